"""The batch script of a run that is a Slurm job; pure."""

import re
import shlex

from tundish import __version__
from tundish.base.run_folder import RunFolder
from tundish.launch.command import MASTER_PORT, node_script, supervisor_command
from tundish.plan.compute import Compute


def job_script(compute: Compute, run: RunFolder) -> str:
    """The text of the run's batch script."""
    node = node_script(compute, run, rank="$SLURM_NODEID", address="$SLURM_LAUNCH_NODE_IPADDR", port=f"${MASTER_PORT}")
    options = "".join(f"#SBATCH --{name}{_value(value)}\n" for name, value in _options(compute, run).items())
    nodes = f"--nodes={compute.nodes} --ntasks={compute.nodes} --ntasks-per-node=1"
    return f"""\
#!/bin/bash
# Run {run.name}, written by tundish {__version__}.
{options}
# What every node runs to train.
node=$(cat <<'END'
{node}END
)

# On the first node: prepares the data, starts training on all nodes by the command after `--`, exports and registers.
# It replaces this shell, and so gets the signal with which Slurm announces that the job's time is nearly over.
exec {shlex.join(supervisor_command(run))} -- \\
  srun {nodes} --cpu-bind=none --export=ALL --kill-on-bad-exit=1 --wait=0 bash -c "$node"
"""


def _options(compute: Compute, run: RunFolder) -> dict[str, str]:
    """Options of sbatch by name; the caller's replace ours."""
    log = str(run.log("supervisor"))
    options = {"job-name": run.name, "nodes": str(compute.nodes), "ntasks-per-node": "1"}
    if compute.device == "gpu":
        options["gpus-per-node"] = str(compute.devices_per_node)
    if not {"cpus-per-task", "cpus-per-gpu", "exclusive"} & set(compute.sbatch):
        options["exclusive"] = ""  # by default Slurm gives a task one core, for all ranks of a node
        if not {"mem", "mem-per-cpu", "mem-per-gpu"} & set(compute.sbatch):
            options["mem"] = "0"
    if compute.time_limit is not None:
        options["time"] = compute.time_limit
    options |= {"signal": f"B:USR1@{compute.grace_s}", "requeue": "", "open-mode": "append"}
    options |= {"output": log.replace("%", "%%"), "chdir": str(run.folder)}
    return options | dict(compute.sbatch)


def _value(value: str) -> str:
    """An option's value as it follows the name; sbatch reads quotes and backslashes as a shell does."""
    if value == "" or re.fullmatch(r"[\w.,:=@%/+-]+", value):
        return value and f"={value}"
    return '="' + re.sub(r'(["\\])', r"\\\1", value) + '"'
