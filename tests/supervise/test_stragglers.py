"""supervise/stragglers.py: a rank that hangs is named, and no rank that does not."""

import os
import subprocess
import sys
import threading
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from tundish import foundation_model as fm
from tundish.base import events
from tundish.base.run_folder import Beat, RunFolder
from tundish.supervise import stage_process, stragglers
from tundish.supervise.stragglers import UNKNOWN_SECONDS, Watch

FIRST = Beat(host="node-a", count=0, moves=0, batch=6, doing="training", usual_s=2.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of the beats of a run."""
    made = tmp_path / "beats"
    made.mkdir()
    return made


def _beat(folder: Path, **ranks: dict[str, Any]) -> None:
    """Each rank's next beat; `moves` are counted on by those that come forward."""
    for name, changes in ranks.items():
        path = Beat.file(folder, int(name.removeprefix("r")))
        old = Beat.read_all(folder).get(int(name.removeprefix("r")), FIRST)
        replace(old, count=old.count + 1, **changes).write(path)


def test_a_rank_whose_process_is_stopped_is_named(folder: Path) -> None:
    """All others wait for it, alive and well, until the collectives give up after half an hour."""
    watch = Watch(folder)
    _beat(folder, r0={}, r1={"host": "node-b"})
    assert watch.stuck(0) == {}
    _beat(folder, r0={})
    assert watch.stuck(19) == {}
    assert watch.stuck(21) == {1: ("(node-b) shows no sign of life", 21)}
    _beat(folder, r0={}, r1={"moves": 1})
    assert watch.stuck(22) == {}


def test_a_rank_that_hangs_in_a_read_is_named_although_it_lives(folder: Path) -> None:
    """A dead disk stops a rank's work and not its threads: those that wait for it would look as guilty."""
    watch = Watch(folder)
    for now in range(0, 22, 2):
        _beat(folder, r0={"moves": 9}, r1={"moves": 8, "doing": "reading", "host": "node-b"}, r2={"moves": 9})
        assert watch.stuck(now) == {}
    _beat(folder, r0={}, r1={}, r2={})
    assert watch.stuck(24) == {1: ("(node-b) is reading batch 7", 24)}


@pytest.mark.parametrize(
    ("doing", "usual", "most"),
    [("training", 30.0, 150), ("finishing", 1.0, UNKNOWN_SECONDS), ("training", 0.0, UNKNOWN_SECONDS)],
)
def test_what_usually_takes_long_is_waited_for(folder: Path, doing: str, usual: float, most: float) -> None:
    """A large model's step, its first one, or the writing of its checkpoint, would be called a standstill each time."""
    watch = Watch(folder)
    _beat(folder, r0={"doing": doing, "usual_s": usual}, r1={"doing": doing, "usual_s": usual})
    assert watch.stuck(0) == {}
    for now in (most - 1, most + 1):
        _beat(folder, r0={}, r1={})
        assert bool(watch.stuck(now)) is (now > most)


def test_a_rank_that_ends_does_not_stand_still(folder: Path) -> None:
    """The last rank at work would be told to wait for the others."""
    watch = Watch(folder)
    _beat(folder, r0={}, r1={})
    assert watch.stuck(0) == {}
    Beat.file(folder, 1).unlink()
    Beat.file(folder, 2).write_text("{half")
    _beat(folder, r0={"moves": 1})
    assert watch.stuck(100) == {}


def test_the_supervisor_writes_one_event_and_get_tells_the_last_sign_of_life(
    make_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody would know for half an hour that a run stands still, nor which host to look at."""
    monkeypatch.setattr(stage_process, "WATCH_SECONDS", 0.01)
    monkeypatch.setattr(stragglers, "LEAST_SECONDS", 0.0)
    paths: RunFolder = make_run("chat-1", ("STARTED", "…"))
    events.append(paths.events, "TRAIN_UPDATED", "[batch=7/9]", share=0.7, eta_s=5.0, loss=1.5)
    paths.beats.mkdir(parents=True)
    stopped = Beat.file(paths.beats, 3)
    replace(FIRST, usual_s=0.0).write(stopped)
    os.utime(stopped, (1_790_000_000, 1_790_000_000))
    codes: list[int] = []
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        thread = threading.Thread(target=lambda: codes.append(stage_process._watch(process, paths)))
        thread.start()
        try:
            while "Training hangs" not in (latest := events.read(paths.events)[-1]).message:
                thread.join(0.01)
                assert thread.is_alive()
            run = fm.get("chat-1")
        finally:
            process.communicate(b"\n")
            thread.join()
    assert codes == [0] and "rank 3 (node-a) shows no sign of life since " in latest.message
    assert latest.facts == {"share": 0.7, "loss": 1.5} and latest.type == "TRAIN_UPDATED"
    assert paths.events.read_text().count("Training hangs") == 1
    assert run.last_seen == datetime.fromtimestamp(1_790_000_000, UTC)
