"""Pure geometry of maps: regions and tiles. Axes are (y, x); regions are half-open."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Overlap = Literal["earliest", "max-zscore", "farthest-from-edge"]
"""Rule that selects the exposure in an overlap: the earliest acquired, the highest z-score, or the
farthest edge."""


GroupBy = Literal["template", "sector", "exposure"]
"""What the groups are whose z-scores are computed separately."""


def ceil_div(numerator: int, denominator: int) -> int:
    """Quotient of two integers, rounded up."""
    return -(-numerator // denominator)


@dataclass(frozen=True, slots=True)
class Region:
    """The pixels with ``y0 <= y < y1`` and ``x0 <= x < x1``.

    Examples
    --------
    >>> from ocelot_em import Region
    >>> region = Region(0, 100, 50, 250)
    >>> region.shape, region.intersect(Region(50, 200, 0, 100))
    ((100, 200), Region(y0=50, y1=100, x0=50, x1=100))
    """

    y0: int
    y1: int
    x0: int
    x1: int

    @classmethod
    def whole(cls, shape: tuple[int, int]) -> "Region":
        """All pixels of a map of this shape."""
        return cls(0, shape[0], 0, shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width in pixels; never negative."""
        return max(self.y1 - self.y0, 0), max(self.x1 - self.x0, 0)

    @property
    def size(self) -> int:
        """Number of pixels."""
        height, width = self.shape
        return height * width

    @property
    def bounds(self) -> tuple[int, int, int, int]:
        """First row, end of the rows, first column, end of the columns."""
        return self.y0, self.y1, self.x0, self.x1

    @property
    def slices(self) -> tuple[slice, slice]:
        """The region as an index into a map."""
        return slice(self.y0, self.y1), slice(self.x0, self.x1)

    def intersect(self, other: "Region") -> "Region":
        """The pixels in both regions; empty (size 0) if there are none."""
        y0, x0 = max(self.y0, other.y0), max(self.x0, other.x0)
        return Region(y0, min(self.y1, other.y1), x0, min(self.x1, other.x1))

    def relative_to(self, origin: "Region") -> "Region":
        """The same pixels, counted from the upper left corner of another region."""
        return self.shifted(-origin.y0, -origin.x0)

    def shifted(self, dy: int, dx: int) -> "Region":
        """The region moved downwards and to the right."""
        return Region(self.y0 + dy, self.y1 + dy, self.x0 + dx, self.x1 + dx)

    def __str__(self) -> str:
        return f"[{self.y0}:{self.y1}, {self.x0}:{self.x1}]"


@dataclass(frozen=True, slots=True)
class Tile:
    """One cell of a grid: its row, its column and its pixels."""

    iy: int
    ix: int
    region: Region

    def __str__(self) -> str:
        return f"tile ({self.iy}, {self.ix}) {self.region}"


@dataclass(frozen=True, slots=True)
class TileGrid:
    """A map divided into cells of one shape, smaller at the lower and right edges.

    Both chunks and tiles are cells of such a grid.
    """

    shape: tuple[int, int]
    cell: tuple[int, int]

    @property
    def counts(self) -> tuple[int, int]:
        """Number of rows and columns of cells."""
        return ceil_div(self.shape[0], self.cell[0]), ceil_div(self.shape[1], self.cell[1])

    def __len__(self) -> int:
        rows, columns = self.counts
        return rows * columns

    def __getitem__(self, index: int) -> Tile:
        """Return the cell with this number, counted row by row."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.at(*divmod(index, self.counts[1]))

    def __iter__(self) -> Iterator[Tile]:
        return (self[index] for index in range(len(self)))

    def at(self, iy: int, ix: int) -> Tile:
        """Return the cell in this row and column."""
        (height, width), (cell_height, cell_width) = self.shape, self.cell
        y0, x0 = iy * cell_height, ix * cell_width
        y1, x1 = min(y0 + cell_height, height), min(x0 + cell_width, width)
        return Tile(iy, ix, Region(y0, y1, x0, x1))

    def touching(self, region: Region) -> Iterator[Tile]:
        """All cells that share at least one pixel with the region, row by row."""
        (height, width), (cell_height, cell_width) = self.shape, self.cell
        y0, y1 = max(region.y0, 0), min(region.y1, height)
        x0, x1 = max(region.x0, 0), min(region.x1, width)
        if y0 >= y1 or x0 >= x1:
            return
        for iy in range(y0 // cell_height, ceil_div(y1, cell_height)):
            for ix in range(x0 // cell_width, ceil_div(x1, cell_width)):
                yield self.at(iy, ix)

    def is_whole(self, tile: Tile) -> bool:
        """Whether a cell is complete, not truncated by the edge of the map."""
        return tile.region.shape == self.cell

    def is_aligned(self, region: Region) -> bool:
        """Whether the region consists of whole cells of the map."""
        (height, width), (cell_height, cell_width) = self.shape, self.cell
        return (
            0 <= region.y0 <= region.y1 <= height
            and 0 <= region.x0 <= region.x1 <= width
            and region.y0 % cell_height == 0
            and region.x0 % cell_width == 0
            and (region.y1 % cell_height == 0 or region.y1 == height)
            and (region.x1 % cell_width == 0 or region.x1 == width)
        )


def template_box_of(shape: tuple[int, int], valid_shape: tuple[int, int]) -> int | None:
    """Return the edge of the template box in pixels that gives these shapes; None if unknown.

    Examples
    --------
    >>> template_box_of((432, 480), (377, 425))
    56
    """
    boxes = {full - valid + 1 for full, valid in zip(shape, valid_shape, strict=True)}
    return boxes.pop() if len(boxes) == 1 and shape != valid_shape else None
