"""overrides.py: what is set reaches numbers and names that are known, and nothing else, of any type, at any depth."""

from pathlib import Path
from typing import Any

import pytest

from tundish.base.run_folder import RunFolder
from tundish.errors import SpecError
from tundish.plan.overrides import COMPONENTS, VALUES, check_overrides, flat, unused_overrides
from tundish.runs import planning

EVIL = "os.system"
GOOD: tuple[Any, ...] = (
    True, 1, 0.5, "10ba", "x", ["x"], [0.5, 0.5], {}, "fp32", "DEFAULT", "default", "inductor", "less", "hours", "last",
    "info", "norm", "decoupled_lionw", "cosine_with_warmup",
)  # fmt: skip
CHECKED_ELSEWHERE = {"global_train_batch_size", "save_folder", "model.attn_implementation"}


def _problems(given: dict[str, Any]) -> list[str]:
    return check_overrides(flat(given))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("eval_loader", [{"name": "finetuning", "label": "x", "dataset": {"preprocessing_fn": EVIL}}]),
        ("eval_loader", {"name": "finetuning", "dataset": {"hf_name": "x", "preprocessing_fn": EVIL}}),
        ("eval_loader.dataset.preprocessing_fn", EVIL),
        ("eval_loader.dataset", ["x"]),
        ("eval_loader.collate_fn", EVIL),
        ("eval_loaders", [{"name": "finetuning"}]),
        ("train_loader.dataset.preprocessing_fn", EVIL),
        ("train_loader", [{"name": "text"}]),
        ("train_loader.dataset", [{"hf_name": "x"}]),
        ("train_loader.dataset.streams.x.remote", "s3://evil/x"),
        ("icl_tasks", [{"dataset_uri": "x"}]),
        ("icl_tasks", "/etc/passwd"),
        ("eval_gauntlet", "x.yaml"),
        ("code_paths", ["x.py"]),
        ("code_paths", "x.py"),
        ("callbacks.async_eval", {"interval": "1ba", "instances": ["x"]}),
        ("callbacks.curriculum_learning", {"schedule": []}),
        ("callbacks.dataset_swap", {}),
        ("callbacks.generate_callback", {"prompts": ["x"], "interval": "1ba", "custom_generate": EVIL}),
        ("callbacks.hf_checkpointer", {"save_folder": "/x", "save_interval": "1ba", "flatten_imports": [EVIL]}),
        ("callbacks.load_checkpoint", {"load_path": "/x"}),
        ("callbacks.memory_snapshot.folder", "/etc"),
        ("callbacks.oom_observer.remote_file_name", "s3://evil/x"),
        ("callbacks.env_logging.workspace_dir", "/"),
        ("callbacks.memory_monitor.memory_keys", {"x": EVIL}),
        ("callbacks", [{"speed_monitor": {}}]),
        ("callbacks", "speed_monitor"),
        ("callbacks.speed_monitor", [1]),
        ("callbacks.speed_monitor", "x"),
        ("callbacks.speed_monitor.window_size", {"_target_": EVIL}),
        ("callbacks.early_stopper.comp", EVIL),
        ("callbacks.tundish_guard", {}),
        ("callbacks.tundish_schedule", {}),
        ("callbacks.tundish_events.events_path", "/x"),
        ("callbacks.tundish_eval_prompts.prompts", ["x"]),
        ("callbacks.no_such", {}),
        ("loggers", [{"wandb": {}}]),
        ("loggers.mlflow.tracking_uri", "x"),
        ("loggers.mosaicml", {}),
        ("loggers.wandb.init_kwargs", {"settings": {"_executable": "/bin/sh"}}),
        ("loggers.wandb", ["x"]),
        ("loggers.no_such", {}),
        ("algorithms.gated_linear_units.act_fn", EVIL),
        ("algorithms.alibi", {"max_sequence_length": 8}),
        ("algorithms", [["gradient_clipping", {}]]),
        ("algorithms.gradient_clipping", [1]),
        ("compile_config", [1]),
        ("compile_config.backend", EVIL),
        ("compile_config.options", {"cpp.cxx": ["/bin/sh"]}),
        ("model", ["x"]),
        ("model.config_overrides", {"auto_map": {"AutoModel": "x.py"}}),
        ("model.config_overrides.quantization_config", {"quant_method": "x"}),
        ("model.peft_config", {"peft_type": "LORA"}),
        ("model.pretrained_lora_id_or_path", "/x"),
        ("model.load_in_8bit", True),
        ("model.additional_train_metrics", [EVIL]),
        ("model.init_device", "meta"),
        ("model.trust_remote_code", True),
        ("tokenizer", ["x"]),
        ("tokenizer.kwargs", {"tokenizer_file": "/x"}),
        ("tokenizer.kwargs.trust_remote_code", True),
        ("optimizer.name", EVIL),
        ("optimizer.name", "no_op"),
        ("optimizer", ["adamw"]),
        ("optimizer.param_groups", [{"param_str_match": "(a+)+$"}]),
        ("optimizer.eps", 1e-8),
        ("scheduler.name", EVIL),
        ("scheduler", "x"),
        ("scheduler.t_max", [1]),
        ("scheduler.t_max", "soon"),
        ("fsdp_config", [1]),
        ("fsdp_config.mixed_precision", {"param_dtype": "x"}),
        ("fsdp_config.auto_microbatching", True),
        ("metadata", ["x"]),
        ("metadata.x", {"y": [{"z": 1}]}),
        ("metadata.x", "???"),
        ("precision", ["fp32"]),
        ("seed", {"x": 1}),
        ("seed", "17"),
        ("save_ignore_keys", "state/*"),
        ("save_ignore_keys", [{"x": 1}]),
        ("python_log_level", "verbose"),
        ("save_interval", [1]),
        ("dist_timeout", "long"),
        ("dist_timeout", float("nan")),
        ("profiler", {}),
        ("variables", {"x": 1}),
        ("load_path", ["x"]),
        ("autoresume", True),
    ],
)
def test_what_reaches_more_than_numbers_is_refused_however_it_is_written(path: str, value: Any) -> None:
    """A YAML file from somebody else could name functions, modules, programs and files for LLM Foundry to run."""
    nested: Any = value
    for part in reversed(path.split(".")):
        nested = {part: nested}
    first, _, rest = path.partition(".")
    for given in ({path: value}, nested, {first: {rest: value}} if rest else nested):
        problems = _problems(given)
        assert problems and all(
            problem.startswith("overrides: '") or "no LLM Foundry key" in problem for problem in problems
        )


