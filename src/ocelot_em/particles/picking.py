"""Particle picking from a merged result: cutoff, candidates, peaks, table.

The candidates recorded by the merge usually suffice. Otherwise the maps are read, tile by tile.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from os import PathLike
from typing import Unpack

import numpy as np

from ocelot_em.errors import OcelotError
from ocelot_em.merge.plan import PlannedExposure
from ocelot_em.merge.result import MergedResult
from ocelot_em.merge.stats.candidates import Candidates
from ocelot_em.merge.stats.collected import NEIGHBOUR_FIELDS, NEIGHBOURS
from ocelot_em.model.keywords import PickKeywords, takes
from ocelot_em.model.maps import (
    BEST_PARTIAL,
    COUNT,
    INDEX,
    MEAN,
    MIP,
    POSES,
    SCALED_MIP,
    SECOND_ZSCORE,
    STD,
    AnyArray,
    Float64,
    Int64,
)
from ocelot_em.model.pick_options import PickOptions
from ocelot_em.model.progress import OnProgress, share_bar
from ocelot_em.particles.areas import Area
from ocelot_em.particles.candidate_rules import CandidateRule, column, make_rules
from ocelot_em.particles.duplicates import Peaks, Tolerances, join_duplicates
from ocelot_em.particles.micrographs import of_micrograph, store_name
from ocelot_em.particles.peaks import select_peaks, subpixel_offsets
from ocelot_em.particles.population import Population, populations_of
from ocelot_em.particles.scanning import OwnMaps, exact_count, scan
from ocelot_em.particles.table import (
    ALSO_SEEN,
    DIFFERENCE,
    EXPOSURE,
    GROUP,
    NEG_LOG_P,
    SEARCHED,
    ParticleTable,
    PickInfo,
)

log = logging.getLogger(__name__)


@takes(PickOptions)
def find_peaks(
    store: str | PathLike[str] | MergedResult,
    *,
    micrograph: str | None = None,
    progress: bool | OnProgress | None = None,
    **options: Unpack[PickKeywords],
) -> ParticleTable:
    """Pick particles from a merged result.

    Candidates at or above the cutoff are processed highest first; each suppresses all others closer
    than ``min_distance``. The result does not depend on the tiles of the merge. Only valid pixels
    are used.

    Parameters
    ----------
    store
        Path or URL of the merged result, or an open one.
    micrograph
        Name of the micrograph, for the table. Default: that of the store, without ``.zarr``.
    progress
        Whether to show a bar while maps are read, which is seldom needed; None: in a notebook, and
        in an interactive session on a terminal; not in a script. A function is called with the
        phase and the fraction of it done, 0 to 1.
    **options
        Fields of :class:`PickOptions`: ``method``, ``false_positives``, ``cutoff``,
        ``min_distance``, ``min_angle``, ``mask``, ``mask_of``, ``mask_marks``, ``mask_unit``,
        ``mask_box``, ``edge``; for a montage also ``per``, ``same_distance``, ``same_angle``,
        ``same_defocus``.

    Returns
    -------
    ParticleTable
        Particles, highest first (z-score, -ln p for ``pvalue``, or ``mip``), ties by position. The
        highest has the rank 1.

    Raises
    ------
    StoreNotFoundError, FormatError, IncompleteError
        If the store is not a finished merged result or has no statistics.
    InvalidInputError
        If options are unknown or invalid, a mask cannot be read or does not fit the result, or a
        distribution cannot be fitted.

    Examples
    --------
    >>> from ocelot_em import find_peaks
    >>> particles = find_peaks("MERGED.zarr", false_positives=1, min_distance=5)
    >>> len(particles)
    20
    >>> particles.to_pandas()[["pos_y", "pos_x", "scaled_mip"]].head(2)
       pos_y  pos_x  scaled_mip
    0     39    249   12.813256
    1     84    202   12.608299
    """
    settings = PickOptions.parse(options)
    with share_bar(progress) as on_progress:
        found = pick_particles(MergedResult.open(store), settings, on_progress)
    return found if micrograph is None else of_micrograph(found, micrograph)


def pick_particles(
    merged: MergedResult,
    settings: PickOptions,
    on_progress: OnProgress = lambda _phase, _share: None,
) -> ParticleTable:
    """Pick particles as :func:`find_peaks` does, with parsed options."""
    if merged.attributes.edge_warning:
        log.warning("%s: %s", merged.url, merged.attributes.edge_warning)
    return pick_again(merged, settings, on_progress)


def pick_again(
    merged: MergedResult,
    settings: PickOptions,
    on_progress: OnProgress = lambda _phase, _share: None,
) -> ParticleTable:
    """Pick particles of a result whose warnings were logged, or are shown otherwise."""
    _ = merged.summary  # fail early without statistics
    populations = populations_of(merged, area := Area.of(merged, settings))
    rules = make_rules(settings, merged, populations)
    candidates, incomplete = _candidates(merged, rules, on_progress)
    found = []
    for own, rows, rule in zip(populations, candidates, rules, strict=True):
        one = _Pixels(own.exposure, rows, rule.height(rows))
        found.append(one if area is None else one.at(area.contains(own.exposure, *one.pixels)))
    if merged.plan.group_by or (merged.plan.has_parts and settings.per == "montage"):
        chosen, others = _peaks_of_montage(merged, found, settings)
    else:
        chosen = [f.at(_peaks(merged, [f], settings)) for f in found]
        others = []
    info = _pick_info(settings, populations, [rule.cutoff for rule in rules], incomplete)
    return replace(_table(merged, chosen, others, settings, info), picking=settings)


def _peaks(
    merged: MergedResult, found: Sequence["_Pixels"], settings: PickOptions, *, canvas: bool = False
) -> Int64:
    """Return the numbers of the peaks among candidates, of all exposures one after another."""
    pixels = [one.on_canvas if canvas else one.pixels for one in found]
    y, x = (np.concatenate([own[axis] for own in pixels]) for axis in (0, 1))
    heights = np.concatenate([one.height for one in found])
    if settings.min_angle is None:
        return select_peaks(y, x, heights, settings.min_distance)
    places = [merged.plan.exposures.index(one.exposure) for one in found]
    exposures = np.repeat(places, [len(one.rows) for one in found])
    poses = _poses(merged, np.concatenate([one.rows for one in found]), exposures)
    templates = np.array(merged.plan.templates)[exposures]
    orientations = poses["best_phi"], poses["best_theta"], poses["best_psi"], templates
    return select_peaks(y, x, heights, settings.min_distance, orientations, settings.min_angle)


def _candidates(
    merged: MergedResult, rules: Sequence[CandidateRule], on_progress: OnProgress
) -> tuple[list[Float64], tuple[str, ...]]:
    """Return candidates per exposure: columns :data:`CANDIDATE_FIELDS`, exposure pixels.

    Uses the candidates recorded by the merge if they are complete. Otherwise reads the maps, and
    merges an exposure again where a montage may show another. Also return the ids of exposures
    whose partials cannot be read for that.
    """
    found, missing = [], []
    for k, (exposure, rule) in enumerate(zip(merged.plan.exposures, rules, strict=True)):
        rows, level = merged.candidates(exposure)
        if rule.model is not None or rule.by_mip or np.float32(rule.cutoff) < level:
            missing.append(k)
        found.append(rows[rule.accepts(column(rows, MIP), column(rows, SCALED_MIP))])
    if not missing:
        return found, ()
    scanned = scan(merged, [rule.accepts for rule in rules], on_progress)
    if not merged.plan.has_parts:
        return scanned, ()
    unreadable = []
    for number, k in enumerate(missing):
        on_progress("merging overlaps", number / len(missing))
        try:
            found[k] = _union(found[k], OwnMaps(merged, k).candidates(rules[k].accepts))
        except OcelotError as error:
            name = merged.plan.exposures[k].id
            log.warning(
                "%s %s: weak candidates are missing where other %ss are shown, since its partials "
                "cannot be read: %s",
                *(merged.plan.part, name, merged.plan.part, error),
            )
            unreadable.append(name)
    return [_union(*both) for both in zip(found, scanned, strict=True)], tuple(unreadable)


def _union(one: Float64, other: Float64) -> Float64:
    """Concatenate rows; for a pixel in both, keep the row of the first."""
    rows = np.concatenate([one, other])
    keys = np.stack([column(rows, "y"), column(rows, "x")], axis=1)
    _, first = np.unique(keys, axis=0, return_index=True)
    return rows[np.sort(first)]


def all_candidates(store: str | PathLike[str] | MergedResult) -> Candidates:
    """Read all candidates recorded by a merge; levels may differ between exposures."""
    merged = MergedResult.open(store)
    found = [merged.candidates(exposure) for exposure in merged.plan.exposures]
    return Candidates(np.concatenate([f.rows for f in found]), max(f.level for f in found))


@dataclass(frozen=True)
class _Pixels:
    """Candidates or peaks of an exposure: rows of :data:`CANDIDATE_FIELDS` and their heights."""

    exposure: PlannedExposure
    rows: Float64
    height: Float64

    @property
    def pixels(self) -> tuple[Int64, Int64]:
        """Rows and columns of the pixels in the exposure."""
        y, x = (column(self.rows, name).astype(np.int64) for name in ("y", "x"))
        return y, x

    @property
    def on_canvas(self) -> tuple[Int64, Int64]:
        """Rows and columns of the pixels on the canvas."""
        y, x = self.pixels
        return y + self.exposure.origin[0], x + self.exposure.origin[1]

    def at(self, which: AnyArray) -> "_Pixels":
        """Return a subset."""
        return _Pixels(self.exposure, self.rows[which], self.height[which])


def _peaks_of_montage(
    merged: MergedResult, found: Sequence[_Pixels], settings: PickOptions
) -> tuple[list[_Pixels], list[_Pixels]]:
    """Return peaks of the shown pixels of a montage, and of the hidden ones, per exposure."""
    is_shown = [merged.shows(f.exposure, *f.on_canvas) for f in found]
    shown = [f.at(np.flatnonzero(s)) for f, s in zip(found, is_shown, strict=True)]
    best = _peaks(merged, shown, settings, canvas=True)
    starts = np.cumsum([0, *(len(f.rows) for f in shown)])
    chosen = [
        f.at(np.sort(best[(best >= start) & (best < end)]) - start)
        for f, start, end in zip(shown, starts[:-1], starts[1:], strict=True)
    ]
    if merged.plan.group_by:  # a pixel where another group is better is no second sighting
        return chosen, []
    hidden = [f.at(np.flatnonzero(~s)) for f, s in zip(found, is_shown, strict=True)]
    others = [f.at(_peaks(merged, [f], settings)) for f in hidden]
    return chosen, others


def _pick_info(
    settings: PickOptions,
    populations: Sequence[Population],
    cutoffs: Sequence[float],
    incomplete: tuple[str, ...],
) -> PickInfo:
    merged, area = populations[0].merged, populations[0].area
    attributes, plan = merged.attributes, merged.plan
    given = settings.cutoff is not None or settings.method == "pvalue"
    by_cutoff = settings.cutoff is not None and settings.method != "mip"
    counted, searched = (
        sum(getattr(own, name) for own in populations) for name in ("pixels", "searched_pixels")
    )
    own = zip(plan.exposures, cutoffs, strict=True)
    return PickInfo(
        store=merged.url,
        method="cutoff" if by_cutoff else settings.method,
        cutoff=min(cutoffs),
        min_distance_px=settings.min_distance,
        false_positives=None if given else settings.false_positives,
        pixel_size_angstrom=attributes.pixel_size_angstrom,
        shape=attributes.shape,
        valid_shape=attributes.valid_shape,
        per="group" if plan.group_by else settings.per if plan.has_parts else None,
        exposure_cutoffs=tuple((e.id, c) for e, c in own) if plan.has_parts else (),
        exposure_shapes=tuple((e.id, (e.shape, e.valid_shape)) for e in attributes.exposures),
        incomplete_exposures=incomplete,
        incomplete_search=merged.incomplete_text,
        area="" if area is None else area.text,
        counted_pixels=counted,
        excluded_pixels=searched - counted,
        correlations=None if given else sum(own.correlations for own in populations),
        min_angle_degrees=settings.min_angle,
    )


def _table(
    merged: MergedResult,
    chosen: Sequence[_Pixels],
    others: Sequence[_Pixels],
    settings: PickOptions,
    info: PickInfo,
) -> ParticleTable:
    """Build the table, highest first and ties by position; join duplicates.

    ``others`` are only listed as duplicates.
    """
    found = [*chosen, *others]  # each in plan order
    n_chosen = sum(len(f.rows) for f in chosen)
    places = [*range(len(chosen)), *range(len(others))]
    exposures = np.repeat(places, [len(f.rows) for f in found])
    rows, height = (np.concatenate([getattr(f, n) for f in found]) for n in ("rows", "height"))
    canvas_y, canvas_x = (np.concatenate([f.on_canvas[axis] for f in found]) for axis in (0, 1))
    columns = _columns(merged, rows, exposures)
    if settings.method == "pvalue":
        columns[NEG_LOG_P] = np.asarray(height, np.float64)
    if merged.incomplete_text and (searched := merged.plan.progress):
        columns[SEARCHED] = np.full(len(rows), searched.share)
    kept = np.arange(n_chosen)
    if merged.plan.group_by:
        columns[GROUP] = np.array([e.id for e in merged.plan.exposures])[exposures]
        columns[SECOND_ZSCORE] = merged.values_at(SECOND_ZSCORE, canvas_y, canvas_x)
        columns[DIFFERENCE] = columns[SCALED_MIP] - columns[SECOND_ZSCORE]
    elif merged.plan.has_parts:
        columns |= {"canvas_y": canvas_y.astype(np.int32), "canvas_x": canvas_x.astype(np.int32)}
        columns[EXPOSURE] = np.array([e.id for e in merged.plan.exposures])[exposures]
        preferred = _preference(merged, exposures, rows, height)
        order = np.lexsort((*preferred, np.arange(len(rows)) >= n_chosen))
        distance = settings.same_distance
        distance = settings.min_distance if distance is None else distance
        agree = Tolerances(distance, settings.same_angle, settings.same_defocus)
        stands_for = join_duplicates(_poses_on_canvas(columns), order, agree)
        columns[ALSO_SEEN] = _also_seen(columns, stands_for)
        kept = np.flatnonzero(stands_for[:n_chosen] == np.arange(n_chosen))
    in_order = np.lexsort((exposures[kept], canvas_x[kept], canvas_y[kept], -height[kept]))
    kept = kept[in_order]
    table = ParticleTable({name: values[kept] for name, values in columns.items()}, info)
    return of_micrograph(table, store_name(merged.url))


def _preference(
    merged: MergedResult, exposures: Int64, rows: Float64, height: Float64
) -> tuple[AnyArray, ...]:
    """Return sort keys (last is primary) that rank duplicates by the overlap rule."""
    plan = merged.plan
    acquired = np.array([e.acquired for e in plan.exposures])[exposures]
    y, x = (column(rows, name) for name in ("y", "x"))
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
    """List the duplicates of each particle as text."""
    texts: list[list[str]] = [[] for _ in stands_for]
    for k in np.flatnonzero(stands_for != np.arange(len(stands_for))).tolist():
        where = f"{columns[EXPOSURE][k]}:{columns['pos_y'][k]}:{columns['pos_x'][k]}"
        texts[int(stands_for[k])].append(where)
    return np.array([" ".join(sorted(own)) for own in texts], dtype=str)


def _columns(merged: MergedResult, rows: Float64, exposures: Int64) -> dict[str, AnyArray]:
    """Return the table columns of peaks in their exposures, including subpixel positions."""
    y, x = (column(rows, name).astype(np.int32) for name in ("y", "x"))
    dy, dx = subpixel_offsets(_neighbourhoods(merged, rows, exposures))
    poses = _poses(merged, rows, exposures)
    totals = np.array([e.total_projections for e in merged.plan.exposures], np.int64)
    counts = totals[exposures]
    if merged.attributes.has_counts:
        counts = column(rows, COUNT).astype(np.int64)
        own = cache(partial(OwnMaps, merged))  # opens the partials of an exposure once
        for k in np.flatnonzero(counts >= 2**53).tolist():
            counts[k] = exact_count(merged, own, int(exposures[k]), int(y[k]), int(x[k]))
    return {
        "pos_y": y,
        "pos_x": x,
        **{name: column(rows, name).astype(np.float32) for name in (MIP, SCALED_MIP)},
        "psi": poses["best_psi"],
        "theta": poses["best_theta"],
        "phi": poses["best_phi"],
        "relative_defocus": poses["best_defocus"],
        "pixel_size_offset": poses["best_pixel_size"],
        **{name: column(rows, name).astype(np.float32) for name in (MEAN, STD)},
        "total_correlations": counts,
        BEST_PARTIAL: column(rows, BEST_PARTIAL).astype(np.int32),
        "pos_y_subpixel": (y + dy).astype(np.float32),
        "pos_x_subpixel": (x + dx).astype(np.float32),
    }


def _poses(merged: MergedResult, rows: Float64, exposures: Int64) -> dict[str, AnyArray]:
    """Return the poses of candidates by name; ``exposures`` are positions in the plan."""
    if merged.decoded_names and len(rows):
        index = column(rows, INDEX).astype(np.int32)
        numbers = np.array([e.number for e in merged.plan.exposures])[exposures]
        return dict(zip(POSES, merged.decode(index, numbers), strict=True))
    return {name: column(rows, name).astype(np.float32) for name in POSES}


def _neighbourhoods(merged: MergedResult, peaks: Float64, exposures: Int64) -> Float64:
    """Return z-scores (n, 3, 3) around peaks; the corners are unused and NaN."""
    around = np.full((len(peaks), 3, 3), np.nan)
    around[:, 1, 1] = column(peaks, SCALED_MIP)
    for name, (dy, dx) in zip(NEIGHBOUR_FIELDS, NEIGHBOURS, strict=True):
        beside = column(peaks, name).copy()
        for k in np.flatnonzero(np.isnan(beside)).tolist():
            y, x = int(column(peaks, "y")[k]) + dy, int(column(peaks, "x")[k]) + dx
            beside[k] = merged.zscore(merged.plan.exposures[exposures[k]], y, x)
        around[:, 1 + dy, 1 + dx] = beside
    return around
