"""Checks of result files before anything is written."""

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from os import PathLike
from os.path import realpath
from pathlib import Path
from typing import cast

import numpy as np

from ocelot_em.errors import InvalidInputError
from ocelot_em.io.edges import EdgeSample
from ocelot_em.io.import_options import (
    MAX_BAND_PX,
    REPLACE_HINT,
    Batch,
    Candidate,
    Checked,
    ImportOptions,
    OnFraction,
    bands_of,
    part_of,
    placed,
)
from ocelot_em.io.partial_names import name_partials
from ocelot_em.io.result_file import open_result_file
from ocelot_em.model.arrays import exact_count
from ocelot_em.model.maps import (
    COUNT,
    INDEX,
    MIP,
    NOT_SEARCHED,
    PIXEL_SIZE,
    POSES,
    SQUARED_SUM,
    SUM,
    AnyArray,
    MapSet,
    PoseForm,
)
from ocelot_em.model.regions import Region
from ocelot_em.model.search_space import TABLES, SearchSpace
from ocelot_em.store import constants
from ocelot_em.store.attributes import PartialAttributes
from ocelot_em.store.completion import existing_partials
from ocelot_em.store.creation import layout_differences, search_attributes
from ocelot_em.store.objects import open_objects
from ocelot_em.store.search_info import SearchInfo
from ocelot_em.store.validation import BadValues, layout_problems, name_problems


def check_batch(
    batch: Batch,
    output: str | PathLike[str],
    options: ImportOptions,
    space: SearchSpace | None,
    seen: dict[str, Path],
    on_fraction: OnFraction,
) -> Checked:
    """Read and check a batch's files; add them to ``seen``, which maps hashes to files."""
    candidates, problems = _open_all(batch)
    result = Checked(f"{batch.files[0]}", problems)
    problems += _read_counts(candidates, batch)
    space, found = _search_space(candidates, options, space)
    problems += found
    result.info = info = replace(_common_info(candidates, options, space), exposure=batch.exposure)
    problems += _layout_problems(candidates, info, batch)
    if problems:
        return result
    shape = cast("tuple[int, int]", candidates[0].shape)
    objects = open_objects(output)
    try:
        different = layout_differences(objects, shape, info)
        problems += [f"{text}; {REPLACE_HINT}" for text in different]
    except InvalidInputError as error:
        problems += error.problems
    if problems:
        return result
    exposure = "" if batch.exposure is None else batch.exposure.id
    existing = existing_partials(objects, exposure)
    in_values, unreadable = list[str](), list[str]()
    for number, candidate in enumerate(candidates):
        on_file = part_of(on_fraction, number, len(candidates))
        if _is_there(candidate, existing):
            continue
        try:
            edges = EdgeSample(shape)
            with closing(candidate.file):
                own = candidate.info_of(info)
                in_values += _value_problems(candidate, own, edges, on_file)
                result.looks_wrapped |= info.takes_all_pixels and edges.looks_wrapped
                candidate.sha256 = candidate.file.sha256()
        except InvalidInputError as error:
            unreadable += error.problems
    result.first_order, found, there = _against_existing(
        candidates, existing, objects.url, exposure
    )
    problems += unreadable + found + _same_content(candidates, seen)
    result.has_only_bad_values = not problems
    problems += in_values
    result.candidates = [c for c in candidates if c.name not in there]
    return result


def unequal(checked: Sequence[Checked]) -> list[str]:
    """List differences between the batches' maps or search spaces."""
    maps, spaces = dict[MapSet, str](), dict[str, str]()
    for one in checked:
        if one.info is not None:
            maps.setdefault(one.info.maps, one.place)
            if one.info.search_space is not None:
                spaces.setdefault(one.info.search_space.digest, one.place)
    if len(maps) > 1:
        return [
            *(f"{place}: has the maps {', '.join(m.partial)}" for m, place in maps.items()),
            "exposures: expected the same maps in all of them",
        ]
    first, *others = spaces.values() or [""]
    return [f"{place}: its search space is not the one of {first}" for place in others]


