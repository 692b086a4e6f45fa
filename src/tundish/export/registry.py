"""An export → a model version in MLflow, without loading the model."""

import importlib.metadata
import logging
from pathlib import Path

from tundish.errors import StageError
from tundish.spec import RunSpec

log = logging.getLogger(__name__)

REGISTERED_TASKS = {
    "CHAT_COMPLETION": "llm/v1/chat",
    "INSTRUCTION_FINETUNE": "llm/v1/completions",
    "CONTINUED_PRETRAIN": "llm/v1/completions",
}
SERVING_PACKAGES = ("mlflow", "torch", "transformers", "accelerate")


def register(export: Path, spec: RunSpec, mlflow_run_id: str, tracking_uri: str) -> tuple[str, str]:
    """Register the Hugging Face folder `export` under the run's `register_to`.

    Returns:
        The registered name and the version, which is READY. A run that has a version already gets that one.

    Raises:
        StageError: the registry did not make the version ready.
    """
    import mlflow

    mlflow.set_tracking_uri(tracking_uri)
    client = mlflow.MlflowClient()
    name = spec.registered_name
    if (version := _version_of(client, name, mlflow_run_id)) is None:
        with mlflow.start_run(run_id=mlflow_run_id):
            mlflow.transformers.log_model(
                transformers_model=str(export),
                artifact_path="model",
                task=REGISTERED_TASKS[spec.task_type],
                registered_model_name=name,
                pip_requirements=[f"{package}=={importlib.metadata.version(package)}" for package in SERVING_PACKAGES],
                metadata={"task": REGISTERED_TASKS[spec.task_type], "base_model": spec.model, "run": spec.run_name},
            )
        version = _version_of(client, name, mlflow_run_id)
    status = client.get_model_version(name, version).status if version else "missing"
    if version is None or status != "READY":
        raise StageError(f"the registry reports version {version} of {name} as {status}; it should be READY.")
    return name, version


def _version_of(client: "object", name: str, mlflow_run_id: str) -> str | None:
    """The version of `name` that this run has made, if there is one."""
    from mlflow import MlflowClient

    assert isinstance(client, MlflowClient)
    versions = client.search_model_versions(f"name='{name}'")
    mine = [int(version.version) for version in versions if version.run_id == mlflow_run_id]
    return str(max(mine)) if mine else None
