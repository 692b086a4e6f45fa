"""Why a stage failed, from what its processes have written: the cause in a sentence, and the end of the log; pure."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from tundish.base.text import redacted
from tundish.plan.overrides import LESS_MEMORY

ERROR_LINE = re.compile(
    r"^(?:\[rank\d+\]: *)?((?:[A-Za-z_]\w*\.)*(?:[A-Z]\w*(?:Error|Exception|Interrupt|Exit)\b|Exception(?=:|$)).*)$"
)
CRASHED = re.compile(r"Rank (\d+) crashed with exit code")
LOST_NODE = re.compile(r"(node \d+ \([^)]*\) (?:has not been heard from|is heard from again).*)")
QUOTED_LINES = 12
QUOTED_CHARACTERS = 300
"""Of a line, at most."""
LAUNCHER_WORDS = (
    "composer.cli.launcher", "Waiting up to", "Global rank", "----------Begin", "----------End",
    "Error occurred. Press",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Common:
    """A cause that is known, and what to do about it."""

    sign: re.Pattern[str]
    advice: str


def _common(sign: str, advice: str) -> Common:
    return Common(re.compile(sign), advice)


COMMON = (
    _common(
        r"CUDA out of memory|OutOfMemoryError|HIP out of memory",
        f"A device ran out of memory. {LESS_MEMORY}, shorten context_length, or use more devices; `tundish estimate` "
        "plans with compute's device_memory_gib.",
    ),
    _common(
        r"DefaultCPUAllocator: can't allocate memory|Cannot allocate memory|^MemoryError|oom-kill|Out of memory: Kill",
        f"The machine ran out of memory. {LESS_MEMORY}, use fewer ranks on it, or a machine with more.",
    ),
    _common(
        r"GatedRepoError|gated repo|Access to model .* is restricted|401 Client Error|403 Client Error",
        "The model hub refuses the model. Accept its licence on its page, and set HF_TOKEN to a token of that account.",
    ),
    _common(
        r"LocalEntryNotFoundError|OfflineModeIsEnabled|couldn't connect to '?https?://|Cannot send a request, as the "
        r"client|NameResolutionError|Temporary failure in name resolution",
        "The model hub cannot be reached from here. Download the model where it can be (`huggingface-cli download`), "
        "and give its folder as model, or unset HF_HUB_OFFLINE.",
    ),
    _common(
        r"No space left on device|ENOSPC|Disk quota exceeded",
        "A disk is full. Make room, or move $TUNDISH_HOME or save_folder to another one; then resume the run.",
    ),
    _common(
        r"insufficient shared memory|Bus error|unable to (?:open|write to|mmap).*shm",
        "Shared memory (/dev/shm) is full or small. Give a container more of it (--shm-size=8g).",
    ),
    _common(r"Too many open files", "Raise the limit of open files (`ulimit -n 65536`) where the run is created."),
    _common(
        r"EADDRINUSE|address already in use|Address already in use",
        "Another process has taken the port of the ranks. Resume the run: another port is chosen.",
    ),
    _common(
        r"Watchdog caught collective operation timeout|Timed out waiting \d+ms|Connection closed by peer|"
        r"Connection reset by peer|Socket Timeout|DistStoreError|DistNetworkError|clients joined",
        "The ranks lost each other. If a rank ended, its own log says why; else look at the network between the nodes "
        "(NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME), and raise dist_timeout by overrides where a rank is only slow.",
    ),
    _common(r"CUDA driver version is insufficient|no kernel image is available|NVIDIA driver on your system is too old",
            "The driver does not fit the installed torch. `tundish doctor` shows both."),
)  # fmt: skip


def explain(logs: Mapping[str, str], returncode: int) -> str:
    """The cause in a sentence or two, and the end of the log that shows it.

    Args:
        logs: name → text of each log of the stage, the launcher's own first.
        returncode: of the stage's process.
    """
    name = failing_log(logs)
    text = redacted(logs.get(name, "")) if name else ""  # before its lines are cut, a secret among them
    line = last_error(text)
    if line is None:
        if 192 < returncode < 255:
            returncode -= 256  # the launcher ends with its rank's -9, of which the system makes 247
        how = f"was killed by signal {-returncode}" if returncode < 0 else f"ended with exit code {returncode}"
        if returncode == -9:
            how += " (by somebody, or by the kernel for want of memory: `dmesg` tells)"
        line = f"its process {how} and left no error in its log."
    sentences = [line if line.endswith((".", "!")) else line + "."]
    sentences += [f"{lost[0].upper()}{lost[1:]}" for lost in lost_nodes("\n".join(logs.values()))]
    sentences += [cause.advice for cause in COMMON if cause.sign.search(line) or cause.sign.search(_end(text))][:1]
    quoted = f"\nThe end of {name}:\n{_end(text)}" if _end(text) else ""
    return " ".join(sentences) + quoted


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
    """The nodes that were not heard from any more when training ended."""
    latest: dict[str, str] = {}
    for sentence in LOST_NODE.findall(text):
        latest[sentence.partition(")")[0]] = sentence
    return [sentence for sentence in latest.values() if "not been heard" in sentence]


def _end(text: str) -> str:
    """The last lines that are not the launcher's, indented."""
    lines = [line.rstrip() for line in text.splitlines() if line.strip() and not any(w in line for w in LAUNCHER_WORDS)]
    return "\n".join(f"    {line[:QUOTED_CHARACTERS]}" for line in lines[-QUOTED_LINES:])
