"""Zarr arrays and groups of searches and merged results.

Metadata is created by zarr and parsed by :mod:`ocelot_em.store.metadata`. Chunks are read and
written here, directly into and from the caller's memory: zarr returns fill values for missing
chunks, cannot decode into given memory, and sends all threads through one event loop. The result is
plain Zarr v3 that any reader opens.
"""

import math
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import numpy as np
import zarr
from numcodecs.blosc import Blosc
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec
from zarr.core.buffer import Buffer
from zarr.storage import MemoryStore

from ocelot_em.errors import CorruptChunkError, FormatError, MissingChunkError
from ocelot_em.model.maps import MAPS, AnyArray
from ocelot_em.model.regions import Region, Tile, TileGrid, ceil_div
from ocelot_em.store.blosc import BloscChunk, encode, max_encoded_nbytes
from ocelot_em.store.constants import (
    DIMENSIONS,
    MAX_CHUNK_NBYTES,
    MAX_METADATA_NBYTES,
    fill_value,
    map_attributes,
    shuffle_of,
)
from ocelot_em.store.contract import Objects, ReusedMemory
from ocelot_em.store.groups import join
from ocelot_em.store.manifest import (
    ArrayManifest,
    Checksums,
    checksum_of,
    metadata_digest,
)
from ocelot_em.store.metadata import BloscSettings, parse_array

_BLOSC = Blosc(cname="lz4", clevel=5, shuffle=Blosc.SHUFFLE)

TABLE_DTYPES = ("float32", "float64", "int64", "uint32")
"""Stored dtypes of arrays that are not maps."""

_of_thread = threading.local()


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
    create_array(objects, path, layout)
    key = "/".join([path, "c", *("0" for _ in values.shape)])
    write_chunk(objects, key, np.ascontiguousarray(values))


def read_table(objects: Objects, path: str, *, max_nbytes: int = 2**31) -> AnyArray:
    """Read a whole small array.

    Raises
    ------
    FormatError
        It is missing, too large, or cannot be decoded.
    """
    place = f"{objects.url}/{path}"
    encoded = _metadata(objects, path, place)
    about = parse_array(encoded, place, place, TABLE_DTYPES, None, max_nbytes)
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
                values = whole = np.empty(about.shape, about.data_type)
                if about.chunk != about.shape:
                    whole = np.empty(about.chunk, about.data_type)
            frame.decode(whole)
        except ValueError as error:
            raise FormatError(f"{place}: chunk {key} is corrupt: {error}") from error
        if whole is not values:
            cells = zip(index, about.chunk, strict=True)
            target = values[tuple(slice(i * n, (i + 1) * n) for i, n in cells)]
            target[...] = whole[tuple(map(slice, target.shape))]
    return values


def create_map(
    objects: Objects,
    path: str,
    name: str,
    shape: tuple[int, int],
    chunk: tuple[int, int],
    dtype: str | None = None,
) -> str:
    """Create the array of a map, by default with its first allowed dtype, without chunks.

    Returns
    -------
    str
        Digest of its metadata for the manifest.
    """
    layout = ArrayLayout(
        shape,
        chunk,
        dtype or MAPS[name].dtypes[0],
        fill_value(name),
        DIMENSIONS,
        map_attributes(name),
        shuffle_of(name),
    )
    return create_array(objects, path, layout)


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


def create_array(objects: Objects, path: str, layout: ArrayLayout) -> str:
    """Write the metadata of an array with this package's codecs; existing chunks are kept.

    This is one atomic, repeatable write; zarr would also create parent groups and reject existing
    arrays.

    Returns
    -------
    str
        Digest of the metadata for the manifest.
    """
    metadata: dict[str, Buffer] = {}
    blosc = BloscCodec(
        typesize=np.dtype(layout.dtype).itemsize,
        cname="lz4",
        clevel=5,
        shuffle=layout.shuffle,
        blocksize=0,
    )
    zarr.create_array(
        MemoryStore(metadata),
        shape=layout.shape,
        chunks=layout.chunk,
        dtype=layout.dtype,
        filters=None,
        serializer=BytesCodec(endian="little"),
        compressors=[blosc, Crc32cCodec()],
        fill_value=layout.fill,
        dimension_names=layout.dimensions,
        attributes=layout.attributes,
    )
    encoded = metadata["zarr.json"].to_bytes()
    objects.put(join(path, "zarr.json"), [encoded])
    return metadata_digest(encoded)


