"""Complete partials whose arrays are written, also for writers that died just before."""

from collections.abc import Mapping
from contextlib import suppress

from ocelot_em.errors import FormatError
from ocelot_em.store import attributes as fmt
from ocelot_em.store import groups
from ocelot_em.store.arrays import ChunkedMap
from ocelot_em.store.contract import Objects
from ocelot_em.store.manifest import (
    MANIFEST,
    Manifest,
    create_manifest,
    describe_manifest,
    find_manifest,
)
from ocelot_em.store.search import (
    completed,
    partial_names,
    partial_path,
    read_partial_attributes,
)


def publish_shards(maps: Mapping[str, ChunkedMap]) -> None:
    """Make the shards of maps that are written visible."""
    for chunked in maps.values():
        if chunked.shards is not None:
            chunked.shards.publish()


def complete_partial(
    objects: Objects, path: str, record: fmt.PartialAttributes, manifest: Manifest
) -> Manifest:
    """Complete a partial whose arrays are written, unless another process already has.

    Of several processes, the first to create the manifest of the partial has completed it; that
    manifest is returned. What unfinished writers left is deleted.
    """
    objects.tidy(path)
    objects.sync()  # the data must be on the disk before the manifest
    complete = record.model_copy(update={"state": "complete", "manifest": None})
    mine = Manifest(record.id, manifest.arrays, complete.model_dump(mode="json"))
    winner = mine if create_manifest(objects, path, mine) else find_manifest(objects, path)
    assert winner is not None
    objects.sync()
    kept = restore(objects, path, winner).folder
    if winner.id == record.id:
        own = {MANIFEST, *([kept] if kept else {key.partition("/")[0] for key in winner.arrays})}
        for child in {*objects.children(path)} - own:
            objects.delete(f"{path}/{child}")
    return winner


def existing_partials(objects: Objects, exposure: str = "") -> dict[str, fmt.PartialAttributes]:
    """Attributes of a search's or exposure's partials by name; empty without any.

    What a killed writer has written but for its record is completed.
    """
    found = {}
    for name in partial_names(objects, exposure):
        found[name] = read_partial_attributes(objects, name, exposure)
        path = partial_path(name, exposure)
        if found[name].manifest and (written := find_manifest(objects, path)):
            found[name] = restore(objects, path, written)
    return found


def restore(objects: Objects, path: str, manifest: Manifest) -> fmt.PartialAttributes:
    """Complete a partial that has a manifest, unless it is; return its attributes."""
    complete = completed(manifest, f"{objects.url}/{path}")
    with suppress(FormatError):
        attributes = groups.group_attributes(objects, path)
        if fmt.parse_attributes(fmt.PartialAttributes, attributes, objects.url) == complete:
            return complete
    describe_manifest(objects, path, manifest)
    groups.replace_attributes(objects, path, fmt.dump_attributes(complete))
    return complete
