"""Summary of all records of a merged result, written at the end of a merge."""

import hashlib
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ocelot_em.errors import FormatError
from ocelot_em.merge.overlap import SHOWN_FIELDS
from ocelot_em.merge.plan import MergePlan, PlannedExposure
from ocelot_em.merge.stats.collected import (
    N_FLAT,
    Histograms,
    PixelStatistics,
    candidate_level,
)
from ocelot_em.merge.stats.layout import Layout
from ocelot_em.merge.stats.totals import Totals
from ocelot_em.model.histograms import JOINT_MIP_AXIS, JOINT_Z_AXIS, MIP_AXIS, Z_AXIS, Axis
from ocelot_em.model.maps import (
    AnyArray,
    Float64,
)
from ocelot_em.model.threads import map_in_threads
from ocelot_em.store import attributes as fmt
from ocelot_em.store import constants, groups, statistics_attributes
from ocelot_em.store.contract import Objects, at_once, return_free_memory
from ocelot_em.store.sources import Source
from ocelot_em.store.tables import read_table, write_table

EXPOSURES_BETWEEN_TIDYING = 32
"""Exposures after which freed memory is returned to the system; each leaves some hundred kB."""

MAX_RECORDS_PER_CALL = 16
"""Maximum number of records that a thread adds before it takes others."""

STATISTICS = "statistics"
"""Path of the group with the statistics of the whole result."""

MIP_HISTOGRAM = "mip_histogram"
Z_HISTOGRAM = "scaled_mip_histogram"
JOINT_HISTOGRAM = "joint_histogram"


@dataclass(frozen=True)
class Summary:
    """Statistics of a merged result, read without its maps.

    Parameters
    ----------
    attributes
        Counts of pixels, ranges, partials.
    histograms
        Histograms of all valid, searched pixels.
    """

    attributes: statistics_attributes.StatisticsAttributes
    histograms: Histograms


def new_totals(plan: MergePlan) -> Totals | None:
    """Return sums of merged tiles, yet of none; None in a montage: large for every exposure."""
    if plan.has_parts:
        return None
    return Totals(Layout.of(plan, plan.exposures[0]).scope, np.zeros(N_FLAT, np.int64))


def finish(
    objects: Objects,
    plan: MergePlan,
    merged: Totals | None,
    to_read: Sequence[tuple[int, int]],
) -> None:
    """Add up the statistics of all tiles, and write the sums for each exposure and for all.

    Parameters
    ----------
    merged
        Sums of the tiles that were merged just now; None in a montage, of which all are read.
    to_read
        Rows and columns of the other tiles, whose records are read.
    """
    if merged is not None:
        (exposure,) = plan.exposures
        layout = Layout.of(plan, exposure)
        touched = [tile for tile in to_read if plan.pieces(plan.grid.at(*tile))]
        _add_up(objects, layout, merged, [layout.number_of(*tile) for tile in touched])
        _write_summary(objects, STATISTICS, merged.histograms, [(exposure, merged.statistics)], ())
        return
    # All exposures share this memory: an allocation for each would fragment the heap.
    all_histograms, flat = Histograms.empty("int64"), np.zeros(N_FLAT, np.int64)
    totals, described = [], []
    for position, exposure in enumerate(plan.exposures, 1):
        layout = Layout.of(plan, exposure)
        flat.fill(0)
        sums = Totals(layout.scope, flat)
        _add_up(objects, layout, sums, range(len(layout)))
        histograms, total = sums.histograms, sums.statistics
        totals.append((exposure, total))
        all_histograms.add(histograms, total.extremes)
        _write_summary(
            objects, statistics_path(exposure.number), histograms, [(exposure, total)], ()
        )
        shown = np.zeros(len(SHOWN_FIELDS))
        read = partial(layout.shown, objects)
        for own in map_in_threads(read, range(len(layout)), objects.requests):
            shown += own
        described.append(_exposure_statistics(exposure, int(histograms.z.sum()), total, shown))
        if position % EXPOSURES_BETWEEN_TIDYING == 0:
            return_free_memory()
    _write_summary(objects, STATISTICS, all_histograms, totals, tuple(described))


