"""Scripts with which people start training themselves, on hosts that no scheduler manages.

`write` makes a folder, on a disk that all hosts share, with the plan, prepared data, `foundry.yaml`, and a script for
each host; checkpoints go there too. A script that is started again resumes; so does one that is written again, for more
hosts or fewer.
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
from tundish.errors import SpecError
from tundish.launch import launcher_of
from tundish.plan.foundry import render
from tundish.plan.run_plan import RunPlan
from tundish.runs import planning
from tundish.supervise.preparing import batch_size_before, prepare
from tundish.tracking.experiment import open_tracking
from tundish.tracking.notes import log_arguments

HOST = r"[A-Za-z0-9]([A-Za-z0-9.-]{0,250}[A-Za-z0-9])?|[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*(%[\w.-]+)?"
"""A host's name or IPv4 address, or an IPv6 address."""


def scripts(arguments: Mapping[str, Any], address: str | None, port: int) -> dict[str, str]:
    """The scripts that start the run of these arguments, by file name; nothing is read or written.

    Args:
        arguments: of `create()`.
        address: of the first host, for the others; None if it is the only one.
        port: a free port of the first host.

    Raises:
        SpecError: an argument is wrong.
    """
    spec = _plan(arguments, address).spec
    return launcher_of(spec.compute).scripts(spec.compute, RunFolder.of(spec.run_name), address, port, {})


def write(arguments: Mapping[str, Any], address: str | None, port: int, out: Path) -> list[Path]:
    """Write the folder of a run that people start themselves, and return the paths of its scripts.

    Raises:
        SpecError, DataError: an argument or the data is wrong.
    """
    plan = _plan(arguments, address)
    launcher = launcher_of(plan.spec.compute)
    if launcher.STARTS_ALL_NODES:
        name = plan.spec.compute.launcher
        raise SpecError(f"compute: with launcher {name!r}, `tundish create` submits the run. Leave out --out.")
    run = RunFolder(out.absolute())
    if (batch_size := batch_size_before(run)) is not None:
        plan = plan.with_batches(batch_size)
    for folder in (run.logs, run.work, run.result("train").parent, run.data("train").parent):
        folder.mkdir(parents=True, exist_ok=True)
    plan = prepare(plan)
    for split, part in plan.data.items():
        assert part.prepared is not None
        shutil.rmtree(run.data(split), ignore_errors=True)
        shutil.copytree(part.prepared.folder, run.data(split))
    tracking = _tracking(plan, run)
    plan = plan.completed(save_folder=tracking.save_folder)
    write_atomic(run.foundry_yaml, render(plan, run))
    plan.write(run)
    for old in run.folder.glob("node*.sh"):
        old.unlink()
    texts = launcher.scripts(plan.spec.compute, run, address, port, tracking.environment)
    for name, text in texts.items():
        write_atomic(run.folder / name, text)
    return [run.folder / name for name in texts]


def _plan(arguments: Mapping[str, Any], address: str | None) -> RunPlan:
    planned = planning.plan(arguments)
    compute = planned.spec.compute
    by_hosts = compute.nodes > 1 and not launcher_of(compute).STARTS_ALL_NODES
    if by_hosts and address is None:
        raise SpecError("--master-addr is missing: the other hosts must reach the first one. Give its address.")
    if address is not None and not by_hosts:
        raise SpecError(
            "--master-addr has no effect unless there are several --nodes without a scheduler. Leave it out."
        )
    if address is not None and not re.fullmatch(HOST, address):
        raise SpecError(f"--master-addr: must be the name or the IP address of a host, not {address!r}.")
    return planned


def _tracking(plan: RunPlan, run: RunFolder) -> Tracking:
    """The MLflow run of the folder: made once, however often the scripts are written."""
    if not run.result("tracking").exists():
        spec = plan.spec
        tags = {"tundish.version": __version__, "tundish.run": spec.run_name}
        made = open_tracking(spec.run_name, spec.experiment_path, tags, stores=plan.stores)
        log_arguments(made, spec)
        replace(made, save_folder=str(run.folder / "checkpoints")).write(run)
    return run.read_tracking()
