"""The plan of a run from the arguments of `create()`, and everything that is checked before the run is accepted.

`validate`, `estimate` and `render_only` show parts of what `check` looks at; nothing here makes a run.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from tundish import launch
from tundish.base.files import obstacle_to_writing
from tundish.base.run_folder import RunFolder
from tundish.base.text import counted
from tundish.base.workers import guarded
from tundish.data.opening import may_be_table, open_source
from tundish.errors import CheckpointError, DataError, SpecError
from tundish.model.pretrained import check_pretrained, state_of
from tundish.model.weights import compare_weights, find_weights
from tundish.plan.address import Address
from tundish.plan.foundry import render
from tundish.plan.memory import GIB
from tundish.plan.overrides import PATHS, save_root
from tundish.plan.run_plan import RunPlan, memory_plan
from tundish.plan.spec import Arguments, RunSpec, read_arguments
from tundish.runs.checking import BarOf, CheckedData, check_data, collected, no_bar
from tundish.runs.checkpoint_addresses import checkpoint_address, model_of_run
from tundish.tracking.experiment import planned_save_folder, registry_uri, tracking_uri, uri_problems

if TYPE_CHECKING:
    from tundish.data.estimate import Estimate
    from tundish.data.report import Validation

PREPARED_BYTES = 8 << 20
"""Data up to this size is prepared, and so checked to the last token, before a run is accepted; of larger data the
structure of every row is checked, and the run reports what only its tokens show."""


def plan(arguments: Mapping[str, Any]) -> RunPlan:
    """The plan, as far as it can be made and checked without data and devices.

    Raises:
        SpecError: an argument is wrong.
    """
    planned, problems = _plan(_read(arguments))
    problems.extend(uri_problems())
    if planned is None or problems:
        raise SpecError(problems)
    return planned


def render_only(arguments: Mapping[str, Any]) -> str:
    """The YAML that `create()` would train, without reading data or starting anything.

    Raises:
        SpecError: an argument is wrong.
    """
    planned = plan(arguments)
    return render(planned, RunFolder.of(planned.spec.run_name))


def check(arguments: Mapping[str, Any], progress: BarOf = no_bar) -> RunPlan:
    """The plan of a run after all checks, with the data that has been prepared on the way.

    Raises:
        SpecError: an argument is wrong; problems of the data are listed with it.
        DataError: only the data is wrong.
    """
    read = _read(arguments)
    planned, problems = _plan(read)
    state = None
    if read.spec is not None:
        state = state_of(read.spec.model)
        problems.extend(launch.problems(read.spec.compute))
        problems.extend(_folder_problems(read.spec))
        problems.extend(_model_problems(read.spec.model))
    problems.extend(uri_problems())
    problems.extend(_weights_problems(read))
    # The caller waits: large data is tokenized by the run.
    data = check_data(read, complete=not problems, rows=read.validate_inputs, most=PREPARED_BYTES, progress=progress)
    problems.extend(data.problems)
    if planned is not None and not problems:
        problems.extend(_memory_problems(planned))
    if planned is None or problems:
        raise SpecError([*problems, *data.row_problems])
    if data.row_problems:
        raise DataError(data.row_problems)
    prepared = {report.argument: report.prepared for report in data.reports if report.prepared is not None}
    facts = {argument.removesuffix("_data_path"): found.facts for argument, found in prepared.items()}
    return planned.completed(facts, model_state=state)


def validate(arguments: Mapping[str, Any], progress: BarOf = no_bar) -> "Validation":
    """What is wrong with the data that the arguments of `create()` name, and what it comes to.

    Raises:
        SpecError: an argument is wrong; problems of the data are listed with it.
        DataError: there is no sample in the data, or compressed data is damaged.
    """
    from tundish.data.report import Validation

    read = _read(arguments)
    _, problems = _plan(read)
    data = check_data(read, complete=not problems, rows=True, progress=progress)
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
    read = _read(arguments)
    planned, problems = _plan(read)
    problems.extend(check_data(read, complete=not problems, rows=False).problems)
    if planned is None or problems:
        raise SpecError(problems)
    data = CheckedData()
    with collected(data, "train_data_path"):
        return guarded(_estimate, planned, progress=progress, tables=may_be_table(planned.spec.train_data_path))
    raise DataError(data.unreadable) if data.unreadable else SpecError(data.problems)


def _estimate(planned: RunPlan, progress: BarOf) -> "Estimate":
    from tundish.data.encoding import Job
    from tundish.data.estimate import estimate as estimate_data

    def steps(rows: int, tokens: int) -> tuple[int, int]:
        sized = planned.for_rows(rows, tokens)
        return sized.batch_size, sized.steps or 0

    spec = planned.spec
    with progress("Estimating") as update:
        source = open_source(spec.train_data_path, spec.task_type, system_message=planned.card.system_message)
        data = estimate_data(source, Job.of(spec), steps, str(spec.training_duration), update)
        return replace(data, memory=memory_plan(spec, planned.card, data.batch_size))


def _read(arguments: Mapping[str, Any]) -> Arguments:
    return read_arguments(arguments, created_at=datetime.now(UTC).isoformat(timespec="seconds"))


def _plan(read: Arguments) -> tuple[RunPlan | None, list[str]]:
    """The plan where the arguments make one, and the problems that need neither data nor a device to be seen."""
    problems = list(read.problems)
    if problems or read.spec is None or read.card is None:
        return None, problems
    spec, weights_model = read.spec, None
    if read.weights is not None:
        try:
            address = checkpoint_address(read.weights)
        except SpecError:
            pass  # reported where the weights are looked at
        else:
            spec, weights_model = replace(spec, custom_weights_path=address), model_of_run(address)
    planned = RunPlan.of(
        spec,
        read.card,
        tracking_uri=tracking_uri(),
        registry_uri=registry_uri(),
        save_folder=planned_save_folder(spec.run_name, spec.experiment_path, save_root(spec.overrides)),
    ).completed(weights_model=weights_model)
    try:
        render(planned, RunFolder.of(spec.run_name))
    except SpecError as error:  # such as the name of a folder that LLM Foundry would resolve
        return None, list(error.problems)
    return planned, []


def _folder_problems(spec: RunSpec) -> Iterator[str]:
    """Folders of this machine that training could not write into."""
    for key in PATHS:
        address = Address.of(spec.overrides[key]) if key in spec.overrides else None
        if address is not None and address.kind == "path" and (obstacle := obstacle_to_writing(address.path)):
            yield f"overrides: {key}: {obstacle}. Name a folder that you may write into."


def _memory_problems(planned: RunPlan) -> Iterator[str]:
    """What no microbatch is small enough for."""
    compute = planned.spec.compute
    states = memory_plan(planned.spec, planned.card, compute.devices).chosen.states
    if states > compute.device_memory_gib * GIB:
        least = max(compute.devices + 1, math.ceil(states * compute.devices / (compute.device_memory_gib * GIB)))
        yield (
            f"compute: weights, gradients and optimizer take {states / GIB:.0f} GiB on each of "
            f"{counted(compute.devices, 'device')} of {compute.device_memory_gib:g} GiB. "
            f"Use {least} devices or more, or a smaller model."
        )


def _model_problems(model: str) -> Iterator[str]:
    """Weights with which no run can begin."""
    try:
        check_pretrained(model)
    except SpecError as error:
        yield from error.problems


def _weights_problems(read: Arguments) -> Iterator[str]:
    """Where there are no weights, or, where the model is known, those of another one."""
    if read.weights is None:
        return
    try:
        where = checkpoint_address(read.weights)
        if read.spec is None:
            find_weights(where)
        else:
            compare_weights(where, read.spec.model)
    except (SpecError, CheckpointError) as error:
        yield f"custom_weights_path: {error.message}"
    except (OSError, ValueError) as error:
        yield f"custom_weights_path: cannot be read ({error}). Check the path."
