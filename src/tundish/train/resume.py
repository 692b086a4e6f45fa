"""Loads the newest complete checkpoint of a run, or the weights that a run starts from; no code in them is run."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from composer import State
from composer.utils import dist, reproducibility
from composer.utils.checkpoint import glob_filter

from tundish.base import events
from tundish.base.run_folder import RunFolder
from tundish.checkpoints.folder import read_checkpoint
from tundish.checkpoints.format.metadata import Layout
from tundish.checkpoints.format.objects import read_object
from tundish.checkpoints.format.pickles import reason, shown
from tundish.checkpoints.loading import load
from tundish.checkpoints.save_folder import SaveFolder
from tundish.checkpoints.saving import clean
from tundish.errors import CheckpointError
from tundish.train.saver import patient_group

ALGORITHMS = ("state", "algorithms")


def newest_checkpoint(place: SaveFolder) -> Path | None:
    """This machine's copy of the checkpoint to resume from, the same on every rank; None = start from the beginning.

    Removes or completes first what a killed process left unfinished.

    Raises:
        CheckpointError: the save folder cannot be reached, or what it holds is damaged.
    """
    # Path, error or None, decided by rank 0 for all ranks.
    newest: list[Path | CheckpointError | None] = [None]
    if dist.get_global_rank() == 0:
        try:
            clean(place.local)
            folder = place.newest()
            if folder is not None and not place.is_remote:
                place.publish(folder)
            newest = [folder]
        except CheckpointError as error:
            # A run that has saved nothing has nothing to resume from: it can train while its store is down.
            newest = [error if _may_have_saved() else None]
        except OSError as error:
            newest = [CheckpointError(f"{place.local}: cannot be cleaned up ({reason(error)}). Check its permissions.")]
    if (group := patient_group()) is not None:
        torch.distributed.broadcast_object_list(newest, src=0, group=group)
    if isinstance(newest[0], CheckpointError):
        raise newest[0]
    return newest[0]


def _may_have_saved() -> bool:
    """Whether a store that does not answer may hold a checkpoint of this run."""
    run = RunFolder.of_this_process()
    return run is None or any(event.type == "CHECKPOINT_SAVED" for event in events.read(run.events))


def load_all(state: State, logger: Any, checkpoint: Path, ignore_keys: list[str]) -> list[dict[str, Any]]:
    """Load everything that training continues with; called on every rank.

    Args:
        state: of the run, with model and optimizer built and sharded.
        logger: of Composer.
        checkpoint: an `ep#-ba#` folder written on any number of ranks.
        ignore_keys: Composer's patterns of what is left out.

    Returns:
        The random state of each rank that saved the checkpoint.

    Raises:
        CheckpointError: it is damaged, unsafe, of another model, or of other algorithms.
    """
    layout = read_checkpoint(checkpoint)
    check_algorithms(state, layout, checkpoint)
    content: dict[str, Any] = {"state": state.state_dict(), "rng": _random_states(layout)}
    # Metadata is for people only; descriptions of algorithms are what Composer would pass to `eval`.
    del content["state"]["metadata"], content["state"]["algorithms"]
    if ignore_keys:
        glob_filter(ignore_keys)(content)
    with torch.no_grad():
        load(content, checkpoint)
        with _fitting(checkpoint):
            state.load_state_dict(content["state"], logger, strict=True)
            # Tried here, where a damaged state gives a sentence; Composer sets it when training begins.
            reproducibility.load_rng_state(content.get("rng", []))
    return content.get("rng", [])


def _random_states(layout: Layout) -> list[dict[str, Any]]:
    """As many ranks as the checkpoint has, with the keys it has of each: saved on a CPU, it has no state of a GPU."""
    known = {path[1:3] for path in layout.paths.values() if path[0] == "rng" and len(path) > 2}
    states = reproducibility.get_rng_state()[: len({rank for rank, _ in known})]
    return [{key: value for key, value in state.items() if (rank, key) in known} for rank, state in enumerate(states)]


@contextmanager
def _fitting(checkpoint: Path) -> Iterator[None]:
    """What Composer raises on a checkpoint's values, as a CheckpointError."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RecursionError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{checkpoint}: cannot be resumed ({reason(error)}). Use another checkpoint of the same run."
        ) from error


def load_weights(state: State, logger: Any, path: Path, strict: bool) -> None:
    """Load the model's weights and nothing else; called on every rank.

    Args:
        state: of the run, with its model built and sharded.
        logger: of Composer.
        path: an `ep#-ba#` folder written on any number of ranks, or a `.pt` file of Composer.
        strict: whether every weight must be there.

    Raises:
        CheckpointError: it is damaged, unsafe, or of another model.
    """
    content: dict[str, Any] = {"state": {"model": state.get_model_state_dict()}}
    with torch.no_grad():
        load(content, path)
        with _fitting(path):
            state.load_state_dict(content["state"], logger, strict=strict)


def check_algorithms(state: State, layout: Layout, checkpoint: Path) -> None:
    """Compare the names of the algorithms that a checkpoint was trained with with those of the run.

    Raises:
        CheckpointError: they differ.
    """
    # Composer would build missing ones from their description by `eval`.
    parts = {path[2:]: layout.objects.get(name) for name, path in layout.paths.items() if path[:2] == ALGORITHMS}
    # One entry for all of them, or one for each part of each.
    whole = parts.get(())
    entries = (
        read_object(whole)
        if whole
        else [read_object(part) for path, part in sorted(parts.items(), key=str) if path[1:] == (0,) and part]
    )
    names = [_name(entry) for entry in (entries if isinstance(entries, list | tuple) else [entries])]
    expected = [type(algorithm).__qualname__ for algorithm in state.algorithms]
    if names != expected:
        raise CheckpointError(
            f"{checkpoint}: was trained with the algorithms {names}, but this run has {expected}. Nothing was loaded. "
            "Set the same ones (overrides: algorithms), or use another checkpoint."
        )


def _name(entry: Any) -> str:
    """An algorithm's name in a checkpoint: the first of a pair, or the entry itself."""
    name = entry[0] if isinstance(entry, list | tuple) and entry else entry
    return shown(name) if isinstance(name, str) else f"a {type(name).__name__}"
