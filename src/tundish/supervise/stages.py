"""One stage of a run in its own process: `python -m tundish.supervise.stages NAME RUN_FOLDER`.

Training is not here: the composer launcher starts it. A stage leaves its result in the run's folder, or an error with
its cause; the supervisor records the run's end.
"""

import logging
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tundish.base.progress import Progress
from tundish.base.run_folder import RunFolder
from tundish.base.text import size_text
from tundish.checkpoints.save_folder import SaveFolder, remove
from tundish.errors import CheckpointError, DataError, TundishError
from tundish.model.pretrained import check_pretrained, state_of
from tundish.plan.run_plan import RunPlan
from tundish.plan.spec import RunSpec
from tundish.supervise.causes import cause_of
from tundish.supervise.preparing import finish, planned, prepare, weights_warning
from tundish.tracking.notes import log_files
from tundish.tracking.publishing import publish_all, wait_seconds

PROGRESS_SECONDS = 2.0
"""Between two reports of how far a stage is."""


def main(stage: str, folder: str) -> int:
    """Run a stage; returns 0, or 1 if it failed for a reason that it has left in the run's folder."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stdout)
    run = RunFolder(Path(folder))
    stages = {"prepare": prepare_stage, "export": export_stage, "register": register_stage}
    try:
        run.write_result(stage, stages[stage](run))
    except TundishError as error:
        run.write_error(stage, error.message, cause_of(error))
        return 1
    return 0


def prepare_stage(run: RunFolder) -> dict[str, Any]:
    """Whatever the run's plan has not settled: its data, custom weights on this machine, and so the plan itself.

    Raises:
        DataError: the data that the run trains on has changed, and what was prepared from it no longer exists.
    """
    plan = planned(run)
    state = state_of(plan.spec.model)
    check_pretrained(plan.spec.model)  # again: the folder may have changed since create()
    # With another model, its tokenizer may be another one. Data that is still right is found again.
    same_model = state is not None and state == plan.model_state
    known = plan if same_model else plan.without_data()
    complete = prepare(known, lambda split: _progress(run, f"Preparing the {split} data: {{share:.0%}}."))
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


def export_stage(run: RunFolder) -> dict[str, Any]:
    """The Hugging Face folder of the last checkpoint.

    Raises:
        CheckpointError: there is no complete checkpoint, or it is damaged.
    """
    from tundish.export.safetensors import export

    spec, save_folder = RunSpec.read(run), run.read_tracking().save_folder
    checkpoint = SaveFolder(save_folder).newest()
    if checkpoint is None:
        raise CheckpointError(f"there is no complete checkpoint in {save_folder}.")
    if run.export.exists():  # the supervisor was killed after the export, and before its result
        remove([run.export])
    total_done, report, lock = 0, _progress(run, "Exporting the model: {share:.0%} of {size}."), threading.Lock()

    def add(count: int, total: int) -> None:
        nonlocal total_done
        with lock:  # several threads write
            total_done += count
            report(total_done, total)

    export(checkpoint, spec.model, spec.task_type, run.export, progress=add)
    return {"checkpoint": str(checkpoint), "export": str(run.export)}


def register_stage(run: RunFolder) -> dict[str, Any]:
    """The model version in MLflow, and everything else that MLflow does not have yet.

    Raises:
        StageError: MLflow does not answer, refuses, or does not make the version ready.
    """
    from tundish.export.registry import register

    spec, tracking = RunSpec.read(run), run.read_tracking()
    run.write_doing("Sending metrics and checkpoints to MLflow.")
    publish_all(run, wait_seconds())
    size = sum(file.stat().st_size for file in run.export.rglob("*") if file.is_file())
    # MLflow reports no progress of an upload.
    begun = f"{datetime.now(UTC):%H:%M} UTC"
    run.write_doing(f"Registering {spec.registered_name}: copying {size_text(size)} since {begun}.")
    name, version = register(
        run.export,
        spec,
        mlflow_run_id=tracking.run_id,
        tracking_uri=tracking.tracking_uri,
        registry_uri=tracking.registry_uri or tracking.tracking_uri,
        model_path=tracking.model_path,
    )
    log_files(run)
    return {"name": name, "version": version}


def _progress(run: RunFolder, text: str) -> Progress:
    """Shows in the run how far a stage is: `text` with `share` and, for bytes, `size`."""
    shown = 0.0

    def report(done: int, total: int | None) -> None:
        nonlocal shown
        if total and time.monotonic() - shown > PROGRESS_SECONDS:
            shown = time.monotonic()
            run.write_doing(text.format(share=done / total, size=size_text(total)))

    return report


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2]))
