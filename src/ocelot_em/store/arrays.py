"""Arrays of searches and merged results: their metadata and chunks."""

import json
import math
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from operator import mul
from typing import Any, Literal

import numpy as np

from ocelot_em.errors import CorruptChunkError, FormatError, MissingChunkError
from ocelot_em.model.maps import MAPS, AnyArray
from ocelot_em.model.regions import Region, Tile, TileGrid
from ocelot_em.store.blosc import (
    BIT_SHUFFLE,
    BYTE_SHUFFLE,
    NO_SHUFFLE,
    BitPlanes,
    BloscChunk,
    Codec,
    EncodedChunks,
    MergedMap,
    encode,
    encode_planes,
    encoded_parts,
    max_encoded_nbytes,
)
from ocelot_em.store.constants import (
    DIMENSIONS,
    MAX_CHUNK_NBYTES,
    MAX_METADATA_NBYTES,
    map_attributes,
    shuffle_of,
)
from ocelot_em.store.contract import Objects, ReusedMemory, join
from ocelot_em.store.manifest import ArrayManifest, Checksums, checksum_of, metadata_digest
from ocelot_em.store.metadata import parse_array
from ocelot_em.store.result_shards import chunks_per_shard
from ocelot_em.store.shards import Shards

_BLOSC = Codec("lz4", 5, BYTE_SHUFFLE)


class _ThreadMemory(threading.local):
    def __init__(self) -> None:
        self.encoded, self.decoded = ReusedMemory(), ReusedMemory()

    def chunk(self, shape: tuple[int, int], dtype: "np.dtype[Any]") -> AnyArray:
        """Return an array of a decoded chunk, valid until the thread's next call."""
        nbytes = shape[0] * shape[1] * dtype.itemsize
        return np.frombuffer(self.decoded.of(nbytes), dtype).reshape(shape)


_of_thread = _ThreadMemory()


def create_map(
    objects: Objects,
    path: str,
    name: str,
    shape: tuple[int, int],
    chunk: tuple[int, int],
    dtype: str | None = None,
) -> str:
    """Create the array of a map without chunks; return the digest of its metadata."""
    return create_array(objects, path, map_layout(name, shape, chunk, dtype))


def digest_of(layout: "ArrayLayout") -> str:
    """Return the digest of the metadata that :func:`create_array` writes."""
    return metadata_digest(_encoded_metadata(layout))


def map_layout(
    name: str, shape: tuple[int, int], chunk: tuple[int, int], dtype: str | None = None
) -> "ArrayLayout":
    """Return the layout of the array of a map."""
    info, attributes = MAPS[name], map_attributes(name)
    dtype = dtype or info.dtypes[0]
    return ArrayLayout(shape, chunk, dtype, info.fill, DIMENSIONS, attributes, shuffle_of(name))


@dataclass(frozen=True)
class ArrayLayout:
    """Properties of a new array, as its metadata stores them."""

    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    dtype: str
    fill: float | int
    dimensions: tuple[str, ...]
    attributes: dict[str, Any] = field(default_factory=dict)
    shuffle: Literal["shuffle", "bitshuffle"] = "shuffle"
    per_shard: tuple[int, ...] | None = None
    separator: Literal["/", "."] = "/"

    @property
    def of_result(self) -> "ArrayLayout":
        """The same layout in the shards of a result."""
        return replace(self, per_shard=chunks_per_shard(len(self.chunk)), separator=".")


def create_array(objects: Objects, path: str, layout: ArrayLayout) -> str:
    """Write the metadata of an array, keeping existing chunks; return the digest of the metadata.

    This is one atomic, repeatable write; zarr would also create parent groups and reject existing
    arrays.
    """
    encoded = _encoded_metadata(layout)
    objects.put(join(path, "zarr.json"), [encoded])
    return metadata_digest(encoded)


def _encoded_metadata(layout: ArrayLayout) -> bytes:
    """Return the bytes that zarr would write, which tests compare.

    Importing zarr takes longer than merging a small search.
    """
    dtype = np.dtype(layout.dtype)
    blosc = {
        "typesize": dtype.itemsize,
        "cname": "lz4",
        "clevel": 5,
        "shuffle": layout.shuffle,
        "blocksize": 0,
    }
    to_bytes = {"name": "bytes", "configuration": {"endian": "little"}}
    codecs = [to_bytes, {"name": "blosc", "configuration": blosc}, {"name": "crc32c"}]
    chunk = layout.chunk
    if layout.per_shard is not None:
        sharding = {
            "chunk_shape": chunk,
            "codecs": codecs,
            "index_codecs": [to_bytes, {"name": "crc32c"}],
            "index_location": "start",
        }
        codecs = [{"name": "sharding_indexed", "configuration": sharding}]
        chunk = tuple(map(mul, chunk, layout.per_shard))
    fill: float | str = layout.fill
    if dtype.kind == "f":
        special = {math.inf: "Infinity", -math.inf: "-Infinity"}
        fill = "NaN" if math.isnan(layout.fill) else special.get(layout.fill, float(layout.fill))
    document = {
        "shape": layout.shape,
        "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": layout.separator}},
        "fill_value": fill,
        "codecs": codecs,
        "attributes": layout.attributes,
        "dimension_names": layout.dimensions,
        "zarr_format": 3,
        "node_type": "array",
        "storage_transformers": [],
    }
    return json.dumps(document, indent=2, allow_nan=False).encode()


