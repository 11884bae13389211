"""Groups of partials whose z-scores are computed separately: templates, sectors or exposures.

All groups cover the same pixels. Each is planned as an exposure at the origin of the canvas, and
the highest z-score wins a pixel.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import count

from ocelot_em.merge.plan import MergePlan
from ocelot_em.model.regions import GroupBy
from ocelot_em.store import attributes as fmt
from ocelot_em.store import constants
from ocelot_em.store.contract import Objects
from ocelot_em.store.creation import write_search_space
from ocelot_em.store.groups import create_group
from ocelot_em.store.objects import open_objects
from ocelot_em.store.search import read_search_space
from ocelot_em.store.sources import Source

Opened = list[tuple[fmt.ExposureAttributes, list[Source]]]
"""Exposures of a store, and their sources."""

Roots = Sequence[fmt.SearchAttributes | fmt.MergedAttributes]

_SAME_PIXELS = ("origin", "shape", "valid_shape")
"""Fields that all groups share."""


def regrouped(
    urls: Sequence[str], roots: Roots, opened: Sequence[Opened], group_by: GroupBy
) -> tuple[list[Opened], dict[str, fmt.Digest | None], list[str]]:
    """Return the partials of stores as exposures, one for each group.

    Also return the digest of the search space of each group by its name, and the problems found.
    """
    problems, groups = [], list[Opened]()
    for url, root, own in zip(urls, roots, opened, strict=True):
        has_exposures = root.shape is None
        if group_by == "exposure" and not has_exposures:
            problems.append(
                f"{url}: expected exposures to group by, got a search without exposures; use "
                "--group-by template or sector"
            )
        elif group_by != "exposure" and has_exposures:
            problems.append(
                f"{url}: expected a search without exposures, got one with {len(own)}; groups of a "
                "montage's exposures are not supported: write each exposure to a search of its "
                "own and merge it with its groups, or use --group-by exposure if all exposures "
                "cover the same pixels"
            )
    if problems:
        return [], {}, problems
    if group_by == "template":
        names = template_names(urls, roots)
        groups = [
            [(_group(own[0][0], name, 0), own[0][1])]
            for name, own in zip(names, opened, strict=True)
        ]
    elif group_by == "sector":
        times = Counter(source.name for own in opened for source in own[0][1])
        names = _ids(
            source.name if times[source.name] == 1 else f"{prefix}.{source.name}"
            for prefix, own in zip(_names_of_stores(urls), opened, strict=True)
            for source in own[0][1]
        )
        left = iter(names)
        groups = [
            [(_group(own[0][0], next(left), k), [source]) for k, source in enumerate(own[0][1])]
            for own in opened
        ]
    else:
        groups = [list(own) for own in opened]
    digests: dict[str, fmt.Digest | None] = {}
    first = groups[0][0][0]
    for url, root, own in zip(urls, roots, groups, strict=True):
        for exposure, _ in own:
            digest = root.search_space_digest
            if digests.setdefault(exposure.id, digest) != digest:
                problems.append(
                    f"{url}: search_space_digest: expected that of the other partials of group "
                    f"{exposure.id!r}, got another one; searches of different templates need "
                    "different names (ocelot import --template-name)"
                )
            problems += [
                f"{url}: group {exposure.id!r}: {field}: expected {wanted} as in group "
                f"{first.id!r}, got {got}; all groups must cover the same pixels: templates must "
                "be in boxes of one size, and exposures at different origins are merged as a "
                "montage, without --group-by"
                for field, wanted, got in fmt.differences(first, exposure, _SAME_PIXELS)
            ]
    placed = [
        [(exposure.model_copy(update={"origin": (0.0, 0.0)}), sources) for exposure, sources in own]
        for own in groups
    ]
    return placed, digests, problems


def template_names(urls: Sequence[str], roots: Roots) -> list[str]:
    """Return the name of each store's template, by default one of its own: that of the store."""
    given = {root.template_name for root in roots if root.template_name}
    unnamed = [url for url, root in zip(urls, roots, strict=True) if not root.template_name]
    own = iter(_ids(_names_of_stores(unnamed), given))
    return [root.template_name or next(own) for root in roots]


def write_own_spaces(objects: Objects, plan: MergePlan) -> None:
    """Write the tables of groups whose search space is not that of the first group."""
    if plan.own_digests:
        create_group(objects, constants.SEARCH_SPACES, {})
    for digest, source in plan.own_digests.items():
        space = read_search_space(open_objects(source.url), digest)
        assert space is not None
        write_search_space(objects, space, constants.own_tables(digest))


def _names_of_stores(urls: Sequence[str]) -> list[str]:
    """Return the names of stores, with those of folders as far as they are needed.

    Stores with the same name in different folders have the names of their folders.
    """
    parts = [url.rstrip("/").removesuffix(".zarr").split("/") for url in urls]
    if len(parts) > 1 and len({own[-1] for own in parts}) == 1:
        parts = [own[:-1] for own in parts]
    times = Counter(tuple(own[-n:]) for own in parts for n in range(1, len(own) + 1))
    names = list[str]()
    for own in parts:
        n = next((n for n in range(1, len(own)) if times[tuple(own[-n:])] == 1), len(own))
        names.append(".".join(own[-n:]))
    return names


def _ids(names: Iterable[str], taken: Iterable[str] = ()) -> list[str]:
    """Return different names of the characters of an id; numbers come after equal ones."""
    found, used = list[str](), {*taken}
    for name in names:
        stem = re.sub(r"[^A-Za-z0-9._-]", "-", name).lstrip("._-")[:120] or "group"
        numbered = (f"{stem}.{n}" for n in count(2))
        found.append(stem if stem not in used else next(n for n in numbered if n not in used))
        used.add(found[-1])
    return found


def _group(exposure: fmt.ExposureAttributes, name: str, number: int) -> fmt.ExposureAttributes:
    return exposure.model_copy(update={"id": name, "number": number, "acquired": 0})
