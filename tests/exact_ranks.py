"""Histograms and the model of p-values from whole maps: what the faster ways are compared with."""

import math
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm

from ocelot_em.model.histograms import JOINT_MIP_AXIS, JOINT_Z_AXIS, Histogram1D, JointHistogram
from ocelot_em.particles.significance import PValueModel


def histogram_of(values, axis):
    """Count the finite pixels of a whole map of any shape."""
    numbers = np.asarray(values, np.float64)
    bins = axis.bin_of(numbers[np.isfinite(numbers)])
    counts = np.bincount(bins + 1, minlength=axis.bins + 2)
    return Histogram1D(axis, counts[1:-1], int(counts[0]), int(counts[-1]))


def joint_histogram_of(mip, z, mip_axis=JOINT_MIP_AXIS, z_axis=JOINT_Z_AXIS):
    """Count the pixels of whole maps where both are finite."""
    maps = np.array([np.ravel(mip), np.ravel(z)], np.float64)
    mips, zs = maps[:, np.isfinite(maps).all(axis=0)]
    row = np.clip(mip_axis.bin_of(mips), 0, mip_axis.bins - 1)
    column = np.clip(z_axis.bin_of(zs), 0, z_axis.bins - 1)
    counts = np.zeros((mip_axis.bins, z_axis.bins), np.int64)
    np.add.at(counts, (row, column), 1)
    return JointHistogram(mip_axis, z_axis, counts)


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
