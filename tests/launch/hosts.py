"""Two hosts on one machine: network namespaces with their own addresses on one bridge."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

BRIDGE = "tundish0"
ADDRESSES = ("10.77.0.1", "10.77.0.2")


def can() -> bool:
    """Whether this machine allows network namespaces."""
    return os.geteuid() == 0 and shutil.which("ip") is not None and _ip("link", "show", check=False) == 0


def _ip(*arguments: str, check: bool = True) -> int:
    return subprocess.run(["ip", *arguments], check=check, capture_output=True).returncode


@contextmanager
def two_hosts() -> Iterator[None]:
    """Create `host0` and `host1`, which reach only each other, for the length of the block."""
    _remove()
    try:
        _ip("link", "add", BRIDGE, "type", "bridge")
        _ip("link", "set", BRIDGE, "up")
        for number, address in enumerate(ADDRESSES):
            host, cable = f"host{number}", f"cable{number}"
            _ip("netns", "add", host)
            _ip("link", "add", cable, "type", "veth", "peer", "name", "net0", "netns", host)
            _ip("link", "set", cable, "master", BRIDGE, "up")
            _ip("-n", host, "address", "add", f"{address}/24", "dev", "net0")
            _ip("-n", host, "link", "set", "net0", "up")
            _ip("-n", host, "link", "set", "lo", "up")
        yield
    finally:
        _remove()


def _remove() -> None:
    for number in range(len(ADDRESSES)):
        _ip("netns", "delete", f"host{number}", check=False)
        _ip("link", "delete", f"cable{number}", check=False)
    _ip("link", "delete", BRIDGE, check=False)


def cut(number: int) -> None:
    """Disconnect a host."""
    _ip("link", "set", f"cable{number}", "down")


@contextmanager
def on_hosts(commands: Sequence[Sequence[str]], folder: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Run a command on each host, with its own shared memory; kill what is left when the block ends."""
    running: list[subprocess.Popen[bytes]] = []
    try:
        for number, command in enumerate(commands):
            alone = 'mount -t tmpfs tmpfs /dev/shm; exec "$@"'
            enter = ["ip", "netns", "exec", f"host{number}", "bash", "-c", alone, "bash", *command]
            with open(folder / f"host{number}.out", "ab") as out:
                running.append(subprocess.Popen(enter, stdout=out, stderr=out, start_new_session=True))
        yield running
    finally:
        for process in running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(20)
