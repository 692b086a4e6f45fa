"""launch/devices.py: first come, first served; nobody gets what another one holds, and the dead hold nothing."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tundish.base.processes import ProcessId
from tundish.base.run_folder import RunFolder
from tundish.launch import devices, local
from tundish.plan.compute import Compute

pytestmark = pytest.mark.slow

Enter = Callable[..., subprocess.Popen[bytes]]
WORKER = """\
import os, sys, time
from tundish.plan.compute import Compute
from tundish.launch import devices
from tundish.base.processes import ProcessId

devices.visible_gpus = lambda: list("0123")
devices.POLL_SECONDS = devices.PER_RUN_SECONDS = 0.005
home, wanted = os.environ["TUNDISH_HOME"], int(sys.argv[1])
for number in range(int(sys.argv[2])):
    run = f"run-{os.getpid()}-{number}"
    devices.enter(run, Compute(device="gpu", devices_per_node=wanted), ProcessId.of(os.getpid()))
    held = devices.wait_for_devices(run)
    assert len(held) == wanted
    for device in held:  # fails where somebody else has it
        os.close(os.open(f"{home}/device-{device}", os.O_CREAT | os.O_EXCL))
    time.sleep(0.01)
    for device in held:
        os.unlink(f"{home}/device-{device}")
    devices.leave(run)
"""


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Sets which GPUs of the machine this process may use, one letter each."""

    def use(names: str) -> None:
        monkeypatch.setattr(devices, "visible_gpus", lambda: list(names))

    use("01234567")
    return use


@pytest.fixture
def enter() -> Iterator[Enter]:
    """Puts a run into the line: `enter(name, gpus)`, without GPUs on the processor; returns its supervisor."""
    owners: list[subprocess.Popen[bytes]] = []

    def run(name: str, wanted: int = 0) -> subprocess.Popen[bytes]:
        owners.append(subprocess.Popen(["sleep", "600"]))
        compute = (
            Compute(device="gpu", devices_per_node=wanted) if wanted else Compute(device="cpu", devices_per_node=1)
        )
        devices.enter(name, compute, ProcessId.of(owners[-1].pid))
        return owners[-1]

    yield run
    for owner in owners:
        owner.kill()
        owner.wait()


def _end(owner: subprocess.Popen[bytes]) -> None:
    owner.kill()
    owner.wait()


def _take(run: str) -> tuple[str, ...]:
    """The devices of a run whose turn it is; fails where it has to wait."""
    found: list[tuple[str, ...]] = []
    thread = threading.Thread(target=lambda: found.append(devices.wait_for_devices(run)), daemon=True)
    thread.start()
    thread.join(10)
    assert found, f"{run} waits: {devices.place(run)}"
    return found[0]


def test_runs_are_served_in_the_order_in_which_they_came(enter: Enter) -> None:
    """A run that came early would wait for ever in a busy week."""
    names = [f"run-{number}" for number in range(5)]
    for name in names:
        enter(name)
    for number, name in enumerate(names):
        assert [devices.place(other) for other in names[number:]] == [
            (place + 1, names[number : number + place]) for place in range(5 - number)
        ]
        assert _take(name) == ("cpu",)
        assert devices.place(name) is None, "who holds the devices does not wait"
        devices.leave(name)
    assert devices.place("run-0") is None and [file.name for file in devices._folder().iterdir()] == ["lock"]


def test_who_waits_is_told_its_place_and_whom_it_waits_for(enter: Enter) -> None:
    """Nobody could tell a run that waits from one that hangs; the holder is no place in the line, but is waited for."""
    for name in ("holds", "first", "second"):
        enter(name)
    _take("holds")
    assert devices.place("first") == (1, ["holds"])
    assert devices.place("second") == (2, ["holds", "first"])
    devices.leave("first")
    assert devices.place("second") == (1, ["holds"])
    assert devices.place("none") is None


def test_only_a_run_that_waits_for_another_is_reported_as_waiting(enter: Enter, home: Path) -> None:
    """The first run of an idle machine would be QUEUED until its supervisor has taken the devices."""
    alone, behind = RunFolder.of("alone"), RunFolder.of("behind")
    supervisor = ProcessId.of(enter("alone").pid)
    assert local.state(alone, supervisor).waiting == ""
    _take("alone")
    waiting = local.state(behind, ProcessId.of(enter("behind").pid)).waiting
    assert waiting == "Waiting for devices: position 1 in the queue, behind alone."
    assert local.state(alone, supervisor).waiting == ""


def test_the_dead_hold_nothing_and_stand_in_nobodys_way(enter: Enter) -> None:
    """A supervisor that was killed would block its devices until somebody removes a file."""
    holder, waiter, _ = enter("holds"), enter("waits"), enter("lives")
    _take("holds")
    _end(holder)
    _end(waiter)
    assert devices.place("lives") == (1, [])
    assert _take("lives") == ("cpu",)
    assert sorted(file.stem for file in devices._folder().glob("*.json")) == ["lives"]


def test_a_process_that_has_got_the_number_of_a_dead_one_holds_nothing(enter: Enter) -> None:
    """After a restart of the machine, any process could block the devices for a run that is long gone."""
    owner = enter("holds")
    _take("holds")
    file = devices._folder() / "holds.json"
    record = json.loads(file.read_text())
    assert record["owner"]["pid"] == owner.pid
    for fact in ({"ticks": record["owner"]["ticks"] - 1}, {"boot": "another"}):
        file.write_text(json.dumps({**record, "owner": {**record["owner"], **fact}}))
        enter(f"after {fact}")
        assert _take(f"after {fact}") == ("cpu",)
        devices.leave(f"after {fact}")


