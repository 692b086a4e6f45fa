"""data/parquet.py: the samples of Parquet files of all writers; problems are reported by file and row."""

import json
import os
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import write_deltalake
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.s3 import Bucket

from tundish.base.home import downloads_dir
from tundish.base.workers import guarded
from tundish.data import rows as table_rows
from tundish.data.encoding import Job
from tundish.data.findings import Outcome
from tundish.data.opening import open_source
from tundish.data.parquet import ParquetRows, RowGroup
from tundish.data.prepare import examine, prepare
from tundish.data.samples import Problem, Rules
from tundish.data.source import Source
from tundish.data.structure import check_structure
from tundish.errors import DataError, SpecError
from tundish.plan.address import Address
from tundish.plan.spec import TaskType

# Streaming's LocalDataset leaves index.json open.
pytestmark = pytest.mark.filterwarnings(r"ignore:unclosed file .*index\.json:ResourceWarning")

WriteLines = Callable[[Path, Iterable[object]], Path]
Row = dict[str, Any]
RULES = Rules("INSTRUCTION_FINETUNE", True)


def _pair(number: int) -> Row:
    return {"prompt": f"{number}: two and two? ", "response": "fox " * (number % 7) + f"four {number}"}


def _chat(number: int) -> Row:
    contents = {"user": f"{number}: two and two?", "assistant": "fox " * (number % 7) + f"four {number}"}
    return {"messages": [{"role": role, "content": content} for role, content in contents.items()]}


def _write(path: Path, rows: Sequence[Row], **settings: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), path, **settings)
    return path


def _pairs(numbers: Iterable[int]) -> list[Row]:
    return [_pair(number) for number in numbers]


def _open(path: object, task_type: TaskType = "INSTRUCTION_FINETUNE") -> Source:
    return open_source(Address.parse(str(path), "data"), task_type, system_message=True)


def _samples(*sources: Source) -> list[Any]:
    """All samples of a source, or of its parts, each with the name of its row."""
    found: list[Any] = []
    for source in sources:
        before = 0
        for chunk in source.chunks():
            for number, sample in chunk.samples(source.rules):
                found.append((source.place.of(before + number), sample))
            before += chunk.units
    return found


def _numbers(path: object) -> list[int]:
    return [int(sample[0].split(":")[0]) for _, sample in _samples(_open(path))]


def _refusals(path: object, task_type: TaskType = "INSTRUCTION_FINETUNE") -> tuple[str, ...]:
    with pytest.raises(SpecError) as error:
        _open(path, task_type)
    assert all(problem.isprintable() for problem in error.value.problems)
    return error.value.problems


def _refusal(path: object, task_type: TaskType = "INSTRUCTION_FINETUNE") -> str:
    (problem,) = _refusals(path, task_type)
    return problem


def _shards(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.name != "manifest.json"}


@pytest.mark.parametrize("kind", ["pairs", "chats", "chats as JSON text"])
def test_tokens_are_those_of_the_same_samples_as_lines(
    tiny_model: Path, tmp_path: Path, write_lines: WriteLines, kind: str
) -> None:
    """A model would learn something else from the same samples because of the format of their file."""
    task_type: TaskType = "INSTRUCTION_FINETUNE" if kind == "pairs" else "CHAT_COMPLETION"
    samples = _pairs(range(300)) if kind == "pairs" else [_chat(number) for number in range(300)]
    lines = write_lines(tmp_path / "train.jsonl", samples)
    texts = [{"messages": json.dumps(sample["messages"])} for sample in samples] if "JSON" in kind else samples
    file = _write(tmp_path / "train.parquet", texts, row_group_size=70)
    job = Job(model=str(tiny_model), task_type=task_type, context_length=64)
    from_lines, from_rows = (prepare(_open(path, task_type), job) for path in (lines, file))
    assert from_rows.samples == 300 and "shard.00000.mds" in _shards(from_rows.folder)
    assert _shards(from_rows.folder) == _shards(from_lines.folder)


def _by_pandas(path: Path, samples: list[Row]) -> None:
    pd.DataFrame(samples).assign(extra=1.5).to_parquet(path)


def _by_pandas_as_categories(path: Path, samples: list[Row]) -> None:
    pd.DataFrame(samples).astype("category").to_parquet(path)


