"""Runs of a Slurm cluster: the supervisor is the batch script of one job, and starts training on all of its nodes.

Preparation, export and registration run once, on the job's first node. A job that is preempted, or whose time limit
comes near, saves a checkpoint, goes back into Slurm's queue and goes on from there. `$TUNDISH_HOME` must be on a disk
that all nodes and the submitting machine share.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping

from tundish import __version__
from tundish.base.files import write_atomic
from tundish.base.home import absolute_environment
from tundish.base.run_folder import RunFolder, SlurmJob
from tundish.errors import RequestError, SpecError
from tundish.launch.command import node_script
from tundish.launch.contract import Life
from tundish.plan.compute import Compute

ANSWER_SECONDS = 20.0
"""Slurm's commands wait for a controller that is away for minutes."""
SUBMIT_SECONDS = 120.0
"""A job that was taken, though sbatch was given up, would start when nobody expects it."""
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
    r"(AWS|AZURE|CUDA|DATABRICKS|GLOO|GOOGLE|HF|HUGGING_FACE_HUB|LC|MLFLOW|NCCL|OCI|OMP|S3|TORCH|TUNDISH|UCX)_\w+|HOME|PG\w+|"
    r"USER|XDG_CACHE_HOME|LOGNAME|LANG|PATH|LD_LIBRARY_PATH|PYTHONPATH|VIRTUAL_ENV|SSL_CERT_FILE|REQUESTS_CA_BUNDLE|"
    r"(http|https|no)_proxy|(HTTP|HTTPS|NO)_PROXY|KRB5CCNAME|SLURM_CONF"
)
"""Variables of the caller's environment that the job gets. Their values are given to sbatch, never to a file."""


def job_script(compute: Compute, paths: RunFolder) -> str:
    """The text of the run's batch script; pure."""
    node = node_script(
        compute, paths, rank="$SLURM_NODEID", address="$SLURM_LAUNCH_NODE_IPADDR", port="$TUNDISH_MASTER_PORT"
    )
    options = "".join(f"#SBATCH --{name}{_value(value)}\n" for name, value in _options(compute, paths).items())
    supervisor = shlex.join([sys.executable, "-m", "tundish.supervise.supervisor", str(paths.folder)])
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
  srun {nodes} --cpu-bind=none --export=ALL --kill-on-bad-exit=1 --wait=0 bash -c "$node"
"""


def _options(compute: Compute, paths: RunFolder) -> dict[str, str]:
    log = str(paths.log("supervisor"))
    options = {"job-name": paths.folder.name, "nodes": str(compute.nodes), "ntasks-per-node": "1"}
    if compute.device == "gpu":
        options["gpus-per-node"] = str(compute.devices_per_node)
    if not {"cpus-per-task", "cpus-per-gpu", "exclusive"} & set(compute.sbatch):
        options["exclusive"] = ""  # a task of Slurm's own choice has one core for all ranks of a node
        if not {"mem", "mem-per-cpu", "mem-per-gpu"} & set(compute.sbatch):
            options["mem"] = "0"
    if compute.time_limit is not None:
        options["time"] = compute.time_limit
    options |= {"signal": f"B:USR1@{compute.grace_s}", "requeue": "", "open-mode": "append"}
    options |= {"output": log.replace("%", "%%"), "chdir": str(paths.folder)}
    return options | dict(compute.sbatch)


def _value(value: str) -> str:
    """After an option's name; sbatch reads quotes and backslashes as a shell does."""
    if value == "" or re.fullmatch(r"[\w.,:=@%/+-]+", value):
        return value and f"={value}"
    return '="' + re.sub(r'(["\\])', r"\\\1", value) + '"'


def submit(paths: RunFolder, compute: Compute) -> None:
    """Write the batch script and give it to sbatch.

    Raises:
        SpecError: Slurm refuses it.
    """
    if adopt(paths):
        return
    write_atomic(paths.job, job_script(compute, paths))
    # What a job around us was given, and sbatch's own variables, would change this one.
    given = {
        name: value for name, value in absolute_environment().items() if not re.match(r"SLURM_(?!CONF$)|SBATCH_", name)
    }
    names = ",".join(sorted(name for name in given if PASSED_ON.fullmatch(name)))
    try:
        answer = _ask("sbatch", "--parsable", f"--export={names}", str(paths.job), seconds=SUBMIT_SECONDS, env=given)
    except RequestError as error:
        if not adopt(paths):
            raise SpecError(f"compute: {error.message} Correct compute, or try again.") from error
        return
    job = answer.strip().partition(";")[0]
    try:
        note(paths, job)
    except BaseException:
        _ask("scancel", "--quiet", job)
        raise


def note(paths: RunFolder, job: str) -> None:
    """Keep which job the run is. The job does it too: whoever submits it may be killed in between."""
    write_atomic(paths.supervisor, json.dumps({"launcher": "slurm", "job": job}) + "\n")


