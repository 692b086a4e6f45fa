"""checkpoints/archive.py and objects.py: archives of `torch.save`, honest ones and others."""

import importlib
import io
import os
import pickle
import socket
import struct
import tarfile
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from tundish.checkpoints.format import archive, objects
from tundish.checkpoints.format.metadata import Part
from tundish.checkpoints.format.tensors import read_part
from tundish.errors import CheckpointError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),  # PyTorch's own, on saving
    pytest.mark.usefixtures("little_memory"),
]
Archived = Callable[[Any], bytes]


@pytest.fixture
def part(tmp_path: Path) -> Callable[..., Part]:
    """`part(content, *sizes)`: an archive between other bytes, as it lies in a `.distcp` file."""

    def make(content: bytes, *sizes: int) -> Part:
        file = tmp_path / "__0_0.distcp"
        file.write_bytes(b"x" * 77 + content + b"y" * 99)
        return Part((0,) * len(sizes), sizes, file, 77, len(content))

    return make


def _refusal(action: Callable[[], Any]) -> str:
    with pytest.raises(CheckpointError) as error:
        action()
    assert error.value.message.isprintable() and len(error.value.message) < 1500
    return error.value.message


def _entries(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as source:
        return {name: source.read(name) for name in source.namelist()}


def _zip(entries: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED, comment: bytes = b"") -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as target:
        for name, content in entries:
            target.writestr(name, content)
        target.comment = comment
    return file.getvalue()


def test_an_archive_of_another_writer_is_read(part: Callable[..., Part], archived: Archived) -> None:
    """Archives that these tests make would be refused for what they have in common, and the tests show nothing."""
    import torch

    content = _zip(list(_entries(archived(torch.ones(3))).items()))
    assert read_part(part(content, 3), "float32").tolist() == [1, 1, 1]
    assert objects.read_object(part(content)).tolist() == [1, 1, 1]


def test_each_flipped_bit_of_a_tensor_is_noticed(part: Callable[..., Part], archived: Archived) -> None:
    """PyTorch reads a damaged tensor as another one."""
    import torch

    content = archived(torch.arange(5.0))
    start = content.index(struct.pack("<5f", *range(5)))
    for at in range(start, start + 20):
        damaged = content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]
        assert not torch.load(io.BytesIO(damaged), weights_only=True).equal(torch.arange(5.0))
        message = _refusal(lambda damaged=damaged: read_part(part(damaged, 5), "float32"))
        assert "__0_0.distcp, byte 781: its content is not what was written (CRC-32 differs)" in message
        assert "CRC-32" in _refusal(lambda damaged=damaged: objects.read_object(part(damaged)))


@pytest.mark.parametrize("kind", ["tensor", "object"])
def test_any_damaged_byte_is_an_error_of_the_checkpoint_or_harmless(
    part: Callable[..., Part], archived: Archived, kind: str
) -> None:
    """One of them would end in a traceback, in no end, or in other values."""
    import torch

    tensor = torch.arange(5.0)
    content = archived(tensor if kind == "tensor" else {"a": [1, 2], "t": tensor})
    refused = 0
    for at in range(0, len(content), 3):
        made = part(content[:at] + bytes([content[at] ^ (1 << at % 8)]) + content[at + 1 :], 5)
        try:
            if kind == "tensor":
                assert read_part(made, "float32").equal(tensor)
            else:
                found = objects.read_object(made)
                assert (found["a"], found["t"].tolist()) == ([1, 2], [*range(5)])
        except CheckpointError as error:
            assert error.message.isprintable()
            refused += 1
    assert refused > 100


@pytest.mark.parametrize("cut", [0, 1, 30, 500, -1, -22, -98])
def test_a_cut_archive_is_refused(part: Callable[..., Part], archived: Archived, cut: int) -> None:
    """What is missing would be read from what comes after it in the file."""
    import torch

    content = archived(torch.arange(5.0))
    assert "not a readable tensor" in _refusal(lambda: read_part(part(content[:cut], 5), "float32"))
    assert "not a readable tensor" in _refusal(lambda: objects.read_object(part(content[:cut])))


