"""Histograms of all cross-correlations of a search, as cisTEM records them. Pure."""

from collections.abc import Iterable, Mapping
from math import erfc, sqrt
from typing import Annotated, Any, Final, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ocelot_em.errors import InvalidInputError
from ocelot_em.model.arrays import MAX_COUNT
from ocelot_em.model.maps import Float64
from ocelot_em.model.problems import in_words

HISTOGRAM: Final = "correlation_histogram"
"""Key of a result that holds its histogram."""

MAX_BINS = 2**14


class CorrelationHistogram(BaseModel):
    """Numbers of cross-correlations of all pixels and projections, in bins of equal width.

    The outermost bins may hold what is beyond them.

    Parameters
    ----------
    low
        Lower edge of the first bin.
    width
        Width of a bin.
    counts
        Number of correlations in each bin, exact integers.

    Examples
    --------
    >>> from ocelot_em import CorrelationHistogram
    >>> histogram = CorrelationHistogram(low=-1, width=0.5, counts=(1, 6, 7, 2))
    >>> histogram.edges, histogram.total
    (array([-1. , -0.5,  0. ,  0.5,  1. ]), 16)
    >>> histogram.mean, round(histogram.std, 3)
    (0.0625, 0.39)
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    low: Annotated[float, Field(allow_inf_nan=False)]
    width: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    counts: Annotated[
        tuple[Annotated[int, Field(ge=0, le=MAX_COUNT)], ...],
        Field(min_length=1, max_length=MAX_BINS),
    ]

    @classmethod
    def of(cls, result: Mapping[str, Any], place: str) -> Self | None:
        """Return the histogram of a result, a mapping or an instance; None without one.

        Raises
        ------
        InvalidInputError
            It is no histogram.
        """
        value = result.get(HISTOGRAM)
        if value is None or isinstance(value, cls):
            return value
        try:
            low, width = float(value["low"]), float(value["width"])
            counts = tuple(np.asarray(value["counts"]).tolist())
            return cls(low=low, width=width, counts=counts)
        except ValidationError as error:
            problem = error.errors()[0]
            got = f"{'.'.join(map(str, problem['loc']))}: {in_words(problem)}"
        except (KeyError, TypeError, ValueError, IndexError) as error:
            got = f"something else: {error}"
        raise InvalidInputError(
            f"{place}: {HISTOGRAM}: expected low, width and counts of bins, got {got}"
        )

    @property
    def edges(self) -> Float64:
        """Edges of the bins, (bins + 1,) float64."""
        return self.low + self.width * np.arange(len(self.counts) + 1, dtype=np.float64)

    @property
    def total(self) -> int:
        """Number of all correlations."""
        return sum(self.counts)

    @property
    def mean(self) -> float:
        """Mean of all correlations, each in the middle of its bin; NaN without any."""
        return float(self._shares @ (self.edges[:-1] + self.width / 2))

    @property
    def std(self) -> float:
        """Their standard deviation; NaN without any."""
        middles = self.edges[:-1] + self.width / 2
        return sqrt(self._shares @ (middles - self.mean) ** 2)

    @property
    def _shares(self) -> Float64:
        return np.array(self.counts, np.float64) / (self.total or np.nan)

    @property
    def survival(self) -> list[int]:
        """Number of correlations at or above the lower edge of each bin, exact integers."""
        above, found = 0, []
        for count in reversed(self.counts):
            above += count
            found.append(above)
        return found[::-1]

    def gaussian(self) -> tuple[Float64, Float64]:
        """Return what standard normal correlations would give: counts and survival, (bins,)."""
        above = np.array([erfc(edge / sqrt(2)) / 2 for edge in self.edges.tolist()])
        return -self.total * np.diff(above), self.total * above[:-1]


def added(
    histograms: Iterable[tuple[str, CorrelationHistogram | None]],
) -> CorrelationHistogram | None:
    """Add the histograms of all parts of a search, each with its name; None if a part has none.

    Raises
    ------
    InvalidInputError
        Naming those with other bins than the first.
    """
    pairs = [*histograms]
    known = [one for _, one in pairs if one is not None]
    problems = [
        f"{name}: {HISTOGRAM}: expected {len(known[0].counts)} bins of {known[0].width} from "
        f"{known[0].low}, as others have, got {len(one.counts)} of {one.width} from {one.low}"
        for name, one in pairs
        if one is not None and _bins(one) != _bins(known[0])
    ]
    if problems:
        raise InvalidInputError(problems)
    if not known or len(known) < len(pairs):
        return None
    counts = tuple(map(sum, zip(*(one.counts for one in known), strict=True)))
    facts = {"low": known[0].low, "width": known[0].width, "counts": counts}
    return CorrelationHistogram.model_construct(None, **facts)  # counts may exceed those of a part


def _bins(histogram: CorrelationHistogram) -> tuple[float, float, int]:
    return histogram.low, histogram.width, len(histogram.counts)
