"""Byte-level BPE tokenizers (Llama 3, GPT-2, Qwen, DBRX …) run by tiktoken: about three times the speed of
`tokenizers` on plain text.

Ranks and pattern are taken from the tokenizer itself. Whether both give the same ids is tested on texts made to
reveal differences; a tokenizer that fails, or that tiktoken cannot express, stays with `tokenizers`.
"""

import re
from collections.abc import Callable, Mapping
from itertools import groupby, pairwise
from typing import Any

import numpy as np
import orjson
import tiktoken
from numpy.typing import NDArray

from tundish.base.workers import no_collection

Ids = NDArray[np.int32]

GPT2_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
"""What the `ByteLevel` pre-tokenizer splits by where it names no pattern."""

TRIED_WORDS = 1 << 14
"""Of the vocabulary, about."""

TRIALS = (
    "",
    " ",
    "\n",
    "Hello, world! It's 2026; they'LL've won't I'D",
    "  two  spaces\t\ttabs \r\n\r\n lines\n\n\n   \n x \u00a0\u3000\u200b\ufeff end  ",
    "1234567890 12 345 6,789.01 ½ ² Ⅷ ٣٤٥ 〇一二",
    "def f(x):\n\treturn x ** 2  # ok\n\n\n```py\n```\n{}[]<>|\\/~`^",
    "naïve café cafe\u0301 Å A\u030a ﬁ ǆ ß İı Ｆｕｌｌ",
    "二加二等于四。日本語テキスト 한국어 ไทย हिन्दी தமிழ் ქართული",
    "מה זה? ما هذا؟ \u202eabc\u202c \u200fשלום\u200e",
    "👩‍👩‍👧‍👦🏳️‍🌈👍🏽 ☕️ 🇩🇪🇫🇷 \U0001fae8 \U000e0001 \U0010fffd \x00\x1f\x7f\x85\u2028",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa bbbbbbb -----======____ !!!??? ......",
    "Donaudampfschifffahrtsgesellschaftskapitän pneumonoultramicroscopicsilicovolcanoconiosis",
    "https://example.org/a?b=c&d=%20#e user@example.org $1.00 €5 C++ O'Brien's 'tis",
)


_NONE = frozenset[str]()