def test_code_in_the_place_of_a_tensor_is_refused_and_not_run(
    part: Callable[..., Part], archived: Archived, runs_code: Any
) -> None:
    """The guard on the metadata would be worth nothing if a tensor's bytes could run a program."""
    import torch

    content = archived(runs_code)
    message = _refusal(lambda: read_part(part(content, 3), "float32"))
    assert "not a readable tensor (it names posix.system, which no checkpoint needs" in message
    message = _refusal(lambda: objects.read_object(part(content)))
    assert "cannot be loaded without running code from it (it names posix.system" in message
    assert not runs_code.marker.exists()
    torch.load(io.BytesIO(content), weights_only=False)
    assert runs_code.marker.exists(), "the payload does nothing, so the test would show nothing"


@pytest.mark.parametrize("where", ["list", "key", "tensor attribute", "ordered dict attribute", "storage"])
def test_code_nested_in_what_is_allowed_is_refused_and_not_run(
    part: Callable[..., Part], archived: Archived, runs_code: Any, where: str
) -> None:
    """Only the outermost object would have been looked at."""
    import torch

    tensor: Any = torch.ones(2)
    ordered: Any = OrderedDict()
    tensor.payload = ordered._metadata = runs_code
    content = {
        "list": {"state": [1, {"a": (2, runs_code)}]},
        "key": {runs_code: 1},
        "tensor attribute": tensor,
        "ordered dict attribute": ordered,
    }.get(where)
    if where == "storage":
        _utils: Any = importlib.import_module("torch._utils")

        class Inside:
            def __reduce__(self) -> Any:
                return _utils._rebuild_tensor_v2, (torch.ones(2).untyped_storage(), runs_code, (2,), (1,), False)

        content = Inside()
    saved = archived(content)
    _refusal(lambda: objects.read_object(part(saved)))
    _refusal(lambda: read_part(part(saved, 2), "float32"))
    assert not runs_code.marker.exists()
    try:
        torch.load(io.BytesIO(saved), weights_only=False)
    except Exception:
        assert where in ("key", "storage"), "what the payload returns is no offset; it has run by then"
    assert runs_code.marker.exists(), "the payload does nothing, so the test would show nothing"


def test_what_composer_keeps_is_read(part: Callable[..., Part], archived: Archived) -> None:
    """A run would not go on: its random state, clock or metrics would be refused."""
    import random

    import numpy as np
    import torch

    given = {
        "rng": [{"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}],
        "timestamp": {"Timestamp": {"batch": 3, "total_wct": timedelta(seconds=3)}},
        "version": torch.__version__,
        "metric": {"_computed": np.array([1.5], np.float32), "sum": np.arange(6).reshape(2, 3)},
        "module": torch.nn.Linear(2, 2).state_dict(),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "misc": [torch.float32, torch.Size([1, 2]), torch.device("cpu"), b"\x00\xff", None, torch.tensor([]), "é"],
    }
    found = objects.read_object(part(archived(given)))
    assert repr(found) == repr(given)
    assert np.array_equal(found["rng"][0]["numpy"][1], given["rng"][0]["numpy"][1])
    np.random.set_state(found["rng"][0]["numpy"])
    assert isinstance(found["metric"]["sum"], np.ndarray) and found["metric"]["sum"].shape == (2, 3)


def _numpy(dtype: Any, shape: Any, raw: Any, state: Any = (3, "<", None, None, None, -1, -1, 0)) -> Any:
    """An array as NumPy pickles it, with a type, a shape and bytes of our choice."""
    import numpy as np

    class Type:
        def __reduce__(self) -> Any:
            return np.dtype, (dtype, False, True), state

    class Array:
        def __reduce__(self) -> Any:
            return np.empty(0).__reduce__()[0], (np.ndarray, (0,), b"b"), (1, shape, Type(), False, raw)

    return Array()


OBJECT_FIELD = (3, "<", None, ("a",), {"a": ("O", 0)}, 8, 8, 0)


@pytest.mark.parametrize(
    "given",
    [
        _numpy("O8", (1,), [1]),
        _numpy("O8", (1,), b"A" * 8, (3, "|", None, None, None, -1, -1, 0)),
        _numpy("V8", (1,), b"A" * 8, OBJECT_FIELD),
        _numpy("u8", (1,), b"A" * 8, OBJECT_FIELD),
        _numpy([("a", "O")], (1,), b"A" * 8),
        _numpy("u4", (1 << 40,), b"A" * 4),
        _numpy("u4", (-1,), b"A" * 4),
        _numpy("u4", (2,), b"A" * 4),
        _numpy("u4", (1,), b"A" * 4, (3, "<", ("u4", (1 << 40,)), None, None, -1, -1, 0)),
        _numpy("u4", (1,), b"A" * 4, (3, "<", None, None, None, 1 << 40, 1, 0)),
        _numpy("u4", (1,), b"A" * 4, (3, "<", None, None, None, -1, -1, 63)),
        _numpy("u4", (1,), b"A" * 4, "x"),
        _numpy("S", (1,), b"A"),
        _numpy("M8[s]", (1,), b"A" * 8),
    ],
    ids=range(14),
)
def test_numpy_arrays_of_anything_but_numbers_are_refused(
    part: Callable[..., Part], archived: Archived, given: Any
) -> None:
    """The bytes of an array of objects are addresses: the process would end, or run what stands there."""
    saved = archived(given)
    assert "cannot be loaded without running code" in _refusal(lambda: objects.read_object(part(saved)))


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (bytearray(4), "bytearray"),
        (Counter("ab"), "collections.Counter"),
        ({1, 2}, "set"),
        (1j, "complex"),
        (Path("x"), "pathlib.PosixPath"),
    ],
    ids=["bytearray", "counter", "set", "complex", "path"],
)
def test_what_weights_only_allows_and_nobody_needs_is_refused(
    part: Callable[..., Part], archived: Archived, given: Any, named: str
) -> None:
    """`bytearray(10 ** 11)` is forty bytes that take a hundred gigabytes."""
    assert named in _refusal(lambda: objects.read_object(part(archived(given))))