def test_a_resumed_run_keeps_what_nobody_has_taken_meanwhile(enter: Enter) -> None:
    """The place, or the devices, would be lost between a caller's process and the supervisor that it starts."""
    enter("holds")
    _take("holds")
    first = enter("first")
    enter("second")
    enter("first")
    _end(first)
    assert devices.place("first") == (1, ["holds"]) and devices.place("second") == (2, ["holds", "first"])
    enter("holds")
    assert devices.place("holds") is None and _take("holds") == ("cpu",)


def test_a_large_run_is_not_starved_by_small_ones_behind_it(enter: Enter, gpus: Callable[[str], None]) -> None:
    """Runs of one GPU would take each GPU that gets free, and a run that wants eight wait for ever."""
    enter("small-1", 1)
    assert _take("small-1") == ("0",)
    for name, wanted in (("large", 8), ("small-2", 1), ("small-3", 1)):
        enter(name, wanted)
    assert devices.place("large") == (1, ["small-1"])
    assert devices.place("small-2") == (2, ["small-1", "large"]), "although seven are free"
    with ThreadPoolExecutor() as pool:
        small = pool.submit(devices.wait_for_devices, "small-2")
        with pytest.raises(TimeoutError):
            small.result(1)
        devices.leave("small-1")
        assert _take("large") == tuple("01234567")
        devices.leave("large")
        assert (small.result(20), _take("small-3")) == (("0",), ("1",))


def test_small_runs_share_the_gpus(enter: Enter, gpus: Callable[[str], None]) -> None:
    """Seven of eight GPUs would stay idle, or two runs have one and the same."""
    for number in range(4):
        enter(f"run-{number}", 2)
    held = [_take(f"run-{number}") for number in range(4)]
    assert sorted(device for devices in held for device in devices) == list("01234567")
    enter("more", 1)
    assert devices.place("more") == (1, [f"run-{number}" for number in range(4)])
    devices.leave("run-2")
    assert _take("more") == held[2][:1]


def test_runs_of_other_gpus_do_not_wait_for_each_other(enter: Enter, gpus: Callable[[str], None]) -> None:
    """Who has divided a machine by CUDA_VISIBLE_DEVICES would wait for the GPUs of others, or be given them."""
    gpus("01")
    enter("left", 2)
    enter("left, later", 2)
    gpus("23")
    enter("right", 2)
    assert devices.place("right") == (1, [])
    assert _take("right") == ("2", "3") and _take("left") == ("0", "1")
    gpus("12")
    enter("both", 1)
    assert devices.place("both") == (2, ["left", "right", "left, later"])


def test_runs_on_the_processor_and_on_gpus_do_not_wait_for_each_other(
    enter: Enter, gpus: Callable[[str], None]
) -> None:
    """A small test on the processor would wait for days of training."""
    enter("gpu", 8)
    enter("cpu")
    assert (_take("cpu"), _take("gpu")) == (("cpu",), tuple("01234567"))


@pytest.mark.parametrize("wanted", [1, 3])
def test_no_device_is_ever_handed_out_twice(home: Path, wanted: int) -> None:
    """Two runs that look at the same moment would both find the device free."""
    home.mkdir()
    command = [sys.executable, "-c", WORKER, str(wanted), "4"]

    def work(_: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)

    with ThreadPoolExecutor(6) as pool:
        ended = list(pool.map(work, range(6)))
    assert [one.returncode for one in ended] == [0] * 6, [one.stderr for one in ended]
    assert not list(home.glob("device-*")) and not list(home.glob("queue/*/*.json"))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\0" * 100, '{"number": 1}', '{"number": "1", "run": "bad"}'])
def test_a_garbled_ticket_is_set_aside(text: str, home: Path, caplog: pytest.LogCaptureFixture) -> None:
    """No run could be created any more, nor any list be shown, until somebody finds the file."""
    _enter_here("run-1")
    folder = next((home / "queue").iterdir())
    (folder / "bad.json").write_text(text)
    (folder / "folder.json").mkdir()
    (folder / "copy.json").write_text((folder / "run-1.json").read_text())
    (folder / ".run-1.json.0123.tmp").write_text("")
    _enter_here("run-2")
    assert devices.wait_for_devices("run-1") == ("cpu",) and devices.place("run-2") == (1, ["run-1"])
    for name, why in (("bad", ""), ("folder", "is a folder"), ("copy", "is of the run 'run-1'")):
        assert f"{name}.json: {why}" in caplog.text and f"kept as {name}.json.damaged" in caplog.text
    assert sorted(path.name for path in folder.iterdir()) == [
        "bad.json.damaged", "copy.json.damaged", "folder.json.damaged", "lock", "run-1.json", "run-2.json",
    ]  # fmt: skip


def test_a_run_whose_ticket_was_damaged_keeps_its_place(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its supervisor would end, or it would go behind those that came after it."""
    monkeypatch.setattr(devices, "POLL_SECONDS", 0.01)
    _enter_here("run-1")
    assert devices.wait_for_devices("run-1")
    _enter_here("run-2")
    _enter_here("run-3")
    folder = next((home / "queue").iterdir())
    with ThreadPoolExecutor() as pool:
        second = pool.submit(devices.wait_for_devices, "run-2")
        while devices.place("run-2") != (1, ["run-1"]):
            pass
        looked = threading.Event()
        monkeypatch.setattr(devices.time, "sleep", lambda _: looked.set())
        assert looked.wait(20)
        (folder / "run-2.json").write_text("{")
        devices.leave("run-1")
        assert second.result(20) == ("cpu",)
    assert devices.place("run-3") == (1, ["run-2"])


def _enter_here(run: str) -> None:
    devices.enter(run, Compute(device="cpu", devices_per_node=1), ProcessId.of(os.getpid()))
