"""MLflow in the user's own process: the store that the user chose, or the one that tundish sets if none was."""

import os
import sys

VARIABLE = "MLFLOW_TRACKING_URI"
REGISTRY_VARIABLE = "MLFLOW_REGISTRY_URI"
SET_HERE = "TUNDISH_SET_MLFLOW_TRACKING_URI"
"""The URI that `use` set, so that it does not count as the user's choice; child processes inherit both variables."""


def chosen_uri() -> str | None:
    """The URI that the user set by `mlflow.set_tracking_uri` or `MLFLOW_TRACKING_URI`; None: neither."""
    mlflow = sys.modules.get("mlflow")
    # Without an import of MLflow, which takes seconds: if it was never imported, its function was never called.
    uri = str(mlflow.get_tracking_uri()) if mlflow and mlflow.is_tracking_uri_set() else os.environ.get(VARIABLE)
    return None if not uri or uri == os.environ.get(SET_HERE) else uri


def use(tracking_uri: str, registry_uri: str | None) -> bool:
    """Point `mlflow` in this process at a store, unless the user has chosen one.

    Returns:
        Whether MLflow now uses another store than before.
    """
    if chosen_uri() is not None or os.environ.get(VARIABLE) == tracking_uri:
        return False
    # MLflow reads the variable at each call, so it need not be imported here.
    os.environ[VARIABLE] = os.environ[SET_HERE] = tracking_uri
    if registry_uri is not None:
        os.environ.setdefault(REGISTRY_VARIABLE, registry_uri)
    return True
