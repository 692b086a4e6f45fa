"""data/spark.py: a cluster makes the same samples as one machine, each once, whatever becomes of its tasks."""

import gzip
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from tundish.data import spark
from tundish.data.encoding import Job
from tundish.data.findings import Location
from tundish.data.lines import LineBlock
from tundish.data.manifest import Prepared
from tundish.data.opening import open_source
from tundish.data.prepare import examine, prepare
from tundish.data.samples import Rules
from tundish.data.source import Chunk, Source
from tundish.errors import DataError, StageError
from tundish.plan.spec import TaskType

pytestmark = [
    pytest.mark.spark,
    pytest.mark.skipif(shutil.which("java") is None, reason="Spark runs on Java, which is not installed"),
    # Streaming's LocalDataset leaves index.json open.
    pytest.mark.filterwarnings(r"ignore:unclosed file .*index\.json:ResourceWarning"),
    # pyspark leaves its connections to Java to the garbage collector.
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),
]

WriteLines = Callable[[Path, Iterable[object]], Path]
PATIENCE = 120.0
"""Seconds after which something that must happen is taken to hang."""


def _pair(number: int) -> dict[str, str]:
    return {"prompt": f"{number}: two and two? ", "response": "fox " * (number % 7) + f"four {number}"}


def _open(path: Path, task_type: TaskType = "INSTRUCTION_FINETUNE") -> Source:
    return open_source(str(path), task_type, system_message=True)


# Processes.


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _wait(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"{what} has not happened"
        time.sleep(0.05)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def _spark_process(log: Path, *command: str) -> Iterator[subprocess.Popen[bytes]]:
    """A command of Spark's; it and what it has started are gone after this."""
    import pyspark

    program = Path(pyspark.__file__).parent / "bin" / command[0]
    with open(log, "w") as out:
        process = subprocess.Popen([program, *command[1:]], stdout=out, stderr=out, start_new_session=True)
    try:
        yield process
    finally:
        started = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        for one in [process, *started]:
            try:
                one.kill()
            except (psutil.NoSuchProcess, ProcessLookupError):
                pass
        process.wait()


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Spark on this machine alone, and quiet; returns a folder for logs. Spark's own process ends after the module."""
    folder = tmp_path_factory.mktemp("spark")
    (folder / "spark-defaults.conf").write_text(
        "spark.ui.enabled false\nspark.driver.host 127.0.0.1\nspark.driver.bindAddress 127.0.0.1\n"
        "spark.executor.memory 512m\nspark.ui.showConsoleProgress false\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARK_CONF_DIR", str(folder))
        patch.setenv("SPARK_LOCAL_IP", "127.0.0.1")
        patch.setenv("SPARK_LOCAL_DIRS", str(folder / "local"))
        patch.setenv("SPARK_NO_DAEMONIZE", "1")
        patch.setenv("PYSPARK_PYTHON", sys.executable)
        paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))  # for spark_cluster.py
        patch.setenv("TOKENIZERS_PARALLELISM", "false")  # this process is forked
        patch.delenv("SPARK_HOME", raising=False)
        yield folder
        _end_gateway()


def _end_gateway() -> None:
    """End the Java process that pyspark has started in this one."""
    from pyspark import SparkContext

    if SparkContext._active_spark_context is not None:
        SparkContext._active_spark_context.stop()
    gateway: Any = SparkContext._gateway
    if gateway is not None:
        gateway.shutdown()
        gateway.proc.stdin.close()
        gateway.proc.wait(PATIENCE)
        SparkContext._gateway = SparkContext._jvm = None


class Cluster:
    """A master and two workers of one core each."""

    def __init__(self, url: str, workers: list[subprocess.Popen[bytes]]) -> None:
        self.url, self.workers = url, workers

    def worker_of(self, process: int) -> int:
        """The id of the Worker below which a process runs."""
        workers = {worker.pid for worker in self.workers}
        return next(parent.pid for parent in psutil.Process(process).parents() if parent.pid in workers)


