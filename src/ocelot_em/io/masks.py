"""Masks in files: images, and tables of the vertices of polygons."""

from contextlib import ExitStack
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from ocelot_em.errors import InvalidInputError
from ocelot_em.particles.csv_columns import parse_column, ragged, read_rows
from ocelot_em.particles.masks import Mask, of_image, of_polygons

MRC = (".mrc", ".mrcs", ".map", ".rec")
HDF5 = (".h5", ".hdf5", ".hdf")

_SHAPES = {"polygon", "rectangle"}


def open_mask(path: str | PathLike[str]) -> Mask:
    """Open a mask; of an image, only the regions that are needed are read, when they are.

    Parameters
    ----------
    path
        An image (y, x), in which pixels are marked that are not 0, also as the only section of a
        stack: MRC (memory-mapped), ``.npy`` (memory-mapped), HDF5, or a folder with a Zarr array.
        Or a CSV file of polygons with the columns ``polygon``, ``y``, ``x``, a line for each
        vertex, or as napari saves a layer of shapes: ``index`` and axes, of which the last two are
        y and x.

        An HDF5 file has one image, or one called ``mask``; or it is a spatial constraint of
        Leopard-EM, whose ``maps/eligible`` is the mask, and ``maps/n_orientations`` and
        ``maps/n_defocus`` the number of correlations of each pixel.

    Returns
    -------
    Mask
        Particles are picked from marked pixels; if they are in polygons, from the others.

    Raises
    ------
    InvalidInputError
        The file cannot be read, or has no mask.
    MissingDependencyError
        mrcfile or h5py, which read such a file, is not installed.

    Examples
    --------
    >>> import numpy as np
    >>> from ocelot_em import find_peaks, open_mask
    >>> is_ice = np.ones((245, 345), bool)
    >>> is_ice[:, :200] = False
    >>> np.save("ice.npy", is_ice)
    >>> open_mask("ice.npy").shape
    (245, 345)
    >>> len(find_peaks("MERGED.zarr", mask="ice.npy"))
    12
    """
    place, suffix = Path(path), Path(path).suffix.lower()
    if not place.exists():
        raise InvalidInputError(f"{place}: expected a mask, got nothing there")
    if suffix == ".csv":
        return _read_polygons(place)
    if suffix in MRC:
        from ocelot_em.io.mrc import open_mrc

        stack = ExitStack()
        return of_image(place.name, stack.enter_context(open_mrc(place)), owner=stack)
    if suffix in HDF5:
        from ocelot_em.io.hdf5 import open_images

        return _of_images(place, *open_images(place))
    if place.is_dir():
        from ocelot_em.io.ome_zarr import open_array

        return of_image(place.name, open_array(place))
    if suffix != ".npy":
        known = ", ".join((".csv", ".npy", *MRC, *HDF5))
        raise InvalidInputError(
            f"{place}: expected a mask in a file that ends with {known}, or a Zarr array, got "
            f"{suffix or 'no such ending'!r}"
        )
    try:
        image = np.load(place, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"{place}: cannot be read as an array: {error}") from error
    return of_image(place.name, image)


def _of_images(place: Path, images: dict[str, Any], frame: str | None, owner: object) -> Mask:
    """Return the mask of an HDF5 file with these images."""
    eligible = images.get("maps/eligible")
    if eligible is not None:
        names = ("maps/n_orientations", "maps/n_defocus")
        counts = {name: images[name] for name in names if name in images}
        problems = [
            f"{place}: {name}: expected integers in the shape of maps/eligible, {eligible.shape}, "
            f"got {image.dtype} of shape {image.shape}"
            for name, image in counts.items()
            if image.shape != eligible.shape or image.dtype.kind not in "iu"
        ]
        if problems:
            raise InvalidInputError(problems)
        of = "map" if frame == "pos_xy" else "micrograph"
        return of_image(place.name, eligible, of=of, counts=(*counts.values(),), owner=owner)
    called = [name for name in images if name.rpartition("/")[2] == "mask"]
    chosen = ["mask"] if "mask" in images else called or [*images]
    if len(chosen) != 1:
        got = ", ".join([*images][:20]) or "none"
        raise InvalidInputError(f"{place}: expected one image, or one called mask, got {got}")
    return of_image(place.name, images[chosen[0]], owner=owner)


def _read_polygons(place: Path) -> Mask:
    header, rows = read_rows(place)
    names, rows = [name.strip().lower() for name in header], [row for row in rows if row]
    axes = [name for name in names if name.startswith("axis-")]  # napari's; the last are y and x
    columns = ["index", *axes[-2:]] if len(axes) > 1 else ["polygon", "y", "x"]
    problems = ragged(rows, len(names))
    if not {*columns} <= {*names}:
        expected = "polygon, y, x or index, axis-0, axis-1"
        problems = [f"expected the columns {expected}, got {', '.join(header)}"]
    if problems:
        raise InvalidInputError(f"{place}: {problem}" for problem in problems)
    texts = dict(zip(names, zip(*rows, strict=True) if rows else [()] * len(names), strict=True))
    if other := set(texts.get("shape-type", ())) - _SHAPES:
        raise InvalidInputError(
            f"{place}: shape-type: expected polygons and rectangles, got {min(other)!r}; draw it "
            "as a polygon"
        )
    vertices = []
    for name in columns[1:]:
        values, found = parse_column(texts[name], "float64")
        vertices.append(values)
        problems += [f"{name}: {problem}" for problem in found]
    if problems:
        raise InvalidInputError(f"{place}: {problem}" for problem in problems)
    numbers = np.array(texts[columns[0]], str)
    each = [np.column_stack(vertices)[numbers == own] for own in dict.fromkeys(numbers.tolist())]
    return of_polygons(place.name, each)
