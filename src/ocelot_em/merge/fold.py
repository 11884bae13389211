"""In-memory merge of a tile: map by map, or partial by partial.

The caller reads the maps of the partials and stores the merged maps; this module is independent of
storage. Maps are read in an order that is known beforehand, so that they can be prefetched.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from ocelot_em import kernels
from ocelot_em.merge.stats.collected import TileStatistics
from ocelot_em.model.maps import (
    BEST_PARTIAL,
    COUNT,
    INDEX,
    MAPS,
    MIP,
    NOT_SEARCHED,
    SQUARED_SUM,
    SUM,
    Accumulator,
    AnyArray,
    MapSet,
    PartialMaps,
)
from ocelot_em.model.search_space import SearchSpace
from ocelot_em.model.workspace import Workspace
from ocelot_em.store.sources import Source
from ocelot_em.store.transfer import READ_TOGETHER


class Arrival(Protocol):
    """A map of a source that has been read, but not decoded."""

    dtype: "np.dtype[np.generic]"
    n_parts: int
    """Number of equal parts in which its pixels can be decoded."""

    def decode(self, part: int, n_parts: int, out: AnyArray) -> None:
        """Decode a part into a flat array of its size; ``n_parts`` is the attribute, or 1."""
        ...


class Incoming(Protocol):
    """The encoded maps of one piece, in the order of :meth:`Fold.order`."""

    def take(self, n: int) -> AbstractContextManager[Sequence[Arrival]]:
        """Wait for the next maps, at most :data:`READ_TOGETHER`; valid within the context."""
        ...


@dataclass
class Notes:
    """Observations of a fold while it merges a piece.

    Parameters
    ----------
    statistics
        Collects statistics and candidates; None: they are not collected.
    searched_pixels
        Number of pixels in which something was searched.
    suspects
        Numbers of the sources to check because of NaN or an index out of range. They may be valid:
        a NaN pose is allowed where nothing was searched.
    """

    statistics: TileStatistics | None = None
    searched_pixels: int = 0
    suspects: list[int] = field(default_factory=list)
    _noted: set[int] = field(default_factory=set)

    def suspect(self, *numbers: int) -> None:
        """Add sources that must be checked; each is added once."""
        self.suspects += [number for number in numbers if number not in self._noted]
        self._noted.update(numbers)


Merged = Iterator[tuple[str, AnyArray]]
"""Merged maps by name, each valid until the next one is requested."""


class Fold:
    """Merges the pieces of an exposure; shared by all tiles and threads.

    Parameters
    ----------
    sources
        Sources in the stated order.
    maps
        Maps of the result.
    space
        The search space of an indexed search.
    mask_nan
        Omit a partial where one of its maps is NaN.
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
        """Yield source number and map name, in the order in which maps are read."""
        names = [source.map_names(self.maps) for source in self.sources]
        if self._mask_nan:
            yield from ((number, name) for number, own in enumerate(names) for name in own)
            return
        for phase in self.maps.phases:
            for number, own in enumerate(names):
                yield from ((number, name) for name in phase if name in own)

    def merge(self, incoming: Incoming, work: Workspace, notes: Notes) -> Merged:
        """Merge one piece.

        Parameters
        ----------
        incoming
            Its maps, in the order of :meth:`order`.
        work
            Memory with the shape of the piece.
        notes
            Observations are added here.

        Yields
        ------
        name, values
            The merged maps.

        Raises
        ------
        StorageError
            Raised by ``incoming``.
        """
        if self._mask_nan:
            yield from self._by_partial(incoming, work, notes)
            return
        yield from self._winners(incoming, work, notes)
        yield from self._best_partial(incoming, work, notes)
        yield from self._sums(incoming, work, notes)
        if self.space is None:
            for name in self.maps.pose:
                yield from self._pose(name, incoming, work, notes)

    def _winners(self, incoming: Incoming, work: Workspace, notes: Notes) -> Merged:
        """Find the source with the highest correlation at each pixel.

        Stores the number of the source, and its number in the result, in the workspace.
        """
        mip, winner, index = work.flat(MIP, "f4"), work.flat("winner", "i2"), work.flat(INDEX, "i4")
        best_partial = work.flat(BEST_PARTIAL, "i4")
        firsts = np.array([source.first_number for source in self.sources], np.int32)
        n_poses = np.int32(0 if self.space is None else self.space.n_poses)
        names = self.maps.phases[0]
        everyone = range(len(self.sources))
        if self.space is not None:
            mip.fill(-np.inf)
            winner.fill(-1)
            index.fill(NOT_SEARCHED)
        several = self._several()
        notes.searched_pixels = work.n_pixels
        for number, part, new in self.parts(incoming, work, names, everyone):
            if self.space is not None:
                kept = mip[part], index[part], winner[part]
                bad = self._planes.contest_indexed(*new, np.int16(number), n_poses, kept)
            elif number == 0:
                bad = self._planes.contest_first(new[0], mip[part], winner[part])
            else:
                bad = self._planes.contest(new[0], np.int16(number), mip[part], winner[part])
            if bad:
                notes.suspect(number)
            if number == everyone[-1]:
                notes.searched_pixels -= int(self._planes.count_unsearched(winner[part]))
                self._planes.number_winners(winner[part], firsts, best_partial[part])
                if notes.statistics is not None and not several:
                    notes.statistics.count_wins(part.start, best_partial[part])
        for name in names:
            yield name, work.array(name, MAPS[name].dtypes[0])

    def _pose(self, name: str, incoming: Incoming, work: Workspace, notes: Notes) -> Merged:
        """Take each pixel from its winner."""
        winner, kept = work.flat("winner", "i2"), work.flat("kept pose", "f4")
        everyone = range(len(self.sources))
        for number, part, (new,) in self.parts(incoming, work, (name,), everyone, first=kept):
            if number == 0:  # its values are correct wherever no other source wins
                bad = self._planes.has_nan(new)
            else:
                bad = self._planes.take(new, np.int16(number), winner[part], kept[part])
            if bad:
                notes.suspect(number)
        if notes.searched_pixels < work.n_pixels:
            self._planes.blank(winner, kept)
        yield name, look_up_candidates(notes, name, work.array("kept pose", "f4"))

    def _best_partial(self, incoming: Incoming, work: Workspace, notes: Notes) -> Merged:
        """Yield the numbers of the winning partials, also within sources merged earlier."""
        winner, best_partial = work.flat("winner", "i2"), work.flat(BEST_PARTIAL, "i4")
        several = self._several()
        for number, part, (new,) in self.parts(incoming, work, (BEST_PARTIAL,), several):
            self._planes.take_number(
                new,
                np.int32(self.sources[number].first_number),
                np.int16(number),
                winner[part],
                best_partial[part],
            )
        if notes.statistics is not None and several:
            notes.statistics.count_wins(0, best_partial)
        yield BEST_PARTIAL, work.array(BEST_PARTIAL, "i4")

    def _several(self) -> list[int]:
        """Numbers of the sources that consist of several partials merged earlier."""
        return [n for n, s in enumerate(self.sources) if BEST_PARTIAL in s.map_names(self.maps)]

    def _sums(self, incoming: Incoming, work: Workspace, notes: Notes) -> Merged:
        """Add the counts and sums, and compute the maps that depend on them."""
        everyone = range(len(self.sources))
        counts = work.flat(COUNT, "i8") if self.maps.counts else None
        if counts is not None:
            counts.fill(sum(s.total_projections for s in self.sources if not s.has_counts))
            mapped = [number for number in everyone if self.sources[number].has_counts]
            for _, part, (new,) in self.parts(incoming, work, (COUNT,), mapped):
                counts[part] += new
        for name in (SUM, SQUARED_SUM):
            total = work.flat(name, "f8")
            for number, part, (new,) in self.parts(incoming, work, (name,), everyone):
                if notes.statistics is not None:
                    bad = notes.statistics.add(number, name, part.start, new, total[part])
                else:
                    add = self._planes.add if number else self._planes.add_first
                    bad = add(new, total[part])
                if bad:
                    notes.suspect(number)
                if name == SQUARED_SUM and number == everyone[-1]:
                    self._compute(self._accumulator(work, part), work, part, notes)
        yield from self._computed(work, notes)

    def _accumulator(self, work: Workspace, part: slice) -> Accumulator:
        """Return the accumulator of some pixels of the workspace."""
        mip = work.flat(MIP, "f4")[part]
        return Accumulator(
            mip=mip,
            # Explicit poses are not needed here; any arrays serve as placeholders.
            pose=(work.flat(INDEX, "i4")[part],) if self.space else (mip,) * len(self.maps.pose),
            best_partial=work.flat(BEST_PARTIAL, "i4")[part],
            correlation_sum=work.flat(SUM, "f8")[part],
            correlation_squared_sum=work.flat(SQUARED_SUM, "f8")[part],
            count_map=work.flat(COUNT, "i8")[part] if self.maps.counts else None,
            count=sum(source.total_projections for source in self.sources),
        )

    def parts(
        self,
        incoming: Incoming,
        work: Workspace,
        names: Sequence[str],
        numbers: Sequence[int],
        first: AnyArray | None = None,
    ) -> Iterator[tuple[int, slice, list[AnyArray]]]:
        """Decode maps of sources part by part: one part of each source, then the next part.

        The merged values of a part thus stay in the caches until its last source is decoded.

        Parameters
        ----------
        incoming, work
            The encoded maps, and the memory.
        names
            Maps that are decoded together, of different dtypes.
        numbers
            Numbers of the sources.
        first
            A flat array of the tile's size into which the first source is decoded.

        Yields
        ------
        number : int
            Number of the source.
        part : slice
            The tile's pixels, in one dimension.
        values : list of array
            Values of the maps in these pixels, valid until the next item is requested.
        """
        together = READ_TOGETHER // len(names)
        for start in range(0, len(numbers), together):
            group = numbers[start : start + together]
            with incoming.take(len(group) * len(names)) as arrived:
                n_names = len(names)
                arrivals = [arrived[at : at + n_names] for at in range(0, len(arrived), n_names)]
                different = {arrival.n_parts for arrival in arrived}
                n_parts = different.pop() if len(different) == 1 else 1
                size = work.n_pixels // n_parts
                memory = [
                    [work.flat("decoded", arrival.dtype)[:size] for arrival in own]
                    for own in arrivals
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

    def _by_partial(self, incoming: Incoming, work: Workspace, notes: Notes) -> Merged:
        """Fold one partial after another: its mask depends on all its maps."""
        maps, statistics = self.maps, notes.statistics
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
                with incoming.take(1) as (arrival,):
                    arrays[name] = work.array(f"incoming {name}", arrival.dtype)
                    arrival.decode(0, 1, arrays[name].reshape(-1))
                if statistics is not None and name in (SUM, SQUARED_SUM):
                    statistics.add(number, name, 0, arrays[name].reshape(-1))
            partial = self._kernel.mask_nan(partial_maps(source, maps, arrays))
            report = self._kernel.fold(accumulator, partial, self.space)
            if report.nan_pixels or report.invalid_indices:
                notes.suspect(number)
        notes.searched_pixels = int(np.count_nonzero(accumulator.mip > -np.inf))
        yield MIP, accumulator.mip
        yield BEST_PARTIAL, accumulator.best_partial
        self._compute(accumulator, work, slice(0, work.n_pixels), notes)
        if statistics is not None:
            statistics.count_wins(0, accumulator.best_partial)
        yield from self._computed(work, notes)
        for name, values in zip(maps.pose, accumulator.pose, strict=True):
            yield name, look_up_candidates(notes, name, values)

    def _compute(
        self, accumulator: Accumulator, work: Workspace, part: slice, notes: Notes
    ) -> None:
        """Compute the maps that depend on the sums for some pixels, and count these pixels."""
        out = {name: work.flat(f"merged {name}", "f4")[part] for name in self.maps.computed}
        shaped = {name: values.reshape(accumulator.mip.shape) for name, values in out.items()}
        self._kernel.finalise(accumulator, self.maps, self.space, shaped)
        if notes.statistics is not None:
            notes.statistics.count(part.start, {MIP: accumulator.mip, **out})

    def _computed(self, work: Workspace, notes: Notes) -> Merged:
        """Find the candidates of the complete piece, and yield the computed maps."""
        computed = {name: work.array(f"merged {name}", "f4") for name in self.maps.computed}
        if self.maps.counts:
            computed[COUNT] = work.array(COUNT, "i8")
        if notes.statistics is not None:
            known = {MIP: work.array(MIP, "f4"), BEST_PARTIAL: work.array(BEST_PARTIAL, "i4")}
            if self.space is not None:
                known[INDEX] = work.array(INDEX, "i4")
            notes.statistics.look(known | computed)
        yield from computed.items()


def look_up_candidates(notes: Notes, name: str, values: AnyArray) -> AnyArray:
    """Keep a merged map's values at the candidates, and return the map."""
    if notes.statistics is not None:
        notes.statistics.take(name, values)
    return values


def partial_maps(source: Source, maps: MapSet, arrays: dict[str, AnyArray]) -> PartialMaps:
    """Combine the arrays of a source's maps for a kernel."""
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
