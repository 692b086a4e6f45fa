"""Weights of a checkpoint: which ones it has, and whether they are those of a model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tundish.checkpoints import MODEL_PREFIX, StoredTensor, check_complete, read_tensors
from tundish.errors import CheckpointError, SpecError
from tundish.paths import resolve

WEIGHT_PREFIX = f"{MODEL_PREFIX}model."
"""Composer's name of the Hugging Face model inside its state dict."""
SHOWN = 5
Shapes = Mapping[str, tuple[int, ...]]


def resolve_weights(given: str) -> Path:
    """The place that `custom_weights_path` stands for: an `ep#-ba#` folder, a `.pt` file, or what `.symlink` names.

    Loads neither weights nor torch; `check_weights` looks inside.

    Raises:
        SpecError: there is nothing of that kind at the path.
        CheckpointError: the folder is incomplete or its metadata names what no checkpoint needs.
    """
    path = Path(resolve(given))
    if path.suffix == ".symlink" and path.is_file():
        target = Path(path.read_text().strip())
        path = target if target.is_absolute() else path.parent / target
    if path.is_dir():
        check_complete(path)
        return path
    if path.suffix == ".pt" and path.is_file():
        return path
    found = "is another kind of file" if path.exists() else f"there is nothing there ({path})"
    raise SpecError(
        f"custom_weights_path: {given}: {found}; allowed is an ep…-ba… folder, a .symlink or a .pt file. "
        "Copy the path from get_checkpoints()."
    )


def check_weights(path: Path, model: str) -> None:
    """Make sure that loading `path` (what `resolve_weights` gave) runs no code and gives all weights of `model`.

    Raises:
        CheckpointError: it is damaged or unsafe, or another model's.
    """
    found = {name: tensor.shape for name, tensor in read_weights(path).items()} if path.is_dir() else _pt_shapes(path)
    check_shapes(path, found, expected_shapes(model_config(model)))


def read_weights(checkpoint: Path) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint's model by their Hugging Face names.

    Raises:
        CheckpointError: it is damaged or unsafe.
    """
    tensors = read_tensors(checkpoint).items()
    return {_plain(name): tensor for name, tensor in tensors if name.startswith(WEIGHT_PREFIX)}


def model_config(model: str) -> Any:
    """The `transformers` config of a model's name or folder."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model, trust_remote_code=False)


def expected_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight that the config asks for, tied ones once; nothing is allocated."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    tied = set(getattr(model, "_tied_weights_keys", None) or ()) if config.tie_word_embeddings else set[str]()
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}


def fit_vocabulary(config: Any, weights: Mapping[str, StoredTensor], tokens: int, checkpoint: Path) -> None:
    """Give `config` the vocabulary of the checkpoint, where tokens were added before it was trained.

    Raises:
        CheckpointError: the tokenizer has more tokens than the checkpoint's embedding.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    embedding = model.get_input_embeddings().weight
    name = next(name for name, tensor in model.named_parameters() if tensor is embedding)
    stored = weights.get(name)
    if stored is None or len(stored.shape) != 2 or stored.shape[0] == config.vocab_size:
        return  # what is missing is told with everything else
    if tokens > stored.shape[0]:
        raise CheckpointError(
            f"{checkpoint}: its vocabulary has {stored.shape[0]:,} tokens, the model's tokenizer {tokens:,}. "
            "Give the model that the run started from."
        )
    config.vocab_size = stored.shape[0]


def check_shapes(checkpoint: Path, found: Shapes, expected: Shapes) -> None:
    """Compare what a checkpoint has with what a model needs.

    Raises:
        CheckpointError: a weight is missing or has another shape.
    """
    missing = [name for name in expected if name not in found]
    other = [
        f"{name} {list(found[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if missing or other:
        raise CheckpointError(
            f"{checkpoint}: not a checkpoint of this model: {len(missing) + len(other)} of its {len(expected)} weights "
            f"differ. Missing: {_some(missing)}. Of another shape: {_some(other)}. Use a checkpoint of the same model."
        )


def _pt_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    from tundish.checkpoints.loading import read_model_file

    return {_plain(name): tuple(tensor.shape) for name, tensor in read_model_file(path).items()}


def _plain(name: str) -> str:
    # Activation checkpointing wraps layers, and the wrapper's name may stand inside theirs.
    return name.removeprefix(WEIGHT_PREFIX).replace("_checkpoint_wrapped_module.", "")


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more if names else "none"