@pytest.mark.parametrize("path", sorted(set(VALUES) - CHECKED_ELSEWHERE))
def test_each_key_takes_some_value_and_no_other_type(path: str) -> None:
    """A key would be listed that nobody can set, or take lists and mappings, whose content nobody looks at."""
    assert any(not _problems({path: value}) for value in GOOD), path
    for value in ([{"x": 1}], {"x": 1}, [["x"]], object(), {"x": {"y": EVIL}}):
        assert _problems({path: value}), path
    assert _problems({f"{path}.x": 1}), path


def test_a_component_is_set_alone_or_with_what_it_takes() -> None:
    """`callbacks.nan_monitor: {}` is how a callback is added."""
    for section, components in COMPONENTS.items():
        for name in components:
            assert not _problems({section: {name: {}}}) and not _problems({f"{section}.{name}": None})


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({"callbacks.speedmonitor": {}}, "'callbacks' has no key 'speedmonitor'. Did you mean speed_monitor"),
        ({"callbacks.speed_monitor.windowsize": 1}, "no key 'windowsize'. Did you mean window_size?"),
        ({"lr": 1}, "a run has no LLM Foundry key 'lr'. Did you mean optimizer.lr?"),
        ({"t_warmup": "10ba"}, "Did you mean scheduler.t_warmup?"),
        (
            {"scheduler.name": "cosine_with_warmups"},
            "must be linear_decay_with_warmup or constant_with_warmup or cos",
        ),
        ({"loggers.wandb.entities": "x"}, "'loggers.wandb' has no key 'entities'. Did you mean entity?"),
        ({"algorithms.x": {}}, "'algorithms' has no key 'x'. It has gradient_clipping."),
        ({"train_loader": ["x" * 1000]}, "'train_loader' is a section, and cannot be a list. Set the keys below it."),
    ],
)
def test_a_refusal_names_what_is_near(given: dict[str, Any], found: str) -> None:
    """The caller would have to read LLM Foundry's source."""
    (problem,) = _problems(given)
    assert found in problem


