"""Fast training runs of a tiny model: their ranks are forked from one process (see ranks.py)."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

WriteLines = Callable[..., Path]


@dataclass(frozen=True, slots=True)
class Trained:
    """What ranks left behind."""

    codes: list[int]
    """Exit codes; negative: killed by that signal."""
    folder: Path

    @property
    def ok(self) -> bool:
        return not any(self.codes)

    @property
    def losses(self) -> dict[int, float]:
        """Loss by batch, from 0."""
        return {int(batch): loss for batch, loss in json.loads((self.folder / "losses.json").read_text()).items()}

    @property
    def rates(self) -> list[float]:
        """Learning rate of each optimizer step; the logged ones must be equal."""
        found = json.loads((self.folder / "rates.json").read_text())
        assert found["logged"] == found["used"]
        return found["used"]

    @property
    def tokens(self) -> list[int]:
        """Tokens trained before each step, and at the end."""
        return json.loads((self.folder / "rates.json").read_text())["tokens"]

    @property
    def tables(self) -> dict[str, Any]:
        """Tables by name, as Composer's logger keeps them."""
        return json.loads((self.folder / "tables.json").read_text())

    @property
    def listening(self) -> list[list[str]]:
        """For each rank, the addresses at which it listens."""
        return [json.loads(path.read_text()) for path in sorted(self.folder.glob("listening*.json"))]

    @property
    def log(self) -> str:
        return "\n".join(path.read_text(errors="replace") for path in sorted(self.folder.glob("rank*.log")))


class Ranks:
    """The process that the ranks are forked from."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def start(self, file: Path, world: int, folder: Path, **environment: object) -> list[int]:
        """Start the ranks of a run and return their process ids."""
        if self.process is None:
            command = [sys.executable, "-W", "ignore", str(Path(__file__).parent / "ranks.py")]
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            self._read()
        folder.mkdir(parents=True, exist_ok=True)
        (file.parent / "results").mkdir(exist_ok=True)
        given = {"TUNDISH_EVENTS": file.parent / "events.jsonl", **environment}
        texts = {name: str(value) for name, value in given.items()}
        run = {"yaml": str(file), "world": world, "folder": str(folder), "environment": texts, "port": free_port()}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(run) + "\n")
        self.process.stdin.flush()
        return self._read()

    def wait(self, folder: Path) -> Trained:
        """Wait for the ranks; returns what they left behind."""
        return Trained(self._read(), folder)

    def train(self, file: Path, world: int, folder: Path, **environment: object) -> Trained:
        """Train a run's file to its end."""
        self.start(file, world, folder, **environment)
        return self.wait(folder)

    def _read(self) -> Any:
        assert self.process is not None and self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the process that forks ranks has ended"
        return json.loads(line)

    def stop(self) -> None:
        """End the process."""
        if self.process is not None:
            assert self.process.stdin is not None
            self.process.stdin.close()
            self.process.wait(30)
            assert self.process.stdout is not None
            self.process.stdout.close()


def free_port() -> int:
    """A free port."""
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Starts ranks; their parent process is started on first use."""
    found = Ranks()
    yield found
    found.stop()


@pytest.fixture
def plan(tmp_path: Path, tiny_model: Path, write_lines: WriteLines) -> Callable[..., Path]:
    """`plan(name, world=1, samples=40, …)`: the file of a run in a folder of its own, its data prepared.

    Samples are short and long, three or four a row. `more` are arguments of `create()`, `overrides` among them.
    """
    from tundish.base.run_folder import RunFolder
    from tundish.data.encoding import Job
    from tundish.data.opening import open_source
    from tundish.data.prepare import prepare
    from tundish.plan.foundry import render
    from tundish.plan.run_plan import RunPlan
    from tundish.plan.spec import parse_spec

    def make(name: str, world: int = 1, samples: int = 40, **more: Any) -> Path:
        paths = RunFolder(tmp_path / name)
        paths.data("train").parent.mkdir(parents=True)
        pairs = [{"prompt": f"{n}: ", "response": f"fox {n} " * (1 + n % 5)} for n in range(samples)]
        data = write_lines(paths.folder / "train.jsonl", pairs)
        arguments = {
            "model": str(tiny_model),
            "train_data_path": str(data),
            "register_to": "main.lab",
            "task_type": "INSTRUCTION_FINETUNE",
            "context_length": 64,
            "learning_rate": 1e-3,
            "training_duration": "2ep",
            "compute": {"device": "cpu", "devices_per_node": world},
            **more,
            "overrides": {"global_train_batch_size": 4, "save_interval": "3ba", **more.get("overrides", {})},
        }
        spec, card = parse_spec(arguments, created_at="2026-11-22T00:00:00+00:00")
        source = open_source(str(data), spec.task_type, system_message=True)
        prepared = prepare(source, Job(model=spec.model, task_type=spec.task_type, context_length=64))
        paths.data("train").symlink_to(prepared.folder)
        planned = RunPlan.of(
            spec, card, save_folder=str(paths.folder / "checkpoints"), tracking_uri="unused", registry_uri=None
        )
        content = yaml.safe_load(render(planned.completed({"train": prepared.facts}), paths))
        del content["loggers"]
        paths.foundry_yaml.write_text(yaml.safe_dump(content, sort_keys=False))
        return paths.foundry_yaml

    return make


def counted(file: Path) -> dict[str, int]:
    """Batches and tokens that a run's file has trained, as its stage records them."""
    return json.loads((file.parent / "results" / "train.json").read_text())


def prepared(file: Path) -> Any:
    """The manifest of a run's training data."""
    from tundish.data.manifest import Prepared

    return Prepared(**json.loads((file.parent / "data" / "train" / "manifest.json").read_text()))


def weights(file: Path) -> dict[str, Any]:
    """The tensors of the newest checkpoint of a run's file, including optimizer state."""
    from tundish.checkpoints.folder import list_checkpoints, read_tensors

    newest = list_checkpoints(file.parent / "checkpoints")[-1]
    return {name: tensor.read() for name, tensor in read_tensors(newest).items()}
