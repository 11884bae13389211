"""Making the plan of a merge from its input stores."""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from os import PathLike

from ocelot_em.errors import IncompleteError, InvalidInputError, PlanError
from ocelot_em.merge.grouping import Opened, Roots, regrouped
from ocelot_em.merge.memory_model import ON_CPU, DeviceChoice, choose_tile, storage_shape
from ocelot_em.merge.plan import MergePlan, PlannedExposure, searched_together
from ocelot_em.model.arrays import MAX_COUNT
from ocelot_em.model.correlation_histogram import added
from ocelot_em.model.maps import MapSet, PoseForm
from ocelot_em.model.options import MergeOptions
from ocelot_em.model.regions import GroupBy, TileGrid
from ocelot_em.model.text import exposure_prefix, partial_text
from ocelot_em.store import attributes as fmt
from ocelot_em.store import constants
from ocelot_em.store.contract import at_once
from ocelot_em.store.distinct import overlaps
from ocelot_em.store.objects import Stores, normalise_url, open_objects
from ocelot_em.store.progress import overlap_problems, progress_of
from ocelot_em.store.sources import Source, names_of_partials, open_sources

log = logging.getLogger(__name__)

MAX_SOURCES = 2**15 - 1
"""Maximum number of sources of an exposure; winners are int16 while a tile is merged."""


def make_plan(
    inputs: Sequence[str | PathLike[str]],
    output: str | PathLike[str],
    options: MergeOptions,
    device: DeviceChoice = ON_CPU,
    stores: Stores = open_objects,
) -> MergePlan:
    """Plan the merge of some inputs from their metadata; every difference of them is named."""
    urls = [normalise_url(path) for path in inputs]
    if not urls:
        raise InvalidInputError("merge: expected at least one input store, got none")
    so_far, group_by = options.takes_incomplete, options.group_by
    opened = opened_inputs(urls, output, options, stores)
    roots, by_store = [root for root, _ in opened], [exposures for _, exposures in opened]
    first, digests = roots[0], dict[str, fmt.Digest | None]()
    problems = _input_differences(urls, roots, group_by)
    if group_by and options.overlap == "farthest-from-edge":
        problems.append(
            f"overlap: expected no rule together with --group-by, with which the highest z-score "
            f"wins, got {options.overlap}"
        )
    if group_by and not problems:
        by_store, digests, problems = regrouped(urls, roots, by_store, group_by)
    if problems:
        raise InvalidInputError(problems)
    joined, problems = _joined(by_store)
    placed, canvas_origin, shape, found = _placed(joined, options, digests)
    problems += found
    sources = [source for exposure in placed for source in exposure.sources]
    problems += _duplicates(sources)
    for exposure in placed:
        problems += _searched_twice(exposure, is_indexed=first.pose_form is PoseForm.INDEXED)
    problems += [
        f"inputs: expected at most {MAX_SOURCES:,} partials at a time, got "
        f"{len(exposure.sources):,}; merge some of them first, then the results"
        for exposure in placed
        if len(exposure.sources) > MAX_SOURCES
    ]
    if (total := sum(source.total_projections for source in sources)) > MAX_COUNT:
        problems.append(f"inputs: expected at most 2**62 projections in total, got {total}")
    if problems:
        raise InvalidInputError(problems)
    if not so_far:
        _refuse_incomplete(placed, group_by)
    has_parts = first.shape is None or group_by is not None
    maps = MapSet(
        first.pose_form,
        first.has_pixel_size,
        counts=options.nan == "mask" or any(source.has_counts for source in sources),
        decoded=options.poses == "decoded" or first.pose_form is PoseForm.EXPLICIT,
        exposures=has_parts,
        derived=options.derived == "stored",
        groups=group_by is not None,
    )
    storage = storage_shape(placed, output, stores)
    plan = MergePlan(
        exposures=placed,
        shape=shape,
        valid_shape=placed[0].valid_shape if group_by else first.valid_shape or shape,
        pixel_size_angstrom=first.pixel_size_angstrom,
        pose_form=maps.form,
        has_pixel_size=maps.pixel_size,
        has_counts=maps.counts,
        search_space_digest=first.search_space_digest,
        tile=choose_tile(shape, storage, maps, options, device.memory_nbytes),
        nan=options.nan,
        has_decoded_poses=maps.decoded,
        has_derived_maps=maps.derived,
        canvas_origin=canvas_origin,
        overlap="max-zscore" if group_by else options.overlap if has_parts else "earliest",
        erode_px=options.erode,
        looks_wrapped=any(root.looks_wrapped for root in roots),
        group_by=group_by,
        template_name=first.template_name if len({r.template_name for r in roots}) == 1 else None,
    )
    added((own.name, own.correlation_histogram) for own in plan.contributions)
    if (n := len(TileGrid(plan.shape, plan.chunk))) > constants.MAX_TILES:
        raise PlanError(
            f"tile size: expected at most {constants.MAX_TILES:,} chunks of a map, got {n:,} for "
            f"{shape[0]} x {shape[1]} pixels; use larger tiles"
        )
    return plan


