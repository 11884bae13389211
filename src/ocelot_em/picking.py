"""From a merged result to particles: cutoff, candidates, peaks, table.

What a merge has collected is enough for most; maps are read only where it is not: tile by tile, of
tiles that can hold something.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from os import PathLike
from statistics import NormalDist
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ocelot_em import format as fmt
from ocelot_em.canvas import Region
from ocelot_em.collected import (
    CANDIDATE_FIELDS,
    GATHERED,
    NEIGHBOUR_FIELDS,
    NEIGHBOURS,
    neighbours_of,
)
from ocelot_em.errors import IncompleteError, InvalidInputError
from ocelot_em.maps import (
    BEST_PARTIAL,
    COUNT,
    INDEX,
    MEAN,
    MIP,
    POSES,
    SCALED_MIP,
    STD,
    AnyArray,
    Float64,
)
from ocelot_em.objects import open_objects
from ocelot_em.particles import NEG_LOG_P, About, ParticleTable
from ocelot_em.peaks import select_peaks, subpixel_offsets
from ocelot_em.records import Summary, open_merged_result, read_candidates, read_summary
from ocelot_em.search import open_partial_maps, read_search_space
from ocelot_em.significance import (
    NEG_LOG_P_CUTOFF,
    PValueModel,
    gev_cutoff,
)
from ocelot_em.statistics import gaussian_cutoff
from ocelot_em.store import ChunkedMap

Wanted = Callable[[AnyArray, AnyArray], AnyArray]
"""Which pixels are candidates, by their ``mip`` and z-score."""


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
        No two peaks are closer, in pixels.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Literal["gaussian", "gev", "pvalue"] = "gaussian"
    false_positives: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    cutoff: Annotated[float, Field(allow_inf_nan=False)] | None = None
    min_distance: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 5.0


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
        ``min_distance``.

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
    attributes = open_merged_result(objects)
    summary = read_summary(store)
    if summary is None:
        raise IncompleteError(
            f"{objects.url}: it was merged without statistics, by an earlier version; merge again"
        )
    merged = MergedMaps.open(store)
    model = None
    if asked.method == "pvalue":
        model = p_value_model(summary)
        cutoff = NEG_LOG_P_CUTOFF if asked.cutoff is None else asked.cutoff
        candidates = scan(merged, _rarer_than(model, summary, cutoff))
        height = model.neg_log_p(_column(candidates, MIP), _column(candidates, SCALED_MIP))
    else:
        cutoff = cutoff_of(asked, attributes, summary)
        candidates = candidates_from(store, merged, cutoff)
        height = _column(candidates, SCALED_MIP)
    y, x = (_column(candidates, name).astype(np.int64) for name in ("y", "x"))
    chosen = select_peaks(y, x, height, asked.min_distance)
    about = About(
        store=objects.url,
        method=asked.method if asked.cutoff is None else "cutoff",
        cutoff=cutoff,
        min_distance_px=asked.min_distance,
        false_positives=None
        if asked.cutoff is not None or asked.method == "pvalue"
        else asked.false_positives,
        pixel_size_angstrom=attributes.pixel_size_angstrom,
        shape=attributes.shape,
        valid_shape=attributes.valid_shape,
    )
    neg_log_p = None if model is None else height[chosen]
    return _table(merged, attributes, candidates[chosen], neg_log_p, about)


def p_value_model(summary: Summary) -> PValueModel:
    """Return the p-value model of a whole map."""
    counted = summary.histograms
    return PValueModel.from_histogram(counted.of_both(), counted.of_mip(), counted.of_z())


def cutoff_of(options: PickOptions, attributes: fmt.MergedAttributes, summary: Summary) -> float:
    """z-score from which a pixel is significant."""
    if options.cutoff is not None:
        return options.cutoff
    if options.method == "gev":
        return gev_cutoff(summary.histograms.of_z(), options.false_positives)
    return gaussian_cutoff(
        summary.attributes.valid_pixels, attributes.total_projections, options.false_positives
    )


def candidates_from(store: str | PathLike[str], merged: "MergedMaps", cutoff: float) -> Float64:
    """All valid pixels with a z-score of at least ``cutoff``, columns :data:`CANDIDATE_FIELDS`."""
    candidates, level = read_candidates(store)
    if cutoff >= level:
        return candidates[_column(candidates, SCALED_MIP) >= np.float32(cutoff)]
    return scan(merged, lambda _, z: z >= np.float32(cutoff))


def _rarer_than(model: PValueModel, summary: Summary, cutoff: float) -> Wanted:
    """Pixels whose -ln p is at least ``cutoff``; it is computed only where it can be."""
    mip_level, z_level = _levels_of(model, summary, cutoff)

    def wanted(mip: AnyArray, z: AnyArray) -> AnyArray:
        rare = ((mip >= mip_level) | (z >= z_level)) & (mip > -np.inf) & np.isfinite(z)
        rare[rare] = model.neg_log_p(mip[rare], z[rare]) >= cutoff
        return rare

    return wanted


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


@dataclass(frozen=True)
class MergedMaps:
    """The stored maps of a merged result, read region by region.

    Parameters
    ----------
    maps
        By name.
    valid_shape
        Of their valid pixels.
    decode
        Turns indices into poses, where these are not stored.
    """

    maps: dict[str, ChunkedMap]
    valid_shape: tuple[int, int]
    decode: Callable[[AnyArray], tuple[AnyArray, ...]] | None

    @classmethod
    def open(cls, store: str | PathLike[str]) -> "MergedMaps":
        """Open what is stored."""
        objects = open_objects(store)
        attributes = open_merged_result(objects)
        maps = open_partial_maps(objects, "", "", attributes.maps.merged, attributes.shape)
        space = read_search_space(objects, attributes.search_space_digest)
        decode = space.decode if space is not None and not attributes.maps.decoded else None
        return cls(maps, attributes.valid_shape, decode)

    def read(self, region: Region, name: str) -> AnyArray:
        """Values of a map over a region."""
        return self.maps[name].read(region)[0]

    def regions(self) -> Iterator[Region]:
        """The valid pixels, in whole chunks."""
        for chunk in self.maps[SCALED_MIP].grid:
            region = chunk.region.intersect(Region.whole(self.valid_shape))
            if region.size:
                yield region


def scan(merged: MergedMaps, wanted: Wanted) -> Float64:
    """Read maps for candidates, tile by tile; columns :data:`CANDIDATE_FIELDS`."""

    def look(region: Region) -> Float64:
        mip, z = merged.read(region, MIP), merged.read(region, SCALED_MIP)
        y, x = np.nonzero(wanted(mip, z))
        rows = np.full((len(y), len(CANDIDATE_FIELDS)), np.nan)
        if not len(y):
            return rows
        _put(rows, "y", y + region.y0)
        _put(rows, "x", x + region.x0)
        for name in GATHERED:
            if name in merged.maps:
                _put(rows, name, merged.read(region, name)[y, x])
        for name, beside in neighbours_of(z, y, x):
            _put(rows, name, beside)
        return rows

    with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        found = list(pool.map(look, merged.regions()))
    return np.concatenate([np.empty((0, len(CANDIDATE_FIELDS))), *found])


def _put(rows: Float64, name: str, values: AnyArray) -> None:
    rows[:, CANDIDATE_FIELDS.index(name)] = values


def _column(rows: Float64, name: str) -> Float64:
    return rows[:, CANDIDATE_FIELDS.index(name)]


def _table(
    merged: MergedMaps,
    attributes: fmt.MergedAttributes,
    peaks: Float64,
    neg_log_p: Float64 | None,
    about: About,
) -> ParticleTable:
    """Put a table together; pixels beyond a tile's edge are looked up for positions in between."""
    y, x = (_column(peaks, name).astype(np.int32) for name in ("y", "x"))
    around = _neighbourhoods(merged, peaks)
    dy, dx = subpixel_offsets(around)
    poses = {name: _column(peaks, name).astype(np.float32) for name in POSES}
    if merged.decode is not None and len(peaks):
        index = _column(peaks, INDEX).astype(np.int32)
        poses = dict(zip(POSES, merged.decode(index), strict=True))
    counts = np.full(len(peaks), attributes.total_projections, np.int64)
    if attributes.has_counts:
        counts = _column(peaks, COUNT).astype(np.int64)
    columns: dict[str, AnyArray] = {
        "pos_y": y,
        "pos_x": x,
        **{name: _column(peaks, name).astype(np.float32) for name in (MIP, SCALED_MIP)},
        "psi": poses["best_psi"],
        "theta": poses["best_theta"],
        "phi": poses["best_phi"],
        "relative_defocus": poses["best_defocus"],
        "pixel_size_offset": poses["best_pixel_size"],
        **{name: _column(peaks, name).astype(np.float32) for name in (MEAN, STD)},
        "total_correlations": counts,
        BEST_PARTIAL: _column(peaks, BEST_PARTIAL).astype(np.int32),
        "pos_y_subpixel": (y + dy).astype(np.float32),
        "pos_x_subpixel": (x + dx).astype(np.float32),
    }
    if neg_log_p is not None:
        columns[NEG_LOG_P] = np.asarray(neg_log_p, np.float64)
    return ParticleTable(columns, about)


def _neighbourhoods(merged: MergedMaps, peaks: Float64) -> Float64:
    """z-scores (n, 3, 3) around peaks, NaN in the corners, which nobody looks at."""
    around = np.full((len(peaks), 3, 3), np.nan)
    around[:, 1, 1] = _column(peaks, SCALED_MIP)
    whole = Region.whole(merged.valid_shape)
    for name, (dy, dx) in zip(NEIGHBOUR_FIELDS, NEIGHBOURS, strict=True):
        beside = _column(peaks, name).copy()
        for number in np.flatnonzero(np.isnan(beside)):
            y, x = int(_column(peaks, "y")[number]) + dy, int(_column(peaks, "x")[number]) + dx
            pixel = Region(y, y + 1, x, x + 1)
            if pixel.intersect(whole) == pixel and y >= 0 and x >= 0:
                beside[number] = merged.read(pixel, SCALED_MIP)[0, 0]
        around[:, 1 + dy, 1 + dx] = beside
    return around
