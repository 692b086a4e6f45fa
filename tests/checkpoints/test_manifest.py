"""checkpoints/manifest.py: what was written, compared with what is there."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tundish.checkpoints.folder import check_complete, list_checkpoints, read_checkpoint
from tundish.checkpoints.manifest import (
    LARGEST_MANIFEST,
    MANIFEST,
    FileFacts,
    base_model,
    member,
    problems,
    read_manifest,
    write_manifest,
)
from tundish.errors import CheckpointError

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),
]


@pytest.fixture
def known(checkpoint: Path) -> Path:
    """A checkpoint with a manifest."""
    files = {path.name: FileFacts.of(path) for path in checkpoint.iterdir()}
    write_manifest(checkpoint, files)
    return checkpoint


def _flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_a_manifest_says_what_training_began_from(known: Path) -> None:
    """Weights of another base model, whose shapes happen to match, would be trained without a word."""
    files = read_manifest(known)
    assert base_model(known) is None and files
    write_manifest(known, files, "org/base")
    assert base_model(known) == "org/base" and read_manifest(known) == files
    (known / "manifest.json").unlink()
    assert base_model(known) is None


def test_an_untouched_checkpoint_has_no_problems(known: Path) -> None:
    """Nobody would believe a check that finds something in every checkpoint."""
    told: list[int] = []
    assert problems(known, told.append) == []
    assert sum(told) == sum(path.stat().st_size for path in known.iterdir() if path.name != MANIFEST)
    assert read_manifest(known) == {p.name: FileFacts.of(p) for p in known.iterdir() if p.name != MANIFEST}


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
@pytest.mark.parametrize("damage", ["flipped", "truncated", "oversized", "missing"])
def test_each_damage_is_named(known: Path, name: str, damage: str) -> None:
    """A damaged disk would be found by a model that talks nonsense."""
    path = known / name
    if damage == "flipped":
        _flip(path, -40)
    elif damage == "truncated":
        os.truncate(path, path.stat().st_size - 1)
    elif damage == "oversized":
        os.truncate(path, path.stat().st_size + 1)
    else:
        path.unlink()
    (problem,) = problems(known)
    assert problem.startswith(f"{path}: ")
    assert {"flipped": "SHA-256", "missing": "is missing"}.get(damage, "it was written with") in problem
    listed = list_checkpoints(known.parent)
    assert listed == ([known] if damage == "flipped" else []), "a listing looks at sizes"
    if damage != "flipped" or name == ".metadata":
        with pytest.raises(CheckpointError, match=rf"{name}: .* (Use another one|Use another checkpoint)\."):
            read_checkpoint(known)


@pytest.mark.parametrize(
    "content",
    {
        "text": "no json",
        "bytes": b"\xff\xfe",
        "empty": "",
        "list": "[]",
        "null": "null",
        "no files": "{}",
        "files as a list": '{"files": []}',
        "files as texts": '{"files": {"a": "b"}}',
        "no size": '{"files": {"a": {"sha256": ""}}}',
        "size as a list": '{"files": {"a": {"bytes": [], "sha256": ""}}}',
        "infinite size": '{"files": {"a": {"bytes": Infinity, "sha256": ""}}}',
        "no number": '{"files": {"a": {"bytes": NaN, "sha256": ""}}}',
        "long number": '{"files": {"a": {"bytes": %s, "sha256": ""}}}' % ("9" * 5000),
        "without bottom": "[" * 200_000,
        "control characters": json.dumps({"files": {"\x1b[2J\n": {"bytes": 1, "sha256": ""}}}),
        "zero": json.dumps({"files": {"a\0b": {"bytes": 1, "sha256": ""}}}),
        "half a character": '{"files": {"\\ud800": {"bytes": 1, "sha256": ""}}}',
        "long name": json.dumps({"files": {"x" * 5000: {"bytes": 1, "sha256": ""}}}),
        "..": json.dumps({"files": {"../x": {"bytes": 1, "sha256": ""}}}),
        "absolute": json.dumps({"files": {"/etc/passwd": {"bytes": 1, "sha256": ""}}}),
        "deep": json.dumps({"files": {"a/../../../x": {"bytes": 1, "sha256": ""}}}),
        "huge": None,
    }.items(),
    ids=lambda item: item[0],
)
def test_a_manifest_that_is_none_is_refused(known: Path, content: tuple[str, Any]) -> None:
    """A traceback would end the listing of all other checkpoints, or a file outside be looked at."""
    path = known / MANIFEST
    if content[1] is None:
        os.truncate(path, LARGEST_MANIFEST + 1)
    else:
        path.write_bytes(content[1] if isinstance(content[1], bytes) else content[1].encode())
    for read in (read_manifest, check_complete, read_checkpoint, problems):
        with pytest.raises(CheckpointError) as error:
            read(known)
        assert str(known) in error.value.message and error.value.message.isprintable()
        assert len(error.value.message) < 800
    assert list_checkpoints(known.parent) == []


@pytest.mark.parametrize("target", ["outside", "/dev/zero", MANIFEST])
def test_a_manifest_that_is_a_link_out_of_the_folder_is_refused(known: Path, target: str) -> None:
    """Another file of the machine would be read, or one without end."""
    (known.parent / "outside").write_text((known / MANIFEST).read_text())
    (known / MANIFEST).unlink()
    (known / MANIFEST).symlink_to(known.parent / target if target == "outside" else target)
    with pytest.raises(CheckpointError):
        read_manifest(known)


def test_a_manifest_that_is_a_pipe_is_not_opened(known: Path) -> None:
    """To open it is to wait for ever."""
    (known / MANIFEST).unlink()
    os.mkfifo(known / MANIFEST)
    assert read_manifest(known) is None
    with pytest.raises(CheckpointError, match="another program wrote it"):
        problems(known)


def test_a_manifest_cannot_vouch_for_what_it_does_not_name(known: Path) -> None:
    """A checkpoint would be loaded without a file of its metadata, or with another one."""
    written = json.loads((known / MANIFEST).read_text())
    del written["files"]["__0_0.distcp"]
    (known / MANIFEST).write_text(json.dumps(written))
    (known / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: is missing"):
        read_checkpoint(known)
    written["files"] = {}
    (known / MANIFEST).write_text(json.dumps(written))
    assert list_checkpoints(known.parent) == []


@pytest.mark.parametrize(("name", "inside"), [("a", True), ("b/c", True), ("..", False), ("b/../..", False)])
def test_a_member_lies_in_its_folder(tmp_path: Path, name: str, inside: bool) -> None:
    """Files would be read, or written, elsewhere."""
    look: Callable[[], Path] = lambda: member(tmp_path, name)  # noqa: E731
    if inside:
        assert look() == tmp_path / name
    else:
        with pytest.raises(CheckpointError, match="leaves"):
            look()
