"""`create()`: check everything, make the run's folder and its MLflow run, start its supervisor."""

import shutil
from collections import deque
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast, get_args

from tundish import __version__, events
from tundish.checkpoints import resolve_weights
from tundish.data.sources import Source, open_source
from tundish.errors import CheckpointError, DataError, SpecError
from tundish.foundry import Destination, check_overrides, render
from tundish.models import ModelCard
from tundish.paths import REMOTE_SCHEMES, RunPaths, resolve, write_atomic
from tundish.runs import supervisor
from tundish.runs.reading import read_run
from tundish.runs.records import TrainingRun
from tundish.runs.tracking import open_tracking, planned_save_folder, tracking_uri
from tundish.spec import RunSpec, TaskType, parse_spec


def create(arguments: Mapping[str, Any]) -> TrainingRun:
    """Accept a run.

    Raises:
        SpecError, DataError: with all problems of the call; nothing is left behind.
    """
    spec, _ = check(arguments)
    paths = RunPaths.of(spec.run_name)
    try:
        paths.folder.mkdir(parents=True)
    except FileExistsError:
        raise SpecError(f"run_name: there is a run {spec.run_name!r} already. Choose another name.") from None
    try:
        _write_run(spec, paths)
    except BaseException:
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


def check(arguments: Mapping[str, Any]) -> tuple[RunSpec, ModelCard]:
    """The spec that the arguments of `create()` make, after all checks.

    Raises:
        SpecError: an argument is wrong; problems of the data are listed with it.
        DataError: only the data is wrong.
    """
    problems: list[str] = []
    try:
        spec, card = parse_spec(arguments, created_at=datetime.now(UTC).isoformat(timespec="seconds"))
    except SpecError as error:
        problems.extend(error.problems)
        spec = card = None
    overrides = arguments.get("overrides")
    if isinstance(overrides, Mapping):
        problems.extend(check_overrides(cast(Mapping[str, Any], overrides)))
    if spec is not None:
        problems.extend([*_nodes_problems(spec), *_batch_size_problems(spec)])
    argument_problems, data_problems = _data_problems(arguments, card)
    problems.extend(argument_problems)
    if problems:
        raise SpecError([*problems, *data_problems])
    if data_problems:
        raise DataError(data_problems)
    assert spec is not None and card is not None
    return spec, card


def _nodes_problems(spec: RunSpec) -> list[str]:
    if spec.compute.nodes == 1:
        return []
    return [f"compute: found {spec.compute.nodes} nodes; a run on this machine has one. `tundish render` plans more."]


def _batch_size_problems(spec: RunSpec) -> list[str]:
    problems: list[str] = []
    batch_size = spec.overrides.get("global_train_batch_size")
    if batch_size is not None and (type(batch_size) is not int or batch_size < 1 or batch_size % spec.compute.devices):
        problems.append(
            f"overrides: found global_train_batch_size {batch_size!r}; allowed is a multiple of the "
            f"{spec.compute.devices} device(s)."
        )
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
    return of_arguments, of_rows


def _read_all(source: Source) -> None:
    deque(source.samples(), maxlen=0)


def render_only(arguments: Mapping[str, Any]) -> str:
    """The YAML that `create()` would train, without reading data or starting anything."""
    problems: list[str] = []
    spec = card = None
    try:
        spec, card = parse_spec(arguments, created_at=datetime.now(UTC).isoformat(timespec="seconds"))
        problems.extend(_batch_size_problems(spec))
    except SpecError as error:
        problems.extend(error.problems)
    if isinstance(overrides := arguments.get("overrides"), Mapping):
        problems.extend(check_overrides(cast(Mapping[str, Any], overrides)))
    if problems or spec is None or card is None:
        raise SpecError(problems)
    destination = Destination(
        save_folder=planned_save_folder(spec.run_name, spec.experiment_path),
        tracking_uri=tracking_uri(),
        experiment_name=spec.experiment_path,
        load_path=None if spec.custom_weights_path is None else resolve(spec.custom_weights_path),
    )
    return render(spec, card, RunPaths.of(spec.run_name), destination, rows=None)
