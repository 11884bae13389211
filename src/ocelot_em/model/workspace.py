"""Reusable memory of one thread for one region after another."""

import numpy as np

from ocelot_em.model.maps import AnyArray


class Workspace:
    """Arrays of a region's shape, by use; allocated once, for the largest region."""

    def __init__(self, max_pixels: int) -> None:
        self.max_pixels = max_pixels
        self._memory: dict[tuple[str, np.dtype[np.generic]], AnyArray] = {}
        self.shape = (1, max_pixels)
        """Shape of the current region; set it before requesting arrays."""

    def array(self, use: str, dtype: "str | np.dtype[np.generic]") -> AnyArray:
        """Return the array for a use, in the region's shape, with its previous contents."""
        return self.flat(use, dtype).reshape(self.shape)

    def flat(self, use: str, dtype: "str | np.dtype[np.generic]") -> AnyArray:
        """Return the same array in one dimension."""
        key = use, np.dtype(dtype)
        memory = self._memory.get(key)
        if memory is None:
            memory = self._memory[key] = np.empty(self.max_pixels, dtype)
        return memory[: self.n_pixels]

    def spare(self, number: int, dtype: "np.dtype[np.generic]") -> AnyArray:
        """Return memory for a map that must be decoded before use."""
        return self.array(f"spare {number}", dtype)

    @property
    def n_pixels(self) -> int:
        """Number of pixels of the current region."""
        return self.shape[0] * self.shape[1]

    @property
    def nbytes(self) -> int:
        """Number of allocated bytes."""
        return sum(memory.nbytes for memory in self._memory.values())
