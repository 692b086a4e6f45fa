"""data/prepare.py and data/shards.py: what goes in comes out of the shards, each sample once and whole."""

import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from tundish.base.files import locked
from tundish.data.bpe import BytePairEncoder
from tundish.data.encoding import Job
from tundish.data.manifest import Prepared
from tundish.data.opening import open_source
from tundish.data.prepare import examine, prepare
from tundish.data.shards import pack_row
from tundish.data.source import Source
from tundish.data.tokenize import Encoded, Encoder, _load_encoder
from tundish.data.tokenizer import load_tokenizer
from tundish.errors import DataError, StageError

# Streaming's LocalDataset leaves index.json open.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings(r"ignore:unclosed file .*index\.json:ResourceWarning")]

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


def _chats(path: Path) -> Source:
    return open_source(str(path), "CHAT_COMPLETION", system_message=True)


def _job(source: Source, model: Path, context_length: int = CONTEXT, **settings: Any) -> Job:
    return Job(model=str(model), task_type=source.rules.task_type, context_length=context_length, **settings)


def _prepare(source: Source, model: Path, context_length: int = CONTEXT, **settings: Any) -> Prepared:
    return prepare(source, _job(source, model, context_length, **settings))


def _encode(model: Path, task: Any, samples: list[Any]) -> list[Encoded]:
    results = Encoder(load_tokenizer(str(model), task), task, "all").encode(samples)
    return [result for result in results if isinstance(result, Encoded)]


SetSizes = Callable[..., None]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> SetSizes:
    """`small(workers=…, chunk=…, shard=…)`: so many processes, and so many bytes a chunk and a shard."""
    import joblib

    def set_sizes(*, workers: int = 1, chunk: int = 200, shard: int = 1 << 26) -> None:
        monkeypatch.setattr(joblib, "cpu_count", lambda: workers)
        for module in ("lines", "texts"):
            monkeypatch.setattr(f"tundish.data.{module}.CHUNK_BYTES", chunk)
        monkeypatch.setattr("tundish.data.shards.SHARD_BYTES", shard)

    return set_sizes


