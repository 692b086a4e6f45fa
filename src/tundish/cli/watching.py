"""The commands that look inside a run: logs, metrics."""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

from tundish import foundation_model as fm
from tundish.base.run_folder import RunFolder
from tundish.base.text import printable
from tundish.cli.output import PICTURES, add_json, add_run, new_file, print_json, print_table
from tundish.cli.parsing import Command, positive, whole
from tundish.errors import Interrupted, RequestError, SpecError, did_you_mean
from tundish.runs import selecting
from tundish.runs.reading import find_run, read_run
from tundish.runs.records import RunStatus

LINES = 50
POLL_SECONDS = 0.5
TAIL_BYTES = 4 << 20
"""How much of the end of a log is searched for its last lines; a training log may have gigabytes."""
NOT_STAGES = ("supervisor", "close")
"""Logs of what happens around the stages; shown only if named."""


def logs_options(command: argparse.ArgumentParser) -> None:
    """What `tundish logs` takes."""
    add_json(command)
    add_run(command)
    command.add_argument(
        "--stage",
        metavar="STAGE",
        help="prepare, train, export, register or supervisor (default: the stage that wrote to its log last)",
    )
    command.add_argument("--rank", type=whole, metavar="N", help="log of rank N of the training (default 0)")
    command.add_argument(
        "-n", "--lines", type=positive, default=LINES, metavar="N", help=f"show the last N lines (default {LINES})"
    )
    command.add_argument("-f", "--follow", action="store_true", help="show new lines until the run ends")


def logs(arguments: argparse.Namespace) -> int:
    """`tundish logs [--follow]`."""
    if arguments.json and arguments.follow:
        raise SpecError("--follow and --json cannot be combined. Choose one of them.")
    if arguments.rank is not None and arguments.rank < 0:
        raise SpecError(f"--rank must be at least 0, not {arguments.rank}.")
    name = selecting.named(arguments.run)
    run = find_run(name)
    log = _log(run, arguments.stage, arguments.rank)
    if arguments.json:
        lines = [] if log is None else _last_lines(log, arguments.lines)[0]
        return print_json({"run": name, "log": log, "lines": lines})
    if log is None and not arguments.follow:
        print(f"Run {name} has no log yet. `tundish logs {name} --follow` waits for it.")
        return 0
    if not arguments.follow:
        _show(log, _last_lines(log, arguments.lines)[0]) if log else None
        return 0
    try:
        return _follow(run, arguments)
    except KeyboardInterrupt:
        if read_run(name).status.is_terminal():
            raise
        raise Interrupted(name) from None


def _log(run: RunFolder, stage: str | None, rank: int | None) -> Path | None:
    """The log to show; None if the run has no logs yet.

    Raises:
        RequestError: the run has logs, but not this one.
    """
    logs = {log.stem: log for log in sorted(run.logs.glob("*.log"), key=lambda log: log.stem)}
    if stage is None and rank is None:
        stages = [log for name, log in logs.items() if name not in NOT_STAGES and "-rank" not in name]
        # On several nodes there is no log of the launcher, to which rank 0 prints otherwise.
        return max(stages or logs.values(), key=lambda log: log.stat().st_mtime_ns, default=None)
    name = stage or "train"
    if rank is not None and (rank > 0 or f"{name}-rank0" in logs):
        name = f"{name}-rank{rank}"
    if name in logs or not logs:
        return logs.get(name)
    near = did_you_mean(name, logs)
    raise RequestError(f"Run {run.folder.name} has no log of {name}; it has logs of {', '.join(logs)}.{near}")


