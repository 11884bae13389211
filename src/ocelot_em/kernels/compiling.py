"""Compiling kernels with numba, and handing them arrays as tables of addresses.

One compilation serves every number of partials and every combination of optional maps.
"""

import time
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
from numba import carray, njit, types
from numba.core import event
from numba.extending import intrinsic

from ocelot_em.model.maps import (
    AnyArray,
)

MISSING = 0
"""Address of a map that is not there."""


F4, F8, I4, I8 = (np.dtype(kind) for kind in ("f4", "f8", "i4", "i8"))


_Function = TypeVar("_Function", bound=Callable[..., Any])


def compiled(function: _Function) -> _Function:
    """Compile for use without the GIL; division by zero gives what NumPy gives."""
    return cast("_Function", njit(nogil=True, cache=True, error_model="numpy")(function))


def summed(function: _Function) -> _Function:
    """Compile as :func:`compiled` does, but add the terms of a sum in any order."""
    jit = njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc"})
    return cast("_Function", jit(function))


class _FirstStart(event.Listener):  # type: ignore[misc]
    """Notes when the first function is compiled that was not on the disk."""

    def __init__(self, compiling: Callable[[], None]) -> None:
        self._compiling, self.at = compiling, 0.0

    def on_start(self, _event: Any) -> None:
        if not self.at:
            self.at = time.perf_counter()
            self._compiling()

    def on_end(self, _event: Any) -> None:
        pass


def seconds_compiling(work: Callable[[], None], compiling: Callable[[], None]) -> float:
    """See :func:`ocelot_em.kernels.seconds_compiling`."""
    first = _FirstStart(compiling)
    with event.install_listener("numba:compile", first):
        work()
    return time.perf_counter() - first.at if first.at else 0.0


def address_of(array: AnyArray, size: int, dtype: np.dtype[Any], changed: bool = False) -> int:
    """Return where an array's values are, after checking that compiled code may go there."""
    flags = array.flags
    fit = flags.c_contiguous and flags.aligned and (flags.writeable or not changed)
    if not fit or array.size != size or array.dtype != dtype:
        raise ValueError(
            f"expected a C-contiguous array of {size} values of {dtype}, got {array.dtype}, "
            f"shape {array.shape}, strides {array.strides}, writeable: {flags.writeable}"
        )
    return start_of(array)


@compiled
def start_of(array: Any) -> int:
    """Several times faster than asking NumPy, which makes an object for it."""
    address: int = array.ctypes.data
    return address


@intrinsic
def pointer(_context: Any, _at: Any, _start: Any, dtype: Any) -> Any:
    """Turn an address and a number of values beyond it into a pointer."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        first = builder.inttoptr(args[0], context.get_value_type(signature.return_type))
        return builder.gep(first, [args[1]])

    return types.CPointer(dtype.dtype)(types.int64, types.int64, dtype), generate


@compiled
def plane(address: Any, dtype: Any, start: Any, size: Any) -> Any:
    """Return ``size`` values of a map from ``start`` as an array."""
    return carray(pointer(address, start, dtype), size)


@compiled
def planes(rows: Any, column: Any, dtype: Any, start: Any, size: Any) -> Any:
    """Return one map of a group; a short group repeats its last, which never wins over itself."""
    last = len(rows) - 1
    return (
        plane(rows[0, column], dtype, start, size),
        plane(rows[min(1, last), column], dtype, start, size),
        plane(rows[min(2, last), column], dtype, start, size),
        plane(rows[last, column], dtype, start, size),
    )
