"""Correlation tables of partials: columns of rows that are sorted by the chunk of their pixel.

All rows of a chunk lie together, so that tables of many partials are joined with merged maps chunk
by chunk, whatever their size.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from ocelot_em.errors import FormatError
from ocelot_em.model.correlations import TABLE, VALUE, CorrelationTable
from ocelot_em.model.maps import MIP, AnyArray, Int64
from ocelot_em.model.regions import Region, TileGrid
from ocelot_em.model.search_space import SearchSpace
from ocelot_em.store import groups
from ocelot_em.store.arrays import ArrayLayout, ChunkedMap, create_array, open_map
from ocelot_em.store.contract import Objects, join
from ocelot_em.store.manifest import ArrayManifest, new_checksums
from ocelot_em.store.search import MapGroup

Y, X, POSE = "pos_y", "pos_x", "global_idx"

COLUMNS = {POSE: "int32", Y: "int32", X: "int32", VALUE: "float32"}
"""Stored columns; other columns of a device are not stored."""

_OFFSETS = "offsets"
"""Array with the first row of each chunk of the maps, row by row, and the number of rows."""

_DIMENSION = ("row",)

ROWS_PER_CHUNK = 2**18
"""Rows of a chunk of a column: 1 MiB decoded."""


def table_problems(
    table: CorrelationTable, shape: tuple[int, int], space: SearchSpace | None, place: str
) -> list[str]:
    """Problems of a device's table with the maps and search space that it belongs to."""
    place = f"{place}: {TABLE}"
    if space is None:
        return [
            f"{place}: expected a search space, to which its {POSE} refers, got none; give it, or "
            "leave the table out"
        ]
    if missing := sorted(COLUMNS.keys() - table.columns.keys()):
        return [f"{place}: expected columns {', '.join(COLUMNS)}, without {', '.join(missing)}"]
    if not np.isfinite(table.threshold):
        return [f"{place}: expected a finite threshold, got {table.threshold}"]
    problems = []
    for name, end in ((POSE, space.n_poses), (Y, shape[0]), (X, shape[1])):
        values = table.columns[name]
        if len(values) and (values.dtype.kind not in "iu"):
            problems.append(f"{place}: {name}: expected integers, got {values.dtype}")
        elif len(values) and not 0 <= values.min() <= values.max() < end:
            got = f"{values.min()} to {values.max()}"
            problems.append(f"{place}: {name}: expected 0 to {end - 1}, got {got}")
    values = table.columns[VALUE]
    bad = ~((values > table.threshold) & np.isfinite(values))
    if bad.any():
        problems.append(
            f"{place}: {VALUE}: expected finite values above the threshold {table.threshold}, got "
            f"{values[bad][0]} in row {int(bad.argmax())}"
        )
    return problems


def write_table(
    group: MapGroup, table: CorrelationTable, grid: TileGrid
) -> dict[str, ArrayManifest]:
    """Write a table, which has no problems, to a partial; return what its manifest states.

    ``grid`` has the chunks of the partial's maps.
    """
    order, counts = _by_cell(table, grid)
    groups.replace_attributes(group.objects, group.path_of(TABLE), {})
    offsets = np.concatenate([[0], np.cumsum(counts)])
    written = {_OFFSETS: _write_column(group, _OFFSETS, "int64", offsets, np.arange(len(offsets)))}
    for name, dtype in COLUMNS.items() if len(order) else ():
        written[name] = _write_column(group, name, dtype, table.columns[name], order)
    return {f"{TABLE}/{name}": array for name, array in written.items()}


def _by_cell(table: CorrelationTable, grid: TileGrid) -> tuple[AnyArray, Int64]:
    """Return the rows in the order of their cells of a grid, and the number in each.

    Rows of one cell stay in their order. They are counted, then placed, in blocks: beside the
    table, memory is that of the returned rows.
    """
    n = len(table.columns[VALUE])

    def blocks() -> Iterator[tuple[int, Int64]]:
        for start in range(0, n, ROWS_PER_CHUNK):
            rows = slice(start, start + ROWS_PER_CHUNK)
            y, x = (table.columns[name][rows].astype(np.int64) for name in (Y, X))
            yield start, y // grid.cell[0] * grid.counts[1] + x // grid.cell[1]

    counts = np.zeros(len(grid), np.int64)
    for _, cells in blocks():
        counts += np.bincount(cells, minlength=len(grid))
    order, following = np.empty(n, np.min_scalar_type(n)), np.cumsum(counts) - counts
    for start, cells in blocks():
        own = np.bincount(cells, minlength=len(grid))
        rows = np.argsort(cells, kind="stable")
        into = np.arange(len(rows)) + np.repeat(following - (np.cumsum(own) - own), own)
        order[into] = start + rows
        following += own
    return order, counts


