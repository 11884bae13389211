"""How a tile is merged in memory: map by map, or partial by partial.

The caller says how a map of a partial is read and where a merged map goes; nothing here knows of
storage. Maps are read in one order that is known beforehand, so that they can be fetched ahead.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from ocelot_em import kernels
from ocelot_em.merge.stats.collected import Collection
from ocelot_em.model.maps import (
    BEST_PARTIAL,
    COUNT,
    INDEX,
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
)
from ocelot_em.model.search_space import SearchSpace
from ocelot_em.store.search import Source
from ocelot_em.store.transfer import READ_TOGETHER

SPARES = tuple(f"spare {slot}" for slot in range(READ_TOGETHER))
"""Memory for maps that are open, and had to be decoded whole."""

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
        self.most_pixels = most_pixels
        self._memory: dict[tuple[str, str], AnyArray] = {}
        self.shape = (1, most_pixels)

    def array(self, use: str, dtype: "str | np.dtype[np.generic]") -> AnyArray:
        """Return the array for this use, of the tile's shape, with what was left in it."""
        key = use, str(dtype)
        memory = self._memory.get(key)
        if memory is None:
            memory = self._memory[key] = np.empty(self.most_pixels, dtype)
        return memory[: self.n_pixels].reshape(self.shape)

    def flat(self, use: str, dtype: "str | np.dtype[np.generic]") -> AnyArray:
        """Return the same in one dimension."""
        return self.array(use, dtype).reshape(-1)

    @property
    def n_pixels(self) -> int:
        """Of the tile."""
        return self.shape[0] * self.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""
        return sum(memory.nbytes for memory in self._memory.values())


class Arrival(Protocol):
    """A map of a source that has been read, but not decoded."""

    dtype: "np.dtype[np.generic]"
    n_parts: int
    """Equal parts of its pixels in which it can be decoded."""

    def decode(self, part: int, n_parts: int, out: AnyArray) -> None:
        """Decode a part into a flat array of its size; ``n_parts`` is that above, or 1."""
        ...


