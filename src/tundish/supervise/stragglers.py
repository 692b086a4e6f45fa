"""Which rank of a training stands still: one that hangs makes all others wait for it, and none of them fails."""

import time
from datetime import datetime, timedelta
from pathlib import Path

from tundish.base.run_folder import Beat

TIMES = 5
"""As long as so many of the usual steps, until a rank is said to stand still …"""
LEAST_SECONDS = 20.0
"""… but no sooner."""
UNKNOWN_SECONDS = 600.0
"""Nobody knows how long the first step takes; nor the checkpoints and answers after a step."""
SHOWN = 4
"""Ranks in one sentence."""
ORDER = ("starting", "reading", "training", "finishing")


class Watch:
    """Looks at the beats of a run's ranks, by its own clock: those of several hosts differ.

    Args:
        folder: of the beats.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._heard: dict[int, tuple[int, float]] = {}
        self._moved: dict[int, tuple[int, float]] = {}
        self._told: set[int] = set()

    def news(self) -> str | None:
        """What is said of ranks that have come to a standstill since the last look; None = nothing new."""
        now = time.monotonic()
        stuck = self.stuck(now)
        new = set(stuck) - self._told
        self._told = set(stuck)
        if not new:
            return None
        said = ", ".join(
            f"rank {rank} {what} since {datetime.now() - timedelta(seconds=seconds):%H:%M:%S}"
            for rank, (what, seconds) in sorted(stuck.items())[:SHOWN]
        )
        said += f" and {len(stuck) - SHOWN} more" if len(stuck) > SHOWN else ""
        return f"Training stands still: {said}. It goes on when the rank does; else cancel and resume the run."

    def stuck(self, now: float) -> dict[int, tuple[str, float]]:
        """By rank, what it does and for how many seconds, where training stands still because of it."""
        beats = Beat.read_all(self.folder)
        for seen, values in ((self._heard, "count"), (self._moved, "moves")):
            for rank in set(seen) - set(beats):
                del seen[rank]
            for rank, beat in beats.items():
                if rank not in seen or seen[rank][0] != getattr(beat, values):
                    seen[rank] = getattr(beat, values), now
        usual = max((beat.usual_s for beat in beats.values()), default=0.0)
        patience = max(LEAST_SECONDS, TIMES * usual)
        silent = {rank: now - at for rank, (_, at) in self._heard.items() if now - at > patience}
        if silent:
            return {rank: (f"({beats[rank].host}) is not heard from", seconds) for rank, seconds in silent.items()}
        if not usual or any(beat.doing in ("starting", "finishing") for beat in beats.values()):
            patience = max(patience, UNKNOWN_SECONDS)
        if any(now - at <= patience for _, at in self._moved.values()):
            return {}
        # All of them live, and wait for those that are behind.
        places = {rank: (beat.batch, ORDER.index(beat.doing)) for rank, beat in beats.items()}
        return {
            rank: (f"({beats[rank].host}) is {beats[rank].doing} batch {place[0] + 1}", now - self._moved[rank][1])
            for rank, place in places.items()
            if place == min(places.values())
        }
