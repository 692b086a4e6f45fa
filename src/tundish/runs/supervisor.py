"""The supervisor: takes one run through its stages, in a process of its own, and says how it ended.

Each stage is a process too: what it loads goes with it, and the supervisor stays small while the model trains. A stage
that has left a result is done: a supervisor that is started again goes on with the next one.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import FrameType

import psutil

from tundish import events
from tundish.errors import StageError
from tundish.launch.command import train_command, train_environment
from tundish.launch.local import ProcessId, processes_with, start, stop_all, stop_tree
from tundish.paths import RUN_VARIABLE, RunPaths, write_atomic
from tundish.runs.tracking import Tracking
from tundish.spec import RunSpec

RANKS_GRACE_SECONDS = 1.0
"""A rank without a launcher has nothing left to do."""
REGISTER_SECONDS = 1800.0
"""A registration may take so long, whatever the size: MLflow itself gives a dead server up after 4 to 20 minutes."""
REGISTER_BYTES_PER_SECOND = 10e6
"""A slow network's; the time for the export's bytes comes on top."""
STAGES = ("prepare", "train", "export", "register")
ERROR_LINE = re.compile(r"^(?:\[rank\d+\]: *)?((?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Interrupt|Exit)\b.*)$")


def spawn(paths: RunPaths) -> None:
    """Start the run's supervisor, detached from the caller, and note which process it is."""
    command = [sys.executable, "-m", "tundish.runs.supervisor", str(paths.folder)]
    process = start(command, paths.log("supervisor"), {}, paths.folder, detached=True)
    write_atomic(paths.supervisor, json.dumps(asdict(ProcessId.of(process.pid))) + "\n")
    # Reaped when it ends, should the caller still live by then.
    threading.Thread(target=process.wait, daemon=True).start()


def main(folder: str) -> None:
    """Run all stages; the last event is COMPLETED, FAILED or CANCELED."""
    paths = RunPaths(Path(folder))
    signal.signal(signal.SIGTERM, _on_terminate)
    if events.read(paths.events)[-1].type in events.TERMINAL_TYPES:
        return  # canceled before it began
    try:
        events.append(paths.events, "STARTED", f"Run started on {os.uname().nodename}.")
        for stage in STAGES:
            if not is_done(paths, stage):
                _run_with_retry(paths, stage)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        result = json.loads(paths.result("register").read_text())
        message = f"Run completed. Registered as version {result['version']} of {result['name']}."
        events.append(paths.events, "COMPLETED", message)
    except StageError as error:
        end_processes_of(paths)
        end_mlflow_run(paths, "FAILED")
        events.append(paths.events, "FAILED", f"{error.message} Log: {error.log_path}")
    except _Terminated:
        stop_all(psutil.Process().children(recursive=True))
        events.append(paths.events, "CANCELED", "Canceled by user.")
    except Exception as error:
        end_processes_of(paths)
        end_mlflow_run(paths, "FAILED")
        events.append(paths.events, "FAILED", f"The supervisor failed: {error!r}. Log: {paths.log('supervisor')}")
        raise


def is_done(paths: RunPaths, stage: str) -> bool:
    """Whether the stage has left a result."""
    try:
        return "error" not in json.loads(paths.result(stage).read_text())
    except FileNotFoundError:
        return False


def _run_with_retry(paths: RunPaths, stage: str) -> None:
    """Run a stage; training that has begun and then crashed, once more from its newest checkpoint."""
    before = _starts(paths)
    try:
        run_stage(paths, stage)
    except StageError as error:
        # What a stage refuses in its own words, or before it has begun, it would refuse again.
        if stage != "train" or paths.result(stage).exists() or _starts(paths) == before:
            raise
        events.append(paths.events, "REQUEUED", f"{error.message} It is tried once more from its newest checkpoint.")
        end_processes_of(paths)
        run_stage(paths, stage)


def _starts(paths: RunPaths) -> int:
    return sum(event.type == "TRAIN_STARTED" for event in events.read(paths.events))


def end_processes_of(paths: RunPaths) -> None:
    """End what a supervisor or a launcher that was killed has left behind."""
    stop_all(processes_with(RUN_VARIABLE, str(paths.events)), grace_s=RANKS_GRACE_SECONDS)


