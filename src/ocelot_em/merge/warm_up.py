"""Compiles the kernels of a merge before its first tile, so that its time excludes compilation.

numba compiles a kernel at its first call with given argument types, and caches the machine code on
disk. Therefore the code of the tiles first merges a few dummy pixels with the dtypes of the
sources.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Protocol, cast

import numpy as np

from ocelot_em.merge.fold import Fold, PieceReport
from ocelot_em.merge.overlap import Canvas, WholeTile
from ocelot_em.merge.plan import MergePlan, PlannedExposure
from ocelot_em.merge.stats.collected import StatisticsScope, TileStatistics
from ocelot_em.model.maps import BEST_PARTIAL, INDEX, MIP, NOT_SEARCHED, SCALED_MIP, AnyArray
from ocelot_em.model.regions import Region
from ocelot_em.model.search_space import SearchSpace
from ocelot_em.model.workspace import Workspace
from ocelot_em.store.arrays import split_chunk
from ocelot_em.store.blosc import BitPlanes, BloscChunk
from ocelot_em.store.transfer import ReadAhead

log = logging.getLogger(__name__)

DTypeOf = Callable[[int, str], "np.dtype[np.generic]"]
"""Returns the dtype of a map, given the number of its source and its name."""


class CompileListener(Protocol):
    """Is notified when kernels are compiled, which happens once after an installation."""

    def compiling(self) -> None:
        """Compilation has started, and takes a while."""
        ...

    def compiled(self, seconds: float) -> None:
        """All kernels are compiled, which took ``seconds``."""
        ...


class CompileLog:
    """Logs compilation, as in a worker process."""

    def compiling(self) -> None:
        """Log the start."""
        log.info("compiling kernels")

    def compiled(self, seconds: float) -> None:
        """Log the duration."""
        log.info("compiled kernels in %.1f s", seconds)


def compile_kernels(
    plan: MergePlan,
    exposure: PlannedExposure,
    space: SearchSpace | None,
    dtype_of: DTypeOf,
    listener: CompileListener,
) -> float:
    """Compile or load the kernels of a merge on the CPU; one exposure represents all.

    Returns the seconds spent compiling, 0 if everything was cached on disk; ``listener`` is
    notified if compilation takes a while.
    """
    announced = False

    def announce() -> None:
        nonlocal announced
        announced = True
        listener.compiling()

    from ocelot_em.kernels import compiling  # on demand

    seconds = compiling.seconds_compiling(
        lambda: _merge_few_pixels(plan, exposure, space, dtype_of), announce
    )
    if announced:
        listener.compiled(seconds)
    return seconds


def _merge_few_pixels(
    plan: MergePlan, exposure: PlannedExposure, space: SearchSpace | None, dtype_of: DTypeOf
) -> None:
    chosen = _distinct_sources(plan, exposure, dtype_of)
    sources = [exposure.sources[number] for number in chosen]
    maps, mask_nan = plan.maps_of_exposure, plan.nan == "mask"
    fold = Fold(sources, maps, space, mask_nan=mask_nan)
    pixels, work = Region(0, _N_PIXELS, 0, 1), Workspace(_N_PIXELS)
    work.shape = pixels.shape
    # numba distinguishes contiguous and strided arrays: with several candidates, and with pieces
    # narrower than their tile. Poses are merged as bit planes, or as values.
    for level, width, encoded in ((0.0, 2, True), (np.inf, 1, False)):
        statistics = TileStatistics(capacity=_N_PIXELS, longest_edge=_N_PIXELS)
        scope = StatisticsScope(pixels, level, len(exposure.contributions), len(sources))
        statistics.begin(pixels, scope)
        reader = cast(
            "ReadAhead", _FewPixels(fold, lambda k, name: dtype_of(chosen[k], name), encoded)
        )
        canvas: Canvas | WholeTile = WholeTile(0, plan.maps, pixels.shape)
        if plan.has_parts:
            canvas = Canvas(plan.maps, plan.overlap, 2 * _N_PIXELS)
            canvas.begin((_N_PIXELS, width), [pixels])
        canvas.place(0, pixels, (pixels, pixels))
        for name, values in fold.merge(reader, work, PieceReport(statistics, as_planes=encoded)):
            if isinstance(values, BitPlanes):
                continue
            for _ in canvas.put(name, values):
                pass
        canvas.shown(0, pixels)
    if plan.has_parts:
        for _ in WholeTile(0, plan.maps, pixels.shape).put(
            SCALED_MIP, work.array(SCALED_MIP, "f4")
        ):
            pass


def _distinct_sources(plan: MergePlan, exposure: PlannedExposure, dtype_of: DTypeOf) -> list[int]:
    """Numbers of the first source, and of one other source for each combination of dtypes."""
    numbers: dict[object, int] = {}
    for number, source in enumerate(exposure.sources):
        names = source.map_names(plan.maps_of_exposure)
        dtypes = tuple((name, dtype_of(number, name)) for name in names)
        numbers.setdefault((number == 0, dtypes), number)
    return list(numbers.values())


class _FewPixels:
    """Stands in for a reader; the last pixel was not searched."""

    def __init__(self, fold: Fold, dtype_of: DTypeOf, encoded: bool) -> None:
        self._order, self._dtype_of, self._encoded = fold.order(), dtype_of, encoded

    @contextmanager
    def take(self, n: int) -> Iterator[Sequence["_Arrival"]]:
        yield [
            _Arrival(name, self._dtype_of(k, name), self._encoded)
            for k, name in islice(self._order, n)
        ]


class _Arrival:
    def __init__(self, name: str, dtype: "np.dtype[np.generic]", encoded: bool) -> None:
        self._name, self.dtype = name, dtype
        self.chunk: BloscChunk | None = None
        if encoded:
            self.chunk = split_chunk(self.values(np.empty(_N_PIXELS, dtype)), name)

    def decode(self, out: AnyArray) -> None:
        out[:-1], out[-1] = 0, _UNSEARCHED.get(self._name, 0)

    def values(self, memory: AnyArray) -> AnyArray:
        self.decode(memory)
        return memory


_N_PIXELS = 256
"""Pixels of the dummy maps: one block of an encoded chunk."""

_UNSEARCHED = {MIP: -np.inf, INDEX: NOT_SEARCHED, BEST_PARTIAL: NOT_SEARCHED}
"""Values other than 0 where nothing was searched, by map."""
