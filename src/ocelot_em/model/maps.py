"""Names, dtypes, units and meaning of the maps, and the classes that hold them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
AnyArray = NDArray[Any]

MIP = "mip"
PIXEL_SIZE = "best_pixel_size"
POSES = ("best_phi", "best_theta", "best_psi", "best_defocus", PIXEL_SIZE)
INDEX = "best_global_index"
SUM = "correlation_sum"
SQUARED_SUM = "correlation_squared_sum"
COUNT = "total_projections"
BEST_PARTIAL = "best_partial"
SCALED_MIP = "scaled_mip"
MEAN = "correlation_mean"
STD = "correlation_std"
SOURCE_EXPOSURE = "source_exposure"
BEST_GROUP = "best_group"
SECOND_ZSCORE = "second_zscore"

NOT_SEARCHED = -1
"""Value of the integer maps where no device searched, or no exposure is placed."""


class Combine(StrEnum):
    """How the merged value of a pixel is derived from those of the partials."""

    DECIDES = "decides"
    """The values determine which partial wins; the merged value is the winner's."""
    FOLLOWS = "follows"
    """The winner's value."""
    ADDS = "adds"
    """The sum over all partials."""
    COMPUTED = "computed"
    """Computed at the end from other merged maps of the same pixel."""
    PLACED = "placed"
    """Determined when exposures or groups are placed on the canvas."""


@dataclass(frozen=True, slots=True)
class MapInfo:
    """Description of a map; the first of its allowed stored dtypes is the default."""

    combine: Combine
    meaning: str
    unit: str = "1"
    dtypes: tuple[str, ...] = ("float32",)
    fill: float | int = float("nan")


_DECIDES, _FOLLOWS, _ADDS, _COMPUTED, _PLACED = Combine
_FLOATS, _NUMBER = ("float32", "float64"), ("int32",)
MAPS: Mapping[str, MapInfo] = {
    MIP: MapInfo(_DECIDES, "highest cross-correlation"),
    "best_phi": MapInfo(_FOLLOWS, "Euler angle phi (ZYZ) of the highest", "degree"),
    "best_theta": MapInfo(_FOLLOWS, "Euler angle theta (ZYZ) of the highest", "degree"),
    "best_psi": MapInfo(_FOLLOWS, "Euler angle psi (ZYZ) of the highest", "degree"),
    "best_defocus": MapInfo(_FOLLOWS, "relative defocus of the highest", "angstrom"),
    PIXEL_SIZE: MapInfo(_FOLLOWS, "pixel-size offset of the highest", "angstrom"),
    INDEX: MapInfo(
        _DECIDES, "index of the highest in the search space", "1", _NUMBER, NOT_SEARCHED
    ),
    SUM: MapInfo(_ADDS, "sum over all cross-correlations", "1", _FLOATS),
    SQUARED_SUM: MapInfo(_ADDS, "sum of squared cross-correlations", "1", _FLOATS),
    COUNT: MapInfo(_ADDS, "number of cross-correlations in the sums", "1", ("int64",), 0),
    BEST_PARTIAL: MapInfo(_FOLLOWS, "number of the partial that won", "1", _NUMBER, NOT_SEARCHED),
    SCALED_MIP: MapInfo(_COMPUTED, "z-score: (mip - mean) / std"),
    MEAN: MapInfo(_COMPUTED, "mean of all cross-correlations"),
    STD: MapInfo(_COMPUTED, "standard deviation of all cross-correlations"),
    SOURCE_EXPOSURE: MapInfo(
        _PLACED, "number of the exposure that all maps come from", "1", _NUMBER, NOT_SEARCHED
    ),
    BEST_GROUP: MapInfo(
        _PLACED, "number of the group with the highest z-score", "1", _NUMBER, NOT_SEARCHED
    ),
    SECOND_ZSCORE: MapInfo(_PLACED, "second highest z-score of a group"),
}

DERIVED = (SCALED_MIP, MEAN, STD)
"""Maps that follow from ``mip``, sums and count."""

_ADDED = (COUNT, SUM, SQUARED_SUM)
"""The order in which sums are read; after the last one the statistics are computed."""


class PoseForm(StrEnum):
    """How the pose of the highest correlation is stored."""

    EXPLICIT = "explicit"
    INDEXED = "indexed"