class _Calls:
    """Is made by a call of our choice."""

    def __init__(self, function: Any, *given: Any) -> None:
        self.call = function, given

    def __reduce__(self) -> Any:
        return self.call


def _lying_tensors() -> dict[str, Any]:
    import codecs

    import torch
    from torch._utils import _rebuild_tensor_v2 as rebuild

    storage = torch.ones(4).storage()

    def tensor(*more: Any) -> Any:
        return _Calls(rebuild, storage, *more, False, OrderedDict())

    return {
        "larger than its storage": tensor(0, (5,), (1,)),
        "huge by a stride of nothing": tensor(0, (1 << 50,), (0,)),
        "negative size": tensor(0, (-4,), (1,)),
        "negative stride": tensor(0, (4,), (-1,)),
        "negative offset": tensor(-4, (4,), (1,)),
        "far offset": tensor(1 << 62, (4,), (1,)),
        "text for a size": tensor(0, "4", (1,)),
        "other dimensions": tensor(0, (2, 2), (1,)),
        "no storage": _Calls(rebuild, 5, 0, (4,), (1,), False, OrderedDict()),
        "sparse": torch.eye(3).to_sparse(),
        "quantized": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        "meta": torch.ones(3, device="meta"),
        "text in a codec of its own": _Calls(codecs.encode, "a" * 100, "punycode"),
    }


@pytest.mark.parametrize("lie", range(13))
def test_lies_in_the_pickle_of_tensors_are_refused(part: Callable[..., Part], archived: Archived, lie: int) -> None:
    """PyTorch would read beyond what it has, or allocate what nobody has."""
    name, given = list(_lying_tensors().items())[lie]
    saved = archived(given)
    assert "cannot be loaded without running code" in _refusal(lambda: objects.read_object(part(saved))), name
    _refusal(lambda: read_part(part(saved, 4), "float32"))


def test_a_storage_that_is_smaller_than_said_is_refused(part: Callable[..., Part], archived: Archived) -> None:
    """PyTorch 2.7 believes the pickle's count, and reads the memory behind it."""
    import torch

    entries = _entries(archived({"t": torch.arange(4.0)}))
    assert entries["archive/data.pkl"].count(b"K\4") == 2
    entries["archive/data.pkl"] = entries["archive/data.pkl"].replace(b"K\4", b"K\xff")
    content = _zip(list(entries.items()))
    message = _refusal(lambda: objects.read_object(part(content)))
    assert "a storage of 255 elements has 16 bytes" in message
    del entries["archive/data/0"]
    assert "has 0 bytes" in _refusal(lambda: objects.read_object(part(_zip(list(entries.items())))))


