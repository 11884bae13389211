"""Detections: rows of correlation tables that no higher row nearby suppresses, out of core.

Rows above the cutoff are sorted by z-score in runs of a fixed size, which are kept in a temporary
file if there are several, and are merged. In that order, highest first, each is compared with the
detections around it. The result is that of all rows in one memory, whatever the chunks, the tiles
and the runs.
"""

import tempfile
from collections.abc import Iterator, Sequence
from functools import cached_property
from os import PathLike
from typing import IO, TYPE_CHECKING, Final, Unpack

import numpy as np
from numpy.typing import NDArray

from ocelot_em.merge.result import MergedResult
from ocelot_em.model.keywords import DetectionKeywords, takes
from ocelot_em.model.maps import SECOND_ZSCORE, AnyArray, Int64
from ocelot_em.model.pick_options import DetectionOptions
from ocelot_em.particles.areas import Area
from ocelot_em.particles.correlations import COLUMNS, POSE_COLUMNS, Correlations
from ocelot_em.particles.micrographs import plain_name
from ocelot_em.particles.peaks import Suppression
from ocelot_em.particles.symmetry import quaternions, symmetry_group
from ocelot_em.particles.table import MICROGRAPH, RANK

if TYPE_CHECKING:
    from pathlib import Path

    from ocelot_em.model.search_space import SearchSpace

DETECTION_COLUMNS: Final = {
    MICROGRAPH: "str",
    RANK: "int64",
    **{name: COLUMNS[name] for name in ("pos_y", "pos_x", "correlation", "zscore")},
    **{name: COLUMNS[name] for name in (*POSE_COLUMNS, "global_index", "partial")},
}
"""Columns of the detections and their dtypes, before those of exposures or groups."""

RUN_ROWS = 2**21
"""Maximum number of rows that are sorted at a time; sorting them takes 200 MB."""

_BLOCK_ROWS = 2**19
"""Number of rows of all runs together that are merged at a time."""

_ROW = np.dtype([("first", "u8"), ("second", "u8"), ("source", "i4"), ("correlation", "f4")])
"""A row as it is sorted: z-score, highest first, and y; x and index of the pose; who found it."""

_ROW_OF_GROUPS = np.dtype([*_ROW.descr, (SECOND_ZSCORE, "f4")])
"""The same, with the highest z-score of the other groups."""

_LOW: Final = np.uint64(0xFFFFFFFF)

Rows = NDArray[np.void]
"""Rows of :data:`_ROW`, or of :data:`_ROW_OF_GROUPS`."""


