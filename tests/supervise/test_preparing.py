"""preparing.py: what `create()` has prepared is taken as it is; runs of the version before get a plan."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tundish.base.files import write_atomic
from tundish.base.run_folder import RunFolder
from tundish.errors import RunDamagedError, SpecError
from tundish.plan.compute import Compute
from tundish.plan.foundry import render
from tundish.plan.run_plan import RunPlan
from tundish.runs import planning
from tundish.supervise import preparing
from tundish.supervise.stages import prepare_stage

MakeRun = Callable[..., RunFolder]
BEFORE = Path(__file__).parent / "before"
"""Files of a completed run, as the last version without plans left them; @TMP@ stands for the folder of its home."""


@pytest.fixture
def accepted(make_run: MakeRun, arguments: dict[str, Any]) -> RunFolder:
    """A run as `create()` leaves it: its data is prepared."""
    run = make_run("chat-1")
    plan = planning.check(arguments | {"run_name": "chat-2"})
    spec = dataclasses.replace(plan.spec, run_name="chat-1")
    dataclasses.replace(plan, spec=spec, save_folder="/save").write(run)
    return run


def test_data_that_create_prepared_is_taken_as_it_is(accepted: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A supervisor would load the data stack for seconds to find out what `create()` knew."""
    plan = RunPlan.read(accepted)
    assert plan.is_prepared and plan.steps == 1
    monkeypatch.setattr(preparing, "prepare", lambda *_: pytest.fail("something was prepared"))
    assert preparing.adopt(accepted) and accepted.is_done("prepare")
    facts = plan.data["train"].prepared
    assert facts is not None and os.readlink(accepted.data("train")) == facts.folder
    assert accepted.foundry_yaml.read_text() == render(plan, accepted) and RunPlan.read(accepted) == plan
    event = accepted.read_events()[-1]
    assert event.type == "DATA_VALIDATED" and event.message.startswith("Train data: 3 samples with ")
    assert event.message.endswith("A step takes 1 row, the run 1 step.")
    assert event.facts == {"rows": 1, "tokens": facts.tokens, "batch_size": 1, "steps": 1}


def test_the_supervisor_loads_nothing_to_take_prepared_data(accepted: RunFolder) -> None:
    """It would carry numpy, transformers or the data stack with it for as long as the model trains."""
    import subprocess
    import sys

    code = (
        "import sys; from pathlib import Path; from tundish.supervise import supervisor as s\n"
        "assert s.adopt(s.RunFolder(Path(sys.argv[1])))\n"
        "heavy = {'numpy', 'torch', 'transformers', 'mlflow', 'streaming', 'tundish.data.prepare'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, str(accepted.folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.mark.parametrize("changed", ["prepared data", "base model", "custom weights"])
def test_what_has_changed_since_is_left_to_the_stage(accepted: RunFolder, tmp_path: Path, changed: str) -> None:
    """A run would train without data, or from weights that nobody has checked."""
    plan = RunPlan.read(accepted)
    if changed == "prepared data":
        assert plan.data["train"].prepared is not None
        shutil.rmtree(plan.data["train"].prepared.folder)
    elif changed == "base model":
        copy = Path(shutil.copytree(plan.spec.model, tmp_path / "copy"))
        spec = dataclasses.replace(plan.spec, model=str(copy))
        dataclasses.replace(plan, spec=spec, model_state=preparing.state_of(str(copy))).write(accepted)
        weights = copy / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1000])
    else:
        dataclasses.replace(plan, spec=dataclasses.replace(plan.spec, custom_weights_path="/w")).write(accepted)
    assert not preparing.adopt(accepted) and not accepted.is_done("prepare") and not accepted.foundry_yaml.exists()
    if changed == "prepared data":
        prepare_stage(accepted)
        assert RunPlan.read(accepted) == plan and plan.is_prepared, "from the same data, the same folder"
    elif changed == "base model":
        with pytest.raises(SpecError, match=r"model\.safetensors: is truncated"):
            prepare_stage(accepted)


