"""What a version before has written still loads: run folders, checkpoints, prepared data, YAML.

Commit a33fb62 made `written.tar.gz` with `make.py`, which describes it. It is never rebuilt to let a test pass: users
who upgrade have such files.
"""

import contextlib
import hashlib
import json
import shlex
import sqlite3
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.written_before.make import ARCHIVE, PLACE, RENDERED

from tundish import foundation_model as fm


@dataclass(frozen=True, slots=True)
class Written:
    """The archive, unpacked."""

    place: Path
    completed: str
    stopped: str
    """Names of the runs."""

    @property
    def home(self) -> Path:
        return self.place / "home"

    @property
    def work(self) -> Path:
        return self.place / "work"

    def arguments(self) -> dict[str, Any]:
        """Those of `create()` that both runs share."""
        return {
            "model": str(self.work / "model"),
            "train_data_path": str(self.work / "train.jsonl"),
            "register_to": "main.lab.dates",
            "task_type": "INSTRUCTION_FINETUNE",
            "context_length": 32,
        }


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Written:
    """The files in a folder of this test, which is `$TUNDISH_HOME`'s as well."""
    place = tmp_path / "written"
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(place, filter="data")
    for path in place.rglob("*"):
        if path.is_file():
            with contextlib.suppress(UnicodeDecodeError):
                text = path.read_bytes().decode()
                if PLACE in text:
                    path.write_bytes(text.replace(PLACE, str(place)).encode())
    for name, target in json.loads((place / "links.json").read_text()).items():
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).symlink_to(target)
    with contextlib.closing(sqlite3.connect(place / "home" / "mlflow" / "mlflow.db")) as database:
        database.executescript((place / "mlflow.sql").read_text())
    monkeypatch.setenv("TUNDISH_HOME", str(place / "home"))
    return Written(place, **json.loads((place / "runs.json").read_text()))


def test_the_verbs_show_the_runs(written: Written) -> None:
    """Runs that vanish from the list, or are DAMAGED, after an upgrade."""
    runs = {run.name: run for run in fm.list()}
    assert runs.keys() == {written.completed, written.stopped}
    completed, stopped = runs[written.completed], runs[written.stopped]
    assert completed.status.display_name == "Completed" and stopped.status.display_name == "Stopped"
    assert fm.get(written.completed).train_loss == completed.train_loss is not None
    assert (completed.registered_name, completed.registered_version) == ("main.lab.dates", "1")
    assert (completed.model, completed.training_duration) == (str(written.work / "model"), "1ep")
    assert (completed.context_length, completed.learning_rate) == (32, 1e-3)
    assert completed.submitted_config is not None
    assert completed.submitted_config.overrides == {"global_train_batch_size": 2}
    assert completed.export_dir == written.home / "runs" / written.completed / "export"
    assert [event.type for event in fm.get_events(completed)][-1] == "COMPLETED"
    assert [event.type for event in fm.get_events(stopped)][-1] == "CANCELED"
    for run in (completed, stopped):
        checkpoints = fm.get_checkpoints(run)
        assert checkpoints and all(Path(path, ".metadata").is_file() for path in checkpoints)


def test_metrics_are_read_from_mlflow_and_from_the_disk(written: Written) -> None:
    """A finished run whose curves are lost."""
    run = fm.get(written.completed)
    metrics = run.metrics("loss/train/total")
    assert len(metrics) == 50 and metrics["value"].iloc[-1] < metrics["value"].iloc[0]
    (written.home / "mlflow" / "mlflow.db").unlink()
    assert run.metrics("loss/train/total").equals(metrics)


def test_a_checkpoint_is_whole_and_its_export_is_the_one_of_then(
    written: Written, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights of months ago that can no longer be read, or that come out as others."""
    from safetensors.numpy import load_file

    from tundish.cli import main

    assert main(["checkpoints", written.completed, "--verify"]) == 0
    assert main(["export", written.completed, "--out", str(tmp_path / "export"), "--dtype", "float32"]) == 0
    assert main(["export", written.completed, "--out", str(tmp_path / "again")]) == 0
    capsys.readouterr()
    before = _only(written.home / "runs" / written.completed / "export")
    again, wide = _only(tmp_path / "again"), load_file(_only(tmp_path / "export"))
    assert hashlib.sha256(again.read_bytes()).digest() == hashlib.sha256(before.read_bytes()).digest()
    base = load_file(_only(written.work / "model"))
    assert wide.keys() == base.keys() and any((wide[name] != base[name]).any() for name in base)


def _only(folder: Path) -> Path:
    (path,) = folder.glob("*.safetensors")
    return path


def test_prepared_data_is_found_again_and_would_be_made_the_same(written: Written, tmp_path: Path) -> None:
    """Terabytes prepared again after an upgrade; or other rows, so that a run that is resumed sees other batches."""
    from tundish.cli import main

    arguments = written.arguments()
    options = [
        word for name, value in arguments.items() if name != "register_to"
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]  # fmt: skip
    before = {path.name: _bytes(path) for path in (written.home / "prepared").iterdir() if path.is_dir()}
    assert len(before) == 2  # training and evaluation data
    stamps = {path: path.stat().st_mtime_ns for path in (written.home / "prepared").glob("*/*")}
    assert len(stamps) == 6
    assert main(["prepare", *options, "--out", str(tmp_path / "found")]) == 0
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}
    assert {path.name for path in (written.home / "prepared").iterdir() if path.is_dir()} == before.keys()

    (written.home / "prepared").rename(tmp_path / "away")
    assert main(["prepare", *options, "--out", str(tmp_path / "new")]) == 0
    (made,) = [path for path in (written.home / "prepared").iterdir() if path.is_dir()]
    assert _bytes(made) == before[made.name]


def _bytes(folder: Path) -> dict[str, object]:
    """The content of a prepared folder, with the manifest as JSON."""
    return {
        path.name: json.loads(path.read_text()) if path.name == "manifest.json" else path.read_bytes()
        for path in folder.iterdir()
    }


@pytest.mark.parametrize("name", RENDERED)
def test_the_same_arguments_give_the_same_yaml(
    written: Written, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training that changes with an upgrade, unseen: each key and each value is the one of then."""
    from tundish.cli import main

    before = json.loads((written.place / "rendered.json").read_text())[name]
    monkeypatch.chdir(written.work)
    monkeypatch.setenv("USER", "lab")
    monkeypatch.setenv("LOGNAME", "lab")
    arguments = ["render", "--register-to", "main.lab", "--run-name", "rendered", *shlex.split(before["options"])]
    assert main(arguments) == 0
    now = yaml.safe_load(capsys.readouterr().out)
    assert len(now) > 25 and now == yaml.safe_load(before["yaml"])


@pytest.mark.slow
def test_a_stopped_run_resumes_to_its_end(written: Written) -> None:
    """A run that was stopped for the upgrade and cannot be continued after it; or starts over."""
    foundry = (written.home / "runs" / written.stopped / "foundry.yaml").read_bytes()
    done = fm.resume(written.stopped).wait(timeout=600)
    assert done.status.display_name == "Completed", done.details
    assert (done.registered_name, done.registered_version) == ("main.lab.dates", "2")
    assert fm.get_checkpoints(done)[-1].endswith("-ba60")
    started = [event.message for event in fm.get_events(done) if event.type == "TRAIN_STARTED"]
    assert len(started) == 2 and started[-1].endswith("from batch 20.")
    assert (written.home / "runs" / written.stopped / "foundry.yaml").read_bytes() == foundry, (
        "the YAML of then trained"
    )
