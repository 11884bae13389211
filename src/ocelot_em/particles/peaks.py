"""Peak selection among candidates, and subpixel positions of peaks."""

from collections.abc import Sequence
from math import cos, radians
from typing import Final

import numpy as np
from numpy.typing import ArrayLike

from ocelot_em.errors import InvalidInputError
from ocelot_em.model.maps import AnyArray, Float64, Int64
from ocelot_em.particles.symmetry import ANGLE_ERROR, quaternions

Orientations = Sequence[AnyArray]
"""Euler angles (ZYZ) phi, theta and psi of candidates in degrees, and perhaps the numbers of their
templates, (n,) each."""

MAX_CELLS = 2**24
"""Maximum number of cells, of 4 bytes, in which rows are looked up; a power of 2."""

_NO_SYMMETRY: Final[Float64] = np.array([[0.0, 0.0, 0.0, 1.0]])
"""The group C1, as quaternions."""


def select_peaks(
    y: ArrayLike,
    x: ArrayLike,
    height: ArrayLike,
    min_distance_px: float,
    orientations: Orientations | None = None,
    min_angle_degrees: float = 180.0,
) -> Int64:
    """Select peaks among candidates: highest first, each suppressing its close neighbours.

    Leopard-EM does the same by comparing all pairs. Here, a candidate is compared only with the few
    selected peaks around it, so the time is proportional to the number of candidates (about a
    second for 10^6).

    ``y`` and ``x`` are (n,) integer pixels, of which several candidates may share one; ``height``
    is (n,) z-score, ``mip`` or -ln p, and candidates with NaN are ignored. Candidates at a
    Euclidean distance below ``min_distance_px`` are suppressed; 0 suppresses none. With
    ``orientations``, only those are suppressed that also differ by a rotation of at most
    ``min_angle_degrees``; an unknown orientation (NaN) differs from none, and neither does that of
    another template, with which it cannot be compared.

    Return indices of the selected peaks by descending height, ties by y, then x, then phi, theta,
    psi and template. The selection does not depend on the order of the candidates.
    """
    ys, xs, heights = np.asarray(y), np.asarray(x), np.asarray(height, np.float64)
    any_angle = orientations is None or min_angle_degrees >= 180
    angles = [] if orientations is None else [np.asarray(own, np.float64) for own in orientations]
    _check(ys, xs, heights, min_distance_px)
    real = np.flatnonzero(~np.isnan(heights))
    keys = xs[real], ys[real], -heights[real]
    order = real[np.lexsort((*(own[real] for own in reversed(angles)), *keys))]
    if not order.size or min_distance_px == 0:
        return order
    rows, columns = (own[order].astype(np.int64) for own in (ys, xs))
    rows, columns = rows - rows.min(), columns - columns.min()
    places = np.arange(order.size, dtype=np.int32)
    turned = _NO_SYMMETRY
    if not any_angle:
        templates = [own[order] for own in angles[3:]]
        turned = np.column_stack([quaternions(*(a[order] for a in angles[:3])), *templates])
    # No more cells than candidates.
    area = (rows.max() + 1.0) * (columns.max() + 1.0)
    area = min(area, order.size * max(min_distance_px, 1.0) ** 2)
    limits = min_distance_px, 180.0 if any_angle else min_angle_degrees
    placed = rows, columns.astype(np.int32), places * (not any_angle)
    return order[Suppression(turned, limits, area).choose(placed)]


