"""run_plan.py: what is decided early, late, and again; and that it comes back from its file as it was."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tundish.base.run_folder import RunFolder
from tundish.errors import RunDamagedError, RunNotFoundError, SpecError
from tundish.plan.compute import Compute
from tundish.plan.foundry import render
from tundish.plan.run_plan import DataFacts, RunPlan
from tundish.plan.spec import Duration, parse_spec

Plan = Callable[..., RunPlan]


@pytest.fixture
def plan(config_folder: Path) -> Plan:
    """`plan(…)`: of a run with these arguments, its data not prepared."""

    def make(**changes: Any) -> RunPlan:
        given = {
            "model": str(config_folder), "train_data_path": "/data/train.jsonl", "register_to": "main.lab",
            "run_name": "one", "compute": {"device": "cpu", "devices_per_node": 2},
        }  # fmt: skip
        spec, card = parse_spec(given | changes, created_at="2026-11-21T10:00:00+00:00")
        return RunPlan.of(spec, card, tracking_uri="sqlite:////db", registry_uri=None, save_folder="/save")

    return make


def _facts(rows: int, **more: Any) -> DataFacts:
    facts = DataFacts(
        folder="/prepared/1", samples=2 * rows, rows=rows, tokens=100 * rows, target_tokens=60 * rows, truncated=0,
        empty=0, warned=0, chatml_added=False, digest="d",
    )  # fmt: skip
    return dataclasses.replace(facts, **more)


def test_what_depends_on_the_rows_is_decided_when_they_are_known(plan: Plan) -> None:
    """A provisional batch size or warm-up would be trained, or one that was decided be chosen again."""
    early = plan()
    assert (early.batch_size, early.batch_size_is_final, early.steps, early.warm_up) == (32, False, None, "1ba")
    late = early.completed({"train": _facts(1600)})
    assert (late.batch_size, late.batch_size_is_final, late.steps, late.warm_up) == (16, True, 100, "2ba")
    assert late.memory.microbatch == 8 and late.data["train"].prepared == _facts(1600)
    again = late.completed({"train": _facts(100)})
    assert (again.batch_size, again.steps) == (16, 7), "prepared once more: the batches stay"
    assert late.completed(save_folder="/other", load_path="/w") == dataclasses.replace(
        late, save_folder="/other", load_path="/w"
    )


@pytest.mark.parametrize(
    ("duration", "steps"), [("1ep", 100), ("3ep", 300), ("7ba", 7), ("160_000tok", 100), ("160_001tok", 101)]
)
def test_steps_are_those_of_the_duration(plan: Plan, duration: str, steps: int) -> None:
    """A run would be said to take another number of steps than it takes."""
    assert plan(training_duration=duration).completed({"train": _facts(1600)}).steps == steps


def test_other_devices_keep_the_batches_of_training_that_has_begun(plan: Plan) -> None:
    """A resumed run would see other batches than the ones its optimizer and learning rate are at."""
    begun = plan().completed({"train": _facts(1600)})
    four, three = (Compute(device="cpu", devices_per_node=number, device_memory_gib=8) for number in (4, 3))
    moved = begun.on(four, keep_batches=True)
    assert (moved.batch_size, moved.memory.microbatch, moved.steps) == (16, 4, 100) and moved.spec.compute == four
    with pytest.raises(SpecError, match=r"batches of 16 rows cannot be shared equally by 3 devices"):
        begun.on(three, keep_batches=True)
    fresh = begun.on(three, keep_batches=False)
    assert (fresh.batch_size, fresh.batch_size_is_final) == (12, True), "nothing was trained: batches of its own"
    with pytest.raises(SpecError, match=r"batches of 8 rows cannot"):
        plan(overrides={"global_train_batch_size": 8}).on(three, keep_batches=False)


def test_the_batches_of_training_that_has_begun_are_rendered_whatever_the_overrides_say(plan: Plan) -> None:
    """The plan would have the batches of before, and the YAML, which is what is trained, others."""
    kept = plan(overrides={"global_train_batch_size": 8}).with_batches(4)
    assert kept.batch_size == kept.spec.overrides["global_train_batch_size"] == 4
    assert yaml.safe_load(render(kept, RunFolder.of("one")))["global_train_batch_size"] == 4
    assert "global_train_batch_size" not in plan().with_batches(4).spec.overrides


def test_a_longer_run_changes_its_steps_and_schedule_alone(plan: Plan) -> None:
    """Batches or microbatch would be chosen anew for the same devices."""
    short = plan().completed({"train": _facts(1600)})
    long = short.longer(Duration(value=3, unit="ep"))
    assert (long.steps, long.warm_up, str(long.spec.training_duration)) == (300, "6ba", "3ep")
    same = dataclasses.replace(long, steps=short.steps, warm_up=short.warm_up, spec=short.spec)
    assert same == short


def test_a_plan_comes_back_from_its_file(plan: Plan, tmp_path: Path) -> None:
    """A stage would train another run than the one that was accepted."""
    run = RunFolder(tmp_path / "one")
    run.folder.mkdir()
    for changes in (
        {},
        {"eval_data_path": "/data/eval.jsonl", "eval_prompts": ["What?"], "overrides": {"scheduler.t_warmup": 3}},
        {"custom_weights_path": "/w/ep1-ba1", "overrides": {"optimizer": {"betas": [0.9, 0.95]}, "seed": 3}},
    ):
        for made in (
            plan(**changes),
            plan(**changes).completed({"train": _facts(40)}, model_state="s", load_path="/x"),
        ):
            made.write(run)
            assert RunPlan.read(run) == made


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("", "is empty"),
        ('{"version": 1', "is not JSON, or was cut off"),
        ("[]", "JSON object"),
        ('{"version": 2}', "was written by a newer version of tundish"),
        ('{"version": 1}', "lacks 'spec'"),
        (None, "is missing"),
    ],
)
def test_a_damaged_plan_is_named(tmp_path: Path, content: str | None, found: str) -> None:
    """A traceback, or a plan of which half is made up."""
    run = RunFolder(tmp_path / "one")
    with pytest.raises(RunNotFoundError):
        RunPlan.read(run)
    run.folder.mkdir()
    if content is not None:
        run.plan.write_text(content)
    with pytest.raises(RunDamagedError, match=r"plan\.json") as error:
        RunPlan.read(run)
    assert found in error.value.message


def test_wrong_values_of_a_plan_are_named(plan: Plan, tmp_path: Path) -> None:
    """A plan that was edited by hand would fail in the middle of the run; or a copied folder train the first one's."""
    run = RunFolder(tmp_path / "one")
    run.folder.mkdir()
    plan().write(run)
    content = json.loads(run.plan.read_text())
    run.plan.write_text(json.dumps(content | {"batch_size": "16", "data": {"train": {"address": 3}}}))
    with pytest.raises(RunDamagedError, match=r"'data': 'address'.*'batch_size'"):
        RunPlan.read(run)
    for wrong in ({"data": {}}, {"batch_size": 0}):
        run.plan.write_text(json.dumps(content | wrong))
        with pytest.raises(RunDamagedError, match="must have training data, and batches of at least one row"):
            RunPlan.read(run)
    copy = RunFolder(tmp_path / "two")
    copy.folder.mkdir()
    plan().write(copy)
    with pytest.raises(RunDamagedError, match="is of the run 'one'"):
        RunPlan.read(copy)