def _open_all(batch: Batch) -> tuple[list[Candidate], list[str]]:
    files = batch.files
    candidates: list[Candidate] = []
    problems: list[str] = []
    if batch.exposure is not None:
        problems += name_problems(batch.exposure.id, "exposure id")
    names = name_partials(files)
    for path, name in zip(files, names, strict=True):
        try:
            file = open_result_file(path)
            with closing(file):
                candidates.append(Candidate(Path(path), name, file, file.info()))
        except InvalidInputError as error:
            problems += error.problems
        problems += [f"{path}: {problem}" for problem in name_problems(name)]
    repeated = Counter(realpath(path) for path in files if "\0" not in os.fspath(path))
    problems += [f"{path}: given {n} times" for path, n in repeated.items() if n > 1]
    if len(repeated) == len(files) and len(set(names)) < len(names):
        problems.append(
            f"{batch.of}partial names: expected unequal ones, got {', '.join(names)}; rename files"
        )
    return candidates, problems


def _read_counts(candidates: Sequence[Candidate], batch: Batch) -> list[str]:
    problems: list[str] = []
    given, option = batch.total_projections, "--total-projections"
    if batch.exposure is not None:
        option = f"{COUNT} of exposure {batch.exposure.id!r}"
    if given and len(given) != len(batch.files):
        problems.append(
            f"{batch.of}total projections: expected one count for each of "
            f"{len(batch.files)} files, got {len(given)}; counts of "
            "devices differ and are not shared out"
        )
        given = ()
    given_counts = dict(zip(map(Path, batch.files), given, strict=False))
    for candidate in candidates:
        place = f"{candidate.path}: {COUNT}"
        stored: int | None = None
        if COUNT in candidate.arrays:
            try:
                stored = exact_count(_stored_count(candidate))
            except ValueError as error:
                problems.append(f"{place}: {error}")
                continue
            except InvalidInputError as error:
                problems += error.problems
                continue
        given_count: int | None = None
        if candidate.path in given_counts:
            try:
                given_count = exact_count(given_counts[candidate.path])
            except ValueError as error:
                problems.append(f"{candidate.path}: {option}: {error}")
                continue
        if candidate.has_counts and given_count is not None:
            stored = None  # the given one is an upper bound of the map, whose values are checked
        if stored is None and given_count is None:
            problems.append(
                f"{place}: missing (Leopard-EM 1.1 and 1.2 write none); give one count for each "
                f"file with {option}"
            )
        elif None not in (stored, given_count) and stored != given_count:
            problems.append(f"{place}: the file has {stored}, {option} has {given_count}")
        candidate.count = stored if given_count is None else given_count
    return problems


def _stored_count(candidate: Candidate) -> object:
    """Read a count, or the highest of a map of counts; refuse other arrays by their header."""
    shape, dtype = candidate.arrays[COUNT]
    with closing(candidate.file):
        if math.prod(shape) == 1 and dtype.kind in "biufcO":
            return candidate.file.small(COUNT)
        if shape != candidate.shape or len(shape) != 2 or dtype.kind not in "iu":
            raise ValueError(
                f"expected one integer, or a map of integers of the shape {candidate.shape} of "
                f"{MIP}, got {dtype} of shape {shape}"
            )
        read, bands = candidate.file.rows(COUNT), bands_of((shape[0], shape[1]))
        candidate.has_counts = True
        return max(int(read(band.region.y0, band.region.y1).max(initial=0)) for band in bands)


def _search_space(
    candidates: Sequence[Candidate], options: ImportOptions, space: SearchSpace | None
) -> tuple[SearchSpace | None, list[str]]:
    """Return the tables of the given file or, without one, those in the result files."""
    if options.search_space is not None and space is None:
        return None, []  # already reported as unreadable
    problems: list[str] = []
    where = str(options.search_space)
    explicit = all(set(POSES[:-1]) <= set(c.arrays) for c in candidates)
    for candidate in candidates:
        if not set(TABLES) <= set(candidate.arrays) or (explicit and space is None):
            continue
        try:
            with closing(candidate.file):
                own = SearchSpace.from_tables(*(candidate.file.small(name) for name in TABLES))
        except InvalidInputError as error:
            problems += placed(error, candidate.path)
            continue
        if space is None:
            space, where = own, str(candidate.path)
        elif own.digest != space.digest:
            problems.append(f"{candidate.path}: its search space is not the one of {where}")
    return space, problems


