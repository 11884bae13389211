"""Kernels: functions that are compiled ahead where the package was built, and by numba elsewhere.

A kernel that was compiled ahead for the types of its arguments is called by its address, without
numba and without the GIL. Its arguments are passed as a row of 64-bit words: numbers, and of arrays
the address, the shape and, unless they are C-contiguous, the strides. The types of arguments are
written as, for example, ``i8 f4 (f4:1C i2:2A)``: numbers by their dtypes, arrays with their number
of dimensions and layout, tuples in brackets. What is missing, numba compiles at its first call, and
caches on disk.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, update_wrapper
from typing import Any, TypeVar, cast

import numpy as np

from ocelot_em.kernels import ahead

_Function = TypeVar("_Function", bound=Callable[..., Any])

_creating = threading.Lock()


class Kernel:
    """A function that is compiled for the types of the arguments it is called with."""

    def __init__(self, function: Callable[..., Any], **options: Any) -> None:
        self.function, self.options = function, options
        self.name = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
        self._dispatcher: Any = None
        self._ready: dict[str, Callable[[ahead.Words], Any] | None] = {}
        update_wrapper(self, function)

    @property
    def dispatcher(self) -> Any:
        """The function that numba compiles."""
        with _creating:
            if self._dispatcher is None:
                self._dispatcher = _jit().dispatcher_of(self)
            return self._dispatcher

    def __call__(self, *args: Any) -> Any:
        """Call it, compiled."""
        words: list[int | float] = []
        types = types_of(args, words)
        try:
            ready = self._ready[types]
        except KeyError:
            ready = self._ready[types] = ahead.find(self.name, types)
        if ready is not None:
            return ready(words)
        if _thread.only_ahead:
            raise _NotReadyError
        return self.dispatcher(*args)


class Operation:
    """What kernels do that Python cannot: :mod:`ocelot_em.kernels.jit` defines it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *_args: Any) -> Any:
        """Only compiled code can call it."""
        raise TypeError(f"{self.name} is an operation of compiled kernels")


plane = Operation("plane")
"""``plane(address, dtype, start, size)``: values of a map, from ``start``, as an array."""

on_stack = Operation("on_stack")
"""``on_stack(size, dtype)``: an array of constant size that exists until the function returns."""

decompress = Operation("decompress")
"""``decompress(function, source, target, nbytes, n)``: call ``LZ4_decompress_safe`` at an address.

Addresses, and encoded and decoded bytes; returns the number of decoded bytes.
"""


def compiled(function: _Function) -> _Function:
    """Compile a function that releases the GIL and divides by zero as NumPy does."""
    return cast("_Function", Kernel(function))


def summed(function: _Function) -> _Function:
    """Compile as :func:`compiled` does, but allow reordering of additions."""
    return cast("_Function", Kernel(function, fastmath={"reassoc"}))


def types_of(values: tuple[Any, ...], words: list[int | float]) -> str:
    """Return the types of arguments, and append their words."""
    types = []
    for value in values:
        kind = type(value)
        if kind is np.ndarray:
            flags, layout = value.flags, "C"
            words.append(value.__array_interface__["data"][0])
            words.extend(value.shape)
            if not flags.c_contiguous:
                layout = "A"
                words.extend(value.strides)
            types.append(f"{_name_of(value.dtype)}:{value.ndim}{layout}")
        elif kind is tuple:
            types.append(f"({types_of(value, words)})")
        else:
            words.append(value)
            types.append(_PYTHON_TYPES.get(kind) or _name_of(value.dtype))
    return " ".join(types)


_PYTHON_TYPES = {bool: "?", int: "i8", float: "f8"}

_NAMES: dict["np.dtype[Any]", str] = {}


def _name_of(dtype: "np.dtype[Any]") -> str:
    name = _NAMES.get(dtype)
    if name is None:
        name = _NAMES[dtype] = "?" if dtype.kind == "b" else dtype.str[1:]
    return name


class _NotReadyError(Exception):
    """A kernel was not compiled ahead."""


class _Thread(threading.local):
    only_ahead = False


_thread = _Thread()


@contextmanager
def _only_ahead() -> Iterator[None]:
    _thread.only_ahead = True
    try:
        yield
    finally:
        _thread.only_ahead = False


def seconds_compiling(work: Callable[[], None], announce: Callable[[], None]) -> float:
    """Call ``work``, which calls kernels, and time their compilation; 0 if there is none.

    If one is neither compiled ahead nor in the cache, ``work`` is interrupted before the first, and
    called again when no other process that shares the cache is compiling: it then finds what that
    process has compiled. ``announce`` is called once if this takes long.
    """
    with suppress(_NotReadyError), _only_ahead():
        work()
        return 0.0
    return float(_jit().seconds_compiling(work, announce))


@cache
def _jit() -> Any:
    from ocelot_em.kernels import jit  # on demand, with numba

    jit.teach(Kernel, Operation)
    return jit


def address_of(array: Any) -> int:
    """Return an array's address."""
    return int(array.__array_interface__["data"][0])


@compiled
def not_finite(value: Any) -> Any:
    """Return 1 for NaN and infinities, else 0, as int32."""
    return np.int32(not np.abs(value) < np.inf)


@compiled
def not_a_mip(value: Any) -> Any:
    """Return 1 for NaN and +inf, else 0, as int32; -inf means that nothing was searched."""
    return np.int32(not value < np.inf)


@compiled
def planes(rows: Any, column: Any, dtype: Any, start: Any, size: Any) -> Any:
    """Return one map of a group; short groups repeat the last partial, which cannot beat itself."""
    last = len(rows) - 1
    return (
        plane(rows[0, column], dtype, start, size),
        plane(rows[min(1, last), column], dtype, start, size),
        plane(rows[min(2, last), column], dtype, start, size),
        plane(rows[last, column], dtype, start, size),
    )
