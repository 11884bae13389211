"""Search of maps for candidates that the merge did not record.

A montage shows one exposure in each pixel. The maps of an exposure where others may be shown are
merged again from its partials, in memory, so that candidates do not depend on the tiles.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from ocelot_em.merge.merge import merge_in_memory
from ocelot_em.merge.result import MergedResult
from ocelot_em.merge.stats.collected import CANDIDATE_FIELDS, GATHERED, neighbours_of
from ocelot_em.model.maps import COUNT, MIP, SCALED_MIP, AnyArray, Float64
from ocelot_em.model.progress import OnProgress
from ocelot_em.model.regions import Region, Tile, TileGrid
from ocelot_em.model.threads import map_in_threads

Rule = Callable[[AnyArray, AnyArray], AnyArray]
"""Returns from ``mip`` and z-scores which pixels are candidates."""

_WINDOW = 1022
"""Edge of the windows that are merged again; one pixel more on each side has the neighbours."""


def scan(
    merged: MergedResult,
    rules: Sequence[Rule],
    on_progress: OnProgress = lambda _phase, _share: None,
) -> list[Float64]:
    """Search maps chunk by chunk for the shown candidates of each exposure.

    Return rows of :data:`CANDIDATE_FIELDS` for each exposure; ``rules`` has one rule for each.
    """

    def look(region: Region) -> list[tuple[int, Float64]]:
        there = merged.plan.touching(region)
        if not there:
            return []
        mip, z = merged.read(region, MIP), merged.read(region, SCALED_MIP)
        maps = {MIP: mip, SCALED_MIP: z}

        def rows_at(where: AnyArray, z: AnyArray, origin: tuple[int, int]) -> Float64:
            for name in GATHERED if where.any() else ():
                if name in merged.maps and name not in maps:
                    maps[name] = merged.read(region, name)
            return _rows_at(where, z, maps, region.shifted(-origin[0], -origin[1]))

        if not merged.plan.has_parts:
            return [(0, rows_at(rules[0](mip, z), z, (0, 0)))]
        numbers = merged.read(region, merged.source)
        found = []
        for k in there:
            exposure = merged.plan.exposures[k]
            own = numbers == exposure.number
            where = own.copy()
            where[own] = rules[k](mip[own], z[own])
            own_z = np.where(own, z, np.float32(np.nan))
            found.append((k, rows_at(where, own_z, exposure.origin)))
        return found

    found: list[list[Float64]] = [[np.empty((0, len(CANDIDATE_FIELDS)))] for _ in rules]
    regions = list(merged.regions())
    for number, own in enumerate(map_in_threads(look, regions), 1):
        for k, rows in own:
            found[k].append(rows)
        on_progress("reading maps", number / len(regions))
    return [np.concatenate(rows) for rows in found]


def own_regions(
    merged: MergedResult, position: int, *names: str
) -> Iterator[tuple[Region, Mapping[str, AnyArray]]]:
    """Yield regions that have all valid pixels of an exposure, in its coordinates, with maps.

    Raises
    ------
    OcelotError
        Maps, or the partials of an exposure of a montage, cannot be read.
    """
    if merged.plan.has_parts:
        yield from OwnMaps(merged, position).regions(*names)
        return
    for region in merged.regions():
        yield region, {name: merged.read(region, name) for name in names}


def exact_count(
    merged: MergedResult, own: "Callable[[int], OwnMaps]", position: int, y: int, x: int
) -> int:
    """Return the number of cross-correlations of a pixel, which float64 rows round above 2**53.

    ``own`` returns the maps of an exposure that is hidden there.

    Raises
    ------
    OcelotError
        The map, or the partials of an exposure that is hidden there, cannot be read.
    """
    exposure, pixel = merged.plan.exposures[position], Region(y, y + 1, x, x + 1)
    shown = pixel.shifted(*exposure.origin)
    if merged.plan.has_parts and merged.read(shown, merged.source)[0, 0] != exposure.number:
        return int(own(position).merge(pixel)[COUNT][0, 0])
    return int(merged.read(shown, COUNT)[0, 0])


class OwnMaps:
    """The maps of one exposure of a montage, shown or hidden."""

    def __init__(self, merged: MergedResult, position: int) -> None:
        self._merged, self._exposure = merged, merged.plan.exposures[position]
        self._job = merged.job_alone(position, _WINDOW + 2)

    def candidates(self, rule: Rule) -> Float64:
        """Search the windows that other exposures touch; rows as those of :func:`scan`.

        Raises
        ------
        OcelotError
            The exposure's partials cannot be read.
        """

        def look(window: Region) -> Float64:
            around = self._grown(window)
            maps = self.merge(around)
            where = np.zeros(around.shape, np.bool_)
            inside = window.relative_to(around).slices
            where[inside] = rule(maps[MIP][inside], maps[SCALED_MIP][inside])
            return _rows_at(where, maps[SCALED_MIP], maps, around)

        touched = (window for window in self._windows() if self._touches_others(window))
        return np.concatenate(
            [np.empty((0, len(CANDIDATE_FIELDS))), *map_in_threads(look, touched)]
        )

    def regions(self, *names: str) -> Iterator[tuple[Region, Mapping[str, AnyArray]]]:
        """Yield regions that have all valid pixels, in exposure coordinates, and these maps."""
        for window in self._windows():
            if self._touches_others(window):
                yield window, self.merge(window)
            else:
                region = window.shifted(*self._exposure.origin)
                yield window, {name: self._merged.read(region, name) for name in names}

    def _windows(self) -> Iterator[Region]:
        grid = TileGrid(self._exposure.shape, (_WINDOW, _WINDOW))
        counted = self._exposure.counted
        return (tile.region.intersect(counted) for tile in grid.touching(counted))

    def _grown(self, window: Region) -> Region:
        """Return a window with the neighbours of its pixels."""
        around = Region(window.y0 - 1, window.y1 + 1, window.x0 - 1, window.x1 + 1)
        return around.intersect(self._exposure.counted)

    def _touches_others(self, window: Region) -> bool:
        """Whether another exposure may be shown in a window or next to it."""
        on_canvas = self._grown(window).shifted(*self._exposure.origin)
        return len(self._merged.plan.touching(on_canvas)) > 1

    def merge(self, region: Region) -> Mapping[str, AnyArray]:
        """Merge pixels of the exposure; at most one window with its neighbours."""
        return merge_in_memory(self._job, Tile(0, 0, region.shifted(*self._exposure.origin)))


def _rows_at(where: AnyArray, z: AnyArray, maps: Mapping[str, AnyArray], region: Region) -> Float64:
    """Return the rows of candidates; ``region`` has the pixels in exposure coordinates."""
    y, x = np.divmod(np.flatnonzero(where), where.shape[1])
    rows = np.full((len(y), len(CANDIDATE_FIELDS)), np.nan)
    if not len(y):
        return rows
    values: dict[str, AnyArray] = {"y": y + region.y0, "x": x + region.x0}
    values |= {name: maps[name][y, x] for name in GATHERED if name in maps}
    values |= dict(neighbours_of(z, y, x))
    with np.errstate(invalid="ignore"):  # damaged maps may contain signalling NaN
        for name, own in values.items():
            rows[:, CANDIDATE_FIELDS.index(name)] = own
    return rows
