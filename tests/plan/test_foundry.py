"""foundry.py: the YAML of a run is complete, true, and what was recorded for each size."""

import ast
import dataclasses
import importlib.util
import itertools
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from tundish.base.run_folder import RunFolder
from tundish.plan.batch import MAX_ROWS_PER_DEVICE, MIN_STEPS, choose_batch_size
from tundish.plan.foundry import render
from tundish.plan.memory import StepMemory
from tundish.plan.models import model_cards
from tundish.plan.overrides import KEYS, REFUSED, check_overrides, flat
from tundish.plan.run_plan import DataFacts, RunPlan, memory_plan
from tundish.plan.spec import TaskType, parse_spec

RECORDED = Path(__file__).parent / "recorded"
PATHS = RunFolder(Path("/runs/recorded"))
SAVE_FOLDER, TRACKING_URI = "/artifacts/recorded/checkpoints", "sqlite:////mlflow/mlflow.db"
EXPERIMENT = "/Users/me/recorded"
LARGE = 50_000
GPUS = {"device": "gpu", "devices_per_node": 8, "device_memory_gib": 80}
SIZES: dict[str, tuple[str, dict[str, Any], int]] = {
    "tiny": ("/models/tiny", {"device": "cpu", "devices_per_node": 1, "device_memory_gib": 24}, 340),
    "8b": ("meta-llama/Meta-Llama-3.1-8B-Instruct", GPUS, LARGE),
    "70b": ("meta-llama/Meta-Llama-3.1-70B-Instruct", GPUS | {"nodes": 4}, LARGE),
    "405b": ("meta-llama/Meta-Llama-3.1-405B-Instruct", GPUS | {"nodes": 16}, LARGE),
}
CASES = {f"{task.lower()}-{size}.yaml": (task, size) for task in get_args(TaskType) for size in SIZES}

Plan = Callable[..., RunPlan]


@pytest.fixture
def plan(config_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """The plan of a run of some size for so many rows, the same on every machine."""
    find_spec = importlib.util.find_spec
    # Whether this machine has flash-attn must not decide what is expected.
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: find_spec("yaml" if name == "flash_attn" else name))

    def make(size: str = "tiny", rows: int | None = LARGE, **changes: Any) -> RunPlan:
        model, compute, _ = SIZES[size]
        given = {
            "model": str(config_folder) if size == "tiny" else model,
            "train_data_path": "/data/train",
            "register_to": "main.lab",
            "run_name": "recorded",
            "experiment_path": EXPERIMENT,
            "compute": compute,
        }
        spec, card = parse_spec(given | changes, created_at="2026-11-21T10:00:00+00:00")
        model = changes.get("model", model)
        spec, card = dataclasses.replace(spec, model=model), dataclasses.replace(card, name=model)
        made = RunPlan.of(spec, card, tracking_uri=TRACKING_URI, registry_uri=None, save_folder=SAVE_FOLDER)
        return made if rows is None else made.completed({"train": facts(rows)})

    return make


def facts(rows: int) -> DataFacts:
    """Of prepared data with so many full rows of 64 tokens."""
    return DataFacts(
        folder="/prepared", samples=rows, rows=rows, tokens=64 * rows, target_tokens=rows, truncated=0, empty=0,
        warned=0, chatml_added=False, digest="0",
    )  # fmt: skip


def _render(planned: RunPlan) -> dict[str, Any]:
    return yaml.safe_load(render(planned, PATHS))


@pytest.mark.parametrize("name", CASES)
def test_the_yaml_is_the_recorded_one(plan: Plan, name: str) -> None:
    """What a run trains with would change unseen. `TUNDISH_RECORD=1` writes the files anew; read the diff."""
    task, size = CASES[name]
    text = render(plan(size, SIZES[size][2], task_type=task), PATHS)
    if os.environ.get("TUNDISH_RECORD") == "1":
        (RECORDED / name).write_text(text)
    assert text == (RECORDED / name).read_text()


def test_every_recorded_file_is_compared() -> None:
    """A recording that nothing compares would look like a promise."""
    assert len(CASES) == 12 and {path.name for path in RECORDED.iterdir()} == set(CASES)


