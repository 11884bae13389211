"""Kernel compilation with numba, and arrays from :mod:`ocelot_em.kernels.addresses`."""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar, cast

import numpy as np
from numba import carray, njit, types
from numba.core import event
from numba.extending import intrinsic

from ocelot_em.kernels.compile_cache import caching_there, compiling_alone

ANNOUNCE_AFTER_SECONDS = 1.0
"""Duration after which compilation is announced; a few kernels take less, all of them 20 s."""

_Function = TypeVar("_Function", bound=Callable[..., Any])


def compiled(function: _Function) -> _Function:
    """Compile a function that releases the GIL and divides by zero as NumPy does."""
    return _compiled(function)


def summed(function: _Function) -> _Function:
    """Compile as :func:`compiled` does, but allow reordering of additions."""
    return _compiled(function, fastmath={"reassoc"})


def _compiled(function: _Function, **options: Any) -> _Function:
    with caching_there() as cache:
        # No kernel is passed to another one as a function, which a second wrapper is for.
        settings = {"nogil": True, "error_model": "numpy", "no_cfunc_wrapper": True, **options}
        jit = njit(cache=cache, **settings)
        return cast("_Function", jit(function))


class _NotCachedError(Exception):
    """A kernel is not in the cache."""


class _Refusal(event.Listener):  # type: ignore[misc]
    """Interrupts this thread where it would compile; listeners hear all threads."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()

    def on_start(self, _event: Any) -> None:
        if threading.get_ident() == self._thread:
            raise _NotCachedError

    def on_end(self, _event: Any) -> None:
        pass


class _Announcement(event.Listener):  # type: ignore[misc]
    """Announces compilation that lasts, by this process or by the one that it waits for."""

    def __init__(self, announce: Callable[[], None]) -> None:
        self._announce: Callable[[], None] | None = announce
        self._started = time.perf_counter()

    def on_start(self, _event: Any = None) -> None:
        if self._announce is not None and self.seconds >= ANNOUNCE_AFTER_SECONDS:
            self._announce()
            self._announce = None

    def on_end(self, _event: Any) -> None:
        pass

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._started


def seconds_compiling(work: Callable[[], None], announce: Callable[[], None]) -> float:
    """Call ``work``, which compiles kernels, and time it; 0 if all of them are in the cache.

    If one is not, ``work`` is interrupted before the first, and called again when no other process
    that shares the cache is compiling: it then finds what that process has compiled. ``announce``
    is called once if this takes long.
    """
    with suppress(_NotCachedError), event.install_listener("numba:compile", _Refusal()):
        work()
        return 0.0
    announcement = _Announcement(announce)
    with (
        compiling_alone(announcement.on_start),
        event.install_listener("numba:compile", announcement),
    ):
        work()
    return announcement.seconds


@compiled
def address_of(array: Any) -> int:
    """Return an array's address; several times faster than NumPy, which creates an object."""
    address: int = array.ctypes.data
    return address


@compiled
def not_finite(value: Any) -> Any:
    """Return 1 for NaN and infinities, else 0, as int32."""
    return np.int32(not np.abs(value) < np.inf)


@compiled
def not_a_mip(value: Any) -> Any:
    """Return 1 for NaN and +inf, else 0, as int32; -inf means that nothing was searched."""
    return np.int32(not value < np.inf)


@intrinsic
def pointer(_context: Any, _at: Any, _start: Any, dtype: Any) -> Any:
    """Convert an address and an offset in values to a pointer."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        first = builder.inttoptr(args[0], context.get_value_type(signature.return_type))
        return builder.gep(first, [args[1]])

    return types.CPointer(dtype.dtype)(types.int64, types.int64, dtype), generate


@compiled
def plane(address: Any, dtype: Any, start: Any, size: Any) -> Any:
    """Return ``size`` values of a map, from ``start``, as an array."""
    return carray(pointer(address, start, dtype), size)


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
