"""Rules for candidates, one per exposure: by z-score or by p-value."""

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from ocelot_em.errors import OcelotError
from ocelot_em.merge.result import MergedResult
from ocelot_em.merge.stats.collected import CANDIDATE_FIELDS
from ocelot_em.merge.stats.summary import Summary
from ocelot_em.model.maps import MIP, SCALED_MIP, AnyArray, Float64
from ocelot_em.model.pick_options import PickOptions
from ocelot_em.particles.gaussian import gaussian_cutoff
from ocelot_em.particles.scanning import all_pixels
from ocelot_em.particles.significance import (
    EXACT_PIXELS,
    NEG_LOG_P_CUTOFF,
    PValueModel,
    gev_cutoff,
)


@dataclass(frozen=True)
class CandidateRule:
    """Rule for the candidates of an exposure.

    ``cutoff`` is the lowest accepted z-score, or -ln p with a p-value model. ``levels`` are a
    ``mip`` and a z-score; every pixel that reaches a p-value cutoff reaches at least one.
    """

    cutoff: float
    model: PValueModel | None = None
    levels: tuple[float, float] = (-np.inf, -np.inf)

    def accepts(self, mip: AnyArray, z: AnyArray) -> AnyArray:
        """Return a mask of candidates; p-values are computed only where they can be low enough."""
        if self.model is None:
            high: AnyArray = z >= np.float32(self.cutoff)
            return high
        near: AnyArray = (mip >= self.levels[0]) | (z >= self.levels[1])
        # -ln p is NaN where nothing was searched, and such pixels are not accepted.
        where = np.flatnonzero(near)  # few; much faster than a mask
        near.flat[where] = self.model.neg_log_p(mip.flat[where], z.flat[where]) >= self.cutoff
        return near

    def height(self, rows: Float64) -> Float64:
        """Return the z-score or -ln p of candidates."""
        if self.model is None:
            return column(rows, SCALED_MIP)
        return self.model.neg_log_p(column(rows, MIP), column(rows, SCALED_MIP))


def make_rules(options: PickOptions, merged: MergedResult) -> list[CandidateRule]:
    """Return the rule of every exposure."""
    plan = merged.plan
    if options.method == "pvalue":
        cutoff = NEG_LOG_P_CUTOFF if options.cutoff is None else options.cutoff
        return [_p_value_rule(merged, k, cutoff) for k in range(len(plan.exposures))]
    if options.cutoff is not None:
        return [CandidateRule(options.cutoff)] * len(plan.exposures)
    if plan.group_by:
        return [CandidateRule(cutoff) for cutoff in _group_cutoffs(options, merged)]
    if plan.is_montage and options.per == "montage":
        return [CandidateRule(_montage_cutoff(options, merged))] * len(plan.exposures)
    about, rules = merged.summary.attributes, []
    searched = {exposure.number: exposure.searched_pixels for exposure in about.exposures}
    for exposure in plan.exposures:
        if options.method == "gev":
            own = merged.summary_of(exposure)
            cutoff = gev_cutoff(own.histograms.of_z(), options.false_positives)
        else:
            pixels = searched.get(exposure.number, about.searched_pixels)
            # At least one: where nothing was searched, there are no candidates.
            cutoff = gaussian_cutoff(
                max(pixels, 1), exposure.total_projections, options.false_positives
            )
        rules.append(CandidateRule(cutoff))
    return rules


def _group_cutoffs(options: PickOptions, merged: MergedResult) -> list[float]:
    """Return the z-score cutoff of each group.

    Any group can contribute noise to any pixel, so all their searched pixels count. A group has the
    share of the false positives that it has of all correlations; Gaussian cutoffs are then equal.
    """
    exposures = merged.plan.exposures
    pixels = {e.number: e.searched_pixels for e in merged.summary.attributes.exposures}
    correlations = [pixels.get(e.number, 0) * e.total_projections for e in exposures]
    total = max(sum(correlations), 1)
    if options.method == "gaussian":
        return [gaussian_cutoff(total, 1, options.false_positives)] * len(exposures)
    cutoffs = []
    for exposure, own in zip(exposures, correlations, strict=True):
        histogram, share = merged.summary_of(exposure).histograms.of_z(), own / total
        # Where nothing was searched, there are no candidates.
        cutoffs.append(gev_cutoff(histogram, options.false_positives * share) if own else np.inf)
    return cutoffs


def _montage_cutoff(options: PickOptions, merged: MergedResult) -> float:
    """Return the z-score cutoff for the false positives of the whole montage.

    If the highest z-score wins a pixel, any exposure can contribute noise there, so all their
    searched pixels count. Otherwise, only shown pixels count.
    """
    all_count = merged.plan.overlap == "max-zscore"
    pixels = {
        exposure.number: exposure.searched_pixels if all_count else exposure.shown_pixels
        for exposure in merged.summary.attributes.exposures
    }
    if options.method == "gev":
        histogram = merged.summary.histograms.of_z()
        share = sum(pixels.values()) / max(histogram.pixels, 1) if not all_count else 1.0
        return gev_cutoff(histogram, options.false_positives / (share or 1.0))
    correlations = sum(
        pixels.get(exposure.number, 0) * exposure.total_projections
        for exposure in merged.plan.exposures
    )
    return gaussian_cutoff(correlations, 1, options.false_positives)


def _p_value_rule(merged: MergedResult, position: int, cutoff: float) -> CandidateRule:
    """Return the rule of an exposure, by exact ranks if it is small enough."""
    own = merged.summary_of(merged.plan.exposures[position])
    if 0 < own.attributes.searched_pixels < EXACT_PIXELS:
        try:
            model = PValueModel.from_pixels(*all_pixels(merged, position))
            return CandidateRule(cutoff, model)
        except OcelotError:  # the partials of an exposure, which picking then reports
            if not merged.plan.is_montage:
                raise
    counted = own.histograms
    model = PValueModel.from_histogram(counted.of_both(), counted.of_mip(), counted.of_z())
    return CandidateRule(cutoff, model, levels_of(model, own, cutoff))


def p_value_model(merged: MergedResult) -> PValueModel | None:
    """Return the model of p-values of a result of one exposure; None for a montage."""
    return None if merged.plan.is_montage else _p_value_rule(merged, 0, NEG_LOG_P_CUTOFF).model


def levels_of(model: PValueModel, summary: Summary, cutoff: float) -> tuple[float, float]:
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
        (summary.histograms.of_mip(), model.mip_rms),
        (summary.histograms.of_z(), model.z_rms),
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
