"""The validator of partial results: layout, dtypes and values of maps, and names.

It reports every problem. Maps are validated once on their way: at import, in a search program's
result, or when they are written. A caller that has validated them passes ``validated=True`` to the
writer.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from ocelot_em.model.arrays import MAX_COUNT
from ocelot_em.model.maps import COUNT, INDEX, MAPS, MIP, NOT_SEARCHED, POSES, SQUARED_SUM, AnyArray
from ocelot_em.model.regions import Region
from ocelot_em.model.search_space import SearchSpace
from ocelot_em.store import attributes as fmt
from ocelot_em.store.search_info import OneMap, SearchInfo


def converted(
    maps: Mapping[str, object], info: SearchInfo, place: str, convert: Callable[[object], OneMap]
) -> tuple[dict[str, OneMap], list[str]]:
    """Required maps, converted to NumPy, and the problems of those that cannot be converted."""
    converted: dict[str, OneMap] = {}
    problems: list[str] = []
    if not info.has_counts and is_map_of_counts(maps.get(COUNT)):
        problems.append(
            f"{place}: {COUNT}: expected one count for all pixels, got a map; a partial with a map "
            "of counts needs SearchInfo(has_counts=True)"
        )
    for key in info.maps.partial:
        try:
            converted[key] = convert(maps[key])
        except KeyError:
            stated = "; expected a map, as SearchInfo(has_counts=True) states" * (key == COUNT)
            problems.append(f"{place}: {key}: missing{stated}")
        except (TypeError, ValueError, RuntimeError) as error:  # such as torch's bfloat16
            problems.append(f"{place}: {key}: cannot become a NumPy array: {error}")
    return converted, problems


def is_map_of_counts(value: object) -> bool:
    """Whether counts differ from pixel to pixel, rather than being one number for all of them."""
    if isinstance(value, list | tuple):
        return len(value) > 1
    return math.prod(getattr(value, "shape", ())) > 1  # of any device


def layout_problems(
    layouts: Mapping[str, tuple[tuple[int, ...], "np.dtype[Any]"]],
    shape: tuple[int, ...] | None,
    info: SearchInfo,
    place: str,
) -> list[str]:
    """Problems with the shapes (None: any) and dtypes of a partial's maps, if they are there."""
    problems = []
    for key, (own_shape, dtype) in layouts.items():
        allowed = [d for d in MAPS[key].dtypes if info.float64_sums or d != "float64"]
        if key == INDEX:
            allowed.append("int64")  # checked against the search space, then stored as int32
        if key == COUNT and dtype.kind in "iu":  # checked against the highest, stored as int64
            allowed.append(dtype.newbyteorder("=").name)
        if dtype.newbyteorder("=").name not in allowed:
            problems.append(f"{place}: {key}: expected dtype {' or '.join(allowed)}, got {dtype}")
        if shape is not None and own_shape != shape:
            problems.append(f"{place}: {key}: expected shape {shape}, got {own_shape}")
    return problems


def value_problems(
    maps: Mapping[str, AnyArray],
    region: Region,
    info: SearchInfo,
    place: str,
    count: int | None = None,
) -> list[str]:
    """Problems with values, each with its first pixel; missing maps are ignored."""
    found = BadValues(place, info.search_space, count)
    own = {key: maps[key] for key in (*info.maps.partial, COUNT) if key in maps}
    found.look(own, (region.y0, region.x0))
    return found.problems()


