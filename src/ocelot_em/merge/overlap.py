"""What a tile of a canvas shows: maps of exposures, laid one after another.

One exposure wins a pixel, for every map. What nobody searched loses against what somebody did;
apart from that, the earliest laid keeps its pixels (``earliest``), or a later one takes those where
its z-score is higher (``max-zscore``) or its edge is farther (``farthest-from-edge``). Exposures
are laid in the order of acquisition, so that ties go to the earliest.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from ocelot_em import kernels
from ocelot_em.merge.fold import Workspace
from ocelot_em.model.maps import MAPS, MIP, SCALED_MIP, SOURCE_EXPOSURE, AnyArray, Float64, MapSet
from ocelot_em.model.regions import Overlap, Region

SHOWN_FIELDS = (
    "pixels_alone",
    "z_alone",
    "squared_z_alone",
    "pixels_overlap",
    "z_overlap",
    "squared_z_overlap",
)
"""What is added up of the pixels that show an exposure: where it lies alone, and where others lie,
too; pixels, their z-scores, the squares of these."""


class Canvas:
    """One tile of a canvas after another, in memory that is kept.

    The order of calls: :meth:`begin` with a tile; for every exposure :meth:`lay`, then :meth:`put`
    for each of its maps; then :meth:`maps` and :meth:`shown`.

    Parameters
    ----------
    maps
        Which maps there are.
    overlap
        Who wins a pixel.
    most_pixels
        Of a tile.
    """

    def __init__(self, maps: MapSet, overlap: Overlap, most_pixels: int) -> None:
        self._names = tuple(name for name in maps.merged if name != SOURCE_EXPOSURE)
        self._kernel = kernels.load_place()
        self._rule = {
            "earliest": self._kernel.EARLIEST,
            "max-zscore": self._kernel.MAX_ZSCORE,
            "farthest-from-edge": self._kernel.FARTHEST,
        }[overlap]
        self._tile, self._piece = Workspace(most_pixels), Workspace(most_pixels)
        self._held: dict[str, AnyArray] = {}

    def begin(self, shape: tuple[int, int], covered: Sequence[Region]) -> None:
        """Start with an empty tile of this shape; ``covered`` are the parts that exposures have."""
        self._tile.shape = shape
        for name in (*self._names, SOURCE_EXPOSURE):
            self._plane(name).fill(MAPS[name].fill)
        covers = self._tile.array("covers", "u2")
        covers.fill(0)
        for region in covered:
            covers[region.slices] += 1

    def lay(self, number: int, within: Region, of: tuple[Region, Region]) -> None:
        """Start with what an exposure has of the tile.

        Parameters
        ----------
        number
            Of the exposure.
        within
            The pixels, in the tile.
        of
            The pixels, and all that are taken, in the exposure.
        """
        self._number, self._within = number, within
        self._piece.shape = within.shape
        self._held = {}
        self._is_chosen = False
        self._reach = _distances_from_edge(*of)

    def put(self, name: str, values: AnyArray) -> None:
        """Take a map of the exposure; its memory is not needed afterwards."""
        if self._is_chosen:
            self._put(name, values)
            return
        if name != SCALED_MIP:  # nobody knows yet who wins
            held = self._piece.array(f"held {name}", values.dtype)
            held[...] = values
            self._held[name] = held
            return
        piece = self._held[MIP], values, self._reach
        canvas = tuple(self._part(key) for key in (SOURCE_EXPOSURE, MIP, SCALED_MIP))
        reaches = self._tile.array("reach", "i4")[self._within.slices]
        taken = self._piece.array("taken", "?")
        self._kernel.choose(piece, np.int32(self._number), self._rule, (*canvas, reaches), taken)
        self._is_chosen = True
        for earlier, held in self._held.items():
            self._put(earlier, held)
        self._put(name, values)

    def maps(self) -> Iterator[tuple[str, AnyArray]]:
        """Give all maps of the tile, by name."""
        return ((name, self._plane(name)) for name in (*self._names, SOURCE_EXPOSURE))

    def shown(self, number: int, within: Region) -> Float64:
        """Add up what the tile shows of an exposure: :data:`SHOWN_FIELDS`."""
        covers = self._tile.array("covers", "u2")
        into = np.zeros((2, len(SHOWN_FIELDS) // 2))
        numbers, zs = (self._plane(n)[within.slices] for n in (SOURCE_EXPOSURE, SCALED_MIP))
        self._kernel.tally(numbers, np.int32(number), covers[within.slices], zs, into)
        return into.reshape(-1)

    def _put(self, name: str, values: AnyArray) -> None:
        self._kernel.put(values, self._piece.array("taken", "?"), self._part(name))

    def _plane(self, name: str) -> AnyArray:
        return self._tile.array(name, MAPS[name].dtypes[0])

    def _part(self, name: str) -> AnyArray:
        return self._plane(name)[self._within.slices]


def _distances_from_edge(region: Region, taken: Region) -> AnyArray:
    """How many pixels lie between each pixel and the nearest edge of what is taken, int32."""
    y, x = np.arange(region.y0, region.y1), np.arange(region.x0, region.x1)
    rows = np.minimum(y - taken.y0, taken.y1 - 1 - y).astype(np.int32)
    columns = np.minimum(x - taken.x0, taken.x1 - 1 - x).astype(np.int32)
    return np.minimum(rows[:, None], columns[None, :])


def shown_alone(zs: AnyArray) -> Float64:
    """Add up what a tile shows that belongs to one exposure alone: :data:`SHOWN_FIELDS`."""
    return np.array([*kernels.load_place().tally_alone(zs.reshape(-1)), 0.0, 0.0, 0.0])
