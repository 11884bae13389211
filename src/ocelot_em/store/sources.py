"""Inputs of a merge: partials of a search, or an earlier merged result."""

from typing import Annotated

from pydantic import StringConstraints

from ocelot_em.errors import FormatError, IncompleteError
from ocelot_em.model.maps import BEST_PARTIAL, MapSet
from ocelot_em.model.text import exposure_prefix, partial_text
from ocelot_em.store import arrays as store
from ocelot_em.store import attributes as fmt
from ocelot_em.store import constants
from ocelot_em.store.contract import Objects
from ocelot_em.store.objects import open_objects
from ocelot_em.store.search import (
    open_partial_maps,
    partial_path,
    place_of,
    read_attributes,
    read_exposures,
    read_partials,
)

_NAME = r"[A-Za-z0-9][A-Za-z0-9._\-]{0,127}"


_GROUP = rf"^(({constants.EXPOSURES}/{_NAME}/)?{constants.PARTIALS}/{_NAME})?$"
"""Pattern of mergeable group paths: a partial, or the root of a merged result."""


class Source(fmt.Attributes):
    """One input of a merge: a partial of a search, or an earlier merged result.

    Parameters
    ----------
    url, path
        The store, and the path of its group (empty for a merged result).
    name
        Name of the partial, or of the merged store.
    id
        Id of this version of the data.
    total_projections
        Exact number of cross-correlations.
    first_number
        Number of its first contribution in the stated order of the merge.
    contributions
        Its partials: itself, or those of the earlier merge.
    has_counts
        Whether it has a map of counts.
    """

    url: str
    path: Annotated[str, StringConstraints(pattern=_GROUP)]
    name: str
    id: str
    total_projections: fmt.Count
    first_number: fmt.Number
    contributions: fmt.Several[fmt.Contribution]
    has_counts: bool

    @property
    def place(self) -> str:
        """Name of the source in error messages."""
        return place_of(self.url, self.path, self.name)

    def map_names(self, maps: MapSet) -> tuple[str, ...]:
        """Names of the source's maps that a merge with these maps needs."""
        names = MapSet(maps.form, maps.pixel_size, self.has_counts).partial
        return names if self.path else (*names, BEST_PARTIAL)


def open_one(source: Source, name: str) -> store.ChunkedMap:
    """Open one map of a source; all its maps have the same shape and chunks.

    Raises
    ------
    FormatError
        The map is missing or invalid.
    """
    objects = open_objects(source.url)
    return open_partial_maps(objects, source.path, source.name, (name,))[name]


def open_source_maps(
    source: Source, maps: MapSet, shape: tuple[int, int]
) -> dict[str, store.ChunkedMap]:
    """Open the maps of a source that a merge needs; they must have this shape.

    Raises
    ------
    FormatError
        As :func:`open_partial_maps`.
    """
    objects = open_objects(source.url)
    return open_partial_maps(objects, source.path, source.name, source.map_names(maps), shape)


def open_sources(
    objects: Objects,
) -> tuple[
    fmt.SearchAttributes | fmt.MergedAttributes, list[tuple[fmt.ExposureAttributes, list[Source]]]
]:
    """Read the sources of a store, in the stated order.

    Returns
    -------
    attributes
        Attributes of the store.
    exposures
        Attributes of each, by number, and its sources, numbered from 0; at least one of each.

    Raises
    ------
    StoreNotFoundError, FormatError
        It is not a store, or a merged montage, which cannot be merged again.
    IncompleteError
        The merged result is incomplete, or partials are missing or incomplete; all are listed.
    """
    attributes = read_attributes(objects)
    exposures = read_exposures(objects, attributes)
    if isinstance(attributes, fmt.MergedAttributes):
        if attributes.state != "complete":
            raise IncompleteError(
                f"{objects.url}: this merge was never finished; run the command that made it again"
            )
        if attributes.exposures:
            raise FormatError(
                f"{objects.url}: is a merged montage, in which exposures have lost the pixels that "
                "others won; merge their searches instead"
            )
        source = Source(
            url=objects.url,
            path="",
            name=objects.url.rpartition("/")[2],
            id=attributes.id,
            total_projections=attributes.total_projections,
            first_number=0,
            contributions=attributes.partials,
            has_counts=attributes.has_counts,
        )
        return attributes, [(exposures[0], [source])]
    opened, problems, n_partials = [], [], 0
    for exposure in exposures:
        partials = read_partials(objects, exposure.id)
        n_partials += len(partials)
        if not partials and exposure.id:
            problems.append(f"{exposure_prefix(exposure.id)}has no partials yet")
        problems += [partial_text(exposure.id, n) for n, p in partials if p.state != "complete"]
        opened.append(
            (
                exposure,
                [
                    _source(objects, exposure.id, name, partial, number)
                    for number, (name, partial) in enumerate(partials)
                ],
            )
        )
    if problems:
        what = "partials" if not attributes.has_exposures else "partials of exposures"
        raise IncompleteError(
            f"{objects.url}: {len(problems)} of {n_partials} {what} were never finished: "
            f"{', '.join(problems)}; their writer died or still runs: write them again, or "
            "delete their groups to leave them out"
        )
    if not n_partials:
        raise IncompleteError(f"{objects.url}: the search has no partials yet")
    return attributes, opened


def _source(
    objects: Objects, exposure: str, name: str, partial: fmt.PartialAttributes, number: int
) -> Source:
    count = partial.total_projections
    return Source(
        url=objects.url,
        path=partial_path(name, exposure),
        name=name,
        id=partial.id,
        total_projections=count,
        first_number=number,
        contributions=(fmt.Contribution(name=name, id=partial.id, total_projections=count),),
        has_counts=False,
    )
