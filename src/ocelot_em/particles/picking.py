"""From a merged result to particles: cutoff, candidates, peaks, table.

What a merge has collected is enough for most; maps are read only where it is not: tile by tile, of
tiles that can hold something.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from os import PathLike
from statistics import NormalDist
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ocelot_em.errors import IncompleteError, InvalidInputError
from ocelot_em.merge.plan import MergePlan, PlannedExposure, read_plan
from ocelot_em.merge.stats.collected import (
    CANDIDATE_FIELDS,
    GATHERED,
    NEIGHBOUR_FIELDS,
    NEIGHBOURS,
    neighbours_of,
)
from ocelot_em.merge.stats.records import (
    Candidates,
    Layout,
    Summary,
    open_merged_result,
    read_candidates,
    read_summary,
    statistics_path,
    summary_at,
)
from ocelot_em.model.maps import (
    BEST_PARTIAL,
    COUNT,
    INDEX,
    MEAN,
    MIP,
    POSES,
    SCALED_MIP,
    SOURCE_EXPOSURE,
    STD,
    AnyArray,
    Float64,
    Int64,
)
from ocelot_em.model.regions import Region
from ocelot_em.particles.duplicates import Peaks, Tolerances, join_sightings
from ocelot_em.particles.gaussian import gaussian_cutoff
from ocelot_em.particles.peaks import select_peaks, subpixel_offsets
from ocelot_em.particles.significance import NEG_LOG_P_CUTOFF, PValueModel, gev_cutoff
from ocelot_em.particles.table import ALSO_SEEN, EXPOSURE, NEG_LOG_P, About, ParticleTable
from ocelot_em.store import attributes as fmt
from ocelot_em.store.arrays import ChunkedMap
from ocelot_em.store.objects import Objects, open_objects
from ocelot_em.store.search import open_partial_maps, read_search_space


class PickOptions(BaseModel):
    """How to pick particles; the same names as the command line's options.

    Parameters
    ----------
    method
        ``gaussian``: z-score that Gaussian noise exceeds ``false_positives`` times. ``gev``: the
        same for the extreme value distribution that fits the map. ``pvalue``: -ln p of ranks of
        ``mip`` and z-score.
    false_positives
        How many are accepted, over the whole map (``gaussian``, ``gev``).
    cutoff
        Taken instead of what the method finds, in the method's own scale: z-score, or -ln p, which
        is 8 by default.
    min_distance
        No two peaks are closer, in pixels; of a montage, in the same exposure.
    per
        Of a montage. ``exposure``: every exposure has a cutoff of its own, with so many false
        positives in each, and peaks are picked from all its valid pixels, shown or not.
        ``montage``: there is one cutoff, with so many false positives in the whole montage, and
        peaks are picked from the pixels that are shown. ``pvalue`` ranks are always those of an
        exposure.
    same_distance, same_angle, same_defocus
        Peaks of different exposures are one particle if they are strictly closer than so many
        pixels on the canvas (None: ``min_distance``; 0: they never are), and their poses differ by
        at most so many degrees and Å; see :class:`ocelot_em.particles.duplicates.Tolerances`. The
        particle is reported once, as it was seen where the montage's rule prefers it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Literal["gaussian", "gev", "pvalue"] = "gaussian"
    false_positives: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    cutoff: Annotated[float, Field(allow_inf_nan=False)] | None = None
    min_distance: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 5.0
    per: Literal["exposure", "montage"] = "exposure"
    same_distance: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    same_angle: Annotated[float, Field(ge=0, le=180)] = 10.0
    same_defocus: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 500.0

    @property
    def tolerances(self) -> Tolerances:
        """How much sightings of one particle may differ."""
        distance = self.min_distance if self.same_distance is None else self.same_distance
        return Tolerances(distance, self.same_angle, self.same_defocus)


