"""model_files.py: what a model's folder may make us read."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tundish.base.model_files import SETTINGS, check_files, license_files, open_file, read_bytes, read_json
from tundish.errors import SpecError
from tundish.plan.models import find_card

READERS = [find_card, check_files]
"""Whoever plans a run, and whoever gives the folder to transformers."""


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A file of the caller's own, which no model's folder has to do with."""
    path = tmp_path / "secret"
    path.write_text("{}")
    return path


@pytest.fixture
def readable() -> Iterator[Path]:
    """A folder in which this process has no more rights than any user: root may read everything."""
    folder = Path(tempfile.mkdtemp())
    user = os.geteuid()
    if user == 0:
        os.chown(folder, 65534, 65534)
        os.seteuid(65534)
    yield folder
    os.seteuid(user)
    shutil.rmtree(folder)


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    "name",
    [*SETTINGS, "tokenizer.json", "tokenizer.model", "chat_template.jinja", "LICENSE", "Notice-key", "README.md"],
)
def test_a_link_out_of_the_folder_is_refused(
    read: Callable[[str], object], name: str, config_folder: Path, secret: Path
) -> None:
    """A private file would be read, and go into the export and the registry."""
    (config_folder / name).unlink(missing_ok=True)
    (config_folder / name).symlink_to(secret)
    with pytest.raises(SpecError) as error:
        read(str(config_folder))
    assert error.value.message == (
        f"model: {config_folder / name}: is outside the model's folder: it leads to {secret}. "
        "Put the file itself into the folder."
    )


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "LICENSE", "README.md", "chat_template.jinja"])
def test_a_named_pipe_is_not_waited_for(read: Callable[[str], object], name: str, config_folder: Path) -> None:
    """`create()` would hang for ever."""
    (config_folder / name).unlink(missing_ok=True)
    os.mkfifo(config_folder / name)
    with pytest.raises(SpecError, match=rf"{name}: is a named pipe; it must be a regular file"):
        read(str(config_folder))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "LICENSE", "README.md"])
def test_a_file_without_end_is_not_read(name: str, config_folder: Path) -> None:
    """All memory would be taken."""
    with open(config_folder / name, "wb") as file:
        file.truncate(20_000_000_000)
    with pytest.raises(SpecError, match=rf"{name}: has 20,000,000,000 bytes; files like this may have at most 1\d+,"):
        find_card(str(config_folder))
    (config_folder / name).unlink()
    (config_folder / name).symlink_to("/dev/zero")
    with pytest.raises(SpecError, match=rf"{name}: is outside the model's folder: it leads to /dev/zero"):
        find_card(str(config_folder))


