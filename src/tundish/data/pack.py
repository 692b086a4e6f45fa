"""Samples → rows: best-fit-decreasing bin packing, deterministic, no sample lost or split.

Method: Johnson, "Near-optimal bin packing algorithms" (1973). One big integer has a bit for every amount of space that
some open row has left, so finding the tightest row costs one shift; and a row takes as many samples of one length at
once as fit.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def pack(lengths: "Sequence[int] | NDArray[np.int32]", capacity: int) -> list[list[int]]:
    """Rows of sample numbers; each row's lengths add up to at most `capacity` tokens.

    Rows come in the order of their first sample, samples in a row in their own order. For example
    `pack([5, 4, 3], 8)` is `[[0, 2], [1]]`.

    Args:
        lengths: tokens of each sample, 1 … capacity.
        capacity: tokens in a row.
    """
    negative_lengths = -np.asarray(lengths, dtype=np.int64)
    order = np.argsort(negative_lengths, kind="stable")
    distinct, starts = np.unique(negative_lengths[order], return_index=True)
    groups = np.split(order, starts[1:]) if len(order) else []
    rows = _Rows(capacity)
    for negative, group in zip(distinct.tolist(), groups, strict=True):
        rows.place(group.tolist(), -negative)
    for row in rows.rows:
        row.sort()
    return sorted(rows.rows)


class _Rows:
    """Rows; those with space left are grouped by how much."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.rows: list[list[int]] = []
        self._open: list[list[int]] = [[] for _ in range(capacity)]
        """Rows by the space left in them."""
        self._spaces = 0
        """Bit s is set where a row with space s is open."""

    def place(self, samples: list[int], length: int) -> None:
        """Put samples of one length, not longer than any before, into the tightest rows."""
        start = 0
        while start < len(samples):
            space, rows = self._tightest(length, len(samples) - start)
            count = space // length
            for row in rows:
                self.rows[row].extend(samples[start : start + count])
                start += count
            # Each row has less space left than this length; only the last one may have taken fewer samples.
            self._leave(rows[:-1], space - count * length)
            self._leave(rows[-1:], space - (count - max(0, start - len(samples))) * length)

    def _tightest(self, length: int, samples: int) -> tuple[int, list[int]]:
        """The space and the numbers of the rows that `samples` of this length go to: the tightest rows, or new ones."""
        fitting = self._spaces >> length
        if not fitting:
            first, count = len(self.rows), -(-samples // (self.capacity // length))
            self.rows.extend([] for _ in range(count))
            return self.capacity, list(range(first, first + count))
        space = length + (fitting & -fitting).bit_length() - 1
        bucket = self._open[space]
        border = max(0, len(bucket) - -(-samples // (space // length)))
        rows = bucket[border:]
        del bucket[border:]
        if not bucket:
            self._spaces ^= 1 << space
        return space, rows

    def _leave(self, rows: list[int], space: int) -> None:
        if rows and space:
            self._open[space].extend(rows)
            self._spaces |= 1 << space
