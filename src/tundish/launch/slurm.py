"""Runs of a Slurm cluster: the supervisor is the batch script of one job, and starts training on all of its nodes.

Preparation, export and registration run once, on the job's first node. A job that is preempted, or whose time limit
comes near, saves a checkpoint, goes back into Slurm's queue and continues from there. `$TUNDISH_HOME` must be on a disk
that all nodes and the submitting machine share.
"""

import os
import re
import shutil
import signal
import subprocess
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tundish.base.files import write_atomic
from tundish.base.home import absolute_environment
from tundish.base.run_folder import RunFolder
from tundish.errors import FailureCause, RequestError, SpecError, StageError
from tundish.launch.contract import Health, Life, Restart
from tundish.launch.job_script import job_script
from tundish.plan.compute import Compute

ANSWER_SECONDS = 20.0
"""Slurm's commands wait for minutes for a controller that is down."""
SUBMIT_SECONDS = 120.0
"""Long, because a job that Slurm accepted after sbatch was given up would start unexpectedly."""
HEALTH_SECONDS = 7.0
FRESH_SECONDS = 2.0
"""One answer of squeue serves all runs that are looked at within this time."""
ALIVE = frozenset(
    "PENDING CONFIGURING RUNNING COMPLETING REQUEUED REQUEUE_FED REQUEUE_HOLD RESIZING SIGNALING SPECIAL_EXIT "
    "STAGE_OUT STOPPED SUSPENDED".split()
)
"""Job states after which the job may still run."""
ENDS = {
    "TIMEOUT": (
        FailureCause.TIME_LIMIT, "Raise compute's time_limit, or its grace_s if saving a checkpoint takes longer."
    ),
    "DEADLINE": (FailureCause.TIME_LIMIT, "Its deadline passed."),
    "NODE_FAIL": (FailureCause.NODE_LOST, "A node was lost."),
    "BOOT_FAIL": (FailureCause.NODE_LOST, "A node did not boot."),
    "OUT_OF_MEMORY": (FailureCause.HOST_OUT_OF_MEMORY, "The nodes ran out of memory; ask for more with sbatch's mem."),
    "PREEMPTED": (FailureCause.PREEMPTED, "It was preempted, and the cluster does not requeue such jobs."),
}  # fmt: skip
"""What the states in which a job ends mean, and what to do."""
NO_SBATCH = "there is no sbatch on this machine's PATH"
SUBMIT_ELSEWHERE = "Run tundish where jobs are submitted."
PASSED_ON = re.compile(
    r"(AWS|AZURE|CUDA|DATABRICKS|GCS|GLOO|GOOGLE|HF|HUGGING_FACE_HUB|LC|MLFLOW|MOSAICML_STREAMING|NCCL|OCI|OMP|S3|TORCH|"
    r"TUNDISH|UCX)_\w+|HOME|PG\w+|"
    r"USER|XDG_CACHE_HOME|LOGNAME|LANG|PATH|LD_LIBRARY_PATH|PYTHONPATH|VIRTUAL_ENV|SSL_CERT_FILE|REQUESTS_CA_BUNDLE|"
    r"(http|https|no)_proxy|(HTTP|HTTPS|NO)_PROXY|KRB5CCNAME|SLURM_CONF"
)
"""Variables of the caller's environment that the job gets. Their values are given to sbatch, never to a file."""


@dataclass(frozen=True, slots=True)
class SlurmJob:
    """How Slurm identifies the supervisor of a run."""

    job: str
    """The job's number."""


RECORD = SlurmJob
STARTS_ALL_NODES = True
SERVICE = "Slurm"


def problems(compute: Compute) -> list[str]:
    """Whether this machine can submit jobs."""
    if shutil.which("sbatch"):
        return []
    return [f"compute: launcher 'slurm': {NO_SBATCH}. {SUBMIT_ELSEWHERE}"]


