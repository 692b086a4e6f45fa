"""data/bpe.py: tiktoken gives the ids of the tokenizer itself, or does not run."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tundish.data.bpe import GPT2_PATTERN, TRIALS, BytePairEncoder
from tundish.data.tokenize import Encoded, Encoder
from tundish.data.tokenizer import load_tokenizer

QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<pad>", "</s>", "<|im_start|>", "<|im_end|>"]
TEXTS = (
    "the quick brown fox jumps over the lazy dog; what is two and two? four. It's 1234567 o'clock, isn't it?",
    "def f(x: int) -> int:\n    if x > 10:\n        return  x ** 2\n\n\n# comment\r\n\tpass\n" * 2,
    "It'S WE'RE we'Ll i'D 'tis it'ſ K's \u212a's O'ſHEA 's's''s ''ll",
    "  two  spaces\t\ttabs \u00a0\u00a0x\u3000 \u200b\u2028\u2029\x85\x1c\x1d\v\f\x00 \ufeff end \r\r\n \n\r ",
    "1 12 123 1234 12345 ½²Ⅷ٣٤٥〇一二三 1\u0660\u06f1\u09e7 x1y22z333 3.14e-10 0x1F",
    "naïve café cafe\u0301 A\u030a\u0323 o\u0323\u0302 \u1100\u1161\u11a8 ｶﾞ ﬁ ǆ ß ŉ İı Ｆｕｌｌ \u0344\u0958",
    "二加二等于四。日本語テキスト한국어ไทย हिन्दी தமிழ் ქართული Ελληνικά Кириллица",
    "מה זה? ما هذا؟ \u202eabc\u202c \u200fשלום\u200e",
    "👩‍👩‍👧‍👦🏳️‍🌈👍🏽☕️🇩🇪🇫🇷\U0001fae8\U000e0001\U0010fffd\ufdd0\uffff",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa -----======____ !!!??? ...... ((((([[[[[ }}}}}; \\\\\\\\ \"\"\"''' ",
    "</s<|im_start|>user\n<|im_end|><|im_end|></s></s> <| im_end |> <|im_start|im_end|> <|IM_END|>",
    "\U00011f50\U0001e4f0\U00010d40\U00016130 1\U00011f502 new digits of old scripts \U00031350\U0001e4d0\U00011f04",
)
FRAGMENTS = [
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "'",
    "'s",
    "'LL",
    "a",
    "B",
    "12",
    "3",
    "é",
    "\u0301",
    "\u0323",
    "中",
    "👍",
    "!",
]
FRAGMENTS += ["_", "\u00a0", "\u3000", "\x85", "\u200d", "ſ", "İ", "ß", "\x00", "<", ">", "|", *SPECIAL]

MakeBackend = Callable[..., Any]


def _train(pre_tokenizer: Any, normalizer: Any = None, special: list[str] = SPECIAL) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend: Any = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    make_trainer: Any = trainers.BpeTrainer  # its stub knows no argument
    trainer = make_trainer(
        vocab_size=1500,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    return backend


def _split(pattern: str) -> Any:
    from tokenizers import Regex, pre_tokenizers

    parts = [
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    return pre_tokenizers.Sequence(parts)


@pytest.fixture(scope="module")
def backends(tiny_model: Path, llama3_tokenizer: Path) -> dict[str, Any]:
    """Byte-level BPE tokenizers by name."""
    from tokenizers import normalizers, pre_tokenizers

    tiny: Any = load_tokenizer(str(tiny_model), "CHAT_COMPLETION")
    llama3: Any = load_tokenizer(str(llama3_tokenizer), "CHAT_COMPLETION")
    return {
        "tiny": tiny.backend_tokenizer,
        "gpt 2": _train(pre_tokenizers.ByteLevel(add_prefix_space=False)),
        "split": _train(_split(QWEN_PATTERN)),
        "nfc": _train(_split(QWEN_PATTERN), normalizers.NFC()),
        "llama 3": llama3.backend_tokenizer,
    }


@pytest.fixture(scope="module")
def fast(backends: dict[str, Any]) -> dict[str, BytePairEncoder]:
    """Each of them by tiktoken."""
    encoders = {name: BytePairEncoder.of(backend, backend.to_str()) for name, backend in backends.items()}
    known = {name: encoder for name, encoder in encoders.items() if encoder is not None}
    assert len(known) == len(backends), "all of these tiktoken can do"
    return known


def _ids(backend: Any, text: str) -> list[int]:
    return backend.encode(text, add_special_tokens=False).ids


NAMES = pytest.mark.parametrize("name", ["tiny", "gpt 2", "split", "nfc", "llama 3"])


@NAMES
def test_texts_that_tell_engines_apart_have_the_same_ids(
    backends: dict[str, Any], fast: dict[str, BytePairEncoder], name: str
) -> None:
    """The model would be trained on tokens that it never gets in use."""
    for text in (*TEXTS, *TRIALS, "".join(TEXTS), "".join(reversed(TEXTS)), *(text[::-1] for text in TEXTS)):
        ids = fast[name].encode(text, fast[name].special)
        assert ids.tolist() == _ids(backends[name], text) and ids.dtype == "int32"
        assert (len(ids) > 0) == bool(text)


@NAMES
def test_any_text_has_the_same_ids(backends: dict[str, Any], fast: dict[str, BytePairEncoder], name: str) -> None:
    """As above, for texts that nobody thought of."""
    lengths: list[int] = []

    @settings(max_examples=200)
    @given(st.text(max_size=40) | st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=3), max_size=16).map("".join))
    @example("<|im_end|>\u0338")
    @example("a\u1ac5\u0323")
    def check(text: str) -> None:
        ids = fast[name].encode(text, fast[name].special).tolist()
        assert ids == _ids(backends[name], text)
        lengths.append(len(ids))

    check()
    assert sum(lengths) > 1000


@pytest.mark.parametrize("name", ["gpt 2", "llama 3"])
def test_every_code_point_has_the_same_ids(
    backends: dict[str, Any], fast: dict[str, BytePairEncoder], name: str
) -> None:
    """The two engines' tables of letters, digits and blanks are of different versions of Unicode."""
    alike = [range(0x3400, 0xA000), range(0xAC00, 0xF900), range(0x17000, 0x18D00)]  # Han, Hangul, surrogates, Tangut
    codes = [code for code in range(0x20000) if not any(code in stretch for stretch in alike)]
    # Several at a time, each among what changes with its kind.
    texts = [
        "".join(f"1{sign}234a{sign}b!!{sign}\n{sign}'s " for sign in map(chr, codes[start : start + 16]))
        for start in range(0, len(codes), 16)
    ]
    expected = backends[name].encode_batch_fast(texts, add_special_tokens=False)
    pairs = zip(texts, expected, strict=True)
    different = [text for text, one in pairs if fast[name].encode(text, frozenset()).tolist() != one.ids]
    assert not [ascii(text) for text in different] and len(texts) > 4000


