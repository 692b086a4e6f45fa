"""The `overrides` argument: LLM Foundry keys that a caller may set, with what they take, and those that a run needs.

What is not listed here is refused, at every depth: LLM Foundry's sections can name functions, modules, files and other
programs to run.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tundish.base.text import INSTEAD_OF_SECRETS, names_secret, redacted
from tundish.errors import did_you_mean

LESS_MEMORY = "Lower device_train_microbatch_size, or set fsdp_config.activation_checkpointing to true, by overrides"
"""What to do where a step does not fit into memory."""


@dataclass(frozen=True, slots=True)
class Value:
    """What a key takes."""

    says: str
    """As in "must be …"."""
    takes: Callable[[Any], bool]
    advice: str = ""
    """A sentence that follows."""


def _one_of(*texts: str) -> Value:
    return Value(" or ".join(texts), lambda value: value in texts)


def _integer(least: int, advice: str = "", *, or_all: bool = False) -> Value:
    return Value(
        f"an integer of at least {least}{', or -1 for all' if or_all else ''}",
        lambda value: type(value) is int and (value >= least or (or_all and value == -1)),
        advice,
    )


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable() and len(value) <= LONGEST_TEXT and value != "???"


def _all(value: Any, check: Callable[[Any], bool]) -> bool:
    return isinstance(value, list | tuple) and all(check(one) for one in value)


LONGEST_TEXT = 10_000
SWITCH = Value("true or false", lambda value: isinstance(value, bool))
COUNT = _integer(1)
NUMBER = Value("a number", _is_number)
POSITIVE = Value("a number above 0", lambda value: _is_number(value) and value > 0)
SECONDS = Value("a number of seconds above 0", POSITIVE.takes)
NUMBERS = Value("a list of numbers", lambda value: _all(value, _is_number))
TEXT = Value("text of one line", _is_text)
TEXTS = Value("a list of texts", lambda value: _all(value, _is_text))
_TIME = re.compile(r"\s*\d[\d_]*(ep|ba|tok|sp|iter|sec)\s*|\s*(\d*\.)?\d+(e-?\d+)?\s*dur\s*")
TIME = Value(
    "an integer, or text such as 10ba, 1ep or 0.1dur",
    lambda value: type(value) is int or (isinstance(value, str) and _TIME.fullmatch(value) is not None),
)
FACT = Value(
    "text, a number, true or false, or a list of them",
    lambda value: value is None
    or isinstance(value, bool)
    or any(check(value) for check in (_is_text, _is_number))
    or _all(value, lambda one: isinstance(one, bool) or _is_text(one) or _is_number(one)),
)
NOTHING = Value("nothing, {}", lambda value: value is None or value == {})
PLANNED = "It is planned where it is left out."
ELSEWHERE = Value("", lambda value: True)
"""Of keys whose values are checked with the devices or the model."""

OPTIMIZERS: Mapping[str, Mapping[str, Value]] = {
    "tundish_decoupled_lionw": {},
    "decoupled_lionw": {},
    "decoupled_adamw": {"eps": POSITIVE, "amsgrad": SWITCH},
    "clip_lion": {"outlier_threshold": POSITIVE},
    "adalr_lion": {"outlier_threshold": POSITIVE, "timeout": COUNT, "lr_penalty": POSITIVE, "min_scale": POSITIVE},
}
SCHEDULERS: Mapping[str, Mapping[str, Value]] = {
    "linear_decay_with_warmup": {"alpha_i": NUMBER, "alpha_f": NUMBER, "t_max": TIME, "scale_warmup": SWITCH},
    "constant_with_warmup": {"alpha": NUMBER, "t_max": TIME, "scale_warmup": SWITCH},
    "cosine_with_warmup": {"alpha_f": NUMBER, "t_max": TIME, "scale_warmup": SWITCH},
    "inv_sqrt_with_warmup": {
        "t_scale": TIME, "t_cooldown": TIME, "t_max": TIME, "alpha_f_decay": NUMBER, "alpha_f_cooldown": NUMBER,
    },
}  # fmt: skip
"""What each accepts besides the keys that all of them accept."""
COMPONENTS: Mapping[str, Mapping[str, Mapping[str, Value]]] = {
    "callbacks": {
        "early_stopper": {
            "monitor": TEXT, "dataloader_label": TEXT, "comp": _one_of("less", "greater"), "min_delta": NUMBER,
            "patience": TIME,
        },
        "fdiff_metrics": {"diff_train_metrics": SWITCH, "diff_eval_metrics": SWITCH},
        "global_lr_scaling": {"lr_scale": POSITIVE, "wd_pct": NUMBER},
        "kill_loss_spike": {
            "log_only": SWITCH, "patience": COUNT, "outlier_multiplier": POSITIVE, "window_size": COUNT,
            "loss_cap": POSITIVE,
        },
        "layer_freezing": {"layer_names": TEXTS},
        "lr_monitor": {},
        "memory_monitor": {"dist_aggregate_batch_interval": COUNT},
        "nan_monitor": {},
        "optimizer_monitor": {"log_optimizer_metrics": SWITCH, "batch_log_interval": COUNT},
        "run_timeout": {"timeout": COUNT},
        "runtime_estimator": {"skip_batches": COUNT, "time_unit": _one_of("seconds", "minutes", "hours", "days")},
        "scheduled_gc": {"batch_interval": COUNT, "gen_1_batch_interval": COUNT, "eval_keep_disabled": SWITCH},
        "speed_monitor": {
            "window_size": COUNT, "gpu_flops_available": POSITIVE,
            "time_unit": _one_of("seconds", "minutes", "hours", "days"),
        },
        "system_metrics_monitor": {"log_all_data": SWITCH},
        "tundish_eval_prompts": {"max_seconds": SECONDS},
    },
    "loggers": {
        "inmemory": {},
        "tensorboard": {"log_dir": TEXT, "flush_interval": COUNT, "rank_zero_only": SWITCH},
        "wandb": {
            "project": TEXT, "group": TEXT, "name": TEXT, "entity": TEXT, "tags": TEXTS, "rank_zero_only": SWITCH,
        },
    },
    "algorithms": {
        "gradient_clipping": {"clipping_type": _one_of("norm", "value", "adaptive"), "clipping_threshold": POSITIVE},
    },
}  # fmt: skip
"""By their names in LLM Foundry's registry: those that only look at numbers, or change them."""
_LOADER: Mapping[str, Value] = {
    "num_workers": _integer(0), "dataset.shuffle": SWITCH, "dataset.shuffle_seed": _integer(0),
}  # fmt: skip
PATHS = ("save_folder", "loggers.tensorboard.log_dir")
"""Keys that hold an address: relative ones start from the caller's folder."""
BATCH_SIZE = "global_train_batch_size"
ATTENTION = "model.attn_implementation"
WARM_UP_KEY = "scheduler.t_warmup"
CHOICES: Mapping[str, str] = {
    "device_train_microbatch_size": "microbatch",
    "fsdp_config.activation_checkpointing": "activation_checkpointing",
    "fsdp_config.reshard_after_forward": "reshard_after_forward",
}
"""Keys that the memory planner chooses where the overrides do not, and its fields for them."""
MAX_SECONDS = "callbacks.tundish_eval_prompts.max_seconds"
TARGET_RESPONSES = "train_loader.dataset.target_responses"
"""Which of the assistant's replies are targets, in training and evaluation: `all` (default) or `last`."""
VALUES: Mapping[str, Value] = {
    "seed": _integer(0),
    "precision": _one_of("fp32", "amp_bf16", "amp_fp16", "amp_fp8"),
    "dist_timeout": SECONDS,
    "global_train_batch_size": ELSEWHERE,
    "device_train_microbatch_size": _integer(1, PLANNED),
    "device_eval_batch_size": _integer(1, PLANNED),
    "accumulate_train_batch_on_tokens": SWITCH,
    "train_subset_num_batches": _integer(1, or_all=True),
    "eval_subset_num_batches": _integer(1, or_all=True),
    "eval_interval": TIME,
    "spin_dataloaders": SWITCH,
    "save_folder": ELSEWHERE,
    "save_interval": TIME,
    "save_num_checkpoints_to_keep": _integer(1, "The export needs a checkpoint.", or_all=True),
    "save_ignore_keys": TEXTS,
    "load_ignore_keys": TEXTS,
    "load_strict_model_weights": SWITCH,
    "progress_bar": SWITCH,
    "log_to_console": SWITCH,
    "console_log_interval": TIME,
    "python_log_level": _one_of("debug", "info", "warning", "error", "critical"),
    "model.attn_implementation": ELSEWHERE,
    "model.use_train_metrics": SWITCH,
    "model.config_overrides.attention_dropout": Value(
        "from 0 to below 1", lambda value: _is_number(value) and 0 <= value < 1
    ),
    "optimizer.name": _one_of(*OPTIMIZERS),
    "optimizer.lr": POSITIVE,
    "optimizer.betas": Value("a list of two numbers", lambda value: NUMBERS.takes(value) and len(value) == 2),
    "optimizer.weight_decay": NUMBER,
    "scheduler.name": _one_of(*SCHEDULERS),
    "scheduler.t_warmup": TIME,
    **{f"train_loader.{key}": value for key, value in _LOADER.items()},
    TARGET_RESPONSES: _one_of("all", "last"),
    **{f"eval_loader.{key}": value for key, value in _LOADER.items()},
    "fsdp_config.activation_checkpointing": Value("true or false", SWITCH.takes, PLANNED),
    "fsdp_config.reshard_after_forward": Value("true or false", SWITCH.takes, PLANNED),
    "fsdp_config.activation_cpu_offload": SWITCH,
    "fsdp_config.mixed_precision": _one_of("DEFAULT", "PURE", "FULL"),
    "fsdp_config.verbose": SWITCH,
    "compile_config.mode": _one_of("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
    "compile_config.backend": _one_of("inductor", "eager", "aot_eager"),
    "compile_config.fullgraph": SWITCH,
    "compile_config.dynamic": SWITCH,
    "compile_config.disable": SWITCH,
    **{
        f"{section}.{name}.{key}": value
        for section, components in COMPONENTS.items()
        for name, keys in components.items()
        for key, value in keys.items()
    },
    **{f"{section}.{name}": NOTHING for section, components in COMPONENTS.items() for name in components},
}
"""Every key that a caller may set, with what it takes; below `metadata` any."""
FREE = "metadata"
KEYS = frozenset(key.split(".")[0] for key in (*VALUES, FREE))
"""LLM Foundry's top-level keys that a run uses and a caller may set; a test compares them with LLM Foundry's own."""

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
    "save_overwrite": "a complete checkpoint is never overwritten",
    "save_latest_filename": "latest-sharded-rank0.symlink is where others look for it",
    "callbacks.load_checkpoint": "it may run code; create() has custom_weights_path, which runs none",
    "callbacks.checkpoint_saver": "save_interval is the key for it",
    "save_weights_only": "a run that is killed resumes from its checkpoints",
    "autoresume": "a run resumes from its newest checkpoint by itself; after its end, by resume()",
    "save_filename": "the export looks for checkpoints named ep#-ba#",
    "fsdp_config.state_dict_type": "the export reads sharded checkpoints",
    "loggers.mlflow": "create() has experiment_path for it; MLFLOW_TRACKING_URI chooses the store",
    "callbacks.tundish_events": "the run's events are written by it",
    "callbacks.tundish_schedule": "it sets each step's learning rate; scheduler and learning_rate say which",
    "callbacks.tundish_guard": "it stops a run that learns nothing",
    "callbacks.tundish_first_batch": "it takes no settings",
    "callbacks.tundish_eval_prompts.prompts": "create() has eval_prompts for it",
    "callbacks.generate_callback": "create() has eval_prompts for it",
    "callbacks.hf_checkpointer": "a run exports and registers its last checkpoint; `tundish export` any other",
    "callbacks.mono_checkpoint_saver": "save_interval is the key for it",
    "callbacks.async_eval": "it starts other jobs",
    "callbacks.curriculum_learning": "it reads other data than was checked",
    "callbacks.dataset_swap": "it reads other data than was checked",
    "callbacks.env_logging": "it starts other programs",
    "callbacks.memory_snapshot": "it writes files to any path",
    "callbacks.oom_observer": "it writes files to any path",
    "loggers.mosaicml": "it reports to a separate platform",
    "loggers.wandb.init_kwargs": "it may name programs and files; set W&B's variables, such as WANDB_MODE",
    "algorithms.alibi": "it changes the model into another one, which no export knows",
    "algorithms.gated_linear_units": "it changes the model into another one, which no export knows",
    "algorithms.low_precision_layernorm": "it changes the model into another one, which no export knows",
    "compile_config.options": "it may name a compiler to run",
    "tokenizer": "the data is prepared with the model's own tokenizer",
    "eval_loaders": "create() has eval_data_path for it",
    "icl_tasks": "it reads other data than was checked",
    "eval_gauntlet": "it reads other data than was checked",
}
"""Keys that a run depends on, or that would run code, each with the reason; what is below them is refused too."""


