"""Comparison of two searches of one micrograph: which particles both found, and how they differ."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Unpack

import numpy as np

from ocelot_em.errors import InvalidInputError
from ocelot_em.merge.result import MergedResult
from ocelot_em.model.keywords import PickKeywords, takes
from ocelot_em.model.maps import MIP, SCALED_MIP, AnyArray, Float64, Int64
from ocelot_em.model.pick_options import PickOptions
from ocelot_em.model.regions import Region, template_box_of
from ocelot_em.model.text import count_text, shape_text
from ocelot_em.model.threads import map_in_threads
from ocelot_em.particles.column_table import Column, ColumnTable
from ocelot_em.particles.duplicates import ROUNDING_PX, join_nearest
from ocelot_em.particles.micrographs import names_of
from ocelot_em.particles.picking import pick_particles
from ocelot_em.particles.symmetry import parse_symmetry, rotation_between
from ocelot_em.particles.table import GROUP, MICROGRAPH, RANK, ParticleTable

Source = str | PathLike[str] | MergedResult | ParticleTable
"""A merged result, its path or URL, a table of particles, or its path."""

BOTH, ONLY_A, ONLY_B = "both", "A", "B"

_FAR_PX = 1e9
"""Distance between two micrographs of tables of several."""

COMPARED: Mapping[str, Column] = {
    MICROGRAPH: Column("str", "", "name of the micrograph, as in A if A has one"),
    RANK: Column("int64", "1", "rank in this table, by the higher of both z-scores"),
    "found_in": Column("str", "", "both, or the only search in which it was picked: A or B"),
    "row_a": Column("int32", "1", "number of the row in A's table of particles; -1: not picked"),
    "row_b": Column("int32", "1", "number of the row in B's table of particles; -1: not picked"),
    "rank_a": Column("int64", "1", "rank in A's table of particles; -1: not picked"),
    "rank_b": Column("int64", "1", "rank in B's table of particles; -1: not picked"),
    "y_a": Column("float64", "pixel", "row in A's map, between pixels; NaN: not picked"),
    "x_a": Column("float64", "pixel", "column in A's map, between pixels"),
    "y_b": Column("float64", "pixel", "row in B's map, between pixels; NaN: not picked"),
    "x_b": Column("float64", "pixel", "column in B's map, between pixels"),
    "mip_a": Column("float32", "1", "mip in A; NaN: not picked"),
    "mip_b": Column("float32", "1", "mip in B; NaN: not picked"),
    "zscore_a": Column("float32", "1", "z-score in A; if not picked, the highest of A's map there"),
    "zscore_b": Column("float32", "1", "z-score in B; if not picked, the highest of B's map there"),
    "zscore_difference": Column("float32", "1", "z-score in B minus that in A"),
    "distance_px": Column("float64", "pixel", "distance between both positions, in pixels of A"),
    "angle_difference": Column(
        "float64", "degree", "smallest rotation between both orientations under the symmetry"
    ),
    "defocus_difference": Column("float32", "angstrom", "relative defocus in B minus that in A"),
    "group_a": Column("str", "", "group that won in A, which has groups; empty: not picked"),
    "group_b": Column("str", "", "group that won in B, which has groups; empty: not picked"),
}
"""Columns of a comparison, the last two only of groups. The three before these are NaN but for
particles that both found."""


@dataclass(frozen=True, eq=False)
class ComparedSearch:
    """One of the two compared searches; ``merged`` is None if only its particles are known."""

    name: str
    particles: ParticleTable
    merged: MergedResult | None = None

    @property
    def about(self) -> Any:
        """Whatever states the pixel size and the shapes of the maps; None if nothing does."""
        return self.particles.about if self.merged is None else self.merged.attributes

    @property
    def pixel_size_angstrom(self) -> float | None:
        """Pixel size of the micrograph; None if unknown."""
        size: float | None = self.about and self.about.pixel_size_angstrom
        return size

    @property
    def is_montage(self) -> bool:
        """Whether positions are those on the canvas of a montage."""
        return self.merged.plan.is_montage if self.merged else self.particles.is_of_montage

    @property
    def cutoff(self) -> float | None:
        """Lowest z-score that was picked; None if unknown, or if something else was judged."""
        about = self.particles.about
        return about.cutoff if about and self.particles.ranked_by == SCALED_MIP else None

    @cached_property
    def template_box_px(self) -> int | None:
        """Edge of the template box; None if unknown."""
        if self.about is None:
            return None
        shapes = [(self.about.shape, self.about.valid_shape)]
        if self.merged is not None and self.merged.attributes.exposures:
            shapes = [(own.shape, own.valid_shape) for own in self.merged.attributes.exposures]
        elif self.is_montage:
            shapes = [own for _, own in self.about.exposure_shapes]
        boxes = {template_box_of(*own) for own in shapes}
        return boxes.pop() if len(boxes) == 1 else None

    @property
    def canvas_origin(self) -> tuple[int, int]:
        """Row and column of the map's first pixel, which differs between montages."""
        return (0, 0) if self.merged is None else self.merged.attributes.canvas_origin

    @cached_property
    def positions(self) -> Float64:
        """Rows and columns (n, 2) of the particles on the map, between pixels."""
        columns, prefix = self.particles.columns, "canvas" if self.is_montage else "pos"
        places = []
        for axis in "yx":
            beyond = columns[f"pos_{axis}_subpixel"].astype(np.float64) - columns[f"pos_{axis}"]
            places.append(columns[f"{prefix}_{axis}"] + np.nan_to_num(beyond))
        return np.stack(places, axis=1)

    @classmethod
    def open(cls, source: Source, picking: PickOptions) -> "ComparedSearch":
        """Open a result and pick its particles, or take or read a table of particles."""
        if isinstance(source, ParticleTable):
            return cls(source.about.store if source.about else "a table of particles", source)
        if not isinstance(source, MergedResult):
            suffix = Path(source).suffix.lower()
            if suffix == ".csv":
                return cls(str(source), ParticleTable.read_csv(source))
            if suffix == ".parquet":
                return cls(str(source), ParticleTable.read_parquet(source))
        merged = MergedResult.open(source)
        return cls(merged.url, pick_particles(merged, picking), merged)


