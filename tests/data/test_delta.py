"""data/delta.py, data/huggingface.py: the rows of a table or of a split; no others, and no other files."""

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake

from tundish.data import huggingface
from tundish.data.encoding import Job
from tundish.data.manifest import Prepared
from tundish.data.opening import open_source
from tundish.data.prepare import prepare
from tundish.data.samples import Problem
from tundish.data.source import Source
from tundish.errors import DataError, SpecError
from tundish.plan import address
from tundish.plan.address import Address
from tundish.plan.spec import TaskType

# Streaming's LocalDataset leaves index.json open.
pytestmark = pytest.mark.filterwarnings(r"ignore:unclosed file .*index\.json:ResourceWarning")

WriteLines = Callable[[Path, Iterable[object]], Path]
Row = dict[str, Any]


def _pair(number: int) -> Row:
    return {"prompt": f"{number}: two and two? ", "response": "fox " * (number % 7) + f"four {number}"}


def _chat(number: int) -> Row:
    said = {"user": f"{number}: two and two?", "assistant": "fox " * (number % 7) + f"four {number}"}
    return {"messages": [{"role": role, "content": content} for role, content in said.items()]}


def _write(path: Path, rows: Iterable[Row], **how: Any) -> Path:
    """Write rows into the Delta table at a path."""
    write_deltalake(str(path), pa.Table.from_pylist(list(rows)), **how)
    return path


def _open(given: object, task_type: TaskType = "INSTRUCTION_FINETUNE") -> Source:
    return open_source(Address.parse(str(given), "data"), task_type, system_message=True)


def _samples(source: Source) -> list[Any]:
    return [sample for chunk in source.chunks() for _, sample in chunk.samples(source.rules)]


def _prompts(given: object) -> list[str]:
    return [prompt for prompt, _ in _samples(_open(given))]


def _numbers(given: object) -> list[int]:
    """The numbers of the pairs at a place, in order."""
    return [int(prompt.split(":")[0]) for prompt in _prompts(given)]


def _refusal(given: object, task_type: TaskType = "INSTRUCTION_FINETUNE") -> str:
    """The one problem of a path that cannot be opened."""
    with pytest.raises(SpecError) as error:
        _open(given, task_type)
    (problem,) = error.value.problems
    assert problem.isprintable(), "one line, and no commands for a terminal"
    return problem


def _prepare(source: Source, model: Path) -> Prepared:
    return prepare(source, Job(model=str(model), task_type=source.rules.task_type, context_length=64))


def _tokens(prepared: Prepared) -> list[tuple[bytes, bytes]]:
    """Tokens and mask of every sample of prepared data, sorted."""
    from streaming import LocalDataset

    dataset = LocalDataset(prepared.folder)
    found: list[tuple[bytes, bytes]] = []
    for row in (dataset[number] for number in range(len(dataset))):
        borders = np.cumsum(row["segments"])[:-1]
        parts = zip(np.split(row["tokens"], borders), np.split(row["loss_mask"], borders), strict=True)
        found.extend((tokens.tobytes(), mask.tobytes()) for tokens, mask in parts)
    return sorted(found)


def _log(table: Path) -> Path:
    """The file of the table's newest commit."""
    return max((table / "_delta_log").glob("*.json"))


def _actions(table: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in _log(table).read_text().splitlines()]


def _edit_log(table: Path, edit: Callable[[str, dict[str, Any]], object]) -> None:
    """Change the content of the actions of the newest commit."""
    actions = _actions(table)
    for action in actions:
        for name, content in action.items():
            edit(name, content)
    _log(table).write_text("".join(json.dumps(action) + "\n" for action in actions))


def _delete_by_vector(table: Path, rows_of_file: Mapping[str, Sequence[int]]) -> None:
    """Commit a deletion vector, as Spark writes one on DELETE: `rows_of_file` by the path in the log."""
    files = {action["add"]["path"]: action["add"] for action in _all_actions(table) if "add" in action}
    feature = ["deletionVectors"]
    features = {"minReaderVersion": 3, "minWriterVersion": 7, "readerFeatures": feature, "writerFeatures": feature}
    actions: list[dict[str, Any]] = [{"protocol": features}]
    for path, rows in rows_of_file.items():
        # The portable format of a 64-bit Roaring bitmap, with one array container.
        bitmap = struct.pack("<IIHHI", 12346, 1, 0, len(rows) - 1, 16) + struct.pack(f"<{len(rows)}H", *rows)
        data = struct.pack("<IQI", 1681511377, 1, 0) + bitmap
        inline = _z85(data + b"\0" * (-len(data) % 4))
        vector = {"storageType": "i", "pathOrInlineDv": inline, "sizeInBytes": len(data), "cardinality": len(rows)}
        actions.append({"remove": {"path": path, "deletionTimestamp": 1, "dataChange": True}})
        actions.append({"add": files[path] | {"deletionVector": vector}})
    following = int(_log(table).stem) + 1
    (table / "_delta_log" / f"{following:020}.json").write_text("".join(json.dumps(a) + "\n" for a in actions))


def _all_actions(table: Path) -> list[dict[str, Any]]:
    logs = sorted((table / "_delta_log").glob("*.json"))
    return [json.loads(line) for log in logs for line in log.read_text().splitlines()]


