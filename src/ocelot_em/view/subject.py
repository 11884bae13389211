"""The data of a report."""

from dataclasses import dataclass
from os import PathLike

from ocelot_em.errors import IncompleteError, InvalidInputError
from ocelot_em.merge.stats.summary import (
    Summary,
    open_merged_result,
    read_exposure_statistics,
    read_summary,
)
from ocelot_em.particles.picking import find_peaks
from ocelot_em.particles.table import EXPOSURE, NEG_LOG_P, ParticleTable
from ocelot_em.store import attributes as fmt
from ocelot_em.store.objects import open_objects
from ocelot_em.view.montage import Montage


@dataclass(frozen=True)
class Subject:
    """The data of a report."""

    store: str | PathLike[str]
    url: str
    attributes: fmt.MergedAttributes
    summary: Summary
    particles: ParticleTable
    trouble: str
    """Why no particles could be picked; otherwise empty."""
    montage: Montage | None
    """Placement and statistics of exposures, if the result is a montage."""

    @property
    def cutoff(self) -> tuple[float, float] | None:
        """Lowest and highest z-score cutoff of the particles, if they have one."""
        about = self.particles.about
        if about is None or NEG_LOG_P in self.particles.columns:
            return None
        own = [cutoff for _, cutoff in about.exposure_cutoffs]
        return about.cutoff, max(own, default=about.cutoff)


def subject_of(store: str | PathLike[str], particles: ParticleTable | None) -> Subject:
    """Read the data of a report."""
    objects = open_objects(store)
    attributes = open_merged_result(objects)
    summary = read_summary(store)
    if summary is None:
        raise IncompleteError(
            f"{objects.url}: it was merged without statistics, by an earlier version; merge again"
        )
    trouble = ""
    if particles is None:
        try:
            particles = find_peaks(store)
        except InvalidInputError as error:  # nothing was searched, or too little for a cutoff
            particles, trouble = ParticleTable.empty(), str(error)
    if problem := _misplaced(particles, attributes):
        raise InvalidInputError(f"particles: {problem}, as find_peaks gives them for {objects.url}")
    montage = None
    if attributes.exposures:
        of_exposures = read_exposure_statistics(store, summary.attributes)
        montage = Montage(attributes, summary, of_exposures)
    return Subject(store, objects.url, attributes, summary, particles, trouble, montage)


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
