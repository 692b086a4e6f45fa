"""Objects and `.pt` files: read by `torch.load` with `weights_only`, after what it would trust has been checked."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, cast

from tundish.checkpoints.format.archive import LARGEST_OBJECT, Archive, damaged
from tundish.checkpoints.format.contents import NUMPY_TYPES, check_object
from tundish.checkpoints.format.metadata import Part
from tundish.checkpoints.format.pickles import reason
from tundish.errors import CheckpointError

LARGEST_PICKLE = 64 << 20
"""Bytes of the pickle of many tensors, as a `.pt` file has it."""


def read_object(part: Part) -> Any:
    """An object that is not a tensor; classes that Composer's state does not need are refused.

    Raises:
        CheckpointError: it is damaged or unsafe.
    """
    import torch

    if part.length > LARGEST_OBJECT:
        raise damaged(part.file, part.start, f"an entry that is not a tensor has {part.length:,} bytes")
    with Archive(part) as archive:
        archive.verify()
        _check_object(part, archive)
        archive.window.seek(0)
        with torch.serialization.safe_globals(_harmless()):
            return _refusing(
                part, lambda: torch.load(cast(BinaryIO, archive.window), map_location="cpu", weights_only=True)
            )


def load_file(path: Path) -> Any:
    """The content of a `.pt` file; its tensors stay on disk until they are used.

    Raises:
        CheckpointError: it is damaged or unsafe.
    """
    import torch

    part = _whole(path)
    with Archive(part) as archive:
        _check_object(part, archive)
    with torch.serialization.safe_globals(_harmless()):
        return _refusing(part, lambda: torch.load(path, map_location="cpu", weights_only=True, mmap=True))


def verify_file(path: Path) -> None:
    """Compare all bytes of a `.pt` file with its CRC-32s.

    Raises:
        CheckpointError: they are not what was written.
    """
    with Archive(_whole(path)) as archive:
        archive.verify()


def _whole(path: Path) -> Part:
    if not path.is_file():
        raise CheckpointError(f"{path}: not a file. Use an ep…-ba… folder or a .pt file that Composer wrote.")
    return Part((), (), path, 0, path.stat().st_size)


def _check_object(part: Part, archive: "Archive") -> None:
    """Check what PyTorch's reader would trust."""
    names = archive.names
    sizes = {name.removeprefix("data/"): info.file_size for name, info in names.items() if name.startswith("data/")}
    try:
        check_object(archive.content(names.get("data.pkl"), LARGEST_PICKLE), sizes)
    except CheckpointError as error:
        raise CheckpointError(
            f"{part.file}, byte {part.start:,}: cannot be loaded without running code from it ({error.message}). "
            "It is damaged or unsafe. Use another checkpoint."
        ) from error


def _harmless() -> list[Any]:
    """What Composer's timestamps, versions and NumPy's random state need beyond what `weights_only` allows."""
    import datetime

    import numpy as np
    from torch.torch_version import TorchVersion

    rebuild = np.empty(0).__reduce__()[0]  # its module's name depends on NumPy's version
    return [
        datetime.timedelta,
        TorchVersion,
        np.ndarray,
        np.dtype,
        *(type(np.dtype(code)) for code in NUMPY_TYPES),
        (rebuild, "numpy.core.multiarray._reconstruct"),
        (rebuild, "numpy._core.multiarray._reconstruct"),
    ]


def _refusing(part: Part, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except Exception as error:
        raise CheckpointError(
            f"{part.file}, byte {part.start:,}: cannot be loaded without running code from it ({reason(error)}). "
            "It is damaged or unsafe. Use another checkpoint."
        ) from error