def test_data_is_prepared_again_for_another_tokenizer(
    make_run: MakeRun, arguments: dict[str, Any], tmp_path: Path
) -> None:
    """The model would be trained on the tokens of the tokenizer that its folder had when the run was created."""
    model = Path(shutil.copytree(arguments["model"], tmp_path / "copy"))
    run = make_run("chat-1", model=str(model))
    plan = planning.check(arguments | {"run_name": "chat-2", "model": str(model)})
    dataclasses.replace(plan, spec=dataclasses.replace(plan.spec, run_name="chat-1")).write(run)
    (file,) = (file for file in model.iterdir() if b"</s>{% endif %}" in file.read_bytes())
    file.write_text(file.read_text().replace("</s>{% endif %}", "</s> {% endif %}"))
    assert not preparing.adopt(run)
    prepare_stage(run)
    first, second = plan.data["train"].prepared, RunPlan.read(run).data["train"].prepared
    assert first is not None and second is not None and first.folder != second.folder
    assert os.readlink(run.data("train")) == second.folder and preparing.adopt(run)


@pytest.fixture
def before(home: Path, tmp_path: Path) -> RunFolder:
    """A run of the version before."""
    run = RunFolder(home / "runs" / "r1")

    def put(name: str, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text((BEFORE / name).read_text().replace("@TMP@", str(tmp_path)))

    put("config.json", tmp_path / "my-model" / "config.json")
    put("spec.json", run.spec)
    put("foundry.yaml", run.foundry_yaml)
    put("tracking.json", run.result("tracking"))
    for split in ("train", "eval"):
        put(f"manifest-{split}.json", tmp_path / "prepared" / split / "manifest.json")
        run.data(split).parent.mkdir(exist_ok=True)
        run.data(split).symlink_to(tmp_path / "prepared" / split)
    return run


def test_a_run_of_before_gets_a_plan_that_trains_the_same(before: RunFolder) -> None:
    """It could not be resumed after an upgrade, or would train other batches."""
    plan = preparing.planned(before)
    assert RunPlan.read(before) == plan and plan.is_prepared
    assert (plan.batch_size, plan.batch_size_is_final, plan.steps) == (2, True, 20)
    train = plan.data["train"].prepared
    assert train is not None and (train.samples, train.rows, train.tokens) == (2000, 214, 52589)
    assert train.folder == os.readlink(before.data("train"))
    assert plan.save_folder == before.read_tracking().save_folder
    new, old = yaml.safe_load(render(plan, before)), yaml.safe_load(before.foundry_yaml.read_text())
    assert new == old and list(new) == list(old), "all but the comments"
    compute = Compute(device="cpu", devices_per_node=2, device_memory_gib=8)
    assert yaml.safe_load(render(plan.on(compute, keep_batches=True), before))["global_train_batch_size"] == 2


def test_a_run_of_before_keeps_its_batches_where_its_prepared_data_no_longer_exists(before: RunFolder) -> None:
    """Its optimizer would go on with batches of another size."""
    for split in ("train", "eval"):
        before.data(split).unlink()
    content = yaml.safe_load(before.foundry_yaml.read_text())
    write_atomic(before.foundry_yaml, yaml.safe_dump(content | {"global_train_batch_size": 6, "load_path": "/copy"}))
    plan = preparing.planned(before)
    assert (plan.batch_size, plan.steps, plan.load_path, plan.is_prepared) == (6, 20, "/copy", False)
    manifest = json.loads((BEFORE / "manifest-train.json").read_text())
    facts = preparing.DataFacts(
        folder="/p", samples=1, rows=manifest["rows"], tokens=1, target_tokens=1, truncated=0, empty=0, warned=0,
        chatml_added=False, digest="",
    )  # fmt: skip
    assert plan.completed({"train": facts}).batch_size == 6


def test_a_run_of_before_that_was_not_prepared_is_planned_anew(before: RunFolder) -> None:
    """It would be taken for one whose batches are decided."""
    before.foundry_yaml.unlink()
    plan = preparing.planned(before)
    assert not plan.batch_size_is_final and plan.data["train"].prepared is None and plan.spec.run_name == "r1"


@pytest.mark.parametrize("text", ["", "a: [", "- 1", "global_train_batch_size: x"])
def test_a_damaged_yaml_of_before_is_named(before: RunFolder, text: str) -> None:
    """A traceback."""
    before.foundry_yaml.write_text(text)
    with pytest.raises(RunDamagedError, match=r"foundry\.yaml: is not "):
        preparing.planned(before)