@dataclass(frozen=True)
class ChunkedMap:
    """A two-dimensional array of a store, opened for reading or writing chunks.

    Parameters
    ----------
    objects
        The store.
    path
        Path of the array within it.
    place
        Store, partial and map, for error messages.
    grid
        Shape and chunks of the array.
    dtype
        Dtype of the array.
    fill
        Value that pads chunks at the lower and right edges.
    codec
        Codec for writing chunks.
    checksums
        Checksums of the chunks from the manifest; None without one, as while they are written.
    """

    objects: Objects
    path: str
    place: str
    grid: TileGrid
    dtype: "np.dtype[Any]"
    fill: float | int
    codec: Blosc
    checksums: Checksums | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.grid.shape

    @property
    def _row_nbytes(self) -> int:
        """Decoded bytes of one row of a chunk."""
        return self.grid.cell[1] * self.dtype.itemsize

    def key(self, chunk: Tile) -> str:
        """Key of the object that holds a chunk."""
        return f"{self.path}/c/{chunk.iy}/{chunk.ix}"

    def read(self, region: Region, out: AnyArray | None = None) -> tuple[AnyArray, int]:
        """Decode the chunks that touch a region.

        Parameters
        ----------
        region
            Pixels within the map.
        out
            C-contiguous output array, with the region's shape and the map's dtype.

        Returns
        -------
        values : array
            ``out``, or a new array.
        nbytes : int
            Number of encoded bytes read.

        Raises
        ------
        MissingChunkError, CorruptChunkError
            Naming store, partial, map and chunk.
        """
        if out is None:
            out = np.empty(region.shape, self.dtype)
        nbytes = 0
        for chunk in self.grid.touching(region):
            frame = self.fetch(chunk, _memory_of_thread())
            nbytes += frame.encoded_nbytes
            self.decode(frame, chunk, region, out)
        return out, nbytes

    def fetch(self, chunk: Tile, memory: ReusedMemory) -> BloscChunk:
        """Read a chunk and check it, without decoding it.

        Parameters
        ----------
        chunk
            Cell of :attr:`grid`.
        memory
            Memory for the chunk, which is valid until the memory is used again.

        Raises
        ------
        MissingChunkError, CorruptChunkError
            Naming store, partial, map and chunk.
        """
        nbytes = self.grid.cell[0] * self.grid.cell[1] * self.dtype.itemsize
        encoded = self.objects.get_into(self.key(chunk), memory, max_encoded_nbytes(nbytes))
        if encoded is None:
            raise MissingChunkError(
                f"{self.place}: chunk ({chunk.iy}, {chunk.ix}), pixels {chunk.region}, is "
                f"missing: expected an object {self.key(chunk)}; write the partial again"
            )
        try:
            fetched = BloscChunk(encoded, nbytes)
            if self.checksums is not None:
                fetched.check_place(self.checksums[chunk.iy, chunk.ix])
        except ValueError as error:
            raise self.corrupt(chunk, error) from error
        return fetched

    def decode(self, frame: BloscChunk, chunk: Tile, region: Region, out: AnyArray) -> None:
        """Decode the part of a chunk inside a region.

        Parameters
        ----------
        frame
            The chunk, from :meth:`fetch`.
        region
            Region of the map that overlaps the chunk.
        out
            Array with the region's shape and the map's dtype; only the chunk's pixels are written.

        Raises
        ------
        CorruptChunkError
            Naming store, partial, map and chunk.
        """
        wanted = chunk.region.intersect(region)
        target = out[wanted.relative_to(region).slices]
        fits = wanted.shape == self.grid.cell and target.flags.c_contiguous
        inside = wanted.relative_to(chunk.region)
        whole = target if fits else _scratch_array(self.grid.cell, self.dtype)
        try:
            if fits:
                frame.decode(whole)
            else:
                frame.decode_part(inside.y0 * self._row_nbytes, inside.y1 * self._row_nbytes, whole)
        except ValueError as error:
            raise self.corrupt(chunk, error) from error
        if not fits:
            target[...] = whole[inside.slices]

    def corrupt(self, chunk: Tile, complaint: ValueError) -> CorruptChunkError:
        """Return the error of a :class:`BloscChunk` with the location of the chunk."""
        return CorruptChunkError(
            f"{self.place}: chunk ({chunk.iy}, {chunk.ix}), pixels {chunk.region}, is corrupt: "
            f"{complaint} (object {self.key(chunk)}); write the partial again"
        )

    def write(self, region: Region, values: AnyArray) -> int:
        """Encode and write whole chunks.

        Parameters
        ----------
        region
            Region made of whole chunks; a chunk is never written in parts.
        values
            Array with the region's shape; cast to the map's dtype. The chunks' checksums are
            entered in :attr:`checksums`, if there are any.

        Returns
        -------
        int
            Number of encoded bytes written.
        """
        nbytes = 0
        for chunk, parts in self.encode(region, values):
            self.objects.put(self.key(chunk), parts)
            nbytes += sum(map(len, parts))
            if self.checksums is not None:
                self.checksums[chunk.iy, chunk.ix] = checksum_of(parts)
        return nbytes

    def encode(self, region: Region, values: AnyArray) -> Iterator[tuple[Tile, list[bytes]]]:
        """Encode as in :meth:`write`; yield each chunk and the parts of its object."""
        if not self.grid.is_aligned(region):
            raise ValueError(
                f"{self.place}: region {region} is not made of whole chunks of {self.grid.cell}"
            )
        for chunk in self.grid.touching(region):
            source = values[chunk.region.relative_to(region).slices]
            if (
                source.shape != self.grid.cell
                or not source.flags.c_contiguous
                or source.dtype != self.dtype
            ):
                whole = _scratch_array(self.grid.cell, self.dtype)
                if source.shape != self.grid.cell:
                    whole.fill(self.fill)
                whole[: source.shape[0], : source.shape[1]] = source
                source = whole
            yield chunk, encode(source, self.codec)

    def encode_blank(self) -> list[bytes]:
        """Encode a chunk of fill values; return the parts of its object."""
        return encode(np.full(self.grid.cell, self.fill, self.dtype), self.codec)


