"""Record what a search finds while it runs, so that a search that was killed can be resumed."""

import logging
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from os import PathLike
from typing import Any

import numpy as np

from ocelot_em.errors import IncompleteError, InvalidDataError, InvalidInputError
from ocelot_em.kernels import load
from ocelot_em.merge.in_memory import BAND_PIXELS, Processor, fold_bands, on_host
from ocelot_em.model import ranges as sets
from ocelot_em.model.arrays import HostRows, fill, synchronize
from ocelot_em.model.correlations import TABLE, THRESHOLD, CorrelationTable, merge_tables
from ocelot_em.model.maps import INDEX, MIP, NOT_SEARCHED, PIXEL_SIZE, POSES, AnyArray
from ocelot_em.model.ranges import Range
from ocelot_em.model.regions import Region
from ocelot_em.model.search_space import SearchSpace
from ocelot_em.model.text import parse_seconds, seconds_text
from ocelot_em.store.arrays import ChunkedMap
from ocelot_em.store.correlations import COLUMNS, StoredTable, open_table, table_problems
from ocelot_em.store.objects import open_objects
from ocelot_em.store.progress import SearchProgress, batch_warning, progress_of_partials
from ocelot_em.store.recorded import RecordedPartial, SearchSize
from ocelot_em.store.search import (
    open_partial,
    read_attributes,
    read_partials,
    read_search_space,
)
from ocelot_em.store.search_info import SearchInfo
from ocelot_em.store.validation import converted, layout_problems, value_problems

log = logging.getLogger(__name__)

_EMPTY = {MIP: -np.inf, INDEX: NOT_SEARCHED, **dict.fromkeys(POSES, np.nan)}
"""Values of maps in which nothing was searched, where they are not 0."""


