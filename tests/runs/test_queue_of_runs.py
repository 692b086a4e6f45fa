"""Many runs at once on one machine, on the real stack: `make test-kill`, as it takes a quarter of an hour."""

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.runs.processes import stages, supervisor, wait_until

from tundish import foundation_model as fm
from tundish.base import events
from tundish.base.run_folder import RunFolder
from tundish.foundation_model import TrainingRun

WriteLines = Callable[[Path, Iterable[object]], Path]
pytestmark = pytest.mark.kill

RUNS = 21
CREATE = """\
import json, os, sys, time
import mlflow, transformers
from tundish import foundation_model as fm
print("ready", flush=True)
while not os.path.exists(sys.argv[1]):
    time.sleep(0.01)
print(fm.create(**json.loads(sys.argv[2])).name, flush=True)
"""


@dataclass
class Watch:
    """What was seen of the machine and of the line while runs went on."""

    home: Path
    before: int = field(default_factory=lambda: psutil.virtual_memory().used)
    peak: int = 0
    """The most bytes of memory that were used beyond those that were used before."""
    numbers: dict[str, int] = field(default_factory=dict[str, int])
    """Of each run's first ticket."""

    def look(self) -> None:
        """Look once."""
        self.peak = max(self.peak, psutil.virtual_memory().used - self.before)
        for file in self.home.glob("queue/*/[!.]*.json"):
            with suppress(FileNotFoundError):  # left meanwhile
                self.numbers.setdefault(file.stem, json.loads(file.read_text())["number"])


@contextmanager
def _watching(home: Path) -> Iterator[Watch]:
    watch, over = Watch(home), threading.Event()

    def go_on() -> None:
        while not over.wait(0.2):
            watch.look()

    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        yield watch
    finally:
        over.set()
        thread.join()


def _create_at_once(arguments: dict[str, Any], folder: Path) -> list[str]:
    """The names of runs that as many processes have created at the same moment."""
    command, go = [sys.executable, "-c", CREATE, str(folder / "go"), json.dumps(arguments)], folder / "go"
    creators: list[subprocess.Popen[str]] = []
    logs = [open(folder / f"create-{number}.err", "w") for number in range(RUNS)]
    try:
        for log in logs:
            creators.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True))
        for one in creators:
            assert one.stdout is not None and one.stdout.readline() == "ready\n"
        go.touch()
        names = [one.communicate(timeout=300)[0].strip() for one in creators]
        assert all(names), [Path(log.name).read_text()[-2000:] for log in logs]
        return names
    finally:
        for one, log in zip(creators, logs, strict=False):
            one.kill()
            one.communicate()
            log.close()


def _line(names: list[str]) -> list[str]:
    """The runs that wait, by the places that they tell."""
    found = {name: re.search(r"position (\d+) in the queue", str(fm.get(name).details)) for name in names}
    return [name for _, name in sorted((int(place[1]), name) for name, place in found.items() if place)]


def _times(name: str, type: str) -> list[datetime]:
    return [event.time for event in events.read(RunFolder.of(name).events) if event.type == type]


def _kill_holder(name: str, following: str) -> str:
    """Kill a run's supervisor while its model is loaded; afterwards the next one has started. Returns its name."""
    paths = RunFolder.of(name)
    wait_until(lambda: _times(name, "DATA_VALIDATED"), 900)
    process = supervisor(paths)
    assert process is not None
    process.kill()
    wait_until(lambda: not stages(paths), 10)
    wait_until(lambda: _times(following, "STARTED"), 20)
    assert fm.get(name).status.display_name == "Failed" and not _times(name, "TRAIN_STARTED")
    return name


def test_runs_that_are_created_at_once_train_one_after_another(
    tiny_model: Path, tmp_path: Path, write_lines: WriteLines, home: Path
) -> None:
    """Two runs would share the devices and run out of memory, one would never be started, or MLflow be left broken."""
    pairs = [{"prompt": f"{n}: ", "response": "fox"} for n in range(40)]
    arguments = {
        "model": str(tiny_model), "train_data_path": str(write_lines(tmp_path / "train.jsonl", pairs)),
        "register_to": "main.lab", "task_type": "INSTRUCTION_FINETUNE", "context_length": 64,
        "training_duration": "2ba", "compute": {"device": "cpu", "devices_per_node": 1},
    }  # fmt: skip
    begin = time.monotonic()
    with _watching(home) as watch:
        names = _create_at_once(arguments, tmp_path)
        created_s, created_peak = time.monotonic() - begin, watch.peak
        assert len(set(names)) == RUNS
        wait_until(lambda: set(watch.numbers) == set(names), 5)
        line = sorted(names, key=lambda name: watch.numbers[name])
        waiting = _line(names)
        assert len(waiting) > 12 and waiting == line[-len(waiting) :], "first come, first served"

        canceled, start = waiting[6], time.monotonic()
        assert fm.cancel(canceled) == 1
        assert fm.get(canceled).status.display_name == "Stopped" and time.monotonic() - start < 10
        assert _line([name for name in names if name != canceled])[-10:] == waiting[-10:], "those behind it move up"

        killed = _kill_holder(waiting[1], waiting[2])
        fm.resume(killed)
        assert _line(names)[-1] == killed, "a run that lost its place goes to the end"
        done = [fm.get(name).wait(timeout=1800) for name in line if name != canceled]
    seconds = time.monotonic() - begin
    _check_end([*(name for name in line if name not in (canceled, killed)), killed], done, home)
    print(f"\n{RUNS} runs created in {created_s:.0f} s, all done after {seconds:.0f} s.")
    print(f"Memory: {created_peak / 2**30:.1f} GiB while they were created, {watch.peak / 2**30:.1f} GiB at most.")


def _check_end(order: list[str], done: list[TrainingRun], home: Path) -> None:
    """All are complete, in their order, and never were two at the devices."""
    from mlflow import MlflowClient

    assert {run.status.display_name for run in done} == {"Completed"}, [run.details for run in done]
    assert sorted(order, key=lambda name: _times(name, "TRAIN_STARTED")) == order
    held = [(_times(name, "STARTED")[-1], _times(name, "TRAIN_FINISHED")[0]) for name in order]
    assert all(end <= start for (_, end), (start, _) in pairwise(sorted(held)))
    client = MlflowClient(f"sqlite:///{home}/mlflow/mlflow.db")
    assert all(len(client.search_model_versions(f"name='{run.submitted_config.registered_name}'")) == 1 for run in done)
    assert [path.name for path in home.glob("queue/*/*")] == ["lock"]
    assert not [path for path in (home / "runs").iterdir() if path.name.startswith(".")]
