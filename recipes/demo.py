"""The demo: a base model with random weights learns to turn written dates into ISO dates.

Run it with `make demo`. Nothing is downloaded; the score is taken on dates that were held out.
"""

import os
import tempfile
import time
from pathlib import Path

from tundish import foundation_model as fm
from tundish import tiny

folder = Path(tempfile.mkdtemp(prefix="tundish-demo-"))
os.environ.setdefault("TUNDISH_HOME", str(folder / "home"))
started = time.monotonic()

pairs = tiny.date_pairs(7_800, seed=1)
train, evaluation, held_out = pairs[:7_600], pairs[7_600:7_700], pairs[7_700:]
base = tiny.make_base_model(folder / "tiny-llama", (text for pair in train for text in pair))
print(f"Created a base model with random weights and {len(train):,} chats in {folder}.\n")

run = fm.create(
    model=str(base),
    train_data_path=str(tiny.write_chats(folder / "train.jsonl", train)),
    eval_data_path=str(tiny.write_chats(folder / "eval.jsonl", evaluation)),
    eval_prompts=[f"<|user|>{held_out[0][0]}<|end|><|assistant|>"],
    register_to="main.demo.dates",
    training_duration="5ep",
    learning_rate="7e-4",
    context_length=256,
)
fm.get_events(run, follow=True)
run = run.refresh()
if run.export_dir is None:
    raise SystemExit(f"The run ended with status {run.status}: {run.details}")

questions, expected = [question for question, _ in held_out], [answer for _, answer in held_out]
before, after = tiny.answer(base, questions), tiny.answer(run.export_dir, questions)
print(f"\n{'question':<30}  {'expected':<10}  {'after':<10}  before")
for row in list(zip(questions, expected, after, before, strict=True))[:10]:
    print(f"{row[0]:<30}  {row[1]:<10}  {row[2]:<10}  {row[3][:20]!r}")


def score(answers: list[str]) -> str:
    """How many answers match exactly."""
    return f"{sum(map(str.__eq__, answers, expected))} of {len(expected)} correct"


print(f"\nHeld-out dates before training: {score(before)}; after: {score(after)}.")
print(f"Checkpoints: {', '.join(Path(path).name for path in fm.get_checkpoints(run))}")
print(f"Export: {run.export_dir}\nTook {time.monotonic() - started:.0f} s.")
