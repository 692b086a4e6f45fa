"""data/download.py: data of an object store, read from a server that speaks S3."""

import gzip
import json
import os
import socket
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.s3 import PAGE, Bucket

from tundish.data.encoding import Job
from tundish.data.opening import open_source
from tundish.data.prepare import prepare
from tundish.data.samples import Problem
from tundish.data.source import Source
from tundish.errors import DataError, SpecError
from tundish.plan.spec import TaskType

pytestmark = pytest.mark.slow

Prepare = Callable[[Source], Path]


def _lines(*numbers: int) -> bytes:
    pairs = ({"prompt": f"{number}: two and two? ", "response": f"four {number}"} for number in numbers)
    return "".join(json.dumps(pair) + "\n" for pair in pairs).encode()


@pytest.fixture
def prepared(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Prepare:
    """Prepares a source; each time in a home of its own, so that nothing is reused."""

    def run(source: Source) -> Path:
        monkeypatch.setenv("TUNDISH_HOME", str(tmp_path / uuid.uuid4().hex))
        return Path(
            prepare(source, Job(model=str(tiny_model), task_type=source.rules.task_type, context_length=64)).folder
        )

    return run


def _open(uri: str, task_type: TaskType = "INSTRUCTION_FINETUNE") -> Source:
    return open_source(uri, task_type, system_message=True)


def _samples(source: Source) -> list[Any]:
    return [sample for chunk in source.chunks() for _, sample in chunk.samples(source.rules)]


def _file(source: Any) -> Path:
    """The copy of an object."""
    return source.path


def _texts(uri: str) -> list[Any]:
    return _samples(_open(uri, "CONTINUED_PRETRAIN"))


def _shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}


def _refusal(uri: str, task_type: TaskType = "INSTRUCTION_FINETUNE") -> str:
    """The one problem of a URI that cannot be opened."""
    with pytest.raises(SpecError) as error:
        _open(uri, task_type)
    (problem,) = error.value.problems
    return problem


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_lines_are_those_of_a_local_copy(bucket: Bucket, prepared: Prepare, tmp_path: Path, suffix: str) -> None:
    """The model would be trained on other rows if its data were in an object store."""
    content = _lines(*range(40))
    content = gzip.compress(content) if suffix.endswith(".gz") else content
    local = tmp_path / f"train{suffix}"
    local.write_bytes(content)
    uri = bucket.put(f"deep/er/train{suffix}", content)
    remote = prepared(_open(uri))
    assert "shard.00000.mds" in _shards(remote)
    assert _shards(remote) == _shards(prepared(_open(str(local))))


def test_a_folder_of_texts_is_that_of_a_local_copy(bucket: Bucket, prepared: Prepare, tmp_path: Path) -> None:
    """Nested texts would be missing, or the order of the rows depend on the store."""
    for name in ("b.txt", "a.txt", "deep/c.txt", "deep/er/d.txt"):
        (tmp_path / "books" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "books" / name).write_text(f"text of {name} " * 9)
        bucket.put(f"lab/books/{name}", f"text of {name} ".encode() * 9)
    remote = prepared(_open(bucket.uri("lab/books"), "CONTINUED_PRETRAIN"))
    assert _shards(remote) == _shards(prepared(_open(str(tmp_path / "books"), "CONTINUED_PRETRAIN")))


def test_a_delta_table_is_that_of_a_local_copy(bucket: Bucket, prepared: Prepare, tmp_path: Path) -> None:
    """A table in an object store would lose its second append, or give rows in another order."""
    import pyarrow as pa
    from deltalake import write_deltalake

    options = {"AWS_ENDPOINT_URL": os.environ["S3_ENDPOINT_URL"], "AWS_ALLOW_HTTP": "true"}
    for start in (0, 20):
        numbers = range(start, start + 20)
        columns = {
            "prompt": [f"{number}? " for number in numbers],
            "response": [f"four {number}" for number in numbers],
        }
        write_deltalake(bucket.uri("my tables/t"), pa.table(columns), mode="append", storage_options=options)
    for found in bucket.client.list_objects_v2(Bucket=bucket.name)["Contents"]:
        copy = tmp_path / "copy" / found["Key"]
        copy.parent.mkdir(parents=True, exist_ok=True)
        bucket.client.download_file(bucket.name, found["Key"], str(copy))
    remote, local = _open(bucket.uri("my tables/t")), _open(str(tmp_path / "copy" / "my tables" / "t"))
    assert (remote.size, remote.digest()) == (40, local.digest())
    assert sorted(_samples(remote)) == sorted((f"{number}? ", f"four {number}") for number in range(40))
    assert _shards(prepared(remote)) == _shards(prepared(local))
    assert _samples(_open(bucket.uri("my tables/t/"))) == _samples(remote), "with a slash at its end, too"


