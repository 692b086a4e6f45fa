"""supervise/stages.py: how a stage shows its progress. What it does is tested with the runs that it is a part of."""

from collections.abc import Callable

from tundish.base.run_folder import RunFolder
from tundish.supervise import stages


def test_a_stage_says_how_far_it_is_now_and_then(make_run: Callable[..., RunFolder]) -> None:
    """An export of an hour would say nothing; or every megabyte of it write a file."""
    paths = make_run("chat-1")
    paths.scratch.mkdir(parents=True)
    report = stages._progress(paths, "Exporting the model: {share:.0%} of {size}.")
    report(4_000_000_000, 16_100_000_000)
    assert paths.read_doing() == "Exporting the model: 25% of 16.1 GB."
    written = paths.doing.stat().st_mtime_ns
    report(8_000_000_000, 16_100_000_000)
    report(8_000_000_000, None)
    assert paths.doing.stat().st_mtime_ns == written
