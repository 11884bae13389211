"""Kernels: the arithmetic of a merge, one module per kind of processor."""

import os
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Protocol, cast

from ocelot_em.errors import InvalidInputError, PlanError
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


def require_compiler() -> None:
    """Raise a PlanError if numba must not compile: merging would fail, or take days."""
    if os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0"):
        raise PlanError("NUMBA_DISABLE_JIT is set, but merging needs compiled kernels; unset it")


def load(name: str) -> Kernels:
    """Import a kernel module by name: ``cpu`` (numba) or ``reference`` (plain NumPy, slow).

    Compiled kernels are imported on demand, so that the command line starts without them.
    """
    if name not in NAMES:
        raise InvalidInputError(f"kernel: expected one of {', '.join(NAMES)}, got {name!r}")
    return cast("Kernels", import_module(f"ocelot_em.kernels.{name}"))
