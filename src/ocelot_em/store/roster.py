"""The list of an exposure's partials, which does not depend on listing the storage.

A folder that was lost, or that the listing of a bucket does not show yet, would otherwise leave a
partial out without a word. Every writer adds its partial as the next group ``roster/N``, created
only if it is new, before it writes anything else; readers fetch them by number.
"""

from collections.abc import Collection, Mapping, Sequence
from itertools import count

from ocelot_em.errors import FormatError
from ocelot_em.model.threads import map_in_threads
from ocelot_em.store import groups
from ocelot_em.store.attributes import (
    Attributes,
    PartialAttributes,
    PartialName,
    dump_attributes,
    parse_attributes,
)
from ocelot_em.store.constants import ROSTER
from ocelot_em.store.contract import Objects, join
from ocelot_em.store.search import exposure_path, partials_path

READ_TOGETHER = 16
"""Number of entries fetched at a time; the list ends at the first that does not exist."""


class Entry(Attributes):
    """One partial of the list.

    Parameters
    ----------
    name
        Name of the partial.
    has_manifest
        Whether it must have a manifest once it is complete; versions 1 and 2 wrote none.
    """

    name: PartialName
    has_manifest: bool


def read_roster(objects: Objects, exposure: str = "") -> dict[str, Entry]:
    """Read the list of the partials of an exposure, by name.

    Raises
    ------
    FormatError
        An entry is damaged.
    """

    def read(number: int) -> Entry | None:
        path = _path(exposure, number)
        attributes = groups.group_attributes(objects, path)
        if attributes is None:
            return None
        return parse_attributes(Entry, attributes, f"{objects.url}/{path}")

    found: dict[str, Entry] = {}
    for start in count(0, READ_TOGETHER):
        for entry in map_in_threads(read, range(start, start + READ_TOGETHER)):
            if entry is None:
                return found
            found[entry.name] = entry
    raise AssertionError("unreachable")


def register(objects: Objects, exposure: str, name: str, *, has_manifest: bool = True) -> None:
    """Add a partial to the list, unless it is there."""
    entry = Entry(name=name, has_manifest=has_manifest)
    if read_roster(objects, exposure).get(name) == entry:
        return
    groups.create_group(objects, _path(exposure), {})
    number = 0
    while not groups.create_group(objects, _path(exposure, number), dump_attributes(entry)):
        number += 1


def roster_problems(
    objects: Objects,
    exposure: str,
    found: Mapping[str, PartialAttributes | None],
    without: Collection[str] = (),
) -> list[str]:
    """Compare the partials of an exposure with the list.

    Parameters
    ----------
    found
        The partials that are there; None for those whose attributes are damaged.
    without
        Partials that do not matter.

    Returns
    -------
    list of str
        One sentence for each partial that is missing, not on the list, or without its manifest.
    """
    roster = read_roster(objects, exposure)
    place = f"{objects.url}/{partials_path(exposure)}"
    problems = [
        f"{place}: partial {name!r} is missing, which the search has; restore its folder, or write "
        "it again under this name, or leave it out (--without NAME)"
        for name in roster.keys() - found.keys() - {*without}
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


def check_roster(
    objects: Objects,
    exposure: str,
    partials: Sequence[tuple[str, PartialAttributes]],
    without: Collection[str] = (),
) -> None:
    """Raise unless the partials of an exposure are those on the list, but for some.

    Raises
    ------
    FormatError
    """
    if problems := roster_problems(objects, exposure, dict(partials), without):
        raise FormatError("; ".join(problems[:20]))


def _path(exposure: str, number: int | None = None) -> str:
    return join(exposure_path(exposure), ROSTER, "" if number is None else str(number))
