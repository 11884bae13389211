"""Kernels: the arithmetic of a merge, one module per kind of processor."""

from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Protocol

from ocelot_em.errors import InvalidInputError
from ocelot_em.kernels.device import Device
from ocelot_em.model.maps import Accumulator, AnyArray, FoldReport, MapSet, PartialMaps
from ocelot_em.model.search_space import SearchSpace

NAMES = ("cpu", "reference")
"""The kernels that :func:`load` knows."""


class Kernels(Protocol):
    """What every kernel module offers; :mod:`ocelot_em.kernels.reference` says what each does.

    All kernels give the same bits.
    """

    def identity(self, shape: tuple[int, int], maps: MapSet) -> Accumulator:
        """Return the merge of nothing."""
        ...

    def reset(self, acc: Accumulator) -> None:
        """Turn an accumulator back into the merge of nothing, in place."""
        ...

    def fold(self, acc: Accumulator, partial: PartialMaps, space: SearchSpace | None) -> FoldReport:
        """Take one more partial into the accumulator, in place."""
        ...

    def fold_all(
        self,
        acc: Accumulator,
        partials: Sequence[PartialMaps],
        space: SearchSpace | None,
        *,
        fresh: bool = False,
    ) -> FoldReport:
        """Take more partials into the accumulator, in place, in their order."""
        ...

    def finalise(
        self,
        acc: Accumulator,
        maps: MapSet,
        space: SearchSpace | None,
        out: Mapping[str, AnyArray] | None = None,
    ) -> dict[str, AnyArray]:
        """Turn an accumulator into the merged maps."""
        ...

    def mask_nan(self, partial: PartialMaps) -> PartialMaps:
        """Make a partial idle where any of its maps is NaN."""
        ...


def load(name: str) -> Kernels:
    """Import a kernel module.

    Only here, so that neither the package nor its command line pays for numba before it is needed.

    Parameters
    ----------
    name
        ``"cpu"`` (numba) or ``"reference"`` (plain NumPy: slow, obvious).

    Raises
    ------
    InvalidInputError
        If there is no kernel of this name.
    """
    if name == "cpu":
        from ocelot_em.kernels import cpu

        return cpu
    if name == "reference":
        from ocelot_em.kernels import reference

        return reference
    raise InvalidInputError(f"kernel: expected one of {', '.join(NAMES)}, got {name!r}")


def seconds_compiling(work: Callable[[], None], compiling: Callable[[], None]) -> float:
    """Call ``work``, and measure how long the kernels were compiled that it calls.

    Parameters
    ----------
    work
        Calls kernels.
    compiling
        Called if one is not on the disk and has to be compiled, before the first.

    Returns
    -------
    float
        Seconds from then to the end of ``work``; 0 if nothing was compiled.
    """
    from ocelot_em.kernels import compiling as numba_kernels

    return numba_kernels.seconds_compiling(work, compiling)


def load_cuda(device: Device) -> Kernels:
    """Return the kernels for a CUDA device; all their arrays lie on it."""
    from ocelot_em.kernels.cuda import CudaKernels

    return CudaKernels(device)


def load_collect() -> ModuleType:
    """Import :mod:`ocelot_em.kernels.collect`; here for the same reason as :func:`load`."""
    from ocelot_em.kernels import collect

    return collect


def load_place() -> ModuleType:
    """Import :mod:`ocelot_em.kernels.place`; here for the same reason as :func:`load`."""
    from ocelot_em.kernels import place

    return place


def load_by_map() -> ModuleType:
    """Import :mod:`ocelot_em.kernels.by_map`; here for the same reason as :func:`load`."""
    from ocelot_em.kernels import by_map

    return by_map
