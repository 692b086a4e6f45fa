"""The line in which this machine's runs wait for its devices: first come, first served.

Each run that waits for devices, or holds some, has a ticket: a file that names its supervisor. The ticket of a process
that has ended counts for nothing and is removed by whoever looks next, so a crashed holder frees its place. All runs of
a `$TUNDISH_HOME` on one machine share the line. The processor is one device: a run takes all of it.
"""

import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tundish.compute import Compute, visible_gpus
from tundish.paths import home, write_atomic
from tundish.processes import ProcessId, locked

POLL_SECONDS = 0.5
LINE_SECONDS = 1.0
CPU = "cpu"


@dataclass(frozen=True, kw_only=True, slots=True)
class Ticket:
    """A run's place in the line."""

    number: int
    """Smaller ones came before."""
    run: str
    owner: ProcessId
    """Its supervisor; while that is being started, whoever starts it."""
    wanted: int
    """Devices that the run needs at once."""
    allowed: tuple[str, ...]
    """The devices that it may take, as CUDA_VISIBLE_DEVICES calls them; the processor is `cpu`."""
    held: tuple[str, ...] = ()
    """The devices that it has; none while it waits."""


def enter(run: str, compute: Compute, owner: ProcessId) -> None:
    """Go to the end of the line; a run that is in it keeps its place, for its new owner."""
    with locked(_lock()):
        tickets = _read(_folder())
        mine = next((ticket for ticket in tickets if ticket.run == run), None)
        if mine is None:
            number = max((ticket.number for ticket in tickets), default=0) + 1
            allowed = (CPU,) if compute.device == "cpu" else tuple(visible_gpus())
            wanted = 1 if compute.device == "cpu" else compute.devices_per_node
            mine = Ticket(number=number, run=run, owner=owner, wanted=wanted, allowed=allowed)
        _write(replace(mine, owner=owner))


def leave(run: str) -> None:
    """Give devices, or the place in the line, back."""
    _file(run).unlink(missing_ok=True)


def wait_for_devices(run: str) -> tuple[str, ...]:
    """The devices that the run now holds, once it is its turn and they are free."""
    pause = POLL_SECONDS
    while True:
        with locked(_lock()):
            tickets = _living()
            mine = next(ticket for ticket in tickets if ticket.run == run)
            held = mine.held or _chosen(mine, tickets)
            if held:
                _write(replace(mine, held=held))
                return held
        time.sleep(pause)
        # A long line is looked at less often: many who wait must not keep the processor busy.
        pause = POLL_SECONDS + LINE_SECONDS * min(4, len(_before(mine, tickets)))


def place(run: str) -> tuple[int, list[str]] | None:
    """The run's place in the line, 1 = next, and the runs that it waits for; None where it does not wait."""
    if not _file(run).is_file():
        return None
    tickets = [ticket for ticket in _read(_folder()) if ticket.owner.process() is not None]
    mine = next((ticket for ticket in tickets if ticket.run == run), None)
    if mine is None or mine.held:
        return None
    holders = [ticket.run for ticket in tickets if set(ticket.held) & set(mine.allowed)]
    waiting = [ticket.run for ticket in _before(mine, tickets)]
    return len(waiting) + 1, [*holders, *waiting]


def _chosen(mine: Ticket, tickets: Sequence[Ticket]) -> tuple[str, ...]:
    """Devices for the run; none while somebody is before it, or too few are free."""
    taken = {device for ticket in tickets for device in ticket.held}
    free = [device for device in mine.allowed if device not in taken]
    return () if _before(mine, tickets) or len(free) < mine.wanted else tuple(free[: mine.wanted])


def _before(mine: Ticket, tickets: Sequence[Ticket]) -> list[Ticket]:
    """Those that wait for some of the same devices and came before."""
    return [
        ticket
        for ticket in tickets
        if ticket.number < mine.number and not ticket.held and set(ticket.allowed) & set(mine.allowed)
    ]


def _living() -> list[Ticket]:
    """The tickets that count; the others are removed."""
    living: list[Ticket] = []
    for ticket in _read(_folder()):
        if ticket.owner.process() is not None:
            living.append(ticket)
        else:
            leave(ticket.run)
    return living


def _read(folder: Path) -> list[Ticket]:
    """All tickets, in the order of the line."""
    found: list[Ticket] = []
    for file in folder.glob("*.json") if folder.is_dir() else ():
        try:
            record: dict[str, Any] = json.loads(file.read_text())
        except FileNotFoundError:
            continue  # left meanwhile
        owner, allowed, held = ProcessId(**record.pop("owner")), record.pop("allowed"), record.pop("held")
        found.append(Ticket(owner=owner, allowed=tuple(allowed), held=tuple(held), **record))
    return sorted(found, key=lambda ticket: ticket.number)


def _write(ticket: Ticket) -> None:
    write_atomic(_file(ticket.run), json.dumps(asdict(ticket)) + "\n")


def _folder() -> Path:
    """Of this machine: a home may be on a disk that several share."""
    return home() / "queue" / platform.node().replace(os.sep, "_")


def _file(run: str) -> Path:
    return _folder() / f"{run}.json"


def _lock() -> Path:
    _folder().mkdir(parents=True, exist_ok=True)
    return _folder() / "lock"
