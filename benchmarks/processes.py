"""Fresh processes to measure in, their peak memory, and a Spark cluster on this machine."""

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import psutil

from benchmarks.sides import Facts, memory_of

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, slots=True)
class Lab:
    """A scratch folder in which sides run, and the part of this machine that they may use."""

    scratch: Path
    sides: str = "benchmarks.sides"
    """The module that serves them."""

    def run(self, side: str, *, watch: bool = False, **arguments: Any) -> Facts:
        """The result of a side in a process of its own, with `wall` seconds and, if watched, `peak` bytes."""
        home = Path(self.fresh("run-"))
        result = home / "result.json"
        command = [sys.executable, "-m", self.sides, side, orjson.dumps(arguments).decode(), str(result)]
        start = time.perf_counter()
        with open(home / "output", "w+b") as output:
            process = subprocess.Popen(command, cwd=ROOT, env=self._environment(home), stdout=output, stderr=output)
            try:
                with _peak(process.pid, wanted=watch) as peak:
                    failed = process.wait()
            finally:
                process.kill()
            wall = time.perf_counter() - start
            if failed:
                output.seek(0)
                raise SystemExit(f"{side} failed:\n{output.read().decode(errors='replace')[-5000:]}")
        return orjson.loads(result.read_bytes()) | {"wall": wall, "peak": max(peak, default=0)}

    def fresh(self, prefix: str) -> str:
        """A new name in the scratch folder."""
        number = sum(1 for _ in self.scratch.glob(f"{prefix}*"))
        folder = self.scratch / f"{prefix}{number}"
        folder.mkdir()
        return str(folder)

    def clear(self) -> None:
        """Remove the files of earlier runs."""
        for folder in self.scratch.glob("run-*"):
            shutil.rmtree(folder, ignore_errors=True)

    def _environment(self, home: Path) -> dict[str, str]:
        own = {"TUNDISH_HOME": str(home / "tundish"), "HF_HOME": str(home / "hf"), "TMPDIR": str(home)}
        fixed = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "SPARK_LOCAL_IP": "127.0.0.1"}
        return {**os.environ, **own, **fixed}


@contextmanager
def _peak(process: int, *, wanted: bool) -> Iterator[list[int]]:
    """Samples the total PSS of a process and its descendants ten times per second."""
    sizes, over = list[int](), threading.Event()

    def watch() -> None:
        while wanted and not over.wait(0.1):
            sizes.append(sum(memory_of(each) for each in _family(process)))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield sizes
    finally:
        over.set()
        thread.join()


def _family(process: int) -> list[int]:
    try:
        return [process, *(child.pid for child in psutil.Process(process).children(recursive=True))]
    except psutil.Error:
        return []


@contextmanager
def spark_cluster(folder: Path, workers: int) -> Iterator[str]:
    """The address of a standalone cluster on loopback, with workers of one core each."""
    import pyspark

    port = free_port()
    address = f"spark://127.0.0.1:{port}"
    common = ["--host", "127.0.0.1", "--webui-port", "0"]
    home = Path(str(pyspark.__file__)).parent
    own = {"SPARK_HOME": str(home), "SPARK_LOCAL_IP": "127.0.0.1", "PYSPARK_PYTHON": sys.executable}
    commands = [["master.Master", *common, "--port", str(port)]]
    commands += [["worker.Worker", *common, "-c", "1", "-m", "1g", "-d", str(folder), address]] * workers
    log = folder / "cluster.log"
    with open(log, "wb") as output:
        started = [
            subprocess.Popen(
                [home / "bin" / "spark-class", f"org.apache.spark.deploy.{name}", *arguments],
                env=os.environ | own, stdout=output, stderr=output,
            )
            for name, *arguments in commands
        ]  # fmt: skip
        try:
            _wait_for(log, "Registering worker", workers)
            yield address
        finally:
            for process in reversed(started):
                process.terminate()
            for process in started:
                process.wait()


def free_port() -> int:
    """A free port."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_for(log: Path, text: str, count: int) -> None:
    for _ in range(600):
        if log.read_text(errors="replace").count(text) >= count:
            return
        time.sleep(0.1)
    raise SystemExit(f"the Spark cluster did not start:\n{log.read_text(errors='replace')[-3000:]}")
