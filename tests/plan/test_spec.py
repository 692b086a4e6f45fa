"""spec.py: arguments become values once, and all problems are told together."""

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from tundish.errors import SpecError
from tundish.plan.compute import Compute, count_gpus
from tundish.plan.spec import Duration, RunSpec, parse_spec

NOW = "2026-11-21T10:00:00+00:00"


def _parse(arguments: dict[str, Any], **changes: Any) -> RunSpec:
    return parse_spec(arguments | changes, created_at=NOW)[0]


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("3ep", 3, "ep"),
        ("100ba", 100, "ba"),
        ("1_000_000tok", 1_000_000, "tok"),
        (" 10 ep ", 10, "ep"),
        ("1000000tok", 10**6, "tok"),
    ],
)
def test_durations_are_read(text: str, value: int, unit: str) -> None:
    """A run would train for another time than was asked for."""
    duration = Duration.parse(text)
    assert (duration.value, duration.unit) == (value, unit)
    assert Duration.parse(str(duration)) == duration


@pytest.mark.parametrize(
    "given",
    [
        "",
        "3",
        "ep",
        "3 epochs",
        "-1ep",
        "0ep",
        "000ba",
        "1.5ep",
        "1e6tok",
        "3ep4",
        "_1ep",
        "1_ep",
        "1__0ep",
        3,
        "\uff13ep",
    ],
)
def test_malformed_durations_are_refused_with_examples(given: object) -> None:
    """A typo would train for ever, not at all, or end in Python's own message about int()."""
    with pytest.raises(
        ValueError, match=re.escape(f"must be a positive integer followed by ep, ba or tok, not {given!r}")
    ):
        Duration.parse(given)


def test_what_is_not_given_is_what_the_service_did(arguments: dict[str, Any], tiny_model: Path) -> None:
    """A notebook that relies on the defaults would get another run."""
    spec = _parse(arguments)
    assert spec.task_type == "CHAT_COMPLETION"
    assert str(spec.training_duration) == "1ep"
    assert spec.learning_rate == 5e-7
    assert spec.context_length == 512, "the model's maximum, as it is less than 8192"
    assert spec.validate_inputs is True
    assert (spec.eval_data_path, spec.eval_prompts, spec.custom_weights_path, spec.data_prep_cluster_id) == (
        None,
        (),
        None,
        None,
    )
    assert (spec.compute.device, spec.compute.devices, spec.compute.launcher) == ("cpu", 1, "local")
    assert spec.model == str(tiny_model.resolve())
    assert (spec.created_at, bool(spec.created_by)) == (NOW, True)
    assert _parse(arguments, model="meta-llama/Llama-3.1-8B").context_length == 8192
    assert _parse(arguments, model="meta-llama/Meta-Llama-3.1-405B-Instruct").learning_rate == 1e-5


@pytest.mark.parametrize(
    ("task_type", "model", "pattern"),
    [
        ("CHAT_COMPLETION", None, r"chat-tiny-llama-[a-z0-9]{6}"),
        ("INSTRUCTION_FINETUNE", "meta-llama/Llama-3.1-70B-Instruct", r"ift-meta-llama-3-1-70b-instruct-[a-z0-9]{6}"),
        ("CONTINUED_PRETRAIN", "mistralai/Mistral-7B-v0.1", r"cpt-mistral-7b-v0-1-[a-z0-9]{6}"),
    ],
)
def test_run_names_look_like_the_service_s(
    arguments: dict[str, Any], task_type: str, model: str | None, pattern: str
) -> None:
    """Scripts that find runs by their prefix would find none; two runs would get one name."""
    changes = {"task_type": task_type} | ({"model": model} if model else {})
    names = {_parse(arguments, **changes).run_name for _ in range(5)}
    assert len(names) == 5 and all(re.fullmatch(pattern, name) for name in names)


@pytest.mark.parametrize("empty", [None, ""])
def test_falsy_arguments_mean_the_default(arguments: dict[str, Any], empty: str | None) -> None:
    """The original accepts `experiment_path=""` and falsy task types; so must we."""
    names = (
        "task_type",
        "experiment_path",
        "eval_data_path",
        "custom_weights_path",
        "training_duration",
        "learning_rate",
    )
    spec = _parse(arguments, **dict.fromkeys(names, empty))
    assert spec.task_type == "CHAT_COMPLETION" and str(spec.training_duration) == "1ep" and spec.learning_rate == 5e-7
    assert re.fullmatch(rf"/Users/[^/]+/{spec.run_name}", spec.experiment_path)
    assert spec.eval_data_path is spec.custom_weights_path is None


@pytest.mark.parametrize(("given", "rate"), [("5e-7", 5e-7), (1e-5, 1e-5), ("0.001", 0.001), (1, 1.0)])
def test_learning_rates_come_as_numbers_or_text(arguments: dict[str, Any], given: object, rate: float) -> None:
    """Notebooks pass `"5e-7"`; it would be refused or stay text."""
    assert _parse(arguments, learning_rate=given).learning_rate == rate


