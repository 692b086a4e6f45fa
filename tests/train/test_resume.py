"""train/resuming.py: runs that are killed and go on, as if nothing had happened."""

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.train.conftest import weights

from tundish.base.events import read
from tundish.checkpoints.folder import list_checkpoints

pytestmark = pytest.mark.slow

Plan = Callable[..., Path]
DURATION = "3ep"
MOST_SECONDS = 0.3
"""From an attempt's checkpoint to its end; about the time between two checkpoints."""


@dataclass(frozen=True, slots=True)
class Whole:
    """What a run leaves that nobody has killed."""

    losses: dict[int, float]
    weights: dict[str, Any]
    checkpoints: list[str]


@pytest.fixture(scope="module")
def wholes() -> dict[int, Whole]:
    """Runs that nobody has killed, by their number of ranks."""
    return {}


@pytest.fixture
def whole(ranks: Any, plan: Plan, tmp_path: Path, wholes: dict[int, Whole]) -> Callable[[int], Whole]:
    """The run that nobody has killed, with so many ranks; trained once."""

    def train(world: int) -> Whole:
        if world not in wholes:
            file = plan("whole", world, training_duration=DURATION)
            trained = ranks.train(file, world, tmp_path / "whole out")
            assert trained.ok, trained.log[-3000:]
            wholes[world] = Whole(trained.losses, weights(file), _checkpoints(file))
        return wholes[world]

    return train


def _checkpoints(file: Path) -> list[str]:
    return sorted(path.name for path in (file.parent / "checkpoints").iterdir() if path.is_dir())


def _same(file: Path, whole: Whole) -> bool:
    """Whether all weights and optimizer states are the same bits."""
    found = weights(file)
    return found.keys() == whole.weights.keys() and all(found[name].equal(whole.weights[name]) for name in found)


@pytest.mark.parametrize(
    ("world", "rank", "batch", "when"),
    [(1, 0, 1, "batch"), (1, 0, 5, "saving"), (2, 1, 7, "batch"), (2, 0, 5, "saving")],
)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    ranks: Any, plan: Plan, tmp_path: Path, whole: Callable[[int], Whole], world: int, rank: int, batch: int, when: str
) -> None:
    """Batches would be trained twice or never, or the optimizer begin anew: other weights, and nobody sees it."""
    killed, expected = plan("killed", world, training_duration=DURATION), whole(world)
    first = ranks.train(killed, world, tmp_path / "first", KILL_RANK=rank, KILL_AT=batch, KILL_WHEN=when)
    assert first.codes[rank] == -signal.SIGKILL
    complete = [int(path.name.partition("-ba")[2]) for path in list_checkpoints(killed.parent / "checkpoints")]
    second = ranks.train(killed, world, tmp_path / "second")
    assert second.ok, second.log[-3000:]
    begun = min(second.losses)
    assert begun == max(complete, default=0) <= batch, "from the newest complete checkpoint"
    assert second.losses == {at: loss for at, loss in expected.losses.items() if at >= begun}
    assert _same(killed, expected)
    assert _checkpoints(killed) == expected.checkpoints


def test_a_run_survives_kills_of_all_ranks_at_any_moment(
    ranks: Any, plan: Plan, tmp_path: Path, whole: Callable[[int], Whole]
) -> None:
    """Some moment would be left at which a kill loses or repeats batches, or leaves what stops the next attempt."""
    file, expected, dice = plan("killed", 2, training_duration=DURATION), whole(2), random.Random(4)
    for attempt in range(5):
        pids = ranks.start(file, 2, tmp_path / f"{attempt} out")
        # By progress, not by the clock: machines differ too much for a kill to come after a given time.
        _wait_for_checkpoints(file, attempt, pids[0])
        time.sleep(dice.uniform(0, MOST_SECONDS))
        for pid in pids:
            with suppress(ProcessLookupError):  # gone with the other, or done
                os.kill(pid, signal.SIGKILL)
        codes = ranks.wait(tmp_path / f"{attempt} out").codes
        assert set(codes) <= {0, -signal.SIGKILL}, codes
    assert any("resumes from batch" in event.message for event in read(file.parent / "events.jsonl"))
    last = ranks.train(file, 2, tmp_path / "last")
    assert last.ok, last.log[-3000:]
    assert last.losses == {at: loss for at, loss in expected.losses.items() if at in last.losses}
    assert _same(file, expected) and _checkpoints(file) == expected.checkpoints


def _wait_for_checkpoints(file: Path, count: int, pid: int) -> None:
    """Until there are so many complete ones, or the rank is gone: it may have had nothing left to train."""
    end = time.monotonic() + 300
    while time.monotonic() < end and Path(f"/proc/{pid}").exists():
        if len(list_checkpoints(file.parent / "checkpoints")) >= count:
            return
        time.sleep(0.01)
    assert time.monotonic() < end, "training has not come that far"