class Detections:
    """Detections of a merged result, from the correlation tables of its partials.

    Made by :func:`find_detections`. Iterating over it reads the tables and yields the detections in
    blocks, the highest z-score first; it can be repeated.
    """

    def __init__(
        self,
        correlations: Correlations,
        options: DetectionOptions,
        scratch: str | PathLike[str] | None = None,
    ) -> None:
        self.correlations, self.options, self._scratch = correlations, options, scratch
        self._limits = [*correlations.limits.values()]
        self._first_source = np.cumsum([0, *(len(own.tables) for own in self._limits)])
        heights = (own.exposure.shape[0] for own in self._limits)
        self._height = max(heights) + int(options.min_distance) + 2  # of a level
        plan = correlations.result.plan
        levels = plan.templates if plan.group_by else range(len(plan.exposures))
        self._levels = np.array([levels[k] for k in correlations.limits])
        """Number of the level of each exposure. Rows of different levels, which are exposures of a
        montage or templates, are too far apart to suppress each other."""
        self.n_found = 0
        """Number of detections that were found."""

    @property
    def columns(self) -> dict[str, str]:
        """Columns of the detections, and their dtypes."""
        return DETECTION_COLUMNS | self.correlations.part_columns

    @property
    def facts(self) -> dict[str, object]:
        """What describes the detections in a file."""
        own = self.options
        angle, distance = own.min_angle, own.min_distance
        options = {
            "min_distance_px": distance,
            "min_angle_degrees": angle,
            "symmetry": own.symmetry,
        }
        return self.correlations.facts | options

    def __iter__(self) -> Iterator[dict[str, AnyArray]]:
        self.n_found, suppression = 0, self._suppression()
        with tempfile.TemporaryFile(dir=self._scratch) as file:
            dtype = _ROW_OF_GROUPS if self.correlations.has_groups else _ROW
            for rows in _sorted(self._rows(dtype), file, dtype):
                found = rows[suppression.choose(self._placed(rows))]
                if len(found):
                    yield self._described(found)

    def to_parquet(self, path: str | PathLike[str], *, overwrite: bool = True) -> "Path":
        """Write the detections to a Parquet file, block by block, and return its path.

        Raises
        ------
        OutputExistsError
            The file exists, and ``overwrite`` is False.
        StorageError
            The file cannot be written.
        MissingDependencyError
            pyarrow is not installed.
        """
        from ocelot_em import write_parquet

        return write_parquet(self, path, overwrite=overwrite)

    def _rows(self, dtype: "np.dtype[np.void]") -> Iterator[Rows]:
        """Yield the rows at or above the cutoff, in the order of the tables."""
        for position, found in self.correlations.of_exposures():
            rows = np.empty(len(found["pos_y"]), dtype)
            rows["first"] = _descending(found["zscore"]) << 32 | found["pos_y"].astype("u8")
            rows["second"] = found["pos_x"].astype("u8") << 32 | found["global_index"].astype("u8")
            rows["source"] = found["partial"] + self._first_source[position]
            for name in dtype.names[3:] if dtype.names else ():
                rows[name] = found[name]
            yield rows

    def _suppression(self) -> Suppression:
        width = max(own.exposure.shape[1] for own in self._limits)
        area = self._height * (int(self._levels.max()) + 1) * width
        turns = [quaternions(*space.euler_angles.T) for space in dict.fromkeys(self._spaces)]
        limits = self.options.min_distance, self.options.min_angle
        group = symmetry_group(self.options.symmetry).as_quat()
        return Suppression(np.concatenate(turns), limits, area, group)

    @cached_property
    def _spaces(self) -> "list[SearchSpace]":
        """The search space of each exposure, which only groups may have of their own."""
        spaces = self.correlations.result.search_spaces
        found = [spaces.get(own.exposure.number, spaces[min(spaces)]) for own in self._limits]
        return [space for space in found if space is not None]  # none has explicit poses

    def _placed(self, rows: Rows) -> tuple[Int64, AnyArray, AnyArray]:
        """Return y, of exposures one below the other, x, and the number of the orientation."""
        exposures = self._exposures_of(rows)
        sizes = {space: len(space.euler_angles) for space in self._spaces}
        starts = dict(zip(sizes, np.cumsum([0, *sizes.values()]).tolist(), strict=False))
        size, start = (np.array([of[space] for space in self._spaces]) for of in (sizes, starts))
        y = (rows["first"] & _LOW).astype(np.int64) + self._levels[exposures] * self._height
        index = (rows["second"] & _LOW).astype(np.int64)
        orientations = start[exposures] + index % size[exposures]
        return y, (rows["second"] >> 32).astype(np.int32), orientations.astype(np.int32)

    def _exposures_of(self, rows: Rows) -> Int64:
        return np.searchsorted(self._first_source, rows["source"], "right") - 1

    def _described(self, rows: Rows) -> dict[str, AnyArray]:
        index, exposures = (rows["second"] & _LOW).astype(np.int32), self._exposures_of(rows)
        first, self.n_found = self.n_found + 1, self.n_found + len(rows)
        numbers = np.array([own.exposure.number for own in self._limits])
        poses = self.correlations.result.decode(index, numbers[exposures])
        found: dict[str, AnyArray] = {
            MICROGRAPH: np.full(len(rows), self.correlations.micrograph),
            RANK: np.arange(first, self.n_found + 1),
            "pos_y": (rows["first"] & _LOW).astype(np.int32),
            "pos_x": (rows["second"] >> 32).astype(np.int32),
            "correlation": rows["correlation"].copy(),
            "zscore": _ascending(rows["first"] >> 32),
            **dict(zip(POSE_COLUMNS, poses, strict=True)),
            "global_index": index,
            "partial": (rows["source"] - self._first_source[exposures]).astype(np.int32),
        }
        names = rows.dtype.names or ()
        second = rows[SECOND_ZSCORE].copy() if SECOND_ZSCORE in names else None
        return found | self.correlations.parts_of(exposures, found["zscore"], second)