def adopt(paths: RunFolder) -> bool:
    """Whether Slurm has a job of the run that nobody has noted, as whoever submitted it was killed; it is noted."""
    if not paths.job.exists() or paths.supervisor.exists():
        return False
    try:
        job = _job_of(paths)
    except RequestError:
        return False
    if job is not None:
        note(paths, job)
    return job is not None


def may_have(paths: RunFolder) -> bool:
    """Whether there is, or may be, a job of the run that nobody has noted."""
    try:
        return paths.job.exists() and _job_of(paths) is not None
    except RequestError:
        return True


def _job_of(paths: RunFolder) -> str | None:
    text = _ask("squeue", "--me", "--noheader", f"--name={paths.folder.name}", "--format=%i")
    return next(iter(text.split()), None)


def state(paths: RunFolder, supervisor: SlurmJob) -> Life:
    """From squeue, else from what Slurm remembers of jobs that have ended."""
    job, run = supervisor.job, paths.folder.name
    try:
        known = _jobs().get((job, run)) or _squeue(f"--jobs={job}").get((job, run)) or _ended(job, run)
    except RequestError as error:
        return Life(alive=True, unknown=f"Slurm job {job}: {error.message}")
    if known is None:
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


def cancel(paths: RunFolder, supervisor: SlurmJob, seconds: float) -> None:
    """Let the supervisor end its stage and say so; then end what is left of the job.

    Raises:
        RequestError: Slurm does not answer.
    """
    job, end = supervisor.job, time.monotonic() + seconds

    def now() -> str | None:
        return _squeue(f"--jobs={job}").get((job, paths.folder.name), (None,))[0]

    if (name := now()) is None:
        return
    if name == "RUNNING":
        _ask("scancel", "--quiet", "--batch", "--signal=INT", job)
        while time.monotonic() < end - seconds / 2 and now() == "RUNNING":
            time.sleep(0.3)
        # A step that ignores SIGTERM would be there for KillWait seconds.
        _ask("scancel", "--quiet", "--full", "--signal=KILL", job)
    _ask("scancel", "--quiet", job)
    while time.monotonic() < end and now() in GOING_ON:
        time.sleep(0.3)


def is_running(job: str) -> bool:
    """Whether Slurm means the job to go on.

    Raises:
        RequestError: it does not answer.
    """
    return any(name == "RUNNING" for name, _ in _squeue(f"--jobs={job}").values())


def requeue(job: str) -> None:
    """Put the job back into Slurm's queue; it ends here, and begins anew when its turn comes.

    Raises:
        RequestError: Slurm refuses.
    """
    _ask("scontrol", "requeue", job)


def problem() -> str | None:
    """Why this machine cannot submit jobs."""
    return None if shutil.which("sbatch") else "found no sbatch on this machine's PATH; it must be able to submit jobs."


_latest: tuple[float, dict[tuple[str, str], tuple[str, str]] | RequestError] = (-FRESH_SECONDS, {})
"""When Slurm has answered last, and what: one question serves all runs of a list, also where there is no answer."""


def _jobs() -> dict[tuple[str, str], tuple[str, str]]:
    """The user's jobs, from an answer that is FRESH_SECONDS old at most."""
    global _latest
    if time.monotonic() - _latest[0] >= FRESH_SECONDS:
        try:
            found = _squeue("--me")
        except RequestError as error:
            found = error
        _latest = time.monotonic(), found
    if isinstance(_latest[1], RequestError):
        raise _latest[1]
    return _latest[1]


def _squeue(which: str) -> dict[tuple[str, str], tuple[str, str]]:
    """State and reason of jobs, by number and name: a number alone may be another job's after years.

    Raises:
        RequestError: Slurm does not answer.
    """
    try:
        text = _ask("squeue", which, "--noheader", "--states=all", "--format=%i|%T|%r|%j")
    except RequestError as error:
        if "Invalid job id" in error.message:
            return {}
        raise
    rows = (line.strip().split("|", 3) for line in text.splitlines() if line.count("|") >= 3)
    return {(job, run): (name, reason) for job, name, reason, run in rows}


def _ended(job: str, run: str) -> tuple[str, str] | None:
    """State and reason of a job that squeue has forgotten, from accounting where there is some."""
    try:
        text = _ask("sacct", "--allocations", "--parsable2", "--noheader", "--jobs", job, "--format=State,JobName%200")
    except RequestError:
        return None  # no accounting
    rows = (line.split("|") for line in text.splitlines())
    return next(((row[0].split()[0], "") for row in rows if row[0] and row[-1] == run), None)


def _ask(*command: str, seconds: float = ANSWER_SECONDS, env: Mapping[str, str] | None = None) -> str:
    """What one of Slurm's commands answers.

    Raises:
        RequestError: it is not there, refuses, or does not answer in time.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False, env=env)
    except FileNotFoundError:
        raise RequestError(f"found no {command[0]} on this machine's PATH.") from None
    except subprocess.TimeoutExpired:
        raise RequestError(f"{command[0]} has not answered for {seconds:g} s.") from None
    if done.returncode != 0:
        said = " ".join(done.stderr.split())[:500] or f"exit code {done.returncode}"
        raise RequestError(f"{command[0]} refuses: {said}.")
    return done.stdout
