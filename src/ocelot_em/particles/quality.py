"""Warnings about unusual results: faulty devices, wrong counts, duplicate shares, seams."""

from collections.abc import Iterator, Mapping, Sequence
from statistics import median

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

STD_RATIO = 1.05
"""Maximum factor between a partial's standard deviation and the median of all; within 0.3 % in the
shards of a real search. A count that is 10 % wrong causes 5 %."""

MEAN_DIFFERENCE = 0.05
"""Maximum difference of a partial's mean from the median, in standard deviations."""

SEAM = 0.25
"""Maximum difference between means of shown z-scores, in standard deviations; larger ones are
visible."""

LIKE_COUNTS = 2
"""Maximum factor between projection counts of compared exposures."""

MIN_SHOWN = 1000
"""Minimum pixels per side of a seam; with fewer, chance and particles explain differences."""


def partial_warnings(statistics: StatisticsAttributes) -> list[str]:
    """Return warnings about partials that differ from the others.

    One sentence per warning; empty if nothing is unusual. For a single partial, only its wins can
    be checked.
    """
    return [
        *_wins(statistics),
        *_outliers([s for s in statistics.sources if s.mean is not None]),
        *_duplicate_sources(statistics.sources),
    ]


def montage_warnings(
    statistics: StatisticsAttributes, of_exposures: Mapping[str, StatisticsAttributes]
) -> list[str]:
    """Return warnings about a montage: unusual partials of each exposure, and seams.

    One sentence per warning; empty if nothing is unusual. ``of_exposures`` are the statistics of
    the exposures, by id.
    """
    return [
        *(
            f"exposure {name}: {sentence}"
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
            f"visible seams: the z-scores have a mean of {overlap.mean:.3g} where exposures "
            f"overlap and of {alone.mean:.3g} elsewhere, {abs(difference):.2g} standard deviations "
            "apart" + (" (the highest of several values is higher)" if difference > 0 else "")
        )
    for exposure in statistics.exposures:
        alone, overlap = exposure.alone, exposure.overlap
        difference = difference_in_std(overlap, alone)
        if difference is not None and abs(difference) > SEAM and not everywhere:
            yield (
                f"exposure {exposure.id}: visible seam: its z-scores have a mean of "
                f"{overlap.mean:.3g} where it overlaps others and of {alone.mean:.3g} elsewhere, "
                f"{abs(difference):.2g} standard deviations apart"
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
                f"exposure {exposure.id}: unusual: its z-scores have a mean of "
                f"{exposure.alone.mean:.3g}, and the median of comparable exposures is "
                f"{usual.mean:.3g}, {abs(difference):.2g} standard deviations apart"
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
    projections = max(sum(partial.total_projections for partial in partials), 1)
    won = sum(partial.won_pixels for partial in partials)
    return [won * partial.total_projections / projections for partial in partials]


def _wins(statistics: StatisticsAttributes) -> Iterator[str]:
    partials = statistics.partials
    for partial, expected in zip(partials, expected_wins(partials), strict=True):
        if expected < MIN_EXPECTED_WINS:
            continue
        if partial.won_pixels == 0:
            yield (
                f"{partial.name}: won no pixel, expected about {expected:,.0f} by its count: its "
                "device was idle or failed, or an earlier partial searched the same share"
            )
        elif not 1 / WIN_RATIO <= partial.won_pixels / expected <= WIN_RATIO:
            many = "more" if partial.won_pixels > expected else "fewer"
            yield (
                f"{partial.name}: won {partial.won_pixels:,} pixels, {many} than the "
                f"{expected:,.0f} expected by its count: its count is wrong, or its device "
                "computed other correlations than the others"
            )


def _outliers(known: list[SourceStatistics]) -> Iterator[str]:
    if len(known) < 2:
        return
    usual_std = median(_or_zero(source.std) for source in known)
    usual_mean = median(_or_zero(source.mean) for source in known)
    for source in known:
        std, mean = _or_zero(source.std), _or_zero(source.mean)
        if usual_std > 0 and not 1 / STD_RATIO <= std / usual_std <= STD_RATIO:
            yield (
                f"{source.name}: its correlations have a standard deviation of {std:.4g}, and the "
                f"median of all is {usual_std:.4g}: its count is wrong, or its device failed"
            )
        elif abs(mean - usual_mean) > MEAN_DIFFERENCE * usual_std:
            yield (
                f"{source.name}: its correlations have a mean of {mean:.4g}, and the median of all "
                f"is {usual_mean:.4g}: its device failed, or it searched another image"
            )


def _duplicate_sources(sources: tuple[SourceStatistics, ...]) -> Iterator[str]:
    first: dict[tuple[float, float], str] = {}
    for source in sources:
        if source.correlation_sum is None or source.correlation_squared_sum is None:
            continue
        sums = source.correlation_sum, source.correlation_squared_sum
        if any(sums) and sums in first:
            yield (
                f"{source.name}: has the same sums as {first[sums]}: the same share was searched "
                "or imported twice; merge again without one of them"
            )
        first.setdefault(sums, source.name)


def _or_zero(value: float | None) -> float:
    return 0.0 if value is None else value
