"""data/chunks.py: a source in parts that hold whole lines and files, each of them once and under its own number."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tundish.data.lines import LineBlock, line_blocks
from tundish.data.samples import Problem, Rules
from tundish.data.source import EMPTY
from tundish.data.texts import TextFiles

PAIRS = Rules("INSTRUCTION_FINETUNE", True)
TEXTS = Rules("CONTINUED_PRETRAIN", True)
SetSizes = Callable[..., None]


@pytest.fixture(scope="module")
def small() -> Iterator[SetSizes]:
    """`small(chunk, line)`: chunks of so many bytes, and lines of at most so many."""
    with pytest.MonkeyPatch.context() as patch:

        def set_sizes(chunk: int, line: int = 1 << 25) -> None:
            patch.setattr("tundish.data.lines.CHUNK_BYTES", chunk)
            for module in ("lines", "samples"):
                patch.setattr(f"tundish.data.{module}.MAX_LINE_BYTES", line)

        yield set_sizes


def _numbered(blocks: list[LineBlock]) -> list[tuple[int, Any]]:
    """All samples with their line in the file."""
    found: list[tuple[int, Any]] = []
    lines = 0
    for block in blocks:
        found.extend((lines + number, sample) for number, sample in block.samples(PAIRS))
        lines += block.units
    return found


def _line(text: str) -> bytes:
    return b'{"prompt": "%s", "response": "b"}' % text.encode()


BYTES = st.lists(st.binary(max_size=30).map(lambda line: line.replace(b"\n", b"")), max_size=12).map(b"\n".join)


@given(BYTES, st.sampled_from([b"", b"\n"]), st.integers(1, 50))
def test_blocks_are_the_file_in_whole_lines(small: SetSizes, lines: bytes, end: bytes, chunk: int) -> None:
    """A line would be cut in two at the end of a chunk, and its parts be taken for two samples."""
    small(chunk)
    data = lines + end
    blocks = list(line_blocks(io.BytesIO(data)))
    assert b"".join(block.data for block in blocks) == data
    assert all(block.data.endswith(b"\n") and len(block.data) >= chunk for block in blocks[:-1])
    assert [block.size for block in blocks] == [len(block.data) for block in blocks] and b"" not in blocks
    assert sum(block.units for block in blocks) == len(data.removesuffix(b"\n").split(b"\n")) * bool(data)


@given(BYTES, st.integers(1, 50), st.integers(0, 12))
def test_a_range_of_a_file_ends_where_it_should(small: SetSizes, lines: bytes, chunk: int, count: int) -> None:
    """Machines that read parts of a file would read a line twice, or none of them."""
    small(chunk)
    data = lines + b"\n"
    ends = [0, *(place for place, byte in enumerate(data, 1) if byte == ord("\n"))]
    border = ends[count % len(ends)]
    file = io.BytesIO(data)
    first = list(line_blocks(file, border))
    assert b"".join(block.data for block in first) == data[:border] and file.tell() == border
    assert b"".join(block.data for block in line_blocks(file, len(data) - border)) == data[border:]


@given(
    st.lists(st.sampled_from([0, 1, 5, 35, 39, 40, 41, 42, 60, 100, 200]), max_size=10),
    st.sampled_from([b"", b"\n"]),
    st.integers(1, 90),
)
def test_a_line_that_is_too_long_is_passed_over(small: SetSizes, sizes: list[int], end: bytes, chunk: int) -> None:
    """The lines after it would be told by wrong numbers, or what is left of it be taken for lines of their own."""
    small(chunk, 40)
    lines = [_line("x" * (size - 31)) if size >= 35 else b" " * size for size in sizes]
    assert [len(line) for line in lines] == sizes
    data = b"\n".join(lines) + end
    blocks = list(line_blocks(io.BytesIO(data)))
    expected = [(number, size > 40) for number, size in enumerate(sizes, 1) if size >= 35]
    found = _numbered(blocks)
    assert [(number, isinstance(sample, Problem)) for number, sample in found] == expected
    assert all(sample.rule == "line too long" for _, sample in found if isinstance(sample, Problem))
    assert sum(block.size for block in blocks) == len(data), "progress would not come to its end"
    assert all(len(block.data) <= chunk + 41 for block in blocks), "no such line is held in memory as a whole"


@pytest.mark.parametrize("chunk", [1, 30, 33, 34, 35, 1 << 20])
def test_lines_are_numbered_as_an_editor_does(small: SetSizes, chunk: int) -> None:
    """Messages would name the wrong line: blank lines and CRLF must not shift them."""
    small(chunk)
    data = _line("a") + b"\r\n\n   \n\r\n" + _line("c") + b"\n\t\n" + _line("é") + b"\r\n\r\n\n" + _line("d")
    assert _numbered(list(line_blocks(io.BytesIO(data)))) == [
        (1, ("a", "b")),
        (5, ("c", "b")),
        (7, ("é", "b")),
        (10, ("d", "b")),
    ]


def test_separators_of_unicode_end_no_line() -> None:
    """A text with U+2028 or a form feed, which JSON allows unescaped, would be cut in two."""
    text = "a\u2028b\u2029c\x85d"
    assert _numbered(list(line_blocks(io.BytesIO(_line(text))))) == [(1, (text, "b"))]


def test_an_empty_file_has_no_blocks() -> None:
    """An empty chunk would be a line that nobody wrote."""
    assert list(line_blocks(io.BytesIO(b""))) == list(line_blocks(io.BytesIO(b"abc"), 0)) == []
    assert LineBlock(b"\n", 1).units == LineBlock(b"\n\n", 2).units - 1 == 1


def test_files_are_read_whole_and_as_they_are(tmp_path: Path) -> None:
    """Texts would be stripped, or begin with a byte-order mark; empty ones be trained as samples."""
    contents = {"a": b" one\r\ntwo \n", "b": b"", "c": "\ufeffcafé".encode(), "d": b" \n\t", "e": "\ufeff".encode()}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    files = TextFiles(tmp_path, tuple(contents), 30)
    assert (files.units, files.size) == (5, 30)
    samples = [" one\r\ntwo \n", EMPTY, "café", EMPTY, EMPTY]
    assert list(files.samples(TEXTS)) == [*enumerate(samples, 1)]


def test_files_that_cannot_be_read_are_problems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One bad file would end preparation, and hide the others."""
    monkeypatch.setattr("tundish.data.texts.MAX_TEXT_BYTES", 100)
    contents = {"a": b"caf\xe9", "b": b"x" * 100, "c": b"x" * 101, "d": b"\xff\xfea\x00"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (_, latin), (_, good), (_, large), (_, utf16) = TextFiles(tmp_path, tuple(contents), 0).samples(TEXTS)
    assert latin == Problem("not UTF-8", "the byte at offset 3 is not UTF-8. Save the file as UTF-8.")
    assert good == "x" * 100
    assert isinstance(large, Problem) and large.rule == "too large" and "Split it into several files" in large.text
    assert isinstance(utf16, Problem) and "the byte at offset 0" in utf16.text
