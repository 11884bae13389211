"""Arrays of other libraries: what they are, and as arrays of NumPy or CuPy.

None of those libraries is imported before one of its arrays is there.
"""

import operator
from typing import Any, cast

import numpy as np

from ocelot_em.model.maps import AnyArray

NUMPY, CUPY, TORCH = "NumPy array", "CuPy array", "torch tensor"
TORCH_CPU, TORCH_CUDA = f"{TORCH} on cpu", f"{TORCH} on cuda"
"""What :func:`kind_of` says; tensors are also named by their kind of device."""


def kind_of(values: object) -> str:
    """Say what kind of array this is; of anything else, the name of its type."""
    if isinstance(values, np.ndarray):
        return NUMPY
    if hasattr(values, "detach") and hasattr(values, "device"):
        return f"{TORCH} on {cast(Any, values).device.type}"
    if hasattr(values, "__cuda_array_interface__") and hasattr(values, "get"):
        return CUPY
    return type(values).__name__


def dtype_name(values: Any) -> str:
    """Return the dtype of an array of any kind as NumPy calls it, and whether it is swapped."""
    dtype = values.dtype
    if kind_of(values).startswith(TORCH):
        return str(dtype).removeprefix("torch.")
    return str(dtype.name if dtype.isnative else f"byte-swapped {dtype.name}")


def as_numpy(values: object) -> AnyArray:
    """Return a NumPy array over the same memory, or a copy where the values live on a device.

    Parameters
    ----------
    values
        NumPy array, torch tensor or CuPy array (any device), or anything that
        :func:`numpy.asarray` takes.
    """
    kind = kind_of(values)
    if kind == NUMPY:
        return cast(AnyArray, values)
    if kind.startswith(TORCH):
        return cast(AnyArray, cast(Any, values).detach().cpu().numpy())
    if kind == CUPY:
        return cast(AnyArray, cast(Any, values).get())
    return np.asarray(values)


def as_cupy(values: Any) -> AnyArray:
    """Return a CuPy array over the memory of a CuPy array or of a torch tensor on a GPU."""
    if kind_of(values) == CUPY:
        return cast(AnyArray, values)
    import cupy
    import torch

    with torch.cuda.device(values.device):  # torch hands out only what is on its current device
        return cast(AnyArray, cupy.from_dlpack(values.detach()))


def gpu_number(values: Any) -> int:
    """Return the number of the GPU on which a CuPy array or torch tensor lies."""
    device = values.device
    return int(device.id if kind_of(values) == CUPY else device.index)


def new_like(values: Any, dtype: str) -> Any:
    """Return an array of the same kind, shape and device, with whatever is in its memory."""
    kind = kind_of(values)
    if kind.startswith(TORCH):
        import torch

        return torch.empty(values.shape, dtype=getattr(torch, dtype), device=values.device)
    if kind == CUPY:
        import cupy

        with values.device:
            return cupy.empty(values.shape, dtype)
    return np.empty(values.shape, dtype)


class HostRows:
    """The rows of a map, brought to the host when they are asked for.

    Parameters
    ----------
    values
        As for :func:`as_numpy`; what has no shape, dtype or slices is converted here, whole.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        The values cannot become a NumPy array.
    """

    def __init__(self, values: Any) -> None:
        sliced = all(hasattr(values, name) for name in ("shape", "dtype", "__getitem__"))
        self._values = values if sliced else as_numpy(values)
        self.shape: tuple[int, ...] = tuple(self._values.shape)
        self.dtype = as_numpy(self._values[:0] if self.shape else self._values).dtype

    def __getitem__(self, rows: slice) -> AnyArray:
        return as_numpy(self._values[rows])


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
