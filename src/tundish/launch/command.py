"""The command lines and environment with which each node starts its ranks; pure."""

import re
import shlex
import sys

from tundish.base.home import RUN_VARIABLE
from tundish.base.run_folder import RunFolder
from tundish.plan.compute import Compute

STOPPED = 75
"""Exit code of ranks that have saved a checkpoint and ended because they were asked to (EX_TEMPFAIL of sysexits.h)."""


def train_command(compute: Compute, paths: RunFolder) -> list[str]:
    """The composer launcher's argv for a run of one node; rank 0 prints to the launcher's own output, the others to
    logs. The launcher chooses a free port.
    """
    return [*_launcher(compute, paths), *_ranks(paths)]


def node_script(compute: Compute, paths: RunFolder, *, rank: str, address: str, port: str) -> str:
    """A shell script that starts the composer launcher on one of several nodes.

    Args:
        compute: where to train.
        paths: of the run.
        rank: the node's number, from 0, or the name of a shell variable that holds it, after its `$`.
        address: of the first node, or such a variable.
        port: of the first node, or such a variable.
    """
    first = f'train-rank"$(({rank} * {compute.devices_per_node}))".log'
    nodes = f"--world_size {compute.devices} --node_rank {_word(rank)} --master_addr {_word(address)}"
    return f"""\
# Asked to end, the ranks save a checkpoint first; the launcher must not end before them.
trap "" TERM USR1
# Not a shared folder: there, ranks of several nodes remove the signal files of each other.
folder=$(mktemp -d) && cd "$folder" || exit 1
{shlex.join(_launcher(compute, paths))} \\
  {nodes} --master_port {_word(port)} \\
  {shlex.join(_ranks(paths))} >> {shlex.quote(str(paths.logs))}/{first} 2>&1
code=$?
rm -rf "$folder"
exit $code
"""


def _word(value: str) -> str:
    """One word of a shell's command: a variable's value, or the text itself, whatever it holds."""
    return f'"{value}"' if re.fullmatch(r"\$\w+", value) else shlex.quote(value)


def _launcher(compute: Compute, paths: RunFolder) -> list[str]:
    rank_log = str(paths.logs / "train-rank{rank}.log")
    launcher = [sys.executable, "-m", "tundish.launch.launcher", "-n", str(compute.devices_per_node)]
    return [*launcher, "--stdout", rank_log, "--stderr", rank_log]


def _ranks(paths: RunFolder) -> list[str]:
    return ["-m", "tundish.train", str(paths.foundry_yaml)]


def train_environment(compute: Compute, paths: RunFolder, cores: int) -> dict[str, str]:
    """What every rank needs beside the caller's environment and MLflow's."""
    environment = {"FSDP_VERSION": "2", "TOKENIZERS_PARALLELISM": "false", RUN_VARIABLE: str(paths.events)}
    if compute.device == "cpu":
        environment["OMP_NUM_THREADS"] = str(max(1, cores // compute.devices_per_node))
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return environment
