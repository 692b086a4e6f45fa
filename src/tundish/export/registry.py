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

from tundish.base.mlflow_client import told
from tundish.errors import FailureCause, StageError, StoreError
from tundish.plan.models import license_of
from tundish.plan.spec import RunSpec, TaskType

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

SERVING_PACKAGES = ("mlflow", "torch", "transformers", "accelerate")
"""What a served model needs, in the versions that are installed here."""
SERVING_LIMITS = ("starlette<1",)
"""MLflow asks for any version of what its server runs on; with 1 it does not start."""
READY_SECONDS = 300.0
"""For the registry's own work on a version: MLflow's default."""
ANSWER_TOKENS = 512
"""At most, of an answer to a request that does not say: transformers would stop after 20."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Serving:
    """How a model of a task type is asked."""

    task: str
    """MLflow's inference task. The signature follows from it: MLflow takes no other."""
    example: Mapping[str, Any]
    settings: Mapping[str, Any]
    """What its pipeline is called with, where a request does not say otherwise."""


CHAT = Serving(
    task="llm/v1/chat",
    example={"messages": [{"role": "user", "content": "What is MLflow?"}], "max_tokens": 100},
    # MLflow renders the chat template and tokenizes its text: a second BOS would come in front of the template's own.
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
    """Register the Hugging Face folder `export` under the run's `register_to`, and end the MLflow run.

    Args:
        export: the folder.
        spec: of the run.
        mlflow_run_id: of the run.
        tracking_uri: of the store that has it.
        registry_uri: of the registry.
        model_path: among the artifacts of the MLflow run; what is there of an earlier version stays as it is.

    Returns:
        The registered name and the version, which is READY. What has been registered from there already is that one.

    Raises:
        StageError: MLflow refuses, does not answer, or did not make the version ready.
    """
    import mlflow

    mlflow.set_tracking_uri(tracking_uri)
    mlflow.set_registry_uri(registry_uri)
    if endpoint := os.environ.get("S3_ENDPOINT_URL"):  # what all else here takes for S3's, under MLflow's own name
        os.environ.setdefault("MLFLOW_S3_ENDPOINT_URL", endpoint)
    client, name = mlflow.MlflowClient(), spec.registered_name
    try:
        with told(registry_uri), _running(mlflow_run_id):
            version = version_of(client, name, mlflow_run_id, model_path) or _log(export, spec, model_path)
            _wait_until_ready(client, name, version)
    except StoreError as error:
        raise StageError(f"the registry has not taken {name}: {error.message}", failure=error.failure) from error
    return name, version


@contextlib.contextmanager
def _running(mlflow_run_id: str) -> Iterator[None]:
    """The MLflow run goes on, and is ended again, whether a version is made or found."""
    import mlflow

    with mlflow.start_run(run_id=mlflow_run_id):
        yield


def _log(export: Path, spec: RunSpec, model_path: str) -> str:
    """Upload the model and make a version of it.

    Given a folder's path, MLflow copies files and loads neither the model nor, for the input example, an answer of it.
    """
    import mlflow
    import torch

    serving, license = SERVING[spec.task_type], license_of(spec.model)
    dtype = json.loads((export / "config.json").read_text())["torch_dtype"]
    with _as_folder(export, spec.run_name) as folder:
        info = mlflow.transformers.log_model(
            transformers_model=folder,
            artifact_path=model_path,
            task=serving.task,
            torch_dtype=getattr(torch, dtype),  # else it is served in float32, in twice the memory
            input_example=dict(serving.example),
            model_config=dict(serving.settings),
            model_card=_hub_card(spec, license),
            registered_model_name=spec.registered_name,
            await_registration_for=0,  # this module waits, for versions of earlier tries too
            pip_requirements=[*_installed(), *SERVING_LIMITS],
            metadata={
                "task": serving.task, "base_model": spec.model, "license": license, "run": spec.run_name,
            },
        )  # fmt: skip
    return str(info.registered_model_version)


def _installed() -> list[str]:
    # Without what stands after a "+": no package index has those builds.
    return [f"{package}=={importlib.metadata.version(package).split('+')[0]}" for package in SERVING_PACKAGES]


@contextlib.contextmanager
def _as_folder(export: Path, name: str) -> Iterator[str]:
    """A relative path by which `export` is found: a served model's answers hold it, as the model's name."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        Path(name).symlink_to(export)
        yield name


def _hub_card(spec: RunSpec, license: str) -> Any:
    """The model's card in the hub's form; without one, MLflow asks the hub."""
    from huggingface_hub import ModelCard, ModelCardData

    base = None if Path(spec.model).is_absolute() else spec.model
    data = ModelCardData(license=license, base_model=base, library_name="transformers", pipeline_tag="text-generation")
    text = f"{base or 'A model of this machine'}, fine-tuned by tundish in run `{spec.run_name}`."
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {spec.registered_name}\n\n{text}\n")


def version_of(client: "MlflowClient", name: str, mlflow_run_id: str, model_path: str = "model") -> str | None:
    """The newest version of `name` that this run has made of the model at `model_path`.

    None if there is none, or the registry gave it up. The path is asked for only where a run has more than one: not
    every registry tells it as it was given.
    """
    numbers = [
        int(version.version)
        for version in _versions(client, name)
        if version.run_id == mlflow_run_id
        and version.status != "FAILED_REGISTRATION"
        and (model_path == "model" or str(version.source).rstrip("/").endswith(f"/{model_path}"))
    ]
    return str(max(numbers)) if numbers else None


def _versions(client: "MlflowClient", name: str) -> "Iterator[ModelVersion]":
    """All versions of a name. Unity Catalog takes no more than one condition, and tells no run's."""
    from mlflow.exceptions import MlflowException

    token = None
    while True:
        try:
            page = client.search_model_versions(f"name='{name}'", page_token=token)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND"):
                return  # so Unity Catalog says that the model is new
            raise
        yield from page
        if not (token := page.token):
            return


def _wait_until_ready(client: "MlflowClient", name: str, version: str) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while (status := client.get_model_version(name, version).status) != "READY":
        if status != "PENDING_REGISTRATION" or time.monotonic() > deadline:
            raise StageError(
                f"the registry reports version {version} of {name} as {status}; it should be READY.",
                failure=FailureCause.REGISTRATION_FAILED,
            )
        time.sleep(1)
