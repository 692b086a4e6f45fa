"""new_folder.py: complete under its name, or not there."""

import subprocess
import sys
from pathlib import Path

import pytest

from tundish.base.files import new_folder
from tundish.errors import SpecError

HOLD = (
    "import sys; from pathlib import Path; from tundish.base.files import new_folder\n"
    "with new_folder(Path(sys.argv[1])) as folder:\n"
    "    (folder / 'part').touch(); print('ready', flush=True); sys.stdin.read()"
)


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_is_there_when_it_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader would see a part of it; or nothing, where the caller has named it from where he is."""
    monkeypatch.chdir(tmp_path)
    with new_folder(Path("a/new one")) as folder:
        (folder / "content").write_text("x")
        assert not (tmp_path / "a" / "new one").exists()
    assert _names(tmp_path / "a") == ["new one"] and _names(tmp_path / "a" / "new one") == ["content"]


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    """Half of it would stay for ever."""
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "one") as folder:
        (folder / "content").write_text("x")
        raise KeyboardInterrupt
    assert not _names(tmp_path)


def test_what_is_there_is_not_replaced(tmp_path: Path) -> None:
    """What somebody has made meanwhile would be lost."""
    with pytest.raises(SpecError, match="one: already exists"), new_folder(tmp_path / "one") as folder:
        (folder / "mine").touch()
        (tmp_path / "one").mkdir()
        (tmp_path / "one" / "theirs").touch()
    assert _names(tmp_path) == ["one"] and _names(tmp_path / "one") == ["theirs"]


def test_what_is_being_written_is_known_by_its_lock_not_by_a_number(tmp_path: Path) -> None:
    """On a shared disk, the numbers of another machine's processes say nothing."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "one")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        with pytest.raises(
            SpecError, match="another process is making it, on this machine or on one that shares the disk"
        ):
            with new_folder(tmp_path / "one"):
                pytest.fail("two processes write one folder")
        assert (tmp_path / ".one.tmp" / "part").exists()
        process.kill()
        process.wait(60)
        assert _names(tmp_path) == [".one.lock", ".one.tmp"]
        with new_folder(tmp_path / "one") as folder:
            assert not _names(folder)
        assert _names(tmp_path) == ["one"]


def test_a_folder_is_replaced_only_by_a_complete_one(tmp_path: Path) -> None:
    """Outdated data would stay; or be lost for a download that fails."""
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "old").touch()
    with pytest.raises(OSError), new_folder(tmp_path / "one", wait=True, replace=True):
        raise OSError
    assert _names(tmp_path / "one") == ["old"]
    with new_folder(tmp_path / "one", wait=True, replace=True) as folder:
        (folder / "new").touch()
        assert _names(tmp_path / "one") == ["old"]
    assert _names(tmp_path / "one") == ["new"]
