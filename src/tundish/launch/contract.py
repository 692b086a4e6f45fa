"""What a launcher knows of the process that takes a run through its stages."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Life:
    """Whether a run goes on, as its launcher sees it."""

    alive: bool
    """It runs, or waits to be started."""
    waiting: str = ""
    """What it waits for, in a sentence; empty once it has started."""
    unknown: str = ""
    """Why nothing can be told now."""
    end: str = ""
    """How it has ended without its own word, where the launcher knows that."""
    canceled: bool = False
    """It was ended on purpose, by the launcher's own means."""