def health() -> Health:
    """Which nodes the cluster has, and whether this machine can submit jobs."""
    if shutil.which("sinfo") is None:
        return Health("absent", "no sinfo on PATH; runs train on this machine")
    try:
        version = _ask("sinfo", "--version", seconds=HEALTH_SECONDS).strip()
        rows = _ask("sinfo", "--noheader", "--format=%R|%D|%T", seconds=HEALTH_SECONDS)
    except RequestError as error:
        if "configuration source" in error.message:
            return Health("absent", "sinfo is installed, but no cluster is configured")
        advice = "Check slurm.conf (SLURM_CONF) and that slurmctld runs; runs on this machine do not need it."
        return Health("problem", error.message.rstrip("."), advice)
    partitions: dict[str, list[str]] = defaultdict(list)
    for name, nodes, state in (line.split("|") for line in rows.split()):
        partitions[name].append(f"{nodes} {state}")
    nodes = "; ".join(f"{name}: {', '.join(states)}" for name, states in partitions.items()) or "no partition"
    text = f"{version}, nodes of {nodes}"
    if not re.search(r"\|(idle|mix|alloc|comp|plan)", rows):
        return Health("problem", text, "No node takes jobs: `sinfo -R` shows why.")
    if shutil.which("sbatch") is None:
        return Health("problem", f"{text}; {NO_SBATCH}", SUBMIT_ELSEWHERE)
    return Health("ok", text)


def submit(run: RunFolder, compute: Compute) -> None:
    """Write the batch script and give it to sbatch.

    Raises:
        SpecError: Slurm refuses it.
    """
    if _adopted(run):
        return
    write_atomic(run.batch_script, job_script(compute, run))
    # Variables of a job that we run in, and sbatch's own, would change this job.
    environment = {
        name: value for name, value in absolute_environment().items() if not re.match(r"SLURM_(?!CONF$)|SBATCH_", name)
    }
    names = ",".join(sorted(name for name in environment if PASSED_ON.fullmatch(name)))
    command = ("sbatch", "--parsable", f"--export={names}", str(run.batch_script))
    try:
        job = _ask(*command, seconds=SUBMIT_SECONDS, env=environment).strip().partition(";")[0]
    except RequestError as error:
        if not _adopted(run):
            raise SpecError(f"compute: {error.message} Correct compute, or try again.") from error
        return
    try:
        _record(run, job)
    except BaseException:
        _ask("scancel", "--quiet", job)
        raise


def record_supervisor(run: RunFolder, compute: Compute) -> None:
    """Record the job that this process runs in."""
    _record(run, os.environ["SLURM_JOB_ID"])


def _record(run: RunFolder, job: str) -> None:
    run.write_supervisor("slurm", SlurmJob(job))


def adopt(run: RunFolder) -> None:
    """Record a job that was submitted for this run but never recorded."""
    _adopted(run)


def _adopted(run: RunFolder) -> bool:
    if not run.batch_script.exists() or run.supervisor.exists():
        return False
    try:
        job = _job_of(run)
    except RequestError:
        return False
    if job is not None:
        _record(run, job)
    return job is not None


def may_have(run: RunFolder) -> bool:
    """Whether there is, or may be, a job of the run that was never recorded."""
    try:
        return run.batch_script.exists() and _job_of(run) is not None
    except RequestError:
        return True


def _job_of(run: RunFolder) -> str | None:
    text = _ask("squeue", "--me", "--noheader", f"--name={run.name}", "--format=%i")
    return next(iter(text.split()), None)


def state(run: RunFolder, record: SlurmJob) -> Life:
    """From squeue, else from what Slurm remembers of jobs that have ended."""
    job, name = record.job, run.name
    # The cached answer may be older than the job, and squeue forgets jobs some minutes after their end.
    try:
        known = _jobs().get((job, name)) or _squeue(f"--jobs={job}").get((job, name)) or _ended(job, name)
    except RequestError as error:
        return Life(alive=True, unknown=f"Slurm job {job}: {error.message}")
    if known is None:
        return Life(alive=False, end=f"Slurm no longer knows job {job}.")
    status, reason = known
    if status in ALIVE:
        why = f": {reason}" if reason not in ("", "None") else ""
        return Life(alive=True, waiting=f"Slurm job {job} is pending{why}." if status == "PENDING" else "")
    cause, advice = ENDS.get(status, (FailureCause.UNKNOWN, ""))
    text = f"Slurm ended job {job}: {status}. {advice}".strip()
    return Life(alive=False, end=text, cause=cause, canceled=status == "CANCELLED")


