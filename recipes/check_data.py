"""Before a run: find out what is wrong with the data, and how many steps a run would take."""

import os
import tempfile
from pathlib import Path

from tundish import foundation_model as fm
from tundish import tiny

folder = Path(tempfile.mkdtemp(prefix="tundish-check-"))
os.environ.setdefault("TUNDISH_HOME", str(folder / "home"))

pairs = tiny.date_pairs(1_000, seed=3)
model = str(tiny.make_base_model(folder / "tiny-llama", (text for pair in pairs for text in pair)))
train = tiny.write_chats(folder / "train.jsonl", pairs)
good = train.read_text().splitlines()
bad = [*good[:41], '{"messages": [{"role": "user", "content": "1 May 2026?"}]}', *good[42:]]

train.write_text("\n".join(bad))
report = fm.validate(model, str(train))
print(report)
assert not report.ok and report.reports[0].problems[0].where == [42]

train.write_text("\n".join(good))
print(fm.estimate(model, str(train), training_duration="3ep", context_length=128))
