"""Models of the ``zarr.json`` files that ``docs/format.md`` allows. Pure.

Metadata is untrusted, so nothing that it names is looked up, loaded or allocated: dtypes, codecs
and grids outside the format are rejected by name.
"""

import json
import math
import re
import reprlib
from collections.abc import Sequence
from operator import floordiv, mod
from typing import (
    Annotated,
    Any,
    Generic,
    Literal,
    NamedTuple,
    NotRequired,
    Self,
    TypeAlias,
    TypeVar,
)

import numpy as np
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    Strict,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from typing_extensions import TypedDict

from ocelot_em.errors import FormatError
from ocelot_em.model.problems import in_words
from ocelot_em.model.regions import ceil_div
from ocelot_em.store.constants import (
    MAX_CHUNK_NBYTES,
    MAX_CHUNKS,
    MAX_METADATA_NBYTES,
    MAX_SHARD_CHUNKS,
)
from ocelot_em.store.result_shards import chunks_per_shard

MAX_KEYS = 1000
"""Maximum number of keys in one object; errors about millions would fill the memory."""

_Context: TypeAlias = "ValidationInfo[_Allowed]"


_STRICT = ConfigDict(strict=True)

Name = TypeVar("Name")
Configuration = TypeVar("Configuration")

# Dictionaries are validated faster than models. Keys that no reader needs are left out.


class _Entry(TypedDict, Generic[Name, Configuration]):
    """A named choice with its settings."""

    __pydantic_config__ = _STRICT  # type: ignore[misc]

    name: Name
    configuration: Configuration


def _named(value: object) -> object:
    """Complete an entry without settings, which may be its name alone."""
    if isinstance(value, dict) and "configuration" in value:
        return value
    return {"configuration": {}, **(value if isinstance(value, dict) else {"name": value})}


Lengths = Annotated[
    tuple[Annotated[int, Field(ge=1, lt=2**31)], ...],
    Strict(False),  # JSON has lists only
    Field(min_length=1, max_length=3),
    FailFast(),
]


class _Chunks(TypedDict):
    __pydantic_config__ = _STRICT  # type: ignore[misc]

    chunk_shape: Lengths


class _Separator(TypedDict):
    separator: NotRequired[Literal["/"]]


class _ByteOrder(TypedDict):
    endian: NotRequired[Literal["little"]]


class BloscSettings(TypedDict):
    """Compression settings for writing chunks, with Zarr's names."""

    __pydantic_config__ = _STRICT  # type: ignore[misc]

    cname: Literal["blosclz", "lz4", "lz4hc", "snappy", "zlib", "zstd"]
    clevel: Annotated[int, Field(ge=0, le=9)]
    shuffle: Literal["noshuffle", "shuffle", "bitshuffle"]
    blocksize: Annotated[int, Field(ge=0, lt=2**31)]


_Codecs = tuple[
    Annotated[_Entry[Literal["bytes"], _ByteOrder], BeforeValidator(_named)],
    _Entry[Literal["blosc"], BloscSettings],
    Annotated[_Entry[Literal["crc32c"], dict[str, Any]], BeforeValidator(_named)],
]


class _Sharding(TypedDict):
    __pydantic_config__ = _STRICT  # type: ignore[misc]

    chunk_shape: Lengths
    codecs: list[Any]
    index_codecs: Annotated[
        tuple[
            Annotated[_Entry[Literal["bytes"], _ByteOrder], BeforeValidator(_named)],
            Annotated[_Entry[Literal["crc32c"], dict[str, Any]], BeforeValidator(_named)],
        ],
        Strict(False),
    ]
    index_location: Literal["start"]


DOTTED = {"name": "default", "configuration": {"separator": "."}}
"""Keys of the shards of merged results, which differ from those of single chunks."""

_SHARDING = TypeAdapter(_Sharding)
_SHARD_GRID = TypeAdapter(_Entry[Literal["regular"], _Chunks])


class _Allowed(NamedTuple):
    """What the reader of an array allows; see :func:`parse_array`."""

    dtypes: tuple[str, ...]
    dimensions: tuple[str, ...] | None
    max_chunk_nbytes: int


