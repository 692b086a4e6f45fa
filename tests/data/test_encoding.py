"""data/encoding.py: what one chunk comes to: its samples in the spool, and what is told of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from tundish.data.encoding import EncodedChunk, Job, encode_chunk
from tundish.data.findings import Finding, Findings, Location
from tundish.data.lines import LineBlock
from tundish.data.samples import Rules
from tundish.data.texts import TextFiles
from tundish.data.tokenize import Encoded
from tundish.plan.spec import TaskType

CONTEXT = 64
PAIR = {"prompt": "two and two? ", "response": "four"}
LONG = {"prompt": "two? ", "response": "fox " * 200}
LOST = {"prompt": "fox " * 200, "response": "four"}

Make = Callable[..., EncodedChunk]


def _chat(*contents: str) -> dict[str, Any]:
    return {
        "messages": [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]
    }


@pytest.fixture
def encode(tiny_model: Path, tmp_path: Path) -> Make:
    """`encode(task, records, …)`: a chunk of those lines, encoded into `tmp_path`."""

    def encode(task: TaskType, records: list[Any], *, spool: bool = True, **settings: Any) -> EncodedChunk:
        lines = [record if isinstance(record, str) else json.dumps(record, ensure_ascii=False) for record in records]
        data = "".join(line + "\n" for line in lines).encode()
        job = Job(**{"model": str(tiny_model), "task_type": task, "context_length": CONTEXT, **settings})
        return encode_chunk(job, Rules(task, True), LineBlock(data, len(data)), tmp_path if spool else None)

    return encode


def _spooled(found: EncodedChunk, spool: Path) -> list[tuple[list[int], list[int]]]:
    """Tokens and mask of every piece that the spool holds of a chunk."""
    total = int(found.lengths.sum())
    content = (spool / found.spool).read_bytes()[found.offset : found.offset + 5 * total]
    borders = np.cumsum(found.lengths)[:-1]
    tokens = np.split(np.frombuffer(content[: 4 * total], np.int32), borders)
    masks = np.split(np.frombuffer(content[4 * total :], np.uint8), borders)
    return [(one.tolist(), mask.tolist()) for one, mask in zip(tokens, masks, strict=True)]


def _expected(encode_samples: list[Any]) -> list[tuple[list[int], list[int]]]:
    assert all(isinstance(one, Encoded) for one in encode_samples)
    return [(one.tokens[:CONTEXT].tolist(), one.loss_mask[:CONTEXT].tolist()) for one in encode_samples]


def _messages(findings: Findings) -> list[Finding]:
    return findings.findings(Location("train.jsonl", "line"), 9)


def test_samples_are_spooled_whole_and_in_order(encode: Make, tiny_model: Path, tmp_path: Path) -> None:
    """Other tokens would be trained, or the targets of one sample belong to another."""
    records = [{**PAIR, "response": f"four {n}" * (n % 3 + 1)} for n in range(600)]
    found = encode("INSTRUCTION_FINETUNE", records)
    encoder = Job(model=str(tiny_model), task_type="INSTRUCTION_FINETUNE", context_length=CONTEXT).encoder
    expected = _expected(encoder.encode([(record["prompt"], record["response"]) for record in records]))
    assert _spooled(found, tmp_path) == expected and len(expected) == 600
    assert (found.samples, found.units, found.truncated, found.empty) == (600, 600, 0, 0)
    assert found.lengths.tolist() == found.sample_lengths.tolist() == [len(tokens) for tokens, _ in expected]
    assert found.target_tokens == sum(sum(mask) for _, mask in expected) > 600
    assert not found.problems and not found.warnings


def test_chunks_share_the_spool_of_their_process(encode: Make, tmp_path: Path) -> None:
    """A chunk would be written over the one before it."""
    first, second = (encode("INSTRUCTION_FINETUNE", [{**PAIR, "response": word}] * 3) for word in ("four", "fox"))
    assert first.spool == second.spool and (first.offset, second.offset) == (0, 5 * int(first.lengths.sum()))
    (size,) = [path.stat().st_size for path in tmp_path.glob("*.spool")]
    assert size == second.offset + 5 * int(second.lengths.sum())
    assert _spooled(first, tmp_path)[2] == _spooled(first, tmp_path)[0] != _spooled(second, tmp_path)[0]


def test_without_a_spool_nothing_is_written(encode: Make, tmp_path: Path) -> None:
    """An estimate would fill the disk with tokens."""
    found = encode("INSTRUCTION_FINETUNE", [PAIR, LONG], spool=False)
    assert found.samples == 2 and found.spool == "" and not list(tmp_path.glob("*.spool"))


def test_long_samples_are_cut_on_the_right_and_counted(encode: Make, tmp_path: Path) -> None:
    """Samples would be cut in silence, or lose their beginning."""
    found = encode("INSTRUCTION_FINETUNE", [PAIR, LONG, PAIR, {**LONG, "prompt": "three? "}])
    assert (found.samples, found.truncated) == (4, 2)
    assert found.lengths.tolist()[1] == found.lengths.tolist()[3] == CONTEXT
    assert min(found.sample_lengths.tolist()[1::2]) > CONTEXT, "before they are cut"
    assert not found.problems
    tokens, mask = _spooled(found, tmp_path)[1]
    assert len(tokens) == len(mask) == CONTEXT and mask[0] == 0 and mask[-1] == 1
    assert found.target_tokens == sum(sum(mask) for _, mask in _spooled(found, tmp_path))


def test_a_sample_as_long_as_a_row_is_not_cut(encode: Make) -> None:
    """Its end of sequence would be lost, or it be counted as cut."""
    (length,) = encode("INSTRUCTION_FINETUNE", [PAIR]).lengths.tolist()
    exact = encode("INSTRUCTION_FINETUNE", [PAIR], context_length=length)
    short = encode("INSTRUCTION_FINETUNE", [PAIR], context_length=length - 1)
    assert (exact.truncated, exact.lengths.tolist()) == (0, [length])
    assert (short.truncated, short.lengths.tolist()) == (1, [length - 1])


def test_samples_without_targets_are_problems_with_their_lines(encode: Make) -> None:
    """A prompt as long as a row leaves nothing to learn: the loss would be 0 and the run a success."""
    found = encode("INSTRUCTION_FINETUNE", [PAIR, LOST, PAIR, "", LOST])
    (finding,) = _messages(found.problems)
    assert (finding.rule, finding.where) == ("no target", [2, 5])
    assert finding.message.startswith("train.jsonl, line 2: the sample is ")
    assert "none of its reply is within the first 64. Shorten the prompt, drop the sample" in finding.message
    assert found.units == 5 and found.samples == 4


def test_with_the_last_reply_alone_earlier_ones_are_no_targets(encode: Make) -> None:
    """A chat whose last reply is cut off would count as trained for the sake of replies that are not."""
    chat = _chat("two?", "four", "fox " * 100, "dog")
    assert not encode("CHAT_COMPLETION", [chat]).problems
    found = encode("CHAT_COMPLETION", [chat], target_responses="last")
    assert [finding.rule for finding in _messages(found.problems)] == ["no target"]
    short = _chat("two?", "four", "fox?", "dog")
    every, last = (encode("CHAT_COMPLETION", [short], target_responses=targets) for targets in ("all", "last"))
    assert 0 < last.target_tokens < every.target_tokens and last.lengths.tolist() == every.lengths.tolist()


def test_a_target_that_nothing_predicts_is_none(encode: Make, tmp_path: Path, save_tokenizer: Any) -> None:
    """The first token of a row has nothing before it: a sample with that target alone teaches nothing."""
    template = "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] }}{% endif %}{% endfor %}"
    folder = str(save_tokenizer(tmp_path / "replies-alone", chat_template=template))
    found = encode("CHAT_COMPLETION", [_chat("a", "b")], context_length=1, model=folder)
    assert found.target_tokens == 1 and [finding.rule for finding in _messages(found.problems)] == ["no target"]
    assert not encode("CHAT_COMPLETION", [_chat("a", "b")], context_length=2, model=folder).problems


@pytest.mark.parametrize(
    ("task", "good", "bad", "text"),
    [
        (
            "CHAT_COMPLETION",
            _chat("two?", "four"),
            _chat("two</s>?", "four"),
            "a message contains '</s>', a control token of the model. It is kept as plain text and has no effect. "
            "Remove it if it is not intended.",
        ),
        (
            "INSTRUCTION_FINETUNE",
            PAIR,
            {"prompt": "two?", "response": "four</s>"},
            "contains '</s>', a control token of the model. It acts as one, as no template is applied. "
            "Remove it if it is not intended.",
        ),
    ],
)
def test_control_tokens_are_warned_of_with_their_lines(encode: Make, task: Any, good: Any, bad: Any, text: str) -> None:
    """Nobody would learn that data holds them, and what becomes of them."""
    found = encode(task, [good, bad, "", good, bad, good], context_length=128)
    (finding,) = _messages(found.warnings)
    assert (finding.rule, finding.count, finding.where) == ("control token", 2, [2, 5])
    assert finding.message == f"train.jsonl, line 2: {text} 2 of 9 lines are like this (2, 5)."
    assert not found.problems and found.samples == 5


def test_problems_of_all_kinds_are_told_together(
    encode: Make, tmp_path: Path, save_tokenizer: Any, chat_templates: dict[str, str]
) -> None:
    """The caller would repair one kind after the other; the good samples around them would be lost or shifted."""
    folder = save_tokenizer(tmp_path / "strict", chat_template=chat_templates["refuses bad"])
    good = _chat("two?", "four")
    many = [good] * 300
    records = ["", _chat("bad", "x"), *many, "{", _chat("fox " * 100, "x"), _chat("a", "b", "c"), _chat("x", "bad")]
    found = encode("CHAT_COMPLETION", records, model=str(folder))
    assert {finding.rule: finding.where for finding in _messages(found.problems)} == {
        "the model's chat template refuses": [2, 306],
        "not JSON": [303],
        "no target": [304],
        "last speaker": [305],
    }
    assert found.samples == 301 and found.units == 306


def test_raw_text_is_cut_into_rows_with_its_tail(tiny_model: Path, tmp_path: Path) -> None:
    """The end of every file, or every small file, would never be trained."""
    texts = {"a.txt": "fox " * 150, "b.txt": "dog", "c.txt": " \n", "d.txt": "the lazy dog. " * 40, "e.txt": "x</s>y"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    job = Job(model=str(tiny_model), task_type="CONTINUED_PRETRAIN", context_length=CONTEXT)
    spool = tmp_path / "spool"
    spool.mkdir()
    found = encode_chunk(job, Rules("CONTINUED_PRETRAIN", True), TextFiles(tmp_path, tuple(texts), 99), spool)
    encoded = job.encoder.encode([text for text in texts.values() if text.strip()])
    wholes = [sample.tokens.tolist() for sample in cast(list[Encoded], encoded)]
    pieces = [whole[start : start + CONTEXT] for whole in wholes for start in range(0, len(whole), CONTEXT)]
    assert _spooled(found, spool) == [(piece, [1] * len(piece)) for piece in pieces] and len(pieces) > 6
    assert (found.samples, found.units, found.empty, found.truncated, found.size) == (4, 5, 1, 0, 99)
    assert found.sample_lengths.tolist() == [len(whole) for whole in wholes]
    assert found.target_tokens == sum(map(len, wholes)) and not found.problems
    (warning,) = _messages(found.warnings)
    assert warning.where == [5] and "It acts as one" in warning.message


def test_texts_shorter_than_a_row_are_whole_pieces(tiny_model: Path, tmp_path: Path) -> None:
    """A text that ends exactly with a row, or is one token, would be an error or an empty piece."""
    job = Job(model=str(tiny_model), task_type="CONTINUED_PRETRAIN", context_length=2)
    for name, text, lengths in [("a", "x", [2]), ("b", "xy x", [2, 2, 1]), ("c", "xyz", [2, 2])]:
        (tmp_path / name).write_text(text)
        found = encode_chunk(job, Rules("CONTINUED_PRETRAIN", True), TextFiles(tmp_path, (name,), 1), None)
        assert found.lengths.tolist() == lengths and found.samples == 1 and not found.problems


def test_a_chunk_without_samples_is_nothing(encode: Make, tmp_path: Path) -> None:
    """Blank lines would be samples, or leave an empty file."""
    found = encode("INSTRUCTION_FINETUNE", ["", "  ", "\t\r"])
    assert (found.units, found.samples, found.target_tokens) == (3, 0, 0) and len(found.lengths) == 0
    assert found.spool == "" and not list(tmp_path.glob("*.spool"))