@pytest.fixture(scope="module")
def cluster(environment: Path) -> Iterator[Cluster]:
    """A standalone cluster on this machine."""
    port = _free_port()
    common = ["--host", "127.0.0.1", "--webui-port", "0"]
    master = ["spark-class", "org.apache.spark.deploy.master.Master", *common, "--port", str(port)]
    url = f"spark://127.0.0.1:{port}"
    worker = ["spark-class", "org.apache.spark.deploy.worker.Worker", *common, "-c", "1", "-m", "1g"]
    folders = [environment / "one", environment / "two"]
    with (
        _spark_process(environment / "master.log", *master),
        _spark_process(environment / "one.log", *worker, "--work-dir", str(folders[0]), url) as one,
        _spark_process(environment / "two.log", *worker, "--work-dir", str(folders[1]), url) as two,
    ):
        _wait(lambda: _listens(port), "the start of the master")
        yield Cluster(url, [one, two])


class Sessions:
    """The session of the tests: one at a time, kept while tests want the same master."""

    def __init__(self) -> None:
        self._master, self._session = "", None

    def use(self, master: str) -> Any:
        from pyspark.sql import SparkSession

        if self._master != master:
            self.stop()
            builder: Any = SparkSession.builder
            builder = builder.master(master).config("spark.python.daemon.module", "spark_cluster")
            self._master, self._session = master, builder.getOrCreate()
        return self._session

    def stop(self) -> None:
        if self._session is not None:
            self._session.stop()
        self._master, self._session = "", None


@pytest.fixture(scope="module")
def sessions(environment: Path) -> Iterator[Sessions]:
    """Sessions of the caller's own; they keep the Python processes, which need seconds to start."""
    found = Sessions()
    yield found
    found.stop()


@pytest.fixture
def on_two_cores(sessions: Sessions) -> str:
    """A Spark of this process, with a session that is open already."""
    sessions.use(f"local[2,{spark.ATTEMPTS}]")
    return "local[2]"


@pytest.fixture
def on_cluster(sessions: Sessions, cluster: Cluster) -> Cluster:
    """The cluster, with a session that is open already."""
    from pyspark import cloudpickle

    # Its processes cannot import this file.
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    sessions.use(cluster.url)
    return cluster


# What a folder holds.


@pytest.fixture
def job(tiny_model: Path) -> Callable[..., Job]:
    """Makes a job for rows of 64 tokens."""

    def make(task_type: TaskType = "INSTRUCTION_FINETUNE") -> Job:
        return Job(model=str(tiny_model), task_type=task_type, context_length=64)

    return make


def _samples(prepared: Prepared) -> Counter[tuple[bytes, bytes]]:
    """Tokens and mask of the samples, and how often each is there; fails where the manifest counts wrong."""
    from streaming import LocalDataset

    folder = Path(prepared.folder)
    dataset = LocalDataset(str(folder))
    rows = [dataset[number] for number in range(len(dataset))]
    shards = [shard["raw_data"]["basename"] for shard in json.loads((folder / "index.json").read_text())["shards"]]
    assert sorted(path.name for path in folder.iterdir()) == ["index.json", "manifest.json", *shards]
    assert [path.name for path in folder.parent.iterdir() if not path.name.endswith(".lock")] == [folder.name]
    assert prepared.rows == len(rows)
    assert prepared.tokens == sum(len(row["tokens"]) for row in rows)
    assert prepared.target_tokens == sum(int(row["loss_mask"].sum()) for row in rows)
    found: Counter[tuple[bytes, bytes]] = Counter()
    for row in rows:
        assert len(row["tokens"]) <= prepared.context_length
        borders = np.cumsum(row["segments"])[:-1]
        parts = zip(np.split(row["tokens"], borders), np.split(row["loss_mask"], borders), strict=True)
        found.update((tokens.tobytes(), mask.tobytes()) for tokens, mask in parts)
    return found


