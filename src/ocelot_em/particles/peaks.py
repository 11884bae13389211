"""Peak selection among candidates, and subpixel positions of peaks."""

from itertools import chain
from math import acos, degrees
from typing import cast

import numpy as np
from numpy.typing import ArrayLike

from ocelot_em.errors import InvalidInputError
from ocelot_em.model.maps import AnyArray, Float64, Int64
from ocelot_em.particles.symmetry import ANGLE_ERROR, quaternions

Orientations = tuple[AnyArray, AnyArray, AnyArray]
"""Euler angles (ZYZ) phi, theta and psi of candidates in degrees, (n,) each."""


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
    selected peaks around it, so the time is proportional to the number of candidates (a few seconds
    for 10^6).

    ``y`` and ``x`` are (n,) integer pixels, of which several candidates may share one; ``height``
    is (n,) z-score, ``mip`` or -ln p, and candidates with NaN are ignored. Candidates at a
    Euclidean distance below ``min_distance_px`` are suppressed; 0 suppresses none. With
    ``orientations``, only those are suppressed that also differ by a rotation of at most
    ``min_angle_degrees``; an unknown orientation (NaN) differs from none.

    Return indices of the selected peaks by descending height, ties by y, then x, then phi, theta
    and psi. The selection does not depend on the order of the candidates.
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
    rows, columns = ys[order].astype(np.int64), xs[order].astype(np.int64)
    # Pixels closer than a cell's side are in the same cell or a neighbouring one. The side is
    # slightly larger than the distance, so rounding cannot move a pixel one cell too far.
    side = max(min_distance_px, 1.0) * (1 + 1e-6)
    cell_y, cell_x = (_cells(positions, side) for positions in (rows, columns))
    stride = int(cell_x.max()) + 2
    around = [dy * stride + dx for dy in (0, -1, 1) for dx in (0, -1, 1)]
    limit = min_distance_px**2
    turned: Float64 = np.empty((0, 4)) if any_angle else quaternions(*(a[order] for a in angles))
    chosen: dict[int, list[tuple[int, int, int]]] = {}  # a few positions per cell
    kept = []
    for place, (cell, row, column) in enumerate(
        zip((cell_y * stride + cell_x).tolist(), rows.tolist(), columns.tolist(), strict=True)
    ):
        near = filter(None, map(chosen.get, map(cell.__add__, around)))
        for peak_y, peak_x, peak in chain.from_iterable(near):
            if (peak_y - row) ** 2 + (peak_x - column) ** 2 < limit and (
                any_angle or not _angle(turned[peak], turned[place]) > min_angle_degrees
            ):
                break
        else:
            chosen.setdefault(cell, []).append((row, column, place))
            kept.append(place)
    return cast(Int64, order[np.array(kept)])


def _angle(one: Float64, other: Float64) -> float:
    """Return the angle in degrees between two orientations, at most its rounding error too low."""
    return 2 * degrees(acos(min(abs(float(one @ other)), 1.0))) - ANGLE_ERROR


def _cells(positions: Int64, side: float) -> Int64:
    """Return the cell number of each position; the lowest is 1, leaving an empty cell 0."""
    cells: Float64 = np.floor((positions - positions.min()) / side)
    return cells.astype(np.int64) + 1


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
