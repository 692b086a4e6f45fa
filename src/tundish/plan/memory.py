"""How much memory a step of training takes on one device, from the architecture's numbers; chooses the microbatch.

The counts are those of full-parameter training under FSDP2 with float32 weights, gradients and momentum (DecoupledLionW
keeps one), and of what autograd saves in transformers' decoder layers. Parts that follow from shapes are counted; what
a device keeps for itself is the reserve. Checked against measured peaks in tests/train/test_memory.py. The accounting
by state, activation and temporary follows Rajbhandari et al., ZeRO (2020), and Korthikanti et al. (2022).
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from tundish.plan.models import ModelCard

GIB = 1 << 30
STATE_BYTES = 12
"""Of one parameter: weight, gradient and momentum in float32."""
GRADIENT_BYTES = MOMENT_BYTES = 4
USABLE_SHARE = 0.92
"""Of a device's memory; the rest is lost to fragmentation."""
CONTEXT_BYTES = int(1.5 * GIB)
"""What a GPU's driver, kernels and communication use."""
ENOUGH_TOKENS = 16_384
"""In one forward pass; more do not make a step faster."""

Device = Literal["gpu", "cpu"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What the memory of a step depends on, besides the choices."""

    card: ModelCard
    context_length: int
    """Tokens in a row; rows are assumed to be full."""
    devices: int
    """Weights, gradients and momentum are sharded over them."""
    rows_per_device: int
    """In an optimizer step."""
    device: Device
    """A GPU computes in bfloat16, a CPU in float32."""
    attention: str
    """The implementation, see `train.attention`."""
    moments: int = 1
    """Numbers that the optimizer keeps for each weight: one for DecoupledLionW, two for Adam and its variants."""

    @property
    def width(self) -> int:
        """Bytes of a number in computations."""
        return 2 if self.device == "gpu" else 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """How a step is computed: values of LLM Foundry's keys of the same names, except `microbatch`."""

    microbatch: int
    """Rows in one forward pass of a device."""
    activation_checkpointing: bool = False
    """Whether activations are recomputed in the backward pass instead of kept."""
    reshard_after_forward: bool = True
    """Whether layers are gathered again in the backward pass instead of kept whole."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepMemory:
    """What one device holds at the peak of a step, in bytes."""

    choice: Choice
    accumulates: bool
    """Whether a step has several microbatches."""
    states: int
    """This device's share of weights, gradients and momentum."""
    gradients: int
    """The part of `states` that is not there before the first backward pass of a step."""
    passing: int
    """Layers that are gathered while they are computed."""
    gathered: int
    """Layers that are gathered when the backward pass begins."""
    activations: int
    """What the forward pass saves for the backward pass."""
    logits: int
    """Scores over the vocabulary, and what the loss derives from them."""

    @property
    def peak(self) -> int:
        """The larger of two moments: the beginning and the end of the backward pass."""
        # At its beginning, all is there; gradients only if an earlier microbatch has left some. At its end, activations
        # are freed, and gathered layers have gradients that are not reduced to shards yet.
        begin = self.states - self.gradients * (not self.accumulates) + self.activations + self.logits
        return max(self.gathered + begin, self.states + 2 * self.passing)


def step_memory(setting: Setting, choice: Choice) -> StepMemory:
    """The memory of one step."""
    card, width = setting.card, setting.width
    tokens = choice.microbatch * setting.context_length
    one = tokens * _layer_bytes(card, width) + _attention_bytes(setting, choice.microbatch)
    again = card.layers * tokens * card.hidden_size * width + one
    share = math.ceil(card.parameters / setting.devices)
    root = _root_parameters(card)
    # Embeddings and head stay gathered for the whole pass; of the layers, the current and the next one.
    passing = width * (root + 2 * ((card.parameters - root) // card.layers))
    return StepMemory(
        choice=choice,
        accumulates=choice.microbatch < setting.rows_per_device,
        states=share * (STATE_BYTES + MOMENT_BYTES * (setting.moments - 1)),
        gradients=share * GRADIENT_BYTES,
        passing=passing,
        gathered=passing if choice.reshard_after_forward else width * card.parameters,
        activations=(again if choice.activation_checkpointing else card.layers * one)
        + _mask_bytes(setting, choice.microbatch),
        # Scores, their float32 copy if they are not float32, log-probabilities, and the gradients of both.
        logits=tokens * card.vocabulary_size * (width + (4 if width < 4 else 0) + 4 + 4),
    )


def candidates(setting: Setting, fixed: Mapping[str, Any]) -> Iterator[StepMemory]:
    """The possible choices, best first: without recomputing layers, then with as many rows as make a step faster.

    `fixed`: fields of `Choice` that the caller's overrides decide.
    """
    most = max(1, min(setting.rows_per_device, math.ceil(ENOUGH_TOKENS / setting.context_length)))
    sizes = [size for size in range(most, 0, -1) if setting.rows_per_device % size == 0]
    for checkpointing in (False, True):
        for size in sizes:
            choice = replace(Choice(microbatch=size, activation_checkpointing=checkpointing), **fixed)
            yield step_memory(setting, choice)


def usable(memory: int, device: Device) -> int:
    """Bytes of a device's memory that a step may take."""
    return int(memory * USABLE_SHARE) - (CONTEXT_BYTES if device == "gpu" else 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """The candidates for a run, and the one that is chosen."""

    candidates: list[StepMemory]
    chosen: StepMemory
    """The best one that fits, else the smallest."""
    fits: bool
    device_memory: int
    """Bytes of one device."""

    def lines(self) -> Iterator[str]:
        """A table of the candidates."""
        yield "  peak memory of a step on one device, in GiB (→ chosen)"
        yield "    microbatch   states  gathered  activations   logits      peak  layers"
        for step in self.candidates:
            parts = (step.states, step.gathered, step.activations, step.logits, step.peak)
            numbers = [f"{part / GIB:.2f}" for part in parts]
            columns = [text.rjust(width) for text, width in zip(numbers, (7, 8, 11, 7, 8), strict=True)]
            layers = "recomputed" if step.choice.activation_checkpointing else "kept"
            mark = "→" if step == self.chosen else " "
            yield f"  {mark} {step.choice.microbatch:>10}  {'  '.join(columns)}  {layers}"
        yield "    layers: activations kept for the backward pass, or recomputed in it"
        if not self.chosen.choice.reshard_after_forward:
            yield "    the chosen step gathers the weights once and keeps them until its end"
        if not self.fits:
            yield f"    none fits into the {self.device_memory / GIB:.1f} GiB of a device; the smallest is chosen"


def plan(setting: Setting, device_memory: int, fixed: Mapping[str, Any] | None = None) -> MemoryPlan:
    """Choose for devices of `device_memory` bytes; `fixed`: see `candidates`."""
    fixed = fixed or {}
    steps = list(dict.fromkeys(candidates(setting, fixed)))
    limit = usable(device_memory, setting.device)
    best = next((step for step in steps if step.peak <= limit), None)
    chosen = best or min(steps, key=lambda step: step.peak)
    if best is not None and setting.device == "cpu" and "reshard_after_forward" not in fixed:
        # Gathering is copying here: once instead of twice makes a small model's step a tenth faster. On a GPU it
        # overlaps with computing.
        kept = step_memory(setting, replace(best.choice, reshard_after_forward=False))
        chosen = kept if kept.peak <= limit else best
        steps[steps.index(best)] = chosen
    return MemoryPlan(candidates=steps, chosen=chosen, fits=best is not None, device_memory=device_memory)


def _root_parameters(card: ModelCard) -> int:
    """Embeddings, head and last norm: what FSDP2 gathers with the model itself."""
    return card.vocabulary_size * card.hidden_size * (1 if card.tied_embeddings else 2) + card.hidden_size


def _layer_bytes(card: ModelCard, width: int) -> int:
    """What autograd saves of one layer for one token, without attention scores."""
    inner = card.heads * (card.head_size or card.hidden_size // card.heads)
    # A norm keeps its float32 input, the normalized input, and its output.
    norms = 2 * card.hidden_size * (4 + 2 * width)
    # Rotated queries; keys and values repeated for every head; the result before and after its projection.
    attention = 5 * inner * width
    # Gate, its activation, the upward projection, and their product; for every expert that a token uses.
    feed_forward = 4 * card.feed_forward_size * card.experts_per_token * width
    return norms + attention + feed_forward


def _attention_bytes(setting: Setting, microbatch: int) -> int:
    """Scores that only `eager` keeps: before and after the softmax, in float32 and as computed."""
    if setting.attention != "eager":
        return 0
    return microbatch * setting.card.heads * setting.context_length**2 * (4 + 2 * setting.width)


def _mask_bytes(setting: Setting, microbatch: int) -> int:
    """The float32 mask that isolates samples, shared by all layers."""
    return microbatch * setting.context_length**2 * 4 if setting.attention in ("sdpa", "eager") else 0
