"""Parse the pickle of a torch file without unpickling: nothing in it is ever called.

torch writes a dictionary of tensors with few pickle instructions, which are interpreted here. They
build plain data only: even a malicious pickle takes time and memory proportional to its length,
which ``torch.load(weights_only=True)`` does not promise (DESIGN.md).
"""

import math
import pickletools
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

MAX_NBYTES = 2**20
"""Maximum size of a pickle; that of a dictionary with a hundred tensors has 20 kB."""

STORAGE_DTYPES: Mapping[str, str | None] = {
    "FloatStorage": "f4",
    "DoubleStorage": "f8",
    "HalfStorage": "f2",
    "BFloat16Storage": None,
    "LongStorage": "i8",
    "IntStorage": "i4",
    "ShortStorage": "i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "?",
    "ComplexFloatStorage": "c8",
    "ComplexDoubleStorage": "c16",
}
"""NumPy dtypes of torch's storages; None where NumPy has none."""

_ORDERED_DICT = "collections OrderedDict"
_TENSOR = "torch._utils _rebuild_tensor_v2"
_PARAMETER = "torch._utils _rebuild_parameter"
_STORAGE = {f"torch {name}": name for name in STORAGE_DTYPES}
_ENCODE = "_codecs encode"
_DTYPE = "numpy dtype"
_SCALARS = ("numpy.core.multiarray scalar", "numpy._core.multiarray scalar")
_SCALAR_TYPES = ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "b1")


@dataclass(frozen=True, slots=True)
class Storage:
    """A flat array of numbers: its torch type, its member's name and its length."""

    kind: str
    key: str
    n: int


@dataclass(frozen=True, slots=True)
class Tensor:
    """Layout of a tensor in a storage; offset and strides count values."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class Foreign:
    """Stands in for what only unpickling would make; ``name`` is the function that it would run."""

    name: str

    @property
    def refusal(self) -> str:
        """Why it cannot be read."""
        return (
            "cannot be read without unpickling, which is never done: it would run "
            f"{self.name.replace(' ', '.')!r}; save tensors and plain numbers"
        )


class _Name(Foreign):
    """A function or a class that the pickle names."""


@dataclass
class _NumpyType:
    """A NumPy type of numbers."""

    code: str
    order: str = "<"


def parse(pickle: bytes) -> object:
    """Parse a pickle.

    Return nested dictionaries, lists, tuples, text, numbers and :class:`Tensor`. Raise a ValueError
    if it has anything else, is truncated or is longer than :data:`MAX_NBYTES`.
    """
    if len(pickle) > MAX_NBYTES:
        raise ValueError(f"expected a pickle of at most {MAX_NBYTES:,} bytes, got {len(pickle):,}")
    machine = _Machine()
    try:
        for instruction, argument, _ in pickletools.genops(pickle):
            if instruction.name == "STOP":
                return machine.stack.pop()
            machine.step(instruction.name, argument)
    except (IndexError, KeyError, TypeError) as error:  # the pickle uses missing values
        raise ValueError(f"is damaged: {error!r}") from error
    raise ValueError("is damaged: it breaks off")


class _Machine:
    """Pickle machine: its stack, marks and memo."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self._marks: list[int] = []
        self._memory: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        """Execute one instruction."""
        stack = self.stack
        if name in ("BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"):
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in ("EMPTY_DICT", "EMPTY_LIST"):
            stack.append({} if name == "EMPTY_DICT" else [])
        elif name == "MARK":
            self._marks.append(len(stack))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(tuple([stack.pop() for _ in range(int(name[-1]))][::-1]))
        elif name == "TUPLE":
            stack.append(tuple(self._to_mark()))
        elif name in ("BINPUT", "LONG_BINPUT"):
            self._memory[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self._memory[argument])
        elif name in ("SETITEM", "SETITEMS"):
            items = [stack.pop(), stack.pop()][::-1] if name == "SETITEM" else self._to_mark()
            _set_items(stack[-1], items)
        elif name in ("APPEND", "APPENDS"):
            values = [stack.pop()] if name == "APPEND" else self._to_mark()
            if not isinstance(stack[-1], Foreign):
                _instance(stack[-1], list).extend(values)
        elif name == "GLOBAL":
            stack.append(_Name(argument))
        elif name == "BINPERSID":
            stack.append(_storage(stack.pop()))
        elif name == "REDUCE":
            arguments, function = _instance(stack.pop(), tuple), _instance(stack.pop(), Foreign)
            is_known = isinstance(function, _Name)
            stack.append(_made(function.name, arguments) if is_known else Foreign(function.name))
        elif name == "NEWOBJ":
            stack.pop()
            stack.append(Foreign(_instance(stack.pop(), Foreign).name))
        elif name == "BUILD":
            _build(stack.pop(), stack[-1])
        elif name != "PROTO":
            raise ValueError(
                f"cannot be read without unpickling, which is never done: it has an instruction "
                f"{name}; save a dictionary of tensors"
            )

    def _to_mark(self) -> list[Any]:
        start = self._marks.pop()
        if start > len(self.stack):
            raise ValueError("is damaged: a mark is gone")
        values = self.stack[start:]
        del self.stack[start:]
        return values


