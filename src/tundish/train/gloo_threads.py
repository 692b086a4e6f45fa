"""Keeps gloo's threads from slowing down everything else that a CPU computes."""

import torch
from torch.distributed import Work, all_gather_into_tensor, get_world_size

NUMBERS = 1 << 18
"""Elements; more than PyTorch copies in one thread (at::internal::GRAIN_SIZE, 32,768)."""
TIMES = 64
"""Exchanges; enough for each of gloo's two threads to take part."""


def single_out_gloo() -> None:
    """Make each of gloo's threads copy single-threaded; call once, on all ranks, after the process group is made."""
    # Each of them would start an OpenMP team of its own for its first large copy. libgomp counts the threads of all
    # teams, and where they outnumber the CPUs, puts every thread to sleep at every barrier: element-wise operations
    # then take up to nine times as long. A thread reads its number of threads when it first needs it, and never again.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        part = torch.zeros(NUMBERS)
        wholes = [torch.empty(NUMBERS * get_world_size()) for _ in range(TIMES)]
        works: list[Work | None] = [all_gather_into_tensor(whole, part, async_op=True) for whole in wholes]
        for work in works:
            assert work is not None
            work.wait()
    finally:
        torch.set_num_threads(threads)
