"""checkpoints/metadata.py: nothing that `.metadata` says is believed, built or allocated before it was checked."""

import os
import pickle
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tundish.checkpoints.format.metadata import LARGEST_METADATA, read_layout
from tundish.errors import CheckpointError

# Of PyTorch's own, on saving: it saves from a single process, which is wanted here, and uses its own old storage class.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),
    pytest.mark.usefixtures("little_memory"),
]
Change = Callable[[Path, Callable[[Any], None]], None]
EMBED, NORM = "state.model.model.embed", "state.model.model.norm"


def _refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        read_layout(folder)
    assert str(folder) in error.value.message and error.value.message.isprintable()
    assert len(error.value.message) < 1500
    return error.value.message


@pytest.mark.parametrize("where", ["alone", "planner_data", "properties", "storage_data", "a name", "a size"])
def test_code_in_the_metadata_is_refused_and_not_run(
    checkpoint: Path, runs_code: Any, change: Change, where: str
) -> None:
    """Reading a downloaded checkpoint would run any program."""

    def put(metadata: Any) -> None:
        entry = metadata.state_dict_metadata[EMBED]
        if where == "planner_data":
            metadata.planner_data = runs_code
        elif where == "properties":
            entry.properties = runs_code
        elif where == "storage_data":
            metadata.storage_data[next(iter(metadata.storage_data))] = runs_code
        elif where == "a name":
            next(iter(metadata.storage_data.values())).relative_path = runs_code
        else:
            entry.size = runs_code

    if where == "alone":
        (checkpoint / ".metadata").write_bytes(pickle.dumps(runs_code))
    else:
        change(checkpoint, put)
    assert "names posix.system, which no checkpoint needs; it may hold code and was not loaded" in _refusal(checkpoint)
    assert not runs_code.marker.exists()
    pickle.loads((checkpoint / ".metadata").read_bytes())
    assert runs_code.marker.exists(), "the payload does nothing, so the test would show nothing"


@pytest.mark.parametrize(
    "name",
    [
        "builtins eval",
        "builtins getattr",
        "builtins exec",
        "torch load",
        "torch.serialization load",
        "torch.distributed.checkpoint.metadata pickle.loads",
        "torch.distributed.checkpoint.filesystem os.system",
        "os system",
        "torch.hub load",
        "pathlib Path",
        "functools partial",
        "numpy load",
    ],
)
def test_only_what_dcp_needs_may_be_named(checkpoint: Path, name: str) -> None:
    """A function of an allowed module, or one that finds others, would be a way round the guard."""
    module, function = name.split()
    for content in (f"c{module}\n{function}\n.".encode(), pickle.dumps([module, function], 4)[:-3] + b"\x93."):
        (checkpoint / ".metadata").write_bytes(content)
        message = _refusal(checkpoint)
        assert f"names {module}.{function}" in message or "no pickle of plain values" in message
    (checkpoint / ".metadata").write_bytes(f"c{module}\n{function}\n.".encode())
    assert f"names {module}.{function}" in _refusal(checkpoint)


@pytest.mark.parametrize("name", ["../secret.distcp", "/etc/passwd", "a/../../secret.distcp", "..", "../ep1-ba10x"])
def test_names_that_leave_the_folder_are_refused(checkpoint: Path, change: Change, name: str) -> None:
    """A checkpoint would make the export read any file of the machine."""
    (checkpoint.parent / "secret.distcp").write_bytes(b"x" * 10_000)

    def point(metadata: Any) -> None:
        for info in metadata.storage_data.values():
            info.relative_path = name

    change(checkpoint, point)
    assert "leaves" in _refusal(checkpoint)


@pytest.mark.parametrize("name", ["", ".", "x" * 300, "a\0b", "a\nb", "\x1b[2J", "loop", "\ud800"])
def test_names_that_no_file_has_are_refused(checkpoint: Path, change: Change, name: str) -> None:
    """They would end in a traceback of the system, or write what they like to the terminal."""
    (checkpoint / "loop").symlink_to(checkpoint / "loop")

    def point(metadata: Any) -> None:
        for info in metadata.storage_data.values():
            info.relative_path = name

    change(checkpoint, point)
    _refusal(checkpoint)