def _counts(prepared: Prepared) -> dict[str, int]:
    names = ("samples", "tokens", "target_tokens", "truncated", "units", "refused")
    return {name: getattr(prepared, name) for name in names}


def _check(source: Source, job: Job, cluster: str) -> Prepared:
    """Prepare a source on a cluster; fails where it is not what one machine makes of it."""
    expected = prepare(source, job)
    wanted = _samples(expected)
    shutil.rmtree(expected.folder)
    found = prepare(source, job, cluster)
    assert found.folder != expected.folder
    assert _samples(found) == wanted and sum(wanted.values()) >= expected.samples > 1
    assert _counts(found) == _counts(expected)
    return found


# Sources that have something done to them in a process of the cluster.


class Wrapped:
    """A source, unchanged."""

    def __init__(self, source: Any, folder: Path) -> None:
        self.source, self.folder = source, folder
        self.number: int | None = None
        """Of the part; None for the whole."""
        self.readings = 0
        """The first is to try the engine, the second to encode."""

    @property
    def rules(self) -> Rules:
        return self.source.rules

    @property
    def place(self) -> Location:
        return self.source.place

    @property
    def size(self) -> int | None:
        return self.source.size

    def digest(self) -> str:
        return self.source.digest()

    def state(self) -> object:
        return self.source.state()

    def parts(self, size: int) -> list[Any]:
        found = [type(self)(part, self.folder) for part in self.source.parts(size)]
        for number, part in enumerate(found):
            part.number = number
        return found

    def chunks(self) -> Iterator[Chunk]:
        return self.source.chunks()


class Stopping(Wrapped):
    """Lines of JSONL of which each is a chunk, so that a task can be stopped after three of them."""

    def chunks(self) -> Iterator[Chunk]:
        self.readings += 1
        lines = [line for block in self.source.chunks() for line in block.data.splitlines(keepends=True)]
        for number, line in enumerate(lines):
            yield LineBlock(line, len(line))
            if number == 2 and self.readings == 2 and self.number is not None:
                self.act()

    def act(self) -> None:
        """What happens then."""

    def once(self, name: str, content: str) -> bool:
        """Whether this has not happened before, in any process; leaves a file."""
        try:
            with open(self.folder / name, "x") as file:
                file.write(content)
        except FileExistsError:
            return False
        return True


def _intercept(function: Callable[..., Any]) -> None:
    """Have `function(write_shards, …)` called in this process, once, instead of `write_shards(…)`."""
    original = spark.write_shards

    def instead(*arguments: Any) -> Any:
        spark.write_shards = original
        return function(original, *arguments)

    spark.write_shards = instead


class FailingOnce(Stopping):
    """The first part's task raises, the second's is killed, the third's fails after it has written its shards."""

    def chunks(self) -> Iterator[Chunk]:
        if self.readings == 0 and self.number == 2:
            _intercept(self.fail_late)
        return super().chunks()

    def act(self) -> None:
        (file,) = self.folder.rglob(f"home/prepared/.*.tmp/part.*/spool/{os.getpid()}.spool")
        if self.number == 0 and self.once("raised", str(file.stat().st_size)):
            raise RuntimeError("a task fails")
        if self.number == 1 and self.once("killed", str(file.stat().st_size)):
            os.kill(os.getpid(), signal.SIGKILL)

    def fail_late(self, prepare_share: Callable[..., Any], *arguments: Any) -> Any:
        share = prepare_share(*arguments)
        if self.once("late", str(len(share.shards))):
            raise RuntimeError("a task fails after its work")
        return share


class Waiting(Stopping):
    """Its tasks say who they are after three lines, and wait."""

    def act(self) -> None:
        (self.folder / f"running.{os.getpid()}").touch()
        _wait((self.folder / "go").exists, "the sign to go on")