def find_peaks(store: str | PathLike[str], **options: Any) -> ParticleTable:
    """Pick particles from a merged result.

    Candidates at or above the cutoff, highest first, each suppressing all others closer than
    ``min_distance``. The result does not depend on the tiles of the merge. Only valid pixels are
    looked at.

    Parameters
    ----------
    store
        Path or URL of the merged result.
    **options
        The fields of :class:`PickOptions`: ``method``, ``false_positives``, ``cutoff``,
        ``min_distance``; of a montage ``per``, ``same_distance``, ``same_angle``, ``same_defocus``.

    Returns
    -------
    ParticleTable
        Highest first (z-score, or -ln p for ``pvalue``), ties by position.

    Raises
    ------
    StoreNotFoundError, FormatError, IncompleteError
        It is not a finished merged result, or was merged without statistics.
    InvalidInputError
        Options that are unknown or unusable, or a distribution that cannot be fitted.
    """
    try:
        asked = PickOptions.model_validate(options)
    except ValidationError as error:
        raise InvalidInputError(
            f"option {'.'.join(map(str, p['loc']))}: {p['msg']}, got {p['input']!r}"
            for p in error.errors()
        ) from None
    objects = open_objects(store)
    merged = MergedMaps.open(objects)
    summary = read_summary(store)
    if summary is None:
        raise IncompleteError(
            f"{objects.url}: it was merged without statistics, by an earlier version; merge again"
        )
    judges = _judges(asked, merged, summary)
    candidates = _candidates(merged, judges)
    found = [
        _Found(exposure, candidates[k], judges[k].height(candidates[k]))
        for k, exposure in enumerate(merged.plan.exposures)
    ]
    if merged.plan.is_montage and asked.per == "montage":
        chosen, others = _peaks_of_montage(merged, found, asked)
    else:
        chosen = [f.at(select_peaks(*f.pixels, f.height, asked.min_distance)) for f in found]
        others = []
    about = _about(asked, merged, [judge.cutoff for judge in judges])
    return _table(merged, chosen, others, asked, about)


@dataclass(frozen=True)
class Judge:
    """What makes a pixel of an exposure a candidate.

    Parameters
    ----------
    cutoff
        What it has to reach: z-score, or -ln p.
    model
        Of p-values; None if z-scores are judged.
    levels
        ``mip`` and z-score of which a pixel that reaches a p-value's cutoff reaches at least one.
    """

    cutoff: float
    model: PValueModel | None = None
    levels: tuple[float, float] = (-np.inf, -np.inf)

    def wanted(self, mip: AnyArray, z: AnyArray) -> AnyArray:
        """Which pixels are candidates; the p-value is computed only where it can be low enough."""
        if self.model is None:
            high: AnyArray = z >= np.float32(self.cutoff)
            return high
        rare = ((mip >= self.levels[0]) | (z >= self.levels[1])) & (mip > -np.inf) & np.isfinite(z)
        rare[rare] = self.model.neg_log_p(mip[rare], z[rare]) >= self.cutoff
        return rare

    def height(self, rows: Float64) -> Float64:
        """By what candidates are compared."""
        if self.model is None:
            return _column(rows, SCALED_MIP)
        return self.model.neg_log_p(_column(rows, MIP), _column(rows, SCALED_MIP))


def _judges(asked: PickOptions, merged: "MergedMaps", summary: Summary) -> list[Judge]:
    """Return the judge of every exposure."""
    plan = merged.plan
    if asked.method == "pvalue":
        cutoff = NEG_LOG_P_CUTOFF if asked.cutoff is None else asked.cutoff
        judges = []
        for exposure in plan.exposures:
            own = _summary_of(exposure, merged, summary)
            model = p_value_model(own)
            judges.append(Judge(cutoff, model, _levels_of(model, own, cutoff)))
        return judges
    if asked.cutoff is not None:
        return [Judge(asked.cutoff)] * len(plan.exposures)
    if plan.is_montage and asked.per == "montage":
        return [Judge(_montage_cutoff(asked, merged, summary))] * len(plan.exposures)
    judges = []
    for exposure in plan.exposures:
        if asked.method == "gev":
            own = _summary_of(exposure, merged, summary)
            cutoff = gev_cutoff(own.histograms.of_z(), asked.false_positives)
        else:
            cutoff = gaussian_cutoff(
                exposure.counted.size, exposure.total_projections, asked.false_positives
            )
        judges.append(Judge(cutoff))
    return judges


