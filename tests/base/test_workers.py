"""data/workers.py: several processes do what one would, in order, and none outlives its parent."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tundish.base.workers import Bars, Workers, guarded, limited
from tundish.errors import DataError, StageError, WorkerError

pytestmark = pytest.mark.slow


def _square(number: int) -> tuple[int, int]:
    return number * number, os.getpid()


def _slow_if_even(number: int) -> int:
    time.sleep(0.02 * (number % 2 == 0))
    return number


def _die(number: int) -> int:
    if number == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def _refuse(number: int) -> int:
    if number == 3:
        raise DataError(["no three", "no four"])
    return number


def _told(number: int) -> str | None:
    return os.environ.get("TOKENIZERS_PARALLELISM")


def _tasks(count: int) -> Iterator[tuple[int]]:
    return ((number,) for number in range(count))


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("tasks", [0, 1, 2, 50])
def test_results_come_in_the_order_of_the_tasks(count: int, tasks: int) -> None:
    """Samples would be counted to other lines, and the same data give other shards."""
    with Workers(count) as workers:
        assert list(workers.map(_slow_if_even, _tasks(tasks))) == list(range(tasks))


def test_tasks_are_done_by_others() -> None:
    """One core would do the work of all; or what others wrote would end the caller."""
    with Workers(2) as workers:
        processes = {process for _, process in workers.map(_square, _tasks(40))}
        assert os.getpid() not in processes and 1 <= len(processes) <= 2
        again = {process for _, process in workers.map(_square, _tasks(40))}
        assert again <= {child.pid for child in psutil.Process().children()}, "the same processes go on"
    assert not {child.pid for child in psutil.Process().children()} & (processes | again), "and end with the work"
    for count, tasks in ((2, 1), (1, 9)):
        with Workers(count) as workers:
            (process,) = {process for _, process in workers.map(_square, _tasks(tasks))}
            assert process != os.getpid()


def test_there_are_as_many_as_the_machine_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container with two cores on a machine of sixty-four would start sixty-four processes."""
    import joblib

    monkeypatch.setattr(joblib, "cpu_count", lambda: 5)
    assert (Workers().count, Workers(3).count) == (5, 3)


@pytest.mark.parametrize("count", [1, 2])
def test_few_tasks_are_under_way_at_a_time(count: int) -> None:
    """All of the data would be read into memory while the first chunk is tokenized."""
    made = 0

    def tasks() -> Iterator[tuple[int]]:
        nonlocal made
        for number in range(100):
            made += 1
            yield (number,)

    with Workers(count) as workers:
        for done, _ in enumerate(workers.map(_slow_if_even, tasks()), 1):
            assert made <= done + 3 * count + 1
    assert made == 100


def test_a_killed_worker_is_told_in_a_sentence() -> None:
    """The kernel kills the largest process when memory is short: the run would end in a traceback, or hang."""
    with (
        Workers(2) as workers,
        pytest.raises(StageError, match="was killed by SIGKILL, most likely by the out-of-memory killer") as error,
    ):
        list(workers.map(_die, _tasks(100)))
    assert "Use a machine with more memory" in str(error.value)


@pytest.mark.parametrize("count", [1, 2])
def test_errors_of_tasks_are_those_of_the_caller(count: int) -> None:
    """What was found in the data would arrive as an error of processes, or as another one."""
    with Workers(count) as workers, pytest.raises(DataError) as error:
        list(workers.map(_refuse, _tasks(20)))
    assert error.value.problems == ("no three", "no four")


@pytest.mark.parametrize("count", [1, 2])
def test_an_error_of_the_source_ends_the_work(count: int) -> None:
    """Damaged data is found while it is read: the workers must not keep the caller from learning it."""

    def tasks() -> Iterator[tuple[int]]:
        yield from _tasks(10)
        raise DataError("damaged")

    before = {child.pid for child in psutil.Process().children()}
    with pytest.raises(DataError, match="damaged"), Workers(count) as workers:
        list(workers.map(_slow_if_even, tasks()))
    assert {child.pid for child in psutil.Process().children()} <= before


def test_workers_start_no_threads_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """`tokenizers` would start as many threads in each process as there are processors; the caller's setting stays."""
    for setting in (None, "true"):
        monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
        if setting is not None:
            monkeypatch.setenv("TOKENIZERS_PARALLELISM", setting)
        with Workers(2) as workers:
            assert set(workers.map(_told, _tasks(5))) == {"false"}
            assert os.environ.get("TOKENIZERS_PARALLELISM") == setting


def _spin(number: int) -> int:
    with limited(number, seconds=0.1):
        if number == 3:
            sum(range(1 << 50))  # in C: no signal's handler is called before it ends
    return number


def _spin_in_c() -> None:
    with limited("the tokenizer of x", seconds=0.1):
        sum(range(1 << 50))


def _fill_the_memory() -> int:
    with limited("the data", memory=1 << 26):
        return len(bytearray(1 << 30))


def _abort() -> None:
    with limited("the tokenizer of x"):
        os.write(2, b"thread panicked\nmore of it\n")
        os.abort()