class SmallShards(Wrapped):
    """A source of which each row makes a shard."""

    def chunks(self) -> Iterator[Chunk]:
        self.readings += 1
        if self.readings == 1 and self.number is not None:
            _intercept(self.with_small_shards)
        return super().chunks()

    def with_small_shards(self, prepare_share: Callable[..., Any], *arguments: Any) -> Any:
        from tundish.data import shards

        before, shards.SHARD_BYTES = shards.SHARD_BYTES, 1
        try:
            return prepare_share(*arguments)
        finally:
            shards.SHARD_BYTES = before


# The same as one machine.


def test_lines_become_the_same_samples(
    on_two_cores: str, job: Any, tmp_path: Path, write_lines: WriteLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sample at the border of two parts would be lost, doubled or cut; the manifest would not add up."""
    monkeypatch.setattr(spark, "PART_BYTES", 700)
    lines = [_pair(number) if number % 9 else "" for number in range(100)]
    lines += [{"prompt": "long? ", "response": "fox " * 300}]
    source = _open(write_lines(tmp_path / "train.jsonl", lines))
    assert len(source.parts(700)) > 5
    told: list[tuple[int, int | None]] = []
    _check(source, job(), on_two_cores)
    shutil.rmtree(tmp_path / "home")
    prepare(source, job(), on_two_cores, lambda done, total: told.append((done, total)))
    assert told[-1] == (len(source.parts(700)),) * 2, "progress comes to its end"


def test_texts_become_the_same_samples(
    on_two_cores: str, job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text would be missing or trained twice; an empty one must not disturb the others."""
    monkeypatch.setattr(spark, "PART_BYTES", 400)
    for number in range(20):
        path = tmp_path / "books" / str(number % 3) / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{number}: the quick brown fox. " * number)
    prepared = _check(_open(tmp_path / "books", "CONTINUED_PRETRAIN"), job("CONTINUED_PRETRAIN"), on_two_cores)
    assert (prepared.samples, prepared.refused, prepared.units) == (19, 1, 20)


def test_parquet_files_become_the_same_samples(
    on_two_cores: str, job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row group would be missing or trained twice; a problem would have the number that its row has in a part."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setattr(spark, "PART_BYTES", 1)
    (tmp_path / "data").mkdir()
    rows = [_pair(number) for number in range(30)]

    def write(part: int) -> None:
        table = pa.Table.from_pylist(rows[10 * part : 10 * part + 10])
        pq.write_table(table, tmp_path / "data" / f"{part}.parquet", row_group_size=4)

    for part in range(3):
        write(part)
    source = _open(tmp_path / "data")
    assert len(source.parts(1)) == 9
    assert _check(source, job(), on_two_cores).samples == 30
    rows[27]["response"] = ""
    write(2)
    with pytest.raises(DataError, match=r"^2\.parquet, row 8: 'response' is empty"):
        prepare(_open(tmp_path / "data"), job(), on_two_cores)


def test_tables_become_the_same_samples(
    on_two_cores: str, job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of the table would be missing; rows that come meanwhile would be in, deleted ones too."""
    import pyarrow as pa
    from deltalake import DeltaTable, write_deltalake

    monkeypatch.setattr(spark, "PART_BYTES", 1)
    table = str(tmp_path / "t")
    for start in range(0, 40, 10):
        rows = [_pair(number) | {"x": number} for number in range(start, start + 10)]
        write_deltalake(table, pa.Table.from_pylist(rows), mode="append")
        if start == 10:
            DeltaTable(table).delete("x % 5 = 0")  # makes one file of two
    source = _open(tmp_path / "t")
    write_deltalake(table, pa.Table.from_pylist([_pair(99) | {"x": 99}]), mode="append")
    assert len(source.parts(1)) == 3
    assert _check(source, job(), on_two_cores).samples == 36


def test_chats_and_warnings_are_the_same(
    on_two_cores: str, job: Any, tmp_path: Path, write_lines: WriteLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Warnings of all parts but the first would be lost, or name other lines."""
    monkeypatch.setattr(spark, "PART_BYTES", 500)
    chats = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "</s>" * (n in (3, 33))}]}
        for n in range(40)
    ]
    for chat in chats:
        chat["messages"][1]["content"] += "four"
    source = _open(write_lines(tmp_path / "train.jsonl", chats), "CHAT_COMPLETION")
    _check(source, job("CHAT_COMPLETION"), on_two_cores)
    (warning,) = examine(source, job("CHAT_COMPLETION"), on_two_cores).warnings
    assert warning.where == [4, 34] and warning.message.startswith("train.jsonl, line 4: ")


