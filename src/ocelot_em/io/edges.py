"""Whether maps are wrapped around: whether their last rows and columns continue with the first."""

import numpy as np

from ocelot_em.model.maps import AnyArray, Float64
from ocelot_em.model.regions import Region

MIN_EDGE_PX = 32
"""Smallest height and width that are judged; shorter lines may be similar by chance."""

MIN_CONTRAST = 4.0
"""Minimum ratio of the mean squared difference between distant lines to that between adjacent
ones; at least 10 for the standard deviations of real searches. Noise without it is not judged."""


class EdgeSample:
    """The lines of a map that show whether it is wrapped around.

    A cross-correlation with the transform of a whole micrograph is periodic: the last line is as
    similar to the first as adjacent lines are. Where only valid pixels are left, the two come from
    opposite sides of the micrograph, and are as different as any distant lines.

    Parameters
    ----------
    shape
        Height and width of the map in pixels.

    Examples
    --------
    >>> import numpy as np
    >>> from ocelot_em import Region
    >>> waves = np.cos(np.arange(64) * 2 * np.pi / 64)
    >>> periodic = waves[:, None] + waves
    >>> sample = EdgeSample(periodic.shape)
    >>> sample.add(Region.whole(periodic.shape), periodic)
    >>> sample.looks_wrapped
    True
    """

    def __init__(self, shape: tuple[int, int]) -> None:
        self._is_judged = min(shape) >= MIN_EDGE_PX
        self._places = [*zip(*((0, 1, n // 2, n - 2, n - 1) for n in shape), strict=True)]
        self._rows, self._columns = (np.zeros((5, n)) for n in reversed(shape))

    def add(self, region: Region, values: AnyArray) -> None:
        """Take what is needed of the values of a region of the map."""
        if not self._is_judged:
            return
        for number, (y, x) in enumerate(self._places):
            if region.y0 <= y < region.y1:
                self._rows[number, region.x0 : region.x1] = values[y - region.y0]
            if region.x0 <= x < region.x1:
                self._columns[number, region.y0 : region.y1] = values[:, x - region.x0]

    @property
    def looks_wrapped(self) -> bool:
        """Whether rows and columns continue beyond the edges; False for maps without structure."""
        return self._is_judged and _continues(self._rows) and _continues(self._columns)


def _continues(lines: Float64) -> bool:
    """Compare the first and the last line with adjacent and with distant lines."""
    first, second, middle, last_but_one, last = lines
    with np.errstate(all="ignore"):
        adjacent = np.mean((first - second) ** 2 + (last - last_but_one) ** 2) / 2
        distant = np.mean((first - middle) ** 2 + (last - middle) ** 2) / 2
        seam = np.mean((first - last) ** 2)
        return bool(distant > MIN_CONTRAST * adjacent and seam < np.sqrt(adjacent * distant))
