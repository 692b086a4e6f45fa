"""`create()`: plan a run and check it, reserve its name, write its folder, start its supervisor."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from tundish import __version__, launch
from tundish.base import events
from tundish.base.files import write_atomic
from tundish.base.processes import interrupt_waits
from tundish.checkpoints.folder import list_checkpoints
from tundish.checkpoints.save_folder import SaveFolder
from tundish.errors import CheckpointError, Interrupted, SpecError
from tundish.plan.overrides import save_root
from tundish.plan.run_plan import RunPlan
from tundish.runs import drafts
from tundish.runs.checking import BarOf, no_bar
from tundish.runs.planning import check
from tundish.runs.reading import read_run
from tundish.runs.records import RunRecord
from tundish.tracking.experiment import MARK, check_registry, open_tracking
from tundish.tracking.notes import log_arguments


def create(arguments: Mapping[str, Any], progress: BarOf = no_bar) -> RunRecord:
    """Accept a run.

    Raises:
        SpecError, DataError: with all problems of the call; nothing is left behind.
    """
    plan = check(arguments, progress)
    check_registry(plan.spec.registered_name, plan.stores)
    _check_save_folder(plan)
    drafts.undo_left()
    with drafts.reserved(plan.spec.run_name) as draft:
        draft.make()
        _write(plan, draft)
        with interrupt_waits(Interrupted(plan.spec.run_name)):
            draft.publish()
            launch.submit(draft.published, plan.spec.compute)
            draft.started = True
    return read_run(plan.spec.run_name)


def _check_save_folder(plan: RunPlan) -> None:
    """Make sure that a root of the caller's choice holds no other run of that name: training would continue from it.

    Raises:
        SpecError: it does, or its store does not answer.
    """
    if save_root(plan.spec.overrides) is None:
        return
    folder = SaveFolder(plan.save_folder)
    try:
        checkpoints = [*folder.list(), *map(str, list_checkpoints(folder.local))]
    except CheckpointError as error:
        raise SpecError(f"overrides: save_folder: {error.message}") from error
    if checkpoints:
        raise SpecError(
            f"overrides: save_folder: {checkpoints[0]}: another run of the name {plan.spec.run_name!r} has saved "
            "there. Choose another run_name or save_folder, or remove what is there."
        )


def _write(plan: RunPlan, draft: drafts.Draft) -> None:
    """Make the run's MLflow run and the files of its folder."""
    spec, run = plan.spec, draft.run
    run.result("tracking").parent.mkdir()
    run.logs.mkdir()
    tags = {"tundish.version": __version__, "tundish.run": spec.run_name, "mlflow.user": spec.created_by}
    tags |= {MARK: draft.mark}
    on_answer = partial(draft.note_mlflow, plan.tracking_uri, spec.experiment_path)
    root = save_root(spec.overrides)
    tracking = open_tracking(spec.run_name, spec.experiment_path, tags, root, on_answer, stores=plan.stores)
    tracking.write(run)
    log_arguments(tracking, spec)
    events.append(run.events, "CREATED", "Run created. It waits to be scheduled.")
    plan.completed(save_folder=tracking.save_folder).write(run)
    # Last: a folder without it is not a run.
    write_atomic(run.spec, spec.to_json())
