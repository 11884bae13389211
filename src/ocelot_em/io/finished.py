"""Import of a finished search as one partial, whose sums come from mean and standard deviation.

:mod:`ocelot_em.io.beside` finds the files, and what they lack in other files beside them.
"""

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any, Unpack

import numpy as np

from ocelot_em.errors import InvalidDataError, InvalidInputError
from ocelot_em.io.beside import find_search
from ocelot_em.io.edges import EdgeSample
from ocelot_em.io.hdf5 import open_hdf5
from ocelot_em.io.import_options import REPLACE_HINT, ImportKeywords, ImportOptions
from ocelot_em.io.leopard_maps import OUR_NAMES, band_grid
from ocelot_em.io.map_files import BOX, CISTEM, COUNT_FACT, OFFSET, PIXEL, FoundSearch, MapFiles
from ocelot_em.io.mrc import open_mrc_set
from ocelot_em.io.partial_names import cleaned_name
from ocelot_em.io.text_file import file_identity, local_path, require_unchanged
from ocelot_em.model.arrays import exact_count
from ocelot_em.model.keywords import takes
from ocelot_em.model.maps import COUNT, PIXEL_SIZE, SQUARED_SUM, SUM, AnyArray, Float64
from ocelot_em.model.progress import OnProgress, share_bar
from ocelot_em.model.regions import Region, TileGrid
from ocelot_em.store.attributes import WRAPPED_EDGES
from ocelot_em.store.completion import existing_partials
from ocelot_em.store.creation import layout_differences, refresh_total
from ocelot_em.store.distinct import overlaps
from ocelot_em.store.objects import open_objects
from ocelot_em.store.partials import PartialWriter
from ocelot_em.store.search_info import SearchInfo
from ocelot_em.store.validation import name_problems, value_problems
from ocelot_em.store.whole_folder import replaced_search

log = logging.getLogger(__name__)

MEAN, STD = "correlation_average", "correlation_variance"


@dataclass(frozen=True)
class ImportedSearch:
    """Name of the imported partial, and notes: what was taken from where, and what was missing."""

    name: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Plan:
    """What is converted: the maps, and all that is not in them."""

    files: MapFiles
    name: str
    count: int
    offset: float | None
    info: SearchInfo
    notes: tuple[str, ...]


@takes(ImportOptions)
def import_finished(
    source: str | PathLike[str],
    output: str | PathLike[str],
    options: ImportOptions | None = None,
    progress: bool | OnProgress | None = None,
    *,
    overwrite: bool = False,
    **keywords: Unpack[ImportKeywords],
) -> ImportedSearch:
    """Convert the maps of a finished search into one partial, as far as their content allows.

    The maps have a mean and a standard deviation but no sums. With the number of projections ``N``
    the sums are ``mean * N`` and ``(std**2 + mean**2) * N``, stored as float64. Merging only this
    partial reproduces the mean and the standard deviation bit for bit.

    All data are read and checked first; nothing is written if there is a problem. ``scaled_mip``
    may be missing; otherwise the maps must agree with it.

    Parameters
    ----------
    source
        A folder with the results of Leopard-EM (MRC or HDF5 files) or of cisTEM, or one of the
        files: a map, the table of results, the configuration.
    output
        Path or URL of the search.
    options
        Options that several imports share, if any.
    progress
        Whether to show a bar; None: in a notebook, and in an interactive session on a terminal; not
        in a script. A function is called with the phase (``check`` or ``convert``) and the fraction
        of it done, 0 to 1.
    overwrite
        Replace an existing search. The new one is complete before the old one is removed.
    **keywords
        Information that the files lack, or that overrides what they have: the fields of
        :class:`ImportOptions`, which describes them.

    Raises
    ------
    InvalidInputError
        Listing every problem: maps that are missing or of different shapes, files that contradict
        each other, what no file has, NaN, a z-score of another search, a different search at
        ``output``.

    Examples
    --------
    >>> from ocelot_em import import_finished
    >>> facts = {"total_projections": 129600, "pixel_size_offset_angstrom": 0}
    >>> import_finished("maps", "FINISHED.zarr", **facts).name
    'maps'
    """
    options = ImportOptions.of(options, keywords)
    if len(options.total_projections) > 1 or options.search_space is not None:
        raise InvalidInputError(
            "import: a finished search is one partial with explicit poses: expected at most one "
            "count and no search space; import each search with its own command"
        )
    found = find_search(local_path(source), options.prefix)
    if overwrite:
        with replaced_search(output, found.files) as place:
            return import_finished(source, place, options, progress)
    with ExitStack() as stack:
        on_progress = stack.enter_context(share_bar(progress))
        plan = _plan(found, _opened(found, stack), options, overlaps(output, found.files))
        before = [file_identity(path) for path in found.files]
        objects = open_objects(output)
        if problems := layout_differences(objects, plan.files.shape, plan.info):
            raise InvalidInputError(f"{problem}; {REPLACE_HINT}" for problem in problems)
        existing = existing_partials(objects)
        chunk = PartialWriter.chunk_of(plan.files.shape)
        edges = EdgeSample(plan.files.shape)
        digest = _checked(plan, edges, chunk, on_progress)
        same = [
            name
            for name, partial in existing.items()
            if partial.state == "complete" and partial.provenance.input_sha256 == digest
        ]
        if plan.name in same and existing[plan.name].total_projections == plan.count:
            refresh_total(objects, "")  # a kill may have struck before it
            note = f"{plan.name}: was there before, and is unchanged"
            return ImportedSearch(plan.name, (note, *plan.notes))
        if plan.name not in same and same:
            raise InvalidInputError(
                f"{plan.files.place}: its content is already there as partial {same[0]!r} of "
                f"{output}; its projections would be counted twice"
            )
        info = plan.info
        if info.takes_all_pixels and edges.looks_wrapped:
            log.warning(WRAPPED_EDGES)
            info = replace(info, looks_wrapped=True)
        others = (p.order for name, p in existing.items() if name != plan.name)
        writer = PartialWriter(
            output,
            plan.name,
            plan.files.shape,
            total_projections=plan.count,
            order=1 + max(others, default=-1),
            search=info,
        )
        writer.describe(file=plan.files.place.rpartition("/")[2], sha256=digest)
        grid = band_grid(plan.files.shape, chunk)
        if found.histogram is not None:
            writer.write_histogram(found.histogram[0])
        with writer, ExitStack() as at_the_end:  # also in place of an error of reading
            for path, was in zip(found.files, before, strict=True):
                at_the_end.callback(require_unchanged, path, was)
            for number, band in enumerate(grid, 1):
                maps = _as_partial(plan.files.read(band.region), plan.count, plan.offset)
                writer.write(band.region, maps, validated=True)
                on_progress("convert", number / len(grid))
    return ImportedSearch(plan.name, plan.notes)


