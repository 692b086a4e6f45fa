"""doctor: each judgement by itself, and the command on a machine whose servers hang."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tundish.base.files import obstacle_to_writing
from tundish.cli import main
from tundish.doctor import CHECKS, examine
from tundish.doctor.finding import Finding
from tundish.doctor.machine import (
    GIB,
    judge_devices,
    judge_driver,
    judge_home,
    judge_open_files,
    judge_shared_memory,
)
from tundish.doctor.packages import TorchBuild, judge_flash_attention, judge_packages, judge_torch, torch_build
from tundish.doctor.services import judge_hub
from tundish.launch import slurm
from tundish.plan.compute import Compute, Gpu

Capture = pytest.CaptureFixture[str]
NVIDIA_SMI = "| NVIDIA-SMI 550.54   Driver Version: 550.54.15   CUDA Version: {} |"
H100 = Gpu("NVIDIA H100", 80.0, 0.5)


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that accepts connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of this machine's PATH, proxies and user is seen: no Slurm, no driver, no token."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("DATABRICKS_HOST", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def _by_check(capsys: Capture) -> dict[str, dict[str, str]]:
    return {finding["check"]: finding for finding in json.loads(capsys.readouterr().out)}


def test_a_machine_where_all_is_well_is_told_in_one_line_a_check(
    home: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report would not come, lines would not align, or a good machine end a script; looking would make folders."""
    monkeypatch.setattr("tundish.doctor.machine.LEAST_DISK", 0)  # the tests' disk may be small
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[4:19].strip() for line in lines] == list(CHECKS)
    assert {line[:4] for line in lines} == {"OK  ", "--  "}
    assert lines[0].startswith("OK  devices") and " CPU cores, " in lines[0]
    assert any(line.startswith("--  model hub") and "HF_HUB_OFFLINE is set" in line for line in lines)
    assert not home.exists()


