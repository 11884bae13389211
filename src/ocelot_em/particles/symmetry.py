"""Symmetry groups of templates, and the angles between orientations under them."""

import re
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from ocelot_em.errors import InvalidInputError
from ocelot_em.model.maps import AnyArray, Float64

if TYPE_CHECKING:
    from scipy.spatial.transform import Rotation

ANGLE_ERROR = 1e-4
"""Error of an angle in degrees between orientations of single precision."""

_NAMES = re.compile("C[1-9][0-9]{0,2}|D[1-9][0-9]{0,2}|T|O|I|I1|I2")


def parse_symmetry(name: object) -> str:
    """Return the name of a symmetry group in capitals.

    >>> parse_symmetry("d7")
    'D7'

    Raises
    ------
    InvalidInputError
        There is no such group.
    """
    text = str(name).strip().upper()
    if not _NAMES.fullmatch(text):
        raise InvalidInputError(
            "symmetry: expected C or D with a number, such as C4, or T, O, I, I1 or I2, as in "
            f"RELION, got {name!r}"
        )
    return text


@cache
def symmetry_group(name: str) -> "Rotation":
    """Return the rotations of a symmetry group, which leave a template as it is.

    The axes are those of RELION (``SymList::fill_symmetry_class``): of C and D, the main axis is z,
    and x is a twofold axis of D. T has a threefold axis along z, O fourfold axes along x, y and z.
    I1 and I2 have twofold axes along x, y and z; the fivefold axes next to z are in the yz plane
    of I1 and in the xz plane of I2. I is I2.

    >>> len(symmetry_group("D7")), len(symmetry_group("I"))
    (14, 60)
    """
    from scipy.spatial.transform import Rotation

    kind = parse_symmetry(name)
    if kind in ("I", "I2"):
        turn = Rotation.from_euler("Z", 90, degrees=True)
    elif kind == "T":  # (1, 1, 1) becomes z, and z (0, sqrt(2/3), sqrt(1/3))
        rows = [[-1, 1, 0], [-1, -1, 2], [1, 1, 1]] / np.sqrt([[2], [6], [3]])
        turn = Rotation.from_matrix(rows)
    else:
        return Rotation.create_group("I" if kind == "I1" else kind)
    return turn * Rotation.create_group(kind[0]) * turn.inv()


def rotation_between(
    phi: tuple[AnyArray, AnyArray],
    theta: tuple[AnyArray, AnyArray],
    psi: tuple[AnyArray, AnyArray],
    *,
    symmetry: str = "C1",
) -> Float64:
    """Return the angle in degrees of the smallest rotation between two orientations.

    The Euler angles (ZYZ) of both sets are in degrees, (n,) each. The result is (n,) from 0 to 180,
    and NaN where an Euler angle is NaN. The orientation Rz(phi) Ry(theta) Rz(psi) takes the axes of
    the image to those of the template, so that orientations of a symmetric template are the same
    if they differ by a rotation of its group from the left.
    """
    from scipy.spatial.transform import Rotation

    one, other = (
        np.stack([np.asarray(angle[k], np.float64) for angle in (phi, theta, psi)], axis=-1)
        for k in (0, 1)
    )
    smallest = np.full(len(one), np.nan)
    known = np.isfinite(one).all(axis=1) & np.isfinite(other).all(axis=1)
    if not known.any():
        return smallest
    back, there = (Rotation.from_euler("ZYZ", own[known], degrees=True) for own in (one, other))
    angles = [(back.inv() * same * there).magnitude() for same in symmetry_group(symmetry)]
    smallest[known] = np.degrees(np.min(angles, axis=0))
    return smallest


def quaternions(phi: AnyArray, theta: AnyArray, psi: AnyArray) -> Float64:
    """Return unit quaternions (n, 4) of orientations as :func:`rotation_between` takes; or NaN."""
    from scipy.spatial.transform import Rotation

    angles = np.stack([np.asarray(angle, np.float64) for angle in (phi, theta, psi)], axis=-1)
    found, known = np.full((len(angles), 4), np.nan), np.isfinite(angles).all(axis=1)
    if known.any():
        found[known] = Rotation.from_euler("ZYZ", angles[known], degrees=True).as_quat()
    return found
