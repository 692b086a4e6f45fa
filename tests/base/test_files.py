"""files.py, home.py: every place is where the contract says, and nothing leaves its root."""

from pathlib import Path

import pytest

from tundish.base import home as base_home
from tundish.base.files import content_root, inside, make_folder, write_atomic
from tundish.base.home import absolute_environment
from tundish.base.run_folder import RunFolder
from tundish.errors import SpecError


def test_home_is_the_environment_s_or_a_folder_of_the_user(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs would be looked for elsewhere than they were written."""
    assert base_home.home() == home and not home.exists()
    monkeypatch.delenv("TUNDISH_HOME")
    assert base_home.home() == Path.home() / ".tundish"
    monkeypatch.setenv("TUNDISH_HOME", "relative")
    assert base_home.home() == Path.cwd() / "relative"
    monkeypatch.setenv("TUNDISH_HOME", "~/relative")
    assert base_home.home() == Path.home() / "relative"


def test_processes_of_a_run_get_absolute_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A supervisor works in another folder than its caller: `TUNDISH_HOME=./home` would be another home there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TUNDISH_HOME", "home")
    monkeypatch.setenv("HF_HOME", "/data/hf")
    monkeypatch.setenv("OCI_CONFIG_FILE", "oci")
    monkeypatch.setenv("SSL_CERT_FILE", "")
    monkeypatch.setenv("OTHER", "relative")
    found = absolute_environment()
    assert found["TUNDISH_HOME"] == str(tmp_path / "home") and found["HF_HOME"] == "/data/hf"
    assert found["OCI_CONFIG_FILE"] == str(tmp_path / "oci")
    assert found["SSL_CERT_FILE"] == "" and found["OTHER"] == "relative"


def test_yaml_layers_are_found_from_a_checkout() -> None:
    """Rendering would find no layers."""
    assert (base_home.yamls_dir() / "base.yaml").is_file()


@pytest.mark.parametrize("parts", [("a.jsonl",), ("a", "b", "c.txt"), ("a/../b",), (".",)])
def test_inside_takes_what_stays_inside(tmp_path: Path, parts: tuple[str, ...]) -> None:
    """Ordinary names would be refused."""
    assert inside(tmp_path, *parts).is_relative_to(tmp_path.resolve())


@pytest.mark.parametrize("parts", [("..",), ("..", "x"), ("a/../../x",), ("/etc/passwd",), ("a", "/etc/passwd")])
def test_inside_refuses_what_leaves_by_name(tmp_path: Path, parts: tuple[str, ...]) -> None:
    """A name from data or a checkpoint would reach any file."""
    with pytest.raises(SpecError, match=r"leaves .*Give a path without '\.\.'"):
        inside(tmp_path / "root", *parts)


@pytest.mark.parametrize(
    ("folder", "root"),
    [
        ("models/tiny", "models/tiny"),
        ("hub/models--lab--tiny/snapshots/0123abcd", "hub/models--lab--tiny"),
        ("hub/datasets--lab--chats/snapshots/0123abcd", "hub/datasets--lab--chats"),
        ("mine/snapshots/monday", "mine/snapshots/monday"),
    ],
)
def test_only_a_snapshot_of_the_hub_s_cache_may_link_to_what_lies_beside_it(
    folder: str, root: str, tmp_path: Path
) -> None:
    """A folder that happens to lie in one called `snapshots` would reach all that its neighbors have."""
    assert content_root(tmp_path / folder) == tmp_path / root


def test_inside_refuses_links_that_lead_out(tmp_path: Path) -> None:
    """A link in a folder would reach any file."""
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(tmp_path)
    (root / "own").symlink_to(root)
    with pytest.raises(SpecError, match="leaves"):
        inside(root, "link", "x")
    assert inside(root, "own", "x") == root / "x"


def test_inside_does_not_take_a_neighbour_for_the_root(tmp_path: Path) -> None:
    """`root-2` would pass for a part of `root` because its name begins like it."""
    with pytest.raises(SpecError, match="leaves"):
        inside(tmp_path / "root", "../root-2/x")


def test_write_atomic_replaces_the_content_and_leaves_nothing_beside(tmp_path: Path) -> None:
    """Old content would shine through, or temporary files would pile up."""
    path = tmp_path / "spec.json"
    write_atomic(path, "a longer first content")
    write_atomic(path, "zweiter größerer Inhalt")
    assert path.read_text() == "zweiter größerer Inhalt" and list(tmp_path.iterdir()) == [path]
    write_atomic(path, b"\x00bytes")
    assert path.read_bytes() == b"\x00bytes"


def test_a_reader_sees_whole_content_at_any_time(tmp_path: Path) -> None:
    """A file opened before the write would change under its reader: it must be another file, not the same one."""
    path = tmp_path / "spec.json"
    write_atomic(path, "old")
    with open(path) as reader:
        write_atomic(path, "new")
        assert reader.read() == "old"


def test_a_write_that_fails_keeps_the_old_content(tmp_path: Path) -> None:
    """A full disk or a bad value would destroy what was there."""
    path = tmp_path / "spec.json"
    write_atomic(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "\ud800")
    assert path.read_text() == "old"


def test_names_in_a_run_folder_differ(home: Path) -> None:
    """Two things would be written to one file."""
    run = RunFolder.of("ift-tiny-abc123")
    assert run.folder == home / "runs" / "ift-tiny-abc123"
    found = [run.spec, run.foundry_yaml, run.events, run.supervisor, run.logs, run.work, run.export]
    found += [run.log("train"), run.log("prepare"), run.result("train"), run.data("train"), run.data("eval")]
    assert len(set(found)) == len(found) and all(path.is_relative_to(run.folder) for path in found)


def test_a_run_name_cannot_leave_the_runs_folder() -> None:
    """`get('../../x')` would read any folder."""
    with pytest.raises(SpecError, match="leaves"):
        RunFolder.of("../elsewhere")


def test_a_home_that_is_made_is_its_user_s_alone(home: Path) -> None:
    """Training data, specs and logs would be readable by every user of the machine."""
    assert make_folder(home / "runs" / "x").is_dir()
    assert home.stat().st_mode & 0o777 == 0o700
    home.chmod(0o755)  # as its owner wants it
    make_folder(home / "prepared")
    assert home.stat().st_mode & 0o777 == 0o755