def _opened(found: FoundSearch, stack: ExitStack) -> MapFiles:
    """Open the maps, and note what their files have besides."""
    return (open_hdf5 if found.is_hdf5 else open_mrc_set)(found, stack)


def _plan(
    found: FoundSearch, files: MapFiles, options: ImportOptions, problems: list[str]
) -> _Plan:
    """Settle everything that is not in the maps; raise an error that lists all problems."""
    facts, name = found.facts, options.name or cleaned_name(found.name)
    notes = [f"maps: {found.program}'s, from {found.place}"]
    if name not in (found.name, options.name):
        notes.append(f"name: {name!r}, because names of partials cannot be like {found.name!r}")
    problems += files.layout_problems()
    given = next(iter(options.total_projections), None)
    count, box = 0, options.template_box
    try:
        count = _count(files, found, given)
    except InvalidInputError as error:
        problems += error.problems
    size, found_problems = facts.settle(PIXEL, options.pixel_size_angstrom, "--pixel-size")
    problems += found_problems
    if not problems:
        box, files, found_problems = _placed(found, files, options.template_box)
        problems += found_problems
    offset, _ = facts.settle(OFFSET, options.pixel_size_offset_angstrom, "--pixel-size-offset")
    if problems:
        raise InvalidInputError([*problems, *name_problems(name)])
    info = SearchInfo(
        template_box=box,
        pixel_size_angstrom=size,
        has_pixel_size=offset is not None or PIXEL_SIZE in files.arrays,
        has_counts=COUNT in files.arrays,
        float64_sums=True,
        chunk_files=options.chunk_files,
        template_name=options.template_name,
    )
    if info.has_counts:
        notes.append("total_projections: a map, of which the number below is an upper bound")
    notes += [*facts.notes, *_missing(files, info)]
    return _Plan(files, name, count, offset, info, tuple(notes))