def _summary_of(exposure: PlannedExposure, merged: "MergedMaps", of_all: Summary) -> Summary:
    """Return the statistics of an exposure, which are those of all if there is no other."""
    if not merged.plan.is_montage:
        return of_all
    path = statistics_path(exposure.number)
    found = summary_at(merged.objects, path)
    if found is None:
        raise IncompleteError(f"{merged.url}: the group {path!r} is missing; merge again")
    return found


def _montage_cutoff(asked: PickOptions, merged: "MergedMaps", summary: Summary) -> float:
    """z-score that noise exceeds in so many of the pixels that could be shown.

    Where the highest z-score wins a pixel, all exposures had a chance to show noise there, and all
    their valid pixels count. Otherwise those count that are shown.
    """
    all_count = merged.plan.overlap == "max-zscore"
    pixels = {
        exposure.number: exposure.valid_pixels if all_count else exposure.shown_pixels
        for exposure in summary.attributes.exposures
    }
    if asked.method == "gev":
        histogram = summary.histograms.of_z()
        share = sum(pixels.values()) / max(histogram.pixels, 1) if not all_count else 1.0
        return gev_cutoff(histogram, asked.false_positives / (share or 1.0))
    correlations = sum(
        pixels.get(exposure.number, 0) * exposure.total_projections
        for exposure in merged.plan.exposures
    )
    return gaussian_cutoff(correlations, 1, asked.false_positives)


def p_value_model(summary: Summary) -> PValueModel:
    """Return the p-value model of a whole map."""
    counted = summary.histograms
    return PValueModel.from_histogram(counted.of_both(), counted.of_mip(), counted.of_z())


def _levels_of(model: PValueModel, summary: Summary, cutoff: float) -> tuple[float, float]:
    """``mip`` and z-score of which a pixel of so high a -ln p reaches at least one.

    -ln p is ``r**2 / 2 - ln(quadrant)``, and with both normal scores from 0 to m (in units of their
    root mean squares) ``r**2`` is at most ``m**2 max(1, 2 (1 - c)) / (1 - c**2)`` for a correlation
    c: so one of them is at least the m of the cutoff.
    """
    c = model.correlation
    quadrant = (np.pi / 2 + np.arcsin(c)) / (2 * np.pi)
    squared = 2 * (1 - c**2) * (cutoff + np.log(quadrant)) / max(1.0, 2 * (1 - c))
    least = float(np.sqrt(max(squared, 0.0)))
    levels = []
    for histogram, rms in (
        (summary.histograms.of_mip(), model.mip_rms),
        (summary.histograms.of_z(), model.z_rms),
    ):
        rank = histogram.pixels * NormalDist().cdf(least * rms)
        edges = histogram.axis.edges
        reached = histogram.below(edges[:-1]) >= rank
        first = int(np.argmax(reached)) if reached.any() else len(edges) - 1
        levels.append(float(edges[max(first - 1, 0)]) if first > 1 else -np.inf)
    return levels[0], levels[1]


def _candidates(merged: "MergedMaps", judges: Sequence[Judge]) -> list[Float64]:
    """Candidates of every exposure, columns :data:`CANDIDATE_FIELDS`; pixels are the exposure's.

    Those that the merge has collected, if that is all. Otherwise maps are read; of the pixels of a
    montage that another exposure has won, only those are known that were collected.
    """
    found, incomplete = [], False
    for exposure, judge in zip(merged.plan.exposures, judges, strict=True):
        layout = Layout.of(merged.plan, exposure)
        rows, level = read_candidates(merged.objects, layout)
        incomplete |= judge.model is not None or judge.cutoff < level
        mip, z = _column(rows, MIP), _column(rows, SCALED_MIP)
        found.append(rows[judge.wanted(mip, z)])
    if not incomplete:
        return found
    scanned = scan(merged, judges)
    if not merged.plan.is_montage:
        return scanned
    return [_united(one, other) for one, other in zip(found, scanned, strict=True)]


