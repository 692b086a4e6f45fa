"""MLflow in the user's own process: which store its user has chosen, and what it uses where none was."""

import os
import sys

VARIABLE = "MLFLOW_TRACKING_URI"
REGISTRY_VARIABLE = "MLFLOW_REGISTRY_URI"
SET_HERE = "TUNDISH_SET_MLFLOW_TRACKING_URI"
"""What `use` has set, which is nobody's choice; this process's children inherit both."""


def chosen_uri() -> str | None:
    """What the user has set by `mlflow.set_tracking_uri` or, where that was not called, by `MLFLOW_TRACKING_URI`."""
    mlflow = sys.modules.get("mlflow")
    found = str(mlflow.get_tracking_uri()) if mlflow and mlflow.is_tracking_uri_set() else os.environ.get(VARIABLE)
    return None if not found or found == os.environ.get(SET_HERE) else found


def use(tracking_uri: str, registry_uri: str | None) -> bool:
    """Let `mlflow` in this process find what is in a store, unless its user has chosen one.

    By the variable alone: MLflow reads it at each call, and takes a while to be imported.

    Returns:
        Whether MLflow looks elsewhere than before.
    """
    if chosen_uri() is not None or os.environ.get(VARIABLE) == tracking_uri:
        return False
    os.environ[VARIABLE] = os.environ[SET_HERE] = tracking_uri
    if registry_uri is not None:
        os.environ.setdefault(REGISTRY_VARIABLE, registry_uri)
    return True
