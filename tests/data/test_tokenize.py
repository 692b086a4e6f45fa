"""data/tokenize.py: each sample's tokens, and which of them are targets."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tundish.data.tokenize import CHATML, TEMPLATE_DATE, encode, load_tokenizer, tokenizer_digest
from tundish.errors import DataError, SpecError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHAT = [
    {"role": "system", "content": "be short"},
    {"role": "user", "content": "two and two?"},
    {"role": "assistant", "content": "four"},
    {"role": "user", "content": "and café?"},
    {"role": "assistant", "content": "naïve ☕"},
]


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> "PreTrainedTokenizerBase":
    """The tiny model's tokenizer."""
    return load_tokenizer(str(tiny_model), "CHAT_COMPLETION")


def _texts(tokenizer: "PreTrainedTokenizerBase", encoded: Any) -> tuple[str, str]:
    """The whole text and the text of the targets."""
    return tokenizer.decode(encoded.tokens), tokenizer.decode(encoded.tokens[encoded.loss_mask == 1])


def test_every_reply_of_a_chat_is_a_target(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Only the last reply would be trained, or questions would be, or the model never learn to stop."""
    (encoded,) = encode(tokenizer, [CHAT], "CHAT_COMPLETION")
    whole, targets = _texts(tokenizer, encoded)
    expected = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert whole == f"{expected}</s>"
    assert targets == "four</s>\nnaïve ☕</s>\n</s>"
    assert encoded.tokens.dtype == "int32" and encoded.loss_mask.dtype == "uint8"
    assert len(encoded.tokens) == len(encoded.loss_mask) > 0


def test_the_response_of_a_pair_is_the_target(tokenizer: "PreTrainedTokenizerBase") -> None:
    """The prompt would be trained, a template applied, or the end of the answer not learnt."""
    (encoded,) = encode(tokenizer, [("two and two? ", "four ☕")], "INSTRUCTION_FINETUNE")
    assert _texts(tokenizer, encoded) == ("two and two? four ☕</s>", "four ☕</s>")


def test_all_of_a_text_is_target(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raw text would be trained in part, or run into the next one without an end."""
    (encoded,) = encode(tokenizer, ["the quick\nbrown fox"], "CONTINUED_PRETRAIN")
    assert _texts(tokenizer, encoded) == ("the quick\nbrown fox</s>",) * 2


def test_the_end_of_a_sequence_is_not_doubled(tokenizer: "PreTrainedTokenizerBase") -> None:
    """The model would learn to end twice."""
    (encoded,) = encode(tokenizer, [("two?", "four</s>")], "INSTRUCTION_FINETUNE")
    assert encoded.tokens.tolist().count(tokenizer.eos_token_id) == 1


def test_a_pair_begins_once(tmp_path: Path, save_tokenizer: Any) -> None:
    """A second beginning-of-sequence token would stand in the middle of every sample of a Llama."""
    tokenizer = load_tokenizer(str(save_tokenizer(tmp_path / "bos", bos=True)), "INSTRUCTION_FINETUNE")
    (encoded,) = encode(tokenizer, [("two?", "four")], "INSTRUCTION_FINETUNE")
    assert tokenizer.bos_token_id == encoded.tokens[0]
    assert encoded.tokens.tolist().count(tokenizer.bos_token_id) == 1
    assert _texts(tokenizer, encoded) == ("<s>two?four</s>", "four</s>")
    (text,) = encode(tokenizer, ["two?"], "CONTINUED_PRETRAIN")
    assert tokenizer.decode(text.tokens) == "<s>two?</s>"


def test_samples_do_not_depend_on_their_neighbours(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Tokens of one chat would be counted to another: a batch must be what its samples are alone."""
    chats = [CHAT, CHAT[:3], CHAT[1:], CHAT[1:3]]
    together = encode(tokenizer, chats, "CHAT_COMPLETION")
    alone = [encode(tokenizer, [chat], "CHAT_COMPLETION")[0] for chat in chats]
    assert len(together) == 4
    for one, other in zip(together, alone, strict=True):
        assert one.tokens.tolist() == other.tokens.tolist() and one.loss_mask.tolist() == other.loss_mask.tolist()
    assert encode(tokenizer, [], "CHAT_COMPLETION") == encode(tokenizer, [], "CONTINUED_PRETRAIN") == []


def test_long_samples_are_not_cut_here(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Truncation would happen before it is counted."""
    tokenizer.model_max_length = 16
    (encoded,) = encode(tokenizer, ["fox " * 1000], "CONTINUED_PRETRAIN")
    assert len(encoded.tokens) > 1000


def test_a_tokenizer_without_template_gets_chatml_for_chats_only(bare_model: Path) -> None:
    """Chats would fail; or a template that nobody asked for be saved with an instruction model."""
    tokenizer = load_tokenizer(str(bare_model), "CHAT_COMPLETION")
    assert tokenizer.chat_template == CHATML
    (encoded,) = encode(tokenizer, [CHAT[1:3]], "CHAT_COMPLETION")
    whole, targets = _texts(tokenizer, encoded)
    assert whole == "<|im_start|>user\ntwo and two?<|im_end|>\n<|im_start|>assistant\nfour<|im_end|>\n</s>"
    assert targets == "four<|im_end|>\n</s>"
    assert load_tokenizer(str(bare_model), "INSTRUCTION_FINETUNE").chat_template is None


def test_a_template_that_prints_the_date_gets_a_fixed_one(
    tokenizer: "PreTrainedTokenizerBase", monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same data would give other tokens tomorrow."""
    monkeypatch.setattr(
        tokenizer,
        "chat_template",
        "{{ date_string }}\n{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}",
    )
    (encoded,) = encode(tokenizer, [CHAT[1:3]], "CHAT_COMPLETION")
    assert tokenizer.decode(encoded.tokens).startswith(TEMPLATE_DATE)


def test_a_template_that_refuses_a_chat_is_an_error_of_the_data(
    tokenizer: "PreTrainedTokenizerBase", monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run would end in a traceback of the template engine."""
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('no system, please') }}")
    with pytest.raises(DataError, match=r"the model's chat template refuses the conversation: no system, please\."):
        encode(tokenizer, [CHAT], "CHAT_COMPLETION")


def test_a_template_that_rewrites_earlier_turns_is_refused(
    tokenizer: "PreTrainedTokenizerBase", monkeypatch: pytest.MonkeyPatch
) -> None:
    """Targets would be marked in the wrong places."""
    template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(DataError, match="rewrites earlier turns, so a reply cannot be told from its prompt"):
        encode(tokenizer, [CHAT], "CHAT_COMPLETION")


def test_the_digest_tells_whatever_changes_tokens(
    tokenizer: "PreTrainedTokenizerBase", tiny_model: Path, bare_model: Path
) -> None:
    """Data tokenized for one model would be reused for another."""
    again = load_tokenizer(str(tiny_model), "CHAT_COMPLETION")
    assert tokenizer_digest(again) == tokenizer_digest(load_tokenizer(str(tiny_model), "INSTRUCTION_FINETUNE"))
    digests = {tokenizer_digest(again), tokenizer_digest(load_tokenizer(str(bare_model), "CHAT_COMPLETION"))}
    again.chat_template = CHATML + " "
    digests.add(tokenizer_digest(again))
    again.add_tokens(["brownfox"])
    digests.add(tokenizer_digest(again))
    assert len(digests) == 4


def test_a_folder_without_tokenizer_says_what_to_do(config_folder: Path) -> None:
    """The run would end in a traceback of transformers."""
    with pytest.raises(
        SpecError, match=r"model: the tokenizer of .*tiny cannot be loaded .*Check that the folder has tokenizer files"
    ):
        load_tokenizer(str(config_folder), "CHAT_COMPLETION")


def test_a_damaged_tokenizer_says_what_to_do(tmp_path: Path, save_tokenizer: Any) -> None:
    """The run would end in a traceback of tokenizers."""
    folder = save_tokenizer(tmp_path / "damaged")
    (folder / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(SpecError, match=r"model: the tokenizer of .* cannot be loaded"):
        load_tokenizer(str(folder), "CHAT_COMPLETION")


def test_a_tokenizer_without_end_of_sequence_is_refused(tmp_path: Path, save_tokenizer: Any) -> None:
    """The model would never learn to stop."""
    folder = save_tokenizer(tmp_path / "endless")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        content = json.loads((folder / name).read_text())
        content.pop("eos_token")
        (folder / name).write_text(json.dumps(content))
    with pytest.raises(SpecError, match=r"has no end-of-sequence token\. Set eos_token in its config"):
        load_tokenizer(str(folder), "CHAT_COMPLETION")


def test_code_in_a_model_folder_is_not_run(tmp_path: Path, save_tokenizer: Any) -> None:
    """A tokenizer of a downloaded model would run any program."""
    folder, marker = save_tokenizer(tmp_path / "evil"), tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Evil: pass\n")
    path = folder / "tokenizer_config.json"
    content = json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    path.write_text(json.dumps(content | {"tokenizer_class": "Evil"}))
    with pytest.raises(SpecError, match="cannot be loaded"):
        load_tokenizer(str(folder), "CHAT_COMPLETION")
    assert not marker.exists()
