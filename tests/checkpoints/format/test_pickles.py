"""checkpoints/pickles.py: a pickle is data, whatever it says."""

import os
import pickle
import pickletools
from collections import OrderedDict
from typing import Any

import pytest

from tundish.checkpoints.format.pickles import Call, PlainUnpickler, Record, empty_dict, same, shown
from tundish.errors import CheckpointError

pytestmark = pytest.mark.slow

NAMES = {"a.Thing": Call(Record), "a.constant": "float32", "a.same": Call(same), "a.dict": Call(empty_dict)}
PLAIN = {"a": [1, -2.5, 1 << 80, None, True], "b": ("x", b"y", ("é" * 300,)), 3: {"c": {}}, 2.5: [[]] * 3}
START = b"\x80\x04"
THING, CONSTANT = b"ca\nThing\n", b"ca\nconstant\n"


def _load(content: bytes) -> Any:
    return PlainUnpickler(content, NAMES).load()


def _refusal(content: bytes) -> str:
    with pytest.raises(CheckpointError) as error:
        _load(content)
    assert error.value.message.isprintable() and len(error.value.message) < 400
    return error.value.message


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_values_are_read_in_every_protocol(protocol: int) -> None:
    """Checkpoints of other versions of Python or PyTorch would be refused."""
    given = PLAIN if protocol > 2 else {**PLAIN, "b": ()}
    assert _load(pickle.dumps(given, protocol)) == given
    shared: list[Any] = [PLAIN["a"]]
    found = _load(pickle.dumps([shared, shared], protocol))
    assert found[0] is found[1]


def test_names_are_never_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module's import would run already; a payload in any form has to be refused by its name."""

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.putenv, ("TUNDISH_PAYLOAD", "ran")

    for protocol in (2, 4):
        assert "it names posix.putenv, which no checkpoint needs" in _refusal(pickle.dumps(Payload(), protocol))
    assert "not_there" in _refusal(b"cnot_there.at_all\nx\n.")


@pytest.mark.parametrize(
    ("name", "content"),
    {
        "a constant is called": CONSTANT + b")R.",
        "a result is called": THING + b")R)R.",
        "a text is called": b"X\1\0\0\0a)R.",
        "the state of a name": THING + b"}b.",
        "the attributes of a name": THING + b"}X\4\0\0\0makeI1\nsb.",
        "the state of a constant": CONSTANT + b"}b.",
        "the state of a text": b"X\1\0\0\0a}b.",
        "the state of a tuple": b")}b.",
        "the state of a list": b"]}b.",
        "items of a record": THING + b")RK\1K\2s.",
        "items of a list": b"]K\0K\1s.",
        "an item appended to a record": THING + b")RK\1a.",
        "items appended to a dict": b"}(K\1K\2e.",
        "a size of no tuple": b"ca\nsame\n](K\1K\2e\x85R.",
        "a dict of something": b"ca\ndict\n}\x85R.",
        "keys that are lists": b"}](K\1es.",
        "a class with keywords": THING + b")}\x92.",
        "an instance": b"(ia\nThing\n.",
        "an object": b"(" + THING + b"o.",
        "a class by number": b"\x82\1.",
        "a set": b"\x8f.",
        "a frozen set": b"(\x91.",
        "a byte array": b"\x96" + (1 << 62).to_bytes(8, "little") + b".",
        "a buffer from outside": b"\x97.",
        "a reference to outside": b"K\1Q.",
        "a reference to outside as text": b"Px\n.",
        "bytes without end": b"\x8e" + (1 << 62).to_bytes(8, "little") + b"a.",
        "more bytes than there are numbers": b"\x8e" + b"\xff" * 8 + b"a.",
        "a text without end": b"\x8d" + (1 << 62).to_bytes(8, "little") + b"a.",
        "a frame without end": b"\x95" + (1 << 62).to_bytes(8, "little") + b"a.",
        "a number without end": b"\x8b" + (1 << 30).to_bytes(4, "little") + b"\1.",
        "a number as text": b"I" + b"9" * 5000 + b"\n.",
        "a place that was never filled": b"h\7.",
        "nothing on the stack": b"R.",
        "no mark": b"t.",
        "no end": b"K\1",
        "nothing": b"",
        "an unknown instruction": b"\xff.",
        "a later protocol": b"\x80\x63K\1.",
        "a name with control characters": b"ca\r\x1b[31m\nb\n.",
        "a long name": b"c" + b"a" * 10_000 + b"\nb\n.",
    }.items(),
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_tricks_of_pickles_are_refused(name: str, content: bytes) -> None:
    """One of them would call or change what it should not, take all memory, or end in a traceback."""
    assert _refusal((START if not content.startswith(b"\x80") else b"") + content)


def test_a_far_place_in_the_memo_takes_no_memory() -> None:
    """Python's own unpickler allocates 34 GB for five bytes."""
    assert _load(START + b"K\1r\xff\xff\xff\x7f.") == 1


def test_values_with_one_part_many_times_take_no_time() -> None:
    """The hash of a tuple of tuples, each twice the one before, would be calculated until the end of time."""
    content = START + b")" + b"".join(b"q%ch%c\x86" % (at, at) for at in range(60))
    assert len(_load(content + b".")) == 2
    assert "a key that is neither text nor a number" in _refusal(START + b"}" + content[2:] + b"K\1s.")


def test_values_in_values_without_bottom_do_not_end_the_process() -> None:
    """To hash or to compare such a tuple overflows the stack: no error, the process is gone."""
    deep = b")" + b"\x85" * 300_000
    assert len(_load(START + deep + b".")) == 1
    assert "a key that is neither" in _refusal(START + b"}" + deep + b"K\1s.")
    assert "a key that is neither" in _refusal(START + b"}(" + deep + b"K\1u.")
    assert len(_load(START + b"]" * 100_001 + b"a" * 100_000 + b".")) == 1


def test_sizes_are_not_copied() -> None:
    """Each copy of a list costs a few bytes and takes as many as the list: memory goes with the square."""
    tuples = _load(START + b"(" + b"K\1" * 1000 + b"t\x94" + b"ca\nsame\nh\0\x85R" + b"\x86.")
    assert tuples[0] is tuples[1]


def test_an_ordered_dict_is_a_dict() -> None:
    """State dicts of PyTorch are ordered and have attributes: none of them would be read."""
    given: Any = OrderedDict(b=1, a=2)
    given._metadata = {"version": 1}
    names = {"collections.OrderedDict": Call(empty_dict)}
    found = PlainUnpickler(pickle.dumps(given, 2), names).load()
    assert (type(found), list(found.items())) == (dict, [("b", 1), ("a", 2)])


def test_the_instructions_are_those_that_python_writes() -> None:
    """A test that only refuses would pass with a reader that reads nothing."""
    written = set[str]()
    for protocol in (2, 3, 4, 5):
        written |= {op.name for op, _, _ in pickletools.genops(pickle.dumps([PLAIN, PLAIN, "x" * 300], protocol))}
    known = {op.name for op in pickletools.opcodes if ord(op.code) in PlainUnpickler.dispatch}
    assert written - {"BYTEARRAY8"} <= known and "INST" not in known


def test_text_of_a_checkpoint_does_not_reach_the_terminal_as_it_is() -> None:
    """A name could hide the message it stands in, or be a megabyte long."""
    assert shown("state.model") == "state.model"
    assert shown("\x1b[2Jall is well\n").isprintable() and len(shown("x" * 9999)) < 200
