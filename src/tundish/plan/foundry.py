"""RunPlan → LLM Foundry YAML: merges the layers of `yamls/` and fills in what the plan has decided.

Pure; with `overrides.py` the only place that knows LLM Foundry's key names. Layers, later ones winning: `base.yaml`,
`task/<task>.yaml`, the model family's layer, `scale.yaml`, what the plan decides, the caller's `overrides`.
"""

import math
from collections.abc import Mapping
from typing import Any, cast

import yaml

from tundish import __version__
from tundish.base.home import yamls_dir
from tundish.base.run_folder import RunFolder
from tundish.base.text import counted
from tundish.errors import SpecError
from tundish.plan.batch import choose_batch_size
from tundish.plan.commented_yaml import comments_of, dump
from tundish.plan.memory import GIB
from tundish.plan.models import foundry_layers
from tundish.plan.overrides import BATCH_SIZE, CHOICES, flat
from tundish.plan.run_plan import Memory, RunPlan
from tundish.plan.spec import RunSpec

MICROBATCH = "device_train_microbatch_size"
DECIDED = (
    "seed global_train_batch_size device_train_microbatch_size precision model.attn_implementation optimizer.name "
    "optimizer.betas optimizer.weight_decay scheduler.name scheduler.t_warmup scheduler.alpha_f eval_interval "
    "save_interval fsdp_config.activation_checkpointing fsdp_config.reshard_after_forward"
).split()
"""Keys that no argument of `create()` but `overrides` sets, and in which runs differ."""


def render(plan: RunPlan, run: RunFolder) -> str:
    """The run's LLM Foundry YAML, with comments.

    Args:
        plan: of the run.
        run: the folder that the YAML is for; nothing is read or written there.

    Raises:
        SpecError: LLM Foundry would resolve a part of a path or name.
    """
    base = (yamls_dir() / "base.yaml").read_text()
    task = (yamls_dir() / "task" / f"{plan.spec.task_type.lower()}.yaml").read_text()
    layers: list[dict[str, Any]] = [
        yaml.safe_load(base),
        yaml.safe_load(task),
        *foundry_layers(plan.card),
        {BATCH_SIZE: plan.batch_size, "scheduler": {"t_warmup": plan.warm_up}},
        _memory_layer(plan.memory),
        _arguments_layer(plan, run),
        # save_folder is only the root: the plan has the run's own folder below it.
        *(_nested(key, value) for key, value in plan.spec.overrides.items() if key != "save_folder"),
    ]
    merged: dict[str, Any] = {}
    for layer in layers:
        merged = _merge(merged, layer)
    merged["scheduler"] = _schedule(merged["scheduler"], layers[0]["scheduler"], plan)
    # LLM Foundry would resolve `${…}`, environment variables included, wherever it comes from: the home's name, a link.
    if problems := [f"{path} is {value!r}" for path, value in flat(merged).items() if "${" in repr(value)]:
        raise SpecError(f"{'; '.join(problems)}: '${{' is not allowed there. Rename the folder, or use another one.")
    header = (
        f"# Run {plan.spec.run_name}, written by tundish {__version__}.\n"
        "# Stock LLM Foundry trains it too, on two ranks or more and with a different save_folder:\n"
        f"#   FSDP_VERSION=2 composer -n {max(2, plan.spec.compute.devices_per_node)} "
        f"$(which llmfoundry) train {run.foundry_yaml.name} save_folder=./checkpoints\n\n"
    )
    return header + dump(merged, _comments(plan, base, task))


def decided(text: str) -> dict[str, Any]:
    """What a run's YAML says of DECIDED: its owner may have edited it."""
    return {key: value for key, value in flat(yaml.safe_load(text)).items() if key in DECIDED}


def checkpoints_to_keep(text: str) -> int:
    """How many checkpoints a run's YAML keeps; less than 1: all."""
    return int(yaml.safe_load(text)["save_num_checkpoints_to_keep"])


def _memory_layer(memory: Memory) -> dict[str, Any]:
    layer: dict[str, Any] = {"device_eval_batch_size": memory.microbatch}
    for key, field in CHOICES.items():
        layer = _merge(layer, _nested(key, getattr(memory, field)))
    return layer