def _add_up(objects: Objects, layout: Layout, totals: Totals, numbers: Sequence[int]) -> None:
    """Add an exposure's records with these numbers to its totals."""
    lock = threading.Lock()

    def add(several: Sequence[int]) -> None:
        for number in several:
            reads: list[Callable[[], Any]] = [
                partial(layout.statistics, objects, number),
                partial(layout.counts, objects, number),
            ]
            statistics, counted = at_once(objects, reads)
            with lock:
                totals.histograms.add(counted, statistics.extremes)
                totals.add_statistics(statistics)

    # Several in a call, where there are many: a call costs as much as a record.
    n = len(numbers)
    size = max(1, min(MAX_RECORDS_PER_CALL, n // MAX_RECORDS_PER_CALL))
    if objects.requests is not None:  # a request takes longer
        size = 1
    batches = (numbers[start : start + size] for start in range(0, n, size))
    deque(map_in_threads(add, batches, objects.requests), maxlen=0)


def statistics_path(number: int) -> str:
    """Path of the group with the statistics of an exposure."""
    return f"{STATISTICS}/{constants.EXPOSURES}/{number}"


def _write_summary(
    objects: Objects,
    path: str,
    histograms: Histograms,
    totals: Sequence[tuple[PlannedExposure, PixelStatistics]],
    exposures: tuple[statistics_attributes.ExposureStatistics, ...],
) -> None:
    parts = path.split("/")
    folders = ["/".join(parts[:depth]) for depth in range(1, len(parts))]
    steps: list[Callable[[], object]] = [
        partial(groups.create_group, objects, folder, {}) for folder in folders
    ]
    tables = {}
    for name, counts, axes in (
        (MIP_HISTOGRAM, histograms.mip, (MIP_AXIS,)),
        (Z_HISTOGRAM, histograms.z, (Z_AXIS,)),
        (JOINT_HISTOGRAM, histograms.joint, (JOINT_MIP_AXIS, JOINT_Z_AXIS)),
    ):
        steps.append(partial(_write_histogram, objects, f"{path}/{name}", counts, axes))
        tables[name] = _digest(counts)
    attributes = _attributes(totals, int(histograms.z.sum()), exposures)
    attributes = attributes.model_copy(update={"tables": tables})
    steps.append(partial(groups.replace_attributes, objects, path, fmt.dump_attributes(attributes)))
    at_once(objects, steps)


def _digest(counts: AnyArray) -> str:
    """Return the SHA-256 of the values of a histogram."""
    return hashlib.sha256(np.ascontiguousarray(counts, "<i8").tobytes()).hexdigest()


def _write_histogram(objects: Objects, path: str, counts: AnyArray, axes: Sequence[Axis]) -> None:
    is_mip = path.endswith(f"/{MIP_HISTOGRAM}")
    dimensions = ("mip",) if is_mip else ("mip", "scaled_mip")[-counts.ndim :]
    attributes = {"low": [axis.low for axis in axes], "width": [axis.width for axis in axes]}
    write_table(objects, path, counts, dimensions, attributes)


def _attributes(
    totals: Sequence[tuple[PlannedExposure, PixelStatistics]],
    searched: int,
    exposures: tuple[statistics_attributes.ExposureStatistics, ...],
) -> statistics_attributes.StatisticsAttributes:
    """Combine the statistics of exposures into attributes."""
    extremes = np.array([total.extremes for _, total in totals])
    lowest_mip, lowest_z = map(float, extremes[:, (0, 2)].min(axis=0))
    highest_mip, highest_z = map(float, extremes[:, (1, 3)].max(axis=0))
    counts = np.sum([total.counts for _, total in totals], axis=0)
    nan, zero_std, unsearched = map(int, counts)
    level = max(candidate_level(exposure.total_projections) for exposure, _ in totals)
    return statistics_attributes.StatisticsAttributes(
        valid_pixels=sum(exposure.counted.size for exposure, _ in totals),
        searched_pixels=searched,
        unsearched_pixels=unsearched,
        nan_pixels=nan,
        zero_std_pixels=zero_std,
        mip_range=(lowest_mip, highest_mip) if searched else None,
        scaled_mip_range=(lowest_z, highest_z) if searched else None,
        candidate_level=level if np.isfinite(level) else None,
        n_candidates=sum(total.n_candidates for _, total in totals),
        partials=tuple(
            statistics_attributes.PartialStatistics(
                name=contribution.name,
                total_projections=contribution.total_projections,
                mean_projections=mean,
                won_pixels=int(won),
            )
            for exposure, total in totals
            for contribution, won, mean in zip(
                exposure.contributions,
                total.wins,
                _mean_projections(exposure, total),
                strict=True,
            )
        ),
        sources=tuple(
            _source_statistics(source, moments, means[source.first_number])
            for exposure, total in totals
            for means in [_mean_projections(exposure, total)]
            for source, moments in zip(exposure.sources, total.moments, strict=True)
        ),
        exposures=exposures,
    )


def _mean_projections(exposure: PlannedExposure, total: PixelStatistics) -> list[float | None]:
    """Return the mean of each partial's map of counts over the pixels; None if it has none."""
    means = iter((total.projections / max(exposure.counted.size, 1)).tolist())
    return [
        next(means) if source.is_counted_by_pixel else None
        for source in exposure.sources
        for _ in source.contributions
    ]


def _exposure_statistics(
    exposure: PlannedExposure, searched: int, total: PixelStatistics, shown: Float64
) -> statistics_attributes.ExposureStatistics:
    alone, overlap = shown.reshape(2, -1)
    means, mean = _mean_projections(exposure, total), None
    if means.count(None) < len(means):
        counts = (own.total_projections for own in exposure.contributions)
        mean = sum(n if own is None else own for own, n in zip(means, counts, strict=True))
    return statistics_attributes.ExposureStatistics(
        id=exposure.id,
        number=exposure.number,
        total_projections=exposure.total_projections,
        mean_projections=mean,
        valid_pixels=exposure.counted.size,
        searched_pixels=searched,
        alone=_shown_statistics(alone),
        overlap=_shown_statistics(overlap),
    )


def _shown_statistics(sums: Float64) -> statistics_attributes.ShownStatistics:
    pixels, total, squared_total = map(float, sums)
    if not pixels:
        return statistics_attributes.ShownStatistics(pixels=0)
    mean = total / pixels
    variance = max(squared_total / pixels - mean * mean, 0.0)
    return statistics_attributes.ShownStatistics(pixels=int(pixels), mean=mean, std=variance**0.5)


def _source_statistics(
    source: Source, moments: Float64, mean_count: float | None
) -> statistics_attributes.SourceStatistics:
    """Compute statistics of a source's correlations from sums over the pixels of its maps."""
    (n, total, squared_total), (n_squared, energy, _) = moments
    about = partial(
        statistics_attributes.SourceStatistics,
        name=source.name,
        total_projections=source.total_projections,
    )
    count = source.total_projections if mean_count is None else mean_count
    known = n > 0 and n_squared > 0 and count > 0
    if not known:
        return about()
    mean, spread = total / n, None
    # Mean over pixels of Q / N - (S / N)**2; with a map of counts, variance of all correlations.
    variance = energy / n_squared / count - squared_total / n / count**2
    if mean_count is not None:
        variance = energy / n_squared / count - (mean / count) ** 2
    else:
        spread = max(squared_total / n - mean * mean, 0.0) ** 0.5 / count
    return about(
        mean=mean / count,
        mean_spread=spread,
        std=max(variance, 0.0) ** 0.5,
        correlation_sum=float(total),
        correlation_squared_sum=float(energy),
    )


def read_statistics(
    objects: Objects, path: str
) -> statistics_attributes.StatisticsAttributes | None:
    """Read the statistics of a group without their histograms; None if it does not exist.

    Raises
    ------
    FormatError
    """
    attributes = groups.group_attributes(objects, path)
    if attributes is None:
        return None
    return fmt.parse_attributes(
        statistics_attributes.StatisticsAttributes, attributes, f"{objects.url}/{path}"
    )


def read_histograms(
    objects: Objects, path: str, statistics: statistics_attributes.StatisticsAttributes
) -> Histograms:
    """Read the histograms of the statistics of a group.

    Raises
    ------
    FormatError
    """
    names, expected = (MIP_HISTOGRAM, Z_HISTOGRAM, JOINT_HISTOGRAM), Histograms.empty("int64")
    tables = []
    for name, like in zip(names, (expected.mip, expected.z, expected.joint), strict=True):
        table = read_table(objects, f"{path}/{name}", max_nbytes=like.nbytes)
        if (table.shape, table.dtype) != (like.shape, like.dtype) or (table < 0).any():
            raise FormatError(
                f"{objects.url}/{path}/{name}: expected {like.dtype} counts of shape {like.shape}, "
                f"got {table.dtype} of shape {table.shape}, the lowest {table.min()}"
            )
        if statistics.tables and statistics.tables.get(name) != _digest(table):
            raise FormatError(
                f"{objects.url}/{path}/{name}: the counts are not those that were written here; "
                "merge again"
            )
        tables.append(table)
    return Histograms(*tables)
