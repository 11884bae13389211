"""The data of a report."""

from dataclasses import dataclass
from os import PathLike

import numpy as np

from ocelot_em.errors import InvalidInputError
from ocelot_em.merge.result import MergedResult
from ocelot_em.merge.stats.summary import Summary
from ocelot_em.particles.picking import find_peaks
from ocelot_em.particles.table import EXPOSURE, NEG_LOG_P, ParticleTable


@dataclass(frozen=True)
class ReportData:
    """The data of a report.

    ``no_particles_reason``: why no particles could be picked; otherwise empty.
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
    _check_origin(particles, merged)
    return ReportData(merged, summary, particles, reason)


def _check_origin(particles: ParticleTable, merged: MergedResult) -> None:
    """Raise InvalidInputError for particles that cannot belong to a result."""
    known = {exposure.id for exposure in merged.attributes.exposures}
    unknown = {*particles.columns.get(EXPOSURE, np.array([])).tolist()} - known
    expected, got = ("a montage", "one exposure") if known else ("one exposure", "a montage")
    if particles.is_of_montage and known:
        expected, got = "its exposures", f"exposure {min(unknown, default='')!r}"
    if len(particles) and (unknown or particles.is_of_montage != bool(known)):
        raise InvalidInputError(
            f"particles: expected particles of {expected}, got particles of {got}; pick them with "
            f"find_peaks from {merged.url}"
        )