def test_keys_of_an_optimizer_or_schedule_are_its_own() -> None:
    """`optimizer.eps` of an optimizer that has none would end the run in training."""
    assert not _problems({"optimizer": {"name": "decoupled_adamw", "eps": 1e-8}})
    assert not _problems({"scheduler": {"name": "cosine_with_warmup", "alpha_f": 0.1}})
    assert _problems({"optimizer.name": "clip_lion", "optimizer.eps": 1e-8})
    assert _problems({"scheduler.name": "cosine_with_warmup", "scheduler.alpha_i": 1})


@pytest.mark.parametrize(
    "given",
    [
        {"metadata.api_key": "x"},
        {"metadata": {"wandb": {"api_key": "x"}}},
        {"loggers.wandb.api_key": "x"},
        {"loggers": {"wandb": {"password": "x"}}},
        {"model.use_auth_token": "x"},
        {"metadata.token": "x"},
        {"metadata.note": "https://me:hunter22@host/x"},
        {"metadata.note": "hf_" + "a" * 30},
    ],
)
def test_secrets_are_refused_with_the_variable_to_use(given: dict[str, Any]) -> None:
    """They would stand in spec.json, foundry.yaml, logs and MLflow."""
    (problem,) = _problems(given)
    assert "which a run's files would show" in problem and "HF_TOKEN, WANDB_API_KEY" in problem
    assert "hunter22" not in problem and "a" * 30 not in problem


def test_a_secret_of_the_environment_is_refused_as_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever pastes it where it does not belong publishes it."""
    monkeypatch.setenv("WANDB_API_KEY", "s3cretvalue")
    assert _problems({"loggers.wandb.project": "s3cretvalue"}) and not _problems({"metadata.team": "lab"})


@pytest.mark.parametrize("name", ["tokens", "max_tokens", "pad_token", "eos_token", "tokenizer", "keyboard", "passes"])
def test_words_like_those_of_secrets_are_none(name: str) -> None:
    """Facts about a run could not be noted."""
    assert not _problems({f"metadata.{name}": "x"})


@pytest.mark.parametrize(
    ("given", "argument"),
    [
        ({"eval_loader.num_workers": 1}, "eval_data_path"),
        ({"eval_loader": {"dataset": {"shuffle": False}}}, "eval_data_path"),
        ({"eval_interval": "1ep"}, "eval_data_path"),
        ({"eval_subset_num_batches": 1}, "eval_data_path"),
        ({"device_eval_batch_size": 1}, "eval_data_path"),
        ({"callbacks.tundish_eval_prompts.max_seconds": 1}, "eval_prompts"),
        ({"load_strict_model_weights": False}, "custom_weights_path"),
    ],
)
def test_what_a_run_has_no_use_for_is_refused(arguments: dict[str, Any], given: dict[str, Any], argument: str) -> None:
    """The caller would believe that it was heeded."""
    (problem,) = unused_overrides(given, arguments)
    assert f"has no effect without {argument}" in problem and not unused_overrides(given, {argument: "x"})
    with pytest.raises(SpecError, match=f"has no effect without {argument}"):
        planning.plan(arguments | {"overrides": given})


def test_dots_mean_the_same_at_every_depth(arguments: dict[str, Any]) -> None:
    """What was checked as one key would be merged as another."""
    given = {"callbacks": {"speed_monitor.window_size": 7}, "optimizer": {"lr": 0.5}}
    spec = planning.plan(arguments | {"overrides": given}).spec
    assert spec.overrides == {"callbacks.speed_monitor.window_size": 7, "optimizer.lr": 0.5}


@pytest.mark.parametrize("variable", ["TUNDISH_HOME", "MLFLOW_TRACKING_URI"])
def test_nothing_that_is_resolved_reaches_the_yaml(
    arguments: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    """The secret would stand in the run's log, by way of the name of a folder that no argument holds."""
    monkeypatch.setenv(variable, str(tmp_path / "${oc.env:SECRET}"))
    with pytest.raises(SpecError, match=r"'\$\{' is not allowed there"):
        planning.plan(arguments)
    assert not RunFolder.of("x").folder.exists()
