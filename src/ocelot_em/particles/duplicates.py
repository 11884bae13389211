"""The same particle in several exposures or in two searches, by positions and poses."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ocelot_em.errors import InvalidInputError
from ocelot_em.model.maps import AnyArray, Float64, Int64
from ocelot_em.particles.symmetry import ANGLE_ERROR, rotation_between

ROUNDING_PX = 1e-6
"""Distances that differ by less are equal; positions in pixels of another size are rounded."""


@dataclass(frozen=True)
class Tolerances:
    """Maximum differences between two peaks of one particle.

    ``distance_px`` (pixels on the canvas, exclusive) should cover errors of the exposures' origins.
    ``angle_degrees`` (rotation between the orientations, inclusive) should be at least the angular
    step of the search; 180 accepts any, for example for a symmetric molecule. ``defocus_angstrom``
    is inclusive.
    """

    distance_px: float = 5.0
    angle_degrees: float = 10.0
    defocus_angstrom: float = 500.0

    def __post_init__(self) -> None:
        problems = [
            f"{name}: expected 0 or more, got {value}"
            for name, value in (
                ("distance_px", self.distance_px),
                ("angle_degrees", self.angle_degrees),
                ("defocus_angstrom", self.defocus_angstrom),
            )
            if not value >= 0
        ]
        if problems:
            raise InvalidInputError(problems)


@dataclass(frozen=True)
class Peaks:
    """Peaks by column, (n,) each: pixels on the canvas, Euler angles (ZYZ) in degrees."""

    exposure: AnyArray
    y: AnyArray
    x: AnyArray
    phi: AnyArray
    theta: AnyArray
    psi: AnyArray
    defocus_angstrom: AnyArray

    def __len__(self) -> int:
        return len(self.y)


def join_duplicates(peaks: Peaks, order: ArrayLike, tolerances: Tolerances) -> Int64:
    """Find peaks of different exposures that are the same particle.

    Peaks are processed in the given order. A peak that matches a particle of other exposures is a
    duplicate of it (of the first such particle, if there are several); any other peak is a new
    particle. A particle has at most one peak per exposure.

    ``order`` has the (n,) indices of all peaks, preferred peaks first. A NaN pose matches none.
    Return for each peak the index of the peak that represents its particle, which may be its own.
    """
    from scipy.spatial import cKDTree

    stands_for = np.arange(len(peaks), dtype=np.int64)
    if not len(peaks) or tolerances.distance_px == 0:
        return stands_for
    positions = np.column_stack([peaks.y, peaks.x]).astype(np.float64)
    # The tree includes pairs at exactly this distance; the strict comparison follows.
    near = cKDTree(positions).query_pairs(tolerances.distance_px, output_type="ndarray")
    i, j = near[:, 0], near[:, 1]
    squared = np.square(positions[i] - positions[j]).sum(axis=1)
    agree = (squared < tolerances.distance_px**2) & (peaks.exposure[i] != peaks.exposure[j])
    i, j = i[agree], j[agree]
    agree = _poses_agree(peaks, i, j, tolerances)
    i, j = i[agree], j[agree]
    rank = np.empty(len(peaks), np.int64)
    rank[np.asarray(order, np.int64)] = np.arange(len(peaks))
    # Pairs in order of the later peak's rank, then of the earlier peak's.
    earlier, later = np.where(rank[i] < rank[j], i, j), np.where(rank[i] < rank[j], j, i)
    in_turn = np.lexsort((rank[earlier], rank[later]))
    seen_in: dict[int, set[int]] = {}
    for first, second in zip(earlier[in_turn].tolist(), later[in_turn].tolist(), strict=True):
        if stands_for[second] != second or stands_for[first] != first:
            continue
        known = seen_in.setdefault(first, {int(peaks.exposure[first])})
        exposure = int(peaks.exposure[second])
        if exposure not in known:
            known.add(exposure)
            stands_for[second] = first
    return stands_for


def _poses_agree(peaks: Peaks, i: Int64, j: Int64, tolerances: Tolerances) -> AnyArray:
    defocus = peaks.defocus_angstrom.astype(np.float64)
    agree: AnyArray = np.abs(defocus[i] - defocus[j]) <= tolerances.defocus_angstrom
    if tolerances.angle_degrees < 180:
        angle = rotation_between(*((a[i], a[j]) for a in (peaks.phi, peaks.theta, peaks.psi)))
        agree &= angle <= tolerances.angle_degrees + ANGLE_ERROR
    return agree


def join_nearest(one: Float64, other: Float64, max_distance: float) -> tuple[Int64, Int64]:
    """Join points of two sets in ascending order of their distance, each at most once.

    Points are (n, k) and (m, k). Pairs at equal distances are taken in the order of their middles,
    y first, so that exchanging the sets exchanges the results. Return the indices of the pairs.
    """
    from scipy.spatial import cKDTree

    if not len(one) or not len(other):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    limit = max_distance + ROUNDING_PX
    near = cKDTree(one).sparse_distance_matrix(cKDTree(other), limit, output_type="ndarray")
    i, j = near["i"], near["j"]
    distance, middle = (np.round(own / ROUNDING_PX) for own in (near["v"], one[i] + other[j]))
    order = np.lexsort((i + j, *middle.T[::-1], distance))
    taken: tuple[set[int], set[int]] = (set(), set())
    pairs = []
    for first, second in zip(i[order].tolist(), j[order].tolist(), strict=True):
        if first not in taken[0] and second not in taken[1]:
            taken[0].add(first)
            taken[1].add(second)
            pairs.append((first, second))
    joined = np.array(sorted(pairs), np.int64).reshape(-1, 2)
    return joined[:, 0], joined[:, 1]
