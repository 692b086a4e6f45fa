"""The `overrides` argument: LLM-Foundry keys that a caller may set, and those that a run depends on."""

import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import yaml

from tundish.errors import did_you_mean
from tundish.paths import yamls_dir

KEYS = frozenset(
    """model tokenizer optimizer scheduler train_loader eval_loader device_eval_batch_size seed precision dist_timeout
    fsdp_config accumulate_train_batch_on_tokens eval_interval loggers progress_bar log_to_console python_log_level
    console_log_interval callbacks algorithms save_folder save_weights_only save_interval save_overwrite
    save_latest_filename
    save_num_checkpoints_to_keep load_ignore_keys load_strict_model_weights save_ignore_keys train_subset_num_batches
    device_train_microbatch_size global_train_batch_size spin_dataloaders eval_subset_num_batches compile_config
    metadata autoresume""".split()
)
"""LLM Foundry's top-level keys that a run uses and a caller may set; a test compares them with LLM Foundry's own."""

LESS_MEMORY = "Lower device_train_microbatch_size, or set fsdp_config.activation_checkpointing to true, by overrides"
"""What to do where a step does not fit."""
REFUSED: Mapping[str, str] = {
    "code_paths": "it would run any file; tundish runs no code from configuration",
    "model.trust_remote_code": "it would run code that comes with the weights",
    "tokenizer.kwargs.trust_remote_code": "it would run code that comes with the tokenizer",
    "load_path": "create() has custom_weights_path for it, which checks what is loaded",
    "load_weights_only": "create() has custom_weights_path for it",
    "run_name": "create() has run_name for it",
    "max_duration": "create() has training_duration for it",
    "max_seq_len": "create() has context_length for it",
    "tokenizer.kwargs.model_max_length": "create() has context_length for it",
    "train_loader.dataset.max_seq_len": "create() has context_length for it",
    "eval_loader.dataset.max_seq_len": "create() has context_length for it",
    "model.pretrained_model_name_or_path": "create() has model for it",
    "tokenizer.name": "create() has model for it, and the data is prepared with its tokenizer",
    "model.name": "only tundish_causal_lm keeps packed samples from seeing each other",
    "model.pretrained": "a run fine-tunes the weights of its model",
    "model.use_flash_attention_2": "model.attn_implementation is the key for it",
    "train_loader.name": "only tundish_packed reads the prepared data",
    "eval_loader.name": "only tundish_packed reads the prepared data",
    "train_loader.dataset.local": "create() has train_data_path for it",
    "eval_loader.dataset.local": "create() has eval_data_path for it",
    "save_overwrite": "a complete checkpoint is never written over",
    "save_latest_filename": "latest-sharded-rank0.symlink is where others look for it",
    "callbacks.load_checkpoint": "it may run code; create() has custom_weights_path, which runs none",
    "callbacks.checkpoint_saver": "save_interval is the key for it",
    "save_weights_only": "a run that is killed goes on from its checkpoints",
    "autoresume": "a run goes on from its newest checkpoint by itself; after its end, with resume()",
    "save_filename": "the export looks for checkpoints named ep#-ba#",
    "fsdp_config.state_dict_type": "the export reads sharded checkpoints",
    "loggers.mlflow": "create() has experiment_path for it; MLFLOW_TRACKING_URI chooses the store",
    "callbacks.tundish_events": "the run's events are written by it",
    "callbacks.tundish_schedule": "it sets each step's learning rate; scheduler and learning_rate say which",
    "callbacks.tundish_guard": "it stops a run that learns nothing",
}
"""Keys that a run depends on, or that would run code, each with the reason; what is below them is refused too."""

SECTIONS: Mapping[str, frozenset[str]] = {
    "optimizer": frozenset("name lr betas weight_decay eps".split()),
    "scheduler": frozenset("name t_warmup t_max alpha_i alpha_f scale_warmup".split()),
    "train_loader": frozenset("dataset num_workers".split()),
    "train_loader.dataset": frozenset("shuffle shuffle_seed target_responses".split()),
    "eval_loader": frozenset("dataset num_workers".split()),
    "eval_loader.dataset": frozenset("shuffle shuffle_seed".split()),
    "fsdp_config": frozenset(
        "activation_checkpointing activation_cpu_offload reshard_after_forward mixed_precision verbose".split()
    ),
    "tokenizer": frozenset(("kwargs",)),
}
"""Sections whose keys are all known. Of `optimizer` and `scheduler` only as long as their name stays."""


