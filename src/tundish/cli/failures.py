"""Errors as messages and exit codes."""

import contextlib
import json
import os
import re
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass

from tundish.cli import streams
from tundish.cli.parsing import UsageError

TRACEBACK = "TUNDISH_TRACEBACK"
"""Environment variable: if set, the traceback is shown too."""


@dataclass(frozen=True, slots=True)
class _Failure:
    message: str
    code: int = 1
    problems: Sequence[str] = ()
    more: str = ""


def report(error: BaseException, words: Sequence[str]) -> int:
    """Print an error on standard error, with `--json` on standard output as well, and return the exit code."""
    from tundish.base.text import printable, redacted

    if isinstance(error, BrokenPipeError) and streams.reader_closed():
        streams.flush()
        return 0  # `tundish list | head`: it read as much as it wanted
    streams.flush()
    failure = _failure(error)
    message = redacted(failure.message)  # those of other libraries may hold secrets
    # An argument may be a whole file, pasted by mistake.
    shown = re.sub(r"\S{500,}", lambda word: f"{word[0][:200]}…{word[0][-100:]}", printable(message))
    print(f"tundish: {shown}{failure.more}", file=sys.stderr)
    if os.environ.get(TRACEBACK):
        print(redacted("".join(traceback.format_exception(error))), file=sys.stderr)
    if "--json" in words:
        facts = {"type": type(error).__name__, "message": message, "exit_code": failure.code}
        # Without a buffer (PYTHONUNBUFFERED), a closed pipe or a full disk is noticed here, not when flushing.
        with contextlib.suppress(OSError):
            print(json.dumps({"error": {**facts, "problems": [*failure.problems] or [message]}}, indent=2))
        streams.flush()
    return failure.code


def _failure(error: BaseException) -> _Failure:
    from tundish.errors import DataError, InputError, Interrupted, RequestError, RunNotFoundError, TundishError

    if isinstance(error, UsageError):
        return _Failure(error.message, 2, more=f"\n{error.usage}" if error.usage else "")
    if isinstance(error, InputError):
        return _Failure(error.message, 1 if isinstance(error, DataError) else 2, error.problems)
    if isinstance(error, TundishError):
        return _Failure(error.message, 2 if isinstance(error, RequestError | RunNotFoundError) else 1)
    if isinstance(error, Interrupted):
        return _Failure(f"{error} Follow it with:  tundish events {error.run_name} --follow", 130)
    if isinstance(error, KeyboardInterrupt):
        return _Failure(f"interrupted. {error}".strip(), 130)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        advice = "Check that the path exists and is writable, and that the disk has free space."
        return _Failure(f"{where}{error.strerror or error}. {advice}")
    place = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())[:500]
    return _Failure(
        f"this is a bug in tundish: {type(error).__name__}: {text} ({place.filename}, line {place.lineno}). Please "
        f"report it with the steps that led to it; {TRACEBACK}=1 shows the traceback."
    )
