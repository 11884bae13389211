"""Options of an import, and what is imported together."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from ocelot_em.errors import InvalidInputError
from ocelot_em.io.result_file import ResultFile, open_result_file
from ocelot_em.model.maps import (
    MIP,
)
from ocelot_em.model.regions import TileGrid
from ocelot_em.model.search_space import TABLES, SearchSpace
from ocelot_em.store import constants
from ocelot_em.store.search_info import Exposure, SearchInfo

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
        raise InvalidInputError(placed(error, path)) from None
    finally:
        file.close()


def placed(error: InvalidInputError, path: str | PathLike[str]) -> list[str]:
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
class Candidate:
    """A file on its way to becoming a partial."""

    path: Path
    name: str
    file: ResultFile
    arrays: Mapping[str, tuple[tuple[int, ...], "np.dtype[Any]"]]
    count: int | None = None
    sha256: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the maps, in pixels."""
        return self.arrays[MIP][0] if MIP in self.arrays else ()


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


@dataclass
class Checked:
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


def part_of(
    tell: Callable[[str, float], None], phase: str, number: int, n: int
) -> Callable[[float], None]:
    """Progress of one of n files as progress of all."""
    return lambda share: tell(phase, (number + share) / n)


def of_batch(batch: Batch) -> str:
    """How errors begin that are of a batch as a whole."""
    return "" if batch.exposure is None else f"exposure {batch.exposure.id!r}: "


def bands_of(shape: tuple[int, int]) -> TileGrid:
    """Return bands of rows in which maps are read."""
    return TileGrid(shape, (min(constants.DEFAULT_CHUNK, shape[0]), shape[1]))