def write_chunk(objects: Objects, key: str, values: AnyArray) -> int:
    """Write C-contiguous values as one chunk; return the number of encoded bytes."""
    parts = encode_chunk(values)
    objects.put(key, parts)
    return sum(map(len, parts))


def encode_chunk(values: AnyArray) -> list[bytes]:
    """Encode C-contiguous values as one chunk; return the parts of its object."""
    return encode(values, _BLOSC)


def decode_chunk(encoded: bytes, nbytes: int, memory: ReusedMemory, place: str) -> memoryview:
    """Decode a chunk of the given decoded size.

    Returns
    -------
    memoryview
        The first ``nbytes`` bytes of ``memory``, valid until it is used again; memory is allocated
        only for a valid chunk.

    Raises
    ------
    CorruptChunkError
        Naming the place.
    """
    try:
        frame = BloscChunk(memoryview(encoded), nbytes)
        decoded = memory.of(nbytes)
        frame.decode(np.frombuffer(decoded, np.uint8))
        return decoded
    except ValueError as error:
        raise CorruptChunkError(f"{place}: is corrupt: {error}; merge again") from error


def open_map(
    objects: Objects,
    path: str,
    place: str,
    dtypes: Iterable[str],
    expected: ArrayManifest | None = None,
) -> ChunkedMap:
    """Open a two-dimensional array and check that it follows the format.

    Parameters
    ----------
    place
        Name of the array in error messages.
    dtypes
        Allowed stored dtypes.
    expected
        What the manifest states of the array, if there is one.

    Raises
    ------
    FormatError
        The array is missing, or is not the one of the manifest; or its dimensions, dtype, chunks,
        codecs or key encoding do not follow ``docs/format.md``. All problems are listed.
    """
    encoded = _metadata(objects, path, place)
    if expected is not None and metadata_digest(encoded) != expected.metadata:
        raise FormatError(
            f"{place}: its metadata are not those of the manifest: {objects.url}/{path}/zarr.json "
            "has changed since it was written; write or merge this again"
        )
    where = f"{objects.url}/{path}"
    about = parse_array(encoded, where, place, tuple(dtypes), DIMENSIONS, MAX_CHUNK_NBYTES)
    (height, width), (chunk_height, chunk_width) = about.shape, about.chunk
    return ChunkedMap(
        objects=objects,
        path=path,
        place=place,
        grid=TileGrid((height, width), (chunk_height, chunk_width)),
        dtype=about.data_type,
        fill=about.fill_value,
        codec=_codec(about.codecs[1]["configuration"]),
        checksums=None if expected is None else expected.checksums,
    )


def _metadata(objects: Objects, path: str, place: str) -> bytes:
    encoded = objects.get(join(path, "zarr.json"), MAX_METADATA_NBYTES)
    if encoded is None:
        raise FormatError(f"{place}: the array is missing: expected {objects.url}/{path}/zarr.json")
    return encoded


def _codec(settings: BloscSettings) -> Blosc:
    """Return the codec that an array's metadata names."""
    shuffles = {"noshuffle": Blosc.NOSHUFFLE, "shuffle": Blosc.SHUFFLE}
    shuffle = shuffles.get(settings["shuffle"], Blosc.BITSHUFFLE)
    return Blosc(settings["cname"], settings["clevel"], shuffle, settings["blocksize"])


def _scratch_array(shape: tuple[int, int], dtype: "np.dtype[Any]") -> AnyArray:
    """Return this thread's chunk buffer; valid until the thread's next call."""
    if not hasattr(_of_thread, "scratch"):
        _of_thread.scratch = ReusedMemory()
    nbytes = shape[0] * shape[1] * dtype.itemsize
    return np.frombuffer(_of_thread.scratch.of(nbytes), dtype).reshape(shape)


def _memory_of_thread() -> ReusedMemory:
    if not hasattr(_of_thread, "memory"):
        _of_thread.memory = ReusedMemory()
    return cast(ReusedMemory, _of_thread.memory)
