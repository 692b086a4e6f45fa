"""Why a stage failed, from what its processes have written: a cause, a sentence, and the end of the log; pure."""

import re
import signal
from collections.abc import Mapping
from dataclasses import dataclass

from tundish import errors
from tundish.base.text import redacted
from tundish.errors import FailureCause
from tundish.plan.overrides import LESS_MEMORY

ERROR_LINE = re.compile(
    r"^(?:\[rank\d+\]: *)?((?:[A-Za-z_]\w*\.)*(?:[A-Z]\w*(?:Error|Exception|Interrupt|Exit)\b|Exception(?=:|$)).*)$"
)
CRASHED = re.compile(r"Rank (\d+) crashed with exit code")
LOST_NODE = re.compile(r"(node \d+ \([^)]*\) (?:has not been heard from|is heard from again).*)")
OWN_ERROR = re.compile(r"tundish\.errors\.(\w+Error)\b")
QUOTED_LINES = 12
QUOTED_CHARACTERS = 300
"""Of a line, at most."""
LAUNCHER_WORDS = (
    "composer.cli.launcher", "Waiting up to", "Global rank", "----------Begin", "----------End",
    "Error occurred. Press",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Known:
    """How a cause shows in a log, and what to do about it."""

    sign: str
    """A regular expression, looked for in the error and in the last lines of its log."""
    advice: str


KNOWN: dict[FailureCause, Known] = {
    # In this order: the first whose sign is found is the cause.
    FailureCause.OUT_OF_MEMORY: Known(
        r"CUDA out of memory|OutOfMemoryError|HIP out of memory|CUDA error: out of memory",
        f"A device ran out of memory. {LESS_MEMORY}, shorten context_length, or use more devices; `tundish estimate` "
        "plans with compute's device_memory_gib.",
    ),
    FailureCause.HOST_OUT_OF_MEMORY: Known(
        r"DefaultCPUAllocator: can't allocate memory|Cannot allocate memory|^MemoryError|oom-kill|oom_kill|"
        r"Out of memory: Kill|memory allocation of \d+ bytes failed",
        f"The machine ran out of memory. {LESS_MEMORY}, use fewer ranks on it, or a machine with more.",
    ),
    FailureCause.GATED_MODEL: Known(
        r"GatedRepoError|gated repo|Access to model .* is restricted|401 Client Error|403 Client Error",
        "The model hub refuses access to the model. Accept its license on its page, and set HF_TOKEN to a token of "
        "that account.",
    ),
    FailureCause.HUB_UNREACHABLE: Known(
        r"LocalEntryNotFoundError|OfflineModeIsEnabled|couldn't connect to '?https?://|Cannot send a request, as the "
        r"client|NameResolutionError|Temporary failure in name resolution",
        "The model hub cannot be reached from this machine. Download the model where it can be (`huggingface-cli "
        "download`), and give its folder as model, or unset HF_HUB_OFFLINE.",
    ),
    FailureCause.DISK_FULL: Known(
        r"No space left on device|ENOSPC|Disk quota exceeded",
        "A disk is full. Free some space, or move $TUNDISH_HOME or save_folder to another disk; then resume the run.",
    ),
    FailureCause.SHARED_MEMORY_FULL: Known(
        r"insufficient shared memory|Bus error|unable to (?:open|write to|mmap).*shm",
        "Shared memory (/dev/shm) is full or too small. Give a container more of it (--shm-size=8g).",
    ),
    FailureCause.TOO_MANY_FILES: Known(
        r"Too many open files",
        "Raise the limit of open files (`ulimit -n 65536`) where the run is created.",
    ),
    FailureCause.PORT_IN_USE: Known(
        r"EADDRINUSE|[Aa]ddress already in use",
        "Another process has taken the port of the ranks. Resume the run: another port is chosen.",
    ),
    FailureCause.DRIVER_TOO_OLD: Known(
        r"CUDA driver version is insufficient|no kernel image is available|NVIDIA driver on your system is too old",
        "The GPU driver does not fit the installed torch. `tundish doctor` shows both versions.",
    ),
    FailureCause.MLFLOW_UNREACHABLE: Known(
        r"^mlflow\.exceptions\.|sqlalchemy\.exc\.OperationalError|database is locked",
        "MLflow's store cannot be used. `tundish doctor` checks it; then resume the run.",
    ),
    FailureCause.RANKS_DISCONNECTED: Known(
        r"Watchdog caught collective operation timeout|Timed out waiting \d+ms|Connection closed by peer|"
        r"Connection reset by peer|Socket Timeout|DistStoreError|DistNetworkError|clients joined",
        "The ranks lost their connection. If one of them exited, its own log says why; otherwise check the network "
        "between the nodes (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME), and if a rank is only slow, raise dist_timeout by "
        "overrides.",
    ),
}
SIGNS = {cause: re.compile(known.sign) for cause, known in KNOWN.items()}


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why a stage failed."""

    cause: FailureCause
    sentence: str
    """What went wrong and, where it is known, what to do."""
    quoted: str = ""
    """The lines at the end of the log that show it; may be empty."""


def explain(logs: Mapping[str, str], returncode: int) -> Explanation:
    """Why a stage failed that has left no result.

    Args:
        logs: name → text of each log of the stage, the launcher's own first.
        returncode: of the stage's process.
    """
    name = failing_log(logs)
    text = redacted(logs.get(name, "")) if name else ""  # before lines are cut, which could halve a secret
    end = _end(text)
    error = last_error(text)
    cause = _cause(error or "", end)
    if error is None:
        code = _signed(returncode)
        how = f"was killed by {_signal_name(-code)}" if code < 0 else f"exited with code {code}"
        if code == -signal.SIGKILL:
            how += ", often the out-of-memory killer (check dmesg)"
        error = f"its process {how}."
        if cause is FailureCause.UNKNOWN:
            error = f"its process {how}, and its log shows no error."
            if code < 0:
                cause = FailureCause.KILLED if -code in (signal.SIGKILL, signal.SIGTERM) else FailureCause.CRASHED
    sentences = [error if error.endswith((".", "!")) else error + "."]
    advice = KNOWN[cause].advice if cause in KNOWN else ""
    if cause in (FailureCause.RANKS_DISCONNECTED, FailureCause.UNKNOWN) and (
        lost := lost_nodes("\n".join(logs.values()))
    ):
        sentences += [f"{sentence[0].upper()}{sentence[1:]}" for sentence in lost]
        advice, cause = KNOWN[FailureCause.RANKS_DISCONNECTED].advice, FailureCause.NODE_LOST
    sentences += [advice] if advice else []
    return Explanation(cause, " ".join(sentences), f"The end of {name}:\n{end}" if end else "")


def cause_of(error: BaseException) -> FailureCause:
    """The cause that an error has, by its class or by its text and that of the errors which caused it."""
    cause = error.failure if isinstance(error, errors.TundishError) else FailureCause.UNKNOWN
    chain: BaseException | None = error
    while cause in (FailureCause.UNKNOWN, FailureCause.BAD_INPUT) and chain is not None:
        text = f"{type(chain).__module__}.{type(chain).__qualname__}: {chain}"
        by_text = next((known for known, sign in SIGNS.items() if sign.search(text)), None)
        cause, chain = by_text or cause, chain.__cause__
    if cause is FailureCause.BAD_INPUT and isinstance(error, errors.InputError):
        of_model = all(problem.startswith("model: ") for problem in error.problems)
        cause = FailureCause.BAD_MODEL if of_model else cause
    return cause


def _cause(error: str, end: str) -> FailureCause:
    """Of an error's line, or else of the lines around it."""
    for text in (error, end):
        for cause, sign in SIGNS.items():
            if sign.search(text):
                return cause
    raised = OWN_ERROR.match(error)
    kind = getattr(errors, raised[1], None) if raised else None
    return kind.failure if isinstance(kind, type) and issubclass(kind, errors.TundishError) else FailureCause.UNKNOWN


def _signed(returncode: int) -> int:
    """A process's return code; negative where a signal ended it, directly or below a launcher or a shell."""
    if 192 < returncode < 255:
        return returncode - 256  # the launcher exits with its rank's -9, of which the system makes 247
    if 128 < returncode <= 128 + 64:
        return 128 - returncode  # srun and shells
    return returncode


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def failing_log(logs: Mapping[str, str]) -> str | None:
    """The log of the rank that ended first, as the launcher says; else the first one with an error."""
    crashed = next((match[1] for text in logs.values() if (match := CRASHED.search(text))), None)
    named = [name for name in logs if crashed is not None and name.endswith(f"-rank{crashed}.log")]
    # The first rank of a node prints to its launcher's log.
    for name in [*named, *logs]:
        if last_error(logs[name]):
            return name
    return next(iter(logs), None)


def last_error(text: str) -> str | None:
    """The last line of a log that names an exception; the launcher's own are left out."""
    matches = (ERROR_LINE.match(line) for line in reversed(text.splitlines()))
    return next((match[1] for match in matches if match), None)


def lost_nodes(text: str) -> list[str]:
    """A sentence for each node that was silent when training ended."""
    latest: dict[str, str] = {}
    for sentence in LOST_NODE.findall(text):
        latest[sentence.partition(")")[0]] = sentence
    return [sentence for sentence in latest.values() if "not been heard" in sentence]


def _end(text: str) -> str:
    """The last lines that are not the launcher's, indented."""
    lines = [
        line.rstrip() for line in text.splitlines() if line.strip() and not any(word in line for word in LAUNCHER_WORDS)
    ]
    return "\n".join(f"    {line[:QUOTED_CHARACTERS]}" for line in lines[-QUOTED_LINES:])
