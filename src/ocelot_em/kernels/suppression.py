"""Suppression of rows near higher ones, by position and orientation, compiled by numba."""

from typing import Any

import numpy as np

from ocelot_em.kernels.compiling import compiled


@compiled
def suppress(rows: Any, turns: Any, limits: Any, kept: Any, n_kept: Any, chosen: Any) -> Any:
    """Choose rows, in their order, that are not near one chosen before; return how many are now.

    A row is near another if their squared distance is below the first of ``limits``, and if the
    product of their quaternions is not below the second, in absolute value, under any rotation that
    leaves the template as it is, or if their templates differ.

    ``rows``: y (int64), x (int32) and the number of the orientation (int32), (n,) each; positions
    are not negative. ``turns``: quaternions and the number of the template (n, 5), float64, of the
    orientations; quaternions (n, 4) of the rotations, and memory for as many as these. ``limits``:
    the two, and the edge of a cell in pixels, above the distance. ``kept``: y, x and orientation of
    all rows that were chosen, also by earlier calls, the number of the one before in the same cell,
    and the number of the last one of each cell; -1 is none. Cells share numbers if there are many,
    which only makes the search longer. ``chosen``: output mask.
    """
    ys, xs, numbers = rows
    orientations, group, same = turns
    squared_distance, cosine, edge = limits
    kept_ys, kept_xs, kept_numbers, before, last = kept
    n_cells = last.size
    for i in range(ys.size):
        y, x = ys[i], np.int64(xs[i])
        for g in range(len(group)):
            _multiply(group[g], orientations[numbers[i]], same[g])
        cell_y, cell_x = np.int64(y / edge), np.int64(x / edge)
        is_near = False
        for dy in (0, -1, 1):
            for dx in (0, -1, 1):
                k = last[_cell(cell_y + dy, cell_x + dx, n_cells)]
                while k >= 0 and not is_near:
                    down, across = np.float64(y - kept_ys[k]), np.float64(x - kept_xs[k])
                    if down * down + across * across < squared_distance:
                        other = orientations[kept_numbers[k]]
                        is_near = orientations[numbers[i], 4] != other[4]
                        is_near = is_near or _is_similar(same, other, cosine)
                    k = before[k]
        chosen[i] = not is_near
        if not is_near:
            cell = _cell(cell_y, cell_x, n_cells)
            kept_ys[n_kept], kept_xs[n_kept] = y, x
            kept_numbers[n_kept], before[n_kept] = numbers[i], last[cell]
            last[cell] = n_kept
            n_kept += 1
    return n_kept


@compiled
def _multiply(one: Any, other: Any, into: Any) -> None:
    """Multiply quaternions x, y, z, w; the other one is applied first."""
    x, y, z, w = one[0], one[1], one[2], one[3]
    a, b, c, d = other[0], other[1], other[2], other[3]
    into[0] = w * a + x * d + y * c - z * b
    into[1] = w * b - x * c + y * d + z * a
    into[2] = w * c + x * b - y * a + z * d
    into[3] = w * d - x * a - y * b - z * c


@compiled
def _is_similar(same: Any, other: Any, cosine: Any) -> Any:
    for g in range(len(same)):
        product = 0.0
        for j in range(4):
            product += same[g, j] * other[j]
        if not abs(product) < cosine:  # also NaN, of an unknown orientation
            return True
    return False


@compiled
def _cell(y: Any, x: Any, n: Any) -> Any:
    """Return the number of a cell; mixed, so that neighbours rarely share one."""
    return ((y * 0x9E3779B1) ^ (x * 0x85EBCA6B)) & (n - 1)