def _united(one: Float64, other: Float64) -> Float64:
    """Rows of both; those of the first where both have a pixel."""
    rows = np.concatenate([one, other])
    keys = np.stack([_column(rows, "y"), _column(rows, "x")], axis=1)
    _, first = np.unique(keys, axis=0, return_index=True)
    return rows[np.sort(first)]


def all_candidates(store: str | PathLike[str]) -> Candidates:
    """Read all that a merge has collected, of all exposures; their levels may differ.

    Raises
    ------
    StoreNotFoundError, FormatError, IncompleteError, MissingChunkError
    """
    objects = open_objects(store)
    plan = read_plan(open_merged_result(objects), objects.url)
    found = [read_candidates(objects, Layout.of(plan, e)) for e in plan.exposures]
    return Candidates(np.concatenate([f.rows for f in found]), max(f.level for f in found))


@dataclass(frozen=True)
class _Found:
    """Candidates, or peaks, of an exposure: rows of :data:`CANDIDATE_FIELDS` and their heights."""

    exposure: PlannedExposure
    rows: Float64
    height: Float64

    @property
    def pixels(self) -> tuple[Int64, Int64]:
        """Rows and columns in the exposure."""
        y, x = (_column(self.rows, name).astype(np.int64) for name in ("y", "x"))
        return y, x

    @property
    def on_canvas(self) -> tuple[Int64, Int64]:
        """The same pixels of the canvas."""
        y, x = self.pixels
        return y + self.exposure.origin[0], x + self.exposure.origin[1]

    def at(self, which: AnyArray) -> "_Found":
        """Return some of them."""
        return _Found(self.exposure, self.rows[which], self.height[which])


def _peaks_of_montage(
    merged: "MergedMaps", found: Sequence[_Found], asked: PickOptions
) -> tuple[list[_Found], list[_Found]]:
    """Peaks of what the montage shows; and of what it does not, exposure by exposure."""
    is_shown = [merged.shows(f.exposure, *f.on_canvas) for f in found]
    shown = [f.at(np.flatnonzero(s)) for f, s in zip(found, is_shown, strict=True)]
    y, x = (np.concatenate([f.on_canvas[axis] for f in shown]) for axis in (0, 1))
    best = select_peaks(y, x, np.concatenate([f.height for f in shown]), asked.min_distance)
    starts = np.cumsum([0, *(len(f.rows) for f in shown)])
    chosen = [
        f.at(np.sort(best[(best >= start) & (best < end)]) - start)
        for f, start, end in zip(shown, starts[:-1], starts[1:], strict=True)
    ]
    hidden = [f.at(np.flatnonzero(~s)) for f, s in zip(found, is_shown, strict=True)]
    others = [f.at(select_peaks(*f.pixels, f.height, asked.min_distance)) for f in hidden]
    return chosen, others


