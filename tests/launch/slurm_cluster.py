"""A real Slurm on this machine: controller and two nodes on loopback, with their own state, keys and ports."""

import os
import platform
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel", "sinfo")
NODES = ("n1", "n2")
CONF = """\
ClusterName=toy
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={state}/munge/socket
CryptoType=crypto/munge
StateSaveLocation={state}/controller
SlurmdSpoolDir={state}/spool/%n
SlurmctldPidFile={state}/controller.pid
SlurmdPidFile={state}/%n.pid
SlurmctldLogFile={state}/log/controller.log
SlurmdLogFile={state}/log/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,bf_interval=2,requeue_delay=1
MinJobAge=3600
KillWait=30
InactiveLimit=0
{nodes}
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> list[str]:
    """Programs that the cluster needs and this machine lacks."""
    return [name for name in COMMANDS if shutil.which(name, path=_path()) is None]


def _path() -> str:
    """PATH with the folders of Debian's daemons, which only root has on it."""
    return os.environ["PATH"] + ":/usr/sbin:/sbin"


@contextmanager
def slurm_cluster(state: Path) -> Iterator[Path]:
    """Run a cluster of two nodes for the length of the block; yields the path for SLURM_CONF."""
    for name in ("controller", "spool", "log", "munge"):
        (state / name).mkdir(parents=True)
        (state / name).chmod(0o755)
    conf = state / "slurm.conf"
    ports = [_free_port() for _ in range(3)]
    nodes = [
        f"NodeName={name} NodeHostname={platform.node()} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=8000"
        for name, port in zip(NODES, ports[1:], strict=True)
    ]
    conf.write_text(CONF.format(host=platform.node(), state=state, controller=ports[0], nodes="\n".join(nodes)))
    (state / "munge" / "key").write_bytes(os.urandom(1024))
    (state / "munge" / "key").chmod(0o600)
    munge = [f"--{name}-file={state}/munge/{name}" for name in ("key", "pid", "log", "seed")]
    daemons = [("munged", "--force", "--foreground", f"--socket={state}/munge/socket", *munge)]
    daemons += [("slurmctld", "-D", "-i"), *(("slurmd", "-D", "-N", name) for name in NODES)]
    running: list[subprocess.Popen[bytes]] = []
    try:
        for daemon in daemons:
            running.append(_start(daemon, conf, state))
            if daemon[0] == "munged":
                _wait_for(lambda: (state / "munge" / "socket").exists(), state)
        _wait_for(lambda: _idle(conf) == len(NODES), state)
        yield conf
    finally:
        for process in reversed(running):
            process.terminate()
        for process in running:
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(15)


def _start(command: Sequence[str], conf: Path, state: Path) -> subprocess.Popen[bytes]:
    with open(state / "log" / "daemons.out", "ab") as log:
        environment = {**os.environ, "SLURM_CONF": str(conf), "PATH": _path()}
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def _idle(conf: Path) -> int:
    command = ["sinfo", "--noheader", "--states=idle", "--format=%D"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "SLURM_CONF": str(conf)})
    return int(done.stdout.strip() or 0)


def _wait_for(condition: object, state: Path, seconds: float = 30) -> None:
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            pytest.fail("".join(log.read_text(errors="replace")[-2000:] for log in (state / "log").iterdir()))
        time.sleep(0.1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