_CONSTANTS: Mapping[str, object] = {
    "NONE": None,
    "NEWTRUE": True,
    "NEWFALSE": False,
    "EMPTY_TUPLE": (),
}


def _instance(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        expected = kind.__name__.removeprefix("_")
        raise ValueError(f"is damaged: expected a {expected} in it, got {type(value)}")
    return value


def _set_items(target: Any, items: Sequence[Any]) -> None:
    if isinstance(target, Foreign):
        return
    found = _instance(target, dict)
    for key, value in zip(items[::2], items[1::2], strict=True):
        # Hashing a nested tuple can take forever.
        if isinstance(key, str | int | float | None):
            found[key] = value


def _build(state: Any, target: Any) -> None:
    """Set the state of an object, which matters for the byte order of a number only."""
    if isinstance(target, _NumpyType):
        target.order = {">": ">"}.get(_instance(state, tuple)[1], "<")
    elif not isinstance(target, Foreign | dict):
        raise ValueError(f"is damaged: a {type(target).__name__} with a state")


def _count(value: Any) -> int:
    number = _instance(value, int)
    if isinstance(number, bool) or not 0 <= number < 2**62:
        raise ValueError(f"is damaged: expected a size or a place, got {reprlib.repr(number)}")
    return cast("int", number)


def _storage(identity: Any) -> Storage | Foreign:
    kind_of_object, name, key, _device, n = _instance(identity, tuple)
    kind = _STORAGE.get(_instance(name, _Name).name)
    if kind_of_object != "storage":
        raise ValueError("is damaged: it refers to something that is no storage")
    return Foreign(name.name) if kind is None else Storage(kind, _instance(key, str), _count(n))


def _made(name: str, arguments: tuple[Any, ...]) -> object:
    """Return the result that a call would have."""
    if name == _ORDERED_DICT and not arguments:
        return {}
    if name == _PARAMETER and arguments and isinstance(arguments[0], Tensor):
        return arguments[0]
    if name == _ENCODE and arguments[1:] == ("latin1",):
        return _instance(arguments[0], str).encode("latin1")
    if name == _DTYPE and arguments and arguments[0] in _SCALAR_TYPES:
        return _NumpyType(arguments[0])
    if name in _SCALARS and len(arguments) == 2 and isinstance(arguments[0], _NumpyType):
        dtype = np.dtype(arguments[0].order + arguments[0].code)
        return np.frombuffer(_instance(arguments[1], bytes), dtype, 1)[0].item()
    # A seventh argument is the user's metadata.
    if name != _TENSOR or len(arguments) != 6 or isinstance(arguments[0], Foreign):
        return Foreign(name)
    storage, offset, shape, strides = arguments[:4]
    tensor = Tensor(
        _instance(storage, Storage),
        _count(offset),
        tuple(map(_count, _instance(shape, tuple))),
        tuple(map(_count, _instance(strides, tuple))),
    )
    if len(tensor.shape) != len(tensor.strides) or len(tensor.shape) > 32:
        raise ValueError(f"is damaged: a tensor with {len(tensor.shape)} axes")
    n = math.prod(tensor.shape)
    last = sum((k - 1) * stride for k, stride in zip(tensor.shape, tensor.strides, strict=True))
    if n and (n > tensor.storage.n or tensor.offset + last >= tensor.storage.n):
        raise ValueError(
            f"expected a value for each element of tensors, got {tensor.storage.n:,} for one of "
            f"shape {tensor.shape}; save tensor.contiguous()"
        )
    return tensor
