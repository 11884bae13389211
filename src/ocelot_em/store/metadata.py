"""Parser of the ``zarr.json`` files that ``docs/format.md`` allows. Pure.

Metadata is untrusted, so nothing that it names is looked up, loaded or allocated: dtypes, codecs
and grids outside the format are rejected by name. (zarr would look up any codec or dtype, and
create values of it, before it could be rejected.)
"""

import json
import math
import re
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import numpy as np

from ocelot_em.errors import FormatError
from ocelot_em.model.regions import ceil_div
from ocelot_em.store.constants import MAX_CHUNK_NBYTES, MAX_CHUNKS, MAX_METADATA_NBYTES

MAX_DIMENSIONS = 3

MAX_KEYS = 1000
"""Maximum number of keys in one object; errors about millions would fill the memory."""

_ARRAY_KEYS = {
    "zarr_format",
    "node_type",
    "shape",
    "data_type",
    "chunk_grid",
    "chunk_key_encoding",
    "fill_value",
    "codecs",
    "attributes",
    "dimension_names",
    "storage_transformers",
}

_COMPRESSORS = {"blosclz", "lz4", "lz4hc", "snappy", "zlib", "zstd"}
_SHUFFLES = {"noshuffle", "shuffle", "bitshuffle"}
_NO_NUMBERS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class BloscSettings(NamedTuple):
    """Compression settings for writing chunks, with Zarr's names."""

    cname: str
    clevel: int
    shuffle: str
    blocksize: int


class ArrayInfo(NamedTuple):
    """Metadata of an array.

    Parameters
    ----------
    shape, chunk
        Shapes of the array and of its chunks, with 1 to :data:`MAX_DIMENSIONS` axes.
    dtype
        Dtype of the values, in this machine's byte order.
    fill
        Fill value.
    blosc
        Settings of the compressor.
    """

    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    dtype: "np.dtype[Any]"
    fill: float | int
    blosc: BloscSettings


def parse_group(encoded: bytes, where: str) -> dict[str, Any]:
    """Return the attributes of a group.

    Parameters
    ----------
    encoded
        Content of its ``zarr.json``.
    where
        Its location, for error messages.

    Raises
    ------
    FormatError
        It is not a Zarr v3 group, or its attributes are not an object.
    """
    attributes = _parse(encoded, "group", where).get("attributes", {})
    if not isinstance(attributes, dict):
        raise FormatError(f"{where}: attributes: expected an object, got {_short(attributes)}")
    return attributes


def parse_array(
    encoded: bytes,
    where: str,
    place: str,
    dtypes: Sequence[str],
    dimensions: tuple[str, ...] | None = None,
    most_chunk_nbytes: int = MAX_CHUNK_NBYTES,
) -> ArrayInfo:
    """Parse the metadata of an array.

    Parameters
    ----------
    encoded
        Content of its ``zarr.json``.
    where
        Its location, for error messages.
    place
        Name of the array in error messages.
    dtypes
        Allowed stored dtypes.
    dimensions
        Required dimension names; None allows any.
    most_chunk_nbytes
        Size limit of a decoded chunk in bytes.

    Raises
    ------
    FormatError
        Its shape, dimensions, dtype, chunks, codecs, key encoding or fill value do not follow
        ``docs/format.md``. All problems are listed.
    """
    array = _Array(_parse(encoded, "array", where), tuple(dtypes))
    shape = array.shape(dimensions)
    dtype = array.dtype()
    chunk = array.chunk(shape, dtype.itemsize, most_chunk_nbytes)
    blosc = array.blosc()
    array.look_at_the_rest()
    fill = array.fill(dtype)
    if array.problems or shape is None or chunk is None or blosc is None or fill is None:
        raise FormatError(f"{place}: {'; '.join(array.problems)}")
    return ArrayInfo(shape, chunk, dtype, fill, blosc)


