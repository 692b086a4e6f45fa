"""Locks of files.py: one at a time, and who waits is told for whom."""

import logging
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tundish.base import events, files
from tundish.base.files import is_held, locked
from tundish.errors import LockHeldError

SIGNED = "with locked(Path(sys.argv[1])): print(1, flush=True); time.sleep(60)"
UNSIGNED = "fcntl.flock(os.open(sys.argv[1], os.O_RDWR), fcntl.LOCK_EX); print(1, flush=True); time.sleep(60)"


@contextmanager
def _holder(path: Path, how: str = SIGNED) -> Iterator["subprocess.Popen[str]"]:
    """Another process that holds a lock until it is killed."""
    script = f"import fcntl, os, sys, time; from tundish.base.files import locked; from pathlib import Path\n{how}"
    with subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline()
        yield process
        process.kill()


def test_a_lock_is_for_one_and_ends_with_its_holder(tmp_path: Path) -> None:
    """Two would do at once what is to be done once; or nobody could go on after a crash."""
    with _holder(tmp_path) as holder:
        assert is_held(tmp_path)
        begun = time.monotonic()
        threading.Timer(0.3, holder.kill).start()
        with locked(tmp_path):
            assert time.monotonic() - begun >= 0.3
    assert not is_held(tmp_path) and not is_held(tmp_path / "nothing")


def test_who_waits_is_told_for_whom(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`create()` would hang without a word behind a process that was stopped, and nobody know which one to end."""
    monkeypatch.setattr(files, "REPORT_SECONDS", 0.05)
    path = tmp_path / "x.lock"
    with _holder(path) as holder:
        with pytest.raises(
            LockHeldError, match=rf"x\.lock: is locked by process {holder.pid} on .* \(-c .*x\.lock\) since "
        ):
            with locked(path, timeout=0.2):
                pytest.fail("two hold it")
        assert f"Waiting for {path}, locked by process {holder.pid} on " in caplog.text
        assert caplog.text.count("Waiting for") == 1
    with locked(path, timeout=0):
        pass


def test_a_foreign_holder_is_another_process(tmp_path: Path) -> None:
    """The last one that had signed would be ended by the user, who was told a wrong number."""
    path = tmp_path / "x.lock"
    with _holder(path):
        pass
    signed = path.read_text()
    with _holder(path, UNSIGNED):
        for found in (signed, "", "{", "[]", '{"command": 1}'):
            path.write_text(found)
            with pytest.raises(LockHeldError, match=r"is locked by another process\."), locked(path, timeout=0):
                pytest.fail("two hold it")


def test_a_lock_that_is_removed_while_it_is_waited_for_counts_no_more(tmp_path: Path) -> None:
    """Two would hold it: one the removed file, the other one a new file of that name."""
    path, order = tmp_path / "x.lock", list[str]()

    def wait() -> None:
        with locked(path):
            order.append("second" if path.exists() else "holds a file that is gone")

    with locked(path, temporary=True):
        waiting = threading.Thread(target=wait)
        waiting.start()
        order.append("first")
    waiting.join()
    assert order == ["first", "second"]
    with locked(path, temporary=True):
        assert path.exists()
    assert not path.exists()


def test_an_event_is_written_whoever_holds_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that was stopped while it wrote would keep `cancel` from ever answering, and the others from training."""
    monkeypatch.setattr(events, "LOCK_SECONDS", 0.05)
    path = tmp_path / "events.jsonl"
    events.append(path, "STARTED", "go")
    with _holder(path, UNSIGNED):
        events.append(path, "CANCELED", "by user")
    assert [event.type for event in events.read(path)] == ["STARTED", "CANCELED"]


def test_nothing_is_told_where_nobody_waits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Every run's log would begin with a line about a lock."""
    with caplog.at_level(logging.DEBUG), locked(tmp_path):
        pass
    assert not caplog.text
