"""Kernels: the arithmetic of a merge, one module per kind of processor."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Protocol

from ocelot_em.errors import InvalidInputError
from ocelot_em.kernels.device import Device
from ocelot_em.model.maps import Accumulator, AnyArray, MapSet, PartialMaps
from ocelot_em.model.search_space import SearchSpace

NAMES = ("cpu", "reference")
"""Names accepted by :func:`load`."""


class Kernels(Protocol):
    """Interface of all kernel modules, documented in :mod:`ocelot_em.kernels.reference`.

    All kernels give bit-identical results.
    """

    def identity(self, shape: tuple[int, int], maps: MapSet) -> Accumulator:
        """Return an empty accumulator."""

    def reset(self, acc: Accumulator) -> None:
        """Reset an accumulator to the empty state, in place."""

    def fold(self, acc: Accumulator, partial: PartialMaps, space: SearchSpace | None) -> bool:
        """Fold one partial into the accumulator; return whether it has an unusable value."""

    def fold_all(
        self,
        acc: Accumulator,
        partials: Sequence[PartialMaps],
        space: SearchSpace | None,
        *,
        fresh: bool = False,
    ) -> bool:
        """Fold partials in the given order; return whether any has an unusable value."""

    def finalise(
        self,
        acc: Accumulator,
        maps: MapSet,
        space: SearchSpace | None,
        out: Mapping[str, AnyArray] | None = None,
    ) -> dict[str, AnyArray]:
        """Compute the merged maps from an accumulator."""

    def mask_nan(self, partial: PartialMaps) -> PartialMaps:
        """Make a partial idle where any of its maps is NaN or infinite."""


def load(name: str) -> Kernels:
    """Import a kernel module by name: ``cpu`` (numba) or ``reference`` (plain NumPy, slow).

    Kernels are imported on demand, so that the package and the command line start without numba.
    """
    if name == "cpu":
        from ocelot_em.kernels import cpu

        return cpu
    if name == "reference":
        from ocelot_em.kernels import reference

        return reference
    raise InvalidInputError(f"kernel: expected one of {', '.join(NAMES)}, got {name!r}")


def seconds_compiling(work: Callable[[], None], announce: Callable[[], None]) -> float:
    """Call ``work`` and time it from its first kernel compilation to its end.

    ``announce`` is called once if kernels that are not in the cache take long to compile. Return
    seconds; 0 if nothing was compiled.
    """
    from ocelot_em.kernels import compiling as numba_kernels

    return numba_kernels.seconds_compiling(work, announce)


def cache_folder() -> Path | None:
    """Return the folder in which compiled kernels are cached; None if none can be written."""
    from ocelot_em.kernels import compile_cache

    return compile_cache.cache_folder()


def load_cuda(device: Device) -> Kernels:
    """Return the kernels for a CUDA device, which must hold all their arrays."""
    from ocelot_em.kernels.cuda import CudaKernels

    return CudaKernels(device)


def load_collect() -> ModuleType:
    """Import :mod:`ocelot_em.kernels.collect` on demand, as :func:`load` does."""
    from ocelot_em.kernels import collect

    return collect


def load_compositing() -> ModuleType:
    """Import :mod:`ocelot_em.kernels.compositing` on demand, as :func:`load` does."""
    from ocelot_em.kernels import compositing

    return compositing


def load_by_map() -> ModuleType:
    """Import :mod:`ocelot_em.kernels.by_map` on demand, as :func:`load` does."""
    from ocelot_em.kernels import by_map

    return by_map
