"""Opens MLflow's databases without creating a stray `mlruns` folder, in every process where tundish is installed.

Registered with MLflow as a plugin (`mlflow.tracking_store`). MLflow itself creates `./mlruns` in the working directory,
even if it only reads, and experiments of the default store would keep their artifacts there.
"""

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from tundish.base.home import default_tracking_uri, mlflow_artifacts_dir

if TYPE_CHECKING:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore


def open_store(store_uri: str, artifact_uri: str | None = None) -> "SqlAlchemyStore":
    """The tracking store in a database; the one in `$TUNDISH_HOME` keeps its artifacts beside the database."""
    from mlflow.store.tracking import DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    if artifact_uri is not None:
        return SqlAlchemyStore(store_uri, artifact_uri)
    if store_uri == default_tracking_uri():
        return SqlAlchemyStore(store_uri, mlflow_artifacts_dir().as_uri())
    folder = Path(DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH)
    existed = folder.exists()
    try:
        return SqlAlchemyStore(store_uri, DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH)
    finally:
        if not existed:
            with contextlib.suppress(OSError):  # it was not created, or another process has written into it
                folder.rmdir()
