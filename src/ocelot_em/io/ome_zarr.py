"""Images of merged maps for viewers: OME-Zarr 0.5 pyramids, pooled by maximum.

A pyramid is written in one pass: each block of the full map is read once and contributes to the
levels above. Memory use is a few blocks per level, whatever the size of the map.
"""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, cast

import numpy as np
import zarr
from zarr.codecs import BloscCodec
from zarr.errors import BaseZarrError

from ocelot_em.errors import FormatError, InvalidInputError, OutputExistsError, StoreNotFoundError
from ocelot_em.merge.result import MergedResult
from ocelot_em.model.maps import MEAN, MIP, SCALED_MIP, STD, Float32
from ocelot_em.model.regions import Region, TileGrid, ceil_div
from ocelot_em.store.distinct import require_distinct, require_no_store_within
from ocelot_em.store.objects import is_local, normalise_url, open_objects
from ocelot_em.store.whole_file import refuse_existing
from ocelot_em.store.whole_folder import whole_folder_or_nothing

VERSION = "0.5"
AXES = ("c", "y", "x")
POOLED = (SCALED_MIP, MIP, MEAN, STD)
"""Maps whose maximum is meaningful; that of an angle or an index is not."""

CHUNK = 512
"""Edge of a chunk in pixels, and the maximum edge of the last level, which is one chunk."""

BLOCK = 2048
"""Edge in pixels of the blocks that are read, pooled and written on every level."""


def write_ome_zarr(
    source: str | PathLike[str] | MergedResult,
    output: str | PathLike[str],
    *,
    maps: Sequence[str] = (SCALED_MIP,),
    overwrite: bool = False,
) -> Path:
    """Write maps of a merged result as a multi-resolution image for viewers.

    Level 0 has the unchanged valid pixels. Each further level has the maximum of 2 x 2 pixels of
    the previous one, so that peaks stay visible at any zoom; the last has no edge longer than 512
    pixels. Unsearched pixels are NaN; a coarser pixel is NaN if it covers only unsearched ones.

    Each of ``maps`` is a channel: ``scaled_mip``, ``mip``, ``correlation_mean`` or
    ``correlation_std``. Axes are c, y, x, in Å if the pixel size is known. Coordinates are those of
    pixel centres; the upper left pixel of level 0 is the origin. Contrast limits are the median and
    the 99.99th percentile of the last level.

    Return the image's folder. ``overwrite`` replaces an existing image, never anything else; if
    writing fails, nothing is left behind.
    """
    problems = [
        f"map {name!r}: expected one of {', '.join(POOLED)}, whose maximum is meaningful"
        for name in maps
        if name not in POOLED
    ]
    if not maps or len(set(maps)) < len(maps):
        problems.append(f"maps: expected one or more different ones, got {tuple(maps)}")
    url = normalise_url(output)
    if not is_local(url):
        problems.append(f"{url}: expected a local folder; write the image there, then copy it")
    if problems:
        raise InvalidInputError(problems)
    merged, place = MergedResult.open(source), Path(url)
    if place.exists():
        refuse_existing([place], overwrite)
        _require_image(place)
    require_distinct(url, [merged.url])
    with whole_folder_or_nothing(place) as staged:
        pyramid = _Pyramid(merged, zarr.create_group(staged, zarr_format=3), maps)
        pyramid.write(place.name)
    return place


def open_array(path: str | PathLike[str]) -> Any:
    """Open a Zarr array of any program; slicing it reads a region.

    Raises
    ------
    InvalidInputError
        The folder has no Zarr array.
    """
    try:
        return zarr.open_array(path, mode="r")
    except (BaseZarrError, OSError, ValueError) as error:
        raise InvalidInputError(f"{path}: expected a Zarr array, got another folder") from error


def read_level(
    path: str | PathLike[str], longest_edge_px: int, name: str = SCALED_MIP
) -> tuple[Float32, int]:
    """Read an overview: the finest level with at most ``longest_edge_px`` rows or columns.

    If the last level is larger, it is pooled further. Return (y, x) float32 values, NaN at
    unsearched pixels, and the edge, in full-size pixels, of the square that each value is the
    maximum of.
    """
    if longest_edge_px < 1:
        raise InvalidInputError(f"longest edge: expected at least 1 pixel, got {longest_edge_px}")
    place = Path(path)
    if not place.exists():
        raise StoreNotFoundError(f"{place}: expected an OME-Zarr image, got nothing there")
    try:
        group = zarr.open_group(place, mode="r", zarr_format=3)
        ome = cast("dict[str, Any]", group.attrs["ome"])
        levels = [level["path"] for level in ome["multiscales"][0]["datasets"]]
        names = [channel["label"] for channel in ome["omero"]["channels"]]
        arrays = [cast("zarr.Array[Any]", group[level]) for level in levels]
        shapes = [array.shape[1:] for array in arrays]
    except (BaseZarrError, ValueError, LookupError, TypeError, OSError) as error:
        raise FormatError(
            f"{place}: expected an image written by ocelot-em, got something else: {error}"
        ) from error
    if name not in names:
        raise InvalidInputError(
            f"{place}: expected one of its maps, {', '.join(names)}; got {name}"
        )
    fitting = (k for k, shape in enumerate(shapes) if max(shape) <= longest_edge_px)
    level = next(fitting, len(levels) - 1)
    values = np.asarray(arrays[level][names.index(name)], np.float32)
    while max(values.shape) > longest_edge_px:
        values, level = pool(values), level + 1
    return values, 2**level


