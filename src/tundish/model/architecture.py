"""The weights that a model's config needs: name and shape of each; without torch if they were computed before."""

import hashlib
import importlib.metadata
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tundish.base.files import make_folder, write_atomic
from tundish.base.home import architectures_dir
from tundish.base.model_files import check_files, is_model_folder, read_bytes
from tundish.errors import SpecError
from tundish.plan.models import check_config

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """The weights of a model, as transformers names them."""

    class_name: str
    """Its class in transformers."""
    prefix: str
    """What names lack if the model was saved without its head."""
    shapes: dict[str, tuple[int, ...]]
    """Of every weight; tied ones once."""
    tied: dict[str, tuple[int, ...]]
    """Of second names of tied weights, which files may contain or not."""
    optional: tuple[str, ...]
    """Patterns of names that may be missing."""
    surplus: tuple[str, ...]
    """Patterns of names that files may contain, but the model does not use."""


def architecture_of(model: str) -> Architecture:
    """The weights that a model's config needs. Those of a folder are cached, as computing them loads torch.

    Args:
        model: name or folder.

    Raises:
        SpecError: transformers does not support the config.
    """
    if not is_model_folder(model):
        return architecture_in(model_config(model))
    facts = read_bytes(Path(model), "config.json") + importlib.metadata.version("transformers").encode()
    kept = architectures_dir() / f"{hashlib.sha256(facts).hexdigest()[:24]}.json"
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or damaged: computed again
        return _from_json(json.loads(kept.read_text()))
    architecture = architecture_in(model_config(model))
    make_folder(kept.parent)
    write_atomic(kept, json.dumps(asdict(architecture)))
    return architecture


def _from_json(content: Mapping[str, Any]) -> Architecture:
    shapes, tied = ({name: tuple(shape) for name, shape in content[key].items()} for key in ("shapes", "tied"))
    optional, surplus = (tuple(content[key]) for key in ("optional", "surplus"))
    return Architecture(
        class_name=content["class_name"], prefix=content["prefix"], shapes=shapes, tied=tied, optional=optional,
        surplus=surplus,
    )  # fmt: skip


def model_config(model: str) -> Any:
    """The `transformers` config of a model's name or folder.

    Raises:
        SpecError: it cannot be loaded.
    """
    from transformers import AutoConfig

    check_files(model)
    check_config(model)
    try:
        with _quiet():
            return AutoConfig.from_pretrained(model, trust_remote_code=False)
    except Exception as error:
        raise SpecError(f"model: {model}: its config cannot be loaded ({_reason(error)}). Check the model.") from error


def architecture_in(config: Any) -> Architecture:
    """The weights that a config needs; none is allocated.

    Raises:
        SpecError: transformers cannot build its model.
    """
    model = hollow(config)
    tied_names = set(getattr(model, "_tied_weights_keys", None) or ()) if config.tie_word_embeddings else set[str]()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    # Buffers that old files contain, and that are computed today.
    surplus = [r"rotary_emb\.inv_freq$", *(model._keys_to_ignore_on_load_unexpected or ())]
    return Architecture(
        class_name=type(model).__name__,
        prefix=model.base_model_prefix,
        shapes={name: shape for name, shape in shapes.items() if name not in tied_names},
        tied={name: shape for name, shape in shapes.items() if name in tied_names},
        optional=tuple(model._keys_to_ignore_on_load_missing or ()),
        surplus=tuple(surplus),
    )


def hollow(config: Any) -> Any:
    """The model of a config on the meta device: its weights take no memory.

    Raises:
        SpecError: transformers cannot build it.
    """
    import torch
    import transformers.modeling_utils  # its own imports fail while a device is set
    from transformers import AutoModelForCausalLM

    assert transformers.modeling_utils
    try:
        with _quiet(), torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # any value of a config may lead to any error
        text = f"transformers cannot build a model from its config ({_reason(error)})"
        raise SpecError(f"model: {config._name_or_path}: {text}. Use the model's original config.json.") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' warnings about files that the user did not write; errors are raised."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
