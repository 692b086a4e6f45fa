"""data/__init__.py: what goes in comes out of the shards, each sample once and whole."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tundish.data import Prepared, prepare
from tundish.data.sources import Source, open_source
from tundish.data.tokenize import CHATML, encode, load_tokenizer
from tundish.errors import DataError

# Streaming's LocalDataset leaves index.json open.
pytestmark = pytest.mark.filterwarnings(r"ignore:unclosed file .*index\.json:ResourceWarning")

WriteLines = Callable[[Path, Any], Path]
CONTEXT = 64


def _pair(number: int) -> dict[str, str]:
    """A pair of 9 … 56 tokens that no other number has."""
    return {"prompt": f"{number}: two and two? ", "response": "fox " * (number % 7) + f"four {number}"}


def _chat(number: int) -> dict[str, Any]:
    pair = _pair(number)
    return {
        "messages": [{"role": "user", "content": pair["prompt"]}, {"role": "assistant", "content": pair["response"]}]
    }


@pytest.fixture
def pairs(tmp_path: Path, write_lines: WriteLines) -> Source:
    """Forty pairs, none longer than a row."""
    return _pairs(write_lines(tmp_path / "train.jsonl", [_pair(number) for number in range(40)]))


def _pairs(path: Path) -> Source:
    return open_source(str(path), "INSTRUCTION_FINETUNE", system_message=True)


def _rows(folder: str) -> list[dict[str, np.ndarray[Any, Any]]]:
    from streaming import LocalDataset

    dataset = LocalDataset(folder)
    return [dataset[number] for number in range(len(dataset))]


def _samples(rows: list[dict[str, np.ndarray[Any, Any]]]) -> list[tuple[bytes, bytes]]:
    """Tokens and mask of every sample in the rows."""
    found: list[tuple[bytes, bytes]] = []
    for row in rows:
        borders = np.cumsum(row["segments"])[:-1]
        tokens, masks = np.split(row["tokens"], borders), np.split(row["loss_mask"], borders)
        found.extend((one.tobytes(), other.tobytes()) for one, other in zip(tokens, masks, strict=True))
    return found


def _bytes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("task", ["INSTRUCTION_FINETUNE", "CHAT_COMPLETION"])
def test_no_sample_is_lost_split_or_changed(
    tiny_model: Path, tmp_path: Path, write_lines: WriteLines, task: Any
) -> None:
    """The model would be trained on other samples than the caller gave."""
    make = _pair if task == "INSTRUCTION_FINETUNE" else _chat
    path = write_lines(tmp_path / "train.jsonl", [make(number) for number in range(40)])
    source = open_source(str(path), task, system_message=True)
    prepared = prepare(source, str(tiny_model), CONTEXT)
    tokenizer = load_tokenizer(str(tiny_model), task)
    expected = [
        (one.tokens.tobytes(), one.loss_mask.tobytes())
        for _, s in source.samples()
        for one in encode(tokenizer, [s], task)
    ]
    assert len(expected) == 40
    assert sorted(_samples(_rows(prepared.folder))) == sorted(expected)


def test_rows_keep_the_contract(tiny_model: Path, pairs: Source) -> None:
    """The loader would read past a sample's end, or a row be longer than the model's context."""
    prepared = prepare(pairs, str(tiny_model), CONTEXT)
    rows = _rows(prepared.folder)
    assert 1 < len(rows) == prepared.rows < 40, "samples are packed"
    for row in rows:
        assert set(row) == {"tokens", "loss_mask", "segments"}
        assert (row["tokens"].dtype, row["loss_mask"].dtype, row["segments"].dtype) == (np.int32, np.uint8, np.int32)
        assert row["tokens"].shape == row["loss_mask"].shape and len(row["tokens"]) <= CONTEXT
        assert row["segments"].sum() == len(row["tokens"]) and row["segments"].min() > 0
        assert set(np.unique(row["loss_mask"])) == {0, 1}


def test_the_manifest_counts_what_is_there(tiny_model: Path, pairs: Source) -> None:
    """Batch size, warm-up and what the user is told would follow wrong numbers."""
    prepared = prepare(pairs, str(tiny_model), CONTEXT)
    rows = _rows(prepared.folder)
    assert prepared.samples == sum(len(row["segments"]) for row in rows) == 40
    assert prepared.tokens == sum(len(row["tokens"]) for row in rows)
    assert prepared.target_tokens == sum(int(row["loss_mask"].sum()) for row in rows)
    assert (prepared.truncated, prepared.refused, prepared.context_length) == (0, 0, CONTEXT)
    assert prepared.fill == prepared.tokens / (prepared.rows * CONTEXT) and 0.5 < prepared.fill <= 1
    assert prepared.source_hash == pairs.digest() and not prepared.chatml_added
    assert Prepared.read(Path(prepared.folder)) == prepared


def test_streaming_dataset_reads_the_rows_too(tiny_model: Path, pairs: Source) -> None:
    """The contract names Streaming's own reader; another loader than ours could not read the shards."""
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    folder = prepare(pairs, str(tiny_model), CONTEXT).folder
    clean_stale_shared_memory()
    dataset = StreamingDataset(local=folder, remote=None, shuffle=False, batch_size=1)
    streamed = [dataset[number] for number in range(len(dataset))]
    local = _rows(folder)
    assert len(streamed) == len(local) > 1
    for one, other in zip(streamed, local, strict=True):
        assert all(np.array_equal(one[name], other[name]) for name in ("tokens", "loss_mask", "segments"))


