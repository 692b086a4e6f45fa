"""Compute: where to train and on how many devices."""

import dataclasses
import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, cast

from tundish.base.text import INSTEAD_OF_SECRETS, names_secret, redacted
from tundish.errors import SpecError, did_you_mean
from tundish.plan.options import Option

PLANNED_GIB = 80.0
"""Assumed for a GPU where nvidia-smi cannot be asked."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Compute:
    """Where to train and on how many devices."""

    # Each docstring is the help text of its option.
    device: Annotated[Literal["gpu", "cpu"], Option(group="compute")]
    """Device to train on; default: gpu if there is one, else cpu."""
    devices_per_node: Annotated[int, Option(group="compute", metavar="N", flag="--devices")]
    """Training processes per node: one per GPU, or ranks that share the CPU; default: all GPUs, else 1."""
    nodes: Annotated[int, Option(group="compute", metavar="N")] = 1
    """Machines that train together; default 1."""
    launcher: Annotated[Literal["local", "slurm"], Option(group="compute")] = "local"
    """What runs the training: a process on this machine (default), or a Slurm job."""
    device_memory_gib: float = PLANNED_GIB
    """Memory of one device; on a CPU, a rank's share of the machine's memory."""
    time_limit: Annotated[str | None, Option(group="compute", metavar="T")] = None
    """Time limit of a Slurm job, as sbatch takes it: `12:00:00`, `2-00:00:00`; default: that of the partition."""
    grace_s: int = 300
    """Seconds before its time limit at which a Slurm job saves a checkpoint and requeues itself."""
    sbatch: Annotated[Mapping[str, str], Option(group="compute", metavar="OPTION=VALUE")] = field(
        default_factory=dict[str, str]
    )
    """Further options of sbatch, by name without dashes, such as partition or account."""

    @property
    def devices(self) -> int:
        """World size."""
        return self.nodes * self.devices_per_node

    @classmethod
    def parse(cls, value: object) -> "Compute":
        """Read a mapping of these fields; absent ones come from this machine.

        Raises:
            SpecError: with every problem: an unknown key, or a value that is not allowed.
        """
        if isinstance(value, Compute):
            return value
        if not isinstance(value or {}, Mapping):
            raise SpecError(
                f"must be a mapping, not {value!r}. For example {{'device': 'cpu', 'devices_per_node': 2}}."
            )
        given, problems = dict(cast(Mapping[str, Any], value or {})), list[str]()
        known = [f.name for f in dataclasses.fields(cls)]
        if unknown := sorted(str(key) for key in given if key not in known):
            problems.append(f"has no key {', '.join(unknown)}; its keys are {', '.join(known)}.")
        for key, allowed in (("device", ("gpu", "cpu")), ("launcher", ("local", "slurm"))):
            if key in given and given[key] not in allowed:
                problems.append(f"{key} must be {' or '.join(allowed)}, not {given[key]!r}.")
        for key in ("nodes", "devices_per_node", "grace_s"):
            if type(given.get(key, 1)) is not int or given.get(key, 1) < 1:
                problems.append(f"{key} must be an integer of at least 1, not {given[key]!r}.")
        memory = given.get("device_memory_gib", 1)
        if type(memory) not in (int, float) or not 0 < memory < 1e6:
            problems.append(f"device_memory_gib must be a number above 0, not {memory!r}.")
        elsewhere = given.get("launcher") == "slurm"
        if elsewhere and "devices_per_node" not in given:
            problems.append(
                "devices_per_node is missing; launcher 'slurm' needs the number of GPUs to use on each node."
            )
        problems.extend(_job_problems(given))
        if problems:
            raise SpecError(problems)
        gpus = count_gpus()
        device = given.setdefault("device", "gpu" if gpus or elsewhere else "cpu")
        devices = given.setdefault("devices_per_node", gpus if device == "gpu" and gpus else 1)
        given.setdefault("device_memory_gib", _device_memory_gib(device, devices, elsewhere))
        if given.get("time_limit") is not None:
            given["time_limit"] = str(given["time_limit"])
        return cls(**given | {"sbatch": _option_texts(given)})


TIME_LIMIT = re.compile(r"\d+(:\d\d){0,2}|\d+-\d+(:\d\d){0,2}")
JOB_OPTIONS = frozenset(
    "account comment constraint cpus-per-gpu cpus-per-task dependency deadline exclude "
    "exclusive gres gpus-per-node hint licenses mail-type mail-user mem mem-per-cpu mem-per-gpu network nice nodelist "
    "oversubscribe partition prefer priority qos reservation switches tmp wckey begin".split()
)
"""Options of sbatch that a caller may set; tundish sets the others, or they would change what the script does."""


def _job_problems(given: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the fields of a Slurm job, or set for another launcher."""
    unused = [name for name in ("sbatch", "time_limit", "grace_s") if given.get(name) not in (None, {})]
    if given.get("launcher") != "slurm" and unused:
        yield f"{', '.join(unused)} can only be set with launcher 'slurm'. Add it, or leave them out."
    limit, grace = given.get("time_limit"), given.get("grace_s", 300)
    if limit is not None and not TIME_LIMIT.fullmatch(str(limit)):
        yield f"time_limit must be text such as '12:00:00' or '2-00:00:00', not {limit!r}."
    elif limit is not None and type(grace) is int and _seconds(str(limit)) <= grace:
        text = f"time_limit must be longer than the {grace} s of grace_s, not {limit!r}."
        yield f"{text} Raise time_limit, or lower grace_s."
    options: object = given.get("sbatch") or {}
    if not isinstance(options, Mapping):
        yield f"sbatch must be a mapping, not {options!r}. For example {{'partition': 'gpu'}}."
        return
    for name, value in _option_texts(given).items():
        if name not in JOB_OPTIONS:
            instead = f" {INSTEAD_OF_SECRETS}" if names_secret(name) else ""
            text = f"sbatch: {name!r} cannot be set; options that can are {', '.join(sorted(JOB_OPTIONS))}.{instead}"
            yield f"{text}{did_you_mean(name, JOB_OPTIONS)}"
        elif not re.fullmatch(r"[\w.,:=@%/+*&|()\[\]-]*", value, re.ASCII):
            yield f"sbatch: {name} must not contain blanks or quotes, but is {value!r}."
        elif redacted(value) != value:
            yield f"sbatch: {name} contains a secret, which the job's script would show. {INSTEAD_OF_SECRETS}"


