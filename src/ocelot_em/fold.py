"""How a tile is merged in memory: map by map, or partial by partial.

The caller says how a map of a partial is read and where a merged map goes; nothing here knows of
storage. Maps are read in one order that is known beforehand, so that they can be fetched ahead.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np

from ocelot_em import kernels
from ocelot_em.maps import (
    BEST_PARTIAL,
    COUNT,
    INDEX,
    MAPS,
    MEAN,
    MIP,
    NOT_SEARCHED,
    SCALED_MIP,
    SQUARED_SUM,
    STD,
    SUM,
    Accumulator,
    AnyArray,
    MapSet,
    PartialMaps,
    PoseForm,
)
from ocelot_em.search import Source
from ocelot_em.search_space import SearchSpace

STATISTICS = (SCALED_MIP, MEAN, STD, SUM, SQUARED_SUM)
"""Computed from sums, when all of them are there."""


class Workspace:
    """Reused memory of one thread for one tile at a time.

    Parameters
    ----------
    most_pixels
        Of a tile.
    """

    def __init__(self, most_pixels: int) -> None:
        self._most_pixels = most_pixels
        self._memory: dict[tuple[str, str], AnyArray] = {}
        self.shape = (1, most_pixels)

    def array(self, use: str, dtype: "str | np.dtype[np.generic]") -> AnyArray:
        """Return the array for this use, of the tile's shape, with what was left in it."""
        key = use, np.dtype(dtype).name
        memory = self._memory.get(key)
        if memory is None:
            memory = self._memory[key] = np.empty(self._most_pixels, dtype)
        return memory[: self.shape[0] * self.shape[1]].reshape(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""
        return sum(memory.nbytes for memory in self._memory.values())


class TileMaps(Protocol):
    """The maps of one tile: those that come in, and those that go out."""

    def read(self, number: int, name: str, use: str) -> AnyArray:
        """Return a map of a source, in the workspace's memory for that use."""
        ...

    def write(self, name: str, values: AnyArray) -> None:
        """Take a merged map; its memory is used again afterwards."""
        ...

    def look_closer(self, number: int) -> None:
        """Raise :class:`InvalidDataError` if a source has NaN or an invalid index in this tile."""
        ...


class Fold:
    """Merges the tiles of a plan; the same for every tile and every thread.

    Parameters
    ----------
    sources
        In the stated order.
    maps
        Which maps the result has.
    space
        The search space of an indexed search.
    mask_nan
        Leave a partial out where one of its maps is NaN.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        maps: MapSet,
        space: SearchSpace | None,
        *,
        mask_nan: bool,
    ) -> None:
        self.sources, self.maps, self.space = sources, maps, space
        self._mask_nan = mask_nan
        self._kernel = kernels.load("cpu")
        self._planes = kernels.load_by_map()

    def order(self) -> Iterator[tuple[int, str]]:
        """Number of the source and name of the map, in the order in which they are read."""
        names = [source.map_names(self.maps) for source in self.sources]
        if self._mask_nan:
            yield from ((number, name) for number, own in enumerate(names) for name in own)
            return
        indexed = self.maps.form is PoseForm.INDEXED
        phases: list[tuple[str, ...]] = [(MIP, INDEX)] if indexed else [(MIP,)]
        phases += [(name,) for name in self.maps.pose if name != INDEX]
        phases += [(BEST_PARTIAL,), (SUM,), (SQUARED_SUM,), (COUNT,)]
        for phase in phases:
            for number, own in enumerate(names):
                yield from ((number, name) for name in phase if name in own)

    def merge(self, tile: TileMaps, work: Workspace) -> int:
        """Merge one tile; in how many pixels something was searched.

        Raises
        ------
        InvalidDataError, StorageError
            As ``tile`` does.
        """
        return self._by_partial(tile, work) if self._mask_nan else self._by_map(tile, work)

    def _by_map(self, tile: TileMaps, work: Workspace) -> int:
        """Find the winners, then merge map after map: each stays in the caches meanwhile.

        A map is held for one source only, whatever their number.
        """
        mip, winner = work.array(MIP, "f4"), work.array("winner", "i2")
        mip.fill(-np.inf)
        winner.fill(-1)
        index = work.array(INDEX, "i4") if self.space is not None else None
        if index is not None:
            index.fill(NOT_SEARCHED)
        for number in range(len(self.sources)):
            new = tile.read(number, MIP, "incoming")
            if index is None or self.space is None:
                bad = self._planes.contest(_flat(new), np.int16(number), _flat(mip), _flat(winner))
            else:
                new_index = tile.read(number, INDEX, "incoming index")
                kept = _flat(mip), _flat(index), _flat(winner)
                n_poses = np.int64(self.space.n_poses)
                bad = self._planes.contest_indexed(
                    _flat(new), _flat(new_index), np.int16(number), n_poses, kept
                )
            if bad:
                tile.look_closer(number)
        unsearched = int(self._planes.count_unsearched(_flat(winner)))
        tile.write(MIP, mip)
        if index is None:
            for name in self.maps.pose:
                tile.write(name, self._pose(name, tile, work, unsearched > 0))
        else:
            tile.write(INDEX, index)
        best_partial = self._best_partial(tile, work)
        tile.write(BEST_PARTIAL, best_partial)
        accumulator = Accumulator(
            mip=mip,
            # Explicit poses are written already, and nothing is computed from them.
            pose=(index,) if index is not None else (mip,) * len(self.maps.pose),
            best_partial=best_partial,
            correlation_sum=self._sum(SUM, tile, work),
            correlation_squared_sum=self._sum(SQUARED_SUM, tile, work),
            count_map=self._counts(tile, work) if self.maps.counts else None,
            count=sum(source.total_projections for source in self.sources),
        )
        self._finish(accumulator, tile, work)
        return mip.size - unsearched

    def _pose(self, name: str, tile: TileMaps, work: Workspace, any_unsearched: bool) -> AnyArray:
        winner = _flat(work.array("winner", "i2"))
        # The first source's values are right wherever no other one wins.
        kept = tile.read(0, name, "kept pose")
        if self._planes.has_nan(_flat(kept)):
            tile.look_closer(0)
        for number in range(1, len(self.sources)):
            new = tile.read(number, name, "incoming")
            if self._planes.take(_flat(new), np.int16(number), winner, _flat(kept)):
                tile.look_closer(number)
        if any_unsearched:
            self._planes.blank(winner, _flat(kept))
        return kept

    def _best_partial(self, tile: TileMaps, work: Workspace) -> AnyArray:
        winner = _flat(work.array("winner", "i2"))
        numbers = np.array([source.first_number for source in self.sources], np.int32)
        best_partial = work.array(BEST_PARTIAL, "i4")
        self._planes.number_winners(winner, numbers, _flat(best_partial))
        for number, source in enumerate(self.sources):
            if BEST_PARTIAL in source.map_names(self.maps):
                new = tile.read(number, BEST_PARTIAL, "incoming best partial")
                self._planes.take_number(
                    _flat(new), numbers[number], np.int16(number), winner, _flat(best_partial)
                )
        return best_partial

    def _sum(self, name: str, tile: TileMaps, work: Workspace) -> AnyArray:
        total = work.array(name, "f8")
        for number in range(len(self.sources)):
            new = tile.read(number, name, "incoming")
            add: Callable[[AnyArray, AnyArray], bool] = (
                self._planes.add if number else self._planes.add_first
            )
            if add(_flat(new), _flat(total)):
                tile.look_closer(number)
        return total

    def _counts(self, tile: TileMaps, work: Workspace) -> AnyArray:
        counts = work.array(COUNT, "i8")
        counts.fill(0)
        for number, source in enumerate(self.sources):
            if source.has_counts:
                counts += tile.read(number, COUNT, "incoming counts")
            else:
                counts += source.total_projections
        return counts

    def _by_partial(self, tile: TileMaps, work: Workspace) -> int:
        """Fold partial after partial: what is left out of one depends on all its maps."""
        maps = self.maps
        pose_dtype = "f4" if self.space is None else "i4"
        accumulator = Accumulator(
            mip=work.array(MIP, "f4"),
            pose=tuple(work.array(name, pose_dtype) for name in maps.pose),
            best_partial=work.array(BEST_PARTIAL, "i4"),
            correlation_sum=work.array(SUM, "f8"),
            correlation_squared_sum=work.array(SQUARED_SUM, "f8"),
            count_map=work.array(COUNT, "i8"),
        )
        self._kernel.reset(accumulator)
        for number, source in enumerate(self.sources):
            arrays = {
                name: tile.read(number, name, f"incoming {name}") for name in source.map_names(maps)
            }
            partial = self._kernel.mask_nan(partial_maps(source, maps, arrays))
            report = self._kernel.fold(accumulator, partial, self.space)
            if report.nan_pixels or report.invalid_indices:
                tile.look_closer(number)
        for name, values in zip(maps.pose, accumulator.pose, strict=True):
            tile.write(name, values)
        tile.write(MIP, accumulator.mip)
        tile.write(BEST_PARTIAL, accumulator.best_partial)
        searched = int(np.count_nonzero(accumulator.mip > -np.inf))
        self._finish(accumulator, tile, work)
        return searched

    def _finish(self, accumulator: Accumulator, tile: TileMaps, work: Workspace) -> None:
        """Write what is computed from the accumulator."""
        names = STATISTICS if self.space is None else (*STATISTICS, *self.maps.explicit_poses)
        out = {name: work.array(f"merged {name}", MAPS[name].dtypes[0]) for name in names}
        merged = self._kernel.finalise(accumulator, self.maps, self.space, out)
        for name in names:
            tile.write(name, merged[name])
        if accumulator.count_map is not None:
            tile.write(COUNT, accumulator.count_map)


def partial_maps(source: Source, maps: MapSet, arrays: dict[str, AnyArray]) -> PartialMaps:
    """Put the arrays of a source's maps together as a kernel takes them."""
    best: int | AnyArray = source.first_number
    if BEST_PARTIAL in arrays:
        numbers = arrays[BEST_PARTIAL]
        best = np.where(numbers == NOT_SEARCHED, numbers, numbers + np.int32(source.first_number))
    return PartialMaps(
        mip=arrays[MIP],
        pose=tuple(arrays[name] for name in maps.pose),
        correlation_sum=arrays[SUM],
        correlation_squared_sum=arrays[SQUARED_SUM],
        count=arrays.get(COUNT, source.total_projections),
        best_partial=best,
    )


def _flat(array: AnyArray) -> AnyArray:
    return array.reshape(-1)
