"""What the pickle of a `torch.save` archive may contain: one tensor, or an object of numbers, texts and tensors."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from tundish.checkpoints.format.metadata import DTYPE_BYTES, numbers
from tundish.checkpoints.format.pickles import Call, PlainUnpickler, Record, empty_dict, same
from tundish.errors import CheckpointError

_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
}
NUMPY_TYPES = "f8 f4 f2 i8 i4 i2 i1 u8 u4 u2 u1 b1".split()
"""Element types of NumPy arrays in a checkpoint: numbers only. NumPy would take bytes of object arrays for pointers."""
_NUMPY_STATE = (None, None, None, -1, -1, 0)
"""The state of all these types: no subarray, no names, no fields, default size and alignment, no flags."""


@dataclass(frozen=True, slots=True)
class Described:
    """A tensor as its pickle describes it."""

    dtype: str
    key: str
    numel: int
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def is_contiguous(self) -> bool:
        """Whether the storage holds the elements in their order, and nothing else."""
        expected = 1
        for size, stride in zip(reversed(self.size), reversed(self.stride), strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return not self.numel or (self.offset == 0 and self.numel == math.prod(self.size))


def describe(content: bytes) -> Described:
    """The tensor that a pickle describes.

    Raises:
        CheckpointError: it contains something else; `.message` names no file.
    """
    tensor = _Unpickler(content, _TENSOR_NAMES).load()
    if type(tensor) is not _Tensor:
        raise CheckpointError("not the pickle of a tensor")
    return tensor.described


def describe_all(content: bytes, sizes: Mapping[str, int]) -> dict[str, Described]:
    """The tensors that a pickle describes by their names; it may contain nothing else.

    Args:
        content: the pickle.
        sizes: bytes of each storage that the archive has, by its key.

    Raises:
        CheckpointError: it contains something else; `.message` names no file.
    """
    state = _Unpickler(content, _STATE_NAMES, sizes).load()
    if type(state) is not dict or not all(type(name) is str for name in cast(dict[Any, Any], state)):
        raise CheckpointError("not a dict of tensors by their names")
    if not all(type(tensor) is _Tensor for tensor in cast(dict[str, Any], state).values()):
        raise CheckpointError("it contains more than tensors")
    return {name: tensor.described for name, tensor in cast(dict[str, _Tensor], state).items()}


def check_object(content: bytes, sizes: Mapping[str, int]) -> None:
    """Check a pickle before PyTorch's `weights_only` reads it, which trusts sizes and calls what it allows.

    Args:
        content: the pickle.
        sizes: bytes of each storage that the archive has, by its key.

    Raises:
        CheckpointError: it is damaged or unsafe; `.message` names no file.
    """
    _Unpickler(content, _OBJECT_NAMES, sizes).load()


class _Unpickler(PlainUnpickler):
    def __init__(self, content: bytes, names: Mapping[str, Any], sizes: Mapping[str, int] | None = None) -> None:
        super().__init__(content, names)
        self.sizes = sizes

    def persistent_load(self, pid: Any) -> "_Storage":
        kind, dtype, key, _location, numel = pid
        if kind != "storage" or type(dtype) is not str or type(key) is not str:
            raise ValueError("it names a storage in another way than PyTorch")
        (numel,) = numbers((numel,))
        if self.sizes is not None and self.sizes.get(key) != numel * DTYPE_BYTES[dtype]:
            raise ValueError(f"a storage of {numel:,} elements has {self.sizes.get(key, 0):,} bytes")
        return _Storage(dtype, key, numel)


@dataclass(frozen=True, slots=True)
class _Storage:
    dtype: str
    key: str
    numel: int


class _Tensor(Record):
    def __init__(self, storage: Any, offset: Any, size: Any, stride: Any, *more: Any) -> None:
        super().__init__()
        if type(storage) is not _Storage or type(size) is not tuple or type(stride) is not tuple:
            raise ValueError("a tensor has other arguments than PyTorch writes")
        (at,) = numbers((offset,))
        described = Described(storage.dtype, storage.key, storage.numel, at, numbers(size), numbers(stride))
        if len(described.size) != len(described.stride) or math.prod(described.size) > storage.numel:
            raise ValueError(f"a tensor {described.size} has {storage.numel:,} elements")
        self.described = described


class _NumpyType(Record):
    def __init__(self, code: Any = None, *more: Any) -> None:
        super().__init__()
        if type(code) is not str or code not in NUMPY_TYPES or not all(type(flag) in (bool, int) for flag in more):
            raise ValueError("the elements of a NumPy array are not numbers")
        self.bytes = int(code[1:])

    def build(self, state: Any) -> None:
        if type(state) is not tuple or state[:1] != (3,) or state[1] not in ("<", "|") or state[2:] != _NUMPY_STATE:
            raise ValueError("a NumPy type has another state than types of numbers")


class _Array(Record):
    def __init__(self, kind: Any = None, size: Any = None, code: Any = None) -> None:
        super().__init__()
        if kind != "ndarray" or size != (0,) or code != b"b":
            raise ValueError("a NumPy array has other arguments than NumPy writes")

    def build(self, state: Any) -> None:
        _version, shape, dtype, is_fortran, content = cast(tuple[Any, ...], state)
        plain = type(dtype) is _NumpyType and type(content) is bytes and type(is_fortran) is bool
        if not plain or math.prod(numbers(shape)) * dtype.bytes != len(content):
            raise ValueError("the bytes of a NumPy array do not match its shape")


def _encoded(text: Any, encoding: Any) -> bytes:
    """Stands for the function by which protocol 2 writes bytes."""
    if type(text) is not str or encoding != "latin1":
        raise ValueError("bytes are encoded in another way than by pickle")
    return text.encode("latin1")


def _tensor_of(tensor: Any, *_: Any) -> Any:
    """Stands for a parameter: its tensor."""
    return tensor


_TENSOR_NAMES: Mapping[str, Any] = {
    "torch._utils._rebuild_tensor_v2": Call(_Tensor),
    "collections.OrderedDict": Call(empty_dict),
    **{f"torch.{name}": dtype for name, dtype in _STORAGES.items()},
}
_STATE_NAMES: Mapping[str, Any] = {
    **_TENSOR_NAMES,
    "torch._utils._rebuild_parameter": Call(_tensor_of),
}
_OBJECT_NAMES: Mapping[str, Any] = {
    **_TENSOR_NAMES,
    **{f"torch.{dtype}": dtype for dtype in DTYPE_BYTES},
    "torch._utils._rebuild_parameter": Call(Record),
    "torch.Size": Call(same),
    "torch.device": Call(Record),
    "torch.torch_version.TorchVersion": Call(Record),
    "datetime.timedelta": Call(Record),
    "_codecs.encode": Call(_encoded),
    **dict.fromkeys(("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"), Call(_Array)),
    "numpy.ndarray": "ndarray",
    "numpy.dtype": Call(_NumpyType),
}
