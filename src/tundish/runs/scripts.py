"""Training that people start themselves: what is to be typed, or submitted, on which machine.

For hosts without Slurm. `write` makes a folder, on a disk that all hosts share, with prepared data, `foundry.yaml`, and
a script for each host; checkpoints go there too. Scripts that are started once more go on; made once more, for more
hosts or fewer, too.
"""

import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tundish import __version__
from tundish.base.files import write_atomic
from tundish.base.run_folder import RunFolder, Tracking
from tundish.data.prepare import prepare_guarded
from tundish.errors import SpecError
from tundish.launch import launcher_of
from tundish.plan.foundry import Destination, render
from tundish.plan.models import ModelCard
from tundish.plan.spec import RunSpec
from tundish.runs.checking import job_of, same_batches
from tundish.runs.creating import destination_of, parsed_spec
from tundish.tracking.experiment import open_tracking
from tundish.tracking.notes import tell_arguments

HOST = r"[A-Za-z0-9]([A-Za-z0-9.-]{0,250}[A-Za-z0-9])?|[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*(%[\w.-]+)?"
"""A host's name or IPv4 address, or an IPv6 address."""


def scripts(arguments: Mapping[str, Any], address: str | None, port: int) -> dict[str, str]:
    """What starts the run that the arguments of `create()` describe, by file name; nothing is read or made.

    Args:
        arguments: of `create()`.
        address: of the first host, for the others; None where there are none.
        port: of the first host, free.

    Raises:
        SpecError: an argument is wrong.
    """
    spec, _ = _planned(arguments, address)
    run = RunFolder.of(spec.run_name)
    return launcher_of(spec.compute).scripts(spec.compute, run, address, port, {})


def write(arguments: Mapping[str, Any], address: str | None, port: int, out: Path) -> list[Path]:
    """Make the folder for a run that is started by hand; the scripts in it.

    Raises:
        SpecError, DataError: an argument or the data is wrong.
    """
    spec, card = _planned(arguments, address)
    if launcher_of(spec.compute).STARTS_ALL_NODES:
        name = spec.compute.launcher
        raise SpecError(f"compute: with launcher {name!r}, `tundish create` submits the run. Leave out --out.")
    paths = RunFolder(out.absolute())
    if paths.foundry_yaml.exists():
        spec = same_batches(spec, paths.foundry_yaml)
    for folder in (paths.logs, paths.work, paths.result("train").parent, paths.data("train").parent):
        folder.mkdir(parents=True, exist_ok=True)
    rows = _prepare(spec, card, paths)
    tracking = _tracking(spec, paths)
    destination = replace(destination_of(spec), save_folder=tracking.save_folder)
    write_atomic(paths.foundry_yaml, render(spec, card, paths, _with_weights(spec, destination), rows))
    for old in paths.folder.glob("node*.sh"):
        old.unlink()
    texts = launcher_of(spec.compute).scripts(spec.compute, paths, address, port, tracking.environment)
    for name, text in texts.items():
        write_atomic(paths.folder / name, text)
    return [paths.folder / name for name in texts]


def _planned(arguments: Mapping[str, Any], address: str | None) -> tuple[RunSpec, ModelCard]:
    spec, card = parsed_spec(arguments)
    by_hosts = spec.compute.nodes > 1 and not launcher_of(spec.compute).STARTS_ALL_NODES
    if by_hosts and address is None:
        raise SpecError("--master-addr is missing: the other hosts must reach the first one. Give its address.")
    if address is not None and not by_hosts:
        raise SpecError("--master-addr is of no use without several --nodes that nobody schedules. Leave it out.")
    if address is not None and not re.fullmatch(HOST, address):
        raise SpecError(f"--master-addr: found {address!r}; allowed is the name of a host, or its IP address.")
    return spec, card


def _tracking(spec: RunSpec, paths: RunFolder) -> Tracking:
    """The MLflow run of the folder; made once, whoever of the hosts is started how often."""
    if not paths.result("tracking").exists():
        tags = {"tundish.version": __version__, "tundish.run": spec.run_name}
        made = open_tracking(spec.run_name, spec.experiment_path, tags)
        tell_arguments(made, spec)
        replace(made, save_folder=str(paths.folder / "checkpoints")).write(paths)
    return RunFolder(paths.folder).read_tracking()


def _prepare(spec: RunSpec, card: ModelCard, paths: RunFolder) -> int:
    """Copy the prepared data into the folder; the rows of the training data."""
    rows = 0
    for split, given in (("train", spec.train_data_path), ("eval", spec.eval_data_path)):
        if given is None:
            continue
        prepared = prepare_guarded(given, job_of(spec), spec.data_prep_cluster_id, system_message=card.system_message)
        shutil.rmtree(paths.data(split), ignore_errors=True)
        shutil.copytree(prepared.folder, paths.data(split))
        if split == "train":
            rows = prepared.rows
    return rows


def _with_weights(spec: RunSpec, destination: Destination) -> Destination:
    from tundish.model.weights import check_weights, fetch_weights

    if spec.custom_weights_path is None:
        return destination
    weights = fetch_weights(spec.custom_weights_path)
    check_weights(weights, spec.model)
    return replace(destination, load_path=str(weights))