def _write_column(
    group: MapGroup, name: str, dtype: str, values: AnyArray, rows: AnyArray
) -> ArrayManifest:
    """Write these rows of values, one chunk after another."""
    n, path = len(rows), group.path_of(f"{TABLE}/{name}")
    chunk = min(n, ROWS_PER_CHUNK)
    layout = ArrayLayout((n,), (chunk,), dtype, np.nan if dtype == "float32" else -1, _DIMENSION)
    checksums = new_checksums(TileGrid((n, 1), (chunk, 1)))
    described = ArrayManifest(create_array(group.objects, path, layout), checksums)
    column = _open_column(group, name, dtype, described)
    for cell in column.grid:
        here = slice(cell.region.y0, cell.region.y1)
        column.write(cell.region, values[rows[here]].astype(dtype)[:, np.newaxis])
    return described


def _open_column(group: MapGroup, name: str, dtype: str, expected: ArrayManifest) -> ChunkedMap:
    path = f"{TABLE}/{name}"
    place = f"{group.place}: {path}"
    return open_map(group.objects, group.path_of(path), place, (dtype,), expected, _DIMENSION)


def n_rows(objects: Objects, path: str) -> int:
    """Return the number of rows of the table of a partial, from its metadata."""
    column = join(path, TABLE, VALUE)
    if objects.size(f"{column}/zarr.json") is None:  # of a table without rows
        return 0
    return open_map(objects, column, column, (COLUMNS[VALUE],), None, _DIMENSION).shape[0]


@dataclass(frozen=True)
class StoredTable:
    """The table of a partial.

    Parameters
    ----------
    place
        Name of store and partial in errors.
    threshold
        All correlations of the partial above it are rows.
    columns
        Columns by name; empty without rows.
    offsets
        First row of each cell of the grid, and the number of rows.
    grid
        Chunks of the partial's maps.
    """

    place: str
    threshold: float
    columns: Mapping[str, ChunkedMap]
    offsets: Int64
    grid: TileGrid

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return int(self.offsets[-1])

    def blocks(self, region: Region) -> Iterator[dict[str, AnyArray]]:
        """Read the rows of the pixels of a region, at most :data:`ROWS_PER_CHUNK` at a time."""
        for cell in self.grid.touching(region):
            for block in self._of_cell(cell.iy * self.grid.counts[1] + cell.ix):
                y, x = block[Y], block[X]
                inside = (y >= region.y0) & (y < region.y1) & (x >= region.x0) & (x < region.x1)
                yield {name: values[inside] for name, values in block.items()}

    def _of_cell(self, number: int) -> Iterator[dict[str, AnyArray]]:
        start, end = self.offsets[number : number + 2].tolist()
        while start < end:
            size = self.columns[VALUE].grid.cell[0]
            stop = min(end, (start // size + 1) * size)
            rows = Region(start, stop, 0, 1)
            yield {name: column.read(rows)[0][:, 0] for name, column in self.columns.items()}
            start = stop

    def problems(self, space: SearchSpace | None) -> Iterator[str]:
        """Read everything, and describe what is wrong."""
        for cell in self.grid:
            inside = cell.region
            for block in self._of_cell(cell.iy * self.grid.counts[1] + cell.ix):
                table = CorrelationTable(self.threshold, block)
                yield from table_problems(table, self.grid.shape, space, self.place)
                y, x = block[Y], block[X]
                here = Region(int(y.min()), int(y.max()) + 1, int(x.min()), int(x.max()) + 1)
                if here.intersect(inside) != here:
                    yield f"{self.place}: {TABLE}: expected rows of pixels {inside}, got {here}"


def open_table(group: MapGroup) -> StoredTable | None:
    """Open the table of a partial; None if it has none.

    Raises
    ------
    FormatError
    """
    if (threshold := group.correlation_threshold) is None:
        return None
    grid = group.open((MIP,))[MIP].grid
    arrays = group.manifest.arrays if group.manifest is not None else {}
    expected = {name: arrays.get(f"{TABLE}/{name}") for name in (_OFFSETS, *COLUMNS)}
    place, found = f"{group.place}: {TABLE}", expected[_OFFSETS]
    if found is None:
        raise FormatError(f"{place}: expected it in the manifest, it is not there")
    column, offsets = _open_column(group, _OFFSETS, "int64", found), np.zeros(0, np.int64)
    if column.shape[0] == len(grid) + 1:  # or it may be of any size
        offsets = column.read(Region.whole(column.shape))[0][:, 0]
    if not len(offsets) or offsets[0] != 0 or (np.diff(offsets) < 0).any():
        raise FormatError(f"{place}: expected ascending offsets of {len(grid)} chunks, from 0 on")
    n = int(offsets[-1])
    columns = {
        name: _open_column(group, name, dtype, array)
        for name, dtype in COLUMNS.items()
        if (array := expected[name]) is not None
    }
    if {*columns} != ({*COLUMNS} if n else set()) or len({c.grid for c in columns.values()}) > 1:
        raise FormatError(f"{place}: expected columns {', '.join(COLUMNS)} with the same chunks")
    if any(column.shape != (n, 1) for column in columns.values()):
        raise FormatError(f"{place}: expected {n} rows")
    return StoredTable(group.place, threshold, columns, offsets, grid)
