"""How many particles are real: false positives, precision and recall for every cutoff."""

from dataclasses import dataclass, replace
from math import erfc, log1p, sqrt
from os import PathLike

import numpy as np

from ocelot_em.errors import InvalidInputError
from ocelot_em.merge.result import MergedResult
from ocelot_em.model.maps import MIP, SCALED_MIP, AnyArray, Float64
from ocelot_em.model.pick_options import PickOptions
from ocelot_em.particles.areas import Area
from ocelot_em.particles.candidate_rules import of_montage
from ocelot_em.particles.picking import all_candidates, pick_again
from ocelot_em.particles.population import populations_of
from ocelot_em.particles.significance import gev_above
from ocelot_em.particles.table import GROUP, NEG_LOG_P, PRECISION, RECALL, ParticleTable
from ocelot_em.store.statistics_attributes import StatisticsAttributes

NOISE = "noise"
"""Name of the estimates by the model of noise, among the names of decoys."""

MAX_ERROR = 0.1
"""Maximum standard error of a number of true particles, as a fraction of it, to count as all."""


@dataclass(frozen=True)
class Estimates:
    """Numbers of particles at or above cutoffs, in descending order of the cutoffs, (n,) each.

    Parameters
    ----------
    cutoffs
        Heights of the particles: z-scores, or -ln p.
    found
        Number of particles at or above each.
    false
        How many of them are expected to be false.
    """

    cutoffs: Float64
    found: Float64
    false: Float64

    @property
    def precision(self) -> Float64:
        """Share of the particles that are true, 0 to 1."""
        return np.clip(1 - self.false / self.found, 0, 1)

    @property
    def true(self) -> Float64:
        """Number of true particles; a lower cutoff does not have fewer."""
        counted: Float64 = np.maximum.accumulate(np.maximum(self.found - self.false, 0))
        return counted

    @property
    def all_true(self) -> float:
        """Number of true particles at the lowest cutoff where chance changes it by a tenth.

        The number of false ones has the standard deviation of a Poisson distribution.
        """
        sure = np.flatnonzero(np.sqrt(self.false) <= MAX_ERROR * self.true)
        return float(self.true[sure[-1]]) if sure.size else float("nan")

    @property
    def recall(self) -> Float64:
        """Share of all true particles that are at or above each cutoff; NaN if it is unknown."""
        return np.clip(self.true / (self.all_true or np.nan), 0, 1)

    def at(self, cutoffs: Float64, false: Float64) -> tuple[Float64, Float64]:
        """Return precision and recall at any cutoffs, descending, with these false ones expected.

        NaN where nothing was found.
        """
        place = np.searchsorted(-self.cutoffs, -cutoffs, "right") - 1
        found = np.where(place < 0, np.nan, self.found[place])
        here = Estimates(cutoffs, found, false)
        true = np.maximum.accumulate(np.nan_to_num(np.maximum(found - false, 0)))
        recall = np.clip(true / (self.all_true or np.nan), 0, 1)
        return here.precision, np.where(place < 0, np.nan, recall)


def estimates_of(
    merged: MergedResult | None,
    particles: ParticleTable,
    decoy: str | ParticleTable | None = None,
) -> Estimates:
    """Return the estimates at the heights of particles, and of weaker ones that were recorded.

    ``decoy`` is the name of a group, or the particles of another result; None: the model of noise.
    """
    height = particles.ranked_by
    if decoy is not None:
        counted, false, scale, lowest = _by_decoy(merged, particles, decoy)
        cutoffs, found = _counted(counted)
        expected = np.where(cutoffs < lowest, np.nan, scale * _at_or_above(false, cutoffs))
        return Estimates(cutoffs, found, expected)
    if merged is None:
        raise InvalidInputError("decoy: expected one, or a merged result, got neither")
    if height == MIP:
        raise InvalidInputError(
            "particles: expected particles picked by z-score or p-value, which have a model of "
            "noise, got particles picked by mip; give a decoy"
        )
    cutoffs, found = _counted(with_weaker(merged, particles).columns[height])
    return Estimates(cutoffs, found, expected_above(merged, particles, cutoffs))


