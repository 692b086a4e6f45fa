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
from types import FrameType

import psutil

from tundish.base.processes import start, stop_tree
from tundish.base.run_folder import RunFolder
from tundish.checkpoints.save_folder import SaveFolder
from tundish.errors import FailureCause, StageError
from tundish.launch.command import MASTER_PORT, STOPPED, train_command, train_environment
from tundish.plan.spec import RunSpec
from tundish.supervise.causes import Explanation, explain
from tundish.supervise.stragglers import Watch
from tundish.tracking.publishing import wait_seconds

REGISTER_SECONDS = 1800.0
"""Time for any registration, whatever the size: MLflow itself gives up on a dead server after 4 to 20 minutes."""
REGISTER_BYTES_PER_SECOND = 10e6
"""Of a slow network; the time for the bytes of the export and of checkpoints that are not uploaded yet is added."""
WATCH_SECONDS = 2.0
"""Between two looks at the ranks' signs of life."""
LOG_BYTES = 1 << 20
"""Of each log's end, read for the cause."""
TRY_MARK = "=== started again ===\n"
"""Begins each further try of a stage in its logs: the cause of a failure is looked for after it."""


class Canceled(BaseException):
    """SIGINT: the run's user has canceled it."""


class Stopped(BaseException):
    """SIGTERM or SIGUSR1, to the supervisor or to its ranks: this process, or its machine, is about to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = signal.Signals(number)


@dataclass(frozen=True, kw_only=True, slots=True)
class Devices:
    """Where a run trains."""

    command: Sequence[str] = ()
    """Starts training on all nodes of a cluster's job; empty: on this machine."""
    visible: Sequence[str] = ()
    """GPUs of this machine, as CUDA_VISIBLE_DEVICES names them; empty: all."""


def listen_to_signals() -> None:
    """From now on SIGINT raises Canceled, and the first SIGTERM or SIGUSR1 raises Stopped."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _on_signal)


def ignore_signals() -> None:
    """From now on signals do nothing: the run is about to end anyway."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _on_signal(number: int, _frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if number == signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise Canceled
    raise Stopped(number)


def training_starts(run: RunFolder) -> int:
    """How often training has begun."""
    return sum(event.type == "TRAIN_STARTED" for event in run.read_events())


def run_stage(run: RunFolder, stage: str, devices: Devices) -> None:
    """Run one stage to its end.

    Raises:
        StageError: it failed; the message says why.
        Stopped: the run was to stop; if training had begun, it has saved a checkpoint where it could.
    """
    starts = training_starts(run)
    command, environment = _command(run, stage, devices)
    run.begin_stage(stage)
    for log in run.stage_logs(stage):
        with open(log, "a") as file:
            file.write(TRY_MARK)
    limit = _register_seconds(run) + wait_seconds() if stage == "register" else None
    with _scratch(run):
        process = start(command, run.log(stage), environment, run.work, ignore_stop=stage == "train")
        try:
            returncode = _watch(process, run) if stage == "train" else _wait(process, limit)
        except Stopped:
            if stage == "train" and training_starts(run) > starts:
                # By a file and not a signal: all ranks must stop after the same batch, on all nodes.
                run.stop_request.touch()
                process.wait()
            raise
    # The exit code alone does not tell: srun returns the highest of all nodes', and kills the slower ones.
    if stage == "train" and returncode != 0 and (returncode == STOPPED or run.stopped.exists()):
        raise Stopped(signal.SIGTERM)
    if returncode != 0 and not run.is_done(stage):  # after its result, how a stage exits does not matter
        why = _explanation(run, stage, limit if returncode is None else None, returncode or 0)
        kept = f" The export is kept: {run.export}. `tundish resume {run.name}` registers it."
        text = f"Stage {stage!r} failed: {why.sentence}{kept if stage == 'register' else ''} Log: {run.log(stage)}"
        raise StageError(f"{text}\n{why.quoted}".strip(), str(run.log(stage)), failure=why.cause)


