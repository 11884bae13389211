"""Particle tables for other programs: Leopard-EM, RELION and cisTEM; and Parquet.

Here a particle's position is the upper left corner of its template box, as in maps. Other programs
use the box's centre, ``box // 2`` pixels further along both axes, counted from 0: Leopard-EM
(``pos_x_img``), RELION (the box that it extracts around a coordinate) and cisTEM (the centre of its
images).

Euler angles need no conversion. All three programs use the slice of the template's transform into
which ``Rz(phi) Ry(theta) Rz(psi)`` rotates the image plane, x first; RELION calls the angles rot,
tilt and psi, and its matrix is the inverse of this one. In all of them the astigmatism angle is
between x and ``defocus_u``, and defocus is positive for underfocus.
"""

import csv
import io
import math
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from ocelot_em.errors import InvalidInputError
from ocelot_em.io.optics import LEOPARD_ABERRATIONS, LEOPARD_MAPS, Optics
from ocelot_em.io.parquet import write_parquet
from ocelot_em.io.star_file import format_star
from ocelot_em.model.maps import MEAN, MIP, SCALED_MIP, STD, AnyArray, Int64
from ocelot_em.particles.table import (
    ParticleTable,
    as_text,
)
from ocelot_em.store.whole_file import write_file


def write_table(
    table: ParticleTable, path: str | PathLike[str], optics: Optics | None = None
) -> None:
    """Write a table in the format given by the file's suffix, replacing an existing file.

    Parameters
    ----------
    table
        The particles.
    path
        ``.csv``: all columns. ``.parquet``: all columns and the picking parameters. ``.star``: for
        RELION.
    optics
        Required for RELION.

    Raises
    ------
    InvalidInputError
        The suffix is unknown, or optics are missing for RELION.
    MissingDependencyError, StorageError
    """
    suffix = Path(path).suffix.lower()
    if suffix == ".csv":
        table.to_csv(path)
    elif suffix == ".parquet":
        write_parquet(table, path)
    elif suffix != ".star":
        raise InvalidInputError(
            f"{path}: expected a name that ends in .csv, .star (RELION) or .parquet, got {suffix!r}"
        )
    elif optics is None:
        raise InvalidInputError(
            f"{path}: a STAR file needs the micrograph's optics, got none; give Leopard-EM's "
            "configuration of the search, or write .csv"
        )
    else:
        write_relion_star(table, optics, path)


def write_leopard_csv(table: ParticleTable, optics: Optics, path: str | PathLike[str]) -> None:
    """Write the results table of Leopard-EM's ``match_template``, which its refinement reads.

    It has all 39 columns in Leopard-EM's order. ``correlation_variance`` is the standard
    deviation, as in Leopard-EM; ``refined_pixel_size`` is the micrograph's pixel size, as before a
    refinement. Zernike coefficients, magnification matrix and map paths are text from the optics,
    or empty. The table has no columns for ``pixel_size_offset``, ``best_partial``, sub-pixel
    positions and ``neg_log_p``.

    Raises
    ------
    InvalidInputError
        The optics belong to another search.
    StorageError
        The file cannot be written.
    """
    _require_same_search(table, optics)
    own, constant = table.columns, _constants(table)
    y, x = _centres(table, optics)
    size, extra = optics.pixel_size_angstrom, optics.leopard_columns
    columns = {
        "particle_index": as_text(np.arange(len(table))),
        "mip": as_text(own[MIP]),
        "scaled_mip": as_text(own[SCALED_MIP]),
        "correlation_mean": as_text(own[MEAN]),
        "correlation_variance": as_text(own[STD]),
        "total_correlations": as_text(own["total_correlations"]),
        "pos_x": as_text(own["pos_x"]),
        "pos_y": as_text(own["pos_y"]),
        "pos_x_img": as_text(x),
        "pos_y_img": as_text(y),
        "pos_x_img_angstrom": as_text(x * size),
        "pos_y_img_angstrom": as_text(y * size),
        **{name: as_text(own[name]) for name in ("phi", "theta", "psi", "relative_defocus")},
        "defocus_u": constant(optics.defocus_u_angstrom),
        "defocus_v": constant(optics.defocus_v_angstrom),
        "astigmatism_angle": constant(optics.astigmatism_angle_degrees),
        "pixel_size": constant(size),
        "refined_pixel_size": constant(size),
        "voltage": constant(optics.voltage_kv),
        "spherical_aberration": constant(optics.spherical_aberration_mm),
        "amplitude_contrast_ratio": constant(optics.amplitude_contrast),
        "phase_shift": constant(optics.phase_shift_degrees),
        "ctf_B_factor": constant(optics.ctf_b_factor_angstrom2),
        **{name: constant(extra.get(name, "")) for name in LEOPARD_ABERRATIONS},
        "micrograph_path": constant(optics.micrograph),
        "template_path": constant(optics.template),
        **{name: constant(extra.get(name, "")) for name in LEOPARD_MAPS},
    }
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    # Leopard-EM uses pandas, which writes NaN as an empty cell.
    writer.writerows(
        ["" if cell == "nan" else cell for cell in row]
        for row in zip(*columns.values(), strict=True)
    )
    write_file(path, text.getvalue().encode())