def _byte_letters() -> dict[str, int]:
    """The letter that byte-level BPE writes for each byte: itself if printable, else one from U+0100 on (GPT-2)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}


class BytePairEncoder:
    """A tokenizer's ids, computed by tiktoken."""

    def __init__(self, core: tiktoken.Encoding, ids: Ids, normalize: Callable[[str], str] | None) -> None:
        self._core, self._ids, self._normalize = core, ids, normalize
        self.special = frozenset(core.special_tokens_set)

    def encode(self, text: str, special: frozenset[str]) -> Ids:
        """Ids int32 [n] of a text, in which those of the added tokens that `special` names stand for themselves.

        Raises:
            ValueError: tiktoken cannot split the text (a million blanks in a row, say).
        """
        if self._normalize is None or text.isascii():
            return self._encode(text, special)
        # Added tokens are found before the text is normalized: what becomes one only then is text.
        parts = re.split(f"({'|'.join(map(re.escape, sorted(special)))})", text) if special else [text]
        plain, tokens = parts[::2], [*parts[1::2], ""]
        pairs = ((self._encode(self._normalize(one), _NONE), token) for one, token in zip(plain, tokens, strict=True))
        return np.concatenate([ids for one, token in pairs for ids in (one, self._encode(token, special))])

    def _encode(self, text: str, special: frozenset[str]) -> Ids:
        return self._ids[self._core.encode_to_numpy(text, allowed_special=special, disallowed_special=())]

    @classmethod
    def of(cls, backend: Any, serialized: str) -> "BytePairEncoder | None":
        """For a `tokenizers.Tokenizer` and its JSON; None if tiktoken does not do the same."""
        try:
            with no_collection():
                parts = orjson.loads(serialized)
                encoder = cls._translate(parts, backend)
                return encoder if encoder is not None and encoder._agrees(backend, parts["model"]) else None
        except BaseException as error:  # its core panics, which is no Exception
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            return None

    @classmethod
    def _translate(cls, parts: Mapping[str, Any], backend: Any) -> "BytePairEncoder | None":
        pattern, model = _pattern(parts.get("pre_tokenizer")), parts["model"]
        normalizer = parts.get("normalizer")
        wrong_model = model["type"] != "BPE" or model.get("dropout") or model.get("byte_fallback")
        affixes = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
        if pattern is None or wrong_model or affixes or normalizer not in (None, {"type": "NFC"}):
            return None
        ranks, ids = _ranks(model)
        added = sorted(token["content"] for token in parts["added_tokens"])
        plain = all(not (token["single_word"] or token["lstrip"] or token["rstrip"]) for token in parts["added_tokens"])
        # Those that are looked for in the normalized text are looked for after the others.
        plain = plain and len({token["normalized"] for token in parts["added_tokens"]}) <= 1
        # Of two that begin alike, tokenizers takes the longer one; tiktoken, either.
        if ids is None or not plain or any(longer.startswith(token) for token, longer in pairwise(added)):
            return None
        id_of = {token["content"]: token["id"] for token in parts["added_tokens"]}
        special = {content: len(ranks) + place for place, content in enumerate(added)}
        core = tiktoken.Encoding("tundish", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
        # Not Python's: the two may be of different versions of Unicode.
        normalize = None if normalizer is None else backend.normalizer.normalize_str
        return cls(core, np.array(ids + [id_of[content] for content in added], dtype=np.int32), normalize)

    def _agrees(self, backend: Any, model: Mapping[str, Any]) -> bool:
        added = backend.get_added_tokens_decoder()
        ids = sorted(number for number in model["vocab"].values() if number not in added)
        if not set(ids) <= set(self._ids.tolist()):
            return False  # a token that no merge leads to
        words = [
            backend.decode([token], skip_special_tokens=False) for token in ids[:: max(1, len(ids) // TRIED_WORDS)]
        ]
        if model.get("ignore_merges"):
            words = [word * 2 for word in words]  # a word that is a token is taken whole by both; what of its inside?
        specials = sorted(self.special)[:8]
        trials = [*TRIALS, "".join(words), "x ".join(specials), "".join(specials), "".join(TRIALS)]
        return self.agrees_on(trials, backend) and self._agrees_on_words(words, backend)

    def _agrees_on_words(self, words: list[str], backend: Any) -> bool:
        """`agrees_on`, without added tokens, for many short texts."""
        expected = backend.encode_batch_fast(words, add_special_tokens=False)
        plain = words if self._normalize is None else [self._normalize(word) for word in words]
        encode, id_of = self._core.encode_ordinary, self._ids.tolist()
        pairs = zip(plain, expected, strict=True)
        return all([id_of[rank] for rank in encode(word)] == one.ids for word, one in pairs)

    def agrees_on(self, texts: list[str], backend: Any) -> bool:
        """Whether both give the same ids for these texts, added tokens included."""
        expected = backend.encode_batch_fast(texts, add_special_tokens=False)
        try:
            return all(
                self.encode(text, self.special).tolist() == one.ids for text, one in zip(texts, expected, strict=True)
            )
        except ValueError:
            return False


def _pattern(pre_tokenizer: Mapping[str, Any] | None) -> str | None:
    """The regular expression that texts are split by; None if it takes more than one."""
    match pre_tokenizer:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return GPT2_PATTERN
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            return pattern
        case _:
            return None


def _ranks(model: Mapping[str, Any]) -> tuple[dict[bytes, int], list[int] | None]:
    """Bytes of every token in the order of merging, and the tokenizer's ids in that order.

    None for ids: the vocabulary lacks one, or a word is merged again after others, where tiktoken knows one time.
    """
    letter_of = {byte: letter for letter, byte in _byte_letters().items()}
    merged = ("".join(merge) if isinstance(merge, list) else merge.replace(" ", "", 1) for merge in model["merges"])
    made = [word for word, _ in groupby(merged)]
    words = [*(letter_of[byte] for byte in range(256)), *made]
    ids = [model["vocab"].get(word) for word in words]
    if None in ids or len(set(words)) < len(words):
        return {}, None
    to_bytes = {ord(letter): chr(byte) for byte, letter in letter_of.items()}
    contents = (word.translate(to_bytes).encode("latin-1") for word in words)  # fails where it is not byte-level
    return {content: rank for rank, content in enumerate(contents)}, ids
