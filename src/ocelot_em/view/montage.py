"""The exposures of a merged montage: placement and coverage."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ocelot_em.errors import InvalidInputError
from ocelot_em.merge.result import MergedResult
from ocelot_em.merge.stats.summary import Summary
from ocelot_em.model.maps import Int64
from ocelot_em.model.regions import ceil_div
from ocelot_em.store.attributes import MergedAttributes
from ocelot_em.store.statistics_attributes import (
    ExposureStatistics,
    StatisticsAttributes,
)
from ocelot_em.view.figures import Store
from ocelot_em.view.plots import OVERVIEW_PX


@dataclass(frozen=True)
class Montage:
    """Placement and statistics of the exposures of a merged result.

    Parameters
    ----------
    attributes
        Attributes of the result, with the placement of exposures.
    summary
        Statistics of all exposures together.
    of_exposures
        Statistics of each exposure, by id.
    """

    attributes: MergedAttributes
    summary: Summary
    of_exposures: Mapping[str, StatisticsAttributes]

    @classmethod
    def read(cls, store: Store) -> "Montage":
        """Read the placement and statistics of a merged montage.

        Raises
        ------
        StoreNotFoundError, FormatError, IncompleteError
            The store is not a finished merged result, or has no statistics.
        InvalidInputError
            The result is not a montage.
        """
        merged = MergedResult.open(store)
        return cls(attributes_of(merged), merged.summary, merged.statistics_of_exposures)

    @property
    def exposures(self) -> tuple[ExposureStatistics, ...]:
        """Statistics of each exposure and of its shown pixels."""
        return self.summary.attributes.exposures


def attributes_of(store: Store) -> MergedAttributes:
    """Return the attributes of a merged montage."""
    merged = MergedResult.open(store)
    if not merged.attributes.exposures:
        raise InvalidInputError(f"{merged.url}: expected a montage, got a result of one exposure")
    return merged.attributes


@dataclass(frozen=True)
class Coverage:
    """Number of exposures that cover each pixel of a canvas.

    Parameters
    ----------
    most
        (y, x) int64: maximum number of exposures in each block of pixels.
    factor
        Edge of the blocks in pixels.
    areas
        Number of pixels covered by 0, 1, 2, ... exposures.
    """

    most: Int64
    factor: int
    areas: tuple[int, ...]

    @classmethod
    def of(cls, attributes: MergedAttributes, longest_edge_px: int = OVERVIEW_PX) -> "Coverage":
        """Count exactly, from the placement of exposures.

        Lines along all edges divide the canvas into cells of constant coverage. Rows of cells are
        counted one after another, so that memory is proportional to one row.
        """
        height, width = attributes.valid_shape
        factor = ceil_div(max(height, width), longest_edge_px)
        bounds = np.array([e.on_canvas.bounds for e in attributes.exposures], np.int64)
        y0, y1, x0, x1 = bounds.reshape(-1, 4).clip(0, [height, height, width, width]).T
        # Block edges are lines, too, so that each cell is in one block.
        rows = np.unique(np.concatenate([y0, y1, np.arange(0, height, factor), [height]]))
        columns = np.unique(np.concatenate([x0, x1, np.arange(0, width, factor), [width]]))
        first_of_block = np.searchsorted(columns, np.arange(0, width, factor))
        widths = np.diff(columns)
        begins, ends = (np.searchsorted(columns, x) for x in (x0, x1))
        first, last = (np.searchsorted(rows, y) for y in (y0, y1))
        opening, closing = np.argsort(first, kind="stable"), np.argsort(last, kind="stable")
        n_open = np.searchsorted(first[opening], np.arange(len(rows)), side="right")
        n_closed = np.searchsorted(last[closing], np.arange(len(rows)), side="right")
        most = np.zeros((ceil_div(height, factor), ceil_div(width, factor)), np.int64)
        areas: Counter[int] = Counter()
        steps = np.zeros(len(columns), np.int64)
        opened = closed = 0
        for row, (top, bottom) in enumerate(pairwise(rows.tolist())):
            new, old = opening[opened : n_open[row]], closing[closed : n_closed[row]]
            opened, closed = n_open[row], n_closed[row]
            for change, exposures in ((1, new), (-1, old)):
                np.add.at(steps, begins[exposures], change)
                np.add.at(steps, ends[exposures], -change)
            covers = np.cumsum(steps)[:-1]
            for number, pixels in enumerate(np.bincount(covers, widths).tolist()):
                areas[number] += int(pixels) * (bottom - top)
            into = most[top // factor]
            np.maximum(into, np.maximum.reduceat(covers, first_of_block), out=into)
        highest = max((number for number, pixels in areas.items() if pixels), default=0)
        return cls(most, factor, tuple(areas[number] for number in range(highest + 1)))

    @property
    def covered_pixels(self) -> int:
        """Number of pixels covered by at least one exposure."""
        return sum(self.areas[1:])

    @property
    def overlap_pixels(self) -> int:
        """Number of pixels covered by several exposures."""
        return sum(self.areas[2:])
