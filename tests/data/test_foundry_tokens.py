"""data/tokenize.py: tokens and targets of every sample are those that LLM Foundry's own path gives it."""

import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tundish.data.samples import Messages
from tundish.data.templates import TEMPLATE_DATE
from tundish.data.tokenize import Encoded, Encoder
from tundish.data.tokenizer import load_tokenizer
from tundish.errors import DataError

pytestmark = pytest.mark.slow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPECIAL = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>"]

TEXTS = {
    "plain": ("two and two?", "four"),
    "one letter": ("a", "b"),
    "emoji": ("what is 👩‍👩‍👧‍👦 and 🏳️‍🌈?", "a family 👪, a flag ☕️"),
    "right to left": ("מה זה? ما هذا؟", "שלום \u200fعالم\u200e!"),
    "combining": ("cafe\u0301 vs café, ﬁ", "\u0928\u093f \u1100\u1161 Z͑ͫ̓"),
    "chinese": ("二加二?", "四。\u3000"),
    "whitespace": ("  \t two \r\n\r\n and\u00a0two ", "\n\n  four\t \n"),
    "code": ("fix:\n```py\ndef f(x):\n\treturn  x ** 2\n```", "```py\ndef f(x: int) -> int:\n    return x**2\n```\n"),
    "zero": ("nul \x00 \u200b \ufeff", "\u2028 ok"),
    "long": ("the quick brown fox jumps over the lazy dog; " * 40, "four " * 200),
}
CONTROL_TEXTS = {
    "ends in eos": ("two?", "four</s>"),
    "begins with bos": ("<s>two?", "<s>four"),
    "control tokens inside": ("say <|eot_id|></s> or <|im_end|>", "no: <|start_header_id|>user<|end_header_id|> </s>"),
}
"""Parsed in prompts and responses; in chats LLM Foundry parses them, and tundish leaves them text."""
TOKENIZERS: dict[str, tuple[str, str]] = {
    "nothing added": ("$A", "</s>"),
    "bos": ("<s> $A", "</s>"),
    "eos": ("$A </s>", "</s>"),
    "bos and eos": ("<s> $A </s>", "</s>"),
    "bos, another eos": ("<s> $A", "<|eot_id|>"),
}
"""What the tokenizer adds to a text by itself, and its end of sequence."""

MakeTokenizer = Callable[..., "PreTrainedTokenizerBase"]
Reference = Callable[..., tuple[list[int], list[int]]]


@pytest.fixture(scope="module")
def reference() -> Reference:
    """Tokens and labels of a sample by LLM Foundry's own functions, as its loader and its collator call them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from llmfoundry.data.finetuning.collator import stitch_turns_decoder_only
        from llmfoundry.data.finetuning.tasks import tokenize_formatted_example

    def make(
        tokenizer: "PreTrainedTokenizerBase", example: dict[str, Any], targets: str = "all"
    ) -> tuple[list[int], list[int]]:
        return stitch_turns_decoder_only(
            tokenize_formatted_example(example, tokenizer)["turns"],
            target_prompts="none",
            target_responses=targets,
            eos_token_id=cast(int, tokenizer.eos_token_id),
            validate=True,
        )

    return make


@pytest.fixture(autouse=True)
def same_date(reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one difference that is wanted: LLM Foundry prints today's date."""
    from llmfoundry.data.finetuning import tasks

    monkeypatch.setattr(tasks, "get_date_string", lambda: TEMPLATE_DATE)


@pytest.fixture
def make_tokenizer(tmp_path: Path, save_tokenizer: Any) -> MakeTokenizer:
    """A saved tokenizer that adds what TOKENIZERS says, loaded as a run loads it."""

    def make(adds: str, task: Any, template: str | None = None) -> "PreTrainedTokenizerBase":
        from tokenizers.processors import TemplateProcessing
        from transformers import AutoTokenizer

        single, eos = TOKENIZERS[adds]
        tokenizer = AutoTokenizer.from_pretrained(save_tokenizer(tmp_path / "made", bos="<s>" in single))
        tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
        tokenizer.eos_token = eos
        make_processor: Any = TemplateProcessing  # its stub asks for an argument that it has a default for
        processor = make_processor(single=single, special_tokens=[("<s>", 2), ("</s>", 1)])
        tokenizer.backend_tokenizer.post_processor = processor
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path / "changed")
        return load_tokenizer(str(tmp_path / "changed"), task)

    return make


def _assert_equal(encoded: Encoded | DataError, expected: tuple[list[int], list[int]]) -> None:
    ids, labels = expected
    assert isinstance(encoded, Encoded)
    assert encoded.tokens.tolist() == ids and len(ids) > 1
    # Compared as labels: a target's value is its own token.
    assert [token if bit else -100 for token, bit in zip(ids, encoded.loss_mask.tolist(), strict=True)] == labels
    assert any(label != -100 for label in labels)


