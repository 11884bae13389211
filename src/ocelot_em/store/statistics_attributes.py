"""Attributes of the statistics of a merged result."""

from pydantic import Field

from ocelot_em.store.attributes import Attributes, Count, Digest, ExposureId, Number, Several


class Projections(Attributes):
    """Numbers of cross-correlations of each pixel.

    ``total_projections`` is that of all pixels, or an upper bound if there is a map of counts;
    ``mean_projections`` is then the mean over the valid pixels, None if unknown.
    """

    total_projections: Count
    mean_projections: float | None = None

    @property
    def projections(self) -> float:
        """Number of cross-correlations of a pixel, on average as far as known."""
        known = self.mean_projections
        return self.total_projections if known is None else known


class PartialStatistics(Projections):
    """Number of valid pixels that a partial won."""

    name: str
    won_pixels: Count


class SourceStatistics(Attributes):
    """Statistics of an input's own correlations over the valid pixels; None if unknown.

    ``mean_spread`` is the standard deviation of the mean correlation over the pixels; ``std`` that
    of the correlations at one pixel, as quadratic mean over the pixels; of a partial with a map of
    counts, that of all its correlations. The sums are over all pixels; equal sums reveal a share
    that was searched twice.
    """

    name: str
    total_projections: Count
    mean: float | None = None
    mean_spread: float | None = None
    std: float | None = None
    correlation_sum: float | None = None
    correlation_squared_sum: float | None = None


class ShownStatistics(Attributes):
    """z-scores of pixels that a montage shows; None if there are none."""

    pixels: Count
    mean: float | None = None
    std: float | None = None


class ExposureStatistics(Projections):
    """Statistics of an exposure of a montage, outside (``alone``) and inside overlaps.

    The numbers of valid and searched pixels count pixels that are shown or not.
    """

    id: ExposureId
    number: Number
    valid_pixels: Count
    searched_pixels: Count
    alone: ShownStatistics
    overlap: ShownStatistics

    @property
    def shown_pixels(self) -> int:
        """Number of its pixels that the montage shows."""
        return self.alone.pixels + self.overlap.pixels


class StatisticsAttributes(Attributes):
    """Statistics over the valid pixels of a merged result.

    In a montage, over those of all exposures, shown or not; ``exposures`` has the pixels shown.
    ``tables`` has the SHA-256 of the values of each histogram; versions 1 and 2 had none.
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
    tables: dict[str, Digest] = Field(default_factory=dict)
