"""Pickles read as data: nothing that they name is imported, called or built.

Python's own unpickler calls what a pickle names; PyTorch's `weights_only` calls less, but believes sizes and hashes
whatever stands as a key, so that some bytes suffice for a crash or for a calculation without end. Here a pickle may
name what is in a table, and each name stands for one of ours; numbers, texts, bytes, lists, tuples and dicts are made.
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
"""The instructions that Python writes for such values, in any protocol of its from 2 on."""


class Record:
    """Stands for any object: keeps the arguments that it would be made of and its state, and does nothing."""

    def __init__(self, *given: Any) -> None:
        self.given = given
        self.state: Any = None

    def build(self, state: Any) -> None:
        """Take the state; a kind of record that knows what it has to be refuses another one."""
        self.state = state


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """Stands for a class or a function: what is made of the arguments instead."""

    make: Callable[..., Any]


def empty_dict() -> dict[Any, Any]:
    """Stands for OrderedDict, which is filled after it was made."""
    return {}


def same(given: Any) -> tuple[Any, ...]:
    """Stands for `torch.Size`. It makes no copy: a few bytes more would make one of all that came before."""
    if type(given) is not tuple:
        raise ValueError("a size is no tuple")
    return given


class PlainUnpickler(_PythonUnpickler):
    """Reads a pickle whose names are all in `names`, each with a constant or a `Call`."""

    dispatch: ClassVar[Any] = {
        ord(getattr(pickle, name)): _PythonUnpickler.dispatch[ord(getattr(pickle, name))] for name in _WRITTEN
    }

    # Python's own, which type stubs do not know.
    stack: list[Any]
    metastack: list[list[Any]]

    def __init__(self, content: bytes, names: Mapping[str, Any]) -> None:
        super().__init__(io.BytesIO(content))
        self.names = names

    def load(self) -> Any:
        """What the pickle holds.

        Raises:
            CheckpointError: it is damaged or names what is not in the table; `.message` has no place in it.
        """
        try:
            return super().load()
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(f"it is no pickle of plain values ({reason(error)})") from error

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a name."""
        found = self.names.get(f"{module}.{name}")
        if found is None:
            raise CheckpointError(
                f"it names {shown(f'{module}.{name}')}, which no checkpoint needs; it may hold code and was not loaded"
            )
        return found

    def persistent_load(self, pid: Any) -> Any:
        """A reference to something outside of the pickle."""
        raise ValueError("it refers to something outside")

    def _take_mark(self) -> list[Any]:
        items = self.stack
        self.stack = self.metastack.pop()
        self.append = self.stack.append
        return items

    def _reduce(self) -> None:
        given, call = self.stack.pop(), self.stack.pop()
        if type(call) is not Call or type(given) is not tuple:
            raise ValueError("it calls what is not callable")
        self.append(call.make(*given))

    def _build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Record):
            target.build(state)
        elif type(target) is not dict or type(state) is not dict:  # PyTorch gives an OrderedDict attributes
            raise ValueError("it sets the state of what has none")

    def _set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        # A tuple's hash is that of all in it, which may have no end or no bottom.
        if type(target) is not dict or not all(type(key) in _KEYS or isinstance(key, Record) for key in items[::2]):
            raise ValueError("it has a key that is neither text nor a number, or one of what is no dict")
        target.update(zip(items[::2], items[1::2], strict=True))

    def _extend(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise ValueError("it appends to what is no list")
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
    """Text of a checkpoint for a message: neither long nor with control characters."""
    cut = text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}…"
    return cut if cut.isprintable() else ascii(cut)
