"""What may change when a run is resumed: its devices, and a longer duration."""

from dataclasses import replace

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
    except ValueError as error:
        raise SpecError(f"compute: {error}") from None
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
    if plan.steps is None or after.steps is None:
        return after, ""  # nothing has been prepared, so nothing has been trained
    wrong = f"training_duration: {duration} is not longer than the run's {before}"
    if (duration.unit == "tok") != (before.unit == "tok"):
        raise SpecError(
            f"training_duration: {duration} cannot be compared with the run's {before}: one is in tokens. Give the "
            f"same unit. {instead}"
        )
    in_tokens = duration.unit == "tok"
    lengths = (before.value, duration.value) if in_tokens else (plan.steps, after.steps)
    if lengths[1] < lengths[0] or (trained and lengths[1] == lengths[0]):
        raise SpecError(f"{wrong}. {instead}")
    if duration == before:
        return after, ""
    begins = ""
    if checkpoints and not in_tokens and "scheduler.name" not in plan.spec.overrides:
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
    if train_again:
        for stage in ("train", "export", "register"):
            run.result(stage).unlink(missing_ok=True)
        replace(run.read_tracking(), model_path=f"model-{plan.spec.training_duration}").write(run)
    plan.write(run)
    write_atomic(run.spec, plan.spec.to_json())
    if not run.is_done("prepare") or run.is_done("train"):
        return
    if not plan.is_prepared or not all(run.data(split).exists() for split in plan.data):
        run.result("prepare").unlink()  # the stage prepares what no longer exists
    elif plan != before:
        write_atomic(run.foundry_yaml, render(plan, run))
