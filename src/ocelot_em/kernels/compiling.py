"""Kernel compilation with numba, and arrays from :mod:`ocelot_em.kernels.addresses`."""

import time
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
from numba import carray, njit, types
from numba.core import event
from numba.extending import intrinsic

from ocelot_em.kernels.compile_cache import caching_there

ANNOUNCE_AFTER_SECONDS = 1.0
"""Duration after which compilation is announced; a few kernels take less, all of them 10 s."""

_Function = TypeVar("_Function", bound=Callable[..., Any])


def compiled(function: _Function) -> _Function:
    """Compile a function that releases the GIL and divides by zero as NumPy does."""
    return _compiled(function)


def summed(function: _Function) -> _Function:
    """Compile as :func:`compiled` does, but allow reordering of additions."""
    return _compiled(function, fastmath={"reassoc"})


def _compiled(function: _Function, **options: Any) -> _Function:
    with caching_there() as cache:
        jit = njit(nogil=True, cache=cache, error_model="numpy", **options)
        return cast("_Function", jit(function))


class _CompileTimer(event.Listener):  # type: ignore[misc]
    """Records when the first uncached function was compiled; announces compilation that lasts."""

    def __init__(self, announce: Callable[[], None]) -> None:
        self._announce: Callable[[], None] | None = announce
        self.started = 0.0

    def on_start(self, _event: Any) -> None:
        now = time.perf_counter()
        self.started = self.started or now
        if self._announce is not None and now - self.started >= ANNOUNCE_AFTER_SECONDS:
            self._announce()
            self._announce = None

    def on_end(self, _event: Any) -> None:
        pass


def seconds_compiling(work: Callable[[], None], announce: Callable[[], None]) -> float:
    """Call ``work`` and time it from its first kernel compilation to its end.

    ``announce`` is called once if kernels that are not in the cache take long to compile. Return
    seconds; 0 if nothing was compiled.
    """
    timer = _CompileTimer(announce)
    with event.install_listener("numba:compile", timer):
        work()
    return time.perf_counter() - timer.started if timer.started else 0.0


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
