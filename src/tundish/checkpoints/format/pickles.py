"""Pickles read as data: nothing that they name is imported, called or built.

Python's own unpickler calls whatever a pickle names. PyTorch's `weights_only` calls less, but it trusts sizes and
hashes any object that is used as a key: a few bytes are enough to crash the process. Here a pickle may only use names
of a table, each of which stands for a harmless value of ours; besides, it can make numbers, texts, bytes, lists, tuples
and dicts.

What is checked, and why: names and calls, so that no code runs; the targets of all instructions that call a method
(append, update, build), so that none runs a method of another type; types of keys, as hashing nested tuples ends the
process by a stack overflow instead of an error; and the set of instructions, which closes all other ways to objects in
two lines. Memory and time that a hostile pickle takes are not limited.
"""

import io
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from tundish.errors import CheckpointError

# The one written in Python: the other one's instructions cannot be replaced.
_PythonUnpickler = pickle._Unpickler  # pyright: ignore[reportPrivateUsage]  there is no public name for it
LONGEST_SHOWN = 120
_KEYS = (str, int, float, bool, bytes, type(None))
_WRITTEN = (
    "PROTO FRAME STOP MARK POP POP_MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT SHORT_BINSTRING "
    "BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 EMPTY_LIST APPEND APPENDS EMPTY_TUPLE "
    "TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT SETITEM SETITEMS BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET GLOBAL "
    "STACK_GLOBAL REDUCE NEWOBJ BUILD BINPERSID"
).split()
"""The instructions that Python writes for such values, in every protocol from 2 on."""


class Record:
    """Stands for any object: holds the arguments and the state that the object would get, and does nothing."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None

    def build(self, state: Any) -> None:
        """Take the state; a subclass refuses one that its object cannot have."""
        self.state = state


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """Stands for a class or function; `make` gets the arguments instead."""

    make: Callable[..., Any]


def empty_dict() -> dict[Any, Any]:
    """Stands for OrderedDict, which is filled after it is made."""
    return {}


def same(size: Any) -> tuple[Any, ...]:
    """Stands for `torch.Size`."""
    if type(size) is not tuple:
        raise ValueError("a size is not a tuple")
    return size  # not a copy: sizes nested in sizes would double the memory with every few bytes


class PlainUnpickler(_PythonUnpickler):
    """Reads a pickle that uses only the names in `names`; each has a constant or a `Call` as its value."""

    dispatch: ClassVar[Any] = {
        ord(getattr(pickle, name)): _PythonUnpickler.dispatch[ord(getattr(pickle, name))] for name in _WRITTEN
    }

    # Attributes of Python's class that its type stubs lack.
    stack: list[Any]
    metastack: list[list[Any]]

    def __init__(self, content: bytes, names: Mapping[str, Any]) -> None:
        super().__init__(io.BytesIO(content))
        self.names = names

    def load(self) -> Any:
        """The value of the pickle.

        Raises:
            CheckpointError: it is damaged, or uses a name that is not in the table; `.message` names no file.
        """
        try:
            return super().load()
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(f"not a pickle of plain values ({reason(error)})") from error

    def find_class(self, module: str, name: str) -> Any:
        """The value that stands for a name."""
        value = self.names.get(f"{module}.{name}")
        if value is None:
            raise CheckpointError(
                f"it names {shown(f'{module}.{name}')}, which no checkpoint needs; it may hold code and was not loaded"
            )
        return value

    def persistent_load(self, pid: Any) -> Any:
        """Refuses a reference to something outside of the pickle."""
        raise ValueError("it refers to something outside")

    def _take_mark(self) -> list[Any]:
        items = self.stack
        self.stack = self.metastack.pop()
        self.append = self.stack.append
        return items

    def _reduce(self) -> None:
        arguments, call = self.stack.pop(), self.stack.pop()
        if type(call) is not Call or type(arguments) is not tuple:
            raise ValueError("it calls what cannot be called")
        self.append(call.make(*arguments))

    def _build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Record):
            target.build(state)
        elif type(target) is not dict or type(state) is not dict:  # PyTorch gives an OrderedDict attributes
            raise ValueError("it sets the state of a value that has none")

    def _set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        # The hash of a tuple is that of everything nested in it.
        if type(target) is not dict or not all(type(key) in _KEYS or isinstance(key, Record) for key in items[::2]):
            raise ValueError("it has a key that is neither text nor a number, or sets one outside of a dict")
        target.update(zip(items[::2], items[1::2], strict=True))

    def _extend(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise ValueError("it appends to a value that is not a list")
        self.stack[-1].extend(items)

    def _take(self, count: int) -> list[Any]:
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def _set_item(self) -> None:
        self._set_items(self._take(2))

    def _set_marked_items(self) -> None:
        self._set_items(self._take_mark())

    def _append(self) -> None:
        self._extend(self._take(1))

    def _append_marked(self) -> None:
        self._extend(self._take_mark())

    dispatch |= {
        ord(pickle.REDUCE): _reduce,
        ord(pickle.NEWOBJ): _reduce,
        ord(pickle.BUILD): _build,
        ord(pickle.SETITEM): _set_item,
        ord(pickle.SETITEMS): _set_marked_items,
        ord(pickle.APPEND): _append,
        ord(pickle.APPENDS): _append_marked,
    }


def reason(error: Exception) -> str:
    """An error in a few words."""
    text = str(error).strip()
    return shown(f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__)


def shown(text: str) -> str:
    """Text of a checkpoint for a message: cut to LONGEST_SHOWN characters, without control characters."""
    cut = text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}…"
    return cut if cut.isprintable() else ascii(cut)
