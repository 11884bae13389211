"""The area that particles are picked from: without masked pixels, and without edges."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ocelot_em.errors import InvalidInputError
from ocelot_em.merge.plan import PlannedExposure
from ocelot_em.merge.result import MergedResult
from ocelot_em.model.maps import AnyArray, Int64
from ocelot_em.model.pick_options import DetectionOptions, PickOptions
from ocelot_em.model.regions import Region, TileGrid, template_box_of
from ocelot_em.model.text import shape_text
from ocelot_em.particles.masks import Mask, as_mask

_CELL = 1024
"""Edge of the regions that are read of a mask."""


@dataclass(frozen=True, eq=False)
class Area:
    """The pixels of a merged result that particles are picked from.

    ``shift_px`` is the pixel of the mask that belongs to the first pixel of the map: a map's pixel
    is the upper left corner of the template box, and the centre of a particle is in the middle of
    it. ``n_each`` is the number of correlations for each one that the mask counts, by number of
    the exposure. ``text`` describes it.
    """

    mask: Mask | None
    marks_kept: bool
    shift_px: int
    edge_px: int
    n_each: Mapping[int, int]
    text: str

    @classmethod
    def of(cls, merged: MergedResult, options: PickOptions | DetectionOptions) -> "Area | None":
        """Return the area of options; None if it is all.

        Raises
        ------
        InvalidInputError
            The mask cannot be read, or does not fit the result.
        """
        edge = f"an edge of {options.edge} px" if options.edge else ""
        if options.mask is None:
            return cls(None, True, 0, options.edge, {}, f"without {edge}") if edge else None
        mask = as_mask(options.mask)
        if mask.polygons and options.mask_unit == "angstrom":
            size = merged.attributes.pixel_size_angstrom
            if size is None:
                raise InvalidInputError(
                    f"{mask.name}: expected polygons in pixels, because the pixel size of "
                    f"{merged.url} is unknown, got Å; import again with --pixel-size"
                )
            polygons = tuple(vertices / size for vertices in mask.polygons)
            mask = Mask(mask.name, polygons=polygons, marks_kept=mask.marks_kept)
        shift, where = _place(mask, merged, options.mask_of or mask.of, options.mask_box)
        marks = mask.marks_kept if options.mask_marks is None else options.mask_marks == "kept"
        name = mask.name if mask.name == "mask" else f"mask {mask.name}"
        text = f"{name} of the {where}" + (f", without {edge}" if edge else "")
        return cls(mask, marks, shift, options.edge, _n_each(mask, merged), text)

    @property
    def has_counts(self) -> bool:
        """Whether the mask has the number of correlations of each pixel."""
        return self.mask is not None and bool(self.mask.counts)

    def allowed(self, exposure: PlannedExposure, region: Region) -> AnyArray:
        """Return whether particles may be in the pixels of a region of an exposure."""
        allowed = np.zeros(region.shape, np.bool_)
        y0, y1, x0, x1 = exposure.counted.bounds
        edge = self.edge_px
        inner = region.intersect(Region(y0 + edge, y1 - edge, x0 + edge, x1 - edge))
        if not inner.size:
            return allowed
        kept: AnyArray = np.ones(inner.shape, np.bool_)
        if self.mask is not None:
            there = self._in_mask(exposure, inner)
            kept = self.mask.marked(there) == self.marks_kept
            if self.mask.counts:
                kept &= self.mask.counted(there) > 0
        allowed[inner.relative_to(region).slices] = kept
        return allowed

    def counts(self, exposure: PlannedExposure, region: Region) -> Int64:
        """Return the numbers that the mask has for pixels of an exposure, one for ``n_each``."""
        assert self.mask is not None
        return self.mask.counted(self._in_mask(exposure, region))

    def contains(self, exposure: PlannedExposure, y: Int64, x: Int64) -> AnyArray:
        """Return whether particles may be in each of these pixels (n,) of an exposure."""
        found = np.zeros(len(y), np.bool_)
        grid = TileGrid(exposure.shape, (_CELL, _CELL))
        cells = y // _CELL * grid.counts[1] + x // _CELL
        for cell in np.unique(cells).tolist():
            here, region = np.flatnonzero(cells == cell), grid[cell].region
            found[here] = self.allowed(exposure, region)[y[here] - region.y0, x[here] - region.x0]
        return found

    def on_canvas(self, merged: MergedResult, region: Region) -> AnyArray:
        """Return whether particles of any exposure may be in the pixels of a region of the maps."""
        allowed = np.zeros(region.shape, np.bool_)
        for number in merged.plan.touching(region):
            exposure = merged.plan.exposures[number]
            shared = region.intersect(exposure.on_canvas)
            dy, dx = exposure.origin
            own = self.allowed(exposure, shared.shifted(-dy, -dx))
            allowed[shared.relative_to(region).slices] |= own
        return allowed

    def _in_mask(self, exposure: PlannedExposure, region: Region) -> Region:
        dy, dx = exposure.origin
        return region.shifted(dy + self.shift_px, dx + self.shift_px)


def _place(
    mask: Mask, merged: MergedResult, of: str | None, given_box: int | None
) -> tuple[int, str]:
    """Return the shift of a mask, and what it is a mask of."""
    valid, shape, exposures = merged.valid_shape, merged.attributes.shape, merged.plan.exposures
    boxes = {template_box_of(one.shape, one.valid_shape) for one in exposures}
    if given_box is not None and not boxes <= {None, given_box}:
        stated = ", ".join(sorted(map(str, boxes - {None})))
        raise InvalidInputError(
            f"mask_box: expected {stated}, the template box of {merged.url}, got {given_box}"
        )
    box = given_box or (boxes.pop() if len(boxes) == 1 else None)
    image = "montage of the micrographs" if merged.plan.is_montage else "micrograph"
    if mask.shape is None:
        if of != "map" and box is None:
            raise InvalidInputError(
                f"{mask.name}: expected a result with a known template box, because polygons of "
                f"the {image} are shifted by half of it, got {merged.url} without one; give it "
                "(--mask-box), or --mask-of map if they are of the map"
            )
        return (0, "map") if of == "map" or box is None else (box // 2, image)
    if of != "micrograph" and mask.shape in ((valid, shape) if of == "map" else (valid,)):
        return 0, "map"
    seen = template_box_of(mask.shape, valid) or 0
    if of == "map" or seen < 1 or box not in (None, seen):
        whole = f"{shape_text((valid[0] + box - 1, valid[1] + box - 1))} pixels, " if box else ""
        known = {
            "map": f"{shape_text(valid)} pixels, the valid ones of {merged.url}",
            "micrograph": f"{whole}the shape of its {image}",
        }
        expected = " or ".join(known.values() if of is None else [known[of]])
        raise InvalidInputError(
            f"{mask.name}: expected {expected}, got {shape_text(mask.shape)}; give a mask of this "
            "result"
        )
    hint = " (or of the map with --mask-of map)" if of is None and mask.shape == shape else ""
    return seen // 2, f"{image}{hint}"


def _n_each(mask: Mask, merged: MergedResult) -> dict[int, int]:
    """Return the number of correlations for each one that a mask counts, for each exposure.

    A mask of Leopard-EM counts orientations, or orientations and defoci, of each pixel size.
    """
    found = {}
    for number, space in merged.search_spaces.items() if mask.counts else ():
        if space is None and len(mask.counts) == 1:
            raise InvalidInputError(
                f"{mask.name}: expected the number of defoci of each pixel (n_defocus), because "
                f"{merged.url} has no search space that states it, got only that of orientations"
            )
        found[number] = 1
        if space is not None:
            n_defoci = len(space.defocus_values) if len(mask.counts) == 1 else 1
            found[number] = n_defoci * len(space.pixel_values)
    return found
