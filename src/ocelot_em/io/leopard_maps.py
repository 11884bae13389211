"""The eight maps of a finished Leopard-EM search: code shared by its file formats.

Export reads the valid pixels of a merged result band by band. Import makes one partial of a search;
its sums are reconstructed from the mean and the standard deviation.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from ocelot_em.errors import InvalidDataError, InvalidInputError
from ocelot_em.io.import_options import OnProgress
from ocelot_em.io.partial_names import cleaned_name
from ocelot_em.model.arrays import exact_count
from ocelot_em.model.maps import (
    MEAN,
    MIP,
    PIXEL_SIZE,
    SCALED_MIP,
    SQUARED_SUM,
    STD,
    SUM,
    AnyArray,
    Float64,
)
from ocelot_em.model.regions import Region, TileGrid, ceil_div
from ocelot_em.store.attributes import PartialAttributes
from ocelot_em.store.creation import layout_differences, refresh_total
from ocelot_em.store.distinct import overlaps
from ocelot_em.store.objects import open_objects
from ocelot_em.store.partials import PartialWriter, existing_partials
from ocelot_em.store.search_info import SearchInfo
from ocelot_em.store.validation import name_problems

OUR_NAMES: Mapping[str, str] = {
    "mip": MIP,
    "scaled_mip": SCALED_MIP,
    "correlation_average": MEAN,
    "correlation_variance": STD,  # misnamed in Leopard-EM since 1.0: it is not squared
    "orientation_psi": "best_psi",
    "orientation_theta": "best_theta",
    "orientation_phi": "best_phi",
    "relative_defocus": "best_defocus",
}
"""Leopard-EM's map names, and the names used here."""

BAND_PX = 4 * 2**20
"""Pixels of a map in memory at a time, unless chunks are larger."""

LEAST_ROWS = 1024
"""Minimum rows of a band: few bands, of whole chunks so that none is read in pieces."""


