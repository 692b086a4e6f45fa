"""train/gloo_threads.py: gloo's threads start no others."""

import os
import subprocess
import sys

import pytest
from tests.train.conftest import free_port

pytestmark = pytest.mark.slow

# Counts its threads before and after large copies between ranks.
COUNT = """
import os, sys
import torch, torch.distributed as dist
from tundish.train.gloo_threads import single_out_gloo

torch.set_num_threads(2)
port, called, rank, world = sys.argv[1:]
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=int(rank), world_size=int(world))
torch.ones(1 << 20).mul(2)
if called == "yes":
    single_out_gloo()
world, before = int(world), len(os.listdir("/proc/self/task"))
for _ in range(20):
    dist.all_gather_into_tensor(torch.empty(world << 20), torch.ones(1 << 20))
    dist.reduce_scatter_tensor(torch.empty(1 << 20), torch.ones(world << 20))
print(len(os.listdir("/proc/self/task")) - before, torch.get_num_threads())
"""


@pytest.mark.parametrize(("called", "world", "started"), [("yes", 1, False), ("yes", 2, False), ("no", 1, True)])
def test_copies_between_ranks_start_no_threads(called: str, world: int, started: bool) -> None:
    """A step would take half as long again: PyTorch's own threads sleep where there are more than processors."""
    command = [sys.executable, "-W", "ignore", "-c", COUNT, str(free_port()), called]
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    ranks = [
        subprocess.Popen([*command, str(rank), str(world)], stdout=subprocess.PIPE, text=True, env=environment)
        for rank in range(world)
    ]
    for rank in ranks:
        output, _ = rank.communicate(timeout=120)
        more, threads = map(int, output.split())
        assert (more > 0) is started and threads == 2
