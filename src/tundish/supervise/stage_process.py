"""Running one stage in a process of its own, to its end or until the run is to stop."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil

from tundish.base import events
from tundish.base.home import RUN_VARIABLE
from tundish.base.processes import start, stop_tree
from tundish.base.run_folder import RunFolder
from tundish.checkpoints.save_folder import SaveFolder
from tundish.errors import StageError
from tundish.launch.command import STOPPED, train_command, train_environment
from tundish.plan.spec import RunSpec
from tundish.supervise.causes import explain
from tundish.supervise.stragglers import Watch
from tundish.tracking.publishing import wait_seconds

REGISTER_SECONDS = 1800.0
"""A registration may take so long, whatever the size: MLflow itself gives a dead server up after 4 to 20 minutes."""
REGISTER_BYTES_PER_SECOND = 10e6
"""A slow network's; the time for the export's bytes, and for those of checkpoints that wait, comes on top."""
WATCH_SECONDS = 2.0
"""Between two looks at the ranks' signs of life."""
LOG_BYTES = 1 << 20
"""Of each log's end, read for the cause."""


class Canceled(BaseException):
    """SIGINT: the run's user has canceled it."""


class Stopped(BaseException):
    """SIGTERM or SIGUSR1, to the supervisor or to its ranks: this process, or its machine, is about to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = signal.Signals(number)


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a run's training runs."""

    command: Sequence[str] = ()
    """Starts it on all nodes of a job; empty: on this machine."""
    devices: Sequence[str] = ()
    """Of this machine, as CUDA_VISIBLE_DEVICES calls them; empty: all."""


def listen() -> None:
    """From now on signals end what this process does: SIGINT by Canceled; SIGTERM and SIGUSR1 by Stopped, once."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _on_signal)


def be_deaf() -> None:
    """From now on signals do nothing: what comes is the end anyway."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _on_signal(number: int, _frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if number == signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise Canceled
    raise Stopped(number)


def is_done(paths: RunFolder, stage: str) -> bool:
    """Whether the stage has left a result."""
    result = paths.read_result(stage)
    return result is not None and "error" not in result


def training_starts(paths: RunFolder) -> int:
    """How often training has begun."""
    return sum(event.type == "TRAIN_STARTED" for event in paths.read_events())


def run_stage(paths: RunFolder, stage: str, place: Place) -> None:
    """Run one stage to its end.

    Raises:
        StageError: it failed; the message is the cause.
        Stopped: the run was to stop; where training had begun, it has saved a checkpoint, if it could.
    """
    log, starts = paths.log(stage), training_starts(paths)
    command, environment = _command(paths, stage, place)
    paths.work.mkdir(exist_ok=True)
    paths.result(stage).unlink(missing_ok=True)
    paths.stop_request.unlink(missing_ok=True)
    paths.stopped.unlink(missing_ok=True)
    shutil.rmtree(paths.beats, ignore_errors=True)
    limit = _register_seconds(paths) + wait_seconds() if stage == "register" else None
    _mark(paths, stage)
    with _scratch(paths):
        process = start(command, log, environment, paths.work, deaf=stage == "train")
        try:
            returncode = _watch(process, paths) if stage == "train" else _wait(process, limit)
        except Stopped:
            if stage == "train" and training_starts(paths) > starts:
                paths.stop_request.touch()
                process.wait()
            raise
    # Not by the exit code alone: srun gives the highest of all nodes', and ends those that are slower than the first.
    if stage == "train" and returncode != 0 and (returncode == STOPPED or paths.stopped.exists()):
        raise Stopped(signal.SIGTERM)
    if returncode != 0 and not is_done(paths, stage):  # what has left a result may end as it will
        kept = f" The export is kept: {paths.export}. `tundish resume {paths.folder.name}` registers it."
        cause = _cause(paths, stage, limit if returncode is None else None, returncode or 0)
        sentence, newline, quoted = cause.partition("\n")
        text = f"Stage {stage!r} failed: {sentence}{kept if stage == 'register' else ''}"
        raise StageError(f"{text} Log: {log}{newline}{quoted}", str(log))