@pytest.mark.parametrize("link", ["__0_0.distcp", ".metadata"])
def test_links_that_leave_the_folder_are_refused(checkpoint: Path, link: str) -> None:
    """A link would get round the check of names."""
    (checkpoint / link).rename(checkpoint.parent / "elsewhere")
    (checkpoint / link).symlink_to(checkpoint.parent / "elsewhere")
    assert "leaves" in _refusal(checkpoint)


def test_a_checkpoint_folder_may_be_a_link(checkpoint: Path) -> None:
    """People link checkpoints to where there is room."""
    (checkpoint.parent / "ep1-ba11").symlink_to(checkpoint)
    assert read_layout(checkpoint.parent / "ep1-ba11").tensors.keys() == read_layout(checkpoint).tensors.keys()


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "folder"])
@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
def test_what_is_no_file_is_not_opened(checkpoint: Path, kind: str, name: str) -> None:
    """To open a pipe is to wait for ever; /dev/zero has no end."""
    path = checkpoint / name
    path.unlink()
    with socket.socket(socket.AF_UNIX) as listener:
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "socket":
            here = Path.cwd()
            os.chdir(checkpoint)  # a socket's path is short
            try:
                listener.bind(name)
            finally:
                os.chdir(here)
        elif kind == "device":
            path.symlink_to("/dev/zero")
        else:
            path.mkdir()
        _refusal(checkpoint)


