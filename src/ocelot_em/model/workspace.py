"""Memory that one thread uses again and again, for one region after another."""

import numpy as np

from ocelot_em.model.maps import AnyArray


class Workspace:
    """Arrays of a region's shape, by what they are used for; allocated once, for the largest.

    Parameters
    ----------
    max_pixels
        Of a region.
    """

    def __init__(self, max_pixels: int) -> None:
        self.max_pixels = max_pixels
        self._memory: dict[tuple[str, str], AnyArray] = {}
        self.shape = (1, max_pixels)
        """Of the region in hand; set it before asking for arrays."""

    def array(self, use: str, dtype: "str | np.dtype[np.generic]") -> AnyArray:
        """Return the array for this use, of the region's shape, with what was left in it."""
        key = use, np.dtype(dtype).name
        memory = self._memory.get(key)
        if memory is None:
            memory = self._memory[key] = np.empty(self.max_pixels, dtype)
        return memory[: self.n_pixels].reshape(self.shape)

    def flat(self, use: str, dtype: "str | np.dtype[np.generic]") -> AnyArray:
        """Return the same in one dimension."""
        return self.array(use, dtype).reshape(-1)

    def spare(self, number: int, dtype: "np.dtype[np.generic]") -> AnyArray:
        """Return memory for a map that has to be decoded before it is used."""
        return self.array(f"spare {number}", dtype)

    @property
    def n_pixels(self) -> int:
        """Of the region in hand."""
        return self.shape[0] * self.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""
        return sum(memory.nbytes for memory in self._memory.values())