def _by_pyarrow(path: Path, samples: list[Row]) -> None:
    table = pa.Table.from_pylist([{"id": number, **sample} for number, sample in enumerate(samples)])
    pq.write_table(table, path, row_group_size=7, compression="zstd", write_page_checksum=True)


def _by_pyarrow_as_large_text(path: Path, samples: list[Row]) -> None:
    columns = {name: pa.array([row[name] for row in samples], pa.large_string()) for name in ("prompt", "response")}
    pq.write_table(pa.table(columns), path, compression="none", data_page_version="2.0", use_dictionary=False)


def _by_spark(path: Path, samples: list[Row]) -> None:
    """Spark makes a folder with the name of a file, and leaves its own files in it."""
    for number in range(3):
        part = samples[number * 10 : (number + 1) * 10]
        _write(path / f"part-0000{number}-abc.snappy.parquet", part, row_group_size=4)
        (path / f".part-0000{number}-abc.snappy.parquet.crc").write_bytes(b"crc")
    for name in ("_SUCCESS", "_committed_1", "_metadata", "_temporary/0/part-00009.parquet", "README.md"):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text("no data")


def _by_partitions(path: Path, samples: list[Row]) -> None:
    for number in range(3):
        _write(path / f"date=2026-11-{number + 1:02}" / "0.parquet", samples[number * 10 : (number + 1) * 10])


@pytest.mark.parametrize(
    "write",
    [
        _by_pandas,
        _by_pandas_as_categories,
        _by_pyarrow,
        _by_pyarrow_as_large_text,
        _by_spark,
        _by_partitions,
    ],
    ids=lambda write: write.__name__,
)
@pytest.mark.parametrize("name", ["train.parquet", "lab.data.parquet", "data"])
def test_files_of_all_writers_are_read_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path, list[Row]], None], name: str
) -> None:
    """Rows would be missing, be trained twice or in another order; or a name with two dots be taken for a table's."""
    monkeypatch.chdir(tmp_path)
    path = Path(name if write in (_by_spark, _by_partitions) or "." in name else f"{name}.parquet")
    write(path, _pairs(range(30)))
    source = _open(path)
    assert _numbers(path) == list(range(30))
    assert source.size == sum(chunk.size for chunk in source.chunks()) == 30


def test_the_columns_of_a_chat_may_hold_more(tmp_path: Path) -> None:
    """Fields of other rows' messages, null in this one, would make every chat wrong."""
    rows = [_chat(1), _chat(2)]
    rows[1]["messages"][0]["name"] = "Ann"
    _write(tmp_path / "t.parquet", rows)
    (_, first), (_, second) = _samples(_open(tmp_path / "t.parquet", "CHAT_COMPLETION"))
    assert first == _chat(1)["messages"]
    assert isinstance(second, Problem) and second.rule == "message keys"


def test_a_completion_is_a_response(tmp_path: Path) -> None:
    """Two names are in use, and parts of a folder may differ in it."""
    _write(tmp_path / "t" / "a.parquet", _pairs([1]))
    _write(tmp_path / "t" / "b.parquet", [{"prompt": "2: ", "completion": "b"}])
    assert _numbers(tmp_path / "t") == [1, 2]