def _z85(data: bytes) -> str:
    """ZeroMQ's Base85, which Delta's protocol names."""
    letters = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"
    values = (int.from_bytes(data[start : start + 4], "big") for start in range(0, len(data), 4))
    return "".join(letters[value // 85**place % 85] for value in values for place in (4, 3, 2, 1, 0))


# Delta tables: which rows.


def test_chats_of_a_table_are_those_of_the_same_jsonl(
    tiny_model: Path, tmp_path: Path, write_lines: WriteLines
) -> None:
    """A table would train another model than a file with the same chats; other columns must not matter."""
    chats = [_chat(number) for number in range(40)]
    others = {"id": 7, "source": "web", "score": 0.5}
    table = _open(_write(tmp_path / "chats", [chat | others for chat in chats]), "CHAT_COMPLETION")
    lines = _open(write_lines(tmp_path / "chats.jsonl", chats), "CHAT_COMPLETION")
    assert _samples(table) == [chat["messages"] for chat in chats]
    one, other = _prepare(table, tiny_model), _prepare(lines, tiny_model)
    assert _tokens(one) == _tokens(other) and len(_tokens(one)) == 40
    assert (one.samples, one.rows, one.tokens, one.units) == (other.samples, other.rows, other.tokens, other.units)


@pytest.mark.parametrize("response", ["response", "completion"])
def test_pairs_of_a_table_are_those_of_the_same_jsonl(
    tiny_model: Path, tmp_path: Path, write_lines: WriteLines, response: str
) -> None:
    """Tables with the column `completion` would be refused, or other columns get into the text."""
    pairs = [{"prompt": _pair(n)["prompt"], response: _pair(n)["response"]} for n in range(40)]
    table = _open(_write(tmp_path / "pairs", [{"id": 1} | pair | {"tag": "x"} for pair in pairs]))
    lines = _open(write_lines(tmp_path / "pairs.jsonl", pairs))
    assert _samples(table) == _samples(lines) == [tuple(pair.values()) for pair in pairs]
    assert _tokens(_prepare(table, tiny_model)) == _tokens(_prepare(lines, tiny_model))


def test_messages_may_have_fields_that_are_null(tmp_path: Path) -> None:
    """A struct has all fields in every row: each chat would be refused for a `name` that nobody gave."""
    rows = [_chat(1), {"messages": [message | {"name": None, "tool_calls": None} for message in _chat(2)["messages"]]}]
    source = _open(_write(tmp_path / "t", rows, schema_mode="merge"), "CHAT_COMPLETION")
    assert _samples(source) == [_chat(1)["messages"], _chat(2)["messages"]]


def test_a_field_of_a_message_that_is_not_null_is_refused(tmp_path: Path) -> None:
    """A tool call would be dropped in silence, and the chat trained without it."""
    rows = [{"messages": [message | {"name": "Ada"} for message in _chat(1)["messages"]]}]
    (problem,) = _samples(_open(_write(tmp_path / "t", rows), "CHAT_COMPLETION"))
    assert isinstance(problem, Problem) and problem.text.startswith("message 1 must have role and content")


def test_all_appends_are_read_once(tmp_path: Path) -> None:
    """All but the last append would be missing, or rows be trained twice."""
    for start in range(0, 50, 10):
        _write(tmp_path / "t", map(_pair, range(start, start + 10)), mode="append")
    source = _open(tmp_path / "t")
    assert sorted(_numbers(tmp_path / "t")) == list(range(50)) and source.size == 50


def test_the_order_of_rows_does_not_depend_on_the_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same table would make other shards on another day; many small batches must be as few large ones."""
    for start in range(0, 60, 20):
        _write(tmp_path / "t", map(_pair, range(start, start + 20)), mode="append")
    expected = _numbers(tmp_path / "t")
    assert [number for number in expected if number < 20] == list(range(20))
    monkeypatch.setattr("tundish.data.rows.BATCH_ROWS", 3)
    source = _open(tmp_path / "t")
    assert _numbers(tmp_path / "t") == expected and len(list(source.chunks())) == 3 * 7
    assert sum(chunk.units for chunk in source.chunks()) == sum(chunk.size for chunk in source.chunks()) == 60


def test_deleted_rows_are_not_read(tmp_path: Path) -> None:
    """What was deleted, for privacy perhaps, is still in files of the folder and would be trained."""
    _write(tmp_path / "t", [_pair(number) | {"x": number} for number in range(10)])
    DeltaTable(tmp_path / "t").delete("x in (3, 9)")
    assert _numbers(tmp_path / "t") == [0, 1, 2, 4, 5, 6, 7, 8]
    assert len(list((tmp_path / "t").glob("*.parquet"))) == 2, "the old file is still there"


@pytest.mark.parametrize("batch_rows", [4, 256])
@pytest.mark.parametrize("name", ["t", "my täble #1"])
def test_rows_deleted_by_a_vector_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_rows: int, name: str
) -> None:
    """Databricks deletes by vectors: the rows are still in the file, and a plain Parquet reader would train them."""
    monkeypatch.setattr("tundish.data.rows.BATCH_ROWS", batch_rows)
    table = tmp_path / name
    table.mkdir()  # delta-rs makes none with such a name
    _write(table, map(_pair, range(10)))
    _write(table, map(_pair, range(10, 20)), mode="append")
    _write(table, map(_pair, range(20, 30)), mode="append")
    first, _, third = (action["add"]["path"] for action in _all_actions(table) if "add" in action)
    _delete_by_vector(table, {first: [2, 5], third: [0, 7, 8, 9]})
    kept = [*(n for n in range(10) if n not in (2, 5)), *range(10, 20), *range(21, 27)]
    assert sorted(_numbers(table)) == kept


def test_rows_deleted_by_a_vector_in_a_partition_are_not_read(tmp_path: Path) -> None:
    """Names of partitions are written in several ways; a vector that finds no file would delete nothing."""
    for value in ("a b", "c%20d", "é/f:g"):
        table = tmp_path / str(len(list(tmp_path.iterdir())))
        _write(table, [_pair(number) | {"kind": value} for number in range(5)], partition_by=["kind"])
        (path,) = (action["add"]["path"] for action in _actions(table) if "add" in action)
        _delete_by_vector(table, {path: [1, 2]})
        assert _numbers(table) == [0, 3, 4]


def test_an_overwritten_table_is_its_last_version(tmp_path: Path) -> None:
    """Rows of older versions would be trained."""
    _write(tmp_path / "t", map(_pair, range(10)))
    _write(tmp_path / "t", map(_pair, range(20, 25)), mode="overwrite")
    source = _open(tmp_path / "t")
    assert _numbers(tmp_path / "t") == list(range(20, 25)) and source.size == 5


def test_a_source_stays_at_the_version_that_was_opened(tmp_path: Path) -> None:
    """Rows that come while a run prepares would make a mixture that no version ever was."""
    _write(tmp_path / "t", map(_pair, range(5)))
    source = _open(tmp_path / "t")
    _write(tmp_path / "t", map(_pair, range(20, 25)), mode="overwrite")
    _write(tmp_path / "t", map(_pair, range(30, 35)), mode="append")
    assert [prompt for prompt, _ in _samples(source)] == [_pair(number)["prompt"] for number in range(5)]
    assert source.place.of(2) == f"{tmp_path / 't'} (version 0), row 2"


def test_the_digest_tells_versions_and_tables(tmp_path: Path) -> None:
    """Changed data would be taken for the data that was prepared before, or the same prepared for every run."""
    _write(tmp_path / "t", map(_pair, range(5)))
    first = _open(tmp_path / "t").digest()
    assert _open(tmp_path / "t").digest() == first
    _write(tmp_path / "t", map(_pair, range(5)), mode="append")
    appended = _open(tmp_path / "t").digest()
    _write(tmp_path / "t", map(_pair, range(5)), mode="overwrite")
    overwritten = _open(tmp_path / "t").digest()
    (path,) = (action["add"]["path"] for action in _actions(tmp_path / "t") if "add" in action)
    _delete_by_vector(tmp_path / "t", {path: [1]})
    deleted = _open(tmp_path / "t").digest()
    other = _open(_write(tmp_path / "other", map(_pair, range(5)))).digest()
    assert len({first, appended, overwritten, deleted, other}) == 5


def test_partitioned_tables_are_read(tmp_path: Path) -> None:
    """Files in folders of partitions, with all the signs that a value can have, would not be found."""
    values = ["a b", "c/d", "e%20f", "g:h", "j#k", "ü"]
    rows = [_pair(number) | {"kind": value} for number, value in enumerate(values)]
    _write(tmp_path / "t", rows, partition_by=["kind"])
    assert sorted(_numbers(tmp_path / "t")) == list(range(6))


def test_a_table_without_statistics_is_read(tmp_path: Path, tiny_model: Path) -> None:
    """Writers need not count the rows: an unknown number would be taken for none, or end in a trace."""
    _write(tmp_path / "t", map(_pair, range(5)))
    _edit_log(tmp_path / "t", lambda name, content: content.pop("stats") if name == "add" else None)
    source = _open(tmp_path / "t")
    assert _numbers(tmp_path / "t") == list(range(5)) and source.size in (None, 5)
    assert _prepare(source, tiny_model).samples == 5


def test_a_table_whose_log_has_a_checkpoint_is_read(tmp_path: Path) -> None:
    """Tables with more than a few commits have one; rows before it would be missing."""
    for number in range(3):
        _write(tmp_path / "t", [_pair(number)], mode="append")
    DeltaTable(tmp_path / "t").create_checkpoint()
    for version in (0, 1):
        (tmp_path / "t" / "_delta_log" / f"{version:020}.json").unlink()
    _write(tmp_path / "t", [_pair(3)], mode="append")
    assert sorted(_numbers(tmp_path / "t")) == [0, 1, 2, 3]


def test_an_empty_table_is_an_error(tmp_path: Path, tiny_model: Path) -> None:
    """A run would train on nothing and succeed."""
    _write(tmp_path / "t", map(_pair, range(5)))
    DeltaTable(tmp_path / "t").delete()
    with pytest.raises(DataError, match=r"t \(version 1\): holds no sample"):
        _prepare(_open(tmp_path / "t"), tiny_model)


# Delta tables: names and refusals.


def test_a_name_of_three_parts_is_a_table_of_the_workspace(home: Path) -> None:
    """A notebook's `catalog.schema.table` would not be found, or another table be read."""
    _write(home / "tables" / "main" / "my-lab" / "chats", map(_pair, range(5)))
    _write(home / "tables" / "main" / "my-lab" / "others", map(_pair, range(9)))
    assert _numbers("main.my-lab.chats") == list(range(5))
    assert _open("main.my-lab.chats").place.of(3) == "main.my-lab.chats (version 0), row 3"


def test_a_table_that_is_not_there_is_named(home: Path, tmp_path: Path) -> None:
    """The caller would read a trace, not learn where tables are looked for, or leave an empty folder behind."""
    problem = _refusal("main.lab.none")
    place = home / "tables" / "main" / "lab" / "none"
    beside = f"nor is there a file or folder {Path.cwd()}/main.lab.none"
    assert problem.startswith(f"main.lab.none: there is no Delta table of that name ({place}), {beside}; ")
    assert problem.endswith("Check the name.") and not home.exists()
    (tmp_path / "t" / "_delta_log").mkdir(parents=True)
    assert _refusal(tmp_path / "t").startswith(f"{tmp_path / 't'}: there is no Delta table to read at")


@pytest.mark.parametrize(
    ("task_type", "columns", "needed"),
    [
        ("CHAT_COMPLETION", ["prompt", "response"], "messages"),
        ("INSTRUCTION_FINETUNE", ["messages", "id"], "prompt and response (or completion, not both)"),
        ("INSTRUCTION_FINETUNE", ["prompt", "answer"], "prompt and response (or completion, not both)"),
        ("INSTRUCTION_FINETUNE", ["response"], "prompt and response (or completion, not both)"),
        ("INSTRUCTION_FINETUNE", ["prompt", "response", "completion"], "prompt and response (or completion, not both)"),
    ],
)
def test_missing_columns_are_told_with_those_that_are_there(
    tmp_path: Path, task_type: TaskType, columns: list[str], needed: str
) -> None:
    """The caller would see one problem a row, or not learn which column is missing or doubled."""
    table = _write(tmp_path / "t", [dict.fromkeys(columns, "x")])
    problem = _refusal(table, task_type)
    assert problem.startswith(f"{table}: has the columns {', '.join(columns)}; {task_type} needs {needed}.")
    assert problem.endswith("Rename the columns, or choose another task_type.")


def test_bad_rows_are_told_by_their_numbers_in_the_snapshot(tmp_path: Path, tiny_model: Path, home: Path) -> None:
    """Nobody could find the bad one of a million rows; deleted rows and several files must not shift the numbers."""
    _write(tmp_path / "t", [_pair(number) | {"x": number} for number in range(10)])
    DeltaTable(tmp_path / "t").delete("x = 0")
    _write(tmp_path / "t", [_pair(10) | {"x": 10}], mode="append")
    bad = {"prompt": "why? ", "response": None, "x": 11}
    empty = {"prompt": "", "response": "so", "x": 12}
    schema = pa.schema([("prompt", pa.string()), ("response", pa.string()), ("x", pa.int64())])
    rows = pa.Table.from_pylist([bad, empty, bad], schema=schema)
    write_deltalake(str(tmp_path / "t"), rows, mode="append")
    source = _open(tmp_path / "t")
    # Files are read in the order of their names, which are made by chance.
    numbers = [number for number, sample in enumerate(_samples(source), 1) if isinstance(sample, Problem)]
    with pytest.raises(DataError) as error:
        _prepare(source, tiny_model)
    null, blank = error.value.problems
    place = f"{tmp_path / 't'} (version 3), row"
    assert null.startswith(f"{place} {numbers[0]}: 'response' is a JSON null; it must be text.")
    assert null.endswith(f"2 of 13 rows are like this ({numbers[0]}, {numbers[2]}).")
    assert blank.startswith(f"{place} {numbers[1]}: 'prompt' is empty")
    assert numbers in ([1, 2, 3], [2, 3, 4], [10, 11, 12], [11, 12, 13])
    assert not list((home / "prepared").glob("[!.]*"))


def test_numbers_of_bad_rows_go_on_over_batches(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The numbers would start again with each batch, or count the rows that a vector deletes."""
    monkeypatch.setattr("tundish.data.rows.BATCH_ROWS", 3)
    rows = [_pair(number) if number not in (4, 9) else {"prompt": "why? ", "response": ""} for number in range(12)]
    _write(tmp_path / "t", rows)
    (path,) = (action["add"]["path"] for action in _actions(tmp_path / "t") if "add" in action)
    _delete_by_vector(tmp_path / "t", {path: [0, 5]})
    with pytest.raises(DataError, match=r"t \(version 1\), row 4: .* 2 of 10 rows are like this \(4, 8\)\."):
        _prepare(_open(tmp_path / "t"), tiny_model)


def test_a_null_in_a_message_is_a_problem(tmp_path: Path) -> None:
    """The word None would be trained."""
    rows = [_chat(1), _chat(2), {"messages": None}]
    rows[1]["messages"][1]["content"] = None
    good, no_content, no_messages = _samples(_open(_write(tmp_path / "t", rows), "CHAT_COMPLETION"))
    assert good == _chat(1)["messages"]
    assert no_content.text == "the content of message 2 is a JSON null; it must be text."
    assert no_messages.text.startswith("'messages' is a JSON null")


def test_messages_of_another_shape_are_a_problem_of_the_row(tmp_path: Path) -> None:
    """A trace would end the run, or the text of a list be trained."""
    for number, messages in enumerate(["hello", ["hello"], {"role": "user", "content": "x"}]):
        (problem,) = _samples(_open(_write(tmp_path / str(number), [{"messages": messages}]), "CHAT_COMPLETION"))
        assert isinstance(problem, Problem)


@pytest.mark.parametrize(
    "name", ["../x.parquet", "%2E%2E/x.parquet", "{folder}/x.parquet", "file://{folder}/x.parquet"]
)
def test_a_log_that_names_files_outside_the_table_is_refused(tmp_path: Path, name: str) -> None:
    """Whoever makes a table could have any Parquet file of the reader's machine trained, and ask the model for it."""
    pq.write_table(pa.Table.from_pylist([_pair(666)]), tmp_path / "x.parquet")
    table = _write(tmp_path / "t", [_pair(1)])
    name = name.format(folder=tmp_path)
    _edit_log(table, lambda action, content: content.update(path=name) if action == "add" else None)
    problem = _refusal(table)
    assert problem.startswith(f"{table}: its log names") and "outside the table" in problem


def test_a_link_out_of_the_table_is_refused(tmp_path: Path) -> None:
    """The same, for a table that comes as an archive with links in it."""
    table = _write(tmp_path / "t", [_pair(666)])
    (file,) = table.glob("*.parquet")
    file.symlink_to(file.rename(tmp_path / "x.parquet"))
    problem = _refusal(table)
    assert problem.startswith(f"{table}: its log names {file.name!r}, outside the table")


def _map_columns(table: Path, reader_version: int) -> None:
    """Make a table's columns have other names in its files, as RENAME COLUMN does."""

    def edit(action: str, content: dict[str, Any]) -> None:
        if action == "protocol":
            content.update(minReaderVersion=reader_version, minWriterVersion=7 if reader_version == 3 else 5)
            if reader_version == 3:
                content.update(readerFeatures=["columnMapping"], writerFeatures=["columnMapping"])
        elif action == "metaData":
            content["configuration"] = {"delta.columnMapping.mode": "name", "delta.columnMapping.maxColumnId": "2"}
            schema = json.loads(content["schemaString"])
            for number, column in enumerate(schema["fields"], 1):
                physical = {"delta.columnMapping.id": number, "delta.columnMapping.physicalName": f"col-{number}"}
                column["metadata"] = physical
            content["schemaString"] = json.dumps(schema)

    _edit_log(table, edit)


@pytest.mark.parametrize("reader_version", [2, 3])
def test_mapped_columns_are_refused(tmp_path: Path, reader_version: int) -> None:
    """Columns would be read under names that they have no longer: other text than the table shows, or none."""
    table = _write(tmp_path / "t", [_pair(1)])
    _map_columns(table, reader_version)
    problem = _refusal(table)
    assert problem.startswith(f"{table}: the table uses columnMapping; only deletionVectors,")
    assert problem.endswith("Copy the rows into a plain table: CREATE TABLE … AS SELECT.")


@pytest.mark.parametrize("feature", ["typeWidening", "featureOfTomorrow"])
def test_unknown_features_are_refused(tmp_path: Path, feature: str) -> None:
    """A table would be read as if it did not have what changes its rows."""
    table = _write(tmp_path / "t", [_pair(1)])
    feature_lists = {"readerFeatures": [feature], "writerFeatures": [feature]}
    protocol = {"minReaderVersion": 3, "minWriterVersion": 7, **feature_lists}
    _edit_log(table, lambda action, content: content.update(protocol) if action == "protocol" else None)
    problem = _refusal(table)
    assert problem.startswith(f"{table}: ") and feature in problem


def test_a_column_of_the_sample_that_partitions_is_refused(tmp_path: Path) -> None:
    """Its values are in the log and not in the files: each row would be blamed for lacking the column."""
    table = _write(tmp_path / "t", map(_pair, range(3)), partition_by=["prompt"])
    problem = _refusal(table)
    assert problem.startswith(f"{table}: the table is partitioned by prompt")


@pytest.mark.parametrize("damage", ["removed", "cut"])
def test_a_damaged_table_is_an_error_of_the_data(tmp_path: Path, tiny_model: Path, damage: str) -> None:
    """A run would end in a trace that does not name the table."""
    table = _write(tmp_path / "t", [_pair(1)])
    (file,) = table.glob("*.parquet")
    file.unlink() if damage == "removed" else file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(DataError) as error:
        _prepare(_open(table), tiny_model)
    (problem,) = error.value.problems
    assert problem.startswith(f"{table}: a file of the table cannot be read (") and problem.isprintable()


# Hugging Face datasets.


@pytest.fixture
def datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of `datasets` for this test."""
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", str(tmp_path / "hf"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path, datasets_cache: Path, write_lines: WriteLines) -> Path:
    """A dataset of two splits: forty pairs to train, five held out."""
    (tmp_path / "lab").mkdir()
    write_lines(tmp_path / "lab" / "train.jsonl", [_pair(number) | {"id": number} for number in range(40)])
    write_lines(tmp_path / "lab" / "validation.jsonl", [_pair(number) | {"id": number} for number in range(50, 55)])
    return tmp_path / "lab"


def test_a_split_of_a_folder_is_the_same_as_its_jsonl(
    folder: Path, tmp_path: Path, tiny_model: Path, write_lines: WriteLines
) -> None:
    """A dataset would train another model than the file that it is made of; other columns must not matter."""
    source = _open(folder / "train")
    lines = _open(write_lines(tmp_path / "plain.jsonl", map(_pair, range(40))))
    assert _samples(source) == _samples(lines) and source.size == 40
    assert _tokens(_prepare(source, tiny_model)) == _tokens(_prepare(lines, tiny_model))


def test_chats_of_a_dataset_are_those_of_the_same_jsonl(
    tmp_path: Path, datasets_cache: Path, write_lines: WriteLines
) -> None:
    """Arrow keeps messages as structs; their order, or a chat's length, could be lost."""
    chats = [_chat(1), {"messages": _chat(2)["messages"] + _chat(3)["messages"]}]
    (tmp_path / "lab").mkdir()
    write_lines(tmp_path / "lab" / "train.jsonl", [chat | {"id": 1} for chat in chats])
    assert _samples(_open(tmp_path / "lab" / "train", "CHAT_COMPLETION")) == [chat["messages"] for chat in chats]


def test_order_and_count_do_not_depend_on_batches(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows at the border of a batch would be lost or doubled, or the numbers in messages be wrong."""
    monkeypatch.setattr(huggingface, "BATCH_ROWS", 7)
    source = _open(folder / "train")
    assert _numbers(folder / "train") == list(range(40)) and len(list(source.chunks())) == 6
    assert source.place.of(9) == f"{folder / 'train'}, row 9"


def test_each_split_is_its_own(folder: Path) -> None:
    """Held-out rows would be trained."""
    assert _numbers(folder / "validation") == list(range(50, 55))
    assert _open(folder / "train").digest() != _open(folder / "validation").digest()


def test_an_unknown_split_is_named_with_those_that_are_there(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller would not learn that what `datasets` makes of val.jsonl is called `validation`."""
    monkeypatch.chdir(tmp_path)
    for given in (folder / "val", "lab/val", "lab/test"):
        problem = _refusal(given)
        assert problem.startswith(f"{given}: ") and "train" in problem and "validation" in problem
    assert _refusal("lab/trian").endswith("Did you mean train.jsonl?")


def test_a_folder_for_each_split_is_read(tmp_path: Path, datasets_cache: Path, write_lines: WriteLines) -> None:
    """`lab/train` is a folder then, and not a split of the dataset `lab`: all of it would be read, or nothing."""
    for name, numbers in {"train": range(3), "val": range(5, 7)}.items():
        (tmp_path / "lab" / name).mkdir(parents=True)
        write_lines(tmp_path / "lab" / name / "part.jsonl", map(_pair, numbers))
    assert _numbers(tmp_path / "lab" / "train") == [0, 1, 2]
    assert _numbers(tmp_path / "lab" / "validation") == [5, 6]


@pytest.mark.parametrize(
    ("file", "split"),
    [
        ("data/train-00000-of-00001.jsonl", "train"),
        ("data/test-00000-of-00001.jsonl", "test"),
        ("data/validation-00000-of-00001.jsonl", "validation"),
        ("dev.jsonl", "validation"),
        ("eval.jsonl", "test"),
        ("rows.jsonl", "train"),
    ],
)
def test_splits_are_found_where_datasets_looks_for_them(
    tmp_path: Path, datasets_cache: Path, write_lines: WriteLines, file: str, split: str
) -> None:
    """Folders that were copied from the hub have their files in `data`: they would be refused as missing."""
    (tmp_path / "lab" / file).parent.mkdir(parents=True)
    write_lines(tmp_path / "lab" / file, map(_pair, range(3)))
    assert _numbers(tmp_path / "lab" / split) == [0, 1, 2]


def test_parquet_and_relative_names_are_read(
    tmp_path: Path, datasets_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most datasets are Parquet, in numbered files; a relative folder would be looked for on the hub."""
    (tmp_path / "lab").mkdir()
    for number in range(2):
        rows = pa.Table.from_pylist([_pair(10 * number + row) for row in range(3)])
        pq.write_table(rows, tmp_path / "lab" / f"train-{number:05}-of-00002.parquet")
    monkeypatch.chdir(tmp_path)
    assert _numbers("lab/train") == _numbers("./lab/train") == [0, 1, 2, 10, 11, 12]


def test_saved_datasets_are_read(tmp_path: Path, datasets_cache: Path) -> None:
    """What `save_to_disk` writes is another format, which would be refused or be read row by row as Arrow files."""
    import datasets

    one = datasets.Dataset.from_list([_pair(number) | {"id": number} for number in range(5)])
    one.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=one, test=one.select([3, 1])).save_to_disk(str(tmp_path / "both"))
    assert _numbers(tmp_path / "one") == _numbers(tmp_path / "both" / "train") == list(range(5))
    assert _numbers(tmp_path / "both" / "test") == [3, 1], "rows in the order of the selection"


def test_a_saved_dataset_that_is_damaged_is_refused(tmp_path: Path, datasets_cache: Path) -> None:
    """A run would end in a trace."""
    import datasets

    datasets.Dataset.from_list([_pair(1)]).save_to_disk(str(tmp_path / "one"))
    next((tmp_path / "one").glob("*.arrow")).unlink()
    assert _refusal(tmp_path / "one").startswith(f"{tmp_path / 'one'}: ")
    (tmp_path / "one" / "dataset_info.json").unlink()
    assert _refusal(tmp_path / "one").startswith(f"{tmp_path / 'one'}: ")


def test_changed_files_are_read_anew(folder: Path, write_lines: WriteLines) -> None:
    """`datasets` keeps what it read in a cache: yesterday's rows would be trained."""
    first = _open(folder / "train").digest()
    write_lines(folder / "train.jsonl", [_pair(7) | {"id": 7}])
    source = _open(folder / "train")
    assert _numbers(folder / "train") == [7] and source.digest() != first


def test_subsets_are_refused(tmp_path: Path, datasets_cache: Path, write_lines: WriteLines) -> None:
    """The wrong subset would be trained, or all of them."""
    for name in ("one", "two"):
        (tmp_path / "lab" / name).mkdir(parents=True)
        write_lines(tmp_path / "lab" / name / "rows.jsonl", [_pair(1)])
    card = "".join(f"- config_name: {name}\n  data_files: {name}/rows.jsonl\n" for name in ("one", "two"))
    (tmp_path / "lab" / "README.md").write_text(f"---\nconfigs:\n{card}---\n")
    problem = _refusal(tmp_path / "lab" / "train")
    assert "the dataset has subsets, which are not supported. Save the one that you want as JSONL." in problem


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("org/name/subset/train", "(org/dataset/split or dataset/split); subsets are not supported"),
        ("dolly", "dolly: there is no such file ({here}/dolly); INSTRUCTION_FINETUNE takes a .jsonl file (.gz and"),
        ("dolly/", "dolly/: there is no such file ({here}/dolly); INSTRUCTION_FINETUNE takes a .jsonl file (.gz and"),
        ("https://example.org/train", "Delta tables cannot be read from https://"),
    ],
)
def test_other_names_are_refused(datasets_cache: Path, given: str, found: str) -> None:
    """A part of the name would be taken for the split, or the message not say how to write it."""
    assert found.format(here=Path.cwd()) in _refusal(given)


@pytest.mark.parametrize("with_data", [False, True])
def test_code_of_a_dataset_is_not_run(
    tmp_path: Path, datasets_cache: Path, monkeypatch: pytest.MonkeyPatch, write_lines: WriteLines, with_data: bool
) -> None:
    """A dataset from the internet could do anything on this machine."""
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / "evil.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')\n")
    if with_data:
        write_lines(tmp_path / "evil" / "train.jsonl", [_pair(1)])
    monkeypatch.setenv("HF_DATASETS_TRUST_REMOTE_CODE", "1")
    monkeypatch.chdir(tmp_path)
    for given in (tmp_path / "evil" / "train", "evil/train", "evil/evil.py/train"):
        problem = _refusal(given)
        assert problem.startswith(f"{given}: the dataset needs a loading script, and its code is never run")
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("name", ["../secret.jsonl", "{folder}/secret.jsonl"])
def test_a_dataset_that_names_files_outside_its_folder_is_refused(
    tmp_path: Path, datasets_cache: Path, write_lines: WriteLines, name: str
) -> None:
    """Whoever makes a dataset could have any file of the reader's machine trained, and ask the model for it."""
    write_lines(tmp_path / "secret.jsonl", [_pair(666)])
    (tmp_path / "lab").mkdir()
    name = name.format(folder=tmp_path)
    card = f"---\nconfigs:\n- config_name: default\n  data_files: {name}\n---\n"
    (tmp_path / "lab" / "README.md").write_text(card)
    problem = _refusal(tmp_path / "lab" / "train")
    assert problem.startswith(f"{tmp_path / 'lab' / 'train'}: ") and "secret.jsonl', outside its folder" in problem


def test_a_saved_dataset_that_names_files_outside_its_folder_is_refused(tmp_path: Path, datasets_cache: Path) -> None:
    """The same, in the other format."""
    import datasets

    for name in ("secret", "lab"):
        datasets.Dataset.from_list([_pair(666)]).save_to_disk(str(tmp_path / name))
    (file,) = (tmp_path / "lab").glob("*.arrow")
    state = json.loads((tmp_path / "lab" / "state.json").read_text())
    state["_data_files"] = [{"filename": f"../secret/{file.name}"}]
    (tmp_path / "lab" / "state.json").write_text(json.dumps(state))
    file.unlink()
    problem = _refusal(tmp_path / "lab")
    assert problem.startswith(f"{tmp_path / 'lab'}: the dataset names") and file.name in problem


def test_pickles_of_the_working_directory_are_not_read(
    tmp_path: Path, datasets_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`pandas` is a reader of `datasets`, and not a dataset: it would unpickle, and so run, what lies around."""
    (tmp_path / "train.pkl").write_bytes(pickle.dumps(_Marks(str(tmp_path / "marker"))))
    monkeypatch.chdir(tmp_path)
    for name in ("pandas", "json", "csv"):
        assert "must be a file, a folder, catalog.schema.table, or a Hugging Face dataset" in _refusal(f"{name}/train")
    assert not (tmp_path / "marker").exists()
    pickle.loads((tmp_path / "train.pkl").read_bytes())
    assert (tmp_path / "marker").exists(), "to read it would have been seen"


class _Marks:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.marker,)


def test_the_hub_out_of_reach_is_told(datasets_cache: Path) -> None:
    """The caller would read a trace of HTTP errors, and not that the name or the network is to be checked."""
    problem = _refusal("nobody/nothing/train")
    assert problem.startswith("nobody/nothing/train: cannot be loaded as a Hugging Face dataset (")
    assert "nobody/nothing" in problem.split("(", 1)[1]
    both = f"Check name, split and network. There is no file or folder {Path.cwd()}/nobody/nothing/train either."
    assert problem.endswith(both), "a slip in a path is as likely"


def test_files_that_cannot_be_read_are_told_with_the_reason(tmp_path: Path, datasets_cache: Path) -> None:
    """`An error occurred while generating the dataset` says nothing that helps."""
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / "train.jsonl").write_text(
        '{"prompt": "a", "response": 1}\n{"prompt": 2, "response": "b"}\n{no\n'
    )
    problem = _refusal(tmp_path / "lab" / "train")
    assert "prompt" in problem.split("cannot be loaded", 1)[1]


def test_a_slip_in_a_path_does_not_search_all_beside_it(tmp_path: Path, datasets_cache: Path) -> None:
    """`datasets` lists all files below a folder: beside a home, or /tmp, the call would not return for minutes."""
    (tmp_path / "projects" / "deep").mkdir(parents=True)
    (tmp_path / "projects" / "deep" / "train.jsonl").write_text("{}")
    (tmp_path / "notes.txt").write_text("x")
    missing = tmp_path / "chats"
    assert _refusal(missing).startswith(f"{missing}: there is no such file ({missing})")


def test_a_folder_is_not_taken_for_a_split_of_the_one_above(
    tmp_path: Path, datasets_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--train-data-path .` and `..` looked through all that lies above, and ended with an IndexError of `datasets`."""
    folder = tmp_path / "lab" / "my data"
    folder.mkdir(parents=True)
    (folder / "chats.jsonl").write_text("{}")
    (tmp_path / "lab" / "train.jsonl").write_text("{}")
    monkeypatch.chdir(folder)
    monkeypatch.setattr("datasets.load_dataset_builder", None)
    for given in (".", "..", str(folder), "../my data"):
        problem = _refusal(given)
        assert problem.startswith(f"{given}: is a folder; INSTRUCTION_FINETUNE takes a .jsonl file")
        inside = "train" if given == ".." else "chats"
        assert problem.endswith(f" Did you mean {given}/{inside}.jsonl?")


def test_a_slip_in_a_large_folder_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a project with its packages beside it, the call took three minutes to say that there is no such file."""
    monkeypatch.setattr(address, "MOST_FILES", 20)
    monkeypatch.setattr("datasets.load_dataset_builder", None)
    (tmp_path / "README.md").write_text("a project")
    (tmp_path / "packages").mkdir()
    for number in range(20):
        (tmp_path / "packages" / f"{number}.py").touch()
    monkeypatch.chdir(tmp_path)
    for given in ("dolly", "./train"):
        assert f"there is no such file ({tmp_path / Path(given)})" in _refusal(given)


def test_a_path_that_is_not_there_does_not_load_its_neighbours(folder: Path, datasets_cache: Path) -> None:
    """A slip in a path – the folder's name without its split, say – would convert all files beside it first."""
    for missing in (folder.parent / "labb", folder / "trian"):
        problem = _refusal(missing)
        assert problem.startswith(f"{missing}: ") and "An error occurred while generating" not in problem
    assert not list(datasets_cache.rglob("*.arrow"))


@pytest.mark.parametrize(("task_type", "needed"), [("CHAT_COMPLETION", "messages"), ("INSTRUCTION_FINETUNE", "prompt")])
def test_missing_columns_of_a_dataset_are_told(
    tmp_path: Path, datasets_cache: Path, write_lines: WriteLines, task_type: TaskType, needed: str
) -> None:
    """The caller would see one problem a row."""
    (tmp_path / "lab").mkdir()
    write_lines(tmp_path / "lab" / "train.jsonl", [{"question": "a", "answer": "b"}])
    problem = _refusal(tmp_path / "lab" / "train", task_type)
    assert f"has the columns question, answer; {task_type} needs {needed}" in problem


def test_bad_rows_of_a_dataset_are_told_by_number(tmp_path: Path, datasets_cache: Path, tiny_model: Path) -> None:
    """Nobody could find them."""
    rows = [_pair(number) for number in range(6)]
    rows[2]["response"] = rows[5]["response"] = None
    (tmp_path / "lab").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "lab" / "train.parquet")
    with pytest.raises(DataError, match=r"lab/train, row 3: 'response' is a JSON null.* 2 of 6 rows .* \(3, 6\)\."):
        _prepare(_open(tmp_path / "lab" / "train"), tiny_model)


def test_nothing_is_printed_while_a_dataset_is_read(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Progress bars of `datasets` would run through those of tundish."""
    shutil.copy(folder / "train.jsonl", folder / "test.jsonl")
    _numbers(folder / "test")
    assert capfd.readouterr() == ("", "")


def test_evaluation_data_may_be_a_table_too(tmp_path: Path, tiny_model: Path, folder: Path) -> None:
    """A run with tables would be refused for its evaluation data, or a bad row be told as one of the training data."""
    from tundish import foundation_model

    bad = {"prompt": "why? ", "response": ""}
    table = _write(tmp_path / "held_out", [_pair(1), bad, _pair(2)])
    report = foundation_model.validate(
        str(tiny_model), str(folder / "train"), eval_data_path=str(table), task_type="INSTRUCTION_FINETUNE"
    )
    train, held_out = report.reports
    assert not report.ok
    assert (train.argument, train.unit, train.total, train.samples, train.problems) == (
        "train_data_path", "row", 40, 40, [],
    )  # fmt: skip
    assert (held_out.argument, held_out.unit, held_out.total) == ("eval_data_path", "row", 3)
    (message,) = held_out.messages
    assert message.startswith(f"eval_data_path: {table} (version 0), row 2: 'response' is empty")
