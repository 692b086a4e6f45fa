"""Where tundish keeps things on this machine: the folders in `$TUNDISH_HOME`, and the layers of YAML."""

import os
from pathlib import Path

FOLDER_VARIABLES = (
    "TUNDISH_HOME HF_HOME HF_HUB_CACHE HF_DATASETS_CACHE HUGGINGFACE_HUB_CACHE TRANSFORMERS_CACHE XDG_CACHE_HOME "
    "TMPDIR AWS_CONFIG_FILE AWS_SHARED_CREDENTIALS_FILE AWS_CA_BUNDLE GOOGLE_APPLICATION_CREDENTIALS OCI_CONFIG_FILE "
    "SSL_CERT_FILE REQUESTS_CA_BUNDLE"
).split()
"""Variables of the environment that name a file or folder."""


def home() -> Path:
    """`$TUNDISH_HOME`, else `~/.tundish`; not created."""
    return Path(os.environ.get("TUNDISH_HOME") or "~/.tundish").expanduser().absolute()


def absolute_environment() -> dict[str, str]:
    """This process's environment with absolute paths, for a process that works in another folder."""
    paths = {name: os.environ[name] for name in FOLDER_VARIABLES if os.environ.get(name)}
    return {**os.environ, **{name: str(Path(path).expanduser().absolute()) for name, path in paths.items()}}


def yamls_dir() -> Path:
    """The folder of YAML layers: inside the installed package, or at the top of a source checkout."""
    packaged = Path(__file__).parents[1] / "yamls"
    return packaged if packaged.is_dir() else Path(__file__).parents[3] / "yamls"


def runs_dir() -> Path:
    """Where all run folders are."""
    return home() / "runs"


def prepared_dir() -> Path:
    """Prepared data, shared by all runs; one folder for each input."""
    return home() / "prepared"


def downloads_dir() -> Path:
    """Copies of data from object stores; one folder for each URI."""
    return home() / "downloads"


def copies_dir() -> Path:
    """Local copies of checkpoints that are stored elsewhere; one folder for each place."""
    return home() / "checkpoints"


def architectures_dir() -> Path:
    """Names and shapes of the weights that models' configs ask for; one file for each config."""
    return home() / "architectures"


def mlflow_artifacts_dir() -> Path:
    """Artifact root of the default MLflow store; contains `<experiment>/<run id>/artifacts`."""
    return home() / "mlflow" / "artifacts"


def default_tracking_uri() -> str:
    """The MLflow store used when `MLFLOW_TRACKING_URI` is not set: a SQLite file."""
    return f"sqlite:///{home() / 'mlflow' / 'mlflow.db'}"
