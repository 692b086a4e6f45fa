"""checkpoints/format/names.py, and that the reader of checkpoints needs nothing else of tundish."""

from pathlib import Path

import pytest

from tundish.checkpoints.format import names
from tundish.errors import CheckpointError


def test_the_reader_stands_alone() -> None:
    """It could not be used, or reviewed, without the rest of tundish."""
    folder = Path(names.__file__).parent
    imports = {
        line.split()[1]
        for file in folder.glob("*.py")
        for line in map(str.strip, file.read_text().splitlines())
        if line.startswith(("from tundish", "import tundish"))
    }
    assert "tundish.errors" in imports
    assert [name for name in imports if not name.startswith(("tundish.errors", "tundish.checkpoints.format."))] == []


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "link/x", "a\0b", "a\x1bb", "x" * 300])
def test_no_file_outside_of_the_folder_is_named(name: str, tmp_path: Path) -> None:
    """A checkpoint could have any file of the machine read."""
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "link").symlink_to(tmp_path)
    with pytest.raises(CheckpointError, match="Do not use this checkpoint") as error:
        names.member(tmp_path / "checkpoint", name)
    assert error.value.message.isprintable() and len(error.value.message) < 600


def test_a_file_of_the_folder_need_not_exist(tmp_path: Path) -> None:
    """What is missing could not be told from what is unsafe."""
    assert names.member(tmp_path, "sub/file.distcp") == tmp_path / "sub" / "file.distcp"
