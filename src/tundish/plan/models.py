"""Model cards: what is known of each supported model, read from `yamls/model/<family>.yaml`.

A card answers what planning needs (context, sizes, chat rules) without asking a model hub. A Hugging Face folder gets
a card of its own from its `config.json`, by the same family's key names.
"""

import difflib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import yaml

from tundish.base.home import yamls_dir
from tundish.base.model_files import check_files, is_model_folder, license_files, read_bytes, read_json
from tundish.errors import SpecError

UNKNOWN_LICENSE = "unknown"
DECLARED = re.compile(r"""^(license(?:_name)?):[ \t]*["']?([\w.+ -]*[\w.+-])["']?[ \t]*(?:#.*)?$""", re.MULTILINE)
"""License lines of a model card's front matter."""
OPTIONAL_NUMBERS = ("tied_embeddings", "head_size", "experts", "experts_per_token", "key_value_heads")
LARGEST: Mapping[str, int] = {
    "max_context_length": 1 << 30,
    "layers": 1_000,
    "hidden_size": 1 << 17,
    "heads": 1 << 12,
    "key_value_heads": 1 << 12,
    "head_size": 1 << 13,
    "feed_forward_size": 1 << 20,
    "vocabulary_size": 1 << 22,
    "experts": 1_024,
    "experts_per_token": 1_024,
}
"""Upper limits of a model folder's numbers, several times those of the largest models. A larger number is damage:
building such a model would take all memory."""
MOST_EXPERTS = 1 << 15
FRACTIONS = ("rms_norm_eps", "rope_theta", "attention_dropout", "initializer_range")
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
    """Whether the hub asks for a license agreement and a token."""
    license: str = UNKNOWN_LICENSE
    """The hub's identifier of the license; of a folder, what its files declare, or UNKNOWN_LICENSE."""
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

    def isolating_attentions(self, device: str) -> list[str]:
        """The attention implementations that keep packed samples apart on a kind of device."""
        everywhere = ["sdpa", "eager"]
        if device == "cpu":
            return everywhere
        return list(dict.fromkeys(["flash_attention_2", self.gpu_attention, *everywhere]))


@cache
def _families() -> dict[str, dict[str, Any]]:
    return {path.stem: yaml.safe_load(path.read_text()) for path in sorted((yamls_dir() / "model").glob("*.yaml"))}


def _by_type() -> dict[str, str]:
    """The family of each architecture that transformers knows by a name."""
    return {model_type: family for family, content in _families().items() for model_type in content["model_types"]}


@cache
def model_cards() -> Mapping[str, ModelCard]:
    """All supported models by name, in the order of the YAML files."""
    cards: dict[str, ModelCard] = {}
    for family, content in _families().items():
        for name, numbers in content["cards"].items():
            cards[name] = ModelCard(name=name, family=family, **(_common(content) | numbers))
    return cards


