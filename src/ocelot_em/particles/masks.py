"""Masks: images or polygons that state where particles may be picked."""

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np

from ocelot_em.errors import InvalidInputError
from ocelot_em.model.maps import AnyArray, Float64, Int64
from ocelot_em.model.regions import Region


@dataclass(frozen=True, eq=False)
class Mask:
    """A mask, of which regions are read as they are needed.

    Parameters
    ----------
    name
        Name for messages: that of its file.
    image
        Image (y, x), or (1, y, x), such as an array, a memory map or a dataset of HDF5; slicing
        reads a region. Pixels are marked that are neither 0 nor NaN. None if there are polygons.
    polygons
        Vertices (n, 2) of each polygon: y and x in pixels, integer at the centres of pixels. Marked
        are pixels whose centre is in a polygon.
    marks_kept
        Whether particles are picked from marked pixels, or from the others.
    of
        What its pixels are of, ``micrograph`` or ``map``, if the file states it.
    counts
        Images like ``image``, whose product is the number of correlations of each pixel that count;
        pixels with 0 are left out.
    owner
        What keeps its file open.
    """

    name: str
    image: Any = None
    polygons: tuple[Float64, ...] = ()
    marks_kept: bool = True
    of: str | None = None
    counts: tuple[Any, ...] = ()
    owner: Any = None

    @property
    def shape(self) -> tuple[int, int] | None:
        """Height and width in pixels; None for polygons."""
        return None if self.image is None else tuple(self.image.shape[-2:])

    def marked(self, region: Region) -> AnyArray:
        """Return whether the pixels of a region are marked."""
        if self.image is None:
            marked = np.zeros(region.shape, np.bool_)
            for vertices in self.polygons:
                (y0, x0), (y1, x1) = (np.floor(vertices).min(axis=0), np.ceil(vertices).max(axis=0))
                part = region.intersect(Region(int(y0), int(y1) + 1, int(x0), int(x1) + 1))
                if part.size:
                    marked[part.relative_to(region).slices] |= inside_polygon(vertices, part)
            return marked
        values = _read(self.image, region)
        is_marked: AnyArray = (values != 0) & (values == values)  # NaN is not equal to itself
        return is_marked

    def counted(self, region: Region) -> Int64:
        """Return the numbers of correlations of the pixels of a region."""
        product = np.ones(region.shape, np.int64)
        for image in self.counts:
            product *= _read(image, region).astype(np.int64)
        return product


def _read(image: Any, region: Region) -> AnyArray:
    """Return a region of an image, which may be the only section of a stack."""
    return np.asarray(image[(0,) * (len(image.shape) - 2) + region.slices])


def inside_polygon(vertices: Float64, region: Region) -> AnyArray:
    """Return which pixels of a region have their centre, at integer coordinates, in a polygon.

    ``vertices`` are (n, 2) y and x; a polygon that crosses itself is filled by the even-odd rule.
    Of centres on an edge, those on a left or upper one are inside, so that adjacent polygons share
    no pixel.
    """
    # Each edge goes down, so that rounding is the same for the polygon on its other side.
    following = np.roll(vertices, -1, axis=0)
    goes_up = (following[:, 0] < vertices[:, 0])[:, np.newaxis]
    (y, x), (next_y, next_x) = (
        np.where(goes_up, *ends).T for ends in ((following, vertices), (vertices, following))
    )
    # An edge crosses the rows from its upper end to the one above its lower end.
    first, end = (
        np.clip(np.ceil(ends), region.y0, region.y1).astype(np.int64) for ends in (y, next_y)
    )
    n_rows = end - first
    edge = np.repeat(np.arange(len(vertices)), n_rows)
    row = np.arange(len(edge)) + np.repeat(first - np.cumsum(n_rows) + n_rows, n_rows)
    slope = (next_x[edge] - x[edge]) / (next_y[edge] - y[edge])
    crossing = np.ceil(x[edge] + (row - y[edge]) * slope)
    crossed = np.zeros((region.shape[0], region.shape[1] + 1), np.bool_)
    column = np.clip(crossing - region.x0, 0, region.shape[1]).astype(np.int64)
    np.logical_xor.at(crossed, (row - region.y0, column), True)
    inside: AnyArray = np.logical_xor.accumulate(crossed[:, :-1], axis=1)
    return inside


def as_mask(given: str | PathLike[str] | Mask | AnyArray | Sequence[AnyArray]) -> Mask:
    """Return a mask that is given as a file, an image or polygons.

    Raises
    ------
    InvalidInputError
        The file cannot be read, or the image or the polygons are none.
    """
    if isinstance(given, Mask):
        return given
    if isinstance(given, str | PathLike):
        from ocelot_em import open_mask

        return open_mask(given)
    if isinstance(given, list | tuple):
        try:
            polygons = [np.asarray(vertices, np.float64) for vertices in given]
        except (TypeError, ValueError) as error:
            raise InvalidInputError(f"mask: expected polygons of numbers: {error}") from error
        return of_polygons("mask", polygons)
    return of_image("mask", given)


def of_image(name: str, image: Any, **facts: Any) -> Mask:
    """Return a mask of an image, if it is one."""
    shape, dtype = getattr(image, "shape", None), getattr(image, "dtype", None)
    is_image = shape is not None and len(shape) > 1 and {1}.issuperset(shape[:-2])
    if not is_image or getattr(dtype, "kind", "") not in "biuf":
        got = f"{dtype} of shape {shape}" if shape is not None else type(image).__name__
        raise InvalidInputError(
            f"{name}: expected an image (y, x) of numbers, not 0 where particles may be, got {got}"
        )
    return Mask(name, image, **facts)


def of_polygons(name: str, polygons: Sequence[Float64]) -> Mask:
    """Return a mask of the areas outside polygons, if they are some."""
    expected, problems = "expected 3 or more vertices, each a finite y and x", []
    for number, vertices in enumerate(polygons):
        if vertices.ndim != 2 or vertices.shape[1] != 2 or len(vertices) < 3:
            problems.append(f"{name}: polygon {number}: {expected}, got shape {vertices.shape}")
        elif (bad := vertices[~np.isfinite(vertices).all(axis=1)]).size:
            problems.append(f"{name}: polygon {number}: {expected}, got {bad[0].tolist()}")
    if not polygons:
        problems = [f"{name}: expected one polygon or more, got none"]
    if problems:
        raise InvalidInputError(problems)
    return Mask(name, polygons=tuple(polygons), marks_kept=False)