def _input_differences(urls: Sequence[str], roots: Roots, group_by: GroupBy | None) -> list[str]:
    """Name properties in which the inputs differ; groups may have search spaces of their own."""
    own = ("shape", "valid_shape", "search_space_digest") if group_by else ()
    fields = [field for field in fmt.SHARED_BY_PARTIALS if field not in own]
    problems = [
        f"{url}: {field}: expected {wanted} as in {urls[0]}, got {got}"
        for url, root in zip(urls, roots, strict=True)
        for field, wanted, got in fmt.differences(roots[0], root, fields)
    ]
    templates = {root.template_name: url for url, root in zip(urls, roots, strict=True)}
    templates.pop(None, None)
    if len(templates) > 1 and group_by is None:
        found = ", ".join(f"{name!r} in {url}" for name, url in templates.items())
        problems.append(
            f"inputs: expected searches of one template, got {found}; use --group-by template to "
            "compute the z-score of each template separately"
        )
    return problems


def opened_inputs(
    urls: Sequence[str], output: str | PathLike[str], options: MergeOptions, stores: Stores
) -> list[tuple[fmt.SearchAttributes | fmt.MergedAttributes, Opened]]:
    """Read the metadata of all inputs, while the place of the output is checked."""

    def refuse() -> None:
        problems = [f"{url}: given more than once" for url, n in Counter(urls).items() if n > 1]
        problems += overlaps(output, urls)
        if options.without:
            names = set[str]().union(*(names_of_partials(stores(url)) for url in urls))
            problems += [
                f"without: no input has a partial {name!r}" for name in {*options.without} - names
            ]
        if problems:
            raise InvalidInputError(problems)

    found: dict[str, tuple[fmt.SearchAttributes | fmt.MergedAttributes, Opened]] = {}

    def read(url: str) -> None:
        found[url] = open_sources(
            stores(url),
            options.without,
            so_far=options.takes_incomplete,
            complete_only=options.complete_only,
        )

    # All at once if any is in a bucket.
    slowest = next((one for one in map(stores, urls) if one.requests), stores(urls[0]))
    actions: list[Callable[[], None]] = [refuse, *(partial(read, url) for url in urls)]
    at_once(slowest, actions)
    return [found[url] for url in urls]


def _joined(stores: Sequence[Opened]) -> tuple[Opened, list[str]]:
    """Combine the exposures of several stores; those with the same id are merged into one."""
    joined: dict[str, tuple[fmt.ExposureAttributes, list[Source]]] = {}
    problems, next_number = [], 0
    for exposures in stores:
        first_number = next_number
        for exposure, sources in exposures:
            if exposure.id not in joined:
                number = first_number + exposure.number
                own = exposure.model_copy(update={"number": number})
                joined[exposure.id] = own, list(sources)
                next_number = max(next_number, number + 1)
                continue
            found, known = joined[exposure.id]
            known += sources
            problems += [
                f"exposure {exposure.id!r}: {field}: {known[0].url} has {one}, {sources[0].url} "
                f"has {other}"
                for field, one, other in fmt.differences(found, exposure, fmt.SHARED_BY_EXPOSURE)
                if exposure.id
            ]
    return list(joined.values()), problems


