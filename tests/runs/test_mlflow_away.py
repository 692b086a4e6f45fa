"""A whole run whose MLflow server goes away while it trains."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from tests.runs.processes import wait_until

from tundish import foundation_model as fm
from tundish.base.run_folder import RunFolder
from tundish.tracking.publishing import AWAY, BACK

pytestmark = pytest.mark.slow

WriteLines = Callable[[Path, Iterable[object]], Path]
STEPS = 60


def test_a_server_that_is_gone_costs_a_run_nothing_but_time(
    mlflow_that_goes: Any,
    tiny_model: Path,
    tmp_path: Path,
    write_lines: WriteLines,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A week of training would end with the first checkpoint after the server's restart; points would be missing."""
    from mlflow import MlflowClient

    monkeypatch.setenv("TUNDISH_MLFLOW_WAIT", "1")
    chats = [
        {"messages": [{"role": "user", "content": f"{n} + 1?"}, {"role": "assistant", "content": str(n + 1)}]}
        for n in range(40)
    ]
    run = fm.create(
        model=str(tiny_model),
        train_data_path=str(write_lines(tmp_path / "train.jsonl", chats)),
        register_to="main.lab",
        context_length=128,
        training_duration=f"{STEPS}ba",
        eval_prompts=["1 + 1?"],
        compute={"device": "cpu", "devices_per_node": 1},
        overrides={"save_interval": "20ba"},
    )
    assert run.run_dir is not None and run.run_id is not None and str(run.save_folder).startswith(mlflow_that_goes.uri)
    wait_until(lambda: "TRAIN_STARTED" in _types(run) or run.refresh().status.is_terminal(), 300)
    mlflow_that_goes.stop()
    failed = run.wait(timeout=300)
    assert failed.status.display_name == "Failed"
    details = str(failed.details)
    assert "Stage 'register' failed: " in details and "connection refused" in details
    assert "Metrics and checkpoints are kept" in details and f"`tundish resume {run.name}`" in details
    assert "TRAIN_FINISHED" in _types(run) and _types(run).count(AWAY) == 1
    assert list(RunFolder(run.run_dir).export.glob("*.safetensors"))

    mlflow_that_goes.start()
    done = fm.resume(run.name).wait(timeout=300)
    assert done.status.display_name == "Completed", done.details
    assert _types(run).count(AWAY) == 1 and _types(run).count(BACK) == 1
    client = MlflowClient(mlflow_that_goes.uri)
    points = client.get_metric_history(run.run_id, "loss/train/total")
    assert [point.step for point in points] == list(range(STEPS)), "each once, in order"
    saved = [address.rpartition("-ba")[2] for address in fm.get_checkpoints(run)]
    assert saved == ["20", "40", "60"]
    names = {info.path for info in client.list_artifacts(run.run_id)}
    assert names >= {"first_batch.html", "eval_prompts.json", "foundry.yaml"}
    (version,) = client.search_model_versions(f"name='main.lab.{run.name}'")
    assert version.status == "READY" and client.get_run(run.run_id).info.status == "FINISHED"


def _types(run: Any) -> list[str]:
    return [event.type for event in fm.get_events(run)]