@dataclass
class _Array:
    """Metadata of an array, checked one part at a time.

    Every method returns its part or appends to :attr:`problems`.
    """

    document: dict[str, Any]
    dtypes: tuple[str, ...]
    problems: list[str] = field(default_factory=list)

    def shape(self, dimensions: tuple[str, ...] | None) -> tuple[int, ...] | None:
        given, names = self.document.get("shape"), self.document.get("dimension_names")
        shape, names = _lengths(given), tuple(names) if isinstance(names, list) else names
        if shape is None:
            self.problems.append(
                f"shape: expected 1 to {MAX_DIMENSIONS} lengths of 1 to 2**31 - 1, got "
                f"{_short(given)}"
            )
        if dimensions and (names != dimensions or (shape and len(shape) != len(dimensions))):
            self.problems.append(
                f"expected dimensions {dimensions}, got shape {shape} named {_short(names)}"
            )
        return shape

    def dtype(self) -> "np.dtype[Any]":
        name, _ = _named(self.document.get("data_type"))
        if name in self.dtypes:
            return np.dtype(name)
        self.problems.append(f"expected dtype {' or '.join(self.dtypes)}, got {_bare(name)}")
        return np.dtype(self.dtypes[0])

    def chunk(
        self, shape: tuple[int, ...] | None, itemsize: int, most_nbytes: int
    ) -> tuple[int, ...] | None:
        name, configuration = _named(self.document.get("chunk_grid"))
        given = configuration.get("chunk_shape")
        chunk = _lengths(given)
        if name != "regular":
            self.problems.append(f"expected a regular chunk grid, got {_bare(name)}")
        elif chunk is None or (shape and len(chunk) != len(shape)):
            self.problems.append(
                "chunk_shape: expected a length of 1 to 2**31 - 1 for each axis, got "
                f"{_short(given)}"
            )
        elif math.prod(chunk) * itemsize > most_nbytes:
            self.problems.append(f"chunks of {chunk} are larger than {most_nbytes} bytes")
        elif shape:
            n = math.prod(ceil_div(n, cell) for n, cell in zip(shape, chunk, strict=True))
            if n > MAX_CHUNKS:
                self.problems.append(f"expected at most {MAX_CHUNKS:,} chunks, got {n:,}")
        return chunk

    def blosc(self) -> BloscSettings | None:
        codecs = self.document.get("codecs")
        found = [_named(codec) for codec in codecs] if isinstance(codecs, list) else []
        names = [name for name, _ in found]
        if names != ["bytes", "blosc", "crc32c"]:
            got = ", ".join(_bare(name) for name in names[:5]) or "none"
            self.problems.append(f"expected codecs bytes, blosc, crc32c, got {got}")
            return None
        (_, order), (_, how), _ = found
        if (endian := order.get("endian", "little")) != "little":
            self.problems.append(f"expected little-endian bytes, got {_bare(endian)}-endian")
        settings = BloscSettings._make(how.get(key) for key in BloscSettings._fields)
        if (
            not (isinstance(settings.cname, str) and settings.cname in _COMPRESSORS)
            or not (_is_integer(settings.clevel) and 0 <= settings.clevel <= 9)
            or not (isinstance(settings.shuffle, str) and settings.shuffle in _SHUFFLES)
            or not (_is_integer(settings.blocksize) and 0 <= settings.blocksize < 2**31)
        ):
            self.problems.append(f"blosc: expected settings that it has, got {_short(how)}")
            return None
        return settings

    def look_at_the_rest(self) -> None:
        name, configuration = _named(self.document.get("chunk_key_encoding"))
        if name != "default" or configuration.get("separator", "/") != "/":
            self.problems.append("expected the default chunk key encoding with separator '/'")
        if (transformers := self.document.get("storage_transformers", [])) != []:
            self.problems.append(f"expected no storage transformers, got {_short(transformers)}")
        unknown = [
            key
            for key, value in self.document.items()
            if key not in _ARRAY_KEYS
            # The Zarr specification allows readers to ignore these.
            and not (isinstance(value, dict) and value.get("must_understand") is False)
        ]
        if unknown:
            self.problems.append(f"expected no more than Zarr's own keys, got {_short(unknown)}")

    def fill(self, dtype: "np.dtype[Any]") -> float | int | None:
        given = self.document.get("fill_value")
        found = _float_of(given, dtype) if dtype.kind == "f" else _integer_of(given, dtype)
        if found is None:
            self.problems.append(f"fill_value: expected a value of {dtype}, got {_short(given)}")
        return found


def _parse(encoded: bytes, kind: str, where: str) -> dict[str, Any]:
    if len(encoded) > MAX_METADATA_NBYTES:
        raise FormatError(
            f"{where}: metadata: expected at most {MAX_METADATA_NBYTES:,} bytes, got "
            f"{len(encoded):,}"
        )
    try:
        content = json.loads(encoded, object_pairs_hook=_unambiguous)
    except RecursionError:
        raise FormatError(f"{where}: cannot be read as Zarr: it is nested too deeply") from None
    except ValueError as error:
        raise FormatError(f"{where}: cannot be read as Zarr: {error}") from None
    if not isinstance(content, dict):
        raise FormatError(
            f"{where}: cannot be read as Zarr: expected an object, got {_short(content)}"
        )
    found, version = content.get("node_type"), content.get("zarr_format")
    if (found, version) != (kind, 3):
        raise FormatError(
            f"{where}: cannot be read as Zarr: expected {kind!r} of format 3, got "
            f"{_short(found)} of format {_short(version)}"
        )
    return content


def _unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object; reject duplicate keys, which readers may interpret differently."""
    if len(pairs) > MAX_KEYS:
        raise ValueError(f"expected at most {MAX_KEYS} keys in an object, got {len(pairs)}")
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in content if names.count(name) > 1)
        raise ValueError(f"the key {_short(twice)} is there more than once")
    return content


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _lengths(value: object) -> tuple[int, ...] | None:
    """Return the value as a shape, or None if it is not one."""
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_DIMENSIONS:
        return None
    return tuple(value) if all(_is_integer(n) and 1 <= n < 2**31 for n in value) else None


def _named(value: object) -> tuple[object, dict[str, Any]]:
    """Name and configuration of an entry, which may be only a name."""
    if isinstance(value, dict) and isinstance(value.get("name"), str):
        configuration = value.get("configuration", {})
        if isinstance(configuration, dict):
            return value["name"], configuration
    return value, {}


def _integer_of(value: object, dtype: "np.dtype[Any]") -> int | None:
    limits = np.iinfo(dtype)
    fits = _is_integer(value) and limits.min <= cast(int, value) <= limits.max
    return cast(int, value) if fits else None


def _float_of(value: object, dtype: "np.dtype[Any]") -> float | None:
    """Parse a number, or Zarr's text for a value that JSON cannot represent."""
    if isinstance(value, str):
        if re.fullmatch(f"0x[0-9a-fA-F]{{{2 * dtype.itemsize}}}", value):
            bits = int(value, 16).to_bytes(dtype.itemsize, "little")
            return float(np.frombuffer(bits, dtype.newbyteorder("<"))[0])
        return _NO_NUMBERS.get(value)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return value
    return float(value) if abs(value) <= float(np.finfo(dtype).max) else None


def _bare(value: object) -> str:
    """Format an expected name; without quotes if it is one."""
    is_name = isinstance(value, str) and re.fullmatch(r"[\w.\-]{1,60}", value, re.ASCII)
    return str(value) if is_name else _short(value)


def _short(value: object) -> str:
    """Format an arbitrary value of any size."""
    return reprlib.repr(value)
