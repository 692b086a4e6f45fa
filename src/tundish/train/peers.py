"""Names the node that was lost: a collective that times out does not say which rank is missing."""

import os
import platform
import threading
import time
from datetime import timedelta
from typing import Any

from composer import Callback, Logger, State
from composer.utils import dist
from torch.distributed import DistError, TCPStore

from tundish.train.silent_nodes import SilentNodes

BEAT_SECONDS = 5.0
SILENT_SECONDS = 20.0
"""Without a beat until a node is reported lost; half of the collectives' timeout, where that is less."""


class Peers(Callback):
    """Exchanges heartbeats between nodes through the store by which the ranks found each other.

    Runs on the first rank of each node. A silent node is named in the log; after `timeout` seconds the rank exits, even
    where it waits in an operation that has no timeout.

    Args:
        timeout: seconds, that of collectives.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._closed = threading.Event()
        self._beats: dict[int, str] | None = None
        self._exchanged_s = 0.0

    @classmethod
    def where_needed(cls, timeout: float) -> list[Callback]:
        """The callback, on the first rank of each of several nodes."""
        return (
            [cls(timeout)] if dist.get_world_size() > dist.get_local_world_size() and not dist.get_local_rank() else []
        )

    def fit_start(self, state: State, logger: Logger) -> None:
        """Start the exchange: all ranks are connected."""
        nodes, me = dist.get_world_size() // dist.get_local_world_size(), dist.get_node_rank()
        # Two threads: one may wait for an answer through a broken connection for as long as TCP does.
        for work in (self._beat, self._watch):
            threading.Thread(target=work, args=(nodes, me), daemon=True).start()

    def close(self, state: State, logger: Logger) -> None:
        """A rank that ends first is not lost."""
        self._closed.set()

    def _beat(self, nodes: int, me: int) -> None:
        count, last, store = 0, False, None
        while not last:
            last = self._closed.wait(BEAT_SECONDS)
            count += 1
            try:
                store = store or _connected()
                self._beats = _exchanged(store, me, nodes, "done" if last else str(count))
                self._exchanged_s = time.monotonic()
            except (DistError, RuntimeError, OSError):
                store = None

    def _watch(self, nodes: int, me: int) -> None:
        hosts = {node: os.environ["MASTER_ADDR"] if node == 0 else "" for node in range(nodes) if node != me}
        others = SilentNodes(hosts)
        while not self._closed.wait(BEAT_SECONDS):
            now = time.monotonic()
            beats = self._beats if now - self._exchanged_s < 2 * BEAT_SECONDS else None
            silent = others.update(beats, now, min(SILENT_SECONDS, self.timeout / 2))
            if silent and max(silent.values()) > self.timeout:
                # In the form of an exception, which is how the supervisor finds the cause in the log.
                print(f"ConnectionError: {others.text(silent)}", flush=True)
                os._exit(1)


def _connected() -> Any:
    """A second client of the ranks' store: the first one may be blocked in a wait."""
    patience = timedelta(seconds=BEAT_SECONDS)
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(address, port, is_master=False, timeout=patience, wait_for_workers=False)


def _exchanged(store: Any, me: int, nodes: int, beat: str) -> dict[int, str]:
    """Publish this node's beat; returns the latest beats of the other nodes."""
    store.set(_key(me), f"{platform.node()} {beat}")
    return {node: store.get(_key(node)).decode() for node in range(nodes) if node != me and store.check([_key(node)])}


def _key(node: int) -> str:
    return f"tundish/node/{node}"
