"""Takes each optimizer step at the learning rate of its own time.

Composer computes the next step's rate before it counts the batch that was just trained: the first two steps would have
the rate of the first, 0 at the start of a warm-up, and every later step that of the one before.
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
    """Registered with LLM Foundry as the callback `tundish_schedule`; works with every schedule of Composer.

    A step has the rate of its start; in the warm-up, which starts at 0, that of its end. With our default schedule
    over T and a warm-up over W, a step from s to e has the smallest of `e / W`, `(T - s) / (T - W)` and 1, times the
    peak: neither the first nor the last step is taken at 0.
    """

    def __init__(self) -> None:
        self._factor: Callable[[int], float] | None = None
        self._warm_up: str | Time[Any] | None = None
        self._used = 0.0

    def fit_start(self, state: State, logger: Logger) -> None:
        """Replace the schedule's function: Composer, which sets it after the step, then logs the rate that was used."""
        (scheduler,) = state.schedulers
        (factor,) = scheduler.lr_lambdas
        # PyTorch's lambda is a closure around Composer's schedule, a function of the state.
        self._warm_up = getattr(inspect.getclosurevars(factor).nonlocals["scheduler"], "t_warmup", None)
        self._factor = factor

        # A function, and no bound method: torch saves the attributes of any other callable in checkpoints.
        def rate_used(_step: int) -> float:
            return self._used

        scheduler.lr_lambdas = [rate_used]

    def batch_start(self, state: State, logger: Logger) -> None:
        """Set the rate of the step that follows."""
        assert self._factor is not None
        (scheduler,), now = state.schedulers, state.timestamp
        state.timestamp = _time_of_step(state, self._warm_up)
        try:
            self._used = self._factor(0)
        finally:
            state.timestamp = now
        for group, peak in zip(scheduler.optimizer.param_groups, scheduler.base_lrs, strict=True):
            group["lr"] = peak * self._used


def _time_of_step(state: State, warm_up_setting: str | Time[Any] | None) -> Timestamp:
    """The start of a step after the warm-up; the end of a step within it, at most the warm-up's end."""
    now = state.timestamp
    if warm_up_setting is None or now >= (warm_up := _convert_time(warm_up_setting, state)):
        return now
    # In these units, Timestamp.get() counts from the start of the run.
    name = {TimeUnit.BATCH: "batch", TimeUnit.SAMPLE: "sample", TimeUnit.TOKEN: "token"}[warm_up.unit]
    end = int(now.get(warm_up.unit)) + _length(state, name)
    moved: dict[str, Any] = {name: min(end, int(warm_up))}
    return now.copy(**moved)


def _length(state: State, unit: str) -> int:
    """Of the current step over all ranks, in batches, samples or tokens."""
    if unit == "batch":
        return 1
    batch: Mapping[str, Any] = state.batch
    mine = count_tokens(batch)["total"] if unit == "token" else len(batch["input_ids"])
    total = state.device.tensor_to_device(torch.tensor(mine))
    dist.all_reduce(total, "SUM")
    return int(total)
