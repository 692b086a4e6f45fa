"""Each optimizer step at the learning rate of its own time.

Composer asks a schedule for the next step's rate before it counts the batch that was just trained: the first two steps
would have the rate of the first, which is 0 at the beginning of a warm-up, and every later one that of the step before.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from composer import Callback, Logger, State, Time, Timestamp, TimeUnit
from composer.optim.scheduler import _convert_time  # pyright: ignore[reportPrivateUsage]  as Composer's schedules do
from composer.utils import dist

from tundish.train.loader import count_tokens


class StepRates(Callback):
    """Registered with LLM Foundry as the callback `tundish_schedule`, for whatever schedule the run has.

    A step has the rate of the time at which it begins; in the warm-up, which begins at 0, of the time at which it ends.
    With our own schedule over T, and a warm-up over W, a step from s to e is taken at the least of `e / W`,
    `(T - s) / (T - W)` and 1 of the peak: no step is taken at 0, neither the first nor the last.
    """

    def __init__(self) -> None:
        self._factor: Callable[[int], float] | None = None
        self._warm_up: str | Time[Any] | None = None
        self._used = 0.0

    def fit_start(self, state: State, logger: Logger) -> None:
        """From now on Composer's own stepping, which comes after the step, sets what the step was taken at."""
        (scheduler,) = state.schedulers
        (factor,) = scheduler.lr_lambdas
        # Composer's schedules are functions of the state, wrapped for PyTorch.
        self._warm_up = getattr(inspect.getclosurevars(factor).nonlocals["scheduler"], "t_warmup", None)
        self._factor = factor

        # A function, and no bound method: torch saves the attributes of any other callable in checkpoints.
        def rate_used(_step: int) -> float:
            return self._used

        scheduler.lr_lambdas = [rate_used]

    def batch_start(self, state: State, logger: Logger) -> None:
        """The batch is there, and its step not taken."""
        assert self._factor is not None
        (scheduler,), now = state.schedulers, state.timestamp
        state.timestamp = _time_of_step(state, self._warm_up)
        try:
            self._used = self._factor(0)
        finally:
            state.timestamp = now
        for group, peak in zip(scheduler.optimizer.param_groups, scheduler.base_lrs, strict=True):
            group["lr"] = peak * self._used


def _time_of_step(state: State, given: str | Time[Any] | None) -> Timestamp:
    """Where a step begins, after the warm-up; where it ends, but not behind the warm-up, in it."""
    now = state.timestamp
    if given is None or now >= (warm_up := _convert_time(given, state)):
        return now
    # Time.get() of all three units is of the whole run.
    name = {TimeUnit.BATCH: "batch", TimeUnit.SAMPLE: "sample", TimeUnit.TOKEN: "token"}[warm_up.unit]
    end = int(now.get(warm_up.unit)) + _length(state, name)
    moved: dict[str, Any] = {name: min(end, int(warm_up))}
    return now.copy(**moved)


def _length(state: State, unit: str) -> int:
    """Of a step, over all ranks."""
    if unit == "batch":
        return 1
    batch: Mapping[str, Any] = state.batch
    mine = count_tokens(batch)["total"] if unit == "token" else len(batch["input_ids"])
    found = state.device.tensor_to_device(torch.tensor(mine))
    dist.all_reduce(found, "SUM")
    return int(found)
