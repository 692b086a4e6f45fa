"""launch/command.py: the launcher gets the right processes, logs and environment."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tundish.base.run_folder import RunFolder
from tundish.launch.command import node_script, train_command, train_environment
from tundish.plan.compute import Compute

PATHS = RunFolder(Path("/runs/recorded"))
CPU = Compute(device="cpu", devices_per_node=2)
GPU = Compute(device="gpu", devices_per_node=8)


def test_the_command_starts_our_entry_on_every_device() -> None:
    """Another number of ranks would train, another file be trained, or ranks write over each other's logs."""
    command = train_command(GPU, PATHS)
    assert command[:3] == [sys.executable, "-m", "tundish.launch.composer_launcher"]
    assert command[command.index("-n") + 1] == "8"
    assert command[-3:] == ["-m", "tundish.train", "/runs/recorded/foundry.yaml"]
    for option in ("--stdout", "--stderr"):
        assert command[command.index(option) + 1] == "/runs/recorded/logs/train-rank{rank}.log"


def test_only_the_run_s_own_ranks_may_write_its_events() -> None:
    """Whoever trains a run's file once more would write into its history."""
    assert train_environment(CPU, PATHS, 8)["TUNDISH_EVENTS"] == "/runs/recorded/events.jsonl"


@pytest.mark.parametrize("compute", [CPU, GPU])
def test_every_rank_shards_by_fsdp2(compute: Compute) -> None:
    """Composer's default, FSDP1, needs CUDA and writes other checkpoints."""
    assert train_environment(compute, PATHS, 8)["FSDP_VERSION"] == "2"


@pytest.mark.parametrize(("cores", "ranks", "threads"), [(8, 2, "4"), (2, 2, "1"), (1, 4, "1"), (2, 1, "2")])
def test_ranks_on_a_cpu_share_its_cores(cores: int, ranks: int, threads: str) -> None:
    """Ranks would get one thread each on a large machine, fight for the cores, or take a GPU."""
    environment = train_environment(Compute(device="cpu", devices_per_node=ranks), PATHS, cores)
    assert (environment["OMP_NUM_THREADS"], environment["CUDA_VISIBLE_DEVICES"]) == (threads, "")


def test_ranks_on_gpus_keep_the_caller_s_devices() -> None:
    """The GPUs that the caller chose would be hidden or replaced."""
    assert not {"CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"} & set(train_environment(GPU, PATHS, 8))


@pytest.mark.parametrize("text", ["$(touch ran)", "`touch ran`", '"; touch ran; "', "a b", "$(touch ran)$x"])
def test_values_of_a_script_are_words(tmp_path: Path, text: str) -> None:
    """`--master-addr '$(…)'` ran on every host; so would a folder's name."""
    paths = RunFolder(tmp_path / text / "run")
    script = node_script(CPU, paths, rank="0", address=text, port="1")
    started = tmp_path / "started"
    # In the launcher's place, a program that writes down what it is given.
    show = f'#!/bin/sh\nfor word; do echo "$word"; done > {started}\n'
    (tmp_path / "show").write_text(show)
    (tmp_path / "show").chmod(0o755)
    paths.logs.mkdir(parents=True)
    script = script.replace(sys.executable, str(tmp_path / "show"))
    subprocess.run(["bash", "-c", script], cwd=tmp_path, check=True)
    words = started.read_text().splitlines()
    assert words[words.index("--master_addr") + 1] == text
    assert str(paths.foundry_yaml) in words and not (tmp_path / "ran").exists()


def test_the_supervisor_has_its_earlier_name_too(make_run: Callable[..., RunFolder]) -> None:
    """A job that was in the queue during an upgrade would end with `No module named …`."""
    run = make_run("one", ("COMPLETED", "Run completed."))
    command = [sys.executable, "-m", "tundish.runs.supervisor", str(run.folder), "--", "srun", "true"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "") and run.lock.exists()
    assert [event.type for event in run.read_events()] == ["COMPLETED"]


@pytest.mark.slow
def test_the_launcher_has_its_earlier_name_too() -> None:
    """So would the scripts that people have on their hosts."""
    command = [sys.executable, "-m", "tundish.launch.launcher", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "--node_rank" in done.stdout
