"""Samples → rows: best-fit-decreasing bin packing, deterministic, no sample lost or split.

Method: Johnson, "Near-optimal bin packing algorithms" (1973). Free space is looked up in one big integer with a bit
for every amount of space that some open row has, so that finding the tightest row costs one shift.
"""

from collections.abc import Sequence

import numpy as np


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of sample numbers; each row's lengths add up to at most `capacity` tokens.

    Rows come in the order of their first sample, samples in a row in their own order. For example
    `pack([5, 4, 3], 8)` is `[[0, 2], [1]]`.

    Args:
        lengths: tokens of each sample, 1 … capacity.
        capacity: tokens in a row.
    """
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = {}
    spaces = 0
    for sample in (int(number) for number in order):
        length = lengths[sample]
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            row = open_rows[space].pop()
            if not open_rows[space]:
                spaces ^= 1 << space
        else:
            space, row = capacity, len(rows)
            rows.append([])
        rows[row].append(sample)
        if left := space - length:
            open_rows.setdefault(left, []).append(row)
            spaces |= 1 << left
    return sorted(sorted(row) for row in rows)