def _common_info(
    candidates: Sequence[Candidate], options: ImportOptions, space: SearchSpace | None
) -> SearchInfo:
    return SearchInfo(
        template_box=options.template_box,
        pixel_size_angstrom=options.pixel_size_angstrom,
        search_space=space,
        has_pixel_size=space is not None or any(PIXEL_SIZE in c.arrays for c in candidates),
        float64_sums=any(
            c.arrays[key][1].name == "float64"
            for c in candidates
            for key in (SUM, SQUARED_SUM)
            if key in c.arrays
        ),
        chunk_files=options.chunk_files,
        template_name=options.template_name,
    )


def _layout_problems(candidates: Sequence[Candidate], info: SearchInfo, batch: Batch) -> list[str]:
    """List missing keys, different shapes and dtypes that cannot be stored."""
    problems: list[str] = []
    exposure, of = batch.exposure, batch.of
    shapes = Counter(c.shape for c in candidates if MIP in c.arrays)
    common = shapes.most_common(1)[0][0] if shapes else ()
    if len(common) == 2:
        try:
            search_attributes((common[0], common[1]), info)
        except InvalidInputError as error:
            problems += [f"{of}{problem}" for problem in error.problems]
        rows = min(constants.DEFAULT_CHUNK, common[0])
        if rows * common[1] > MAX_BAND_PX:
            problems.append(
                f"{of}{MIP}: expected at most {MAX_BAND_PX // rows:,} columns, of which {rows:,} "
                f"rows are read at a time, got shape {common}; cut the maps"
            )
    elif shapes:
        problems.append(f"{of}{MIP}: expected maps (y, x), got shape {common}")
    for candidate in candidates:
        missing = [key for key in info.maps.partial if key not in candidate.arrays]
        only_indexed = info.maps.form is PoseForm.EXPLICIT and INDEX in candidate.arrays
        for key in missing:
            if key in POSES and only_indexed:
                continue
            problems.append(f"{candidate.path}: {key}: missing")
        if only_indexed and set(missing) & set(POSES[:-1]):
            problems.append(
                f"{candidate.path}: poses are indexed ({INDEX}): give the tables with "
                + ("--search-space" if exposure is None else "search_space")
            )
        shape = common if shapes else None
        either = replace(candidate.info_of(info), float64_sums=True)
        layouts = {k: candidate.arrays[k] for k in either.maps.partial if k not in missing}
        problems += layout_problems(layouts, shape, either, str(candidate.path))
    return problems


def _is_there(candidate: Candidate, existing: Mapping[str, PartialAttributes]) -> bool:
    """Return whether the file was imported as the partial of its name; read the file if so."""
    found = existing.get(candidate.name)
    if found is None or found.state != "complete":
        return False
    with closing(candidate.file):
        candidate.sha256 = candidate.file.sha256()
    return candidate.sha256 == found.provenance.input_sha256


def _against_existing(
    candidates: Sequence[Candidate],
    existing: Mapping[str, PartialAttributes],
    url: str,
    exposure: str,
) -> tuple[int, list[str], set[str]]:
    """Return the first new partial's order, problems with names, and partials already imported.

    Unfinished partials of these files are written again, and so are their places in the order.
    """
    complete = {name: p for name, p in existing.items() if p.state == "complete"}
    hashes = {p.provenance.input_sha256: name for name, p in complete.items()}
    problems, there = [], set()
    for candidate in candidates:
        name = same = candidate.name
        if name not in complete and candidate.count:  # idle devices have identical results
            same = hashes.get(candidate.sha256, name)
        found = complete.get(same)
        if found is None:
            continue
        if (exposure or same == name) and found.provenance.input_sha256 == candidate.sha256:
            there.add(name)
            if found.total_projections != candidate.count:
                problems.append(
                    f"{candidate.path}: {COUNT}: {url} has its partial {same!r} with "
                    f"{found.total_projections}, now it is {candidate.count}"
                )
        elif same == name:
            problems.append(
                f"{candidate.path}: {url} has a partial {name!r} already; leave the file "
                "out, or rename it if it is another result"
            )
        else:
            problems.append(
                f"{candidate.path}: its content is already there as partial {same!r}; its "
                "projections would be counted twice"
            )
    again = {candidate.name for candidate in candidates} - complete.keys()
    orders = (p.order for name, p in existing.items() if name not in again)
    return 1 + max(orders, default=-1), problems, there


