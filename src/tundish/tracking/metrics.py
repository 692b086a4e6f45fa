"""A run's metrics: all points as a DataFrame, and a plot of the losses."""

import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from tundish.base.journal import Journal
from tundish.base.mlflow_client import impatient, open_client, quiet, store_errors
from tundish.errors import RequestError, StoreError, did_you_mean

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

TRAIN_LOSS = "loss/train/total"
EVAL_LOSS = "metrics/eval/LanguageCrossEntropy"
"""Composer's names; both are the mean over target tokens, in nats."""
COLUMNS = ["key", "step", "time", "value"]
MANY_POINTS = 100
"""Lines of more points are drawn faintly, with their moving average on top."""
TRAIN_COLOR, EVAL_COLOR = "#2f6f8f", "#c1440e"


def read(tracking_uri: str, run_id: str, key: str | None = None, journal: Path | None = None) -> "pd.DataFrame":
    """All points of all metrics, or of one: one row each, sorted by key, step and time.

    They come from MLflow or, while it does not answer, from the run's disk. A run that was resumed from a checkpoint
    has two points for each step that it took twice.

    Args:
        tracking_uri: of the store.
        run_id: MLflow's id of the run.
        key: Composer's name of a metric; None: all.
        journal: the run's own file of metrics, which may be missing.

    Raises:
        RequestError: MLflow does not answer and there is no such file, or the run has no metric of that name.
    """
    import pandas as pd

    try:
        names, points = _from_mlflow(tracking_uri, run_id, key)
    except StoreError as error:
        text = f"The metrics of run {run_id} cannot be read from MLflow: {error.message}"
        if journal is None or not journal.is_file():
            raise RequestError(text) from error
        log.warning("%s Showing the metrics on the run's own disk.", text)
        points = list(_from_disk(journal))
        names = sorted({name for name, *_ in points})
        points = [point for point in points if key in (None, point[0])]
    if key is not None and key not in names and names:
        hint = did_you_mean(key, names)
        raise RequestError(f"the run has no metric {key!r}; it has {', '.join(names)}.{hint}")
    frame = pd.DataFrame(points, columns=pd.Index(COLUMNS))
    frame["time"] = pd.to_datetime(frame["time"], unit="ms", utc=True)
    frame = frame.astype({"key": str, "step": "int64", "value": "float64"})
    return frame.sort_values(["key", "step", "time"], kind="stable", ignore_index=True)


Point = tuple[str, int, int, float]
"""Key, step, milliseconds and value."""


def _from_mlflow(tracking_uri: str, run_id: str, key: str | None) -> tuple[list[str], list[Point]]:
    """The names of all metrics, and the points of `key`, or of all."""
    client = open_client(tracking_uri)
    with store_errors(tracking_uri), quiet(), impatient():
        names = sorted(client.get_run(run_id).data.metrics)
        keys = [name for name in names if key in (None, name)]
        points = [point for name in keys for point in client.get_metric_history(run_id, name)]
    return names, [(point.key, point.step, point.timestamp, point.value) for point in points]


def _from_disk(journal: Path) -> Iterator[Point]:
    for record in Journal(journal):
        for name, value in record["metrics"].items():
            yield name, record["step"], record["time"], value


class LossPlot(Figure):
    """A figure that a notebook displays even if pyplot was never imported in it."""

    def _repr_png_(self) -> bytes:
        sink = io.BytesIO()
        self.savefig(sink, format="png", dpi=120)
        return sink.getvalue()


def plot(metrics: "pd.DataFrame", title: str) -> Figure:
    """Training and evaluation loss by batch.

    Args:
        metrics: as returned by `read`; metrics other than the losses are ignored.
        title: of the plot.
    """
    figure = LossPlot(figsize=(8, 4.5), layout="constrained")
    axes: Any = figure.add_subplot()
    train, evaluation = _line(metrics, TRAIN_LOSS), _line(metrics, EVAL_LOSS)
    if len(train) > MANY_POINTS:
        window = max(5, len(train) // 50)
        axes.plot(train.index, train, color=TRAIN_COLOR, linewidth=0.6, alpha=0.3)
        mean: Any = train.rolling(window, min_periods=1, center=True).mean()
        axes.plot(mean.index, mean, color=TRAIN_COLOR, label=f"training (mean of {window:,} batches)")
    elif len(train):
        axes.plot(train.index, train, color=TRAIN_COLOR, marker="o", markersize=3, label="training")
    if len(evaluation):
        axes.plot(evaluation.index, evaluation, color=EVAL_COLOR, marker="D", markersize=4, label="evaluation")
    if len(train) or len(evaluation):
        axes.legend(frameon=False)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.xaxis.set_major_formatter("{x:,.0f}")
    else:
        axes.text(0.5, 0.5, "No loss has been logged yet.", ha="center", va="center", transform=axes.transAxes)
    axes.set_xlabel("batch (optimizer steps done)")
    axes.set_ylabel("loss (nats per target token)")
    axes.set_title(title, fontsize=11, parse_math=False)  # a `$` in a title does not begin a formula
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _line(metrics: "pd.DataFrame", key: str) -> Any:
    """The values of a metric as a Series by step; for a step that was taken twice, the later one."""
    return metrics[metrics["key"] == key].groupby("step")["value"].last()