def _count(files: MapFiles, found: FoundSearch, given: object) -> int:
    problems = []
    for value, where in found.facts.values.pop(COUNT_FACT, []):
        try:
            if exact := exact_count(value):  # 0 means that it was never set
                found.facts.add(COUNT_FACT, exact, where)
        except ValueError as error:
            problems.append(f"{where}: {COUNT_FACT}: {error}")
    try:
        given = None if given is None else exact_count(given)
    except ValueError as error:
        problems.append(f"{files.place}: {COUNT_FACT}: {error}")
    if given == 0:
        problems.append(f"{files.place}: {COUNT_FACT}: expected at least 1, got 0")
    if problems:
        raise InvalidInputError(problems)
    if given is None and found.histogram is not None:
        histogram, path = found.histogram
        n_pixels = files.n_searched()
        found.facts.add(
            COUNT_FACT, max(round(histogram.total / max(n_pixels, 1)), 1), f"{path}, to about 1 %"
        )
    count, problems = found.facts.settle(COUNT_FACT, given, "--total-projections")
    if count is None and not problems:
        problems.append(
            f"{files.place}: {COUNT_FACT}: missing: the number of cross-correlations behind the "
            "mean; give it with --total-projections"
        )
    if problems:
        raise InvalidInputError(problems)
    return int(count)


def _placed(
    found: FoundSearch, files: MapFiles, given: int | None
) -> tuple[int | None, MapFiles, list[str]]:
    """Return the template box of wrapped maps, if they are, and maps by corners of the box."""
    shape, facts = files.shape, found.facts
    if found.program == CISTEM:
        box, problems = facts.settle(BOX, given, "--template-box")
        if problems:
            return None, files, problems
        if box is None or not 1 <= box <= min(shape):
            return (
                None,
                files,
                [
                    f"{files.place}: template box: expected its edge in pixels, up to "
                    f"{min(shape)}, got {box or 'none'}: a pixel of cisTEM's maps is the center of "
                    "the template, here it is the box's corner; give it with --template-box"
                ],
            )
        return None, files.of_corners(box), []
    micrograph = found.micrograph
    if given is not None:
        return given, files, []
    if micrograph is not None:
        (height, width), where = micrograph
        margin = {height - shape[0], width - shape[1]}
        if margin == {0}:
            box, problems = facts.settle(BOX, None, "--template-box")
            if box is None and not problems:
                problems = [
                    f"{files.place}: template box: missing: the maps have the shape of {where}, so "
                    "that their last rows and columns are wrapped around; give its edge with "
                    "--template-box"
                ]
            return box, files, problems
        if len(margin) == 1 and min(margin) > 0:
            facts.notes.append(
                f"template box: {min(margin) + 1}, from the shape of {where}; the maps are cropped "
                "to the valid pixels"
            )
            return None, files, []
    facts.notes.append(
        "template box: not given; all pixels are taken as valid, as Leopard-EM crops maps by "
        "default; if they have the micrograph's shape, give it with --template-box"
    )
    return None, files, []


def _missing(files: MapFiles, info: SearchInfo) -> Sequence[str]:
    """List what the maps lack."""
    notes = [
        "correlation_sum, correlation_squared_sum: reconstructed from mean, standard deviation and "
        f"the number of projections, with the precision of {files.precision} that those are stored "
        "in",
        "best_partial: the files do not record which device found what; the search counts as one "
        "partial with explicit poses",
    ]
    if not info.has_pixel_size:
        notes.append(
            "best_pixel_size: the files have no map of pixel-size offsets, so that this merges "
            "only with searches without one; if all was searched at one offset, give it with "
            "--pixel-size-offset (0 if the pixel size was not varied)"
        )
    if "scaled_mip" not in files.arrays:
        notes.append("scaled_mip: missing, so that the maps could not be checked against it")
    if info.pixel_size_angstrom is None:
        notes.append(
            "pixel size: neither in the files nor given, so that it stays unknown; give it with "
            "--pixel-size"
        )
    return notes


def _checked(
    plan: _Plan, edges: EdgeSample, chunk: tuple[int, int], on_progress: OnProgress
) -> str:
    """Check all values, sample the edges, and return a digest that does not depend on the bands."""
    files = plan.files
    digests, grid = dict[tuple[int, int], bytes](), band_grid(files.shape, chunk)
    for number, band in enumerate(grid, 1):
        region, maps = band.region, files.read(band.region)
        if problems := _value_problems(plan, maps, region):
            raise InvalidDataError(problems)
        edges.add(region, maps[STD])
        for cell in TileGrid(region.shape, chunk):
            hasher = hashlib.sha256()
            for name in sorted(maps):
                hasher.update(np.ascontiguousarray(maps[name][cell.region.slices]).data)
            digests[region.y0 + cell.region.y0, region.x0 + cell.region.x0] = hasher.digest()
        on_progress("check", number / len(grid))
    whole = hashlib.sha256(repr((files.shape, sorted(files.arrays))).encode())
    for _, digest in sorted(digests.items()):
        whole.update(digest)
    return whole.hexdigest()


