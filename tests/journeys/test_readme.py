"""Types everything that the README prints, in order, in a folder outside the repository.

A block is `sh` (each line is a command), `python` (a script), or `text` (output of a command). The output of commands
is checked as well: see OUTPUT, and the events in the text block.
"""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.launch.fake_slurm import install

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
SERVER = re.compile(r"(\w+=\S+ )*mlflow (ui|models serve)\b")
"""Commands that run until they are stopped; they are up when their port answers."""
EVENT = re.compile(r"^\d\d:\d\d:\d\d  (.*)", flags=re.MULTILINE)
"""A line of a run's events."""
OUTPUT = {
    "tundish example": r"train\.jsonl",
    "tundish validate": r"2,000 samples",
    "tundish estimate": r"steps",
    "tundish create": r"COMPLETED.*Registered as version 1 of main\.lab\.dates",
    "tundish list": r"COMPLETED",
    "tundish get": r"main\.lab\.dates",
    "tundish events": r"COMPLETED",
    "tundish checkpoints": r"ep1-ba\d+",
    "tundish models": r"meta-llama/",
    "tundish doctor": r"\bOK\b",
}
"""What must be in the output of at least one of the commands that begin so."""


@dataclass(frozen=True, slots=True)
class Typed:
    """Something that the README tells its reader to type."""

    language: str
    text: str
    line: int
    """Of the README."""

    @property
    def is_repository_command(self) -> bool:
        """For a clone of the repository; CI and the tests of the recipes run these."""
        return self.text.startswith("make ")


def typed(readme: str) -> Iterator[Typed]:
    """All commands and scripts, in order."""
    for block in BLOCK.finditer(readme):
        line = readme.count("\n", 0, block.start()) + 2
        if block[1] == "python":
            yield Typed("python", block[2], line)
        elif block[1] == "sh":
            # A backslash continues a command on the next line; lines are counted nevertheless.
            text = block[2].replace("\\\n", "\\\0")
            for row in text.splitlines():
                command = re.sub(r"\s+#\s.*$", "", row.replace("\\\0", "")).strip()
                if command and not command.startswith("#"):
                    yield Typed("sh", re.sub(r"\s{2,}", " ", command), line)
                line += 1 + row.count("\0")
        else:
            assert block[1] == "text", f"README.md, line {line - 1}: a block of {block[1]!r}; sh, python or text is run"


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A folder with a space in its name, and an environment in which nothing is set."""
    home = tmp_path_factory.mktemp("reader")
    folder, slurm, jobs = home / "my work", home / "slurm", home / "jobs"
    folder.mkdir()
    jobs.mkdir()
    install(slurm)
    (jobs / "pending").touch()  # the example asks for nodes that are not here
    ours = ("TUNDISH_", "MLFLOW_", "PYTEST_", "SLURM_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    environment |= {
        "HOME": str(home),
        "PATH": os.pathsep.join([str(slurm), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "FAKE_SLURM": str(jobs),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
    }
    return folder, environment


def test_all_that_the_readme_prints_works_as_printed(reader: tuple[Path, dict[str, str]]) -> None:
    """A first command that fails, a command that was renamed, an example with undefined names, outdated output."""
    folder, environment = reader
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    seen = dict.fromkeys(OUTPUT, False)
    outputs: list[str] = []
    for step in typed(readme):
        if step.is_repository_command:
            continue
        output = _run(step, folder, environment)
        outputs.append(output)
        for words, pattern in OUTPUT.items():
            seen[words] |= step.text.startswith(words) and re.search(pattern, output, re.DOTALL) is not None
        print(f"--- README.md, line {step.line}: {step.text}\n{output}")
    assert len(outputs) >= 20
    assert [words for words, was_seen in seen.items() if not was_seen] == []
    printed, happened = _events(readme), _events("\n".join(outputs))
    assert len(printed) >= 6
    assert [line for line in printed if not any(other.startswith(line.rstrip(" …")) for other in happened)] == []
    assert not (folder / "mlruns").exists()


def _events(text: str) -> list[str]:
    """The events in a text; numbers and the host's name are left out, as each run has its own."""
    return [re.sub(r"(?<=started on )[^\d\s]\S*|\d[\w.,]*", "#", event) for event in EVENT.findall(text)]


def _run(step: Typed, folder: Path, environment: dict[str, str]) -> str:
    """The output of a command or script, which must succeed."""
    if SERVER.match(step.text):
        return _serve(step, folder, environment)
    command = [sys.executable, "-c", step.text] if step.language == "python" else ["bash", "-c", step.text]
    result = subprocess.run(
        command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=900
    )
    output = result.stdout + result.stderr
    assert result.returncode == 0 and "Traceback" not in output, f"README.md, line {step.line}: {step.text}\n{output}"
    return output


def _serve(step: Typed, folder: Path, environment: dict[str, str]) -> str:
    """Start a server, wait until its port answers, and stop it with everything that it started."""
    words = shlex.split(step.text)
    port = int(words[words.index("--port") + 1] if "--port" in words else 5000)
    log = folder.parent / "server.log"
    with open(log, "w") as out:
        server = subprocess.Popen(
            ["bash", "-c", step.text],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return log.read_text()
            assert server.poll() is None, f"README.md, line {step.line}: {step.text}\n{log.read_text()}"
            time.sleep(0.2)
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