def test_keys_are_those_that_llm_foundry_knows() -> None:
    """An override that LLM Foundry takes would be refused, or one that it does not know accepted."""
    spec = importlib.util.find_spec("llmfoundry")  # found, not loaded: that takes 20 seconds
    assert spec is not None and spec.submodule_search_locations
    source = Path(spec.submodule_search_locations[0]) / "utils" / "config_utils.py"
    classes = {node.name: node for node in ast.parse(source.read_text()).body if isinstance(node, ast.ClassDef)}
    fields = {
        node.target.id
        for node in classes["TrainConfig"].body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    assert len(fields) > 50 and len(KEYS) > 30 and KEYS < fields
    assert {key.split(".")[0] for key in REFUSED} <= fields


@pytest.mark.parametrize("task", get_args(TaskType))
def test_nothing_is_left_open_for_any_model(plan: Plan, task: str) -> None:
    """LLM Foundry would stop at a `???`, at a key that it does not know, or resolve an environment variable."""
    assert len(model_cards()) > 30
    for name in model_cards():
        text = render(plan("8b", model=name, task_type=task), PATHS)
        values = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
        assert "???" not in values and "${" not in values, name
        assert set(yaml.safe_load(text)) <= KEYS | {key.split(".")[0] for key in REFUSED}, name


def test_training_is_what_the_service_did(plan: Plan) -> None:
    """Optimizer, schedule or loss weighting would differ from the managed service's, or code of a model could run."""
    content = _render(plan("8b", learning_rate="1e-6", training_duration="3ep"))
    assert content["optimizer"] == {
        "name": "tundish_decoupled_lionw",
        "lr": 1e-6,
        "betas": [0.99, 0.95],
        "weight_decay": 0.0,
    }
    assert (content["scheduler"]["name"], content["scheduler"]["alpha_f"]) == ("linear_decay_with_warmup", 0)
    assert (content["max_duration"], content["max_seq_len"]) == ("3ep", 8192)
    assert content["accumulate_train_batch_on_tokens"] is True
    assert content["fsdp_config"]["state_dict_type"] == "sharded"
    assert content["model"]["trust_remote_code"] is content["tokenizer"]["kwargs"]["trust_remote_code"] is False
    assert content["save_overwrite"] is False and content["save_num_checkpoints_to_keep"] == -1


def test_arguments_and_places_reach_their_keys(plan: Plan) -> None:
    """A run would read other data, or write elsewhere, than its record says."""
    content = _render(plan("tiny", SIZES["tiny"][2]))
    assert content["run_name"] == "recorded"
    assert content["model"]["pretrained_model_name_or_path"] == content["tokenizer"]["name"] == "/models/tiny"
    assert content["train_loader"]["name"] == "tundish_packed"
    assert content["train_loader"]["dataset"]["local"] == "/runs/recorded/data/train"
    assert content["train_loader"]["dataset"]["max_seq_len"] == content["max_seq_len"] == 512
    assert content["save_folder"] == SAVE_FOLDER
    assert content["loggers"]["mlflow"]["tracking_uri"] == TRACKING_URI
    assert content["loggers"]["mlflow"]["experiment_name"] == EXPERIMENT
    assert content["callbacks"]["tundish_events"] == {"events_path": "/runs/recorded/events.jsonl"}


@pytest.mark.parametrize(
    ("device", "flash", "attention", "precision"),
    [
        ("cpu", True, "sdpa", "fp32"),
        ("gpu", True, "flash_attention_2", "amp_bf16"),
        ("gpu", False, "flex_attention", "amp_bf16"),
    ],
)
def test_attention_is_one_that_the_machine_has(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, device: str, flash: bool, attention: str, precision: str
) -> None:
    """The model would not load, or packed samples would see each other: loader and model must agree."""
    if not flash:
        monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    content = _render(plan("8b", compute={"device": device, "devices_per_node": 8}))
    assert content["model"]["attn_implementation"] == attention
    assert content["precision"] == precision


def test_sections_that_were_not_asked_for_are_absent(plan: Plan) -> None:
    """A run without evaluation data would look for some, or load weights from nowhere."""
    content = _render(plan())
    assert not {"eval_loader", "load_path", "load_weights_only"} & set(content)
    assert "tundish_eval_prompts" not in content["callbacks"]


def test_sections_that_were_asked_for_are_there(plan: Plan) -> None:
    """Evaluation, prompts or custom weights would be ignored in silence."""
    content = _render(
        plan(
            eval_data_path="/data/eval", eval_prompts=["What?", "Who?"], custom_weights_path="/w/latest.symlink"
        ).completed(load_path="/w/ep1-ba2")
    )
    assert content["eval_loader"]["dataset"]["local"] == "/runs/recorded/data/eval"
    assert content["eval_loader"]["dataset"]["shuffle"] is False
    assert content["callbacks"]["tundish_eval_prompts"]["prompts"] == ["What?", "Who?"]
    assert (content["load_path"], content["load_weights_only"]) == ("/w/ep1-ba2", True)


def test_overrides_win_and_leave_their_neighbours(plan: Plan) -> None:
    """An override would be lost, or take the rest of its section with it."""
    overrides = {"optimizer.lr": 0.5, "callbacks": {"run_timeout": {"timeout": 1}}, "seed": 3, "spin_dataloaders": True}
    before, after = _render(plan()), _render(plan(overrides=overrides))
    assert after["optimizer"] == before["optimizer"] | {"lr": 0.5}
    assert after["callbacks"] == before["callbacks"] | {"run_timeout": {"timeout": 1}}
    assert (after["seed"], after["spin_dataloaders"]) == (3, True)
    unchanged = set(before) - {"optimizer", "callbacks", "seed"}
    assert {key: after[key] for key in unchanged} == {key: before[key] for key in unchanged}


def test_a_given_batch_size_wins_and_the_file_says_so(plan: Plan) -> None:
    """The one setting that people change would be overruled, or the comment would give a false reason."""
    text = render(plan("8b", overrides={"global_train_batch_size": 24}), PATHS)
    assert yaml.safe_load(text)["global_train_batch_size"] == 24
    assert "# Set by overrides.\nglobal_train_batch_size: 24\n" in text


def test_the_chosen_batch_size_is_explained(plan: Plan) -> None:
    """Nobody would know where the number comes from, or the steps would be miscounted."""
    text = render(plan(rows=340), PATHS)
    size = yaml.safe_load(text)["global_train_batch_size"]
    assert (
        f"# Chosen for 340 rows on 1 device: {math.ceil(340 / size)} steps per epoch.\n"
        f"global_train_batch_size: {size}\n" in text
    )
    assert "chosen again from the number of rows" in render(plan(rows=None), PATHS)


@pytest.mark.parametrize(("rows", "devices"), itertools.product([1, 7, 100, 340, 5_000, 10**6], [1, 2, 3, 8, 128]))
def test_the_batch_size_suits_rows_and_devices(rows: int, devices: int) -> None:
    """Ranks would get unequal shares, or a small data set too few steps to learn anything."""
    size = choose_batch_size(rows, devices)
    per_device = size // devices
    assert size % devices == 0 and 1 <= per_device <= MAX_ROWS_PER_DEVICE
    assert math.ceil(rows / size) >= MIN_STEPS or per_device == 1
    # The largest that does: twice as many rows would give too few steps.
    assert per_device == MAX_ROWS_PER_DEVICE or math.ceil(rows / (2 * size)) < MIN_STEPS


@pytest.mark.parametrize("rows", [7, 340, 5_000])
def test_the_duration_does_not_change_the_batch_size(plan: Plan, rows: int) -> None:
    """Two runs that are compared would differ in two things, one of which nobody has set."""
    durations = ("1ep", "3ep", "4ep", "20ep", "1ba", "500ba", "1000tok", "9_000_000tok")
    sizes = {plan(rows=rows, training_duration=duration).batch_size for duration in durations}
    assert sizes == {choose_batch_size(rows, 1)}


@pytest.mark.parametrize(
    ("given", "schedule"),
    [
        ({"scheduler.alpha_f": 0.1}, {"name": "linear_decay_with_warmup", "t_warmup": "2ba", "alpha_f": 0.1}),
        ({"scheduler.name": "constant_with_warmup"}, {"name": "constant_with_warmup", "t_warmup": "2ba"}),
        (
            {"scheduler": {"name": "cosine_with_warmup", "alpha_f": 0.1, "t_warmup": "0.1dur"}},
            {"name": "cosine_with_warmup", "t_warmup": "10ba", "alpha_f": 0.1},
        ),
    ],
)
def test_another_schedule_gets_its_own_settings(plan: Plan, given: dict[str, Any], schedule: dict[str, Any]) -> None:
    """It would be built with settings of the linear one, which it does not know: the run fails after its data is
    prepared."""
    planned = plan(rows=340, training_duration="100ba", overrides=given)
    assert _render(planned)["scheduler"] == schedule


def test_memory_is_planned_for_what_the_overrides_say(plan: Plan) -> None:
    """The comment in the file, and what is refused, would be those of another run."""
    planned = plan()

    def chosen(**overrides: object) -> StepMemory:
        return memory_plan(dataclasses.replace(planned.spec, overrides=flat(overrides)), planned.card, 8).chosen

    usual = chosen()
    assert chosen(optimizer={"name": "decoupled_adamw"}).states == usual.states * 4 // 3
    assert chosen(device_train_microbatch_size=3).choice.microbatch == 3
    assert chosen(**{"fsdp_config.activation_checkpointing": True}).choice.activation_checkpointing
    assert chosen(**{"model.attn_implementation": "eager"}).activations > usual.activations


@pytest.mark.parametrize(
    ("rows", "changes", "warm_up"),
    [
        (340, {"training_duration": "10ba"}, "1ba"),
        (340, {"training_duration": "1000ba"}, "20ba"),
        (10, {"training_duration": "4ep"}, "1ba"),
        (1_600_000, {}, "2000ba"),
        (1_600_000, {"training_duration": "3ep"}, "6000ba"),
        (1_600_000, {"overrides": {"global_train_batch_size": 1600}}, "20ba"),
        (None, {}, "1ba"),
        (340, {"training_duration": "500_000tok"}, "0.02dur"),
        (1_600_000, {"overrides": {"scheduler.t_warmup": "0.1dur"}}, "10000ba"),
        (340, {"overrides": {"scheduler": {"t_warmup": "0.1dur"}}}, "17ba"),
        (340, {"overrides": {"scheduler.t_warmup": "0ba"}}, "0ba"),
        (340, {"overrides": {"scheduler.t_warmup": "1e-1 dur"}}, "17ba"),
        (340, {"overrides": {"scheduler.t_warmup": "1ep"}}, "1ep"),
    ],
)
def test_warm_up_is_two_percent_of_the_steps_and_at_least_one(
    plan: Plan, rows: int | None, changes: dict[str, Any], warm_up: str
) -> None:
    """Composer rounds 2 % of a short run down to no warm-up at all, or warm-up takes another share."""
    assert _render(plan(rows=rows, **changes))["scheduler"]["t_warmup"] == warm_up


@pytest.mark.parametrize(
    ("duration", "interval"), [("1ep", "1ep"), ("10ep", "1ep"), ("25ep", "3ep"), ("100ba", "0.25dur")]
)
def test_saving_and_evaluating_happen_at_most_ten_times(plan: Plan, duration: str, interval: str) -> None:
    """Checkpoints of a long run would fill the disk."""
    content = _render(plan(training_duration=duration))
    assert content["save_interval"] == content["eval_interval"] == interval


def test_microbatches_of_large_models_are_single_rows(plan: Plan) -> None:
    """A large model would run out of memory; a tiny one would crawl; `auto` fails on a CPU and under FSDP2."""
    assert _render(plan("405b"))["device_train_microbatch_size"] == 1
    tiny = _render(plan("tiny", overrides={"global_train_batch_size": 8}))
    assert tiny["device_train_microbatch_size"] == tiny["device_eval_batch_size"] == 8


def test_each_comment_is_true_where_it_stands(plan: Plan) -> None:
    """The file explains its values: a reason for what only large models get would be false in a small one's file."""
    small = render(plan("tiny"), PATHS)
    large = render(plan("8b"), PATHS)
    assert "Only rank 0 reads the weights" in large
    assert "Only rank 0 reads the weights" not in small
    raw_text = render(plan("tiny", task_type="CONTINUED_PRETRAIN"), PATHS)
    assert "raw text is split" in raw_text, "its tail is kept, unlike a sample's"


def test_the_file_tells_how_to_train_it_without_tundish(plan: Plan) -> None:
    """The command in the header would start another number of processes than the run has."""
    text = render(plan("8b"), PATHS)
    assert text.startswith("# Run recorded, written by tundish ")
    assert "composer -n 8 $(which llmfoundry) train foundry.yaml" in text


@pytest.mark.parametrize(
    ("overrides", "found"),
    [
        (
            {"global_train_batchsize": 8},
            "no LLM Foundry key 'global_train_batchsize'. Did you mean global_train_batch_size",
        ),
        ({"zzz": 8}, "no LLM Foundry key 'zzz'. It has accumulate_train_batch_on_tokens, algorithms"),
        ({"optimiser.lr": 1}, "no LLM Foundry key 'optimiser'. Did you mean optimizer"),
        ({"code_paths": ["x.py"]}, "'code_paths' is not allowed: it would run any file"),
        ({"max_seq_len": 1}, "'max_seq_len' is not allowed: create() has context_length for it"),
        ({"max_duration": "1ep"}, "create() has training_duration for it"),
        ({"run_name": "x"}, "create() has run_name for it"),
        ({"metadata.x": "${oc.env:HOME}"}, "'metadata.x' contains '${'"),
        ({"metadata": {"x": ["${oc.env:HOME}"]}}, "'metadata.x' contains '${'"),
        ({"optimizer.lrr": 1}, "'optimizer' has no key 'lrr'. Did you mean lr"),
        ({"optimizer": {"lrr": 1}}, "'optimizer' has no key 'lrr'. Did you mean lr"),
        ({"train_loader.dataset.shufle": 1}, "'train_loader.dataset' has no key 'shufle'. Did you mean shuffle"),
        ({"optimizer": None}, "'optimizer' is a section, and cannot be None"),
        ({"model": {"trust_remote_code": True}}, "it would run code that comes with the weights"),
        ({"model.name": "hf_causal_lm"}, "only tundish_causal_lm keeps packed samples from seeing each other"),
        ({"load_path": "/x/evil.pt"}, "create() has custom_weights_path for it, which checks what is loaded"),
        ({"loggers.mlflow.tracking_uri": "x"}, "create() has experiment_path for it"),
        ({"save_num_checkpoints_to_keep": 0}, "The export needs a checkpoint"),
        ({"save_num_checkpoints_to_keep": -2}, "must be an integer of at least 1, or -1 for all, not"),
        ({"save_num_checkpoints_to_keep": "3"}, "must be an integer of at least 1, or -1 for all, not"),
        ({"save_overwrite": True}, "a complete checkpoint is never overwritten"),
        ({"callbacks.load_checkpoint": {"load_path": "/x"}}, "it may run code; create() has custom_weights_path"),
        ({"device_train_microbatch_size": "auto"}, "must be an integer of at least 1, not 'auto'. It is planned"),
        ({"fsdp_config": {"activation_checkpointing": {}}}, "must be true or false, not"),
        ({"fsdp_config.reshard_after_forward": 1}, "must be true or false, not"),
        ({"callbacks.tundish_eval_prompts.max_seconds": "60"}, "must be a number of seconds"),
        ({"model.use_flash_attention_2": True}, "model.attn_implementation is the key for it"),
        ({"eval_first": True}, "no LLM Foundry key 'eval_first'"),
        ({"seed.x": 1}, "'seed.x' goes below a key that holds a single value"),
        ({"seed.x.y": 1}, "'seed.x.y' goes below a key that holds a single value"),
        ({"save_interval.x": 1}, "'save_interval.x' goes below a key that holds a single value"),
    ],
)
def test_a_wrong_override_is_named(overrides: dict[str, Any], found: str) -> None:
    """LLM Foundry would fail in the middle of the run, or run a file, or print a secret."""
    (problem,) = check_overrides(flat(overrides))
    assert problem.startswith("overrides: ") and found in problem


def test_all_wrong_overrides_are_told_together() -> None:
    """The caller would repair one key after the other."""
    assert len(check_overrides({"zzz": 1, "code_paths": [], "optimiser.lr": 1, "seed": 3})) == 3


def test_good_overrides_are_no_problem() -> None:
    """A key that LLM Foundry knows would be refused."""
    good = {"seed": 3, "optimizer.lr": 1e-3, "fsdp_config": {"activation_checkpointing": True}, "metadata.team": "x"}
    good |= {"save_folder": "s3://lab/checkpoints", "save_num_checkpoints_to_keep": -1}
    assert check_overrides(flat(good)) == [] and check_overrides({}) == []


def test_only_this_module_knows_llm_foundry_s_keys() -> None:
    """A key name in another pure module would have to be changed there too when LLM Foundry changes it."""
    source = Path(sys.modules["tundish"].__file__ or "").parent
    telling = [
        key for key in KEYS if key.startswith(("device_", "save_", "fsdp", "accumulate_")) and key != "save_folder"
    ]
    others = [
        path
        for path in source.rglob("*.py")
        if path.name not in ("foundry.py", "overrides.py") and "train" not in path.relative_to(source).parts
    ]
    assert len(telling) >= 7 and len(others) > 20
    assert not [f"{path.name}: {key}" for path in others for key in telling if key in path.read_text()]