def _by_decoy(
    merged: MergedResult | None, particles: ParticleTable, decoy: str | ParticleTable
) -> tuple[AnyArray, AnyArray, float, float]:
    """Return the heights of particles and of the decoy's, and what one of those stands for.

    A decoy of half as many correlations finds half as many false particles. The last value is the
    decoy's own cutoff, below which its number is unknown; -inf if it is not known.
    """
    height, about = particles.ranked_by, particles.about
    searched, heights = _correlations_of(particles), particles.columns[height]
    if isinstance(decoy, ParticleTable):
        unstated = decoy.about is None and height == MIP
        if height not in decoy.columns or not (decoy.ranked_by == height or unstated):
            raise InvalidInputError(
                f"decoy: expected particles picked by {height}, as the others, got particles "
                f"picked by {decoy.ranked_by}; pick both with the same method"
            )
        scale = sum(searched.values()) / (sum(_correlations_of(decoy).values()) or np.inf)
        lowest = -np.inf if decoy.about is None else decoy.about.cutoff
        return heights, decoy.columns[height], scale, lowest
    cutoffs = dict(about.exposure_cutoffs) if about is not None and about.per == "group" else {}
    searched = dict.fromkeys(cutoffs, 0) | (searched if GROUP in particles.columns else {})
    if merged is not None and merged.plan.group_by:
        searched |= {own.id: own.projections for own in merged.summary.attributes.exposures}
    if decoy not in searched:
        known = ", ".join(sorted(searched)) or "none, because there are none"
        raise InvalidInputError(
            f"decoy (--estimates): expected the name of a group ({known}), a table of particles "
            f"(.csv, .parquet), or noise, got {decoy!r}"
        )
    is_decoy = particles.columns[GROUP] == decoy
    own = searched.pop(decoy)
    scale = sum(searched.values()) / (own or np.inf)
    return heights[~is_decoy], heights[is_decoy], scale, cutoffs.get(decoy, -np.inf)


def _correlations_of(particles: ParticleTable) -> dict[str, float]:
    """Return the number of correlations of a pixel, for each group of particles, if any."""
    counts = particles.columns["total_correlations"]
    groups = particles.columns.get(GROUP, np.zeros(len(counts), str))
    return {name: int(counts[groups == name].max()) for name in np.unique(groups).tolist()}


def _counted(heights: AnyArray) -> tuple[Float64, Float64]:
    """Return the different heights, descending, and the number of particles at or above each."""
    cutoffs = np.unique(heights[np.isfinite(heights)].astype(np.float64))[::-1]
    return cutoffs, _at_or_above(heights, cutoffs)


def _at_or_above(heights: AnyArray, cutoffs: Float64) -> Float64:
    """Return how many heights are at or above each cutoff."""
    ascending = np.sort(heights[np.isfinite(heights)].astype(np.float64))
    return (len(ascending) - np.searchsorted(ascending, cutoffs)).astype(np.float64)


def estimate(
    particles: ParticleTable,
    store: str | PathLike[str] | MergedResult | None = None,
    *,
    decoy: str | ParticleTable | None = None,
) -> ParticleTable:
    """Return particles with estimates of precision and recall, if the cutoff stood at each.

    The precision is the share of the particles at or above the cutoff that are true: one minus the
    number of expected false ones by the number found. The recall is the share of all true ones. How
    many these are is estimated at the lowest cutoff where chance changes their number by a tenth,
    for which peaks below the cutoff that the merge recorded are counted, too.

    Parameters
    ----------
    particles
        Picked particles.
    store
        The merged result that they were picked from. Without a decoy, false ones are those that
        its model of noise expects: that of the picking, or Gaussian noise.
    decoy
        What finds false particles as often as the template does, for as many correlations: the name
        of a group of a template that is not there, such as a mirrored one, or the particles of such
        a search, down to the same cutoff.

    Returns
    -------
    ParticleTable
        The same particles with the columns ``precision`` and ``recall``. They are NaN for the
        particles of a group that is the decoy, and below the cutoff of the decoy; and the recall
        where it is unknown.

    Raises
    ------
    InvalidInputError
        There is no such group, neither a store nor a decoy, no model of noise, or a decoy that was
        picked by another method.

    Examples
    --------
    >>> from ocelot_em import estimate, find_peaks
    >>> particles = estimate(find_peaks("MERGED.zarr"), "MERGED.zarr")
    >>> particles["precision"].min().round(2), particles["recall"].max().round(2)
    (np.float64(1.0), np.float64(1.0))
    """
    merged = None if store is None else MergedResult.open(store)
    found = estimates_of(merged, particles, decoy)
    heights = particles.columns[particles.ranked_by].astype(np.float64)
    columns = dict(particles.columns)
    for name, values in ((PRECISION, found.precision), (RECALL, found.recall)):
        at = np.full(len(heights), np.nan)
        if len(values):
            place = np.searchsorted(-found.cutoffs, -heights).clip(max=len(values) - 1)
            at = np.where(np.isfinite(heights), values[place], np.nan)
        if isinstance(decoy, str):
            at = np.where(particles.columns[GROUP] == decoy, np.nan, at)
        columns[name] = at
    return replace(particles, columns=columns)


