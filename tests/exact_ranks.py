"""The model of p-values from whole maps, to hold the one from histograms against."""

import math
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm

from ocelot_em.particles.significance import PValueModel


@dataclass(frozen=True)
class SortedPixels:
    """Exact ranks: all values of a map, sorted."""

    values: np.ndarray

    @property
    def pixels(self):
        return self.values.size

    def below(self, values):
        first, last = (np.searchsorted(self.values, values, side=s) for s in ("left", "right"))
        return (first + last) / 2


def from_maps(mip, z):
    """The model from whole maps in memory: the definition, which histograms come close to."""
    maps = np.array([np.ravel(mip), np.ravel(z)], np.float64)
    mips, zs = maps[:, np.isfinite(maps).all(axis=0)]
    mip_ranks, z_ranks = SortedPixels(np.sort(mips)), SortedPixels(np.sort(zs))
    x, y = (
        norm.ppf(np.clip(ranks.below(values), 0.5, mips.size - 0.5) / mips.size)
        for ranks, values in ((mip_ranks, mips), (z_ranks, zs))
    )
    mip_rms, z_rms = (math.sqrt(np.mean(scores**2)) or 1.0 for scores in (x, y))
    correlation = float(np.clip(np.mean(x * y) / (mip_rms * z_rms), -0.999, 0.999))
    return PValueModel(mip_ranks, z_ranks, mip_rms, z_rms, correlation)
