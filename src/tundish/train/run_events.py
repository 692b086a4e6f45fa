"""The training events of a run: written by rank 0 after the deed, from the values used."""

import math
import os
import time
from collections.abc import Mapping
from pathlib import Path

from composer import Callback, Logger, State, TimeUnit
from composer.utils import dist

from tundish.base import events
from tundish.base.run_folder import RUN_VARIABLE
from tundish.train.saver import Saver

PROGRESS_SECONDS = 2.0, 60.0
SHOWN = {"loss": "Train loss: {:.4g}", "eval_loss": "Eval loss: {:.4g}", "tokens_per_s": "{:,.0f} tokens/s"}
"""Facts of progress, and how people see them."""
PROGRESS_SHARE = 1 / 300
"""Of the time since training began: a run of days writes thousands of lines, not a hundred thousand."""


class RunEvents(Callback):
    """Registered with LLM Foundry as the callback `tundish_events`.

    Args:
        events_path: the run's events.jsonl.
    """

    def __init__(self, events_path: str) -> None:
        self.path = Path(events_path)
        self._started_s = self._started_done = 0.0
        self._progress, self._place = (0.0, 1.0), ""
        """After the latest batch. While it is evaluated, the state has the evaluation's data."""
        self._last_word = 0.0
        self._tokens_before, self._evaluated_s, self._evaluation_began_s = 0, 0.0, 0.0
        self._facts: dict[str, float] = {}
        """Latest losses and speed."""
        self._savers: list[Saver] = []

    def after_load(self, state: State, logger: Logger) -> None:
        """The model and, where there is one, its checkpoint are loaded."""
        model = state.model
        name = getattr(getattr(model, "config", None), "_name_or_path", type(model).__name__)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        self._write("MODEL_INITIALIZED", f"Model initialized for base model {name}: {parameters:,} parameters.")

    def fit_start(self, state: State, logger: Logger) -> None:
        """Training begins, or goes on."""
        self._savers = [callback for callback in state.callbacks if isinstance(callback, Saver)]
        for saver in self._savers:
            saver.completed.append(self.checkpoint_saved)
        self._started_s, self._started_done = time.monotonic(), _progress(state)[0]
        self._tokens_before, self._evaluated_s = int(state.timestamp.token), 0.0
        batch = int(state.timestamp.batch)
        if batch:
            self._facts = _facts_so_far(self.path)
        where = f" It goes on from batch {batch}." if batch else ""
        self._write("TRAIN_STARTED", f"Training started on {dist.get_world_size()} device(s).{where}")

    def batch_end(self, state: State, logger: Logger) -> None:
        """At most one line in PROGRESS_SECONDS, less often the longer it lasts, and one for the last batch."""
        self._progress, self._place = _progress(state), _place(state)
        done, total = self._progress
        least, most = PROGRESS_SECONDS
        elapsed = time.monotonic() - self._started_s
        if time.monotonic() - self._last_word < min(most, max(least, elapsed * PROGRESS_SHARE)) and done < total:
            return
        self._tell(state)

    def eval_start(self, state: State, logger: Logger) -> None:
        """What evaluation takes does not count as training's."""
        self._evaluation_began_s = time.monotonic()

    def eval_end(self, state: State, logger: Logger) -> None:
        """Evaluations are rare, and each is told."""
        self._evaluated_s += time.monotonic() - self._evaluation_began_s
        if (loss := state.eval_metric_values.get("LanguageCrossEntropy")) is not None:
            self._note("eval_loss", float(loss))
            self._tell(state)

    def _tell(self, state: State) -> None:
        """How far training is, with the latest losses and its speed."""
        self._last_word = now = time.monotonic()
        done, total = self._progress
        elapsed = now - self._started_s
        eta_s = elapsed / max(done - self._started_done, 1e-9) * max(0.0, total - done)
        if hasattr(state, "total_loss_dict"):
            self._note("loss", state.total_loss_dict.get("loss/train/total", math.nan))
        tokens = int(state.timestamp.token) - self._tokens_before
        self._note("tokens_per_s", tokens / max(elapsed - self._evaluated_s, 1e-9))
        text = f"{self._place}[ETA={events.short_duration(eta_s)}] {_shown(self._facts)}"
        facts = {"eta_s": round(eta_s, 1), "batch": int(state.timestamp.batch), **self._facts}
        self._write("TRAIN_UPDATED", text, share=round(min(1.0, done / total), 4), **facts)

    def _note(self, name: str, value: float) -> None:
        if math.isfinite(value):  # JSON has no other numbers
            self._facts[name] = float(f"{value:.6g}")

    def checkpoint_saved(self, address: str) -> None:
        """The checkpoint at a path or URI is complete."""
        self._write("CHECKPOINT_SAVED", f"Checkpoint {address.rpartition('/')[2]} saved.", checkpoint=address)

    def fit_end(self, state: State, logger: Logger) -> None:
        """All batches are done, and the last checkpoint is complete."""
        for saver in self._savers:
            saver.wait()
        batches, tokens = int(state.timestamp.batch), int(state.timestamp.token)
        text = f"Training finished after {batches:,} batches and {tokens:,} tokens. {_shown(self._facts)}"
        self._write("TRAIN_FINISHED", text, **self._facts)

    def _write(self, type: str, message: str, **facts: object) -> None:
        # Somebody who trains the run's file once more must not write into the run's history.
        if dist.get_global_rank() == 0 and os.environ.get(RUN_VARIABLE) == str(self.path):
            events.append(self.path, type, message, **facts)


def _facts_so_far(path: Path) -> dict[str, float]:
    """Latest losses and speed of a run that goes on."""
    found = [event.facts for event in events.read(path) if event.type == "TRAIN_UPDATED"]
    return {name: found[-1][name] for name in SHOWN if found and name in found[-1]}


def _shown(facts: Mapping[str, float]) -> str:
    return ", ".join(SHOWN[name].format(facts[name]) for name in SHOWN if name in facts)


def _progress(state: State) -> tuple[float, float]:
    """How much is done and how much there is, in one unit."""
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
