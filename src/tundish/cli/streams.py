"""Standard output and error: closed streams, encodings other than UTF-8, closed pipes, full disks."""

import codecs
import io
import os
import select
import sys

PLAIN = str.maketrans("–—×·■□━’‘“”\xa0", "--x-#.-''\"\" ", "") | {ord("…"): "...", ord("→"): "->"}
"""Replacements for characters that the terminal's encoding lacks; all others become a question mark."""


def prepare() -> None:
    """Make standard output and error accept any text."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # closed by the parent: the next open() would reuse its number
    sys.stdout = sys.stdout or open(1, "w")
    sys.stderr = sys.stderr or open(2, "w")
    codecs.register_error("tundish.plain", _replaced)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="tundish.plain")


def _replaced(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end].translate(PLAIN)
    return "".join(letter if letter.isascii() else "?" for letter in text), error.end


def can_encode(text: str) -> bool:
    """Whether the encoding of standard output has all characters of a text."""
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def reader_closed() -> bool:
    """Whether standard output is a pipe whose reader has closed it, as `| head` does."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def flush() -> OSError | None:
    """Flush standard output. Returns the error if that fails, except for a closed pipe: its reader has read enough."""
    try:
        sys.stdout.flush()
    except OSError as error:
        # Drop the rest: Python would try again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return None if isinstance(error, BrokenPipeError) else error
    return None
