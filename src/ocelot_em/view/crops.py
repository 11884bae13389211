"""Parts of a micrograph, and projections of a template, as the search sees them."""

from math import ceil

import numpy as np
from scipy.ndimage import affine_transform, gaussian_filter
from scipy.spatial.transform import Rotation

from ocelot_em.model.maps import AnyArray, Float32

MAX_EDGE = 128
"""Maximum edge of a projected volume in voxels; a larger one is binned first."""


def crop_box(
    micrograph: AnyArray, corner: tuple[int, int], box_px: int, sigma_px: float
) -> Float32:
    """Return the pixels in the template box of a particle, smoothed by a Gaussian.

    Parameters
    ----------
    micrograph
        Image (y, x); only the pixels around the box are read.
    corner
        Row and column of the box's upper left corner, which is the position of a particle.
    box_px
        Edge of the box; the result is smaller where the box ends beyond the micrograph.
    sigma_px
        Standard deviation of the Gaussian.

    Examples
    --------
    >>> crop_box(np.arange(20).reshape(4, 5), (1, 2), 2, 0)
    array([[ 7.,  8.],
           [12., 13.]], dtype=float32)
    """
    margin = ceil(4 * sigma_px)
    starts = [max(start - margin, 0) for start in corner]
    around = tuple(
        slice(first, start + box_px + margin) for first, start in zip(starts, corner, strict=True)
    )
    smooth: Float32 = gaussian_filter(micrograph[around].astype(np.float32), sigma_px)
    inner = tuple(
        slice(start - first, start - first + box_px)
        for first, start in zip(starts, corner, strict=True)
    )
    return smooth[inner]


def bin_volume(volume: AnyArray, max_edge: int = MAX_EDGE) -> tuple[Float32, float]:
    """Return a cube with at most ``max_edge`` voxels along an edge, and its centre.

    Voxels are means of blocks; incomplete blocks at the end are left out. The centre is that of the
    volume, its voxel ``n // 2``, in voxels of the result. One layer of blocks is read at a time.

    Examples
    --------
    >>> binned, centre = bin_volume(np.ones((8, 8, 8)), 4)
    >>> binned.shape, centre
    ((4, 4, 4), 1.75)
    """
    edge = len(volume)
    factor = ceil(edge / max_edge)
    n = edge // factor
    layers = [
        volume[k * factor : (k + 1) * factor, : n * factor, : n * factor]
        .reshape(factor, n, factor, n, factor)
        .mean(axis=(0, 2, 4), dtype=np.float32)
        for k in range(n)
    ]
    return np.stack(layers), (edge // 2 + 0.5) / factor - 0.5


def project(volume: Float32, centre: float, angles_degrees: tuple[float, float, float]) -> Float32:
    """Return the projection (y, x) of a volume (z, y, x) at a pose.

    The pixel at q = (x, y) is the sum over z of the volume at R (x, y, z), relative to the centre,
    with R = Rz(phi) Ry(theta) Rz(psi): the central slice that Leopard-EM takes, and the projection
    of RELION and cisTEM with rot = phi and tilt = theta. Voxels are interpolated linearly.

    Parameters
    ----------
    volume, centre
        A cube, and its centre along each axis, in voxels.
    angles_degrees
        phi, theta and psi.

    Examples
    --------
    >>> volume = np.zeros((5, 5, 5), np.float32)
    >>> volume[2, 2, 4] = 1  # at x = 2
    >>> np.argwhere(project(volume, 2, (0, 0, 90)) > 0.5)  # now at y = -2
    array([[0, 2]])
    """
    turn = Rotation.from_euler("ZYZ", angles_degrees, degrees=True).as_matrix()[::-1, ::-1]
    middle = np.full(3, centre)
    turned: Float32 = affine_transform(volume, turn, middle - turn @ middle, order=1)
    projection: Float32 = turned.sum(axis=0)
    return projection