def _same_content(candidates: Sequence[Candidate], seen: dict[str, Path]) -> list[str]:
    problems = []
    for candidate in candidates:
        if candidate.count == 0 or not candidate.sha256:
            continue  # idle devices have identical results; an unreadable file is reported already
        first = seen.setdefault(candidate.sha256, candidate.path)
        if first.resolve() != candidate.path.resolve():
            problems.append(
                f"{candidate.path}: has the same content as {first}; its projections would be "
                "counted twice"
            )
    return problems


def _value_problems(
    candidate: Candidate, info: SearchInfo, edges: EdgeSample, on_fraction: OnFraction
) -> list[str]:
    """Check all values of a file in the order of the file, and sample the edges.

    Values that are valid where nothing was searched wait until all maps are read: there are few, or
    long runs, and each takes a bit.
    """
    bad = BadValues(str(candidate.path), info.search_space, candidate.count)
    bands = bands_of(cast("tuple[int, int]", candidate.shape))
    waiting: dict[Region, dict[str, AnyArray]] = {band.region: {} for band in bands}
    infinite = set[tuple[Region, str]]()
    keys = info.maps.partial
    for number, (key, read) in enumerate(candidate.file.scan(keys)):
        for n, region in enumerate(waiting, 1):
            values = read(region.y0, region.y1)
            if key == SQUARED_SUM:
                edges.add(region, values)
            if key in (MIP, COUNT) or key in info.maps.pose:
                marked = _valid_only_if_idle(key, values)
                if marked.any():
                    waiting[region][key] = np.packbits(marked, axis=1)
                    if key in POSES and np.isinf(values[marked]).any():
                        infinite.add((region, key))
            if key not in info.maps.pose or key == INDEX:
                bad.look({key: values}, (region.y0, region.x0))
            on_fraction((number + n / len(bands)) / len(keys))
    for region, marks in waiting.items():
        maps = {key: _stand_in(key, bits, region.shape) for key, bits in marks.items()}
        for key in maps:
            if (region, key) in infinite:
                maps[key][np.isnan(maps[key])] = np.inf
        if maps.keys() - {MIP}:
            maps.setdefault(MIP, np.zeros(region.shape, np.float32))
            bad.look(maps, (region.y0, region.x0))
    return bad.problems()


def _valid_only_if_idle(key: str, values: AnyArray) -> AnyArray:
    """Mark pixels without a pose or count; of ``mip``, those where nothing was searched."""
    marked: AnyArray
    if key == MIP:
        marked = ~(values > -np.inf)
    elif key in _UNSEARCHED:
        marked = values == _UNSEARCHED[key]
    else:
        marked = ~np.isfinite(values)
    return marked


_UNSEARCHED = {INDEX: NOT_SEARCHED, COUNT: 0}
"""Values of integer maps where nothing was searched; above them, values are valid elsewhere."""


def _stand_in(key: str, bits: AnyArray, shape: tuple[int, int]) -> AnyArray:
    """Return a map with the same pixels marked, and valid values elsewhere."""
    marked = np.unpackbits(bits, axis=1, count=shape[1]).astype(bool)
    if key in _UNSEARCHED:
        return np.where(marked, _UNSEARCHED[key], _UNSEARCHED[key] + 1)
    return np.where(marked, np.float32(-np.inf if key == MIP else np.nan), np.float32(0))
