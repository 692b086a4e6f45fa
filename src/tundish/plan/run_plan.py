"""RunPlan: everything that is decided about a run before it trains, as one value.

`RunPlan.of` decides from the checked arguments alone. What is known later (how many rows the data has, where MLflow put
the run, where custom weights were copied to) comes in by `completed`, a resumed run's changes by `on` and `longer`.
`validate`, `estimate`, `render`, `create` and the stages of a run show or apply it, and decide nothing themselves.
"""

import dataclasses
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

from tundish import __version__
from tundish.base.files import write_atomic
from tundish.base.run_folder import RunFolder
from tundish.base.text import counted
from tundish.base.typed_json import NewerError, object_of, parse
from tundish.errors import SpecError
from tundish.plan.batch import WARM_UP, choose_batch_size, count_steps, warm_up_in_batches
from tundish.plan.compute import Compute
from tundish.plan.memory import GIB, MemoryPlan, Setting
from tundish.plan.memory import plan as plan_memory
from tundish.plan.models import ModelCard
from tundish.plan.overrides import ATTENTION, BATCH_SIZE, WARM_UP_KEY, memory_choices, optimizer_moments
from tundish.plan.spec import Duration, RunSpec

PLAN_VERSION = 1
"""Format of `plan.json`; raised when an older tundish would misread what a newer one wrote."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataFacts:
    """What one split of the data came to when it was prepared."""

    folder: str
    """Of the prepared data."""
    samples: int
    rows: int
    tokens: int
    target_tokens: int
    truncated: int
    """Samples cut at the context length."""
    empty: int
    """Files without a sample."""
    warned: int
    """Samples with warnings."""
    chatml_added: bool
    """Whether the tokenizer had no chat template and got ChatML."""
    digest: str
    """SHA-256 of the source."""

    def summary(self, context_length: int) -> str:
        """The counts, in a sentence or two."""
        text = (
            f"{counted(self.samples, 'sample')} with {counted(self.tokens, 'token')} ("
            f"{counted(self.target_tokens, 'target')}) in {counted(self.rows, 'row')} of {context_length:,}, "
            f"{self.tokens / (self.rows * context_length):.1%} full."
        )
        if self.truncated:
            text += f" {counted(self.truncated, 'sample')} cut at {context_length:,} tokens."
        if self.empty:
            text += f" {counted(self.empty, 'empty file')} left out."
        return text


@dataclass(frozen=True, kw_only=True, slots=True)
class DataPlan:
    """One split of the data."""

    address: str
    """`Address.text` of the source."""
    prepared: DataFacts | None = None
    """None: the run prepares it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """How a step is done so that it fits into a device."""

    microbatch: int
    """Rows in one forward pass of a device."""
    activation_checkpointing: bool
    reshard_after_forward: bool
    peak_bytes: int
    """Of one device, as planned."""
    device_bytes: int
    """That one device has."""
    fits: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class RunPlan:
    """What a run trains, on what data, how, and where the results go."""

    spec: RunSpec
    """What was asked for, defaults filled in."""
    card: ModelCard
    model_state: str | None = None
    """Names, sizes and times of the base model's files when they were checked; None: to be checked by the run."""
    data: Mapping[str, DataPlan]
    """By split: `train`, and `eval` where there is evaluation data."""
    batch_size: int
    """Rows in an optimizer step, over all devices."""
    batch_size_is_final: bool
    """False: chosen again once the training data is prepared."""
    steps: int | None
    """Optimizer steps of the run, approximate for a duration in tokens; None until the training data is prepared."""
    warm_up: str | int
    """Of the learning rate, as Composer takes it."""
    attention: str
    memory: Memory
    tracking_uri: str
    registry_uri: str | None
    """None: the tracking store is the registry, too."""
    save_folder: str
    """Where the checkpoints go."""
    load_path: str | None
    """Checkpoint whose weights replace the model's; on this machine once the data is prepared."""
    weights_model: str | None = None
    """The model that the run of that checkpoint started from, where this machine knows the run."""

    @classmethod
    def of(
        cls, spec: RunSpec, card: ModelCard, *, tracking_uri: str, registry_uri: str | None, save_folder: str
    ) -> Self:
        """Decide all that does not need the data."""
        paths = {"train": spec.train_data_path, "eval": spec.eval_data_path}
        given = spec.overrides.get(BATCH_SIZE)
        batch_size = choose_batch_size(None, spec.compute.devices) if given is None else int(given)
        return cls(
            spec=spec,
            card=card,
            data={split: DataPlan(address=address) for split, address in paths.items() if address is not None},
            tracking_uri=tracking_uri,
            registry_uri=registry_uri,
            save_folder=save_folder,
            load_path=spec.custom_weights_path,
            batch_size=batch_size,
            batch_size_is_final=given is not None,
            **_consequences(spec, card, batch_size),
        )

    @property
    def stores(self) -> tuple[str, str | None]:
        """MLflow's: `tracking_uri` and `registry_uri`."""
        return self.tracking_uri, self.registry_uri

    @property
    def is_prepared(self) -> bool:
        """Whether the prepared data is on this machine; a folder of it is complete as soon as it exists."""
        return all(part.prepared is not None and Path(part.prepared.folder).is_dir() for part in self.data.values())

    def completed(
        self,
        data: Mapping[str, DataFacts] = MappingProxyType({}),
        *,
        model_state: str | None = None,
        save_folder: str | None = None,
        load_path: str | None = None,
        weights_model: str | None = None,
    ) -> Self:
        """The plan with what has become known, and what depends on it decided.

        Args:
            data: by split, what was prepared.
            model_state: see the field; None, here and below: nothing new.
            save_folder: see the field.
            load_path: see the field.
            weights_model: see the field.
        """
        plan = self
        if (train := data.get("train")) is not None:
            plan = replace(self.for_rows(train.rows, train.tokens), batch_size_is_final=True)
        new = {split: replace(plan.data[split], prepared=facts) for split, facts in data.items()}
        return replace(
            plan,
            data={**plan.data, **new},
            model_state=model_state or plan.model_state,
            save_folder=save_folder or plan.save_folder,
            load_path=load_path or plan.load_path,
            weights_model=weights_model or plan.weights_model,
        )

    def without_data(self) -> Self:
        """The plan without what its data came to: it must be prepared again, in batches of the same size."""
        return replace(self, data={split: replace(part, prepared=None) for split, part in self.data.items()})

    def for_rows(self, rows: int, tokens: int) -> Self:
        """The plan for an epoch of so many rows and tokens; a batch size that is final is kept."""
        batch_size = self.batch_size if self.batch_size_is_final else choose_batch_size(rows, self.spec.compute.devices)
        return replace(self, batch_size=batch_size, **_consequences(self.spec, self.card, batch_size, rows, tokens))

    def with_batches(self, batch_size: int) -> Self:
        """The plan with the batches of an earlier one, which also replace those of the overrides.

        Training that has begun continues with the same batches.

        Raises:
            SpecError: the devices cannot share them.
        """
        devices = self.spec.compute.devices
        if batch_size % devices:
            raise SpecError(
                f"compute: batches of {batch_size} rows cannot be shared equally by {devices} devices, and training "
                f"that has begun keeps its batches. Use a number of devices that divides {batch_size}."
            )
        spec = self.spec
        if BATCH_SIZE in spec.overrides:  # the YAML would have theirs, as overrides are merged last
            spec = replace(spec, overrides={**spec.overrides, BATCH_SIZE: batch_size})
        return replace(self._changed(spec, batch_size), batch_size_is_final=True)

    def on(self, compute: Compute, *, keep_batches: bool) -> Self:
        """The plan for other devices.

        Args:
            compute: the devices.
            keep_batches: whether training has begun, so that the batches must stay the same.

        Raises:
            SpecError: the devices cannot share the batches.
        """
        moved = replace(self, spec=replace(self.spec, compute=compute))
        if self.batch_size_is_final and (keep_batches or BATCH_SIZE in self.spec.overrides):
            return moved.with_batches(self.batch_size)
        train = self.data["train"].prepared
        return self._changed(moved.spec, choose_batch_size(train and train.rows, compute.devices))

    def longer(self, duration: Duration) -> Self:
        """The plan for another duration; the batches stay the same."""
        return self._changed(replace(self.spec, training_duration=duration), self.batch_size)

    def _changed(self, spec: RunSpec, batch_size: int) -> Self:
        train = self.data["train"].prepared
        known = (None, None) if train is None else (train.rows, train.tokens)
        return replace(self, spec=spec, batch_size=batch_size, **_consequences(spec, self.card, batch_size, *known))

    @classmethod
    def read(cls, run: RunFolder) -> "RunPlan":
        """The plan in a run's folder.

        Raises:
            RunDamagedError: it is missing, cannot be read, or belongs to another run.
            RunNotFoundError: the folder no longer exists.
        """

        def parsed(text: bytes) -> RunPlan:
            plan = cls.from_json(text)
            run.check_name(plan.spec.run_name)
            return plan

        return run.read(run.plan, parsed)

    @classmethod
    def from_json(cls, text: str | bytes) -> "RunPlan":
        """Read what `write` wrote.

        Raises:
            NewerError: a newer tundish wrote it.
            ValueError: it is something else.
        """
        content = object_of(text)
        version = content.pop("version", None)
        if type(version) is int and version > PLAN_VERSION:
            raise NewerError(
                f"was written by a newer version of tundish (format {version}; tundish {__version__} reads up to "
                f"{PLAN_VERSION})"
            )
        plan = parse(cls, content)
        if "train" not in plan.data or plan.batch_size < 1:
            raise ValueError("must have training data, and batches of at least one row")
        return plan

    def write(self, run: RunFolder) -> None:
        """Keep it in a run's folder."""
        content = {"version": PLAN_VERSION, **dataclasses.asdict(self)}
        write_atomic(run.plan, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _consequences(
    spec: RunSpec, card: ModelCard, batch_size: int, rows: int | None = None, tokens: int | None = None
) -> dict[str, Any]:
    """The fields of RunPlan that follow from the spec, the batch size and the data."""
    duration, steps = spec.training_duration, None
    if rows is not None and tokens is not None:
        steps = count_steps(duration, batch_size, rows, tokens)
    elif duration.unit == "ba":
        steps = duration.value
    memory = memory_plan(spec, card, batch_size)
    return {
        "steps": steps,
        "warm_up": warm_up_in_batches(spec.overrides.get(WARM_UP_KEY, WARM_UP), duration, steps),
        "attention": choose_attention(spec, card),
        "memory": Memory(
            **dataclasses.asdict(memory.chosen.choice),
            peak_bytes=memory.chosen.peak,
            device_bytes=memory.device_memory,
            fits=memory.fits,
        ),
    }


def memory_plan(spec: RunSpec, card: ModelCard, batch_size: int) -> MemoryPlan:
    """What a step of a run takes on one device, and the microbatch that fits."""
    devices = spec.compute.devices
    setting = Setting(
        card=card,
        context_length=spec.context_length,
        devices=devices,
        rows_per_device=max(1, batch_size // devices),
        device=spec.compute.device,
        attention=choose_attention(spec, card),
        moments=optimizer_moments(spec.overrides),
    )
    return plan_memory(setting, int(spec.compute.device_memory_gib * GIB), memory_choices(spec.overrides))


def choose_attention(spec: RunSpec, card: ModelCard) -> str:
    """The attention of the caller's overrides, else the fastest that this machine has."""
    if given := spec.overrides.get(ATTENTION):
        return given
    if spec.compute.device == "cpu":
        return "sdpa"
    return "flash_attention_2" if importlib.util.find_spec("flash_attn") else card.gpu_attention
