"""The training events of a run, written by rank 0 after each has happened."""

import math
import os
import time
from collections.abc import Mapping
from pathlib import Path

from composer import Callback, Logger, State, TimeUnit
from composer.utils import dist

from tundish.base import events
from tundish.base.run_folder import RUN_VARIABLE
from tundish.base.text import counted
from tundish.train.saver import Saver

PROGRESS_SECONDS = 2.0, 60.0
"""Least and most seconds between two progress events."""
SHOWN = {"loss": "Train loss: {:.4g}", "eval_loss": "Eval loss: {:.4g}", "tokens_per_s": "{:,.0f} tokens/s"}
"""Facts of a progress event, and their form in its message."""
PROGRESS_SHARE = 1 / 300
"""Of the time since training began, between two progress events: a run of days writes thousands, not 100,000."""


class RunEvents(Callback):
    """Registered with LLM Foundry as the callback `tundish_events`.

    Args:
        events_path: the run's events.jsonl.
    """

    def __init__(self, events_path: str) -> None:
        self.path = Path(events_path)
        self._started_s = self._started_done = 0.0
        self._progress, self._place = (0.0, 1.0), ""
        """After the latest batch: during an evaluation, the state has the evaluation's data."""
        self._last_report_s = 0.0
        self._tokens_before, self._evaluated_s, self._evaluation_began_s = 0, 0.0, 0.0
        self._facts: dict[str, float] = {}
        """Latest losses and speed."""
        self._savers: list[Saver] = []

    def after_load(self, state: State, logger: Logger) -> None:
        """Report the model."""
        model = state.model
        name = getattr(getattr(model, "config", None), "_name_or_path", type(model).__name__)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        self._write("MODEL_INITIALIZED", f"Model initialized for base model {name}: {parameters:,} parameters.")

    def fit_start(self, state: State, logger: Logger) -> None:
        """Report that training starts or resumes."""
        self._savers = [callback for callback in state.callbacks if isinstance(callback, Saver)]
        for saver in self._savers:
            saver.completed.append(self.checkpoint_saved)
        self._started_s, self._started_done = time.monotonic(), _progress(state)[0]
        self._tokens_before, self._evaluated_s = int(state.timestamp.token), 0.0
        batch = int(state.timestamp.batch)
        if batch:
            self._facts = _facts_so_far(self.path)
        resumed = f" It resumes from batch {batch}." if batch else ""
        self._write("TRAIN_STARTED", f"Training started on {counted(dist.get_world_size(), 'device')}.{resumed}")

    def batch_end(self, state: State, logger: Logger) -> None:
        """Report progress, less often the longer training lasts, and after the last batch."""
        self._progress, self._place = _progress(state), _place(state)
        done, total = self._progress
        least, most = PROGRESS_SECONDS
        elapsed = time.monotonic() - self._started_s
        if time.monotonic() - self._last_report_s < min(most, max(least, elapsed * PROGRESS_SHARE)) and done < total:
            return
        self._report(state)

    def eval_start(self, state: State, logger: Logger) -> None:
        """Time of evaluations does not count in tokens_per_s."""
        self._evaluation_began_s = time.monotonic()

    def eval_end(self, state: State, logger: Logger) -> None:
        """Report every evaluation: they are rare."""
        self._evaluated_s += time.monotonic() - self._evaluation_began_s
        if (loss := state.eval_metric_values.get("LanguageCrossEntropy")) is not None:
            self._keep("eval_loss", float(loss))
            self._report(state)

    def _report(self, state: State) -> None:
        """Write a progress event with the latest losses and speed."""
        self._last_report_s = now = time.monotonic()
        done, total = self._progress
        elapsed = now - self._started_s
        eta_s = elapsed / max(done - self._started_done, 1e-9) * max(0.0, total - done)
        if hasattr(state, "total_loss_dict"):
            self._keep("loss", state.total_loss_dict.get("loss/train/total", math.nan))
        tokens = int(state.timestamp.token) - self._tokens_before
        self._keep("tokens_per_s", tokens / max(elapsed - self._evaluated_s, 1e-9))
        text = f"{self._place}[ETA={events.short_duration(eta_s)}] {_shown(self._facts)}"
        facts = {"eta_s": round(eta_s, 1), "batch": int(state.timestamp.batch), **self._facts}
        self._write("TRAIN_UPDATED", text, share=round(min(1.0, done / total), 4), **facts)

    def _keep(self, name: str, value: float) -> None:
        if math.isfinite(value):  # JSON has no other numbers
            self._facts[name] = float(f"{value:.6g}")

    def checkpoint_saved(self, address: str) -> None:
        """Report a complete checkpoint at a path or URI; called by the saver, from its thread."""
        self._write("CHECKPOINT_SAVED", f"Checkpoint {address.rpartition('/')[2]} saved.", checkpoint=address)

    def fit_end(self, state: State, logger: Logger) -> None:
        """Report the end, once the last checkpoint is complete."""
        for saver in self._savers:
            saver.wait()
        batches, tokens = int(state.timestamp.batch), int(state.timestamp.token)
        text = f"Training finished after {batches:,} batches and {tokens:,} tokens. {_shown(self._facts)}"
        self._write("TRAIN_FINISHED", text, **self._facts)

    def _write(self, type: str, message: str, **facts: object) -> None:
        # Training a copy of the run's YAML by hand must not write into the run's events.
        if dist.get_global_rank() == 0 and os.environ.get(RUN_VARIABLE) == str(self.path):
            events.append(self.path, type, message, **facts)


def _facts_so_far(path: Path) -> dict[str, float]:
    """Latest losses and speed of a run that resumes."""
    updates = [event.facts for event in events.read(path) if event.type == "TRAIN_UPDATED"]
    return {name: updates[-1][name] for name in SHOWN if updates and name in updates[-1]}


def _shown(facts: Mapping[str, float]) -> str:
    return ", ".join(SHOWN[name].format(facts[name]) for name in SHOWN if name in facts)


def _progress(state: State) -> tuple[float, float]:
    """Done and total, in one unit."""
    duration = state.max_duration
    assert duration is not None
    if duration.unit == TimeUnit.EPOCH:
        per_epoch = int(state.dataloader_len or 1)
        return float(int(state.timestamp.batch)), float(duration.value * per_epoch)
    return float(state.timestamp.get(duration.unit).value), float(duration.value)


def _place(state: State) -> str:
    duration, now = state.max_duration, state.timestamp
    assert duration is not None
    done, total = _progress(state)
    if duration.unit == TimeUnit.EPOCH:
        epoch = min(int(now.epoch) + (1 if int(now.batch_in_epoch) else 0), duration.value)
        return f"[epoch={max(1, epoch)}/{duration.value}][batch={int(done)}/{int(total)}]"
    return f"[{'batch' if duration.unit == TimeUnit.BATCH else 'token'}={int(done):,}/{int(total):,}]"
