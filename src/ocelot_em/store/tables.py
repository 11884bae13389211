"""Small arrays that are not maps, written in one chunk and read whole."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from ocelot_em.errors import FormatError
from ocelot_em.model.maps import AnyArray
from ocelot_em.model.regions import ceil_div
from ocelot_em.store.arrays import ArrayLayout, array_metadata, create_array, write_chunk
from ocelot_em.store.blosc import BloscChunk, max_encoded_nbytes
from ocelot_em.store.contract import Objects, at_once
from ocelot_em.store.metadata import parse_array

_DTYPES = ("float32", "float64", "int64", "uint32")


def write_table(
    objects: Objects,
    path: str,
    values: AnyArray,
    dimensions: tuple[str, ...],
    attributes: dict[str, Any] | None = None,
) -> None:
    """Write a small array in one chunk."""
    shape, fill = values.shape, math.nan if values.dtype.kind == "f" else 0
    layout = ArrayLayout(shape, shape, values.dtype.name, fill, dimensions, attributes or {})
    key = "/".join([path, "c", *("0" for _ in values.shape)])
    steps: list[Callable[[], object]] = [
        partial(create_array, objects, path, layout),
        partial(write_chunk, objects, key, np.ascontiguousarray(values)),
    ]
    at_once(objects, steps)


def read_table(objects: Objects, path: str, *, max_nbytes: int = 2**31) -> AnyArray:
    """Read a whole small array; ``FormatError`` if it is missing, too large or damaged."""
    place = f"{objects.url}/{path}"
    encoded = array_metadata(objects, path, place)
    about = parse_array(encoded, place, place, _DTYPES, None, max_nbytes)
    if (nbytes := math.prod(about.shape) * about.data_type.itemsize) > max_nbytes:
        raise FormatError(f"{place}: expected at most {max_nbytes} bytes, got {nbytes}")
    nbytes = math.prod(about.chunk) * about.data_type.itemsize
    values = whole = np.empty(0, about.data_type)
    counts = [ceil_div(n, cell) for n, cell in zip(about.shape, about.chunk, strict=True)]
    for index in np.ndindex(*counts):
        key = "/".join([path, "c", *map(str, index)])
        content = objects.get(key, max_encoded_nbytes(nbytes))
        if content is None:
            raise FormatError(f"{place}: the table's chunk is missing: expected an object {key}")
        try:
            frame = BloscChunk(memoryview(content), nbytes)
            if not any(index):  # allocate only after the first chunk proved readable
                values, whole = (np.empty(n, about.data_type) for n in (about.shape, about.chunk))
            frame.decode(whole)
        except ValueError as error:
            raise FormatError(f"{place}: chunk {key} is corrupt: {error}") from error
        cells = zip(index, about.chunk, strict=True)
        target = values[tuple(slice(i * n, (i + 1) * n) for i, n in cells)]
        target[...] = whole[tuple(map(slice, target.shape))]
    return values