def test_only_named_tokens_stand_for_themselves(fast: dict[str, BytePairEncoder]) -> None:
    """Text that looks like a control token would become one."""
    encoder = fast["llama 3"]
    both, one, none = (
        encoder.encode("<|eot_id|>x<|eom_id|>", frozenset(names)).tolist()
        for names in (["<|eot_id|>", "<|eom_id|>"], ["<|eom_id|>"], [])
    )
    assert (both[0], both[-1], len(both)) == (128009, 128008, 3)
    assert one[-1] == 128008 and one.count(128009) == 0 and len(one) > 3
    assert not {128008, 128009} & {*none} and len(none) > len(one)


@pytest.mark.parametrize("name", ["gpt 2", "split", "nfc"])
def test_a_combining_sign_after_a_control_token_leaves_it_whole(
    backends: dict[str, Any], fast: dict[str, BytePairEncoder], name: str
) -> None:
    """NFC joins ">" and U+0338 to "≯": normalized as a whole, a text would lose the token that ends a turn."""
    for text in ("four<|im_end|>\u0338 two", "<|im_end|>\u0338", "é<|im_end|>\u0338\u0301</s>\u0338", "e<pad>\u0301"):
        assert fast[name].encode(text, fast[name].special).tolist() == _ids(backends[name], text)


def test_texts_are_normalized_as_the_tokenizer_does_it(
    backends: dict[str, Any], fast: dict[str, BytePairEncoder]
) -> None:
    """Python and the tokenizer know different versions of Unicode, and so another order of combining signs."""
    # Signs that came to Unicode between 1991 and 2021, in 5.1, 7, 8, 10, 11, 12, 13 and 14.
    for sign in "\u0301\u1dcb\u1ab0\u08e3\u0d3b\u07fd\u1abf\u1ac0\u0898\u1ace\u1dfa\U00010eab\U0001193e\U00011070":
        for text in (f"a{sign}\u0323", f"a\u0301{sign}\u0323", f"\u0323{sign}", f"{sign}\u0301a"):
            expected = _ids(backends["nfc"], text)
            assert fast["nfc"].encode(text, frozenset()).tolist() == expected, ascii(text)


