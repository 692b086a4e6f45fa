"""Runs of a Slurm cluster: the supervisor is the batch script of one job, and starts training on all of its nodes.

Preparation, export and registration run once, on the job's first node. A job that is preempted, or whose time limit
comes near, saves a checkpoint, goes back into Slurm's queue and goes on from there. `$TUNDISH_HOME` must be on a disk
that all nodes and the submitting machine share.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from tundish import __version__
from tundish.compute import Compute
from tundish.errors import RequestError, SpecError
from tundish.launch.command import node_script
from tundish.launch.life import Life
from tundish.paths import RunPaths, write_atomic

ANSWER_SECONDS = 20.0
"""Slurm's commands wait for a controller that is away for minutes."""
FRESH_SECONDS = 2.0
"""One question to Slurm serves all runs that are looked at within this time."""
GOING_ON = frozenset(
    "PENDING CONFIGURING RUNNING COMPLETING REQUEUED REQUEUE_FED REQUEUE_HOLD RESIZING SIGNALING SPECIAL_EXIT "
    "STAGE_OUT STOPPED SUSPENDED".split()
)
ADVICE = {
    "TIMEOUT": "Raise compute's time_limit, or its grace_s if saving a checkpoint takes longer.",
    "NODE_FAIL": "A node was lost.",
    "OUT_OF_MEMORY": "The nodes' memory did not suffice; ask for more with sbatch's mem.",
    "PREEMPTED": "It was preempted, and the cluster does not put such jobs back into the queue.",
    "DEADLINE": "Its deadline came.",
}
PASSED_ON = re.compile(
    r"(AWS|AZURE|CUDA|DATABRICKS|GLOO|GOOGLE|HF|HUGGING_FACE_HUB|LC|MLFLOW|NCCL|OCI|OMP|S3|TORCH|TUNDISH|UCX)_\w+|HOME|"
    r"USER|LOGNAME|LANG|PATH|LD_LIBRARY_PATH|PYTHONPATH|VIRTUAL_ENV|SSL_CERT_FILE|REQUESTS_CA_BUNDLE|"
    r"(http|https|no)_proxy|(HTTP|HTTPS|NO)_PROXY|KRB5CCNAME|SLURM_CONF"
)
"""Variables of the caller's environment that the job gets. Their values are given to sbatch, never to a file."""


def job_script(compute: Compute, paths: RunPaths) -> str:
    """The text of the run's batch script; pure."""
    node = node_script(
        compute, paths, rank="$SLURM_NODEID", address="$SLURM_LAUNCH_NODE_IPADDR", port="$TUNDISH_MASTER_PORT"
    )
    options = "".join(f"#SBATCH --{name}{_value(value)}\n" for name, value in _options(compute, paths).items())
    supervisor = shlex.join([sys.executable, "-m", "tundish.runs.supervisor", str(paths.folder)])
    nodes = f"--nodes={compute.nodes} --ntasks={compute.nodes} --ntasks-per-node=1"
    return f"""\
#!/bin/bash
# Run {paths.folder.name}, written by tundish {__version__}.
{options}
# What every node does to train.
node=$(cat <<'END'
{node}END
)

# On the first node: prepares the data, starts training on all nodes by the command after `--`, exports and registers.
# It takes this shell's place, and so gets the signal by which Slurm tells that the job's time is nearly over.
exec {supervisor} -- \\
  srun {nodes} --cpu-bind=none --export=ALL --kill-on-bad-exit=1 --wait=60 bash -c "$node"
"""


def _options(compute: Compute, paths: RunPaths) -> dict[str, str]:
    log = str(paths.log("supervisor"))
    options = {"job-name": paths.folder.name, "nodes": str(compute.nodes), "ntasks-per-node": "1"}
    if compute.device == "gpu":
        options["gpus-per-node"] = str(compute.devices_per_node)
    if not {"cpus-per-task", "cpus-per-gpu", "exclusive"} & set(compute.sbatch):
        options |= {"exclusive": "", "mem": "0"}  # a task of Slurm's own choice has one core for all ranks of a node
    if compute.time_limit is not None:
        options["time"] = compute.time_limit
    options |= {"signal": f"B:USR1@{compute.grace_s}", "requeue": "", "open-mode": "append"}
    options |= {"output": log.replace("%", "%%"), "chdir": str(paths.folder)}
    return options | dict(compute.sbatch)


def _value(value: str) -> str:
    return "" if value == "" else "=" + (value if re.fullmatch(r"[\w.,:=@%/+-]+", value) else f'"{value}"')


