"""Where a run goes on that was killed: the newest complete checkpoint of its save folder."""

import shutil
from pathlib import Path

from composer.utils import dist

from tundish.checkpoints import NAME, list_checkpoints
from tundish.paths import CHECKPOINT_LINK, write_atomic


def newest_checkpoint(save_folder: str) -> Path | None:
    """The checkpoint to go on from, the same on every rank; None = begin.

    What a killed process left half written is removed: Composer writes no checkpoint over another, and nothing can be
    read from these.
    """
    found: list[Path | None] = [None]
    if dist.get_global_rank() == 0:
        complete = list_checkpoints(Path(save_folder))
        _remove_incomplete(Path(save_folder), complete)
        found = [complete[-1] if complete else None]
        if complete:
            _point_latest_at(complete[-1])
    dist.broadcast_object_list(found, src=0)
    return found[0]


def _point_latest_at(checkpoint: Path) -> None:
    """As the killed process would have done next, had it been killed between a checkpoint's last file and this."""
    write_atomic(checkpoint.parent / CHECKPOINT_LINK, str(checkpoint))
    link = checkpoint.parent / CHECKPOINT_LINK.removesuffix(".symlink")
    link.unlink(missing_ok=True)
    link.symlink_to(checkpoint.name)


def _remove_incomplete(save_folder: Path, complete: list[Path]) -> None:
    if not save_folder.is_dir():
        return
    for path in save_folder.iterdir():
        if NAME.fullmatch(path.name) and path not in complete and not path.is_symlink():
            shutil.rmtree(path)
