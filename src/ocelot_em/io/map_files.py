"""A finished search: its files, its maps in open files, and facts from files beside them."""

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ocelot_em.errors import InvalidInputError
from ocelot_em.io.leopard_maps import OUR_NAMES
from ocelot_em.model.correlation_histogram import CorrelationHistogram
from ocelot_em.model.maps import COUNT, PIXEL_SIZE, AnyArray
from ocelot_em.model.regions import Region, TileGrid

LEOPARD, CISTEM = "Leopard-EM", "cisTEM"
COUNT_FACT, PIXEL, BOX, OFFSET = (
    "total_projections",
    "pixel size",
    "template box",
    "pixel-size offset",
)

_POSES = ("orientation_psi", "orientation_theta", "orientation_phi", "relative_defocus", PIXEL_SIZE)

_LOWEST = -1e30
"""cisTEM has about -FLT_MAX, rescaled, where nothing was searched; float16 turns it into -inf."""


@dataclass
class Facts:
    """Values by name, each with the file that has it, and notes on those that were taken."""

    values: dict[str, list[tuple[Any, str]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, name: str, value: Any, where: object) -> None:
        """Add a value, unless it is None or that file's value is known."""
        known = self.values.setdefault(name, [])
        if value is not None and all(repr((value, str(where))) != repr(one) for one in known):
            known.append((value, str(where)))

    def settle(self, name: str, given: Any, option: str) -> tuple[Any, list[str]]:
        """Return the value of an option, or the one that all files have, and a contradiction."""
        known = self.values.get(name, [])
        value, where = (given, "as given") if given is not None or not known else known[0]
        others = [f"{place} has {other}" for other, place in known if not _same(other, value)]
        if value is None:
            return None, []
        if given is None and others:
            return None, [
                f"{name}: {where} has {value}, {', '.join(others)}; give the right one with "
                f"{option}"
            ]
        unit = " Å" if name in (PIXEL, OFFSET) else ""
        source = where if given is not None else f"from {where}"
        self.notes.append("; ".join((f"{name}: {value}{unit}, {source}", *others)))
        return value, []


def _same(one: Any, other: Any) -> bool:
    """Compare values; pixel sizes may be rounded to float32."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-4)
    return bool(one == other)


@dataclass
class FoundSearch:
    """A finished search: its program, its files, and facts beside them.

    ``paths`` are the maps' files by Leopard-EM's names, or the HDF5 file by ``""``. ``micrograph``
    is its shape, and the file; ``histogram`` that of cisTEM, and the file.
    """

    program: str
    place: str
    name: str
    paths: Mapping[str, Path]
    facts: Facts = field(default_factory=Facts)
    micrograph: tuple[tuple[int, int], Path] | None = None
    histogram: tuple[CorrelationHistogram, Path] | None = None

    @property
    def is_hdf5(self) -> bool:
        """Whether the maps are in one HDF5 file."""
        return "" in self.paths

    @property
    def files(self) -> list[Path]:
        """The files of the maps."""
        return list(self.paths.values())


@dataclass(frozen=True)
class MapFiles:
    """Maps (y, x) by Leopard-EM's names, and :data:`PIXEL_SIZE` where a program has that, too.

    ``place`` names the files in errors; slicing an array reads a region, and only ``scaled_mip``
    may be missing. An HDF5 file may also have a map of integers, :data:`COUNT`.
    ``marks_unsearched``: like cisTEM, by a standard deviation of 0 and very low values.
    """

    place: str
    arrays: Mapping[str, Any]
    marks_unsearched: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width in pixels."""
        height, width = self.arrays["mip"].shape
        return height, width

    @property
    def precision(self) -> str:
        """The least precise type of the values."""
        names = {array.dtype.newbyteorder("=").name for array in self.arrays.values()}
        return "float16" if "float16" in names else "float32"

    @property
    def rounding(self) -> float:
        """Relative rounding error of values, with room for a few operations."""
        return 1e-3 if self.precision == "float16" else 1e-6

    def layout_problems(self) -> list[str]:
        """List maps that are missing, not two-dimensional, not of floats or not of one shape."""
        problems = [
            f"{self.place}: {name}: missing"
            for name in OUR_NAMES
            if name not in self.arrays and name != "scaled_mip"
        ]
        shapes = {name: tuple(values.shape) for name, values in self.arrays.items()}
        for name, values in self.arrays.items():
            place, first = f"{self.place}: {name}", next(iter(shapes))
            if name == COUNT:
                if values.dtype.kind not in "iu":
                    problems.append(f"{place}: expected integers, got {values.dtype}")
            elif values.dtype.newbyteorder("=").name not in ("float32", "float16"):
                problems.append(f"{place}: expected float32 or float16 values, got {values.dtype}")
            if len(shapes[name]) != 2:
                problems.append(f"{place}: expected a map (y, x), got shape {shapes[name]}")
            elif shapes[name] != shapes[first]:
                problems.append(
                    f"{place}: expected shape {shapes[first]}, as {first} has, got {shapes[name]}"
                )
        return problems

    def read(self, region: Region) -> dict[str, AnyArray]:
        """Read all maps over a region as float32, counts as they are.

        Unsearched pixels are -inf and NaN, as here.
        """
        read: dict[str, AnyArray] = {}
        for name, values in self.arrays.items():
            try:
                dtype = None if name == COUNT else np.float32
                read[name] = np.asarray(values[region.slices], dtype)
            except (OSError, RuntimeError, ValueError) as error:
                raise InvalidInputError(
                    f"{self.place}: {name}: pixels {region} cannot be read: {error}"
                ) from error
        if self.marks_unsearched:
            unsearched = (read["correlation_variance"] == 0) | (read["mip"] < _LOWEST)
            for name in read:
                value = -np.inf if name == "mip" else np.nan if name in _POSES else 0
                read[name] = np.where(unsearched, np.float32(value), read[name])
        return read

    def n_searched(self) -> int:
        """Count the pixels with a standard deviation."""
        std = self.arrays["correlation_variance"]
        rows = TileGrid(std.shape, (1024, std.shape[1]))
        return sum(int(np.count_nonzero(std[band.region.slices])) for band in rows)

    def of_corners(self, box: int) -> "MapFiles":
        """Move pixels from the center of a template to the upper left corner of its box.

        Only boxes that lie within the micrograph remain.
        """
        y, x = (slice(box // 2, box // 2 + n - box + 1) for n in self.shape)
        return replace(self, arrays={name: values[y, x] for name, values in self.arrays.items()})


def single_offset(result: Mapping[str, Any]) -> float | None:
    """Return 0 if the counts of orientations and defoci show that the pixel size was not varied."""
    names = ("total_projections", "total_orientations", "total_defocus")
    with suppress(TypeError, ValueError, OverflowError):
        count, orientations, defoci = (int(result.get(name) or 0) for name in names)
        return 0.0 if count and count == orientations * defoci else None
    return None


def positive_or_none(value: Any) -> float | None:
    """Return a pixel size as a number; None if it is not a positive one."""
    with suppress(TypeError, ValueError):
        number = float(value)
        return number if math.isfinite(number) and number > 0 else None
    return None
