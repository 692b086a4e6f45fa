"""Byte-level BPE tokenizers (Llama 3, GPT-2, Qwen, DBRX …) run by tiktoken.

On text without added tokens, it takes a fifth to a sixth of the CPU time of `tokenizers` (measured with Llama 3's
tokenizer on one thread).

Ranks and pattern come from the tokenizer itself. Whether both libraries give the same ids is tested, on texts that were
chosen to expose differences; a tokenizer that fails, or that tiktoken cannot express, stays with `tokenizers`.
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
"""What the `ByteLevel` pre-tokenizer splits by if it has no pattern of its own."""

TRIED_WORDS = 1 << 14
"""About how many words of the vocabulary are compared."""

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
    """The byte of each letter of byte-level BPE (GPT-2): itself if printable, otherwise letters from U+0100 on."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}


class BytePairEncoder:
    """A tokenizer's ids, computed by tiktoken."""

    def __init__(self, core: tiktoken.Encoding, ids: Ids, normalize: Callable[[str], str] | None) -> None:
        self._core, self._ids, self._normalize = core, ids, normalize
        self.special = frozenset(core.special_tokens_set)

    def encode(self, text: str, special: frozenset[str]) -> Ids:
        """Ids int32 [n] of a text; only the added tokens in `special` are recognized as tokens.

        Raises:
            ValueError: tiktoken cannot split the text (a million spaces in a row, for example).
        """
        if self._normalize is None or text.isascii():
            return self._encode(text, special)
        # Added tokens are found before the text is normalized: what only normalization turns into one stays text.
        parts = re.split(f"({'|'.join(map(re.escape, sorted(special)))})", text) if special else [text]
        plain, tokens = parts[::2], [*parts[1::2], ""]
        pairs = ((self._encode(self._normalize(part), _NONE), token) for part, token in zip(plain, tokens, strict=True))
        return np.concatenate([ids for text_ids, token in pairs for ids in (text_ids, self._encode(token, special))])

    def _encode(self, text: str, special: frozenset[str]) -> Ids:
        return self._ids[self._core.encode_to_numpy(text, allowed_special=special, disallowed_special=())]

    @classmethod
    def of(cls, backend: Any, serialized: str) -> "BytePairEncoder | None":
        """The encoder for a `tokenizers.Tokenizer` and its JSON; None if tiktoken does not give the same ids."""
        try:
            with no_collection():
                parts = orjson.loads(serialized)
                encoder = cls._translate(parts, backend)
                return encoder if encoder is not None and encoder._agrees(backend, parts["model"]) else None
        except BaseException as error:  # a panic of its Rust core is not an Exception
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
        # Tokens with `normalized` are searched for after the others, in the normalized text; tiktoken has one pass.
        plain = plain and len({token["normalized"] for token in parts["added_tokens"]}) <= 1
        # If one token is the beginning of another, tokenizers prefers the longer one; tiktoken takes either.
        if ids is None or not plain or any(longer.startswith(token) for token, longer in pairwise(added)):
            return None
        id_of = {token["content"]: token["id"] for token in parts["added_tokens"]}
        special = {content: len(ranks) + place for place, content in enumerate(added)}
        core = tiktoken.Encoding("tundish", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
        # Not Python's normalization: its version of Unicode may differ.
        normalize = None if normalizer is None else backend.normalizer.normalize_str
        return cls(core, np.array(ids + [id_of[content] for content in added], dtype=np.int32), normalize)

    def _agrees(self, backend: Any, model: Mapping[str, Any]) -> bool:
        added = backend.get_added_tokens_decoder()
        ids = sorted(number for number in model["vocab"].values() if number not in added)
        if not set(ids) <= set(self._ids.tolist()):
            return False  # a token that no merge produces
        words = [
            backend.decode([token], skip_special_tokens=False) for token in ids[:: max(1, len(ids) // TRIED_WORDS)]
        ]
        if model.get("ignore_merges"):
            # Both take a word that is a token as a whole; only longer words show whether the merges are the same.
            words = [word * 2 for word in words]
        specials = sorted(self.special)[:8]
        trials = [*TRIALS, "".join(words), "x ".join(specials), "".join(specials), "".join(TRIALS)]
        return self.agrees_on(trials, backend) and self._agrees_on_words(words, backend)

    def _agrees_on_words(self, words: list[str], backend: Any) -> bool:
        """As `agrees_on`, without added tokens and faster for many short texts."""
        expected = backend.encode_batch_fast(words, add_special_tokens=False)
        plain = words if self._normalize is None else [self._normalize(word) for word in words]
        encode, id_of = self._core.encode_ordinary, self._ids.tolist()
        pairs = zip(plain, expected, strict=True)
        return all([id_of[rank] for rank in encode(word)] == encoding.ids for word, encoding in pairs)

    def agrees_on(self, texts: list[str], backend: Any) -> bool:
        """Whether both libraries give the same ids for these texts, added tokens included."""
        expected = backend.encode_batch_fast(texts, add_special_tokens=False)
        try:
            pairs = zip(texts, expected, strict=True)
            return all(self.encode(text, self.special).tolist() == encoding.ids for text, encoding in pairs)
        except ValueError:
            return False


def _pattern(pre_tokenizer: Mapping[str, Any] | None) -> str | None:
    """The regular expression that splits texts; None if there is not exactly one."""
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
    """The rank of every token's bytes, in the order of merging, and the tokenizer's ids in that order.

    The ids are None if the vocabulary lacks one, or if merges produce a word at several ranks: tiktoken has one.
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
