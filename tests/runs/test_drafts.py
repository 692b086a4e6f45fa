"""runs/drafts.py: a run that could not be made has never been, wherever it ended."""

import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.runs.steps import Steps, accept_anything, counted, full

from tundish import foundation_model as fm
from tundish import launch
from tundish.base.files import locked
from tundish.base.home import runs_dir
from tundish.base.run_folder import RunFolder
from tundish.errors import SpecError
from tundish.foundation_model import TrainingRun
from tundish.runs import creating, drafts
from tundish.tracking.experiment import open_tracking

pytestmark = pytest.mark.slow

KILLED = """
import json, os, sys
import mlflow, mlflow.store.tracking.sqlalchemy_store
from tests.runs.steps import Steps, accept_anything, counted, kill
from tundish import foundation_model as fm
from tundish import launch
accept_anything(json.loads(sys.argv[1]))
for number, named in enumerate(sys.argv[2:]):
    if os.fork() == 0:
        with counted(Steps(named=named, then=kill)):
            fm.create("", "", "", run_name=f"run-{number}")
        os._exit(0)
    print(number, os.waitstatus_to_exitcode(os.wait()[1]))
"""


@pytest.fixture
def held_devices(home: Path) -> Iterator[None]:
    """Runs that are started wait in line, and load nothing."""
    from tundish.base.processes import ProcessId
    from tundish.launch import devices
    from tundish.plan.compute import Compute

    devices.enter("somebody", Compute(device="cpu", devices_per_node=1), ProcessId.of(os.getpid()))
    assert devices.wait_for_devices("somebody")
    yield
    devices.leave("somebody")


@pytest.fixture
def checked(arguments: dict[str, Any], held_devices: None, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Arguments that were checked; the database is there."""
    monkeypatch.setattr(creating, "check", creating.check)
    arguments["experiment_path"] = "/Shared/lab"
    accept_anything(arguments)
    open_tracking("other", "/Shared/lab", {})
    return arguments


def _left(home: Path) -> dict[str, Any]:
    """What there is of runs."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{home}/mlflow/mlflow.db")
    ids: list[str] = [experiment.experiment_id for experiment in client.search_experiments()]
    queued = {path.name for path in home.glob("queue/*/*")} - {"lock", "somebody.json"}
    there = {path.name for path in runs_dir().iterdir()} if runs_dir().is_dir() else set[str]()
    return {
        "runs": there,
        "queue": queued,
        "mlflow": {run.info.run_name for run in client.search_runs(ids)} - {"other"},
    }


NOTHING: dict[str, Any] = {"runs": set(), "queue": set(), "mlflow": set()}


def test_a_disk_that_is_full_at_any_step_leaves_nothing(checked: dict[str, Any], home: Path) -> None:
    """A run would be PENDING for ever, its name be taken, its MLflow run RUNNING, or its ticket keep others waiting."""
    number, steps = 0, list[str]()

    def end(step: str) -> None:
        steps.append(step)
        full(step)

    while True:
        number += 1
        try:
            with counted(Steps(at=number, then=end)):
                run = fm.create(**checked, run_name="run-1")
            if len(steps) < number:
                break
            # What MLflow need not know may fail, and a lock be held that is not signed.
            assert "log_batch" in steps[-1] or steps[-1].endswith("lock"), steps[-1]
            _end(run)
        except (OSError, SpecError) as error:
            assert "no space left" in str(error).lower(), error
            assert _left(home) == NOTHING, steps[-1]
    _end(run)
    text = "\n".join(steps)
    for step in ("before create_run", "after create_run", "spec.json", "events.jsonl", "os.rename", "Popen", "queue/"):
        assert step in text
    assert len(steps) >= 20


def _end(run: TrainingRun) -> None:
    """As if it had never been; faster than `cancel`, which tells MLflow by a process of its own."""
    from mlflow import MlflowClient

    assert run.run_dir is not None and run.run_id is not None
    launch.cancel(RunFolder(run.run_dir), 2)
    shutil.rmtree(run.run_dir)
    MlflowClient(run.tracking_uri).delete_run(run.run_id)


# Where it is killed, and whether it stays: when its supervisor is there, it is a run.
KILLS = {
    ".draft/ballast": False,
    ".draft/run": False,
    "before create_run": False,
    "after create_run": False,
    ".tracking.json": False,
    "events.jsonl": False,
    ".spec.json": False,
    "os.rename": False,
    "/queue/": False,
    "Popen": False,
    "/.supervisor.json": True,
    "no such step": True,
}


