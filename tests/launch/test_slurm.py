"""launch/slurm.py: a run as a job: what is submitted, what its state means, how it ends.

Here with Slurm's commands replaced at the edge; `make test-slurm` is the same with a real Slurm.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.launch.fake_slurm import install

from tundish import foundation_model as fm
from tundish import launch
from tundish.base import events
from tundish.base.run_folder import RunFolder
from tundish.errors import SpecError
from tundish.launch import slurm
from tundish.launch.job_script import job_script
from tundish.plan.compute import Compute
from tundish.runs.reading import wait

pytestmark = pytest.mark.slow

MakeRun = Callable[..., RunFolder]
RECORDED = Path(__file__).parent / "job.sbatch"
GPUS = Compute(device="gpu", nodes=2, devices_per_node=4, launcher="slurm", time_limit="12:00:00",
               sbatch={"partition": "gpu", "account": "lab"})  # fmt: skip
ONE = Compute(device="cpu", devices_per_node=1, launcher="slurm")


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Slurm's commands on PATH; gives the folder that tells them what to say."""
    install(tmp_path / "slurm bin")
    (tmp_path / "slurm").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'slurm bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(tmp_path / "slurm"))
    monkeypatch.setattr(slurm, "PASSED_ON", __import__("re").compile(slurm.PASSED_ON.pattern + "|FAKE_SLURM"))
    monkeypatch.setattr(slurm, "FRESH_SECONDS", 1e-9)
    yield tmp_path / "slurm"


@pytest.fixture
def submitted(make_run: MakeRun, cluster: Path) -> Callable[..., RunFolder]:
    """Submits a run: `submitted(name, *events)`."""

    def submit(name: str, *happened: tuple[str, str]) -> RunFolder:
        paths = make_run(name, *(happened or (("CREATED", "waits"),)), compute={"launcher": "slurm", "device": "cpu",
                                                                                "devices_per_node": 1})  # fmt: skip
        paths.logs.mkdir()
        launch.submit(paths, ONE)
        return paths

    return submit


@pytest.mark.parametrize("name", ["GCS_KEY", "GCS_SECRET", "MOSAICML_STREAMING_AWS_REQUESTER_PAYS", "OCI_CONFIG_FILE"])
def test_the_variables_of_stores_are_passed_on(name: str) -> None:
    """What `create()` has checked could not be read by the job."""
    assert slurm.PASSED_ON.fullmatch(name)


def test_the_script_is_as_recorded() -> None:
    """Each option is there for a reason, and a change of the script is a decision."""
    text = job_script(GPUS, RunFolder(Path("/shared/runs/recorded"))).replace(sys.executable, "python")
    if os.environ.get("TUNDISH_RECORD"):
        RECORDED.write_text(text)
    assert text == RECORDED.read_text()


@pytest.mark.parametrize("folder", ["/shared/runs/a", '/shared/it\'s "here" 100%/a'])
def test_the_script_is_one_that_bash_understands(folder: str) -> None:
    """A folder's name would end a string, or a command begin in it."""
    text = job_script(GPUS, RunFolder(Path(folder)))
    assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True).stderr == ""


def test_a_job_takes_whole_nodes_unless_told() -> None:
    """Slurm gives a task one core: eight ranks of a node would share it."""
    options = [line for line in job_script(GPUS, RunFolder(Path("/r/a"))).splitlines() if line.startswith("#SBATCH")]
    assert "#SBATCH --exclusive" in options and "#SBATCH --mem=0" in options
    shared = Compute(device="cpu", devices_per_node=1, launcher="slurm", sbatch={"cpus-per-task": "8"})
    text = job_script(shared, RunFolder(Path("/r/a")))
    assert "--exclusive" not in text and "#SBATCH --cpus-per-task=8" in text and "gpus-per-node" not in text


def test_a_job_goes_through_the_stages_that_are_left(make_run: MakeRun, cluster: Path) -> None:
    """Nothing would run, or outside of the job; here all stages were done before."""
    compute = {"launcher": "slurm", "device": "cpu", "devices_per_node": 1}
    paths = make_run("ift-1", ("CREATED", "waits"), compute=compute)
    paths.logs.mkdir()
    for stage in ("prepare", "train", "export", "register"):
        paths.result(stage).write_text('{"name": "main.lab.x", "version": "7"}')
    launch.submit(paths, ONE)
    run = wait("ift-1", 60)
    assert run.status.display_name == "Completed"
    assert run.details == "Run completed. Registered as version 7 of main.lab.x."
    assert json.loads(paths.supervisor.read_text()) == {"launcher": "slurm", "job": "1"}
    assert (cluster / "1.json").exists()


