"""Create searches and exposures, or compare existing ones with what a new partial needs."""

import datetime
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from importlib.metadata import version
from typing import Any

import numpy as np

from ocelot_em.errors import FormatError, InvalidInputError
from ocelot_em.model.regions import TileGrid
from ocelot_em.model.search_space import TABLES, SearchSpace
from ocelot_em.store import attributes as fmt
from ocelot_em.store import constants, groups
from ocelot_em.store.contract import Objects, at_once
from ocelot_em.store.distinct import inside_store
from ocelot_em.store.roster import register
from ocelot_em.store.search import (
    exposure_path,
    partial_names,
    partials_path,
    read_attributes,
    read_exposure,
    read_exposures,
    read_partials,
)
from ocelot_em.store.search_info import SearchInfo
from ocelot_em.store.tables import write_table
from ocelot_em.store.validation import name_problems


def provenance(
    *, inputs: Sequence[str], options: Mapping[str, Any], input_sha256: str = ""
) -> fmt.Provenance:
    """Provenance of data created now, with the present package versions."""
    return fmt.Provenance(
        created=now(),
        versions={name: _version(name) for name in ("ocelot-em", "zarr", "numpy", "numcodecs")},
        inputs=tuple(inputs),
        input_sha256=input_sha256,
        options=dict(options),
    )


_version = cache(version)  # looks for the package's files


