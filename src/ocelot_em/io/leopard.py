"""Result files of Leopard-EM's devices, as partials of a search, converted in bands."""

import hashlib
import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from os import PathLike
from os.path import realpath
from pathlib import Path
from typing import Any, cast

import numpy as np

from ocelot_em.errors import InvalidDataError, InvalidInputError
from ocelot_em.io.result_file import ResultFile, open_result_file
from ocelot_em.model.arrays import exact_count
from ocelot_em.model.maps import (
    COUNT,
    INDEX,
    MIP,
    PIXEL_SIZE,
    POSES,
    SQUARED_SUM,
    SUM,
    MapSet,
    PoseForm,
)
from ocelot_em.model.regions import Region, TileGrid
from ocelot_em.model.search_space import TABLES, SearchSpace
from ocelot_em.store.attributes import DEFAULT_CHUNK
from ocelot_em.store.objects import open_objects
from ocelot_em.store.search import (
    Exposure,
    PartialWriter,
    SearchInfo,
    dtype_problems,
    layout_differences,
    name_problems,
    partial_names,
    read_partials,
    search_attributes,
    value_problems,
)

log = logging.getLogger(__name__)

MAX_BAND_PX = 2**27
"""Pixels of a map that are in memory at a time: half a gigabyte of float32."""


def read_search_space_file(path: str | PathLike[str]) -> SearchSpace:
    """Read the tables ``euler_angles``, ``defocus_values`` and ``pixel_values`` of a file.

    Raises
    ------
    InvalidInputError
        Naming every table that is missing or unusable.
    """
    file = open_result_file(path)
    try:
        missing = [name for name in TABLES if name not in file.info()]
        if missing:
            raise InvalidInputError(f"{path}: {name}: missing" for name in missing)
        return SearchSpace.from_tables(*(file.small(name) for name in TABLES))
    except InvalidInputError as error:
        raise InvalidInputError(_placed(error, path)) from None
    finally:
        file.close()


def _placed(error: InvalidInputError, path: str | PathLike[str]) -> list[str]:
    """Problems with the file in front, where it is not there already."""
    return [p if p.startswith(str(path)) else f"{path}: {p}" for p in error.problems]


@dataclass(frozen=True)
class ImportOptions:
    """What the files do not say.

    Parameters
    ----------
    search_space
        File with the tables; files that carry both pose forms are then read as indexed.
    template_box
        Edge of the template box in pixels: the maps are of mode ``same``. None: all pixels are
        valid.
    pixel_size_angstrom
        Pixel size of the micrograph in Å.
    total_projections
        Counts, one per file in their order; for files that carry none.
    """

    search_space: str | PathLike[str] | None = None
    template_box: int | None = None
    pixel_size_angstrom: float | None = None
    total_projections: Sequence[int] = ()


@dataclass
class _Candidate:
    """A file on its way to becoming a partial."""

    path: Path
    name: str
    file: ResultFile
    arrays: Mapping[str, tuple[tuple[int, ...], "np.dtype[Any]"]]
    count: int | None = None
    sha256: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.arrays[MIP][0] if MIP in self.arrays else ()


def import_results(
    files: Sequence[str | PathLike[str]],
    output: str | PathLike[str],
    options: ImportOptions | None = None,
    on_progress: Callable[[str, float], None] | None = None,
) -> list[str]:
    """Convert result files into partials of a search, in the order given.

    Files are first read through and checked, then converted in bands of rows; nothing is written
    unless all of them are in order. Into an existing search they are appended.

    Parameters
    ----------
    files
        ``.npz`` or ``.pt`` dictionaries with the maps' names as keys.
    output
        Path or URL of the search.
    options
        What the files do not say.
    on_progress
        Called with the phase (``check`` or ``convert``) and the share done, 0 to 1.

    Returns
    -------
    list of str
        Names of the new partials.

    Raises
    ------
    InvalidInputError
        Listing everything that is wrong with all files.
    """
    options = options or ImportOptions()
    if not files:
        raise InvalidInputError("import: expected at least one file, got none")
    return import_batches([Batch(files, options.total_projections)], output, options, on_progress)


@dataclass(frozen=True)
class Batch:
    """Files that become the partials of one exposure, or of a search that has no exposures.

    Parameters
    ----------
    files
        In the order of the partials.
    total_projections
        As in :class:`ImportOptions`.
    exposure
        Whose partials they are.
    """

    files: Sequence[str | PathLike[str]]
    total_projections: Sequence[int] = ()
    exposure: Exposure | None = None


