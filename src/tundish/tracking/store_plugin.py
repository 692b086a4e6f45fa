"""How MLflow opens a database, in every process where tundish is installed: without a stray `mlruns` folder.

Registered with MLflow as a plugin (`mlflow.tracking_store`). MLflow's own way makes `./mlruns` in whatever folder the
process is in, also to read, and an experiment of the default store would keep its artifacts there.
"""

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from tundish.base.home import default_tracking_uri, mlflow_artifacts_dir

if TYPE_CHECKING:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore


def open_store(store_uri: str, artifact_uri: str | None = None) -> "SqlAlchemyStore":
    """The tracking store at a database's address; that of `$TUNDISH_HOME` keeps its artifacts beside it."""
    from mlflow.store.tracking import DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    if artifact_uri is not None:
        return SqlAlchemyStore(store_uri, artifact_uri)
    if store_uri == default_tracking_uri():
        return SqlAlchemyStore(store_uri, mlflow_artifacts_dir().as_uri())
    folder = Path(DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH)
    was_there = folder.exists()
    try:
        return SqlAlchemyStore(store_uri, DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH)
    finally:
        if not was_there:
            with contextlib.suppress(OSError):  # nothing was made, or another process has put something there
                folder.rmdir()
