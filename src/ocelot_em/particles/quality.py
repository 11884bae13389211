"""Warnings about unusual results: faulty devices, wrong counts, duplicate shares, seams."""

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import median

import numpy as np

from ocelot_em.model.histograms import Histogram1D
from ocelot_em.model.maps import SCALED_MIP
from ocelot_em.particles.table import ParticleTable
from ocelot_em.store.statistics_attributes import (
    PartialStatistics,
    ShownStatistics,
    SourceStatistics,
    StatisticsAttributes,
)

WIN_RATIO = 1.25
"""Maximum factor between pixels won and pixels expected from a partial's share of projections;
within 1 % in the shards of a real search."""

MIN_EXPECTED_WINS = 1000
"""Minimum expected wins; below it, any ratio can be due to chance."""

MIN_PROJECTIONS = 1000
"""Minimum projections of a partial whose wins are judged; a few similar ones win by chance."""

RMS_DIFFERENCE = 0.005
"""Maximum relative difference between the root mean squares of partials' correlations; within
0.11 % in the shards of real searches. A count that is 2 % wrong causes 1 %."""

CHANCE = 0.15
"""Additional relative difference for n projections, times the square root of n: three times what
shares of 2 to 100 similar projections of simulated particles had."""

MEAN_DIFFERENCE = 0.05
"""Maximum difference of a partial's mean from the others', in root mean squares."""

SEAM = 0.25
"""Maximum difference between means of shown z-scores, in standard deviations; larger ones are
visible."""

LIKE_COUNTS = 2
"""Maximum factor between projection counts of compared exposures."""

MIN_SHOWN = 1000
"""Minimum pixels per side of a seam; with fewer, chance and particles explain differences."""


NOISE_SHARE = 0.01
"""Minimum share of all pixels that reach a z-score of noise; particles are far fewer."""


def picking_warnings(particles: ParticleTable, z_scores: Histogram1D) -> list[str]:
    """Return a warning, if any, about particles whose z-scores are those of noise.

    ``z_scores`` is the histogram of all pixels.
    """
    z = particles.columns[SCALED_MIP]
    z = z[z_scores.pixels - z_scores.below(z) > NOISE_SHARE * z_scores.pixels]
    if not z.size:
        return []
    low, high = (f"{end:.2f}" for end in (z.min(), z.max()))
    z_text = f"a z-score of {low}" if low == high else f"z-scores of {low} to {high}"
    has, them = ("has", "it") if z.size == 1 else ("have", "them")
    return [
        f"{z.size:,} of {np.size(particles.columns[SCALED_MIP]):,} particles {has} {z_text}, which "
        f"more than {NOISE_SHARE:.0%} of all pixels reach: noise has as much. A higher cutoff, or "
        f"picking by z-score, leaves {them} out."
    ]


def partial_warnings(statistics: StatisticsAttributes) -> list[str]:
    """Return warnings about partials that differ from the others.

    One sentence per warning; empty if nothing is unusual. For a single partial, only its wins can
    be checked.
    """
    return [
        *_wins(statistics),
        *_outliers(statistics.sources),
        *_duplicate_sources(statistics.sources),
    ]


def montage_warnings(
    statistics: StatisticsAttributes,
    of_exposures: Mapping[str, StatisticsAttributes],
    part: str = "exposure",
) -> list[str]:
    """Return warnings about a montage or groups: unusual partials of each part, and seams.

    One sentence per warning; empty if nothing is unusual. ``of_exposures`` are the statistics of
    the exposures, by id.
    """
    return [
        *(
            f"{part.capitalize()} {name}: {sentence[0].lower()}{sentence[1:]}"
            for name, own in of_exposures.items()
            for sentence in partial_warnings(own)
        ),
        *_seams(statistics),
    ]


