"""`tundish export` and `tundish checkpoints`: existing checkpoints, of runs or of other programs."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from tundish.base.files import make_folder
from tundish.base.home import copies_dir
from tundish.checkpoints.folder import in_order
from tundish.checkpoints.save_folder import SaveFolder, save_folder_of
from tundish.errors import CheckpointError, RunNotFoundError, SpecError
from tundish.export.plan import ExportDtype
from tundish.export.safetensors import BytesWritten, export
from tundish.model.weights import fetch_weights
from tundish.plan.address import Address
from tundish.plan.spec import RunSpec, TaskType
from tundish.runs.checkpoint_addresses import checkpoint_address
from tundish.runs.reading import find_run, run_names, trackings


@dataclass(frozen=True, slots=True)
class Exportable:
    """A checkpoint on this machine, and what is needed to export it."""

    checkpoint: Path
    model: str
    task_type: TaskType
    name: str
    """Name of its run, or of the folder that it is in."""


def find_exportable(given: str, model: str | None = None) -> Exportable:
    """The newest checkpoint of a run, or the checkpoint at a path or URI.

    Args:
        given: name of the run, path or URI.
        model: name or folder of the base model; required if no run of this machine made the checkpoint.

    Raises:
        RunNotFoundError: there is neither a run nor a path of that name.
        RunDamagedError: the spec of the run is damaged.
        SpecError: there is no such checkpoint, or its base model is unknown.
        CheckpointError: it is damaged, or cannot be downloaded.
    """
    address = ""
    if given in run_names():
        run = find_run(given)
        checkpoint = SaveFolder(run.read_tracking().save_folder).newest()
        if checkpoint is None:
            raise CheckpointError(f"{given} has no complete checkpoint yet. Wait for its first CHECKPOINT_SAVED event.")
    else:
        address = _address(given)
        checkpoint = fetch_weights(address)
        save_folder = save_folder_of(address)[0].address
        run = next((run for run, tracking in trackings() if tracking.save_folder == save_folder), None)
    if run is None and model is None:
        raise SpecError(
            f"{given} was not made by a run of this machine, so its base model is unknown. Give --model, the name or "
            "folder of the model that the training started from."
        )
    spec = None if run is None else RunSpec.read(run)
    return Exportable(
        checkpoint=checkpoint,
        model=model or (spec.model if spec else ""),
        # This task leaves the tokenizer of the model unchanged.
        task_type=spec.task_type if spec else "INSTRUCTION_FINETUNE",
        name=spec.run_name if spec else _name(address),
    )


def export_checkpoint(
    exportable: Exportable, out: Path, dtype: ExportDtype, progress: BytesWritten | None = None
) -> None:
    """Export a checkpoint as a Hugging Face folder.

    Raises:
        SpecError: `out` already exists.
        CheckpointError: the checkpoint is damaged, or does not fit the model.
    """
    if exportable.checkpoint.suffix == ".pt":
        raise SpecError(
            f"{exportable.checkpoint} is a single file; an ep…-ba… folder is expected. Load the file with transformers."
        )
    export(exportable.checkpoint, exportable.model, exportable.task_type, out, dtype, progress)


def local_checkpoints(given: str) -> Iterator[tuple[str, Path | CheckpointError]]:
    """The checkpoints of a run, in a save_folder, or at a path or URI: names, and run on this machine.

    One in an object store is downloaded, and the copy removed before the next one; if that fails, the error is yielded.

    Raises:
        RunNotFoundError: there is neither a run nor a path of that name.
        RunDamagedError: the file that says where the run's checkpoints are is damaged.
        CheckpointError: the object store cannot be reached.
    """
    if is_run := given in run_names():
        place = SaveFolder(find_run(given).read_tracking().save_folder)
    else:
        place = SaveFolder(_address(given).rstrip("/"))
    if not place.is_remote:
        # Incomplete ones as well: they are to be checked.
        if not place.local.is_dir() and not is_run:
            raise SpecError(f"{given}: the folder does not exist. Copy the path from get_checkpoints().")
        local = in_order(place.local.iterdir()) if place.local.is_dir() else []
        yield from ((path.name, path) for path in local or ([] if is_run else [place.local]))
        return
    names = [address.rpartition("/")[2] for address in place.list()]
    if not names and not is_run:
        place, name = save_folder_of(place.address)
        names = [name]
    for name in names:
        with TemporaryDirectory(dir=make_folder(copies_dir()), prefix=".verify-") as scratch:
            try:
                copy: Path | CheckpointError = place.copy(name, Path(scratch))
            except CheckpointError as error:
                copy = error
            yield name, copy


def _address(given: str) -> str:
    if "/" not in given and not Path(given).exists():
        find_run(given)  # its error suggests similar names
        raise RunNotFoundError(f"there is no run {given!r}.")
    return checkpoint_address(Address.parse(given, "checkpoint"))


def _name(address: str) -> str:
    """A name for the checkpoints of another program: that of their folder."""
    parents = [part for part in address.split("/")[:-1] if part not in ("", ".", "checkpoints")]
    return parents[-1] if parents else "checkpoint"