def _second_directory(honest: bytes, other: bytes) -> bytes:
    """An archive that Python's reader takes for `honest`, and PyTorch's for `other`."""
    body = other + honest
    return body[:-6] + struct.pack("<L", len(other) - 22) + body[-2:]


def test_an_archive_that_two_readers_read_differently_is_refused(
    part: Callable[..., Part], archived: Archived, tmp_path: Path
) -> None:
    """What was looked at would not be what is loaded."""
    import torch

    entries = list(_entries(archived({"a": torch.ones(2)})).items())
    plain = _zip(entries)
    tricks = {
        "bytes before": b"x" * 50 + plain,
        "an archive before": plain + plain,
        "bytes after": plain + b"x" * 50,
        "a comment": _zip(entries, comment=b"x" * 60),
        "a comment with an end": _zip(entries, comment=plain[-22:]),
        "another directory": _second_directory(plain, plain),
        "bytes between": plain[:-22] + b"x" * 9 + plain[-22:],
        "capital letters": _zip([*entries, ("archive/DATA.PKL", b"N.")]),
        "a name cut off by zero": _zip([*entries, ("archive/data.pklX0", b"N.")]).replace(b"pklX0", b"pkl\0a"),
        "two prefixes": _zip([*entries, ("other/data.pkl", b"N.")]),
        "compressed": _zip(entries, zipfile.ZIP_DEFLATED),
        "a bomb": _zip([*entries, ("archive/data/7", b"\0" * (64 << 20))], zipfile.ZIP_DEFLATED),
    }
    with pytest.warns(UserWarning, match="Duplicate name"):
        tricks["two of a name"] = _zip([*entries, (entries[0][0], b"N.")])
    for name, content in tricks.items():
        _refusal(lambda content=content: objects.read_object(part(content)))
        (tmp_path / "x.pt").write_bytes(content)
        assert "x.pt, byte 0:" in _refusal(lambda: objects.load_file(tmp_path / "x.pt")), name


def _directory(content: bytes, entry: int, at: int, value: bytes) -> bytes:
    """Overwrite a field of an entry of the directory."""
    start = -1
    for _ in range(entry + 1):
        start = content.index(b"PK\1\2", start + 1)
    return content[: start + at] + value + content[start + at + len(value) :]


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (24, struct.pack("<L", 0xFFFFFFFF)),
        (24, struct.pack("<L", 0x7FFFFFFF)),
        (20, struct.pack("<L", 0)),
        (42, struct.pack("<L", 0)),
        (42, struct.pack("<L", 0x7FFFFFFF)),
        (10, struct.pack("<H", 8)),
        (10, struct.pack("<H", 99)),
        (8, struct.pack("<H", 1)),
        (28, struct.pack("<H", 0xFFFF)),
        (30, struct.pack("<H", 0xFFFF)),
        (32, struct.pack("<H", 0xFFFF)),
    ],
)
def test_a_directory_that_lies_is_refused(part: Callable[..., Part], archived: Archived, at: int, value: bytes) -> None:
    """An entry would be as large as it says, lie over another one, or be unpacked into memory."""
    import torch

    plain = _zip(list(_entries(archived(torch.arange(4.0))).items()))
    for entry in (1, 2):
        content = _directory(plain, entry, at, value)
        _refusal(lambda content=content: objects.read_object(part(content)))
    content = plain[:-12] + struct.pack("<L", 0xF0000000) + plain[-8:]
    _refusal(lambda: read_part(part(content, 4), "float32"))


