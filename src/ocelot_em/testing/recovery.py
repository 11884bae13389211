"""Comparison of found particles with planted ones."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ocelot_em.model.maps import POSES, SCALED_MIP, AnyArray
from ocelot_em.model.regions import Region
from ocelot_em.testing.noise import window

TRUTH_DTYPE = np.dtype(
    [
        ("y", np.int64),
        ("x", np.int64),
        ("phi", np.float32),
        ("theta", np.float32),
        ("psi", np.float32),
        ("defocus_angstrom", np.float32),
        ("pixel_size_offset_angstrom", np.float32),
        ("global_index", np.int32),
        ("partial", np.int32),
        ("amplitude", np.float32),
    ]
)
"""Fields of a truth table. ``y`` and ``x`` are the corner of the template box in pixels, angles are
in degrees, and ``amplitude`` is in standard deviations, approximately the expected z-score."""

TRUTH_POSES = ("phi", "theta", "psi", "defocus_angstrom", "pixel_size_offset_angstrom")


@dataclass(frozen=True, slots=True)
class Recovery:
    """Number of planted particles, of those found, and of those with exactly the pose."""

    n: int
    found: int
    pose_right: int


def compare_with_truth(
    truth: NDArray[np.void], read: Callable[[str, Region], AnyArray], cutoff: float
) -> Recovery:
    """Search merged maps for planted particles.

    A particle is found if the highest ``scaled_mip`` within two pixels of it along each axis
    exceeds the cutoff; its pose is read at that pixel. NaN is ignored; in a tie the first pixel in
    row order is used.

    ``truth`` has :data:`TRUTH_DTYPE`, in the coordinates of the merged maps and at least two pixels
    from their edges, as :attr:`Simulation.truth` is. ``read`` reads a region of a merged map by
    name: ``scaled_mip`` or one of :data:`~ocelot_em.model.maps.POSES`.
    """
    found = pose_right = 0
    for particle in truth:
        around = window(particle)
        z = read(SCALED_MIP, around)
        z = np.where(np.isnan(z), -np.inf, z)
        y, x = (int(i) for i in np.unravel_index(np.argmax(z), z.shape))
        if not z[y, x] > cutoff:
            continue
        found += 1
        pixel = Region(around.y0 + y, around.y0 + y + 1, around.x0 + x, around.x0 + x + 1)
        pose_right += all(
            read(name, pixel).item() == particle[column].item()
            for name, column in zip(POSES, TRUTH_POSES, strict=True)
        )
    return Recovery(len(truth), found, pose_right)