def test_an_unchanged_object_is_downloaded_once(bucket: Bucket) -> None:
    """Every call – create, then the run itself – would download gigabytes again."""
    uri = bucket.put("train.jsonl", _lines(1, 2))
    first, second = _open(uri), _open(uri)
    assert bucket.downloads("train.jsonl") == 1
    assert first.digest() == second.digest() and _samples(second) == _samples(first) != []


def test_a_changed_object_is_downloaded_again(bucket: Bucket) -> None:
    """The model would be trained on yesterday's data; an object of the same length must be noticed, too."""
    first = _open(bucket.put("train.jsonl", _lines(1, 2)))
    before = (_samples(first), first.digest())
    second = _open(bucket.put("train.jsonl", _lines(1, 3)))
    assert _samples(second) == [("1: two and two? ", "four 1"), ("3: two and two? ", "four 3")]
    assert (_samples(second), second.digest()) != before
    assert bucket.downloads("train.jsonl") == 2


def test_what_a_killed_download_has_left_is_not_taken(bucket: Bucket, home: Path) -> None:
    """Half of the data would be trained, in every run from then on; or it would fill the disk."""
    uri = bucket.put("train.jsonl", _lines(1, 2))
    folder = _file(_open(uri)).parent
    killed = folder.rename(folder.with_name(f".{folder.name}.tmp"))
    (killed / "train.jsonl").write_bytes(_lines(9))
    (killed / "other.jsonl").write_bytes(_lines(9))
    assert _samples(_open(uri)) == [("1: two and two? ", "four 1"), ("2: two and two? ", "four 2")]
    assert [path.name for path in home.rglob("*.jsonl")] == ["train.jsonl"]


def test_a_copy_in_use_is_not_written_to(bucket: Bucket) -> None:
    """A run that still reads would go on with other rows than it has begun with."""
    first = _open(bucket.put("train.jsonl", _lines(1, 2)))
    before = _file(first).read_bytes()
    _open(bucket.put("train.jsonl", _lines(3, 4)))
    assert _file(first).read_bytes() == before
    texts = _open(bucket.put("books/a.txt", b"old").rpartition("/")[0], "CONTINUED_PRETRAIN")
    bucket.put("books/a.txt", b"new")
    assert (_texts(bucket.uri("books")), _samples(texts)) == (["new"], ["old"])


def test_objects_of_one_name_are_kept_apart(bucket: Bucket) -> None:
    """Evaluation data would be written over the training data of the same file name."""
    train, held_out = bucket.put("train/data.jsonl", _lines(1)), bucket.put("eval/data.jsonl", _lines(2))
    one, other = _open(train), _open(held_out)
    assert _samples(one) == [("1: two and two? ", "four 1")]
    assert _samples(other) == [("2: two and two? ", "four 2")]


def test_texts_are_those_below_the_prefix(bucket: Bucket) -> None:
    """Files of another folder whose name begins alike, or that are no text, would be trained."""
    for key in ("books/a.txt", "books/deep/b.txt", "books/notes.md", "books/a.txt.bak", "books2/c.txt", "d.txt"):
        bucket.put(key, key.encode())
    assert _texts(bucket.uri("books")) == _texts(bucket.uri("books/")) == ["books/a.txt", "books/deep/b.txt"]


def test_texts_removed_from_the_store_are_gone(bucket: Bucket) -> None:
    """A text that was taken out of the data would still be trained, from the copy."""
    for key in ("books/a.txt", "books/b.txt"):
        bucket.put(key, key.encode())
    first = _open(bucket.uri("books"), "CONTINUED_PRETRAIN").digest()
    bucket.client.delete_object(Bucket=bucket.name, Key="books/a.txt")
    second = _open(bucket.uri("books"), "CONTINUED_PRETRAIN")
    assert _samples(second) == ["books/b.txt"] and second.digest() != first


def test_texts_of_all_pages_of_the_listing_are_read(bucket: Bucket) -> None:
    """The rest of a large corpus would be missing in silence."""
    for number in range(2 * PAGE + 1):
        bucket.put(f"books/{number:02}.txt", b"text %d" % number)
    assert _texts(bucket.uri("books")) == [f"text {number}" for number in range(2 * PAGE + 1)]


@pytest.mark.parametrize("name", ["../out.txt", "deep/../../out.txt", "{folder}/out.txt"])
def test_a_key_cannot_leave_the_folder_of_the_copy(bucket: Bucket, tmp_path: Path, name: str) -> None:
    """Whoever may write to the bucket could write any .txt file on this machine."""
    name = name.format(folder=tmp_path)
    bucket.put("books/ok.txt", b"fine")
    bucket.put(f"books/{name}", b"escaped")
    problem = _refusal(bucket.uri("books"), "CONTINUED_PRETRAIN")
    assert list(tmp_path.rglob("out.txt")) == []
    assert problem.startswith(bucket.uri("books")) and name in problem


