"""Upgrade of stores of versions 1 and 2 to the present version, in place."""

from collections.abc import Iterable
from functools import partial
from os import PathLike

from ocelot_em.errors import IncompleteError
from ocelot_em.model.regions import Tile
from ocelot_em.model.threads import map_in_threads
from ocelot_em.store import attributes as fmt
from ocelot_em.store import constants, groups
from ocelot_em.store.arrays import ChunkedMap
from ocelot_em.store.completion import restore
from ocelot_em.store.contract import Objects, ReusedMemory
from ocelot_em.store.creation import adopt_earlier_version
from ocelot_em.store.manifest import (
    ArrayManifest,
    Manifest,
    create_manifest,
    metadata_digest,
    new_checksums,
    write_manifest,
)
from ocelot_em.store.objects import open_objects
from ocelot_em.store.roster import register
from ocelot_em.store.search import (
    MapGroup,
    open_partial,
    read_attributes,
    read_exposures,
    read_partials,
)


def upgrade(path: str | PathLike[str]) -> int:
    """Give a search or a complete result manifests; return the number of those that had none.

    Everything is read, and taken to be right: from now on, any change is noticed.
    """
    objects = open_objects(path)
    attributes = read_attributes(objects)
    if isinstance(attributes, fmt.MergedAttributes):
        return _upgrade_result(objects, attributes)
    adopt_earlier_version(objects)
    n_upgraded = 0
    for exposure in read_exposures(objects, attributes):
        for name, found in read_partials(objects, exposure.id):
            if found.state != "complete" or found.manifest is not None:
                continue
            group = open_partial(objects, name, exposure.id, found)
            arrays = _arrays(group, found.maps(attributes.maps).partial)
            content = found.model_dump(mode="json", exclude={"manifest"})
            manifest = Manifest(found.id, arrays, content)
            create_manifest(objects, group.path, manifest)
            restore(objects, group.path, manifest)
            register(objects, exposure.id, [name])
            n_upgraded += 1
    return n_upgraded


def _upgrade_result(objects: Objects, attributes: fmt.MergedAttributes) -> int:
    if attributes.manifest is not None:
        return 0
    if attributes.state != "complete":
        raise IncompleteError(
            f"{objects.url}: this merge was never finished; run the command that made it again, "
            "which also upgrades it"
        )
    arrays = _arrays(MapGroup(objects), attributes.maps.merged)
    changes = {
        "format_version": constants.FORMAT_VERSION,
        "manifest": write_manifest(objects, "", Manifest(attributes.id, arrays)),
    }
    upgraded = attributes.model_copy(update=changes)
    groups.replace_attributes(objects, "", fmt.dump_attributes(upgraded))
    return 1


def _arrays(group: MapGroup, names: Iterable[str]) -> dict[str, ArrayManifest]:
    """Read all chunks of some maps, and return what a manifest states of them."""
    found = {}
    for name, chunked in group.open(tuple(names)).items():
        checksums = new_checksums(chunked.grid)
        reads = map_in_threads(partial(_checksum, chunked), chunked.grid)
        for chunk, checksum in zip(chunked.grid, reads, strict=True):
            checksums[chunk.iy, chunk.ix] = checksum
        metadata = group.objects.get(f"{chunked.path}/zarr.json") or b""
        found[name] = ArrayManifest(metadata_digest(metadata), checksums)
    return found


def _checksum(chunked: ChunkedMap, chunk: Tile) -> int:
    return chunked.fetch(chunk, ReusedMemory()).checksum
