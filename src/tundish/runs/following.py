"""Following a run: its events as lines and a bar on a terminal, as lines in a log, as a table in a notebook."""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from tundish.base.events import TERMINAL_TYPES, Event
from tundish.base.progress_bar import in_notebook, spinner
from tundish.runs.reading import find_run, read_events, read_run
from tundish.runs.records import RunRecord, RunStatus

POLL_SECONDS = 0.5
PLAIN_SECONDS = 15.0
"""Without a terminal: seconds between two lines of training progress."""
ACTIVITIES = {
    "CREATED": "starting",
    "STARTED": "preparing the data",
    "DATA_VALIDATED": "loading the model",
    "MODEL_INITIALIZED": "loading the model",
    "TRAIN_STARTED": "training",
    "TRAIN_UPDATED": "training",
    "CHECKPOINT_SAVED": "training",
    "TRAIN_FINISHED": "exporting and registering",
}
"""Latest event → what the run is doing since then."""
STYLES = {"COMPLETED": "bold green", "FAILED": "bold red", "CANCELED": "bold yellow"}


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A run at one moment."""

    run: RunRecord
    events: list[Event]
    new_events: list[Event]
    """Those since the snapshot before, without TRAIN_UPDATED."""

    @property
    def stage_progress(self) -> str:
        """How far a stage is that writes no events meanwhile: then `details` is not the latest event's message."""
        active = self.run.status in (RunStatus.STARTING, RunStatus.RUNNING)
        silent = self.run.details != self.events[-1].message.partition("\n")[0]
        return str(self.run.details) if active and silent else ""

    @property
    def state_without_event(self) -> str:
        """What no event records: what the run waits for, or that its supervisor died."""
        died = self.run.status.is_terminal() and self.events[-1].type not in TERMINAL_TYPES
        waits = self.run.status is RunStatus.QUEUED
        return f"{self.run.status!s:<17}  {self.run.details}" if died or waits else ""


def follow(name: str) -> RunRecord:
    """Show a run's events until it ends, and return it. Interrupting this does not affect the run."""
    if in_notebook():
        _follow_in_notebook(name)
    elif sys.stdout.isatty():
        _follow_on_terminal(name)
    else:
        _follow_in_log(name)
    return read_run(name)


def _snapshots(name: str) -> Iterator[Snapshot]:
    """The run every half second; the last one is of its end."""
    shown = 0
    while True:
        # The record first: events written in between belong to what is shown next, and none is lost at the end.
        run, all_events = read_run(name), find_run(name).read_events()
        lasting = [event for event in all_events if event.type != "TRAIN_UPDATED"]
        yield Snapshot(run, all_events, lasting[shown:])
        shown = len(lasting)
        if run.status.is_terminal():
            return
        time.sleep(POLL_SECONDS)


def _follow_in_notebook(name: str) -> None:
    from IPython.display import (  # pyright: ignore[reportMissingImports]  installed in every notebook
        clear_output,
        display,
    )

    shown = None
    for now in _snapshots(name):
        if (now.events[-1], now.stage_progress) != shown:
            shown = now.events[-1], now.stage_progress
            clear_output(wait=True)
            display(read_events(find_run(name)))
            if now.stage_progress:
                print(now.stage_progress)
    clear_output()


def _follow_in_log(name: str) -> None:
    last_progress, state = 0.0, ""
    for now in _snapshots(name):
        for event in now.new_events:
            print(_line(event), flush=True)
        if time.monotonic() - last_progress > PLAIN_SECONDS:
            if now.events[-1].type == "TRAIN_UPDATED":
                last_progress = time.monotonic()
                print(_line(now.events[-1]), flush=True)
            elif now.stage_progress:
                last_progress = time.monotonic()
                print(f"{datetime.now():%H:%M:%S}  {now.run.status!s:<17}  {now.stage_progress}", flush=True)
        if now.state_without_event not in ("", state):
            print(f"{datetime.now():%H:%M:%S}  {now.state_without_event}", flush=True)
        state = now.state_without_event


def _follow_on_terminal(name: str) -> None:
    console = Console(highlight=False)
    bar = Progress(
        spinner(console),
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[facts]}", markup=False),
        console=console,
    )
    bar.add_task("starting", total=None, facts="")

    def show(line: str, style_of: str) -> None:
        console.print(line, style=STYLES.get(style_of, ""), markup=False, soft_wrap=True)

    with Live(bar, console=console, refresh_per_second=8, transient=True):
        for now in _snapshots(name):
            for event in now.new_events:
                show(_line(event), event.type)
            if now.run.status.is_terminal() and now.state_without_event:
                show(f"{datetime.now():%H:%M:%S}  {now.state_without_event}", str(now.run.status))
            _update(bar, now)


def _update(bar: Progress, now: Snapshot) -> None:
    latest = next((event for event in reversed(now.events) if event.type == "TRAIN_UPDATED"), None)
    activity = ACTIVITIES.get(now.events[-1].type, "working")
    share = latest.facts.get("share") if latest and activity == "training" else None
    waiting = str(now.run.details) if now.state_without_event else ""
    (task,) = bar.tasks
    # Without a total the bar pulses; `update` takes None for "as before".
    task.total = None if share is None else 1.0
    facts = waiting or now.stage_progress or (latest.message if latest and share else "")
    bar.update(task.id, description="waiting" if waiting else activity, completed=share or 0, facts=facts)


def _line(event: Event) -> str:
    return f"{event.time.astimezone():%H:%M:%S}  {event.type:<17}  {event.message}"
