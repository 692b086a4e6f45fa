"""A progress bar on standard error, or below a notebook's cell."""

import html
import importlib
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

from tundish.base.progress import Progress

REDRAW_SECONDS = 0.5
"""Between two states of a notebook's bar: each one is a message to the browser."""


@contextmanager
def progress_bar(title: str) -> Iterator[Progress]:
    """Show a bar while the context lasts, on a terminal or in a notebook; elsewhere nothing."""
    if in_notebook():
        with _notebook_bar(title) as update:
            yield update
        return
    console = Console(stderr=True)
    columns = (spinner(console), TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    hidden = not console.is_terminal
    with RichProgress(*columns, TimeElapsedColumn(), console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def spinner(console: Console) -> SpinnerColumn:
    """A spinner in characters that the terminal's encoding has; rich checks that for bars, but not for spinners."""
    return SpinnerColumn("dots" if console.encoding.startswith("utf") else "line")


@contextmanager
def _notebook_bar(title: str) -> Iterator[Progress]:
    # rich and tqdm need ipywidgets here, which few notebooks have; an HTML progress element needs nothing.
    from IPython.display import HTML, display  # pyright: ignore[reportMissingImports]  installed in every notebook

    line: Any = display(HTML(f"{html.escape(title)} …"), display_id=True)
    redrawn = time.monotonic()

    def update(done: int, total: int | None) -> None:
        nonlocal redrawn
        if time.monotonic() - redrawn > REDRAW_SECONDS:
            redrawn = time.monotonic()
            share = f'<progress value="{done}" max="{total}"></progress> {done / total:.0%}' if total else ""
            line.update(HTML(f"{html.escape(title)} … {share}"))

    try:
        yield update
    finally:
        line.update(HTML(""))


def in_notebook() -> bool:
    """Whether this process is a Jupyter kernel."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return shell is not None and "IPKernelApp" in shell.config


if in_notebook():
    # Hugging Face's libraries import it; without ipywidgets it warns, once, in the user's cell.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("tqdm.auto")