def test_problems_of_all_parts_have_their_lines(
    on_two_cores: str, job: Any, tmp_path: Path, home: Path, write_lines: WriteLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lines would be counted from the beginning of each part; rows of the good parts would be left."""
    monkeypatch.setattr(spark, "PART_BYTES", 600)
    lines: list[Any] = [_pair(number) for number in range(80)]
    lines[1] = lines[41] = lines[79] = "{"
    lines[30] = {"prompt": "fox " * 100, "response": "x"}
    lines[50:60] = [""] * 700  # a part with nothing in it
    lines[-2] = {"prompt": "a"}
    source = _open(write_lines(tmp_path / "train.jsonl", lines))
    total = len(lines)
    alone, together = examine(source, job()), examine(source, job(), on_two_cores)
    found = sorted(together.problems, key=lambda finding: finding.where[0])
    assert together.prepared is None
    assert found == sorted(alone.problems, key=lambda finding: finding.where[0])
    assert [finding.where for finding in found] == [[2, 42, total], [31], [total - 1]]
    assert f"3 of {total:,} lines are like this (2, 42, {total})." in found[0].message
    assert together.samples == alone.samples
    assert [path for path in (home / "prepared").iterdir() if not path.name.endswith(".lock")] == []


def test_data_without_samples_is_an_error(
    on_two_cores: str, job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run would train on nothing."""
    monkeypatch.setattr(spark, "PART_BYTES", 10)
    for number, content in enumerate(["", "\n" * 30]):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(content)
        with pytest.raises(DataError, match=rf"{number}\.jsonl: holds no sample"):
            prepare(_open(path), job(), on_two_cores)


def test_damaged_data_is_an_error_of_the_data(on_two_cores: str, job: Any, tmp_path: Path) -> None:
    """The cluster would be blamed for it, after it has tried four times."""
    path = tmp_path / "train.jsonl.gz"
    path.write_bytes(gzip.compress(b"".join(b'{"prompt": "%d", "response": "x"}\n' % n for n in range(999)))[:-20])
    with pytest.raises(DataError, match=r"train\.jsonl\.gz: the compressed data is damaged or truncated"):
        prepare(_open(path), job(), on_two_cores)


def test_shards_of_one_part_do_not_overwrite_each_other(
    on_two_cores: str, job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards of full rows are all of one size; taken for each other, some would be lost and others be read twice."""
    from pyspark import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr(spark, "PART_BYTES", 100)
    (tmp_path / "books").mkdir()
    for name, words in {"a": 40, "b": 400}.items():
        (tmp_path / "books" / f"{name}.txt").write_text("".join(f"{name}{number} " for number in range(words)))
    source = _open(tmp_path / "books", "CONTINUED_PRETRAIN")
    expected = _samples(prepare(source, job("CONTINUED_PRETRAIN")))
    shutil.rmtree(tmp_path / "home")
    prepared = prepare(SmallShards(source, tmp_path), job("CONTINUED_PRETRAIN"), on_two_cores)
    assert len(list(Path(prepared.folder).glob("*.mds"))) == prepared.rows > 10
    assert _samples(prepared) == expected


def test_the_callers_session_goes_on(
    on_two_cores: str, sessions: Sessions, job: Any, tmp_path: Path, write_lines: WriteLines
) -> None:
    """The notebook's own Spark would be gone after a call, with all that was computed; from another thread, too."""
    session = sessions.use(f"local[2,{spark.ATTEMPTS}]")
    source = _open(write_lines(tmp_path / "train.jsonl", map(_pair, range(5))))
    found: list[Prepared] = []
    for start in (lambda call: call(), _in_thread):
        shutil.rmtree(tmp_path / "home", ignore_errors=True)
        start(lambda: found.append(prepare(source, job(), on_two_cores)))
        assert found.pop().samples == 5
        alive = session._sc._jsc is not None
        if not alive:
            sessions.stop()  # for the other tests
        assert alive and session.range(3).count() == 3


def _in_thread(call: Callable[[], object]) -> None:
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()


# A cluster.


@pytest.fixture
def lines(tmp_path: Path, write_lines: WriteLines, monkeypatch: pytest.MonkeyPatch) -> Source:
    """Sixty pairs, in four or five parts on a cluster."""
    monkeypatch.setattr(spark, "PART_BYTES", 1000)
    source = _open(write_lines(tmp_path / "train.jsonl", map(_pair, range(60))))
    assert 4 <= len(source.parts(1000)) <= 5
    return source


def test_tasks_that_fail_once_are_tried_again(on_cluster: Cluster, job: Any, tmp_path: Path, lines: Source) -> None:
    """What a failed attempt has written would be trained as well, or the run end with a machine that failed once."""
    _check(FailingOnce(lines, tmp_path), job(), on_cluster.url)
    happened = {name: int((tmp_path / name).read_text()) for name in ("raised", "killed", "late")}
    assert all(happened.values()), "tokens, or shards, had been written"


def test_a_worker_may_be_killed(on_cluster: Cluster, job: Any, tmp_path: Path, lines: Source) -> None:
    """A machine that dies would take its samples with it, or they would be there twice."""
    problems: list[BaseException] = []

    def kill_one() -> None:
        try:
            _wait(lambda: len(_running_workers()) == 2, "work on both workers")
            victim = on_cluster.workers[0]
            (process,) = (process for process in _running() if on_cluster.worker_of(process) == victim.pid)
            victim.kill()
            _wait(lambda: not psutil.pid_exists(process), "the end of what the killed worker had started")
        except BaseException as error:
            problems.append(error)
        finally:
            (tmp_path / "go").touch()

    def _running() -> list[int]:
        return [int(path.suffix[1:]) for path in tmp_path.glob("running.*")]

    def _running_workers() -> set[int]:
        return {on_cluster.worker_of(process) for process in _running()}

    expected = _samples(prepare(lines, job()))
    shutil.rmtree(tmp_path / "home")
    killer = threading.Thread(target=kill_one)
    killer.start()
    prepared = prepare(Waiting(lines, tmp_path), job(), on_cluster.url)
    killer.join()
    assert problems == []
    assert _samples(prepared) == expected and sum(expected.values()) == 60


def test_what_always_fails_is_told_in_a_sentence(on_cluster: Cluster, tmp_path: Path, lines: Source) -> None:
    """The caller would have to find the cause in a trace of Python, Java and Python."""
    missing = Job(model=str(tmp_path / "none"), task_type="INSTRUCTION_FINETUNE", context_length=64)
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises((StageError, DataError, ValueError)) as error:
        spark.prepare_on_cluster(missing, lines, folder, on_cluster.url, lambda done, total: None)
    assert "\n" not in str(error.value) and f"the tokenizer of {tmp_path / 'none'} cannot be loaded" in str(error.value)


def test_a_session_of_its_own_is_ended(
    sessions: Sessions, job: Any, tmp_path: Path, write_lines: WriteLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each run would leave a Spark behind that holds memory, and cores of a cluster."""
    from pyspark import SparkContext

    sessions.stop()
    monkeypatch.delenv("PYSPARK_PYTHON")
    _check(_open(write_lines(tmp_path / "train.jsonl", map(_pair, range(9)))), job(), "local")
    assert SparkContext._active_spark_context is None


def test_spark_connect_prepares_too(
    environment: Path, sessions: Sessions, job: Any, lines: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cluster that is reached through Spark Connect alone, as most of today's, could not be used."""
    from pyspark.sql import SparkSession

    sessions.stop()
    # pyspark notes in the environment that it speaks to a server.
    monkeypatch.setenv("SPARK_CONNECT_MODE_ENABLED", "")
    monkeypatch.delenv("SPARK_CONNECT_MODE_ENABLED")
    port = _free_port()
    server = ["--class", "org.apache.spark.sql.connect.service.SparkConnectServer"]
    server += ["--conf", "spark.connect.grpc.binding.address=127.0.0.1", "--master", "local[2]"]
    server += [
        "--conf",
        f"spark.connect.grpc.binding.port={port}",
        "--conf",
        "spark.python.daemon.module=spark_cluster",
    ]
    with _spark_process(environment / "connect.log", "spark-submit", *server, "spark-internal"):
        _wait(lambda: _listens(port), "the start of the server")
        _check(lines, job(), f"sc://127.0.0.1:{port}")
    builder: Any = SparkSession.builder
    session = builder.master("local[1]").getOrCreate()
    try:
        assert session.range(3).count() == 3, "the next call may name another cluster"
    finally:
        session.stop()


# No cluster.


def test_spark_that_is_not_installed_is_told(
    job: Any, tmp_path: Path, home: Path, write_lines: WriteLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller would not learn what to install."""
    monkeypatch.setitem(sys.modules, "pyspark.sql", None)
    source = _open(write_lines(tmp_path / "train.jsonl", [_pair(1)]))
    with pytest.raises(StageError, match=r"takes pyspark, which is not installed: tundish\[spark\]\.$"):
        prepare(source, job(), "local[2]")
    assert [path for path in (home / "prepared").iterdir() if not path.name.endswith(".lock")] == []


def test_datasets_of_hugging_face_are_refused(
    job: Any, tmp_path: Path, write_lines: WriteLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller would wait for a cluster first, or not learn what it takes."""
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "pyspark.sql", None)
    (tmp_path / "lab").mkdir()
    write_lines(tmp_path / "lab" / "train.jsonl", [_pair(1)])
    with pytest.raises(
        DataError, match=r"lab/train: a Spark cluster prepares Delta tables, \.parquet, \.jsonl and \.txt files"
    ):
        prepare(_open(tmp_path / "lab" / "train"), job(), "local[2]")


@pytest.mark.parametrize("scheme", ["spark", "sc"])
def test_a_cluster_that_is_not_there_is_told(
    environment: Path, tmp_path: Path, write_lines: WriteLines, scheme: str
) -> None:
    """Spark tries for minutes, Spark Connect for ten, and neither says then that nobody listens at the address."""
    url = f"{scheme}://127.0.0.1:{_free_port()}"
    path = write_lines(tmp_path / "train.jsonl", [_pair(1)])
    program = (
        "import sys; from pathlib import Path; from tundish.errors import StageError\n"
        "from tundish.data.encoding import Job\n"
        "from tundish.data.opening import open_source; from tundish.data.spark import prepare_on_cluster\n"
        "url, path, task_type = sys.argv[1:]\n"
        "source = open_source(path, task_type, system_message=True)\n"
        "job = Job(model='none', task_type=task_type, context_length=64)\n"
        "try: prepare_on_cluster(job, source, Path(path).parent, url, print)\n"
        "except StageError as error: print(error)\n"
    )
    command = [sys.executable, "-c", program, url, str(path), "INSTRUCTION_FINETUNE"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith(f"the Spark cluster {url} cannot be reached: "), done.stderr
    assert "refused" in done.stdout and done.stdout.count("\n") == 1
