"""Arrays of other libraries: their kind, and their conversion to NumPy or CuPy.

A library is imported only when one of its arrays is used.
"""

import operator
from typing import Any, cast

import numpy as np

from ocelot_em.model.maps import AnyArray

NUMPY, CUPY, TORCH = "NumPy array", "CuPy array", "torch tensor"
TORCH_CPU, TORCH_CUDA = f"{TORCH} on cpu", f"{TORCH} on cuda"
"""Results of :func:`kind_of`; those of tensors include the type of device."""


def kind_of(values: object) -> str:
    """Return the kind of an array, or the type name of any other object."""
    if isinstance(values, np.ndarray):
        return NUMPY
    if hasattr(values, "detach") and hasattr(values, "device"):
        return f"{TORCH} on {cast(Any, values).device.type}"
    if hasattr(values, "__cuda_array_interface__") and hasattr(values, "get"):
        return CUPY
    return type(values).__name__


def dtype_name(values: Any) -> str:
    """Return NumPy's name for the dtype of an array of any kind, marked if it is byte-swapped."""
    dtype = values.dtype
    if kind_of(values).startswith(TORCH):
        return str(dtype).removeprefix("torch.")
    return str(dtype.name if dtype.isnative else f"byte-swapped {dtype.name}")


def as_numpy(values: object) -> AnyArray:
    """Return a NumPy array that shares the memory, or a copy if the values are on a device.

    Values may be anything that :func:`numpy.asarray` accepts, too. Masked elements, whose values
    are undefined, are a ValueError.
    """
    if isinstance(values, np.ma.MaskedArray):
        if n_masked := int(np.ma.getmaskarray(values).sum()):
            raise ValueError(
                f"expected no masked elements, got {n_masked}; fill them, for example those of mip "
                "with -inf where nothing was searched"
            )
        return cast(AnyArray, values.data)
    kind = kind_of(values)
    if kind == NUMPY:
        return cast(AnyArray, values)
    if kind.startswith(TORCH):
        return cast(AnyArray, cast(Any, values).detach().cpu().numpy())
    if kind == CUPY:
        return cast(AnyArray, cast(Any, values).get())
    return np.asarray(values)


def as_cupy(values: Any) -> AnyArray:
    """Return a CuPy array that shares the memory of a CuPy array or of a torch tensor on a GPU."""
    if kind_of(values) == CUPY:
        return cast(AnyArray, values)
    import cupy
    import torch

    with torch.cuda.device(values.device):  # torch exports only tensors on its current device
        return cast(AnyArray, cupy.from_dlpack(values.detach()))


def gpu_number(values: Any) -> int:
    """Return the number of the GPU that holds a CuPy array or torch tensor."""
    device = values.device
    return int(device.id if kind_of(values) == CUPY else device.index)


def new_like(values: Any, dtype: str) -> Any:
    """Return an uninitialised array of the same kind, shape and device."""
    kind = kind_of(values)
    if kind.startswith(TORCH):
        import torch

        return torch.empty(values.shape, dtype=getattr(torch, dtype), device=values.device)
    if kind == CUPY:
        import cupy

        with values.device:
            return cupy.empty(values.shape, dtype)
    return np.empty(values.shape, dtype)


def synchronize(values: Any) -> None:
    """Wait until a device has finished all work on its arrays, in whichever stream."""
    kind = kind_of(values)
    if kind == TORCH_CUDA:
        import torch

        torch.cuda.synchronize(values.device)
    elif kind == CUPY:
        with values.device:
            values.device.synchronize()


def fill(values: Any, value: float) -> None:
    """Set all elements of an array of any kind, in place."""
    (values.fill_ if kind_of(values).startswith(TORCH) else values.fill)(value)


class HostRows:
    """Parts of a map, copied to the host on access, or at once if it cannot be sliced."""

    def __init__(self, values: Any) -> None:
        sliced = all(hasattr(values, name) for name in ("shape", "dtype", "__getitem__"))
        if not sliced or isinstance(values, np.ma.MaskedArray):
            values = as_numpy(values)
        self._values = values
        self.shape: tuple[int, ...] = tuple(self._values.shape)
        self.dtype = as_numpy(self._values[:0] if self.shape else self._values).dtype

    def __getitem__(self, rows: slice | tuple[int | slice, ...]) -> AnyArray:
        return as_numpy(self._values[rows])


MAX_COUNT = 2**62
"""Maximum number of cross-correlations, also of all partials together: sums stay 64-bit."""


def exact_count(value: object) -> int:
    """Return an integer, a scalar or a one-element array as an exact count of cross-correlations.

    It must be from 0 to 2**62. Floating point is a ValueError even if integral, since float32
    cannot represent every count above 16.8 million.

    Examples
    --------
    >>> exact_count(np.array([20_500_000]))
    20500000
    """
    if not isinstance(value, (int, np.integer)):
        array = as_numpy(value)
        if array.size != 1:
            raise ValueError(f"expected one integer, got {array.dtype} of shape {array.shape}")
        if array.dtype.kind not in "iu":
            raise ValueError(f"expected an integer, got {array.dtype}: {array.item()!r}")
        value = array.item()
    if isinstance(value, bool):
        raise ValueError("expected an integer, got a bool")
    count = operator.index(cast(int, value))
    if not 0 <= count <= MAX_COUNT:
        raise ValueError(f"expected a count from 0 to 2**62, got {count}")
    return count
