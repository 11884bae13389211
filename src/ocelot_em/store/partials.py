"""Write partials of a search, from several processes at the same time."""

import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from types import TracebackType
from typing import Any, Self, cast

import numpy as np
from pydantic import ValidationError

from ocelot_em.errors import (
    FormatError,
    IncompleteError,
    InvalidDataError,
    InvalidInputError,
    StorageError,
)
from ocelot_em.model.arrays import HostRows, as_numpy, exact_count
from ocelot_em.model.correlation_histogram import CorrelationHistogram
from ocelot_em.model.correlations import TABLE, CorrelationTable
from ocelot_em.model.maps import COUNT, MIP, PIXEL_SIZE, AnyArray
from ocelot_em.model.regions import Region, TileGrid
from ocelot_em.model.text import exposure_prefix
from ocelot_em.store import arrays as store
from ocelot_em.store import attributes as fmt
from ocelot_em.store import constants, groups
from ocelot_em.store.completion import complete_partial, publish_shards, restore
from ocelot_em.store.correlations import table_problems, write_table
from ocelot_em.store.creation import ensure_search, layout_differences, provenance, refresh_total
from ocelot_em.store.manifest import (
    ArrayManifest,
    Manifest,
    find_manifest,
    new_checksums,
)
from ocelot_em.store.metadata import problems_of
from ocelot_em.store.objects import open_objects
from ocelot_em.store.roster import register
from ocelot_em.store.search import (
    MapGroup,
    partial_path,
    read_partial_attributes,
)
from ocelot_em.store.search_info import SearchInfo
from ocelot_em.store.validation import (
    BadValues,
    converted,
    is_map_of_counts,
    layout_problems,
    name_problems,
    value_problems,
)


def write_partial(
    store: str | PathLike[str],
    name: str,
    result: Mapping[str, object],
    *,
    total_projections: "int | AnyArray",
    order: int = 0,
    search: SearchInfo | None = None,
) -> None:
    """Write the results of one device as a partial of a search.

    Several processes may write different partials of one search at the same time; the first one
    creates the search. If any input is invalid, nothing is written.

    Parameters
    ----------
    store
        Path or URL of the search; created if missing.
    name
        Name of the partial, unique in the search, or in its exposure: letters, digits, ``.``,
        ``_``, ``-``.
    result
        Maps by name (see :class:`MapSet`), each (y, x), NumPy, torch or CuPy; ``mip`` is -inf
        where nothing was searched. Poses are indexed if there is a search space, otherwise
        explicit. Sums keep their dtype, float32 or float64. Maps on a GPU are copied to the host
        one band of rows at a time, twice: for validation and for writing. A table of correlations
        above a threshold, ``correlation_table``, may be there, as Leopard-EM 1.3 has it, with
        ``global_idx``, ``pos_y``, ``pos_x``, ``corr_value`` and ``threshold``; and so may
        ``correlation_histogram``, with ``low``, ``width`` and ``counts``. Others are ignored.
    total_projections
        Exact number of cross-correlations in the sums: an integer, or a map (y, x) of integers of
        any type if it differs from pixel to pixel, 0 only where nothing was searched. If
        ``result`` has such a map, an integer that is an upper bound of it.
    order
        Partials are merged in ascending order, then by name; earlier ones win ties.
    search
        Properties that all partials share, and the exposure of a montage; by default explicit
        poses and all pixels valid.

    Raises
    ------
    InvalidInputError
        Listing all problems: maps that are missing or have unequal shapes or a wrong dtype, NaN,
        indices outside the search space, wrong counts, a name that is taken, a different search or
        exposure.

    Examples
    --------
    >>> import numpy as np
    >>> from ocelot_em import describe, write_partial
    >>> poses = ("best_phi", "best_theta", "best_psi", "best_defocus")
    >>> names = ("mip", *poses, "correlation_sum", "correlation_squared_sum")
    >>> result = {name: np.ones((64, 80), np.float32) for name in names}
    >>> write_partial("RUN.zarr", "gpu0", result, total_projections=20_500_000)
    >>> describe("RUN.zarr").attributes.total_projections
    20500000
    >>> counts = np.full((64, 80), 5_000_000)
    >>> write_partial("RUN.zarr", "gpu1", result, total_projections=counts)
    """
    info = search or SearchInfo()
    kept = "exposure", "chunk_files", "template_name", "has_counts"
    if info == SearchInfo(**{name: getattr(info, name) for name in kept}):  # the maps say it
        info = replace(info, has_pixel_size=PIXEL_SIZE in result)
    is_map = is_map_of_counts(total_projections)
    counts = total_projections if is_map else result.get(COUNT)
    if is_map_of_counts(counts):
        result, info = {**result, COUNT: counts}, replace(info, has_counts=True)
    maps, problems = converted(result, info, name, HostRows)
    wide = any(rows.dtype.name == "float64" for key, rows in maps.items() if key != MIP)
    info = replace(info, float64_sums=info.float64_sums or wide)
    given_shape = next((rows.shape for rows in maps.values()), ())
    if len(given_shape) != 2:
        raise InvalidInputError(
            [*problems, f"{name}: expected maps (y, x), got shape {given_shape}"]
        )
    shape = given_shape[0], given_shape[1]
    bands = [band.region for band in TileGrid(shape, (constants.DEFAULT_CHUNK, max(shape[1], 1)))]

    def on_host(band: Region) -> dict[str, AnyArray]:
        return {key: rows[band.slices[0]] for key, rows in maps.items()}

    total = _highest(maps.get(COUNT), bands) if is_map else total_projections
    histogram, table = CorrelationHistogram.of(result, name), None
    if TABLE in result:
        try:
            table = CorrelationTable.of(result[TABLE], f"{name}: {TABLE}")
            problems += table_problems(table, shape, info.search_space, name)
        except InvalidInputError as error:
            problems += error.problems
    partial, refused = None, InvalidInputError(())
    try:
        partial = PartialWriter(
            store, name, shape, total_projections=cast(int, total), order=order, search=info
        )
    except InvalidInputError as error:
        refused = error
    if wrong_layout := layout_problems(_layouts(maps), shape, info, name):
        problems += wrong_layout
    else:
        found = BadValues(name, info.search_space, partial.total_projections if partial else None)
        for band in bands:
            found.look(on_host(band), (band.y0, band.x0))
        problems += found.problems()
    if partial is None:
        raise InvalidInputError([*problems, *refused.problems])
    if problems:
        raise InvalidDataError(problems)
    with partial as writer:
        for band in bands:
            writer.write(band, on_host(band), validated=True)
        if table is not None:
            writer.write_correlations(table, validated=True)
        if histogram is not None:
            writer.write_histogram(histogram)