def _source_of(packed: str, folder: Path, count: int) -> Source:
    """Samples none of which is longer than a row, as lines, packed lines or texts."""
    data = "".join(json.dumps(_pair(number)) + "\n" for number in range(count)).encode()
    match packed:
        case "texts":
            for number in range(count):
                path = folder / "texts" / str(number % 7) / f"{number}.txt"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(f"{number} " + "fox " * (number % 7))
            return open_source(str(folder / "texts"), "CONTINUED_PRETRAIN", system_message=True)
        case "gz":
            (folder / "train.jsonl.gz").write_bytes(gzip.compress(data))
        case "zst":
            (folder / "train.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(data))
        case _:
            (folder / "train.jsonl").write_bytes(data)
    return _pairs(folder / f"train.jsonl{'' if packed == 'lines' else '.' + packed}")


def _left(home: Path) -> list[str]:
    """What stands in the folder of prepared data, but for locks."""
    return sorted(path.name for path in (home / "prepared").iterdir() if path.suffix != ".lock")


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
    prepared = _prepare(source, tiny_model)
    samples = [sample for chunk in source.chunks() for _, sample in chunk.samples(source.rules)]
    expected = [(one.tokens.tobytes(), one.loss_mask.tobytes()) for one in _encode(tiny_model, task, samples)]
    assert len(expected) == 40
    assert sorted(_samples(_rows(prepared.folder))) == sorted(expected)


def test_rows_keep_the_contract(tiny_model: Path, pairs: Source) -> None:
    """The loader would read past a sample's end, or a row be longer than the model's context."""
    prepared = _prepare(pairs, tiny_model)
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
    prepared = _prepare(pairs, tiny_model)
    rows = _rows(prepared.folder)
    assert prepared.samples == sum(len(row["segments"]) for row in rows) == 40
    assert prepared.tokens == sum(len(row["tokens"]) for row in rows)
    assert prepared.target_tokens == sum(int(row["loss_mask"].sum()) for row in rows)
    assert (prepared.truncated, prepared.refused, prepared.context_length) == (0, 0, CONTEXT)
    assert prepared.fill == prepared.tokens / (prepared.rows * CONTEXT) and 0.5 < prepared.fill <= 1
    assert prepared.source_hash == pairs.digest() and not prepared.chatml_added
    assert (prepared.units, prepared.warnings, prepared.engine) == (40, [], "tiktoken")
    assert Prepared.read(Path(prepared.folder)) == prepared


def test_streaming_dataset_reads_the_rows_too(tiny_model: Path, pairs: Source) -> None:
    """The contract names Streaming's own reader; another loader than ours could not read the shards."""
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    folder = _prepare(pairs, tiny_model).folder
    clean_stale_shared_memory()
    dataset = StreamingDataset(local=folder, remote=None, shuffle=False, batch_size=1)
    streamed = [dataset[number] for number in range(len(dataset))]
    local = _rows(folder)
    assert len(streamed) == len(local) > 1
    for one, other in zip(streamed, local, strict=True):
        assert all(np.array_equal(one[name], other[name]) for name in ("tokens", "loss_mask", "segments"))


@pytest.mark.parametrize("packed", ["lines", "gz", "texts"])
def test_the_same_data_gives_the_same_bytes(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: SetSizes, packed: str
) -> None:
    """Two machines, with other numbers of processors, would train different things from the same data."""
    source = _source_of(packed, tmp_path, 300)
    found: list[dict[str, str]] = []
    for number, (workers, chunk) in enumerate([(1, 1 << 20), (1, 300), (3, 300), (3, 300)]):
        monkeypatch.setenv("TUNDISH_HOME", str(tmp_path / str(number)))
        small(workers=workers, chunk=chunk, shard=3000)
        folder = Path(_prepare(source, tiny_model).folder)
        # The manifest alone tells the folder's place.
        found.append({name: digest for name, digest in _bytes(folder).items() if name != "manifest.json"})
        content = json.loads((folder / "manifest.json").read_text())
        found[-1]["manifest"] = json.dumps({**content, "folder": folder.name})
    assert len(found[0]) > 5, "there are several shards"
    assert found[0] == found[1] == found[2] == found[3]


@pytest.mark.parametrize("packed", ["lines", "gz", "zst", "texts"])
@pytest.mark.parametrize("workers", [1, 3])
def test_nothing_is_lost_or_doubled_over_many_chunks_and_shards(
    tiny_model: Path, tmp_path: Path, home: Path, small: SetSizes, packed: str, workers: int
) -> None:
    """A chunk would be left out, or its samples be read from the wrong place of the wrong spool."""
    small(workers=workers, shard=3000)
    source = _source_of(packed, tmp_path, 500)
    told: list[tuple[int, int | None]] = []
    prepared = prepare(source, _job(source, tiny_model), progress=lambda done, total: told.append((done, total)))
    samples = [sample for chunk in source.chunks() for _, sample in chunk.samples(source.rules)]
    expected = [
        (one.tokens.tobytes(), one.loss_mask.tobytes())
        for one in _encode(tiny_model, source.rules.task_type, samples)
        if len(one.tokens) <= CONTEXT
    ]
    assert len(expected) == 500
    assert sorted(_samples(_rows(prepared.folder))) == sorted(expected)
    assert len(list(Path(prepared.folder).glob("shard.*.mds"))) > 5
    assert sorted(path.suffix for path in Path(prepared.folder).iterdir() if path.suffix != ".mds") == [".json"] * 2
    assert len(told) > 20 and told == sorted(told, key=lambda one: one[0])
    assert {total for _, total in told} == {source.size}
    assert told[-1][0] == source.size if packed in ("lines", "texts") else source.size is None
    assert _left(home) == [Path(prepared.folder).name]


def test_lines_of_many_chunks_keep_their_numbers(
    tiny_model: Path, tmp_path: Path, home: Path, small: SetSizes, write_lines: WriteLines
) -> None:
    """Problems and warnings would name lines of their chunk, or come in the order in which workers are done."""
    records: list[Any] = [_pair(number) for number in range(1, 401)]
    for number in (7, 150, 399):
        records[number - 1] = "{"
    for number in (8, 9, 280):
        records[number - 1] = {"prompt": "two</s>", "response": "four"}
    records[199] = ""
    source = _pairs(write_lines(tmp_path / "train.jsonl", records))
    for workers in (1, 3):
        small(workers=workers)
        outcome = examine(source, _job(source, tiny_model))
        (problem,), (warning,) = outcome.problems, outcome.warnings
        assert (problem.rule, problem.where, problem.count) == ("not JSON", [7, 150, 399], 3)
        assert problem.message.startswith("train.jsonl, line 7: ") and "3 of 400 lines" in problem.message
        assert (warning.rule, warning.where) == ("control token", [8, 9, 280])
        assert (outcome.total, outcome.samples, outcome.prepared) == (400, 396, None)
    assert _left(home) == []


def test_warnings_stay_with_the_data(
    tiny_model: Path, tmp_path: Path, write_lines: WriteLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second run with the same data would be told that nothing is odd about it."""
    path = write_lines(tmp_path / "train.jsonl", [_pair(1), {"prompt": "two</s>", "response": "four"}])
    first = examine(_pairs(path), _job(_pairs(path), tiny_model))
    (warning,) = first.warnings
    assert warning.message.startswith("train.jsonl, line 2: contains '</s>', a control token of the model.")
    assert first.prepared is not None
    assert [(found["rule"], found["where"]) for found in first.prepared.warnings] == [("control token", [2])]
    monkeypatch.setattr("tundish.data.prepare._write_shards", lambda *_: pytest.fail("tokenized again"))
    assert examine(_pairs(path), _job(_pairs(path), tiny_model)) == first
    copy = path.rename(tmp_path / "copy.jsonl")
    (again,) = examine(_pairs(copy), _job(_pairs(copy), tiny_model)).warnings
    assert again.message == warning.message.replace("train", "copy"), "under the name that it has now"


def test_the_same_data_is_prepared_once(
    tiny_model: Path, pairs: Source, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every run would tokenize its data again, or write over rows that another run reads."""
    first = _prepare(pairs, tiny_model)
    before = {path: path.stat().st_mtime_ns for path in Path(first.folder).iterdir()}
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes((tmp_path / "train.jsonl").read_bytes())
    monkeypatch.setattr("tundish.data.prepare._write_shards", lambda *_: pytest.fail("tokenized again"))
    assert _prepare(_pairs(copy), tiny_model) == first
    assert {path: path.stat().st_mtime_ns for path in Path(first.folder).iterdir()} == before
    assert _left(home) == [Path(first.folder).name]


def test_the_name_of_a_prepared_folder_stays_as_it_was(tiny_model: Path, pairs: Source) -> None:
    """All that users have prepared with an earlier version would be prepared again, and fill the disk twice."""
    prepared = _prepare(pairs, tiny_model)
    facts = {name: getattr(prepared, name) for name in ("source_hash", "tokenizer_hash", "context_length", "versions")}
    rules = {"task_type": "INSTRUCTION_FINETUNE", "system_message": True}
    key = json.dumps([facts, rules, "all", False, "26 Jul 2024", 3])
    assert Path(prepared.folder).name == hashlib.sha256(key.encode()).hexdigest()[:24]


def test_other_inputs_are_prepared_apart(
    tiny_model: Path, bare_model: Path, pairs: Source, tmp_path: Path, write_lines: WriteLines
) -> None:
    """Rows of other data, another tokenizer or another length would be reused."""
    more = _pairs(write_lines(tmp_path / "more.jsonl", [_pair(number) for number in range(41)]))
    chats = _chats(write_lines(tmp_path / "c.jsonl", [_chat(1)]))
    folders = [
        _prepare(pairs, tiny_model).folder,
        _prepare(pairs, tiny_model, CONTEXT + 1).folder,
        _prepare(pairs, bare_model).folder,
        _prepare(more, tiny_model).folder,
        _prepare(chats, tiny_model).folder,
        _prepare(chats, tiny_model, target_responses="last").folder,
        _prepare(chats, bare_model).folder,
    ]
    assert len(set(folders)) == 7


def test_prepared_data_moves_with_its_home(
    tiny_model: Path, pairs: Source, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After $TUNDISH_HOME was moved, a run would be linked to a folder that is not there."""
    _prepare(pairs, tiny_model)
    moved = home.rename(tmp_path / "moved")
    monkeypatch.setenv("TUNDISH_HOME", str(moved))
    assert Path(_prepare(pairs, tiny_model).folder).is_relative_to(moved)


def test_what_a_killed_run_has_left_is_no_obstacle(tiny_model: Path, pairs: Source, home: Path) -> None:
    """A folder half written under the same process id, as in a restarted container, would stop preparation for good."""
    folder = Path(_prepare(pairs, tiny_model).folder)
    for process in (os.getpid(), 1):
        stale = folder.with_name(f".{folder.name}.{process}.tmp")
        (stale / "spool").mkdir(parents=True)
        (stale / "spool" / f"{os.getpid()}.spool").write_bytes(b"rubbish")
        (stale / "shard.00000.mds").write_bytes(b"rubbish")
    folder.rename(folder.with_name(f".{folder.name}.2.tmp"))
    killed, busy = (folder.with_name(f".{name}.3.tmp") for name in ("killed", "busy"))
    for other in (killed, busy):
        other.mkdir()
    with locked(folder.with_name(".busy.lock")):
        assert len(_rows(_prepare(pairs, tiny_model).folder)) > 1
    assert _left(home) == [busy.name, folder.name], "what another process is at work on is left alone"


def test_chatml_is_noted(bare_model: Path, tmp_path: Path, write_lines: WriteLines) -> None:
    """The user would not learn that a template was chosen for the model."""
    path = write_lines(tmp_path / "train.jsonl", [_chat(1)])
    prepared = _prepare(_chats(path), bare_model, 128)
    assert prepared.chatml_added
    (row,) = _rows(prepared.folder)
    assert "<|im_start|>assistant" in load_tokenizer(str(bare_model), "CHAT_COMPLETION").decode(row["tokens"])


def test_long_samples_are_cut_on_the_right_and_counted(
    tiny_model: Path, tmp_path: Path, write_lines: WriteLines
) -> None:
    """Samples would be cut in silence, or lose their beginning."""
    long = {"prompt": "two? ", "response": "fox " * 200}
    source = _pairs(write_lines(tmp_path / "train.jsonl", [_pair(1), long, _pair(2), long | {"prompt": "three? "}]))
    prepared = _prepare(source, tiny_model)
    assert (prepared.samples, prepared.truncated) == (4, 2)
    (whole,) = _encode(tiny_model, "INSTRUCTION_FINETUNE", [("two? ", "fox " * 200)])
    found = _samples(_rows(prepared.folder))
    assert (whole.tokens[:CONTEXT].tobytes(), whole.loss_mask[:CONTEXT].tobytes()) in found
    assert len(found) == 4


def test_a_sample_without_targets_is_an_error_with_its_line(
    tiny_model: Path, tmp_path: Path, home: Path, write_lines: WriteLines
) -> None:
    """A prompt as long as a row leaves nothing to learn: the loss would be 0 and the run a success."""
    lost = {"prompt": "fox " * 200, "response": "four"}
    source = _pairs(write_lines(tmp_path / "train.jsonl", [_pair(1), lost, _pair(2), "", lost]))
    with pytest.raises(DataError) as error:
        _prepare(source, tiny_model)
    (problem,) = error.value.problems
    assert (
        problem.startswith("train.jsonl, line 2: the sample is ")
        and "within the first 64. Shorten the prompt" in problem
    )
    assert problem.endswith("2 of 5 lines are like this (2, 5).")
    assert _left(home) == []


def test_bad_lines_leave_nothing_behind(tiny_model: Path, tmp_path: Path, home: Path, write_lines: WriteLines) -> None:
    """Rows of half the data would be found, and reused by the next run."""
    source = _pairs(write_lines(tmp_path / "train.jsonl", [_pair(1), "{", _pair(2)]))
    with pytest.raises(DataError, match=r"train\.jsonl, line 2: not JSON"):
        _prepare(source, tiny_model)
    assert _left(home) == []


@pytest.mark.parametrize("workers", [1, 3])
def test_damaged_data_leaves_nothing_behind(
    tiny_model: Path, tmp_path: Path, home: Path, small: SetSizes, workers: int
) -> None:
    """What was read before the damage would be found, and reused by the next run."""
    small(workers=workers)
    source = _source_of("gz", tmp_path, 5000)
    path = tmp_path / "train.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="the compressed data is damaged or truncated"):
        _prepare(source, tiny_model)
    assert _left(home) == []


@pytest.mark.parametrize("content", ["", "\n\n \n"])
def test_data_without_samples_is_an_error(tiny_model: Path, tmp_path: Path, home: Path, content: str) -> None:
    """A run would train on nothing and succeed."""
    path = tmp_path / "train.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=r"train\.jsonl: holds no sample: it is empty or blank. Use data with samples"):
        _prepare(_pairs(path), tiny_model)
    assert _left(home) == []


def test_data_that_changes_while_it_is_read_is_refused(
    tiny_model: Path, tmp_path: Path, home: Path, small: SetSizes
) -> None:
    """Half of one file and half of another would be found under the digest of the first."""
    small()
    source = _source_of("lines", tmp_path, 100)
    path = tmp_path / "train.jsonl"

    def grow(done: int, total: int | None) -> None:
        if done < 1000:
            with open(path, "ab") as file:
                file.write(b'{"prompt": "a", "response": "b"}\n')

    with pytest.raises(DataError, match=r"train\.jsonl: changed while it was read\. Try again when it is complete"):
        prepare(source, _job(source, tiny_model), progress=grow)
    assert _left(home) == []


def _full(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def test_a_disk_without_room_is_told(
    tiny_model: Path, pairs: Source, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run would end in a traceback, and what was written so far fill the disk for good."""

    monkeypatch.setattr("tundish.data.shards.write_shard", _full)
    with pytest.raises(
        StageError, match=r"preparing the data in .* failed: .*No space left on device.*Check its free space"
    ):
        _prepare(pairs, tiny_model)
    assert _left(home) == []


def _kill_itself(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_told_and_leaves_nothing_behind(
    tiny_model: Path, tmp_path: Path, home: Path, small: SetSizes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel kills a process that needs too much memory: the run would hang, or end in a traceback."""
    small(workers=2)
    source = _source_of("lines", tmp_path, 300)
    for function in ("shards.write_shard", "encoding.encode_chunk"):
        monkeypatch.setattr(f"tundish.data.{function}", _kill_itself)
        small(workers=2, shard=3000)
        with pytest.raises(
            StageError,
            match="a process that prepares data was killed by SIGKILL, most likely by the out-of-memory killer",
        ):
            _prepare(source, tiny_model)
        assert _left(home) == []


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
        _prepare(_chats(path), folder, 128)
    (problem,) = error.value.problems
    assert problem.startswith("train.jsonl, line 2: the model's chat template refuses the conversation: no bad.")
    assert problem.endswith("2 of 4 lines are like this (2, 4).")


def test_raw_text_keeps_its_tail(tiny_model: Path, tmp_path: Path) -> None:
    """The end of every file, or every small file, would never be trained."""
    folder = tmp_path / "books"
    (folder / "deep").mkdir(parents=True)
    texts = {"a.txt": "fox " * 150, "deep/b.txt": "dog", "deep/c.txt": "the lazy dog. " * 40, "deep/empty.txt": " \n"}
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "notes.md").write_text("not for training")
    source = open_source(str(folder), "CONTINUED_PRETRAIN", system_message=True)
    prepared = _prepare(source, tiny_model)
    wholes = _encode(tiny_model, "CONTINUED_PRETRAIN", [text for text in texts.values() if text.strip()])
    expected = [
        whole.tokens[start : start + CONTEXT].tobytes()
        for whole in wholes
        for start in range(0, len(whole.tokens), CONTEXT)
    ]
    assert len(expected) > 6
    rows = _rows(prepared.folder)
    assert sorted(tokens for tokens, _ in _samples(rows)) == sorted(expected)
    assert all(row["loss_mask"].all() for row in rows)
    assert (prepared.samples, prepared.truncated, prepared.target_tokens) == (3, 0, prepared.tokens)
    assert (prepared.units, prepared.refused) == (4, 1)


def test_samples_of_one_token_come_last_in_their_row() -> None:
    """Positions 0, 0, 1, 2 never fall: FlashAttention would take the two samples for one."""
    samples = [
        Encoded(np.arange(start, start + length, dtype=np.int32), np.full(length, length % 2, np.uint8))
        for start, length in ((10, 1), (20, 3), (30, 1), (40, 2))
    ]
    row = pack_row(samples)
    assert row["segments"].tolist() == [3, 2, 1, 1]
    assert row["tokens"].tolist() == [20, 21, 22, 40, 41, 10, 30]
    assert row["loss_mask"].tolist() == [1, 1, 1, 0, 0, 1, 1]


def test_the_engine_that_the_data_refutes_is_not_used(
    tiny_model: Path, pairs: Source, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The trials may pass where the data would not: the first samples are compared before anything is written."""
    honest = _prepare(pairs, tiny_model)
    monkeypatch.setenv("TUNDISH_HOME", str(tmp_path / "other"))
    monkeypatch.setattr(BytePairEncoder, "encode", lambda self, text, special: np.zeros(len(text), np.int32))
    _load_encoder.cache_clear()  # the engine is dropped for good in an encoder that other tests use
    monkeypatch.setattr(BytePairEncoder, "_agrees", lambda *_: True)
    refuted = _prepare(pairs, tiny_model)
    _load_encoder.cache_clear()
    assert (honest.engine, refuted.engine) == ("tiktoken", "tokenizers")
    assert _samples(_rows(honest.folder)) == _samples(_rows(refuted.folder))


def test_the_manifest_is_json_for_people_too(tiny_model: Path, pairs: Source) -> None:
    """Nobody could tell what decided the bytes of a prepared folder."""
    folder = Path(_prepare(pairs, tiny_model).folder)
    content = json.loads((folder / "manifest.json").read_text())
    packages = {"jinja2", "mosaicml-streaming", "tiktoken", "tokenizers", "transformers"}
    assert set(content["versions"]) == packages
    assert content["format_version"] == 3 and content["engine"] == "tiktoken"
    assert content["template_date"] == "26 Jul 2024" and len(content["tokenizer_hash"]) == 64


# Processes that are killed, and processes that meet: one driver for all of it, as importing Streaming takes seconds.

DRIVER = """
import json, logging, os, random, signal, sys, time
from pathlib import Path

import joblib, psutil, streaming

from tundish.data import lines, shards
from tundish.data import prepare as preparing
from tundish.data.encoding import Job
from tundish.data.opening import open_source

work, model = Path(sys.argv[1]), sys.argv[2]
lines.CHUNK_BYTES = 1000
shards.SHARD_BYTES = 5000
joblib.cpu_count = lambda: 2
job = Job(model=model, task_type="INSTRUCTION_FINETUNE", context_length=64)
job.encoder

def prepare(progress=lambda done, total: None):
    source = open_source(str(work / "train.jsonl"), "INSTRUCTION_FINETUNE", system_message=True)
    return preparing.prepare(source, job, progress=progress)

def start(home, action):
    child = os.fork()
    if child:
        return child
    try:
        os.setpgid(0, 0)
        os.environ["TUNDISH_HOME"] = str(home)
        action()
        code = 0
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        code = 1
    os._exit(code)

def group(leader):
    found = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            pass
    return found

def folders(home):
    names = [path.name for path in (home / "prepared").glob("*")] if home.exists() else []
    return sorted(name for name in names if not name.endswith(".lock"))

def whole(home):
    kept = [name for name in folders(home) if not name.startswith(".")]
    return [name for name in kept if (home / "prepared" / name / "manifest.json").exists()], kept

def kill(home, wait):
    before = folders(home)
    child = start(home, wait[0])
    wait[1](child)
    workers = len(group(child)) - 1
    try:
        os.kill(child, signal.SIGKILL)
    except ProcessLookupError:
        pass
    _, status = os.waitpid(child, 0)
    until = time.monotonic() + 60
    while (alive := group(child)) and time.monotonic() < until:
        time.sleep(0.05)
    complete, kept = whole(home)
    return {"killed": os.WIFSIGNALED(status), "workers": workers, "alive": len(alive), "complete": complete,
            "kept": kept, "stale": [name for name in folders(home) if name.startswith(".")], "before": before}

def after(seconds):
    return prepare, lambda child: time.sleep(seconds)

def at_chunk(number):
    reader, writer = os.pipe()
    seen = []
    def progress(done, total):
        seen.append(done)
        if len(seen) == number:
            os.write(writer, b"x")
            time.sleep(60)
    return (lambda: prepare(progress)), (lambda child: os.read(reader, 1))

def at_shard(home, number):
    def wait(child):
        until = time.monotonic() + 60
        while not list((home / "prepared").glob(f".*/*{number:05}*")) and time.monotonic() < until:
            time.sleep(0.001)
    return prepare, wait

results = {}
reference = work / "reference"
began = time.monotonic()
assert os.waitpid(start(reference, prepare), 0)[1] == 0
seconds = time.monotonic() - began
results["reference"] = folders(reference)

home = work / "killed"
moments = random.Random(7)
waits = [at_chunk(1), at_chunk(9), at_shard(home, 0), at_shard(home, 7)]
waits += [after(moments.uniform(0, 1.1 * seconds)) for _ in range(8)]
results["kills"] = []
for wait in waits:
    results["kills"].append(kill(home, wait))
    for name in whole(home)[0]:
        (home / "prepared" / name).rename(work / f"complete-{len(results['kills'])}")
assert os.waitpid(start(home, prepare), 0)[1] == 0
results["after"] = folders(home)

home = work / "met"
ready, go = os.pipe(), os.pipe()

def meet(number):
    def run():
        logging.basicConfig(filename=str(work / f"{number}.log"), level=logging.INFO)
        os.write(ready[1], b"x")
        os.read(go[0], 1)
        found = prepare()
        (work / f"{number}.folder").write_text(found.folder)
    return run

children = [start(home, meet(number)) for number in range(3)]
for _ in children:
    os.read(ready[0], 1)
os.write(go[1], b"xxx")
results["met"] = [os.waitpid(child, 0)[1] for child in children]
results["logs"] = [(work / f"{number}.log").read_text().count("Reusing") for number in range(3)]
results["folders"] = [(work / f"{number}.folder").read_text() for number in range(3)]
results["left"] = folders(home)
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, write_lines: WriteLines) -> dict[str, Any]:
    """What the driver saw, and the folder in which it worked."""
    work = tmp_path_factory.mktemp("processes")
    write_lines(work / "train.jsonl", [_pair(number) for number in range(1500)])
    (work / "driver.py").write_text(DRIVER)
    command = [sys.executable, str(work / "driver.py"), str(work), str(tiny_model)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return {"work": work, **json.loads(done.stdout.splitlines()[-1])}


def _all_there(folder: Path, processes: dict[str, Any]) -> bool:
    (name,) = processes["reference"]
    expected = _bytes(processes["work"] / "reference" / "prepared" / name)
    found = _bytes(folder)
    assert len(expected) > 10
    return {**found, "manifest.json": ""} == {**expected, "manifest.json": ""}


def test_a_killed_process_leaves_all_or_nothing(processes: dict[str, Any]) -> None:
    """A folder with a part of the data would be found by the next run, and trained on."""
    kills = processes["kills"]
    assert len(kills) == 12 and all(kill["killed"] and not kill["kept"] for kill in kills[:2]), (
        "these are in the middle"
    )
    assert sum(kill["killed"] for kill in kills) >= 4
    for number, kill in enumerate(kills, 1):
        assert kill["kept"] == kill["complete"], "what has its name is complete"
        if kill["complete"]:
            assert _all_there(processes["work"] / f"complete-{number}", processes)


def test_workers_of_a_killed_process_end(processes: dict[str, Any]) -> None:
    """They would keep their memory, and write into a folder that another process has taken over."""
    assert [kill["alive"] for kill in processes["kills"]] == [0] * 12
    assert min(kill["workers"] for kill in processes["kills"][:2]) == 2, "there were some"


def test_what_killed_processes_leave_is_cleared_away(processes: dict[str, Any]) -> None:
    """Every killed run would leave its spool on the disk for good."""
    kills = processes["kills"]
    assert kills[0]["stale"] and max(len(kill["stale"]) for kill in kills) == 1, "one at a time"
    assert processes["after"] == processes["reference"]
    assert _all_there(processes["work"] / "killed" / "prepared" / processes["after"][0], processes)


def test_processes_that_meet_prepare_data_once(processes: dict[str, Any]) -> None:
    """Two runs with the same data would tokenize it twice, or write into one folder."""
    assert processes["met"] == [0, 0, 0]
    assert sorted(processes["logs"]) == [0, 1, 1], "one does the work, and the others find it done"
    assert processes["left"] == processes["reference"]
    (folder,) = {Path(folder) for folder in processes["folders"]}
    assert folder == processes["work"] / "met" / "prepared" / processes["reference"][0]
    assert _all_there(folder, processes)