@pytest.mark.parametrize(
    "key", ["my data/train set.jsonl", "50%25.jsonl", "dätä.jsonl", "a+b&c=d.jsonl", "chapter #1.jsonl", "what?.jsonl"]
)
def test_odd_keys_are_read(bucket: Bucket, key: str) -> None:
    """An object would not be found because of a blank or a sign in its name."""
    bucket.put(key.partition("#")[0].partition("?")[0], _lines(1))
    assert len(_samples(_open(bucket.put(key, _lines(1, 2))))) == 2
    bucket.put(f"books/{key}.txt", b"text")
    assert _texts(bucket.uri("books")) == ["text"]


def test_a_text_and_a_folder_of_one_name_are_refused(bucket: Bucket) -> None:
    """A store can have both, a file system cannot: the caller would read a trace."""
    for key in ("books/a.txt", "books/a.txt/b.txt"):
        bucket.put(key, b"text")
    assert _refusal(bucket.uri("books"), "CONTINUED_PRETRAIN").startswith(bucket.uri("books"))


def test_a_missing_object_is_named(bucket: Bucket) -> None:
    """The caller would read a client's trace, without the path that is wrong."""
    bucket.put("train.jsonl", _lines(1))
    uri = bucket.uri("tran.jsonl")
    assert _refusal(uri) == f"{uri}: it does not exist. Check the path."
    uri = f"s3://no-{bucket.name}/train.jsonl"
    assert _refusal(uri) == f"{uri}: the bucket does not exist. Create it, or correct its name."


def test_an_object_that_is_gone_is_not_read_from_its_copy(bucket: Bucket) -> None:
    """A run would go on with data that was withdrawn."""
    uri = bucket.put("train.jsonl", _lines(1))
    _open(uri)
    bucket.client.delete_object(Bucket=bucket.name, Key="train.jsonl")
    assert _refusal(uri).startswith(f"{uri}: it does not exist")


def test_missing_texts_are_named(bucket: Bucket) -> None:
    """A run would train on nothing, or the message not say where nothing was found."""
    bucket.put("books/notes.md", b"x")
    for uri in (bucket.uri("books"), bucket.uri("none")):
        assert _refusal(uri, "CONTINUED_PRETRAIN").startswith(f"{uri}: the folder holds no .txt file")
    uri = f"s3://no-{bucket.name}/books"
    problem = _refusal(uri, "CONTINUED_PRETRAIN")
    assert problem == f"{uri}: the bucket does not exist. Create it, or correct its name."


def test_missing_tables_are_named(bucket: Bucket) -> None:
    """The caller would read a trace of Rust, or not learn that it is the bucket that is missing."""
    for uri, reason in {bucket.uri("none"): "", f"s3://no-{bucket.name}/none": "NoSuchBucket"}.items():
        problem = _refusal(uri)
        assert problem.startswith(f"{uri}: there is no Delta table to read at {uri} (") and problem.isprintable()
        assert reason in problem


def test_a_server_that_is_not_there_is_an_error_of_the_path(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong S3_ENDPOINT_URL would end in a trace, and the message not speak of it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("S3_ENDPOINT_URL", f"http://127.0.0.1:{free.getsockname()[1]}")
        problem = _refusal(bucket.uri("train.jsonl"))
    assert problem.startswith(f"{bucket.uri('train.jsonl')}: connection refused") and "S3_ENDPOINT_URL" in problem


def test_problems_name_the_line_of_the_object(bucket: Bucket) -> None:
    """The message would name a file of the cache that the caller has never seen, or no line."""
    source = _open(bucket.put("deep/train.jsonl", _lines(1) + b"\n{\n" + _lines(2)))
    problems = [
        (number, sample)
        for chunk in source.chunks()
        for number, sample in chunk.samples(source.rules)
        if isinstance(sample, Problem)
    ]
    assert [number for number, _ in problems] == [3]
    assert source.place.of(3) == "train.jsonl, line 3"


def test_damaged_compressed_data_is_an_error_of_the_data(bucket: Bucket) -> None:
    """Half of an upload would be trained as if it were all."""
    content = b"".join(os.urandom(20).hex().encode() for _ in range(2000))
    source = _open(bucket.put("train.jsonl.gz", gzip.compress(content)[:-20]))
    with pytest.raises(DataError, match=r"train\.jsonl\.gz: the compressed data is damaged or truncated"):
        _samples(source)