def test_the_same_data_gives_the_same_bytes(
    tiny_model: Path, pairs: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two machines would train different things from the same data."""
    found: list[Path] = []
    for name in ("one", "two"):
        monkeypatch.setenv("TUNDISH_HOME", str(tmp_path / name))
        found.append(Path(prepare(pairs, str(tiny_model), CONTEXT).folder))
    one, two = found
    assert one != two and one.name == two.name
    assert _bytes(one).keys() == _bytes(two).keys() and len(_bytes(one)) >= 3
    differing = {name for name, digest in _bytes(one).items() if digest != _bytes(two)[name]}
    assert differing <= {"manifest.json"}, "the manifest alone tells the folder's place"


def test_the_same_data_is_prepared_once(
    tiny_model: Path, pairs: Source, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every run would tokenize its data again, or write over rows that another run reads."""
    first = prepare(pairs, str(tiny_model), CONTEXT)
    before = {path: path.stat().st_mtime_ns for path in Path(first.folder).iterdir()}
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(pairs.path.read_bytes())
    monkeypatch.setattr("tundish.data.encode", lambda *_: pytest.fail("tokenized again"))
    assert prepare(_pairs(copy), str(tiny_model), CONTEXT) == first
    assert {path: path.stat().st_mtime_ns for path in Path(first.folder).iterdir()} == before
    assert [path.name for path in (home / "prepared").iterdir()] == [Path(first.folder).name]


def test_other_inputs_are_prepared_apart(
    tiny_model: Path, bare_model: Path, pairs: Source, tmp_path: Path, write_lines: WriteLines
) -> None:
    """Rows of other data, another tokenizer or another length would be reused."""
    more = _pairs(write_lines(tmp_path / "more.jsonl", [_pair(number) for number in range(41)]))
    chats = open_source(str(write_lines(tmp_path / "c.jsonl", [_chat(1)])), "CHAT_COMPLETION", system_message=True)
    folders = [
        prepare(pairs, str(tiny_model), CONTEXT).folder,
        prepare(pairs, str(tiny_model), CONTEXT + 1).folder,
        prepare(pairs, str(bare_model), CONTEXT).folder,
        prepare(more, str(tiny_model), CONTEXT).folder,
        prepare(chats, str(tiny_model), CONTEXT).folder,
        prepare(chats, str(bare_model), CONTEXT).folder,
    ]
    assert len(set(folders)) == 6


def test_prepared_data_moves_with_its_home(
    tiny_model: Path, pairs: Source, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After $TUNDISH_HOME was moved, a run would be linked to a folder that is not there."""
    prepare(pairs, str(tiny_model), CONTEXT)
    moved = home.rename(tmp_path / "moved")
    monkeypatch.setenv("TUNDISH_HOME", str(moved))
    assert Path(prepare(pairs, str(tiny_model), CONTEXT).folder).is_relative_to(moved)


def test_what_a_killed_run_has_left_is_no_obstacle(tiny_model: Path, pairs: Source, home: Path) -> None:
    """A folder half written under the same process id, as in a restarted container, would stop preparation for good."""
    import os

    folder = Path(prepare(pairs, str(tiny_model), CONTEXT).folder)
    folder.rename(folder.with_name(f".{folder.name}.{os.getpid()}.tmp"))
    assert len(_rows(prepare(pairs, str(tiny_model), CONTEXT).folder)) > 1
    assert [path.name for path in (home / "prepared").iterdir()] == [folder.name]


def test_chatml_is_noted(bare_model: Path, tmp_path: Path, write_lines: WriteLines) -> None:
    """The user would not learn that a template was chosen for the model."""
    path = write_lines(tmp_path / "train.jsonl", [_chat(1)])
    prepared = prepare(open_source(str(path), "CHAT_COMPLETION", system_message=True), str(bare_model), 128)
    assert prepared.chatml_added
    (row,) = _rows(prepared.folder)
    assert (
        "<|im_start|>assistant" in load_tokenizer(str(bare_model), "CHAT_COMPLETION").decode(row["tokens"]) and CHATML
    )


def test_long_samples_are_cut_on_the_right_and_counted(
    tiny_model: Path, tmp_path: Path, write_lines: WriteLines
) -> None:
    """Samples would be cut in silence, or lose their beginning."""
    long = {"prompt": "two? ", "response": "fox " * 200}
    source = _pairs(write_lines(tmp_path / "train.jsonl", [_pair(1), long, _pair(2), long | {"prompt": "three? "}]))
    prepared = prepare(source, str(tiny_model), CONTEXT)
    assert (prepared.samples, prepared.truncated) == (4, 2)
    tokenizer = load_tokenizer(str(tiny_model), "INSTRUCTION_FINETUNE")
    whole = encode(tokenizer, [("two? ", "fox " * 200)], "INSTRUCTION_FINETUNE")[0]
    found = _samples(_rows(prepared.folder))
    assert (whole.tokens[:CONTEXT].tobytes(), whole.loss_mask[:CONTEXT].tobytes()) in found
    assert len(found) == 4


def test_a_sample_that_just_fits_is_not_cut(tiny_model: Path, tmp_path: Path, write_lines: WriteLines) -> None:
    """The end-of-sequence token of a sample as long as a row would be cut off."""
    source = _pairs(write_lines(tmp_path / "train.jsonl", [_pair(6)]))
    tokenizer = load_tokenizer(str(tiny_model), "INSTRUCTION_FINETUNE")
    length = len(encode(tokenizer, [(_pair(6)["prompt"], _pair(6)["response"])], "INSTRUCTION_FINETUNE")[0].tokens)
    exact, short = (prepare(source, str(tiny_model), length - less) for less in (0, 1))
    assert (exact.truncated, exact.tokens, short.truncated, short.tokens) == (0, length, 1, length - 1)
    assert _rows(exact.folder)[0]["tokens"][-1] == tokenizer.eos_token_id


def test_a_sample_without_targets_is_an_error_with_its_line(
    tiny_model: Path, tmp_path: Path, home: Path, write_lines: WriteLines
) -> None:
    """A prompt as long as a row leaves nothing to learn: the loss would be 0 and the run a success."""
    lost = {"prompt": "fox " * 200, "response": "four"}
    source = _pairs(write_lines(tmp_path / "train.jsonl", [_pair(1), lost, _pair(2), "", lost]))
    with pytest.raises(DataError) as error:
        prepare(source, str(tiny_model), CONTEXT)
    (problem,) = error.value.problems
    assert (
        problem.startswith("train.jsonl, line 2: the sample is ")
        and "left in the first 64. Shorten the prompt" in problem
    )
    assert problem.endswith("2 of 4 lines are like this (2, 5).")
    assert not home.exists() or list(home.rglob("*")) in ([], [home / "prepared"])


def test_bad_lines_leave_nothing_behind(tiny_model: Path, tmp_path: Path, home: Path, write_lines: WriteLines) -> None:
    """Rows of half the data would be found, and reused by the next run."""
    source = _pairs(write_lines(tmp_path / "train.jsonl", [_pair(1), "{", _pair(2)]))
    with pytest.raises(DataError, match=r"train\.jsonl, line 2: not JSON"):
        prepare(source, str(tiny_model), CONTEXT)
    assert not home.exists() or list(home.rglob("*")) in ([], [home / "prepared"])


def test_chats_that_the_template_refuses_are_told_by_line(
    tmp_path: Path, save_tokenizer: Any, write_lines: WriteLines
) -> None:
    """One bad chat would hide which of thousands it is."""
    template = (
        "{% for m in messages %}{% if m['content'] == 'bad' %}{{ raise_exception('no ' + m['content']) }}{% endif %}"
        "<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    folder = save_tokenizer(tmp_path / "strict", chat_template=template)
    bad = {"messages": [{"role": "user", "content": "bad"}, {"role": "assistant", "content": "x"}]}
    path = write_lines(tmp_path / "train.jsonl", [_chat(1), bad, _chat(2), bad])
    with pytest.raises(DataError) as error:
        prepare(open_source(str(path), "CHAT_COMPLETION", system_message=True), str(folder), 128)
    (problem,) = error.value.problems
    assert problem.startswith("train.jsonl, line 2: the model's chat template refuses the conversation: no bad.")
    assert problem.endswith("2 of 4 lines are like this (2, 4).")


def test_raw_text_keeps_its_tail(tiny_model: Path, tmp_path: Path) -> None:
    """The end of every file, or every small file, would never be trained."""
    folder = tmp_path / "books"
    (folder / "deep").mkdir(parents=True)
    texts = {"a.txt": "fox " * 150, "deep/b.txt": "dog", "deep/c.txt": "the lazy dog. " * 40}
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "notes.md").write_text("not for training")
    source = open_source(str(folder), "CONTINUED_PRETRAIN", system_message=True)
    prepared = prepare(source, str(tiny_model), CONTEXT)
    tokenizer = load_tokenizer(str(tiny_model), "CONTINUED_PRETRAIN")
    expected: list[bytes] = []
    for encoded in encode(tokenizer, [texts[name] for name in sorted(texts)], "CONTINUED_PRETRAIN"):
        expected.extend(
            encoded.tokens[start : start + CONTEXT].tobytes() for start in range(0, len(encoded.tokens), CONTEXT)
        )
    assert len(expected) > 6
    rows = _rows(prepared.folder)
    assert sorted(tokens for tokens, _ in _samples(rows)) == sorted(expected)
    assert all(row["loss_mask"].all() for row in rows)
    assert (prepared.samples, prepared.truncated, prepared.target_tokens) == (3, 0, prepared.tokens)


def test_the_manifest_is_json_for_people_too(tiny_model: Path, pairs: Source) -> None:
    """Nobody could tell what decided the bytes of a prepared folder."""
    folder = Path(prepare(pairs, str(tiny_model), CONTEXT).folder)
    content = json.loads((folder / "manifest.json").read_text())
    assert set(content["versions"]) == {"tokenizers", "transformers", "mosaicml-streaming"}
    assert content["format_version"] == 1
    assert content["template_date"] == "26 Jul 2024" and len(content["tokenizer_hash"]) == 64