def _seams(statistics: StatisticsAttributes) -> Iterator[str]:
    """Yield warnings about visible seams and unusual exposures."""
    alone, overlap = (
        _pooled([getattr(exposure, where) for exposure in statistics.exposures])
        for where in ("alone", "overlap")
    )
    difference = difference_in_std(overlap, alone)
    everywhere = difference is not None and abs(difference) > SEAM
    if difference is not None and everywhere:
        yield (
            f"Visible seams: the z-scores have a mean of {overlap.mean:.3g} where exposures "
            f"overlap and of {alone.mean:.3g} elsewhere, {abs(difference):.2g} standard deviations "
            "apart" + (" (the highest of several values is higher)." if difference > 0 else ".")
        )
    for exposure in statistics.exposures:
        alone, overlap = exposure.alone, exposure.overlap
        difference = difference_in_std(overlap, alone)
        if difference is not None and abs(difference) > SEAM and not everywhere:
            yield (
                f"Exposure {exposure.id}: visible seam: its z-scores have a mean of "
                f"{overlap.mean:.3g} where it overlaps others and of {alone.mean:.3g} elsewhere, "
                f"{abs(difference):.2g} standard deviations apart."
            )
    known = [e for e in statistics.exposures if e.alone.pixels >= MIN_SHOWN]
    for exposure in known:
        # The mean of the highest of N correlations grows with N.
        n = exposure.total_projections
        alike = [
            e.alone for e in known if n / LIKE_COUNTS <= e.total_projections <= n * LIKE_COUNTS
        ]
        if len(alike) < 3:
            continue
        usual = sorted(alike, key=lambda shown: _or_zero(shown.mean))[len(alike) // 2]
        difference = difference_in_std(exposure.alone, usual)
        if difference is not None and abs(difference) > SEAM:
            yield (
                f"Exposure {exposure.id}: unusual: its z-scores have a mean of "
                f"{exposure.alone.mean:.3g}, and the median of comparable exposures is "
                f"{usual.mean:.3g}, {abs(difference):.2g} standard deviations apart."
            )


def _pooled(parts: list[ShownStatistics]) -> ShownStatistics:
    """Pool the statistics of several sets of pixels."""
    pixels = sum(part.pixels for part in parts)
    if not pixels:
        return ShownStatistics(pixels=0)
    mean = sum(part.pixels * _or_zero(part.mean) for part in parts) / pixels
    squares = sum(
        part.pixels * (_or_zero(part.std) ** 2 + _or_zero(part.mean) ** 2) for part in parts
    )
    return ShownStatistics(
        pixels=pixels, mean=mean, std=max(squares / pixels - mean * mean, 0.0) ** 0.5
    )


def difference_in_std(one: ShownStatistics, other: ShownStatistics) -> float | None:
    """Return the difference of means in standard deviations of ``other``, or None."""
    if min(one.pixels, other.pixels) < MIN_SHOWN or not other.std:
        return None
    return (_or_zero(one.mean) - _or_zero(other.mean)) / other.std


def expected_wins(partials: Sequence[PartialStatistics]) -> list[float]:
    """Return the pixels that each partial would win by its share of the projections."""
    projections = max(sum(partial.projections for partial in partials), 1)
    won = sum(partial.won_pixels for partial in partials)
    return [won * partial.projections / projections for partial in partials]


def _wins(statistics: StatisticsAttributes) -> Iterator[str]:
    partials = statistics.partials
    for partial, expected in zip(partials, expected_wins(partials), strict=True):
        if expected < MIN_EXPECTED_WINS or partial.total_projections < MIN_PROJECTIONS:
            continue
        if partial.won_pixels == 0:
            yield (
                f"Partial {partial.name} won no pixel, expected about {expected:,.0f} by its "
                "count: its device was idle or failed, or an earlier partial "
                "searched the same share."
            )
        elif not 1 / WIN_RATIO <= partial.won_pixels / expected <= WIN_RATIO:
            many = "more" if partial.won_pixels > expected else "fewer"
            yield (
                f"Partial {partial.name} won {partial.won_pixels:,} pixels, {many} than the "
                f"{expected:,.0f} expected by its count: its count is wrong, or its device "
                "computed other correlations than the others."
            )


def rms_of(source: SourceStatistics) -> float:
    """Return the root mean square of a source's correlations; NaN if unknown.

    Unlike the standard deviation, it is not lower for a few correlated projections.
    """
    if source.mean is None:
        return math.nan
    parts = source.std, source.mean, source.mean_spread
    return math.hypot(*(_or_zero(part) for part in parts))


def rms_deviations(sources: Sequence[SourceStatistics]) -> list[tuple[float, bool]]:
    """Compare the root mean square of each source with those of the others.

    Return its ratio to the other's if there are two, else to the median of all, and whether it is
    unusual: a wrong count, or a faulty device. NaN if there is nothing to compare.
    """
    found = []
    for source, others in _with_others(sources):
        usual = median(map(rms_of, others)) if others else math.nan
        ratio = rms_of(source) / usual if usual > 0 else math.nan
        unusual = abs(math.log(max(ratio, 1e-9))) > RMS_DIFFERENCE + _chance(source, others)
        found.append((ratio, unusual))
    return found


def _with_others(
    sources: Sequence[SourceStatistics],
) -> Iterator[tuple[SourceStatistics, list[SourceStatistics]]]:
    """Yield each source with those that it is compared with: the other one, or a median pair."""
    known = sorted((s for s in sources if s.mean is not None), key=rms_of)
    middle = known[(len(known) - 1) // 2 : len(known) // 2 + 1]
    for source in sources:
        others = [s for s in known if s is not source] if len(known) == 2 else middle
        yield source, others if source.mean is not None and len(known) > 1 else []


def _chance(source: SourceStatistics, others: Sequence[SourceStatistics]) -> float:
    """Relative difference that few projections explain."""
    fewest = min((s.total_projections for s in others), default=1)
    return CHANCE / math.sqrt(source.total_projections or 1) + CHANCE / math.sqrt(fewest or 1)


def _outliers(sources: Sequence[SourceStatistics]) -> Iterator[str]:
    deviations = rms_deviations(sources)
    is_pair = sum(source.mean is not None for source in sources) == 2
    for (source, others), (_, unusual) in zip(_with_others(sources), deviations, strict=True):
        if not others or (is_pair and others[0] in sources[: sources.index(source)]):
            continue
        who = f"{source.name} or {others[0].name}" if is_pair else source.name
        rms, usual_rms = rms_of(source), median(map(rms_of, others))
        mean, usual_mean = (median(_or_zero(s.mean) for s in some) for some in ([source], others))
        if unusual:
            yield (
                f"Input {who}: the correlations of {source.name} have a root mean square of "
                f"{rms:.4g}, those of {'the other' if is_pair else 'the others'} {usual_rms:.4g}: "
                "a count is wrong, or a device failed."
            )
        elif abs(mean - usual_mean) > (MEAN_DIFFERENCE + _chance(source, others)) * usual_rms:
            yield (
                f"Input {who}: the correlations of {source.name} have a mean of {mean:.4g}, "
                f"those of {'the other' if is_pair else 'the others'} {usual_mean:.4g}: a device "
                "failed, or searched another image."
            )


def _duplicate_sources(sources: tuple[SourceStatistics, ...]) -> Iterator[str]:
    first: dict[tuple[float, float], str] = {}
    for source in sources:
        if source.correlation_sum is None or source.correlation_squared_sum is None:
            continue
        sums = source.correlation_sum, source.correlation_squared_sum
        if any(sums) and sums in first:
            yield (
                f"Input {source.name} has the same sums as {first[sums]}: the same share was "
                "searched or imported twice; merge again without one of them."
            )
        first.setdefault(sums, source.name)


def _or_zero(value: float | None) -> float:
    return 0.0 if value is None else value