def target_responses(overrides: Mapping[str, Any]) -> Literal["all", "last"]:
    """What the overrides set TARGET_RESPONSES to."""
    return "last" if overrides.get(TARGET_RESPONSES) == "last" else "all"


def save_root(overrides: Mapping[str, Any]) -> str | None:
    """Where the overrides put the checkpoints: each run has a folder below it."""
    return overrides.get("save_folder")


def memory_choices(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """What the overrides decide of a step's memory, by fields of `memory.Choice`."""
    return {field: overrides[key] for key, field in CHOICES.items() if key in overrides}


def optimizer_moments(overrides: Mapping[str, Any]) -> int:
    """How many numbers the optimizer keeps of each weight."""
    return 2 if "adam" in str(overrides.get("optimizer.name", "")).lower() else 1


def flat(given: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that is set, by its dotted path; a later one wins."""
    return {path: value for key, top in given.items() for path, value in _leaves(key, top)}


def check_overrides(overrides: Mapping[str, Any]) -> list[str]:
    """Problems of overrides that `flat` made, one sentence each; empty when all is well."""
    values = _values(overrides)
    problems = (_problem(path, value, values) for path, value in overrides.items())
    return [f"overrides: {problem}" for problem in problems if problem]


def unused_overrides(overrides: Mapping[str, Any], arguments: Mapping[str, Any]) -> list[str]:
    """Overrides that `flat` made, for a part that the run of these arguments of `create()` does not have."""
    required = {
        "eval_loader": "eval_data_path",
        "eval_interval": "eval_data_path",
        "eval_subset_num_batches": "eval_data_path",
        "device_eval_batch_size": "eval_data_path",
        "callbacks.early_stopper": "eval_data_path",
        "callbacks.tundish_eval_prompts": "eval_prompts",
        "load_strict_model_weights": "custom_weights_path",
    }
    return [
        f"overrides: {path!r} has no effect without {required[key]}. Give that too, or leave it out."
        for path in overrides
        for key in required
        if _is_below(path, key) and not arguments.get(required[key])
    ]


def _values(overrides: Mapping[str, Any]) -> Mapping[str, Value]:
    """What may be set, with the keys of the optimizer and the schedule that were chosen, or of ours."""
    values = dict(VALUES)
    for section, known, ours in (
        ("optimizer", OPTIMIZERS, "tundish_decoupled_lionw"),
        ("scheduler", SCHEDULERS, "linear_decay_with_warmup"),
    ):
        name = overrides.get(f"{section}.name", ours)
        # Of an unknown one, which is a problem of its own, all keys are.
        chosen = [known[name]] if isinstance(name, str) and name in known else known.values()
        values |= {f"{section}.{key}": value for keys in chosen for key, value in keys.items()}
    return values


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Dotted path and value of everything that is set."""
    if isinstance(value, Mapping) and value:
        for key, below in value.items():
            yield from _leaves(f"{path}.{key}", below)
    else:
        yield path, value


def _is_below(path: str, key: str) -> bool:
    return path == key or path.startswith(f"{key}.")


def _problem(path: str, value: Any, values: Mapping[str, Value]) -> str | None:
    if secret := next((part for part in path.split(".") if names_secret(part)), None):
        return (
            f"{path!r} is not allowed: {secret!r} names a secret, which a run's files would show. {INSTEAD_OF_SECRETS}"
        )
    refused = next((key for key in REFUSED if _is_below(path, key)), None)
    if refused is not None:
        return f"{path!r} is not allowed: {REFUSED[refused]}."
    if "${" in path or "${" in repr(value):
        return f"{path!r} contains '${{', which LLM Foundry would resolve. Write the value itself."
    known = values.get(path) or (FACT if path.startswith(f"{FREE}.") else None)
    if known is None:
        return _unknown(path, value, values)
    if not known.takes(value):
        return f"{path!r} must be {known.says}, not {_shown(value)}. {known.advice}".rstrip()
    if isinstance(value, str) and redacted(value) != value:
        return f"{path!r} contains a secret, which a run's files would show. {INSTEAD_OF_SECRETS}"
    return None


def _unknown(path: str, value: Any, values: Mapping[str, Value]) -> str:
    """Where a path leaves what is known, and what is near."""
    if path == FREE or any(key.startswith(f"{path}.") for key in values):
        return f"{path!r} is a section, and cannot be {_shown(value)}. Set the keys below it."
    parts = path.split(".")
    for depth in range(len(parts)):
        section, word = ".".join(parts[:depth]), parts[depth]
        below = f"{section}." if section else ""
        known = {key.removeprefix(below).split(".")[0] for key in (*values, FREE) if key.startswith(below)}
        if word not in known:
            break
    else:
        raise AssertionError(path)
    if not known:
        return f"{path!r} goes below a key that holds a single value. Shorten it."
    same = sorted(key for key in values if key.endswith(f".{word}"))[:3]
    hint = did_you_mean(word, known).strip() or (f"Did you mean {' or '.join(same)}?" if same else "")
    where = f"{section!r} has no key" if section else "a run has no LLM Foundry key"
    listed = ", ".join(sorted(known))
    return f"{where} {word!r}. {hint or f'It has {listed}.'}"


def _shown(value: Any) -> str:
    text = repr(value)
    if isinstance(value, Sequence | Mapping) and not isinstance(value, str):
        return text if len(text) <= 60 else f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:60]}…"