def band_grid(shape: tuple[int, int], block: tuple[int, int]) -> TileGrid:
    """Cut a map into bands of whole blocks, each of about :data:`BAND_PX` pixels.

    Wide maps are cut along both axes: one row of chunks of a montage can be gigabytes.
    """
    rows = ceil_div(LEAST_ROWS, block[0]) * block[0]
    columns = max(BAND_PX // (rows * block[1]), 1) * block[1]
    return TileGrid(shape, (min(rows, shape[0]), min(columns, shape[1])))


@dataclass(frozen=True)
class FinishedSearch:
    """Information that the files of a finished search lack.

    ``total_projections`` is the exact number of cross-correlations behind the mean and the standard
    deviation; Leopard-EM records it in its configuration file and in HDF5 files. ``template_box``
    is the edge in pixels, for maps of the micrograph's shape (mode ``same``); None: all pixels are
    valid, as Leopard-EM writes them by default.

    ``pixel_size_angstrom`` and ``name`` (of the partial) are taken from the files by default.
    ``pixel_size_offset_angstrom`` is the single offset of the search: 0 if the pixel size was not
    varied; None: the poses have no pixel size and merge only with others that have none.
    """

    total_projections: int | None = None
    template_box: int | None = None
    pixel_size_angstrom: float | None = None
    pixel_size_offset_angstrom: float | None = None
    name: str | None = None


@dataclass(frozen=True)
class ImportedSearch:
    """Name of the imported partial, and notes on what was missing or reconstructed."""

    name: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class MapFiles:
    """The maps of a finished search in open files.

    ``maps`` are float32 (y, x) by Leopard-EM's names; slicing reads a region, and only
    ``scaled_mip`` may be missing. ``place`` names the files in errors, ``name`` is the default name
    of the partial. ``paths`` are in a fixed order. The last two are None if the files have no such
    value.
    """

    place: str
    name: str
    maps: Mapping[str, Any]
    paths: Sequence[Path]
    pixel_size_angstrom: float | None = None
    total_projections: int | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width in pixels."""
        height, width = self.maps["mip"].shape
        return height, width

    def read(self, region: Region) -> dict[str, AnyArray]:
        """Read all maps over a region."""
        read = {}
        for name, values in self.maps.items():
            try:
                read[name] = np.asarray(values[region.slices], np.float32)
            except (OSError, RuntimeError, ValueError) as error:
                raise InvalidInputError(
                    f"{self.place}: {name}: pixels {region} cannot be read: {error}"
                ) from error
        return read


def positive_or_none(value: Any) -> float | None:
    """Return a pixel size as a number; None if it is not a positive one."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) and number > 0 else None


def import_map_files(
    files: MapFiles,
    output: str | PathLike[str],
    about: FinishedSearch,
    on_progress: OnProgress | None = None,
) -> ImportedSearch:
    """Convert the maps of a finished search into a partial of a new or existing search.

    All data are read and checked first; nothing is written if there is a problem. Problems are
    raised together.
    """
    on_progress = on_progress or (lambda _phase, _fraction: None)
    name = about.name or cleaned_name(files.name)
    problems, count = [*overlaps(output, files.paths), *_layout_problems(files)], 0
    try:
        count = _count(files, about)
    except InvalidInputError as error:
        problems += error.problems
    if problems:
        raise InvalidInputError([*problems, *name_problems(name)])
    objects = open_objects(output)
    existing = existing_partials(objects)
    digest = _digest(files.paths)
    notes = tuple(_notes(files, about, name))
    if _is_there(existing.get(name), digest, count):
        if differences := layout_differences(objects, files.shape, _search_info(files, about)):
            raise InvalidInputError(differences)
        refresh_total(objects, "")  # a kill may have struck before it
        return ImportedSearch(name, (f"{name}: was there before, and is unchanged", *notes))
    problems += [
        f"{files.place}: its content is already there as partial {there!r} of {output}; its "
        "projections would be counted twice"
        for there, partial in existing.items()
        if partial.state == "complete" and partial.provenance.input_sha256 == digest
    ]
    try:
        writer = PartialWriter(
            output,
            name,
            files.shape,
            total_projections=count,
            order=1 + max((p.order for other, p in existing.items() if other != name), default=-1),
            search=_search_info(files, about),
        )
    except InvalidInputError as error:
        raise InvalidInputError([*problems, *error.problems]) from None
    if problems:
        raise InvalidInputError(problems)
    grid = band_grid(files.shape, writer.chunk)
    for band in grid:
        problems = _value_problems(files.place, files.read(band.region), band.region)
        if problems:
            raise InvalidDataError(problems)
        on_progress("check", (1 + band.iy * grid.counts[1] + band.ix) / len(grid))
    writer.describe(file=files.place.rpartition("/")[2], sha256=digest)
    with writer:
        for band in grid:
            maps = _as_partial(files.read(band.region), count, about.pixel_size_offset_angstrom)
            writer.write(band.region, maps, validated=True)
            on_progress("convert", (1 + band.iy * grid.counts[1] + band.ix) / len(grid))
    return ImportedSearch(name, notes)


def _is_there(found: PartialAttributes | None, digest: str, count: int) -> bool:
    """Return whether a partial is complete and of these files."""
    return (
        found is not None
        and found.state == "complete"
        and found.provenance.input_sha256 == digest
        and found.total_projections == count
    )


def _layout_problems(files: MapFiles) -> list[str]:
    """List maps that are missing, not two-dimensional, not float32 or not of one shape."""
    problems = [
        f"{files.place}: {name}: missing"
        for name in OUR_NAMES
        if name not in files.maps and name != "scaled_mip"
    ]
    shapes = {name: tuple(values.shape) for name, values in files.maps.items()}
    for name, values in files.maps.items():
        place = f"{files.place}: {name}"
        if values.dtype.newbyteorder("=").name != "float32":
            problems.append(
                f"{place}: expected float32 values, as Leopard-EM writes them, got {values.dtype}"
            )
        first = next(iter(shapes))
        if len(shapes[name]) != 2:
            problems.append(f"{place}: expected a map (y, x), got shape {shapes[name]}")
        elif shapes[name] != shapes[first]:
            problems.append(
                f"{place}: expected shape {shapes[first]}, as {first} has, got {shapes[name]}"
            )
    return problems


def _count(files: MapFiles, about: FinishedSearch) -> int:
    place = f"{files.place}: total_projections"
    try:
        stored, given = (
            None if count is None else exact_count(count)
            for count in (files.total_projections, about.total_projections)
        )
    except ValueError as error:
        raise InvalidInputError(f"{place}: {error}") from None
    stored = stored or None  # 0 means that it was never set
    if given is None and stored is None:
        raise InvalidInputError(
            f"{place}: missing: the number of cross-correlations behind the mean; give it "
            "(Leopard-EM's configuration file has it below match_template_result)"
        )
    if given is not None and stored is not None and given != stored:
        raise InvalidInputError(f"{place}: the file has {stored}, {given} was given")
    count = stored if given is None else given
    if not count:
        raise InvalidInputError(f"{place}: expected at least 1, got {count}")
    return count


def _search_info(files: MapFiles, about: FinishedSearch) -> SearchInfo:
    given = about.pixel_size_angstrom
    return SearchInfo(
        template_box=about.template_box,
        pixel_size_angstrom=files.pixel_size_angstrom if given is None else given,
        has_pixel_size=about.pixel_size_offset_angstrom is not None,
        float64_sums=True,
    )


def _digest(paths: Sequence[Path]) -> str:
    """Hash the files' bytes."""
    hasher = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            hasher.update(hashlib.file_digest(file, "sha256").digest())
    return hasher.hexdigest()


def _value_problems(place: str, maps: Mapping[str, AnyArray], region: Region) -> list[str]:
    """List unexpected NaN and infinities, and z-scores that contradict the other maps."""
    searched = maps["mip"] != -np.inf
    problems = []
    for name, values in maps.items():
        bad = ~np.isfinite(values)
        if name not in ("correlation_average", "correlation_variance"):
            bad &= searched
        elif (bad & ~searched).any():
            problems.append(
                f"{place}: {name}: not a number {_where(bad & ~searched, region)}, where nobody "
                "searched: a partial has one count at every pixel, and cannot say that it is 0 "
                "there; merge the search's own partials instead"
            )
            bad &= searched
        if bad.any():
            problems.append(f"{place}: {name}: not a finite number {_where(bad, region)}")
    negative = maps["correlation_variance"] < 0
    if negative.any():
        problems.append(f"{place}: correlation_variance: below 0 {_where(negative, region)}")
    return problems or _zscore_problems(place, maps, region, searched)


def _zscore_problems(
    place: str, maps: Mapping[str, AnyArray], region: Region, searched: AnyArray
) -> list[str]:
    if "scaled_mip" not in maps:
        return []
    wrong = _disagrees(maps, maps["correlation_variance"]) & searched
    if not wrong.any():
        return []
    hint = "are these files of one search?"
    if not (_disagrees(maps, np.sqrt(maps["correlation_variance"])) & searched).any():
        hint = (
            "correlation_variance seems to be a variance; Leopard-EM stores the standard deviation "
            "under that name: replace it by its square root"
        )
    return [
        f"{place}: scaled_mip: expected (mip - correlation_average) / correlation_variance, got "
        f"something else {_where(wrong, region)}; {hint}"
    ]


def _disagrees(maps: Mapping[str, AnyArray], std: AnyArray) -> AnyArray:
    """Mark z-scores that differ from those of this standard deviation by more than rounding."""
    mip, mean, std = (
        np.asarray(values, np.float64) for values in (maps["mip"], maps["correlation_average"], std)
    )
    with np.errstate(all="ignore"):
        expected = np.where(std == 0, 0, (mip - mean) / std)
        rounding = np.where(std == 0, 0, 1e-6 * (np.abs(mip) + np.abs(mean)) / std)
        tolerance = 1e-3 * (1 + np.abs(expected)) + rounding
        wrong: AnyArray = ~(np.abs(maps["scaled_mip"] - expected) <= tolerance)
    return wrong


def _where(bad: AnyArray, region: Region) -> str:
    y, x = np.unravel_index(int(np.argmax(bad)), bad.shape)
    n = int(np.count_nonzero(bad))
    return f"at {n} pixel{'s' * (n > 1)} of {region}, first ({region.y0 + y}, {region.x0 + x})"


def _as_partial(
    maps: Mapping[str, AnyArray], count: int, pixel_size_offset: float | None
) -> dict[str, AnyArray]:
    """Return a partial's maps, with sums that give this mean and standard deviation."""
    mean, std = (
        maps[name].astype(np.float64) for name in ("correlation_average", "correlation_variance")
    )
    partial: dict[str, AnyArray] = {
        OUR_NAMES[name]: values
        for name, values in maps.items()
        if name == "mip" or name.startswith(("orientation", "relative"))
    }
    if pixel_size_offset is not None:
        searched = maps["mip"] != -np.inf
        partial[PIXEL_SIZE] = np.where(searched, np.float32(pixel_size_offset), np.float32(np.nan))
    return partial | {SUM: mean * count, SQUARED_SUM: _squared_sum(mean, std, count)}


def _squared_sum(mean: Float64, std: Float64, count: int) -> Float64:
    squared: Float64 = (std * std + mean * mean) * count
    # Rounding must not turn a deviation of 0 into a tiny one, and so a huge z-score. A sum reduced
    # by more than all rounding errors together gives 0 again.
    squared[std == 0] *= 1 - 2.0**-49
    return squared


def _notes(files: MapFiles, about: FinishedSearch, name: str) -> Iterator[str]:
    if about.name is None and name != files.name:
        yield f"name: {name!r}, because names of partials cannot be like {files.name!r}"
    yield (
        "correlation_sum, correlation_squared_sum: reconstructed from mean, standard deviation and "
        "the number of projections, with the precision of float32 that those are stored in"
    )
    if about.pixel_size_offset_angstrom is None:
        yield (
            "best_pixel_size: the files have no map of pixel-size offsets, so that this merges "
            "only with searches without one; if all was searched at one offset, give it (0 if the "
            "pixel size was not varied)"
        )
    else:
        yield f"best_pixel_size: {about.pixel_size_offset_angstrom} Å everywhere, as given"
    yield (
        "best_partial: the files do not record which device found what; the search counts as one "
        "partial with explicit poses"
    )
    if "scaled_mip" not in files.maps:
        yield "scaled_mip: missing, so that the maps could not be checked against it"
    if about.template_box is None:
        yield "template box: not given; all pixels are taken as valid"
    stored, given = files.pixel_size_angstrom, about.pixel_size_angstrom
    if stored is None and given is None:
        yield "pixel size: neither in the files nor given; it stays unknown"
    elif None not in (stored, given) and stored != given:
        yield f"pixel size: the files have {stored} Å; the given {given} Å is used"
