"""runs/metrics.py: all points come back as they were logged, and the picture shows them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tundish import foundation_model as fm
from tundish.base.files import write_atomic
from tundish.base.journal import Journal
from tundish.base.run_folder import RunFolder
from tundish.errors import RequestError
from tundish.tracking import metrics
from tundish.tracking.experiment import open_tracking

MakeRun = Callable[..., RunFolder]


@pytest.fixture
def logged(make_run: MakeRun) -> RunFolder:
    """A run with three batches and an evaluation, the third batch twice: it was killed after it, and went on."""
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    paths = make_run("chat-1", ("CREATED", "waits"), ("FAILED", "in train"))
    open_tracking("chat-1", "/Users/me/chat-1", {}).write(paths)
    tracking = paths.read_tracking()
    points = [("loss/train/total", 0, 3.0), ("loss/train/total", 1, 2.0), ("loss/train/total", 2, 9.0)]
    points += [("loss/train/total", 2, 1.5), ("metrics/eval/LanguageCrossEntropy", 3, 1.25)]
    client: Any = MlflowClient(tracking.tracking_uri)
    client.log_batch(
        tracking.run_id, [Metric(key, value, 1_000 * i, step) for i, (key, step, value) in enumerate(points)]
    )
    return paths


def test_points_come_back_in_order_and_the_picture_shows_them(logged: RunFolder) -> None:
    """A notebook's plot of its own would lack points, or have them as text; the picture lack units, or jump back."""
    run = fm.get("chat-1")
    frame = run.metrics()
    assert list(frame.columns) == ["key", "step", "time", "value"]
    train = run.metrics("loss/train/total")
    assert list(zip(train["step"], train["value"], strict=True)) == [(0, 3.0), (1, 2.0), (2, 9.0), (2, 1.5)]
    assert str(train["time"].iloc[3]) == "1970-01-01 00:00:03+00:00"
    assert len(frame) == 5 and set(frame["key"]) == {"loss/train/total", "metrics/eval/LanguageCrossEntropy"}
    with pytest.raises(RequestError, match=r"the run has no metric 'loss'; it has loss/train/total, metrics/eval"):
        run.metrics("loss")
    with pytest.raises(RequestError, match=r"Did you mean loss/train/total\?$"):
        run.metrics("loss/train/totl")
    figure: Any = run.plot()
    (axes,) = figure.axes
    points: dict[str, Any] = {str(line.get_label()): line.get_data() for line in axes.lines}
    lines = {label: list(zip(list(x), list(y), strict=True)) for label, (x, y) in points.items()}
    assert lines == {"training": [(0, 3.0), (1, 2.0), (2, 1.5)], "evaluation": [(3, 1.25)]}
    assert axes.get_title() == "chat-1: failed"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("batch (optimizer steps done)", "loss (nats per target token)")
    assert figure._repr_png_().startswith(b"\x89PNG")  # what a notebook shows


def test_a_long_run_s_line_can_be_read() -> None:
    """Ten thousand noisy points would be a band without a line in it."""
    import numpy as np
    import pandas as pd

    noise = np.random.default_rng(0).normal(2.0, 0.5, 10_000)
    frame = pd.DataFrame({"key": metrics.TRAIN_LOSS, "step": np.arange(10_000), "value": noise})
    (axes,) = metrics.plot(frame, "x").axes
    raw, mean = (np.asarray(line.get_ydata()) for line in axes.lines)
    assert len(raw) == 10_000 and mean[200:-200].std() < 0.1 * raw.std()
    assert axes.lines[1].get_label() == "training (mean of 200 batches)"


def test_a_run_that_has_logged_nothing_yet_says_so(make_run: MakeRun) -> None:
    """An empty frame without columns, or a picture without a word, in the first minutes of each run."""
    paths = make_run("chat-2", ("CREATED", "waits"))
    open_tracking("chat-2", "/Users/me/chat-2", {}).write(paths)
    run = fm.get("chat-2")
    assert run.metrics().empty and list(run.metrics("loss/train/total").columns) == metrics.COLUMNS
    (axes,) = run.plot().axes
    assert [text.get_text() for text in axes.texts] == ["No loss has been logged yet."]


def test_while_the_store_is_away_the_run_s_own_points_are_there(logged: RunFolder) -> None:
    """Whoever wants to see how a run does while the server is away would look at nothing."""
    journal, tracking = Journal(logged.metrics), logged.read_tracking()
    journal.append({"time": 1000, "step": 1, "metrics": {"loss/train/total": 2.5, "lr-x": 0.1}})
    journal.note_sent(logged.metrics.stat().st_size)
    journal.append({"time": 2000, "step": 2, "metrics": {"loss/train/total": 1.5}})
    run = fm.get("chat-1")
    assert len(run.metrics()) == 5, "MLflow's, while it is there"
    replace(tracking, tracking_uri=f"sqlite:///{logged.folder}/gone/mlflow.db").write(logged)
    run = fm.get("chat-1")
    train = run.metrics("loss/train/total")
    assert list(zip(train["step"], train["value"], strict=True)) == [(1, 2.5), (2, 1.5)] and len(run.metrics()) == 3
    assert str(train["time"].iloc[1]) == "1970-01-01 00:00:02+00:00"
    with pytest.raises(RequestError, match=r"the run has no metric 'loss'; it has loss/train/total, lr-x\."):
        run.metrics("loss")


def test_a_store_that_is_away_is_told_in_a_sentence(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """A traceback of the network's after minutes."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    paths = make_run("chat-3", ("CREATED", "waits"))
    away = paths.result("tracking").read_text().replace("sqlite:////nowhere.db", "http://127.0.0.1:1")
    write_atomic(paths.result("tracking"), away)
    with pytest.raises(
        RequestError,
        match=r"^The metrics of run \S+ cannot be read from MLflow: .*http://127\.0\.0\.1:1: connection refused",
    ):
        fm.get("chat-3").metrics()
