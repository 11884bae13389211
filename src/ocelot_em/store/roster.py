"""The lists of partials and exposures of a search, which do not depend on listing the storage.

A folder that was lost, or that the listing of a bucket does not show yet, would otherwise leave a
partial or an exposure out unnoticed. Every writer adds its partial as the next group
``roster/N``, created only if it is new, before it writes anything else, and a new exposure as
``exposure_numbers/N``; readers fetch them by number.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import count
from typing import TypeVar

from ocelot_em.errors import FormatError
from ocelot_em.store import groups
from ocelot_em.store.attributes import (
    Attributes,
    ExposureAttributes,
    NumberAttributes,
    PartialAttributes,
    PartialName,
    dump_attributes,
    parse_attributes,
)
from ocelot_em.store.constants import EXPOSURE_NUMBERS, EXPOSURES, ROSTER
from ocelot_em.store.contract import Objects, join
from ocelot_em.store.search import exposure_path, partials_path

READ_TOGETHER = 16
"""Number of entries expected where it is unknown."""


class Entry(Attributes):
    """One partial of the list.

    Parameters
    ----------
    name
        Name of the partial.
    has_manifest
        Whether it must have a manifest once it is complete; versions 1 and 2 wrote none.
    is_recorded
        Whether it is recorded while its search runs.
    """

    name: PartialName
    has_manifest: bool
    is_recorded: bool = False


def read_roster(
    objects: Objects, exposure: str = "", n_expected: int = READ_TOGETHER
) -> dict[str, Entry]:
    """Read the list of the partials of an exposure, by name, of about this many.

    Raises
    ------
    FormatError
        An entry is damaged.
    """
    entries = _numbered(objects, _path(exposure), Entry, n_expected)
    return {entry.name: entry for entry in entries}


Item = TypeVar("Item", bound=Attributes)


def _numbered(
    objects: Objects, path: str, model: type[Item], n_expected: int = READ_TOGETHER
) -> Iterator[Item]:
    """Read the groups ``path/0``, ``path/1`` and so on, up to the first that does not exist."""
    end = n_expected + 1  # with the first that does not exist
    with objects.snapshot() as known:
        known.prefetch(_numbered_keys(path, 0, end))
        for number in count():
            own = f"{path}/{number}"
            if number == end:
                end = 2 * end + READ_TOGETHER
                known.prefetch(_numbered_keys(path, number, end))
            attributes = groups.group_attributes(known, own)
            if attributes is None:
                return
            yield parse_attributes(model, attributes, f"{objects.url}/{own}")


def _numbered_keys(path: str, start: int, stop: int) -> list[str]:
    return [f"{path}/{number}/zarr.json" for number in range(start, stop)]


def roster_keys(exposure: str, n_partials: int) -> list[str]:
    """Keys of a list of this many partials, and the one that ends it, to prefetch them."""
    return _numbered_keys(_path(exposure), 0, n_partials + 1)


def exposure_number_keys(n_exposures: int) -> list[str]:
    """Keys of a list of this many exposures, and the one that ends it, to prefetch them."""
    return _numbered_keys(EXPOSURE_NUMBERS, 0, n_exposures + 1)


def listed_exposures(objects: Objects, n_expected: int = READ_TOGETHER) -> list[str]:
    """Return the exposures that own the numbers 0, 1 and so on of a search."""
    claims = _numbered(objects, EXPOSURE_NUMBERS, NumberAttributes, n_expected)
    return [claim.exposure for claim in claims]


def exposure_problems(
    objects: Objects, exposures: Sequence[ExposureAttributes], without: Collection[str] = ()
) -> list[str]:
    """Compare the exposures of a search with its list, the groups that claim their numbers.

    Parameters
    ----------
    exposures
        The exposures that are there.
    without
        Exposures that do not matter.

    Returns
    -------
    list of str
        One sentence for each exposure that is missing or not on the list.
    """
    listed = listed_exposures(objects, len(exposures))
    place = f"{objects.url}/{EXPOSURES}"
    missing = {*listed} - {exposure.id for exposure in exposures} - {*without}
    return [
        f"{place}: exposure {name!r} is missing, which the search has; restore its folder, or "
        f"write its partials again, or leave it out (--without {name})"
        for name in sorted(missing)
    ] + [
        f"{place}: exposure {exposure.id!r} is not on the list of the search, "
        f"{EXPOSURE_NUMBERS}: the list was damaged, or the folder was put there by hand; restore "
        "the list, or write the search again"
        for exposure in exposures
        if exposure.number >= len(listed) or listed[exposure.number] != exposure.id
    ]


def register(
    objects: Objects,
    exposure: str,
    names: Collection[str],
    *,
    has_manifest: bool = True,
    is_recorded: bool = False,
) -> None:
    """Add partials to the list, unless they are there."""
    entries = list(_numbered(objects, _path(exposure), Entry))
    roster, number = {entry.name: entry for entry in entries}, len(entries)
    for name in names:
        entry = Entry(name=name, has_manifest=has_manifest, is_recorded=is_recorded)
        if roster.get(entry.name) != entry:
            groups.create_group(objects, _path(exposure), {})
            while not groups.create_group(objects, _path(exposure, number), dump_attributes(entry)):
                number += 1


def roster_problems(
    objects: Objects,
    exposure: str,
    found: Mapping[str, PartialAttributes | None],
    without: Collection[str] = (),
    *,
    all_created: bool = True,
) -> list[str]:
    """Compare the partials of an exposure with the list.

    Parameters
    ----------
    found
        The partials that are there; None for those whose attributes are damaged.
    without
        Partials that do not matter.
    all_created
        Whether partials on the list that are missing are a problem. They may just be created.

    Returns
    -------
    list of str
        One sentence for each partial that is missing, not on the list, or without its manifest.
    """
    roster = read_roster(objects, exposure, len(found))
    place = f"{objects.url}/{partials_path(exposure)}"
    problems = [
        f"{place}: partial {name!r} is missing, which the search has; restore its folder, or write "
        "it again under this name, or leave it out (--without NAME)"
        for name in roster.keys() - found.keys() - {*without}
        if all_created
    ]
    problems += [
        f"{place}: partial {name!r} is not on the list of the search: its folder was put there by "
        "hand, or the list was damaged; write it again under another name, or delete its folder"
        for name in found.keys() - roster.keys()
    ]
    problems += [
        f"{place}: partial {name!r}: expected the digest of a manifest, got none; delete its "
        "folder, and write it again"
        for name, partial in found.items()
        if partial is not None and partial.state == "complete" and partial.manifest is None
        if name in roster and roster[name].has_manifest
    ]
    return sorted(problems)


def check_exposures(
    objects: Objects, exposures: Sequence[ExposureAttributes], without: Collection[str] = ()
) -> None:
    """Raise ``FormatError`` unless the exposures of a search are those on its list."""
    if problems := exposure_problems(objects, exposures, without):
        raise FormatError("; ".join(problems[:20]))


def check_roster(
    objects: Objects,
    exposure: str,
    partials: Sequence[tuple[str, PartialAttributes]],
    without: Collection[str] = (),
    *,
    all_created: bool = True,
) -> None:
    """Raise unless the partials of an exposure are those on the list, but for some.

    Raises
    ------
    FormatError
    """
    found = dict(partials)
    if problems := roster_problems(objects, exposure, found, without, all_created=all_created):
        raise FormatError("; ".join(problems[:20]))


def _path(exposure: str, number: int | None = None) -> str:
    return join(exposure_path(exposure), ROSTER, "" if number is None else str(number))