@dataclass(frozen=True)
class ChunkedMap:
    """An array of a store, opened for reading or writing chunks; a column of one axis has a second.

    ``place`` names store, partial and map in errors; ``fill`` pads chunks at the lower and right
    edges; chunks are compared with ``checksums``, those of the manifest, if there is one.
    """

    objects: Objects
    path: str
    place: str
    grid: TileGrid
    dtype: "np.dtype[Any]"
    fill: float | int
    codec: Codec
    checksums: Checksums | None = None
    is_column: bool = False
    shards: Shards | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.grid.shape

    def key(self, chunk: Tile) -> str:
        """Key of the object that holds a chunk."""
        if self.shards is not None:
            return self.shards.key(chunk)
        return f"{self.path}/c/{chunk.iy}" + ("" if self.is_column else f"/{chunk.ix}")

    def read(self, region: Region, out: AnyArray | None = None) -> tuple[AnyArray, int]:
        """Decode a region into a C-contiguous array; also return the number of bytes read."""
        if out is None:
            out = np.empty(region.shape, self.dtype)
        nbytes = 0
        for chunk in self.grid.touching(region):
            frame = self.fetch(chunk, _of_thread.encoded)
            nbytes += frame.encoded_nbytes
            self.decode(frame, chunk, region, out)
        return out, nbytes

    def fetch(self, chunk: Tile, memory: ReusedMemory) -> BloscChunk:
        """Read a chunk into memory and check it, without decoding it."""
        nbytes = self.grid.cell[0] * self.grid.cell[1] * self.dtype.itemsize
        encoded = self._encoded(chunk, memory, max_encoded_nbytes(nbytes))
        if encoded is None:
            raise MissingChunkError(
                f"{self.place}: chunk ({chunk.iy}, {chunk.ix}), pixels {chunk.region}, is "
                f"missing: expected an object {self.key(chunk)}; write the partial, or merge, again"
            )
        try:
            fetched = BloscChunk(encoded, nbytes)
            if self.checksums is not None:
                fetched.check_place(self.checksums[chunk.iy, chunk.ix])
        except ValueError as error:
            raise self.corrupt(chunk, error) from error
        return fetched

    def _encoded(self, chunk: Tile, memory: ReusedMemory, max_nbytes: int) -> memoryview | None:
        if self.shards is None:
            return self.objects.get_into(self.key(chunk), memory, max_nbytes)
        try:
            return self.shards.read(chunk, memory, max_nbytes)
        except ValueError as error:
            raise self.corrupt(chunk, error) from error

    def decode(self, frame: BloscChunk, chunk: Tile, region: Region, out: AnyArray) -> None:
        """Decode the part of a fetched chunk inside a region into that region's array."""
        wanted = chunk.region.intersect(region)
        target = out[wanted.relative_to(region).slices]
        fits = wanted.shape == self.grid.cell and target.flags.c_contiguous
        inside = wanted.relative_to(chunk.region)
        whole = target if fits else _of_thread.chunk(self.grid.cell, self.dtype)
        try:
            if fits:
                frame.decode(whole)
            else:
                row_nbytes = self.grid.cell[1] * self.dtype.itemsize
                frame.decode_part(inside.y0 * row_nbytes, inside.y1 * row_nbytes, whole)
        except ValueError as error:
            raise self.corrupt(chunk, error) from error
        if not fits:
            target[...] = whole[inside.slices]

    def corrupt(self, chunk: Tile, complaint: ValueError) -> CorruptChunkError:
        """Return the error for a chunk that :class:`BloscChunk` rejects."""
        return CorruptChunkError(
            f"{self.place}: chunk ({chunk.iy}, {chunk.ix}), pixels {chunk.region}, is corrupt: "
            f"{complaint} (object {self.key(chunk)}); write the partial, or merge, again"
        )

    def write(self, region: Region, values: AnyArray) -> int:
        """Write a region made of whole chunks, cast to the map's dtype, and note the checksums.

        Returns the number of bytes written.
        """
        nbytes = 0
        for chunk, parts in self.encode(region, values):
            if self.shards is None:
                self.objects.put(self.key(chunk), parts)
            else:
                self.shards.append(chunk, parts)
            nbytes += sum(map(len, parts))
            if self.checksums is not None:
                self.checksums[chunk.iy, chunk.ix] = checksum_of(parts)
        return nbytes

    def encode(self, region: Region, values: MergedMap) -> Iterator[tuple[Tile, list[bytes]]]:
        """Encode as in :meth:`write`; yield each chunk and the parts of its object."""
        if not self.grid.is_aligned(region):
            raise ValueError(
                f"{self.place}: region {region} is not made of whole chunks of {self.grid.cell}"
            )
        if isinstance(values, EncodedChunks):
            for chunk, frame in zip(self.grid.touching(region), values.frames, strict=True):
                yield chunk, encoded_parts(frame, self.dtype, self.codec)
            return
        if isinstance(values, BitPlanes):
            if region.shape == self.grid.cell:
                (only,) = self.grid.touching(region)
                yield only, encode_planes(values, self.dtype, self.codec)
                return
            values = values.values(self.dtype).reshape(region.shape)
        for chunk in self.grid.touching(region):
            source = values[chunk.region.relative_to(region).slices]
            if (
                source.shape != self.grid.cell
                or not source.flags.c_contiguous
                or source.dtype != self.dtype
            ):
                whole = _of_thread.chunk(self.grid.cell, self.dtype)
                if source.shape != self.grid.cell:
                    whole.fill(self.fill)
                whole[: source.shape[0], : source.shape[1]] = source
                source = whole
            yield chunk, encode(source, self.codec)

    def encode_blank(self) -> list[bytes]:
        """Encode a chunk of fill values; return the parts of its object."""
        return encode(np.full(self.grid.cell, self.fill, self.dtype), self.codec)

    def blank(self) -> BloscChunk:
        """Return a chunk of fill values."""
        encoded = bytearray().join(self.encode_blank())
        return BloscChunk(memoryview(encoded), math.prod(self.grid.cell) * self.dtype.itemsize)


