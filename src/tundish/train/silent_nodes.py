"""Which nodes of a run have gone silent, from the beats that were received; pure."""

import logging

log = logging.getLogger(__name__)


class SilentNodes:
    """When each node was last heard from; logs once when a node goes silent, and once when it is back.

    Args:
        hosts: host by node number; empty where not known yet.
    """

    def __init__(self, hosts: dict[int, str]) -> None:
        self.hosts = hosts
        self._beats: dict[int, str] = {}
        self._times: dict[int, float] = {}
        self._lost: set[int] = set()

    def update(self, beats: dict[int, str] | None, now: float, patience: float) -> dict[int, float]:
        """Take in the latest beats; returns for how many seconds each silent node has been silent.

        Args:
            beats: `<host> <count>` by node, `<host> done` at its end; None where the first node was not reached.
            now: seconds, of any clock.
            patience: seconds without a new beat until a node counts as silent.
        """
        if beats is None:
            # All others are heard through the first node: their silence says nothing.
            shift = now - max(self._times.values(), default=now)
            self._times = {node: at if node == 0 else at + shift for node, at in self._times.items()}
            beats = {}
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
        # The supervisor looks for these words: see `supervise.causes.LOST_NODE`.
        nodes = [
            f"node {node} ({self.hosts[node]}) has not been heard from for {s:.0f} s" for node, s in silent.items()
        ]
        return ", ".join(nodes) + "."
