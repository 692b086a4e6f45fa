"""Which node was lost: a collective that times out tells that somebody is missing, but not who."""

import os
import platform
import threading
import time
from datetime import timedelta
from typing import Any

from composer import Callback, Logger, State
from composer.utils import dist
from torch.distributed import DistError, TCPStore

from tundish.train.heard import Heard

BEAT_SECONDS = 5.0
SILENT_SECONDS = 20.0
"""Without a beat until a node is called lost; half of the collectives' time-out, where that is less."""


class Peers(Callback):
    """The first rank of a node tells the others, through the store in which the ranks have met, that the node is there.

    A node that is silent is named in the log; after `timeout` seconds the rank ends, even where it waits without one.

    Args:
        timeout: seconds, as for collectives.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._closed = threading.Event()
        self._beats: dict[int, str] | None = None
        self._told = 0.0

    @classmethod
    def where_needed(cls, timeout: float) -> list[Callback]:
        """The callback, on the first rank of each of several nodes."""
        return (
            [cls(timeout)] if dist.get_world_size() > dist.get_local_world_size() and not dist.get_local_rank() else []
        )

    def fit_start(self, state: State, logger: Logger) -> None:
        """All ranks have met."""
        nodes, me = dist.get_world_size() // dist.get_local_world_size(), dist.get_node_rank()
        # Two threads: one may wait for an answer through a cable that is cut for as long as TCP does.
        for work in (self._tell, self._watch):
            threading.Thread(target=work, args=(nodes, me), daemon=True).start()

    def close(self, state: State, logger: Logger) -> None:
        """Whoever ends first is not lost."""
        self._closed.set()

    def _tell(self, nodes: int, me: int) -> None:
        count, last, store = 0, False, None
        while not last:
            last = self._closed.wait(BEAT_SECONDS)
            count += 1
            try:
                store = store or _connected()
                self._beats = _exchanged(store, me, nodes, "done" if last else str(count))
                self._told = time.monotonic()
            except (DistError, RuntimeError, OSError):
                store = None

    def _watch(self, nodes: int, me: int) -> None:
        heard = Heard({node: os.environ["MASTER_ADDR"] if node == 0 else "" for node in range(nodes) if node != me})
        while not self._closed.wait(BEAT_SECONDS):
            now = time.monotonic()
            beats = self._beats if now - self._told < 2 * BEAT_SECONDS else None
            silent = heard.update(beats, now, min(SILENT_SECONDS, self.timeout / 2))
            if silent and max(silent.values()) > self.timeout:
                # Said as an exception is: it is the cause that is looked for in the log.
                print(f"ConnectionError: {heard.text(silent)}", flush=True)
                os._exit(1)


def _connected() -> Any:
    """A client of our own of the store in which the ranks have met: theirs may be waiting in it."""
    patience = timedelta(seconds=BEAT_SECONDS)
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(address, port, is_master=False, timeout=patience, wait_for_workers=False)


def _exchanged(store: Any, me: int, nodes: int, beat: str) -> dict[int, str]:
    """Tell this node's beat; what the others have told last, by node."""
    store.set(_key(me), f"{platform.node()} {beat}")
    return {node: store.get(_key(node)).decode() for node in range(nodes) if node != me and store.check([_key(node)])}


def _key(node: int) -> str:
    return f"tundish/node/{node}"
