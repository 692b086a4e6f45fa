"""`create()`: check everything, make the run's folder and its MLflow run, start its supervisor."""

import shutil
from collections import deque
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast, get_args

from tundish import __version__, events
from tundish.checkpoints import resolve_weights
from tundish.compute import Compute, count_gpus
from tundish.data.sources import Source, open_source
from tundish.errors import CheckpointError, DataError, SpecError
from tundish.foundry import Destination, render
from tundish.models import ModelCard
from tundish.overrides import check_overrides
from tundish.paths import REMOTE_SCHEMES, RunPaths, resolve, write_atomic
from tundish.runs import supervisor
from tundish.runs.reading import read_run
from tundish.runs.records import TrainingRun
from tundish.runs.tracking import Tracking, end_tracking, open_tracking, planned_save_folder, tracking_uri
from tundish.spec import RunSpec, TaskType, parse_spec


def create(arguments: Mapping[str, Any]) -> TrainingRun:
    """Accept a run.

    Raises:
        SpecError, DataError: with all problems of the call; nothing is left behind.
    """
    spec = check(arguments)
    paths = RunPaths.of(spec.run_name)
    try:
        paths.folder.mkdir(parents=True)
    except FileExistsError:
        raise SpecError(f"run_name: there is a run {spec.run_name!r} already. Choose another name.") from None
    try:
        _write_run(spec, paths)
    except BaseException:
        if paths.result("tracking").exists():
            end_tracking(Tracking.read(paths), "FAILED")
        shutil.rmtree(paths.folder, ignore_errors=True)
        raise
    return read_run(spec.run_name)


def _write_run(spec: RunSpec, paths: RunPaths) -> None:
    paths.result("tracking").parent.mkdir()
    paths.logs.mkdir()
    tags = {"tundish.version": __version__, "tundish.run": spec.run_name}
    open_tracking(spec.run_name, spec.experiment_path, tags).write(paths)
    events.append(paths.events, "CREATED", "Run created. It waits to be scheduled.")
    # Last before the start: a folder without a spec is no run to anybody who looks.
    write_atomic(paths.spec, spec.to_json())
    supervisor.spawn(paths)


def check(arguments: Mapping[str, Any]) -> RunSpec:
    """The spec that the arguments of `create()` make, after all checks.

    Raises:
        SpecError: an argument is wrong; problems of the data are listed with it.
        DataError: only the data is wrong.
    """
    parsed, problems = _parse(arguments)
    if parsed is not None:
        problems.extend(_machine_problems(parsed[0].compute))
    of_arguments, of_rows = _data_problems(arguments, parsed[1] if parsed else None)
    problems.extend(of_arguments)
    if problems:
        raise SpecError([*problems, *of_rows])
    if of_rows:
        raise DataError(of_rows)
    assert parsed is not None
    return parsed[0]


def _parse(arguments: Mapping[str, Any]) -> tuple[tuple[RunSpec, ModelCard] | None, list[str]]:
    """Spec and card where the arguments make them, and the problems that need neither data nor a device to be seen."""
    parsed, problems = None, list[str]()
    try:
        parsed = parse_spec(arguments, created_at=datetime.now(UTC).isoformat(timespec="seconds"))
        problems.extend(_plan_problems(*parsed))
    except SpecError as error:
        problems.extend(error.problems)
    overrides = arguments.get("overrides")
    if isinstance(overrides, Mapping):
        problems.extend(check_overrides(cast(Mapping[Any, Any], overrides)))
    return parsed, problems


def _plan_problems(spec: RunSpec, card: ModelCard) -> list[str]:
    problems: list[str] = []
    batch_size, devices = spec.overrides.get("global_train_batch_size"), spec.compute.devices
    if batch_size is not None and (type(batch_size) is not int or batch_size < 1 or batch_size % devices):
        text = f"found global_train_batch_size {batch_size!r}; allowed is a multiple of the {devices} device(s)."
        problems.append(f"overrides: {text}")
    attention = spec.overrides.get("model.attn_implementation")
    if attention == "flex_attention" and card.gpu_attention != attention:
        text = f"found {attention}, in which samples packed for {card.family} see each other"
        problems.append(f"overrides: {text}; allowed is {card.gpu_attention}.")
    return problems


def _machine_problems(compute: Compute) -> list[str]:
    problems: list[str] = []
    if compute.nodes > 1:
        problems.append(
            f"compute: found {compute.nodes} nodes; a run on this machine has one. `tundish render` plans more."
        )
    if compute.device == "gpu" and compute.devices_per_node > count_gpus():
        text = f"found {compute.devices_per_node} GPU(s) asked for; this machine has {count_gpus()} to give."
        problems.append(f"compute: {text} Ask for fewer, or for device 'cpu'.")
    return problems


def _data_problems(arguments: Mapping[str, Any], card: ModelCard | None) -> tuple[list[str], list[str]]:
    """Problems of the data's paths, and of its rows."""
    of_arguments: list[str] = []
    of_rows: list[str] = []
    task_type = arguments.get("task_type") or "CHAT_COMPLETION"
    for name in ("train_data_path", "eval_data_path"):
        given = arguments.get(name)
        if not given or not isinstance(given, str | Path):
            continue  # told by the spec's own check
        try:
            if task_type not in get_args(TaskType):
                # What it should hold cannot be told, but whether it is there.
                if not str(given).startswith(REMOTE_SCHEMES) and not Path(resolve(str(given))).exists():
                    of_arguments.append(f"{name}: {given}: there is no such file or folder. Check the path.")
                continue
            source = open_source(str(given), task_type, system_message=card is None or card.system_message)
            if arguments.get("validate_inputs") is not False:
                _read_all(source)
        except SpecError as error:
            of_arguments.extend(f"{name}: {problem}" for problem in error.problems)
        except DataError as error:
            of_rows.extend(f"{name}: {problem}" for problem in error.problems)
        except (OSError, ValueError) as error:
            of_arguments.append(f"{name}: cannot be read ({error}). Check the path.")
    if arguments.get("custom_weights_path"):
        try:
            resolve_weights(str(arguments["custom_weights_path"]))
        except (SpecError, CheckpointError) as error:
            text = error.message
            of_arguments.append(text if text.startswith("custom_weights_path") else f"custom_weights_path: {text}")
        except (OSError, ValueError) as error:
            of_arguments.append(f"custom_weights_path: cannot be read ({error}). Check the path.")
    return of_arguments, of_rows


def _read_all(source: Source) -> None:
    deque(source.samples(), maxlen=0)


def render_only(arguments: Mapping[str, Any]) -> str:
    """The YAML that `create()` would train, without reading data or starting anything.

    Raises:
        SpecError: an argument is wrong.
    """
    parsed, problems = _parse(arguments)
    if problems or parsed is None:
        raise SpecError(problems)
    spec, card = parsed
    destination = Destination(
        save_folder=planned_save_folder(spec.run_name, spec.experiment_path),
        tracking_uri=tracking_uri(),
        experiment_name=spec.experiment_path,
        load_path=None if spec.custom_weights_path is None else resolve(spec.custom_weights_path),
    )
    return render(spec, card, RunPaths.of(spec.run_name), destination, rows=None)