def test_secrets_reach_the_job_and_no_file(
    submitted: Callable[..., RunFolder], cluster: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token in a script is a token in every backup of the cluster's disk; without it, gated models cannot be read."""
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    monkeypatch.setenv("SOMEBODY_ELSES_TOKEN", "not for the job")
    paths = submitted("ift-1")
    given = json.loads((cluster / "1.environment").read_text())
    assert given["HF_TOKEN"] == "hf_verysecret" and "SOMEBODY_ELSES_TOKEN" not in given
    wait("ift-1", 60)
    texts = [file.read_bytes() for file in paths.folder.rglob("*") if file.is_file()]
    assert len(texts) > 4 and not any(b"hf_verysecret" in text for text in texts)


def test_what_sbatch_refuses_is_told(submitted: Callable[..., RunFolder], cluster: Path) -> None:
    """A traceback of subprocess, or a run that waits for a job that does not exist."""
    (cluster / "refuse").write_text("sbatch: error: invalid partition specified: gpux")
    with pytest.raises(SpecError, match=r"^compute: sbatch failed: sbatch: error: invalid partition.* Correct compute"):
        submitted("ift-1")


def test_a_job_that_waits_is_queued_and_can_be_canceled(submitted: Callable[..., RunFolder], cluster: Path) -> None:
    """The user would not know what the run waits for, or it would start after it was canceled."""
    (cluster / "pending").touch()
    submitted("ift-1")
    run = fm.get("ift-1")
    assert (run.status.display_name, run.details) == ("Queued", "Slurm job 1 is pending: Resources.")
    assert fm.cancel("ift-1") == 1
    assert fm.get("ift-1").status.display_name == "Stopped"
    assert (cluster / "states" / "1").read_text().startswith("CANCELLED")


def test_a_job_that_runs_is_canceled_with_its_stage(submitted: Callable[..., RunFolder]) -> None:
    """The job would hold its nodes for days."""
    paths = submitted("ift-1")
    end = time.monotonic() + 60
    while events.read(paths.events)[-1].type != "STARTED" and time.monotonic() < end:
        time.sleep(0.05)
    assert fm.cancel("ift-1") == 1
    assert fm.get_events("ift-1")[-1].type == "CANCELED"
    assert not launch.state(paths).alive  # pyright: ignore[reportOptionalMemberAccess]


@pytest.mark.parametrize(
    ("state", "status", "cause", "words"),
    [
        ("RUNNING|None", "Running", None, "go"),
        ("COMPLETING|None", "Running", None, "go"),
        ("SUSPENDED|None", "Running", None, "go"),
        ("PENDING|Priority", "Queued", None, "Slurm job 1 is pending: Priority."),
        ("CANCELLED|None", "Stopped", None, "Slurm ended job 1: CANCELLED"),
        ("TIMEOUT|TimeLimit", "Failed", "TIME_LIMIT", "Raise compute's time_limit"),
        ("OUT_OF_MEMORY|None", "Failed", "HOST_OUT_OF_MEMORY", "ask for more with sbatch's mem"),
        ("NODE_FAIL|None", "Failed", "NODE_LOST", "A node was lost. `tundish resume` continues it."),
        ("BOOT_FAIL|None", "Failed", "NODE_LOST", "BOOT_FAIL"),
        ("COMPLETED|None", "Failed", "UNKNOWN", "Slurm ended job 1: COMPLETED"),
    ],
)
def test_the_status_is_what_slurm_says(
    submitted: Callable[..., RunFolder], cluster: Path, state: str, status: str, cause: str | None, words: str
) -> None:
    """A run that a cluster has ended would be RUNNING for ever; one that waits, FAILED."""
    (cluster / "pending").touch()
    submitted("ift-1", ("TRAIN_STARTED", "go"))
    (cluster / "states").mkdir()
    (cluster / "states" / "1").write_text(state)
    run = fm.get("ift-1")
    assert run.status.display_name == status and words in (run.details or "")
    assert run.cause == cause


def test_a_controller_that_is_away_fails_no_run(submitted: Callable[..., RunFolder], cluster: Path) -> None:
    """Whoever looks in that minute would resume runs that go on."""
    (cluster / "pending").touch()
    submitted("ift-1", ("TRAIN_STARTED", "go"))
    (cluster / "down").touch()
    run = fm.get("ift-1")
    assert run.status.display_name == "Running" and "Unable to contact slurm controller" in (run.details or "")


def test_a_job_that_nobody_remembers_has_failed(submitted: Callable[..., RunFolder], cluster: Path) -> None:
    """Slurm without accounting forgets a job after minutes; the run would be RUNNING for ever."""
    (cluster / "pending").touch()
    submitted("ift-1", ("TRAIN_STARTED", "go"))
    (cluster / "gone").touch()
    run = fm.get("ift-1")
    assert run.status.display_name == "Failed" and "no longer knows job 1" in (run.details or "")


def test_one_question_serves_all_runs(
    submitted: Callable[..., RunFolder], cluster: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A list of a hundred runs would ask a cluster's controller a hundred times, and be throttled by it."""
    (cluster / "pending").touch()
    for number in range(5):
        submitted(f"ift-{number}")
    monkeypatch.setattr(slurm, "FRESH_SECONDS", 3600)
    monkeypatch.setattr(slurm, "_latest", (-3600.0, {}))
    (cluster / "questions").unlink(missing_ok=True)
    assert len(fm.list(statuses=["QUEUED"])) == 5
    assert len((cluster / "questions").read_text().splitlines()) <= 2


def test_a_job_that_was_submitted_a_moment_ago_is_known(
    submitted: Callable[..., RunFolder], cluster: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer from before it would call it lost: who waits for a run just resumed is told that it failed."""
    (cluster / "pending").touch()
    submitted("ift-1")
    monkeypatch.setattr(slurm, "FRESH_SECONDS", 3600)
    assert fm.get("ift-1").status.display_name == "Queued"
    submitted("ift-2")
    assert fm.get("ift-2").status.display_name == "Queued"


def test_a_number_that_another_job_has_by_now_is_not_ours(submitted: Callable[..., RunFolder], cluster: Path) -> None:
    """Canceling an old run would kill a stranger's job: numbers begin anew when a cluster's state is lost."""
    (cluster / "pending").touch()
    submitted("ift-1", ("TRAIN_STARTED", "go"))
    (cluster / "1.name").write_text("somebody-else")
    assert fm.get("ift-1").status.display_name == "Failed"
    assert fm.cancel("ift-1") == 0
    assert not (cluster / "states").exists()


def test_a_job_that_nobody_noted_is_found(submitted: Callable[..., RunFolder], cluster: Path) -> None:
    """Whoever submits may be killed before the job's number is kept: resuming would submit it once more."""
    (cluster / "pending").touch()
    paths = submitted("ift-1")
    paths.supervisor.unlink()
    assert fm.get("ift-1").status.display_name == "Queued"
    assert json.loads(paths.supervisor.read_text())["job"] == "1"
    paths.supervisor.unlink()
    launch.submit(paths, ONE)
    assert json.loads(paths.supervisor.read_text())["job"] == "1" and not (cluster / "2.json").exists()


def test_the_job_is_not_changed_by_a_job_around_it(
    submitted: Callable[..., RunFolder], cluster: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a notebook inside of an allocation, the job would get that one's settings."""
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "100")
    monkeypatch.setenv("SBATCH_NO_REQUEUE", "1")
    submitted("ift-1")
    given = json.loads((cluster / "1.sbatch").read_text())
    assert "SLURM_MEM_PER_CPU" not in given and "SBATCH_NO_REQUEUE" not in given and "PATH" in given
    wait("ift-1", 60)


def test_without_slurm_a_run_for_it_is_refused(arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A FileNotFoundError, after the data was prepared."""
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SpecError, match="launcher 'slurm': there is no sbatch on this machine's PATH"):
        fm.create(**arguments, compute={"launcher": "slurm", "devices_per_node": 1, "device": "cpu"})
