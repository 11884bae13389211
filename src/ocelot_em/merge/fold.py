"""Merge of a tile's pieces: map by map, or partial by partial.

Maps come from a reader, in an order that is known beforehand so that their chunks are prefetched. A
piece that is one whole chunk is decoded here, block by block; of others, the reader decodes and
crops the chunks. Merged maps are yielded to the caller, one at a time.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

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
from ocelot_em.store.transfer import READ_TOGETHER, Arrival, ReadAhead


@dataclass
class PieceReport:
    """What a fold finds out while it merges a piece.

    ``statistics`` are None if they are not collected. ``suspects`` are numbers of sources that may
    have unusable values, and must be checked: a NaN pose is valid where nothing was searched.
    """

    statistics: TileStatistics | None = None
    searched_pixels: int = 0
    suspects: list[int] = field(default_factory=list)
    _known_suspects: set[int] = field(default_factory=set)

    def suspect(self, *numbers: int) -> None:
        """Add sources that must be checked; each is added once."""
        self.suspects += [number for number in numbers if number not in self._known_suspects]
        self._known_suspects.update(numbers)

    def keep_candidates(self, name: str, values: AnyArray) -> None:
        """Keep a merged map's values at the candidates, if statistics are collected."""
        if self.statistics is not None:
            self.statistics.keep_values(name, values)


Merged = Iterator[tuple[str, AnyArray]]
"""Merged maps by name, each valid until the next one is requested."""


class Fold:
    """Merges the pieces of an exposure from its sources, in the stated order.

    It is shared by all tiles and threads. ``space`` is None for explicit poses; with ``mask_nan``,
    a partial is omitted where one of its maps is NaN or infinite.
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
        from ocelot_em.kernels import by_map, cpu  # on demand, with numba

        self._by_map, self._kernels = by_map, cpu

    def order(self) -> Iterator[tuple[int, str]]:
        """Yield source number and map name, in the order in which maps are read."""
        names = [source.map_names(self.maps) for source in self.sources]
        if self._mask_nan:
            yield from ((number, name) for number, own in enumerate(names) for name in own)
            return
        for phase in self.maps.phases:
            for number, own in enumerate(names):
                yield from ((number, name) for name in phase if name in own)

    def merge(self, reader: ReadAhead, work: Workspace, report: PieceReport) -> Merged:
        """Merge one piece, whose maps ``reader`` reads in the order of :meth:`order`.

        ``work`` has the shape of the piece, and ``report`` is filled in. A chunk that is missing or
        corrupt is a ChunkError, and one that cannot be read is a StorageError.
        """
        if self._mask_nan:
            yield from self._by_partial(reader, work, report)
            return
        yield from self._winners(reader, work, report)
        yield from self._best_partial(reader, work, report)
        yield from self._sums(reader, work, report)
        if self.space is None:
            for name in self.maps.pose:
                yield from self._pose(name, reader, work, report)

    def _winners(self, reader: ReadAhead, work: Workspace, report: PieceReport) -> Merged:
        """Find the source with the highest correlation at each pixel, and its partial's number."""
        mip, winner, index = work.flat(MIP, "f4"), work.flat("winner", "i2"), work.flat(INDEX, "i4")
        best_partial = work.flat(BEST_PARTIAL, "i4")
        firsts = np.array([source.first_number for source in self.sources], np.int32)
        n_poses = np.int32(0 if self.space is None else self.space.n_poses)
        names = self.maps.phases[0]
        all_sources = range(len(self.sources))
        merged_sources = self._merged_sources()
        report.searched_pixels = work.n_pixels
        for number, part, new in self._parts(reader, work, names, all_sources):
            own, first = np.int16(number), number == 0
            if self.space is None:
                bad = self._by_map.update_winner(new[0], own, first, mip[part], winner[part])
            else:
                kept = mip[part], index[part], winner[part]
                bad = self._by_map.update_winner_indexed(new[0], new[1], own, first, n_poses, kept)
            if bad:
                report.suspect(number)
            if number == all_sources[-1]:
                report.searched_pixels -= int(self._by_map.count_unsearched(winner[part]))
                self._by_map.number_winners(winner[part], firsts, best_partial[part])
                if report.statistics is not None and not merged_sources:
                    report.statistics.count_wins(part.start, best_partial[part])
        for name in names:
            yield name, work.array(name, MAPS[name].dtypes[0])

    def _pose(self, name: str, reader: ReadAhead, work: Workspace, report: PieceReport) -> Merged:
        """Take each pixel from its winner."""
        winner, kept = work.flat("winner", "i2"), work.flat("kept pose", "f4")
        all_sources = range(len(self.sources))
        for number, part, (new,) in self._parts(reader, work, (name,), all_sources, first=kept):
            if number == 0:  # its values are correct wherever no other source wins
                bad = self._by_map.any_not_finite(new)
            else:
                bad = self._by_map.take(new, np.int16(number), winner[part], kept[part])
            if bad:
                report.suspect(number)
        if report.searched_pixels < work.n_pixels:
            self._by_map.blank(winner, kept)
        pose = work.array("kept pose", "f4")
        report.keep_candidates(name, pose)
        yield name, pose

    def _best_partial(self, reader: ReadAhead, work: Workspace, report: PieceReport) -> Merged:
        """Yield the numbers of the winning partials, also within sources merged earlier."""
        winner, best_partial = work.flat("winner", "i2"), work.flat(BEST_PARTIAL, "i4")
        merged_sources = self._merged_sources()
        for number, part, (new,) in self._parts(reader, work, (BEST_PARTIAL,), merged_sources):
            own = np.int32(self.sources[number].first_number), np.int16(number)
            self._by_map.take_number(new, *own, winner[part], best_partial[part])
        if report.statistics is not None and merged_sources:
            report.statistics.count_wins(0, best_partial)
        yield BEST_PARTIAL, work.array(BEST_PARTIAL, "i4")

    def _merged_sources(self) -> list[int]:
        """Numbers of the sources that were merged earlier from several partials."""
        return [n for n, s in enumerate(self.sources) if BEST_PARTIAL in s.map_names(self.maps)]

    def _sums(self, reader: ReadAhead, work: Workspace, report: PieceReport) -> Merged:
        """Add the counts and sums, and compute the maps that depend on them."""
        all_sources = range(len(self.sources))
        counts = work.flat(COUNT, "i8") if self.maps.counts else None
        if counts is not None:
            counts.fill(sum(s.total_projections for s in self.sources if not s.has_counts))
            mapped = [number for number in all_sources if self.sources[number].has_counts]
            for _, part, (new,) in self._parts(reader, work, (COUNT,), mapped):
                counts[part] += new
        for name in (SUM, SQUARED_SUM):
            total = work.flat(name, "f8")
            for number, part, (new,) in self._parts(reader, work, (name,), all_sources):
                if report.statistics is not None:
                    bad = report.statistics.add_sums(number, name, part.start, new, total[part])
                else:
                    bad = self._by_map.add(new, number == 0, total[part])
                if bad:
                    report.suspect(number)
                if name == SQUARED_SUM and number == all_sources[-1]:
                    self._compute(self._accumulator(work, part), work, part, report)
        yield from self._computed(work, report)

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

    def _parts(
        self,
        reader: ReadAhead,
        work: Workspace,
        names: Sequence[str],
        numbers: Sequence[int],
        first: AnyArray | None = None,
    ) -> Iterator[tuple[int, slice, list[AnyArray]]]:
        """Decode maps of several sources part by part: one part of each, then the next part.

        At most :data:`READ_TOGETHER` chunks are open; the merged values of a part stay in the
        caches until it is decoded from all of them. Yield the number of the source, the part of the
        piece's pixels, and the values of the maps there, valid until the next item is requested.
        The first source is decoded into ``first``, if given.
        """
        n_names = len(names)
        n_sources = READ_TOGETHER // n_names
        for start in range(0, len(numbers), n_sources):
            batch = numbers[start : start + n_sources]
            with reader.take(len(batch) * n_names) as arrivals:
                by_source = [arrivals[n : n + n_names] for n in range(0, len(arrivals), n_names)]
                all_n_parts = {arrival.n_parts for arrival in arrivals}
                n_parts = all_n_parts.pop() if len(all_n_parts) == 1 else 1
                size = work.n_pixels // n_parts
                memory = [
                    [work.flat("decoded", arrival.dtype)[:size] for arrival in own]
                    for own in by_source
                ]
                for at in range(n_parts):
                    part = slice(at * size, (at + 1) * size)
                    for number, own, decoded in zip(batch, by_source, memory, strict=True):
                        values = decoded
                        if first is not None and number == numbers[0]:
                            values = [first[part]]
                        for arrival, out in zip(own, values, strict=True):
                            arrival.decode(at, n_parts, out)
                        yield number, part, values

    def _by_partial(self, reader: ReadAhead, work: Workspace, report: PieceReport) -> Merged:
        """Fold one partial after another: its mask depends on all its maps."""
        maps, statistics = self.maps, report.statistics
        accumulator = Accumulator.allocate(maps, work.array)
        for number, source in enumerate(self.sources):
            read = whole_maps(
                reader, (number, source), maps, report, lambda n, t: work.flat(f"incoming {n}", t)
            )
            arrays = {name: values.reshape(work.shape) for name, values in read}
            partial = self._kernels.mask_nan(partial_maps(source, maps, arrays))
            fresh = number == 0
            if self._kernels.fold_all(accumulator, (partial,), self.space, fresh=fresh):
                report.suspect(number)
        report.searched_pixels = int(np.count_nonzero(accumulator.mip > -np.inf))
        yield MIP, accumulator.mip
        yield BEST_PARTIAL, accumulator.best_partial
        self._compute(accumulator, work, slice(0, work.n_pixels), report)
        if statistics is not None:
            statistics.count_wins(0, accumulator.best_partial)
        yield from self._computed(work, report)
        for name, values in zip(maps.pose, accumulator.pose, strict=True):
            report.keep_candidates(name, values)
            yield name, values

    def _compute(
        self, accumulator: Accumulator, work: Workspace, part: slice, report: PieceReport
    ) -> None:
        """Compute the maps that depend on the sums for some pixels, and count these pixels."""
        out = {name: work.flat(f"merged {name}", "f4")[part] for name in self.maps.computed}
        shaped = {name: values.reshape(accumulator.mip.shape) for name, values in out.items()}
        self._kernels.finalise(accumulator, self.maps, self.space, shaped)
        if report.statistics is not None:
            report.statistics.count_pixels(part.start, {MIP: accumulator.mip, **out})

    def _computed(self, work: Workspace, report: PieceReport) -> Merged:
        """Find the candidates of the complete piece, and yield the computed maps."""
        computed = {name: work.array(f"merged {name}", "f4") for name in self.maps.computed}
        if self.maps.counts:
            computed[COUNT] = work.array(COUNT, "i8")
        if report.statistics is not None:
            known = {MIP: work.array(MIP, "f4"), BEST_PARTIAL: work.array(BEST_PARTIAL, "i4")}
            if self.space is not None:
                known[INDEX] = work.array(INDEX, "i4")
            report.statistics.find_candidates(known | computed)
        yield from computed.items()


def whole_maps(
    reader: ReadAhead,
    numbered_source: tuple[int, Source],
    maps: MapSet,
    report: PieceReport,
    memory: Callable[[str, "np.dtype[np.generic]"], AnyArray],
) -> Merged:
    """Decode the maps of a source, one after another."""
    for name in numbered_source[1].map_names(maps):
        with reader.take(1) as (arrival,):
            values = memory(name, arrival.dtype)
            whole_map(name, arrival, numbered_source, report, values)
        yield name, values


def whole_map(
    name: str,
    arrival: Arrival,
    numbered_source: tuple[int, Source],
    report: PieceReport,
    values: AnyArray,
) -> None:
    """Decode a map of a source; numbers of partials become those of the result."""
    number, source = numbered_source
    arrival.decode(0, 1, values)
    if name == BEST_PARTIAL:
        np.add(values, source.first_number, out=values, where=values != NOT_SEARCHED)
    if report.statistics is not None and name in (SUM, SQUARED_SUM):
        report.statistics.add_sums(number, name, 0, values)


def partial_maps(source: Source, maps: MapSet, arrays: dict[str, AnyArray]) -> PartialMaps:
    """Combine the arrays of a source's maps for a kernel."""
    return PartialMaps(
        mip=arrays[MIP],
        pose=tuple(arrays[name] for name in maps.pose),
        correlation_sum=arrays[SUM],
        correlation_squared_sum=arrays[SQUARED_SUM],
        count=arrays.get(COUNT, source.total_projections),
        best_partial=arrays.get(BEST_PARTIAL, source.first_number),
    )