def test_bad_rows_are_reported_by_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody could find them among a million."""
    monkeypatch.setattr(table_rows, "BATCH_ROWS", 3)
    rows = _pairs(range(40))
    rows[4]["response"] = rows[9]["response"] = rows[39]["response"] = None
    rows[20]["prompt"] = ""
    outcome = check_structure(_open(_write(tmp_path / "train.parquet", rows, row_group_size=8)))
    null, empty = outcome.problems
    assert null.message.startswith("train.parquet, row 5: 'response' is a JSON null")
    assert null.message.endswith("3 of 40 rows are like this (5, 10, 40).") and null.where == [5, 10, 40]
    assert empty.message.startswith("train.parquet, row 21: 'prompt' is empty")
    assert (outcome.total, outcome.samples) == (40, 36)


def test_bad_rows_of_a_folder_are_reported_by_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A number over all files would have to be counted out by hand."""
    monkeypatch.setattr(table_rows, "BATCH_ROWS", 3)
    for part in range(3):
        rows = _pairs(range(10))
        rows[part]["response"] = rows[9]["response"] = None
        _write(tmp_path / "data" / f"part-{part}.parquet", rows if part != 1 else [], row_group_size=4)
    pq.write_table(pa.Table.from_pylist(_pairs([1]))[:0], tmp_path / "data" / "part-1.parquet")
    (null,) = check_structure(_open(tmp_path / "data")).problems
    assert null.message.startswith("part-0.parquet, row 1: 'response' is a JSON null")
    names = ["part-0.parquet, row 1", "part-0.parquet, row 10", "part-2.parquet, row 3", "part-2.parquet, row 10"]
    assert null.where == names
    assert null.message.endswith(f"4 of 20 rows are like this ({'; '.join(names)}).")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('[{"role": "user", "content": "a"}]', "the last message is from 'user'"),
        ('{"role": "user"}', "'messages' is a JSON object"),
        ("two and two?", "not JSON: "),
        ('[{"role": "user", "role": "user"}]', "the key role appears twice"),
        ("[" * 100_000, "nested too deeply"),
        ("[NaN]", "holds NaN"),
        ('[{"role": "user", "content": "\\ud83d"}, {"role": "assistant", "content": "b"}]', "half of a surrogate pair"),
    ],
)
def test_messages_as_text_are_read_as_strictly_as_lines(tmp_path: Path, text: str, found: str) -> None:
    """What is refused in a line would be trained from a column."""
    _write(tmp_path / "t.parquet", [{"messages": text}])
    ((_, problem),) = _samples(_open(tmp_path / "t.parquet", "CHAT_COMPLETION"))
    assert isinstance(problem, Problem) and found in problem.text and "line" not in problem.text.split("JSONL")[0]


def test_text_that_is_not_utf_8_is_reported(tmp_path: Path) -> None:
    """Other systems write what they call text."""
    texts = pa.array([b"fine", b"\xff\xfe"]).view(pa.string())
    pq.write_table(pa.table({"prompt": texts, "response": texts}), tmp_path / "t.parquet")
    (_, good), (_, bad) = _samples(_open(tmp_path / "t.parquet"))
    assert good == ("fine", "fine") and isinstance(bad, Problem) and bad.rule == "not UTF-8"


MESSAGE = pa.struct([("role", pa.string()), ("text", pa.string())])


@pytest.mark.parametrize(
    ("columns", "task_type", "problem"),
    [
        ({"q": ["a"], "response": ["b"]}, "INSTRUCTION_FINETUNE", "columns q, response"),
        ({"prompt": ["a"], "response": ["b"], "completion": ["c"]}, "INSTRUCTION_FINETUNE", "not both"),
        ({"prompt": ["a"], "response": ["b"]}, "CHAT_COMPLETION", "columns prompt, response"),
        ({"prompt": [1], "response": ["b"]}, "INSTRUCTION_FINETUNE", "the column prompt has the type int64"),
        ({"prompt": ["a"], "response": [b"b"]}, "INSTRUCTION_FINETUNE", "the column response has the type binary"),
        ({"messages": [["a"]]}, "CHAT_COMPLETION", "the column messages has the type list<element: string>"),
        ({"messages": [{"role": "user"}]}, "CHAT_COMPLETION", "the column messages has the type struct<"),
        (
            {"messages": pa.array([[]], pa.list_(MESSAGE))},
            "CHAT_COMPLETION",
            "it must be a list of structs with role and content, or JSON text",
        ),
    ],
)
def test_columns_that_hold_no_samples_are_refused(
    tmp_path: Path, columns: Any, task_type: TaskType, problem: str
) -> None:
    """The caller would see one problem a row, or none that says which columns there are."""
    pq.write_table(pa.table(columns), tmp_path / "train.parquet")
    text = _refusal(tmp_path / "train.parquet", task_type)
    assert text.startswith(f"{tmp_path / 'train.parquet'}: ") and problem in text


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    """The second one would be trained, and the first one be dropped in silence."""
    table = pa.table([["a"], ["b"], ["c"]], names=["prompt", "response", "prompt"])
    pq.write_table(table, tmp_path / "t.parquet")
    assert "has two columns named prompt" in _refusal(tmp_path / "t.parquet")