def import_batches(
    batches: Sequence[Batch],
    output: str | PathLike[str],
    options: ImportOptions,
    on_progress: Callable[[str, float], None] | None = None,
) -> list[str]:
    """Convert files of several exposures as :func:`import_results` does those of one search.

    Partials of exposures that are there already with the same content are left alone.

    Returns
    -------
    list of str
        Names of the new partials, behind those of their exposures and a slash.

    Raises
    ------
    InvalidInputError
        Listing everything that is wrong with all files.
    """
    tell = on_progress or (lambda _phase, _share: None)
    problems: list[str] = []
    space: SearchSpace | None = None
    if options.search_space is not None:
        try:
            space = read_search_space_file(options.search_space)
        except InvalidInputError as error:
            problems += error.problems
    seen: dict[str, Path] = {}
    checked: list[_Checked] = []
    for number, batch in enumerate(batches):
        told = _part(tell, "check", number, len(batches))
        found = _check(batch, output, options, space, seen, told)
        problems += found.problems
        checked.append(found)
    unequal = [] if problems else _unequal(checked)
    if unequal:
        raise InvalidInputError(unequal)
    if problems:
        if (space is None) == (options.search_space is None) and all(
            c.has_only_bad_values for c in checked
        ):
            raise InvalidDataError(problems)
        raise InvalidInputError(problems)
    for number, (batch, found) in enumerate(zip(batches, checked, strict=True)):
        told = _part(tell, "convert", number, len(batches))
        _convert_batch(batch, found, output, told)
    return [
        f"{batch.exposure.id}/{name}" if batch.exposure else name
        for batch, found in zip(batches, checked, strict=True)
        for name in found.names
    ]


@dataclass
class _Checked:
    """What is known of a batch after its files were read through.

    ``has_only_bad_values``: problems, if any, are of what the maps hold. ``names``, ``counts`` and
    ``hashes`` are of the files that are to be converted, by their paths.
    """

    place: str
    problems: list[str]
    info: SearchInfo | None = None
    has_only_bad_values: bool = False
    first_order: int = 0
    paths: tuple[Path, ...] = ()
    names: tuple[str, ...] = ()
    counts: tuple[int, ...] = ()
    hashes: tuple[str, ...] = ()


def _check(
    batch: Batch,
    output: str | PathLike[str],
    options: ImportOptions,
    space: SearchSpace | None,
    seen: dict[str, Path],
    tell: Callable[[float], None],
) -> _Checked:
    """Read a batch's files through; ``seen`` has files by their hashes, and gets these."""
    with ExitStack() as stack:
        candidates, problems = _open_all(batch, stack)
        result = _Checked(f"{batch.files[0]}", problems)
        problems += _read_counts(candidates, batch)
        space, found = _search_space(candidates, options, space)
        problems += found
        result.info = info = _common_info(candidates, options, space)
        problems += _layout_problems(candidates, info, batch)
        if problems:
            return result
        shape = cast("tuple[int, int]", candidates[0].shape)
        objects = open_objects(output)
        try:
            problems += layout_differences(objects, shape, info, batch.exposure)
        except InvalidInputError as error:
            problems += error.problems
        if problems:
            return result
        exposure = "" if batch.exposure is None else batch.exposure.id
        result.first_order, found, there = _against_existing(candidates, objects, exposure)
        problems += found
        problems += _same_content(candidates, seen)
        result.has_only_bad_values = not problems
        candidates = [candidate for candidate in candidates if candidate.name not in there]
        for number, candidate in enumerate(candidates):
            told = _part(lambda _, share: tell(share), "", number, len(candidates))
            problems += _value_problems(candidate, info, told)
        result.paths = tuple(c.path for c in candidates)
        result.names = tuple(c.name for c in candidates)
        result.counts = tuple(c.count or 0 for c in candidates)
        result.hashes = tuple(c.sha256 for c in candidates)
    return result


def _unequal(checked: Sequence[_Checked]) -> list[str]:
    """How the batches' maps and search spaces differ, if they do."""
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


def _convert_batch(
    batch: Batch,
    checked: _Checked,
    output: str | PathLike[str],
    tell: Callable[[float], None],
) -> None:
    assert checked.info is not None
    for number, path in enumerate(checked.paths):
        file = open_result_file(path)
        try:
            candidate = _Candidate(
                path,
                checked.names[number],
                file,
                file.info(),
                checked.counts[number],
                checked.hashes[number],
            )
            told = _part(lambda _, share: tell(share), "", number, len(checked.paths))
            order = checked.first_order + number
            _convert(candidate, output, (checked.info, batch.exposure), order, told)
        finally:
            file.close()


def _part(
    tell: Callable[[str, float], None], phase: str, number: int, n: int
) -> Callable[[float], None]:
    """Progress of one of n files as progress of all."""
    return lambda share: tell(phase, (number + share) / n)