class Suppression:
    """Rows that no earlier row nearby suppresses: 20 bytes each, and cells to find them by place.

    ``orientations`` are quaternions (n, 4), and perhaps a fifth column, the number of the template:
    orientations of different templates are never different. A row is suppressed if its distance in
    pixels from one that was chosen is below the first of ``limits`` and their orientations differ
    by at most the second, in degrees; from 180, any two orientations are near. ``area`` in pixels
    is that in which the rows are; a wrong one only makes the search longer. ``group``: quaternions
    (n, 4) of the rotations that leave the template as it is.
    """

    def __init__(
        self,
        orientations: Float64,
        limits: tuple[float, float],
        area: float,
        group: Float64 = _NO_SYMMETRY,
    ) -> None:
        distance, angle = limits
        turns: Float64 = np.zeros((len(orientations), 5))
        turns[:, : orientations.shape[1]] = orientations
        self._turns = turns, group, np.empty_like(group)
        cosine = cos(radians(min(angle + ANGLE_ERROR, 180) / 2)) if angle < 180 else 0.0
        # Pixels closer than a cell's edge are in the same cell or a neighbouring one. The edge is
        # slightly longer than the distance, so rounding cannot move a pixel one cell too far.
        edge = max(distance, 1.0) * (1 + 1e-6)
        self._limits = float(distance**2), cosine, edge
        wanted = 2 ** int(max(area / edge**2, 1.0)).bit_length()
        self._last = np.full(min(wanted, MAX_CELLS), -1, np.int32)
        self._kept = [np.empty(0, dtype) for dtype in ("i8", "i4", "i4", "i4")]
        self._n = 0

    def choose(self, rows: tuple[Int64, AnyArray, AnyArray]) -> AnyArray:
        """Return which of these rows are chosen; they follow those of earlier calls.

        ``rows``: y (int64), x (int32), not negative, and number of the orientation (int32).
        """
        from ocelot_em.kernels.suppression import suppress

        n = len(rows[0])
        chosen = np.ones(n, np.bool_)
        if not n or self._limits[0] == 0:
            return chosen
        for array in self._kept:
            if self._n + n > len(array):
                array.resize(max(self._n + n, len(array) * 5 // 4), refcheck=False)
        kept = (*self._kept, self._last)
        self._n = suppress(rows, self._turns, self._limits, kept, self._n, chosen)
        return chosen


def _check(ys: AnyArray, xs: AnyArray, heights: Float64, distance: float) -> None:
    problems = []
    if ys.ndim != 1 or not ys.shape == xs.shape == heights.shape:
        problems.append(
            "y, x, height: expected one-dimensional arrays of equal length, got shapes "
            f"{ys.shape}, {xs.shape}, {heights.shape}"
        )
    problems += [
        f"{name}: expected integer pixels, got {values.dtype}"
        for name, values in (("y", ys), ("x", xs))
        if values.size and values.dtype.kind not in "iu"
    ]
    if not distance >= 0:
        problems.append(f"min_distance_px: expected 0 or more pixels, got {distance}")
    if problems:
        raise InvalidInputError(problems)


def subpixel_offsets(neighbourhood: ArrayLike) -> tuple[Float64, Float64]:
    """Return subpixel offsets of peaks: parabola vertices through three values per axis.

    ``neighbourhood`` is (..., 3, 3) float: z-scores around peaks, axes (y, x), NaN where there is
    no pixel or it was not searched. Return dy and dx in pixels, of the leading shape, from -0.5 to
    0.5; 0 along an axis where any of the three values is not finite, or where they have no maximum.
    """
    values = np.asarray(neighbourhood, np.float64)
    if values.shape[-2:] != (3, 3):
        raise InvalidInputError(
            f"neighbourhood: expected shape (..., 3, 3) around each peak, got {values.shape}"
        )
    return _vertex(values[..., :, 1]), _vertex(values[..., 1, :])


def _vertex(three: Float64) -> Float64:
    """Return the vertex (...,) of parabolas through (..., 3) values at -1, 0 and 1."""
    finite = np.isfinite(three).all(axis=-1, keepdims=True)
    before, middle, after = np.moveaxis(np.where(finite, three, 0.0), -1, 0)
    bend = 2 * middle - before - after
    top = bend > 0
    offset = np.where(top, (after - before) / np.where(top, 2 * bend, 1.0), 0.0)
    return np.clip(offset, -0.5, 0.5)
