"""Model cards: what is known of each supported model, read from `yamls/model/<family>.yaml`.

A card answers what planning needs (context, sizes, chat rules) without asking a model hub. A Hugging Face folder gets
a card of its own from its `config.json`, by the same family's key names.
"""

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from tundish.errors import SpecError
from tundish.paths import yamls_dir

UNKNOWN_LICENSE = "unknown"
DEFAULT_LEARNING_RATE = 5e-7
"""The managed service's peak learning rate for every model whose card names no other."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelCard:
    """One model: its name, its limits and its architecture's numbers."""

    name: str
    """Hugging Face name, or the path of a Hugging Face folder."""
    display_name: str
    max_context_length: int
    """Tokens."""
    family: str
    """The file in `yamls/model/` that the card comes from."""
    gated: bool
    """Whether the hub asks for a licence agreement and a token."""
    license: str = UNKNOWN_LICENSE
    """The hub's identifier of the licence; of a folder, what it says of itself, or UNKNOWN_LICENSE."""
    system_message: bool
    """Whether the family's chat template takes a system message."""
    gpu_attention: str
    """The attention that isolates packed samples on a GPU where flash-attn is not installed."""
    learning_rate: float
    """Default peak learning rate."""
    layers: int
    hidden_size: int
    heads: int
    key_value_heads: int
    feed_forward_size: int
    """Of one expert, where there are several."""
    vocabulary_size: int
    experts: int = 1
    """Feed-forward blocks a layer; 1 = dense."""
    experts_per_token: int = 1
    """How many of them a token takes."""
    tied_embeddings: bool = False
    head_size: int | None = None
    """Channels of one attention head; None = hidden_size / heads."""

    @property
    def parameters(self) -> int:
        """Number of weights, from the architecture's numbers."""
        head_size = self.head_size or self.hidden_size // self.heads
        attention = 2 * self.hidden_size * head_size * (self.heads + self.key_value_heads)
        feed_forward = 3 * self.hidden_size * self.feed_forward_size * self.experts
        router = self.hidden_size * self.experts if self.experts > 1 else 0
        layer = attention + feed_forward + router + 2 * self.hidden_size
        embeddings = self.vocabulary_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        return self.layers * layer + embeddings + self.hidden_size


@cache
def _families() -> dict[str, dict[str, Any]]:
    return {path.stem: yaml.safe_load(path.read_text()) for path in sorted((yamls_dir() / "model").glob("*.yaml"))}


@cache
def model_cards() -> Mapping[str, ModelCard]:
    """All supported models by name, in the order of the YAML files."""
    cards: dict[str, ModelCard] = {}
    for family, content in _families().items():
        for name, numbers in content["cards"].items():
            cards[name] = ModelCard(name=name, family=family, **(_common(content) | numbers))
    return cards


def _common(family: Mapping[str, Any]) -> dict[str, Any]:
    """What all cards of a family share, unless they say otherwise."""
    shared = {key: family[key] for key in ("system_message", "gpu_attention")}
    return {"learning_rate": DEFAULT_LEARNING_RATE, **shared}


def foundry_layers(card: ModelCard) -> list[dict[str, Any]]:
    """The LLM-Foundry YAML layers of the card's family, then those of `yamls/scale.yaml` for its size."""
    scale = yaml.safe_load((yamls_dir() / "scale.yaml").read_text())
    steps = [step["foundry"] for step in scale if card.parameters > step["above_parameters"]]
    return [_families()[card.family].get("foundry", {}), *steps]


def find_card(model: str) -> ModelCard:
    """The card of a supported model's name or of a Hugging Face folder.

    Raises:
        SpecError: the name is not supported (near names are listed), or the folder is not a supported model's.
    """
    cards = model_cards()
    # The 3.1 models were renamed on the hub; callers use either spelling.
    for spelling in (model, model.replace("/Llama-3.1-", "/Meta-Llama-3.1-")):
        if spelling in cards:
            return cards[spelling]
    if _is_folder(model):
        return _folder_card(Path(model))
    near = difflib.get_close_matches(model, cards, n=3, cutoff=0.4)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise SpecError(
        f"model: {model!r} is neither a supported model nor a folder on this machine.{hint} "
        "`tundish models` lists the supported names; a folder needs a config.json."
    )


def _is_folder(text: str) -> bool:
    try:
        return Path(text).is_dir()
    except OSError:
        # A text too long for a path.
        return False


def _folder_card(folder: Path) -> ModelCard:
    config_path = folder / "config.json"
    try:
        config = json.loads(config_path.read_text())
    except (OSError, ValueError) as error:
        raise SpecError(
            f"model: {config_path} cannot be read ({error}). Give the folder of a Hugging Face model."
        ) from error
    if not isinstance(config, dict):
        raise SpecError(f"model: {config_path} holds no JSON object. Give the folder of a Hugging Face model.")
    by_type = {model_type: family for family, content in _families().items() for model_type in content["model_types"]}
    family = by_type.get(str(config.get("model_type")))
    if family is None:
        raise SpecError(
            f"model: {config_path} says model_type {config.get('model_type')!r}; "
            f"tundish trains {', '.join(sorted(by_type))}. Use a model of these architectures."
        )
    content = _families()[family]
    numbers = {name: _lookup(config, key) for name, key in content["config_keys"].items()}
    numbers = {name: value for name, value in numbers.items() if value is not None}
    if wrong := [content["config_keys"][name] for name, value in numbers.items() if not isinstance(value, int)]:
        raise SpecError(f"model: {config_path}: {', '.join(wrong)} must be a whole number. Correct the model's config.")
    numbers.setdefault("key_value_heads", numbers.get("heads"))
    try:
        return ModelCard(
            name=str(folder.resolve()), display_name=folder.resolve().name, family=family, gated=False,
            license=_folder_license(folder), **_common(content), **numbers,
        )  # fmt: skip
    except TypeError as error:
        optional = ("tied_embeddings", "head_size", "experts", "experts_per_token", "key_value_heads")
        missing = [key for name, key in content["config_keys"].items() if name not in numbers and name not in optional]
        raise SpecError(f"model: {config_path} lacks {', '.join(missing)}. Complete the model's config.") from error


def license_of(model: str) -> str:
    """The licence of a supported model, or of a folder; UNKNOWN_LICENSE where the folder is gone or does not say."""
    try:
        return find_card(model).license
    except SpecError:
        return UNKNOWN_LICENSE


def _folder_license(folder: Path) -> str:
    """What a folder's README.md declares, in the hub's way, else the title of its licence file."""
    if declared := _declared_license(folder / "README.md"):
        return declared
    for path in sorted(folder.glob("LICENSE*")):
        if title := next(filter(None, map(str.strip, _text(path).splitlines())), None):
            return title[:100]
    return UNKNOWN_LICENSE


def _declared_license(readme: Path) -> str | None:
    """`license` of the front matter; `license_name` where the hub has no identifier for it (`other`)."""
    parts = re.split(r"^---[ \t]*$", _text(readme), maxsplit=2, flags=re.MULTILINE)
    if len(parts) < 3 or parts[0].strip():
        return None
    try:
        content = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return None  # somebody else's file, which training does not need
    found = content if isinstance(content, dict) else {}
    declared = found.get("license_name") if found.get("license") == "other" else None
    declared = declared or found.get("license")
    return declared if isinstance(declared, str) else None


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _lookup(config: Mapping[str, Any], dotted_key: str) -> Any:
    value: Any = config
    for part in dotted_key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value