def _of(batch: Batch) -> str:
    """How errors begin that are of a batch as a whole."""
    return "" if batch.exposure is None else f"exposure {batch.exposure.id!r}: "


def _open_all(batch: Batch, stack: ExitStack) -> tuple[list[_Candidate], list[str]]:
    files = batch.files
    candidates: list[_Candidate] = []
    problems: list[str] = []
    if batch.exposure is not None:
        problems += name_problems(batch.exposure.id, "exposure id")
    names = _names([Path(path) for path in files])
    for path, name in zip(files, names, strict=True):
        try:
            file = open_result_file(path)
            stack.callback(file.close)
            candidates.append(_Candidate(Path(path), name, file, file.info()))
        except InvalidInputError as error:
            problems += error.problems
        problems += [f"{path}: {problem}" for problem in name_problems(name)]
    repeated = Counter(realpath(path) for path in files)
    problems += [f"{path}: given {n} times" for path, n in repeated.items() if n > 1]
    if len(repeated) == len(files) and len(set(names)) < len(names):
        problems.append(
            f"{_of(batch)}partial names: expected unequal ones, got {', '.join(names)}; rename "
            "files"
        )
    return candidates, problems


def _names(paths: Sequence[Path]) -> list[str]:
    """Name partials after their files, with as many folders as it takes to tell them apart."""
    folders = [path.absolute().parent.parts[1:] for path in paths]
    for depth in range(1 + max(map(len, folders))):
        names = [
            "-".join((*parts[max(len(parts) - depth, 0) :], path.stem))
            for parts, path in zip(folders, paths, strict=True)
        ]
        if len(set(names)) == len(names):
            return names
    return [path.stem for path in paths]


def _read_counts(candidates: Sequence[_Candidate], batch: Batch) -> list[str]:
    problems: list[str] = []
    given, option = batch.total_projections, "--total-projections"
    if batch.exposure is not None:
        option = f"{COUNT} of exposure {batch.exposure.id!r}"
    if given and len(given) != len(batch.files):
        problems.append(
            f"{_of(batch)}total projections: expected one count for each of {len(batch.files)} "
            f"files, got {len(given)}; counts of devices differ and are not shared out"
        )
        given = ()
    wanted_counts = dict(zip(map(Path, batch.files), given, strict=False))
    for candidate in candidates:
        place = f"{candidate.path}: {COUNT}"
        stored: int | None = None
        if COUNT in candidate.arrays:
            try:
                stored = exact_count(_one_number(candidate, COUNT))
            except ValueError as error:
                problems.append(f"{place}: {error}")
                continue
        wanted: int | None = None
        if candidate.path in wanted_counts:
            try:
                wanted = exact_count(wanted_counts[candidate.path])
            except ValueError as error:
                problems.append(f"{candidate.path}: {option}: {error}")
                continue
        if stored is None and wanted is None:
            problems.append(
                f"{place}: missing (Leopard-EM 1.1 and 1.2 write none); give one count for each "
                f"file with {option}"
            )
        elif stored is not None and wanted is not None and stored != wanted:
            problems.append(f"{place}: the file says {stored}, {option} says {wanted}")
        candidate.count = stored if wanted is None else wanted
    return problems


def _one_number(candidate: _Candidate, key: str) -> object:
    """Read an array of one element; of others, which may be huge, the header is enough."""
    shape, dtype = candidate.arrays[key]
    if math.prod(shape) != 1 or dtype.kind not in "biufcO":
        raise ValueError(f"expected one integer, got {dtype} of shape {shape}")
    return candidate.file.small(key)


def _search_space(
    candidates: Sequence[_Candidate], options: ImportOptions, space: SearchSpace | None
) -> tuple[SearchSpace | None, list[str]]:
    """Tables of the file that was given, or else those that the files carry themselves."""
    if options.search_space is not None and space is None:
        return None, []  # why it cannot be read has been said
    problems: list[str] = []
    where = str(options.search_space)
    explicit = all(set(POSES[:-1]) <= set(c.arrays) for c in candidates)
    for candidate in candidates:
        if not set(TABLES) <= set(candidate.arrays) or (explicit and space is None):
            continue
        try:
            own = SearchSpace.from_tables(*(candidate.file.small(name) for name in TABLES))
        except InvalidInputError as error:
            problems += _placed(error, candidate.path)
            continue
        if space is None:
            space, where = own, str(candidate.path)
        elif own.digest != space.digest:
            problems.append(f"{candidate.path}: its search space is not the one of {where}")
    return space, problems


def _common_info(
    candidates: Sequence[_Candidate], options: ImportOptions, space: SearchSpace | None
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
    )