def test_all_files_of_a_folder_that_are_wrong_are_named(tmp_path: Path) -> None:
    """The caller would mend one after the other."""
    _write(tmp_path / "data" / "a.parquet", _pairs([1]))
    _write(tmp_path / "data" / "b.parquet", [{"question": "a"}])
    _write(tmp_path / "data" / "c.parquet", [{"prompt": 1, "response": "b"}])
    (tmp_path / "data" / "d.parquet").write_text("prompt,response\n")
    first, second, third = _refusals(tmp_path / "data")
    assert first.startswith(f"{tmp_path / 'data'}/b.parquet: has the columns question")
    assert second.startswith(f"{tmp_path / 'data'}/c.parquet: the column prompt has the type int64")
    assert third.startswith(f"{tmp_path / 'data'}/d.parquet: is not a Parquet file")
    for number in range(30):
        (tmp_path / "data" / f"e{number}.parquet").write_text("x")
    *some, last = _refusals(tmp_path / "data")
    assert len(some) == 20 and last.endswith("33 of 34 files have problems.")


def test_what_only_has_the_name_of_a_parquet_file_is_refused(tmp_path: Path) -> None:
    """The caller would read an error of Arrow about magic bytes."""
    file = _write(tmp_path / "train.parquet", _pairs(range(100)))
    content = file.read_bytes()
    for damaged, problem in {
        b"prompt,response\na,b\n": "is not a Parquet file, whatever its name",
        b"": "is not a Parquet file, whatever its name",
        b"PAR1": "ends too early to be a whole Parquet file",
        content[:-100]: "ends too early to be a whole Parquet file",
        content[:-4] + b"PARE": "is encrypted",
        content[:-20] + b"\xff" * 8 + content[-12:]: "its metadata cannot be read (",
        b"PAR1" + b"\xff" * 8 + b"PAR1": "its metadata cannot be read (",
    }.items():
        file.write_bytes(damaged)
        assert _refusal(file).startswith(f"{file}: {problem}")


def _read_mutated(path: str, content: bytes, count: int) -> list[str]:
    """What comes of a file with some bytes changed, or cut off, so many times."""
    chance, seen = random.Random(5), set[str]()
    for _ in range(count):
        damaged = bytearray(content)
        for _ in range(chance.choice([1, 3, 40])):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        Path(path).write_bytes(damaged)
        try:
            samples = _samples(_open(path))
            assert all(isinstance(sample, tuple | Problem) for _, sample in samples)
            seen.add("read")
        except (SpecError, DataError) as error:
            assert error.message.startswith((f"{path}: ", "train.parquet"))
            seen.add(type(error).__name__)
    return sorted(seen)


def test_damaged_files_end_in_a_sentence(tmp_path: Path) -> None:
    """A disk's error would end in a trace, or end the process."""
    file = _write(tmp_path / "train.parquet", _pairs(range(200)), row_group_size=50, write_page_checksum=True)
    seen = guarded(_read_mutated, str(file), file.read_bytes(), 300)
    assert {"SpecError", "DataError"} <= set(seen)


def test_a_changed_text_is_noticed_by_its_checksum(tmp_path: Path) -> None:
    """What the disk made of the text would be trained."""
    rows = [{"prompt": "a unique prompt", "response": "b"}]
    file = _write(
        tmp_path / "t.parquet", rows, write_page_checksum=True, compression="none", use_dictionary=False,
        write_statistics=False,
    )  # fmt: skip
    content = file.read_bytes()
    assert content.count(b"a unique prompt") == 1
    file.write_bytes(content.replace(b"a unique prompt", b"a vnique prompt"))
    with pytest.raises(DataError, match=r"^t\.parquet: the file is damaged or cannot be read \(.*CRC"):
        _samples(_open(file))


def test_rows_that_the_metadata_does_not_count_are_an_error(tmp_path: Path) -> None:
    """Rows would be missing in silence, and the numbers of those after them be wrong."""
    file = _write(tmp_path / "t.parquet", _pairs(range(10)))
    group = RowGroup("", 0, 0, 12, 1)
    with pytest.raises(DataError, match="it has 10 rows where its metadata promises 12"):
        _samples(ParquetRows(file, "t.parquet", RULES, ("",), (group,)))


