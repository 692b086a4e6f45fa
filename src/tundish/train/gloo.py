"""The mean of the ranks' gradients on a CPU."""

import torch
from composer import Callback, Logger, State
from composer.utils import dist


class GlooMean(Callback):
    """FSDP2 asks for the mean of the ranks' gradients; gloo, of PyTorch 2.7, gives their sum and does not say so.

    Lion sees only signs, but its momentum would have another scale in a run that goes on with more or fewer ranks.
    """

    @classmethod
    def where_needed(cls) -> list[Callback]:
        """The callback, where ranks talk through gloo."""
        return [cls()] if dist.get_world_size() > 1 and torch.distributed.get_backend() == "gloo" else []

    def after_train_batch(self, state: State, logger: Logger) -> None:
        """All microbatches are done, and the optimizer has not looked yet."""
        for group in state.optimizers[0].param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.div_(dist.get_world_size())
