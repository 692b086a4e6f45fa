"""A run that is canceled in every state, on the real stack, and resumed each time; part of `make test-kill`."""

import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from tests.runs.processes import stages, supervisor

from tundish import foundation_model as fm
from tundish.base import events
from tundish.base.processes import ProcessId
from tundish.base.run_folder import RunFolder
from tundish.foundation_model import TrainingRun
from tundish.launch import devices
from tundish.plan.compute import Compute

WriteLines = Callable[[Path, Iterable[object]], Path]
pytestmark = pytest.mark.kill

MOST_SECONDS = 10.0


def test_cancel_ends_a_run_in_every_state(
    tiny_model: Path, tmp_path: Path, write_lines: WriteLines, sleeper: ProcessId
) -> None:
    """Somewhere it would take long, leave a process, lose a checkpoint, or leave a run that cannot go on."""
    pairs = [{"prompt": f"{n}: ", "response": "fox " * 20} for n in range(400)]
    data = write_lines(tmp_path / "train.jsonl", pairs)
    devices.enter("somebody", Compute(device="cpu", devices_per_node=1), sleeper)
    assert devices.wait_for_devices("somebody")
    run = fm.create(
        model=str(tiny_model), train_data_path=str(data), register_to="main.lab", task_type="INSTRUCTION_FINETUNE",
        context_length=64, training_duration="120ba", learning_rate=1e-4, validate_inputs=False,
        compute={"device": "cpu", "devices_per_node": 2},
        overrides={"global_train_batch_size": 4, "save_interval": "20ba"},
    )  # fmt: skip
    assert run.run_dir is not None
    paths, taken = RunFolder(run.run_dir), dict[str, float]()
    for state, reached in _states(paths).items():
        _wait(lambda reached=reached: reached(), run)
        kept = fm.get_checkpoints(run)
        taken[state] = _cancel(run, paths)
        assert fm.get_checkpoints(run)[: len(kept)] == kept, "checkpoints stay"
        devices.leave("somebody")
        fm.resume(run)
    done = run.wait(timeout=400)
    assert done.status.display_name == "Completed" and "version 1 of" in str(done.details), done.details
    print("\n| canceled while | seconds |\n| --- | --- |")
    print("".join(f"| {state} | {seconds:.1f} |\n" for state, seconds in taken.items()))
    assert max(taken.values()) < MOST_SECONDS, taken


def _states(paths: RunFolder) -> dict[str, Callable[[], object]]:
    """Names of states, in order, and how it is seen that the run is in them, after it was resumed that often."""

    def since_resumed() -> list[str]:
        types = [event.type for event in events.read(paths.events)]
        return types[max((i for i, type in enumerate(types) if type == "REQUEUED"), default=0) :]

    def runs(stage: str) -> bool:
        found = stages(paths)
        return any(f"tundish.supervise.stages {stage}" in " ".join(process.cmdline()) for process in found)

    return {
        "waiting in line": lambda: devices.place(paths.folder.name),
        "preparing data": lambda: runs("prepare"),
        "loading the model": lambda: "STARTED" in since_resumed() and len(stages(paths)) >= 3,
        "training": lambda: "TRAIN_UPDATED" in since_resumed(),
        "after a checkpoint": lambda: "CHECKPOINT_SAVED" in since_resumed(),
        "exporting": lambda: runs("export"),
        "registering": lambda: runs("register"),
    }


def _cancel(run: TrainingRun, paths: RunFolder) -> float:
    """Cancel, and look for what is left; the seconds that it took."""
    begun = time.monotonic()
    assert fm.cancel(run) == 1
    seconds = time.monotonic() - begun
    assert run.refresh().status.display_name == "Stopped"
    last = fm.get_events(run)[-1]
    assert (last.type, last.message) == ("CANCELED", "Canceled by user.")
    assert supervisor(paths) is None and not stages(paths)
    return seconds


def _wait(condition: Callable[[], object], run: TrainingRun, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end and not run.refresh().status.is_terminal(), run.refresh().details
        time.sleep(0.05)


@pytest.fixture
def sleeper() -> Iterable[ProcessId]:
    """A process that does nothing, and holds the devices."""
    import subprocess

    with subprocess.Popen(["sleep", "600"]) as process:
        yield ProcessId.of(process.pid)
        process.kill()
