"""Slurm's commands for tests without Slurm: jobs are processes of this machine, on one node.

`install` puts them into a folder; the folder `$FAKE_SLURM` holds the jobs. What a test writes there changes what they
say: `pending` keeps jobs from starting, `down` makes the controller away, `states/<job>` is what squeue says of a job,
`gone` makes squeue forget jobs, `refuse` is sbatch's answer.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

NAMES = ("sbatch", "squeue", "scancel", "scontrol", "sacct")


def install(folder: Path) -> None:
    """Write the commands to a folder, for PATH."""
    folder.mkdir()
    for name in NAMES:
        (folder / name).write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} {name} "$@"\n')
        (folder / name).chmod(0o755)


def _jobs(home: Path) -> dict[str, dict[str, int]]:
    return {file.stem: json.loads(file.read_text()) for file in sorted(home.glob("*.json"))}


def _state(home: Path, job: str, pid: int) -> str:
    said = home / "states" / job
    if said.exists():
        return said.read_text()
    if not pid:
        return "PENDING|Resources"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return "COMPLETED|None"
    return "RUNNING|None"


def sbatch(home: Path, arguments: list[str]) -> int:
    """Start the script, with the variables that `--export` names and no others."""
    if (home / "refuse").exists():
        print((home / "refuse").read_text(), file=sys.stderr)
        return 1
    (export,) = [argument.partition("=")[2] for argument in arguments if argument.startswith("--export=")]
    job, script = str(len(_jobs(home)) + 1), Path(arguments[-1])
    environment = {name: os.environ[name] for name in export.split(",")} | {"SLURM_JOB_ID": job}
    (home / f"{job}.environment").write_text(json.dumps(environment))
    (home / f"{job}.sbatch").write_text(json.dumps(sorted(os.environ)))
    (home / f"{job}.name").write_text(script.parent.name)
    pid = 0
    if not (home / "pending").exists():
        with open(home / f"{job}.log", "wb") as log:
            # No child of ours: it disappears when it exits.
            shell = f"setsid bash {str(script)!r} & echo $! > {home}/{job}.pid"
            subprocess.run(["bash", "-c", shell], env=environment, stdout=log, stderr=log, check=True)
        pid = int((home / f"{job}.pid").read_text())
    (home / f"{job}.json").write_text(json.dumps({"pid": pid}))
    print(job)
    return 0


def squeue(home: Path, arguments: list[str]) -> int:
    """`job|state|reason|name` of every job."""
    with open(home / "questions", "a") as file:
        file.write("squeue\n")
    if (home / "down").exists():
        print("slurm_load_jobs error: Unable to contact slurm controller (connect failure)", file=sys.stderr)
        return 1
    for job, record in {} if (home / "gone").exists() else _jobs(home).items():
        name = (home / f"{job}.name").read_text()
        asked = [argument.partition("=")[2] for argument in arguments if argument.startswith("--name=")]
        if asked and asked != [name]:
            continue
        print(job if "--format=%i" in arguments else f"{job}|{_state(home, job, record['pid'])}|{name}")
    return 0


def scancel(home: Path, arguments: list[str]) -> int:
    """Send the signal, by default SIGTERM; a waiting job is removed."""
    job = arguments[-1]
    names = [argument.partition("=")[2] for argument in arguments if argument.startswith("--signal=")]
    pid = _jobs(home)[job]["pid"]
    if not pid:
        (home / "states").mkdir(exist_ok=True)
        (home / "states" / job).write_text("CANCELLED|None")
        return 0
    try:
        os.kill(pid, getattr(signal, "SIG" + (names[0] if names else "TERM")))
    except ProcessLookupError:
        pass
    return 0


def sacct(home: Path, arguments: list[str]) -> int:
    """Fail as without accounting."""
    print("Slurm accounting storage is disabled", file=sys.stderr)
    return 1


def scontrol(home: Path, arguments: list[str]) -> int:
    """Record that a job was requeued."""
    (home / "requeued").write_text(arguments[-1])
    return 0


if __name__ == "__main__":
    sys.exit(globals()[sys.argv[1]](Path(os.environ["FAKE_SLURM"]), sys.argv[2:]))
