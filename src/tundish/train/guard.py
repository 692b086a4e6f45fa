"""What the loss says: logged under the names that people know; a run that learns nothing is stopped."""

import math

from composer import Callback, Logger, State

from tundish.errors import StageError

METRICS = "metrics/train/Language"
LARGEST = 700
"""A loss whose perplexity is a number still."""


class LossGuard(Callback):
    """Registered with LLM Foundry as the callback `tundish_guard`.

    Composer averages the loss over all ranks, so every rank stops at the same batch.
    """

    def batch_end(self, state: State, logger: Logger) -> None:
        """After the step, before a checkpoint of it."""
        losses = getattr(state, "total_loss_dict", {})
        if (loss := losses.get("loss/train/total")) is None:
            return
        check_loss(loss, int(state.timestamp.batch), max(group["lr"] for group in state.optimizers[0].param_groups))
        # The loss is the mean over targets: measured once more from the scores, as Composer's metrics do, it takes
        # their memory again and a twentieth of a small model's step.
        metrics = {f"{METRICS}CrossEntropy": loss, f"{METRICS}Perplexity": math.exp(min(loss, LARGEST))}
        # Composer counts the batch only after it has logged the loss.
        logger.log_metrics(metrics, step=int(state.timestamp.batch) - 1)


def check_loss(loss: float, batch: int, learning_rate: float) -> None:
    """Refuse a loss that no training goes on from.

    Raises:
        StageError: it is NaN, infinite, or exactly 0.
    """
    if math.isfinite(loss) and loss != 0:
        return
    cause = (
        "Either no token is a target, or the model knows every one with certainty: look at first_batch.html among the "
        "run's MLflow artifacts, and at what the samples repeat."
        if loss == 0
        else f"Lower learning_rate (it is {learning_rate:g} at this batch); if the loss is so from the first batch on, "
        "look at the weights that the run began with."
    )
    raise StageError(
        f"batch {batch}: the loss is {loss:g}; allowed is a finite number above 0. {cause} "
        "Checkpoints saved before are kept."
    )