@dataclass(frozen=True, eq=False, repr=False)
class Comparison(ColumnTable):
    """Particles of two searches, stored by column, that can be used like a data frame.

    A particle of both searches is one row. Rows are in descending order of the higher z-score. The
    class is used like :class:`ocelot_em.ParticleTable`.

    Parameters
    ----------
    columns
        Arrays with the names and dtypes of :data:`ocelot_em.particles.comparison.COMPARED`.
    a, b
        The two searches, with the ``name``, the ``particles`` and the result of each.
    max_distance_px
        Maximum distance of a particle's positions, in pixels of A.
    symmetry
        Symmetry group of the template.

    Examples
    --------
    >>> from ocelot_em import compare, find_peaks
    >>> both = compare("MERGED.zarr", find_peaks("MERGED.zarr", cutoff=10))
    >>> both.counts
    {'both': 17, 'A': 3, 'B': 0}
    >>> both[both["found_in"] == "A"][["y_a", "x_a", "zscore_a"]].round(1).head(1)
         y_a    x_a  zscore_a
    0  176.0  278.0       9.9
    """

    described: ClassVar[Mapping[str, Column]] = COMPARED

    a: ComparedSearch
    b: ComparedSearch
    max_distance_px: float
    symmetry: str

    @property
    def counts(self) -> dict[str, int]:
        """Numbers of particles in both, and only in one."""
        found = self.columns["found_in"]
        return {kind: int((found == kind).sum()) for kind in (BOTH, ONLY_A, ONLY_B)}

    def places_on(self, side: str) -> Float64:
        """Return rows and columns (n, 2) on the map of A or B, also where it was not picked."""
        grid, columns = _Grid.of(self.a, self.b), self.columns
        at_a, at_b = (np.stack([columns[f"{axis}_{own}"] for axis in "yx"], axis=1) for own in "ab")
        if side == "A":
            return np.where(np.isnan(at_a), grid.to_a(grid.from_b(at_b)), at_a)
        return np.where(np.isnan(at_b), grid.to_b(grid.from_a(at_a)), at_b)

    def facts(self) -> dict[str, object]:
        """Return what was compared, and how."""
        return {
            "a": self.a.name,
            "b": self.b.name,
            "max_distance_px": self.max_distance_px,
            "symmetry": self.symmetry,
        }

    def _summary(self) -> str:
        both, only_a, only_b = self.counts.values()
        return (
            f"{count_text(both, 'particle')} in both, {only_a:,} only in A ({self.a.name}), "
            f"{only_b:,} only in B ({self.b.name})"
        )