@dataclass(frozen=True)
class MergedMaps:
    """The stored maps of a merged result, read region by region.

    Parameters
    ----------
    objects
        The result.
    attributes, plan
        What it says of itself, and what it was made by.
    maps
        By name.
    decode
        Turns indices into poses, where these are not stored.
    """

    objects: Objects
    attributes: fmt.MergedAttributes
    plan: MergePlan
    maps: dict[str, ChunkedMap]
    decode: Callable[[AnyArray], tuple[AnyArray, ...]] | None

    @classmethod
    def open(cls, place: str | PathLike[str] | Objects) -> "MergedMaps":
        """Open what is stored.

        Raises
        ------
        StoreNotFoundError, FormatError, IncompleteError
        """
        objects = open_objects(place) if isinstance(place, (str, PathLike)) else place
        attributes = open_merged_result(objects)
        maps = open_partial_maps(objects, "", "", attributes.maps.merged, attributes.shape)
        space = read_search_space(objects, attributes.search_space_digest)
        decode = space.decode if space is not None and not attributes.maps.decoded else None
        return cls(objects, attributes, read_plan(attributes, objects.url), maps, decode)

    @property
    def url(self) -> str:
        """Where it is."""
        return self.objects.url

    @property
    def valid_shape(self) -> tuple[int, int]:
        """Of the maps' valid pixels."""
        return self.attributes.valid_shape

    def read(self, region: Region, name: str) -> AnyArray:
        """Values of a map over a region."""
        return self.maps[name].read(region)[0]

    def regions(self) -> Iterator[Region]:
        """The valid pixels, in whole chunks."""
        for chunk in self.maps[SCALED_MIP].grid:
            region = chunk.region.intersect(Region.whole(self.valid_shape))
            if region.size:
                yield region

    def zscore(self, exposure: PlannedExposure, y: int, x: int) -> float:
        """z-score of a pixel of an exposure; NaN where it is not valid, or not shown."""
        pixel = Region(y, y + 1, x, x + 1)
        if not pixel.intersect(exposure.counted).size:
            return float("nan")
        pixel = pixel.shifted(*exposure.origin)
        if self.plan.is_montage and self.read(pixel, SOURCE_EXPOSURE)[0, 0] != exposure.number:
            return float("nan")
        return float(self.read(pixel, SCALED_MIP)[0, 0])

    def shows(self, exposure: PlannedExposure, y: Int64, x: Int64) -> AnyArray:
        """Whether pixels of the canvas show an exposure; only chunks in overlaps are read."""
        own = exposure.on_canvas
        shown = np.ones(len(y), np.bool_)
        for place in self.plan.touching(own) if len(y) else ():
            other = self.plan.exposures[place]
            shared = other.on_canvas.intersect(own)
            if other.number != exposure.number:
                shown &= (y < shared.y0) | (y >= shared.y1) | (x < shared.x0) | (x >= shared.x1)
        doubtful = np.flatnonzero(~shown)
        grid = self.maps[SOURCE_EXPOSURE].grid
        cells = (y[doubtful] // grid.cell[0]) * grid.counts[1] + x[doubtful] // grid.cell[1]
        for cell in np.unique(cells).tolist():
            region = grid[cell].region
            numbers = self.read(region, SOURCE_EXPOSURE)
            here = doubtful[cells == cell]
            shown[here] = numbers[y[here] - region.y0, x[here] - region.x0] == exposure.number
        return shown


def scan(merged: MergedMaps, judges: Sequence[Judge]) -> list[Float64]:
    """Read maps for candidates, chunk by chunk: those of every exposure that are shown.

    Parameters
    ----------
    merged
        The result.
    judges
        Of its exposures.

    Returns
    -------
    list of NDArray[np.float64]
        For each exposure rows of :data:`CANDIDATE_FIELDS`.
    """

    def look(region: Region) -> list[tuple[int, Float64]]:
        there = merged.plan.touching(region)
        if not there:
            return []
        mip, z = merged.read(region, MIP), merged.read(region, SCALED_MIP)
        if not merged.plan.is_montage:
            return [(0, rows_at(region, z, judges[0].wanted(mip, z), (0, 0)))]
        numbers = merged.read(region, SOURCE_EXPOSURE)
        found = []
        for k in there:
            exposure = merged.plan.exposures[k]
            own = numbers == exposure.number
            where = own.copy()
            where[own] = judges[k].wanted(mip[own], z[own])
            own_z = np.where(own, z, np.float32(np.nan))
            found.append((k, rows_at(region, own_z, where, exposure.origin)))
        return found

    def rows_at(region: Region, z: AnyArray, where: AnyArray, origin: tuple[int, int]) -> Float64:
        y, x = np.nonzero(where)
        rows = np.full((len(y), len(CANDIDATE_FIELDS)), np.nan)
        if not len(y):
            return rows
        _put(rows, "y", y + region.y0 - origin[0])
        _put(rows, "x", x + region.x0 - origin[1])
        for name in GATHERED:
            if name in merged.maps:
                _put(rows, name, merged.read(region, name)[y, x])
        for name, beside in neighbours_of(z, y, x):
            _put(rows, name, beside)
        return rows

    found: list[list[Float64]] = [[np.empty((0, len(CANDIDATE_FIELDS)))] for _ in judges]
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        for own in pool.map(look, merged.regions()):
            for k, rows in own:
                found[k].append(rows)
    return [np.concatenate(rows) for rows in found]


def _put(rows: Float64, name: str, values: AnyArray) -> None:
    rows[:, CANDIDATE_FIELDS.index(name)] = values


def _column(rows: Float64, name: str) -> Float64:
    return rows[:, CANDIDATE_FIELDS.index(name)]


def _about(asked: PickOptions, merged: MergedMaps, cutoffs: Sequence[float]) -> About:
    attributes, plan = merged.attributes, merged.plan
    given = asked.cutoff is not None or asked.method == "pvalue"
    own = zip(plan.exposures, cutoffs, strict=True)
    return About(
        store=merged.url,
        method=asked.method if asked.cutoff is None else "cutoff",
        cutoff=min(cutoffs),
        min_distance_px=asked.min_distance,
        false_positives=None if given else asked.false_positives,
        pixel_size_angstrom=attributes.pixel_size_angstrom,
        shape=attributes.shape,
        valid_shape=attributes.valid_shape,
        per=asked.per if plan.is_montage else None,
        exposure_cutoffs=tuple((e.id, c) for e, c in own) if plan.is_montage else (),
        exposure_shapes=tuple((e.id, (e.shape, e.valid_shape)) for e in attributes.exposures),
    )


def _table(
    merged: MergedMaps,
    chosen: Sequence[_Found],
    others: Sequence[_Found],
    asked: PickOptions,
    about: About,
) -> ParticleTable:
    """Put a table together: of peaks that are one particle, one, with the others named.

    Highest first, ties by position. ``others`` are only named.
    """
    found = [*chosen, *others]  # each in the order of the plan
    n_chosen = sum(len(f.rows) for f in chosen)
    places = [*range(len(chosen)), *range(len(others))]
    exposures = np.repeat(places, [len(f.rows) for f in found])
    rows, height = (np.concatenate([getattr(f, n) for f in found]) for n in ("rows", "height"))
    canvas_y, canvas_x = (np.concatenate([f.on_canvas[axis] for f in found]) for axis in (0, 1))
    columns = _columns(merged, rows, exposures)
    if asked.method == "pvalue":
        columns[NEG_LOG_P] = np.asarray(height, np.float64)
    kept = np.arange(n_chosen)
    if merged.plan.is_montage:
        columns |= {"canvas_y": canvas_y.astype(np.int32), "canvas_x": canvas_x.astype(np.int32)}
        columns[EXPOSURE] = np.array([e.id for e in merged.plan.exposures])[exposures]
        preferred = _preference(merged, exposures, rows, height)
        order = np.lexsort((*preferred, np.arange(len(rows)) >= n_chosen))
        stands_for = join_sightings(_poses_on_canvas(columns), order, asked.tolerances)
        columns[ALSO_SEEN] = _also_seen(columns, stands_for)
        kept = np.flatnonzero(stands_for[:n_chosen] == np.arange(n_chosen))
    in_order = np.lexsort((exposures[kept], canvas_x[kept], canvas_y[kept], -height[kept]))
    kept = kept[in_order]
    return ParticleTable({name: values[kept] for name, values in columns.items()}, about)


def _preference(
    merged: MergedMaps, exposures: Int64, rows: Float64, height: Float64
) -> tuple[AnyArray, ...]:
    """Keys by which one of several sightings is preferred, the last one first: as pixels are."""
    plan = merged.plan
    acquired = np.array([e.acquired for e in plan.exposures])[exposures]
    y, x = (_column(rows, name) for name in ("y", "x"))
    earliest = (x, y, -height, exposures, acquired)
    if plan.overlap == "earliest":
        return earliest
    if plan.overlap == "max-zscore":
        return (*earliest, -height)
    bounds = np.array([e.taken for e in plan.exposures])[exposures]
    reach = np.minimum.reduce(
        [y - bounds[:, 0], bounds[:, 1] - 1 - y, x - bounds[:, 2], bounds[:, 3] - 1 - x]
    )
    return (*earliest, -reach)


def _poses_on_canvas(columns: Mapping[str, AnyArray]) -> Peaks:
    _, exposure = np.unique(columns[EXPOSURE], return_inverse=True)
    names = "canvas_y", "canvas_x", "phi", "theta", "psi", "relative_defocus"
    return Peaks(exposure, *(columns[name] for name in names))


def _also_seen(columns: Mapping[str, AnyArray], stands_for: Int64) -> AnyArray:
    """Name the other sightings of every particle."""
    texts: list[list[str]] = [[] for _ in stands_for]
    for k in np.flatnonzero(stands_for != np.arange(len(stands_for))).tolist():
        where = f"{columns[EXPOSURE][k]}:{columns['pos_y'][k]}:{columns['pos_x'][k]}"
        texts[int(stands_for[k])].append(where)
    return np.array([" ".join(sorted(own)) for own in texts], dtype=str)


def _columns(merged: MergedMaps, rows: Float64, exposures: Int64) -> dict[str, AnyArray]:
    """What a table says of peaks in their exposures; positions between pixels, too."""
    y, x = (_column(rows, name).astype(np.int32) for name in ("y", "x"))
    dy, dx = subpixel_offsets(_neighbourhoods(merged, rows, exposures))
    poses = {name: _column(rows, name).astype(np.float32) for name in POSES}
    if merged.decode is not None and len(rows):
        index = _column(rows, INDEX).astype(np.int32)
        poses = dict(zip(POSES, merged.decode(index), strict=True))
    totals = np.array([e.total_projections for e in merged.plan.exposures], np.int64)
    counts = totals[exposures]
    if merged.attributes.has_counts:
        counts = _column(rows, COUNT).astype(np.int64)
    return {
        "pos_y": y,
        "pos_x": x,
        **{name: _column(rows, name).astype(np.float32) for name in (MIP, SCALED_MIP)},
        "psi": poses["best_psi"],
        "theta": poses["best_theta"],
        "phi": poses["best_phi"],
        "relative_defocus": poses["best_defocus"],
        "pixel_size_offset": poses["best_pixel_size"],
        **{name: _column(rows, name).astype(np.float32) for name in (MEAN, STD)},
        "total_correlations": counts,
        BEST_PARTIAL: _column(rows, BEST_PARTIAL).astype(np.int32),
        "pos_y_subpixel": (y + dy).astype(np.float32),
        "pos_x_subpixel": (x + dx).astype(np.float32),
    }


def _neighbourhoods(merged: MergedMaps, peaks: Float64, exposures: Int64) -> Float64:
    """z-scores (n, 3, 3) around peaks, NaN in the corners, which nobody looks at."""
    around = np.full((len(peaks), 3, 3), np.nan)
    around[:, 1, 1] = _column(peaks, SCALED_MIP)
    for name, (dy, dx) in zip(NEIGHBOUR_FIELDS, NEIGHBOURS, strict=True):
        beside = _column(peaks, name).copy()
        for k in np.flatnonzero(np.isnan(beside)).tolist():
            y, x = int(_column(peaks, "y")[k]) + dy, int(_column(peaks, "x")[k]) + dx
            beside[k] = merged.zscore(merged.plan.exposures[exposures[k]], y, x)
        around[:, 1 + dy, 1 + dx] = beside
    return around
