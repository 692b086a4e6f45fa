"""train/stopping.py: ranks that are asked to end save a checkpoint, and go on from it as if nothing had happened."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.train.conftest import weights

from tundish.base.run_folder import RunFolder
from tundish.checkpoints.folder import list_checkpoints
from tundish.launch.command import STOPPED

pytestmark = pytest.mark.slow

Plan = Callable[..., Path]


@pytest.mark.parametrize(
    ("world", "rank", "batch", "by"), [(1, 0, 2, "SIGTERM"), (2, 1, 5, "SIGUSR1"), (2, 0, 4, "file")]
)
def test_what_is_asked_to_end_saves_and_goes_on_later(
    ranks: Any, plan: Plan, tmp_path: Path, world: int, rank: int, batch: int, by: str
) -> None:
    """A preempted run would lose what it has trained since its last checkpoint, or end differently."""
    whole, stopped = plan("whole", world, training_duration="7ba"), plan("stopped", world, training_duration="7ba")
    assert ranks.train(whole, world, tmp_path / "whole out").ok
    first = ranks.train(stopped, world, tmp_path / "first", ASK_RANK=rank, ASK_AT=batch, ASK_BY=by)
    assert first.codes == [STOPPED] * world, first.log[-3000:]
    newest = list_checkpoints(stopped.parent / "checkpoints")[-1].name
    assert re.fullmatch(rf"ep\d+-ba{batch}", newest), "at the batch after which it was asked, by all ranks"
    assert not (stopped.parent / "results" / "train.json").exists(), "training is not done"
    RunFolder(stopped.parent).stop_request.unlink(missing_ok=True)
    second = ranks.train(stopped, world, tmp_path / "second")
    assert second.ok and min(second.losses) == batch, second.log[-3000:]
    ours, expected = weights(stopped), weights(whole)
    assert ours.keys() == expected.keys() and all(ours[name].equal(expected[name]) for name in ours)


def test_signals_that_come_to_all_processes_do_not_end_those_that_read_ahead(
    ranks: Any, plan: Plan, tmp_path: Path
) -> None:
    """A cluster sends SIGTERM to every process of a job: a rank whose loader has died fails before it has saved."""
    file = plan("workers", training_duration="7ba", overrides={"train_loader.num_workers": 2})
    first = ranks.train(file, 1, tmp_path / "first", ASK_RANK=0, ASK_AT=3, ASK_BY="SIGTERM", ASK_CHILDREN=1)
    assert first.codes == [STOPPED], first.log[-3000:]
    assert list_checkpoints(file.parent / "checkpoints")[-1].name.endswith("-ba3")


def test_what_has_nothing_left_to_train_ends_as_usual(ranks: Any, plan: Plan, tmp_path: Path) -> None:
    """A run that is asked in its last batch would be put back into a queue for nothing."""
    file = plan("last", training_duration="6ba")
    trained = ranks.train(file, 1, tmp_path / "out", ASK_RANK=0, ASK_AT=6, ASK_BY="SIGTERM")
    assert trained.ok, trained.log[-3000:]
    assert (file.parent / "results" / "train.json").exists()


def test_what_waits_for_a_crashed_rank_ends_at_once(ranks: Any, plan: Plan, tmp_path: Path) -> None:
    """The launcher asks the others to end when one has crashed: waiting for the end of a batch that never comes would
    hold the devices for half a minute."""
    file = plan("crash", 2)
    trained = ranks.train(file, 2, tmp_path / "out", KILL_RANK=1, KILL_AT=3, KILL_WHEN="batch")
    assert trained.codes[1] == -9 and trained.codes[0] in (1, 143), trained.codes
