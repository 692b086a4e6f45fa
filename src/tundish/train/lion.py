"""LLM Foundry's DecoupledLionW, applied to many tensors at a time.

The local part of each sharded tensor is looked up once a step, not once for each of four operations: in a small model
the lookups take longer than the operations. On a GPU, PyTorch also has one kernel for many tensors.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from llmfoundry.optim import DecoupledLionW as FoundryLion
from torch.distributed.tensor import DTensor

# PyTorch's operations on lists of tensors, which its own optimizers use, have no public names.
_lerp: Callable[..., Any] = torch._foreach_lerp  # pyright: ignore[reportPrivateUsage]
_lerp_: Callable[..., Any] = torch._foreach_lerp_  # pyright: ignore[reportPrivateUsage]
_mul_: Callable[..., Any] = torch._foreach_mul_  # pyright: ignore[reportPrivateUsage]
_sign_: Callable[..., Any] = torch._foreach_sign_  # pyright: ignore[reportPrivateUsage]
_add_: Callable[..., Any] = torch._foreach_add_  # pyright: ignore[reportPrivateUsage]

CHUNK_BYTES = 256 << 20
"""Weights that are updated at once; their updates are in memory together."""


class DecoupledLionW(FoundryLion):
    """Registered with LLM Foundry as the optimizer `tundish_decoupled_lionw`.

    The same updates (Chen et al., Symbolic Discovery of Optimization Algorithms, 2023), bit for bit on a CPU, and the
    same state, so that checkpoints fit both. The class's name is part of metric names.
    """

    @torch.no_grad()  # pyright: ignore[reportUntypedFunctionDecorator]  torch's is not typed
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every weight that has a gradient; returns what `closure` returns, which is called first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            trained = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameters in _chunks(trained):
                self._update(parameters, group)
        return loss

    def _update(self, parameters: Sequence[torch.Tensor], group: dict[str, Any]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["exp_avg"] = torch.zeros_like(parameter)
        weights = [_local(parameter) for parameter in parameters]
        gradients = [_local(parameter.grad) for parameter in parameters if parameter.grad is not None]
        momenta = [_local(self.state[parameter]["exp_avg"]) for parameter in parameters]
        beta1, beta2 = group["betas"]
        if group["weight_decay"] != 0:
            # Decoupled, as in LLM Foundry: the decay follows the schedule, but does not depend on the peak rate.
            share = group["lr"] / group["initial_lr"] if group["initial_lr"] else 1.0
            _mul_(weights, 1 - share * group["weight_decay"])
        updates = _lerp(momenta, gradients, 1 - beta1)
        _sign_(updates)
        _add_(weights, updates, alpha=-group["lr"])
        _lerp_(momenta, gradients, 1 - beta2)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a sharded tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _chunks(parameters: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    chunk: list[torch.Tensor] = []
    size = 0
    for parameter in parameters:
        bytes_of = _local(parameter).nbytes
        if chunk and size + bytes_of > CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
        chunk.append(parameter)
        size += bytes_of
    if chunk:
        yield chunk
