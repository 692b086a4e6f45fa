"""data/tokenize.py: tokens and targets of every sample are those that LLM Foundry's own path gives it."""

import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tundish.data.tokenize import CHATML, TEMPLATE_DATE, encode, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LLAMA_3 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] | trim %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "<|start_header_id|>system<|end_header_id|>\n\nToday Date: {{ date_string }}\n\n{{ system }}<|eot_id|>"
    "{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
"""What of Llama 3.1's own template decides tokens: begin of text, headers, the date, stripped contents."""
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
    "ends in eos": ("two?", "four</s>"),
    "begins with bos": ("<s>two?", "<s>four"),
    "special tokens inside": ("say <|eot_id|></s> or <|im_end|>", "no: <|start_header_id|>user<|end_header_id|> </s>"),
    "zero": ("nul \x00 \u200b \ufeff", "\u2028 ok"),
    "long": ("the quick brown fox jumps over the lazy dog; " * 40, "four " * 200),
}
TOKENIZERS: dict[str, tuple[str, str]] = {
    "nothing added": ("$A", "</s>"),
    "bos": ("<s> $A", "</s>"),
    "eos": ("$A </s>", "</s>"),
    "bos and eos": ("<s> $A </s>", "</s>"),
    "bos, another eos": ("<s> $A", "<|eot_id|>"),
}
"""What the tokenizer adds to a text by itself, and its end of sequence."""

MakeTokenizer = Callable[..., "PreTrainedTokenizerBase"]
Reference = Callable[["PreTrainedTokenizerBase", dict[str, Any]], tuple[list[int], list[int]]]


@pytest.fixture(scope="module")
def reference() -> Reference:
    """Tokens and labels of a sample by LLM Foundry's own functions, as its loader and its collator call them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from llmfoundry.data.finetuning.collator import stitch_turns_decoder_only
        from llmfoundry.data.finetuning.tasks import tokenize_formatted_example

    def make(tokenizer: "PreTrainedTokenizerBase", example: dict[str, Any]) -> tuple[list[int], list[int]]:
        return stitch_turns_decoder_only(
            tokenize_formatted_example(example, tokenizer)["turns"],
            target_prompts="none",
            target_responses="all",
            eos_token_id=tokenizer.eos_token_id,
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
        processor = TemplateProcessing(single=single, special_tokens=[("<s>", 2), ("</s>", 1)])
        tokenizer.backend_tokenizer.post_processor = processor
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path / "changed")
        return load_tokenizer(str(tmp_path / "changed"), task)

    return make


def _assert_equal(encoded: Any, expected: tuple[list[int], list[int]]) -> None:
    ids, labels = expected
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


def _simple_template(model: Path) -> str:
    from transformers import AutoTokenizer

    template = AutoTokenizer.from_pretrained(model).chat_template
    assert isinstance(template, str)
    return template


@pytest.mark.parametrize("adds", TOKENIZERS)
@pytest.mark.parametrize("template", ["simple", "llama 3", "chatml"])
def test_chats_are_tokenized_as_by_llm_foundry(
    make_tokenizer: MakeTokenizer, reference: Reference, tiny_model: Path, template: str, adds: str
) -> None:
    """A fine-tune that moves to tundish would train other tokens or other targets of the same file."""
    text = {"simple": _simple_template(tiny_model), "llama 3": LLAMA_3, "chatml": CHATML}[template]
    tokenizer = make_tokenizer(adds, "CHAT_COMPLETION", text)
    chats = _chats()
    assert len(chats) == len(TEXTS) + 4
    for encoded, messages in zip(encode(tokenizer, [*chats.values()], "CHAT_COMPLETION"), chats.values(), strict=True):
        _assert_equal(encoded, reference(tokenizer, {"messages": messages}))


def test_the_llama_3_template_is_really_used(make_tokenizer: MakeTokenizer, reference: Reference) -> None:
    """Both sides could agree on a text that no Llama ever saw."""
    tokenizer = make_tokenizer("bos, another eos", "CHAT_COMPLETION", LLAMA_3)
    ids, labels = reference(tokenizer, {"messages": _chats()["many turns, with system"]})
    text = tokenizer.decode(ids)
    assert text.startswith("<s><|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\nbe short")
    assert ids.count(tokenizer.bos_token_id) == 3, "the template's own, and two of the texts"
    assert labels[-1] == tokenizer.eos_token_id
    turns = sum(before == -100 != label for before, label in pairwise(labels))
    assert turns == len(TEXTS), "every reply is a target"


def test_a_tokenizer_without_template_gets_llm_foundrys_own(
    bare_model: Path, make_tokenizer: MakeTokenizer, reference: Reference
) -> None:
    """Our ChatML would be another one than that which LLM Foundry uses in silence."""
    from transformers import AutoTokenizer

    untouched = AutoTokenizer.from_pretrained(bare_model)
    assert untouched.chat_template is None
    ours = load_tokenizer(str(bare_model), "CHAT_COMPLETION")
    chats = _chats()
    for encoded, messages in zip(encode(ours, [*chats.values()], "CHAT_COMPLETION"), chats.values(), strict=True):
        _assert_equal(encoded, reference(untouched, {"messages": messages}))


@pytest.mark.parametrize("adds", TOKENIZERS)
def test_pairs_are_tokenized_as_by_llm_foundry(make_tokenizer: MakeTokenizer, reference: Reference, adds: str) -> None:
    """A second begin of sequence, or a missing end, would stand in every sample."""
    tokenizer = make_tokenizer(adds, "INSTRUCTION_FINETUNE")
    pairs = [*TEXTS.values(), (" ", "\n")]
    for encoded, (prompt, response) in zip(encode(tokenizer, pairs, "INSTRUCTION_FINETUNE"), pairs, strict=True):
        _assert_equal(encoded, reference(tokenizer, {"prompt": prompt, "response": response}))


@pytest.mark.parametrize("adds", TOKENIZERS)
def test_the_tokenizers_add_what_they_should(make_tokenizer: MakeTokenizer, adds: str) -> None:
    """The other tests would compare five times the same tokenizer."""
    tokenizer = make_tokenizer(adds, "INSTRUCTION_FINETUNE")
    plain, whole = tokenizer("two", add_special_tokens=False).input_ids, tokenizer("two").input_ids
    single, eos = TOKENIZERS[adds]
    assert whole == [*[2] * ("<s>" in single), *plain, *[1] * ("</s>" in single)] and plain
    assert tokenizer.eos_token == eos and (tokenizer.bos_token == "<s>") == ("<s>" in single)
