"""train/resuming.py: runs that are killed and go on, as if nothing had happened."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.train.conftest import Trained, weights

Plan = Callable[..., Path]


def _checkpoints(file: Path) -> list[str]:
    return sorted(path.name for path in (file.parent / "checkpoints").iterdir() if path.is_dir())


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether all weights and optimizer states are the same bits."""
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


@pytest.mark.parametrize(
    ("world", "rank", "batch", "when"),
    [(1, 0, 1, "batch"), (1, 0, 5, "saving"), (1, 0, 7, "batch"), (2, 1, 7, "batch"), (2, 0, 5, "saving")],
)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    ranks: Any, plan: Plan, tmp_path: Path, world: int, rank: int, batch: int, when: str
) -> None:
    """Batches would be trained twice or never, or the optimizer begin anew: other weights, and nobody sees it."""
    whole, killed = (plan(name, world, training_duration="3ep") for name in ("whole", "killed"))
    uninterrupted: Trained = ranks.train(whole, world, tmp_path / "whole")
    assert uninterrupted.ok, uninterrupted.log[-3000:]
    first = ranks.train(killed, world, tmp_path / "first", KILL_RANK=rank, KILL_AT=batch, KILL_WHEN=when)
    assert first.codes[rank] == -signal.SIGKILL
    second = ranks.train(killed, world, tmp_path / "second")
    assert second.ok, second.log[-3000:]
    begun = min(second.losses)
    assert begun == batch // 3 * 3, "from the newest complete checkpoint"
    assert second.losses == {at: loss for at, loss in uninterrupted.losses.items() if at >= begun}
    assert _same(weights(killed), weights(whole))
    assert _checkpoints(killed) == _checkpoints(whole)