def _value_problems(plan: _Plan, maps: Mapping[str, AnyArray], region: Region) -> list[str]:
    """List unexpected NaN and infinities, counts, and z-scores that contradict the other maps."""
    files = plan.files
    searched, place = maps["mip"] != -np.inf, files.place
    problems = []
    if COUNT in maps:
        own = {name: maps[name] for name in ("mip", COUNT)}
        problems += value_problems(own, region, plan.info, place, plan.count)
    counted = searched | (maps.get(COUNT, 1) != 0)
    for name, values in maps.items():
        bad = ~np.isfinite(values)
        if name in (MEAN, STD) and (bad & ~searched & counted).any():
            problems.append(
                f"{place}: {name}: not a number {_where(bad & ~searched & counted, region)}, where "
                "nothing was searched: without a map of counts, a partial has one count for all "
                "its pixels, which cannot be 0 at some; merge the search's own partials instead"
            )
        if (bad := bad & searched).any():
            problems.append(f"{place}: {name}: not a finite number {_where(bad, region)}")
    if (negative := maps[STD] < 0).any():
        problems.append(f"{place}: {STD}: below 0 {_where(negative, region)}")
    if problems or "scaled_mip" not in maps:
        return problems
    wrong = _disagrees(maps, maps[STD], files.rounding) & searched
    if not wrong.any():
        return []
    hint = "are these files of one search?"
    if not (_disagrees(maps, np.sqrt(maps[STD]), files.rounding) & searched).any():
        hint = (
            f"{STD} seems to be a variance; Leopard-EM stores the standard deviation under that "
            "name: replace it by its square root"
        )
    return [
        f"{place}: scaled_mip: expected (mip - {MEAN}) / {STD}, got something else "
        f"{_where(wrong, region)}; {hint}"
    ]


def _disagrees(maps: Mapping[str, AnyArray], std: AnyArray, rounding: float) -> AnyArray:
    """Mark z-scores that differ from those of this standard deviation by more than rounding."""
    wrong = np.empty(std.shape, np.bool_)
    for rows in _cached_rows(std.shape):
        names = ("mip", MEAN, "scaled_mip")
        mip, mean, z, own = (
            np.asarray(values[rows], np.float64) for values in (*(maps[n] for n in names), std)
        )
        with np.errstate(all="ignore"):
            expected = np.where(own == 0, 0, (mip - mean) / own)
            error = np.where(own == 0, 0, rounding * (np.abs(mip) + np.abs(mean)) / own)
            tolerance = max(1e-3, 2 * rounding) * (1 + np.abs(expected)) + error
            wrong[rows] = ~(np.abs(z - expected) <= tolerance)
    return wrong


def _cached_rows(shape: tuple[int, ...]) -> Iterator[slice]:
    """Cut an array into rows whose float64 values stay in the processor's cache."""
    n = max(2**14 // shape[1], 1)
    return (slice(start, start + n) for start in range(0, shape[0], n))


def _where(bad: AnyArray, region: Region) -> str:
    y, x = np.unravel_index(int(np.argmax(bad)), bad.shape)
    n = int(np.count_nonzero(bad))
    return f"at {n} pixel{'s' * (n > 1)} of {region}, first ({region.y0 + y}, {region.x0 + x})"


def _as_partial(
    maps: Mapping[str, AnyArray], count: int, offset: float | None
) -> dict[str, AnyArray]:
    """Return a partial's maps, with sums that give this mean and standard deviation."""
    partial = {OUR_NAMES.get(name, name): values for name, values in maps.items()}
    if offset is not None and PIXEL_SIZE not in maps:
        searched = maps["mip"] != -np.inf
        partial[PIXEL_SIZE] = np.where(searched, np.float32(offset), np.float32(np.nan))
    sums, squared_sums = (np.empty(maps[MEAN].shape) for _ in range(2))
    for rows in _cached_rows(sums.shape):
        mean, std = (maps[name][rows].astype(np.float64) for name in (MEAN, STD))
        n: Any = count
        if COUNT in maps:
            n = maps[COUNT][rows].astype(np.float64)
            mean[n == 0] = std[n == 0] = 0  # NaN
        sums[rows] = mean * n
        squared_sums[rows] = _squared_sum(mean, std, n)
    return partial | {SUM: sums, SQUARED_SUM: squared_sums}


def _squared_sum(mean: Float64, std: Float64, count: "int | Float64") -> Float64:
    squared: Float64 = (std * std + mean * mean) * count
    # Rounding must not turn a deviation of 0 into a tiny one, and so a huge z-score. A sum reduced
    # by more than all rounding errors together gives 0 again.
    squared[std == 0] *= 1 - 2.0**-49
    return squared
