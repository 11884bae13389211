"""Compositing: a canvas tile from the maps of its exposures.

One exposure wins each pixel, for every map. A searched pixel always wins over an unsearched one.
Otherwise the exposure placed first keeps its pixels (``earliest``), or a later one wins those where
its z-score is higher (``max-zscore``) or its edge is farther away (``farthest-from-edge``).
Exposures are placed in the order of acquisition, so that the earliest wins ties.

Groups are placed on one another by ``max-zscore``; the second highest z-score is kept, too.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from ocelot_em.model.maps import MAPS, MIP, SCALED_MIP, SECOND_ZSCORE, AnyArray, Float64, MapSet
from ocelot_em.model.regions import Overlap, Region
from ocelot_em.model.workspace import Workspace
from ocelot_em.store.blosc import MergedMap

SHOWN_FIELDS = (
    "pixels_alone",
    "z_alone",
    "squared_z_alone",
    "pixels_overlap",
    "z_overlap",
    "squared_z_overlap",
)
"""Sums over the pixels that show an exposure, outside and inside overlaps: number of pixels,
z-scores, squared z-scores."""

Maps = Iterator[tuple[str, MergedMap]]
"""Finished maps of a tile, by name."""


class WholeTile:
    """A tile covered by a single exposure, whose maps are final; see :class:`Canvas`."""

    takes_planes = True
    """Whether maps may be bit planes, or encoded."""

    def __init__(self, number: int, maps: MapSet, shape: tuple[int, int]) -> None:
        self._number, self._maps, self._shape = number, maps, shape
        self._shown = np.zeros(len(SHOWN_FIELDS))

    def place(self, *_: object) -> None:
        """Do nothing; the exposure covers the whole tile."""

    def put(self, name: str, values: MergedMap) -> Maps:
        """Yield the map unchanged."""
        yield name, values
        if self._maps.exposures and name == SCALED_MIP and isinstance(values, np.ndarray):
            from ocelot_em.kernels import compositing  # on demand

            sums = compositing.sum_alone(values.reshape(-1))
            self._shown[: len(sums)] = sums

    def maps(self) -> Maps:
        """Yield the map of exposure numbers, in a montage."""
        if self._maps.exposures:
            yield self._maps.source, np.full(self._shape, self._number, np.int32)

    def shown(self, *_: object) -> Float64:
        """Return :data:`SHOWN_FIELDS` of the exposure in the tile."""
        return self._shown


class Canvas:
    """Composites one canvas tile after another in reused memory.

    The order of calls: :meth:`begin` for a tile; for every exposure :meth:`place`, then
    :meth:`put` for each of its maps; then :meth:`maps` and :meth:`shown`.
    """

    takes_planes = False

    def __init__(self, maps: MapSet, overlap: Overlap, max_pixels: int) -> None:
        # Exposures are chosen by z-score, stored or not.
        self._dtypes = {name: maps.merged_dtype(name) for name in maps.with_derived.merged}
        self._numbers, self._has_groups = maps.source, maps.groups
        from ocelot_em.kernels import compositing  # on demand

        self._kernel = compositing
        self._rule = {
            "earliest": self._kernel.EARLIEST,
            "max-zscore": self._kernel.MAX_ZSCORE,
            "farthest-from-edge": self._kernel.FARTHEST,
        }[overlap]
        self._tile, self._piece = Workspace(max_pixels), Workspace(max_pixels)
        self._held: dict[str, AnyArray] = {}

    def begin(self, shape: tuple[int, int], covered: Sequence[Region]) -> None:
        """Start an empty tile of this shape; ``covered`` are the regions of its exposures."""
        self._tile.shape = shape
        for name in {*self._dtypes, self._numbers}:  # a search without exposures stores no numbers
            self._plane(name).fill(MAPS[name].fill)
        n_covering = self._tile.array("n_covering", "u2")
        n_covering.fill(0)
        for region in covered:
            n_covering[region.slices] += 1

    def place(self, number: int, in_tile: Region, regions: tuple[Region, Region]) -> None:
        """Start the piece of an exposure, which has pixels ``in_tile``.

        ``regions`` are those of the piece and of all merged pixels, in the exposure's coordinates.
        """
        self._number, self._in_tile = number, in_tile
        self._piece.shape = in_tile.shape
        self._held = {}
        self._is_chosen = False
        self._edge_distance = _distances_from_edge(*regions)

    def put(self, name: str, values: MergedMap) -> Maps:
        """Place a map of the exposure; no map of the tile is finished before all are placed."""
        assert isinstance(values, np.ndarray)
        if self._is_chosen:
            self._put(name, values)
        elif name != SCALED_MIP:  # it is not known yet which exposure wins
            held = self._piece.array(f"held {name}", values.dtype)
            held[...] = values
            self._held[name] = held
        else:
            self._choose(values)
            for earlier, held in self._held.items():
                self._put(earlier, held)
            self._put(name, values)
        return iter(())

    def maps(self) -> Maps:
        """Return all maps of the tile by name."""
        return ((name, self._plane(name)) for name in self._dtypes)

    def shown(self, number: int, in_tile: Region) -> Float64:
        """Return :data:`SHOWN_FIELDS` of an exposure in the tile."""
        n_covering = self._tile.array("n_covering", "u2")
        sums = np.zeros((2, len(SHOWN_FIELDS) // 2))
        numbers, zs = (self._plane(n)[in_tile.slices] for n in (self._numbers, SCALED_MIP))
        self._kernel.tally(numbers, np.int32(number), n_covering[in_tile.slices], zs, sums)
        return sums.reshape(-1)

    def _choose(self, z: AnyArray) -> None:
        """Determine the pixels that the exposure wins, from its z-scores."""
        piece = self._held[MIP], z, self._edge_distance
        canvas = tuple(self._part(key) for key in (self._numbers, MIP, SCALED_MIP))
        edge_distances = self._tile.array("edge_distance", "i4")[self._in_tile.slices]
        taken = self._piece.array("taken", "?")
        self._kernel.choose(
            piece, np.int32(self._number), self._rule, (*canvas, edge_distances), taken
        )
        if self._has_groups:
            self._kernel.runner_up(z, self._part(SCALED_MIP), taken, self._part(SECOND_ZSCORE))
        self._is_chosen = True

    def _put(self, name: str, values: AnyArray) -> None:
        self._kernel.put(values, self._piece.array("taken", "?"), self._part(name))

    def _plane(self, name: str) -> AnyArray:
        return self._tile.array(name, self._dtypes.get(name, MAPS[name].dtypes[0]))

    def _part(self, name: str) -> AnyArray:
        return self._plane(name)[self._in_tile.slices]


def _distances_from_edge(region: Region, taken: Region) -> AnyArray:
    """Number of pixels between each pixel and the nearest edge of the merged region, int32."""
    y, x = np.arange(region.y0, region.y1), np.arange(region.x0, region.x1)
    rows = np.minimum(y - taken.y0, taken.y1 - 1 - y).astype(np.int32)
    columns = np.minimum(x - taken.x0, taken.x1 - 1 - x).astype(np.int32)
    return np.minimum(rows[:, None], columns[None, :])
