"""Attributes of the statistics of a merged result."""

from ocelot_em.store.attributes import Attributes, Count, ExposureId, Number, Several


class PartialStatistics(Attributes):
    """How often a partial won, of the valid pixels."""

    name: str
    total_projections: Count
    won_pixels: Count


class SourceStatistics(Attributes):
    """An input's own correlations, over the valid pixels; None where nothing is known.

    Parameters
    ----------
    mean, mean_spread
        Mean over the pixels of the mean correlation, and its standard deviation over the pixels.
    std
        Standard deviation of the correlations at one pixel, in the quadratic mean over the pixels.
    correlation_sum, correlation_squared_sum
        Sums over all pixels; equal ones give away a share that was searched twice.
    """

    name: str
    total_projections: Count
    mean: float | None = None
    mean_spread: float | None = None
    std: float | None = None
    correlation_sum: float | None = None
    correlation_squared_sum: float | None = None


class ShownStatistics(Attributes):
    """z-scores of some of the pixels that a montage shows; None where there are none."""

    pixels: Count
    mean: float | None = None
    std: float | None = None


class ExposureStatistics(Attributes):
    """An exposure of a montage.

    Parameters
    ----------
    id, number, total_projections
        Of the exposure.
    valid_pixels, searched_pixels
        Of the exposure, shown or not.
    alone, overlap
        Its pixels that the montage shows: where no other exposure lies, and where others do.
    """

    id: ExposureId
    number: Number
    total_projections: Count
    valid_pixels: Count
    searched_pixels: Count
    alone: ShownStatistics
    overlap: ShownStatistics

    @property
    def shown_pixels(self) -> int:
        """All that the montage shows of it."""
        return self.alone.pixels + self.overlap.pixels


class StatisticsAttributes(Attributes):
    """What was counted over the valid pixels of a merged result.

    Of a montage: over those of all exposures, shown or not; and what is shown of each.
    """

    valid_pixels: Count
    searched_pixels: Count
    unsearched_pixels: Count
    nan_pixels: Count
    zero_std_pixels: Count
    mip_range: tuple[float, float] | None
    scaled_mip_range: tuple[float, float] | None
    candidate_level: float | None
    n_candidates: Count
    partials: Several[PartialStatistics]
    sources: Several[SourceStatistics]
    exposures: Several[ExposureStatistics] = ()
