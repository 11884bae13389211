"""What a tile of a canvas shows: maps of exposures, laid one after another.

One exposure wins a pixel, for every map. What nobody searched loses against what somebody did;
apart from that, the earliest laid keeps its pixels (``earliest``), or a later one takes those where
its z-score is higher (``max-zscore``) or its edge is farther (``farthest-from-edge``). Exposures
are laid in the order of acquisition, so that ties go to the earliest.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from ocelot_em import kernels
from ocelot_em.model.maps import MAPS, MIP, SCALED_MIP, SOURCE_EXPOSURE, AnyArray, Float64, MapSet
from ocelot_em.model.regions import Overlap, Region
from ocelot_em.model.workspace import Workspace

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


Maps = Iterator[tuple[str, AnyArray]]
"""Maps of a tile that are finished, by name."""


class WholeTile:
    """A tile that one exposure covers alone: its maps are finished as they come.

    Parameters
    ----------
    number
        Of the exposure.
    maps
        Which maps there are; those of a montage include the number of the exposure.
    shape
        Of the tile.
    """

    def __init__(self, number: int, maps: MapSet, shape: tuple[int, int]) -> None:
        self._number, self._is_montage, self._shape = number, maps.exposures, shape
        self._shown = np.zeros(len(SHOWN_FIELDS))

    def place(self, *_: object) -> None:
        """Nothing has to be known of the exposure."""

    def put(self, name: str, values: AnyArray) -> Maps:
        """Pass a map on."""
        yield name, values
        if self._is_montage and name == SCALED_MIP:
            tally = kernels.load_place().tally_alone(values.reshape(-1))
            self._shown[: len(tally)] = tally

    def maps(self) -> Maps:
        """Give the number of the exposure of every pixel, in a montage."""
        if self._is_montage:
            yield SOURCE_EXPOSURE, np.full(self._shape, self._number, np.int32)

    def shown(self, *_: object) -> Float64:
        """Return what the tile shows of the exposure: :data:`SHOWN_FIELDS`."""
        return self._shown


class Canvas:
    """One tile of a canvas after another, in memory that is kept.

    The order of calls: :meth:`begin` with a tile; for every exposure :meth:`place`, then
    :meth:`put` for each of its maps; then :meth:`maps` and :meth:`shown`.

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

    def place(self, number: int, within: Region, of: tuple[Region, Region]) -> None:
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

    def put(self, name: str, values: AnyArray) -> Maps:
        """Take a map of the exposure; its memory is not needed afterwards.

        Returns
        -------
        Iterator
            Nothing: no map of the tile is finished before the last exposure is placed.
        """
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
        """Give all maps of the tile, by name."""
        return ((name, self._plane(name)) for name in (*self._names, SOURCE_EXPOSURE))

    def shown(self, number: int, within: Region) -> Float64:
        """Add up what the tile shows of an exposure: :data:`SHOWN_FIELDS`."""
        covers = self._tile.array("covers", "u2")
        into = np.zeros((2, len(SHOWN_FIELDS) // 2))
        numbers, zs = (self._plane(n)[within.slices] for n in (SOURCE_EXPOSURE, SCALED_MIP))
        self._kernel.tally(numbers, np.int32(number), covers[within.slices], zs, into)
        return into.reshape(-1)

    def _choose(self, z: AnyArray) -> None:
        """Find out in which pixels the exposure wins, from its z-scores."""
        piece = self._held[MIP], z, self._reach
        canvas = tuple(self._part(key) for key in (SOURCE_EXPOSURE, MIP, SCALED_MIP))
        reaches = self._tile.array("reach", "i4")[self._within.slices]
        taken = self._piece.array("taken", "?")
        self._kernel.choose(piece, np.int32(self._number), self._rule, (*canvas, reaches), taken)
        self._is_chosen = True

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