class SearchRecorder:
    """Records the maps of one device of a running search, one checkpoint after another.

    Each device of a search has a recorder, in whichever process and on whichever machine; all write
    to the same store. A checkpoint adds the maps to those of the last one, in the store, and sets
    them back to nothing searched, which also keeps sums in float32 accurate. After a kill, the same
    program, with any number of devices, searches what is missing.

    Parameters
    ----------
    store
        Path or URL of the search; created if missing. It holds one search, or several exposures.
    name
        Name of the partial. If it is taken, as after a restart, a number is appended: ``gpu0.2``.
    maps
        Maps by name, as for :func:`~ocelot_em.write_partial`: NumPy, torch or CuPy, to which the
        search adds, and possibly its ``correlation_table``. They are set back in place.
    search
        Properties that all partials share.
    size
        Number of orientations of the whole search, and of cross-correlations for each. With a
        search space, by default as it says.
    every
        Time between two checkpoints: seconds, or text such as ``10min``.

    Raises
    ------
    InvalidInputError
        Listing all problems.

    Examples
    --------
    >>> import numpy as np
    >>> from ocelot_em import SearchInfo, SearchRecorder, SearchSpace
    >>> angles = np.float32([[0, 0, psi] for psi in range(0, 360, 15)])
    >>> info = SearchInfo(search_space=SearchSpace.from_tables(angles, [0], [0]))
    >>> maps = {name: np.zeros((64, 80), np.float32) for name in ("mip", "correlation_sum")}
    >>> maps["mip"][:] = -np.inf
    >>> maps["correlation_squared_sum"] = np.zeros((64, 80), np.float32)
    >>> maps["best_global_index"] = np.full((64, 80), -1, np.int32)
    >>> recorder = SearchRecorder("RECORDED.zarr", "gpu0", maps, search=info)
    >>> for start, stop in recorder.ranges([(0, 8), (8, 16), (16, 24)]):
    ...     for number in range(start, stop):  # the search, instead of this
    ...         scores = np.random.default_rng(number).normal(size=(64, 80)).astype(np.float32)
    ...         maps["best_global_index"][scores > maps["mip"]] = number
    ...         maps["mip"] = np.maximum(maps["mip"], scores, out=maps["mip"])
    ...         maps["correlation_sum"] += scores
    ...         maps["correlation_squared_sum"] += scores**2
    >>> recorder.finish()
    """

    def __init__(
        self,
        store: str | PathLike[str],
        name: str,
        maps: Mapping[str, Any],
        *,
        search: SearchInfo | None = None,
        size: SearchSize | None = None,
        every: str | float = "10min",
    ) -> None:
        info = search or SearchInfo(has_pixel_size=PIXEL_SIZE in maps)
        if size is None and info.search_space is not None:
            size = SearchSize.of(info.search_space)
        rows, problems = converted(maps, info, name, HostRows)
        shape = next((values.shape for values in rows.values()), ())
        if len(shape) != 2 or not all(shape):
            problems.append(f"{name}: expected maps (y, x), got shape {shape}")
        layouts = {key: (values.shape, values.dtype) for key, values in rows.items()}
        problems += layout_problems(layouts, shape, replace(info, float64_sums=True), name)
        if info.has_counts:
            problems.append(
                "has_counts: expected false, since a recorded search counts its ranges, got true; "
                "use write_partial at the end of the search"
            )
        if size is None:
            problems.append("size: expected a SearchSize, since there is no search space, got none")
        try:
            self._every = parse_seconds(every)
        except ValueError as error:
            problems.append(f"every: {error}")
        if problems or size is None:
            raise InvalidInputError(problems)
        self._maps = {key: maps[key] for key in info.maps.partial}
        self._rows, self._info, self._table = rows, info, maps.get(TABLE)
        self._partial = RecordedPartial(store, name, (shape[0], shape[1]), info, size, self._every)
        self._done = self._partial.searched_before()
        self._n_orientations = size.n_orientations
        self._pending: list[Range] = []
        self._given: Range | None = None
        self._has_failed = False
        self._last = time.monotonic()
        if warning := batch_warning(size.coverage):
            warnings.warn(warning, stacklevel=2)

    @property
    def name(self) -> str:
        """Name of the partial; known for good from the first checkpoint on."""
        return self._partial.name

    def ranges(self, next_range: Callable[[], Range | None] | Iterable[Range]) -> Iterator[Range]:
        """Iterate over what this device has to search, and write checkpoints in between.

        A range counts as searched when the next one is asked for. Orientations that are in the
        store already are left out.

        Parameters
        ----------
        next_range
            Returns the first orientation of the next range and the one after its last, or None at
            the end; or all ranges in advance. Each device must have ranges of its own.

        Raises
        ------
        InvalidInputError
            A range has orientations that the search has not.
        """
        given = iter(next_range, None) if callable(next_range) else iter(next_range)
        for start, stop in given:
            if not 0 <= start <= stop <= self._n_orientations:
                raise InvalidInputError(
                    f"{self.name}: expected ranges within 0 to {self._n_orientations}, which the "
                    f"search has, got {start} to {stop}"
                )
            missing = sets.minus(((int(start), int(stop)),), self._done)
            for piece in sets.minus(missing, sets.union(self._pending)):
                self._given = piece
                yield piece
                self._given = None
                self._pending.append(piece)
                self._write_when_due()

    def _write_when_due(self) -> None:
        """Write a checkpoint if the time between two has passed."""
        if time.monotonic() - self._last >= self._every:
            self.write()

    def write(self) -> None:
        """Write a checkpoint of what has been searched since the last one, if there is anything.

        Raises
        ------
        InvalidDataError
            The maps have values that no search produces.
        IncompleteError
            Another process has recorded the same orientations meanwhile; or it is not known what
            the maps contain, because a range was begun, or an earlier checkpoint failed.
        """
        self._last = time.monotonic()
        if self._has_failed:
            raise IncompleteError(
                f"{self.name}: an earlier checkpoint failed, and its maps may have been recorded; "
                "run the search again, which searches only what is missing"
            )
        if self._given is not None:
            raise IncompleteError(
                f"{self.name}: expected maps of whole ranges, got a checkpoint in the middle of "
                f"orientations {self._given[0]:,} to {self._given[1]:,}; let the iterator over "
                "ranges ask for the next one first, and end it by None"
            )
        if not self._pending:
            return
        ranges, partial = sets.union(self._pending), self._partial
        synchronize(self._maps[MIP])
        (before, rows), slot = partial.last(), partial.begin()
        (height, width), edge = partial.grid.shape, partial.grid.cell[0]
        for top in range(0, height, edge):
            band = Region(top, min(top + edge, height), 0, width)
            for key, values in self._folded(band, before).items():
                slot.maps[key].write(band, values)
        if self._table is not None:
            slot = slot.with_table(self._joined(rows))
        self._has_failed = True
        self._done = partial.publish(slot, ranges)
        self._pending.clear()
        for key, values in self._maps.items():
            fill(values, _EMPTY.get(key, 0))
        if self._table is not None:
            for key in self._table.keys() - {THRESHOLD}:
                self._table[key] = self._table[key][:0]
        synchronize(self._maps[MIP])
        self._has_failed = False
        seconds = time.monotonic() - self._last
        log.info("%s: checkpoint written in %s", self.name, seconds_text(seconds))

    def _folded(self, band: Region, before: Mapping[str, ChunkedMap]) -> dict[str, AnyArray]:
        """Merge a band of the last checkpoint with what was searched since."""
        new = {key: on_host(rows[band.slices[0]]) for key, rows in self._rows.items()}
        if problems := value_problems(new, band, self._info, self.name):
            raise InvalidDataError(problems)
        old = {key: chunked.read(band)[0] for key, chunked in before.items()}
        return _merged(old, new, self._info.search_space) if old else new

    def _joined(self, rows: StoredTable | None) -> CorrelationTable:
        """Join the rows of the last checkpoint with those since."""
        tables = [{TABLE: self._table}] if rows is None else [_rows_of(rows), {TABLE: self._table}]
        table = CorrelationTable.of(merge_tables(tables)[TABLE], self.name)
        shape, space = self._partial.grid.shape, self._info.search_space
        if problems := table_problems(table, shape, space, self.name):
            raise InvalidDataError(problems)
        return table

    def finish(self) -> None:
        """Write what has not been written yet, and complete the partial."""
        self.write()
        self._partial.complete()


