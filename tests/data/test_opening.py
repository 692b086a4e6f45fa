"""data/sources.py: exactly the samples that the caller named, in a fixed order."""

import gzip
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from tundish.data.findings import Outcome
from tundish.data.lines import Lines
from tundish.data.opening import open_source
from tundish.data.samples import Problem, Rules
from tundish.data.source import EMPTY, Source, first_samples
from tundish.data.structure import check_structure
from tundish.data.texts import TextFiles, TextFolder
from tundish.errors import DataError, SpecError
from tundish.plan.address import Address

PAIR = {"prompt": "2 + 2?", "response": "4"}
CHAT = {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}
RULES = Rules("INSTRUCTION_FINETUNE", True)
WriteLines = Callable[[Path, Any], Path]


def _pairs(path: Path) -> Source:
    return open_source(str(path), "INSTRUCTION_FINETUNE", system_message=True)


def _texts(path: Path) -> Source:
    return open_source(str(path), "CONTINUED_PRETRAIN", system_message=True)


def _samples(*sources: Source) -> list[tuple[int, Any]]:
    """All samples of a source, or of its parts, numbered as preparation numbers them."""
    found: list[tuple[int, Any]] = []
    units = 0
    for source in sources:
        for chunk in source.chunks():
            found.extend((units + number, sample) for number, sample in chunk.samples(source.rules))
            units += chunk.units
    return found


def _line(text: object) -> bytes:
    return b'{"prompt": "%s", "response": "b"}\n' % str(text).encode()


def _write(path: Path, data: bytes) -> Path:
    """Writes `data` as the suffix of `path` has it packed."""
    match path.suffix:
        case ".gz":
            path.write_bytes(gzip.compress(data))
        case ".zst":
            path.write_bytes(zstandard.ZstdCompressor().compress(data))
        case _:
            path.write_bytes(data)
    return path


SUFFIXES = pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every source comes in many chunks."""
    for module in ("lines", "texts"):
        monkeypatch.setattr(f"tundish.data.{module}.CHUNK_BYTES", 64)


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


@SUFFIXES
@pytest.mark.parametrize("chunk", [1, 40, 1 << 20])
def test_lines_are_numbered_as_an_editor_does(
    tmp_path: Path, suffix: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Messages would name the wrong line: blank lines, CRLF, a byte-order mark and chunks must not shift them."""
    monkeypatch.setattr("tundish.data.lines.CHUNK_BYTES", chunk)
    data = b"\xef\xbb\xbf" + _line("a")[:-1] + b"\r\n\n   \n" + _line("c") + b'\n\r\n{"prompt": "e"}'
    (first, second, third) = _samples(_pairs(_write(tmp_path / f"train{suffix}", data)))
    assert (first, second) == ((1, ("a", "b")), (4, ("c", "b")))
    assert third[0] == 7 and isinstance(third[1], Problem) and third[1].rule == "keys"


def test_a_byte_order_mark_is_one_at_the_beginning_alone(tmp_path: Path, small_chunks: None) -> None:
    """A mark in the middle, as files joined by hand have it, would be passed over in some chunks and not in others."""
    path = _write(tmp_path / "train.jsonl", b"".join(b"\xef\xbb\xbf" + _line(n) for n in range(9)))
    found = _samples(_pairs(path))
    assert [isinstance(sample, Problem) for _, sample in found] == [False] + [True] * 8
    assert _samples(*_pairs(path).parts(70)) == found


@SUFFIXES
def test_bad_lines_are_all_told(tmp_path: Path, suffix: str, small_chunks: None) -> None:
    """The caller would repair one line after the other; or wrong ones, where numbers start anew in each chunk."""
    lines = [_line(n) for n in range(500)]
    for number in (2, 77, 500):
        lines[number - 1] = b"{\n"
    lines[99] = b"\n"
    lines[199] = b'{"prompt": "a"}\n'
    outcome = check_structure(_pairs(_write(tmp_path / f"train{suffix}", b"".join(lines))))
    first, second = outcome.problems
    assert first.message.startswith(f"train{suffix}, line 2: not JSON")
    assert first.message.endswith("3 of 500 lines are like this (2, 77, 500).") and first.where == [2, 77, 500]
    assert second.message.startswith(f"train{suffix}, line 200: has the keys prompt")
    assert (outcome.total, outcome.samples, outcome.prepared) == (500, 495, None)