class ArrayInfo(BaseModel):
    """Metadata of an array, with Zarr's names; fields are checked in this order."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    _per_shard: tuple[int, ...] | None = None  # not of the document
    _is_of_result: bool = False

    zarr_format: int
    node_type: str
    data_type: Any
    shape: Lengths
    dimension_names: Any = Field(None, validate_default=True)
    chunk_grid: _Entry[Literal["regular"], _Chunks]
    chunk_key_encoding: Annotated[_Entry[Literal["default"], _Separator], BeforeValidator(_named)]
    codecs: Annotated[_Codecs, Strict(False)]
    fill_value: Any
    storage_transformers: Annotated[list[Any], Field(max_length=0)] = []
    attributes: Any = None

    @property
    def chunk(self) -> tuple[int, ...]:
        """Shape of the chunks."""
        return self.chunk_grid["configuration"]["chunk_shape"]

    @property
    def per_shard(self) -> tuple[int, ...] | None:
        """Number of chunks of a shard along each axis; None without shards."""
        return self._per_shard

    @property
    def is_of_result(self) -> bool:
        """Whether the shards are those of a merged result, and not of a partial."""
        return self._is_of_result

    def in_shards(self, per_shard: tuple[int, ...], *, of_result: bool) -> Self:
        """Note that the chunks are in shards."""
        self._per_shard, self._is_of_result = per_shard, of_result
        return self

    @model_validator(mode="before")
    @classmethod
    def _without_optional_keys(cls, document: dict[str, Any]) -> dict[str, Any]:
        """Leave out unknown keys that the Zarr specification allows readers to ignore."""
        if document.keys() <= _KEYS:
            return document
        return {
            key: value
            for key, value in document.items()
            if key in _KEYS
            or not (isinstance(value, dict) and value.get("must_understand") is False)
        }

    @field_validator("data_type")
    @classmethod
    def _allowed_dtype(cls, value: object, info: _Context) -> "np.dtype[Any]":
        name = value.get("name") if isinstance(value, dict) else value
        if name not in info.context.dtypes:
            allowed = " or ".join(info.context.dtypes)
            raise ValueError(f"expected {allowed}, got {reprlib.repr(name)}")
        return np.dtype(name)

    @field_validator("dimension_names")
    @classmethod
    def _allowed_dimensions(cls, value: object, info: _Context) -> object:
        allowed, shape = info.context.dimensions, info.data.get("shape")
        names = tuple(value) if isinstance(value, list) else value
        if allowed and (names != allowed or (shape and len(shape) != len(allowed))):
            raise ValueError(
                f"expected dimensions {allowed}, got shape {shape} named {reprlib.repr(names)}"
            )
        return names

    @field_validator("chunk_grid")
    @classmethod
    def _allowed_chunks(cls, grid: Any, info: _Context) -> object:
        chunk, limit = grid["configuration"]["chunk_shape"], info.context.max_chunk_nbytes
        shape, dtype = info.data.get("shape", chunk), info.data.get("data_type", np.dtype("int8"))
        if len(chunk) != len(shape):
            raise ValueError(f"expected chunks with {len(shape)} axes, got {chunk}")
        if (nbytes := math.prod(chunk) * dtype.itemsize) > limit:
            raise ValueError(f"expected chunks of at most {limit:,} bytes, got {nbytes:,}: {chunk}")
        if (n := math.prod(map(ceil_div, shape, chunk))) > MAX_CHUNKS:
            raise ValueError(f"expected at most {MAX_CHUNKS:,} chunks, got {n:,}")
        return grid

    @field_validator("fill_value")
    @classmethod
    def _allowed_fill(cls, value: object, info: _Context) -> object:
        dtype = info.data.get("data_type")
        if dtype is None:
            return value
        found = _float_of(value, dtype) if dtype.kind == "f" else _integer_of(value, dtype)
        if found is None:
            raise ValueError(f"expected a value of {dtype}, got {reprlib.repr(value)}")
        return found


_KEYS = ArrayInfo.model_fields.keys()


def _integer_of(value: object, dtype: "np.dtype[Any]") -> int | None:
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    limits = np.iinfo(dtype)
    return value if limits.min <= value <= limits.max else None


def _float_of(value: object, dtype: "np.dtype[Any]") -> float | None:
    """Parse a number, or Zarr's text for a value that JSON cannot represent."""
    if isinstance(value, str):
        if re.fullmatch(f"0x[0-9a-fA-F]{{{2 * dtype.itemsize}}}", value):
            bits = int(value, 16).to_bytes(dtype.itemsize, "little")
            return float(np.frombuffer(bits, dtype.newbyteorder("<"))[0])
        return float(value) if value in ("NaN", "Infinity", "-Infinity") else None
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return value
    return float(value) if abs(value) <= float(np.finfo(dtype).max) else None


