"""Compositing of montages: which exposure each pixel shows, compiled by numba.

The rules are described in ``ocelot_em.merge.overlap``. Arrays are two-dimensional. Those of a piece
are C-contiguous; those of the canvas are views of the same shape.
"""

from typing import Any

import numpy as np

from ocelot_em.kernels.compiling import compiled, summed

EARLIEST, MAX_ZSCORE, FARTHEST = 0, 1, 2
"""Overlap rules."""


@compiled
def choose(piece: Any, number: Any, rule: Any, canvas: Any, taken: Any) -> Any:
    """Decide where a piece wins, store its number there, and return the number of pixels won.

    ``piece``: ``mip``, z-scores, and distances of pixels from the edge. ``canvas``: what is shown
    so far: exposure number (-1: none), ``mip``, z-score, distance. ``taken``: output mask of pixels
    won.
    """
    mips, zs, edge_distances = piece
    numbers, kept_mips, kept_zs, kept_distances = canvas
    n_taken = 0
    for y in range(mips.shape[0]):
        for x in range(mips.shape[1]):
            if numbers[y, x] < 0:
                wins = True
            elif not mips[y, x] > -np.inf:
                wins = False
            elif not kept_mips[y, x] > -np.inf:
                wins = True
            elif rule == MAX_ZSCORE:
                z, kept = zs[y, x], kept_zs[y, x]
                wins = z > kept or (kept != kept and z == z)
            elif rule == FARTHEST:
                wins = edge_distances[y, x] > kept_distances[y, x]
            else:
                wins = False
            taken[y, x] = wins
            if wins:
                numbers[y, x] = number
                kept_distances[y, x] = edge_distances[y, x]
                n_taken += 1
    return n_taken


@compiled
def runner_up(zs: Any, kept_zs: Any, taken: Any, seconds: Any) -> None:
    """Update the second highest z-score, before that of a piece replaces the highest one.

    ``seconds`` is NaN where fewer than two z-scores are known.
    """
    for y in range(zs.shape[0]):
        for x in range(zs.shape[1]):
            loser = kept_zs[y, x] if taken[y, x] else zs[y, x]
            second = seconds[y, x]
            higher = loser > second or second != second
            seconds[y, x] = loser if higher and loser == loser else second


@compiled
def put(values: Any, taken: Any, into: Any) -> None:
    """Copy the values of taken pixels."""
    for y in range(values.shape[0]):
        for x in range(values.shape[1]):
            value, old = values[y, x], into[y, x]
            into[y, x] = value if taken[y, x] else old


@summed
def sum_alone(zs: Any) -> Any:
    """Return the count, sum and sum of squares of z-scores that are not NaN."""
    n, total, squared_total = 0.0, 0.0, 0.0
    for i in range(zs.size):
        z = np.float64(zs[i])
        known = z == z
        value = z if known else 0.0
        n += 1.0 if known else 0.0
        total += value
        squared_total += value * value
    return n, total, squared_total


@compiled
def tally(numbers: Any, number: Any, n_covering: Any, zs: Any, into: Any) -> None:
    """Sum the shown z-scores of an exposure, separately where it is alone and in overlaps.

    ``into``: (2, 3) counts, sums and sums of squares; NaN z-scores are ignored.
    """
    for y in range(numbers.shape[0]):
        for x in range(numbers.shape[1]):
            z = np.float64(zs[y, x])
            if numbers[y, x] == number and z == z:
                row = 1 if n_covering[y, x] > 1 else 0
                into[row, 0] += 1.0
                into[row, 1] += z
                into[row, 2] += z * z
