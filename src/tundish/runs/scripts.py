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
from tundish.errors import SpecError
from tundish.launch import launcher_of
from tundish.plan.foundry import render
from tundish.plan.run_plan import RunPlan
from tundish.plan.spec import RunSpec
from tundish.runs import planning
from tundish.supervise.preparing import batch_size_before, prepare
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
    spec = _plan(arguments, address).spec
    return launcher_of(spec.compute).scripts(spec.compute, RunFolder.of(spec.run_name), address, port, {})


def write(arguments: Mapping[str, Any], address: str | None, port: int, out: Path) -> list[Path]:
    """Make the folder for a run that people start themselves; the paths of its scripts.

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
    tracking = _tracking(plan.spec, run)
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
        raise SpecError("--master-addr is of no use without several --nodes that nobody schedules. Leave it out.")
    if address is not None and not re.fullmatch(HOST, address):
        raise SpecError(f"--master-addr: found {address!r}; allowed is the name of a host, or its IP address.")
    return planned


def _tracking(spec: RunSpec, paths: RunFolder) -> Tracking:
    """The MLflow run of the folder; made once, whoever of the hosts is started how often."""
    if not paths.result("tracking").exists():
        tags = {"tundish.version": __version__, "tundish.run": spec.run_name}
        made = open_tracking(spec.run_name, spec.experiment_path, tags)
        tell_arguments(made, spec)
        replace(made, save_folder=str(paths.folder / "checkpoints")).write(paths)
    return RunFolder(paths.folder).read_tracking()
