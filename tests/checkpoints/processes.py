"""Processes that have imported PyTorch, and nothing else that a fork could break: its threads do not survive one."""

import multiprocessing
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from typing import Any

_CONTEXT: ForkServerContext = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["pytest", "torch.distributed.checkpoint", "torch.distributed.fsdp", "tundish.checkpoints.saving"]
)


def start(function: Callable[..., object], *given: Any) -> Any:
    """A process that calls a test module's function; `pid`, `join()` and `exitcode` are those of multiprocessing."""
    process = _CONTEXT.Process(target=_alone, args=(function, given), daemon=True)
    process.start()
    return process


def _alone(function: Callable[..., object], given: tuple[Any, ...]) -> None:
    import warnings

    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    function(*given)
