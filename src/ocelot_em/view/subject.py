"""The data of a report."""

from dataclasses import dataclass
from os import PathLike

from ocelot_em.errors import InvalidInputError
from ocelot_em.merge.result import MergedResult
from ocelot_em.merge.stats.summary import Summary
from ocelot_em.particles.picking import find_peaks
from ocelot_em.particles.table import EXPOSURE, NEG_LOG_P, ParticleTable
from ocelot_em.store import attributes as fmt
from ocelot_em.view.montage import Montage


@dataclass(frozen=True)
class Subject:
    """The data of a report."""

    merged: MergedResult
    particles: ParticleTable
    trouble: str
    """Why no particles could be picked; otherwise empty."""
    montage: Montage | None
    """Placement and statistics of exposures, if the result is a montage."""

    @property
    def url(self) -> str:
        """URL of the result."""
        return self.merged.url

    @property
    def attributes(self) -> fmt.MergedAttributes:
        """Attributes of the result."""
        return self.merged.attributes

    @property
    def summary(self) -> Summary:
        """Statistics of the result."""
        return self.merged.summary

    @property
    def cutoff(self) -> tuple[float, float] | None:
        """Lowest and highest z-score cutoff of the particles, if they have one."""
        about = self.particles.about
        if about is None or NEG_LOG_P in self.particles.columns:
            return None
        own = [cutoff for _, cutoff in about.exposure_cutoffs]
        return about.cutoff, max(own, default=about.cutoff)


def subject_of(
    store: str | PathLike[str] | MergedResult, particles: ParticleTable | None
) -> Subject:
    """Read the data of a report."""
    merged = MergedResult.open(store)
    summary = merged.summary
    trouble = ""
    if particles is None:
        try:
            particles = find_peaks(merged)
        except InvalidInputError as error:  # nothing was searched, or too little for a cutoff
            particles, trouble = ParticleTable.empty(), str(error)
    if problem := _misplaced(particles, merged.attributes):
        raise InvalidInputError(f"particles: {problem}, as find_peaks gives them for {merged.url}")
    montage = None
    if merged.attributes.exposures:
        montage = Montage(merged.attributes, summary, merged.statistics_of_exposures)
    return Subject(merged, particles, trouble, montage)


def _misplaced(particles: ParticleTable, attributes: fmt.MergedAttributes) -> str:
    """Return why particles cannot belong to a result; empty if they can."""
    if not len(particles):
        return ""
    known = {exposure.id for exposure in attributes.exposures}
    if particles.is_of_montage != bool(known):
        expected, got = ("a montage", "one exposure") if known else ("one exposure", "a montage")
        return f"expected those of {expected}, got those of {got}"
    if particles.is_of_montage and (unknown := {*particles.columns[EXPOSURE].tolist()} - known):
        return f"expected those of its exposures, got some of {min(unknown)!r}"
    return ""