def write_relion_star(table: ParticleTable, optics: Optics, path: str | PathLike[str]) -> None:
    """Write a STAR file of RELION 3.1 and later: one optics group and its particles.

    Coordinates are whole pixels, because RELION truncates them; the remainder is in
    ``rlnOriginXAngst`` and ``rlnOriginYAngst``, which RELION subtracts from the coordinates. Image
    size and pixel size are those of the template and the micrograph; images that RELION extracts
    have their own. ``rlnAutopickFigureOfMerit`` is the z-score. Defocus is the micrograph's plus
    the particle's.

    Raises
    ------
    InvalidInputError
        The optics belong to another search, or STAR files cannot hold the name of the micrograph
        or the label: it contains quotation marks, ``#`` or whitespace other than plain spaces, or
        stands for a missing value.
    StorageError
        The file cannot be written.
    """
    _require_same_search(table, optics)
    _require_star_names({"micrograph": optics.micrograph, "label": optics.label})
    own, constant = table.columns, _constants(table)
    y, x = _centres(table, optics)
    u, v = _defocus(table, optics)
    size = optics.pixel_size_angstrom
    # Numbers come first: parsers take any line that starts like a header for one.
    group = {
        "rlnOpticsGroup": ["1"],
        "rlnOpticsGroupName": [optics.label],
        "rlnVoltage": [str(optics.voltage_kv)],
        "rlnSphericalAberration": [str(optics.spherical_aberration_mm)],
        "rlnAmplitudeContrast": [str(optics.amplitude_contrast)],
        "rlnImagePixelSize": [str(size)],
        "rlnImageSize": [str(optics.template_box_px)],
        "rlnImageDimensionality": ["2"],
    }
    particles = {
        "rlnCoordinateX": as_text(x.astype(np.float64)),
        "rlnCoordinateY": as_text(y.astype(np.float64)),
        "rlnOriginXAngst": as_text(_residual(own["pos_x"], own["pos_x_subpixel"]) * size),
        "rlnOriginYAngst": as_text(_residual(own["pos_y"], own["pos_y_subpixel"]) * size),
        "rlnAngleRot": as_text(own["phi"]),
        "rlnAngleTilt": as_text(own["theta"]),
        "rlnAnglePsi": as_text(own["psi"]),
        "rlnAutopickFigureOfMerit": as_text(own[SCALED_MIP]),
        "rlnDefocusU": as_text(u),
        "rlnDefocusV": as_text(v),
        "rlnDefocusAngle": constant(optics.astigmatism_angle_degrees),
        "rlnPhaseShift": constant(optics.phase_shift_degrees),
        "rlnOpticsGroup": constant(1),
        "rlnMicrographName": constant(optics.micrograph),
    }
    write_file(path, format_star({"optics": group, "particles": particles}))