@takes(PickOptions)
def compare(
    a: Source,
    b: Source,
    *,
    max_distance: float | None = None,
    symmetry: str = "C1",
    **options: Unpack[PickKeywords],
) -> Comparison:
    """Compare the particles of two searches of one micrograph, or of one montage.

    Two tables may be of several micrographs, which are compared by their names.

    Particles are the same if they are at the same place: pairs are joined in ascending order of
    their distance, each particle at most once. Positions are compared at the centres of the
    template boxes if both boxes are known, and in Å if both pixel sizes are. Of a montage, they are
    those on the canvas. Poses do not decide; how they differ is in the table.

    Parameters
    ----------
    a, b
        Merged results (paths, URLs or open ones), of which particles are picked, or tables of
        particles (``ParticleTable``, or paths of .csv or .parquet files). Of a result, the z-score
        is also known where the other search found a particle and this one did not: the highest
        within ``max_distance``.
    max_distance
        Maximum distance of the positions of one particle, in pixels of A. Default: the minimum
        distance of peaks.
    symmetry
        Symmetry group of the template, with axes as in RELION: C1, C4, D7, T, O, I, I1, ...
    **options
        Fields of :class:`PickOptions`, for both results.

    Returns
    -------
    Comparison
        One row for each particle, the highest z-score first.

    Raises
    ------
    StoreNotFoundError, FormatError, IncompleteError
        A store is not a finished merged result or has no statistics.
    InvalidInputError
        Options are invalid, or the searches are not of one micrograph, as far as is known.

    Examples
    --------
    >>> from ocelot_em import compare
    >>> compare("MERGED.zarr", "MERGED.zarr", symmetry="C2").counts
    {'both': 20, 'A': 0, 'B': 0}
    """
    picking = PickOptions.parse(options)
    return compare_searches(
        ComparedSearch.open(a, picking),
        ComparedSearch.open(b, picking),
        picking.min_distance if max_distance is None else max_distance,
        symmetry,
    )


