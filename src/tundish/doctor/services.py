"""What a run talks to: MLflow, the model hub, Slurm. Each is asked once, and no answer is waited for long.

A `judge_…` function says what is to be thought of what was read; the function after it reads.
"""

import os
import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

from tundish.base.files import obstacle_to_writing
from tundish.base.home import default_tracking_uri
from tundish.base.mlflow_client import ask_registry, check_file, file_of, open_client, told, why
from tundish.base.objects.opening import check_artifacts
from tundish.doctor.finding import Finding
from tundish.errors import StoreError
from tundish.tracking.experiment import registry_uri, tracking_uri

SECONDS = (3.0, 4.0)
"""To connect, and to answer."""


def mlflow() -> Finding:
    """Open the stores as `create()` does, except that nothing is made."""
    uri, registry = tracking_uri(), registry_uri()
    try:
        if place := _to_be_made(uri):
            return Finding("MLflow", "ok", f"{place}, to be made by the first run")
        for experiment in open_client(uri).search_experiments(max_results=1):
            check_artifacts(experiment.artifact_location, uri)
        if registry is not None:
            ask_registry(registry, uri, "main.default.tundish")
    except StoreError as error:
        return Finding("MLflow", "problem", error.found, error.advice)
    return Finding("MLflow", "ok", f"{uri} answers" + (f"; the model registry {registry}, too" if registry else ""))


def _to_be_made(uri: str) -> Path | None:
    """A file or folder that opening the store would make; it can."""
    file = file_of(uri)
    path = uri.removeprefix("file:").removeprefix("//")
    place = file if file is not None or "://" in path or uri == "databricks" else Path(path)
    if place is None or place.exists():
        return None
    if file is not None and uri != default_tracking_uri():
        with told(uri):
            check_file(file)
    elif obstacle := obstacle_to_writing(place.parent):
        advice = "Set TUNDISH_HOME or MLFLOW_TRACKING_URI to a place that you may write."
        raise StoreError(f"{place} cannot be made ({obstacle})", advice)
    return place


def judge_hub(endpoint: str, obstacle: str, *, offline: str, token: bool) -> Finding:
    """What to think of the model hub.

    Args:
        endpoint: its address.
        obstacle: why it does not answer; empty: it does.
        offline: the setting that switches it off; empty: none does.
        token: whether there is one.
    """
    if offline:
        return Finding(
            "model hub", "absent", f"not asked, as {offline}: models and datasets come from folders and cache"
        )
    if obstacle:
        advice = "Check the network, HF_ENDPOINT and the proxy; on a machine without a way out, set HF_HUB_OFFLINE=1."
        return Finding("model hub", "problem", f"{endpoint}: {obstacle}", advice)
    if not token:
        advice = "Gated models, such as Llama, need one: `huggingface-cli login`, or HF_TOKEN."
        return Finding("model hub", "ok", f"{endpoint} answers; there is no token", advice)
    return Finding("model hub", "ok", f"{endpoint} answers; there is a token")


def hub() -> Finding:
    """Ask the model hub for its first page, unless it is switched off."""
    import requests
    from huggingface_hub import get_token

    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    switches = [name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if _is_on(name)]
    obstacle = ""
    if not switches:
        try:
            status = requests.head(endpoint, timeout=SECONDS, allow_redirects=False).status_code
            obstacle = f"answers with {status}" if status >= 500 else ""
        except requests.RequestException as error:
            obstacle, _ = why(error)
    offline = f"{switches[0]} is set" if switches else ""
    return judge_hub(endpoint, obstacle, offline=offline, token=bool(get_token()))


def _is_on(name: str) -> bool:
    return os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")


def judge_slurm(version: str, status: int, rows: str, complaint: str) -> Finding:
    """What to think of Slurm.

    Args:
        version: what `sinfo --version` says.
        status: exit code of sinfo.
        rows: what it lists: `partition|nodes|state` a line.
        complaint: what it says on standard error.
    """
    if status:
        if "configuration source" in complaint:
            return Finding("Slurm", "absent", "sinfo is there, but no cluster is configured")
        said = " ".join(complaint.split())[:200] or f"exit code {status}"
        advice = "Check slurm.conf (SLURM_CONF) and that slurmctld runs; runs on this machine do not need it."
        return Finding("Slurm", "problem", f"sinfo says: {said}", advice)
    partitions: dict[str, list[str]] = defaultdict(list)
    for name, nodes, state in (line.split("|") for line in rows.split()):
        partitions[name].append(f"{nodes} {state}")
    told = "; ".join(f"{name}: {', '.join(states)}" for name, states in partitions.items()) or "no partition"
    usable = re.search(r"\|(idle|mix|alloc|comp|plan)", rows)
    found, advice = f"{version}, nodes of {told}", "" if usable else "No node takes jobs: `sinfo -R` tells why."
    return Finding("Slurm", "ok" if usable else "problem", found, advice)


def slurm() -> Finding:
    """Ask sinfo."""
    if shutil.which("sinfo") is None:
        return Finding("Slurm", "absent", "no sinfo on PATH; runs train on this machine")
    version, listed = (
        subprocess.run(["sinfo", *options], capture_output=True, text=True, timeout=sum(SECONDS), check=False)
        for options in (["--version"], ["--noheader", "--format=%R|%D|%T"])
    )
    return judge_slurm(version.stdout.strip(), listed.returncode, listed.stdout, listed.stderr)
