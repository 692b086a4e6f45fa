"""Preparation on a Spark cluster: each task prepares a share with the functions that one machine uses.

Every attempt of a task writes into a folder of its own, and only the folders of finished tasks are merged; those of
failed or duplicate attempts are removed. Driver and executors must see folders and data under the same path.
"""

import os
import pickle
import re
import shutil
import socket
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tundish.base.progress import Progress
from tundish.base.workers import Workers, one_thread_each
from tundish.data.encoding import Job
from tundish.data.shards import PartResult, write_shards
from tundish.data.source import Source, first_samples
from tundish.errors import DataError, FailureCause, StageError

PART_BYTES = 1 << 25
"""Input of one task; the last row of each share is not full, so small shares would waste space."""
RESULT = "part bigint, folder string, result binary, problems array<string>"
CONNECT_MODES = ("SPARK_CONNECT_MODE_ENABLED", "SPARK_REMOTE", "SPARK_LOCAL_REMOTE")
"""Environment variables that pyspark sets for Spark Connect; with them, it takes every cluster for one of that kind."""
DEFAULT_PORTS = {"spark": 7077, "sc": 15002}
REACH_SECONDS = 10
ATTEMPTS = 4
"""How often a task is tried: Spark's default on a cluster, used here for `local[n]` too."""


def prepare_on_cluster(job: Job, source: Source, folder: Path, cluster: str, progress: Progress) -> PartResult:
    """Write the shards of a source's samples into `folder`, which exists; none if there are problems.

    Args:
        job: how samples are encoded.
        source: the samples.
        folder: that driver and executors see under this path.
        cluster: `spark://host:port`, `sc://host:port` or `local[n]`.
        progress: called with the number of parts that are merged, and of all.

    Raises:
        DataError: the data cannot be read.
        StageError: pyspark is not installed, the cluster cannot be reached, or a task failed in all its attempts.
    """
    parts = source.parts(PART_BYTES)
    with _session(cluster) as session:
        results = _run(session, job, parts, folder)
    whole = PartResult()
    for done, (name, share) in enumerate(results, 1):
        for number, entry in enumerate(share.shards, len(whole.shards)):
            shard = f"shard.{number:05}.mds"
            (folder / name / entry["raw_data"]["basename"]).rename(folder / shard)
            entry["raw_data"]["basename"] = shard
        whole.add(share)
        progress(done, len(parts))
    for attempt in folder.glob("part.*"):
        shutil.rmtree(attempt, ignore_errors=True)
    return whole


def _run(session: Any, job: Job, parts: Sequence[Source], folder: Path) -> list[tuple[str, PartResult]]:
    """Folder and share of every part, in order."""

    def prepare_parts(batches: Iterator[Any]) -> Iterator[Any]:
        import pyarrow as pa

        names = {"part": pa.int64(), "folder": pa.string(), "result": pa.binary(), "problems": pa.list_(pa.string())}
        schema = pa.schema(list(names.items()))
        for number in (number for batch in batches for number in batch["id"].to_pylist()):
            row = {"part": number, "folder": "", "result": b"", "problems": list[str]()}
            try:
                name, result = prepare_part(job, parts[number], folder, number)
                row |= {"folder": name, "result": pickle.dumps(result)}
            except DataError as error:  # another attempt would find the same
                row["problems"] = list(error.problems)
            yield pa.RecordBatch.from_pylist([row], schema)

    # One part per task, so that a lost worker costs one part.
    try:
        numbers = session.range(0, len(parts), 1, len(parts))
        rows = numbers.mapInArrow(prepare_parts, RESULT).collect()
    except Exception as error:  # Py4J's, or Spark Connect's
        raise StageError(
            f"the Spark cluster could not prepare the data: {_cause(error)}", failure=FailureCause.SPARK_FAILED
        ) from error
    if problems := sorted({problem for row in rows for problem in row["problems"]}):
        raise DataError(problems)
    results = {row["part"]: (row["folder"], pickle.loads(bytes(row["result"]))) for row in rows}
    return [results[number] for number in range(len(parts))]


def prepare_part(job: Job, part: Source, folder: Path, number: int) -> tuple[str, PartResult]:
    """The work of a task: write one part's shards into a new folder below `folder`. Returns that folder's name."""
    name = f"part.{number:05}.{uuid.uuid4().hex}"
    own = folder / name
    own.mkdir()
    job.prove(islice(first_samples(part), 16))
    with Workers(1) as workers:
        return name, write_shards(job, part, own, workers, lambda done, total: None)


@contextmanager
def _session(cluster: str) -> Iterator[Any]:
    """A Spark session on `cluster`; the caller's own if there is one."""
    try:
        from pyspark.sql import SparkSession
    except ImportError:
        raise StageError(
            "preparing data on Spark needs pyspark, which is not installed. Install tundish[spark].",
            failure=FailureCause.SPARK_FAILED,
        ) from None
    # Otherwise executors use the first python3 on their PATH.
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    before, modes = _is_running(), {name: os.environ.get(name) for name in CONNECT_MODES}
    builder: Any = SparkSession.builder.appName("tundish")
    try:
        _reach(cluster)
        if cluster.startswith("sc://"):
            session = builder.remote(cluster).getOrCreate()
        else:
            quiet = {"spark.ui.enabled": "false", "spark.ui.showConsoleProgress": "false"}
            master = re.sub(r"^local(\[(.*)\])?$", lambda match: f"local[{match[2] or 1},{ATTEMPTS}]", cluster)
            with one_thread_each():  # Spark forks this process to start its own
                session = builder.master(master).config(map=quiet).getOrCreate()
    except Exception as error:
        raise StageError(
            f"the Spark cluster {cluster} cannot be reached: {_cause(error)}", failure=FailureCause.SPARK_FAILED
        ) from error
    try:
        yield session
    finally:
        if not before:
            session.stop()
            for name, value in modes.items():
                os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def _is_running() -> bool:
    """Whether this process has a Spark session, in any thread."""
    from pyspark import SparkContext

    connect: Any = sys.modules.get("pyspark.sql.connect.session")
    remote = None if connect is None else connect.SparkSession._get_default_session()
    context = SparkContext._active_spark_context  # pyright: ignore[reportPrivateUsage]  the public way would create one
    return context is not None or remote is not None


def _reach(cluster: str) -> None:
    """Connect to a cluster's address once.

    Raises:
        OSError: none of the cluster's masters can be reached.
    """
    # Spark itself tries for minutes, and then does not report that the connection was refused.
    scheme, _, rest = cluster.partition("://")
    if scheme not in DEFAULT_PORTS:
        return
    errors = []
    for address in re.split(r"[/;]", rest)[0].split(","):
        url = urlsplit(f"//{address}")
        try:
            return socket.create_connection(
                (url.hostname or "", url.port or DEFAULT_PORTS[scheme]), REACH_SECONDS
            ).close()
        except OSError as error:
            errors.append(error)
    raise errors[0]


def _cause(error: Exception) -> str:
    """The last error in a traceback of Python and Java."""
    causes = re.findall(r"^(?:[\w.]*\.)?(\w+(?:Error|Exception): .+)$", str(error), re.MULTILINE)
    return (causes[-1] if causes else (str(error).strip() or repr(error)).splitlines()[0])[:500]