def cancel(run: RunFolder, record: SlurmJob, seconds: float) -> None:
    """Let the supervisor end its stage and record the end; then end what is left of the job.

    Raises:
        RequestError: Slurm does not answer.
    """
    job, end = record.job, time.monotonic() + seconds

    def status() -> str | None:
        return _squeue(f"--jobs={job}").get((job, run.name), (None,))[0]

    if (before := status()) is None:
        return
    if before == "RUNNING":
        # To the supervisor alone, which ends its stage and records CANCELED: plain scancel kills without waiting.
        _ask("scancel", "--quiet", "--batch", "--signal=INT", job)
        while time.monotonic() < end - seconds / 2 and status() == "RUNNING":
            time.sleep(0.3)
        # A step that ignores SIGTERM would stay for Slurm's KillWait seconds.
        _ask("scancel", "--quiet", "--full", "--signal=KILL", job)
    _ask("scancel", "--quiet", job)
    while time.monotonic() < end and status() in ALIVE:
        time.sleep(0.3)


def wait_for_devices(run: RunFolder) -> Sequence[str]:
    """Nothing to wait for: Slurm starts a job when its devices are free, and shows it no others."""
    return ()


def release_devices(run: RunFolder) -> None:
    """Nothing: the job's devices are released when it ends."""


def restart(stopped_by: signal.Signals, *, progressed: bool) -> Restart | None:
    """The job goes back into Slurm's queue; it begins anew when its turn comes."""
    job = os.environ["SLURM_JOB_ID"]
    at_time_limit = stopped_by is signal.SIGUSR1  # the job script asks for this signal before the limit
    if at_time_limit and not progressed:
        raise StageError(
            "The run made no progress within the job's time limit. Raise compute's time_limit, or save more often.",
            failure=FailureCause.TIME_LIMIT,
        )

    def request() -> None:
        # A job that was canceled, or that Slurm requeues itself, is no longer RUNNING.
        if at_time_limit or any(status == "RUNNING" for status, _ in _squeue(f"--jobs={job}").values()):
            _ask("scontrol", "requeue", job)

    return Restart(f"Slurm job {job} received {stopped_by.name}. It resumes when Slurm starts it again.", request)


def scripts(
    compute: Compute, run: RunFolder, address: str | None, port: int, environment: Mapping[str, str]
) -> dict[str, str]:
    """The batch script; Slurm knows the hosts."""
    return {run.batch_script.name: job_script(compute, run)}


_latest: tuple[float, dict[tuple[str, str], tuple[str, str]] | RequestError] = (-FRESH_SECONDS, {})
"""When squeue was last asked for all jobs, and its answer: also a missing one serves all runs of a list."""


def _jobs() -> dict[tuple[str, str], tuple[str, str]]:
    """The user's jobs, from an answer that is FRESH_SECONDS old at most."""
    global _latest
    if time.monotonic() - _latest[0] >= FRESH_SECONDS:
        try:
            answer = _squeue("--me")
        except RequestError as error:
            answer = error
        _latest = time.monotonic(), answer
    if isinstance(_latest[1], RequestError):
        raise _latest[1]
    return _latest[1]


def _squeue(which: str) -> dict[tuple[str, str], tuple[str, str]]:
    """Status and reason of jobs, by number and name: years later, the number alone may be another job's.

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
    return {(job, name): (status, reason) for job, status, reason, name in rows}


def _ended(job: str, name: str) -> tuple[str, str] | None:
    """Status and reason of a job that squeue has forgotten, from accounting where there is some."""
    try:
        text = _ask("sacct", "--allocations", "--parsable2", "--noheader", "--jobs", job, "--format=State,JobName%200")
    except RequestError:
        return None  # no accounting
    rows = (line.split("|") for line in text.splitlines())
    return next(((row[0].split()[0], "") for row in rows if row[0] and row[-1] == name), None)


def _ask(*command: str, seconds: float = ANSWER_SECONDS, env: Mapping[str, str] | None = None) -> str:
    """What one of Slurm's commands prints.

    Raises:
        RequestError: it is not installed, fails, or does not answer in time.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False, env=env)
    except FileNotFoundError:
        raise RequestError(f"there is no {command[0]} on this machine's PATH.") from None
    except subprocess.TimeoutExpired:
        raise RequestError(f"{command[0]} did not answer within {seconds:g} s.") from None
    if done.returncode != 0:
        output = " ".join(done.stderr.split())[:500] or f"exit code {done.returncode}"
        raise RequestError(f"{command[0]} failed: {output}.")
    return done.stdout
