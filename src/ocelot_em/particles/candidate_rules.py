"""Rules for candidates, one per exposure: by z-score, by ``mip`` or by p-value."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from ocelot_em.errors import OcelotError
from ocelot_em.merge.result import MergedResult
from ocelot_em.merge.stats.collected import CANDIDATE_FIELDS, Histograms
from ocelot_em.model.histograms import Histogram1D
from ocelot_em.model.maps import MIP, SCALED_MIP, AnyArray, Float64
from ocelot_em.model.pick_options import PickOptions
from ocelot_em.particles.gaussian import gaussian_cutoff
from ocelot_em.particles.population import Population
from ocelot_em.particles.significance import (
    EXACT_PIXELS,
    NEG_LOG_P_CUTOFF,
    PValueModel,
    gev_cutoff,
)


@dataclass(frozen=True)
class CandidateRule:
    """Rule for the candidates of an exposure.

    ``cutoff`` is the lowest accepted z-score, ``mip`` if ``by_mip``, or -ln p with a p-value model.
    ``levels`` are a ``mip`` and a z-score; every pixel that reaches a p-value cutoff reaches at
    least one.
    """

    cutoff: float
    model: PValueModel | None = None
    levels: tuple[float, float] = (-np.inf, -np.inf)
    by_mip: bool = False

    def accepts(self, mip: AnyArray, z: AnyArray) -> AnyArray:
        """Return a mask of candidates; p-values are computed only where they can be low enough."""
        if self.model is None:
            known: AnyArray = ~np.isnan(z)
            return known & ((mip if self.by_mip else z) >= np.float32(self.cutoff))
        near: AnyArray = (mip >= self.levels[0]) | (z >= self.levels[1])
        # -ln p is NaN where nothing was searched, and such pixels are not accepted.
        where = np.flatnonzero(near)  # few; much faster than a mask
        near.flat[where] = self.model.neg_log_p(mip.flat[where], z.flat[where]) >= self.cutoff
        return near

    def height(self, rows: Float64) -> Float64:
        """Return the z-score, ``mip`` or -ln p of candidates."""
        if self.model is None:
            return column(rows, MIP if self.by_mip else SCALED_MIP)
        return self.model.neg_log_p(column(rows, MIP), column(rows, SCALED_MIP))


def make_rules(
    options: PickOptions, merged: MergedResult, populations: Sequence[Population]
) -> list[CandidateRule]:
    """Return the rule of every exposure, whose populations are given."""
    plan = merged.plan
    if options.method == "pvalue":
        cutoff = NEG_LOG_P_CUTOFF if options.cutoff is None else options.cutoff
        return [_p_value_rule(own, cutoff) for own in populations]
    if options.cutoff is not None:
        rule = CandidateRule(options.cutoff, by_mip=options.method == "mip")
        return [rule] * len(plan.exposures)
    if plan.group_by:
        return [CandidateRule(cutoff) for cutoff in _group_cutoffs(options, populations)]
    if plan.has_parts and options.per == "montage":
        cutoff = _montage_cutoff(options, merged, populations)
        return [CandidateRule(cutoff)] * len(plan.exposures)
    return [CandidateRule(_cutoff(options, own)) for own in populations]


def _group_cutoffs(options: PickOptions, populations: Sequence[Population]) -> list[float]:
    """Return the z-score cutoff of each group.

    Any group can contribute noise to any pixel, so all their searched pixels count. A group has the
    share of the false positives that it has of all correlations; Gaussian cutoffs are then equal.
    """
    total = max(sum(own.correlations for own in populations), 1)
    if options.method == "gaussian":
        return [gaussian_cutoff(total, 1, options.false_positives)] * len(populations)
    cutoffs = []
    for own in populations:
        allowed = options.false_positives * own.correlations / total
        # Where nothing was searched, there are no candidates.
        cutoffs.append(gev_cutoff(own.histograms.of_z(), allowed) if allowed else np.inf)
    return cutoffs


def _cutoff(options: PickOptions, own: Population) -> float:
    """Return the z-score cutoff for the false positives of an exposure."""
    if options.method == "gev":
        return gev_cutoff(own.histograms.of_z(), options.false_positives)
    if not own.exposure.total_projections or not own.correlations:
        # At least one: where nothing was searched, there are no candidates.
        return gaussian_cutoff(1, own.exposure.total_projections, options.false_positives)
    return gaussian_cutoff(own.correlations, 1, options.false_positives)


def _montage_cutoff(
    options: PickOptions, merged: MergedResult, populations: Sequence[Population]
) -> float:
    """Return the z-score cutoff for the false positives of the whole montage.

    If the highest z-score wins a pixel, any exposure can contribute noise there, so all their
    searched pixels count. Otherwise, only shown pixels count.
    """
    if options.method == "gev":
        histogram, share = of_montage(merged, populations)
        return gev_cutoff(histogram, options.false_positives / (share or 1.0))
    all_count = merged.plan.overlap == "max-zscore"
    correlations = sum(own.correlations if all_count else own.shown[1] for own in populations)
    return gaussian_cutoff(correlations, 1, options.false_positives)


def of_montage(
    merged: MergedResult, populations: Sequence[Population]
) -> tuple[Histogram1D, float]:
    """Return the histogram of the z-scores of all exposures, and the share of pixels that count."""
    total = merged.summary.histograms
    if any(own.area is not None for own in populations):
        total = Histograms.empty("int64")
        for own in populations:
            total.z += own.histograms.z
    histogram = total.of_z()
    if merged.plan.overlap == "max-zscore":
        return histogram, 1.0
    return histogram, sum(own.shown[0] for own in populations) / max(histogram.pixels, 1)


def _p_value_rule(own: Population, cutoff: float) -> CandidateRule:
    """Return the rule of an exposure, by exact ranks if it is small enough."""
    if 0 < own.pixels < EXACT_PIXELS:
        try:
            return CandidateRule(cutoff, PValueModel.from_pixels(*own.values()))
        except OcelotError:  # the partials of an exposure, which picking then reports
            if own.area is not None or not own.merged.plan.has_parts:
                raise
    counted = own.histograms
    model = PValueModel.from_histogram(counted.of_both(), counted.of_mip(), counted.of_z())
    return CandidateRule(cutoff, model, levels_of(model, counted, cutoff))


def p_value_model(own: Population) -> PValueModel | None:
    """Return the model of p-values of a result of one exposure; None for a montage."""
    return None if own.merged.plan.has_parts else _p_value_rule(own, NEG_LOG_P_CUTOFF).model


def levels_of(model: PValueModel, counted: Histograms, cutoff: float) -> tuple[float, float]:
    """Return a ``mip`` and a z-score; pixels with this -ln p reach at least one of them.

    -ln p is ``r**2 / 2 - ln(quadrant)``. If both normal scores (in units of their root mean
    squares) are from 0 to m, ``r**2`` is at most ``m**2 max(1, 2 (1 - c)) / (1 - c**2)`` for a
    correlation c. At least one of them is therefore not below the m of the cutoff.
    """
    c = model.correlation
    quadrant = (np.pi / 2 + np.arcsin(c)) / (2 * np.pi)
    squared = 2 * (1 - c**2) * (cutoff + np.log(quadrant)) / max(1.0, 2 * (1 - c))
    least = float(np.sqrt(max(squared, 0.0)))
    levels = []
    for histogram, rms in (
        (counted.of_mip(), model.mip_rms),
        (counted.of_z(), model.z_rms),
    ):
        rank = histogram.pixels * NormalDist().cdf(least * rms)
        edges = histogram.axis.edges
        reached = histogram.below(edges[:-1]) >= rank
        first = int(np.argmax(reached)) if reached.any() else len(edges) - 1
        levels.append(float(edges[max(first - 1, 0)]) if first > 1 else -np.inf)
    return levels[0], levels[1]


def column(rows: Float64, name: str) -> Float64:
    """Return a named column of candidate rows."""
    return rows[:, CANDIDATE_FIELDS.index(name)]
