"""runs/notes.py: two runs can be compared in MLflow by any argument, and MLflow has what was trained on what."""

import dataclasses
import inspect
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tundish import foundation_model as fm
from tundish.base.files import write_atomic
from tundish.base.run_folder import RunFolder
from tundish.plan.foundry import render
from tundish.plan.run_plan import DataFacts, DataPlan, RunPlan
from tundish.plan.spec import RunSpec
from tundish.runs import planning
from tundish.tracking import notes
from tundish.tracking.experiment import open_tracking
from tundish.tracking.publishing import Publisher, channels

MakeRun = Callable[..., RunFolder]


def test_every_argument_of_create_is_a_param(arguments: dict[str, Any], tmp_path: Path) -> None:
    """Two runs that differ in one argument could not be told apart by it."""
    given = arguments | {
        "eval_data_path": arguments["train_data_path"],
        "eval_prompts": ["What?", "x" * 1000],
        "custom_weights_path": "/weights/ep1-ba1",
        "data_prep_cluster_id": "local[2]",
        "learning_rate": "5e-7",
        "training_duration": "2_0ep",
        "overrides": {"seed": 3, "optimizer": {"betas": [0.9, 0.95]}},
        "compute": {"device": "cpu", "devices_per_node": 2},
    }
    spec = planning.plan(given).spec
    found = notes.arguments_of(spec)
    names = set(inspect.signature(fm.create).parameters) - {"compute", "overrides"}
    assert len(names) >= 14 and names <= set(found)
    expected = {
        "learning_rate": "5e-07",
        "training_duration": "20ep",
        "context_length": "512",
        "task_type": "CHAT_COMPLETION",
        "devices": "2",
        "compute.devices_per_node": "2",
        "overrides.seed": "3",
        "overrides.optimizer.betas": "[0.9, 0.95]",
        "validate_inputs": "true",
    }
    assert {name: found[name] for name in expected} == expected
    assert found["eval_prompts"].startswith('["What?", "xxx') and found["eval_prompts"].endswith("x…")
    assert max(map(len, found.values())) <= 500
    least = planning.plan(arguments).spec
    assert "eval_data_path" not in notes.arguments_of(least) and "eval_prompts" not in notes.arguments_of(least)


@pytest.fixture
def prepared_run(make_run: MakeRun, tmp_path: Path) -> RunFolder:
    """A run whose data is prepared, with an MLflow run."""
    paths = make_run("chat-1", ("CREATED", "waits"), eval_data_path=str(tmp_path / "train.jsonl"))
    open_tracking("chat-1", "/Users/me/chat-1", {}).write(paths)
    spec = RunSpec.read(paths)
    facts = {
        split: DataFacts(
            folder=str(tmp_path), samples=samples, rows=samples // 2, tokens=100 * samples, target_tokens=60 * samples,
            truncated=0, empty=0, warned=0, chatml_added=False, digest=(split * 64)[:64],
        )
        for split, samples in (("train", 40), ("eval", 4))
    }  # fmt: skip
    plan = planning.plan({"model": spec.model, "train_data_path": "x", "register_to": "a.b"})
    data = {split: DataPlan(address=spec.train_data_path) for split in facts}
    plan = dataclasses.replace(plan, spec=spec, data=data).completed(facts)
    plan.write(paths)
    write_atomic(paths.foundry_yaml, render(plan, paths))
    return paths