def test_other_kinds_of_files_are_refused(tmp_path: Path) -> None:
    """A traceback of the system's error, or a wait."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "nowhere").symlink_to("gone")
    for name, said in (
        ("folder", "is a folder; it must be a regular file"),
        ("loop", "cannot be opened"),
        ("nowhere", "is a link to a missing file"),
        ("missing", "no such file"),
        ("../x", "no such file"),
        ("a\0b", "cannot be opened"),
    ):
        with pytest.raises(SpecError, match=said):
            open_file(tmp_path, name)


def test_links_within_the_folder_are_followed(config_folder: Path, tmp_path: Path) -> None:
    """A folder with one file under two names, or one that is itself reached by a link, would be refused."""
    (config_folder / "LICENSE").write_text("Our own\n")
    (config_folder / "NOTICE").symlink_to("LICENSE")
    (tmp_path / "link").symlink_to(config_folder)
    assert read_bytes(tmp_path / "link", "NOTICE") == b"Our own\n"
    check_files(str(tmp_path / "link"))
    assert license_files(tmp_path / "link") == ["LICENSE", "NOTICE"]


def test_a_snapshot_of_the_hub_s_cache_is_a_model_s_folder(config_folder: Path, tmp_path: Path, secret: Path) -> None:
    """Models that were downloaded by name would be refused as folders; their links end beside them only."""
    cache = tmp_path / "hub" / "models--org--tiny"
    snapshot = cache / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    shutil.copyfile(config_folder / "config.json", cache / "blobs" / "f00")
    (snapshot / "config.json").symlink_to("../../blobs/f00")
    assert find_card(str(snapshot)).layers == 2
    (snapshot / "LICENSE").symlink_to(secret)
    with pytest.raises(SpecError, match="LICENSE: is outside the model's folder"):
        find_card(str(snapshot))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"vocab_file": "/etc/passwd"}, "vocab_file names the file '/etc/passwd'. Remove the key"),
        ({"merges_file": "merges.txt"}, "merges_file names the file 'merges.txt'"),
        ({"tokenizer_file": "../secret"}, "tokenizer_file names the file '../secret'"),
        ({"init_inputs": ["/etc/passwd"]}, "init_inputs has ['/etc/passwd'], which may be files"),
        ({"fast_tokenizer_files": ["../tokenizer.4.0.json"]}, "fast_tokenizer_files names '../tokenizer.4.0.json'"),
        ({"fast_tokenizer_files": {"a": 1}}, "fast_tokenizer_files names {'a': 1}"),
    ],
)
def test_files_that_a_tokenizer_s_config_names_are_refused(
    content: dict[str, object], said: str, config_folder: Path
) -> None:
    """transformers would read that file, and `save_pretrained` copy it into the export."""
    (config_folder / "tokenizer_config.json").write_text(json.dumps(content))
    with pytest.raises(SpecError) as error:
        check_files(str(config_folder))
    assert f"tokenizer_config.json: {said}" in error.value.message


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("configuration_files", ["../config.4.0.0.json"], "which would be read instead of this file"),
        ("_attn_implementation_internal", "flash_attention_2", "which would replace the attention"),
    ],
)
def test_a_config_that_would_replace_what_the_run_says_is_refused(
    key: str, value: object, said: str, config_folder: Path
) -> None:
    """The run would be planned by one file and trained by another; or packed samples see each other."""
    content = json.loads((config_folder / "config.json").read_text())
    (config_folder / "config.json").write_text(json.dumps(content | {key: value}))
    with pytest.raises(SpecError) as error:
        find_card(str(config_folder))
    assert f"config.json: {key} is {value!r}, {said}" in error.value.message


def test_what_stock_models_write_into_it_is_allowed(config_folder: Path) -> None:
    """Most models of the hub would be refused."""
    content = {
        "vocab_file": None, "init_inputs": [], "fast_tokenizer_files": ["tokenizer.json", "tokenizer.4.0.json"],
        "special_tokens_map_file": "/root/.cache/huggingface/special_tokens_map.json",
    }  # fmt: skip
    (config_folder / "tokenizer_config.json").write_text(json.dumps(content))
    check_files(str(config_folder))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[" * 200_000, "is nested too deeply"),
        (b'{"a":' * 200 + b"1" + b"}" * 200, "is nested too deeply"),
        (b"[1]", "must be a JSON object"),
        (b"{", r"not valid JSON \(Expecting property name"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b'{"a": ' + b"9" * 5_000 + b"}", "not valid JSON"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "is a Git LFS pointer"),
    ],
    ids=["deep", "a little less deep", "list", "cut", "no text", "a number of 5,000 digits", "Git LFS"],
)
def test_what_is_no_json_object_ends_as_a_sentence(content: bytes, said: str, config_folder: Path) -> None:
    """A traceback of some parser."""
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        (config_folder / name).write_bytes(content)
        with pytest.raises(SpecError, match=rf"{name}: {said}"):
            read_json(config_folder, name)
    with pytest.raises(SpecError) as error:
        check_files(str(config_folder))
    assert len(error.value.problems) == 3


def test_a_file_that_may_not_be_read_says_so(readable: Path) -> None:
    """transformers says of such a file that there is none."""
    (readable / "config.json").write_text("{}")
    (readable / "config.json").chmod(0)
    with pytest.raises(SpecError, match=r"config\.json: permission denied\. Make it readable for \S+"):
        find_card(str(readable))


def test_a_folder_that_may_not_be_entered_says_so(readable: Path) -> None:
    """It would be said to be no folder."""
    (readable / "private").mkdir(mode=0)
    for folder in (readable / "private", readable / "private" / "model"):
        with pytest.raises(SpecError, match="permission denied"):
            find_card(str(folder))
    (readable / "private").rmdir()
