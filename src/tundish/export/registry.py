"""An export → a model version in MLflow, without loading the model."""

import contextlib
import importlib.metadata
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tundish.base.mlflow_client import store_errors
from tundish.errors import FailureCause, StageError, StoreError
from tundish.plan.models import license_of
from tundish.plan.spec import RunSpec, TaskType

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

SERVING_PACKAGES = ("mlflow", "torch", "transformers", "accelerate")
"""What a served model needs, in the installed versions."""
SERVING_LIMITS = ("starlette<1",)
"""MLflow allows any version, but its server does not start with 1."""
READY_SECONDS = 300.0
"""How long the registry may take for a version: MLflow's default."""
ANSWER_TOKENS = 512
"""Maximum of an answer if the request sets none; transformers would stop after 20."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Serving:
    """How a model of a task type is served."""

    task: str
    """MLflow's inference task, which determines the signature."""
    example: Mapping[str, Any]
    settings: Mapping[str, Any]
    """Arguments of its pipeline unless a request sets them."""


CHAT = Serving(
    task="llm/v1/chat",
    example={"messages": [{"role": "user", "content": "What is MLflow?"}], "max_tokens": 100},
    # MLflow renders the chat template and tokenizes its text: a second BOS would precede the template's own.
    settings={"max_new_tokens": ANSWER_TOKENS, "add_special_tokens": False},
)
COMPLETIONS = Serving(
    task="llm/v1/completions",
    example={"prompt": "MLflow is", "max_tokens": 100},
    settings={"max_new_tokens": ANSWER_TOKENS},
)
SERVING: Mapping[TaskType, Serving] = {
    "CHAT_COMPLETION": CHAT,
    "INSTRUCTION_FINETUNE": COMPLETIONS,
    "CONTINUED_PRETRAIN": COMPLETIONS,
}


def register(
    export: Path, spec: RunSpec, *, mlflow_run_id: str, tracking_uri: str, registry_uri: str, model_path: str = "model"
) -> tuple[str, str]:
    """Register the Hugging Face folder `export` under the run's `register_to`, and finish the MLflow run.

    Args:
        export: the folder.
        spec: of the run.
        mlflow_run_id: of the run.
        tracking_uri: of the store that has it.
        registry_uri: of the registry.
        model_path: of the model in the MLflow run's artifacts; those of earlier versions stay.

    Returns:
        The registered name and the version, which is READY: the one that was registered from this path before, if any.

    Raises:
        StageError: MLflow refuses it, does not answer, or does not make the version ready.
    """
    import mlflow

    mlflow.set_tracking_uri(tracking_uri)
    mlflow.set_registry_uri(registry_uri)
    if endpoint := os.environ.get("S3_ENDPOINT_URL"):  # what all else here takes for S3's, under MLflow's own name
        os.environ.setdefault("MLFLOW_S3_ENDPOINT_URL", endpoint)
    client, name = mlflow.MlflowClient(), spec.registered_name
    try:
        with store_errors(registry_uri), _running(mlflow_run_id):
            version = version_of(client, name, mlflow_run_id, model_path) or _log(export, spec, model_path)
            _wait_until_ready(client, name, version)
    except StoreError as error:
        raise StageError(f"{name} could not be registered: {error.message}", failure=error.failure) from error
    return name, version


@contextlib.contextmanager
def _running(mlflow_run_id: str) -> Iterator[None]:
    """Set the MLflow run to running, and finish it again."""
    import mlflow

    with mlflow.start_run(run_id=mlflow_run_id):
        yield


def _log(export: Path, spec: RunSpec, model_path: str) -> str:
    """Upload the model and create a version of it."""
    # Given the path of a folder, MLflow copies files; it neither loads the model nor runs it on the input example.
    import mlflow
    import torch

    serving, license = SERVING[spec.task_type], license_of(spec.model)
    # Without the part after "+": package indexes do not have local builds.
    installed = [f"{package}=={importlib.metadata.version(package).split('+')[0]}" for package in SERVING_PACKAGES]
    dtype = json.loads((export / "config.json").read_text())["torch_dtype"]
    with _as_folder(export, spec.run_name) as folder:
        info = mlflow.transformers.log_model(
            transformers_model=folder,
            artifact_path=model_path,
            task=serving.task,
            torch_dtype=getattr(torch, dtype),  # otherwise it is served in float32, with twice the memory
            input_example=dict(serving.example),
            model_config=dict(serving.settings),
            model_card=_hub_card(spec, license),
            registered_model_name=spec.registered_name,
            await_registration_for=0,  # `_wait_until_ready` waits, also for versions of earlier attempts
            pip_requirements=[*installed, *SERVING_LIMITS],
            metadata={
                "task": serving.task, "base_model": spec.model, "license": license, "run": spec.run_name,
            },
        )  # fmt: skip
    return str(info.registered_model_version)


@contextlib.contextmanager
def _as_folder(export: Path, name: str) -> Iterator[str]:
    """A relative path that leads to `export`: served answers contain it as the model's name."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        Path(name).symlink_to(export)
        yield name


def _hub_card(spec: RunSpec, license: str) -> Any:
    """The model's card in the hub's form; without one, MLflow would ask the hub."""
    from huggingface_hub import ModelCard, ModelCardData

    base = None if Path(spec.model).is_absolute() else spec.model
    data = ModelCardData(license=license, base_model=base, library_name="transformers", pipeline_tag="text-generation")
    text = f"{base or 'A model of this machine'}, fine-tuned by tundish in run `{spec.run_name}`."
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {spec.registered_name}\n\n{text}\n")


def version_of(client: "MlflowClient", name: str, mlflow_run_id: str, model_path: str = "model") -> str | None:
    """The newest version of `name` that this run created from `model_path`; None if it created none, or that failed."""
    # The path is compared only if it is not the usual one: not every registry returns it unchanged.
    numbers = [
        int(version.version)
        for version in _versions(client, name)
        if version.run_id == mlflow_run_id
        and version.status != "FAILED_REGISTRATION"
        and (model_path == "model" or str(version.source).rstrip("/").endswith(f"/{model_path}"))
    ]
    return str(max(numbers)) if numbers else None


def _versions(client: "MlflowClient", name: str) -> "Iterator[ModelVersion]":
    """All versions of a name. Unity Catalog allows one condition only, and none on the run."""
    from mlflow.exceptions import MlflowException

    token = None
    while True:
        try:
            page = client.search_model_versions(f"name='{name}'", page_token=token)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND"):
                return  # Unity Catalog's answer for a new model
            raise
        yield from page
        if not (token := page.token):
            return


def _wait_until_ready(client: "MlflowClient", name: str, version: str) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while (status := client.get_model_version(name, version).status) != "READY":
        if status != "PENDING_REGISTRATION" or time.monotonic() > deadline:
            raise StageError(
                f"version {version} of {name} is {status} in the registry; it must be READY. Check the registry, then "
                "`tundish resume` the run.",
                failure=FailureCause.REGISTRATION_FAILED,
            )
        time.sleep(1)
