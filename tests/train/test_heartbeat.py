"""train/heartbeat.py: a real rank that is stopped is the one that is named."""

import os
import signal
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tundish.base.run_folder import Beat, RunFolder
from tundish.supervise.stragglers import Watch

pytestmark = pytest.mark.slow

Plan = Callable[..., Path]


def _until(condition: Callable[[], bool]) -> None:
    """However long the machine takes."""
    end = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_disk_that_is_away_for_a_moment_is_no_standstill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rank would be called silent from then on, or after its end, when its last beat is written late."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tundish.train import heartbeat
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.01)
    rank = heartbeat.Heartbeat(tmp_path / "beats")
    state: Any = SimpleNamespace(timestamp=SimpleNamespace(batch=0))
    logger: Any = None
    rank.fit_start(state, logger)
    _until(lambda: bool(Beat.read_all(rank.file.parent)))
    rank.file.parent.rename(tmp_path / "away")
    count = Beat.read_all(tmp_path / "away")[0].count
    rank.file.parent.mkdir()
    _until(lambda: any(beat.count > count for beat in Beat.read_all(rank.file.parent).values()))
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 60.0)
    rank.close(state, logger)
    assert rank._thread is not None and not rank._thread.is_alive() and not rank.file.exists()


def test_a_stopped_rank_is_named_and_forgotten_when_it_goes_on(ranks: Any, plan: Plan, tmp_path: Path) -> None:
    """The rank that waits would be named, or the one that is stopped still be when it goes on."""
    file = plan("run", 2, training_duration="100000ba", overrides={"save_interval": "100000ba"})
    pids = ranks.start(file, 2, tmp_path / "out")
    folder = RunFolder(file.parent).beats

    def batch(rank: int) -> int:
        return beat.batch if (beat := Beat.read_all(folder).get(rank)) else -1

    def beats(rank: int) -> int:
        return Beat.read_all(folder)[rank].count

    watch = Watch(folder)
    try:
        _until(lambda: min(batch(0), batch(1)) > 2)
        os.kill(pids[1], signal.SIGSTOP)
        assert watch.stuck(0) == {}
        count = beats(0)
        _until(lambda: beats(0) > count)
        # A thousand seconds later by the watch's clock: the other one beats, and waits.
        assert list(watch.stuck(1000)) == [1]
        os.kill(pids[1], signal.SIGCONT)
        reached = batch(0)
        _until(lambda: min(batch(0), batch(1)) > reached)
        assert watch.stuck(2000) == {}
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    assert set(ranks.wait(tmp_path / "out").codes) == {-signal.SIGKILL}