@SUFFIXES
def test_a_line_that_is_too_long_is_refused_by_number(
    tmp_path: Path, suffix: str, small_chunks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be held in memory many times over; or the lines after it be told by wrong numbers."""
    for module in ("lines", "samples"):
        monkeypatch.setattr(f"tundish.data.{module}.MAX_LINE_BYTES", 1000)
    lines = [_line("x" * (5000 if n in (4, 11) else 100)) for n in range(1, 21)]
    lines[14] = b"{\n"
    outcome = check_structure(_pairs(_write(tmp_path / f"train{suffix}", b"".join(lines))))
    assert {finding.rule: finding.where for finding in outcome.problems} == {"line too long": [4, 11], "not JSON": [15]}
    assert (outcome.total, outcome.samples) == (20, 17)


@SUFFIXES
@pytest.mark.parametrize("content", [b"", b"\n\n  \n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_an_error(tmp_path: Path, suffix: str, content: bytes) -> None:
    """A run would train on nothing and succeed."""
    path = _write(tmp_path / f"train{suffix}", content)
    with pytest.raises(
        DataError, match=r"train\.jsonl.*: holds no sample: it is empty or blank. Use data with samples"
    ):
        check_structure(_pairs(path))


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_compressed_files_may_be_put_together(tmp_path: Path, suffix: str) -> None:
    """`cat a.zst b.zst` is a file like any other; all but its first part would be lost in silence."""
    parts = [b"".join(_line(n) for n in numbers) for numbers in (range(3), range(3, 4000), range(4000, 4005))]
    whole = b"".join(_write(tmp_path / f"part{suffix}", part).read_bytes() for part in parts)
    path = tmp_path / f"train{suffix}"
    path.write_bytes(whole)
    assert [(number, sample[0]) for number, sample in _samples(_pairs(path))] == [(n + 1, str(n)) for n in range(4005)]


def test_a_stream_of_zstandard_without_its_size_is_read(tmp_path: Path) -> None:
    """`zstd` reading from a pipe does not write how long the data is, nor in how many blocks it comes."""
    data = b"".join(_line(n) for n in range(4000))
    sink = io.BytesIO()
    with zstandard.ZstdCompressor(write_content_size=False).stream_writer(sink, closefd=False) as writer:
        for start in range(0, len(data), 999):
            writer.write(data[start : start + 999])
            writer.flush()
    path = tmp_path / "train.jsonl.zst"
    path.write_bytes(sink.getvalue())
    assert len(_samples(_pairs(path))) == 4000


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
@pytest.mark.parametrize("kept", [0.3, 0.9, 0.9999])
def test_compressed_data_that_is_cut_off_is_refused(tmp_path: Path, suffix: str, kept: float) -> None:
    """A copy that broke off would be trained as far as it goes, and the run be a success."""
    path = _write(tmp_path / f"train{suffix}", b"".join(_line(n * n * n) for n in range(20_000)))
    packed = path.read_bytes()
    path.write_bytes(packed[: int(kept * len(packed))])
    assert 3 < path.stat().st_size < len(packed)
    with pytest.raises(
        DataError, match=r"train\.jsonl\.\w+: the compressed data is damaged or truncated .* copy it again"
    ):
        check_structure(_pairs(path))


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
@pytest.mark.parametrize("at", ["beginning", "header", "middle", "end"])
def test_damaged_compressed_data_is_refused(tmp_path: Path, suffix: str, at: str) -> None:
    """The run would end in a traceback of a compressor, or train on rubbish."""
    data = b"".join(_line(n * n * n) for n in range(20_000))
    path = _write(tmp_path / f"train{suffix}", data)
    if suffix == ".jsonl.zst":  # which checks what it has read where it is told to, as its command line does by default
        path.write_bytes(zstandard.ZstdCompressor(write_checksum=True).compress(data))
    packed = bytearray(path.read_bytes())
    place = {"beginning": 0, "header": 12, "middle": len(packed) // 2, "end": len(packed) - 3}[at]
    packed[place] ^= 0xFF
    path.write_bytes(bytes(packed))
    with pytest.raises(DataError, match=r"train\.jsonl\.\w+: the compressed data is damaged or truncated"):
        check_structure(_pairs(path))


def test_a_file_that_is_not_what_its_name_says_is_refused(tmp_path: Path) -> None:
    """Plain lines under a compressor's name are a common mistake."""
    for suffix in (".jsonl.gz", ".jsonl.zst"):
        path = tmp_path / f"train{suffix}"
        path.write_bytes(_line(1) * 10)
        with pytest.raises(DataError, match="the compressed data is damaged or truncated"):
            check_structure(_pairs(path))


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_line_without_end_ends_the_reading(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk of zeros, or a few megabytes of them compressed, would be read for hours."""
    for module in ("lines", "samples"):
        monkeypatch.setattr(f"tundish.data.{module}.MAX_LINE_BYTES", 1000)
    monkeypatch.setattr("tundish.data.lines.CHUNK_BYTES", 100)
    monkeypatch.setattr("tundish.data.lines.MAX_PASSED_BYTES", 5000)
    compress = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix]
    path = tmp_path / f"train.jsonl{suffix}"
    path.write_bytes(compress(_line(1) * 40 + b" " * 4000 + b"\n" + _line(2) + b"\0" * 6000))
    with pytest.raises(
        DataError, match=r"train\.jsonl\S*, line 43: the line is longer than 0 MiB, so this is not a JSONL file"
    ):
        list(_pairs(path).chunks())


def test_a_gibibyte_is_no_line(tmp_path: Path) -> None:
    """The limit would be one of the tests alone."""
    path = tmp_path / "train.jsonl.zst"
    with open(path, "wb") as file, zstandard.ZstdCompressor().stream_writer(file) as writer:
        for _ in range(1100):
            writer.write(bytes(1 << 20))
    assert path.stat().st_size < 1 << 20
    with pytest.raises(DataError, match=r"train\.jsonl\.zst, line 1: the line is longer than 1,024 MiB"):
        list(_pairs(path).chunks())


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_data_that_expands_without_measure_is_refused(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten megabytes would be read for days."""
    compress = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix]
    path = tmp_path / f"train.jsonl{suffix}"
    path.write_bytes(compress(_line(1) * 100_000))
    assert list(_pairs(path).chunks()), "a few megabytes are no matter"
    monkeypatch.setattr("tundish.data.lines.MAX_EXPANDED_BYTES", 1 << 20)
    with pytest.raises(DataError, match=r"train\.jsonl\S*, its [\d,]+ bytes expand to more than 200 times as many"):
        list(_pairs(path).chunks())


@settings(max_examples=100)
@given(
    st.lists(st.integers(0, 120), max_size=30),
    st.sampled_from([b"", b"\n"]),
    st.integers(1, 400),
    st.sampled_from([16, 100, 1 << 20]),
)
def test_parts_of_a_file_are_all_of_it_once(
    lines_file: Path, lengths: list[int], end: bytes, size: int, chunk: int
) -> None:
    """Machines that share a file would train some of its lines twice, or never."""
    lines = [_line(f"{n} {'x' * length}")[:-1] if length % 7 else b" " * length for n, length in enumerate(lengths)]
    lines_file.write_bytes(b"\n".join(lines) + end)
    source = Lines(lines_file, RULES)
    with pytest.MonkeyPatch.context() as patch:
        for module in ("lines", "texts"):
            patch.setattr(f"tundish.data.{module}.CHUNK_BYTES", chunk)
        parts = source.parts(size)
        assert _samples(*parts) == _samples(source)
        assert sum(part.size or 0 for part in parts) == source.size == lines_file.stat().st_size
        assert sum(chunk.size for part in parts for chunk in part.chunks()) == source.size
    assert 1 <= len(parts) <= max(1, len(lines))
    # A part is what was asked for, and the rest of its last line.
    assert all(size <= (part.size or 0) <= size + 160 for part in parts[:-1])


@pytest.fixture(scope="module")
def lines_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place for a .jsonl file."""
    return tmp_path_factory.mktemp("lines") / "train.jsonl"


@settings(max_examples=50)
@given(st.lists(st.integers(0, 200), min_size=1, max_size=20), st.integers(1, 500), st.sampled_from([16, 100, 1 << 20]))
def test_parts_of_a_folder_are_all_of_it_once(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], size: int, chunk: int
) -> None:
    """Machines that share a folder would train some of its files twice, or never."""
    folder = tmp_path_factory.mktemp("texts")
    for number, length in enumerate(lengths):
        (folder / f"{number:02}.txt").write_text(f"{number}" * length)
    source = TextFolder.of(folder, Rules("CONTINUED_PRETRAIN", True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tundish.data.texts.CHUNK_BYTES", chunk)
        parts = source.parts(size)
        assert _samples(*parts) == _samples(source)
        assert [text for _, text in _samples(source)] == [f"{number}" * length for number, length in enumerate(lengths)]
        assert sum(part.size or 0 for part in parts) == source.size
        assert [name for part in cast(list[TextFiles], parts) for name in part.names] == list(source.names)
    assert all((part.size or 0) >= size for part in parts[:-1])


def test_compressed_data_is_one_part(tmp_path: Path) -> None:
    """A part would begin in the middle of what only can be read from its beginning."""
    for suffix in (".jsonl.gz", ".jsonl.zst"):
        source = _pairs(_write(tmp_path / f"train{suffix}", b"".join(_line(n) for n in range(100))))
        assert source.parts(10) == [source] and source.size is None


def test_the_first_samples_are_good_ones(tmp_path: Path, small_chunks: None) -> None:
    """The engines would be compared on rubbish, or on all of the data."""
    path = _write(tmp_path / "train.jsonl", b"{\n\n" + b"".join(_line(n) for n in range(100)))
    assert list(first_samples(_pairs(path))) == [("0", "b"), ("1", "b")]


def test_text_files_are_found_nested_and_in_order_and_others_ignored(books: Path) -> None:
    """Text would be missing, other files would be trained, or the order depend on the machine."""
    assert _samples(_texts(books)) == [
        (1, "text of a.txt"),
        (2, "text of b.txt"),
        (3, "text of deep/c.txt"),
        (4, "text of deep/er/d.txt"),
    ]


def test_links_out_of_the_folder_are_refused(books: Path, tmp_path: Path) -> None:
    """A link in a data folder would put any file of the machine into the model; or texts be missing in silence."""
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "secret.txt").write_text("secret")
    (books / "link.txt").symlink_to(tmp_path / "secret.txt")
    (books / "folder").symlink_to(tmp_path / "other")
    with pytest.raises(
        SpecError, match=r"books: holds 2 links out of the folder.*\(folder, link\.txt\)\. Copy the files"
    ):
        _texts(books)


def test_what_is_no_file_is_refused(books: Path) -> None:
    """A pipe would be waited for until somebody writes to it; a link to nothing end preparation in a traceback."""
    os.mkfifo(books / "pipe.txt")
    (books / "gone.txt").symlink_to(books / "nothing")
    (books / "notes.link").symlink_to(books / "nothing")
    with pytest.raises(SpecError, match=r"books: holds 2 links.*\(gone\.txt, pipe\.txt\)"):
        _texts(books)


def test_a_link_to_a_text_of_the_folder_is_that_text(books: Path) -> None:
    """Folders that a hub's client has made are full of links, all of them inside."""
    (books / "a2.txt").symlink_to(books / "a.txt")
    assert [text for _, text in _samples(_texts(books))][:2] == ["text of a.txt", "text of a.txt"]


def test_the_state_tells_that_somebody_has_written(books: Path, tmp_path: Path, write_lines: WriteLines) -> None:
    """Data that grows while it is read would be prepared under the digest of what it was."""
    path = write_lines(tmp_path / "train.jsonl", [PAIR])
    for source, file in ((_pairs(path), path), (_texts(books), books / "deep" / "er" / "d.txt")):
        before = source.state()
        assert source.state() == before
        os.utime(file, ns=(1, 1))
        touched = source.state()
        file.write_bytes(file.read_bytes() * 2)
        assert before != touched != source.state() != before


def test_empty_text_files_are_no_samples(books: Path) -> None:
    """A row of nothing would be trained; the other files' numbers would shift."""
    (books / "a.txt").write_text(" \n")
    assert [(number, sample == EMPTY) for number, sample in _samples(_texts(books))] == [
        (1, True),
        (2, False),
        (3, False),
        (4, False),
    ]
    outcome: Outcome = check_structure(_texts(books))
    assert (outcome.total, outcome.samples, outcome.problems) == (4, 3, [])
    for path in books.rglob("*.txt"):
        path.write_text("")
    with pytest.raises(DataError, match=r"books: holds no sample: it is empty or blank"):
        check_structure(_texts(books))


def test_text_that_is_not_utf8_is_named(books: Path, small_chunks: None) -> None:
    """Broken characters would be trained, or all but the first file go unnamed."""
    (books / "a.txt").write_bytes(b"caf\xe9")
    (books / "deep" / "c.txt").write_bytes(b"\xff")
    (finding,) = check_structure(_texts(books)).problems
    assert finding.message == (
        "a.txt: the byte at offset 3 is not UTF-8. Save the file as UTF-8. "
        "2 of 4 files are like this (a.txt, deep/c.txt)."
    )
    assert finding.where == ["a.txt", "deep/c.txt"]


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
def test_a_path_that_holds_no_lines_is_refused(tmp_path: Path, task: Any) -> None:
    """The message would not say what the task type takes."""
    (tmp_path / "train.csv").write_text("a,b")
    (tmp_path / "train").write_text("{}")
    (tmp_path / "folder.jsonl").mkdir()
    takes = (
        r"takes a \.jsonl file \(\.gz and \.zst too\), a \.parquet file or a folder of them, a Delta table .*, or a "
        r"Hugging Face dataset with its split .*"
    )
    for name, found in [
        ("none.jsonl", rf"none\.jsonl: there is no such file \(.*none\.jsonl\); {task} {takes}\. Check the path"),
        ("none.jsonl.gz", rf"none\.jsonl\.gz: there is no such file \(.*\); {task} {takes}"),
        ("folder.jsonl", rf"folder\.jsonl: is a folder; {task} {takes}"),
        ("train.csv", rf"train\.csv: is a \.csv file; {task} {takes}"),
        ("train", rf"train: has no suffix; {task} {takes}"),
    ]:
        with pytest.raises(SpecError, match=found):
            open_source(str(tmp_path / name), task, system_message=True)


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


def test_volume_paths_are_read_from_the_workspace(home: Path, write_lines: WriteLines) -> None:
    """A notebook's `dbfs:/Volumes/…` path would not be found."""
    folder = home / "Volumes" / "main" / "lab" / "v"
    folder.mkdir(parents=True)
    write_lines(folder / "train.jsonl", [CHAT])
    address = Address.parse("dbfs:/Volumes/main/lab/v/train.jsonl", "data")
    source = open_source(address, "CHAT_COMPLETION", system_message=True)
    assert _samples(source) == [(1, CHAT["messages"])]
