"""The launcher's command line and environment; pure."""

import sys

from tundish.compute import Compute
from tundish.paths import RUN_VARIABLE, RunPaths


def train_command(compute: Compute, paths: RunPaths) -> list[str]:
    """The composer launcher's argv for one node; rank 0 prints to the launcher's own output, the others to logs."""
    rank_log = str(paths.logs / "train-rank{rank}.log")
    return [
        *(sys.executable, "-m", "composer.cli.launcher"),
        *("-n", str(compute.devices_per_node), "--stdout", rank_log, "--stderr", rank_log),
        *("-m", "tundish.train", str(paths.foundry_yaml)),
    ]


def train_environment(compute: Compute, paths: RunPaths, cores: int) -> dict[str, str]:
    """What every rank needs beside the caller's environment and MLflow's."""
    environment = {"FSDP_VERSION": "2", "TOKENIZERS_PARALLELISM": "false", RUN_VARIABLE: str(paths.events)}
    if compute.device == "cpu":
        environment["OMP_NUM_THREADS"] = str(max(1, cores // compute.devices_per_node))
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return environment
