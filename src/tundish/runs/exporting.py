"""`tundish export` and `tundish checkpoints`: earlier checkpoints, of a run or of another program."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from tundish.base.files import make_folder
from tundish.base.home import copies_dir
from tundish.base.run_folder import RunFolder
from tundish.checkpoints.folder import in_order
from tundish.checkpoints.save_folder import SaveFolder, save_folder_of
from tundish.errors import CheckpointError, RunNotFoundError, SpecError
from tundish.export.plan import ExportDtype
from tundish.export.safetensors import Progress, export
from tundish.model.weights import fetch_weights
from tundish.plan.address import Address
from tundish.plan.spec import RunSpec, TaskType
from tundish.runs.checkpoint_addresses import checkpoint_address
from tundish.runs.reading import find_run, run_names, trackings


@dataclass(frozen=True, slots=True)
class Exportable:
    """A checkpoint on this machine and what it is a checkpoint of."""

    checkpoint: Path
    model: str
    task_type: TaskType
    name: str
    """Of its run, or of the folder that it lies in."""


def find_exportable(given: str, model: str | None = None) -> Exportable:
    """The checkpoint that is meant by a run's name (its newest) or by a checkpoint's path or URI.

    Args:
        given: one of them.
        model: name or folder of the base model; needed where no run of this machine has made the checkpoint.

    Raises:
        RunNotFoundError: there is neither run nor path.
        RunDamagedError: the run's folder does not say what it trains.
        SpecError: there is no such checkpoint, or its model is not known.
        CheckpointError: it is damaged, or cannot be fetched.
    """
    address = ""
    if given in run_names():
        paths = find_run(given)
        checkpoint = SaveFolder(paths.read_tracking().save_folder).newest()
        if checkpoint is None:
            raise CheckpointError(f"{given}: has no complete checkpoint yet. Wait for its first CHECKPOINT_SAVED.")
    else:
        address = _address(given)
        checkpoint = fetch_weights(address)
        paths = _run_with(save_folder_of(address)[0].address)
    if paths is None and model is None:
        raise SpecError(
            f"{given}: no run of this machine has made it, so its model is not known. Give --model: name or folder of "
            "the model that the training started from."
        )
    spec = None if paths is None else RunSpec.read(paths)
    return Exportable(
        checkpoint=checkpoint,
        model=model or (spec.model if spec else ""),
        # Without a run, the tokenizer stays as the model has it.
        task_type=spec.task_type if spec else "INSTRUCTION_FINETUNE",
        name=spec.run_name if spec else _name(address),
    )


def export_checkpoint(found: Exportable, out: Path, dtype: ExportDtype, progress: Progress | None = None) -> None:
    """Write a Hugging Face folder of the checkpoint.

    Raises:
        SpecError: `out` is there already.
        CheckpointError: the checkpoint is damaged, or of another model.
    """
    if found.checkpoint.suffix == ".pt":
        raise SpecError(f"{found.checkpoint}: is one file; allowed is an ep…-ba… folder. Load it with transformers.")
    export(found.checkpoint, found.model, found.task_type, out, dtype, progress)


def local_checkpoints(given: str) -> Iterator[tuple[str, Path | CheckpointError]]:
    """The checkpoints that are meant by a run's name, a save_folder or a checkpoint: name, and path on this machine.

    What is kept elsewhere is copied anew, and the copy removed before the next one; or what is wrong with it is told.

    Raises:
        RunNotFoundError: there is neither run nor path.
        RunDamagedError: the run's folder does not say what it trains.
        CheckpointError: the store cannot be asked.
    """
    if is_run := given in run_names():
        place = SaveFolder(find_run(given).read_tracking().save_folder)
    else:
        place = SaveFolder(_address(given).rstrip("/"))
    if not place.is_remote:
        # Damaged ones too, which a list of complete ones leaves out.
        if not place.local.is_dir() and not is_run:
            raise SpecError(f"{given}: there is no such folder. Copy the path from get_checkpoints().")
        found_here = in_order(place.local.iterdir()) if place.local.is_dir() else []
        yield from ((path.name, path) for path in found_here or ([] if is_run else [place.local]))
        return
    names = [address.rpartition("/")[2] for address in place.list()]
    if not names and not is_run:
        place, name = save_folder_of(place.address)
        names = [name]
    for name in names:
        with TemporaryDirectory(dir=make_folder(copies_dir()), prefix=".verify-") as scratch:
            try:
                found: Path | CheckpointError = place.copy(name, Path(scratch))
            except CheckpointError as error:
                found = error
            yield name, found


def _address(given: str) -> str:
    if "/" not in given and not Path(given).exists():
        find_run(given)  # says which names are near
        raise RunNotFoundError(f"there is no run {given!r}.")
    return checkpoint_address(Address.parse(given, "checkpoint"))


def _name(address: str) -> str:
    """Of the folder that somebody's checkpoints are in."""
    above = [part for part in address.split("/")[:-1] if part not in ("", ".", "checkpoints")]
    return above[-1] if above else "checkpoint"


def _run_with(save_folder: str) -> RunFolder | None:
    """The run of this machine that saves there."""
    return next((paths for paths, tracking in trackings() if tracking.save_folder == save_folder), None)
