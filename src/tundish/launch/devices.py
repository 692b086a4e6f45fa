"""The queue in which this machine's runs wait for its devices: first come, first served.

Each run that waits for devices, or holds some, has a ticket: a file that names its supervisor. The ticket of a process
that has exited does not count, and the next process that looks removes it: a holder that crashed frees its devices. All
runs of a `$TUNDISH_HOME` on one machine share the queue. The CPU is one device: a run takes all of it.
"""

import json
import logging
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tundish.base.files import LOCK_NAME, locked, make_folder, write_atomic
from tundish.base.home import home
from tundish.base.processes import ProcessId
from tundish.base.typed_json import parse, read_object
from tundish.errors import StageError
from tundish.plan.compute import Compute, visible_gpus

log = logging.getLogger(__name__)

POLL_SECONDS = 0.5
PER_RUN_SECONDS = 1.0
"""Added to POLL_SECONDS for each run before one, up to 4: many that wait must not keep the CPU busy."""
CPU = "cpu"


@dataclass(frozen=True, kw_only=True, slots=True)
class Ticket:
    """A run's place in the queue."""

    number: int
    """Smaller ones came before."""
    run: str
    owner: ProcessId
    """Its supervisor; until that has started, the process that starts it."""
    wanted: int
    """Devices that the run needs at once."""
    allowed: tuple[str, ...]
    """The devices that it may take, as CUDA_VISIBLE_DEVICES names them; the CPU is `cpu`."""
    held: tuple[str, ...] = ()
    """The devices that it has; none while it waits."""


def enter(run: str, compute: Compute, owner: ProcessId) -> None:
    """Join the end of the queue; a run that is in it keeps its place, for its new owner."""
    with locked(_lock()):
        for left in _folder().glob(".*.tmp"):  # of a process that was killed: every writer holds the lock
            left.unlink(missing_ok=True)
        tickets = _read(_folder())
        mine = next((ticket for ticket in tickets if ticket.run == run), None)
        if mine is None:
            number = max((ticket.number for ticket in tickets), default=0) + 1
            allowed = (CPU,) if compute.device == "cpu" else tuple(visible_gpus())
            wanted = 1 if compute.device == "cpu" else compute.devices_per_node
            mine = Ticket(number=number, run=run, owner=owner, wanted=wanted, allowed=allowed)
        _write(replace(mine, owner=owner))


def leave(run: str) -> None:
    """Give up the run's devices, or its place in the queue."""
    _file(run).unlink(missing_ok=True)


def wait_for_devices(run: str) -> tuple[str, ...]:
    """The devices that the run now holds, once it is its turn and they are free.

    Raises:
        StageError: the run is not in the queue.
    """
    mine = None
    while True:
        with locked(_lock()):
            tickets = _living()
            mine = next((ticket for ticket in tickets if ticket.run == run), mine)
            if mine is None:
                raise StageError(f"{run}: has lost its place in the queue. `tundish resume {run}` gives it a new one.")
            if mine not in tickets:  # damaged, or removed by hand
                _write(mine)
                tickets.append(mine)
            held = mine.held or _chosen(mine, tickets)
            if held:
                _write(replace(mine, held=held))
                return held
        time.sleep(POLL_SECONDS + PER_RUN_SECONDS * min(4, len(_before(mine, tickets))))


def place(run: str) -> tuple[int, list[str]] | None:
    """The run's position in the queue, 1 = next, and the runs that it waits for; None if it does not wait."""
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
    """Devices for the run; none while another run is before it, or too few are free."""
    taken = {device for ticket in tickets for device in ticket.held}
    free = [device for device in mine.allowed if device not in taken]
    # Free devices are left idle while a large run is before this one: small runs would let it wait forever.
    return () if _before(mine, tickets) or len(free) < mine.wanted else tuple(free[: mine.wanted])


def _before(mine: Ticket, tickets: Sequence[Ticket]) -> list[Ticket]:
    """Those that wait for some of the same devices and came before."""
    return [
        ticket
        for ticket in tickets
        if ticket.number < mine.number and not ticket.held and set(ticket.allowed) & set(mine.allowed)
    ]


def _living() -> list[Ticket]:
    """The tickets of processes that are alive; the others are removed."""
    living: list[Ticket] = []
    for ticket in _read(_folder()):
        if ticket.owner.process() is not None:
            living.append(ticket)
        else:
            leave(ticket.run)
    return living


def _read(folder: Path) -> list[Ticket]:
    """All tickets, in the order of the queue; files that are not tickets are set aside."""
    tickets: list[Ticket] = []
    for file in folder.glob("*.json"):
        try:
            ticket = parse(Ticket, read_object(file))
            if ticket.run != file.stem:
                raise ValueError(f"is of the run {ticket.run!r}")
            tickets.append(ticket)
        except FileNotFoundError:
            continue  # its run left meanwhile
        except (OSError, ValueError) as error:
            _set_aside(file, error)
    return sorted(tickets, key=lambda ticket: ticket.number)


def _set_aside(file: Path, error: Exception) -> None:
    """Rename a damaged ticket; its supervisor writes the ticket again, or takes a new place when it starts again."""
    aside = file.with_name(f"{file.name}.damaged")
    try:
        file.rename(aside)
        log.warning("%s: %s. It is ignored, and kept as %s.", file, error, aside.name)
    except OSError as refused:
        log.warning("%s: %s. It is ignored, and cannot be renamed (%s).", file, error, refused)


def _write(ticket: Ticket) -> None:
    write_atomic(_file(ticket.run), json.dumps(asdict(ticket)) + "\n")


def _folder() -> Path:
    """Of this machine: several machines may share the disk of a home."""
    return home() / "queue" / platform.node().replace(os.sep, "_")


def _file(run: str) -> Path:
    return _folder() / f"{run}.json"


def _lock() -> Path:
    return make_folder(_folder()) / LOCK_NAME
