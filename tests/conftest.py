"""What all tests share: a clean environment, tiny models made during the test, and run folders without processes."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
from hypothesis import configuration, settings

# The same examples in every run, nothing written to the checkout, and no deadline: the machine may be busy.
configuration.set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "hypothesis-of-tundish")
settings.register_profile("tundish", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("tundish")

# huggingface_hub and torch read these when they are imported, which may be before the first test.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

# Started in the background by a shell, the tests and all their processes would ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

TINY_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "max_position_embeddings": 512,
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 384,
    "tie_word_embeddings": False,
}
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% if m['role'] == 'assistant' %}</s>{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CHAT_TEMPLATES = {
    "simple": CHAT_TEMPLATE,
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama 3.1": (
        "{{- bos_token }}{%- if not date_string is defined %}{%- set date_string = '1 Jan 2000' %}{%- endif %}"
        "{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content'] | trim %}"
        "{%- set messages = messages[1:] %}{%- else %}{%- set system_message = '' %}{%- endif %}"
        "{{- '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n' }}"
        "{{- 'Today Date: ' + date_string + '\n\n' + system_message + '<|eot_id|>' }}"
        "{%- for message in messages %}{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
        " + message['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
    ),
    "mistral": (
        "{{- bos_token }}{%- for message in messages %}"
        "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{- raise_exception('Conversation roles must alternate user/assistant') }}{%- endif %}"
        "{%- if message['role'] == 'user' %}{{- '[INST] ' + message['content'] + '[/INST]' }}"
        "{%- else %}{{- ' ' + message['content'] | trim + eos_token }}{%- endif %}{%- endfor %}"
    ),
    "trim": (
        "{% for m in messages %}### {{ m['role'] }}:\n{{ m['content'] | trim }}\n\n{% endfor %}"
        "{% if add_generation_prompt %}### assistant:\n{% endif %}"
    ),
    # As in reasoning models: thoughts are left out of all turns but the last.
    "think": (
        "{% for m in messages %}{% set text = m['content'] %}"
        "{% if m['role'] == 'assistant' and not loop.last and '</think>' in text %}"
        "{% set text = text.split('</think>')[-1] %}{% endif %}"
        "<|{{ m['role'] }}|>{{ text }}</s>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    ),
    "refuses bad": (
        "{% for m in messages %}{% if 'bad' in m['content'] %}{{ raise_exception('no bad words') }}{% endif %}"
        "<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    ),
}

MakeRun = Callable[..., Any]
WriteLines = Callable[[Path, Iterable[object]], Path]
SaveTokenizer = Callable[..., Path]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`$TUNDISH_HOME` of this test, not created. No settings of the machine reach the test."""
    # Variables that create() sets during a test do not reach the next test.
    for name in {"MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "TUNDISH_SET_MLFLOW_TRACKING_URI", *os.environ}:
        if "MLFLOW_" in name:
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
    if mlflow := sys.modules.get("mlflow"):
        mlflow.set_tracking_uri(None)
        mlflow.set_registry_uri(None)
    folder = tmp_path / "home"
    monkeypatch.setenv("TUNDISH_HOME", str(folder))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return folder


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Address of a local MLflow server, and the folder of its artifacts."""
    folder = tmp_path_factory.mktemp("mlflow-server")
    artifacts = folder / "artifacts"
    artifacts.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(artifacts)]
    with _serving(command, port, folder / "log"):
        yield f"http://127.0.0.1:{port}", artifacts


class MLflowServer:
    """An MLflow server that can be stopped and started again at the same address."""

    def __init__(self, folder: Path, serving: Callable[..., AbstractContextManager[None]]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.folder, self._serving, self._running = folder, serving, ExitStack()

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        self._running.enter_context(self._serving(command, self.port, self.folder / "log"))
        end = time.monotonic() + 120  # its port is open before it answers
        while not self._answers():
            assert time.monotonic() < end, (self.folder / "log").read_text()
            time.sleep(0.2)

    def _answers(self) -> bool:
        try:
            return requests.get(f"{self.uri}/health", timeout=5).text == "OK"
        except requests.RequestException:
            return False

    def stop(self) -> None:
        self._running.close()


@pytest.fixture
def mlflow_that_goes(
    tmp_path: Path, serving: Callable[..., AbstractContextManager[None]], monkeypatch: pytest.MonkeyPatch
) -> Iterator[MLflowServer]:
    """A server that the test can stop and start; it is MLflow's tracking URI."""
    folder = tmp_path / "server"
    folder.mkdir()
    server = MLflowServer(folder, serving)
    server.start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    yield server
    server.stop()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Endpoint and log of an S3 server, in a process of its own: delta-rs holds the GIL while it waits."""
    from tests.s3 import ENVIRONMENT, PAGE

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("s3-server") / "log"
    settings = ENVIRONMENT | {"MOTO_S3_DEFAULT_MAX_KEYS": str(PAGE)}
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with _serving(command, port, log, settings):
        yield f"http://127.0.0.1:{port}", log


@pytest.fixture
def bucket(s3_server: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> Any:
    """An empty bucket, with its server and credentials in the environment."""
    import boto3
    from tests.s3 import ENVIRONMENT, Bucket

    endpoint, log = s3_server
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("S3_ENDPOINT_URL", endpoint)
    client = boto3.client("s3", endpoint_url=endpoint)
    name = f"lab-{uuid.uuid4().hex[:12]}"
    client.create_bucket(Bucket=name)
    return Bucket(name, client, log)


@pytest.fixture(scope="session")
def serving() -> Callable[..., AbstractContextManager[None]]:
    """Runs a server during a block: `with serving(command, port, log): …`."""
    return _serving


@contextmanager
def _serving(command: Sequence[str], port: int, log: Path, settings: Mapping[str, str] = {}) -> Iterator[None]:
    """Run a server and its children until the block ends; the block begins when its port answers."""
    import psutil

    # MLflow finds gunicorn and uvicorn on PATH.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with open(log, "w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, cwd=log.parent, env=os.environ | settings | {"PATH": path}
        )
    try:
        for _ in range(1200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        else:
            pytest.fail(log.read_text())
        yield
    finally:
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for one in family:
            one.terminate()
        _, alive = psutil.wait_procs(family, timeout=10)
        for one in alive:
            one.kill()
        process.wait(10)


@pytest.fixture
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test if a run is accepted, instead of training it."""
    from tundish.runs import creating

    def refuse(*_: object, **__: object) -> None:
        pytest.fail("a run was accepted")

    monkeypatch.setattr(creating.launch, "submit", refuse)
    monkeypatch.setattr(creating, "open_tracking", refuse)


@pytest.fixture
def config_folder(tmp_path: Path) -> Path:
    """A Hugging Face folder with only a config.json, which is enough for planning."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY_CONFIG))
    return folder


@pytest.fixture(scope="session")
def write_lines() -> WriteLines:
    """Writes a JSONL file; records that are strings are written unchanged."""

    def write(path: Path, records: Iterable[object]) -> Path:
        lines = [record if isinstance(record, str) else json.dumps(record, ensure_ascii=False) for record in records]
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return path

    return write


@pytest.fixture
def arguments(tiny_model: Path, tmp_path: Path, write_lines: WriteLines) -> dict[str, Any]:
    """Valid arguments of `create()`."""
    chat = {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}
    data = write_lines(tmp_path / "train.jsonl", [chat] * 3)
    return {"model": str(tiny_model), "train_data_path": str(data), "register_to": "main.lab"}


@pytest.fixture
def make_run(arguments: dict[str, Any]) -> MakeRun:
    """Writes the folder of a run without processes: `make_run(name, ("STARTED", "…"), …, created_at=…)`."""
    from tundish.base import events
    from tundish.base.files import write_atomic
    from tundish.base.run_folder import RunFolder
    from tundish.plan.spec import parse_spec
    from tundish.tracking.experiment import Tracking

    def make(
        name: str,
        *happened: tuple[str, str],
        created_at: str = "2026-11-21T10:00:00+00:00",
        experiment_id: str = "1",
        **more: Any,
    ) -> RunFolder:
        spec, _ = parse_spec(arguments | {"run_name": name} | more, created_at=created_at)
        paths = RunFolder.of(name)
        paths.result("tracking").parent.mkdir(parents=True)
        Tracking(
            tracking_uri="sqlite:////nowhere.db",
            experiment_id=experiment_id,
            experiment_name=spec.experiment_path,
            run_id=f"id-of-{name}",
            save_folder=str(paths.folder / "artifacts" / name / "checkpoints"),
        ).write(paths)
        for type, message in happened or (("CREATED", "waits"),):
            events.append(paths.events, type, message)
        write_atomic(paths.spec, spec.to_json())
        return paths

    return make


@pytest.fixture(scope="session")
def save_tokenizer() -> SaveTokenizer:
    """Saves a byte-level BPE tokenizer of 384 tokens; with `bos` it starts texts with <s>, as Llama's does."""
    import importlib

    from transformers import PreTrainedTokenizerFast

    # Its type stubs lack most arguments.
    parts: Any = importlib.import_module("tokenizers")

    def save(folder: Path, *, chat_template: str | None = None, bos: bool = False) -> Path:
        backend = parts.Tokenizer(parts.models.BPE())
        backend.pre_tokenizer = parts.pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = parts.decoders.ByteLevel()
        trainer = parts.trainers.BpeTrainer(
            vocab_size=384,
            special_tokens=["<pad>", "</s>", "<s>"],
            initial_alphabet=parts.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(
            ["the quick brown fox jumps over the lazy dog; what is two and two? four."], trainer
        )
        special = {"eos_token": "</s>", "pad_token": "<pad>"}
        if bos:
            backend.post_processor = parts.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
            special["bos_token"] = "<s>"
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
        tokenizer.chat_template = chat_template
        tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, save_tokenizer: SaveTokenizer) -> Path:
    """A Hugging Face folder: tokenizer with chat template, and a Llama of 0.1 M parameters with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = save_tokenizer(tmp_path_factory.mktemp("models") / "tiny-llama", chat_template=CHAT_TEMPLATE)
    numbers = {name: value for name, value in TINY_CONFIG.items() if name not in ("architectures", "model_type")}
    numbers |= {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    torch.manual_seed(17)
    LlamaForCausalLM(LlamaConfig(**numbers)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bare_model(tmp_path_factory: pytest.TempPathFactory, save_tokenizer: SaveTokenizer) -> Path:
    """A folder with a tokenizer that has no chat template."""
    return save_tokenizer(tmp_path_factory.mktemp("models") / "bare")


@pytest.fixture(scope="session")
def chat_templates() -> dict[str, str]:
    """Chat templates by name: those of the model families, and some unusual ones."""
    return CHAT_TEMPLATES


def _shipped(package: str, file: str) -> Path:
    """A file that a package ships, without importing the package."""
    import importlib.util

    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations, f"{package} is not installed"
    return Path(spec.submodule_search_locations[0]) / file


@pytest.fixture(scope="session")
def llama3_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tokenizer of Llama 3 and the template of Llama 3.1 without its parts for tools."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )
    names = ["begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1"]
    names += ["finetune_right_pad_id", "step_id", "start_header_id", "end_header_id", "eom_id", "eot_id", "python_tag"]
    names += [f"reserved_special_token_{number}" for number in range(2, 247)]
    special = [f"<|{name}|>" for name in names]
    model = _shipped("llama_models", "llama3/tokenizer.model")
    backend: Any = TikTokenConverter(str(model), pattern, additional_special_tokens=special).converted()
    backend.model.ignore_merges = True
    template: Any = processors.TemplateProcessing  # its stub asks for an argument that it has a default for
    backend.post_processor = template(
        single=f"{special[0]} $A", special_tokens=[(special[0], backend.token_to_id(special[0]))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=special[0], eos_token="<|eot_id|>", pad_token="<|finetune_right_pad_id|>"
    )
    tokenizer.chat_template = CHAT_TEMPLATES["llama 3.1"]
    folder = tmp_path_factory.mktemp("models") / "llama-3"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def mistral_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tokenizer of Mistral v3, from its SentencePiece file, and an [INST] template."""
    import shutil
    import warnings

    from transformers import LlamaTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "mistral-v3"
    folder.mkdir()
    vocabulary = folder / "tokenizer.model"
    shutil.copy(_shipped("mistral_common", "data/mistral_instruct_tokenizer_240323.model.v3"), vocabulary)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SWIG's types in SentencePiece
        tokenizer = LlamaTokenizerFast(vocab_file=str(vocabulary), legacy=False)
    tokenizer.chat_template = CHAT_TEMPLATES["mistral"]
    tokenizer.save_pretrained(folder)
    return folder
