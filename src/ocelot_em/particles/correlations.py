"""Correlation tables of all partials, joined with the mean and deviation of the merged result."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike

import numpy as np

from ocelot_em.errors import IncompleteError, InvalidInputError
from ocelot_em.merge.plan import PlannedExposure
from ocelot_em.merge.result import MergedResult
from ocelot_em.model.correlations import VALUE
from ocelot_em.model.maps import MEAN, SCALED_MIP, SECOND_ZSCORE, STD, AnyArray, Int64
from ocelot_em.model.regions import Region
from ocelot_em.particles.areas import Area
from ocelot_em.particles.gaussian import gaussian_cutoff
from ocelot_em.particles.micrographs import plain_name, store_name
from ocelot_em.particles.population import populations_of
from ocelot_em.particles.scanning import own_regions
from ocelot_em.particles.table import DIFFERENCE, EXPOSURE, GROUP, MICROGRAPH
from ocelot_em.store.correlations import POSE, StoredTable, X, Y, open_table
from ocelot_em.store.objects import normalise_url, open_objects
from ocelot_em.store.search import read_partial_at
from ocelot_em.store.sources import Source, check_unchanged, open_source

POSE_COLUMNS = "phi", "theta", "psi", "relative_defocus", "pixel_size_offset"

COLUMNS = {
    MICROGRAPH: "str",
    "pos_y": "int32",
    "pos_x": "int32",
    "correlation": "float32",
    "zscore": "float32",
    **dict.fromkeys(POSE_COLUMNS, "float32"),
    "global_index": "int32",
    MEAN: "float32",
    STD: "float32",
    "partial": "int32",
}
"""Columns of the rows and their dtypes, before those of exposures or groups."""


@dataclass(frozen=True)
class _Limits:
    """The tables of an exposure, by partial, and what its rows must exceed or reach.

    A partial that searched nothing may have no table.
    """

    exposure: PlannedExposure
    tables: Sequence[StoredTable | None]
    threshold: float
    cutoff: float


class Correlations:
    """What :func:`read_correlations` reads, with the thresholds and cutoffs that apply."""

    def __init__(
        self,
        place: str | PathLike[str] | MergedResult,
        cutoff: float | None = None,
        exposure: str | None = None,
        *,
        false_positives: float = 1.0,
        search: str | PathLike[str] | None = None,
        area: Area | None = None,
    ):
        self.result = result = MergedResult.open(place)
        known = {own.id: number for number, own in enumerate(result.plan.exposures) if own.id}
        if exposure is not None and exposure not in known:
            raise InvalidInputError(
                f"{result.url}: exposure: expected one of {', '.join([*known][:20]) or 'none'}, "
                f"got {exposure!r}"
            )
        numbers = range(len(result.plan.exposures)) if exposure is None else [known[exposure]]
        planned: dict[int, Sequence[Source]]
        planned = {k: result.plan.exposures[k].sources for k in numbers}
        if search is not None:
            planned = {k: _moved(own, search, result.url) for k, own in planned.items()}
        sources = {k: [*_partials_of(own)] for k, own in planned.items()}
        tables = {k: [(source, _open(source)) for source in own] for k, own in sources.items()}
        opened = [pair for own in tables.values() for pair in own if pair[0].total_projections]
        if missing := [source.place for source, table in opened if table is None]:
            raise IncompleteError(
                f"{result.url}: {len(missing)} of {len(opened)} partials have no correlation "
                f"table: {', '.join(missing[:20])}; search them again with one"
            )
        rate, self._area = false_positives, area
        self._populations = populations_of(result, area)
        self.limits = {
            k: self._limits(k, [table for _, table in own], cutoff, rate)
            for k, own in tables.items()
        }
        """By position of the exposure in the plan."""
        self.threshold = min(own.threshold for own in self.limits.values())
        self.cutoff = min(own.cutoff for own in self.limits.values())
        self.n_kept = 0
        """Number of rows that were read and kept."""
        self.micrograph = plain_name(store_name(result.url))
        """Name of the micrograph, which may be set."""

    @property
    def has_groups(self) -> bool:
        """Whether the search has groups."""
        return self.result.plan.group_by is not None

    def _limits(
        self,
        k: int,
        tables: Sequence[StoredTable | None],
        cutoff: float | None,
        false_positives: float,
    ) -> _Limits:
        exposure = self.result.plan.exposures[k]
        if cutoff is None:
            # Noise of every group may be in the table.
            own = self._populations if self.has_groups else [self._populations[k]]
            n = sum(one.correlations for one in own)
            # Where nothing counts, there are no rows.
            cutoff = gaussian_cutoff(n, 1, false_positives) if n else np.inf
        threshold = max((own.threshold for own in tables if own is not None), default=-np.inf)
        return _Limits(exposure, tables, threshold, cutoff)

    @property
    def columns(self) -> dict[str, str]:
        """Columns of the rows, and their dtypes."""
        return COLUMNS | self.part_columns

    @property
    def part_columns(self) -> dict[str, str]:
        """Columns of exposures or groups, which :meth:`parts_of` returns."""
        if self.has_groups:
            return {GROUP: "str", SECOND_ZSCORE: "float32", DIFFERENCE: "float32"}
        return {EXPOSURE: "str"} if self.result.plan.has_parts else {}

    @property
    def facts(self) -> dict[str, object]:
        """Thresholds and cutoffs, and what the search lacked, if anything."""
        facts: dict[str, object] = {"threshold": self.threshold, "cutoff": self.cutoff}
        if self.result.plan.has_parts:
            limits, name = self.limits.values(), f"{self.result.plan.part}s"
            facts[name] = {
                own.exposure.id: (own.threshold, own.cutoff)
                for own in limits
                if own.cutoff < np.inf
            }
        texts = {"area": self.area_text, "incomplete_search": self.result.incomplete_text}
        return facts | {name: text for name, text in texts.items() if text}

    @property
    def area_text(self) -> str:
        """Where rows were read, if not everywhere."""
        return "" if self._area is None else self._area.text

    @property
    def n_rows(self) -> int:
        """Number of rows of all tables, before anything is left out."""
        tables = [table for limits in self.limits.values() for table in limits.tables]
        return sum(table.n_rows for table in tables if table is not None)

    def __iter__(self) -> Iterator[dict[str, AnyArray]]:
        for position, rows in self.of_exposures():
            n = len(rows["pos_y"])
            parts = self.parts_of(np.full(n, position), rows["zscore"], rows.get(SECOND_ZSCORE))
            yield {MICROGRAPH: np.full(n, self.micrograph)} | rows | parts

    def parts_of(
        self, positions: Int64, z: AnyArray, second: AnyArray | None
    ) -> dict[str, AnyArray]:
        """Return the columns of rows of exposures or groups, by their positions in the limits."""
        names = np.array([own.exposure.id for own in self.limits.values()])
        found = dict(zip(self.part_columns, [names[positions]], strict=False))
        return found if second is None else found | {SECOND_ZSCORE: second, DIFFERENCE: z - second}

    def of_exposures(self) -> Iterator[tuple[int, dict[str, AnyArray]]]:
        """Yield blocks of rows, each with the position of its exposure in :attr:`limits`."""
        self.n_kept = 0
        for position, (k, limits) in enumerate(self.limits.items()):
            for region, own in own_regions(self.result, k, MEAN, STD):
                maps = {MEAN: own[MEAN], STD: own[STD]}
                if self.has_groups:
                    maps[SECOND_ZSCORE] = self._best_of_others(region, limits.exposure)
                for number, table in enumerate(limits.tables):
                    for block in table.blocks(region) if table is not None else ():
                        rows = self._joined(block, region, maps, limits)
                        if n := len(rows["pos_y"]):
                            self.n_kept += n
                            yield position, rows | {"partial": np.full(n, number, np.int32)}

    def _best_of_others(self, region: Region, group: PlannedExposure) -> AnyArray:
        """Return the highest z-score of the other groups, NaN where there is none."""
        names = self.result.source, SECOND_ZSCORE, SCALED_MIP
        numbers, second, best = (self.result.read(region, name) for name in names)
        return np.where(numbers == group.number, second, best)

    def _joined(
        self,
        block: dict[str, AnyArray],
        region: Region,
        maps: Mapping[str, AnyArray],
        limits: _Limits,
    ) -> dict[str, AnyArray]:
        """Return the rows at or above the cutoff, with their z-scores and poses."""
        pixels = block[Y] - region.y0, block[X] - region.x0
        mean, std = maps[MEAN][pixels], maps[STD][pixels]
        with np.errstate(invalid="ignore", divide="ignore"):
            z = (block[VALUE].astype(np.float64) - mean) / std
        z = np.where(std == 0, 0, z).astype(np.float32)
        kept = (z >= limits.cutoff) & (block[VALUE] > limits.threshold)
        if self._area is not None:
            kept &= self._area.allowed(limits.exposure, region)[pixels]
        found = {
            "pos_y": block[Y],
            "pos_x": block[X],
            "correlation": block[VALUE],
            "zscore": z,
            "global_index": block[POSE],
            **{name: values[pixels] for name, values in maps.items()},
        }
        found = {name: values[kept] for name, values in found.items()}
        index = found["global_index"]
        poses = self.result.decode(index, np.full(len(index), limits.exposure.number))
        return found | dict(zip(POSE_COLUMNS, poses, strict=True))


def read_correlations(
    store: str | PathLike[str] | MergedResult,
    *,
    cutoff: float | None = None,
    exposure: str | None = None,
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
        Minimum z-score. Default: the one that Gaussian noise exceeds once in the whole search of
        the exposure, or of all groups together.
    exposure
        Id of the only exposure of a montage, or name of the only group, to read. Default: all, one
        after another.

    Returns
    -------
    iterator of dict
        Columns by name: ``micrograph``, the name of the store; ``pos_y``, ``pos_x``,
        ``correlation``, ``zscore``, pose, ``global_index``, ``correlation_mean``,
        ``correlation_std``, and ``partial``, the number of the device. Rows are grouped by chunk of
        the maps, then by device, then as the device found them. Those of pixels that are not valid
        are left out.

        Rows of a montage have also ``exposure``, its id; position and ``partial`` are of that
        exposure, and windows of it take the place of chunks. All its rows are there, also those of
        pixels where the montage shows another exposure, so that a particle in an overlap is in the
        tables of both. There, maps are merged again from the partials.

        Likewise, rows of groups have ``group``, its name, ``second_zscore``, the highest z-score of
        the other groups at the pixel, and ``zscore_difference``. All rows of each group are there.

    Raises
    ------
    StoreNotFoundError, FormatError, InputChangedError
        The merged result or its partials are not there, or are other ones.
    IncompleteError
        Partials without a table, by name.
    InvalidInputError
        The exposure is not one of the result's.

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
    return iter(Correlations(store, cutoff, exposure))


def _moved(sources: Sequence[Source], search: str | PathLike[str], place: str) -> Sequence[Source]:
    """Return partials of one search at the place where it is now."""
    if len(urls := sorted({source.url for source in sources})) > 1:
        raise InvalidInputError(
            f"{place}: search: expected the partials of one search, got those of "
            f"{', '.join(urls)}; move them back"
        )
    return [source.model_copy(update={"url": normalise_url(search)}) for source in sources]


def _partials_of(sources: Sequence[Source]) -> Iterator[Source]:
    """Yield partials, also those of earlier results that were merged again."""
    for source in sources:
        if source.path:
            yield source
        else:
            check_unchanged(source)
            earlier = MergedResult.open(source.url)  # never a montage
            yield from _partials_of(earlier.plan.exposures[0].sources)


def _open(source: Source) -> StoredTable | None:
    check_unchanged(source)
    found = read_partial_at(open_objects(source.url), source.path)
    threshold = found.correlation_threshold
    return open_table(replace(open_source(source), correlation_threshold=threshold))
