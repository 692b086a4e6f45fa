"""A run's events as they come: lines and a bar on a terminal, lines in a log, a table in a notebook."""

import html
import importlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn

from tundish.base import events
from tundish.runs.reading import find_run, read_events, read_run
from tundish.runs.records import RunStatus, TrainingRun

POLL_SECONDS = 0.5
PLAIN_SECONDS = 15.0
"""Without a terminal: seconds between two lines of training progress."""
DOING = {
    "CREATED": "starting",
    "STARTED": "preparing the data",
    "DATA_VALIDATED": "loading the model",
    "MODEL_INITIALIZED": "loading the model",
    "TRAIN_STARTED": "training",
    "TRAIN_UPDATED": "training",
    "CHECKPOINT_SAVED": "training",
    "TRAIN_FINISHED": "exporting and registering",
}
STYLES = {"COMPLETED": "bold green", "FAILED": "bold red", "CANCELED": "bold yellow"}


@contextmanager
def bar(title: str) -> Iterator[Callable[[int, int | None], None]]:
    """A bar on standard error, where people see it, that is told how much is done, and of how much."""
    if in_notebook():
        with _notebook_bar(title) as tell:
            yield tell
        return
    console = Console(stderr=True)
    columns = (
        SpinnerColumn(_spinner(console)),
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as shown:
        task = shown.add_task(title, total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)


def _spinner(console: Console) -> str:
    """One of the spinners of rich, which draws bars for the terminal's encoding, but not these."""
    return "dots" if console.encoding.startswith("utf") else "line"


@contextmanager
def _notebook_bar(title: str) -> Iterator[Callable[[int, int | None], None]]:
    """A line below the cell, gone when the work is done; rich would ask for ipywidgets, which few notebooks have."""
    from IPython.display import HTML, display  # pyright: ignore[reportMissingImports]  there, as a notebook runs

    line: Any = display(HTML(f"{html.escape(title)} …"), display_id=True)
    latest = time.monotonic()

    def tell(done: int, total: int | None) -> None:
        nonlocal latest
        if time.monotonic() - latest > POLL_SECONDS:
            latest = time.monotonic()
            share = f'<progress value="{done}" max="{total}"></progress> {done / total:.0%}' if total else ""
            line.update(HTML(f"{html.escape(title)} … {share}"))

    try:
        yield tell
    finally:
        line.update(HTML(""))


def watch(name: str) -> TrainingRun:
    """Show the run's events until it has ended, and return it. The caller may stop watching; the run goes on."""
    if in_notebook():
        return _watch_notebook(name)
    return _watch_live(name) if sys.stdout.isatty() else _watch_plain(name)


def in_notebook() -> bool:
    """Whether this process is a Jupyter kernel."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return shell is not None and "IPKernelApp" in shell.config


def _watch_notebook(name: str) -> TrainingRun:
    from IPython.display import (  # pyright: ignore[reportMissingImports]  there, as a notebook runs
        clear_output,
        display,
    )

    latest = None
    while True:
        run, found = read_run(name), read_events(find_run(name))
        said = _doing(run, found[-1].message)
        if (found[-1], said) != latest:
            latest = found[-1], said
            clear_output(wait=True)
            display(found)
            if said:
                print(said)
        if run.status.is_terminal():
            clear_output()
            return run
        time.sleep(POLL_SECONDS)


def _watch_plain(name: str) -> TrainingRun:
    shown, last_progress, waiting = 0, 0.0, ""
    while True:
        run = read_run(name)
        found = find_run(name).read_events()
        lasting = [event for event in found if event.type != "TRAIN_UPDATED"]
        for event in lasting[shown:]:
            print(_line(event), flush=True)
        shown = len(lasting)
        if found and found[-1].type == "TRAIN_UPDATED" and time.monotonic() - last_progress > PLAIN_SECONDS:
            last_progress = time.monotonic()
            print(_line(found[-1]), flush=True)
        doing = _doing(run, found[-1].message)
        if doing and time.monotonic() - last_progress > PLAIN_SECONDS:
            last_progress = time.monotonic()
            print(f"{datetime.now():%H:%M:%S}  {run.status!s:<17}  {doing}", flush=True)
        said = _unsaid(run, found)
        if said and said != waiting:
            print(f"{datetime.now():%H:%M:%S}  {said}", flush=True)
        waiting = said
        if run.status.is_terminal():
            return run
        time.sleep(POLL_SECONDS)


def _doing(run: TrainingRun, message: str) -> str:
    """How far a stage is that writes no events: what `details` has beyond the last event's message."""
    active = run.status in (RunStatus.STARTING, RunStatus.RUNNING)
    return str(run.details) if active and run.details != message.partition("\n")[0] else ""


def _unsaid(run: TrainingRun, found: list[events.Event]) -> str:
    """What no event tells: what the run waits for, or that its supervisor has died."""
    ended = run.status.is_terminal() and not (found and found[-1].type in events.TERMINAL_TYPES)
    if not ended and run.status is not RunStatus.QUEUED:
        return ""
    return f"{run.status!s:<17}  {run.details}"


def _watch_live(name: str) -> TrainingRun:
    console = Console(highlight=False)
    bar = Progress(
        SpinnerColumn(_spinner(console)),
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[facts]}", markup=False),
        console=console,
    )
    bar.add_task("starting", total=None, facts="")
    shown = 0
    with Live(bar, console=console, refresh_per_second=8, transient=True):
        while True:
            run = read_run(name)
            found = find_run(name).read_events()
            lasting = [event for event in found if event.type != "TRAIN_UPDATED"]
            for event in lasting[shown:]:
                console.print(_line(event), style=STYLES.get(event.type, ""), markup=False, soft_wrap=True)
            shown = len(lasting)
            said = _unsaid(run, found)
            _update(bar, found, str(run.details) if said else "", _doing(run, found[-1].message))
            if run.status.is_terminal():
                if said:
                    said = f"{datetime.now():%H:%M:%S}  {said}"
                    console.print(said, style=STYLES.get(str(run.status), ""), markup=False, soft_wrap=True)
                return run
            time.sleep(POLL_SECONDS)


def _update(bar: Progress, found: list[events.Event], waiting: str, stage: str) -> None:
    latest = next((event for event in reversed(found) if event.type == "TRAIN_UPDATED"), None)
    doing = DOING.get(found[-1].type, "working") if found else "starting"
    share = latest.facts.get("share") if latest and doing == "training" else None
    (task,) = bar.tasks
    # Without a total the bar pulses; `update` takes None for "as before".
    task.total = None if share is None else 1.0
    facts = waiting or stage or (latest.message if latest and share else "")
    bar.update(task.id, description="waiting" if waiting else doing, completed=share or 0, facts=facts)


def _line(event: events.Event) -> str:
    return f"{event.time.astimezone():%H:%M:%S}  {event.type:<17}  {event.message}"


def _import_tqdm() -> None:
    """Import what Hugging Face's libraries draw bars with: in a notebook without ipywidgets, that would warn."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("tqdm.auto")


if in_notebook():
    _import_tqdm()
