"""runs/changing.py: what a longer training needs, and what is refused. `test_resuming.py` trains one."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tundish import foundation_model as fm
from tundish.base import events
from tundish.base.files import write_atomic
from tundish.base.run_folder import RunFolder
from tundish.errors import DataError, RequestError, SpecError
from tundish.plan.foundry import render
from tundish.plan.run_plan import RunPlan
from tundish.plan.spec import RunSpec
from tundish.runs import changing, control
from tundish.supervise.preparing import adopt, planned
from tundish.supervise.stages import prepare_stage

MakeRun = Callable[..., RunFolder]


def _finished(paths: RunFolder, batches: int) -> RunSpec:
    """Prepare the run's data, and leave what its other stages would leave, a checkpoint among it."""
    spec, tracking = RunSpec.read(paths), paths.read_tracking()
    write_atomic(paths.result("prepare"), json.dumps(prepare_stage(paths)))
    for stage in ("train", "export", "register"):
        write_atomic(paths.result(stage), "{}")
    folder = Path(tracking.save_folder) / f"ep1-ba{batches}"
    folder.mkdir(parents=True)
    (folder / ".metadata").write_bytes(b"x")
    (folder / "manifest.json").write_text('{"files": {".metadata": {"bytes": 1, "sha256": "0"}}}')
    events.append(paths.events, "COMPLETED", "Run completed.")
    return spec


@pytest.fixture
def paths(make_run: MakeRun, tiny_model: Path) -> RunFolder:
    """A run of one epoch, which is one batch."""
    made = make_run("chat-1", ("CREATED", "waits"), model=str(tiny_model), training_duration="1ep")
    _finished(made, 1)
    return made


