"""The best particles in the micrograph, and the projections of the template at their poses."""

from contextlib import ExitStack
from dataclasses import dataclass
from math import log, pi, sqrt
from os import PathLike
from typing import Any

import numpy as np

from ocelot_em.errors import InvalidInputError
from ocelot_em.merge.result import MergedResult
from ocelot_em.model.maps import AnyArray, Float32
from ocelot_em.model.options import Options
from ocelot_em.model.regions import template_box_of
from ocelot_em.model.text import shape_text
from ocelot_em.particles.table import ParticleTable

LOW_PASS_ANGSTROM = 20.0
"""Resolution at which the low-pass filter of the micrograph halves amplitudes."""

LOW_PASS_PX = 10.0
"""The same in pixels if their size is unknown."""

_SIGMA = sqrt(log(2) / 2) / pi
"""Standard deviation of a Gaussian that halves amplitudes at a resolution of 1."""


class ReportImages(Options):
    """Images for a report, besides its result.

    Parameters
    ----------
    pyramid
        Image of this result from :func:`ocelot_em.io.ome_zarr.write_ome_zarr`, from which the
        overview is then read.
    micrograph
        MRC file of the micrograph that was searched: the best particles are shown in it. Not for a
        montage.
    template
        MRC file of the template that was searched: its projections at the poses of the best
        particles are shown.
    """

    pyramid: str | PathLike[str] | None = None
    micrograph: str | PathLike[str] | None = None
    template: str | PathLike[str] | None = None


@dataclass(frozen=True)
class Hits:
    """Pictures of particles in their order; an empty list if there is no file to draw them from.

    ``box_px`` is the edge of the template box, or None without a micrograph.
    """

    crops: list[Float32]
    projections: list[Float32]
    box_px: int | None
    low_pass: str


def read_hits(
    merged: MergedResult, particles: ParticleTable, rows: AnyArray, images: ReportImages
) -> Hits:
    """Read the pictures of some particles.

    Raises
    ------
    InvalidInputError
        A file cannot be read, or is not the micrograph or the template of the result.
    MissingDependencyError
        mrcfile is not installed.
    """
    with ExitStack() as stack:
        micrograph, template = (
            None if path is None else _opened(stack, path)
            for path in (images.micrograph, images.template)
        )
        box, problems = _box_px(merged, images, micrograph, template)
        if problems:
            raise InvalidInputError(problems)
        columns, size = particles.columns, merged.attributes.pixel_size_angstrom
        sigma = _SIGMA * (LOW_PASS_ANGSTROM / size if size else LOW_PASS_PX)
        crops, projections = list[Float32](), list[Float32]()
        if micrograph is not None and box is not None:
            from ocelot_em.view.crops import crop_box

            places = zip(
                *(columns[name][rows].tolist() for name in ("pos_y", "pos_x")), strict=True
            )
            crops = [crop_box(micrograph, place, box, sigma) for place in places]
        if template is not None:
            from ocelot_em.view.crops import bin_volume, project

            poses = zip(
                *(columns[name][rows].tolist() for name in ("phi", "theta", "psi")), strict=True
            )
            volume, centre = bin_volume(template)
            unknown = np.full(volume.shape[1:], np.nan, np.float32)
            projections = [
                project(volume, centre, pose) if np.isfinite(pose).all() else unknown
                for pose in poses
            ]
    low_pass = f"{LOW_PASS_ANGSTROM:g} Å" if size else f"{LOW_PASS_PX:g} pixels"
    return Hits(crops, projections, box, low_pass)


def draw_picture(picture: Float32, title: str, ax: Any, *, is_dark: bool = False) -> None:
    """Draw a picture in grey from its 1st to its 99th percentile; ``is_dark``: high values are."""
    known = picture[np.isfinite(picture)]
    low, high = np.percentile(known, (1, 99.9 if is_dark else 99)) if known.size else (0, 1)
    ax.imshow(picture, cmap="gray_r" if is_dark else "gray", vmin=low, vmax=max(high, low + 1e-9))
    ax.set_title(title)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(True)


def _opened(stack: ExitStack, path: str | PathLike[str]) -> AnyArray:
    from ocelot_em.io.mrc import open_mrc

    return stack.enter_context(open_mrc(path))


def _box_px(
    merged: MergedResult,
    images: ReportImages,
    micrograph: AnyArray | None,
    template: AnyArray | None,
) -> tuple[int | None, list[str]]:
    """Return the template box, and what is wrong with the images."""
    url, problems, is_montage = merged.url, list[str](), merged.attributes.is_montage
    shape, valid = merged.attributes.shape, merged.attributes.valid_shape
    box = None if is_montage else template_box_of(shape, valid)
    if template is not None:
        edge = len(template)
        if template.ndim != 3 or template.shape != (edge,) * 3:
            problems.append(
                f"{images.template}: expected a cube, the template that was searched, got shape "
                f"{template.shape}"
            )
        elif box not in (None, edge):
            problems.append(
                f"{images.template}: expected a cube of {box} voxels along each edge, the template "
                f"box of {url}, got {edge}; give the template that was searched"
            )
        box = box or edge
    if micrograph is None:
        return None, problems
    if micrograph.ndim != 2:
        problems.append(
            f"{images.micrograph}: expected one image, got {len(micrograph):,} sections; write the "
            "searched one to a file of its own"
        )
    elif is_montage:
        problems.append(
            f"{images.micrograph}: expected no micrograph, because {url} is a montage of several, "
            "got one; write a report of each exposure's own result"
        )
    elif (box := box or template_box_of(micrograph.shape, valid)) is None:
        problems.append(
            f"{images.micrograph}: expected a result with a known template box, got {url} without "
            "one; give the template, or import the files again with --template-box"
        )
    elif micrograph.shape not in (shape, whole := (valid[0] + box - 1, valid[1] + box - 1)):
        problems.append(
            f"{images.micrograph}: expected {shape_text(whole)} pixels, the micrograph of {url}, "
            f"got {shape_text(micrograph.shape)}; give the micrograph that was searched"
        )
    return box, problems
