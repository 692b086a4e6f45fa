"""Standard output and error: closed ones, other encodings than UTF-8, readers that have gone, full disks."""

import codecs
import io
import os
import select
import sys

PLAIN = str.maketrans("–—×·■□━’‘“”\xa0", "--x-#.-''\"\" ", "") | {ord("…"): "...", ord("→"): "->"}
"""What stands for a character that the terminal does not have; a question mark for all others."""


def prepare() -> None:
    """Make standard output and error take any text."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # closed by the caller: the next file opened would take its number
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


def takes(text: str) -> bool:
    """Whether standard output has all characters of a text."""
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def reader_is_gone() -> bool:
    """Whether standard output is a pipe that nobody reads any more, as behind `| head`."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def flush() -> OSError | None:
    """Print what is still to be printed, and tell why that is not possible; a reader that has gone has read enough.

    Then the rest is dropped, as Python would try again when it ends.
    """
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return None if isinstance(error, BrokenPipeError) else error
    return None