def _descending(z: AnyArray) -> AnyArray:
    """Return numbers of 32 bits, as uint64, whose ascending order is the descending one of z."""
    bits = (z.astype(np.float32) + np.float32(0)).view("u4")  # no -0
    ascending = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
    return (~ascending).astype("u8")


def _ascending(numbers: AnyArray) -> AnyArray:
    """Return the z-scores of :func:`_descending`."""
    bits = ~numbers.astype("u4")
    return np.where(bits >> 31, bits & np.uint32((1 << 31) - 1), ~bits).view(np.float32)


def _in_order(rows: Rows) -> Rows:
    return rows[np.lexsort((rows["source"], rows["second"], rows["first"]))]


def _sorted(blocks: Iterator[Rows], file: IO[bytes], dtype: "np.dtype[np.void]") -> Iterator[Rows]:
    """Yield rows in order, in blocks; sorted runs are in the file if there are several."""
    waiting, runs, n = list[Rows](), list[range](), 0

    def run() -> Rows:
        rows = np.concatenate([np.empty(0, dtype), *waiting])
        waiting.clear()
        return _in_order(rows)

    for block in blocks:
        if n + len(block) > RUN_ROWS and n:
            run().tofile(file)
            first = runs[-1].stop if runs else 0
            runs.append(range(first, first + n))
            n = 0
        waiting.append(block)
        n += len(block)
    rows = run()
    if not runs:
        yield from np.array_split(rows, max(n // _BLOCK_ROWS, 1))
        return
    file.flush()
    size = max(_BLOCK_ROWS // (len(runs) + 1), 2)
    left = range(0)
    yield from _merged(
        [*(_Run(file, run, size, rows[:0]) for run in runs), _Run(file, left, size, rows)]
    )


class _Run:
    """Sorted rows in a file, of which some are in memory."""

    def __init__(self, file: IO[bytes], left: range, size: int, rows: Rows) -> None:
        self._file, self._left, self._size, self.rows = file, left, size, rows
        self.fill()

    def fill(self) -> None:
        """Read up to the number of rows that should be in memory."""
        n = min(self._size - len(self.rows), len(self._left))
        if n > 0:
            dtype = self.rows.dtype
            self._file.seek(self._left.start * dtype.itemsize)
            new = np.fromfile(self._file, dtype, n)
            self.rows, self._left = np.concatenate([self.rows, new]), self._left[n:]

    @property
    def last(self) -> tuple[int, int] | None:
        """Keys of the last row in memory, if others follow it."""
        return self.rows[["first", "second"]][-1].item() if self._left else None

    def take(self, end: tuple[int, int] | None) -> Rows:
        """Return, and leave out from now on, the rows in memory before a key; all without one."""
        n = len(self.rows)
        if end is not None:
            n = int(np.searchsorted(self.rows["first"], np.uint64(end[0])))
            n_same = np.searchsorted(self.rows["first"][n:], np.uint64(end[0]), "right")
            n += int(np.searchsorted(self.rows["second"][n : n + n_same], np.uint64(end[1])))
        taken, self.rows = self.rows[:n], self.rows[n:]
        return taken


def _merged(runs: Sequence[_Run]) -> Iterator[Rows]:
    while True:
        ends = [run.last for run in runs]
        end = min((end for end in ends if end is not None), default=None)
        rows = np.concatenate([run.take(end) for run in runs])
        if not len(rows) and end is not None:  # more rows of one pose than are in memory
            end = end[0], end[1] + 1
            rows = np.concatenate([run.take(end) for run in runs])
        yield _in_order(rows)
        if end is None:
            return
        for run in runs:
            run.fill()


@takes(DetectionOptions)
def find_detections(
    store: str | PathLike[str] | MergedResult,
    *,
    exposure: str | None = None,
    search: str | PathLike[str] | None = None,
    scratch: str | PathLike[str] | None = None,
    **options: Unpack[DetectionKeywords],
) -> Detections:
    """Find detections in the correlation tables of a search, beyond the best of each pixel.

    A map keeps one pose of each pixel, so that particles that overlap, or of which the second best
    pose is the right one, are lost. The devices' correlation tables, as of Leopard-EM 1.3, have all
    correlations above a threshold. Their z-scores follow from the mean and standard deviation of
    the whole search. Of those at or above a cutoff, the highest comes first, and a row is
    suppressed if a detection before it is closer than ``min_distance`` and differs by at most
    ``min_angle`` in orientation. Ties are broken by row, column, pose and partial.

    Parameters
    ----------
    store
        Path or URL of a merged result, or an open one.
    exposure
        Id of the only exposure of a montage, or name of the only group, to read. Default: all.
    search
        Path or URL of the search that was merged. Default: where it was then.
    scratch
        Folder for a temporary file, of 24 bytes for each row above the cutoff if there are more
        than two million. Default: the system's.
    **options
        ``cutoff``: minimum z-score. ``false_positives``: the number from which it follows if it is
        not given, 1 by default. ``min_distance``: pixels, 10 by default; 0 suppresses nothing.
        ``min_angle``: degrees, 10 by default; with 180, orientations do not matter. ``symmetry``:
        that of the template, under which orientations are the same; C1 by default.
        ``micrograph``: its name, for the table; by default that of the store, without ``.zarr``.
        ``mask``, ``mask_of``, ``mask_marks``, ``mask_unit``, ``mask_box``, ``edge``: as of
        :class:`PickOptions`.

    Returns
    -------
    Detections
        An iterable of blocks, dictionaries of columns: ``micrograph``, ``rank`` (from 1, by
        z-score), ``pos_y``, ``pos_x`` (pixels), ``correlation``, ``zscore``, pose (degrees, Å),
        ``global_index``, ``partial``; of a montage also ``exposure``, to which position and partial
        belong; of groups ``group``, ``second_zscore`` (the highest of the other groups at the
        pixel) and ``zscore_difference``. Exposures of a montage do not suppress each other, nor do
        groups of different templates. :meth:`Detections.to_parquet` writes a file. Memory is below
        1 GB, and 20 bytes for each detection more if any row is to be suppressed.

    Raises
    ------
    StoreNotFoundError, FormatError, InputChangedError
        The merged result or its partials are not there, or are other ones.
    IncompleteError
        Partials without a table, by name.
    InvalidInputError
        The exposure is not one of the result's, an option is invalid, or a mask does not fit.

    Examples
    --------
    >>> import numpy as np
    >>> from ocelot_em import SearchInfo, SearchSpace, find_detections, merge, write_partial
    >>> search = SearchInfo(search_space=SearchSpace.from_tables([[0, 0, 0], [0, 0, 90]], [0], [0]))
    >>> result = {
    ...     "mip": np.float32([[8.5, 9]]),
    ...     "best_global_index": np.int32([[0, 0]]),
    ...     "correlation_sum": np.float32([[0, 0]]),
    ...     "correlation_squared_sum": np.float32([[1000, 1000]]),
    ...     "correlation_table": {
    ...         "threshold": 5.5,
    ...         "global_idx": np.int32([0, 0, 1]),
    ...         "pos_y": np.int32([0, 0, 0]),
    ...         "pos_x": np.int32([0, 1, 1]),
    ...         "corr_value": np.float32([8.5, 9, 8]),
    ...     },
    ... }
    >>> write_partial("ROWS.zarr", "gpu0", result, total_projections=1000, search=search)
    >>> _ = merge("ROWS.zarr", "ROWS_MERGED.zarr")
    >>> for rows in find_detections("ROWS_MERGED.zarr", cutoff=6):
    ...     print(rows["pos_x"], rows["psi"], rows["zscore"])
    [1 1] [ 0. 90.] [9. 8.]
    """
    own, merged = DetectionOptions.parse(options), MergedResult.open(store)
    correlations = Correlations(
        merged,
        own.cutoff,
        exposure,
        false_positives=own.false_positives,
        search=search,
        area=Area.of(merged, own),
    )
    if own.micrograph is not None:
        correlations.micrograph = plain_name(own.micrograph)
    return Detections(correlations, own, scratch)