def test_what_a_kill_leaves_is_removed_by_the_next_one(checked: dict[str, Any], home: Path) -> None:
    """Drafts would pile up, and runs that nobody has made be RUNNING in MLflow for ever."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-W", "ignore", "-c", KILLED, json.dumps(checked), *KILLS]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment)
    killed = [f"{number} {0 if step == 'no such step' else -9}" for number, step in enumerate(KILLS)]
    assert done.stdout.splitlines() == killed, done.stderr
    stay = {f"run-{number}" for number, stays in enumerate(KILLS.values()) if stays}
    left = _left(home)
    assert left["runs"] == left["mlflow"] == {run.name for run in fm.list()} == stay
    assert left["queue"] <= {f"{name}.json" for name in stay}
    for name in stay:
        _end(fm.get(name))


def test_of_many_with_one_name_one_is_made(checked: dict[str, Any], home: Path) -> None:
    """Nine runs in MLflow would have failed before they began."""

    def make(_: int) -> str:
        try:
            return fm.create(**checked, run_name="mine").name
        except SpecError as error:
            return error.message

    with ThreadPoolExecutor(10) as pool:
        told = list(pool.map(make, range(10)))
    assert told.count("mine") == 1 and _left(home)["mlflow"] == _left(home)["runs"] == {"mine"}
    _end(fm.get("mine"))
    others = "\n".join(text for text in told if text != "mine")
    assert "run_name: run 'mine' already exists" in others or "run 'mine' is being created right now" in others


def test_who_makes_a_run_of_that_name_is_told(checked: dict[str, Any], home: Path) -> None:
    """The caller would wait for a process that was stopped, and not know for which."""
    runs_dir().mkdir(parents=True)
    with locked(runs_dir() / ".mine.lock"):
        with pytest.raises(
            SpecError, match=rf"'mine' is being created right now.* is locked by process {os.getpid()} on"
        ):
            fm.create(**checked, run_name="mine")
        drafts.undo_left()  # leaves it alone
        assert (runs_dir() / ".mine.lock").exists()


def test_what_cannot_be_undone_now_is_undone_later(
    checked: dict[str, Any], home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A server that goes away while a run is made would have its run for ever."""

    def away(*_: object) -> None:
        raise ConnectionError("the server is away")

    with monkeypatch.context() as patch:
        patch.setattr(drafts, "delete_runs", away)
        patch.setattr(creating.launch, "submit", away)
        with pytest.raises(ConnectionError):
            fm.create(**checked, run_name="mine")
        assert "create() left of the run mine" in caplog.text and "the server is away" in caplog.text
        assert _left(home) == {"runs": {".mine.draft"}, "queue": set(), "mlflow": {"mine"}} and len(fm.list()) == 0
        with pytest.raises(SpecError, match=r"\.mine\.draft is left over from an earlier create\(\)"):
            fm.create(**checked, run_name="mine")
    drafts.undo_left()
    assert _left(home) == NOTHING


@pytest.mark.parametrize(("shared", "umask", "mode"), [(False, 0o022, 0o700), (True, 0o007, 0o770)])
def test_who_may_read_what_is_made(arguments: dict[str, Any], home: Path, shared: bool, umask: int, mode: int) -> None:
    """Any user of the machine would read training data; or, in a home that was made for a group, not even the group."""
    if shared:
        home.mkdir()
        home.chmod(0o770)
    before = os.umask(umask)
    try:
        from tundish.base.processes import ProcessId
        from tundish.launch import devices
        from tundish.plan.compute import Compute

        devices.enter("somebody", Compute(device="cpu", devices_per_node=1), ProcessId.of(os.getpid()))
        assert devices.wait_for_devices("somebody")
        run = fm.create(**arguments)
    finally:
        os.umask(before)
    assert stat.S_IMODE(home.stat().st_mode) == mode
    wrong = {
        str(path.relative_to(home)): oct(stat.S_IMODE(path.stat().st_mode))
        for path in home.rglob("*")
        if stat.S_IMODE(path.stat().st_mode) & ~0o100 != (0o677 if path.is_dir() else 0o666) & ~umask
    }
    _end(run)
    assert wrong == {}