@pytest.fixture
def submitted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What would have been started; nothing is."""
    calls: list[Any] = []
    monkeypatch.setattr(control, "reopen_tracking", lambda tracking: None)
    monkeypatch.setattr(control.launch, "submit", lambda *given: calls.append(given))
    return calls


@pytest.mark.parametrize(
    ("given", "length", "begins"), [("4ep", "4ep", "about 75% of its peak"), ("2ba", "2ba", "about 50% of its peak")]
)
def test_a_longer_duration_keeps_the_batches_and_says_what_the_learning_rate_does(
    paths: RunFolder, given: str, length: str, begins: str
) -> None:
    """The rate had fallen to 0, and would go up again without a word; or another batch size be chosen."""
    plan = RunPlan.read(paths)
    before = yaml.safe_load(paths.foundry_yaml.read_text())
    changed, note = changing.longer(plan, given, paths)
    after = yaml.safe_load(render(changed, paths))
    assert str(changed.spec.training_duration) == after["max_duration"] == length
    changed = {key for key in after if after[key] != before.get(key)}
    assert changed <= {"max_duration", "eval_interval", "save_interval"} and after.keys() == before.keys()
    assert f"training_duration is {length} instead of 1ep" in note and begins in note


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("1ep", "1ep is not longer than the run's 1ep"),
        ("1ba", "1ba is not longer than the run's 1ep"),
        ("9_000tok", "9000tok cannot be compared with the run's 1ep"),
        ("soon", "must be a positive integer followed by ep, ba or tok, not 'soon'"),
    ],
)
def test_what_is_not_longer_is_refused_with_what_to_do(paths: RunFolder, given: str, found: str) -> None:
    """Nothing would be trained, and the run be exported and registered once more."""
    text = paths.foundry_yaml.read_text()
    with pytest.raises(SpecError) as error:
        fm.resume("chat-1", training_duration=given)
    assert error.value.message.startswith("training_duration: ") and found in error.value.message
    if given != "soon":
        assert "/checkpoints/ep1-ba1' instead, whose optimizer and schedule start over." in error.value.message
    assert paths.foundry_yaml.read_text() == text and fm.get("chat-1").status.display_name == "Completed"
    with pytest.raises(RequestError, match=r"nothing is left to do\. Give a longer training_duration"):
        fm.resume("chat-1")


def test_a_longer_training_needs_the_checkpoints(paths: RunFolder) -> None:
    """Training would start over under the name of the old run."""
    shutil.rmtree(paths.read_tracking().save_folder)
    with pytest.raises(SpecError) as error:
        fm.resume("chat-1", training_duration="2ep")
    assert f"Create a run with model='{paths.export}'" in error.value.message


def test_prepared_data_that_was_removed_is_prepared_again_unless_its_source_has_changed(
    paths: RunFolder, submitted: list[Any]
) -> None:
    """Training would fail for want of data that can be made again, or continue on other data without a word."""
    plan = RunPlan.read(paths)
    events.append(paths.events, "TRAIN_STARTED", "")
    events.append(paths.events, "COMPLETED", "")
    facts = plan.data["train"].prepared
    assert facts is not None
    shutil.rmtree(facts.folder)
    fm.resume("chat-1", training_duration="2ep")
    assert len(submitted) == 1 and not paths.is_done("prepare") and not adopt(paths)
    prepare_stage(paths)
    assert RunPlan.read(paths).data == plan.data and Path(facts.folder).is_dir() and adopt(paths)
    shutil.rmtree(facts.folder)
    with open(plan.spec.train_data_path, "a") as file:
        file.write(json.dumps({"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}))
    with pytest.raises(DataError, match=r"train_data_path: .* has changed since the run began to train"):
        prepare_stage(paths)


@pytest.mark.parametrize("killed_before", ["render", "write_atomic"])
def test_a_change_that_was_interrupted_is_completed_by_the_next_one(
    paths: RunFolder, submitted: list[Any], monkeypatch: pytest.MonkeyPatch, killed_before: str
) -> None:
    """The YAML would be that of the shorter run: nothing would be trained, and the run be COMPLETED once more."""
    with monkeypatch.context() as patch:
        patch.setattr(changing, killed_before, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fm.resume("chat-1", training_duration="3ep")
    fm.resume("chat-1", training_duration="3ep")
    assert len(submitted) == 1 and RunSpec.read(paths) == RunPlan.read(paths).spec
    assert paths.is_done("prepare") or adopt(paths)
    assert yaml.safe_load(paths.foundry_yaml.read_text())["max_duration"] == "3ep"


def test_any_duration_can_replace_that_of_a_run_without_data(make_run: MakeRun) -> None:
    """A run that failed over its data could be made longer in batches, but not shorter."""
    run = make_run("chat-1", training_duration="100ba")
    plan = planned(run)
    for duration in ("50ba", "2ep", "1_000tok"):
        changed, note = changing.longer(plan, duration, run)
        assert str(changed.spec.training_duration) == duration.replace("_", "") and not note


def test_durations_are_compared_without_the_data_where_they_can_be(paths: RunFolder) -> None:
    """A run of before whose prepared data was removed would be trained for a shorter time, which trains nothing."""
    plan = RunPlan.read(paths).without_data()
    plan = dataclasses.replace(plan, steps=None)
    with pytest.raises(SpecError, match="2ba cannot be compared with the run's 1ep: the run's prepared data no longer"):
        changing.longer(plan, "2ba", paths)
    with pytest.raises(SpecError, match="1ep is not longer than the run's 1ep"):
        changing.longer(plan, "1ep", paths)
    assert changing.longer(plan, "2ep", paths)[1].startswith("training_duration is 2ep instead of 1ep")


def test_custom_weights_that_were_removed_are_copied_again(make_run: MakeRun, submitted: list[Any]) -> None:
    """Training would fail for want of a copy that can be made again."""
    run = make_run("chat-1", ("CREATED", "waits"))
    write_atomic(run.result("prepare"), json.dumps(prepare_stage(run)))
    RunPlan.read(run).completed(load_path=str(run.folder / "none")).write(run)
    events.append(run.events, "FAILED", "")
    fm.resume("chat-1")
    assert len(submitted) == 1 and not run.is_done("prepare")


def test_what_follows_training_needs_no_plan(paths: RunFolder, submitted: list[Any]) -> None:
    """A run of before could not be registered any more once the folder of its base model was removed."""
    paths.result("register").unlink()
    paths.plan.unlink()
    spec = RunSpec.read(paths)
    write_atomic(paths.spec, dataclasses.replace(spec, model="/no/such/model").to_json())
    events.append(paths.events, "FAILED", "")
    fm.resume("chat-1")
    assert submitted == [(paths, spec.compute)] and not paths.plan.exists()


def test_stages_behind_the_data_are_done_again(paths: RunFolder, submitted: list[Any]) -> None:
    """The old export would be registered as the result of the longer training, or the old version be changed."""
    fm.resume("chat-1", training_duration="3ep")
    assert len(submitted) == 1
    assert [paths.is_done(stage) for stage in ("prepare", "train", "export", "register")] == [True] + [False] * 3
    assert paths.read_tracking().model_path == "model-3ep"
    assert yaml.safe_load(paths.foundry_yaml.read_text())["max_duration"] == "3ep"
    assert paths.read_result("prepare") == {"train": os.readlink(paths.data("train")), "batch_size": 1, "steps": 3}
    message = events.read(paths.events)[-1].message
    assert message.endswith("Training continues from checkpoint ep1-ba1.") and "3ep instead of 1ep" in message