def test_a_file_that_differs_from_what_is_said_is_named(checkpoint: Path) -> None:
    """An export from half a checkpoint would fail late, or write zeros; what is appended could be anything."""
    shard = checkpoint / "__0_0.distcp"
    size = shard.stat().st_size
    for wrong, what in ((size // 2, "incomplete"), (size - 1, "incomplete"), (size + 1, "damaged"), (0, "incomplete")):
        os.truncate(shard, wrong)
        assert f"__0_0.distcp: has {wrong:,} bytes, but its last entry ends at byte" in _refusal(checkpoint)
        assert f"The checkpoint is {what}. Use another one." in _refusal(checkpoint)
    shard.unlink()
    assert "__0_0.distcp: is missing, but" in _refusal(checkpoint)


def test_missing_or_damaged_metadata_is_named(checkpoint: Path) -> None:
    """An unfinished checkpoint would end in a traceback of pickle."""
    path = checkpoint / ".metadata"
    content = path.read_bytes()
    for damaged in (b"", content[: len(content) // 2], b"not a pickle", pickle.dumps([1, 2]), pickle.dumps(None)):
        path.write_bytes(damaged)
        assert ".metadata: " in _refusal(checkpoint)
    with open(path, "wb") as file:
        file.truncate(LARGEST_METADATA + 1)
    assert "bytes, and may have at most" in _refusal(checkpoint)
    path.unlink()
    assert "has no .metadata, so the checkpoint is incomplete" in _refusal(checkpoint)


def test_any_flipped_bit_of_the_metadata_is_an_error_of_the_checkpoint(checkpoint: Path) -> None:
    """One of them would end in a traceback, or in no end."""
    path = checkpoint / ".metadata"
    content = path.read_bytes()
    refused = 0
    for at in range(len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ (1 << at % 8)]) + content[at + 1 :])
        try:
            read_layout(checkpoint)
        except CheckpointError as error:
            assert error.message.isprintable()
            refused += 1
    assert refused > len(content) / 4


def _change_entry(name: str, **values: Any) -> Callable[[Any], None]:
    def apply(metadata: Any) -> None:
        for attribute, value in values.items():
            setattr(metadata.state_dict_metadata[name], attribute, value)

    return apply


def _chunks(*pairs: tuple[Any, Any]) -> list[Any]:
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

    return [ChunkStorageMetadata(offsets=offsets, sizes=sizes) for offsets, sizes in pairs]


HUGE = 1 << 62
LIES: dict[str, dict[str, Any]] = {
    "negative": {"size": (-6, 4)},
    "huge": {"size": (HUGE, HUGE), "chunks": [((0, 0), (HUGE, HUGE))]},
    "huge in one dimension": {"size": (HUGE, 4), "chunks": [((0, 0), (HUGE, 4))]},
    "larger than any number": {"size": (1 << 80_000, 4), "chunks": [((0, 0), (1 << 80_000, 4))]},
    "empty and huge": {"size": (0, HUGE, HUGE), "chunks": []},
    "larger than its parts": {"size": (12, 4)},
    "more dimensions than its parts": {"size": (6, 4, 1)},
    "a thousand dimensions": {"size": (1,) * 1000, "chunks": [((0,) * 1000, (1,) * 1000)]},
    "parts that overlap": {"size": (9, 4), "chunks": [((0, 0), (6, 4)), ((3, 0), (6, 4))]},
    "the same part twice": {"size": (12, 4), "chunks": [((0, 0), (6, 4)), ((0, 0), (6, 4))]},
    "a part outside": {"chunks": [((3, 0), (6, 4))]},
    "a part with other offsets": {"chunks": [((0,), (6, 4))]},
    "a gap": {"size": (6, 4), "chunks": [((0, 0), (3, 4)), ((4, 0), (3, 4))]},
    "no parts": {"chunks": []},
    "a size that is a text": {"size": "64"},
    "a size that is a number": {"size": 24},
    "sizes that are texts": {"size": ("6", "4")},
    "sizes that are broken": {"size": (6.0, 4.0)},
    "sizes that are true": {"size": (True, True)},
    "parts that are none": {"chunks": 5},
    "elements that are objects": {"properties": None},
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_about_shapes_are_refused_before_anything_is_allocated(checkpoint: Path, change: Change, lie: str) -> None:
    """A size would end the process, or what no part covers be exported as whatever was in memory."""
    values = dict(LIES[lie])
    if isinstance(values.get("chunks"), list):
        values["chunks"] = _chunks(*values["chunks"])
    change(checkpoint, _change_entry(EMBED, **values))
    _refusal(checkpoint)


@pytest.mark.parametrize("dtype", ["complex128", "quint8", "float32x", None])
def test_elements_that_are_no_numbers_are_refused(checkpoint: Path, change: Change, dtype: str | None) -> None:
    """A type of which nobody knows the size would pass all checks of sizes."""
    import torch

    def turn(metadata: Any) -> None:
        metadata.state_dict_metadata[EMBED].properties.dtype = getattr(torch, str(dtype), dtype)

    change(checkpoint, turn)
    _refusal(checkpoint)


@pytest.mark.parametrize("kind", ["many", "one"])
def test_a_file_s_bytes_are_those_of_one_tensor(checkpoint: Path, change: Change, kind: str) -> None:
    """A small file could make up terabytes: each part alone is as large as its bytes."""
    from torch.distributed.checkpoint.metadata import MetadataIndex

    def repeat(metadata: Any) -> None:
        (place,) = [info for index, info in metadata.storage_data.items() if index.fqn == EMBED]
        entry = metadata.state_dict_metadata[EMBED]
        if kind == "many":
            for number in range(100):
                metadata.state_dict_metadata[f"copy {number}"] = entry
                metadata.storage_data[MetadataIndex(f"copy {number}", (0, 0))] = place
            return
        entry.size, entry.chunks = (600, 4), _chunks(*(((6 * number, 0), (6, 4)) for number in range(100)))
        for number in range(1, 100):
            metadata.storage_data[MetadataIndex(EMBED, (6 * number, 0))] = place

    change(checkpoint, repeat)
    assert "to two tensors" in _refusal(checkpoint)


def test_many_parts_are_compared_in_time(checkpoint: Path, change: Change) -> None:
    """Each compared with each, a checkpoint of a thousand ranks would take minutes, and a lie hours."""
    from torch.distributed.checkpoint.metadata import MetadataIndex

    count = 20_000

    def divide(metadata: Any) -> None:
        (place,) = [info for index, info in metadata.storage_data.items() if index.fqn == EMBED]
        entry = metadata.state_dict_metadata[EMBED]
        entry.size, entry.chunks = (1, count), _chunks(*(((0, number), (1, 1)) for number in range(count)))
        metadata.storage_data |= {MetadataIndex(EMBED, (0, number)): place for number in range(count)}

    change(checkpoint, divide)
    assert "to two tensors" in _refusal(checkpoint), "which is looked at after the parts"


@pytest.mark.parametrize("shape", ["rows", "columns", "both", "uneven", "empty rank"])
def test_parts_as_ranks_write_them_are_read(tmp_path: Path, change: Change, shape: str) -> None:
    """Checkpoints of tensor parallel or odd numbers of ranks would be refused."""
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import MetadataIndex

    from tundish.checkpoints.folder import read_tensors

    cells = {
        "rows": [((0, 0), (3, 4)), ((3, 0), (3, 4))],
        "columns": [((0, 0), (6, 2)), ((0, 2), (6, 2))],
        "both": [((0, 0), (3, 2)), ((0, 2), (3, 2)), ((3, 0), (3, 2)), ((3, 2), (3, 2))],
        "uneven": [((0, 0), (4, 4)), ((4, 0), (2, 1)), ((4, 1), (2, 3))],
        "empty rank": [((0, 0), (3, 4)), ((3, 0), (3, 4)), ((6, 0), (0, 4))],
    }[shape]
    whole = torch.arange(24.0).reshape(6, 4)
    pieces = {
        f"part{number}": whole[top : top + rows, left : left + columns].clone()
        for number, ((top, left), (rows, columns)) in enumerate(cells)
    }
    dcp.save(pieces, checkpoint_id=tmp_path / "ep1-ba1", no_dist=True)

    def join(metadata: Any) -> None:
        places = {index.fqn: info for index, info in metadata.storage_data.items()}
        entry = metadata.state_dict_metadata["part0"]
        entry.size, entry.chunks = torch.Size([6, 4]), _chunks(*((torch.Size(a), torch.Size(b)) for a, b in cells))
        metadata.state_dict_metadata = {"whole": entry}
        metadata.storage_data = {
            MetadataIndex("whole", torch.Size(cells[number][0])): places[f"part{number}"]
            for number in reversed(range(len(cells)))
        }

    change(tmp_path / "ep1-ba1", join)
    (tensor,) = read_tensors(tmp_path / "ep1-ba1").values()
    assert len(tensor.parts) == len(cells) and tensor.read().equal(whole)


def _wrong(metadata: Any, what: str) -> None:
    info = next(iter(metadata.storage_data.values()))
    if what == "negative place":
        info.offset = -5
    elif what == "place that is a text":
        info.offset = "0"
    elif what == "place beyond the file":
        info.offset = HUGE
    elif what == "no storage":
        metadata.storage_data = None
    elif what == "storage that is a list":
        metadata.storage_data = [1, 2]
    elif what == "entries that are a list":
        metadata.state_dict_metadata = ["a"]
    elif what == "entry without a place":
        metadata.state_dict_metadata["more"] = metadata.state_dict_metadata[EMBED]
    elif what == "entry that is a number":
        metadata.state_dict_metadata[EMBED] = 5
    elif what == "compressed file":
        info.transform_descriptors = ["zstd"]
    elif what == "name with control characters":
        metadata.state_dict_metadata["\x1b[2J"] = metadata.state_dict_metadata.pop(EMBED)
    elif what == "path without keys":
        metadata.planner_data = {EMBED: ()}
    elif what == "path that is a number":
        metadata.planner_data = {EMBED: 5}
    elif what == "path with a key that is a list":
        metadata.planner_data = {EMBED: ([],)}
    else:
        raise AssertionError(what)


@pytest.mark.parametrize(
    "what",
    [
        "negative place",
        "place that is a text",
        "place beyond the file",
        "no storage",
        "storage that is a list",
        "entries that are a list",
        "entry without a place",
        "entry that is a number",
        "compressed file",
        "name with control characters",
        "path without keys",
        "path that is a number",
        "path with a key that is a list",
    ],
)
def test_metadata_of_wrong_types_is_refused(checkpoint: Path, change: Change, what: str) -> None:
    """A traceback would reach the user, or a wrong type the code behind."""
    change(checkpoint, lambda metadata: _wrong(metadata, what))
    _refusal(checkpoint)