def _register_seconds(run: RunFolder) -> float:
    """How long a registration may take: the upload of a large model lasts hours, a server that hangs, forever."""
    checkpoints = SaveFolder(run.read_tracking().save_folder)
    folders = [run.export, *([checkpoints.local] if checkpoints.is_remote else [])]
    size = sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())
    return REGISTER_SECONDS + size / REGISTER_BYTES_PER_SECOND


def _watch(process: subprocess.Popen[bytes], run: RunFolder) -> int:
    """The exit code of the ranks' launcher; meanwhile an event names any rank that the others wait for."""
    # A rank that hangs fails nothing: the others wait in a collective, by default for half an hour.
    watch = Watch(run.beats)
    while True:
        try:
            return process.wait(WATCH_SECONDS)
        except subprocess.TimeoutExpired:
            text = watch.news()
        if text is not None:
            updates = [event.facts for event in run.read_events() if event.type == "TRAIN_UPDATED"]
            # The latest update is the only one that readers look at; the time that is left is no longer true.
            facts = {name: value for update in updates for name, value in update.items() if name != "eta_s"}
            run.add_event("TRAIN_UPDATED", text, **facts)


def _wait(process: subprocess.Popen[bytes], limit: float | None) -> int | None:
    """The exit code; None if the process, and all that it has started, had to be stopped after `limit` seconds."""
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        stop_tree(psutil.Process(process.pid))
        process.wait()
        return None


@contextlib.contextmanager
def _scratch(run: RunFolder) -> Iterator[None]:
    """An empty folder for a stage's temporary files, removed with what a killed stage leaves in it."""
    shutil.rmtree(run.scratch, ignore_errors=True)
    run.scratch.mkdir()
    try:
        yield
    finally:
        shutil.rmtree(run.scratch, ignore_errors=True)


def _command(run: RunFolder, stage: str, devices: Devices) -> tuple[Sequence[str], Mapping[str, str]]:
    """What starts the stage, and the variables that it needs beside this process's own."""
    if stage != "train":
        environment = {"TOKENIZERS_PARALLELISM": "true"} | run.environment
        if stage == "register":
            # MLflow copies the whole export before it uploads it: /tmp may be small, or memory.
            environment |= {"TMPDIR": str(run.scratch), "HF_HUB_OFFLINE": "1"}
        return [sys.executable, "-m", "tundish.supervise.stages", stage, str(run.folder)], environment
    compute = RunSpec.read(run).compute
    environment = train_environment(compute, run, os.cpu_count() or 1) | run.read_tracking().environment
    if devices.visible and compute.device == "gpu":
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices.visible)
    if devices.command:
        with socket.socket() as probe:  # most likely still free when the first node's ranks bind it, a moment later
            probe.bind(("", 0))
            environment[MASTER_PORT] = str(probe.getsockname()[1])
        return devices.command, environment
    return train_command(compute, run), environment


def _explanation(run: RunFolder, stage: str, limit: float | None, returncode: int) -> Explanation:
    """Why a stage failed: what it recorded itself, else what its logs show."""
    if limit is not None:
        text = f"it was not done after {limit:,.0f} s, and was stopped."
        return Explanation(FailureCause.MLFLOW_UNREACHABLE, text)  # only registering has a limit
    # What the stage recorded is better than what its log shows: a rank's refusal reaches the other logs as noise.
    if (result := run.read_result(stage)) is not None and "error" in result:
        sentence, _, more = str(result["error"]).partition("\n")
        return Explanation(FailureCause.of(result.get("cause")), sentence, more)
    logs: dict[str, str] = {}
    for log in run.stage_logs(stage):
        with open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - LOG_BYTES))
            logs[log.name] = file.read().decode(errors="replace").rpartition(TRY_MARK)[2]
    return explain(logs, returncode)