def _layout_problems(candidates: Sequence[_Candidate], info: SearchInfo, batch: Batch) -> list[str]:
    """Keys that are missing, shapes that differ, types that cannot be stored."""
    problems: list[str] = []
    exposure, of = batch.exposure, _of(batch)
    shapes = Counter(c.shape for c in candidates if MIP in c.arrays)
    common = shapes.most_common(1)[0][0] if shapes else ()
    if len(common) == 2:
        try:
            search_attributes((common[0], common[1]), info, exposure)
        except InvalidInputError as error:
            problems += [f"{of}{problem}" for problem in error.problems]
        rows = min(DEFAULT_CHUNK, common[0])
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
        for key in info.maps.partial:
            if key in missing:
                continue
            shape, dtype = candidate.arrays[key]
            problems += dtype_problems(key, dtype, f"{candidate.path}: {key}")
            if shapes and shape != common:
                problems.append(f"{candidate.path}: {key}: expected shape {common}, got {shape}")
    return problems


def _against_existing(
    candidates: Sequence[_Candidate], objects: Any, exposure: str
) -> tuple[int, list[str], set[str]]:
    """Order of the first new partial, names that are taken, and partials that are there already."""
    if not partial_names(objects, exposure):
        return 0, [], set()
    existing = dict(read_partials(objects, exposure))
    complete = {name: p for name, p in existing.items() if p.state == "complete"}
    hashes = {p.provenance.input_sha256: name for name, p in complete.items()}
    problems, there = [], set()
    for candidate in candidates:
        candidate.sha256 = _sha256(candidate.path)
        name = there_as = candidate.name
        if name not in complete and candidate.count:  # results of idle devices are alike
            there_as = hashes.get(candidate.sha256, name)
        found = complete.get(there_as)
        if found is None:
            continue
        if exposure and found.provenance.input_sha256 == candidate.sha256:
            there.add(name)
            if found.total_projections != candidate.count:
                problems.append(
                    f"{candidate.path}: {COUNT}: {objects.url} has its partial {there_as!r} with "
                    f"{found.total_projections}, now it is {candidate.count}"
                )
        elif there_as == name:
            problems.append(
                f"{candidate.path}: {objects.url} has a partial {name!r} already; leave the file "
                "out, or rename it if it is another result"
            )
        else:
            problems.append(
                f"{candidate.path}: its content is already there as partial {there_as!r}; its "
                "projections would be counted twice"
            )
    return 1 + max(p.order for p in existing.values()), problems, there


def _same_content(candidates: Sequence[_Candidate], seen: dict[str, Path]) -> list[str]:
    problems = []
    for candidate in candidates:
        candidate.sha256 = candidate.sha256 or _sha256(candidate.path)
        if candidate.count == 0:
            continue  # of idle devices, whose results are alike
        first = seen.setdefault(candidate.sha256, candidate.path)
        if first.resolve() != candidate.path.resolve():
            problems.append(
                f"{candidate.path}: has the same content as {first}; its projections would be "
                "counted twice"
            )
    return problems


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _bands(shape: tuple[int, int]) -> TileGrid:
    return TileGrid(shape, (min(DEFAULT_CHUNK, shape[0]), shape[1]))


def _value_problems(
    candidate: _Candidate, info: SearchInfo, tell: Callable[[float], None]
) -> list[str]:
    """Read a file through; the first band with problems is reported."""
    shape = cast("tuple[int, int]", candidate.shape)
    readers = {key: candidate.file.rows(key) for key in info.maps.partial}
    for band in _bands(shape):
        region = band.region
        maps = {key: read(region.y0, region.y1) for key, read in readers.items()}
        problems = value_problems(maps, region, info, str(candidate.path))
        if problems:
            return problems
        tell(region.y1 / shape[0])
    return []


def _convert(
    candidate: _Candidate,
    output: str | PathLike[str],
    of: tuple[SearchInfo, Exposure | None],
    order: int,
    tell: Callable[[float], None],
) -> None:
    shape = cast("tuple[int, int]", candidate.shape)
    assert candidate.count is not None
    info, exposure = of
    writer = PartialWriter(
        output,
        candidate.name,
        shape,
        total_projections=candidate.count,
        order=order,
        search=info,
        exposure=exposure,
    )
    writer.describe(file=candidate.path.name, sha256=candidate.sha256)
    readers = {key: candidate.file.rows(key) for key in info.maps.partial}
    with writer:
        for band in _bands(shape):
            region: Region = band.region
            writer.write(region, {k: read(region.y0, region.y1) for k, read in readers.items()})
            tell(region.y1 / shape[0])