SWITCHES = ("fsdp_config.activation_checkpointing", "fsdp_config.reshard_after_forward")
MAX_SECONDS = "callbacks.tundish_eval_prompts.max_seconds"
TARGET_RESPONSES = "train_loader.dataset.target_responses"
"""Which of the assistant's replies are targets, in training and in evaluation: `all` (default) or `last`."""


def target_responses(given: Mapping[str, Any]) -> Literal["all", "last"]:
    """What the overrides say of TARGET_RESPONSES."""
    return "last" if flat(given).get(TARGET_RESPONSES) == "last" else "all"


def save_root(given: Mapping[str, Any]) -> str | None:
    """Where the overrides put the checkpoints: each run has a folder of its own below."""
    return flat(given).get("save_folder")


def flat(given: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that is set, by its dotted path; a later one wins."""
    return {path: value for key, top in given.items() for path, value in _leaves(key, top)}


def check_overrides(given: Mapping[Any, Any]) -> list[str]:
    """Problems of the `overrides` argument, one sentence each; empty when all is well."""
    # Keys that are no text are told by the spec's own check.
    leaves = [leaf for key, value in given.items() if isinstance(key, str) for leaf in _leaves(key, value)]
    renamed = {path.split(".")[0] for path, _ in leaves if path in ("optimizer.name", "scheduler.name")}
    base = yaml.safe_load((yamls_dir() / "base.yaml").read_text())
    problems = (_problem(path, value, base, renamed) for path, value in leaves)
    return [f"overrides: {problem}" for problem in problems if problem]


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Dotted path and value of everything that is set."""
    if isinstance(value, Mapping) and value:
        for key, below in value.items():
            yield from _leaves(f"{path}.{key}", below)
    else:
        yield path, value


def _problem(path: str, value: Any, base: Mapping[str, Any], renamed: set[str]) -> str | None:
    parts = path.split(".")
    refused = next((key for key in REFUSED if path == key or path.startswith(f"{key}.")), None)
    if refused is not None:
        return f"{path!r} is not allowed: {REFUSED[refused]}."
    if path == "save_num_checkpoints_to_keep" and (type(value) is not int or (value < 1 and value != -1)):
        return f"{path!r} is {value!r}; the export needs a checkpoint. Allowed is 1 or more, or -1 for all."
    if path == "device_train_microbatch_size" and (type(value) is not int or value < 1):
        return f"{path!r} is {value!r}; allowed is a number of rows, 1 or more. Leave it out, and it is planned."
    if path in SWITCHES and not isinstance(value, bool):
        return f"{path!r} is {value!r}; allowed is true or false. Leave it out, and it is planned."
    if path == MAX_SECONDS and (isinstance(value, bool) or not isinstance(value, int | float) or value <= 0):
        return f"{path!r} is {value!r}; allowed is a number of seconds above 0."
    if path == TARGET_RESPONSES and value not in ("all", "last"):
        return f"{path!r} is {value!r}; allowed is all or last."
    if parts[0] not in KEYS:
        return f"a run has no LLM-Foundry key {parts[0]!r}. {_hint(parts[0], KEYS)}"
    for depth in range(1, len(parts)):
        section = ".".join(parts[:depth])
        if section in SECTIONS and section not in renamed and parts[depth] not in SECTIONS[section]:
            return f"{section!r} has no key {parts[depth]!r}. {_hint(parts[depth], SECTIONS[section])}"
    return _shape_problem(path, parts, value, base)


def _shape_problem(path: str, parts: list[str], value: Any, base: Mapping[str, Any]) -> str | None:
    node: Any = base
    for part in parts[:-1]:
        node = node.get(part, {}) if isinstance(node, Mapping) else None
    if not isinstance(node, Mapping):
        return f"{path!r} goes below a key that holds a single value. Shorten it."
    if isinstance(node.get(parts[-1]), Mapping) and not isinstance(value, Mapping):
        return f"{path!r} is a section; found {value!r}. Set the keys below it."
    if "${" in repr(value):
        return f"{path!r} holds '${{', which LLM Foundry would resolve. Write the value itself."
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return f"{path!r} is a {type(value).__name__}; allowed are text, numbers, lists and mappings. Write it as text."
    return None


def _hint(word: str, known: frozenset[str]) -> str:
    return did_you_mean(word, known).strip() or f"It has {', '.join(sorted(known))}."