@dataclass(frozen=True, slots=True)
class MapSet:
    """The maps of a result: its pose form and optional maps.

    ``pixel_size``: it has ``best_pixel_size`` (explicit form; a decoded index always gives it).
    ``counts``: the count differs from pixel to pixel and is a map. ``decoded``: a merged result
    also has the pose maps of its indices. ``exposures``: a merged result is a montage, or, with
    ``groups``, made of groups. ``derived``: a merged result has :data:`DERIVED` maps; if not, its
    sums are float64, and they are computed when they are read.
    """

    form: PoseForm
    pixel_size: bool = True
    counts: bool = False
    decoded: bool = True
    exposures: bool = False
    derived: bool = True
    groups: bool = False

    @property
    def source(self) -> str:
        """Name of the map with the numbers of exposures, or of groups."""
        return BEST_GROUP if self.groups else SOURCE_EXPOSURE

    @property
    def with_derived(self) -> "MapSet":
        """The maps that can be read of a merged result, and of which a tile is made."""
        return replace(self, derived=True)

    def merged_dtype(self, name: str) -> str:
        """Dtype of a map of a merged result as it is stored."""
        return (
            "float64" if name in (SUM, SQUARED_SUM) and not self.derived else MAPS[name].dtypes[0]
        )

    @property
    def explicit_poses(self) -> tuple[str, ...]:
        """Names of the decoded pose maps."""
        return POSES if self.pixel_size else POSES[:-1]

    @property
    def pose(self) -> tuple[str, ...]:
        """Names of the maps of the winning pose, as a device stores them."""
        return (INDEX,) if self.form is PoseForm.INDEXED else self.explicit_poses

    @property
    def computed_poses(self) -> tuple[str, ...]:
        """Names of the pose maps of a merged result that are decoded from its index."""
        indexed = self.form is PoseForm.INDEXED
        return self.explicit_poses if indexed and self.decoded else ()

    @property
    def computed(self) -> tuple[str, ...]:
        """Names of the maps computed after all partials have been merged.

        They include the sums, which are kept as float64 until then and stored as float32.
        """
        return (SCALED_MIP, MEAN, STD, SUM, SQUARED_SUM, *self.computed_poses)

    @property
    def phases(self) -> tuple[tuple[str, ...], ...]:
        """Names of the maps that are read together, in the order in which a merge needs them.

        The first maps determine the winner, the next ones are for the statistics, the last ones
        follow the winner. A phase starts after all partials have been read for the previous one.
        """
        names = (*self.partial, BEST_PARTIAL)
        decide = tuple(name for name in names if MAPS[name].combine is Combine.DECIDES)
        add = sorted((n for n in names if MAPS[n].combine is Combine.ADDS), key=_ADDED.index)
        poses = [n for n in self.pose if MAPS[n].combine is Combine.FOLLOWS]
        return decide, (BEST_PARTIAL,), *((name,) for name in (*add, *poses))

    @property
    def partial(self) -> tuple[str, ...]:
        """Names of the maps of a partial."""
        return (MIP, *self.pose, SUM, SQUARED_SUM, *self._count)

    @property
    def merged(self) -> tuple[str, ...]:
        """Names of the maps of a merged result."""
        indexed = self.form is PoseForm.INDEXED
        poses = (*self.computed_poses, INDEX) if indexed else self.explicit_poses
        statistics = (*DERIVED * self.derived, SUM, SQUARED_SUM, *self._count)
        placed = (self.source,) * self.exposures + (SECOND_ZSCORE,) * self.groups
        return (MIP, *poses, BEST_PARTIAL, *statistics, *placed)

    @property
    def _count(self) -> tuple[str, ...]:
        return (COUNT,) * self.counts


@dataclass(frozen=True, slots=True)
class PartialMaps:
    """The maps of one partial over one region, as input of a kernel.

    Arrays are C-contiguous and of one shape (y, x).

    ``mip`` is float32, -inf where the device searched nothing. Explicit poses are four or five
    float32 maps in the order of :data:`POSES`, indexed ones one int32 map. Sums are float32 or
    float64. ``count`` is the number of cross-correlations in them: one integer, or an int64 map.
    ``best_partial`` is the number of this partial in the stated order; for an earlier merge, an
    int32 map of them.
    """

    mip: Float32
    pose: tuple[AnyArray, ...]
    correlation_sum: AnyArray
    correlation_squared_sum: AnyArray
    count: int | Int64
    best_partial: int | Int32


@dataclass(slots=True)
class Accumulator:
    """The merge of the partials so far: running maximum, its pose, sums in float64, count.

    Created by :func:`ocelot_em.kernels.reference.identity` or its faster equivalents. ``count_map``
    replaces ``count`` if counts differ from pixel to pixel, and is None otherwise.
    """

    mip: Float32
    pose: tuple[AnyArray, ...]
    best_partial: Int32
    correlation_sum: Float64
    correlation_squared_sum: Float64
    count_map: Int64 | None
    count: int = 0

    @classmethod
    def allocate(cls, maps: MapSet, plane: Callable[[str, str], AnyArray]) -> "Accumulator":
        """Return an accumulator of arrays that ``plane`` returns for a map's name and dtype."""
        pose_dtype = "int32" if maps.form is PoseForm.INDEXED else "float32"
        return cls(
            mip=plane(MIP, "float32"),
            pose=tuple(plane(name, pose_dtype) for name in maps.pose),
            best_partial=plane(BEST_PARTIAL, "int32"),
            correlation_sum=plane(SUM, "float64"),
            correlation_squared_sum=plane(SQUARED_SUM, "float64"),
            count_map=plane(COUNT, "int64") if maps.counts else None,
        )
