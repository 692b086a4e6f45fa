"""Makes `written.tar.gz`: what a version of tundish leaves on disk, for `test_written_before.py` of later versions.

Run it with the Python of the version that is to be kept, from outside its checkout:

    git worktree add /tmp/before a33fb62 && make -C /tmp/before install
    /tmp/before/.venv/bin/python tests/written_before/make.py

Only names that users have are called, so that any version can run it. The archive holds a `$TUNDISH_HOME` with a
completed and a canceled run, the model and data that they were made from, and what `tundish render` printed. Absolute
paths in text files begin with PLACE; for the same reason the MLflow database is kept as SQL, and links as JSON.
"""

import contextlib
import io
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

PLACE = "/place-of-the-archive"
ARCHIVE = Path(__file__).with_name("written.tar.gz")
GPUS = "--device gpu --devices 8 --set compute.device_memory_gib=80"
CPU = "--device cpu --devices 1 --set compute.device_memory_gib=24"
RENDERED = {
    "chat-8b": f"--model meta-llama/Llama-3.1-8B-Instruct --train-data-path ./large.jsonl {GPUS}",
    "instruction-70b": f"--model meta-llama/Llama-3.1-70B --train-data-path ./large.jsonl {GPUS} --nodes 4 "
    "--task-type INSTRUCTION_FINETUNE --training-duration 300ba --learning-rate 1e-6 --eval-data-path ./eval.jsonl "
    "--set optimizer.betas=[0.9,0.95]",
    "pretrain-405b": f"--model meta-llama/Meta-Llama-3.1-405B-Instruct --train-data-path ./texts {GPUS} --nodes 16 "
    "--task-type CONTINUED_PRETRAIN --training-duration 1_000_000_000tok --context-length 4096",
    "tiny": f"--model ./model --train-data-path ./train.jsonl {CPU} --task-type INSTRUCTION_FINETUNE "
    "--context-length 32 --training-duration 2ep --set global_train_batch_size=2",
}
"""Options of `tundish render` by name; the working directory is the archive's `work`."""


def main() -> None:
    """Make the files in a new folder, and pack them."""
    place = Path(tempfile.mkdtemp(prefix="tundish-written-"))
    work = place / "work"
    work.mkdir()
    os.environ |= {"TUNDISH_HOME": str(place / "home"), "USER": "lab", "LOGNAME": "lab", "CUDA_VISIBLE_DEVICES": ""}
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.chdir(work)
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        del os.environ[name]
    _inputs(work)
    rendered = {name: _render(options) for name, options in RENDERED.items()}
    names = _runs()
    (place / "rendered.json").write_text(json.dumps(rendered, indent=1))
    (place / "runs.json").write_text(json.dumps(names))
    _pack(place)
    shutil.rmtree(place)
    print(f"{ARCHIVE}: {ARCHIVE.stat().st_size:,} bytes")


def _inputs(work: Path) -> None:
    from tundish import tiny

    pairs = tiny.date_pairs(120, seed=5)
    rows = [{"prompt": f"{question}: ", "response": answer} for question, answer in pairs]
    (work / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:100]))
    (work / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[100:]))
    tiny.make_base_model(
        work / "model", (row["prompt"] for row in rows), vocabulary=262, hidden_size=16, intermediate_size=16,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64,
    )  # fmt: skip


def _runs() -> dict[str, str]:
    """A completed run and one that was canceled after its first checkpoint; their names."""
    from tundish import foundation_model as fm

    shared: dict[str, Any] = {
        "model": "./model", "train_data_path": "./train.jsonl", "task_type": "INSTRUCTION_FINETUNE",
        "register_to": "main.lab.dates", "context_length": 32, "learning_rate": "1e-3",
    }  # fmt: skip
    overrides = {"global_train_batch_size": 2}
    completed = fm.create(
        **shared, eval_data_path="./eval.jsonl", run_name="completed",
        training_duration="1ep", compute={"device": "cpu", "devices_per_node": 1}, overrides=overrides,
    )  # fmt: skip
    completed = completed.wait()
    assert completed.status.display_name == "Completed", completed.details
    stopped = fm.create(
        **shared, run_name="stopped", training_duration="60ba", overrides=overrides | {"save_interval": "20ba"},
        compute={"device": "cpu", "devices_per_node": 1},
    )  # fmt: skip
    while all(event.type != "CHECKPOINT_SAVED" for event in fm.get_events(stopped)):
        assert not stopped.refresh().status.is_terminal(), stopped.refresh().details
        time.sleep(0.05)
    assert fm.cancel(stopped) == 1
    while not stopped.refresh().status.is_terminal():
        time.sleep(0.1)
    assert stopped.refresh().status.display_name == "Stopped"
    return {"completed": completed.name, "stopped": stopped.name}


def _render(options: str) -> dict[str, str]:
    command = [sys.executable, "-m", "tundish", "render", "--register-to", "main.lab", "--run-name", "rendered"]
    result = subprocess.run([*command, *options.split()], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return {"options": options, "yaml": result.stdout}


def _pack(place: Path) -> None:
    database = place / "home" / "mlflow" / "mlflow.db"
    with contextlib.closing(sqlite3.connect(database)) as connection:
        (place / "mlflow.sql").write_text("\n".join(connection.iterdump()))
    for path in (database, *database.parent.glob("mlflow.db-*")):
        path.unlink(missing_ok=True)
    links = {str(path.relative_to(place)): os.readlink(path) for path in place.rglob("*") if path.is_symlink()}
    (place / "links.json").write_text(json.dumps(links))
    with tarfile.open(ARCHIVE, "w:gz", compresslevel=9) as archive:
        for path in sorted(place.rglob("*")):
            if not path.is_file() or path.is_symlink():
                continue
            content = path.read_bytes()
            with contextlib.suppress(UnicodeDecodeError):
                content = content.decode().replace(str(place), PLACE).encode()
            assert str(place).encode() not in content, f"{path}: a path in a file that is no text"
            entry = tarfile.TarInfo(str(path.relative_to(place)))
            entry.size, entry.mode, entry.mtime = len(content), 0o644, int(path.stat().st_mtime)
            archive.addfile(entry, io.BytesIO(content))


if __name__ == "__main__":
    main()
