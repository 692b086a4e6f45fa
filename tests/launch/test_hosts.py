"""Two hosts, each started by hand with what `tundish render --launch` has written; one is cut off."""

import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from tests.launch.hosts import ADDRESSES, can, cut, on_hosts, two_hosts
from tests.runs.processes import wait_until

from tundish.base import events
from tundish.checkpoints.folder import list_checkpoints
from tundish.cli import main

WriteLines = Callable[[Path, Iterable[object]], Path]
TIMEOUT_SECONDS = 40

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(not can(), reason="needs root and ip, to make network namespaces"),
]


def test_a_host_that_is_cut_off_ends_the_other_which_goes_on_alone(
    tiny_model: Path, tmp_path: Path, write_lines: WriteLines, capsys: pytest.CaptureFixture[str]
) -> None:
    """A lost cable would hold all other nodes for half an hour, and nobody would know which one it is."""
    pairs = [{"prompt": f"{n}: ", "response": "fox " * 20} for n in range(40)]
    data, out = write_lines(tmp_path / "train.jsonl", pairs), tmp_path / "shared"
    options: list[Any] = ["--model", tiny_model, "--train-data-path", data, "--register-to", "main.lab", "--launch"]
    options += ["--task-type", "INSTRUCTION_FINETUNE", "--context-length", 64, "--training-duration", "5000ba"]
    options += ["--device", "cpu", "--devices", 1, "--run-name", "hosts", "--out", out, "--set", "save_interval=20ba"]
    options += ["--set", "global_train_batch_size=4", "--set", f"dist_timeout={TIMEOUT_SECONDS}"]
    assert main(["render", *map(str, options), "--nodes", "2", "--master-addr", ADDRESSES[0]]) == 0
    commands = _commands(capsys.readouterr().out)
    with two_hosts(), on_hosts(commands, tmp_path) as hosts:
        wait_until(lambda: list_checkpoints(out / "checkpoints") or any(host.poll() is not None for host in hosts), 400)
        assert all(host.poll() is None for host in hosts), _log(out, 0)
        cut(1)
        begun = time.monotonic()
        assert [host.wait(TIMEOUT_SECONDS + 60) for host in hosts] == [1, 1]
        print(f"both hosts ended {time.monotonic() - begun:.0f} s after the cut")
    assert re.search(r"node 1 \(.+\) has not been heard from for \d+ s", _log(out, 0))
    assert re.search(r"node 0 \(.+\) has not been heard from for \d+ s", _log(out, 1))

    newest = int(list_checkpoints(out / "checkpoints")[-1].name.partition("-ba")[2])
    options[options.index("5000ba")] = f"{newest + 3}ba"
    assert main(["render", *map(str, options)]) == 0
    (alone,) = _commands(capsys.readouterr().out)
    with two_hosts(), on_hosts([alone], tmp_path) as hosts:
        assert hosts[0].wait(300) == 0, _log(out, 0)
    started = [event.message for event in events.read(out / "events.jsonl") if event.type == "TRAIN_STARTED"]
    assert started == [
        "Training started on 2 devices.",
        f"Training started on 1 device. It resumes from batch {newest}.",
    ]


def _commands(printed: str) -> list[list[str]]:
    return [line.partition(":  ")[2].split() for line in printed.splitlines() if line.startswith("On host ")]


def _log(out: Path, rank: int) -> str:
    return (out / "logs" / f"train-rank{rank}.log").read_text(errors="replace")