def test_a_million_blanks_have_the_tokenizers_ids(tiny_model: Path) -> None:
    """tiktoken gives up on them: one such file would end preparation."""
    encoder = Encoder(load_tokenizer(str(tiny_model), "CONTINUED_PRETRAIN"), "CONTINUED_PRETRAIN", "all")
    assert encoder.engine == "tiktoken"
    text = "a" + " " * 1_000_000 + "b"
    assert encoder._fast is not None
    with pytest.raises(ValueError):
        encoder._fast.encode(text, frozenset())
    encoded, short = cast(list[Encoded], encoder.encode([text, "a b"]))
    expected = encoder.backend.encode(text).ids
    assert encoded.tokens.tolist() == [*expected, encoder.eos] and len(expected) > 1000
    assert short.tokens.tolist() == [*encoder.backend.encode("a b").ids, encoder.eos]


def test_merges_may_be_written_as_text(backends: dict[str, Any]) -> None:
    """Older files have "a b" where newer ones have ["a", "b"]."""
    parts = json.loads(backends["gpt 2"].to_str())
    assert isinstance(parts["model"]["merges"][0], list)
    parts["model"]["merges"] = [" ".join(merge) for merge in parts["model"]["merges"]]
    assert BytePairEncoder.of(backends["gpt 2"], json.dumps(parts)) is not None


# What tiktoken cannot do.


def _model(**settings: Any) -> Callable[[dict[str, Any]], None]:
    return lambda parts: parts["model"].update(settings)


def _parts(**settings: Any) -> Callable[[dict[str, Any]], None]:
    return lambda parts: parts.update(settings)


def _added(*contents: str, **settings: Any) -> Callable[[dict[str, Any]], None]:
    def change(parts: dict[str, Any]) -> None:
        plain = {**parts["added_tokens"][-1], "special": True, "normalized": False}
        first = max(parts["model"]["vocab"].values()) + 1
        parts["added_tokens"] += [
            {**plain, "id": first + number, "content": content, **settings} for number, content in enumerate(contents)
        ]

    return change


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
REFUSED = {
    "dropout": _model(dropout=0.5),
    "byte fallback": _model(byte_fallback=True),
    "prefix": _model(continuing_subword_prefix="##"),
    "suffix": _model(end_of_word_suffix="</w>"),
    "lower case": _parts(normalizer={"type": "Lowercase"}),
    "NFKC": _parts(normalizer={"type": "NFKC"}),
    "several normalizers": _parts(normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}]}),
    "no pre-tokenizer": _parts(pre_tokenizer=None),
    "space before": _parts(pre_tokenizer={**BYTE_LEVEL, "add_prefix_space": True}),
    "no regex": _parts(pre_tokenizer={**BYTE_LEVEL, "use_regex": False}),
    "metaspace": _parts(
        pre_tokenizer={"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True}
    ),
    "digits first": _parts(
        pre_tokenizer={
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL],
        }
    ),
    "two splits": _parts(
        pre_tokenizer={
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": r"\p{N}"}, "behavior": "Isolated", "invert": False},
                {"type": "Split", "pattern": {"Regex": GPT2_PATTERN}, "behavior": "Isolated", "invert": False},
                {**BYTE_LEVEL, "use_regex": False},
            ],
        }
    ),
    "splits that remove": _parts(
        pre_tokenizer={
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": r"\s+"}, "behavior": "Removed", "invert": False},
                {**BYTE_LEVEL, "use_regex": False},
            ],
        }
    ),
    "one token begins another": _added("<|a|>", "<|a|>b", "<|a|>a"),
    "swallows blanks before it": _added("<mask>", lstrip=True),
    "swallows blanks after it": _added("<|end|>", rstrip=True),
    "whole words alone": _added("fox", single_word=True),
}


def _changed(backend: Any, change: Callable[[dict[str, Any]], None]) -> Any:
    from tokenizers import Tokenizer

    parts = json.loads(backend.to_str())
    change(parts)
    return Tokenizer.from_str(json.dumps(parts))


