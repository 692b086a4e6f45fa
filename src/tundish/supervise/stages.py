"""One stage of a run in its own process: `python -m tundish.supervise.stages NAME RUN_FOLDER`.

Training is not here: the composer launcher starts it. A stage writes its event after its deed, and its result, or the
sentence that says why it failed, into the run folder.
"""

import logging
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tundish.base import events
from tundish.base.files import locked, write_atomic
from tundish.base.mlflow_client import impatient
from tundish.base.run_folder import RunFolder, Tracking
from tundish.base.text import size_text
from tundish.checkpoints.save_folder import SaveFolder, remove
from tundish.errors import CheckpointError, DataError, TundishError
from tundish.model.pretrained import check_pretrained, state_of
from tundish.plan.run_plan import RunPlan
from tundish.plan.spec import RunSpec
from tundish.supervise.causes import cause_of
from tundish.supervise.preparing import finish, planned, prepare, weights_warning
from tundish.tracking.experiment import end_tracking
from tundish.tracking.notes import tell_files
from tundish.tracking.publishing import Checkpoints, Publisher, channels, publish_all, wait_seconds

TOLD_SECONDS = 2.0
"""Between two words on how far a stage is."""


def main(stage: str, folder: str) -> int:
    """Run a stage; 0 = done, 1 = failed for a reason that the result file gives."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stdout)
    paths = RunFolder(Path(folder))
    if stage.startswith("close-"):
        _close(paths, stage.removeprefix("close-"))
        return 0
    if stage == "canceled":
        return _canceled(paths)
    try:
        if stage == "prepare":
            result = prepare_stage(paths)
        else:
            rest = {"export": export_stage, "register": register_stage}
            result = rest[stage](paths, RunSpec.read(paths), paths.read_tracking())
    except TundishError as error:
        paths.write_error(stage, error.message, cause_of(error))
        return 1
    paths.write_result(stage, result)
    return 0


def _canceled(paths: RunFolder) -> int:
    """Close the MLflow run of a canceled run, unless that goes on again by now."""
    with locked(paths.folder):
        if paths.read_events()[-1].type in events.TERMINAL_TYPES:
            _close(paths, "KILLED")
    return 0


def _close(paths: RunFolder, status: str) -> None:
    """Send what points MLflow does not have yet, if it can be reached, and close its run; checkpoints may take long."""
    with impatient(seconds=5, retries=0):
        Publisher([way for way in channels(paths) if not isinstance(way, Checkpoints)], None).attempt()
        end_tracking(paths.read_tracking(), status)
    tell_files(paths)


def prepare_stage(run: RunFolder) -> dict[str, Any]:
    """What the run's plan leaves to be prepared: data, custom weights on this machine, and so the plan itself.

    Raises:
        DataError: the data that the run trains on has changed, and what was prepared from it no longer exists.
    """
    plan = planned(run)
    state = state_of(plan.spec.model)
    check_pretrained(plan.spec.model)  # once more: the folder may have changed since
    complete = prepare(plan, lambda split: _teller(run, f"Preparing the {split} data: {{share:.0%}}."))
    if any(event.type == "TRAIN_STARTED" for event in run.read_events()):
        _check_same_data(plan, complete)
    return finish(run, complete.completed(model_state=state), weights_warning(complete))


def _check_same_data(before: RunPlan, after: RunPlan) -> None:
    """Make sure that training that has begun continues with the data that it began with."""
    for split, part in before.data.items():
        now = after.data[split].prepared
        if part.prepared is not None and now is not None and part.prepared.digest != now.digest:
            raise DataError(
                f"{split}_data_path: {part.address}: has changed since the run began to train, and what was prepared "
                "from it then no longer exists. Restore the data, or create a new run."
            )


def _teller(paths: RunFolder, text: str) -> Callable[[int, int | None], None]:
    """Shows people who look at the run how far a stage is: `text` with `share` and, for bytes, `size`."""
    told = 0.0

    def tell(done: int, total: int | None) -> None:
        nonlocal told
        if total and time.monotonic() - told > TOLD_SECONDS:
            told = time.monotonic()
            _say(paths, text.format(share=done / total, size=size_text(total)))

    return tell


def _say(paths: RunFolder, text: str) -> None:
    if paths.scratch.is_dir():  # a supervisor runs the stage
        write_atomic(paths.doing, text)


def export_stage(paths: RunFolder, spec: RunSpec, tracking: Tracking) -> dict[str, Any]:
    """The Hugging Face folder of the last checkpoint."""
    from tundish.export.safetensors import export

    checkpoint = SaveFolder(tracking.save_folder).newest()
    if checkpoint is None:
        raise CheckpointError(f"there is no complete checkpoint in {tracking.save_folder}.")
    if paths.export.exists():  # of a run whose supervisor was killed right after it
        remove([paths.export])
    done, tell, lock = 0, _teller(paths, "Exporting the model: {share:.0%} of {size}."), threading.Lock()

    def written(count: int, total: int) -> None:
        nonlocal done
        with lock:  # several threads write
            done += count
            tell(done, total)

    export(checkpoint, spec.model, spec.task_type, paths.export, progress=written)
    return {"checkpoint": str(checkpoint), "export": str(paths.export)}


def register_stage(paths: RunFolder, spec: RunSpec, tracking: Tracking) -> dict[str, Any]:
    """The model version in MLflow."""
    from tundish.export.registry import register

    write_atomic(paths.doing, "Sending MLflow what it does not have yet.")
    publish_all(paths, wait_seconds())
    size = sum(file.stat().st_size for file in paths.export.rglob("*") if file.is_file())
    begun = f"{datetime.now(UTC):%H:%M} UTC"
    _say(paths, f"Registering {spec.registered_name}: copying {size_text(size)} since {begun}.")
    name, version = register(
        paths.export,
        spec,
        mlflow_run_id=tracking.run_id,
        tracking_uri=tracking.tracking_uri,
        registry_uri=tracking.registry_uri or tracking.tracking_uri,
        model_path=tracking.model_path,
    )
    tell_files(paths)
    return {"name": name, "version": version}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2]))
