"""Kills spread over a whole run, and what must hold after each of them."""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from tests.runs.processes import ranks, stages, supervisor, wait_until

from tundish import foundation_model as fm
from tundish.base import events
from tundish.base.run_folder import RunFolder
from tundish.supervise.supervisor import STAGES

MOMENTS = ("created", "prepare", "load", "train", "save", "export", "register", "end")
TARGETS = ("supervisor", "stage", "one", "all")
"""What is killed; `one` is a rank while ranks live, else a process that has started no other."""
SLACK_SECONDS = 5.0
"""For the kernel to end processes that lost their parent."""
WAIT_SECONDS = 240.0


@dataclass(frozen=True, slots=True)
class Row:
    """One kill, as the table shows it."""

    devices: int
    moment: str
    killed: str
    status: str
    then: str

    COLUMNS = ("#", "ranks", "moment", "killed", "right after", "then")

    def text(self, number: int) -> str:
        """A row of Markdown."""
        cells = (str(number), str(self.devices), self.moment, self.killed, self.status, self.then)
        return f"| {' | '.join(cells)} |"


@dataclass
class Victim:
    """A run, its usual durations, and what has happened since it was last started or went on by itself."""

    paths: RunFolder
    devices: int
    seconds: dict[str, float]
    rng: random.Random
    check: Callable[[RunFolder], None]
    """Called after each kill: everything visible must be complete."""
    rows: list[Row] = field(default_factory=list[Row])
    _since: int = 0
    _seen: float = 0.0

    def kill(self, moment: str, target: str) -> None:
        """Kill at the chosen moment, check, and continue."""
        self._await(moment)
        where, before = self._where(), events.read(self.paths.events)
        family = self._family()
        chosen, name = self._chosen(target, family)
        alone = supervisor(self.paths)
        for process in chosen:
            _kill(process)
        if alone is None or alone in chosen:
            wait_until(lambda: not _alive(family) and not stages(self.paths), SLACK_SECONDS)
        else:
            wait_until(lambda: self._has_reacted(len(before), family), WAIT_SECONDS)
        status = self._status(family)
        self.check(self.paths)
        self._since = len(events.read(self.paths.events))
        then = self._go_on()
        self.rows.append(Row(self.devices, where, name, status, then))

    def _await(self, moment: str) -> None:
        """Wait until the run gets there, then for a random part of the usual duration."""
        number = self.rng.randint(1, 2)
        wait_until(lambda: self._reached(moment, number), WAIT_SECONDS, pause=0.002)
        self._seen = time.monotonic()
        end = self._seen + self.rng.random() * self.seconds[moment]
        while time.monotonic() < end and not self._is_over(moment):
            time.sleep(0.005)

    def _reached(self, moment: str, number: int) -> bool:
        new = [event.type for event in events.read(self.paths.events)[self._since :]]
        done = {stage: self.paths.is_done(stage) for stage in STAGES}
        match moment:
            case "created":
                return True
            case "prepare":
                return "STARTED" in new
            case "load":
                return done["prepare"]
            case "train":
                return new.count("CHECKPOINT_SAVED") >= number
            case "save":
                return new.count("CHECKPOINT_SAVED") >= number and any(self._saving())
            case _:
                return done[{"export": "train", "register": "export", "end": "register"}[moment]]

    def _is_over(self, moment: str) -> bool:
        """The machine is faster now than when the durations were measured."""
        if moment == "load":
            return "TRAIN_STARTED" in [event.type for event in events.read(self.paths.events)[self._since :]]
        return moment in STAGES and moment != "train" and self.paths.is_done(moment)

    def _saving(self) -> list[Path]:
        return list(Path(self.paths.read_tracking().save_folder).glob(".ep*-ba*.tmp"))

    def _where(self) -> str:
        """The stage and the last event, now."""
        stage = next((stage for stage in STAGES if not self.paths.is_done(stage)), "end")
        last = events.read(self.paths.events)[-1]
        progress = last.message.split()[1] if last.type == "CHECKPOINT_SAVED" else ""
        writing = ", while a checkpoint is written" if stage == "train" and self._saving() else ""
        seconds = time.monotonic() - self._seen
        return f"{stage}, {seconds:.1f} s in; last event {last.type} {progress}".rstrip() + writing

    def _family(self) -> list[psutil.Process]:
        process = supervisor(self.paths)
        return [] if process is None else [process, *_descendants(process)]

    def _chosen(self, target: str, family: Sequence[psutil.Process]) -> tuple[Sequence[psutil.Process], str]:
        if not family:
            return (), "nothing: it has ended"
        boss, *below = family
        if target == "all":
            return family, f"all {len(family)} processes"
        if target == "stage" and below:
            return below[:1], "launcher" if ranks(self.paths) else "stage process"
        if target == "one" and (found := ranks(self.paths)):
            return [self.rng.choice(found)], "one rank"
        if target == "one" and (found := [process for process in below if not _descendants(process)]):
            return [self.rng.choice(found)], "one process of the stage"
        return [boss], "supervisor"

    def _has_reacted(self, before: int, family: Sequence[psutil.Process]) -> bool:
        """Whether the supervisor has noticed, or continues with the next stage."""
        new = [event.type for event in events.read(self.paths.events)[before:]]
        said = bool(set(new) - {"TRAIN_UPDATED", "CHECKPOINT_SAVED"})
        return said or supervisor(self.paths) is None or self._is_at_next_stage(family)

    def _is_at_next_stage(self, family: Sequence[psutil.Process]) -> bool:
        started = [process for process in self._family()[1:] if process not in family]
        return any("tundish.supervise.stages" in (args := _arguments(p)) and args[3] in STAGES for p in started)

    def _status(self, family: Sequence[psutil.Process]) -> str:
        """What the run reports of itself, after checking that it is true."""
        run, last = fm.get(self.paths.folder.name), events.read(self.paths.events)[-1]
        alive = supervisor(self.paths) is not None
        said = last.type in events.TERMINAL_TYPES
        if said:
            wait_until(lambda: not _alive(family) and not stages(self.paths), SLACK_SECONDS)
        assert run.status.is_terminal() == (said or not alive), (run.status, run.details, alive)
        if run.status.is_terminal():
            expected = "Completed" if last.type == "COMPLETED" else "Failed"
            assert run.status.display_name == expected and run.details, (run.status, run.details)
        details = str(run.details).partition(" Log: ")[0].partition(". ")[0]
        return f"{run.status.display_name}: {details}".replace(self.paths.folder.name, "RUN")

    def _go_on(self) -> str:
        """Resume the run if it has ended early; returns its details, or what it did by itself."""
        run = fm.get(self.paths.folder.name)
        if not run.status.is_terminal():
            return "went on by itself"
        if run.status.display_name == "Completed":
            return "nothing was left to do"
        fm.resume(run)
        message = next(e.message for e in reversed(events.read(self.paths.events)) if e.type == "REQUEUED")
        return f"resumed: {message.removeprefix('Run resumed by user. ')}"


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _arguments(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _kill(process: psutil.Process) -> None:
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return  # it has just ended


def _alive(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    return [process for process in processes if _lives(process)]


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def tensors(folder: Path) -> dict[str, Any]:
    """Every tensor of an export; all of its files must exist and be complete."""
    import json

    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    index = folder / "model.safetensors.index.json"
    if index.exists():
        named: dict[str, str] = json.loads(index.read_text())["weight_map"]
        assert set(named) == set(found) and {folder / name for name in named.values()} == set(files)
    assert found and (folder / "config.json").is_file() and (folder / "tokenizer.json").is_file()
    return found
