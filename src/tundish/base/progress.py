"""The progress of long work: how those who do it report it, and how those who show it are asked for a bar."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

Progress = Callable[[int, int | None], None]
"""Called with how much is done and how much there is, in the same unit; None where the total is not known."""
Bars = Callable[[str], AbstractContextManager[Progress]]
"""Makes a progress bar with a title; entered, it gives what is called with the progress."""


def no_progress(done: int, total: int | None) -> None:
    """Progress that is not shown."""


def no_bar(title: str) -> AbstractContextManager[Progress]:
    """A bar that is not shown."""
    return nullcontext(no_progress)