def _die_of_rust() -> None:
    with limited("the tokenizer of x", memory=1 << 28):
        os.write(2, b"memory allocation of 256000000 bytes failed\n")
        os.abort()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (_spin_in_c, "the tokenizer of x took more than 0.1 s of CPU time. Check what it is"),
        (_fill_the_memory, "the data took more than 0.062 GiB of memory."),
        (_abort, "the tokenizer of x crashed its process (SIGABRT: more of it)."),
        (_die_of_rust, "the tokenizer of x took more than 0.25 GiB of memory."),
    ],
)
def test_what_takes_too_much_is_a_sentence(
    function: Callable[[], None], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """A tokenizer or a template of somebody else would hang the caller, end it, or fill its terminal."""
    with pytest.raises(WorkerError) as error:
        guarded(function)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")


def test_limits_end_with_their_block() -> None:
    """What is read later would be refused for want of memory that was another's."""
    with Workers(1) as workers:
        assert list(workers.map(_large_after_small, [()])) == [1 << 28]


def _large_after_small() -> int:
    with limited("little", seconds=1e-3, memory=1 << 20):
        pass
    return len(bytearray(1 << 28)) + 0 * sum(range(1 << 20))


def test_a_process_that_nobody_started_has_no_limits() -> None:
    """Spark's processes, and those of tests, would be killed."""
    assert _spin(2) == 2
    with limited("all", seconds=1e-6, memory=1):
        assert len(bytearray(1 << 26)) == 1 << 26


def test_what_a_worker_does_not_survive_is_done_again_in_another_way() -> None:
    """It would not be known which of hundreds of samples it was."""
    with Workers(2) as workers:
        assert list(workers.map(_spin, _tasks(9), again=_slow_if_even)) == list(range(9))
        results = workers.map(_spin, _tasks(9), again=_spin)
        assert [next(results) for _ in range(3)] == [0, 1, 2], "what comes before it is given"
        with pytest.raises(WorkerError) as error:
            next(results)
    assert (error.value.what, error.value.cause) == (3, "took more than 0.1 s of CPU time")


def _with_a_bar(progress: Bars) -> str:
    with progress("Reading") as tell:
        tell(1, 2)
        tell(2, 2)
    print("a warning", file=sys.stderr)
    return "done"


def test_a_guarded_function_tells_its_progress_and_its_warnings(capfd: pytest.CaptureFixture[str]) -> None:
    """The user would look at a terminal that says nothing."""
    told = list[object]()

    @contextmanager
    def bar(title: str) -> Iterator[Callable[[int, int | None], None]]:
        told.append(title)
        yield lambda done, total: told.append((done, total))
        told.append("end")

    assert guarded(_with_a_bar, progress=bar) == "done"
    assert told == ["Reading", (1, 2), (2, 2), "end"]


def test_errors_of_a_guarded_function_are_its_own() -> None:
    """Refusals would arrive as failures; and of a failure, nobody could tell where it was."""
    with pytest.raises(DataError) as refused:
        guarded(_refuse, 3)
    assert refused.value.problems == ("no three", "no four") and not hasattr(refused.value, "__notes__")
    with pytest.raises(ZeroDivisionError) as failed:
        guarded(divmod, 1, 0)
    assert "ZeroDivisionError" in failed.value.__notes__[0]


PARENT = """
import sys, time
from tundish.base.workers import Workers

def wait(number):
    time.sleep(600 if number > 3 else 0)
    return number

with Workers(3) as workers:
    for number in workers.map(wait, ((number,) for number in range(9))):
        print(number, flush=True)
"""


@pytest.fixture
def parent(tmp_path: Path) -> Iterator[Any]:
    """A process whose workers are busy for ten minutes."""
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        for number in range(4):
            assert process.stdout.readline() == b"%d\n" % number
        yield process
        process.kill()


def _children(process: Any) -> list[psutil.Process]:
    found = psutil.Process(process.pid).children()
    assert len(found) == 3
    return found


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE  # which nobody has buried yet
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_their_parent(parent: Any, sent: signal.Signals) -> None:
    """Processes of a run that was killed would stay, with all their memory, and write into its folder."""
    workers = _children(parent)
    parent.send_signal(sent)
    until = time.monotonic() + 60
    while any(map(_is_alive, workers)) and time.monotonic() < until:
        time.sleep(0.05)
    assert [_is_alive(worker) for worker in workers] == [False] * 3


def test_workers_leave_an_interrupt_to_their_parent(parent: Any) -> None:
    """Ctrl+C reaches every process of a terminal: each worker would print a traceback of its own."""
    workers = _children(parent)
    for worker in workers:
        worker.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert [_is_alive(worker) for worker in workers] == [True] * 3


INTERRUPTED = """
import sys, time
from pathlib import Path
from tundish.base.workers import Workers, guarded

def work(half_written):
    half_written.touch()
    try:
        with Workers(2) as workers:
            for number in workers.map(wait, ((number,) for number in range(9))):
                print(number, flush=True)
    finally:
        half_written.unlink()

def wait(number):
    time.sleep(600 if number > 3 else 0)
    return number

guarded(work, Path(sys.argv[1]))
"""


def test_an_interrupt_leaves_neither_processes_nor_files(tmp_path: Path) -> None:
    """Ctrl+C would leave processes that go on, and folders that are half written."""
    script, half_written = tmp_path / "parent.py", tmp_path / "half"
    script.write_text(INTERRUPTED)
    command = [sys.executable, str(script), str(half_written)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None and process.stderr is not None
        for number in range(4):
            assert process.stdout.readline() == b"%d\n" % number
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) == 3 and half_written.exists()
        os.killpg(process.pid, signal.SIGINT)
        assert process.stderr.read().count(b"Traceback") == 1, "the caller's own"
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive and not half_written.exists()
