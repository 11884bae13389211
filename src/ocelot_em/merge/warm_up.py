"""Compiles the kernels that a merge needs before its first tile, whose time it is not.

numba compiles a kernel when it is first called with arguments of some types, and keeps the machine
code on the disk. So a few pixels that nobody sees are merged first, of maps of the types that the
sources have, by the same code as every tile: that calls all kernels with the right types. Where the
machine code is there, it takes no longer than the first tile would have.
"""

import logging
from collections.abc import Callable
from typing import Protocol

import numpy as np

from ocelot_em import kernels
from ocelot_em.merge.fold import Fold, Workspace
from ocelot_em.merge.overlap import Canvas, shown_alone
from ocelot_em.merge.plan import MergePlan, PlannedExposure
from ocelot_em.merge.stats.collected import Collection, Counting
from ocelot_em.model.maps import BEST_PARTIAL, INDEX, MIP, NOT_SEARCHED, AnyArray
from ocelot_em.model.regions import Region
from ocelot_em.model.search_space import SearchSpace

log = logging.getLogger(__name__)

DTypeOf = Callable[[int, str], "np.dtype[np.generic]"]
"""Of a map of a source of the exposure, by the source's number and the map's name."""


class Compiling(Protocol):
    """Is told that kernels are compiled, which happens once after an installation."""

    def compiling(self) -> None:
        """The first kernel is being compiled."""
        ...

    def compiled(self, seconds: float) -> None:
        """All are, since ``seconds`` ago."""
        ...


class Logged:
    """Where nobody watches, as in a worker process."""

    def compiling(self) -> None:
        """Log it."""
        log.info("compiling kernels")

    def compiled(self, seconds: float) -> None:
        """Log it."""
        log.info("compiled kernels in %.1f s", seconds)


def compile_kernels(
    plan: MergePlan,
    exposure: PlannedExposure,
    space: SearchSpace | None,
    dtype_of: DTypeOf,
    watcher: Compiling,
) -> float:
    """Compile or load what the tiles of a merge on the CPU call.

    Parameters
    ----------
    plan
        The merge.
    exposure, space, dtype_of
        One of its exposures, which stands for all.
    watcher
        Is told, if anything has to be compiled.

    Returns
    -------
    float
        Seconds that compiling took; 0 where everything was on the disk.
    """
    seconds = kernels.seconds_compiling(
        lambda: _merge_few_pixels(plan, exposure, space, dtype_of), watcher.compiling
    )
    if seconds:
        watcher.compiled(seconds)
    return seconds


def _merge_few_pixels(
    plan: MergePlan, exposure: PlannedExposure, space: SearchSpace | None, dtype_of: DTypeOf
) -> None:
    chosen = _different_ones(plan, exposure, dtype_of)
    sources = [exposure.sources[number] for number in chosen]
    maps, mask_nan = plan.maps_of_exposure, plan.nan == "mask"
    fold = Fold(sources, maps, space, mask_nan=mask_nan)
    pixels, work = Region(0, 3, 0, 1), Workspace(3)
    work.shape = pixels.shape
    # Arrays that are contiguous and those that are not are of different types: candidates, if there
    # are several, and pieces that are narrower than their tile.
    for level, width in ((0.0, 2), (np.inf, 1)):
        counting = Counting(pixels, level, len(exposure.contributions), len(sources))
        tile = _FewPixels(lambda number, name: dtype_of(chosen[number], name), counting)
        if not plan.is_montage:
            fold.merge(tile, work)
            continue
        canvas = Canvas(plan.maps, plan.overlap, 6)
        canvas.begin((3, width), [pixels])
        canvas.lay(0, pixels, (pixels, pixels))
        tile.write = canvas.put
        fold.merge(tile, work)
        canvas.shown(0, pixels)
    if plan.is_montage:
        shown_alone(np.zeros(pixels.shape, np.float32))


def _different_ones(plan: MergePlan, exposure: PlannedExposure, dtype_of: DTypeOf) -> list[int]:
    """Numbers of the first source, and of one of each kind among the others, as of the types."""
    kinds: dict[object, int] = {}
    for number, source in enumerate(exposure.sources):
        names = source.map_names(plan.maps_of_exposure)
        kind = number == 0, tuple((name, dtype_of(number, name)) for name in names)
        kinds.setdefault(kind, number)
    return list(kinds.values())


class _FewPixels:
    """A tile of which the last pixel was not searched."""

    def __init__(self, dtype_of: DTypeOf, counting: Counting) -> None:
        self._dtype_of = dtype_of
        self.collection = Collection(capacity=3, longest_edge=3)
        self.collection.begin(counting.region, counting)
        self.write: Callable[[str, AnyArray], None] = _forget

    def open(self, number: int, name: str, _spare: str) -> "_Arrival":
        return _Arrival(name, self._dtype_of(number, name))

    def close(self) -> None:
        pass

    def look_closer(self, number: int) -> None:
        pass


class _Arrival:
    n_parts = 1

    def __init__(self, name: str, dtype: "np.dtype[np.generic]") -> None:
        self._name, self.dtype = name, dtype

    def decode(self, _part: int, _n_parts: int, out: AnyArray) -> None:
        out[:-1], out[-1] = 0, _UNSEARCHED.get(self._name, 0)


_UNSEARCHED = {MIP: -np.inf, INDEX: NOT_SEARCHED, BEST_PARTIAL: NOT_SEARCHED}
"""What maps have where nobody searched, if it is not 0."""


def _forget(_name: str, _values: AnyArray) -> None:
    pass
