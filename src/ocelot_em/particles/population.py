"""The pixels of an exposure that its cutoff is for: searched ones, where particles may be.

Without a mask, the statistics of the merge describe them. Otherwise, the mask is read, and the maps
where that is needed, region by region.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ocelot_em.errors import InvalidInputError, OcelotError
from ocelot_em.merge.plan import PlannedExposure
from ocelot_em.merge.result import MergedResult
from ocelot_em.merge.stats.collected import Histograms
from ocelot_em.model.histograms import (
    JOINT_MIP_AXIS,
    JOINT_Z_AXIS,
    MIP_AXIS,
    Z_AXIS,
    Axis,
)
from ocelot_em.model.maps import COUNT, MIP, SCALED_MIP, AnyArray, Int64
from ocelot_em.model.regions import Region, TileGrid
from ocelot_em.particles.areas import Area
from ocelot_em.particles.scanning import own_regions

log = logging.getLogger(__name__)

_CELL = 1024
"""Edge of the regions in which a mask is counted without maps."""


@dataclass(frozen=True, eq=False)
class Population:
    """The pixels of an exposure that count: valid, searched, and in the area of the picking.

    Parameters
    ----------
    merged
        The merged result.
    position
        Position of the exposure in its plan.
    area
        Where particles may be; None: everywhere.
    """

    merged: MergedResult
    position: int
    area: Area | None = None

    @property
    def exposure(self) -> PlannedExposure:
        """The exposure."""
        return self.merged.plan.exposures[self.position]

    @property
    def pixels(self) -> int:
        """Number of pixels that count."""
        return self.searched_pixels if self.area is None else self._counted[0]

    @property
    def correlations(self) -> int:
        """Number of cross-correlations of these pixels."""
        if self.area is None and not self.merged.attributes.has_counts:
            return self.searched_pixels * self.exposure.total_projections
        return self._counted[1]

    @property
    def searched_pixels(self) -> int:
        """Number of searched pixels, in the area or not."""
        about = self.merged.summary.attributes
        found = {one.number: one.searched_pixels for one in about.exposures}
        return found.get(self.exposure.number, about.searched_pixels)

    @cached_property
    def histograms(self) -> Histograms:
        """Histograms of the pixels."""
        if self.area is None:
            return self.merged.summary_of(self.exposure).histograms
        found = Histograms.empty("int64")
        for region, maps in own_regions(self.merged, self.position, MIP, SCALED_MIP):
            counted = self._counts(region, maps)
            mip, z = maps[MIP][counted], maps[SCALED_MIP][counted]
            for into, axis, values in ((found.mip, MIP_AXIS, mip), (found.z, Z_AXIS, z)):
                into += np.bincount(axis.bin_of(values) + 1, minlength=len(into))
            bins = _nearest(JOINT_MIP_AXIS, mip) * JOINT_Z_AXIS.bins + _nearest(JOINT_Z_AXIS, z)
            joint = np.bincount(bins, minlength=found.joint.size)
            found.joint[:] += joint.reshape(found.joint.shape)
        return found

    def values(self) -> tuple[AnyArray, AnyArray]:
        """Return ``mip`` and z-score of the pixels, one-dimensional.

        Raises
        ------
        OcelotError
            Maps, or the partials of an exposure of a montage, cannot be read.
        """
        mips, zs = [np.empty(0, np.float32)], [np.empty(0, np.float32)]
        for region, maps in own_regions(self.merged, self.position, MIP, SCALED_MIP):
            counted = self._counts(region, maps)
            mips.append(maps[MIP][counted])
            zs.append(maps[SCALED_MIP][counted])
        return np.concatenate(mips), np.concatenate(zs)

    @cached_property
    def shown(self) -> tuple[int, int]:
        """Numbers of pixels that the map of a montage shows, and of their cross-correlations."""
        if self.area is None and not self.merged.attributes.has_counts:
            found = self.merged.summary.attributes.exposures
            pixels = {one.number: one.shown_pixels for one in found}.get(self.exposure.number, 0)
            return pixels, pixels * self.exposure.total_projections
        return self._sum(self._shown_regions())

    def _shown_regions(self) -> Iterator[tuple[Region, Mapping[str, AnyArray]]]:
        """Yield regions of the exposure with the shown z-scores, NaN where others are shown."""
        names = (SCALED_MIP, COUNT) if self.merged.attributes.has_counts else (SCALED_MIP,)
        for chunk in self.merged.regions():
            region = chunk.intersect(self.exposure.on_canvas)
            if region.size:
                maps = {name: self.merged.read(region, name) for name in names}
                numbers = self.merged.read(region, self.merged.source)
                maps[SCALED_MIP][numbers != self.exposure.number] = np.nan
                dy, dx = self.exposure.origin
                yield region.shifted(-dy, -dx), maps

    @cached_property
    def _counted(self) -> tuple[int, int]:
        """Numbers of pixels in the area and of their correlations; maps are read only if needed."""
        has_own = self.area is not None and self.area.has_counts
        needs_counts = self.merged.attributes.has_counts and not has_own
        names = (SCALED_MIP, COUNT) if needs_counts else (SCALED_MIP,)
        if needs_counts or self.searched_pixels < self.exposure.counted.size:
            try:
                return self._sum(own_regions(self.merged, self.position, *names))
            except OcelotError as error:  # the partials of an exposure of a montage
                if not self.merged.plan.has_parts:
                    raise
                log.warning(
                    "exposure %s: pixels that were not searched count for its cutoff, too, since "
                    "its partials cannot be read: %s",
                    *(self.exposure.id, error),
                )
        grid = TileGrid(self.exposure.shape, (_CELL, _CELL))
        tiles = grid.touching(valid := self.exposure.counted)
        return self._sum((tile.region.intersect(valid), {}) for tile in tiles)

    def _sum(self, regions: Iterable[tuple[Region, Mapping[str, AnyArray]]]) -> tuple[int, int]:
        """Return the numbers of pixels that count, and of their cross-correlations."""
        pixels = correlations = 0
        for region, maps in regions:
            counted = self._counts(region, maps)
            pixels += int(counted.sum())
            correlations += self._correlations(region, counted, maps)
        return pixels, correlations

    def _counts(self, region: Region, maps: Mapping[str, AnyArray]) -> AnyArray:
        """Return which pixels of a region of the exposure count."""
        counted: AnyArray = np.ones(region.shape, np.bool_)
        for name in (MIP, SCALED_MIP):
            if name in maps:
                counted &= np.isfinite(maps[name])
        if self.area is not None:
            counted &= self.area.allowed(self.exposure, region)
        return counted

    def _correlations(self, region: Region, counted: AnyArray, maps: Mapping[str, AnyArray]) -> int:
        """Return the number of cross-correlations of these pixels."""
        if self.area is not None and self.area.has_counts:
            return self.area.n_each[self.exposure.number] * _exact_sum(
                self.area.counts(self.exposure, region)[counted]
            )
        if COUNT in maps:
            return _exact_sum(maps[COUNT][counted])
        return int(counted.sum()) * self.exposure.total_projections


def _exact_sum(counts: Int64) -> int:
    """Return a sum that need not fit into 64 bits."""
    return (int((counts >> 32).sum()) << 32) + int((counts & 0xFFFFFFFF).sum())


def populations_of(merged: MergedResult, area: Area | None) -> list[Population]:
    """Return the population of every exposure; an area without searched pixels is an error."""
    found = [Population(merged, k, area) for k in range(len(merged.plan.exposures))]
    if area is not None and not any(own.pixels for own in found):
        raise InvalidInputError(
            f"{area.text}: expected searched pixels where particles may be, got none"
            + ("" if area.mask is None else "; is --mask-marks right?")
        )
    return found


def _nearest(axis: Axis, values: AnyArray) -> Int64:
    """Return the bins of values; those off the axis are in the nearest one."""
    return np.clip(axis.bin_of(values), 0, axis.bins - 1)