def parse_group(encoded: bytes, where: str) -> dict[str, Any]:
    """Return the attributes of a group from its ``zarr.json``."""
    attributes = _parse(encoded, "group", where).get("attributes", {})
    if not isinstance(attributes, dict):
        raise FormatError(
            f"{where}: attributes: expected an object, got {reprlib.repr(attributes)}"
        )
    return attributes


def parse_array(
    encoded: bytes,
    where: str,
    place: str,
    dtypes: Sequence[str],
    dimensions: tuple[str, ...] | None = None,
    max_chunk_nbytes: int = MAX_CHUNK_NBYTES,
) -> ArrayInfo:
    """Parse the ``zarr.json`` of an array; ``FormatError`` lists what is not allowed.

    ``where`` locates the file, ``place`` names the array; ``dimensions`` None allows any names.
    """
    document = _parse(encoded, "array", where)
    allowed = _Allowed(tuple(dtypes), dimensions, max_chunk_nbytes)
    try:
        match document.get("codecs"):
            case [{"name": "sharding_indexed", "configuration": configuration}]:
                return _parse_sharded(document, configuration, place, allowed)
        return ArrayInfo.model_validate(document, context=allowed)
    except ValidationError as error:
        raise FormatError(f"{place}: {'; '.join(problems_of(error))}") from None


def _parse_sharded(
    document: dict[str, Any], configuration: object, place: str, allowed: _Allowed
) -> ArrayInfo:
    sharding = _SHARDING.validate_python(configuration)
    grid = {"name": "regular", "configuration": {"chunk_shape": sharding["chunk_shape"]}}
    chunked = {**document, "chunk_grid": grid, "codecs": sharding["codecs"]}
    if of_result := chunked.get("chunk_key_encoding") == DOTTED:
        chunked["chunk_key_encoding"] = "default"
    about = ArrayInfo.model_validate(chunked, context=allowed)
    shard = _SHARD_GRID.validate_python(document.get("chunk_grid"))["configuration"]["chunk_shape"]
    n_axes = len(about.chunk)
    if len(shard) != n_axes or any(map(mod, shard, about.chunk)) or not (n_axes == 2 or of_result):
        raise FormatError(
            f"{place}: chunk_grid: expected shards of whole chunks {about.chunk} of two axes, got "
            f"{reprlib.repr(shard)}"
        )
    per_shard = tuple(map(floordiv, shard, about.chunk))
    if of_result and per_shard != (expected := chunks_per_shard(n_axes)):
        raise FormatError(
            f"{place}: chunk_grid: expected shards of {expected} chunks, whose keys have dots, got "
            f"{reprlib.repr(per_shard)}"
        )
    if (n := math.prod(per_shard)) > MAX_SHARD_CHUNKS:
        raise FormatError(
            f"{place}: expected at most {MAX_SHARD_CHUNKS:,} chunks in a shard, got {n:,}"
        )
    return about.in_shards(per_shard, of_result=of_result)


_MAX_PROBLEMS, _MAX_NAME = 20, 60


def problems_of(error: ValidationError) -> list[str]:
    """Describe the first problems of a validation: where, what was expected, and what was found."""
    problems = error.errors(include_url=False)[:_MAX_PROBLEMS]
    found = [f"{_place_of(problem['loc'])}{in_words(problem)}" for problem in problems]
    if (n_more := error.error_count() - len(found)) > 0:
        found.append(f"and {n_more} more problems")
    return found


def _place_of(steps: tuple[int | str, ...]) -> str:
    """Format the location of a problem in a document, whose keys may be arbitrary text."""
    names = (str(step) if str(step).isidentifier() else reprlib.repr(step) for step in steps[:8])
    place = ".".join(name[:_MAX_NAME] for name in names)
    return f"{place}: " if place else ""


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
            f"{where}: cannot be read as Zarr: expected an object, got {reprlib.repr(content)}"
        )
    found, version = content.get("node_type"), content.get("zarr_format")
    if (found, version) != (kind, 3):
        raise FormatError(
            f"{where}: cannot be read as Zarr: expected {kind!r} of format 3, got "
            f"{reprlib.repr(found)} of format {reprlib.repr(version)}"
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
        raise ValueError(f"the key {reprlib.repr(twice)} is there more than once")
    return content