def test_mlflow_has_plan_data_and_files_of_a_run(
    prepared_run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run's batch size, data or log would be on the machine that trained it alone; or a secret be in MLflow."""
    from mlflow import MlflowClient

    paths, tracking = prepared_run, prepared_run.read_tracking()
    monkeypatch.setenv("HF_TOKEN", "hf_geheimgeheim")
    spec = RunSpec.read(paths)
    notes.log_arguments(tracking, spec)
    notes.log_plan(paths)
    assert Publisher(channels(paths), None).attempt() is None
    # Resumed with two devices: MLflow changes no param, and refuses the whole batch.
    more = dataclasses.replace(spec, compute=dataclasses.replace(spec.compute, devices_per_node=2))
    dataclasses.replace(RunPlan.read(paths), spec=more).write(paths)
    notes.log_plan(paths)
    assert Publisher(channels(paths), None).attempt() is None
    paths.logs.mkdir()
    monkeypatch.setattr(notes, "LOG_BYTES", 100)
    paths.log("train").write_text("x" * 1000 + "\nrefused: hf_geheimgeheim is no token\n")
    notes.log_files(paths)

    client: Any = MlflowClient(tracking.tracking_uri)
    run = client.get_run(tracking.run_id)
    batch = run.data.params["global_train_batch_size"]
    assert run.data.params["steps"] == str(-(-20 // int(batch)))
    counts = {"train_samples": "40", "train_tokens": "4000", "train_rows": "20", "eval_target_tokens": "240"}
    assert {name: run.data.params[name] for name in counts} == counts
    assert (run.data.params["seed"], run.data.params["devices"]) == ("17", "1")
    assert run.data.tags["resumed.devices"] == "2" and "resumed.seed" not in run.data.tags
    train, evaluation = sorted(run.inputs.dataset_inputs, key=lambda one: one.dataset.digest, reverse=True)
    assert (train.dataset.name, train.dataset.digest) == ("train.jsonl", ("train" * 64)[:36])
    assert json.loads(train.dataset.source) == {"uri": str(tmp_path / "train.jsonl")}
    assert json.loads(train.dataset.profile)["tokens"] == 4000
    assert [one.tags[0].value for one in (train, evaluation)] == ["train", "eval"]
    names = [one.path for folder in (None, "logs") for one in client.list_artifacts(tracking.run_id, folder)]
    assert names == ["foundry.yaml", "logs", "plan.json", "spec.json", "logs/train.log"]
    text = Path(client.download_artifacts(tracking.run_id, "logs/train.log")).read_text()
    assert text.startswith("(938 bytes before this are left out)\nxxx") and text.endswith("refused: *** is no token\n")


def test_a_store_that_is_away_costs_a_run_nothing(
    prepared_run: RunFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Training would not begin, or a run's end not be told, for want of a log in MLflow; or its plan be lost."""
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracking = prepared_run.read_tracking()
    dataclasses.replace(tracking, tracking_uri="http://127.0.0.1:1").write(prepared_run)
    with caplog.at_level(logging.WARNING):
        notes.log_plan(prepared_run)
        assert Publisher(channels(prepared_run), None).attempt() is not None
        notes.log_files(prepared_run)
    said = [record.getMessage() for record in caplog.records if record.name == "tundish.tracking.notes"]
    assert [text.partition(":")[0] for text in said] == ["Could not log the run's files to MLflow"]
    tracking.write(prepared_run)
    assert Publisher(channels(prepared_run), None).attempt() is None
    run = MlflowClient(tracking.tracking_uri).get_run(tracking.run_id)
    assert run.data.params["train_samples"] == "40" and len(run.inputs.dataset_inputs) == 2


@pytest.mark.parametrize(
    ("given", "kind", "source"),
    [
        ("/data/train.jsonl", "local", {"uri": "/data/train.jsonl"}),
        ("s3://lab/train.jsonl", "s3", {"uri": "s3://lab/train.jsonl"}),
        ("main.lab.chats", "delta_table", {"delta_table_name": "main.lab.chats"}),
        ("org/dataset/train", "hugging_face", {"path": "org/dataset", "split": "train"}),
    ],
)
def test_a_data_set_s_place_is_named_as_mlflow_names_it(given: str, kind: str, source: dict[str, str]) -> None:
    """`mlflow.data.get_source` would not find the data again."""
    assert notes._source(given) == (kind, source)
