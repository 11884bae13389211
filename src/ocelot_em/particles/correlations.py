"""Correlation tables of all partials, joined with the mean and deviation of the merged result."""

from collections.abc import Iterator
from dataclasses import replace
from os import PathLike

import numpy as np

from ocelot_em.errors import IncompleteError, InvalidInputError
from ocelot_em.merge.result import MergedResult
from ocelot_em.model.correlations import VALUE
from ocelot_em.model.maps import MEAN, STD, AnyArray
from ocelot_em.model.regions import Region
from ocelot_em.particles.gaussian import gaussian_cutoff
from ocelot_em.store.correlations import POSE, StoredTable, X, Y, open_table
from ocelot_em.store.objects import open_objects
from ocelot_em.store.search import read_partial_at
from ocelot_em.store.sources import Source, check_unchanged, open_source

_POSE = "phi", "theta", "psi", "relative_defocus", "pixel_size_offset"

COLUMNS = {
    "pos_y": "int32",
    "pos_x": "int32",
    "correlation": "float32",
    "zscore": "float32",
    **dict.fromkeys(_POSE, "float32"),
    "global_index": "int32",
    MEAN: "float32",
    STD: "float32",
    "partial": "int32",
}
"""Columns of the rows, and their dtypes."""


class Correlations:
    """What :func:`read_correlations` reads, with the threshold and the cutoff that apply."""

    def __init__(self, place: str | PathLike[str] | MergedResult, cutoff: float | None = None):
        self.result = result = MergedResult.open(place)
        if result.plan.is_montage:
            raise InvalidInputError(
                f"{result.url}: expected the result of one exposure, got a montage; search and "
                "merge each exposure in a store of its own to read correlation tables"
            )
        sources = list(_partials_of(result))
        tables = [(source, _open(source)) for source in sources]
        if missing := [source.place for source, table in tables if table is None]:
            raise IncompleteError(
                f"{result.url}: {len(missing)} of {len(sources)} partials have no correlation "
                f"table: {', '.join(missing[:20])}; search them again with one"
            )
        self._tables = [table for _, table in tables if table is not None]
        self.threshold = max(table.threshold for table in self._tables)
        if cutoff is None:
            counted = result.summary.attributes.searched_pixels
            cutoff = gaussian_cutoff(counted, result.attributes.total_projections)
        self.cutoff = cutoff
        self.n_kept = 0
        """Number of rows that were read and kept."""

    @property
    def n_rows(self) -> int:
        """Number of rows of all tables, before anything is left out."""
        return sum(table.n_rows for table in self._tables)

    def __iter__(self) -> Iterator[dict[str, AnyArray]]:
        self.n_kept = 0
        for region in self.result.regions():
            maps = {name: self.result.read(region, name) for name in (MEAN, STD)}
            for number, table in enumerate(self._tables):
                for block in table.blocks(region):
                    rows = self._joined(block, region, maps)
                    if n := len(rows["pos_y"]):
                        self.n_kept += n
                        yield rows | {"partial": np.full(n, number, np.int32)}

    def _joined(
        self, block: dict[str, AnyArray], region: Region, maps: dict[str, AnyArray]
    ) -> dict[str, AnyArray]:
        """Return the rows at or above the cutoff, with their z-scores and poses."""
        pixels = block[Y] - region.y0, block[X] - region.x0
        mean, std = maps[MEAN][pixels], maps[STD][pixels]
        with np.errstate(invalid="ignore", divide="ignore"):
            z = (block[VALUE].astype(np.float64) - mean) / std
        z = np.where(std == 0, 0, z).astype(np.float32)
        kept = (z >= self.cutoff) & (block[VALUE] > self.threshold)
        found = {
            "pos_y": block[Y],
            "pos_x": block[X],
            "correlation": block[VALUE],
            "zscore": z,
            "global_index": block[POSE],
            MEAN: mean,
            STD: std,
        }
        found = {name: values[kept] for name, values in found.items()}
        return found | dict(zip(_POSE, self.result.decode(found["global_index"]), strict=True))


def read_correlations(
    store: str | PathLike[str] | MergedResult, *, cutoff: float | None = None
) -> Iterator[dict[str, AnyArray]]:
    """Read all correlations of a search above its threshold and a z-score, in blocks.

    A map keeps the best pose of each pixel. The devices' correlation tables, as of Leopard-EM 1.3,
    also have the others. This reads the tables of all partials of a merged result, and computes
    z-scores with the mean and standard deviation of the whole search. Memory is that of one chunk
    of the maps and of 2**18 rows, whatever there is.

    Parameters
    ----------
    store
        Path or URL of a merged result, or an open one. Its partials must still be where they were.
    cutoff
        Minimum z-score. Default: the one that Gaussian noise exceeds once in the whole search.

    Returns
    -------
    iterator of dict
        Columns by name: ``pos_y``, ``pos_x``, ``correlation``, ``zscore``, pose, ``global_index``,
        ``correlation_mean``, ``correlation_std``, and ``partial``, the number of the device. Rows
        are grouped by chunk of the maps, then by device, then as the device found them. Those of
        pixels that are not valid are left out.

    Raises
    ------
    StoreNotFoundError, FormatError, InputChangedError
        The merged result or its partials are not there, or are other ones.
    IncompleteError
        Partials without a table, by name.
    InvalidInputError
        The result is a montage.

    Examples
    --------
    >>> import numpy as np
    >>> from ocelot_em import SearchInfo, SearchSpace, merge, read_correlations, write_partial
    >>> search = SearchInfo(search_space=SearchSpace.from_tables([[0, 0, 0], [0, 0, 90]], [0], [0]))
    >>> result = {
    ...     "mip": np.float32([[4, 9]]),
    ...     "best_global_index": np.int32([[0, 0]]),
    ...     "correlation_sum": np.float32([[0, 0]]),
    ...     "correlation_squared_sum": np.float32([[1000, 1000]]),
    ...     "correlation_table": {
    ...         "threshold": 5.5,
    ...         "global_idx": np.int32([0, 1]),
    ...         "pos_y": np.int32([0, 0]),
    ...         "pos_x": np.int32([1, 1]),
    ...         "corr_value": np.float32([9, 8]),
    ...     },
    ... }
    >>> write_partial("TABLES.zarr", "gpu0", result, total_projections=1000, search=search)
    >>> _ = merge("TABLES.zarr", "TABLES_MERGED.zarr")
    >>> for rows in read_correlations("TABLES_MERGED.zarr", cutoff=6):
    ...     print(rows["pos_x"], rows["psi"], rows["zscore"])
    [1 1] [ 0. 90.] [9. 8.]
    """
    return iter(Correlations(store, cutoff))


def _partials_of(result: MergedResult) -> Iterator[Source]:
    """Yield the partials of a result, through earlier results that were merged again."""
    for source in result.plan.exposures[0].sources:
        if source.path:
            yield source
        else:
            check_unchanged(source)
            yield from _partials_of(MergedResult.open(source.url))


def _open(source: Source) -> StoredTable | None:
    check_unchanged(source)
    found = read_partial_at(open_objects(source.url), source.path)
    threshold = found.correlation_threshold
    return open_table(replace(open_source(source), correlation_threshold=threshold))