def submit(paths: RunPaths, compute: Compute) -> None:
    """Write the batch script and give it to sbatch.

    Raises:
        SpecError: Slurm refuses it.
    """
    write_atomic(paths.job, job_script(compute, paths))
    names = ",".join(sorted(name for name in os.environ if PASSED_ON.fullmatch(name)))
    try:
        answer = _ask("sbatch", "--parsable", f"--export={names}", str(paths.job))
    except RequestError as error:
        raise SpecError(f"compute: {error.message} Correct compute, or try again.") from error
    note(paths, answer.strip().partition(";")[0])


def note(paths: RunPaths, job: str) -> None:
    """Keep which job the run is. The job does it too: whoever submits it may be killed in between."""
    write_atomic(paths.supervisor, json.dumps({"launcher": "slurm", "job": job}) + "\n")


def state(paths: RunPaths, record: Mapping[str, Any]) -> Life:
    """From squeue, else from what Slurm remembers of jobs that have ended."""
    job = str(record["job"])
    moment = int(time.monotonic() / FRESH_SECONDS)
    jobs = _squeue(moment)
    if isinstance(jobs, dict) and job not in jobs:
        _squeue.cache_clear()  # submitted since
        jobs = _squeue(moment)
    if isinstance(jobs, str):
        return Life(alive=True, unknown=f"Slurm job {job}: {jobs}")
    if (known := jobs.get(job) or _ended(job)) is None:
        return Life(alive=False, end=f"Slurm does not know its job {job} any more.")
    name, reason = known
    if name in GOING_ON:
        why = f": {reason}" if reason not in ("", "None") else ""
        return Life(alive=True, waiting=f"Slurm job {job} waits{why}." if name == "PENDING" else "")
    return Life(
        alive=False,
        end=f"Slurm ended its job {job}: {name}. {ADVICE.get(name, '')}".strip(),
        canceled=name == "CANCELLED",
    )


def cancel(paths: RunPaths, record: Mapping[str, Any], seconds: float) -> None:
    """Let the supervisor end its stage and say so; then end what is left of the job."""
    job, end = str(record["job"]), time.monotonic() + seconds
    if (known := _squeue_now(job)) is None:
        return
    if known[0] == "RUNNING":
        _ask("scancel", "--quiet", "--batch", "--signal=INT", job)
        while time.monotonic() < end - seconds / 2 and (found := _squeue_now(job)) and found[0] == "RUNNING":
            time.sleep(0.3)
        # A step that ignores SIGTERM would be there for KillWait seconds.
        _ask("scancel", "--quiet", "--full", "--signal=KILL", job)
    _ask("scancel", "--quiet", job)
    while time.monotonic() < end and (found := _squeue_now(job)) and found[0] in GOING_ON:
        time.sleep(0.3)


def requeue(job: str) -> None:
    """Put the job back into Slurm's queue; it ends here, and begins anew when its turn comes.

    Raises:
        RequestError: Slurm refuses.
    """
    _ask("scontrol", "requeue", job)


def problem() -> str | None:
    """Why this machine cannot submit jobs."""
    return None if shutil.which("sbatch") else "found no sbatch on this machine's PATH; it must be able to submit jobs."


@lru_cache(maxsize=1)
def _squeue(_moment: int) -> dict[str, tuple[str, str]] | str:
    """State and reason of the user's jobs that squeue knows, by number; else why it tells nothing."""
    try:
        text = _ask("squeue", "--me", "--noheader", "--states=all", "--format=%i|%T|%r")
    except RequestError as error:
        return error.message
    rows = (line.strip().split("|", 2) for line in text.splitlines() if line.count("|") >= 2)
    return {job: (name, reason) for job, name, reason in rows}


def _squeue_now(job: str) -> tuple[str, str] | None:
    _squeue.cache_clear()
    if isinstance(jobs := _squeue(0), str):
        raise RequestError(f"Slurm job {job} cannot be canceled: {jobs} Try again.")
    return jobs.get(job)


def _ended(job: str) -> tuple[str, str] | None:
    """State and reason of a job that squeue has forgotten, from accounting where there is some."""
    try:
        text = _ask("sacct", "--allocations", "--parsable2", "--noheader", "--jobs", job, "--format=State%40")
    except RequestError:
        return None  # no accounting
    words = text.split()
    return (words[0].rstrip("+"), "") if words else None


def _ask(*command: str) -> str:
    """What one of Slurm's commands answers.

    Raises:
        RequestError: it is not there, refuses, or does not answer in time.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_SECONDS, check=False)
    except FileNotFoundError:
        raise RequestError(f"found no {command[0]} on this machine's PATH.") from None
    except subprocess.TimeoutExpired:
        raise RequestError(f"{command[0]} has not answered for {ANSWER_SECONDS:g} s.") from None
    if done.returncode != 0:
        said = " ".join(done.stderr.split())[:500] or f"exit code {done.returncode}"
        raise RequestError(f"{command[0]} refuses: {said}.")
    return done.stdout