def now() -> str:
    """Return the current UTC time, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def ensure_search(objects: Objects, shape: tuple[int, int], info: SearchInfo) -> None:
    """Create the search and the exposure, or check that existing ones have the same properties.

    Raises
    ------
    InvalidInputError
        Listing every property that differs.
    """
    wanted = search_attributes(shape, info)
    if problems := layout_differences(objects, shape, info):
        raise InvalidInputError(problems)
    if groups.group_attributes(objects, "") is None and (problems := inside_store(objects.url)):
        raise InvalidInputError(problems)
    is_new = groups.create_group(objects, "", fmt.dump_attributes(wanted))
    # Another process may have just created it with other properties.
    if not is_new and (problems := _search_differences(objects, wanted)):
        raise InvalidInputError(problems)
    if info.exposure is not None:
        _ensure_exposure(objects, info.exposure.attributes(shape, info))
    groups.create_group(objects, partials_path(info.exposure_id), {})
    adopt_earlier_version(objects)
    if info.search_space is not None:
        keys = [
            f"{constants.SEARCH_SPACE}/{name}/{key}"
            for name, axes in _AXES.items()
            for key in ("zarr.json", "/".join(["c", *("0" for _ in axes)]))
        ]
        # A writer may have been killed before it had written all of them.
        if None in at_once(objects, [partial(objects.size, key) for key in keys]):
            write_search_space(objects, info.search_space)


def adopt_earlier_version(objects: Objects) -> None:
    """Turn a search of version 1 or 2 into one of version 3, whose earlier partials stay as are."""
    root = read_attributes(objects)
    if root.format_version == constants.FORMAT_VERSION or isinstance(root, fmt.MergedAttributes):
        return
    for exposure in read_exposures(objects, root):
        register(objects, exposure.id, partial_names(objects, exposure.id), has_manifest=False)
    changed = root.model_copy(update={"format_version": constants.FORMAT_VERSION})
    groups.replace_attributes(objects, "", fmt.dump_attributes(changed))


def _ensure_exposure(objects: Objects, wanted: fmt.ExposureAttributes) -> None:
    """Create an exposure with a unique number, unless it exists."""
    groups.create_group(objects, constants.EXPOSURES, {})
    path = exposure_path(wanted.id)
    if groups.group_attributes(objects, path) is None:
        numbered = wanted.model_copy(update={"number": _claim_number(objects, wanted.id)})
        if groups.create_group(objects, path, fmt.dump_attributes(numbered)):
            return
    if problems := _exposure_differences(objects, wanted):
        raise InvalidInputError(problems)


_NUMBER = re.compile("0|[1-9][0-9]{0,9}")


def _claim_number(objects: Objects, exposure: str) -> int:
    """Claim the next number, unique across processes; a process that dies here leaves a gap."""
    groups.create_group(objects, constants.EXPOSURE_NUMBERS, {})
    claim = fmt.dump_attributes(fmt.NumberAttributes(exposure=exposure))
    taken = (int(n) for n in objects.children(constants.EXPOSURE_NUMBERS) if _NUMBER.fullmatch(n))
    number = max(taken, default=-1) + 1
    if number > 2**31 - 2:
        place = f"{objects.url}/{constants.EXPOSURE_NUMBERS}"
        raise FormatError(f"{place}: expected a free number, got none")
    while not groups.create_group(objects, f"{constants.EXPOSURE_NUMBERS}/{number}", claim):
        number += 1
    return number


def search_attributes(shape: tuple[int, int], info: SearchInfo) -> fmt.SearchAttributes:
    """Root attributes of a search with maps of this shape, before its first partial.

    Raises
    ------
    InvalidInputError
        The maps are empty or too large, the template box does not fit, or the pixel size is not
        positive.
    """
    problems: list[str] = []
    valid_shape, size, exposure = shape, info.pixel_size_angstrom, info.exposure
    if not all(1 <= n < 2**31 for n in shape):
        problems.append(f"shape: expected 1 to 2**31 - 1 rows and columns of pixels, got {shape}")
    elif (n := len(TileGrid(shape, (constants.DEFAULT_CHUNK,) * 2))) > constants.MAX_CHUNKS:
        problems.append(f"shape: expected at most {constants.MAX_CHUNKS:,} chunks, got {n:,}")
    elif exposure is None or exposure.valid_shape is None:
        try:
            valid_shape = info.valid_shape(shape)
        except InvalidInputError as error:
            problems += error.problems
    if info.template_name is not None:
        problems += name_problems(info.template_name, "template name")
    if size is not None and not (np.isfinite(size) and size > 0):
        problems.append(f"pixel size: expected a positive number of Å, got {size}")
    if problems:
        raise InvalidInputError(problems)
    return fmt.SearchAttributes(
        format_version=constants.FORMAT_VERSION,
        kind="search",
        shape=shape if exposure is None else None,
        valid_shape=valid_shape if exposure is None else None,
        pixel_size_angstrom=info.pixel_size_angstrom,
        pose_form=info.maps.form,
        has_pixel_size=info.maps.pixel_size,
        has_counts=False,
        search_space_digest=None if info.search_space is None else info.search_space.digest,
        total_projections=0,
        provenance=provenance(inputs=(), options={}),
        looks_wrapped=info.looks_wrapped,
        template_name=info.template_name,
    )


def layout_differences(objects: Objects, shape: tuple[int, int], info: SearchInfo) -> list[str]:
    """Differences between the existing search and exposure and those of a new partial.

    Raises
    ------
    InvalidInputError
        The properties of the new partial are invalid.
    """
    problems = _search_differences(objects, search_attributes(shape, info))
    if info.exposure is not None:
        problems += _exposure_differences(objects, info.exposure.attributes(shape, info))
    return problems


def _search_differences(objects: Objects, wanted: fmt.SearchAttributes) -> list[str]:
    """Differences between an existing search and the wanted one; empty if none exists."""
    if groups.group_attributes(objects, "") is None:
        return []
    found = read_attributes(objects)
    if isinstance(found, fmt.MergedAttributes):
        return [f"{objects.url}: expected a search, got a merged result"]
    if found.has_exposures != wanted.has_exposures:
        return [
            f"{objects.url}: the search has {'' if found.has_exposures else 'no '}exposures, the "
            f"new partial belongs to {'one' if wanted.has_exposures else 'none'}"
        ]
    named = ("template_name",) if wanted.template_name is not None else ()
    return _differences(objects.url, found, wanted, (*fmt.SHARED_BY_PARTIALS, *named))


def _exposure_differences(objects: Objects, wanted: fmt.ExposureAttributes) -> list[str]:
    """Differences between an existing exposure and the wanted one; empty if none exists."""
    if objects.get(f"{exposure_path(wanted.id)}/zarr.json") is None:
        return []
    place = f"{objects.url}: exposure {wanted.id!r}"
    return _differences(place, read_exposure(objects, wanted.id), wanted, fmt.SHARED_BY_EXPOSURE)


def _differences(
    place: str, found: fmt.Attributes, wanted: fmt.Attributes, fields: Sequence[str]
) -> list[str]:
    return [
        f"{place}: {field}: the search has {own}, the new partial {new}"
        for field, own, new in fmt.differences(found, wanted, fields)
    ]


_AXES = dict(zip(TABLES, (("orientation", "angle"), ("defocus",), ("pixel_size",)), strict=True))
"""Tables of a search space, and their axes."""


def write_search_space(
    objects: Objects, space: SearchSpace, path: str = constants.SEARCH_SPACE
) -> None:
    """Write the tables of a search space."""
    steps: list[Callable[[], object]] = [partial(groups.create_group, objects, path, {})]
    for name, axes in _AXES.items():
        steps.append(partial(write_table, objects, f"{path}/{name}", getattr(space, name), axes))
    at_once(objects, steps)


def refresh_total(objects: Objects, exposure: str) -> None:
    """Write the sum of the complete partials' counts into the root, or into their exposure.

    Every writer reads the partials again after writing, so that the last of several concurrent
    writers has counted all of them.
    """
    written = None
    while True:
        partials = read_partials(objects, exposure)
        total = sum(p.total_projections for _, p in partials if p.state == "complete")
        if total == written:
            return
        owner = read_exposure(objects, exposure) if exposure else read_attributes(objects)
        changed = owner.model_copy(update={"total_projections": total})
        groups.update_attributes(objects, exposure_path(exposure), fmt.dump_attributes(changed))
        written = total