def _option_texts(given: Mapping[str, Any]) -> dict[str, str]:
    """Options of sbatch by name without dashes; the text of a switch is empty."""
    options = cast(Mapping[object, object], given.get("sbatch") or {})
    return {str(name).lstrip("-"): "" if value is True else str(value) for name, value in options.items()}


def _seconds(limit: str) -> int:
    """Of a time limit as Slurm reads it: `minutes`, `minutes:seconds`, `hours:minutes:seconds`, `days-hours:…`."""
    days, dash, rest = limit.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    hours_first = bool(dash) or len(parts) == 3
    hours, minutes, seconds = ([*parts, 0, 0] if hours_first else [0, *parts, 0])[:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, by their names in CUDA_VISIBLE_DEVICES. Does not load torch."""
    gpus = [path.name for path in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [str(number) for number in range(len(gpus))]
    # CUDA stops at the first entry that is not a GPU.
    entries = takewhile(lambda entry: entry not in ("", "-1"), (entry.strip() for entry in visible.split(",")))
    return list(entries)[: len(gpus)]


def count_gpus() -> int:
    """GPUs of this machine that this process may use."""
    return len(visible_gpus())


class Gpu(NamedTuple):
    """A GPU of this machine, as nvidia-smi reports it."""

    name: str
    gib: float
    used_gib: float


def installed_gpus(seconds: float) -> list[Gpu]:
    """All GPUs of this machine; empty where nvidia-smi is not installed, fails, or takes longer than `seconds`."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total,memory.used", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=True)
        rows = [line.rsplit(",", 2) for line in done.stdout.splitlines() if line.strip()]
        return [Gpu(name.strip(), float(total) / 1024, float(used) / 1024) for name, total, used in rows]
    except (OSError, subprocess.SubprocessError, ValueError):
        return []


def _device_memory_gib(device: str, devices_per_node: int, elsewhere: bool) -> float:
    """GiB of one device of this machine; for a GPU of another machine, PLANNED_GIB."""
    if device == "gpu" and elsewhere:
        return PLANNED_GIB
    if device == "cpu":
        import psutil

        return round(psutil.virtual_memory().total / devices_per_node / (1 << 30), 1)
    return round(min((gpu.gib for gpu in installed_gpus(20)), default=PLANNED_GIB), 1)