def _last_lines(log: Path, count: int, *, whole: bool = False) -> tuple[list[str], int]:
    """The last lines of a log, and the position of their end; with `whole`, without a line that is not complete yet."""
    with open(log, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
        data = file.read()
        rest = len(data) - (data.rfind(b"\n") + 1) if whole else 0
        return _lines(data[: len(data) - rest])[-count:], file.tell() - rest


def _lines(data: bytes) -> list[str]:
    """Lines as a terminal would show them: of a progress bar, its last state."""
    return [printable(line.rstrip("\r").rpartition("\r")[2]) for line in data.decode(errors="replace").splitlines()]


def _show(log: Path, lines: list[str]) -> None:
    print(f"==> {log}", file=sys.stderr)
    print("".join(f"{line}\n" for line in lines), end="", flush=True)


def _follow(run: RunFolder, arguments: argparse.Namespace) -> int:
    """Show what is written until the run ends; without `--stage`, also the logs of the stages that follow."""
    shown: Path | None = None
    position = 0
    while True:
        # Before the log: what is written before the run ends must be shown.
        status = read_run(run.folder.name).status
        ended = status.is_terminal()
        log = _log(run, arguments.stage, arguments.rank)
        if log is not None and log != shown:
            lines, position = _last_lines(log, arguments.lines, whole=not ended)
            _show(log, lines)
            shown = log
        elif log is not None:
            position = _show_written(log, position, rest=ended)
        if ended:
            return 1 if status is RunStatus.FAILED else 0
        time.sleep(POLL_SECONDS)


def _show_written(log: Path, position: int, *, rest: bool) -> int:
    """Print the lines written after `position`, with `rest` incomplete ones too; returns the position of their end."""
    with open(log, "rb") as file:
        file.seek(position if position <= file.seek(0, os.SEEK_END) else 0)
        while data := file.read(TAIL_BYTES):
            end = len(data) if rest or len(data) == TAIL_BYTES else data.rfind(b"\n") + 1
            if end:
                print("".join(f"{line}\n" for line in _lines(data[:end])), end="", flush=True)
            if end < len(data):
                return file.tell() - len(data) + end
        return file.tell()


def metrics_options(command: argparse.ArgumentParser) -> None:
    """What `tundish metrics` takes."""
    add_json(command)
    add_run(command)
    command.add_argument("--key", metavar="KEY", help="show all points of this metric, such as loss/train/total")
    command.add_argument("--plot", metavar="FILE", help="plot training and evaluation loss (.png, .svg, .pdf, .jpg)")


def metrics(arguments: argparse.Namespace) -> int:
    """`tundish metrics [--plot FILE]`."""
    file = new_file("--plot", arguments.plot, PICTURES)
    run = fm.get(selecting.named(arguments.run))
    points: Any = run.metrics(arguments.key)
    if file and points.empty:
        file = None  # an empty picture looks like a finished one
    if file:
        run.plot().savefig(file)
    if arguments.json:
        return print_json([dict(zip(points.columns, row, strict=True)) for row in points.itertuples(index=False)])
    if points.empty:
        if run.status.is_terminal():
            print(f"Run {run.name} has no metrics: it ended before its first step. `tundish get {run.name}` shows why.")
        else:
            print(f"Run {run.name} has no metrics yet. Follow it with:  tundish events {run.name} --follow")
    elif arguments.key:
        rows = [(point.step, f"{point.time:%Y-%m-%d %H:%M:%S}", f"{point.value:.6g}") for point in points.itertuples()]
        print_table(["STEP", "TIME (UTC)", "VALUE"], rows)
    else:
        rows = [
            (key, len(of), of["step"].iloc[-1], f"{of['value'].iloc[0]:.6g}", f"{of['value'].iloc[-1]:.6g}")
            for key, of in points.groupby("key")
        ]
        print_table(["METRIC", "POINTS", "LAST STEP", "FIRST", "LAST"], rows)
    if file:
        print(f"Plot: {file}")
    return 0


COMMANDS = {
    "logs": Command(
        options=logs_options,
        action=logs,
        examples=["tundish logs @last --follow", "tundish logs RUN --stage train --rank 1 --lines 200"],
    ),
    "metrics": Command(
        options=metrics_options,
        action=metrics,
        examples=["tundish metrics RUN --plot loss.png", "tundish metrics RUN --key loss/train/total --json"],
    ),
}
