"""Which exposure a pixel of a montage shows, compiled by numba; rules: ``ocelot_em.merge.overlap``.

Arrays are two-dimensional. Those of a piece are C-contiguous; those of the canvas are views of the
same shape.
"""

from typing import Any

import numpy as np

from ocelot_em.kernels.compiling import compiled, summed

EARLIEST, MAX_ZSCORE, FARTHEST = 0, 1, 2
"""Rules."""


@compiled
def choose(piece: Any, number: Any, rule: Any, canvas: Any, taken: Any) -> Any:
    """Decide where a piece wins, and note its number there; in how many pixels.

    ``piece``: its ``mip``, its z-scores, and how far its pixels are from its edge. ``canvas``: what
    is shown so far: number of the exposure (-1: none), ``mip``, z-score, distance. ``taken``: where
    the piece wins, to be written.
    """
    mips, zs, reaches = piece
    numbers, kept_mips, kept_zs, kept_reaches = canvas
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
                wins = reaches[y, x] > kept_reaches[y, x]
            else:
                wins = False
            taken[y, x] = wins
            if wins:
                numbers[y, x] = number
                kept_reaches[y, x] = reaches[y, x]
                n_taken += 1
    return n_taken


@compiled
def put(values: Any, taken: Any, into: Any) -> None:
    """Copy the values of pixels that are taken."""
    for y in range(values.shape[0]):
        for x in range(values.shape[1]):
            value, old = values[y, x], into[y, x]
            into[y, x] = value if taken[y, x] else old


@summed
def tally_alone(zs: Any) -> Any:
    """Add up z-scores; pixels that have one, z-scores, squared z-scores."""
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
def tally(numbers: Any, number: Any, covers: Any, zs: Any, into: Any) -> None:
    """Add up what is shown of an exposure, where it is alone and where others lie, too.

    ``into``: (2, 3) pixels, z-scores, squared z-scores; pixels without z-score are left out.
    """
    for y in range(numbers.shape[0]):
        for x in range(numbers.shape[1]):
            z = np.float64(zs[y, x])
            if numbers[y, x] == number and z == z:
                place = 1 if covers[y, x] > 1 else 0
                into[place, 0] += 1.0
                into[place, 1] += z
                into[place, 2] += z * z
