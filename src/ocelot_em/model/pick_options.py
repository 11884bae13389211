"""Options for particle picking."""

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from ocelot_em.model.options import Options


class PickOptions(Options):
    """Options for particle picking, with the same names as on the command line.

    Parameters
    ----------
    method
        How significance is judged. ``gaussian``: by the z-score that Gaussian noise exceeds
        as often as there may be false positives. ``gev``: the same for an extreme value
        distribution fitted to the map. ``pvalue``: by -ln p from the ranks of ``mip`` and z-score.
        ``mip``: by ``mip`` itself, with a cutoff of yours.
    false_positives
        Expected number of false positives in the whole map (``gaussian``, ``gev``).
    cutoff
        Cutoff to use instead of the method's, in the method's own scale: z-score, -ln p, or
        ``mip``. Default: from the expected number of false positives, or 8 for ``pvalue``.
    min_distance
        Minimum distance between peaks in pixels; in a montage, within one exposure. Leopard-EM up
        to 1.3.0 has 5; later versions, and cisTEM, have 10.
    min_angle
        Maximum difference in degrees between the orientation of a peak and of those that it
        suppresses within that distance: others are peaks, too. Of groups of different templates,
        the distance alone decides. Default: any orientation.
    mask
        Where particles may be: an image (.mrc, .npy, .h5; a Zarr array), not 0 where they may; or
        the vertices of polygons (.csv) in which they may not. Pixels outside do not count for the
        cutoff. Default: everywhere.
    mask_of
        What the mask is of: the ``micrograph``, whose pixels are those of the particles' centres,
        or the ``map``. Default: whichever has its shape; if both have it, the micrograph.
    mask_marks
        What pixels of a mask are that are not 0, or are in a polygon: ``kept`` or ``excluded``.
        Default: kept if it is an image, excluded if it is polygons.
    mask_unit
        Unit of polygons.
    mask_box
        Edge of the template box in pixels, by half of which polygons of the micrograph are shifted.
        Default: that of the maps; give it for maps of valid pixels only, which have none.
    edge
        Width in pixels of the edge of the valid pixels in which no particles are picked; in a
        montage, of each exposure. They do not count for the cutoff.
    per
        Scope of the false positives and of the cutoff in a montage. ``exposure``: each exposure has
        its own cutoff, and peaks are picked from all its valid pixels, shown or hidden.
        ``montage``: one cutoff applies to the whole montage, and peaks are picked from the shown
        pixels.
        ``pvalue`` ranks are always per exposure. Groups are picked from the shown pixels, and each
        has its own cutoff, for its share of the false positives of all.
    same_distance
        Maximum distance in pixels on the canvas between peaks of different exposures that are one
        particle, if their poses agree, too; 0: never. The particle is reported once, from the
        exposure that the montage's overlap rule prefers. Default: the minimum distance of peaks.
    same_angle
        Maximum difference in degrees between the orientations of one particle in two exposures.
    same_defocus
        Maximum difference in Å between the defoci of one particle in two exposures.

    Examples
    --------
    >>> from ocelot_em import PickOptions
    >>> PickOptions(method="gev", min_distance=5).false_positives
    1.0
    """

    method: Literal["gaussian", "gev", "pvalue", "mip"] = "gaussian"
    false_positives: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    cutoff: Annotated[float | None, Field(allow_inf_nan=False, validate_default=True)] = None
    min_distance: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 10.0
    min_angle: Annotated[float, Field(ge=0, le=180)] | None = None
    mask: Any = None
    mask_of: Literal["micrograph", "map"] | None = None
    mask_marks: Literal["kept", "excluded"] | None = None
    mask_unit: Literal["pixels", "angstrom"] = "pixels"
    mask_box: Annotated[int, Field(ge=1, le=2**16)] | None = None
    edge: Annotated[int, Field(ge=0, le=2**30)] = 0
    per: Literal["exposure", "montage"] = "exposure"
    same_distance: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    same_angle: Annotated[float, Field(ge=0, le=180)] = 10.0
    same_defocus: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 500.0

    @field_validator("cutoff")
    @classmethod
    def _has_cutoff_for_mip(cls, cutoff: float | None, known: ValidationInfo) -> float | None:
        if cutoff is None and known.data.get("method") == "mip":
            raise ValueError(
                "expected one for the method mip, because the distribution of noise differs from "
                "pixel to pixel, got none; give a value of mip"
            )
        return cutoff


class DetectionOptions(Options):
    """Options for detections in correlation tables, with the same names as on the command line.

    Parameters
    ----------
    cutoff
        Minimum z-score. Default: from the expected number of false positives.
    false_positives
        Number of correlations of Gaussian noise that are expected at or above the cutoff, in the
        whole search, with all its groups; of a montage, in each exposure.
    min_distance
        Distance in pixels below which a row is suppressed by a higher one of similar orientation;
        0: all rows at or above the cutoff are kept.
    min_angle
        Maximum difference in degrees between two orientations that are similar; it should be
        several angular steps of the search. 180: any two are, so that the best row of each place
        is kept.
    symmetry
        Symmetry of the template, such as C4, D7 or O, with the axes of RELION. Orientations that
        differ by a rotation of it are the same.
    micrograph
        Name of the micrograph, for the table. Default: that of the result, without ``.zarr``.
    mask
        Where particles may be: an image (.mrc, .npy, .h5; a Zarr array), not 0 where they may; or
        the vertices of polygons (.csv) in which they may not. Pixels outside do not count for the
        cutoff. Default: everywhere.
    mask_of
        What the mask is of: ``micrograph`` or ``map``. Default: whichever has its shape.
    mask_marks
        What marked pixels of a mask are: ``kept`` or ``excluded``. Default: kept if it is an image,
        excluded if it is polygons.
    mask_unit
        Unit of polygons.
    mask_box
        Edge of the template box in pixels, for polygons. Default: that of the maps.
    edge
        Width in pixels of the edge of the valid pixels that has no detections.

    Examples
    --------
    >>> from ocelot_em.model.pick_options import DetectionOptions
    >>> DetectionOptions(min_distance=5).min_angle
    10.0
    """

    cutoff: Annotated[float, Field(allow_inf_nan=False)] | None = None
    false_positives: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    min_distance: Annotated[float, Field(ge=0, le=2**20)] = 10.0
    min_angle: Annotated[float, Field(ge=0, le=180)] = 10.0
    symmetry: str = "C1"
    micrograph: str | None = None
    mask: Any = None
    mask_of: Literal["micrograph", "map"] | None = None
    mask_marks: Literal["kept", "excluded"] | None = None
    mask_unit: Literal["pixels", "angstrom"] = "pixels"
    mask_box: Annotated[int, Field(ge=1, le=2**16)] | None = None
    edge: Annotated[int, Field(ge=0, le=2**30)] = 0
