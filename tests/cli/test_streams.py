"""cli/streams.py: what becomes of the output where it is not a UTF-8 terminal."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tundish import __version__
from tundish.cli import main, streams

Capture = pytest.CaptureFixture[str]
TUNDISH = f"{sys.executable} -m tundish"


def _shell(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", "-o", "pipefail", "-c", line.replace("tundish", TUNDISH, 1)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("what", ["models", "--help"])
def test_a_full_disk_and_a_reader_that_has_gone(what: str, unbuffered: str) -> None:
    """A script would take half a list for a whole one; `| head` end in a traceback."""
    full = _shell(f"tundish {what} > /dev/full", PYTHONUNBUFFERED=unbuffered)
    assert full.returncode == 1 and full.stderr.startswith("tundish: No space left on device. Check ")
    assert len(full.stderr.splitlines()) == 1
    gone = _shell(f"tundish {what} | true", PYTHONUNBUFFERED=unbuffered)
    assert (gone.returncode, gone.stderr) == (0, "")


@pytest.mark.parametrize("where", ["| true", "> /dev/full"])
def test_an_error_whose_document_cannot_be_written_is_still_one_line(where: str) -> None:
    """`| head` in a container, where output has no buffer, would end in two tracebacks."""
    done = _shell(f"tundish get none --json {where}", PYTHONUNBUFFERED="1")
    assert done.returncode == 2 and done.stderr.startswith("tundish: there ")
    assert len(done.stderr.splitlines()) == 1


def test_closed_output_is_nobodys_file(tmp_path: Path) -> None:
    """The first file that a command opens would become its standard output, and a `print` end in it."""
    done = _shell(f"tundish validate --model x --train-data-path y --report {tmp_path}/r.json >&- 2>&-")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")
    done = _shell("tundish models >&-")
    assert (done.returncode, done.stderr) == (0, "")


def test_characters_that_the_terminal_does_not_have_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name with an umlaut would end in a traceback on an ASCII terminal."""
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii", errors="strict"))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(shown, encoding="latin-1", errors="strict"))
    streams.prepare()
    print("größe … “a” → ■■□ 漢字 \udcff", flush=True)
    print("größe … ’s → 漢", file=sys.stderr, flush=True)
    assert shown.getvalue().decode("latin-1").splitlines() == ['gr??e ... "a" -> ##. ?? ?', "größe ... 's -> ?"]


def test_json_is_the_same_on_an_ascii_terminal() -> None:
    """A question mark in a document would be data."""
    done = _shell("tundish get größe --json", PYTHONIOENCODING="ascii")
    assert done.returncode == 2 and "\"there is no run 'gr\\u00f6\\u00dfe' in " in done.stdout
    assert "'gr??e'" in done.stderr


def test_arguments_that_are_no_text_are_refused(capsys: Capture) -> None:
    """A name that no file of a run can hold would end in a traceback hours later."""
    assert main(["get", os.fsdecode(b"caf\xe9")]) == 2
    assert capsys.readouterr().err == r"tundish: b'caf\xe9' is not valid utf-8. Rename it." + "\n"


def test_the_command_ends_at_once_and_whole() -> None:
    """Output would be lost, or what a library does at the end be left out, as Python's own end is."""
    code = "import atexit, sys, threading; from tundish.cli import entry\nsys.argv = ['tundish', '--version']\n"
    code += "atexit.register(print, 'at exit')\nstart = threading.Event()\n"
    code += "threading.Thread(target=lambda: start.wait() and print('thread')).start()\nstart.set()\nentry()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.splitlines()) == {f"tundish {__version__}", "thread", "at exit"} and done.stderr == ""
