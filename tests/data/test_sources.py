"""data/sources.py: exactly the samples that the caller named, in a fixed order."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tundish.data.sources import Source, open_source
from tundish.errors import DataError, SpecError

PAIR = {"prompt": "2 + 2?", "response": "4"}
CHAT = {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}
WriteLines = Callable[[Path, Any], Path]


def _pairs(path: Path) -> Source:
    return open_source(str(path), "INSTRUCTION_FINETUNE", system_message=True)


def _texts(path: Path) -> Source:
    return open_source(str(path), "CONTINUED_PRETRAIN", system_message=True)


@pytest.fixture
def books(tmp_path: Path) -> Path:
    """A folder of texts, nested, with other files among them."""
    folder = tmp_path / "books"
    (folder / "deep" / "er").mkdir(parents=True)
    for name in ("b.txt", "a.txt", "deep/c.txt", "deep/er/d.txt"):
        (folder / name).write_text(f"text of {name}")
    for name in ("notes.md", "deep/table.csv", "a.txt.bak", "TXT"):
        (folder / name).write_text("not for training")
    return folder


def test_lines_are_numbered_as_an_editor_does(tmp_path: Path) -> None:
    """Messages would name the wrong line: blank lines, CRLF and a byte-order mark must not shift them."""
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a", "response": "b"}\r\n\n   \n{"prompt": "c", "response": "d"}')
    assert list(_pairs(path).samples()) == [(1, ("a", "b")), (4, ("c", "d"))]


def test_bad_lines_are_all_told_after_the_good_ones(tmp_path: Path, write_lines: WriteLines) -> None:
    """The caller would repair one line after the other."""
    path = write_lines(tmp_path / "train.jsonl", [PAIR, "{", PAIR, {"prompt": "a"}, "{", ""])
    found: list[int] = []
    with pytest.raises(DataError) as error:
        found.extend(number for number, _ in _pairs(path).samples())
    first, second = list(error.value.problems)
    assert first.startswith("train.jsonl, line 2: not JSON") and first.endswith("2 of 5 lines are like this (2, 5).")
    assert second.startswith("train.jsonl, line 4: found the keys prompt")


@pytest.mark.parametrize("content", ["", "\n\n  \n"])
def test_an_empty_file_is_an_error(tmp_path: Path, content: str) -> None:
    """A run would train on nothing and succeed."""
    path = tmp_path / "train.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=r"train\.jsonl: the file is empty; each line must hold one sample"):
        list(_pairs(path).samples())


def test_text_files_are_found_nested_and_in_order_and_others_ignored(books: Path) -> None:
    """Text would be missing, other files would be trained, or the order depend on the machine."""
    samples = list(_texts(books).samples())
    assert samples == [
        (1, "text of a.txt"),
        (2, "text of b.txt"),
        (3, "text of deep/c.txt"),
        (4, "text of deep/er/d.txt"),
    ]


def test_links_out_of_the_folder_are_not_followed(books: Path, tmp_path: Path) -> None:
    """A link in a data folder would put any file of the machine into the model."""
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "secret.txt").write_text("secret")
    (books / "link.txt").symlink_to(tmp_path / "secret.txt")
    (books / "folder").symlink_to(tmp_path / "other")
    assert len(list(_texts(books).samples())) == 4


def test_a_folder_with_nothing_but_links_out_holds_no_text(tmp_path: Path) -> None:
    """The message would speak of empty files that are not there."""
    (tmp_path / "secret.txt").write_text("secret")
    folder = tmp_path / "books"
    folder.mkdir()
    (folder / "link.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(SpecError, match=r"the folder holds no \.txt file"):
        _texts(folder)


def test_empty_text_files_are_no_samples(books: Path) -> None:
    """A row of nothing would be trained; the other files' numbers would shift."""
    (books / "a.txt").write_text(" \n")
    assert [number for number, _ in _texts(books).samples()] == [2, 3, 4]
    for path in books.rglob("*.txt"):
        path.write_text("")
    with pytest.raises(DataError, match=r"books: all \.txt files are empty. Give a folder with text"):
        list(_texts(books).samples())


