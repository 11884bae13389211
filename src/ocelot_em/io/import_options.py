"""Options of an import, and the batches of files that are imported together."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, TypedDict

import numpy as np
from pydantic import BeforeValidator, WrapValidator

from ocelot_em.errors import InvalidInputError
from ocelot_em.io.result_file import ResultFile, open_result_file
from ocelot_em.model.maps import MIP
from ocelot_em.model.options import Options, one_or_many
from ocelot_em.model.regions import TileGrid
from ocelot_em.model.search_space import TABLES, SearchSpace
from ocelot_em.model.text import exposure_prefix
from ocelot_em.store import constants
from ocelot_em.store.search_info import Exposure, SearchInfo

OnFraction = Callable[[float], None]
"""Called with the fraction done of a phase, 0 to 1."""

REPLACE_HINT = "choose another output, or replace the search (--overwrite)"
"""What to do about a search at the output that has other properties."""

MAX_BAND_PX = 2**27
"""Maximum number of pixels of a map in memory at a time: half a gigabyte of float32."""


def read_search_space_file(path: str | PathLike[str]) -> SearchSpace:
    """Read the tables ``euler_angles``, ``defocus_values`` and ``pixel_values`` of a file.

    Raises
    ------
    InvalidInputError
        Naming every missing or unusable table.

    Examples
    --------
    >>> from ocelot_em import read_search_space_file
    >>> read_search_space_file("search_space.npz").n_poses
    129600
    """
    with closing(open_result_file(path)) as file:
        missing = [name for name in TABLES if name not in file.info(TABLES)]
        if missing:
            raise InvalidInputError(f"{path}: {name}: missing" for name in missing)
        try:
            return SearchSpace.from_tables(*(file.small(name) for name in TABLES))
        except InvalidInputError as error:
            raise InvalidInputError(placed(error, path)) from None


def placed(error: InvalidInputError, path: str | PathLike[str]) -> list[str]:
    """Return an error's problems, each prefixed with the file if it is not already."""
    return [p if p.startswith(str(path)) else f"{path}: {p}" for p in error.problems]


def _parse_text(value: object, parse: Callable[[object], int]) -> object:
    """Parse a text; counts of other types are checked together with those of the files."""
    return parse(value) if isinstance(value, str) else value


class ImportOptions(Options):
    """Information that result files lack, or that overrides what they have.

    Parameters
    ----------
    search_space
        File (.npz, .pt) with the tables of an indexed search; files with both pose forms are then
        imported as indexed. Default: the tables in the files, if they have any.
    template_box
        Edge of the template box in pixels, for maps of the micrograph's shape (mode ``same``).
        Default: all pixels are valid.
    pixel_size_angstrom
        Pixel size of the micrograph in Å. Default: that of a finished search's files, or unknown.
    total_projections
        Number of cross-correlations of each file, in the order of the files, if the files do not
        contain it; upper bounds, if files have maps of counts. Default: the counts in the files.
    pixel_size_offset_angstrom
        The single pixel-size offset of a finished search in Å: 0 if the pixel size was not varied.
        Default: the one that its files show.
    prefix
        Prefix of the names of a finished search's files, such as ``output`` for
        ``output_mip.mrc``, where a folder has several searches. Default: any.
    name
        Name of the partial of a finished search. Default: the prefix, or the name of the folder or
        file.
    template_name
        Name of the template, which is that of its group when searches of several templates are
        merged (``--group-by template``). Default: the name of the store.
    chunk_files
        Write a file for each chunk of a map, as for a bucket, instead of for up to 16 x 16 chunks.

    Examples
    --------
    >>> from ocelot_em import ImportOptions, import_results
    >>> options = ImportOptions(template_box=56, pixel_size_angstrom=2.5)
    >>> import_results("gpu0.npz", "MONDAY.zarr", options)
    ['gpu0']
    >>> import_results("gpu1.npz", "TUESDAY.zarr", options, chunk_files=True)
    ['gpu1']
    """

    search_space: str | Path | None = None
    template_box: int | None = None
    pixel_size_angstrom: float | None = None
    total_projections: Annotated[
        tuple[Annotated[int, WrapValidator(_parse_text)], ...], BeforeValidator(one_or_many)
    ] = ()
    pixel_size_offset_angstrom: float | None = None
    prefix: str = ""
    name: str | None = None
    template_name: str | None = None
    chunk_files: bool = False


class ImportKeywords(TypedDict, total=False):
    """Fields of :class:`ImportOptions` as keywords."""

    search_space: str | PathLike[str] | None
    template_box: int | None
    pixel_size_angstrom: float | None
    total_projections: int | Sequence[int]
    pixel_size_offset_angstrom: float | None
    prefix: str
    name: str | None
    template_name: str | None
    chunk_files: bool


@dataclass
class Candidate:
    """A file to be imported as a partial.

    ``count`` is an upper bound of its map of counts, if it has one.
    """

    path: Path
    name: str
    file: ResultFile
    arrays: Mapping[str, tuple[tuple[int, ...], "np.dtype[Any]"]]
    count: int | None = None
    has_counts: bool = False
    sha256: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the maps, in pixels."""
        return self.arrays[MIP][0] if MIP in self.arrays else ()

    def info_of(self, common: SearchInfo) -> SearchInfo:
        """Properties of the partial, from those that all files have in common."""
        return replace(common, has_counts=self.has_counts)


@dataclass(frozen=True)
class Batch:
    """Files, in the order of the partials, of one exposure or of a search without exposures."""

    files: Sequence[str | PathLike[str]]
    total_projections: Sequence[int] = ()
    exposure: Exposure | None = None

    @property
    def of(self) -> str:
        """Prefix of errors that concern the whole batch."""
        return exposure_prefix(self.exposure.id if self.exposure else "")


@dataclass
class Checked:
    """Result of checking a batch's files.

    ``has_only_bad_values``: any problems concern only the maps' values. ``candidates`` are the
    files to convert; ``first_order`` is the order of the first of them. ``looks_wrapped``: all
    pixels are taken as valid, but the edges look wrapped.
    """

    place: str
    problems: list[str]
    info: SearchInfo | None = None
    has_only_bad_values: bool = False
    first_order: int = 0
    candidates: Sequence[Candidate] = ()
    looks_wrapped: bool = False


def part_of(on_fraction: OnFraction, number: int, n: int) -> OnFraction:
    """Return a callback that converts the progress of file ``number`` of n to that of all."""
    return lambda fraction: on_fraction((number + fraction) / n)


def bands_of(shape: tuple[int, int]) -> TileGrid:
    """Return the bands of rows in which maps are read."""
    return TileGrid(shape, (min(constants.DEFAULT_CHUNK, shape[0]), shape[1]))