def compare_searches(
    a: ComparedSearch, b: ComparedSearch, max_distance_px: float, symmetry: str
) -> Comparison:
    """Compare opened searches as :func:`compare` does."""
    group = parse_symmetry(symmetry)
    if not 0 < max_distance_px < np.inf:
        raise InvalidInputError(
            f"max_distance: expected more than 0 pixels, got {max_distance_px:g}"
        )
    grid = _Grid.of(a, b)
    at_a, at_b = (
        np.column_stack([number * _FAR_PX, places])
        for number, places in zip(
            _numbers(a, b), (grid.from_a(a.positions), grid.from_b(b.positions)), strict=True
        )
    )
    i, j = join_nearest(at_a, at_b, max_distance_px)
    only_a, only_b = (
        np.setdiff1d(np.arange(len(own.particles)), joined) for own, joined in ((a, i), (b, j))
    )
    row_a = np.concatenate([i, only_a, np.full(len(only_b), -1)])
    row_b = np.concatenate([j, np.full(len(only_a), -1), only_b])
    z_a, z_b = _of(a, SCALED_MIP, row_a), _of(b, SCALED_MIP, row_b)
    if a.merged is not None:
        places = grid.to_a(at_b[only_b, 1:])
        z_a[row_a < 0] = highest_near(a.merged, places, max_distance_px)
    if b.merged is not None:
        places = grid.to_b(at_a[only_a, 1:])
        z_b[row_b < 0] = highest_near(b.merged, places, max_distance_px / grid.ratio)
    apart = np.full(len(row_a), np.nan)
    apart[: len(i)] = np.linalg.norm(at_a[i] - at_b[j], axis=1)
    poses = [(_of(a, name, row_a), _of(b, name, row_b)) for name in ("phi", "theta", "psi")]
    defocus_a, defocus_b = (_of(*own) for own in ((a, _DEFOCUS, row_a), (b, _DEFOCUS, row_b)))
    names = np.repeat([BOTH, ONLY_A, ONLY_B], [len(i), len(only_a), len(only_b)])
    own_a, own_b = _texts(a, MICROGRAPH, row_a), _texts(b, MICROGRAPH, row_b)
    if len(names_of(a.particles)) == 1 == len(names_of(b.particles)):  # one micrograph, two names
        own_b[:] = names_of(a.particles)[0]
    found: dict[str, AnyArray] = {
        MICROGRAPH: np.where(row_a < 0, own_b, own_a),
        "found_in": names,
        "row_a": row_a,
        "row_b": row_b,
    }
    for own, row, side in ((a, row_a, "a"), (b, row_b, "b")):
        ranks = own.particles.columns.get(RANK, np.arange(1, len(own.particles) + 1))
        found |= {f"rank_{side}": np.append(ranks, -1)[row], f"mip_{side}": _of(own, MIP, row)}
        there = np.full((len(row), 2), np.nan)
        there[row >= 0] = own.positions[row[row >= 0]]
        found |= {f"y_{side}": there[:, 0], f"x_{side}": there[:, 1]}
    found |= {
        "zscore_a": z_a,
        "zscore_b": z_b,
        "zscore_difference": z_b - z_a,
        "distance_px": apart,
        "angle_difference": rotation_between(*poses, symmetry=group),
        "defocus_difference": defocus_b - defocus_a,
    }
    for own, row, side in ((a, row_a, "a"), (b, row_b, "b")):
        if GROUP in own.particles:
            found[f"group_{side}"] = _texts(own, GROUP, row)
    # Positions on the common grid decide between equal z-scores.
    places = np.concatenate([(at_a[i] + at_b[j]) / 2, at_a[only_a], at_b[only_b]])
    rounded = np.round(places / ROUNDING_PX)
    order = np.lexsort((*rounded.T[::-1], -np.nan_to_num(np.fmax(z_a, z_b))))
    found[RANK] = np.argsort(order) + 1
    columns = {
        name: found[name][order] if kind.dtype == "str" else found[name][order].astype(kind.dtype)
        for name, kind in COMPARED.items()
        if name in found
    }
    return Comparison(columns, a, b, max_distance_px, group)


_DEFOCUS = "relative_defocus"


def _of(search: ComparedSearch, name: str, rows: Int64) -> AnyArray:
    """Return a column of some particles; NaN where there is none."""
    values = np.full(len(rows), np.nan, np.float32)
    values[rows >= 0] = search.particles.columns[name][rows[rows >= 0]]
    return values


def _texts(search: ComparedSearch, name: str, rows: Int64) -> AnyArray:
    """Return a column of text of some particles; empty where there is none."""
    own = search.particles.columns.get(name, np.empty(0, str))
    return np.append(own, "")[rows if own.size else np.full_like(rows, -1)]


def _numbers(a: ComparedSearch, b: ComparedSearch) -> list[Int64]:
    """Return the numbers of the particles' micrographs, which differ only in tables of several."""
    several = [own for own in (a, b) if len(names_of(own.particles)) > 1]
    if not several:
        return [np.zeros(len(own.particles), np.int64) for own in (a, b)]
    if a.merged is not None or b.merged is not None:
        raise InvalidInputError(
            f"{several[0].name}: expected particles of one micrograph, because the other search is "
            f"a result of one, got those of {len(names_of(several[0].particles)):,}; compare "
            'two tables, or choose the rows of one: table[table["micrograph"] == NAME]'
        )
    known, other = names_of(a.particles), names_of(b.particles)
    if known and other and not {*known} & {*other}:
        raise InvalidInputError(
            f"expected tables of the same micrographs, got {known[0]!r} and others in {a.name}, "
            f"and none of them in {b.name}, such as {other[0]!r}"
        )
    numbers = {name: k for k, name in enumerate(sorted({*known, *other}))}
    return [
        np.array([numbers[name] for name in own.particles.columns[MICROGRAPH].tolist()], np.int64)
        for own in (a, b)
    ]


