"""Where things are on this machine: the folders in `$TUNDISH_HOME`, and the layers of YAML."""

import os
from pathlib import Path

RUN_VARIABLE = "TUNDISH_EVENTS"
"""Environment variable with which a run's supervisor lets the ranks write its events: the path of events.jsonl."""
FOLDER_VARIABLES = (
    "TUNDISH_HOME HF_HOME HF_HUB_CACHE HF_DATASETS_CACHE HUGGINGFACE_HUB_CACHE TRANSFORMERS_CACHE XDG_CACHE_HOME "
    "TMPDIR AWS_CONFIG_FILE AWS_SHARED_CREDENTIALS_FILE GOOGLE_APPLICATION_CREDENTIALS SSL_CERT_FILE REQUESTS_CA_BUNDLE"
).split()
"""Variables of the environment that name a file or folder."""


def home() -> Path:
    """`$TUNDISH_HOME`, else `~/.tundish`; not created."""
    return Path(os.environ.get("TUNDISH_HOME") or "~/.tundish").expanduser().absolute()


def absolute_environment() -> dict[str, str]:
    """This process's environment for one that works in another folder: relative paths in it are made absolute."""
    given = {name: os.environ[name] for name in FOLDER_VARIABLES if os.environ.get(name)}
    return {**os.environ, **{name: str(Path(path).expanduser().absolute()) for name, path in given.items()}}


def yamls_dir() -> Path:
    """The folder of YAML layers: inside the installed package, or at the top of a source checkout."""
    packaged = Path(__file__).parents[1] / "yamls"
    return packaged if packaged.is_dir() else Path(__file__).parents[3] / "yamls"


def runs_dir() -> Path:
    """Where all run folders are."""
    return home() / "runs"


def prepared_dir() -> Path:
    """Prepared data, shared by all runs; one folder for each distinct input."""
    return home() / "prepared"


def downloads_dir() -> Path:
    """Copies of data from object stores; one folder for each URI."""
    return home() / "downloads"


def copies_dir() -> Path:
    """This machine's copies of checkpoints that are kept elsewhere; one folder for each place."""
    return home() / "checkpoints"


def architectures_dir() -> Path:
    """What models' configs ask of their weights; one file for each config."""
    return home() / "architectures"


def mlflow_artifacts_dir() -> Path:
    """Artifact root of the default MLflow store: `<experiment>/<run id>/artifacts` below it."""
    return home() / "mlflow" / "artifacts"


def default_tracking_uri() -> str:
    """The MLflow store used when `MLFLOW_TRACKING_URI` is not set: a SQLite file."""
    return f"sqlite:///{home() / 'mlflow' / 'mlflow.db'}"
