"""The command lines and environment with which a run's supervisor, and each node's ranks, are started; pure."""

import re
import shlex
import sys

from tundish.base.run_folder import RunFolder
from tundish.plan.compute import Compute

STOPPED = 75
"""Exit code of ranks that were asked to stop and have saved a checkpoint (EX_TEMPFAIL of sysexits.h)."""
MASTER_PORT = "TUNDISH_MASTER_PORT"
"""Variable with the port of the first node, where a command starts training on several."""


def supervisor_command(run: RunFolder) -> list[str]:
    """The argv of the process that takes the run through its stages."""
    return [sys.executable, "-m", "tundish.supervise.supervisor", str(run.folder)]


def train_command(compute: Compute, run: RunFolder) -> list[str]:
    """The composer launcher's argv for a run of one node; rank 0 prints to the launcher's own output, the others to
    logs. The launcher chooses a free port.
    """
    return [*_launcher(compute, run), *_ranks(run)]


def node_script(compute: Compute, run: RunFolder, *, rank: str, address: str, port: str) -> str:
    """A shell script that starts the composer launcher on one of several nodes.

    Args:
        compute: where to train.
        run: its folder.
        rank: the node's number, from 0, or `$` and the name of a shell variable that holds it.
        address: of the first node, or such a variable.
        port: of the first node, or such a variable.
    """
    first = f'train-rank"$(({rank} * {compute.devices_per_node}))".log'
    nodes = f"--world_size {compute.devices} --node_rank {_word(rank)} --master_addr {_word(address)}"
    return f"""\
# When stopped, the ranks save a checkpoint first; the launcher must not end before them.
trap "" TERM USR1
# Not a shared folder: there, the ranks of several nodes would remove each other's signal files.
folder=$(mktemp -d) && cd "$folder" || exit 1
{shlex.join(_launcher(compute, run))} \\
  {nodes} --master_port {_word(port)} \\
  {shlex.join(_ranks(run))} >> {shlex.quote(str(run.logs))}/{first} 2>&1
code=$?
rm -rf "$folder"
exit $code
"""


def _word(value: str) -> str:
    """One word of a shell command: a variable's value, or the text itself, whatever it contains."""
    return f'"{value}"' if re.fullmatch(r"\$\w+", value) else shlex.quote(value)


def _launcher(compute: Compute, run: RunFolder) -> list[str]:
    rank_log = str(run.log("train", "{rank}"))  # the launcher puts the number there
    launcher = [sys.executable, "-m", "tundish.launch.composer_launcher", "-n", str(compute.devices_per_node)]
    return [*launcher, "--stdout", rank_log, "--stderr", rank_log]


def _ranks(run: RunFolder) -> list[str]:
    return ["-m", "tundish.train", str(run.foundry_yaml)]


def train_environment(compute: Compute, run: RunFolder, cores: int) -> dict[str, str]:
    """What every rank needs beside the caller's environment and MLflow's."""
    environment = {"FSDP_VERSION": "2", "TOKENIZERS_PARALLELISM": "false"} | run.environment
    if compute.device == "cpu":
        environment["OMP_NUM_THREADS"] = str(max(1, cores // compute.devices_per_node))
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return environment