@pytest.mark.parametrize(
    ("name", "given", "found"),
    [
        ("model", None, "model: is missing"),
        ("model", 5, "model: must be text, not int"),
        ("model", "no/such", "model: 'no/such' is neither a supported model nor a folder"),
        ("train_data_path", None, "train_data_path: is missing"),
        ("train_data_path", "${oc.env:HOME}/x.jsonl", "must not contain '${'"),
        ("register_to", "", "register_to: must not be empty"),
        ("register_to", "main", "register_to: must be 'catalog.schema' or 'catalog.schema.name', not 'main'"),
        ("register_to", "a.b.c.d", "'catalog.schema.name', not 'a.b.c.d'"),
        ("register_to", "a..b", "'catalog.schema.name', not 'a..b'"),
        ("register_to", "a.b/../c", "'catalog.schema.name', not 'a.b/../c'"),
        ("experiment_path", "${oc.env:SECRET}", "experiment_path: must not contain '${', but is '${oc.env:SECRET}'"),
        ("task_type", "CHAT", "must be CHAT_COMPLETION, INSTRUCTION_FINETUNE or CONTINUED_PRETRAIN, not 'CHAT'"),
        ("task_type", ["CHAT_COMPLETION"], "CONTINUED_PRETRAIN, not ['CHAT_COMPLETION']"),
        ("training_duration", "3 epochs", "must be a positive integer followed by ep, ba or tok, not '3 epochs'"),
        ("learning_rate", "fast", "learning_rate: must be a number above 0, not 'fast'"),
        ("learning_rate", -1.0, "above 0, not -1.0"),
        ("learning_rate", 0, "above 0, not 0."),
        ("learning_rate", "nan", "above 0, not 'nan'"),
        ("learning_rate", math.inf, "above 0, not inf"),
        ("context_length", 513, "context_length: must be at most 512, the maximum of"),
        ("context_length", 0, "context_length: must be an integer of at least 8, not 0."),
        ("context_length", "512", "integer of at least 8, not '512'"),
        ("context_length", True, "integer of at least 8, not True"),
        ("validate_inputs", "false", "validate_inputs: must be true or false, not 'false'"),
        ("validate_inputs", 0, "validate_inputs: must be true or false, not 0"),
        ("eval_prompts", "What?", "eval_prompts: must be a list of texts"),
        ("eval_prompts", ["What?", ""], "eval_prompts: must be a list of texts"),
        ("eval_prompts", [1], "eval_prompts: must be a list of texts"),
        ("eval_prompts", ["${oc.env:HOME}"], "must not contain '${' or be '???'"),
        ("eval_prompts", ["???"], "must not contain '${' or be '???'"),
        ("eval_prompts", itertools.repeat("What?"), "4,000,000 characters in total, not more than 1,000 prompts"),
        ("eval_prompts", ["x" * 5_000_000], "in total, not 5,000,000 characters"),
        ("eval_prompts", 5, "eval_prompts: must be a list of texts"),
        ("learning_rate", True, "above 0, not True"),
        ("data_prep_cluster_id", "0123-456", "for 4 processes, not '0123-456'"),
        ("data_prep_cluster_id", "sc://host:443/;token=Gehe1mnis", "'sc://host:443/;token=***' contains a password"),
        ("run_name", "../x", "digits, '-' and '_', the first a letter or digit, not '../x'"),
        ("run_name", "-x", "letter or digit, not '-x'"),
        ("run_name", "a b", "letter or digit, not 'a b'"),
        ("run_name", "x" * 101, "must be 1 to 100 letters"),
        ("compute", {"gpus": 8}, "compute: has no key gpus; its keys are device, devices_per_node"),
        ("compute", {"device": "tpu"}, "compute: device must be gpu or cpu, not 'tpu'"),
        ("compute", {"devices_per_node": 0}, "compute: devices_per_node must be an integer of at least 1, not 0"),
        ("compute", {"nodes": "2"}, "compute: nodes must be an integer of at least 1, not '2'"),
        ("compute", {"launcher": "ray"}, "launcher must be local or slurm, not 'ray'"),
        ("compute", "gpu", "compute: must be a mapping, not 'gpu'"),
        ("overrides", "a=b", "overrides: must be a mapping of LLM Foundry keys"),
        ("overrides", {1: 2}, "overrides: must be a mapping of LLM Foundry keys"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_named_with_what_is_allowed(
    arguments: dict[str, Any], name: str, given: object, found: str
) -> None:
    """The run would fail later, or the message would not say what to change."""
    with pytest.raises(SpecError) as error:
        _parse(arguments, **{name: given})
    assert len(error.value.problems) == 1
    assert found in error.value.message


def test_all_problems_are_told_together() -> None:
    """The caller would repair one argument after the other."""
    wrong = {
        "model": "no/such",
        "train_data_path": "",
        "register_to": "main",
        "task_type": "CHAT",
        "training_duration": "soon",
        "learning_rate": "fast",
        "eval_prompts": "What?",
        "run_name": "a b",
        "compute": {"gpus": 8},
        "overrides": 1,
    }
    with pytest.raises(SpecError) as error:
        parse_spec(wrong, created_at=NOW)
    named = "model task_type run_name train_data_path register_to eval_prompts training_duration learning_rate"
    named += " compute overrides"
    assert [problem.split(":")[0] for problem in error.value.problems] == named.split()


def test_the_name_of_an_existing_run_is_refused(arguments: dict[str, Any], home: Path) -> None:
    """Two runs would write into one folder."""
    (home / "runs" / "mine").mkdir(parents=True)
    with pytest.raises(SpecError, match=r"run_name: run 'mine' already exists\. Choose another name"):
        _parse(arguments, run_name="mine")
    assert _parse(arguments, run_name="mine-2").run_name == "mine-2"


def test_a_spec_is_read_back_as_it_was_written(arguments: dict[str, Any]) -> None:
    """The supervisor would run something else than was accepted."""
    spec = _parse(
        arguments,
        task_type="INSTRUCTION_FINETUNE",
        eval_prompts=["Wie heißt du?"],
        training_duration="1_000tok",
        learning_rate="1e-4",
        overrides={"optimizer.lr": 1e-3, "callbacks": {"lr_monitor": {}}},
        compute={"devices_per_node": 2},
        validate_inputs=False,
    )
    text = spec.to_json()
    assert RunSpec.from_json(text) == spec
    assert json.loads(text)["eval_prompts"] == ["Wie heißt du?"] and "heißt" in text


@pytest.mark.parametrize(
    ("given", "registered"), [("main.lab", "main.lab.run-1"), ("main.lab.dates", "main.lab.dates")]
)
def test_the_registered_name_has_three_parts(arguments: dict[str, Any], given: str, registered: str) -> None:
    """The model would be registered under a name that the caller did not give."""
    assert _parse(arguments, register_to=given, run_name="run-1").registered_name == registered


def test_all_problems_of_compute_are_reported_at_once() -> None:
    """Each would be found by another call."""
    wrong = {"device": "tpu", "nodes": 0, "gpus": 8, "device_memory_gib": -1, "time_limit": "soon", "sbatch": ["x"]}
    with pytest.raises(SpecError) as error:
        Compute.parse({**wrong, "launcher": "slurm"})
    assert len(error.value.problems) == 7, error.value.problems
    for words in (*wrong, "devices_per_node is missing"):
        assert words in error.value.message


def test_compute_counts_all_devices() -> None:
    """World size, and with it the batch size, would be wrong."""
    assert Compute(device="gpu", devices_per_node=8, nodes=4).devices == 32
    parsed = Compute.parse({"device": "cpu", "devices_per_node": 2})
    assert parsed.devices == 2 and 0.1 < parsed.device_memory_gib < 100_000
    given = Compute(device="gpu", devices_per_node=3)
    assert Compute.parse(given) is given


def test_no_gpu_is_counted_that_this_process_may_not_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run would be planned on GPUs that are hidden from it."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert count_gpus() == 0


@pytest.mark.parametrize(
    ("limit", "grace", "good"),
    [("5", 300, False), ("6", 300, True), ("5:30", 300, True), ("00:05:00", 300, False), ("1-00", 300, True),
     ("0-00:01", 30, True), ("1:00", 60, False)],
)  # fmt: skip
def test_a_time_limit_leaves_time_before_its_end(limit: str, grace: int, good: bool) -> None:
    """The signal to save would come before the run has begun, and end it without a word."""
    given = {"launcher": "slurm", "devices_per_node": 1, "time_limit": limit, "grace_s": grace}
    if good:
        assert Compute.parse(given).time_limit == limit
    else:
        with pytest.raises(ValueError, match="Raise time_limit, or lower grace_s"):
            Compute.parse(given)


@pytest.mark.parametrize(
    "given",
    [
        {"launcher": "slurm"},
        {"launcher": "slurm", "devices_per_node": 1, "sbatch": {"wrap": "x"}},
        {"launcher": "slurm", "devices_per_node": 1, "sbatch": {"account": "a b"}},
        {"launcher": "slurm", "devices_per_node": 1, "time_limit": "soon"},
        {"sbatch": {"partition": "gpu"}},
        {"time_limit": "1:00:00"},
        {"grace_s": 60},
        {"launcher": "slurm", "devices_per_node": 1, "sbatch": {"comment": "hf_" + "a" * 30}},
        {"launcher": "ssh"},
    ],
)
def test_what_makes_no_job_is_refused(given: dict[str, Any]) -> None:
    """Text of an argument would become another option of the job, or be ignored."""
    with pytest.raises(ValueError, match=r"must|missing|can only be|cannot be set|contains a secret|has no key"):
        Compute.parse(given)


def test_an_option_that_names_a_secret_is_told_what_to_set_instead() -> None:
    """The secret would stand in the job's script, for all who can read it."""
    with pytest.raises(ValueError, match=r"sbatch: 'api_key' cannot be set.*HF_TOKEN, WANDB_API_KEY"):
        Compute.parse({"launcher": "slurm", "devices_per_node": 1, "sbatch": {"api_key": "x"}})