def _outcome(path: str, model: str) -> Outcome:
    source = _open(path)
    return examine(source, Job(model=model, task_type="INSTRUCTION_FINETUNE", context_length=64))


@pytest.mark.parametrize("kind", ["one text", "a dictionary"])
def test_a_small_file_of_huge_texts_is_refused(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A few kilobytes could take all memory of the machine."""
    monkeypatch.setattr(table_rows, "BATCH_BYTES", 64 << 20)
    monkeypatch.setattr("tundish.data.parquet.BATCH_BYTES", 64 << 20)
    huge = "x" * (100 << 20) if kind == "one text" else "x" * (1 << 20)
    texts = [huge] if kind == "one text" else [huge] * 200
    table = pa.table({"prompt": ["a"] * 3 + texts, "response": ["b"] * (3 + len(texts))})
    pq.write_table(table, tmp_path / "train.parquet", compression="zstd")
    assert (tmp_path / "train.parquet").stat().st_size < 1 << 20
    with pytest.raises(DataError, match=r"train\.parquet, row \d: this row and those after it take more than 64 MiB"):
        guarded(_outcome, str(tmp_path / "train.parquet"), str(tiny_model))


def test_a_huge_row_group_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pandas writes a million rows in one: they would take all memory, or the file be refused."""
    texts = [random.Random(number).randbytes(500).hex() for number in range(100_000)]
    table = pa.table({"prompt": texts, "response": ["b"] * len(texts)})
    file = tmp_path / "t.parquet"
    pq.write_table(table, file, row_group_size=len(texts), use_dictionary=False, compression="none")
    del table
    assert pq.read_metadata(file).num_row_groups == 1 and file.stat().st_size > 96 << 20
    monkeypatch.setattr(table_rows, "BATCH_BYTES", 64 << 20)
    assert guarded(_count, str(file)) == len(texts)


def _count(path: str) -> int:
    return sum(chunk.units for chunk in _open(path).chunks())


@pytest.mark.parametrize("kind", [pa.string(), pa.null()])
def test_files_without_rows_are_an_error(tmp_path: Path, kind: pa.DataType) -> None:
    """A run would train on nothing and succeed; pandas writes empty columns as those of nulls."""
    nothing = pa.array([], kind)
    pq.write_table(pa.table({"prompt": nothing, "response": nothing}), tmp_path / "none.parquet")
    source = _open(tmp_path / "none.parquet")
    assert source.size == 0 and len(source.parts(100)) == 1
    with pytest.raises(DataError, match=r"none\.parquet: holds no sample"):
        check_structure(source)


def test_a_file_of_a_delta_table_is_not_read_alone(tmp_path: Path) -> None:
    """Rows that the table has deleted or rewritten would be trained."""
    write_deltalake(tmp_path / "t", pa.Table.from_pylist([_pair(1) | {"kind": "a"}]), partition_by=["kind"])
    (file,) = (tmp_path / "t").rglob("*.parquet")
    for path in (file, file.parent):
        assert (
            _refusal(path) == f"{path}: belongs to the Delta table {tmp_path / 't'}. Give the table's folder instead."
        )
    assert _numbers(tmp_path / "t") == [1]


def test_folders_that_hold_more_than_one_thing_are_refused(tmp_path: Path, write_lines: WriteLines) -> None:
    """Half of the data would be left out in silence; or the test split be trained."""
    _write(tmp_path / "mixed" / "a.parquet", _pairs([1]))
    write_lines(tmp_path / "mixed" / "b.jsonl", _pairs([2]))
    problem = _refusal(tmp_path / "mixed")
    assert problem.startswith(
        f"{tmp_path / 'mixed'}: holds .parquet files beside b.jsonl; a folder is read as one kind"
    )
    for name in ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet"):
        _write(tmp_path / "hub" / name, _pairs([1]))
    problem = _refusal(tmp_path / "hub")
    assert "holds several splits (test-00000-of-00001.parquet, train-00000-of-00001.parquet)" in problem
    _write(tmp_path / "warehouse" / "a.parquet", _pairs([1]))
    write_deltalake(tmp_path / "warehouse" / "b", pa.Table.from_pylist(_pairs([2])))
    problem = _refusal(tmp_path / "warehouse")
    assert problem.startswith(f"{tmp_path / 'warehouse'}: holds the Delta table {tmp_path / 'warehouse' / 'b'}, whose")
    _write(tmp_path / "links" / "a.parquet", _pairs([1]))
    (tmp_path / "links" / "b.parquet").symlink_to(tmp_path / "mixed" / "a.parquet")
    assert "1 links out of the folder" in _refusal(tmp_path / "links")
    (tmp_path / "empty").mkdir()
    assert "is a folder; INSTRUCTION_FINETUNE takes a .jsonl file" in _refusal(tmp_path / "empty")
    (tmp_path / "empty.parquet" / "kind=a").mkdir(parents=True)
    assert _refusal(tmp_path / "empty.parquet").endswith("holds no .parquet file. Folders inside it are searched too.")


def test_a_folder_named_like_a_split_is_one_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` would read all that lies beside the folder as the split of that name."""
    monkeypatch.setattr("datasets.load_dataset_builder", None)
    _write(tmp_path / "data" / "train" / "0.parquet", _pairs([1]))
    _write(tmp_path / "data" / "test" / "0.parquet", _pairs([2]))
    assert _numbers(tmp_path / "data" / "train") == [1]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 15)), min_size=1, max_size=5),
    st.integers(1, 4000),
    st.sampled_from([3, 256]),
)
def test_parts_are_all_of_it_once(
    tmp_path_factory: pytest.TempPathFactory, files: list[tuple[int, int]], size: int, batch_rows: int
) -> None:
    """Machines that share a folder would train some rows twice, or never; or name others than one machine does."""
    folder = tmp_path_factory.mktemp("parts")
    for number, (count, group_size) in enumerate(files):
        rows = pa.Table.from_pylist(_pairs(range(count)) or _pairs([1]))[:count]
        pq.write_table(rows, folder / f"{number}.parquet", row_group_size=group_size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table_rows, "BATCH_ROWS", batch_rows)
        for source in (_open(folder), _open(folder / "0.parquet")):
            parts = source.parts(size)
            assert [sample for _, sample in _samples(*parts)] == [sample for _, sample in _samples(source)]
            assert [name for name, _ in _samples(*parts)] == [name for name, _ in _samples(source)]
            assert sum(part.size or 0 for part in parts) == source.size and len(parts) >= 1
    names = [name for name, _ in _samples(_open(folder))]
    assert names == [f"{n}.parquet, row {row + 1}" for n, (count, _) in enumerate(files) for row in range(count)]


def test_the_same_file_is_prepared_once_and_another_one_anew(tmp_path: Path, tiny_model: Path) -> None:
    """Every run would tokenize its data again, or be trained on that of before."""
    job = Job(model=str(tiny_model), task_type="INSTRUCTION_FINETUNE", context_length=64)
    file = _write(tmp_path / "a.parquet", _pairs(range(20)))
    first = prepare(_open(file), job)
    assert prepare(_open(file.rename(tmp_path / "b.parquet")), job) == first
    file = _write(tmp_path / "b.parquet", _pairs(range(21)))
    assert prepare(_open(file), job).folder != first.folder
    folder = _write(tmp_path / "data" / "a.parquet", _pairs(range(20))).parent
    digest = _open(folder).digest()
    (folder / "a.parquet").rename(folder / "z.parquet")
    assert _open(folder).digest() != digest, "names decide the order"


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    """Half of one file and half of another would be found under the digest of the first."""
    file = _write(tmp_path / "a.parquet", _pairs(range(600)))
    job = Job(model=str(tiny_model), task_type="INSTRUCTION_FINETUNE", context_length=64)
    with pytest.raises(DataError, match=r"a\.parquet: changed while it was read"):
        prepare(_open(file), job, progress=lambda done, total: os.utime(file, ns=(done, done)))


def test_a_run_s_report_names_file_and_row(tmp_path: Path, tiny_model: Path) -> None:
    """The first thing that a caller sees of the data would not say where it is wrong."""
    from tundish import foundation_model as fm

    _write(tmp_path / "data" / "part-0.parquet", _pairs(range(5)))
    _write(tmp_path / "data" / "part-1.parquet", [*_pairs(range(3)), {"prompt": "a", "response": ""}])
    settings: dict[str, Any] = {"task_type": "INSTRUCTION_FINETUNE", "eval_data_path": str(tmp_path / "eval.parquet")}
    _write(tmp_path / "eval.parquet", _pairs(range(4)))
    report = fm.validate(str(tiny_model), str(tmp_path / "data"), **settings)
    train, held_out = report.reports
    assert not report.ok and "problem: part-1.parquet, row 4: 'response' is empty" in str(report)
    assert (train.total, train.samples, held_out.total, held_out.problems) == (9, 8, 4, [])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["file", "prefix", "file that is a prefix"])
def test_objects_are_read_like_local_files(tmp_path: Path, bucket: Bucket, kind: str) -> None:
    """Data in a store would be refused, or read in another order."""
    content = _write(tmp_path / "a.parquet", _pairs(range(10))).read_bytes()
    more = _write(tmp_path / "b.parquet", _pairs(range(10, 15))).read_bytes()
    match kind:
        case "file":
            uri, count = bucket.put("deep/train.parquet", content), 10
        case "prefix":
            for name in ("_SUCCESS", "notes.md", "_temporary/x.parquet"):
                bucket.put(f"deep/data/{name}", b"x")
            bucket.put("deep/data/part-1.parquet", more)
            uri, count = bucket.put("deep/data/part-0.parquet", content).rpartition("/")[0], 15
        case _:
            bucket.put("train.parquet/part-1.parquet", more)
            uri, count = bucket.put("train.parquet/part-0.parquet", content).rpartition("/")[0], 15
    assert _numbers(uri) == list(range(count))
    assert _open(uri).place.source == uri.rpartition("/")[2]


@pytest.mark.slow
def test_a_table_in_a_store_is_not_read_as_its_files(tmp_path: Path, bucket: Bucket) -> None:
    """Its old rows are in .parquet files, too, which its log does not count any more."""
    options = {"AWS_ENDPOINT_URL": os.environ["S3_ENDPOINT_URL"], "AWS_ALLOW_HTTP": "true"}
    write_deltalake(bucket.uri("t"), pa.Table.from_pylist(_pairs([1])), storage_options=options)
    others = pa.Table.from_pylist([{"question": "a"}])
    write_deltalake(bucket.uri("t"), others, mode="overwrite", schema_mode="overwrite", storage_options=options)
    assert "has the columns question" in _refusal(bucket.uri("t"))


@pytest.mark.slow
@pytest.mark.parametrize("below", ["data", "data.parquet"])
def test_prefixes_that_hold_more_than_one_thing_are_refused(tmp_path: Path, bucket: Bucket, below: str) -> None:
    """As of a folder: the test split would be trained, or the old rows of a table; and all be downloaded first."""
    content = _write(tmp_path / "a.parquet", _pairs([1])).read_bytes()
    uri = bucket.put(f"1/{below}/train/0.parquet", content).removesuffix("/train/0.parquet")
    bucket.put(f"1/{below}/test/0.parquet", content)
    problem = _refusal(uri)
    assert problem.startswith(f"{uri}: holds several splits (test/0.parquet, train/0.parquet), which would")
    uri = bucket.put(f"2/{below}/a.parquet", content).removesuffix("/a.parquet")
    bucket.put(f"2/{below}/b.jsonl", b"{}")
    assert _refusal(uri).startswith(f"{uri}: holds .parquet files beside b.jsonl; a folder is read as one kind")
    uri = bucket.put(f"3/{below}/table/a.parquet", content).removesuffix("/table/a.parquet")
    bucket.put(f"3/{below}/table/_delta_log/00000000000000000000.json", b"{}")
    assert _refusal(uri).startswith(f"{uri}: holds the Delta table {uri}/table, whose log says")
    assert not list(downloads_dir().glob("*/**/*.parquet"))


@pytest.mark.slow
def test_a_missing_object_is_named(bucket: Bucket) -> None:
    """The caller would read that a Delta table is missing, which was not asked for."""
    bucket.put("train.jsonl", b"{}")
    assert _refusal(bucket.uri("train.parquet")).startswith(f"{bucket.uri('train.parquet')}: it does not exist.")
