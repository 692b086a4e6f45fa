"""Continued pretraining on a folder of .txt files: every token is a target, nested folders are read too."""

import os
import tempfile
from pathlib import Path

from tundish import foundation_model as fm
from tundish import tiny

folder = Path(tempfile.mkdtemp(prefix="tundish-pretrain-"))
os.environ.setdefault("TUNDISH_HOME", str(folder / "home"))

texts = folder / "texts"
for year in range(1990, 2010):
    (texts / f"{year // 10}0s").mkdir(parents=True, exist_ok=True)
    lines = [f"{written} is {iso}." for written, iso in tiny.date_pairs(30, seed=year)]
    (texts / f"{year // 10}0s" / f"{year}.txt").write_text("\n".join(lines))
(texts / "notes.md").write_text("Files that are not .txt are left alone.")

run = fm.create(
    model=str(tiny.make_base_model(folder / "tiny-llama", (path.read_text() for path in texts.rglob("*.txt")))),
    train_data_path=str(texts),
    register_to="main.recipes",
    task_type="CONTINUED_PRETRAIN",
    training_duration="8_000tok",
    learning_rate="1e-3",
    context_length=256,
)
fm.get_events(run, follow=True)
run = run.refresh()
print(f"{run.name}: {run.status.display_name}. {run.details}")
raise SystemExit(run.status.display_name != "Completed")
