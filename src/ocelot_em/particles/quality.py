"""What looks wrong, in words: a faulty device, a wrong count, a share searched twice, a seam."""

from collections.abc import Iterator, Mapping
from statistics import median

from ocelot_em.store.statistics_attributes import (
    ShownStatistics,
    SourceStatistics,
    StatisticsAttributes,
)

WIN_RATIO = 1.25
"""Pixels won may be so many times more, or fewer, than a partial's share of the projections. In the
shards of a real search they were within 1 %."""

MIN_EXPECTED_WINS = 1000
"""Below that, chance explains every ratio."""

STD_RATIO = 1.05
"""Standard deviations of a partial's correlations may be so many times those of the others. In the
shards of a real search they were within 0.3 %; a count that is wrong by a tenth makes 5 %."""

MEAN_DIFFERENCE = 0.05
"""Their means may differ by so many standard deviations."""

SEAM = 0.25
"""Means of shown z-scores may differ by so many standard deviations; from about there on an eye
sees the seam in a picture."""

LIKE_COUNTS = 2
"""Exposures are compared with those of at most so many times more, or fewer, projections."""

MIN_SHOWN = 1000
"""Pixels on both sides of a seam; below that, chance and particles explain a difference."""


def partial_warnings(statistics: StatisticsAttributes) -> list[str]:
    """Say what is unlike the other partials.

    Parameters
    ----------
    statistics
        Of a merged result.

    Returns
    -------
    list of str
        One sentence each; empty if nothing stands out. Of one partial alone only its wins can be
        judged.
    """
    return [
        *_wins(statistics),
        *_unlike_the_others([s for s in statistics.sources if s.mean is not None]),
        *_twins(statistics.sources),
    ]


def montage_warnings(
    statistics: StatisticsAttributes, of_exposures: Mapping[str, StatisticsAttributes]
) -> list[str]:
    """Say what of a montage is out of line: partials among those of their exposure, and seams.

    Parameters
    ----------
    statistics
        Of the montage.
    of_exposures
        Of its exposures, by their ids.

    Returns
    -------
    list of str
        One sentence each; empty if nothing stands out.
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
    """Edges of exposures that can be seen in the shown z-scores."""
    alone, overlap = (
        _together([getattr(exposure, where) for exposure in statistics.exposures])
        for where in ("alone", "overlap")
    )
    difference = _difference(overlap, alone)
    everywhere = difference is not None and abs(difference) > SEAM
    if difference is not None and everywhere:
        yield (
            f"seams can be seen: the z-scores have a mean of {overlap.mean:.3g} where exposures "
            f"overlap, and of {alone.mean:.3g} where one is alone, {abs(difference):.2g} standard "
            "deviations apart" + (" (the highest of several is higher)" if difference > 0 else "")
        )
    for exposure in statistics.exposures:
        alone, overlap = exposure.alone, exposure.overlap
        difference = _difference(overlap, alone)
        if difference is not None and abs(difference) > SEAM and not everywhere:
            yield (
                f"exposure {exposure.id}: a seam can be seen: its z-scores have a mean of "
                f"{overlap.mean:.3g} where other exposures lie, too, and of {alone.mean:.3g} where "
                f"it is alone, {abs(difference):.2g} standard deviations apart"
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
        usual = sorted(alike, key=lambda shown: _number(shown.mean))[len(alike) // 2]
        difference = _difference(exposure.alone, usual)
        if difference is not None and abs(difference) > SEAM:
            yield (
                f"exposure {exposure.id}: stands out: its z-scores have a mean of "
                f"{exposure.alone.mean:.3g}, those of the exposures together {usual.mean:.3g} in "
                f"the median, {abs(difference):.2g} standard deviations apart"
            )


def _together(parts: list[ShownStatistics]) -> ShownStatistics:
    """Statistics of the pixels of several."""
    pixels = sum(part.pixels for part in parts)
    if not pixels:
        return ShownStatistics(pixels=0)
    mean = sum(part.pixels * _number(part.mean) for part in parts) / pixels
    squares = sum(
        part.pixels * (_number(part.std) ** 2 + _number(part.mean) ** 2) for part in parts
    )
    return ShownStatistics(
        pixels=pixels, mean=mean, std=max(squares / pixels - mean * mean, 0.0) ** 0.5
    )


def _difference(one: ShownStatistics, other: ShownStatistics) -> float | None:
    """Between means, in standard deviations of the other; None where too little is known."""
    if min(one.pixels, other.pixels) < MIN_SHOWN or not other.std:
        return None
    return (_number(one.mean) - _number(other.mean)) / other.std


def _wins(statistics: StatisticsAttributes) -> Iterator[str]:
    total = sum(partial.total_projections for partial in statistics.partials)
    won = sum(partial.won_pixels for partial in statistics.partials)
    for partial in statistics.partials:
        expected = won * partial.total_projections / total if total else 0
        if expected < MIN_EXPECTED_WINS:
            continue
        if partial.won_pixels == 0:
            yield (
                f"{partial.name}: won no pixel, expected about {expected:,.0f} by its count: its "
                "device was idle or failed, or its share was searched by an earlier partial, too"
            )
        elif not 1 / WIN_RATIO <= partial.won_pixels / expected <= WIN_RATIO:
            many = "more" if partial.won_pixels > expected else "fewer"
            yield (
                f"{partial.name}: won {partial.won_pixels:,} pixels, {many} than the "
                f"{expected:,.0f} expected by its count: its count is wrong, or its device "
                "computed other correlations than the others"
            )


def _unlike_the_others(known: list[SourceStatistics]) -> Iterator[str]:
    if len(known) < 2:
        return
    usual_std = median(_number(source.std) for source in known)
    usual_mean = median(_number(source.mean) for source in known)
    for source in known:
        std, mean = _number(source.std), _number(source.mean)
        if usual_std > 0 and not 1 / STD_RATIO <= std / usual_std <= STD_RATIO:
            yield (
                f"{source.name}: its correlations have a standard deviation of {std:.4g}, those of "
                f"the partials together {usual_std:.4g} in the median: its count is wrong, or its "
                "device failed"
            )
        elif abs(mean - usual_mean) > MEAN_DIFFERENCE * usual_std:
            yield (
                f"{source.name}: its correlations have a mean of {mean:.4g}, those of the partials "
                f"together {usual_mean:.4g} in the median: its device failed, or it searched "
                "another image"
            )


def _twins(sources: tuple[SourceStatistics, ...]) -> Iterator[str]:
    first: dict[tuple[float, float], str] = {}
    for source in sources:
        if source.correlation_sum is None or source.correlation_squared_sum is None:
            continue
        sums = source.correlation_sum, source.correlation_squared_sum
        if any(sums) and sums in first:
            yield (
                f"{source.name}: has the same sums as {first[sums]}: a share that was searched, or "
                "imported, twice; merge without one of them"
            )
        first.setdefault(sums, source.name)


def _number(value: float | None) -> float:
    return 0.0 if value is None else value
