"""runs/following.py: one who watches sees each event once, as it comes, and is told when the run has ended."""

import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime, timedelta
from typing import Any

import pytest

from tundish import foundation_model as fm
from tundish.base import events
from tundish.base.processes import ProcessId
from tundish.base.run_folder import RunFolder
from tundish.launch import devices
from tundish.plan.compute import Compute
from tundish.runs.following import follow
from tundish.runs.records import RunStatus

MakeRun = Callable[..., RunFolder]


def test_watching_an_ended_run_shows_all_of_it_and_returns_it(
    make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    """Watching would hang on an ended run, repeat its events or leave some out."""
    make_run("ift-1", ("CREATED", "waits"), ("TRAIN_UPDATED", "half"), ("FAILED", "[broken] 1/2"))
    assert follow("ift-1").status is RunStatus.FAILED
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["CREATED", "FAILED"]
    assert lines[-1].endswith("FAILED             [broken] 1/2")


def test_following_returns_the_events(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    """`get_events(run, follow=True)` in a notebook would show events but not return them."""
    make_run("ift-1", ("CREATED", "waits"), ("COMPLETED", "done"))
    assert [event.message for event in fm.get_events("ift-1", follow=True)] == ["waits", "done"]
    assert capsys.readouterr().out.count("\n") == 2


def test_events_are_shown_as_they_come(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    """Events that are written while one watches would be missing, or shown twice."""
    paths = make_run("ift-1", ("STARTED", "zero"))
    paths.supervisor.write_text(json.dumps({"launcher": "local", **asdict(ProcessId.of(os.getpid()))}))

    def go_on() -> None:
        for type, message in [("DATA_VALIDATED", "one"), ("TRAIN_STARTED", "two"), ("COMPLETED", "three")]:
            time.sleep(0.3)
            events.append(paths.events, type, message)

    thread = threading.Thread(target=go_on)
    thread.start()
    assert follow("ift-1").status is RunStatus.COMPLETED
    thread.join()
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()] == ["zero", "one", "two", "three"]


def test_a_wait_in_line_is_told_once(
    make_run: MakeRun, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A log would get a line a second for as long as the run waits for its devices."""
    paths = make_run("ift-1", ("CREATED", "waits"))
    owner = ProcessId.of(os.getpid())
    for name in ("holds", "ift-1"):
        devices.enter(name, Compute.parse({"device": "cpu"}), owner)
    devices.wait_for_devices("holds")
    paths.supervisor.write_text(json.dumps({"launcher": "local", **asdict(owner)}))
    clock, polls = datetime(2026, 11, 25), iter(range(4))

    def sleep(_: float) -> None:
        if next(polls, None) is None:
            events.append(paths.events, "FAILED", "over")

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            nonlocal clock
            clock += timedelta(seconds=1)
            return clock if tz is None else datetime.now(tz)

    monkeypatch.setattr("tundish.runs.following.time.sleep", sleep)
    monkeypatch.setattr("tundish.runs.following.datetime", Clock)
    follow("ift-1")
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["CREATED", "QUEUED", "FAILED"]
