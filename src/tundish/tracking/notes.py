"""What MLflow is told of a run beside its metrics: its arguments as params, its data sets, its files.

What a run is made of waits on its disk, as its metrics do; logs that MLflow does not take are left out with a warning.
"""

import contextlib
import dataclasses
import json
import logging
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tundish.base.files import make_folder, write_atomic
from tundish.base.journal import Journal
from tundish.base.mlflow_client import impatient, quiet, told
from tundish.base.run_folder import RunFolder, Tracking
from tundish.base.text import redacted
from tundish.errors import StoreError
from tundish.plan.address import Address
from tundish.plan.foundry import decided
from tundish.plan.overrides import flat
from tundish.plan.run_plan import DataPlan, RunPlan
from tundish.plan.spec import RunSpec
from tundish.tracking.publishing import log_params

log = logging.getLogger(__name__)

MOST_CHARACTERS = 500
"""Of a param: what every MLflow server takes. `spec.json` has the whole value."""
LOG_BYTES = 8 << 20
"""Of a log, its end."""
COUNTS = ("samples", "tokens", "target_tokens", "rows")
"""Of a data set, in MLflow."""


@contextlib.contextmanager
def _unimportant(what: str) -> Iterator[None]:
    try:
        with told("MLflow"), quiet(), impatient():
            yield
    except StoreError as error:
        log.warning("Could not log %s to MLflow: %s", what, error.message)


def tell_arguments(tracking: Tracking, spec: RunSpec) -> None:
    """Log the arguments of `create()`, defaults filled in."""
    with _unimportant("the run's arguments"):
        log_params(tracking, arguments_of(spec))


def arguments_of(spec: RunSpec) -> dict[str, str]:
    """Every argument of a run by its name, what lies deeper by a dotted one; what was not given is left out."""
    given = dataclasses.asdict(spec)
    for name in ("created_by", "created_at", "compute", "overrides"):
        del given[name]
    given |= {"training_duration": str(spec.training_duration), "eval_prompts": list(spec.eval_prompts) or None}
    given |= flat({"compute": dataclasses.asdict(spec.compute), "overrides": dict(spec.overrides)})
    given |= {"devices": spec.compute.devices}
    return {name: text(value) for name, value in given.items() if value not in (None, {})}


def text(value: object) -> str:
    """A value as a param, without secrets."""
    shown = redacted(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))
    return shown if len(shown) <= MOST_CHARACTERS else shown[: MOST_CHARACTERS - 1] + "…"


def tell_plan(paths: RunFolder) -> None:
    """Log what is known when the data is prepared: what was chosen for the run, its data sets, its files so far.

    All is written to the run's disk, and sent on with what training logs.
    """
    plan = RunPlan.read(paths)
    params = arguments_of(plan.spec) | {"steps": text(plan.steps)}
    params |= {name: text(value) for name, value in decided(paths.foundry_yaml.read_text()).items()}
    for split, part in plan.data.items():
        if part.prepared is not None:
            params |= {f"{split}_{name}": text(getattr(part.prepared, name)) for name in (*COUNTS, "truncated")}
    journal = Journal(paths.artifacts_journal)
    with _unimportant("the run's plan"):
        make_folder(paths.artifacts)
        files = [_copy(file, paths.artifacts / file.name) for file in (paths.spec, paths.plan, paths.foundry_yaml)]
        for record in ({"params": params}, {"inputs": _inputs(plan.data)}, *({"file": file.name} for file in files)):
            journal.append(record)


def tell_files(paths: RunFolder) -> None:
    """Log files of the run's folder and all logs as artifacts, without secrets."""
    tracking = paths.read_tracking()
    with _unimportant("the run's files"), tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "artifacts"
        folder.mkdir()  # MLflow gives its folder the rights of this one, and a temporary one has its owner's only
        for file in (paths.spec, paths.foundry_yaml, *paths.logs.glob("*.log")):
            if file.is_file() and file.stat().st_size:
                _copy(file, folder / file.relative_to(paths.folder))
        client(tracking).log_artifacts(tracking.run_id, str(folder))


def _copy(file: Path, copy: Path) -> Path:
    copy.parent.mkdir(exist_ok=True)
    write_atomic(copy, redacted(_end(file)))
    return copy


def _end(file: Path) -> str:
    with open(file, "rb") as opened:
        skipped = max(0, file.stat().st_size - LOG_BYTES)
        opened.seek(skipped)
        found = opened.read().decode(errors="replace")
    return f"({skipped:,} bytes before this are left out)\n{found}" if skipped else found


def client(tracking: Tracking) -> Any:
    """Of the run's store."""
    from mlflow import MlflowClient

    return MlflowClient(tracking.tracking_uri)


def _inputs(data: Mapping[str, DataPlan]) -> list[dict[str, str]]:
    """The data sets in MLflow's words."""
    inputs: list[dict[str, str]] = []
    for split, part in data.items():
        if part.prepared is None:
            continue
        kind, source = _source(part.address)
        inputs.append(
            {
                "context": split,
                "name": redacted(part.address).rstrip("/").rpartition("/")[2][:MOST_CHARACTERS],
                "digest": part.prepared.digest[:36],
                "source_type": kind,
                "source": redacted(json.dumps(source)),
                "profile": json.dumps({name: getattr(part.prepared, name) for name in COUNTS}),
            }
        )
    return inputs


def _source(given: str) -> tuple[str, Mapping[str, str]]:
    """How MLflow names the place of data: its kind, and what finds it there."""
    kind = Address.of(given).kind
    name, _, last = given.rpartition("/")
    if kind == "table":
        return "delta_table", {"delta_table_name": given}
    if kind == "hub":
        return "hugging_face", {"path": name, "split": last}
    return "local" if kind == "path" else given.partition(":")[0], {"uri": given}
