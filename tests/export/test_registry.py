"""export/registry.py: a version says how it is asked, is made once a run, and answers through the chat template."""

import json
import shutil
import socket
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tundish.errors import StageError
from tundish.export.registry import register
from tundish.plan.spec import RunSpec, parse_spec
from tundish.tracking.experiment import Tracking, open_tracking

Serving = Callable[..., Any]
# MLflow's import of all its flavours warns of much that is not ours.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A SQLite file for all tests of this file: making its tables takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


@pytest.fixture
def in_store(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """New runs are made in the SQLite file."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)


@pytest.fixture
def unreadable_export(tiny_model: Path, tmp_path: Path) -> Path:
    """An export whose weights nobody can load."""
    folder = tmp_path / "export"
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16", "architectures": ["Llama"]}))
    (folder / "model-00001-of-00001.safetensors").write_bytes(b"these are no weights")
    return folder


def _spec(arguments: dict[str, Any], **more: Any) -> tuple[RunSpec, Tracking]:
    spec, _ = parse_spec(arguments | more, created_at="2026-11-21T10:00:00+00:00")
    return spec, open_tracking(spec.run_name, spec.experiment_path, {})


def _register(export: Path, spec: RunSpec, tracking: Tracking) -> tuple[str, str]:
    return register(
        export,
        spec,
        mlflow_run_id=tracking.run_id,
        tracking_uri=tracking.tracking_uri,
        registry_uri=tracking.registry_uri or tracking.tracking_uri,
    )


@pytest.mark.parametrize(
    ("task_type", "task", "key"),
    [
        ("CHAT_COMPLETION", "llm/v1/chat", "messages"),
        ("INSTRUCTION_FINETUNE", "llm/v1/completions", "prompt"),
        ("CONTINUED_PRETRAIN", "llm/v1/completions", "prompt"),
    ],
)
def test_a_version_tells_how_it_is_asked_and_nobody_loads_the_model(
    task_type: str, task: str, key: str, arguments: dict[str, Any], unreadable_export: Path, in_store: None
) -> None:
    """Serving would not know the requests; or registering took as much memory as the model."""
    import mlflow
    from mlflow.models import Model, ModelSignature
    from mlflow.types import llm

    spec, tracking = _spec(arguments, task_type=task_type)
    name, version = _register(unreadable_export, spec, tracking)
    assert (name, version) == (f"main.lab.{spec.run_name}", "1")
    source = mlflow.MlflowClient().get_model_version(name, version).source
    assert source is not None
    folder = Path(source.removeprefix("file://"))
    model = Model.load(folder)
    chat = ModelSignature(llm.CHAT_MODEL_INPUT_SCHEMA, llm.CHAT_MODEL_OUTPUT_SCHEMA)
    completions = ModelSignature(llm.COMPLETIONS_MODEL_INPUT_SCHEMA, llm.COMPLETIONS_MODEL_OUTPUT_SCHEMA)
    assert model.signature == (chat if task == "llm/v1/chat" else completions)
    assert set(json.loads((folder / "input_example.json").read_text())) == {key, "max_tokens"}
    base = {"task": task, "base_model": spec.model, "license": "unknown", "run": spec.run_name}
    assert model.metadata == base
    flavor = model.flavors["transformers"]
    assert (flavor["inference_task"], flavor["torch_dtype"]) == (task, "torch.bfloat16")
    # A served model's answers hold it: no path of this machine.
    assert flavor["source_model_name"] == spec.run_name
    assert "starlette<1" in (folder / "requirements.txt").read_text().splitlines()
    assert (folder / "model" / "model-00001-of-00001.safetensors").read_bytes() == b"these are no weights"


def test_the_licence_of_a_supported_model_goes_with_it(
    arguments: dict[str, Any], unreadable_export: Path, in_store: None
) -> None:
    """Whoever gets the model from the registry could not tell what it may be used for."""
    import mlflow
    from mlflow.models import Model

    spec, tracking = _spec(arguments, model="meta-llama/Llama-3.2-1B")
    version = mlflow.MlflowClient().get_model_version(*_register(unreadable_export, spec, tracking))
    folder = Path(str(version.source).removeprefix("file://"))
    metadata = Model.load(folder).metadata
    assert metadata is not None
    assert (metadata["license"], metadata["base_model"]) == ("llama3.2", "meta-llama/Llama-3.2-1B")
    assert "license: llama3.2" in (folder / "model_card_data.yaml").read_text()
    assert "'llama3.2'" in (folder / "LICENSE.txt").read_text()


def test_an_existing_name_gets_the_next_version_and_a_run_only_one(
    arguments: dict[str, Any], unreadable_export: Path, in_store: None
) -> None:
    """A second run would fail or replace the first; a run that is resumed would register the same weights twice."""
    import mlflow

    first, second = (_spec(arguments, register_to="main.lab.dates") for _ in range(2))
    assert _register(unreadable_export, *first) == ("main.lab.dates", "1")
    assert _register(unreadable_export, *second) == ("main.lab.dates", "2")
    client = mlflow.MlflowClient()
    client.update_run(first[1].run_id, "RUNNING")  # as a resumed run has it
    assert _register(unreadable_export, *first) == ("main.lab.dates", "1")
    versions = client.search_model_versions("name='main.lab.dates'")
    assert {version.version: version.run_id for version in versions} == {1: first[1].run_id, 2: second[1].run_id}
    assert {client.get_run(tracking.run_id).info.status for _, tracking in (first, second)} == {"FINISHED"}


def test_a_server_that_is_away_is_named(
    arguments: dict[str, Any], unreadable_export: Path, in_store: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run would end with a traceback of MLflow's, or with nothing."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    spec, tracking = _spec(arguments)
    with pytest.raises(
        StageError,
        match=r"^main\.lab\..* could not be registered: http://127\.0\.0\.1:1: connection refused\. Check",
    ):
        register(
            unreadable_export,
            spec,
            mlflow_run_id=tracking.run_id,
            tracking_uri=tracking.tracking_uri,
            registry_uri="http://127.0.0.1:1",
        )


@pytest.fixture
def peculiar_export(
    tiny_model: Path, tmp_path: Path, save_tokenizer: Callable[..., Path], chat_templates: dict[str, str]
) -> Path:
    """An export whose template begins with BOS, as its tokenizer does by itself."""
    folder = tmp_path / "export"
    shutil.copytree(tiny_model, folder)
    return save_tokenizer(folder, chat_template=chat_templates["llama 3.1"], bos=True)


def test_a_served_version_answers_through_the_chat_template(
    arguments: dict[str, Any],
    peculiar_export: Path,
    mlflow_server: tuple[str, Path],
    serving: Serving,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A registered model that cannot be served, or that reads its chats in another form than it was trained on."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server[0])
    spec, tracking = _spec(arguments, model=str(peculiar_export))
    name, version = _register(peculiar_export, spec, tracking)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", f"models:/{name}/{version}"]
    command += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]
    chat = [{"role": "user", "content": "what is two and two?"}]
    with serving(command, port, tmp_path / "serve.log"):
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations",
            json.dumps({"messages": chat, "max_tokens": 12}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            (answer,) = json.load(response)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(peculiar_export)
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)
    message = answer["choices"][0]["message"]
    assert message == {"role": "assistant", "content": _greedy(peculiar_export, ids)}
    assert (answer["model"], answer["usage"]["prompt_tokens"]) == (spec.run_name, len(ids))
    # It would be another one without the template, or with a second BOS.
    assert message["content"] != _greedy(peculiar_export, tokenizer(chat[0]["content"])["input_ids"])
    assert message["content"] != _greedy(peculiar_export, tokenizer(text)["input_ids"])


def _greedy(folder: Path, ids: list[int]) -> str:
    """What plain transformers answers to tokens."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype="auto")
    given = torch.tensor([ids])
    output = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=12, do_sample=False)
    return AutoTokenizer.from_pretrained(folder).decode(output[0, len(ids) :], skip_special_tokens=True).lstrip()
