"""RunSpec → LLM-Foundry YAML: merges the layers of `yamls/` and fills in what the arguments and the data decide.

Pure; with `overrides.py` the only place that knows LLM Foundry's key names. Layers, later ones winning: `base.yaml`,
`task/<task>.yaml`, the model family's layer, `scale.yaml`, what is computed here, the caller's `overrides`.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import yaml

from tundish import __version__
from tundish.base.home import yamls_dir
from tundish.base.run_folder import RunFolder
from tundish.errors import SpecError
from tundish.plan.commented_yaml import comments_of, dump
from tundish.plan.memory import GIB, Choice, MemoryPlan, Setting, plan
from tundish.plan.models import ModelCard, foundry_layers
from tundish.plan.overrides import flat
from tundish.plan.spec import RunSpec

MAX_ROWS_PER_DEVICE = 16
"""Upper end of the automatic batch size, in rows of one device."""
MIN_STEPS = 100
"""An epoch should take at least this many optimizer steps, as far as its rows allow."""
WARM_UP = 0.02
"""Of a run, as in the managed service."""
CHOICES = {
    "device_train_microbatch_size": "microbatch",
    "fsdp_config.activation_checkpointing": "activation_checkpointing",
    "fsdp_config.reshard_after_forward": "reshard_after_forward",
}
"""Keys that the memory planner chooses, where the caller's overrides do not, by its own words."""
DECIDED = (
    "seed global_train_batch_size device_train_microbatch_size precision model.attn_implementation optimizer.name "
    "optimizer.betas optimizer.weight_decay scheduler.name scheduler.t_warmup scheduler.alpha_f eval_interval "
    "save_interval fsdp_config.activation_checkpointing fsdp_config.reshard_after_forward"
).split()
"""Keys that no argument of `create()` sets but `overrides`, and that make a run another one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Destination:
    """Where a run's checkpoints and metrics go, and where its weights come from."""

    save_folder: str
    tracking_uri: str
    experiment_name: str
    load_path: str | None = None
    """Checkpoint whose weights replace the model's; None = the model's own."""


def choose_batch_size(rows: int, devices: int) -> int:
    """Rows in one optimizer step, over all devices: a multiple of `devices`, the same for every duration.

    The largest power of two of rows a device, up to MAX_ROWS_PER_DEVICE, that still leaves MIN_STEPS steps an epoch;
    one row a device where even that leaves fewer. Rows that do not divide evenly are no matter: the loader fills the
    last batch of an epoch with rows without targets, so that every sample is trained in every epoch.
    """
    per_device = MAX_ROWS_PER_DEVICE
    while per_device > 1 and math.ceil(rows / (per_device * devices)) < MIN_STEPS:
        per_device //= 2
    return per_device * devices


def planned_steps(spec: RunSpec, rows: int, tokens: int) -> tuple[int, int]:
    """Rows in an optimizer step and steps of a run, for an epoch of so many rows and tokens."""
    batch_size, _ = _batch_size(spec, rows)
    if spec.training_duration.unit == "tok":
        # A full batch: the last of an epoch may be smaller, but it comes last.
        tokens_in_batch = tokens * min(1, batch_size / rows)
        return batch_size, math.ceil(spec.training_duration.value / tokens_in_batch)
    return batch_size, _steps(spec, rows, batch_size) or 0