def _common(family: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults of all cards of a family."""
    shared = {key: family[key] for key in ("system_message", "gpu_attention")}
    return {"learning_rate": DEFAULT_LEARNING_RATE, **shared}


def foundry_layers(card: ModelCard) -> list[dict[str, Any]]:
    """The LLM Foundry YAML layers of the card's family, then those of `yamls/scale.yaml` for its size."""
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
    if is_model_folder(model):
        return _folder_card(Path(model))
    near = difflib.get_close_matches(model, cards, n=3, cutoff=0.4)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise SpecError(
        f"model: {model!r} is neither a supported model nor a folder on this machine.{hint} "
        "`tundish models` lists the supported names; a folder needs a config.json."
    )


def _folder_card(folder: Path) -> ModelCard:
    check_files(str(folder))
    config_path, config = folder / "config.json", read_json(folder, "config.json")
    family = _by_type().get(str(config.get("model_type")))
    if family is None:
        raise SpecError(
            f"model: {config_path}: model_type {config.get('model_type')!r} is not supported; "
            f"tundish trains {', '.join(sorted(_by_type()))}. Use a model of these architectures."
        )
    content = _families()[family]
    keys = cast(dict[str, str], content["config_keys"])
    numbers = {name: value for name, key in keys.items() if (value := _lookup(config, key)) is not None}
    if missing := [key for name, key in keys.items() if name not in numbers and name not in OPTIONAL_NUMBERS]:
        raise SpecError(f"model: {config_path}: {', '.join(missing)} is missing. Complete the model's config.")
    if problems := [*_number_problems(numbers, keys), *_setting_problems(config)]:
        raise SpecError([f"model: {config_path}: {problem} Correct the model's config." for problem in problems])
    numbers.setdefault("key_value_heads", numbers["heads"])
    return ModelCard(
        name=str(folder.resolve()), display_name=folder.resolve().name, family=family, gated=False,
        license=_folder_license(folder), **_common(content), **numbers,
    )  # fmt: skip


def _number_problems(numbers: Mapping[str, Any], keys: Mapping[str, str]) -> Iterator[str]:
    """Numbers from which no model can be built."""
    if problems := list(_range_problems(numbers, keys)):
        yield from problems
        return
    head_size = numbers.get("head_size")
    for name, divisor in [("heads", "key_value_heads"), *([] if head_size else [("hidden_size", "heads")])]:
        if numbers[name] % numbers.get(divisor, 1):
            text = f"must be a multiple of {keys[divisor]} ({numbers[divisor]:,}), not {numbers[name]:,}."
            yield f"{keys[name]}: {text}"
    if (head_size or numbers["hidden_size"] // numbers["heads"]) % 2:
        name = "head_size" if head_size else "hidden_size"
        text = f"must give each head an even number of channels, but is {numbers[name]:,}."
        yield f"{keys[name]}: {text}"
    experts, used = numbers.get("experts", 1), numbers.get("experts_per_token", 1)
    if used > experts:
        yield f"{keys['experts_per_token']}: must be at most {keys['experts']} ({experts:,}), not {used:,}."
    if experts * numbers["layers"] > MOST_EXPERTS:
        text = f"must come to at most {MOST_EXPERTS:,} in all layers, not {experts:,} in each of {numbers['layers']:,}."
        yield f"{keys['experts']}: {text}"


def _range_problems(numbers: Mapping[str, Any], keys: Mapping[str, str]) -> Iterator[str]:
    for name, value in numbers.items():
        if name == "tied_embeddings":
            allowed, fits = "true or false", type(value) is bool
        else:
            allowed = f"an integer from 1 to {LARGEST[name]:,}"
            fits = type(value) is int and 1 <= value <= LARGEST[name]
        if not fits:
            yield f"{keys[name]}: must be {allowed}, not {repr(value)[:80]}."


def _setting_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """Settings with which the first step would fail."""
    for key in FRACTIONS:
        value = config.get(key)
        if value is not None and not (type(value) in (int, float) and 0 <= value < math.inf):
            yield f"{key}: must be a number of at least 0, not {repr(value)[:80]}."


def check_config(model: str) -> None:
    """Make sure that a model can be built from a folder's config, also of an architecture that is only exported.

    Raises:
        SpecError: it cannot, or its numbers are too large.
    """
    if not is_model_folder(model):
        return
    config = read_json(Path(model), "config.json")
    if str(config.get("model_type")) in _by_type():
        find_card(model)
        return
    for content in _families().values():
        for name, key in cast(dict[str, str], content["config_keys"]).items():
            value = _lookup(config, key)
            if type(value) is int and value > LARGEST.get(name, value):
                text = f"{key}: must be at most {LARGEST[name]:,}, not {repr(value)[:80]}."
                raise SpecError(f"model: {Path(model) / 'config.json'}: {text} Correct the model's config.")


def license_of(model: str) -> str:
    """The license of a supported model or of a folder; UNKNOWN_LICENSE if it has none, or does not exist."""
    try:
        return find_card(model).license
    except SpecError:
        return UNKNOWN_LICENSE


def _folder_license(folder: Path) -> str:
    """What a folder's README.md declares, in the hub's way, else the title of its license file."""
    if (folder / "README.md").exists() and (declared := _declared_license(_text(folder, "README.md"))):
        return declared
    for name in license_files(folder):
        lines = map(str.strip, _text(folder, name).splitlines())
        if name.upper().startswith(("LICENSE", "LICENCE")) and (title := next(filter(None, lines), None)):
            return "".join(letter for letter in title[:100] if letter.isprintable())
    return UNKNOWN_LICENSE


def _declared_license(readme: str) -> str | None:
    """`license` of the front matter; `license_name` where the hub has no identifier for it (`other`).

    Only these lines are read: parsed as YAML, a hostile file could nest or expand without limit.
    """
    parts = re.split(r"^---[ \t]*$", readme, maxsplit=2, flags=re.MULTILINE)
    if len(parts) < 3 or parts[0].strip():
        return None
    declared = dict(DECLARED.findall(parts[1]))
    return (declared.get("license_name") if declared.get("license") == "other" else None) or declared.get("license")


def _text(folder: Path, name: str) -> str:
    return read_bytes(folder, name).decode(errors="replace")


def _lookup(config: Mapping[str, Any], dotted_key: str) -> Any:
    value: Any = config
    for part in dotted_key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value