def with_weaker(merged: MergedResult, found: ParticleTable) -> ParticleTable:
    """Return particles and, as far as the merge recorded them, peaks below their cutoff.

    Not where exposures or groups have their own cutoffs, not of p-values or ``mip``, for which
    maps would have to be read, and not in an area that is not known any more. Estimates of those
    below are unknown.
    """
    about, picking = found.about, found.picking
    if merged.attributes.exposures or about is None or found.ranked_by != SCALED_MIP:
        return found
    if picking is None and (about.area or about.min_angle_degrees is not None):
        return found
    level = all_candidates(merged).level
    if not level < about.cutoff:
        return found
    own = {"method": "gaussian", "cutoff": level, "min_distance": about.min_distance_px}
    weaker = (picking or PickOptions()).model_copy(update=own)
    others = dict(pick_again(merged, weaker).columns)
    below = others[SCALED_MIP] < np.float32(about.cutoff)
    others |= dict.fromkeys((PRECISION, RECALL), np.full(len(below), np.nan))
    columns = {
        name: np.concatenate([values, others[name][below]])
        for name, values in found.columns.items()
        if name in others
    }
    return ParticleTable(columns, about)


def expected_above(merged: MergedResult, particles: ParticleTable, cutoffs: Float64) -> Float64:
    """Return how many pixels of noise are expected at or above cutoffs, by the picking's model.

    Only pixels that the picking counted; empty if it has no model.
    """
    statistics, about = merged.summary.attributes, particles.about
    if particles.ranked_by == MIP:
        return np.empty(0)
    if about is not None and about.method == "gev":
        area = None if particles.picking is None else Area.of(merged, particles.picking)
        own = [one for one in populations_of(merged, area) if one.pixels]
        if about.per == "montage":
            histogram, share = of_montage(merged, own)
            return share * gev_above(histogram, cutoffs)
        above = np.zeros(len(cutoffs))
        for one in own:
            above += gev_above(one.histograms.of_z(), cutoffs)
        return above
    searched, share = statistics.searched_pixels, 1.0
    if about is not None and about.counted_pixels is not None:
        share = about.counted_pixels / max(about.counted_pixels + about.excluded_pixels, 1)
    if particles.ranked_by == NEG_LOG_P:
        return share * searched * np.exp(-cutoffs)
    if about is not None and about.correlations is not None:
        whole = sum(n * pixels for n, pixels in _draws(statistics))
        share = about.correlations / max(whole, 1)
    return share * noise_above(cutoffs, statistics)


def noise_above(z: Float64, attributes: StatisticsAttributes) -> Float64:
    """Return how many pixels exceed each z-score if correlations are independent and Gaussian."""
    highest = 1 - 2**-53  # of a probability, whose complement has a logarithm
    log_below = np.array([log1p(-min(erfc(level / sqrt(2)) / 2, highest)) for level in z])
    above = np.zeros(len(z))
    for n, pixels in _draws(attributes):
        above -= pixels * np.expm1(n * log_below)
    return above


def _draws(attributes: StatisticsAttributes) -> list[tuple[float, int]]:
    """Return the mean number of correlations of a pixel, and of pixels, of each exposure."""
    projections = sum(partial.projections for partial in attributes.partials)
    draws = [(own.projections, own.valid_pixels) for own in attributes.exposures]
    return draws or [(projections, attributes.valid_pixels)]