def _arguments_layer(plan: RunPlan, run: RunFolder) -> dict[str, Any]:
    """What the arguments of `create()` come to."""
    spec, on_gpu = plan.spec, plan.spec.compute.device == "gpu"
    loader: dict[str, Any] = {
        "dataset": {"local": str(run.data("train")), "max_seq_len": spec.context_length, "shuffle_seed": 17},
        "num_workers": 2 if on_gpu else 0,
    }
    layer: dict[str, Any] = {
        "run_name": spec.run_name,
        "max_seq_len": spec.context_length,
        "max_duration": str(spec.training_duration),
        "precision": "amp_bf16" if on_gpu else "fp32",
        "tokenizer": {"name": spec.model, "kwargs": {"model_max_length": spec.context_length}},
        "model": {
            "pretrained_model_name_or_path": spec.model,
            "use_auth_token": plan.card.gated,
            "attn_implementation": plan.attention,
        },
        "optimizer": {"lr": spec.learning_rate},
        "train_loader": loader,
        "eval_interval": _interval(spec),
        "save_folder": plan.save_folder,
        "save_interval": _interval(spec),
        "loggers": {"mlflow": {"experiment_name": spec.experiment_path, "tracking_uri": plan.tracking_uri}},
        "callbacks": {"tundish_events": {"events_path": str(run.events)}},
    }
    if "eval" in plan.data:
        dataset = {**loader["dataset"], "local": str(run.data("eval")), "shuffle": False}
        layer["eval_loader"] = {**loader, "name": "tundish_packed", "dataset": dataset}
    if spec.eval_prompts:
        layer["callbacks"]["tundish_eval_prompts"] = {"prompts": list(spec.eval_prompts)}
    if plan.load_path:
        # Weights only: optimizer, schedule and data start from the beginning.
        layer |= {"load_path": plan.load_path, "load_weights_only": True}
    return layer


def _interval(spec: RunSpec) -> str:
    """How often to evaluate and to save: at most ten times in a run, and at its end."""
    duration = spec.training_duration
    return f"{math.ceil(duration.value / 10)}ep" if duration.unit == "ep" else "0.25dur"


def _schedule(merged: Mapping[str, Any], base: Mapping[str, Any], plan: RunPlan) -> dict[str, Any]:
    """The schedule of a run; another one than ours takes none of our settings but the warm-up."""
    ours = merged["name"] == base["name"]
    kept = {
        key: value
        for key, value in merged.items()
        if ours or key in ("name", "t_warmup") or f"scheduler.{key}" in plan.spec.overrides
    }
    return kept | {"t_warmup": plan.warm_up}


def _comments(plan: RunPlan, base: str, task: str) -> dict[tuple[str, ...], list[str]]:
    """The layers' comments, and why the batch size and the microbatch are what they are."""
    comments = comments_of(base) | comments_of(task)
    scale = comments_of((yamls_dir() / "scale.yaml").read_text(), below="foundry")
    layers = foundry_layers(plan.card)
    comments |= {path: lines for path, lines in scale.items() if any(_has(layer, path) for layer in layers)}
    comments[(BATCH_SIZE,)] = [*comments[(BATCH_SIZE,)], f"# {_batch_size_reason(plan)}"]
    memory = plan.memory
    needs = f"{memory.peak_bytes / GIB:.1f} of a device's {memory.device_bytes / GIB:.1f} GiB"
    planned = (
        f"Planned: {needs}." if memory.fits else f"Does not fit: {needs} planned. Use more devices or shorter rows."
    )
    comments[(MICROBATCH,)] = [*comments[(MICROBATCH,)], f"# {planned}"]
    return comments


def _batch_size_reason(plan: RunPlan) -> str:
    devices, train = plan.spec.compute.devices, plan.data["train"].prepared
    if BATCH_SIZE in plan.spec.overrides:
        return "Set by overrides."
    if train is None:
        return "For large data; chosen again from the number of rows once they are packed."
    if plan.batch_size != choose_batch_size(train.rows, devices):
        return "Kept from the run's start: a run that is resumed on other devices keeps its batches."
    steps = math.ceil(train.rows / plan.batch_size)
    return (
        f"Chosen for {counted(train.rows, 'row')} on {counted(devices, 'device')}: {counted(steps, 'step')} per epoch."
    )


def _has(layer: Mapping[str, Any], path: tuple[str, ...]) -> bool:
    node: Any = layer
    for part in path:
        if not isinstance(node, Mapping) or part not in node:
            return False
        node = node[part]
    return True


def _nested(dotted_key: str, value: Any) -> dict[str, Any]:
    for part in reversed(dotted_key.split(".")):
        value = {part: value}
    return cast(dict[str, Any], value)


def _merge(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """Both mappings in one, `high` winning, nested mappings merged."""
    merged = dict(low)
    for key, value in high.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged
