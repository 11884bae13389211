"""Merge of a tile's pieces: map by map, or partial by partial.

Maps come from a reader, in an order that is known beforehand so that their chunks are prefetched.
Where a piece is one whole chunk, one call of a kernel decodes and merges a map of several sources
(:mod:`ocelot_em.kernels.by_chunk`); of other pieces, the reader decodes and crops the chunks.
Merged maps are yielded to the caller, one at a time.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ocelot_em.kernels import by_chunk, by_map, cpu, cpu_statistics
from ocelot_em.kernels.compiling import address_of
from ocelot_em.merge.stats.collected import TileStatistics, none_collected
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
from ocelot_em.store.blosc import BitPlanes, BloscChunk, MergedMap, lz4_address
from ocelot_em.store.sources import Source
from ocelot_em.store.transfer import READ_TOGETHER, Arrival, ReadAhead


@dataclass
class PieceReport:
    """What a fold finds out while it merges a piece.

    ``statistics`` are None if they are not collected; ``as_planes``: poses may be bit planes, and
    maps that are on a device may be encoded there. ``suspects`` are numbers of sources that may
    have unusable values, and must be checked: a NaN pose is valid where nothing was searched.
    """

    statistics: TileStatistics | None = None
    as_planes: bool = False
    searched_pixels: int = 0
    suspects: list[int] = field(default_factory=list)
    _known_suspects: set[int] = field(default_factory=set)

    def suspect(self, *numbers: int) -> None:
        """Add sources that must be checked; each is added once."""
        self.suspects += [number for number in numbers if number not in self._known_suspects]
        self._known_suspects.update(numbers)

    def add_counts(self, number: int, counts: AnyArray, winner: AnyArray | None = None) -> None:
        """Collect a source's map of counts, which are suspect if negative, or 0 where it won."""
        lowest = counts.min()
        if lowest < 0 or (
            lowest == 0 and winner is not None and not counts[winner == number].all()
        ):
            self.suspect(number)
        if self.statistics is not None:
            self.statistics.add_counts(number, counts)

    def keep_candidates(self, name: str, values: AnyArray) -> None:
        """Keep a merged map's values at the candidates, if statistics are collected."""
        if self.statistics is not None:
            self.statistics.keep_values(name, values)


Maps = Iterator[tuple[str, AnyArray]]
"""Maps by name, each valid until the next one is requested."""

Merged = Iterator[tuple[str, MergedMap]]
"""Merged maps by name, each valid until the next one is requested."""

MAX_BLOCK = 2**17
"""Pixels that are merged together where no chunk says how many."""