def pool(values: Float32) -> Float32:
    """Return maxima of 2 x 2 pixels, fewer at lower and right edges; NaN where all are NaN."""
    height, width = values.shape
    rows = values[0::2].copy()
    np.fmax(rows[: height // 2], values[1::2], out=rows[: height // 2])
    pooled = rows[:, 0::2].copy()
    np.fmax(pooled[:, : width // 2], rows[:, 1::2], out=pooled[:, : width // 2])
    return pooled


class _Pyramid:
    """The levels of an image, written block by block from the finest upwards."""

    def __init__(self, merged: MergedResult, group: zarr.Group, maps: Sequence[str]) -> None:
        self._merged, self._group, self._maps = merged, group, maps
        shapes = [merged.valid_shape]
        while max(shapes[-1]) > CHUNK:
            shapes.append((ceil_div(shapes[-1][0], 2), ceil_div(shapes[-1][1], 2)))
        self._grids = [TileGrid(shape, (BLOCK, BLOCK)) for shape in shapes]
        self._arrays = [
            group.create_array(
                str(level),
                shape=(len(maps), *shape),
                chunks=(1, CHUNK, CHUNK),
                dtype="float32",
                fill_value=np.nan,
                compressors=BloscCodec(typesize=4, cname="lz4", clevel=5, shuffle="shuffle"),
                dimension_names=AXES,
            )
            for level, shape in enumerate(shapes)
        ]

    def write(self, name: str) -> None:
        """Write all levels of all maps, then the metadata of the image with this name."""
        for channel in range(len(self._maps)):
            for block in self._grids[-1]:
                self._write_block(channel, len(self._grids) - 1, block.region)
        self._group.attrs["ome"] = self._metadata(name)
        if self._merged.incomplete_text:
            self._group.attrs["incomplete_search"] = self._merged.incomplete_text

    def _write_block(self, channel: int, level: int, region: Region) -> Float32:
        """Write a block and all blocks below it; return its pixels of the level above."""
        if level == 0:
            values = self._merged.read(region, self._maps[channel])
            values = np.where(np.isneginf(values), np.float32(np.nan), values)
        else:
            values = np.empty(region.shape, np.float32)
            finer = Region(2 * region.y0, 2 * region.y1, 2 * region.x0, 2 * region.x1)
            for below in self._grids[level - 1].touching(finer):
                share = self._write_block(channel, level - 1, below.region)
                y0, x0 = below.region.y0 // 2 - region.y0, below.region.x0 // 2 - region.x0
                values[y0 : y0 + share.shape[0], x0 : x0 + share.shape[1]] = share
        self._arrays[level][(channel, *region.slices)] = values
        return pool(values)

    def _metadata(self, name: str) -> dict[str, Any]:
        size = self._merged.attributes.pixel_size_angstrom
        unit = {} if size is None else {"unit": "angstrom"}
        datasets = []
        for level in range(len(self._arrays)):
            scale = 2.0**level * (size or 1)
            offset = (2.0**level - 1) / 2 * (size or 1)  # centre of a pooled pixel
            transformations = [
                {"type": "scale", "scale": [1.0, scale, scale]},
                {"type": "translation", "translation": [0.0, offset, offset]},
            ]
            datasets.append({"path": str(level), "coordinateTransformations": transformations})
        multiscale = {
            "name": name,
            "axes": [
                {"name": "c", "type": "channel"},
                {"name": "y", "type": "space", **unit},
                {"name": "x", "type": "space", **unit},
            ],
            "datasets": datasets,
            "type": "maximum",
            "metadata": {
                "description": "Maximum of 2 x 2 pixels of the level before, NaN left out. A "
                "pixel is the upper left corner of the template box.",
                "method": "numpy.fmax",
            },
        }
        channels = [
            {
                "label": label,
                "active": number == 0,
                "color": "FFFFFF",
                "window": _window(np.asarray(self._arrays[-1][number], np.float32)),
            }
            for number, label in enumerate(self._maps)
        ]
        omero = {"channels": channels, "rdefs": {"model": "greyscale"}}
        return {"version": VERSION, "multiscales": [multiscale], "omero": omero}


def _window(values: Float32) -> dict[str, float]:
    """Return contrast limits from the median of the noise to the peaks."""
    known = values[np.isfinite(values)].astype(np.float64)
    if not known.size:
        return {"min": 0.0, "max": 1.0, "start": 0.0, "end": 1.0}
    start, end = map(float, np.percentile(known, (50, 99.99)))
    if end <= start:
        end = start + 1
    low, high = float(known.min()), max(float(known.max()), end)
    return {"min": low, "max": high, "start": start, "end": end}


def _require_image(place: Path) -> None:
    """Refuse to delete anything but an image."""
    try:
        is_image = "ome" in zarr.open_group(place, mode="r").attrs
    except (BaseZarrError, ValueError, OSError):
        is_image = False
    if not is_image:
        raise OutputExistsError(
            f"{place}: expected an OME-Zarr image to overwrite, got something else, which is not "
            "replaced; choose another path, or delete it"
        )
    require_no_store_within(open_objects(place))
