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
Progress = Callable[[int], None]
"""Told the number of bytes that were just read."""


@dataclass(frozen=True, slots=True)
class FileFacts:
    """What a file should be."""

    bytes: int
    sha256: str

    @classmethod
    def of(cls, file: Path, progress: Progress | None = None) -> "FileFacts":
        """What a file is; it is read whole."""
        digest, size = hashlib.sha256(), 0
        with open(file, "rb") as content:
            while block := content.read(BLOCK_BYTES):
                digest.update(block)
                size += len(block)
                if progress is not None:
                    progress(len(block))
        return cls(size, digest.hexdigest())


def write_manifest(folder: Path, files: Mapping[str, FileFacts], base_model: str | None = None) -> None:
    """Write the manifest of a checkpoint whose files are all there, and the model that its training began from."""
    content: dict[str, object] = {"format": FORMAT}
    content |= {} if base_model is None else {"base_model": base_model}
    content["files"] = {name: asdict(facts) for name, facts in sorted(files.items())}
    write_atomic(folder / MANIFEST, json.dumps(content, indent=1) + "\n")


def read_manifest(folder: Path) -> dict[str, FileFacts] | None:
    """File names with what each should be; None if there is no manifest (another program's checkpoint).

    Raises:
        CheckpointError: it is damaged, or names files outside of the folder.
    """
    path = member(folder, MANIFEST)
    if not path.is_file():
        return None
    try:
        if (size := path.stat().st_size) > LARGEST_MANIFEST:
            raise ValueError(f"it has {size:,} bytes")
        files = json.loads(path.read_text())["files"]
        found = {str(name): FileFacts(int(facts["bytes"]), str(facts["sha256"])) for name, facts in files.items()}
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: not a manifest ({type(error).__name__}: {str(error)[:120]!a}). Use another checkpoint."
        ) from error
    for name in found:
        member(folder, name)
    return found


def base_model(folder: Path) -> str | None:
    """The model that training began from, as its run called it; None where no manifest says it."""
    if read_manifest(folder) is None:
        return None
    said = json.loads((folder / MANIFEST).read_text()).get("base_model")
    return said if isinstance(said, str) else None


def size_problems(folder: Path, files: Mapping[str, FileFacts]) -> list[str]:
    """What is missing, or has another size; no file is read."""
    problems: list[str] = []
    for name, facts in files.items():
        file = folder / name
        size = file.stat().st_size if file.is_file() else None
        if size != facts.bytes:
            found = "is missing" if size is None else f"has {size:,} bytes"
            problems.append(f"{file}: {found}; it was written with {facts.bytes:,} bytes.")
    return problems


def problems(folder: Path, progress: Progress | None = None) -> list[str]:
    """Everything in which a checkpoint differs from its manifest, a sentence each; every file is read.

    Raises:
        CheckpointError: there is no manifest to compare with.
    """
    files = read_manifest(folder)
    if files is None:
        raise CheckpointError(f"{folder}: there is no {MANIFEST}: another program wrote it. It cannot be verified.")
    found = size_problems(folder, files)
    damaged = {problem.partition(":")[0] for problem in found}
    for name, facts in files.items():
        if str(folder / name) not in damaged and FileFacts.of(folder / name, progress) != facts:
            found.append(f"{folder / name}: its bytes are not those that were written (SHA-256).")
    return found