class ChunkBatch:
    """A map of a few sources, as a kernel takes it: encoded where it can decode, else decoded.

    ``n`` is the number of pixels in a block. If ``bits``, the bits of all maps must be shuffled;
    else ``n`` is 0.
    """

    def __init__(self, arrivals: Sequence[Arrival], work: Workspace, *, bits: bool = False) -> None:
        self._arrivals, self._held, self.n = arrivals, list[AnyArray](), 0
        self.found, rows = np.zeros(len(arrivals), np.int32), []
        for number, arrival in enumerate(arrivals):
            chunk, itemsize = arrival.chunk, arrival.dtype.itemsize
            encoded_nbytes = 0
            if chunk is not None and self._takes(chunk, itemsize, bits):
                memory = np.frombuffer(chunk.frame, np.uint8)
                encoded_nbytes = memory.size
            elif bits:
                self.n = 0
                return
            else:
                memory = arrival.values(work.spare(number, arrival.dtype).reshape(-1))
            self._held.append(memory)
            rows.append((address_of(memory), encoded_nbytes, itemsize))
        self.rows = np.array(rows, np.int64)
        self.n = self.n or min(work.n_pixels, MAX_BLOCK)

    def _takes(self, chunk: BloscChunk, itemsize: int, bits: bool) -> bool:
        """Whether a chunk has blocks like the others, and one stream for each byte of a value."""
        blocks = chunk.blocks
        if blocks is None or (blocks.itemsize, blocks.bits) != (itemsize, bits):
            return False
        n = blocks.nbytes // itemsize
        is_fit = blocks.are_alike and blocks.n_streams == itemsize and n % 64 == 0
        if not is_fit or self.n not in (0, n) or not lz4_address():
            return False
        self.n = n
        return True

    def arguments(self, work: Workspace) -> tuple[Any, ...]:
        """Arguments of a kernel, see :mod:`ocelot_em.kernels.by_chunk`."""
        streams, joined = (work.flat(use, "f8").view(np.uint8) for use in ("streams", "joined"))
        tools = lz4_address(), streams, joined
        return tools, self.rows, (work.n_pixels, self.n), self.found

    def suspects(self, corrupt: np.int32) -> Iterator[int]:
        """Yield maps that may have unusable values, after a kernel has run."""
        for number, found in enumerate(self.found):
            if found == corrupt:
                raise self._arrivals[number].corrupt(
                    ValueError("one of its LZ4 streams cannot be decoded")
                )
            if found:
                yield number


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
        # Numbers of the sources that were merged earlier from several partials.
        self._merged_sources = [
            n for n, s in enumerate(sources) if BEST_PARTIAL in s.map_names(maps)
        ]
        self._not_collected = none_collected()

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
        corrupt is a ChunkError, and one that cannot be read is a StorageError. Poses are yielded
        as bit planes, if the report says so and all sources have them in equal blocks.
        """
        if self._mask_nan:
            yield from self._by_partial(reader, work, report)
            return
        yield from self._winners(reader, work, report)
        yield from self._best_partial(reader, work, report)
        yield from self._sums(reader, work, report)
        if self.space is None:
            winners = self._plane_winners(work) if report.as_planes else None
            for name in self.maps.pose:
                yield from self._pose(name, reader, work, report, winners)

    def _winners(self, reader: ReadAhead, work: Workspace, report: PieceReport) -> Merged:
        """Find the source with the highest correlation at each pixel, and its partial's number."""
        best_partial = work.flat(BEST_PARTIAL, "i4")
        index = work.flat(INDEX, "i4") if self.space else best_partial[:0]
        kept = work.flat(MIP, "f4"), index, work.flat("winner", "i2"), best_partial
        firsts = np.array([source.first_number for source in self.sources], np.int32)
        n_poses = 0 if self.space is None else self.space.n_poses
        names, wins = self.maps.phases[0], self._not_collected[1]
        if report.statistics is not None and not self._merged_sources:
            wins = report.statistics.wins()
        for batch, incoming in self._incoming(reader, work, report, names):
            sources = batch[0], batch[-1] + 1 == len(self.sources), n_poses, firsts
            n = by_chunk.fold_winners(incoming.arguments(work), sources, kept, wins)
            report.searched_pixels = work.n_pixels - n
        for name in names:
            yield name, work.array(name, MAPS[name].dtypes[0])

    def _pose(
        self,
        name: str,
        reader: ReadAhead,
        work: Workspace,
        report: PieceReport,
        winners: AnyArray | None,
    ) -> Merged:
        """Take each pixel from its winner, as bit planes as long as ``winners`` and chunks are."""
        kept, planes = work.flat("kept pose", "f4"), None
        for batch in self._batches(range(len(self.sources)), READ_TOGETHER):
            with reader.take(len(batch)) as arrivals:
                if winners is not None:
                    incoming = ChunkBatch(arrivals, work, bits=True)
                    if incoming.n and (planes is None or planes.block_nbytes == 4 * incoming.n):
                        planes = BitPlanes(kept.view(np.uint64), 4 * incoming.n)
                        chunks = incoming.arguments(work)
                        by_chunk.fold_planes(chunks, batch[0], winners, planes.words)
                        self._suspect(incoming, batch, report)
                        continue
                winners = None
                if planes is not None:
                    kept[...], planes = planes.values(kept.dtype), None
                for number, arrival in zip(batch, arrivals, strict=True):
                    self._take(number, arrival, work, report)
        yield name, self._finished_pose(name, work, report, planes, winners)

    def _take(self, number: int, arrival: Arrival, work: Workspace, report: PieceReport) -> None:
        """Take values where a source won; those of the first one are right where no other wins."""
        winner, kept = work.flat("winner", "i2"), work.flat("kept pose", "f4")
        if number == 0:
            arrival.decode(kept)
            bad = by_map.any_not_finite(kept)
        else:
            new = arrival.values(work.flat("decoded", "f4"))
            bad = by_map.take(new, np.int16(number), winner, kept)
        if bad:
            report.suspect(number)

    def _finished_pose(
        self,
        name: str,
        work: Workspace,
        report: PieceReport,
        planes: BitPlanes | None,
        winners: AnyArray | None,
    ) -> AnyArray | BitPlanes:
        """Return a merged pose, NaN where nothing was searched, and keep that of candidates."""
        any_unsearched = report.searched_pixels < work.n_pixels
        if planes is None or winners is None:
            if any_unsearched:
                by_map.blank(work.flat("winner", "i2"), work.flat("kept pose", "f4"))
            report.keep_candidates(name, work.array("kept pose", "f4"))
            return work.array("kept pose", "f4")
        n = planes.block_nbytes // 4
        if any_unsearched:
            by_chunk.blank_planes(winners, n, planes.words)

        def look_up(where: AnyArray) -> AnyArray:
            bits = np.empty(len(where), np.uint32)
            by_chunk.values_in_planes(planes.words, n, where, bits)
            return bits.view(np.float32)

        if report.statistics is not None:
            report.statistics.keep(name, look_up)
        return planes

    def _plane_winners(self, work: Workspace) -> AnyArray | None:
        """Return the winners as bit planes; None if pixels do not fill words."""
        if work.n_pixels % 64:
            return None
        n_planes, n_words = (len(self.sources) - 1).bit_length() + 1, work.n_pixels // 64
        memory = work.flat("winner planes", "i2").view(np.uint64)
        planes = memory[: n_planes * n_words].reshape(n_planes, n_words)
        by_chunk.plane_winners(work.flat("winner", "i2"), planes)
        return planes

    def _best_partial(self, reader: ReadAhead, work: Workspace, report: PieceReport) -> Merged:
        """Yield the numbers of the winning partials, also within sources merged earlier."""
        winner, best_partial = work.flat("winner", "i2"), work.flat(BEST_PARTIAL, "i4")
        for number, new in self._each(reader, work, self._merged_sources):
            own = np.int32(self.sources[number].first_number), np.int16(number)
            by_map.take_number(new, *own, winner, best_partial)
        if report.statistics is not None and self._merged_sources:
            report.statistics.count_wins(0, best_partial)
        yield BEST_PARTIAL, work.array(BEST_PARTIAL, "i4")

    def _sums(self, reader: ReadAhead, work: Workspace, report: PieceReport) -> Merged:
        """Add the counts and sums, and compute the maps that depend on them."""
        statistics = report.statistics
        if self.maps.counts:
            counts = work.flat(COUNT, "i8")
            counts.fill(sum(s.total_projections for s in self.sources if not s.has_counts))
            mapped = [n for n, source in enumerate(self.sources) if source.has_counts]
            for number, new in self._each(reader, work, mapped):
                counts += new
                report.add_counts(number, new, work.flat("winner", "i2"))
        out = {name: work.flat(f"merged {name}", "f4") for name in self.maps.computed}
        accumulator = self._accumulator(work)
        _, computing = cpu_statistics.finish_of(accumulator, self.maps, self.space, out)
        moments, _, counting = self._not_collected
        if statistics is not None:
            counting = statistics.counting()
        n_candidates = 0
        for name in (SUM, SQUARED_SUM):
            total = work.flat(name, "f8")
            if statistics is not None:
                moments = statistics.moments(name)
            for batch, incoming in self._incoming(reader, work, report, (name,)):
                is_last = name == SQUARED_SUM and batch[-1] + 1 == len(self.sources)
                n_candidates = by_chunk.fold_sums(
                    incoming.arguments(work),
                    batch[0],
                    total,
                    moments,
                    (is_last, computing),
                    counting,
                )
        cpu_statistics.decode_poses(work.n_pixels, self.space, computing)
        if statistics is not None:
            statistics.counted(n_candidates)
        yield from self._computed(work, report)

    def _accumulator(self, work: Workspace) -> Accumulator:
        """Return the accumulator of the piece."""
        mip = work.array(MIP, "f4")
        return Accumulator(
            mip=mip,
            # Explicit poses are not needed here; any arrays serve as placeholders.
            pose=(work.array(INDEX, "i4"),) if self.space else (mip,) * len(self.maps.pose),
            best_partial=work.array(BEST_PARTIAL, "i4"),
            correlation_sum=work.array(SUM, "f8"),
            correlation_squared_sum=work.array(SQUARED_SUM, "f8"),
            count_map=work.array(COUNT, "i8") if self.maps.counts else None,
            count=sum(source.total_projections for source in self.sources),
        )

    def _incoming(
        self, reader: ReadAhead, work: Workspace, report: PieceReport, names: Sequence[str]
    ) -> Iterator[tuple[range, ChunkBatch]]:
        """Read maps of all sources, a few at a time, for a kernel that the caller calls.

        At most :data:`READ_TOGETHER` chunks are open. Yield the numbers of the sources and their
        maps, valid until the next ones are requested.
        """
        n_names = len(names)
        for batch in self._batches(range(len(self.sources)), READ_TOGETHER // n_names):
            with reader.take(len(batch) * n_names) as arrivals:
                incoming = ChunkBatch(arrivals, work)
                yield batch, incoming
                self._suspect(incoming, [number for number in batch for _ in names], report)

    def _batches(self, numbers: range, n: int) -> Iterator[range]:
        return (numbers[start : start + n] for start in range(0, len(numbers), n))

    def _suspect(self, incoming: ChunkBatch, sources: Sequence[int], report: PieceReport) -> None:
        """Check what a kernel has found in the maps of some sources."""
        for number in incoming.suspects(by_chunk.CORRUPT):
            report.suspect(sources[number])

    def _each(
        self, reader: ReadAhead, work: Workspace, numbers: Sequence[int]
    ) -> Iterator[tuple[int, AnyArray]]:
        """Decode the next map of some sources, one after another."""
        for number in numbers:
            with reader.take(1) as (arrival,):
                yield number, arrival.values(work.flat("decoded", arrival.dtype))

    def _by_partial(self, reader: ReadAhead, work: Workspace, report: PieceReport) -> Merged:
        """Fold one partial after another: its mask depends on all its maps."""
        maps = self.maps
        accumulator = Accumulator.allocate(maps, work.array)
        for number, source in enumerate(self.sources):
            read = whole_maps(
                reader, (number, source), maps, report, lambda n, t: work.flat(f"incoming {n}", t)
            )
            arrays = {name: values.reshape(work.shape) for name, values in read}
            partial = cpu.mask_nan(partial_maps(source, maps, arrays))
            fresh = number == 0
            if cpu.fold_all(accumulator, (partial,), self.space, fresh=fresh):
                report.suspect(number)
        report.searched_pixels = int(np.count_nonzero(accumulator.mip > -np.inf))
        yield MIP, accumulator.mip
        yield BEST_PARTIAL, accumulator.best_partial
        out = {name: work.array(f"merged {name}", "f4") for name in maps.computed}
        cpu.finalise(accumulator, maps, self.space, out)
        yield from self._computed(work, report)
        for name, values in zip(maps.pose, accumulator.pose, strict=True):
            report.keep_candidates(name, values)
            yield name, values

    def _computed(self, work: Workspace, report: PieceReport) -> Merged:
        """Find the candidates of the complete piece, and yield the computed maps."""
        computed = {name: work.array(f"merged {name}", "f4") for name in self.maps.computed}
        if self.maps.counts:
            computed[COUNT] = work.array(COUNT, "i8")
        if not self.maps.derived:
            computed |= {name: work.array(name, "f8") for name in (SUM, SQUARED_SUM)}
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
) -> Maps:
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
    arrival.decode(values)
    if name == BEST_PARTIAL:
        np.add(values, source.first_number, out=values, where=values != NOT_SEARCHED)
    if name == COUNT:
        report.add_counts(number, values)
    elif report.statistics is not None and name in (SUM, SQUARED_SUM):
        report.statistics.add_sums(number, name, values)


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
