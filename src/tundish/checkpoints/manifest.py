"""A checkpoint's manifest: size and SHA-256 of each of its files."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from tundish.base.files import write_atomic
from tundish.checkpoints.format.names import member
from tundish.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT = 1
LARGEST_MANIFEST = 64 << 20
"""Bytes; a file takes about 150 of them."""
BLOCK_BYTES = 8 << 20
BytesRead = Callable[[int], None]
"""Called with the number of bytes just read."""


@dataclass(frozen=True, slots=True)
class FileFacts:
    """Size and hash of a file."""

    bytes: int
    sha256: str

    @classmethod
    def of(cls, file: Path, progress: BytesRead | None = None) -> "FileFacts":
        """Those of a file on disk, which is read whole."""
        digest, size = hashlib.sha256(), 0
        with open(file, "rb") as content:
            while block := content.read(BLOCK_BYTES):
                digest.update(block)
                size += len(block)
                if progress is not None:
                    progress(len(block))
        return cls(size, digest.hexdigest())


def write_manifest(folder: Path, files: Mapping[str, FileFacts], base_model: str | None = None) -> None:
    """Write the manifest of a checkpoint, all of whose files exist.

    Args:
        folder: of the checkpoint.
        files: its files by name.
        base_model: the model that training started from, as its run names it.
    """
    content: dict[str, object] = {"format": FORMAT}
    content |= {} if base_model is None else {"base_model": base_model}
    content["files"] = {name: asdict(facts) for name, facts in sorted(files.items())}
    write_atomic(folder / MANIFEST, json.dumps(content, indent=1) + "\n")


def read_manifest(folder: Path) -> dict[str, FileFacts] | None:
    """The files of a checkpoint by name; None without a manifest, as other programs write checkpoints.

    Raises:
        CheckpointError: the manifest is damaged, or names files outside of the folder.
    """
    path = member(folder, MANIFEST)
    if not path.is_file():
        return None
    try:
        if (size := path.stat().st_size) > LARGEST_MANIFEST:
            raise ValueError(f"{size:,} bytes")
        files = json.loads(path.read_text())["files"]
        manifest = {str(name): FileFacts(int(facts["bytes"]), str(facts["sha256"])) for name, facts in files.items()}
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: not a manifest ({type(error).__name__}: {str(error)[:120]!a}). Use another checkpoint."
        ) from error
    for name in manifest:
        member(folder, name)
    return manifest


def base_model(folder: Path) -> str | None:
    """The model that training started from, as its run names it; None if no manifest names it."""
    if read_manifest(folder) is None:
        return None
    name = json.loads((folder / MANIFEST).read_text()).get("base_model")
    return name if isinstance(name, str) else None


def size_problems(folder: Path, files: Mapping[str, FileFacts]) -> list[str]:
    """Files that are missing or have another size, a sentence each; no file is read."""
    differences: list[str] = []
    for name, facts in files.items():
        file = folder / name
        size = file.stat().st_size if file.is_file() else None
        if size != facts.bytes:
            state = "is missing" if size is None else f"has {size:,} bytes"
            differences.append(f"{file}: {state}; it was written with {facts.bytes:,} bytes.")
    return differences


def problems(folder: Path, progress: BytesRead | None = None) -> list[str]:
    """Every difference between a checkpoint and its manifest, a sentence each; every file is read.

    Raises:
        CheckpointError: there is no manifest to compare with.
    """
    files = read_manifest(folder)
    if files is None:
        raise CheckpointError(f"{folder}: has no {MANIFEST}, as another program wrote it. It cannot be verified.")
    differences = size_problems(folder, files)
    reported = {difference.partition(":")[0] for difference in differences}
    for name, facts in files.items():
        if str(folder / name) not in reported and FileFacts.of(folder / name, progress) != facts:
            differences.append(f"{folder / name}: its content is not what was written (SHA-256 differs).")
    return differences
