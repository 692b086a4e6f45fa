"""What a run connects to: MLflow, the model hub, the launchers' services. Each is asked once, with a short timeout.

A `judge_…` function rates what was read; the function after it reads.
"""

import os
from pathlib import Path

from tundish.base.files import obstacle_to_writing
from tundish.base.home import default_tracking_uri
from tundish.base.mlflow_client import ask_registry, check_file, file_of, open_client, store_errors, why
from tundish.base.objects.opening import check_artifacts
from tundish.doctor.finding import Finding
from tundish.errors import StoreError
from tundish.launch.contract import Launcher
from tundish.tracking.experiment import registry_uri, tracking_uri

SECONDS = (3.0, 4.0)
"""Timeouts to connect and to read."""


def mlflow() -> Finding:
    """Open the stores as `create()` does, except that nothing is created."""
    uri, registry = tracking_uri(), registry_uri()
    try:
        if (path := _missing(uri)) is not None:
            return Finding("MLflow", "ok", f"{path}, which the first run creates")
        for experiment in open_client(uri).search_experiments(max_results=1):
            check_artifacts(experiment.artifact_location, uri)
        if registry is not None:
            ask_registry(registry, uri, "main.default.tundish")
    except StoreError as error:
        return Finding("MLflow", "problem", error.found, error.advice)
    return Finding("MLflow", "ok", f"{uri} answers" + (f"; so does the model registry {registry}" if registry else ""))


def _missing(uri: str) -> Path | None:
    """The file or folder that opening the store would create; None if it exists or is not a path.

    Raises:
        StoreError: it cannot be created.
    """
    file = file_of(uri)
    path = uri.removeprefix("file:").removeprefix("//")
    missing = file if file is not None or "://" in path or uri == "databricks" else Path(path)
    if missing is None or missing.exists():
        return None
    if file is not None and uri != default_tracking_uri():
        with store_errors(uri):
            check_file(file)
    elif obstacle := obstacle_to_writing(missing.parent):
        advice = "Set TUNDISH_HOME or MLFLOW_TRACKING_URI to a location that you can write to."
        raise StoreError(f"{missing} cannot be created ({obstacle})", advice)
    return missing


def judge_hub(endpoint: str, obstacle: str, *, offline: str, token: bool) -> Finding:
    """Whether the model hub can be used.

    Args:
        endpoint: its address.
        obstacle: why it does not answer; empty = it does.
        offline: the setting that switches it off; empty = none.
        token: whether a token is set.
    """
    if offline:
        return Finding(
            "model hub", "absent", f"not used, because {offline}: models and datasets come from folders and the cache"
        )
    if obstacle:
        advice = (
            "Check the network, HF_ENDPOINT and the proxy; on a machine without internet access, set HF_HUB_OFFLINE=1."
        )
        return Finding("model hub", "problem", f"{endpoint}: {obstacle}", advice)
    if not token:
        advice = "Gated models such as Llama need a token: run `huggingface-cli login`, or set HF_TOKEN."
        return Finding("model hub", "ok", f"{endpoint} answers; no token is set", advice)
    return Finding("model hub", "ok", f"{endpoint} answers; a token is set")


def hub() -> Finding:
    """Request the hub's front page, unless it is switched off."""
    import requests
    from huggingface_hub import get_token

    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    switches = [name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if _is_on(name)]
    obstacle = ""
    if not switches:
        try:
            status = requests.head(endpoint, timeout=SECONDS, allow_redirects=False).status_code
            obstacle = f"answers with status {status}" if status >= 500 else ""
        except requests.RequestException as error:
            obstacle, _ = why(error)
    offline = f"{switches[0]} is set" if switches else ""
    return judge_hub(endpoint, obstacle, offline=offline, token=bool(get_token()))


def _is_on(name: str) -> bool:
    return os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")


def launcher(service: Launcher) -> Finding:
    """Ask what a launcher needs."""
    health = service.health()
    return Finding(service.SERVICE, health.state, health.text, health.advice)