def run_stage(paths: RunPaths, stage: str) -> None:
    """Run one stage to its end.

    Raises:
        StageError: it failed; the message is the cause in one sentence.
    """
    log = paths.log(stage)
    command, environment = _command(paths, stage)
    paths.work.mkdir(exist_ok=True)
    paths.result(stage).unlink(missing_ok=True)
    limit = _register_seconds(paths.export) if stage == "register" else None
    with _scratch(paths):
        returncode = _wait(start(command, log, environment, paths.work), limit)
    if returncode != 0:
        logs = [log, *sorted(paths.logs.glob(f"{stage}-rank*.log"))]
        if returncode is None:
            cause = f"it was not done after {limit:,.0f} s, and was stopped."
        else:
            cause = _cause(paths, stage, logs, returncode)
        kept = f" The export is kept: {paths.export}. `tundish resume {paths.folder.name}` registers it."
        raise StageError(f"Stage {stage!r} failed: {cause}{kept if stage == 'register' else ''}", str(log))


def _register_seconds(export: Path) -> float:
    """How long a registration may take: the upload of a large model lasts hours, a server that hangs for ever."""
    size = sum(path.stat().st_size for path in export.rglob("*") if path.is_file())
    return REGISTER_SECONDS + size / REGISTER_BYTES_PER_SECOND


def _wait(process: subprocess.Popen[bytes], limit: float | None) -> int | None:
    """The exit code; None if the process, and all that it has started, had to be stopped after `limit` seconds."""
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        stop_tree(psutil.Process(process.pid))
        process.wait()
        return None


@contextlib.contextmanager
def _scratch(paths: RunPaths) -> Iterator[None]:
    """An empty folder for a stage's temporary files; what a stage leaves that was killed goes with it."""
    shutil.rmtree(paths.scratch, ignore_errors=True)
    paths.scratch.mkdir()
    try:
        yield
    finally:
        shutil.rmtree(paths.scratch, ignore_errors=True)


def _command(paths: RunPaths, stage: str) -> tuple[Sequence[str], Mapping[str, str]]:
    tracking = Tracking.read(paths)
    if stage != "train":
        # By the variable, what outlives its supervisor is found.
        environment = {"TOKENIZERS_PARALLELISM": "true", RUN_VARIABLE: str(paths.events)}
        if stage == "register":
            # MLflow copies the whole export before it uploads it: /tmp may be small, or memory.
            environment |= {"TMPDIR": str(paths.scratch), "HF_HUB_OFFLINE": "1"}
        return [sys.executable, "-m", "tundish.runs.stage", stage, str(paths.folder)], environment
    compute = RunSpec.from_json(paths.spec.read_text()).compute
    environment = train_environment(compute, paths, os.cpu_count() or 1) | tracking.environment
    return train_command(compute, paths), environment


def _cause(paths: RunPaths, stage: str, logs: Sequence[Path], returncode: int) -> str:
    """What a failed stage said of itself, else the last error in its logs, else its exit code."""
    try:
        return json.loads(paths.result(stage).read_text())["error"]
    except (FileNotFoundError, KeyError):
        pass
    for log in logs:
        if log.is_file() and (line := last_error(log.read_text(errors="replace"))):
            return line if line.endswith(".") else line + "."
    how = f"was killed by signal {-returncode}" if returncode < 0 else f"ended with exit code {returncode}"
    return f"its process {how} and left no error in its log."


def last_error(text: str) -> str | None:
    """The last line of a log that names an exception; the launcher's own are left out."""
    matches = (ERROR_LINE.match(line) for line in reversed(text.splitlines()))
    return next((match[1] for match in matches if match), None)


def end_mlflow_run(paths: RunPaths, status: str) -> None:
    """Close the MLflow run from a process of its own; a store that cannot be reached must not hide the cause."""
    command = [sys.executable, "-m", "tundish.runs.stage", f"close-{status}", str(paths.folder)]
    with contextlib.suppress(subprocess.TimeoutExpired, OSError):
        subprocess.run(command, stdin=subprocess.DEVNULL, check=False, timeout=60)


class _Terminated(BaseException):
    """SIGTERM has come."""


def _on_terminate(_signal: int, _frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise _Terminated


if __name__ == "__main__":
    main(sys.argv[1])
