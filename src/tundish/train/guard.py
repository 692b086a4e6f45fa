"""Watches the loss: logs it under its usual names, and fails a run whose loss diverges or that learns nothing."""

import math
from pathlib import Path
from typing import Any, cast

import torch
from composer import Callback, Logger, State
from composer.utils import dist
from torch.distributed.tensor import DTensor

from tundish.base.run_folder import RunFolder
from tundish.base.text import counted
from tundish.errors import FailureCause, StageError

METRICS = "metrics/train/Language"
LARGEST = 700
"""The largest loss whose perplexity is finite."""


class LossGuard(Callback):
    """Registered with LLM Foundry as the callback `tundish_guard`.

    Composer averages the loss over all ranks, so every rank stops at the same batch.
    """

    def __init__(self) -> None:
        self._begun: torch.Tensor | None = None
        """Digest of the weights at the beginning, until one of them has changed."""

    def fit_start(self, state: State, logger: Logger) -> None:
        """The weights are those of the base model, or of the checkpoint that the run resumes from."""
        if not int(state.timestamp.batch) and (mark := _mark()) is not None and dist.get_global_rank() == 0:
            mark.unlink(missing_ok=True)  # left by an attempt whose weights are lost
        # Rank 0's answer, since all ranks compare or none does: on a shared disk, others may see an old state.
        learned = [bool(int(state.timestamp.batch)) and has_learned()]
        dist.broadcast_object_list(learned, src=0)
        if not learned[0]:
            self._begun = digest(state.model)

    def batch_end(self, state: State, logger: Logger) -> None:
        """After the step and before its checkpoint."""
        losses = getattr(state, "total_loss_dict", {})
        if (loss := losses.get("loss/train/total")) is None:
            return
        check_loss(loss, int(state.timestamp.batch), max(group["lr"] for group in state.optimizers[0].param_groups))
        # Derived from the loss, the mean over targets. Composer's metrics compute it once more from the logits: their
        # memory again, and a twentieth of a small model's step.
        metrics = {f"{METRICS}CrossEntropy": loss, f"{METRICS}Perplexity": math.exp(min(loss, LARGEST))}
        # Composer counts the batch only after it has logged the loss.
        logger.log_metrics(metrics, step=int(state.timestamp.batch) - 1)
        if self._begun is not None:
            self._compare(state, self._begun)

    def fit_end(self, state: State, logger: Logger) -> None:
        """Fail before training is reported as finished."""
        if self._begun is not None:
            raise nothing_learned(state)

    def _compare(self, state: State, begun: torch.Tensor) -> None:
        """Look for a changed weight on any rank; usually the first step changes one, and this is not called again."""
        changed = state.device.tensor_to_device(torch.tensor(int(not digest(state.model).equal(begun))))
        dist.all_reduce(changed, "MAX")
        if changed:
            self._begun = None
            if (mark := _mark()) is not None and dist.get_global_rank() == 0:
                mark.parent.mkdir(exist_ok=True)  # a YAML that is trained by hand has no such folder yet
                mark.touch()


def digest(model: torch.nn.Module) -> torch.Tensor:
    """A sum of the bits of this rank's part of each parameter: int64 [parameters]."""
    sums: list[torch.Tensor] = []
    for parameter in model.parameters():
        local = parameter.detach()
        local = local.to_local() if isinstance(local, DTensor) else local
        whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[local.element_size()]
        sums.append(local.view(whole).sum(dtype=torch.int64))
    return torch.stack(sums)


def has_learned() -> bool:
    """Whether training has ever changed a weight; assumed for a YAML that is trained by hand."""
    mark = _mark()
    return mark is None or mark.exists()


def nothing_learned(state: State) -> StageError:
    """The error of a run that ends with the weights it began with."""
    rates = [group.get("initial_lr", group["lr"]) for group in cast(Any, state.optimizers[0]).param_groups]
    return StageError(
        f"training changed no weight in {counted(int(state.timestamp.batch), 'step')}: the result would be "
        f"the base model. Raise learning_rate (it is {max(rates):g}), or check the overrides of optimizer "
        "and scheduler.",
        failure=FailureCause.NOTHING_LEARNED,
    )


def _mark() -> Path | None:
    run = RunFolder.of_this_process()
    return run.learned if run else None


def check_loss(loss: float, batch: int, learning_rate: float) -> None:
    """Refuse a loss from which training cannot recover.

    Raises:
        StageError: it is NaN, infinite, or exactly 0.
    """
    if math.isfinite(loss) and loss != 0:
        return
    cause = (
        "Either no token is a target, or the model predicts every target with certainty: check first_batch.html among "
        "the run's MLflow artifacts, and the data for repeated samples."
        if loss == 0
        else f"Lower learning_rate (it is {learning_rate:g} at this batch); if it is so from the first batch on, "
        "check the weights that the run started from."
    )
    raise StageError(
        f"batch {batch}: the loss is {loss:g}, but must be finite and above 0. {cause} Earlier checkpoints are kept.",
        failure=FailureCause.DIVERGED,
    )
