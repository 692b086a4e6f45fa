"""A run that is trained longer than was asked for at first: what is refused, and what its learning rate does."""

from dataclasses import dataclass, replace
from typing import Any

import yaml

from tundish.base.files import write_atomic
from tundish.base.run_folder import RunFolder
from tundish.data.manifest import Prepared
from tundish.errors import SpecError
from tundish.plan.foundry import Destination, planned_steps, render
from tundish.plan.models import find_card
from tundish.plan.overrides import flat
from tundish.plan.spec import Duration, RunSpec
from tundish.runs import selecting
from tundish.runs.checking import same_batches


@dataclass(frozen=True, slots=True)
class Extension:
    """A run's longer training."""

    spec: RunSpec
    said: str
    """Of its learning rate."""
    foundry_yaml: str | None
    """What is trained; None: nothing has been prepared yet."""

    def apply(self, paths: RunFolder) -> None:
        """Training, export and registration are to be done once more; what is registered already stays as it is."""
        if self.foundry_yaml is not None:
            write_atomic(paths.foundry_yaml, self.foundry_yaml)
        for stage in ("train", "export", "register"):
            paths.result(stage).unlink(missing_ok=True)
        replace(paths.read_tracking(), model_path=f"model-{self.spec.training_duration}").write(paths)


def extension(spec: RunSpec, given: object, paths: RunFolder) -> Extension:
    """What a longer training of a run would be; nothing is changed.

    Raises:
        SpecError: the duration is none, or not longer than the run's; or what training would go on from is gone.
    """
    try:
        duration = Duration.parse(given)
    except ValueError as error:
        raise SpecError(f"training_duration: {error}") from None
    checkpoints, trained = selecting.checkpoints(spec.run_name), paths.is_done("train")
    anew = f"custom_weights_path={checkpoints[-1]!r}" if checkpoints else f"model={str(paths.export)!r}"
    instead = f"Create a run with {anew} instead, whose optimizer and schedule begin anew."
    if trained and not checkpoints:
        raise SpecError(f"training_duration: the run's checkpoints are gone, and its optimizer with them. {instead}")
    if not paths.foundry_yaml.exists():  # nothing has been prepared yet
        return Extension(replace(spec, training_duration=duration), "", None)
    try:
        data = Prepared.read(paths.data("train"))
    except (OSError, ValueError) as error:
        raise SpecError(f"training_duration: the run's prepared data cannot be read ({error}). {instead}") from error
    longer = replace(same_batches(spec, paths.foundry_yaml), training_duration=duration)
    before, after = (
        _length(each, data) for each in (replace(longer, training_duration=spec.training_duration), longer)
    )
    found = f"training_duration: found {duration}; the run's is {spec.training_duration}"
    if before[1] != after[1]:
        raise SpecError(
            f"{found}, and tokens cannot be compared with epochs and batches. Give the same unit. {instead}"
        )
    if after[0] < before[0] or (trained and after[0] == before[0]):
        raise SpecError(f"{found}; allowed is a longer one. {instead}")
    content: dict[str, Any] = yaml.safe_load(paths.foundry_yaml.read_text())
    tracking = paths.read_tracking()
    destination = Destination(
        save_folder=tracking.save_folder,
        tracking_uri=tracking.tracking_uri,
        experiment_name=tracking.experiment_name,
        load_path=content.get("load_path"),
    )
    text = render(longer, find_card(spec.model), paths, destination, data.rows)
    return Extension(longer, _said(spec, longer, after, checkpoints), text)


def _length(spec: RunSpec, data: Prepared) -> tuple[int, str]:
    """How long a run is, in batches or tokens."""
    if spec.training_duration.unit == "tok":
        return spec.training_duration.value, "tok"
    return planned_steps(spec, data.rows, data.tokens)[1], "ba"


def _said(spec: RunSpec, longer: RunSpec, length: tuple[int, str], checkpoints: list[str]) -> str:
    """What the learning rate does, which had fallen to 0 at the end of the shorter run."""
    if longer.training_duration == spec.training_duration:
        return ""
    begins = ""
    if checkpoints and length[1] == "ba" and "scheduler.name" not in flat(spec.overrides):
        left = 1 - int(checkpoints[-1].rpartition("-ba")[2]) / length[0]
        begins = f", goes on from about {left:.0%} of its peak"
    return (
        f"training_duration is {longer.training_duration} instead of {spec.training_duration}: the learning rate is "
        f"that of a run of {longer.training_duration}{begins}, and follows its schedule to the end. "
    )
