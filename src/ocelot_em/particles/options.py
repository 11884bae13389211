"""How particles are picked."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from ocelot_em.particles.duplicates import Tolerances


class PickOptions(BaseModel):
    """How to pick particles; the same names as the command line's options.

    Parameters
    ----------
    method
        ``gaussian``: z-score that Gaussian noise exceeds ``false_positives`` times. ``gev``: the
        same for the extreme value distribution that fits the map. ``pvalue``: -ln p of ranks of
        ``mip`` and z-score.
    false_positives
        How many are accepted, over the whole map (``gaussian``, ``gev``).
    cutoff
        Taken instead of what the method finds, in the method's own scale: z-score, or -ln p, which
        is 8 by default.
    min_distance
        No two peaks are closer, in pixels; of a montage, in the same exposure.
    per
        Of a montage. ``exposure``: every exposure has a cutoff of its own, with so many false
        positives in each, and peaks are picked from all its valid pixels, shown or not.
        ``montage``: there is one cutoff, with so many false positives in the whole montage, and
        peaks are picked from the pixels that are shown. ``pvalue`` ranks are always those of an
        exposure.
    same_distance, same_angle, same_defocus
        Peaks of different exposures are one particle if they are strictly closer than so many
        pixels on the canvas (None: ``min_distance``; 0: they never are), and their poses differ by
        at most so many degrees and Å; see :class:`ocelot_em.particles.duplicates.Tolerances`. The
        particle is reported once, as it was seen where the montage's rule prefers it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Literal["gaussian", "gev", "pvalue"] = "gaussian"
    false_positives: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    cutoff: Annotated[float, Field(allow_inf_nan=False)] | None = None
    min_distance: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 5.0
    per: Literal["exposure", "montage"] = "exposure"
    same_distance: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    same_angle: Annotated[float, Field(ge=0, le=180)] = 10.0
    same_defocus: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 500.0

    @property
    def tolerances(self) -> Tolerances:
        """How much sightings of one particle may differ."""
        distance = self.min_distance if self.same_distance is None else self.same_distance
        return Tolerances(distance, self.same_angle, self.same_defocus)
