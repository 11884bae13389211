"""Noise and peaks of simulated maps."""

import math
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from ocelot_em.model.maps import Float32
from ocelot_em.model.regions import Region

# First element of the numpy.random.SeedSequence spawn key: one per kind of draw.
TRUTH_STREAM, FIELD_STREAM, BLOCK_STREAM = range(3)

LOWEST_EXPONENT, HIGHEST_EXPONENT = -54, 6  # draws outside occur once in 1e16 and are clipped

MAX_PARTIALS = 1000
BLOCK_PX = 256
"""Edge of the blocks for which random numbers are drawn; the arrays of a block fit the cache."""

PEAK_RADIUS_PX = 2
_PEAK_SIGMA_PX = 0.77
"""The adjacent pixels have 0.43 of the height, as at high peaks of real searches (0.40 to 0.6)."""

INDEPENDENT_SHARE = 0.206
"""Independent correlations per correlation: projections of similar poses are correlated. The
highest of the 129,600 correlations in the pixels of a real search is distributed as that of 26,700
independent ones."""

_SHARED = 0.008
"""Share of the correlations of a pixel that it has in common with each of three adjacent ones; the
z-scores of adjacent pixels then have the correlation coefficient of real noise, 0.033."""


def generator(seed: int, *key: int) -> np.random.Generator:
    """Return a random generator that depends only on the seed and the key."""
    # SFC64 is NumPy's fastest; the spawn key makes streams independent.
    return np.random.Generator(np.random.SFC64(np.random.SeedSequence(seed, spawn_key=key)))


@lru_cache(maxsize=4096)
def _wave_parameters(seed: int, field: int) -> NDArray[np.float64]:
    """Frequencies and phases (axis, frequency or phase, wave, 1) of three 60 to 600 px waves."""
    rng = generator(seed, FIELD_STREAM, field)
    frequency = 2 * np.pi / np.exp(rng.uniform(math.log(60), math.log(600), (2, 3, 1)))
    return np.stack([frequency, rng.uniform(0, 2 * np.pi, (2, 3, 1))], axis=1)


def waves(seed: int, field: int, iy: int, ix: int, *, amplitude: float) -> Float32:
    """Return a smooth random function on one block, between -amplitude and amplitude."""
    along = []
    for (frequency, phase), block in zip(_wave_parameters(seed, field), (iy, ix), strict=True):
        position = block * BLOCK_PX + np.arange(BLOCK_PX)
        along.append(np.cos(frequency * position + phase))
    rows = (along[0] * (amplitude / len(along[0]))).astype(np.float32)[:, :, None]
    columns = along[1].astype(np.float32)
    total: Float32 = rows[0] * columns[0]
    wave = np.empty_like(total)
    for row, column in zip(rows[1:], columns[1:], strict=True):
        total += np.multiply(row, column, out=wave)
    return total


# The table's argument is a standard exponential draw e = -log(u) on a fine logarithmic scale: the
# upper bits of a float64 are its exponent and the first bits of its mantissa.
_SEGMENT_BITS = 6
_SEGMENT_SHIFT = 52 - _SEGMENT_BITS


def draw_rarities(rng: np.random.Generator) -> NDArray[np.float64]:
    """Draw standard exponentials for the pixels of a block, correlated between adjacent pixels.

    A pixel has the minimum of its own draw and those of three adjacent pixels, each divided by its
    share, which is again a standard exponential. The last row and column of a block continue with
    the first, so that no draws of other blocks are needed.
    """
    own = rng.standard_exponential((BLOCK_PX, BLOCK_PX))
    drawn = own / (1 - 3 * _SHARED)
    own /= _SHARED
    for shift in ((0, -1), (-1, 0), (-1, -1)):
        np.minimum(drawn, np.roll(own, shift, (0, 1)), out=drawn)
    return drawn


@lru_cache(maxsize=MAX_PARTIALS)
def _maximum_table(n: float) -> tuple[Float32, Float32]:
    """Tabulate the maximum of n normal draws at segment starts, and its change per segment."""
    octaves = np.exp2(np.arange(LOWEST_EXPONENT, HIGHEST_EXPONENT))
    within = 1 + np.arange(2**_SEGMENT_BITS) / 2**_SEGMENT_BITS
    edges = np.append(np.outer(octaves, within).ravel(), 2.0**HIGHEST_EXPONENT)
    normal = NormalDist()
    z = np.empty(len(edges))
    for i, e in enumerate((edges / n).tolist()):
        # Use the tail whose probability float64 represents without loss.
        upper = -math.expm1(-e)
        z[i] = -normal.inv_cdf(upper) if upper < 0.5 else normal.inv_cdf(math.exp(-e))
    return z[:-1].astype(np.float32), np.diff(z).astype(np.float32)


def maximum_of_normals(exponential: NDArray[np.float64], n: float) -> Float32:
    """Convert standard exponential draws to draws of the maximum of n standard normals.

    n need not be an integer. The maximum's distribution function is ``Phi(z)**n``; with
    ``u = exp(-exponential)`` uniform, ``z = Phi^-1(1 - p)``, ``p = -expm1(log(u) / n)``. Table
    interpolation is accurate to 1e-4.
    """
    values, changes = _maximum_table(n)
    bits = exponential.view(np.int64)
    segment = bits >> _SEGMENT_SHIFT
    segment -= (1023 + LOWEST_EXPONENT) << _SEGMENT_BITS
    fraction = (bits & ((1 << _SEGMENT_SHIFT) - 1)).astype(np.float32)
    fraction *= np.float32(2.0**-_SEGMENT_SHIFT)
    fraction *= changes.take(segment, mode="clip")
    fraction += values.take(segment, mode="clip")
    return fraction


def window(particle: np.void) -> Region:
    """Return the region of a particle's peak."""
    y, x, reach = int(particle["y"]), int(particle["x"]), PEAK_RADIUS_PX
    return Region(y - reach, y + reach + 1, x - reach, x + reach + 1)


@lru_cache(maxsize=1)
def peak_profile() -> Float32:
    """Return the profile of a peak: a Gaussian of height 1."""
    distance = np.arange(-PEAK_RADIUS_PX, PEAK_RADIUS_PX + 1)
    along = np.exp(-np.square(distance) / (2 * _PEAK_SIGMA_PX**2))
    return np.outer(along, along).astype(np.float32)