def _register_seconds(paths: RunFolder) -> float:
    """How long a registration may take: the upload of a large model lasts hours, a server that hangs for ever."""
    place = SaveFolder(paths.read_tracking().save_folder)
    folders = [paths.export, *([place.local] if place.is_remote else [])]
    size = sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())
    return REGISTER_SECONDS + size / REGISTER_BYTES_PER_SECOND


def _watch(process: subprocess.Popen[bytes], paths: RunFolder) -> int:
    """The exit code of the ranks' launcher; an event names a rank for which the others wait."""
    watch = Watch(paths.beats)
    while True:
        try:
            return process.wait(WATCH_SECONDS)
        except subprocess.TimeoutExpired:
            text = watch.news()
        if text is not None:
            found = [event.facts for event in paths.read_events() if event.type == "TRAIN_UPDATED"]
            kept = {name: value for facts in found for name, value in facts.items() if name != "eta_s"}
            events.append(paths.events, "TRAIN_UPDATED", text, **kept)


def _wait(process: subprocess.Popen[bytes], limit: float | None) -> int | None:
    """The exit code; None if the process, and all that it has started, had to be stopped after `limit` seconds."""
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        stop_tree(psutil.Process(process.pid))
        process.wait()
        return None


@contextlib.contextmanager
def _scratch(paths: RunFolder) -> Iterator[None]:
    """An empty folder for a stage's temporary files; what a stage leaves that was killed goes with it."""
    shutil.rmtree(paths.scratch, ignore_errors=True)
    paths.scratch.mkdir()
    try:
        yield
    finally:
        shutil.rmtree(paths.scratch, ignore_errors=True)


def _command(paths: RunFolder, stage: str, place: Place) -> tuple[Sequence[str], Mapping[str, str]]:
    tracking = paths.read_tracking()
    if stage != "train":
        # By the variable, what outlives its supervisor is found.
        environment = {"TOKENIZERS_PARALLELISM": "true", RUN_VARIABLE: str(paths.events)}
        if stage == "register":
            # MLflow copies the whole export before it uploads it: /tmp may be small, or memory.
            environment |= {"TMPDIR": str(paths.scratch), "HF_HUB_OFFLINE": "1"}
        return [sys.executable, "-m", "tundish.supervise.stages", stage, str(paths.folder)], environment
    compute = RunSpec.read(paths).compute
    environment = train_environment(compute, paths, os.cpu_count() or 1) | tracking.environment
    if place.devices and compute.device == "gpu":
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(place.devices)
    if place.command:
        # Asked for by the first node's ranks in a moment: free until then, most likely.
        environment["TUNDISH_MASTER_PORT"] = str(_free_port())
        return place.command, environment
    return train_command(compute, paths), environment


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _logs(paths: RunFolder, stage: str) -> list[Path]:
    return [log for log in [paths.log(stage), *sorted(paths.logs.glob(f"{stage}-rank*.log"))] if log.is_file()]


def _mark(paths: RunFolder, stage: str) -> None:
    """Say in the logs where this try begins: the cause of a failure is looked for after it."""
    for log in _logs(paths, stage):
        with open(log, "a") as file:
            file.write(MARK)


MARK = "=== started again ===\n"


def _cause(paths: RunFolder, stage: str, limit: float | None, returncode: int) -> str:
    """What a failed stage said of itself, else what its logs tell."""
    if limit is not None:
        return f"it was not done after {limit:,.0f} s, and was stopped."
    if (result := paths.read_result(stage)) is not None and "error" in result:
        return str(result["error"])
    return explain({log.name: _tail(log).rpartition(MARK)[2] for log in _logs(paths, stage)}, returncode)


def _tail(log: Path) -> str:
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - LOG_BYTES))
        return file.read().decode(errors="replace")
