"""runs/cleaning.py: what a run needs, or somebody uses, stays."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tundish.base import events
from tundish.base.files import locked
from tundish.base.home import copies_dir, downloads_dir, prepared_dir, runs_dir
from tundish.base.run_folder import RunFolder, Tracking
from tundish.checkpoints.save_folder import SaveFolder
from tundish.runs import cleaning

MakeRun = Callable[..., RunFolder]
ENDED = (("CREATED", "waits"), ("FAILED", "in train"))


def _folder(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "shard.mds").write_bytes(bytes(50_000))
    return path


def _clean() -> list[str]:
    """Kinds of what was removed."""
    return sorted(one.kind for one in cleaning.leftovers()[0] if cleaning.remove(one))


def _link(paths: RunFolder, folder: Path) -> None:
    paths.data("train").parent.mkdir(exist_ok=True)
    paths.data("train").symlink_to(folder)


def test_nothing_is_left_where_nothing_is(home: Path) -> None:
    """A new machine would see a traceback."""
    assert cleaning.leftovers() == ([], 0) and not home.exists()


def test_what_no_run_needs_goes_with_its_size_told_before(home: Path, make_run: MakeRun) -> None:
    """The disk would fill up, or a run lose its data."""
    needed, unused = (_folder(prepared_dir() / (letter * 24)) for letter in "ab")
    _link(make_run("chat-1", *ENDED), needed)
    download = _folder(downloads_dir() / ("c" * 24))
    half = _folder(prepared_dir() / f".{'d' * 24}.tmp")
    removed, draft = _folder(runs_dir() / ".chat-0.tmp"), _folder(runs_dir() / ".chat-9.draft")
    for path in (removed, removed / "shard.mds"):
        os.utime(path, (time.time() - 7200, time.time() - 7200))
    found, used = cleaning.leftovers()
    assert used == cleaning.tree_bytes(needed) >= 50_000
    assert sum(one.bytes for one in found) == 5 * used
    assert _clean() == ["download", "draft", cleaning.INCOMPLETE, cleaning.INCOMPLETE, "prepared data"]
    assert needed.exists() and not any(path.exists() for path in (unused, download, half, removed, draft))
    assert cleaning.leftovers()[0] == []


def test_what_is_not_ours_is_not_looked_at(home: Path) -> None:
    """A folder that somebody has put there, or a link to one, would be removed."""
    mine = _folder(prepared_dir() / "my data")
    (prepared_dir() / ("e" * 24)).symlink_to(mine)
    assert cleaning.leftovers() == ([], 0)


def test_what_somebody_works_with_stays(home: Path) -> None:
    """A `create()` that prepares its data, or a `tundish export` that reads a copy, would lose it."""
    prepared, download = _folder(prepared_dir() / ("a" * 24)), _folder(downloads_dir() / ("b" * 24))
    copy = _folder(copies_dir() / ("c" * 24) / "read").parent
    _folder(runs_dir() / ".chat-0.tmp")  # of a removal of this moment
    draft = _folder(runs_dir() / ".chat-9.draft")
    locks = [folder.with_name(f".{folder.name}.lock") for folder in (prepared, download)]
    locks += [copy / "read" / ".ep1-ba2.lock", draft.with_suffix(".lock")]
    found, _ = cleaning.leftovers()
    assert len(found) == 4
    with locked(locks[0]), locked(locks[1]), locked(locks[2]), locked(locks[3]):
        assert cleaning.leftovers()[0] == []
        (late,) = (one for one in found if one.path == prepared)
        assert not cleaning.remove(late), "it came into use between the question and the answer"
    assert _clean() == ["checkpoints", "download", "draft", "prepared data"]


def test_while_a_run_prepares_its_data_all_data_stays(home: Path, make_run: MakeRun) -> None:
    """It may just have found what it takes, and not said so yet."""
    prepared = _folder(prepared_dir() / ("a" * 24))
    found, _ = cleaning.leftovers()
    paths = make_run("chat-1")
    events.append(paths.events, "CREATED", "waits")
    assert cleaning.leftovers()[0] == [] and not cleaning.remove(found[0])
    _link(paths, _folder(prepared_dir() / ("b" * 24)))
    assert _clean() == ["prepared data"] and not prepared.exists()


@pytest.mark.parametrize("broken", [False, True])
def test_copies_of_checkpoints_go_when_no_run_knows_them(home: Path, make_run: MakeRun, broken: bool) -> None:
    """A run would go on from its beginning, or read its first weights again; of a damaged one nobody knows."""
    paths, address = make_run("chat-1", *ENDED), "s3://bucket/runs/chat-1/checkpoints"
    content = {field: getattr(paths.read_tracking(), field) for field in Tracking.__slots__}
    Tracking(**content | {"save_folder": address}).write(paths)
    make_run("chat-2", *ENDED, custom_weights_path="s3://bucket/other/ep1-ba2")
    own, first, unknown = (
        _folder(SaveFolder(uri).local) for uri in (address, "s3://bucket/other", "s3://bucket/third")
    )
    if broken:
        paths.spec.write_text("{")
    assert _clean() == ([] if broken else ["checkpoints"])
    assert own.exists() and first.exists() and unknown.exists() == broken
