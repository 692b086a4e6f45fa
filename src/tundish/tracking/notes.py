"""Logs what MLflow has of a run besides its metrics: its arguments as params, its data sets, its files.

The plan and the data sets are written to the run's disk and uploaded later, as metrics are; what is sent directly is
skipped with a warning if MLflow does not accept it.
"""

import contextlib
import dataclasses
import json
import logging
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from tundish.base.files import make_folder, write_atomic
from tundish.base.journal import Journal
from tundish.base.mlflow_client import impatient, quiet, store_errors
from tundish.base.run_folder import RunFolder, Tracking
from tundish.base.text import redacted
from tundish.errors import StoreError
from tundish.plan.address import Address
from tundish.plan.foundry import decided
from tundish.plan.overrides import flat
from tundish.plan.run_plan import DataPlan, RunPlan
from tundish.plan.spec import RunSpec
from tundish.tracking.publishing import client, log_params

log = logging.getLogger(__name__)

MOST_CHARACTERS = 500
"""Longest value of a param that every MLflow server accepts; `spec.json` has the whole value."""
LOG_BYTES = 8 << 20
"""A longer log is uploaded from this many bytes before its end."""
COUNTS = ("samples", "tokens", "target_tokens", "rows")
"""Numbers that MLflow shows of a data set."""


@contextlib.contextmanager
def _optional(what: str) -> Iterator[None]:
    """Log a warning instead of a StoreError: no run fails because a note in MLflow is missing."""
    try:
        with store_errors("MLflow"), quiet(), impatient():
            yield
    except StoreError as error:
        log.warning("Could not log %s to MLflow: %s", what, error.message)


def log_arguments(tracking: Tracking, spec: RunSpec) -> None:
    """Log the arguments of `create()` as params, with defaults filled in."""
    with _optional("the run's arguments"):
        log_params(tracking, arguments_of(spec))


def arguments_of(spec: RunSpec) -> dict[str, str]:
    """Every argument of a run by name, nested ones by dotted names; those that were not set are left out."""
    arguments = dataclasses.asdict(spec)
    for name in ("created_by", "created_at", "compute", "overrides"):
        del arguments[name]
    arguments |= {"training_duration": str(spec.training_duration), "eval_prompts": list(spec.eval_prompts) or None}
    arguments |= flat({"compute": dataclasses.asdict(spec.compute), "overrides": dict(spec.overrides)})
    arguments |= {"devices": spec.compute.devices}
    return {name: text(value) for name, value in arguments.items() if value not in (None, {})}


def text(value: object) -> str:
    """A value as the text of a param, shortened, and without secrets."""
    shown = redacted(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))
    return shown if len(shown) <= MOST_CHARACTERS else shown[: MOST_CHARACTERS - 1] + "…"


def log_plan(run: RunFolder) -> None:
    """Log what is known once the data is prepared: the settings of the run, its data sets, its files so far.

    All of it is written to the run's disk, and uploaded together with what training logs.
    """
    plan = RunPlan.read(run)
    params = arguments_of(plan.spec) | {"steps": text(plan.steps)}
    params |= {name: text(value) for name, value in decided(run.foundry_yaml.read_text()).items()}
    for split, part in plan.data.items():
        if part.prepared is not None:
            params |= {f"{split}_{name}": text(getattr(part.prepared, name)) for name in (*COUNTS, "truncated")}
    journal = Journal(run.artifacts_journal)
    with _optional("the run's plan"):
        make_folder(run.artifacts)
        files = [_copy(file, run.artifacts / file.name) for file in (run.spec, run.plan, run.foundry_yaml)]
        for record in ({"params": params}, {"inputs": _inputs(plan.data)}, *({"file": file.name} for file in files)):
            journal.append(record)


def log_files(run: RunFolder) -> None:
    """Upload the run's spec, its YAML and all logs as artifacts, without secrets."""
    tracking = run.read_tracking()
    with _optional("the run's files"), tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "artifacts"
        folder.mkdir()  # MLflow copies the permissions of this folder, and a temporary one is for its owner only
        for file in (run.spec, run.foundry_yaml, *run.logs.glob("*.log")):
            if file.is_file() and file.stat().st_size:
                _copy(file, folder / file.relative_to(run.folder))
        client(tracking).log_artifacts(tracking.run_id, str(folder))


def _copy(file: Path, copy: Path) -> Path:
    copy.parent.mkdir(exist_ok=True)
    write_atomic(copy, redacted(_end(file)))
    return copy


def _end(file: Path) -> str:
    with open(file, "rb") as opened:
        skipped = max(0, file.stat().st_size - LOG_BYTES)
        opened.seek(skipped)
        text = opened.read().decode(errors="replace")
    return f"({skipped:,} bytes before this are left out)\n{text}" if skipped else text


def _inputs(data: Mapping[str, DataPlan]) -> list[dict[str, str]]:
    """The prepared data sets, as the fields of MLflow's `Dataset`, and their `context`."""
    inputs: list[dict[str, str]] = []
    for split, part in data.items():
        if part.prepared is None:
            continue
        kind, source = _source(part.address)
        inputs.append(
            {
                "context": split,
                "name": redacted(part.address).rstrip("/").rpartition("/")[2][:MOST_CHARACTERS],
                "digest": part.prepared.digest[:36],  # MLflow accepts no longer one
                "source_type": kind,
                "source": redacted(json.dumps(source)),
                "profile": json.dumps({name: getattr(part.prepared, name) for name in COUNTS}),
            }
        )
    return inputs


def _source(address: str) -> tuple[str, Mapping[str, str]]:
    """MLflow's `source_type` of a data address, and its `source`."""
    kind = Address.of(address).kind
    name, _, split = address.rpartition("/")
    if kind == "table":
        return "delta_table", {"delta_table_name": address}
    if kind == "hub":
        return "hugging_face", {"path": name, "split": split}
    return "local" if kind == "path" else address.partition(":")[0], {"uri": address}
