"""How many rows an optimizer step takes, how many steps a run takes, and how long it warms up. Pure."""

import math
import re

from tundish.plan.spec import Duration

MAX_ROWS_PER_DEVICE = 16
"""Upper end of the automatic batch size, in rows of one device."""
MIN_STEPS = 100
"""An epoch should take at least this many optimizer steps, as far as its rows allow."""
WARM_UP = "0.02dur"
"""Share of a run, as in the managed service."""


def choose_batch_size(rows: int | None, devices: int) -> int:
    """Rows in one optimizer step over all devices: a multiple of `devices`, the same for every duration.

    The largest power of two of rows per device, up to MAX_ROWS_PER_DEVICE, that still leaves MIN_STEPS steps in an
    epoch; one row per device where even that leaves fewer. Rows do not have to divide evenly: the loader fills the last
    batch of an epoch with rows without targets, so that every sample is trained in every epoch.

    Args:
        rows: of the training data; None before they are packed: provisionally, the size for large data.
        devices: of all nodes.
    """
    per_device = MAX_ROWS_PER_DEVICE
    while rows is not None and per_device > 1 and math.ceil(rows / (per_device * devices)) < MIN_STEPS:
        per_device //= 2
    return per_device * devices


def count_steps(duration: Duration, batch_size: int, rows: int, tokens: int) -> int:
    """Optimizer steps of a run whose epoch has so many rows and tokens; for a duration in tokens, about so many."""
    if duration.unit == "ba":
        return duration.value
    if duration.unit == "ep":
        return math.ceil(rows / batch_size) * duration.value
    # A full batch's tokens: the last batch of an epoch may be smaller, but it comes last.
    return math.ceil(duration.value / (tokens * min(1, batch_size / rows)))


def warm_up_in_batches(warm_up: str | int, duration: Duration, steps: int | None) -> str | int:
    """A warm-up that is a share of the run (`0.02dur`), in batches; any other warm-up is returned unchanged.

    Args:
        warm_up: as Composer takes it.
        duration: of the run; one in tokens keeps the share, as its steps are not known exactly.
        steps: of the run; None: not known yet.
    """
    share = re.fullmatch(r"\s*(\d*\.?\d+(?:e-?\d+)?)\s*dur\s*", str(warm_up))
    if share is None or duration.unit == "tok":
        return warm_up
    # Composer rounds a share down: a short run would have no warm-up at all.
    return f"{max(1, round(float(share[1]) * (steps or 1)))}ba" if float(share[1]) else "0ba"
