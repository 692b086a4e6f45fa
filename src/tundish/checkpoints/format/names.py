"""Names that a checkpoint gives to its files: they are joined with its folder, and lead nowhere else."""

from pathlib import Path

from tundish.errors import CheckpointError


def member(folder: Path, name: str) -> Path:
    """The path of a file that a checkpoint names; the file need not exist.

    Raises:
        CheckpointError: the path leaves the folder, also through a link, or no file can have that name.
    """
    try:
        if not name.isprintable():
            raise ValueError("it has control characters")
        path = (folder / name).resolve()
        path.is_file()  # fails where the system refuses such a name
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: {name[:120]!a} cannot be the name of a file ({type(error).__name__}). "
            "Do not use this checkpoint."
        ) from error
    if not path.is_relative_to(folder.resolve()):
        raise CheckpointError(f"{folder}: the file {name[:120]!a} leaves {folder}. Do not use this checkpoint.")
    return path
