"""Validation of the layout, dtypes and values of maps; reports every problem."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from ocelot_em.model.arrays import HostRows
from ocelot_em.model.maps import (
    INDEX,
    MAPS,
    MIP,
    NOT_SEARCHED,
    AnyArray,
)
from ocelot_em.model.regions import Region
from ocelot_em.store import attributes as fmt
from ocelot_em.store.search_info import OneMap, SearchInfo


def converted(
    maps: Mapping[str, object], info: SearchInfo, place: str, convert: Callable[[object], OneMap]
) -> tuple[dict[str, OneMap], list[str]]:
    """Required maps, converted to NumPy, and the problems of those that cannot be converted."""
    converted: dict[str, OneMap] = {}
    problems: list[str] = []
    for key in info.maps.partial:
        try:
            converted[key] = convert(maps[key])
        except KeyError:
            problems.append(f"{place}: {key}: missing")
        except (TypeError, ValueError, RuntimeError) as error:  # such as torch's bfloat16
            problems.append(f"{place}: {key}: cannot become a NumPy array: {error}")
    return converted, problems


def layout_problems(
    maps: Mapping[str, AnyArray] | Mapping[str, HostRows],
    shape: tuple[int, int],
    info: SearchInfo,
    place: str,
) -> list[str]:
    """Problems with the dtypes and shapes of a partial's maps; missing maps are ignored."""
    problems = []
    for key, values in maps.items():
        problems += dtype_problems(key, values.dtype, f"{place}: {key}", info.float64_sums)
        if values.shape != shape:
            problems.append(f"{place}: {key}: expected shape {shape}, got {values.shape}")
    return problems


def dtype_problems(
    name: str, dtype: "np.dtype[Any]", place: str, float64_sums: bool = True
) -> list[str]:
    """Problem if values of this dtype cannot be stored in this map without loss."""
    allowed = [d for d in MAPS[name].dtypes if float64_sums or d != "float64"]
    if name == INDEX:
        allowed.append("int64")  # checked against the search space, then stored as int32
    if dtype.newbyteorder("=").name in allowed:
        return []
    return [f"{place}: expected dtype {' or '.join(allowed)}, got {dtype}"]


def value_problems(
    maps: Mapping[str, AnyArray], region: Region, info: SearchInfo, place: str
) -> list[str]:
    """Problems with NaN and with indices, each with its first pixel; missing maps are ignored."""
    found = BadValues(info, place)
    found.look(maps, region)
    return found.problems()


class BadValues:
    """Collects invalid values of a partial from several regions.

    Parameters
    ----------
    info
        Properties of the search.
    place
        Name of the partial in messages.
    """

    def __init__(self, info: SearchInfo, place: str) -> None:
        self._info, self._place = info, place
        self._found: dict[str, tuple[int, tuple[int, int]]] = {}
        self._outside: list[int] = []

    def look(self, maps: Mapping[str, AnyArray], region: Region) -> None:
        """Check one region; missing maps are ignored."""
        mip = maps.get(MIP, np.zeros(region.shape, np.float32))
        unsearched = mip == -np.inf
        for key in self._info.maps.partial:
            values = maps.get(key)
            if values is None or values.dtype.kind != "f":
                continue
            nan = np.isnan(values)
            if key in self._info.maps.pose:
                nan &= ~unsearched
            self._note(key, nan, region)
        space = self._info.search_space
        if space is not None and INDEX in maps:
            index = maps[INDEX]
            outside = (index < NOT_SEARCHED) | (index >= space.n_poses)
            if self._note(_OUTSIDE, outside, region):
                self._outside += [int(index[outside].min()), int(index[outside].max())]
            if MIP in maps:
                missing = (index == NOT_SEARCHED) & ~unsearched & ~np.isnan(mip)
                self._note(_MISSING, missing, region)

    def _note(self, what: str, bad: AnyArray, region: Region) -> bool:
        """Count bad pixels; return whether there are any."""
        if not bad.any():
            return False
        y, x = np.unravel_index(int(np.argmax(bad)), bad.shape)
        n_before, first = self._found.get(what, (0, (region.y0 + int(y), region.x0 + int(x))))
        self._found[what] = n_before + int(np.count_nonzero(bad)), first
        return True

    def problems(self) -> list[str]:
        """Describe all problems, map by map."""
        said = []
        for what in (*self._info.maps.partial, _OUTSIDE, _MISSING):
            if what not in self._found:
                continue
            count, first = self._found[what]
            where = f"at {count} pixel{'s' * (count > 1)}, first {first}"
            if what == _MISSING:
                said.append(f"{self._place}: {INDEX}: -1 where {MIP} was searched {where}")
            elif what == _OUTSIDE and self._info.search_space is not None:
                said.append(
                    f"{self._place}: {INDEX}: expected -1 to "
                    f"{self._info.search_space.n_poses - 1}, got {min(self._outside)} to "
                    f"{max(self._outside)} {where}; either the search space is another one, or "
                    "this is Leopard-EM 1.2's wrong index in the last batch, when the number of "
                    "orientations is no multiple of the batch size: search again with a batch "
                    "size that divides it"
                )
            else:
                said.append(f"{self._place}: {what}: NaN {where}")
        return said


_OUTSIDE, _MISSING = "outside", "missing"
"""Kinds of index problems; the other kinds are names of maps with NaN."""


def name_problems(name: str, what: str = "partial name") -> list[str]:
    """Problems with the name of a partial or an exposure."""
    try:
        TypeAdapter(fmt.PartialName).validate_python(name)
    except ValidationError:
        return [
            f"{what} {name!r}: expected up to 128 letters, digits, '.', '_' and '-', "
            "starting with a letter or digit"
        ]
    if name == "zarr.json":
        return [f"{what} {name!r}: is the name of Zarr's own metadata"]
    return []
