"""Which rank of a training hangs: one that does makes all others wait for it, and none of them fails."""

import time
from datetime import datetime, timedelta
from pathlib import Path

from tundish.base.run_folder import Beat

PATIENCE_STEPS = 5
"""A rank hangs if it makes no progress for as long as so many of the usual steps …"""
LEAST_SECONDS = 20.0
"""… but at least so long."""
UNKNOWN_SECONDS = 600.0
"""Instead, for a first step, and for checkpoints and answers after a step, whose usual duration is not known."""
NAMED_RANKS = 4
"""In one sentence."""
ORDER = ("starting", "reading", "training", "finishing")
"""What a rank does with a batch, in order."""


class Watch:
    """Looks at the beats of a run's ranks.

    Args:
        folder: of the beats.
    """

    # All times are by this process's clock: those of several hosts differ.

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._heard: dict[int, tuple[int, float]] = {}
        self._moved: dict[int, tuple[int, float]] = {}
        self._reported: set[int] = set()

    def news(self) -> str | None:
        """A sentence about ranks that began to hang since the last look; None = nothing new."""
        stuck = self.stuck(time.monotonic())
        new = set(stuck) - self._reported
        self._reported = set(stuck)
        if not new:
            return None
        ranks = ", ".join(
            f"rank {rank} {what} since {datetime.now() - timedelta(seconds=seconds):%H:%M:%S}"
            for rank, (what, seconds) in sorted(stuck.items())[:NAMED_RANKS]
        )
        ranks += f" and {len(stuck) - NAMED_RANKS} more" if len(stuck) > NAMED_RANKS else ""
        return f"Training hangs: {ranks}. It continues when the rank does; otherwise cancel and resume the run."

    def stuck(self, now: float) -> dict[int, tuple[str, float]]:
        """The ranks that training waits for: what each does, and for how many seconds."""
        beats = Beat.read_all(self.folder)
        for seen, values in ((self._heard, "count"), (self._moved, "moves")):
            for rank in set(seen) - set(beats):
                del seen[rank]
            for rank, beat in beats.items():
                if rank not in seen or seen[rank][0] != getattr(beat, values):
                    seen[rank] = getattr(beat, values), now
        usual = max((beat.usual_s for beat in beats.values()), default=0.0)
        patience = max(LEAST_SECONDS, PATIENCE_STEPS * usual)
        silent = {rank: now - at for rank, (_, at) in self._heard.items() if now - at > patience}
        if silent:
            return {rank: (f"({beats[rank].host}) shows no sign of life", seconds) for rank, seconds in silent.items()}
        if not usual or any(beat.doing in ("starting", "finishing") for beat in beats.values()):
            patience = max(patience, UNKNOWN_SECONDS)
        if any(now - at <= patience for _, at in self._moved.values()):
            return {}
        # All ranks are alive, and wait for those that are behind.
        places = {rank: (beat.batch, ORDER.index(beat.doing)) for rank, beat in beats.items()}
        return {
            rank: (f"({beats[rank].host}) is {beats[rank].doing} batch {place[0] + 1}", now - self._moved[rank][1])
            for rank, place in places.items()
            if place == min(places.values())
        }
