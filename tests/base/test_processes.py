"""processes.py: processes are started with a log, told apart, and stopped with all that they have started."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from tundish.base.processes import ProcessId, start, stop_tree

pytestmark = pytest.mark.slow

# Starts a child that does not end when it is asked to, tells its number, and waits.
STUBBORN = """
import signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(60)"],
    stdout=subprocess.PIPE, text=True)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(60)
"""


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process that does nothing."""
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


def _wait_for_text(path: Path) -> str:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if path.exists() and (text := path.read_text()).endswith("\n"):
            return text
        time.sleep(0.02)
    return pytest.fail(f"nothing was written to {path}")


def test_output_is_appended_to_the_log(tmp_path: Path) -> None:
    """The cause of a failure would be lost, or a second start wipe the first one's log."""
    log = tmp_path / "logs" / "stage.log"
    script = "import os, sys; print(os.environ['STAGE'], os.getcwd()); print('err', file=sys.stderr); sys.exit(3)"
    for name in ("one", "two"):
        process = start([sys.executable, "-c", script], log, {"STAGE": name}, tmp_path)
        assert process.wait(10) == 3
    assert sorted(log.read_text().split("\n")) == sorted(["", f"one {tmp_path}", "err", f"two {tmp_path}", "err"])


@pytest.mark.parametrize("detached", [True, False])
def test_detached_processes_have_a_session_of_their_own(tmp_path: Path, detached: bool) -> None:
    """Closing the caller's terminal would end the run; or a stage would outlive its supervisor."""
    log = tmp_path / "log"
    process = start([sys.executable, "-c", "import os; print(os.getsid(0))"], log, {}, tmp_path, detached=detached)
    process.wait(10)
    assert (int(log.read_text()) == process.pid) is detached
    assert detached or int(log.read_text()) == os.getsid(0)


def test_a_process_is_known_while_it_runs(sleeper: subprocess.Popen[bytes]) -> None:
    """A living run would look dead, or an ended one alive."""
    known = ProcessId.of(sleeper.pid)
    process = known.process()
    assert process is not None and process.pid == sleeper.pid
    sleeper.kill()
    psutil.wait_procs([process], timeout=60)
    assert known.process() is None, "a zombie has ended, though nobody has reaped it"
    sleeper.wait(10)
    assert known.process() is None


def test_a_later_process_of_the_same_number_is_another(sleeper: subprocess.Popen[bytes]) -> None:
    """Cancelling an old run would kill a stranger's process that got its number."""
    known = ProcessId.of(sleeper.pid)
    assert replace(known, ticks=known.ticks - 100).process() is None
    assert replace(known, boot="another").process() is None, "after a reboot, ticks begin anew"
    elsewhere = replace(known, host="another")
    assert elsewhere.process() is None and not elsewhere.is_here


@pytest.mark.parametrize("deaf", [True, False])
def test_what_is_started_dies_with_its_starter(tmp_path: Path, deaf: bool) -> None:
    """Ranks would hold their devices for days after their supervisor was killed."""
    script = "import sys, time; from tundish.base.processes import start; from pathlib import Path; "
    script += (
        f"p = start(['sleep', '60'], Path('log'), {{}}, Path('.'), ignore_stop={deaf}); print(p.pid, flush=True); "
    )
    with subprocess.Popen(
        [sys.executable, "-c", script + "time.sleep(60)"], stdout=subprocess.PIPE, text=True, cwd=tmp_path
    ) as starter:
        assert starter.stdout is not None
        child = psutil.Process(int(starter.stdout.readline()))
        starter.kill()
        starter.wait(10)
        _, alive = psutil.wait_procs([child], timeout=60)
        assert not alive


def test_what_is_deaf_does_not_end_by_the_system_s_signals(tmp_path: Path) -> None:
    """A cluster sends SIGTERM to all processes of a job at once: the launcher must not end before its ranks."""
    process = start(["sleep", "60"], tmp_path / "log", {}, tmp_path, ignore_stop=True)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGUSR1)
    time.sleep(0.3)
    assert process.poll() is None
    process.kill()
    process.wait(10)


def test_a_stopped_process_takes_its_children_along(tmp_path: Path) -> None:
    """Ranks would train on after the run was cancelled, even those that do not end when asked."""
    log = tmp_path / "log"
    process = start([sys.executable, "-c", STUBBORN], log, {}, tmp_path)
    child = psutil.Process(int(_wait_for_text(log)))
    assert child.is_running()
    stop_tree(psutil.Process(process.pid), grace_s=0.3)
    assert process.poll() is not None
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_stopping_what_has_ended_is_no_error(sleeper: subprocess.Popen[bytes]) -> None:
    """Cancelling a run in the moment in which it ends would raise."""
    process = psutil.Process(sleeper.pid)
    sleeper.kill()
    sleeper.wait(10)
    stop_tree(process, grace_s=0.1)


def test_what_has_lost_its_starter_before_it_could_ask_ends_too(tmp_path: Path) -> None:
    """A rank whose launcher is killed while the rank is loaded would train on, beside those that take its place."""
    wait = f"while not os.path.exists({str(tmp_path / 'go')!r}): time.sleep(0.01)"
    load = "from tundish.base.processes import die_with_starter"
    child = f"import os, time\n{wait}\n{load}\ndie_with_starter('RUN')\nprint('on')"
    script = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]).wait(); time.sleep(60)"
    logs = {lost: tmp_path / f"{lost}.log" for lost in (True, False)}
    starters = {lost: start([sys.executable, "-c", script], logs[lost], {"RUN": "a"}, tmp_path) for lost in logs}
    children = {lost: _child(starters[lost]) for lost in logs}
    starters[True].kill()
    starters[True].wait()
    (tmp_path / "go").touch()
    psutil.wait_procs(list(children.values()), timeout=300)
    starters[False].kill()
    starters[False].wait()
    assert {lost: log.read_text() for lost, log in logs.items()} == {True: "", False: "on\n"}


def _child(process: subprocess.Popen[bytes]) -> psutil.Process:
    deadline = time.monotonic() + 300
    while not (found := psutil.Process(process.pid).children()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found[0]
