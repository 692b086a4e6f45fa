"""Everything that the README prints is typed here as it stands, in order, by somebody in a folder of their own.

A block is `sh` (each line is a command), `python` (a script), or `text` (nothing to type). What a command says is read
as well: see SAID.
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
"""Commands that go on until they are stopped; they have come up when their port answers."""
SAID = {
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
"""What a reader looks for in what a command says; a command whose words begin so must say it at least once."""


@dataclass(frozen=True, slots=True)
class Typed:
    """Something that the README asks its reader to type."""

    language: str
    text: str
    line: int
    """Of the README."""

    @property
    def is_repository_command(self) -> bool:
        """For a clone of the repository: what CI and the tests of the recipes run."""
        return self.text.startswith("make ")


def typed(readme: str) -> Iterator[Typed]:
    """All of it, in order."""
    for block in BLOCK.finditer(readme):
        line = readme.count("\n", 0, block.start()) + 2
        if block[1] == "python":
            yield Typed("python", block[2], line)
        elif block[1] == "sh":
            # A backslash makes one command of several lines; they are counted all the same.
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
    """A folder with a space in its name, and the environment of somebody who has set nothing."""
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
    """A first command that fails, a command that was renamed, an example whose names are defined nowhere."""
    folder, environment = reader
    said = dict.fromkeys(SAID, False)
    count = 0
    for each in typed((ROOT / "README.md").read_text(encoding="utf-8")):
        if each.is_repository_command:
            continue
        output = _run(each, folder, environment)
        count += 1
        for words, wanted in SAID.items():
            said[words] |= each.text.startswith(words) and re.search(wanted, output, re.DOTALL) is not None
        print(f"--- README.md, line {each.line}: {each.text}\n{output}")
    assert count >= 20
    assert [words for words, seen in said.items() if not seen] == []
    assert not (folder / "mlruns").exists()


def _run(each: Typed, folder: Path, environment: dict[str, str]) -> str:
    """What it prints."""
    if SERVER.match(each.text):
        return _serve(each, folder, environment)
    command = [sys.executable, "-c", each.text] if each.language == "python" else ["bash", "-c", each.text]
    result = subprocess.run(
        command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=900
    )
    output = result.stdout + result.stderr
    assert result.returncode == 0 and "Traceback" not in output, f"README.md, line {each.line}: {each.text}\n{output}"
    return output


def _serve(each: Typed, folder: Path, environment: dict[str, str]) -> str:
    """Start it, wait until its port answers, stop it and all that it has started."""
    words = shlex.split(each.text)
    port = int(words[words.index("--port") + 1] if "--port" in words else 5000)
    log = folder.parent / "server.log"
    with open(log, "w") as out:
        server = subprocess.Popen(
            ["bash", "-c", each.text],
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
            assert server.poll() is None, f"README.md, line {each.line}: {each.text}\n{log.read_text()}"
            time.sleep(0.2)
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