def test_text_that_is_not_utf8_is_named(books: Path) -> None:
    """Broken characters would be trained, or all but the first file go unnamed."""
    (books / "a.txt").write_bytes(b"caf\xe9")
    (books / "deep" / "c.txt").write_bytes(b"\xff")
    with pytest.raises(DataError) as error:
        list(_texts(books).samples())
    assert len(error.value.problems) == 2
    assert error.value.problems[0] == f"{books / 'a.txt'}: the byte at offset 3 is not UTF-8. Save the file as UTF-8."


def test_the_digest_tells_contents_and_names(books: Path) -> None:
    """Changed data would be taken for the data that was prepared before."""
    first = _texts(books).digest()
    assert _texts(books).digest() == first
    (books / "notes.md").write_text("other notes")
    assert _texts(books).digest() == first, "files that are no samples do not matter"
    (books / "a.txt").write_text("text of a.txt!")
    second = _texts(books).digest()
    (books / "a.txt").rename(books / "z.txt")
    assert len({first, second, _texts(books).digest()}) == 3


def test_the_digest_of_a_file_does_not_depend_on_its_place(tmp_path: Path, write_lines: WriteLines) -> None:
    """A copy of the data would be prepared again; changed data would not."""
    one = write_lines(tmp_path / "one.jsonl", [PAIR])
    two = write_lines(tmp_path / "two.jsonl", [PAIR])
    three = write_lines(tmp_path / "three.jsonl", [PAIR, PAIR])
    assert _pairs(one).digest() == _pairs(two).digest() != _pairs(three).digest()


@pytest.mark.parametrize("task", ["CHAT_COMPLETION", "INSTRUCTION_FINETUNE"])
def test_a_path_that_holds_no_lines_is_refused(tmp_path: Path, books: Path, task: Any) -> None:
    """The message would not say what the task type takes."""
    (tmp_path / "train.csv").write_text("a,b")
    (tmp_path / "train").write_text("{}")
    for path, found in [
        (tmp_path / "none.jsonl", r"none\.jsonl: there is no such file .*Check the path"),
        (books, f"books: is a folder; {task} takes one .jsonl file. Name the file"),
        (tmp_path / "train.csv", f"train.csv: found a .csv file; {task} takes a .jsonl file"),
        (tmp_path / "train", "train: found a nameless file"),
    ]:
        with pytest.raises(SpecError, match=found):
            open_source(str(path), task, system_message=True)


def test_a_path_that_holds_no_texts_is_refused(tmp_path: Path, write_lines: WriteLines) -> None:
    """The message would not say what the task type takes."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.md").write_text("x")
    for path, found in [
        (tmp_path / "none", "none: there is no such folder .*Name the folder"),
        (write_lines(tmp_path / "train.jsonl", [PAIR]), "is a file; CONTINUED_PRETRAIN takes a folder of .txt files"),
        (tmp_path / "empty", "empty: the folder holds no .txt file. Folders inside it are searched too"),
    ]:
        with pytest.raises(SpecError, match=found):
            _texts(path)


def test_object_stores_are_refused_for_now() -> None:
    """A local path of that odd name would be looked for."""
    with pytest.raises(SpecError, match="reading from an object store is not built yet"):
        open_source("s3://bucket/train.jsonl", "CHAT_COMPLETION", system_message=True)


def test_volume_paths_are_read_from_the_workspace(home: Path, write_lines: WriteLines) -> None:
    """A notebook's `dbfs:/Volumes/…` path would not be found."""
    folder = home / "Volumes" / "main" / "lab" / "v"
    folder.mkdir(parents=True)
    write_lines(folder / "train.jsonl", [CHAT])
    source = open_source("dbfs:/Volumes/main/lab/v/train.jsonl", "CHAT_COMPLETION", system_message=True)
    assert list(source.samples()) == [(1, CHAT["messages"])]
