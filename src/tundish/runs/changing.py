"""What may change when a run is resumed: its devices, and a longer duration."""

from dataclasses import replace
from pathlib import Path

from tundish import launch
from tundish.base.files import write_atomic
from tundish.base.run_folder import RunFolder
from tundish.errors import SpecError
from tundish.plan.compute import Compute
from tundish.plan.foundry import render
from tundish.plan.run_plan import RunPlan
from tundish.plan.spec import Duration
from tundish.runs import selecting
from tundish.supervise import stage_process


def on_other_devices(plan: RunPlan, compute: object, run: RunFolder) -> RunPlan:
    """The plan of a run for other devices; nothing is changed yet.

    Raises:
        SpecError: `compute` is wrong, this machine does not have the devices, or they cannot share the run's batches.
    """
    try:
        parsed = Compute.parse(compute)
    except SpecError as error:
        raise SpecError([f"compute: {problem}" for problem in error.problems]) from None
    if problems := launch.problems(parsed):
        raise SpecError(problems)
    return plan.on(parsed, keep_batches=stage_process.training_starts(run) > 0)


def longer(plan: RunPlan, training_duration: object, run: RunFolder) -> tuple[RunPlan, str]:
    """The plan of a run that is trained longer, and what its learning rate does then; nothing is changed yet.

    Raises:
        SpecError: the duration is malformed or not longer than the run's, or the checkpoints no longer exist.
    """
    before = plan.spec.training_duration
    try:
        duration = Duration.parse(training_duration)
    except ValueError as error:
        raise SpecError(f"training_duration: {error}") from None
    checkpoints, trained = selecting.checkpoints(run.folder.name), run.is_done("train")
    source = f"custom_weights_path={checkpoints[-1]!r}" if checkpoints else f"model={str(run.export)!r}"
    instead = f"Create a run with {source} instead, whose optimizer and schedule start over."
    if trained and not checkpoints:
        raise SpecError(
            f"training_duration: the run's checkpoints no longer exist, and its optimizer is lost with them. {instead}"
        )
    after = plan.longer(duration)
    if not run.foundry_yaml.exists():
        return after, ""  # nothing has been prepared, so nothing has been trained
    in_tokens, why = duration.unit == "tok", ""
    lengths = (before.value, duration.value) if duration.unit == before.unit else (plan.steps, after.steps)
    if in_tokens != (before.unit == "tok"):
        why = "one is in tokens"
    elif lengths[0] is None or lengths[1] is None:
        why = "the run's prepared data no longer exists"
    if why or lengths[0] is None or lengths[1] is None:
        raise SpecError(
            f"training_duration: {duration} cannot be compared with the run's {before}: {why}. Give the same unit. "
            f"{instead}"
        )
    if lengths[1] < lengths[0] or (trained and lengths[1] == lengths[0]):
        raise SpecError(f"training_duration: {duration} is not longer than the run's {before}. {instead}")
    if duration == before:
        return after, ""
    begins = ""
    if checkpoints and after.steps and not in_tokens and "scheduler.name" not in plan.spec.overrides:
        # The learning rate had fallen to 0 at the end of the shorter run.
        left = 1 - int(checkpoints[-1].rpartition("-ba")[2]) / after.steps
        begins = f", continues from about {left:.0%} of its peak"
    return after, (
        f"training_duration is {duration} instead of {before}: the learning rate is that of a run of {duration}"
        f"{begins}, and follows its schedule to the end. "
    )


def apply(before: RunPlan, plan: RunPlan, run: RunFolder, *, train_again: bool) -> None:
    """Keep a run's plan and write what it trains; what has been registered stays as it is.

    Args:
        before: the plan that the run had.
        plan: the one that it gets.
        run: its folder.
        train_again: whether training, export and registration are to be done once more.
    """
    prepared = run.read_result("prepare") if run.is_done("prepare") else None
    trains = train_again or not run.is_done("train")
    is_lost = _is_lost(plan, run)
    if prepared is not None and trains and (is_lost or plan != before):
        # First of all: if this process is killed before the YAML is that of the plan, the stage writes it.
        run.result("prepare").unlink()
    if train_again:
        for stage in ("train", "export", "register"):
            run.result(stage).unlink(missing_ok=True)
        replace(run.read_tracking(), model_path=f"model-{plan.spec.training_duration}").write(run)
    plan.write(run)
    write_atomic(run.spec, plan.spec.to_json())
    if prepared is not None and trains and not is_lost and plan != before:
        write_atomic(run.foundry_yaml, render(plan, run))
        run.write_result("prepare", prepared | {"batch_size": plan.batch_size, "steps": plan.steps})


def _is_lost(plan: RunPlan, run: RunFolder) -> bool:
    """Whether something no longer exists that was prepared, and that training needs: the stage prepares it again."""
    if not plan.is_prepared or not all(run.data(split).exists() for split in plan.data):
        return True
    # Custom weights are where training starts; later it continues from its own checkpoints.
    is_missing = plan.load_path is not None and not Path(plan.load_path).exists()
    return is_missing and not selecting.checkpoints(run.name)
