"""The run's first batch as the model sees it: an HTML page in the MLflow artifacts, with trained tokens marked."""

import html
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from composer import Callback, Logger, State
from composer.loggers import MLFlowLogger
from composer.utils import dist

from tundish.data.preview import marked_html, segments
from tundish.train.loader import IGNORE_INDEX
from tundish.train.run_logger import RunLogger

log = logging.getLogger(__name__)

NAME = "first_batch.html"
SHOWN_ROWS = 8
SHOWN_TOKENS = 16_384
"""Of all rows together."""


class FirstBatch(Callback):
    """Registered with LLM Foundry as the callback `tundish_first_batch`; rank 0's part of the batch is shown."""

    def batch_start(self, state: State, logger: Logger) -> None:
        """Write the page, for the very first batch of a run only."""
        if int(state.timestamp.batch) or dist.get_global_rank():
            return
        model: Any = state.model.module if state.is_model_ddp else state.model
        text = page(state.batch, model.tokenizer.backend_tokenizer, state.run_name)
        for destination in logger.destinations:
            if isinstance(destination, RunLogger):
                destination.log_text(text, NAME)
            elif isinstance(destination, MLFlowLogger):
                _upload(text, destination._run_id)  # pyright: ignore[reportPrivateUsage]  it has no public name


def _upload(text: str, run_id: Any) -> None:
    """Log to MLflow directly: under the stock `llmfoundry train`, nothing uploads what is on the disk."""
    from mlflow import MlflowClient

    try:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / NAME).write_text(text, encoding="utf-8")
            MlflowClient().log_artifact(run_id, str(Path(folder) / NAME))
    except Exception:  # a missing page must not end the run
        log.warning("The first batch could not be logged to MLflow.", exc_info=True)


def page(batch: Mapping[str, Any], backend: Any, title: str) -> str:
    """An HTML page of a batch's samples.

    Args:
        batch: see `Collate`.
        backend: the `tokenizers.Tokenizer`.
        title: of the page.
    """
    parts = [
        "<!doctype html><meta charset='utf-8'><title>first batch</title>",
        f"<h3>First batch of {html.escape(title)}: trained tokens are marked</h3>",
    ]
    left = SHOWN_TOKENS
    ids, labels, owner = (batch[key].cpu().numpy() for key in ("input_ids", "labels", "segment_ids"))
    for row in range(min(len(ids), SHOWN_ROWS)):
        for sample in range(1, int(owner[row].max(initial=0)) + 1):
            mine = owner[row] == sample
            if left <= 0:
                break
            targets = labels[row][mine] != IGNORE_INDEX
            head = f"row {row + 1}, sample {sample}: {mine.sum():,} tokens, {targets.sum():,} trained"
            parts.append(f"<p>{head}</p>{marked_html(list(segments(ids[row][mine][:left], targets[:left], backend)))}")
            left -= int(mine.sum())
    return "\n".join(parts) + "\n"
