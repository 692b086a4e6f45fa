"""Instruction fine-tuning on two ranks: prompt and response, loss on the response only."""

import json
import os
import tempfile
from pathlib import Path

from tundish import foundation_model as fm
from tundish import tiny

folder = Path(tempfile.mkdtemp(prefix="tundish-instruction-"))
os.environ.setdefault("TUNDISH_HOME", str(folder / "home"))

pairs = tiny.date_pairs(1_000, seed=2)
rows = [{"prompt": f"Write {question} as an ISO date: ", "response": answer} for question, answer in pairs]
train, evaluation = folder / "train.jsonl", folder / "eval.jsonl"
train.write_text("".join(json.dumps(row) + "\n" for row in rows[:900]))
evaluation.write_text("".join(json.dumps(row) + "\n" for row in rows[900:]))

run = fm.create(
    model=str(tiny.make_base_model(folder / "tiny-llama", (row["prompt"] for row in rows))),
    train_data_path=str(train),
    eval_data_path=str(evaluation),
    register_to="main.recipes.instruction",
    task_type="INSTRUCTION_FINETUNE",
    training_duration="1ep",
    learning_rate=1e-3,
    context_length=128,
    compute={"device": "cpu", "devices_per_node": 2},
    overrides={"global_train_batch_size": 8},
)
fm.get_events(run, follow=True)
run = run.refresh()
print(f"{run.name}: {run.status.display_name}. {run.details}")
raise SystemExit(run.status.display_name != "Completed")