class BadValues:
    """Values that no search produces, found in a result's maps part by part.

    They are NaN and infinities, except in a pose where ``mip`` is -inf; negative sums of squares;
    indices outside the search space, if that is known; -1 where something was searched; counts that
    are negative, above ``count`` if that is known, or 0 where something was searched.
    """

    def __init__(
        self, place: str, space: SearchSpace | None = None, count: int | None = None
    ) -> None:
        self._place = f"{place}: " if place else ""
        self._n_poses = space.n_poses if space is not None else None
        self._count = count
        self._found: dict[str, tuple[int, tuple[int, ...]]] = {}
        self._infinite: set[str] = set()
        self._outside: dict[str, list[int]] = {}

    def look(self, maps: Mapping[str, AnyArray], origin: tuple[int, ...]) -> None:
        """Check one part of all or some maps, which begins at ``origin``, on their own device.

        Without ``mip``, all pixels count as searched. The arrays may lack leading axes.
        """
        searched = maps[MIP] > -np.inf if MIP in maps else None
        if self._count == 0 and searched is not None:
            self._note(_UNCOUNTED, searched, origin)
        for key, values in maps.items():
            if key == INDEX:
                self._look_at_index(values, searched, origin)
            elif key == COUNT:
                end = MAX_COUNT if self._count is None else self._count
                self._look_outside(_WRONG_COUNT, values, (values < 0) | (values > end), origin)
                if searched is not None and self._count != 0:
                    self._note(_NOT_COUNTED, (values == 0) & searched, origin)
            elif values.dtype.kind == "f":
                bad = ~(values < np.inf) if key == MIP else ~np.isfinite(values)
                if key in POSES and searched is not None:
                    bad &= searched
                problem = f"{key}: {{kind}} {{where}}"
                if self._note(problem, bad, origin) and np.isinf(values[bad]).any():
                    self._infinite.add(problem)
                if key == SQUARED_SUM:
                    self._note(_NEGATIVE, (values < 0) & ~bad, origin)

    def _look_at_index(
        self, index: AnyArray, searched: AnyArray | None, origin: tuple[int, ...]
    ) -> None:
        end = np.iinfo(np.int32).max if self._n_poses is None else self._n_poses
        outside = (index < NOT_SEARCHED) | (index >= end)
        problem = _OUTSIDE_ANY if self._n_poses is None else _OUTSIDE
        self._look_outside(problem, index, outside, origin)
        if searched is not None:
            self._note(_MISSING, (index == NOT_SEARCHED) & searched, origin)

    def _look_outside(
        self, problem: str, values: AnyArray, outside: AnyArray, origin: tuple[int, ...]
    ) -> None:
        """Count integers out of range, and keep the lowest and the highest."""
        if self._note(problem, outside, origin):
            found = self._outside.setdefault(problem, [])
            found += [int(values[outside].min()), int(values[outside].max())]

    def _note(self, problem: str, bad: AnyArray, origin: tuple[int, ...]) -> bool:
        """Count bad pixels; return whether there are any."""
        n_before, first = self._found.setdefault(problem, (0, ()))  # this fixes their order
        if not bad.any():
            return False
        within = np.unravel_index(int(bad.argmax()), bad.shape)
        n_leading = len(origin) - bad.ndim
        ends = (start + int(n) for start, n in zip(origin[n_leading:], within, strict=True))
        first = first or (*origin[:n_leading], *ends)
        self._found[problem] = n_before + int(np.count_nonzero(bad)), first
        return True

    def problems(self) -> list[str]:
        """Describe all problems, map by map."""
        return [
            self._place
            + problem.format(
                where=f"at {n} pixel{'s' * (n > 1)}, first {first}",
                first=first,
                kind="NaN or infinite" if problem in self._infinite else "NaN",
                last=(self._n_poses or 0) - 1,
                count=MAX_COUNT if self._count is None else self._count,
                got="got {} to {}".format(*_ends(self._outside.get(problem, [0]))),
            )
            for problem, (n, first) in self._found.items()
            if n
        ]


def _ends(values: Sequence[int]) -> tuple[int, int]:
    return min(values), max(values)


_UNCOUNTED = f"{COUNT}: 0, but {MIP} was searched, first at pixel {{first}}"
_NOT_COUNTED = f"{COUNT}: 0 where {MIP} was searched {{where}}"
_WRONG_COUNT = f"{COUNT}: expected 0 to {{count}}, {{got}} {{where}}"
_NEGATIVE = f"{SQUARED_SUM}: negative {{where}}"
_MISSING = f"{INDEX}: -1 where {MIP} was searched {{where}}"
_OUTSIDE_ANY = f"{INDEX}: expected -1 or more, {{got}} {{where}}"
_OUTSIDE = (
    f"{INDEX}: expected -1 to {{last}}, {{got}} {{where}}; either the search space is another one, "
    "or this is Leopard-EM 1.2's wrong index in the last batch, when the number of orientations is "
    "no multiple of the batch size: search again with a batch size that divides it"
)


_PARTIAL_NAME = TypeAdapter(fmt.PartialName)


def name_problems(name: str, what: str = "partial name") -> list[str]:
    """Problems with the name of a partial or an exposure."""
    try:
        _PARTIAL_NAME.validate_python(name)
    except ValidationError:
        return [
            f"{what} {name!r}: expected up to 128 letters, digits, '.', '_' and '-', "
            "starting with a letter or digit"
        ]
    if name == "zarr.json":
        return [f"{what} {name!r}: is the name of Zarr's own metadata"]
    return []
