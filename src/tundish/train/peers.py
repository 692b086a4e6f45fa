"""Which node was lost: a collective that times out tells that somebody is missing, but not who."""

import logging
import os
import platform
import threading
import time
from datetime import timedelta
from typing import Any

from composer import Callback, Logger, State
from composer.utils import dist
from torch.distributed import DistError, TCPStore

log = logging.getLogger(__name__)

BEAT_SECONDS = 5.0
SILENT_SECONDS = 20.0
"""Without a beat until a node is called lost; half of the collectives' time-out, where that is less."""


class Peers(Callback):
    """One thread a node tells the others, through the store in which the ranks have met, that the node is there.

    A node that is silent is named in the log; after `timeout` seconds the rank ends, even where it waits without one.

    Args:
        timeout: seconds, as for collectives.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._closed = threading.Event()

    @classmethod
    def where_needed(cls, timeout: float) -> list[Callback]:
        """The callback, on the first rank of each of several nodes."""
        return (
            [cls(timeout)] if dist.get_world_size() > dist.get_local_world_size() and not dist.get_local_rank() else []
        )

    def fit_start(self, state: State, logger: Logger) -> None:
        """All ranks have met."""
        threading.Thread(target=self._watch, daemon=True).start()

    def close(self, state: State, logger: Logger) -> None:
        """Whoever ends first is not lost."""
        self._closed.set()

    def _watch(self) -> None:
        nodes, me = dist.get_world_size() // dist.get_local_world_size(), dist.get_node_rank()
        heard = Heard({node: os.environ["MASTER_ADDR"] if node == 0 else "" for node in range(nodes) if node != me})
        count, last = 0, False
        while not last:
            last = self._closed.wait(BEAT_SECONDS)
            count += 1
            try:
                beats = exchange(me, nodes, "done" if last else str(count))
            except (DistError, RuntimeError, OSError):
                beats = {}
            silent = heard.update(beats, time.monotonic(), min(SILENT_SECONDS, self.timeout / 2))
            if not last and silent and max(silent.values()) > self.timeout:
                # Said as an exception is: it is the cause that is looked for in the log.
                print(f"ConnectionError: {heard.text(silent)}", flush=True)
                os._exit(1)


def exchange(me: int, nodes: int, beat: str) -> dict[int, str]:
    """Tell this node's beat; what the others have told last, by node."""
    port = int(os.environ["MASTER_PORT"])
    patience = timedelta(seconds=BEAT_SECONDS)
    # Its type stub does not know `check`.
    store: Any = TCPStore(os.environ["MASTER_ADDR"], port, is_master=False, timeout=patience, wait_for_workers=False)
    store.set(_key(me), f"{platform.node()} {beat}")
    if me != 0 and not store.check([_key(0)]):
        return {}
    return {node: store.get(_key(node)).decode() for node in range(nodes) if node != me and store.check([_key(node)])}


def _key(node: int) -> str:
    return f"tundish/node/{node}"


class Heard:
    """When each node was heard from last.

    Args:
        hosts: by node; empty where not known yet.
    """

    def __init__(self, hosts: dict[int, str]) -> None:
        self.hosts = hosts
        self._beats: dict[int, str] = {}
        self._times: dict[int, float] = {}
        self._lost: set[int] = set()

    def update(self, beats: dict[int, str], now: float, patience: float) -> dict[int, float]:
        """Take in what was heard; the seconds for which each lost node has been silent."""
        for node in self.hosts:
            if node not in self._times or (node in beats and beats[node] != self._beats.get(node)):
                self._times[node] = now
                self._beats[node] = beats.get(node, "")
                self.hosts[node] = self._beats[node].partition(" ")[0] or self.hosts[node]
        ended = {node for node, beat in self._beats.items() if beat.endswith(" done")}
        silent = {node: now - at for node, at in self._times.items() if node not in ended and now - at > patience}
        for node in sorted(set(silent) - self._lost):
            log.error("%s", self.text({node: silent[node]}))
        for node in sorted(self._lost - set(silent)):
            log.error("node %s (%s) is heard from again.", node, self.hosts[node])
        self._lost = set(silent)
        return silent

    def text(self, silent: dict[int, float]) -> str:
        """The nodes by number and host, and for how long they have been silent."""
        said = (f"node {node} ({self.hosts[node]}) has not been heard from for {s:.0f} s" for node, s in silent.items())
        return ", ".join(said) + "."
