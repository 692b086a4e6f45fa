"""Continued pretraining on a folder of .txt files, then instruction fine-tuning that starts from its weights."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from tundish import foundation_model as fm
from tundish import tiny

folder = Path(tempfile.mkdtemp(prefix="tundish-pretrain-"))
os.environ.setdefault("TUNDISH_HOME", str(folder / "home"))

texts, pairs = folder / "texts", tiny.date_pairs(800, seed=3)
for number in range(20):
    path = texts / f"part-{number % 4}" / f"{number:02}.txt"  # subfolders are read too
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(f"{written} is {iso}." for written, iso in pairs[number * 30 : (number + 1) * 30]))
(texts / "notes.md").write_text("Files other than .txt are ignored.")
questions = [{"prompt": f"{written} is", "response": f" {iso}."} for written, iso in pairs[600:]]
(folder / "train.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
base = tiny.make_base_model(folder / "tiny-llama", (path.read_text() for path in texts.rglob("*.txt")))


def train(**arguments: Any) -> fm.TrainingRun:
    """Start a run and follow it to its end."""
    run = fm.create(model=str(base), register_to="main.recipes", learning_rate="1e-3", **arguments)
    fm.get_events(run, follow=True)
    run = run.refresh()
    if run.status.display_name != "Completed":
        raise SystemExit(f"{run.name}: {run.status.display_name}. {run.details}")
    return run


pretrained = train(
    task_type="CONTINUED_PRETRAIN", train_data_path=str(texts), training_duration="20_000tok", context_length=256
)
# Only the weights are taken over; optimizer and schedule start fresh.
tuned = train(
    task_type="INSTRUCTION_FINETUNE",
    train_data_path=str(folder / "train.jsonl"),
    training_duration="1ep",
    context_length=128,
    custom_weights_path=fm.get_checkpoints(pretrained)[-1],
)
print(f"{tuned.name} started from the weights of {pretrained.name}. {tuned.details}")