@dataclass(frozen=True)
class _Grid:
    """Coordinates in which positions are compared: pixels of A, from one origin.

    ``ratio`` is the pixel size of B in pixels of A; shifts are added to positions on each map.
    """

    ratio: float
    shift_a: Float64
    shift_b: Float64

    @classmethod
    def of(cls, a: ComparedSearch, b: ComparedSearch) -> "_Grid":
        """Return the grid of two searches; refuse those that cannot be of one micrograph."""
        if a.is_montage != b.is_montage:
            names = [own.name for own in (a, b) if own.is_montage]
            raise InvalidInputError(
                "expected two searches of one micrograph, or of one montage, of which only "
                f"{names[0]} is a montage; compare it with a montage, or its exposure's own result"
            )
        sizes = [own.pixel_size_angstrom for own in (a, b)]
        boxes = [own.template_box_px or 0 for own in (a, b)]
        ratio = (sizes[1] or 1) / (sizes[0] or 1) if all(sizes) else 1.0
        ratio = 1.0 if abs(ratio - 1) < 1e-4 else ratio
        if not all(boxes):
            boxes = [0, 0]  # corners of the boxes are compared
        if not a.is_montage and a.about and b.about:
            edges = [
                np.add(own.about.valid_shape, max(box - 1, 0))
                for own, box in zip((a, b), boxes, strict=True)
            ]
            dropped = 0 if ratio == 1 else 2 * max(ratio, 1)  # by binning
            if np.abs(edges[0] - edges[1] * ratio).max() > dropped:
                kinds = [
                    f"{shape_text(tuple(edge.tolist()))} pixels"
                    + (f" of {size:g} Å" if size else "")
                    for edge, size in zip(edges, sizes, strict=True)
                ]
                raise InvalidInputError(
                    f"expected two searches of one micrograph, got {kinds[0]} ({a.name}) and "
                    f"{kinds[1]} ({b.name})"
                    + (
                        ""
                        if any(boxes)
                        else "; if the templates differ in size, import both again "
                        "with --template-box"
                    )
                )
        shifts = [
            np.array(own.canvas_origin, np.float64) + box // 2
            for own, box in zip((a, b), boxes, strict=True)
        ]
        return cls(ratio, *shifts)

    def from_a(self, places: Float64) -> Float64:
        """Convert positions (n, 2) on the map of A."""
        return places + self.shift_a

    def from_b(self, places: Float64) -> Float64:
        """Convert positions (n, 2) on the map of B."""
        return (places + self.shift_b) * self.ratio

    def to_a(self, places: Float64) -> Float64:
        """Convert positions (n, 2) to those on the map of A."""
        return places - self.shift_a

    def to_b(self, places: Float64) -> Float64:
        """Convert positions (n, 2) to those on the map of B."""
        return places / self.ratio - self.shift_b


def highest_near(merged: MergedResult, places: Float64, radius_px: float) -> AnyArray:
    """Return the highest z-score within a radius of each position (n, 2) on a map.

    Float32, NaN where no pixel within the radius was searched. The chunks that have the positions
    are read one after another, with what is needed around them.
    """
    highest, whole = np.full(len(places), np.nan, np.float32), Region.whole(merged.valid_shape)
    chunks = np.floor(places / merged.chunk)
    order = np.lexsort(chunks.T)
    groups = np.split(order, np.flatnonzero(np.diff(chunks[order], axis=0).any(axis=1)) + 1)

    def look(group: Int64) -> list[float]:
        lowest, furthest = places[group].min(axis=0), places[group].max(axis=0)
        (y0, x0), (y1, x1) = np.ceil(lowest - radius_px), np.floor(furthest + radius_px) + 1
        region = Region(int(y0), int(y1), int(x0), int(x1)).intersect(whole)
        if not region.size:
            return [np.nan] * len(group)
        z, found = merged.read(region, SCALED_MIP), []
        for y, x in places[group] - (region.y0, region.x0):
            top, left = (max(int(np.ceil(own - radius_px)), 0) for own in (y, x))
            around = z[top : int(y + radius_px) + 1, left : int(x + radius_px) + 1]
            dy, dx = np.ogrid[top : top + around.shape[0], left : left + around.shape[1]]
            near = around[np.hypot(dy - y, dx - x) <= radius_px]
            found.append(np.fmax.reduce(near, initial=np.nan))
        return found

    if len(places):
        for group, found in zip(groups, map_in_threads(look, groups), strict=True):
            highest[group] = found
    return highest