class TileMaps(Protocol):
    """The maps of one tile: those that come in, and those that go out."""

    def open(self, number: int, name: str, spare: str) -> Arrival:
        """Return a map of a source; ``spare`` is memory of the workspace that it may need."""
        ...

    def close(self) -> None:
        """Be done with all that is open."""
        ...

    def write(self, name: str, values: AnyArray) -> None:
        """Take a merged map; its memory is used again afterwards."""
        ...

    @property
    def collection(self) -> Collection | None:
        """Where statistics and candidates of this tile are collected, if anybody wants them."""
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
        phases: list[tuple[str, ...]] = [(MIP,)] if self.space is None else [(MIP, INDEX)]
        phases += [(BEST_PARTIAL,), (COUNT,), (SUM,), (SQUARED_SUM,)]
        phases += [(name,) for name in self.maps.pose if name != INDEX]
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
        if self._mask_nan:
            return self._by_partial(tile, work)
        searched = self._winners(tile, work)
        self._best_partial(tile, work)
        self._sums(tile, work)
        if self.space is None:
            for name in self.maps.pose:
                self._pose(name, tile, work, any_unsearched=searched < work.n_pixels)
        return searched

    def _winners(self, tile: TileMaps, work: Workspace) -> int:
        """Find out which source has the highest correlation; in how many pixels one has.

        Leaves the number of the source, and what it is called in the result, in the workspace.
        """
        mip, winner, index = work.flat(MIP, "f4"), work.flat("winner", "i2"), work.flat(INDEX, "i4")
        best_partial = work.flat(BEST_PARTIAL, "i4")
        firsts = np.array([source.first_number for source in self.sources], np.int32)
        n_poses = np.int32(0 if self.space is None else self.space.n_poses)
        names = (MIP,) if self.space is None else (MIP, INDEX)
        everyone = range(len(self.sources))
        if self.space is not None:
            mip.fill(-np.inf)
            winner.fill(-1)
            index.fill(NOT_SEARCHED)
        unsearched, several = 0, self._several()
        for number, part, new in self.parts(tile, work, names, everyone):
            if self.space is not None:
                kept = mip[part], index[part], winner[part]
                bad = self._planes.contest_indexed(*new, np.int16(number), n_poses, kept)
            elif number == 0:
                bad = self._planes.contest_first(new[0], mip[part], winner[part])
            else:
                bad = self._planes.contest(new[0], np.int16(number), mip[part], winner[part])
            if bad:
                tile.look_closer(number)
            if number == everyone[-1]:
                unsearched += int(self._planes.count_unsearched(winner[part]))
                self._planes.number_winners(winner[part], firsts, best_partial[part])
                if tile.collection is not None and not several:
                    tile.collection.count_wins(part.start, best_partial[part])
        tile.write(MIP, work.array(MIP, "f4"))
        if self.space is not None:
            tile.write(INDEX, work.array(INDEX, "i4"))
        return work.n_pixels - unsearched

    def _pose(self, name: str, tile: TileMaps, work: Workspace, *, any_unsearched: bool) -> None:
        """Take every pixel from its winner."""
        winner, kept = work.flat("winner", "i2"), work.flat("kept pose", "f4")
        everyone = range(len(self.sources))
        for number, part, (new,) in self.parts(tile, work, (name,), everyone, first=kept):
            if number == 0:  # its values are right wherever no other one wins
                bad = self._planes.has_nan(new)
            else:
                bad = self._planes.take(new, np.int16(number), winner[part], kept[part])
            if bad:
                tile.look_closer(number)
        if any_unsearched:
            self._planes.blank(winner, kept)
        write_and_keep(tile, name, work.array("kept pose", "f4"))

    def _best_partial(self, tile: TileMaps, work: Workspace) -> None:
        """Write what the winners are called; in a source of several, which of them."""
        winner, best_partial = work.flat("winner", "i2"), work.flat(BEST_PARTIAL, "i4")
        several = self._several()
        for number, part, (new,) in self.parts(tile, work, (BEST_PARTIAL,), several):
            self._planes.take_number(
                new,
                np.int32(self.sources[number].first_number),
                np.int16(number),
                winner[part],
                best_partial[part],
            )
        if tile.collection is not None and several:
            tile.collection.count_wins(0, best_partial)
        tile.write(BEST_PARTIAL, work.array(BEST_PARTIAL, "i4"))

    def _several(self) -> list[int]:
        """Numbers of the sources that are several partials, merged before."""
        return [n for n, s in enumerate(self.sources) if BEST_PARTIAL in s.map_names(self.maps)]

    def _sums(self, tile: TileMaps, work: Workspace) -> None:
        """Add the counts and sums, and compute and write what follows from them."""
        everyone = range(len(self.sources))
        counts = work.flat(COUNT, "i8") if self.maps.counts else None
        if counts is not None:
            counts.fill(sum(s.total_projections for s in self.sources if not s.has_counts))
            mapped = [number for number in everyone if self.sources[number].has_counts]
            for _, part, (new,) in self.parts(tile, work, (COUNT,), mapped):
                counts[part] += new
        for name in (SUM, SQUARED_SUM):
            total = work.flat(name, "f8")
            for number, part, (new,) in self.parts(tile, work, (name,), everyone):
                if tile.collection is not None:
                    bad = tile.collection.add(number, name, part.start, new, total[part])
                else:
                    add = self._planes.add if number else self._planes.add_first
                    bad = add(new, total[part])
                if bad:
                    tile.look_closer(number)
                if name == SQUARED_SUM and number == everyone[-1]:
                    self._compute(self._accumulator(work, part), tile, work, part)
        self._look_and_write(tile, work)

    def _accumulator(self, work: Workspace, part: slice) -> Accumulator:
        """Some pixels of the workspace, as a kernel takes them."""
        mip = work.flat(MIP, "f4")[part]
        return Accumulator(
            mip=mip,
            # Explicit poses are written already, and nothing is computed from them.
            pose=(work.flat(INDEX, "i4")[part],) if self.space else (mip,) * len(self.maps.pose),
            best_partial=work.flat(BEST_PARTIAL, "i4")[part],
            correlation_sum=work.flat(SUM, "f8")[part],
            correlation_squared_sum=work.flat(SQUARED_SUM, "f8")[part],
            count_map=work.flat(COUNT, "i8")[part] if self.maps.counts else None,
            count=sum(source.total_projections for source in self.sources),
        )

    def parts(
        self,
        tile: TileMaps,
        work: Workspace,
        names: Sequence[str],
        numbers: Sequence[int],
        first: AnyArray | None = None,
    ) -> Iterator[tuple[int, slice, list[AnyArray]]]:
        """Decode maps of sources part by part: a part of all that fit, then the next.

        So what is merged of a part stays in the caches until its last source has come.

        Parameters
        ----------
        tile, work
            What is merged, and where.
        names
            Maps that are decoded together, of different dtypes.
        numbers
            Of the sources.
        first
            A flat array of the tile's size, to decode the first source into.

        Yields
        ------
        number : int
            Of the source.
        part : slice
            Of the tile's pixels, in one dimension.
        values : list of array
            Of the maps over these pixels, until the next is asked for.
        """
        together = READ_TOGETHER // len(names)
        for start in range(0, len(numbers), together):
            group = numbers[start : start + together]
            spares = iter(SPARES)
            arrivals = [
                [tile.open(number, name, next(spares)) for name in names] for number in group
            ]
            different = {arrival.n_parts for own in arrivals for arrival in own}
            n_parts = different.pop() if len(different) == 1 else 1
            size = work.n_pixels // n_parts
            memory = [
                [work.flat("decoded", arrival.dtype)[:size] for arrival in own] for own in arrivals
            ]
            for at in range(n_parts):
                part = slice(at * size, (at + 1) * size)
                for number, own, decoded in zip(group, arrivals, memory, strict=True):
                    values = decoded
                    if first is not None and number == numbers[0]:
                        values = [first[part]]
                    for arrival, out in zip(own, values, strict=True):
                        arrival.decode(at, n_parts, out)
                    yield number, part, values
            tile.close()

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
            arrays = {}
            for name in source.map_names(maps):
                arrival = tile.open(number, name, SPARES[0])
                arrays[name] = work.array(f"incoming {name}", arrival.dtype)
                arrival.decode(0, 1, arrays[name].reshape(-1))
                tile.close()
                if tile.collection is not None and name in (SUM, SQUARED_SUM):
                    tile.collection.add(number, name, 0, arrays[name].reshape(-1))
            partial = self._kernel.mask_nan(partial_maps(source, maps, arrays))
            report = self._kernel.fold(accumulator, partial, self.space)
            if report.nan_pixels or report.invalid_indices:
                tile.look_closer(number)
        tile.write(MIP, accumulator.mip)
        tile.write(BEST_PARTIAL, accumulator.best_partial)
        self._compute(accumulator, tile, work, slice(0, work.n_pixels))
        if tile.collection is not None:
            tile.collection.count_wins(0, accumulator.best_partial)
        self._look_and_write(tile, work)
        for name, values in zip(maps.pose, accumulator.pose, strict=True):
            write_and_keep(tile, name, values)
        return int(np.count_nonzero(accumulator.mip > -np.inf))

    @property
    def _computed(self) -> tuple[str, ...]:
        """Names of the maps that are computed, when everything has come."""
        return (*STATISTICS, *self.maps.computed_poses)

    def _compute(
        self, accumulator: Accumulator, tile: TileMaps, work: Workspace, part: slice
    ) -> None:
        """Compute what follows from the sums of some pixels, and have them counted."""
        out = {name: work.flat(f"merged {name}", "f4")[part] for name in self._computed}
        shaped = {name: values.reshape(accumulator.mip.shape) for name, values in out.items()}
        self._kernel.finalise(accumulator, self.maps, self.space, shaped)
        if tile.collection is not None:
            tile.collection.count(part.start, {MIP: accumulator.mip, **out})

    def _look_and_write(self, tile: TileMaps, work: Workspace) -> None:
        """Look at what is known of the whole tile now, and write what was computed."""
        computed = {name: work.array(f"merged {name}", "f4") for name in self._computed}
        if self.maps.counts:
            computed[COUNT] = work.array(COUNT, "i8")
        if tile.collection is not None:
            known = {MIP: work.array(MIP, "f4"), BEST_PARTIAL: work.array(BEST_PARTIAL, "i4")}
            if self.space is not None:
                known[INDEX] = work.array(INDEX, "i4")
            tile.collection.look(known | computed)
        for name, values in computed.items():
            tile.write(name, values)


def write_and_keep(tile: TileMaps, name: str, values: AnyArray) -> None:
    """Write a merged map, when it is known where the candidates are."""
    if tile.collection is not None:
        tile.collection.take(name, values)
    tile.write(name, values)


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
