"""Compute: where to train and on how many devices."""

import dataclasses
import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, cast

PLANNED_GIB = 80.0
"""Of a GPU where none can be asked."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Compute:
    """Where to train and on how many devices."""

    device: Literal["gpu", "cpu"]
    devices_per_node: int
    """Processes on each node: one a GPU, or ranks that share the processor."""
    nodes: int = 1
    launcher: Literal["local"] = "local"
    device_memory_gib: float = PLANNED_GIB
    """Of one device; on a CPU, a rank's share of the machine's."""

    @property
    def devices(self) -> int:
        """World size."""
        return self.nodes * self.devices_per_node

    @classmethod
    def parse(cls, value: object) -> "Compute":
        """Read a mapping of these fields; absent ones come from this machine.

        Raises:
            ValueError: an unknown key or a value that is not allowed.
        """
        if isinstance(value, Compute):
            return value
        if not isinstance(value or {}, Mapping):
            raise ValueError(
                f"found {value!r}; allowed is a mapping. For example {{'device': 'cpu', 'devices_per_node': 2}}."
            )
        given = dict(cast(Mapping[str, Any], value or {}))
        known = [f.name for f in dataclasses.fields(cls)]
        if unknown := sorted(set(given) - set(known)):
            raise ValueError(f"found unknown key {', '.join(unknown)}; allowed are {', '.join(known)}.")
        gpus = count_gpus()
        device = given.setdefault("device", "gpu" if gpus else "cpu")
        given.setdefault("devices_per_node", gpus if device == "gpu" and gpus else 1)
        for key, allowed in (("device", ("gpu", "cpu")), ("launcher", ("local",))):
            if key in given and given[key] not in allowed:
                raise ValueError(f"found {key} {given[key]!r}; allowed is {' or '.join(allowed)}.")
        for key in ("nodes", "devices_per_node"):
            if type(given.get(key, 1)) is not int or given.get(key, 1) < 1:
                raise ValueError(f"found {key} {given[key]!r}; allowed is a whole number from 1.")
        memory = given.setdefault("device_memory_gib", _device_memory_gib(device, given["devices_per_node"]))
        if type(memory) not in (int, float) or not 0 < memory < 1e6:
            raise ValueError(f"found device_memory_gib {memory!r}; allowed is a number above 0.")
        return cls(**given)


def count_gpus() -> int:
    """GPUs of this machine that this process may use, without loading torch."""
    found = [path for path in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return len(found)
    # CUDA stops at the first entry that names none.
    return min(len(found), len(list(takewhile(lambda entry: entry.strip() not in ("", "-1"), visible.split(",")))))


def _device_memory_gib(device: str, devices_per_node: int) -> float:
    """GiB of one device of this machine."""
    if device == "cpu":
        import psutil

        return round(psutil.virtual_memory().total / devices_per_node / (1 << 30), 1)
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()
        return round(min(float(mebibytes) for mebibytes in found) / 1024, 1)
    except (OSError, subprocess.SubprocessError, ValueError):
        return PLANNED_GIB