def _placed(
    exposures: Opened, options: MergeOptions, digests: Mapping[str, fmt.Digest | None]
) -> tuple[tuple[PlannedExposure, ...], tuple[int, int], tuple[int, int], list[str]]:
    """Place exposures on a canvas; also return its origin and shape, and the problems found.

    ``digests`` are those of the search spaces of groups.
    """
    problems, placed, erode, rounded = [], [], options.erode, list[str]()
    is_montage = bool(exposures[0][0].id) and not options.group_by
    shared_digest = digests.get(exposures[0][0].id)
    for exposure, sources in exposures:
        y, x = exposure.origin
        if options.origins == "exact" and not (y.is_integer() and x.is_integer()):
            problems.append(
                f"exposure {exposure.id!r}: origin: expected whole pixels, got ({y}, {x}); maps "
                "are never interpolated; use --origins round to round origins to whole pixels"
            )
        elif (y, x) != (round(y), round(x)):
            rounded.append(f"{exposure.id} ({y}, {x}) to ({round(y)}, {round(x)})")
        height, width = exposure.valid_shape if is_montage or erode else exposure.shape
        digest = digests.get(exposure.id)
        edge = erode if min(height, width) > 2 * erode else 0
        if edge < erode:
            name = f"exposure {exposure.id!r}" if exposure.id else "inputs"
            problems.append(
                f"{name}: erode: expected less than half of the valid {height} x {width} pixels, "
                f"got {erode}"
            )
        placed.append(
            PlannedExposure(
                **exposure.model_dump(exclude={"origin", "total_projections"}),
                origin=(round(y), round(x)),
                taken=(edge, height - edge, edge, width - edge),
                search_space_digest=None if digest == shared_digest else digest,
                sources=_numbered(sources),
            )
        )
    if rounded:
        shown = ", ".join(rounded[:10]) + ", ..." * (len(rounded) > 10)
        log.warning("origins are rounded to whole pixels: %s", shown)
    corners = [exposure.on_canvas for exposure in placed]
    top, left = (min(0, *(getattr(c, key) for c in corners)) for key in ("y0", "x0"))
    shape = placed[0].shape
    if is_montage:
        shape = max(c.y1 for c in corners) - top, max(c.x1 for c in corners) - left
        placed = [
            e.model_copy(update={"origin": (e.origin[0] - top, e.origin[1] - left)}) for e in placed
        ]
        if not all(1 <= n < 2**31 for n in shape):
            problems.append(f"canvas: expected at most 2**31 - 1 rows and columns, got {shape}")
            shape = 1, 1
    return tuple(placed), (top, left), shape, problems


def _numbered(sources: Sequence[Source]) -> tuple[Source, ...]:
    firsts = accumulate((len(source.contributions) for source in sources), initial=0)
    numbered = zip(sources, firsts, strict=False)
    return tuple(source.model_copy(update={"first_number": first}) for source, first in numbered)


_PLACES_SHOWN = 5
"""Maximum number of places of one partial in an error."""


def _duplicates(sources: Sequence[Source]) -> list[str]:
    origins: dict[str, list[str]] = {}
    for source in sources:
        for contribution in source.contributions:
            inside = "" if source.path else f" (which contains {contribution.name!r})"
            origins.setdefault(contribution.id, []).append(source.place + inside)
    return [
        f"the same partial is given {len(found)} times, and would be counted each time: "
        + "; ".join(found[:_PLACES_SHOWN])
        + f"; and {len(found) - _PLACES_SHOWN:,} more" * (len(found) > _PLACES_SHOWN)
        for found in origins.values()
        if len(found) > 1
    ]


def _searched_twice(exposure: PlannedExposure, *, is_indexed: bool) -> list[str]:
    """Name partials that have the same orientations.

    Orientations are known by their numbers in a search space, or in a store without one.
    """
    by_store: dict[str, list[tuple[str, fmt.Coverage | None]]] = {}
    for source in exposure.sources:
        for contribution in source.contributions:
            place = f"{source.url}: partial {partial_text(exposure.id, contribution.name)!r}"
            numbered_by = "" if is_indexed else source.url
            by_store.setdefault(numbered_by, []).append((place, contribution.coverage))
    return [problem for found in by_store.values() for problem in overlap_problems(found)]


def _refuse_incomplete(exposures: Sequence[PlannedExposure], group_by: GroupBy | None) -> None:
    """Raise ``IncompleteError`` unless all orientations of each exposure were searched.

    That is known where partials state their orientations, and it does not matter then whether the
    writer of one died before it completed it.
    """
    problems = []
    for own in searched_together(exposures, group_by):
        sources = [source for exposure in own for source in exposure.sources]
        found = progress_of(c.coverage for source in sources for c in source.contributions)
        prefix = "" if group_by else exposure_prefix(own[0].id)
        place = f"{sources[0].url}: {prefix}"
        running = [s.name for s in sources if s.manifest_folder] if found is None else []
        if running:
            problems.append(f"{place}{', '.join(running)}: still recorded by a search")
        elif found is not None and not found.is_whole:
            problems.append(f"{place}{found.text}")
    if problems:
        raise IncompleteError(
            f"{'; '.join(problems)}: the search is incomplete; run it again, which searches only "
            "what is missing, or merge what there is (--so-far)"
        )