def write_chunk(objects: Objects, key: str, values: AnyArray) -> None:
    """Write C-contiguous values as one chunk."""
    objects.put(key, encode_chunk(values))


def encode_chunk(values: AnyArray) -> list[bytes]:
    """Encode C-contiguous values as one chunk; return the parts of its object."""
    return encode(values, _BLOSC)


def split_chunk(values: AnyArray, name: str) -> BloscChunk:
    """Encode few values of a map as one chunk, in streams that compiled kernels decode."""
    shuffle = BYTE_SHUFFLE if shuffle_of(name) == "shuffle" else BIT_SHUFFLE
    encoded = bytearray().join(encode(values, Codec("lz4", 5, shuffle, values.nbytes)))
    return BloscChunk(memoryview(encoded), values.nbytes)


def decode_chunk(
    encoded: bytes, nbytes: int, memory: ReusedMemory, place: Callable[[], str]
) -> memoryview:
    """Decode a chunk of ``nbytes`` decoded bytes into memory, allocated only if it is intact.

    ``place`` returns its name for errors.
    """
    try:
        frame = BloscChunk(memoryview(encoded), nbytes)
        decoded = memory.of(nbytes)
        frame.decode(np.frombuffer(decoded, np.uint8))
        return decoded
    except ValueError as error:
        raise CorruptChunkError(f"{place()}: is corrupt: {error}; merge again") from error


def open_map(
    objects: Objects,
    path: str,
    place: str,
    dtypes: Iterable[str],
    expected: ArrayManifest | None = None,
    dimensions: tuple[str, ...] = DIMENSIONS,
) -> ChunkedMap:
    """Open a map or a column; ``FormatError`` lists what differs from the format or manifest."""
    encoded = array_metadata(objects, path, place)
    if expected is not None and metadata_digest(encoded) != expected.metadata:
        raise FormatError(
            f"{place}: its metadata are not those of the manifest: {objects.url}/{path}/zarr.json "
            "has changed since it was written; write or merge this again"
        )
    where = f"{objects.url}/{path}"
    about = parse_array(encoded, where, place, tuple(dtypes), dimensions, MAX_CHUNK_NBYTES)
    (height, width), (chunk_height, chunk_width) = ((*n, 1)[:2] for n in (about.shape, about.chunk))
    grid = TileGrid((height, width), (chunk_height, chunk_width))
    if expected is not None and expected.checksums.shape != grid.counts:
        counts = expected.checksums.shape
        raise FormatError(
            f"{place}: expected {counts} chunks as in the manifest, got {grid.counts}"
        )
    settings = about.codecs[1]["configuration"]
    shuffles = {"noshuffle": NO_SHUFFLE, "shuffle": BYTE_SHUFFLE}
    shuffle = shuffles.get(settings["shuffle"], BIT_SHUFFLE)
    shards = None
    # While a result is written, objects of single chunks take precedence over its shards.
    if about.per_shard is not None and (expected is not None or not about.is_of_result):
        cells = about.per_shard[0], about.per_shard[1]
        separator = "." if about.is_of_result else "/"
        shards = Shards(objects, path, grid.counts, cells, separator)
    return ChunkedMap(
        objects=objects,
        path=path,
        place=place,
        grid=grid,
        dtype=about.data_type,
        fill=about.fill_value,
        codec=Codec(settings["cname"], settings["clevel"], shuffle, settings["blocksize"]),
        checksums=None if expected is None else expected.checksums,
        is_column=len(dimensions) == 1,
        shards=shards,
    )


def array_metadata(objects: Objects, path: str, place: str) -> bytes:
    """Read the metadata of an array; ``FormatError`` if it is missing."""
    encoded = objects.get(join(path, "zarr.json"), MAX_METADATA_NBYTES)
    if encoded is None:
        raise FormatError(f"{place}: the array is missing: expected {objects.url}/{path}/zarr.json")
    return encoded