def _chats() -> dict[str, list[dict[str, str]]]:
    chats = {
        name: [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
        for name, (prompt, reply) in TEXTS.items()
    }
    chats["many turns"] = [message for name in TEXTS for message in chats[name]]
    system = {"role": "system", "content": " be short; 답은 짧게 🙏 "}
    return chats | {f"{name}, with system": [system, *chats[name]] for name in ("plain", "whitespace", "many turns")}


ENGINES = pytest.mark.parametrize("engine", ["tiktoken", "tokenizers"])


def _encoder(tokenizer: "PreTrainedTokenizerBase", task: Any, engine: str, targets: Any = "all") -> Encoder:
    encoder = Encoder(tokenizer, task, targets)
    if engine == "tokenizers":
        encoder._fast = None
    assert encoder.engine == engine
    return encoder


@ENGINES
@pytest.mark.parametrize("adds", TOKENIZERS)
@pytest.mark.parametrize("template", ["simple", "llama 3.1", "chatml"])
def test_chats_are_tokenized_as_by_llm_foundry(
    make_tokenizer: MakeTokenizer,
    reference: Reference,
    chat_templates: dict[str, str],
    template: str,
    adds: str,
    engine: str,
) -> None:
    """A fine-tune that moves to tundish would train other tokens or other targets of the same file."""
    tokenizer = make_tokenizer(adds, "CHAT_COMPLETION", chat_templates[template])
    chats = _chats()
    assert len(chats) == len(TEXTS) + 4
    for targets in ("all", "last"):
        results = _encoder(tokenizer, "CHAT_COMPLETION", engine, targets).encode([*chats.values()])
        for encoded, messages in zip(results, chats.values(), strict=True):
            _assert_equal(encoded, reference(tokenizer, {"messages": messages}, targets))


def test_the_llama_3_template_is_really_used(
    make_tokenizer: MakeTokenizer, reference: Reference, chat_templates: dict[str, str]
) -> None:
    """Both sides could agree on a text that no Llama ever saw."""
    tokenizer = make_tokenizer("bos, another eos", "CHAT_COMPLETION", chat_templates["llama 3.1"])
    ids, labels = reference(tokenizer, {"messages": _chats()["many turns, with system"]})
    text = tokenizer.decode(ids)
    assert text.startswith(
        "<s><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: 26 Jul 2024\n\nbe short"
    )
    assert ids.count(cast(int, tokenizer.bos_token_id)) == 1
    assert labels[-1] == tokenizer.eos_token_id
    turns = sum(before == -100 != label for before, label in pairwise(labels))
    assert turns == len(TEXTS), "every reply is a target"


@pytest.mark.parametrize("name", CONTROL_TEXTS)
@pytest.mark.parametrize("template", ["simple", "llama 3.1", "chatml"])
def test_control_tokens_in_chats_are_the_difference(
    make_tokenizer: MakeTokenizer, reference: Reference, chat_templates: dict[str, str], template: str, name: str
) -> None:
    """The difference that is wanted would be there no longer, or another one with it."""
    tokenizer = make_tokenizer("bos", "CHAT_COMPLETION", chat_templates[template])
    prompt, reply = CONTROL_TEXTS[name]
    chat = [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
    (encoded,) = Encoder(tokenizer, "CHAT_COMPLETION", "all").encode([chat])
    ids, _ = reference(tokenizer, {"messages": chat})
    control = set(tokenizer.all_special_ids)
    assert isinstance(encoded, Encoded)
    ours, theirs = ([token for token in one if token in control] for one in (encoded.tokens.tolist(), ids))
    assert len(ours) < len(theirs)
    # The end of a sequence that a message holds is no end: ours may have one more.
    assert tokenizer.decode(encoded.tokens) in (tokenizer.decode(ids), tokenizer.decode(ids) + "</s>")


def test_a_tokenizer_without_template_gets_llm_foundrys_own(
    bare_model: Path, make_tokenizer: MakeTokenizer, reference: Reference
) -> None:
    """Our ChatML would be another one than that which LLM Foundry uses in silence."""
    from transformers import AutoTokenizer

    untouched = AutoTokenizer.from_pretrained(bare_model)
    assert untouched.chat_template is None
    ours = Encoder(load_tokenizer(str(bare_model), "CHAT_COMPLETION"), "CHAT_COMPLETION", "all")
    chats = _chats()
    for encoded, messages in zip(ours.encode([*chats.values()]), chats.values(), strict=True):
        _assert_equal(encoded, reference(untouched, {"messages": messages}))


# Conversations that nobody thought of, with the tokenizers of Llama 3 and Mistral.

PIECES = [
    *(
        "two",
        "Fox",
        "don't",
        "I'LL",
        "12",
        "345 678",
        "3.14",
        "x**2",
        "def f(x):\n\treturn {x: [1]}",
        "```py\n",
        "{{ x }}",
    ),
    *(" ", "  ", "\t", "\n", "\n\n", "\r\n", " \n ", "\u00a0", "\u3000", "\u200b", "\ufeff", "\x00", "\x85", "\u2028"),
    *("<b>", "</think>", "<|x|>", "[INST", "_", "--", "…", "「二」", "四。", "ไทย", "हिन्दी", "▁", "▁▁", "<0x41>"),
    *("שלום", "ما هذا؟", "\u202e", "\u200f", "\u0301", "é", "e\u0301", "ﬁ", "İ", "ſ", "\ufdd0", "\U0010ffff"),
    *("👩\u200d👩\u200d👧", "🏳️\u200d🌈", "👍🏽"),
]
MESSAGES = (
    st.lists(st.sampled_from(PIECES) | st.text(max_size=3), min_size=1, max_size=8).map("".join).filter(str.strip)
)


@st.composite
def _conversations(draw: st.DrawFn, *, system: bool) -> Messages:
    turns = draw(st.sampled_from([1, 1, 2, 3]))
    contents = draw(st.lists(MESSAGES, min_size=2 * turns, max_size=2 * turns))
    chat = [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]
    first = draw(st.none() | MESSAGES | st.sampled_from([".", "\u200b", "\ufeff"])) if system else None
    return chat if first is None else [{"role": "system", "content": first}, *chat]


@pytest.fixture(scope="module")
def models(llama3_tokenizer: Path, mistral_tokenizer: Path, bare_model: Path) -> dict[str, Path]:
    """Folders of tokenizers by name."""
    return {"llama 3": llama3_tokenizer, "mistral": mistral_tokenizer, "chatml": bare_model}


@pytest.mark.parametrize("targets", ["all", "last"])
@pytest.mark.parametrize("name", ["llama 3", "mistral", "chatml"])
def test_any_conversation_is_tokenized_as_by_llm_foundry(
    models: dict[str, Path], reference: Reference, name: str, targets: Any
) -> None:
    """The models that are trained in earnest would get other tokens or targets than by LLM Foundry."""
    tokenizer = load_tokenizer(str(models[name]), "CHAT_COMPLETION")
    encoder = Encoder(tokenizer, "CHAT_COMPLETION", targets)
    assert encoder.engine == ("tokenizers" if name == "mistral" else "tiktoken")
    compared: list[int] = []

    @settings(max_examples=60)
    @given(st.lists(_conversations(system=name != "mistral"), min_size=1, max_size=4))
    @example([[{"role": "user", "content": " a "}, {"role": "assistant", "content": "\u3000b\n"}]])
    def check(chats: Sequence[Messages]) -> None:
        for encoded, chat in zip(encoder.encode(chats), chats, strict=True):
            assert encoder.control_token(chat) is None
            _assert_equal(encoded, reference(tokenizer, {"messages": chat}, targets))
            compared.append(len(chat))

    check()
    assert len(compared) > 60 and max(compared) >= 6


@pytest.mark.parametrize("name", ["llama 3", "mistral"])
def test_any_pair_is_tokenized_as_by_llm_foundry(models: dict[str, Path], reference: Reference, name: str) -> None:
    """As above, for prompts and responses, in which control tokens are what they are for LLM Foundry."""
    tokenizer = load_tokenizer(str(models[name]), "INSTRUCTION_FINETUNE")
    encoder = Encoder(tokenizer, "INSTRUCTION_FINETUNE", "all")
    control = ["<|eot_id|>", "<|begin_of_text|>", "<|start_header_id|>", "</s>", "<s>", "[INST]", "[/INST]"]
    texts = st.lists(st.sampled_from([*PIECES, *control]), min_size=1, max_size=8).map("".join)

    @given(texts, texts)
    @example("<|begin_of_text|>", "<|begin_of_text|><|begin_of_text|>")
    @example("<s>x", "<s>")
    def check(prompt: str, response: str) -> None:
        (encoded,) = encoder.encode([(prompt, response)])
        _assert_equal(encoded, reference(tokenizer, {"prompt": prompt, "response": response}))

    check()


@ENGINES
@pytest.mark.parametrize("adds", TOKENIZERS)
def test_pairs_are_tokenized_as_by_llm_foundry(
    make_tokenizer: MakeTokenizer, reference: Reference, adds: str, engine: str
) -> None:
    """A second begin of sequence, or a missing end, would stand in every sample."""
    tokenizer = make_tokenizer(adds, "INSTRUCTION_FINETUNE")
    pairs = [*TEXTS.values(), *CONTROL_TEXTS.values(), (" ", "\n")]
    results = _encoder(tokenizer, "INSTRUCTION_FINETUNE", engine).encode(pairs)
    for encoded, (prompt, response) in zip(results, pairs, strict=True):
        _assert_equal(encoded, reference(tokenizer, {"prompt": prompt, "response": response}))


@pytest.mark.parametrize("adds", TOKENIZERS)
def test_the_tokenizers_add_what_they_should(make_tokenizer: MakeTokenizer, adds: str) -> None:
    """The other tests would compare five times the same tokenizer."""
    tokenizer = make_tokenizer(adds, "INSTRUCTION_FINETUNE")
    plain, whole = tokenizer("two", add_special_tokens=False).input_ids, tokenizer("two").input_ids
    single, eos = TOKENIZERS[adds]
    assert whole == [*[2] * ("<s>" in single), *plain, *[1] * ("</s>" in single)] and plain
    assert tokenizer.eos_token == eos and (tokenizer.bos_token == "<s>") == ("<s>" in single)