def write_cistem_star(table: ParticleTable, optics: Optics, path: str | PathLike[str]) -> None:
    """Write template matches in cisTEM's own STAR format.

    Positions are distances in Å from the micrograph's first pixel to the particle's centre, in
    whole pixels as in cisTEM; defocus is absolute; the score is the z-score. cisTEM cannot read a
    file without particles.

    Raises
    ------
    InvalidInputError
        The optics belong to another search, or cisTEM cannot read the name of the micrograph or
        the template: it contains spaces, quotation marks or ``#``.
    StorageError
        The file cannot be written.
    """
    _require_same_search(table, optics)
    _require_star_names(
        {"micrograph": optics.micrograph, "template": optics.template}, spaces=False
    )
    own, constant = table.columns, _constants(table)
    y, x = _centres(table, optics)
    u, v = _defocus(table, optics)
    size = optics.pixel_size_angstrom
    matches = {
        "cisTEMPositionInStack": as_text(np.arange(1, len(table) + 1)),
        "cisTEMAnglePsi": as_text(own["psi"]),
        "cisTEMAngleTheta": as_text(own["theta"]),
        "cisTEMAnglePhi": as_text(own["phi"]),
        "cisTEMDefocus1": as_text(u),
        "cisTEMDefocus2": as_text(v),
        "cisTEMDefocusAngle": constant(optics.astigmatism_angle_degrees),
        "cisTEMPhaseShift": constant(optics.phase_shift_degrees),
        "cisTEMScore": as_text(own[SCALED_MIP]),
        "cisTEMPixelSize": constant(size),
        "cisTEMMicroscopeVoltagekV": constant(optics.voltage_kv),
        "cisTEMMicroscopeCsMM": constant(optics.spherical_aberration_mm),
        "cisTEMAmplitudeContrast": constant(optics.amplitude_contrast),
        # cisTEM ignores a name that is not in single quotation marks.
        "cisTEMOriginalImageFilename": constant(f"'{optics.micrograph}'"),
        "cisTEMReference3DFilename": constant(f"'{optics.template}'"),
        "cisTEMOriginalXPosition": as_text(x * size),
        "cisTEMOriginalYPosition": as_text(y * size),
    }
    write_file(path, format_star({"": matches}))


def _require_same_search(table: ParticleTable, optics: Optics) -> None:
    """Refuse optics that contradict the table's record of its search."""
    if table.is_of_montage:
        raise InvalidInputError(
            "particles: expected those of one micrograph, got those of a montage, whose exposures "
            "have optics of their own: take one exposure's with --exposure ID "
            "(ParticleTable.of_exposure)"
        )
    about = table.about
    if about is None:
        return
    problems = []
    box, size = about.template_box_px, about.pixel_size_angstrom
    if box is not None and box != optics.template_box_px:
        problems.append(f"template_box_px: expected {box}, got {optics.template_box_px}")
    if size is not None and not math.isclose(size, optics.pixel_size_angstrom, rel_tol=1e-4):
        problems.append(f"pixel_size_angstrom: expected {size}, got {optics.pixel_size_angstrom}")
    if problems:
        raise InvalidInputError(
            f"{problem}; are these the optics of {about.store}?" for problem in problems
        )


def _constants(table: ParticleTable) -> Any:
    """Return a function that makes a column of one value."""
    return lambda value: [str(value)] * len(table)


def _centres(table: ParticleTable, optics: Optics) -> tuple[Int64, Int64]:
    """Return y and x of the particles' centres, in pixels of the micrograph."""
    half = optics.template_box_px // 2
    y, x = (table.columns[name].astype(np.int64) + half for name in ("pos_y", "pos_x"))
    return y, x


def _defocus(table: ParticleTable, optics: Optics) -> tuple[AnyArray, AnyArray]:
    """Return the particles' absolute defocus u and v in Å."""
    relative = table.columns["relative_defocus"].astype(np.float64)
    return relative + optics.defocus_u_angstrom, relative + optics.defocus_v_angstrom


def _residual(whole: AnyArray, subpixel: AnyArray) -> AnyArray:
    """Return whole minus sub-pixel positions; 0 where the latter are NaN."""
    residual: AnyArray = np.nan_to_num(whole - subpixel.astype(np.float64))
    return residual


def _require_star_names(names: Mapping[str, str], *, spaces: bool = True) -> None:
    """Refuse names that STAR readers would truncate, treat as missing or fail to parse."""
    kind = "spaces other than ' '" if spaces else "spaces"
    problems = [
        f"{name}: expected a name without quotation marks, '#' and {kind}, that does not stand for "
        f"a missing value, got {text!r}; rename the file"
        for name, text in names.items()
        if any(c in "'\"#" or (c.isspace() and not (spaces and c == " ")) for c in text)
        or text.lower() in ("nan", "<na>")
    ]
    if problems:
        raise InvalidInputError(problems)