@pytest.mark.parametrize("change", REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("name", ["gpt 2", "split"])
def test_what_tiktoken_cannot_do_stays_with_the_tokenizer(
    backends: dict[str, Any], name: str, change: Callable[[dict[str, Any]], None]
) -> None:
    """Texts would be tokenized by half of the tokenizer's rules, where the trials do not tell."""
    backend = backends[name]
    parts = json.loads(backend.to_str())
    assert BytePairEncoder.of(backend, json.dumps(parts)) is not None
    change(parts)
    # Tried on the unchanged tokenizer, so that it is the rule which refuses, and no trial.
    assert BytePairEncoder.of(backend, json.dumps(parts)) is None


def test_other_kinds_of_tokenizer_stay_as_they_are(mistral_tokenizer: Path) -> None:
    """SentencePiece's, Unigram's and WordPiece's vocabularies have no bytes."""
    from tokenizers import Tokenizer, pre_tokenizers

    models: Any = importlib.import_module("tokenizers.models")  # its stubs ask for what has defaults
    mistral: Any = load_tokenizer(str(mistral_tokenizer), "CHAT_COMPLETION")
    kinds: list[Any] = [
        mistral.backend_tokenizer,
        Tokenizer(models.Unigram([("a", 0.0), ("b", -1.0)])),
        Tokenizer(models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]")),
        Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")),
    ]
    for backend in kinds[1:]:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert [BytePairEncoder.of(backend, backend.to_str()) for backend in kinds] == [None] * 4
    assert Encoder(mistral, "CHAT_COMPLETION", "all").engine == "tokenizers"


def test_added_tokens_that_begin_alike_are_taken_if_none_is_the_other(backends: dict[str, Any]) -> None:
    """Every tokenizer with `<|a|>` and `<|ab|>` would be slow for nothing."""
    backend = _changed(backends["gpt 2"], _added("<|a|>", "<|ab|>", "<|b|>"))
    encoder = BytePairEncoder.of(backend, backend.to_str())
    assert encoder is not None
    text = "<|a|><|ab|><|b|><|abc|> <|a|ab|>"
    assert encoder.encode(text, encoder.special).tolist() == _ids(backend, text)


def _merged(backend: Any, *merges: tuple[str, str]) -> Any:
    """With more merges, as a vocabulary has that was put together from two."""

    def change(parts: dict[str, Any]) -> None:
        model, added = parts["model"], parts["added_tokens"]
        numbers = [*model["vocab"].values(), *(token["id"] for token in added)]
        for merge in merges:
            model["merges"].append(list(merge))
            model["vocab"].setdefault("".join(merge), max(numbers) + 1)
            numbers.append(model["vocab"]["".join(merge)])

    return _changed(backend, change)


def _begin_with(*merges: tuple[str, str]) -> Any:
    """A tokenizer of bytes, special tokens and a few merges."""
    from tokenizers import pre_tokenizers

    letters = _changed(_train(pre_tokenizers.ByteLevel(add_prefix_space=False)), lambda parts: None)

    def change(parts: dict[str, Any]) -> None:
        model = parts["model"]
        model["merges"] = []
        model["vocab"] = {word: number for word, number in model["vocab"].items() if len(word) == 1 or word in SPECIAL}

    return _merged(_changed(letters, change), *merges)


def test_a_pattern_that_the_engines_read_differently_is_found_out(backends: dict[str, Any]) -> None:
    """`^` is the beginning of a line to one and of the text to the other; what no pattern takes is kept or dropped."""
    for pattern in (r"^\s+|\w+|\W", r"\p{L}+", r"\p{L}+|\p{N}+| ?[^\s\p{L}\p{N}]+|[ \t\n\r]+"):
        backend = _train(_split(pattern))
        serialized = backend.to_str()
        assert BytePairEncoder._translate(json.loads(serialized), backend) is not None, "nothing in its file tells"
        assert BytePairEncoder.of(backend, backend.to_str()) is None


@pytest.mark.parametrize("pattern", [r"\X|\s+", r"\w+|$"], ids=["unknown", "empty"])
def test_a_pattern_that_tiktoken_does_not_know_is_no_obstacle(pattern: str) -> None:
    """A model whose pattern only Oniguruma reads could not be trained at all."""
    backend = _train(_split(pattern))
    assert BytePairEncoder.of(backend, backend.to_str()) is None


def test_merges_that_no_bytes_spell_are_no_obstacle(backends: dict[str, Any]) -> None:
    """A vocabulary with words of another alphabet than that of bytes could not be trained at all."""

    def change(parts: dict[str, Any]) -> None:
        first = max(parts["model"]["vocab"].values()) + 1
        parts["model"]["vocab"] |= {"▁": first, "▁▁": first + 1}
        parts["model"]["merges"].append(["▁", "▁"])

    backend = _changed(backends["gpt 2"], change)
    assert BytePairEncoder.of(backend, backend.to_str()) is None


HELLO = [("l", "o"), ("H", "e"), ("He", "l"), ("Hel", "l"), ("Hell", "o")]
ZEBRA = [("r", "a"), ("z", "e"), ("ze", "b"), ("zeb", "r"), ("zebr", "a")]


@pytest.mark.parametrize(("merges", "word"), [(HELLO, "Hello"), (ZEBRA, "zebra")], ids=["Hello", "zebra"])
def test_a_word_that_no_order_of_merges_reaches_is_found_out(merges: list[tuple[str, str]], word: str) -> None:
    """tiktoken takes any two tokens whose bytes are a third: it would give the word that the tokenizer never makes."""
    backend = _begin_with(*merges)
    assert len(_ids(backend, word)) > 1 and backend.token_to_id(word) is not None
    assert BytePairEncoder.of(backend, backend.to_str()) is None
    # The rest of the merges is well: without the last one, nothing is wrong.
    backend = _begin_with(*merges[:-1])
    assert BytePairEncoder.of(backend, backend.to_str()) is not None


def test_words_without_merges_are_found_out() -> None:
    """With `ignore_merges` a word of the vocabulary is taken whole, whether merges lead to it or not."""

    def change(parts: dict[str, Any]) -> None:
        parts["model"]["ignore_merges"] = True
        parts["model"]["vocab"]["zebra"] = max(parts["model"]["vocab"].values()) + 1

    backend = _changed(_begin_with(*ZEBRA[:2]), change)
    assert _ids(backend, "zebra") == [backend.token_to_id("zebra")]
    assert BytePairEncoder.of(backend, backend.to_str()) is None


def test_words_that_are_only_taken_whole_are_found_out() -> None:
    """With `ignore_merges` "zebra" is a token and "zebras" is none: there tiktoken would make the word of its parts."""

    def change(parts: dict[str, Any]) -> None:
        parts["model"]["ignore_merges"] = True

    backend = _changed(_begin_with(*ZEBRA), change)
    assert _ids(backend, "zebra") == [backend.token_to_id("zebra")]
    assert backend.token_to_id("zebra") not in _ids(backend, "zebras")
    assert BytePairEncoder.of(backend, backend.to_str()) is None


def test_a_word_with_two_merges_is_made_when_the_tokenizer_makes_it() -> None:
    """tiktoken knows one time for a word: the first, at which the tokenizer may have none of its parts."""
    # "kwj" is made early of k + wj, which never meet, and late of kw + j; before that, j goes to "jp". "qq" stands
    # between the two words in the vocabulary: side by side, they would be found out by luck.
    backend = _begin_with(("k", "w"), ("w", "j"), ("k", "wj"), ("q", "q"), ("j", "p"), ("kw", "j"))
    assert [len(_ids(backend, text)) for text in ("kw", "wj", "kwj", "jp")] == [1] * 4, "every word is reached"
    encoder = BytePairEncoder.of(backend, backend.to_str())
    for text in ("kwj", "kwjp", "xkwjpx"):
        assert encoder is None or encoder.encode(text, frozenset()).tolist() == _ids(backend, text)


def test_added_tokens_that_overlap_are_found_in_the_tokenizers_order(backends: dict[str, Any]) -> None:
    """The tokenizer looks for special tokens first; tiktoken takes whatever begins first."""

    def change(parts: dict[str, Any]) -> None:
        _added("</x>")(parts)
        _added("abc</", special=False, normalized=True)(parts)
        parts["added_tokens"][-1]["id"] += 1

    backend = _changed(backends["gpt 2"], change)
    encoder = BytePairEncoder.of(backend, backend.to_str())
    text = "abc</x>"
    assert backend.token_to_id("</x>") in _ids(backend, text)
    assert encoder is None or encoder.encode(text, encoder.special).tolist() == _ids(backend, text)


def test_the_data_decides_in_the_end(tiny_model: Path) -> None:
    """An engine that differs on the very data would be used because it passed the trials."""
    encoder = Encoder(load_tokenizer(str(tiny_model), "INSTRUCTION_FINETUNE"), "INSTRUCTION_FINETUNE", "all")
    pairs = [("the quick brown fox", "jumps"), ("two?", "zebra")]
    expected = [encoded.tokens.tolist() for encoded in cast(list[Encoded], encoder.encode(pairs))]
    other = _begin_with(("z", "e"))
    liar = BytePairEncoder.of(other, other.to_str())
    assert liar is not None and not liar.agrees_on(["zebra"], encoder.backend)

    encoder.prove(pairs)
    assert encoder.engine == "tiktoken", "the honest one stays"
    encoder._fast = liar
    encoder.prove([])
    assert encoder.engine == "tiktoken"
    encoder.prove(pairs)
    assert encoder.engine == "tokenizers"
    assert [encoded.tokens.tolist() for encoded in cast(list[Encoded], encoder.encode(pairs))] == expected