def _highest(counts: HostRows | None, bands: Sequence[Region]) -> int:
    """Return the highest count of a map; 0 if it cannot be one, which is reported elsewhere."""
    if counts is None or counts.dtype.kind not in "iu":
        return 0
    return max((int(counts[band.slices[0]].max(initial=0)) for band in bands), default=0)


def _layouts(
    maps: Mapping[str, AnyArray] | Mapping[str, HostRows],
) -> dict[str, tuple[tuple[int, ...], "np.dtype[Any]"]]:
    return {key: (values.shape, values.dtype) for key, values in maps.items()}


class PartialWriter:
    """Writes a partial region by region, for maps larger than memory.

    A context manager: a normal exit checks that every pixel was written and marks the partial
    complete. After an exception the partial stays incomplete and cannot be merged, but may be
    written again under the same name.

    Parameters
    ----------
    store, name, order, search
        As for :func:`write_partial`.
    shape
        Height and width of the maps in pixels.
    total_projections
        Exact number of cross-correlations in the sums; an upper bound of the map of counts, if
        ``search`` states that there is one.

    Raises
    ------
    InvalidInputError
        Listing all problems.

    Examples
    --------
    >>> import numpy as np
    >>> from ocelot_em import PartialWriter, Region
    >>> poses = ("best_phi", "best_theta", "best_psi", "best_defocus", "best_pixel_size")
    >>> names = ("mip", *poses, "correlation_sum", "correlation_squared_sum")
    >>> with PartialWriter("RUN.zarr", "gpu0", (2000, 1000), total_projections=500) as writer:
    ...     for top in range(0, 2000, writer.chunk[0]):
    ...         rows = Region(top, min(top + writer.chunk[0], 2000), 0, 1000)
    ...         writer.write(rows, {name: np.ones(rows.shape, np.float32) for name in names})
    """

    def __init__(
        self,
        store: str | PathLike[str],
        name: str,
        shape: tuple[int, int],
        *,
        total_projections: int,
        order: int = 0,
        search: SearchInfo | None = None,
    ) -> None:
        self.name, self.shape = name, shape
        self.chunk = self.chunk_of(shape)
        self._info = search or SearchInfo()
        self._exposure_id = self._info.exposure_id
        self._path = partial_path(name, self._exposure_id)
        self._objects = open_objects(store)
        self._written: set[tuple[int, int]] = set()
        self._in_batch = False
        problems, self.total_projections = [], 0
        try:
            self.total_projections = exact_count(total_projections)
        except ValueError as error:
            problems.append(f"{name}: total_projections: {error}")
        try:
            self._record = fmt.PartialAttributes(
                id=uuid.uuid4().hex,
                order=order,
                total_projections=self.total_projections,
                has_counts=self._info.has_counts,
                state="writing",
                provenance=provenance(inputs=(), options={}),
            )
        except ValidationError as error:
            problems += [f"{name}: {problem}" for problem in problems_of(error)]
        wrong_names = name_problems(name)
        if self._info.exposure is not None:
            wrong_names += name_problems(self._exposure_id, "exposure id")
        problems += wrong_names or self._taken_problems()
        if not wrong_names:
            try:
                problems += layout_differences(self._objects, shape, self._info)
            except InvalidInputError as error:
                problems += error.problems
        if problems:
            raise InvalidInputError(problems)

    @staticmethod
    def chunk_of(shape: tuple[int, int]) -> tuple[int, int]:
        """Return the shape of the chunks of maps of a shape."""
        return min(constants.DEFAULT_CHUNK, shape[0]), min(constants.DEFAULT_CHUNK, shape[1])

    def describe(self, *, file: str, sha256: str) -> None:
        """Record the file that the partial comes from; call this before entering the writer."""
        self._change(provenance=provenance(inputs=(file,), input_sha256=sha256, options={}))

    def in_batch(self) -> None:
        """Leave the list of partials and the total to the caller, who writes many partials.

        The caller creates the search and registers all partials first, and refreshes the total last
        (:func:`ensure_search`, :func:`register`, :func:`refresh_total`): each of these reads what
        all other partials have written.
        """
        self._in_batch = True

    def _change(self, **changes: object) -> None:
        self._record = self._record.model_copy(update=changes)

    def __enter__(self) -> Self:
        ensure_search(self._objects, self.shape, self._info)
        objects, path = self._objects, self._path
        if not self._in_batch:
            register(objects, self._exposure_id, [self.name])
        if not groups.create_group(objects, path, fmt.dump_attributes(self._record)):
            if problems := self._taken_problems():
                raise InvalidInputError(problems)
            # The other writer may still live: its late chunks must not mix with these.
            self._change(folder=self._record.id[:12])
            groups.replace_attributes(objects, path, fmt.dump_attributes(self._record))
            if problems := self._taken_problems():  # completed meanwhile
                raise InvalidInputError(problems)
            groups.create_group(objects, f"{path}/{self._record.folder}", {})
        group = MapGroup(objects, path, self.name, self._record.folder)
        grid = TileGrid(self.shape, self.chunk)
        self._manifest, self._maps = create_arrays(group, self._info, grid, self._record.id)
        return self

    def write(self, region: Region, maps: Mapping[str, object], *, validated: bool = False) -> None:
        """Write all maps of one region, made of whole chunks of :attr:`chunk` pixels.

        Parameters
        ----------
        region
            The region.
        maps
            Maps by name, as for :func:`write_partial`.
        validated
            Whether the caller has already found no problem in these maps, which are then not
            validated again.

        Raises
        ------
        InvalidDataError
            Listing all problems of the maps; nothing of the region is written.
        ValueError
            The region is not made of whole chunks.
        """
        info, place = self._info, self.name
        arrays, problems = converted(maps, info, place, as_numpy)
        if not validated:
            problems += layout_problems(_layouts(arrays), region.shape, info, place) or (
                value_problems(arrays, region, info, place, self.total_projections)
            )
        if problems:
            raise InvalidDataError(problems)
        try:
            for key, chunked in self._maps.items():
                chunked.write(region, arrays[key])
        except StorageError:  # another writer that is done has deleted its folders
            self._require_own()
            raise
        grid = TileGrid(self.shape, self.chunk)
        self._written.update((chunk.iy, chunk.ix) for chunk in grid.touching(region))

    def write_histogram(self, histogram: CorrelationHistogram) -> None:
        """Write the histogram of all correlations."""
        self._change(correlation_histogram=histogram)

    def write_correlations(self, table: CorrelationTable, *, validated: bool = False) -> None:
        """Write the correlation table, once, with the maps.

        Raises
        ------
        InvalidDataError
            Listing all problems.
        """
        space = self._info.search_space
        if not validated and (problems := table_problems(table, self.shape, space, self.name)):
            raise InvalidDataError(problems)
        self._change(correlation_threshold=table.threshold)
        group = MapGroup(self._objects, self._path, self.name, self._record.folder)
        arrays = write_table(group, table, TileGrid(self.shape, self.chunk))
        self._manifest = replace(self._manifest, arrays={**self._manifest.arrays, **arrays})

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._complete()
        finally:
            for chunked in self._maps.values():
                if chunked.shards is not None:
                    chunked.shards.discard()

    def _complete(self) -> None:
        grid = TileGrid(self.shape, self.chunk)
        missing = [cell for cell in grid if (cell.iy, cell.ix) not in self._written]
        if missing:
            raise IncompleteError(
                f"{self._objects.url}: partial {self.name!r}: {len(missing)} of {len(grid)} chunks "
                f"were not written, the first at pixels {missing[0].region}; it stays incomplete"
            )
        objects, path = self._objects, self._path
        self._require_own()
        try:
            publish_shards(self._maps)
        except StorageError:  # another writer that is done has deleted them
            self._require_own()
            raise
        winner = complete_partial(objects, path, self._record, self._manifest)
        if winner.id != self._record.id:
            raise self._taken_over()
        if not self._in_batch:
            refresh_total(objects, self._exposure_id)
            objects.sync()

    def _require_own(self) -> None:
        found = read_partial_attributes(self._objects, self.name, self._exposure_id)
        if found.id != self._record.id:
            raise self._taken_over()

    def _own_children(self) -> Collection[str]:
        return [self._record.folder] if self._record.folder else [*self._maps, TABLE]

    def _taken_over(self) -> IncompleteError:
        """Delete what this writer has written, and return its error."""
        found = read_partial_attributes(self._objects, self.name, self._exposure_id)
        if found.folder != self._record.folder:
            for child in self._own_children():
                self._objects.delete(f"{self._path}/{child}")
        return IncompleteError(
            f"{self._objects.url}: partial {self.name!r} was taken over by another writer; give "
            "every writer a name of its own"
        )

    def _taken_problems(self) -> list[str]:
        written = find_manifest(self._objects, self._path)
        if written is not None:
            restore(self._objects, self._path, written)
        state = "complete" if written is not None else self._state_without_manifest()
        if state == "writing":
            return []
        of = exposure_prefix(self._exposure_id)
        return [
            f"{self._objects.url}: {of}a partial {self.name!r} is already there and {state}; "
            "choose another name, or leave it out"
        ]

    def _state_without_manifest(self) -> str:
        """State of a partial that version 1 or 2 has written, or that a search is recording."""
        try:
            found = read_partial_attributes(self._objects, self.name, self._exposure_id)
        except FormatError:  # there is none, or one that no writer has finished
            return "writing"
        # A complete one that has lost its manifest may be written again.
        return "writing" if found.state == "complete" and found.manifest else found.state


def create_arrays(
    group: MapGroup, info: SearchInfo, grid: TileGrid, owner: str
) -> tuple[Manifest, dict[str, store.ChunkedMap]]:
    """Create the arrays of a partial; return them, and the manifest that writing them fills.

    Maps of several chunks are in shards, where objects can grow: their one writer writes all.
    """
    per_shard, arrays = None, {}
    if group.objects.can_append and len(grid) > 1 and not info.chunk_files:
        edge = constants.SHARD_CHUNKS
        per_shard = min(edge, grid.counts[0]), min(edge, grid.counts[1])
    for key in info.maps.partial:
        place, dtype = group.path_of(key), info.stored_dtype(key)
        layout = store.map_layout(key, grid.shape, grid.cell, dtype)
        layout = replace(layout, per_shard=per_shard)
        metadata = store.create_array(group.objects, place, layout)
        arrays[key] = ArrayManifest(metadata, new_checksums(grid))
    manifest = Manifest(owner, arrays)
    return manifest, replace(group, manifest=manifest).open(info.maps.partial)
