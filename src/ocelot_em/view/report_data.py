"""The data of a report."""

from dataclasses import dataclass
from os import PathLike

from ocelot_em.errors import InvalidInputError
from ocelot_em.merge.result import MergedResult
from ocelot_em.merge.stats.summary import Summary
from ocelot_em.particles.picking import find_peaks
from ocelot_em.particles.table import EXPOSURE, NEG_LOG_P, ParticleTable
from ocelot_em.store import attributes as fmt


@dataclass(frozen=True)
class ReportData:
    """The data of a report.

    Parameters
    ----------
    merged, summary
        The result and its statistics.
    particles
        Particles to show.
    no_particles_reason
        Why no particles could be picked; otherwise empty.
    """

    merged: MergedResult
    summary: Summary
    particles: ParticleTable
    no_particles_reason: str

    @property
    def is_montage(self) -> bool:
        """Whether the result has exposures."""
        return bool(self.merged.attributes.exposures)

    @property
    def cutoff(self) -> tuple[float, float] | None:
        """Lowest and highest z-score cutoff of the particles, if they have one."""
        about = self.particles.about
        if about is None or NEG_LOG_P in self.particles.columns:
            return None
        own = [cutoff for _, cutoff in about.exposure_cutoffs]
        return about.cutoff, max(own, default=about.cutoff)


def read_report_data(
    store: str | PathLike[str] | MergedResult, particles: ParticleTable | None
) -> ReportData:
    """Read the data of a report."""
    merged = MergedResult.open(store)
    summary, reason = merged.summary, ""
    if particles is None:
        try:
            particles = find_peaks(merged)
        except InvalidInputError as error:  # nothing was searched, or too little for a cutoff
            particles, reason = ParticleTable.empty(), str(error)
    if problem := _misplaced(particles, merged.attributes):
        raise InvalidInputError(f"particles: {problem}, as find_peaks gives them for {merged.url}")
    return ReportData(merged, summary, particles, reason)


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
