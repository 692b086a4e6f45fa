"""train/threads.py: gloo's threads start no others."""

import os
import subprocess
import sys

import pytest
from tests.train.conftest import free_port

# Counts its threads before and after large copies between ranks.
COUNT = """
import os, sys
import torch, torch.distributed as dist
from tundish.train.threads import single_out_gloo

torch.set_num_threads(2)
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{sys.argv[1]}", rank=0, world_size=1)
torch.ones(1 << 20).mul(2)
if sys.argv[2] == "yes":
    single_out_gloo()
before = len(os.listdir("/proc/self/task"))
for _ in range(20):
    dist.all_gather_into_tensor(torch.empty(1 << 20), torch.ones(1 << 20))
    dist.reduce_scatter_tensor(torch.empty(1 << 20), torch.ones(1 << 20))
print(len(os.listdir("/proc/self/task")) - before, torch.get_num_threads())
"""


@pytest.mark.parametrize(("called", "started"), [("yes", False), ("no", True)])
def test_copies_between_ranks_start_no_threads(called: str, started: bool) -> None:
    """A step would take half as long again: PyTorch's own threads sleep where there are more than processors."""
    command = [sys.executable, "-W", "ignore", "-c", COUNT, str(free_port()), called]
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=True)
    more, threads = map(int, done.stdout.split())
    assert (more > 0) is started and threads == 2
