"""`create()`: check everything, make the run's folder and its MLflow run, start its supervisor."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tundish import __version__, launch
from tundish.base import events
from tundish.base.files import obstacle_to_writing, write_atomic
from tundish.base.processes import interrupt_waits
from tundish.base.run_folder import RunFolder
from tundish.base.workers import guarded
from tundish.checkpoints.folder import list_checkpoints
from tundish.checkpoints.save_folder import SaveFolder
from tundish.data.opening import may_be_table, open_source
from tundish.errors import CheckpointError, DataError, Interrupted, SpecError
from tundish.model.pretrained import check_pretrained
from tundish.model.weights import compare_weights, find_weights
from tundish.plan.address import Address
from tundish.plan.foundry import Destination, isolating_attentions, memory_plan, planned_steps, render
from tundish.plan.memory import GIB
from tundish.plan.models import ModelCard
from tundish.plan.overrides import PATHS, check_overrides, flat, save_root, unused_overrides
from tundish.plan.spec import RunSpec, parse_spec
from tundish.runs import drafts
from tundish.runs.checking import BarOf, CheckedData, check_data, collected, job_of, no_bar
from tundish.runs.checkpoint_addresses import checkpoint_address
from tundish.runs.reading import read_run
from tundish.runs.records import RunRecord
from tundish.tracking.experiment import (
    MARK,
    check_registry,
    open_tracking,
    planned_save_folder,
    tracking_uri,
    uri_problems,
)
from tundish.tracking.notes import tell_arguments

if TYPE_CHECKING:
    from tundish.data.estimate import Estimate
    from tundish.data.report import Validation

PREPARED_BYTES = 8 << 20
"""Data up to this size is prepared, and so checked to the last token, before a run is accepted; of larger data the
structure of every row is checked, and the run tells what only its tokens show."""


def create(arguments: Mapping[str, Any], progress: BarOf = no_bar) -> RunRecord:
    """Accept a run.

    Raises:
        SpecError, DataError: with all problems of the call; nothing is left behind.
    """
    spec = check(arguments, progress)
    check_registry(spec.registered_name)
    _check_save_folder(spec)
    drafts.undo_left()
    with drafts.reserved(spec.run_name) as draft:
        draft.make()
        _write_run(spec, draft)
        with interrupt_waits(Interrupted(spec.run_name)):
            draft.publish()
            launch.submit(draft.published, spec.compute)
            draft.started = True
    return read_run(spec.run_name)


def _write_run(spec: RunSpec, draft: drafts.Draft) -> None:
    paths = draft.run
    paths.result("tracking").parent.mkdir()
    paths.logs.mkdir()
    tags = {"tundish.version": __version__, "tundish.run": spec.run_name, "mlflow.user": spec.created_by}
    tags |= {MARK: draft.mark}
    answers = partial(draft.note_mlflow, tracking_uri(), spec.experiment_path)
    tracking = open_tracking(spec.run_name, spec.experiment_path, tags, save_root(spec.overrides), answers)
    tracking.write(paths)
    tell_arguments(tracking, spec)
    events.append(paths.events, "CREATED", "Run created. It waits to be scheduled.")
    write_atomic(paths.spec, spec.to_json())


def _check_save_folder(spec: RunSpec) -> None:
    """Make sure that a root of the caller's own holds no other run of that name: training would go on from it.

    Raises:
        SpecError: it does, or cannot be asked.
    """
    root = save_root(spec.overrides)
    if root is None:
        return
    place = SaveFolder(planned_save_folder(spec.run_name, spec.experiment_path, root))
    try:
        found = [*place.list(), *map(str, list_checkpoints(place.local))]
    except CheckpointError as error:
        raise SpecError(f"overrides: save_folder: {error.message}") from error
    if found:
        raise SpecError(
            f"overrides: save_folder: {found[0]}: another run of the name {spec.run_name!r} has saved there. "
            "Choose another run_name or save_folder, or remove what is there."
        )


def check(arguments: Mapping[str, Any], progress: BarOf = no_bar) -> RunSpec:
    """The spec that the arguments of `create()` make, after all checks.

    Raises:
        SpecError: an argument is wrong; problems of the data are listed with it.
        DataError: only the data is wrong.
    """
    parsed, problems = _parse(arguments)
    if parsed is not None:
        problems.extend(launch.problems(parsed[0].compute))
        problems.extend(_folder_problems(parsed[0].overrides))
        problems.extend(_model_problems(parsed[0].model))
    problems.extend(uri_problems())
    problems.extend(_weights_problems(arguments.get("custom_weights_path"), parsed[0].model if parsed else None))
    rows = arguments.get("validate_inputs") is not False
    # Its caller waits: large data is tokenized by the run.
    data = check_data(arguments, parsed if not problems else None, rows=rows, most=PREPARED_BYTES, progress=progress)
    problems.extend(data.problems)
    if parsed is not None and not problems:
        problems.extend(_memory_problems(*parsed))
    if problems:
        raise SpecError([*problems, *data.row_problems])
    if data.row_problems:
        raise DataError(data.row_problems)
    assert parsed is not None
    return parsed[0]


def validate(arguments: Mapping[str, Any], progress: BarOf = no_bar) -> "Validation":
    """What is found in the data that the arguments of `create()` name.

    Raises:
        SpecError: an argument is wrong; problems of the data are listed with it.
        DataError: there is no sample in the data, or compressed data is damaged.
    """
    from tundish.data.report import Validation

    parsed, problems = _parse(arguments)
    data = check_data(arguments, parsed if not problems else None, rows=True, progress=progress)
    if problems or data.problems:
        raise SpecError([*problems, *data.problems, *data.row_problems])
    if data.unreadable:
        raise DataError(data.unreadable)
    return Validation(data.reports)


def estimate(arguments: Mapping[str, Any], progress: BarOf = no_bar) -> "Estimate":
    """What the run that the arguments of `create()` describe would train on.

    Raises:
        SpecError: an argument is wrong.
        DataError: there is no good sample in the data.
    """
    parsed, problems = _parse(arguments)
    problems.extend(check_data(arguments, parsed, rows=False).problems)
    if problems or parsed is None:
        raise SpecError(problems)
    found = CheckedData()
    with collected(found, "train_data_path"):
        return guarded(_estimate, *parsed, progress=progress, tables=may_be_table(parsed[0].train_data_path))
    raise DataError(found.unreadable) if found.unreadable else SpecError(found.problems)


def _estimate(spec: RunSpec, card: ModelCard, progress: BarOf) -> "Estimate":
    from tundish.data.estimate import estimate as estimate_data

    with progress("Estimating") as tell:
        source = open_source(spec.train_data_path, spec.task_type, system_message=card.system_message)
        data = estimate_data(source, job_of(spec), partial(planned_steps, spec), str(spec.training_duration), tell)
        return replace(data, memory=memory_plan(spec, card, data.batch_size))


def _parse(arguments: Mapping[str, Any]) -> tuple[tuple[RunSpec, ModelCard] | None, list[str]]:
    """Spec and card where the arguments make them, and the problems that need neither data nor a device to be seen."""
    parsed, problems = None, list[str]()
    try:
        spec, card = parse_spec(arguments, created_at=datetime.now(UTC).isoformat(timespec="seconds"))
        parsed = _with_weights(spec), card
        problems.extend(_plan_problems(*parsed))
    except SpecError as error:
        problems.extend(error.problems)
    overrides = arguments.get("overrides")
    if isinstance(overrides, Mapping):
        problems.extend(check_overrides(cast(Mapping[Any, Any], overrides)))
        problems.extend(unused_overrides(cast(Mapping[Any, Any], overrides), arguments))
    if parsed is not None and not problems:
        problems.extend(_render_problems(*parsed))
    return parsed, problems


def _render_problems(spec: RunSpec, card: ModelCard) -> Sequence[str]:
    """What could not be trained of what the arguments come to, such as the name of a folder."""
    try:
        render(spec, card, RunFolder.of(spec.run_name), destination_of(spec), rows=None)
    except SpecError as error:
        return error.problems
    return ()


def _with_weights(spec: RunSpec) -> RunSpec:
    """The spec with the place of the weights, where they are named as an artifact of an MLflow run."""
    if spec.custom_weights_path is None:
        return spec
    try:
        return replace(spec, custom_weights_path=checkpoint_address(Address.of(spec.custom_weights_path)))
    except SpecError:
        return spec  # told where the weights are looked at


def _plan_problems(spec: RunSpec, card: ModelCard) -> list[str]:
    problems: list[str] = []
    given, devices = flat(spec.overrides), spec.compute.devices
    batch_size = given.get("global_train_batch_size")
    if batch_size is not None and (type(batch_size) is not int or batch_size < 1 or batch_size % devices):
        text = f"found global_train_batch_size {batch_size!r}; allowed is a multiple of the {devices} device(s)."
        problems.append(f"overrides: {text}")
    attention, device = given.get("model.attn_implementation"), spec.compute.device
    isolating = isolating_attentions(card, device)
    if attention is not None and attention not in isolating:
        text = (
            f"found model.attn_implementation {attention!r}, in which packed samples see each other, or which cannot "
        )
        problems.append(f"overrides: {text}train {card.family} on a {device}; allowed is {' or '.join(isolating)}.")
    return problems


def _folder_problems(overrides: Mapping[str, Any]) -> list[str]:
    """Folders of this machine that training could not write into."""
    given = {key: Address.of(address) for key, address in flat(overrides).items() if key in PATHS}
    obstacles = {key: obstacle_to_writing(one.path) for key, one in given.items() if one.kind == "path"}
    return [
        f"overrides: {key}: {said}. Name a folder that you may write into." for key, said in obstacles.items() if said
    ]


def _memory_problems(spec: RunSpec, card: ModelCard) -> list[str]:
    """What no microbatch is small enough for."""
    given, devices = spec.compute.device_memory_gib, spec.compute.devices
    states = memory_plan(spec, card, devices).chosen.states
    if states <= given * GIB:
        return []
    least = max(devices + 1, math.ceil(states * devices / (given * GIB)))
    text = f"weights, gradients and optimizer take {states / GIB:.0f} GiB on each of {devices} device(s)"
    return [f"compute: {text} of {given:g} GiB. Use {least} devices or more, or a smaller model."]


def _model_problems(model: str) -> Sequence[str]:
    """Weights with which no run can begin."""
    try:
        check_pretrained(model)
    except SpecError as error:
        return error.problems
    return ()


def _weights_problems(given: object, model: str | None) -> list[str]:
    """Where there are no weights, or, where the model is known, those of another one."""
    if not given or not isinstance(given, str | Path):
        return []
    try:
        address = Address.parse(given, "checkpoint")
    except SpecError:
        return []  # told by the spec's own check
    try:
        where = checkpoint_address(address)
        if model is None:
            find_weights(where)
        else:
            compare_weights(where, model)
    except (SpecError, CheckpointError) as error:
        return [f"custom_weights_path: {error.message}"]
    except (OSError, ValueError) as error:
        return [f"custom_weights_path: cannot be read ({error}). Check the path."]
    return []


def render_only(arguments: Mapping[str, Any]) -> str:
    """The YAML that `create()` would train, without reading data or starting anything.

    Raises:
        SpecError: an argument is wrong.
    """
    spec, card = parsed_spec(arguments)
    return render(spec, card, RunFolder.of(spec.run_name), destination_of(spec), rows=None)


def parsed_spec(arguments: Mapping[str, Any]) -> tuple[RunSpec, ModelCard]:
    """Spec and model card of a run, as far as they can be checked without data and devices.

    Raises:
        SpecError: an argument is wrong.
    """
    parsed, problems = _parse(arguments)
    problems.extend(uri_problems())
    if problems or parsed is None:
        raise SpecError(problems)
    return parsed


def destination_of(spec: RunSpec) -> Destination:
    """Where a run's checkpoints and metrics would go."""
    return Destination(
        save_folder=planned_save_folder(spec.run_name, spec.experiment_path, save_root(spec.overrides)),
        tracking_uri=tracking_uri(),
        experiment_name=spec.experiment_path,
        load_path=spec.custom_weights_path,
    )
