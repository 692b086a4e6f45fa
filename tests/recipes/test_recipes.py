"""Every recipe runs unchanged on the real stack, and leaves what a run must leave."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tundish.checkpoints.folder import verify

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = [path for path in sorted(FOLDER.glob("*.py")) if path.stem != "check_data"]
"""Those that train."""
WITH_SERVER = "continued_pretrain"
BEFORE_TRAINING = ["CREATED", "STARTED", "DATA_VALIDATED", "MODEL_INITIALIZED", "TRAIN_STARTED"]
AT_THE_END = ["CHECKPOINT_SAVED", "TRAIN_FINISHED", "COMPLETED"]


class Finished(NamedTuple):
    """What a recipe left behind."""

    output: str
    home: Path
    run_folders: list[Path]
    """In the order in which the runs were created."""

    @property
    def run_folder(self) -> Path:
        """The folder of the last run."""
        return self.run_folders[-1]

    def of(self, number: int) -> "Finished":
        """What one of its runs left behind."""
        return self._replace(run_folders=[self.run_folders[number]])

    @property
    def export(self) -> Path:
        return self.run_folder / "export"

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.run_folder / "events.jsonl").read_text().splitlines()]

    @property
    def tracking(self) -> dict[str, str]:
        return json.loads((self.run_folder / "results" / "tracking.json").read_text())


@pytest.fixture(scope="session")
def run_recipe(tmp_path_factory: pytest.TempPathFactory, mlflow_server: tuple[str, Path]) -> Callable[[str], Finished]:
    """Runs each recipe once per session; one of them with an MLflow server, the others without."""

    @cache
    def run(name: str) -> Finished:
        folder = tmp_path_factory.mktemp(name)
        environment = {**os.environ, "TUNDISH_HOME": str(folder / "home"), "TMPDIR": str(folder)}
        if name == WITH_SERVER:
            environment["MLFLOW_TRACKING_URI"] = mlflow_server[0]
        command = [sys.executable, str(RECIPES[0].parent / f"{name}.py")]
        result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
        assert result.returncode == 0, result.stdout + result.stderr
        assert "Traceback" not in result.stderr
        runs = sorted((folder / "home" / "runs").iterdir(), key=lambda path: (path / "spec.json").stat().st_mtime)
        return Finished(result.stdout, folder / "home", runs)

    return run


@pytest.fixture
def at_home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Finished], None]]:
    """Sets `$TUNDISH_HOME` to that of a recipe."""
    yield lambda finished: monkeypatch.setenv("TUNDISH_HOME", str(finished.home))


def test_the_recipe_that_checks_data_finds_the_mistake(tmp_path: Path) -> None:
    """Readers who copy it would not learn about bad data."""
    environment = {**os.environ, "TUNDISH_HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path)}
    command = [sys.executable, str(FOLDER / "check_data.py")]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "train.jsonl, line 42: the last message is from 'user'" in result.stdout
    assert re.search(r"steps +\d+ for 3ep", result.stdout) and not (tmp_path / "home" / "runs").exists()


@pytest.mark.parametrize("recipe", [path.stem for path in RECIPES])
def test_each_recipe_runs_to_a_registered_model(recipe: str, run_recipe: Callable[[str], Finished]) -> None:
    """A stage that fails, an event out of order, or a missing export."""
    whole = run_recipe(recipe)
    assert len(whole.run_folders) == (2 if recipe == "continued_pretrain" else 1)
    for number in range(len(whole.run_folders)):
        _check_run(whole.of(number))


def _check_run(finished: Finished) -> None:
    types = [event["type"] for event in finished.events]
    lasting = [type for type in types if type != "TRAIN_UPDATED"]
    assert lasting[:5] == BEFORE_TRAINING
    assert lasting[-3:] == AT_THE_END
    assert set(lasting[5:-2]) == {"CHECKPOINT_SAVED"}
    assert types.count("TRAIN_UPDATED") >= 1
    assert "ETA=" in next(event["message"] for event in finished.events if event["type"] == "TRAIN_UPDATED")
    export = finished.run_folder / "export"
    names = {path.name for path in export.iterdir()}
    assert {"config.json", "tokenizer.json", "generation_config.json", "model.safetensors.index.json"} <= names
    assert json.loads((export / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize(("recipe", "ranks"), [("demo", 1), ("instruction_finetune", 2), ("continued_pretrain", 1)])
def test_checkpoints_are_sharded_at_every_world_size(
    recipe: str, ranks: int, run_recipe: Callable[[str], Finished], mlflow_server: tuple[str, Path]
) -> None:
    """A monolithic file, a missing rank, or a `latest` that names something else."""
    address = run_recipe(recipe).tracking["save_folder"]
    assert address.startswith("http") == (recipe == WITH_SERVER)
    folder = mlflow_server[1] / address.split("/artifacts/", 1)[1] if recipe == WITH_SERVER else Path(address)
    checkpoints = sorted(path for path in folder.iterdir() if re.fullmatch(r"ep\d+-ba\d+", path.name))
    assert checkpoints
    files = {".metadata", "manifest.json", *(f"__{rank}_0.distcp" for rank in range(ranks))}
    for checkpoint in checkpoints:
        assert {path.name for path in checkpoint.iterdir()} == files and verify(checkpoint) == []
    newest = max(checkpoints, key=lambda path: int(path.name.split("-ba")[1]))
    assert (folder / "latest-sharded-rank0.symlink").read_text() == f"{address}/{newest.name}"


def test_the_demo_answers_dates_that_it_has_not_seen(run_recipe: Callable[[str], Finished]) -> None:
    """Training that does nothing, an export of other weights, or a score that is made up."""
    match = re.search(r"before training: (\d+) of 100 correct; after: (\d+) of 100 correct", run_recipe("demo").output)
    assert match is not None
    assert int(match[1]) <= 5
    assert int(match[2]) >= 90


def test_an_untrained_model_scores_nothing(tmp_path: Path) -> None:
    """A task that a model solves without training would prove nothing."""
    from tundish import tiny

    pairs = tiny.date_pairs(50, seed=3)
    base = tiny.make_base_model(tmp_path / "base", (text for pair in pairs for text in pair))
    answers = tiny.answer(base, [question for question, _ in pairs])
    assert len(answers) == 50
    assert sum(given == right for given, (_, right) in zip(answers, pairs, strict=True)) <= 2


def test_the_export_is_the_last_checkpoint(run_recipe: Callable[[str], Finished]) -> None:
    """An export of an older checkpoint, or with tensors swapped."""
    import torch
    from safetensors.torch import load_file

    from tundish.checkpoints.folder import list_checkpoints, read_tensors

    finished = run_recipe("instruction_finetune")
    stored = read_tensors(list_checkpoints(Path(finished.tracking["save_folder"]))[-1])
    (shard,) = (finished.run_folder / "export").glob("*.safetensors")
    exported = load_file(shard)
    assert exported
    for name, tensor in exported.items():
        assert torch.equal(tensor, stored[f"state.model.model.{name}"].read(torch.bfloat16)), name


def test_metrics_and_eval_prompts_are_in_mlflow(run_recipe: Callable[[str], Finished]) -> None:
    """Loss, learning rate, evaluation or the answers to eval prompts missing from the experiment."""
    from mlflow import MlflowClient

    finished = run_recipe("demo")
    tracking = finished.tracking
    client = MlflowClient(tracking["tracking_uri"])
    run = client.get_run(tracking["run_id"])
    assert run.info.status == "FINISHED"
    assert client.get_experiment(tracking["experiment_id"]).name == tracking["experiment_name"]
    wanted = {
        "loss/train/total",
        "metrics/train/LanguageCrossEntropy",
        "metrics/eval/LanguageCrossEntropy",
        "lr-DecoupledLionW/group0",
        "throughput/tokens_per_sec",
    }
    assert wanted <= set(run.data.metrics)
    loss, entropy = (
        [(each.step, each.value) for each in client.get_metric_history(tracking["run_id"], name)]
        for name in ("loss/train/total", "metrics/train/LanguageCrossEntropy")
    )
    assert sorted(loss) == sorted(entropy) and len(loss) > 100
    saved = [event["checkpoint"] for event in finished.events if event["type"] == "CHECKPOINT_SAVED"]
    table = json.loads((Path(tracking["save_folder"]).parents[1] / "eval_prompts.json").read_text())
    assert table["columns"] == ["step", "checkpoint", "prompt", "output"]
    assert [row[1] for row in table["data"]] == [Path(path).name for path in saved]
    assert [row[0] for row in table["data"]] == [int(path.split("-ba")[1]) for path in saved]


def test_the_registered_version_answers(run_recipe: Callable[[str], Finished]) -> None:
    """A version that is registered but cannot be loaded or used."""
    code = (
        "import mlflow, sys\n"
        "mlflow.set_tracking_uri(sys.argv[1])\n"
        "model = mlflow.transformers.load_model('models:/main.demo.dates/1')\n"
        "chat = [{'role': 'user', 'content': 'Friday, 11 March 1977'}]\n"
        "print('ANSWER', model(chat, max_new_tokens=16)[0]['generated_text'][-1]['content'])\n"
    )
    uri = run_recipe("demo").tracking["tracking_uri"]
    result = subprocess.run([sys.executable, "-c", code, uri], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert re.search(r"ANSWER \d{4}-\d\d-\d\d", result.stdout), result.stdout


def test_other_processes_see_a_finished_run(
    run_recipe: Callable[[str], Finished], at_home: Callable[[Finished], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """A run whose status, events or checkpoints are lost for other processes."""
    from tundish import foundation_model as fm

    finished = run_recipe("demo")
    at_home(finished)
    (run,) = fm.list(statuses=["COMPLETED"])
    assert run.name == finished.run_folder.name
    assert run.name.startswith("chat-tiny-llama-")
    assert run.status.display_name == "Completed"
    assert run.export_dir == finished.run_folder / "export"
    assert run.completed_at is not None and run.started_at is not None
    assert run.formatted_eta is None
    assert len(fm.get_checkpoints(run)) == 5
    assert fm.get_events(run)[-1].is_terminal_state()
    assert fm.cancel(run) == 0
    assert "No active runs found to cancel." in capsys.readouterr().out


def test_stock_llm_foundry_trains_the_same_file(run_recipe: Callable[[str], Finished], tmp_path: Path) -> None:
    """A YAML that only our own entry understands, or that it trains differently."""
    import yaml

    finished = run_recipe("instruction_finetune")
    content = yaml.safe_load((finished.run_folder / "foundry.yaml").read_text())
    content |= {"save_folder": str(tmp_path / "checkpoints"), "loggers": {}}
    content["callbacks"]["tundish_events"]["events_path"] = str(tmp_path / "events.jsonl")
    (tmp_path / "stock.yaml").write_text(yaml.safe_dump(content))
    programs = Path(sys.executable).parent
    command = [programs / "composer", "-n", "2", programs / "llmfoundry", "train", tmp_path / "stock.yaml"]
    environment = {**os.environ, "FSDP_VERSION": "2", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["TUNDISH_EVENTS"] = str(tmp_path / "events.jsonl")
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    stock = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert _final_loss(stock) == pytest.approx(_final_loss(finished.events), rel=1e-5)
    _check_stock_checkpoint(tmp_path / "checkpoints", content["tokenizer"]["name"], finished)


def _check_stock_checkpoint(folder: Path, model: str, finished: Finished) -> None:
    """Compare the export of a checkpoint by LLM Foundry's own saver with ours."""
    import torch
    from safetensors.torch import load_file

    from tundish.checkpoints.folder import list_checkpoints
    from tundish.export.safetensors import export

    newest = list_checkpoints(folder)[-1]
    assert not (newest / "manifest.json").exists() and verify(newest) == []
    export(newest, model, "INSTRUCTION_FINETUNE", folder / "export")
    theirs, ours = (load_file(next(each.glob("*.safetensors"))) for each in (folder / "export", finished.export))
    assert theirs.keys() == ours.keys() and len(ours) > 10
    assert all(torch.allclose(tensor, ours[name], atol=0.02) for name, tensor in theirs.items())


def test_fine_tuning_starts_from_the_weights_of_the_pretraining(run_recipe: Callable[[str], Finished]) -> None:
    """Training that starts from the base model although a checkpoint was named, or that continues its schedule."""
    whole = run_recipe("continued_pretrain")
    pretrained, tuned = whole.of(0), whole.of(1)
    named = json.loads((tuned.run_folder / "spec.json").read_text())["custom_weights_path"]
    assert named == [event["checkpoint"] for event in pretrained.events if event["type"] == "CHECKPOINT_SAVED"][-1]
    before, after = (
        next(each for each in run.events if each["type"] == "TRAIN_UPDATED") for run in (pretrained, tuned)
    )
    assert before["batch"] == after["batch"] == 1
    assert after["loss"] < 0.6 * before["loss"]
    assert _final_loss(tuned.events) < after["loss"]
    assert f"started from the weights of {pretrained.run_folder.name}" in whole.output


def _final_loss(events: list[dict[str, Any]]) -> float:
    return [event["loss"] for event in events if event["type"] == "TRAIN_UPDATED"][-1]
