"""Loading: the newest complete checkpoint of a run that was killed, or the weights that a run starts from."""

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
    """This machine's copy of the checkpoint to go on from, the same on every rank; None = begin.

    What a killed process has left half done is put in order.

    Raises:
        CheckpointError: the place cannot be reached, or what it holds is damaged.
    """
    found: list[Path | CheckpointError | None] = [None]
    if dist.get_global_rank() == 0:
        try:
            clean(place.local)
            newest = place.newest()
            if newest is not None and not place.is_remote:
                place.publish(newest)
            found = [newest]
        except CheckpointError as error:
            found = [error if _may_have_saved() else None]
        except OSError as error:
            found = [
                CheckpointError(f"{place.local}: cannot be put in order ({reason(error)}). Check its permissions.")
            ]
    if (group := patient_group()) is not None:
        torch.distributed.broadcast_object_list(found, src=0, group=group)
    if isinstance(found[0], CheckpointError):
        raise found[0]
    return found[0]


def _may_have_saved() -> bool:
    """Whether there may be a checkpoint, though its store does not answer."""
    run = RunFolder.of_this_process()
    return run is None or any(event.type == "CHECKPOINT_SAVED" for event in events.read(run.events))


def load_all(state: State, logger: Any, checkpoint: Path, ignore_keys: list[str]) -> list[dict[str, Any]]:
    """Load everything that training goes on with; on every rank.

    Args:
        state: the run's, its model and optimizer made and sharded.
        logger: Composer's.
        checkpoint: an `ep#-ba#` folder written on any number of ranks.
        ignore_keys: Composer's patterns of what is left out.

    Returns:
        The random state of each rank that the checkpoint knows.

    Raises:
        CheckpointError: it is damaged or unsafe, or of another model or other algorithms.
    """
    layout = read_checkpoint(checkpoint)
    check_algorithms(state, layout, checkpoint)
    content: dict[str, Any] = {"state": state.state_dict(), "rng": _random_states(layout)}
    # Facts for people; and Composer evaluates what a checkpoint says of its algorithms.
    del content["state"]["metadata"], content["state"]["algorithms"]
    if ignore_keys:
        glob_filter(ignore_keys)(content)
    with torch.no_grad():
        load(content, checkpoint)
        with _fitting(checkpoint):
            state.load_state_dict(content["state"], logger, strict=True)
            # Composer sets it when training begins, where what is wrong with it would end in a traceback.
            reproducibility.load_rng_state(content.get("rng", []))
    return content.get("rng", [])


def _random_states(layout: Layout) -> list[dict[str, Any]]:
    """Of as many ranks as the checkpoint knows, with what it knows of each: a processor has no state of a GPU's."""
    known = {path[1:3] for path in layout.paths.values() if path[0] == "rng" and len(path) > 2}
    states = reproducibility.get_rng_state()[: len({rank for rank, _ in known})]
    return [{key: value for key, value in each.items() if (rank, key) in known} for rank, each in enumerate(states)]


@contextmanager
def _fitting(checkpoint: Path) -> Iterator[None]:
    """What Composer finds wrong with a checkpoint's values is an error of the checkpoint."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RecursionError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{checkpoint}: cannot be gone on from ({reason(error)}). Use another checkpoint of the same run."
        ) from error


def load_weights(state: State, logger: Any, path: Path, strict: bool) -> None:
    """Load the model's weights and nothing else; on every rank.

    Args:
        state: the run's, its model made and sharded.
        logger: Composer's.
        path: an `ep#-ba#` folder written on any number of ranks, or a `.pt` file of Composer.
        strict: whether every weight must be there.

    Raises:
        CheckpointError: it is damaged or unsafe, or of another model.
    """
    content: dict[str, Any] = {"state": {"model": state.get_model_state_dict()}}
    with torch.no_grad():
        load(content, path)
        with _fitting(path):
            state.load_state_dict(content["state"], logger, strict=strict)


def check_algorithms(state: State, layout: Layout, checkpoint: Path) -> None:
    """Compare the algorithms that a checkpoint was trained with, as text, with the run's.

    Composer would build those that are missing from their description, by `eval`.

    Raises:
        CheckpointError: they differ.
    """
    said = {path[2:]: layout.objects.get(name) for name, path in layout.paths.items() if path[:2] == ALGORITHMS}
    # One entry for all of them, or one for each part of each.
    whole = said.get(())
    found = (
        read_object(whole)
        if whole
        else [read_object(part) for path, part in sorted(said.items(), key=str) if path[1:] == (0,) and part]
    )
    names = [_name(entry) for entry in (found if isinstance(found, list | tuple) else [found])]
    wanted = [type(algorithm).__qualname__ for algorithm in state.algorithms]
    if names != wanted:
        raise CheckpointError(
            f"{checkpoint}: was trained with the algorithms {names}, this run has {wanted}. They were not loaded. "
            "Set the same ones (overrides: algorithms), or use another checkpoint."
        )


def _name(entry: Any) -> str:
    """What a checkpoint calls an algorithm: the first of a pair, or all there is."""
    name = entry[0] if isinstance(entry, list | tuple) and entry else entry
    return shown(name) if isinstance(name, str) else f"a {type(name).__name__}"
