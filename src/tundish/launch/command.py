"""The launcher's command line and environment; pure."""

import sys
from collections.abc import Mapping

from tundish.compute import Compute
from tundish.paths import RunPaths


def train_command(compute: Compute, paths: RunPaths) -> list[str]:
    """The composer launcher's argv for one node; rank 0 prints to the launcher's own output, the others to logs."""
    rank_log = str(paths.logs / "train-rank{rank}.log")
    return [
        *(sys.executable, "-m", "composer.cli.launcher"),
        *("-n", str(compute.devices_per_node), "--stdout", rank_log, "--stderr", rank_log),
        *("-m", "tundish.train", str(paths.foundry_yaml)),
    ]


def train_environment(
    compute: Compute, tracking_uri: str, experiment_id: str, mlflow_run_id: str, cores: int
) -> Mapping[str, str]:
    """What every rank needs beside the caller's environment."""
    environment = {
        "FSDP_VERSION": "2",
        "MLFLOW_TRACKING_URI": tracking_uri,
        "MLFLOW_EXPERIMENT_ID": experiment_id,
        # Composer's logger goes on with the run that create() has made.
        "MLFLOW_RUN_ID": mlflow_run_id,
        "TOKENIZERS_PARALLELISM": "false",
    }
    if compute.device == "cpu":
        environment["OMP_NUM_THREADS"] = str(max(1, cores // compute.devices_per_node))
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return environment
