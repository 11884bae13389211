"""Arrays of other libraries as NumPy arrays, without importing those libraries."""

import operator
from typing import Any, cast

import numpy as np

from ocelot_em.maps import AnyArray


def as_numpy(values: object) -> AnyArray:
    """Return a NumPy array over the same memory, or a copy where the values live on a device.

    Parameters
    ----------
    values
        NumPy array, torch tensor or CuPy array (any device), or anything that
        :func:`numpy.asarray` takes.
    """
    if isinstance(values, np.ndarray):
        return values
    if hasattr(values, "detach"):  # torch
        return cast(AnyArray, cast(Any, values).detach().cpu().numpy())
    if hasattr(values, "__cuda_array_interface__") and hasattr(values, "get"):  # CuPy
        return cast(AnyArray, cast(Any, values).get())
    return np.asarray(values)


def exact_count(value: object) -> int:
    """Return a count of cross-correlations as an exact integer.

    Parameters
    ----------
    value
        A Python integer, or an integer scalar or array of one element of NumPy, torch or CuPy.

    Raises
    ------
    ValueError
        It is not one non-negative integer. Floating point is refused even where it looks whole:
        float32 cannot hold every count above 16.8 million.
    """
    if not isinstance(value, (int, np.integer)):
        array = as_numpy(value)
        if array.size != 1 or array.dtype.kind not in "iu":
            raise ValueError(
                f"expected one integer, got {array.dtype} of shape {array.shape}"
                if array.size != 1
                else f"expected an integer, got {array.dtype}: {array.item()!r}"
            )
        value = array.item()
    if isinstance(value, bool):
        raise ValueError("expected an integer, got a bool")
    count = operator.index(cast(int, value))
    if not 0 <= count <= 2**62:
        raise ValueError(f"expected a count from 0 to 2**62, got {count}")
    return count