@pytest.mark.parametrize("name", ["archive/data.pkl", "archive/data/0"])
def test_a_huge_hollow_entry_takes_no_memory(tmp_path: Path, archived: Archived, name: str) -> None:
    """A file with a hole is as large as one likes, and costs nothing to make."""
    import torch

    entries = _entries(archived(torch.arange(4.0)))
    path, size = tmp_path / "__0_0.distcp", 40 << 30
    with zipfile.ZipFile(path, "w") as target:
        for other, content in entries.items():
            if other != name:
                target.writestr(other, content)
        info = zipfile.ZipInfo(name)
        info.file_size = info.compress_size = size
        info.header_offset, info.CRC = target.start_dir, 0
        assert target.fp is not None
        target.fp.seek(target.start_dir)
        target.fp.write(info.FileHeader(zip64=True))
        target.fp.seek(size, os.SEEK_CUR)
        target.start_dir = target.fp.tell()
        target.filelist.append(info)
        setattr(target, "_didModify", True)  # noqa: B010  zipfile has no public way
    assert path.stat().st_size > size and path.stat().st_blocks * 512 < 1 << 20
    whole = Part((0,), (4,), path, 0, path.stat().st_size)
    assert "bytes" in _refusal(lambda: read_part(whole, "float32"))
    assert "an entry that is not a tensor has" in _refusal(lambda: objects.read_object(whole))
    _refusal(lambda: objects.load_file(path))
    hole = tmp_path / "hole.pt"
    with open(hole, "wb") as file:
        file.truncate(size)
    _refusal(lambda: objects.load_file(hole))
    _refusal(lambda: read_part(Part((0,), (4,), hole, 0, size), "float32"))


def test_a_huge_directory_takes_no_memory(tmp_path: Path) -> None:
    """The end of an archive says how much is read before anything else."""
    size = 3 << 30
    path = tmp_path / "x.pt"
    with open(path, "wb") as file:
        file.write(b"PK\3\4")
        file.seek(size)
        file.write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, size - 100, 100, 0))
    assert "its directory is not at its end" in _refusal(lambda: objects.load_file(path))


def test_files_of_other_formats_are_refused_and_not_run(tmp_path: Path, runs_code: Any) -> None:
    """PyTorch's older formats are pickles and tar files; they are loaded by other code."""
    import torch

    path = tmp_path / "x.pt"
    for content in (pickle.dumps(runs_code), b"", b"x", b"PK\3\4", b"PK\5\6" + b"\0" * 18):
        path.write_bytes(content)
        _refusal(lambda: objects.load_file(path))
    torch.save({"state": runs_code}, path, _use_new_zipfile_serialization=False)
    _refusal(lambda: objects.load_file(path))
    torch.save({"state": {"model": {"a": torch.ones(2)}}}, path, _use_new_zipfile_serialization=False)
    assert "x.pt, byte 0: not a readable tensor" in _refusal(lambda: objects.load_file(path))
    with tarfile.open(path, "w") as target:
        member = tarfile.TarInfo("pickle")
        member.size = len(pickle.dumps(runs_code))
        target.addfile(member, io.BytesIO(pickle.dumps(runs_code)))
    _refusal(lambda: objects.load_file(path))
    assert not runs_code.marker.exists()
    pickle.loads(pickle.dumps(runs_code))
    assert runs_code.marker.exists()


@pytest.mark.filterwarnings("ignore:'torch.load' received a zip file that looks like a TorchScript:UserWarning")
def test_programs_of_torchscript_are_refused(tmp_path: Path) -> None:
    """They are archives with code of their own."""
    import torch

    path = tmp_path / "x.pt"
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))
    _refusal(lambda: objects.load_file(path))


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "folder", "nothing"])
def test_what_is_no_file_is_not_opened(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To open a pipe is to wait for ever."""
    path = tmp_path / "x.pt"
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as listener:
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "socket":
            listener.bind("x.pt")
        elif kind == "device":
            path.symlink_to("/dev/zero")
        elif kind == "folder":
            path.mkdir()
        assert "x.pt: not a file" in _refusal(lambda: objects.load_file(path))


def test_a_pt_file_s_bytes_are_verified(tmp_path: Path) -> None:
    """PyTorch looks at no checksum: a run would start from damaged weights."""
    import torch

    path = tmp_path / "x.pt"
    torch.save({"state": {"model": {"a": torch.arange(1000.0)}}}, path)
    objects.verify_file(path)
    assert objects.load_file(path)["state"]["model"]["a"][999] == 999
    content = path.read_bytes()
    at = content.index(struct.pack("<3f", 500, 501, 502))
    path.write_bytes(content[:at] + b"\1" + content[at + 1 :])
    assert "its content is not what was written (CRC-32 differs)" in _refusal(lambda: objects.verify_file(path))
    for end in (100, len(content) - 50):
        path.write_bytes(content[:end])
        _refusal(lambda: objects.load_file(path))
    assert archive.LARGEST_OBJECT > 1 << 20