def memory_plan(spec: RunSpec, card: ModelCard, batch_size: int) -> MemoryPlan:
    """What a step of the run takes on one device, and the microbatch that fits."""
    given, devices = flat(spec.overrides), spec.compute.devices
    setting = Setting(
        card=card,
        context_length=spec.context_length,
        devices=devices,
        rows_per_device=max(1, batch_size // devices),
        device=spec.compute.device,
        attention=given.get("model.attn_implementation") or _attention(spec, card),
        moments=2 if "adam" in str(given.get("optimizer.name", "")).lower() else 1,
    )
    fixed = {field: given[key] for key, field in CHOICES.items() if key in given}
    return plan(setting, int(spec.compute.device_memory_gib * GIB), fixed)


def render(spec: RunSpec, card: ModelCard, paths: RunFolder, destination: Destination, rows: int | None) -> str:
    """The run's LLM-Foundry YAML, with comments.

    `rows`: rows of the prepared training data; None before it is prepared. Batch size and warm-up are then provisional,
    and a comment says so.
    """
    texts = [
        (yamls_dir() / "base.yaml").read_text(),
        (yamls_dir() / "task" / f"{spec.task_type.lower()}.yaml").read_text(),
    ]
    batch_size, reason = _batch_size(spec, rows)
    memory, steps = memory_plan(spec, card, batch_size), _steps(spec, rows, batch_size)
    layers: list[dict[str, Any]] = [
        *(yaml.safe_load(text) for text in texts),
        *foundry_layers(card),
        {"global_train_batch_size": batch_size, "scheduler": {"t_warmup": f"{WARM_UP}dur"}},
        _chosen(memory.chosen.choice),
        _computed(spec, card, paths, destination),
        # Where the run's own folder is below it, the destination says.
        *(_nested(key, value) for key, value in spec.overrides.items() if key != "save_folder"),
    ]
    merged: dict[str, Any] = {}
    for layer in layers:
        merged = _merge(merged, layer)
    merged["scheduler"] = _schedule(merged["scheduler"], layers[0]["scheduler"], spec, steps)
    _refuse_interpolations(merged)
    comments: dict[tuple[str, ...], list[str]] = {}
    for text in texts:
        comments |= comments_of(text)
    scale = comments_of((yamls_dir() / "scale.yaml").read_text(), below="foundry")
    comments |= {
        path: lines for path, lines in scale.items() if any(_has(layer, path) for layer in foundry_layers(card))
    }
    comments["global_train_batch_size",] = [*comments["global_train_batch_size",], f"# {reason}"]
    comments["device_train_microbatch_size",] = [
        *comments["device_train_microbatch_size",],
        f"# {_memory_comment(memory)}",
    ]
    header = (
        f"# Run {spec.run_name}, written by tundish {__version__}.\n"
        "# Stock LLM Foundry trains it too, on two ranks or more and into a save_folder of its own:\n"
        f"#   FSDP_VERSION=2 composer -n {max(2, spec.compute.devices_per_node)} "
        f"$(which llmfoundry) train {paths.foundry_yaml.name} save_folder=./checkpoints\n\n"
    )
    return header + dump(merged, comments)


def _memory_comment(memory: MemoryPlan) -> str:
    needs = f"{memory.chosen.peak / GIB:.1f} of a device's {memory.device_memory / GIB:.1f} GiB"
    return f"Planned: {needs}." if memory.fits else f"Does not fit: {needs} planned. Use more devices or shorter rows."


def _batch_size(spec: RunSpec, rows: int | None) -> tuple[int, str]:
    given = spec.overrides.get("global_train_batch_size")
    if given is not None:
        return int(given), "Set by overrides."
    devices = spec.compute.devices
    if rows is None:
        return (
            MAX_ROWS_PER_DEVICE * devices,
            "For large data; chosen again from the number of rows once they are packed.",
        )
    size = choose_batch_size(rows, devices)
    steps = math.ceil(rows / size)
    return size, f"Chosen for {rows:,} rows on {devices} device(s): {steps:,} steps an epoch."


def _steps(spec: RunSpec, rows: int | None, batch_size: int) -> int | None:
    """Optimizer steps of a run whose duration is in epochs or batches; None where the rows are not known yet."""
    duration = spec.training_duration
    if duration.unit == "ba":
        return duration.value
    return None if rows is None else math.ceil(rows / batch_size) * duration.value


def _schedule(merged: Mapping[str, Any], base: Mapping[str, Any], spec: RunSpec, steps: int | None) -> dict[str, Any]:
    """The schedule of a run; what ours is set to means nothing to another one, except that it has a warm-up too."""
    given = {key for key in flat(spec.overrides) if key.startswith("scheduler.")}
    ours = merged["name"] == base["name"]
    kept = {
        key: value
        for key, value in merged.items()
        if ours or key in ("name", "t_warmup") or f"scheduler.{key}" in given
    }
    return kept | {"t_warmup": _in_batches(kept["t_warmup"], spec, steps)}


def _in_batches(warm_up: object, spec: RunSpec, steps: int | None) -> object:
    """A share of a run in batches: Composer rounds it down, in a short run to no warm-up at all."""
    share = re.fullmatch(r"\s*(\d*\.?\d+(?:e-?\d+)?)\s*dur\s*", str(warm_up))
    if share is None or spec.training_duration.unit == "tok":
        return warm_up
    return f"{max(1, round(float(share[1]) * (steps or 1)))}ba" if float(share[1]) else "0ba"


def decided(text: str) -> dict[str, Any]:
    """What a run's YAML says of DECIDED."""
    return {key: value for key, value in flat(yaml.safe_load(text)).items() if key in DECIDED}


def checkpoints_to_keep(text: str) -> int:
    """How many checkpoints a run's YAML leaves; less than 1: all."""
    return int(yaml.safe_load(text)["save_num_checkpoints_to_keep"])


def _interval(spec: RunSpec) -> str:
    """How often to evaluate and to save: at most ten times in a run, and at its end."""
    duration = spec.training_duration
    return f"{math.ceil(duration.value / 10)}ep" if duration.unit == "ep" else "0.25dur"


def isolating_attentions(card: ModelCard, device: str) -> list[str]:
    """The attentions that keep packed samples apart: of the family, on a kind of device."""
    everywhere = ["sdpa", "eager"]
    return (
        everywhere if device == "cpu" else list(dict.fromkeys(["flash_attention_2", card.gpu_attention, *everywhere]))
    )


def _attention(spec: RunSpec, card: ModelCard) -> str:
    import importlib.util

    if spec.compute.device == "cpu":
        return "sdpa"
    return "flash_attention_2" if importlib.util.find_spec("flash_attn") else card.gpu_attention


def _chosen(choice: Choice) -> dict[str, Any]:
    layer = {"device_eval_batch_size": choice.microbatch}
    for key, field in CHOICES.items():
        layer = _merge(layer, _nested(key, getattr(choice, field)))
    return layer


def _computed(spec: RunSpec, card: ModelCard, paths: RunFolder, destination: Destination) -> dict[str, Any]:
    computed: dict[str, Any] = {
        "run_name": spec.run_name,
        "max_seq_len": spec.context_length,
        "max_duration": str(spec.training_duration),
        "precision": "amp_bf16" if spec.compute.device == "gpu" else "fp32",
        "tokenizer": {"name": spec.model, "kwargs": {"model_max_length": spec.context_length}},
        "model": {
            "pretrained_model_name_or_path": spec.model,
            "use_auth_token": card.gated,
            "attn_implementation": _attention(spec, card),
        },
        "optimizer": {"lr": spec.learning_rate},
        "train_loader": {
            "dataset": {"local": str(paths.data("train")), "max_seq_len": spec.context_length, "shuffle_seed": 17},
            "num_workers": 2 if spec.compute.device == "gpu" else 0,
        },
        "eval_interval": _interval(spec),
        "save_folder": destination.save_folder,
        "save_interval": _interval(spec),
        "loggers": {
            "mlflow": {"experiment_name": destination.experiment_name, "tracking_uri": destination.tracking_uri}
        },
        "callbacks": {"tundish_events": {"events_path": str(paths.events)}},
    }
    return _merge(computed, _optional(spec, paths, computed["train_loader"], destination.load_path))


def _optional(spec: RunSpec, paths: RunFolder, loader: Mapping[str, Any], load_path: str | None) -> dict[str, Any]:
    """Sections that only some runs have."""
    sections: dict[str, Any] = {}
    if spec.eval_data_path:
        evaluation = {**loader["dataset"], "local": str(paths.data("eval")), "shuffle": False}
        sections["eval_loader"] = {**loader, "name": "tundish_packed", "dataset": evaluation}
    if spec.eval_prompts:
        prompts = {"prompts": list(spec.eval_prompts)}
        sections["callbacks"] = {"tundish_eval_prompts": prompts}
    if load_path:
        # Weights only: optimizer, schedule and data start anew.
        sections |= {"load_path": load_path, "load_weights_only": True}
    return sections


def _refuse_interpolations(merged: Mapping[str, Any]) -> None:
    """The last look before LLM Foundry's: it would resolve `${…}`, environment variables included, wherever it is from.

    Raises:
        SpecError: there is one; names of folders may hold it, of the home, or behind a link.
    """
    found = [f"{path} is {value!r}" for path, value in flat(merged).items() if "${" in repr(value)]
    if found:
        raise SpecError(f"{'; '.join(found)}: '${{' is not allowed there. Rename the folder, or use another one.")


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
