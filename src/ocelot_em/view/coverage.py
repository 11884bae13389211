"""Number of exposures of a montage that cover each pixel."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ocelot_em.model.maps import Int64
from ocelot_em.model.regions import ceil_div
from ocelot_em.store.attributes import MergedAttributes
from ocelot_em.view.figures import OVERVIEW_PX


@dataclass(frozen=True)
class Coverage:
    """Number of exposures that cover each pixel of a canvas.

    ``most`` is (y, x) int64: the maximum number of exposures in each block of pixels, whose edge is
    ``factor``. ``areas`` are the numbers of pixels covered by 0, 1, 2, ... exposures.
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
        most = np.zeros((ceil_div(height, factor), ceil_div(width, factor)), np.int64)
        areas = np.zeros(len(bounds) + 1, np.int64)
        for top, bottom in pairwise(rows.tolist()):
            here = (y0 <= top) & (top < y1)
            opened, closed = (np.bincount(x[here], minlength=len(columns)) for x in (begins, ends))
            covers = np.cumsum(opened - closed)[:-1]
            pixels = np.bincount(covers, widths, len(areas)).astype(np.int64)
            areas += (bottom - top) * pixels
            into = most[top // factor]
            np.maximum(into, np.maximum.reduceat(covers, first_of_block), out=into)
        highest = int(np.flatnonzero(areas)[-1])
        return cls(most, factor, tuple(areas[: highest + 1].tolist()))

    @property
    def covered_pixels(self) -> int:
        """Number of pixels covered by at least one exposure."""
        return sum(self.areas[1:])

    @property
    def overlap_pixels(self) -> int:
        """Number of pixels covered by several exposures."""
        return sum(self.areas[2:])
