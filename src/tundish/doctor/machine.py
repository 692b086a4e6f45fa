"""What the machine offers: devices and their driver, shared memory, disk, open files.

A `judge_…` function rates what was read; the function after it reads.
"""

import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tundish.base import files
from tundish.base import home as places
from tundish.doctor.finding import Finding
from tundish.doctor.packages import torch_build
from tundish.plan.compute import Gpu, count_gpus, installed_gpus

GIB = 1 << 30
LEAST_SHARED_MEMORY = GIB
"""What NCCL's documentation advises for containers; Docker gives 64 MiB."""
LEAST_DISK = 10 * GIB
GOOD_OPEN_FILES = 65536
LEAST_OPEN_FILES = 1024
COMMAND_SECONDS = 6.0


def judge_devices(usable: int, gpus: Sequence[Gpu], cores: int, memory: int, free: int) -> Finding:
    """Where a run would train.

    Args:
        usable: GPUs that this process may use.
        gpus: all GPUs of the machine; empty where nvidia-smi does not list them.
        cores: of the CPU.
        memory: of the machine, in bytes.
        free: available memory, in bytes.
    """
    cpu = f"{cores} CPU cores, {memory / GIB:.1f} GiB of memory ({free / GIB:.1f} available)"
    if not usable:
        hidden = f"CUDA_VISIBLE_DEVICES hides all {len(gpus)}" if gpus else "runs train on the CPU"
        return Finding("devices", "ok", f"no GPU, {hidden}: {cpu}")
    if not gpus:
        return Finding("devices", "ok", f"{usable} GPUs, memory unknown; {cpu}")
    kinds = Counter((gpu.name, round(gpu.gib)) for gpu in gpus)
    names = ", ".join(f"{count} x {name} of {total} GiB" for (name, total), count in kinds.items())
    of_all = "" if usable == len(gpus) else f" ({usable} of them usable)"
    busy = [f"GPU {number}: {gpu.used_gib:.0f} GiB" for number, gpu in enumerate(gpus) if gpu.used_gib > gpu.gib / 10]
    advice = f"In use by other processes: {', '.join(busy)}; a run may run out of memory there." if busy else ""
    return Finding("devices", "ok", f"{names}{of_all}; {cpu}", advice)


def devices() -> Finding:
    """Read the devices."""
    import psutil

    memory = psutil.virtual_memory()
    cores = len(os.sched_getaffinity(0))
    return judge_devices(count_gpus(), installed_gpus(COMMAND_SECONDS), cores, memory.total, memory.available)


def judge_driver(output: str | None, torch_cuda: str | None, usable: int) -> Finding:
    """Whether the driver can run what torch was built for.

    Args:
        output: of nvidia-smi; None where there is no such command.
        torch_cuda: of the torch build; None for one without CUDA.
        usable: GPUs that this process may use.
    """
    check = "NVIDIA driver"
    if output is None:
        if usable:
            return Finding(check, "problem", f"{usable} GPUs, but no nvidia-smi on PATH", "Install the NVIDIA driver.")
        return Finding(check, "absent", "not installed; a CPU needs none")
    driver, cuda = (re.search(rf"{name} Version:\s*([\d.]+)", output) for name in ("Driver", "CUDA"))
    if driver is None or cuda is None:
        shown = " ".join(output.split())[:200] or "nothing"
        return Finding(check, "problem", f"nvidia-smi prints: {shown}", "Repair the driver; often a reboot is enough.")
    found = f"{driver[1]}, supports CUDA up to {cuda[1]}"
    if torch_cuda and _numbers(cuda[1])[0] < _numbers(torch_cuda)[0]:
        advice = f"Update the driver, or install a torch build for CUDA {_numbers(cuda[1])[0]}."
        return Finding(check, "problem", f"{found}; torch is built for CUDA {torch_cuda}", advice)
    if torch_cuda and _numbers(cuda[1]) < _numbers(torch_cuda):
        # NVIDIA's minor version compatibility: kernels run, but code that is compiled at run time may not.
        return Finding(check, "ok", f"{found}; torch is built for CUDA {torch_cuda}", "A newer driver is safer.")
    return Finding(check, "ok", found)


def driver() -> Finding:
    """Ask nvidia-smi."""
    output = None
    if shutil.which("nvidia-smi"):
        done = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False)
        output = done.stdout or done.stderr
    return judge_driver(output, torch_build().cuda, count_gpus())


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".") if part]


def judge_shared_memory(size: int, usable: int) -> Finding:
    """Whether `size` bytes of /dev/shm are enough: on GPUs, loader processes and NCCL exchange data there."""
    check, found = "shared memory", f"/dev/shm has {_size(size)}"
    if usable and size < LEAST_SHARED_MEMORY:
        advice = (
            "Ranks would be killed by bus errors. Enlarge it: `docker run --shm-size=8g …`, or mount a larger tmpfs."
        )
        return Finding(check, "problem", f"{found}; runs on GPUs need {_size(LEAST_SHARED_MEMORY)}", advice)
    return Finding(check, "ok", found if usable else f"{found}; runs on a CPU need none")


def shared_memory() -> Finding:
    """Read the size of /dev/shm."""
    folder = Path("/dev/shm")
    return judge_shared_memory(shutil.disk_usage(folder).total if folder.is_dir() else 0, count_gpus())


def judge_home(folder: Path, free: int, obstacle: str) -> Finding:
    """Whether runs can be kept in `$TUNDISH_HOME`.

    Args:
        folder: `$TUNDISH_HOME`.
        free: bytes.
        obstacle: why nothing can be written there; empty = it can.
    """
    check = "TUNDISH_HOME"
    if obstacle:
        found = f"{folder} cannot be written ({obstacle})"
        return Finding(check, "problem", found, "Set TUNDISH_HOME to a folder that you can write to.")
    needed = "a run writes 8 bytes per parameter for each checkpoint, and 2 for its export"
    found = f"{folder}, {_size(free)} free"
    if free < LEAST_DISK:
        advice = f"Free some space, or set TUNDISH_HOME to a larger disk: {needed}."
        return Finding(check, "problem", found, advice)
    return Finding(check, "ok", f"{found}; {needed}")


def home() -> Finding:
    """Check `$TUNDISH_HOME`, without creating it."""
    folder = places.home()
    obstacle = files.obstacle_to_writing(folder)
    return judge_home(folder, 0 if obstacle else shutil.disk_usage(files.existing(folder)).free, obstacle)


def judge_open_files(limit: int) -> Finding:
    """Whether a process may open enough files."""
    check, found, raise_it = "open files", f"up to {limit:,} per process", f"Raise it: `ulimit -n {GOOD_OPEN_FILES}`"
    if limit < LEAST_OPEN_FILES:
        return Finding(check, "problem", f"{found}; at least {LEAST_OPEN_FILES:,} are needed", f"{raise_it}.")
    return Finding(check, "ok", found, "" if limit >= 4096 else f"{raise_it}, if a run has many devices or shards.")


def open_files() -> Finding:
    """Read the limit, which the processes of a run inherit."""
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return judge_open_files(2**31 if limit == resource.RLIM_INFINITY else limit)


def _size(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / (1 << 20):.0f} MiB"