def test_a_terminal_shows_the_same(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """The report would be empty where people read it, or brackets in it be taken for colours."""
    monkeypatch.setattr("tundish.cli.machine.examine", lambda: [Finding("MLflow", "problem", "at [red]x", "Look.")])
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("TERM", "dumb")
    assert main(["doctor"]) == 1
    assert capsys.readouterr().out.split() == ["!!", "MLflow", "at", "[red]x.", "Look."]


def test_a_server_that_hangs_is_named_in_time(
    silent_port: int, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command would hang with the server, or say nothing of it; the password would stand in the log of a job."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:geheim@127.0.0.1:{silent_port}")
    assert main(["doctor", "--json"]) == 1
    out = capsys.readouterr().out
    assert "geheim" not in out and "me:" not in out
    (finding,) = [one for one in json.loads(out) if one["check"] == "MLflow"]
    assert finding["state"] == "problem" and "MLFLOW_TRACKING_URI" in finding["advice"]
    assert finding["found"] == f"http://***@127.0.0.1:{silent_port}: it timed out"


def test_a_home_that_cannot_be_written_is_a_problem(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first run would fail with the operating system's words."""
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("TUNDISH_HOME", str(tmp_path / "file" / "home"))
    assert main(["doctor", "--json"]) == 1
    found = _by_check(capsys)
    for check in ("TUNDISH_HOME", "MLflow"):
        assert found[check]["state"] == "problem" and "Not a directory" in found[check]["found"]
        assert "Set TUNDISH_HOME" in found[check]["advice"]


def test_a_check_that_fails_or_hangs_costs_one_line() -> None:
    """One broken driver would hide what the other checks found, behind a traceback or for ever."""

    def fails() -> Finding:
        raise RuntimeError("cannot log in at http://me:geheim@host/")

    def hangs() -> Finding:
        threading.Event().wait()
        raise AssertionError

    checks: dict[str, Callable[[], Finding]] = {
        "fails": fails,
        "hangs": hangs,
        "works": lambda: Finding("works", "ok", "fine"),
    }
    failed, hung, works = examine(checks, seconds=2)
    assert failed.found == "the check failed (RuntimeError: cannot log in at http://***@host/)"
    assert (failed.state, hung.state, hung.found) == ("problem", "problem", "no answer within 2 s")
    assert works == Finding("works", "ok", "fine")


def test_devices_are_counted_with_their_memory() -> None:
    """The user would not learn why a run sees fewer GPUs than there are, or that they are full."""
    memory = (8, 64 * GIB, 32 * GIB)
    assert judge_devices(0, [], *memory).found == (
        "no GPU, runs train on the CPU: 8 CPU cores, 64.0 GiB of memory (32.0 available)"
    )
    assert "CUDA_VISIBLE_DEVICES hides all 1" in judge_devices(0, [H100], *memory).found
    assert judge_devices(2, [H100] * 2, *memory).found.startswith("2 x NVIDIA H100 of 80 GiB; 8 CPU")
    some = judge_devices(1, [H100, Gpu("NVIDIA H100", 80.0, 70.2)], *memory)
    assert "(1 of them usable)" in some.found and "GPU 1: 70 GiB" in some.advice
    assert judge_devices(2, [], *memory).found.startswith("2 GPUs, memory unknown")


@pytest.mark.parametrize(
    ("told", "cuda", "usable", "state", "part"),
    [
        (None, "12.6", 0, "absent", "a CPU needs none"),
        (None, "12.6", 2, "problem", "2 GPUs, but no nvidia-smi"),
        (NVIDIA_SMI.format("12.6"), "12.6", 1, "ok", "550.54.15, supports CUDA up to 12.6"),
        (NVIDIA_SMI.format("13.0"), "12.6", 1, "ok", "13.0"),
        (NVIDIA_SMI.format("12.10"), "12.6", 1, "ok", "12.10"),
        (NVIDIA_SMI.format("12.4"), "12.6", 1, "ok", "torch is built for CUDA 12.6"),
        (NVIDIA_SMI.format("11.8"), "12.6", 1, "problem", "torch is built for CUDA 12.6"),
        (NVIDIA_SMI.format("11.8"), None, 1, "ok", "11.8"),
        ("Failed to initialize NVML:\n version mismatch\n", "12.6", 1, "problem", "NVML: version mismatch"),
        ("", "12.6", 1, "problem", "prints: nothing"),
    ],
)
def test_a_driver_must_run_what_torch_is_built_for(
    told: str | None, cuda: str | None, usable: int, state: str, part: str
) -> None:
    """A run would end after its data is prepared: the driver is too old, or broken."""
    finding = judge_driver(told, cuda, usable)
    assert finding.state == state and part in finding.found
    assert state != "problem" or finding.advice


@pytest.mark.parametrize(
    ("size", "usable", "state"),
    [(64 << 20, 8, "problem"), (GIB, 8, "ok"), (64 << 20, 0, "ok"), (0, 0, "ok"), (0, 1, "problem")],
)
def test_shared_memory_must_be_enough_for_gpus(size: int, usable: int, state: str) -> None:
    """In a container's 64 MiB, ranks die of bus errors; a processor's run be told to mend what it does not use."""
    finding = judge_shared_memory(size, usable)
    assert finding.state == state and ("--shm-size" in finding.advice) == (state == "problem")


@pytest.mark.parametrize(
    ("free", "obstacle", "state", "part"),
    [
        (100 * GIB, "", "ok", "/h, 100.0 GiB free"),
        (9 * GIB, "", "problem", "/h, 9.0 GiB free"),
        (5 << 20, "", "problem", "/h, 5 MiB free"),
        (0, "/: Read-only file system", "problem", "cannot be written (/: Read-only"),
    ],
)
def test_a_home_needs_room(free: int, obstacle: str, state: str, part: str) -> None:
    """A run would end at its first checkpoint."""
    finding = judge_home(Path("/h"), free, obstacle)
    assert finding.state == state and part in finding.found
    assert state == "ok" or "set TUNDISH_HOME" in finding.advice.replace("Set", "set")


def test_writing_is_tried_where_the_folder_would_be_made(tmp_path: Path) -> None:
    """A home that is not there yet would be called unwritable, or be made."""
    assert obstacle_to_writing(tmp_path / "a" / "b") == "" and list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("x")
    assert obstacle_to_writing(tmp_path / "file" / "b") == f"{tmp_path / 'file'}: Not a directory"


@pytest.mark.parametrize(("limit", "state", "advised"), [(256, "problem", 1), (1024, "ok", 1), (20_000, "ok", 0)])
def test_few_open_files_are_told(limit: int, state: str, advised: int) -> None:
    """Reading many shards would fail with 'too many open files'."""
    finding = judge_open_files(limit)
    assert finding.state == state and ("ulimit -n 65536" in finding.advice) == bool(advised)


def test_torch_is_read_without_being_imported() -> None:
    """The report would take as long as a training to begin, or tell another version than is there."""
    import importlib.metadata

    build = torch_build()
    assert build.version is not None and build.version.startswith(importlib.metadata.version("torch").split("+")[0])
    assert judge_torch(build, 0).state == "ok"


def test_torch_must_fit_the_devices() -> None:
    """A run on GPUs would find none of them."""
    assert judge_torch(TorchBuild(None), 0).state == "problem"
    without = judge_torch(TorchBuild("2.7.0+cpu"), 2)
    assert without.state == "problem" and "2.7.0+cpu, built without CUDA, on a machine with 2 GPUs" in without.found
    assert judge_torch(TorchBuild("2.7.0+cpu"), 0) == Finding("torch", "ok", "2.7.0+cpu, built without CUDA")
    assert judge_torch(TorchBuild("2.7.0", "12.6"), 2) == Finding("torch", "ok", "2.7.0, built for CUDA 12.6")


def test_flash_attention_is_advised_where_it_helps() -> None:
    """Everybody would be told to install what a processor cannot use, or nobody."""
    assert judge_flash_attention("2.8.1", 1) == Finding("flash-attn", "ok", "2.8.1")
    assert "pip install" in judge_flash_attention(None, 1).advice
    assert judge_flash_attention(None, 0).advice == ""
    assert {judge_flash_attention(None, usable).state for usable in (0, 1)} == {"absent"}


def test_versions_outside_the_requirements_are_named() -> None:
    """A package that was updated by another one would show itself as a traceback in the middle of a run."""
    required = ["torch<2.7.1,>=2.7", "mlflow<2.23,>=2.22", "rich<15,>=13"]
    good = {"torch": "2.7.0+cu126", "mlflow": "2.22.5", "rich": "14.0"}
    assert judge_packages(required, good) == Finding("packages", "ok", "torch 2.7.0+cu126, mlflow 2.22.5")
    bad = judge_packages(required, good | {"mlflow": "3.1.0", "rich": None})
    assert bad.state == "problem" and "make install" in bad.advice
    assert "mlflow 3.1.0 (<2.23,>=2.22), rich is not installed (<15,>=13)" in bad.found and "torch" not in bad.found


def test_the_hub_may_be_switched_off_and_wants_a_token() -> None:
    """A machine that is offline on purpose would be called ill, or a missing token be found in the middle of a run."""
    off = judge_hub("https://hub", "", offline="HF_HUB_OFFLINE is set", token=False)
    assert off.state == "absent" and "HF_HUB_OFFLINE is set" in off.found
    away = judge_hub("https://hub", "no connection", offline="", token=True)
    assert away.state == "problem" and "HF_HUB_OFFLINE=1" in away.advice
    assert "HF_TOKEN" in judge_hub("https://hub", "", offline="", token=False).advice
    assert judge_hub("https://hub", "", offline="", token=True) == Finding(
        "model hub", "ok", "https://hub answers; a token is set"
    )


def _command(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize(
    ("rows", "complaint", "state", "part"),
    [
        (
            "gpu|4|idle\ngpu|1|down*\ncpu|2|mixed\n",
            "",
            "ok",
            "slurm 23.11, nodes of gpu: 4 idle, 1 down*; cpu: 2 mixed",
        ),
        ("gpu|4|down*\n", "", "problem", "gpu: 4 down*"),
        ("", "", "problem", "no partition"),
        ("", "sinfo: fatal: Could not establish a configuration source", "absent", "no cluster is configured"),
        ("", "sinfo: error: Unable to contact\n slurm controller", "problem", "Unable to contact slurm controller"),
    ],
)
def test_slurm_is_reported_in_brief(tmp_path: Path, rows: str, complaint: str, state: str, part: str) -> None:
    """A cluster without a usable node would look like a good one; a machine without Slurm like a broken one."""
    (tmp_path / "rows").write_text(rows)
    (tmp_path / "complaint").write_text(complaint)
    answer = f'while read line; do echo "$line"; done < {tmp_path}/rows'
    if complaint:
        answer = f'while read line; do echo "$line" >&2; done < {tmp_path}/complaint; echo "$line" >&2; exit 1'
    _command(tmp_path, "sinfo", f'if [ "$1" = --version ]; then echo slurm 23.11; else {answer}; fi')
    _command(tmp_path, "sbatch", "exit 1")
    health = slurm.health()
    assert health.state == state and part in health.text and bool(health.advice) == (state == "problem")


def test_a_machine_that_submits_no_jobs_is_told_as_create_does(tmp_path: Path) -> None:
    """The report would call the launcher usable, and `create()` refuse it."""
    _command(tmp_path, "sinfo", 'if [ "$1" = --version ]; then echo slurm 23.11; else echo "gpu|4|idle"; fi')
    (problem,) = slurm.problems(Compute(device="cpu", devices_per_node=1, launcher="slurm"))
    health = slurm.health()
    assert health.state == "problem" and slurm.NO_SBATCH in health.text and slurm.NO_SBATCH in problem


def test_the_machine_s_own_tools_are_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What nvidia-smi and sinfo print would be misread."""
    for module in ("machine", "packages"):
        monkeypatch.setattr(f"tundish.doctor.{module}.count_gpus", lambda: 2)
    asked = '[ "$*" = "--query-gpu=name,memory.total,memory.used --format=csv,noheader,nounits" ]'
    rows = "echo 'NVIDIA H100 80GB HBM3, 81559, 4'; echo 'NVIDIA H100 80GB HBM3, 81559, 70000'"
    banner = NVIDIA_SMI.format("12.4")
    _command(tmp_path, "nvidia-smi", f"if {asked}; then {rows}; else echo '{banner}'; fi")
    listed = "printf 'gpu|2|idle\\ngpu|1|allocated\\n'"
    _command(tmp_path, "sinfo", f'if [ "$1" = --version ]; then echo slurm 23.11.4; else {listed}; fi')
    _command(tmp_path, "sbatch", "exit 1")
    found = {finding.check: finding for finding in examine()}
    assert found["devices"].found.startswith("2 x NVIDIA H100 80GB HBM3 of 80 GiB; ")
    assert "GPU 1: 68 GiB" in found["devices"].advice
    assert found["NVIDIA driver"].found.startswith("550.54.15, supports CUDA up to 12.4")
    assert found["Slurm"] == Finding("Slurm", "ok", "slurm 23.11.4, nodes of gpu: 2 idle, 1 allocated")


def test_tools_that_fail_are_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that was updated without a restart would look like a machine without GPUs."""
    monkeypatch.setattr("tundish.doctor.machine.count_gpus", lambda: 2)
    _command(tmp_path, "nvidia-smi", "echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18")
    _command(tmp_path, "sinfo", "echo 'slurm_load_partitions: Unable to contact slurm controller' >&2; exit 1")
    found = {finding.check: finding for finding in examine()}
    assert found["devices"].found.startswith("2 GPUs, memory unknown")
    assert found["NVIDIA driver"].state == "problem" and "version mismatch" in found["NVIDIA driver"].found
    assert found["Slurm"].state == "problem" and "Unable to contact slurm controller" in found["Slurm"].found
