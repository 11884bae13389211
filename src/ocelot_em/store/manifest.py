"""Checksums of everything that belongs to a partial or to a merged result, by place.

A chunk has a checksum of its own, which shows that its bytes are intact, but not that it is the
chunk that was written there: a copy of another tile, map or search is intact, too. A manifest lists
the checksums by map, row and column, and the group that it belongs to records the digest of the
manifest. Readers compare both while they read, at no cost: a chunk's checksum is computed anyway.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as validated_dataclass

from ocelot_em.errors import FormatError
from ocelot_em.model.regions import TileGrid
from ocelot_em.store.blosc import checksum
from ocelot_em.store.contract import Objects, at_once, join

MANIFEST: Final = "manifest"
"""Group in that of a partial or of a merged result; its array ``content`` holds bytes."""

SEAL: Final = "seal"
"""Attribute with the digest of a group's metadata and of its path."""

MAX_MANIFEST_NBYTES = 2**31
"""Size limit of a manifest, for maps of :data:`ocelot_em.store.constants.MAX_CHUNKS` chunks."""

Checksums = NDArray[np.uint32]
"""CRC32C of the chunks of a map by row and column, as stored at their ends."""


@validated_dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid"))
class _Array:
    """One array in the first line of a manifest: digest of its metadata, and its chunks."""

    metadata: str
    chunks: tuple[int, int]


@validated_dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid"))
class _Head:
    """The first line of a manifest."""

    id: str
    attributes: dict[str, Any]
    arrays: dict[str, _Array]


_HEAD = TypeAdapter(_Head)


@dataclass(frozen=True)
class ArrayManifest:
    """What a manifest states of one array.

    Parameters
    ----------
    metadata
        SHA-256 of its ``zarr.json``.
    checksums
        Checksums of its chunks.
    """

    metadata: str
    checksums: Checksums


@dataclass(frozen=True)
class Manifest:
    """The checksums of a partial or of a merged result.

    Parameters
    ----------
    id
        Id of the partial or result.
    arrays
        What belongs to it, by name of the map.
    attributes
        Attributes of a complete partial, from which its group can be restored.
    """

    id: str
    arrays: Mapping[str, ArrayManifest]
    attributes: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def encoded(self) -> bytes:
        """Bytes of the stored object: a line of JSON, then all checksums."""
        head = {
            "id": self.id,
            "attributes": dict(self.attributes),
            "arrays": {
                name: {"metadata": array.metadata, "chunks": array.checksums.shape}
                for name, array in self.arrays.items()
            },
        }
        parts = [json.dumps(head).encode(), b"\n"]
        parts += [array.checksums.astype("<u4").tobytes() for array in self.arrays.values()]
        return b"".join(parts)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the stored object."""
        return hashlib.sha256(self.encoded).hexdigest()


def new_checksums(grid: TileGrid) -> Checksums:
    """Return checksums of no chunk yet."""
    return np.zeros(grid.counts, np.uint32)


def write_manifest(objects: Objects, path: str, manifest: Manifest) -> str:
    """Write the manifest of a group; return its digest, which the group must record."""
    at_once(
        objects,
        [
            partial(describe_manifest, objects, path, manifest),
            partial(objects.put, manifest_key(path), [manifest.encoded]),
        ],
    )
    return manifest.digest


def create_manifest(objects: Objects, path: str, manifest: Manifest) -> bool:
    """Write the manifest of a group unless it has one; return whether it was written.

    :func:`describe_manifest` makes it readable for others.
    """
    return objects.create(manifest_key(path), manifest.encoded)


def describe_manifest(objects: Objects, path: str, manifest: Manifest) -> None:
    """Write the metadata of a manifest's group and array."""
    _write_metadata(objects, path, len(manifest.encoded))


def read_manifest(objects: Objects, path: str, owner: str, digest: str) -> Manifest:
    """Read the manifest of a group.

    Parameters
    ----------
    objects, path
        The group.
    owner, digest
        Id of the partial or result, and the recorded digest.

    Raises
    ------
    FormatError
        It is missing, is not the recorded one, or belongs to something else.
    """
    place = f"{objects.url}/{manifest_key(path)}"
    encoded = objects.get(manifest_key(path), MAX_MANIFEST_NBYTES)
    if encoded is None:
        raise FormatError(f"{place}: the manifest is missing; write or merge this again")
    if (found := hashlib.sha256(encoded).hexdigest()) != digest:
        raise FormatError(
            f"{place}: expected the manifest with the digest {digest[:12]}, got {found[:12]}: it "
            "was damaged, or belongs to other data; write or merge this again"
        )
    manifest = _decoded(encoded, place)
    if manifest.id != owner:
        raise FormatError(f"{place}: expected that of {owner[:12]}, got that of {manifest.id[:12]}")
    return manifest


def find_manifest(objects: Objects, path: str) -> Manifest | None:
    """Read the manifest of a group, whichever it is; None if there is none.

    Raises
    ------
    FormatError
    """
    encoded = objects.get(manifest_key(path), MAX_MANIFEST_NBYTES)
    return None if encoded is None else _decoded(encoded, f"{objects.url}/{manifest_key(path)}")


def _decoded(encoded: bytes, place: str) -> Manifest:
    line, _, content = encoded.partition(b"\n")
    try:
        head = _HEAD.validate_json(line)
    except ValidationError as error:
        raise FormatError(f"{place}: not a manifest: {error.error_count()} problems") from None
    arrays, offset = {}, 0
    for name, about in head.arrays.items():
        n = about.chunks[0] * about.chunks[1]
        if min(about.chunks) < 0 or offset + 4 * n > len(content):
            raise FormatError(f"{place}: expected checksums of {name} in {about.chunks} chunks")
        values = np.frombuffer(content, "<u4", n, offset).reshape(about.chunks)
        arrays[name] = ArrayManifest(about.metadata, values.astype(np.uint32))
        offset += 4 * n
    return Manifest(head.id, arrays, head.attributes)


def metadata_digest(encoded: bytes) -> str:
    """Return the digest of an array's ``zarr.json`` as a manifest states it."""
    return hashlib.sha256(encoded).hexdigest()


def seal_of(path: str, attributes: Mapping[str, Any]) -> str:
    """Return the seal of a group's attributes: a digest of their content and of its path."""
    content = {key: value for key, value in attributes.items() if key != SEAL}
    text = json.dumps([path, content], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def identity(owner: str, key: str) -> int:
    """Return the number in a record of a tile that binds it to its result and to its key."""
    return checksum(f"{owner} {key}".encode())


def checksum_of(parts: Sequence[bytes]) -> int:
    """Return the checksum of an encoded chunk, which is its last part."""
    return int.from_bytes(parts[-1], "little")


def manifest_key(path: str) -> str:
    """Return the key of a group's manifest: the only chunk of its array."""
    return join(path, MANIFEST, "content/c/0")


def _write_metadata(objects: Objects, path: str, nbytes: int) -> None:
    """Write the metadata of group and array, for other readers; this package needs none."""
    metadata = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [nbytes],
        "data_type": "uint8",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [nbytes]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0,
        "codecs": [{"name": "bytes"}],
        "dimension_names": ["byte"],
        "attributes": {},
    }
    group = {"zarr_format": 3, "node_type": "group", "attributes": {}}
    at_once(
        objects,
        [
            partial(objects.put, join(path, MANIFEST, name), [json.dumps(content).encode()])
            for content, name in ((group, "zarr.json"), (metadata, "content/zarr.json"))
        ],
    )