def read_recorded(
    store: str | PathLike[str], exposure: str = ""
) -> tuple[SearchProgress | None, dict[str, Any]]:
    """Merge all partials of a recorded search, or of its exposure, in memory, also their tables.

    Also return the progress of the search; None, and no maps, if nothing was recorded.
    """
    objects = open_objects(store)
    attributes = read_attributes(objects)
    space = read_search_space(objects, attributes.search_space_digest)
    partials = read_partials(objects, exposure)
    whole, tables = dict[str, AnyArray](), list[dict[str, Any]]()
    for name, partial in partials:
        if not partial.is_readable:
            continue
        group = open_partial(objects, name, exposure, partial)
        if partial.has_counts:
            raise InvalidInputError(
                f"{group.place}: expected one count for all pixels, got a map of counts; merge the "
                "search with ocelot merge"
            )
        maps, rows = group.open(attributes.maps.partial), open_table(group)
        tables += [_rows_of(rows)] if rows is not None else []
        grid = maps[MIP].grid
        wanted = whole or {key: np.empty(grid.shape, m.dtype) for key, m in maps.items()}
        for cell in grid:
            new = {key: chunked.read(cell.region)[0] for key, chunked in maps.items()}
            if whole:
                old = {key: values[cell.region.slices] for key, values in whole.items()}
                new = _merged({key: on_host(values) for key, values in old.items()}, new, space)
            for key, values in new.items():
                wanted[key][cell.region.slices] = values
        whole = wanted
    return progress_of_partials(partials), {**whole, **merge_tables(tables)}


def _rows_of(table: StoredTable) -> dict[str, Any]:
    """Read all rows of a table, as a result of a device has them."""
    blocks = list(table.blocks(Region.whole(table.grid.shape)))
    columns = {
        name: np.concatenate([np.empty(0, dtype), *(block[name] for block in blocks)])
        for name, dtype in COLUMNS.items()
    }
    return {TABLE: {**columns, THRESHOLD: table.threshold}}


def _merged(
    old: Mapping[str, AnyArray], new: Mapping[str, AnyArray], space: SearchSpace | None
) -> dict[str, AnyArray]:
    """Merge maps of one shape; the old ones win ties of explicit poses, and give the dtypes."""
    merged = {key: np.empty(values.shape, values.dtype) for key, values in old.items()}
    # The compiled kernels would be compiled in the process of every device.
    processor = Processor(load("reference"), np.empty, on_host, BAND_PIXELS)
    fold_bands([old, new], merged, processor, [None, None], space)
    return merged
