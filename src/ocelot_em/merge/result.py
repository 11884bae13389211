"""Read access to the maps of a merged result."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from os import PathLike

import numpy as np

from ocelot_em.merge.plan import MergePlan, PlannedExposure, read_plan
from ocelot_em.merge.stats.summary import (
    open_merged_result,
)
from ocelot_em.model.maps import (
    SCALED_MIP,
    SOURCE_EXPOSURE,
    AnyArray,
    Int64,
)
from ocelot_em.model.regions import Region
from ocelot_em.store import attributes as fmt
from ocelot_em.store.arrays import ChunkedMap
from ocelot_em.store.contract import Objects
from ocelot_em.store.objects import open_objects
from ocelot_em.store.search import open_partial_maps, read_search_space


@dataclass(frozen=True)
class MergedMaps:
    """The stored maps of a merged result, read region by region.

    Parameters
    ----------
    objects
        The store of the result.
    attributes, plan
        Attributes and plan of the result.
    maps
        Stored maps by name.
    decode
        Decodes poses from indices; None if the poses are stored.
    """

    objects: Objects
    attributes: fmt.MergedAttributes
    plan: MergePlan
    maps: dict[str, ChunkedMap]
    decode: Callable[[AnyArray], tuple[AnyArray, ...]] | None

    @classmethod
    def open(cls, place: str | PathLike[str] | Objects) -> "MergedMaps":
        """Open a merged result.

        Raises
        ------
        StoreNotFoundError, FormatError, IncompleteError
        """
        objects = open_objects(place) if isinstance(place, (str, PathLike)) else place
        attributes = open_merged_result(objects)
        maps = open_partial_maps(objects, "", "", attributes.maps.merged, attributes.shape)
        space = read_search_space(objects, attributes.search_space_digest)
        decode = space.decode if space is not None and not attributes.maps.decoded else None
        return cls(objects, attributes, read_plan(attributes, objects.url), maps, decode)

    @property
    def url(self) -> str:
        """URL of the result."""
        return self.objects.url

    @property
    def valid_shape(self) -> tuple[int, int]:
        """Height and width of the maps' valid pixels."""
        return self.attributes.valid_shape

    def read(self, region: Region, name: str) -> AnyArray:
        """Read a map over a region."""
        return self.maps[name].read(region)[0]

    def regions(self) -> Iterator[Region]:
        """Yield the regions of valid pixels, chunk by chunk."""
        for chunk in self.maps[SCALED_MIP].grid:
            region = chunk.region.intersect(Region.whole(self.valid_shape))
            if region.size:
                yield region

    def zscore(self, exposure: PlannedExposure, y: int, x: int) -> float:
        """Return the z-score of a pixel of an exposure; NaN if it is not valid or not shown."""
        pixel = Region(y, y + 1, x, x + 1)
        if not pixel.intersect(exposure.counted).size:
            return float("nan")
        pixel = pixel.shifted(*exposure.origin)
        if self.plan.is_montage and self.read(pixel, SOURCE_EXPOSURE)[0, 0] != exposure.number:
            return float("nan")
        return float(self.read(pixel, SCALED_MIP)[0, 0])

    def shows(self, exposure: PlannedExposure, y: Int64, x: Int64) -> AnyArray:
        """Return whether canvas pixels show an exposure; only chunks in overlaps are read."""
        own = exposure.on_canvas
        shown = np.ones(len(y), np.bool_)
        for place in self.plan.touching(own) if len(y) else ():
            other = self.plan.exposures[place]
            shared = other.on_canvas.intersect(own)
            if other.number != exposure.number:
                shown &= (y < shared.y0) | (y >= shared.y1) | (x < shared.x0) | (x >= shared.x1)
        doubtful = np.flatnonzero(~shown)
        grid = self.maps[SOURCE_EXPOSURE].grid
        cells = (y[doubtful] // grid.cell[0]) * grid.counts[1] + x[doubtful] // grid.cell[1]
        for cell in np.unique(cells).tolist():
            region = grid[cell].region
            numbers = self.read(region, SOURCE_EXPOSURE)
            here = doubtful[cells == cell]
            shown[here] = numbers[y[here] - region.y0, x[here] - region.x0] == exposure.number
        return shown
