"""Zarr groups: creation, and attributes under a seal.

A seal is a digest of a group's attributes and of its path. It shows that metadata are those that
were written there: a flipped bit or the metadata of another group would often be valid, too.
"""

import json
from typing import Any

from ocelot_em.errors import FormatError, InvalidInputError
from ocelot_em.store.constants import ATTRIBUTE_KEY, FIRST_SEALED_VERSION, MAX_METADATA_NBYTES
from ocelot_em.store.contract import Objects, join
from ocelot_em.store.manifest import SEAL, seal_of
from ocelot_em.store.metadata import parse_group


def create_group(objects: Objects, path: str, attributes: dict[str, Any]) -> bool:
    """Create a group atomically unless it exists; return whether it was created."""
    return objects.create(join(path, "zarr.json"), _group_metadata(path, attributes))


def group_attributes(objects: Objects, path: str) -> dict[str, Any] | None:
    """Attributes of a group, or None if it does not exist.

    Raises
    ------
    FormatError
        The metadata is not that of a Zarr v3 group, or has changed since it was written.
    """
    encoded = objects.get(join(path, "zarr.json"), MAX_METADATA_NBYTES)
    if encoded is None:
        return None
    where = join(objects.url, path)
    attributes = parse_group(encoded, where)
    own = attributes.get(ATTRIBUTE_KEY)
    if not isinstance(own, dict):
        return attributes
    version = own.get("format_version")
    is_sealed = SEAL in own or (type(version) is int and version >= FIRST_SEALED_VERSION)
    if is_sealed and own.get(SEAL) != seal_of(path, own):
        raise FormatError(
            f"{where}/zarr.json: the attributes do not match their seal: they have changed since "
            "they were written, or belong to another group; write or merge this again"
        )
    return {**attributes, ATTRIBUTE_KEY: {k: v for k, v in own.items() if k != SEAL}}


def replace_attributes(objects: Objects, path: str, attributes: dict[str, Any]) -> None:
    """Write a group with these attributes alone, atomically, whether or not it exists."""
    objects.put(join(path, "zarr.json"), [_group_metadata(path, attributes)])


def update_attributes(objects: Objects, path: str, attributes: dict[str, Any]) -> None:
    """Set attributes of an existing group, keeping the others; the replacement is atomic."""
    kept = group_attributes(objects, path) or {}
    objects.put(join(path, "zarr.json"), [_group_metadata(path, {**kept, **attributes})])


def _group_metadata(path: str, attributes: dict[str, Any]) -> bytes:
    if ATTRIBUTE_KEY in attributes:
        own = attributes[ATTRIBUTE_KEY]
        attributes = {**attributes, ATTRIBUTE_KEY: {**own, SEAL: seal_of(path, own)}}
    content = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    encoded = json.dumps(content, indent=2).encode()
    if len(encoded) > MAX_METADATA_NBYTES:
        raise InvalidInputError(
            f"metadata: expected at most {MAX_METADATA_NBYTES:,} bytes, which is all that is read, "
            f"got {len(encoded):,}; merge some of the inputs first, then the results"
        )
    return encoded
