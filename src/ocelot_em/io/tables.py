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

import itertools
import math
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, cast

import numpy as np

from ocelot_em.errors import InvalidInputError
from ocelot_em.io.optics import LEOPARD_ABERRATIONS, LEOPARD_MAPS, Optics
from ocelot_em.io.parquet import read_parquet, write_parquet
from ocelot_em.io.star_file import STAR_END, format_star
from ocelot_em.model.maps import MEAN, MIP, SCALED_MIP, SECOND_ZSCORE, STD, AnyArray, Int64
from ocelot_em.model.problems import require
from ocelot_em.particles.micrographs import names_of
from ocelot_em.particles.table import (
    DIFFERENCE,
    GROUP,
    GROUP_COLUMNS,
    INCOMPLETE_COLUMNS,
    PRECISION,
    RANK,
    RANK_IN_MICROGRAPH,
    RECALL,
    ParticleTable,
    is_formula,
    require_table,
)
from ocelot_em.store.whole_file import write_file


def write_table(
    table: ParticleTable,
    output: str | PathLike[str],
    *,
    optics: Optics | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a table in the format that the file's suffix names.

    ``.csv``: all columns. ``.parquet``: all columns and the picking parameters. ``.star``: for
    RELION, which requires optics.
    """
    place = Path(output)
    suffix = place.suffix.lower()
    if suffix == ".csv":
        return table.to_csv(place, overwrite=overwrite)
    if suffix == ".parquet":
        return write_parquet(table, output, overwrite=overwrite)
    if suffix != ".star":
        raise InvalidInputError(
            f"{output}: expected a name that ends in .csv, .star (RELION) or .parquet, got "
            f"{suffix!r}"
        )
    if optics is None:
        raise InvalidInputError(
            f"{output}: a STAR file needs the micrograph's optics, got none; give them "
            "(read_optics), or write .csv"
        )
    return write_relion_star(table, output, optics=optics, overwrite=overwrite)


def read_particles(path: str | PathLike[str]) -> ParticleTable:
    """Read a table of particles that :func:`write_table` wrote, .csv or .parquet."""
    readers = {".csv": ParticleTable.read_csv, ".parquet": read_parquet}
    suffix = Path(path).suffix.lower()
    if suffix not in readers:
        raise InvalidInputError(f"{path}: expected a table that ends in .csv or .parquet")
    return readers[suffix](path)


def write_leopard_csv(
    table: ParticleTable, output: str | PathLike[str], *, optics: Optics, overwrite: bool = False
) -> Path:
    """Write the results table of Leopard-EM's ``match_template``, which its refinement reads.

    It has all 39 columns in Leopard-EM's order. ``correlation_variance`` is the standard
    deviation, as in Leopard-EM; ``refined_pixel_size`` is the micrograph's pixel size, as before a
    refinement. Zernike coefficients, magnification matrix and map paths are text from the optics,
    or empty. The table has no columns for ``pixel_size_offset``, ``best_partial``, sub-pixel
    positions and ``neg_log_p``. Those of groups and estimates, and ``searched_share`` of an
    incomplete search, come after the 39. A path that a spreadsheet would interpret as a formula
    gets the prefix ``./``.

    Raises
    ------
    InvalidInputError
        The optics belong to another search, or a spreadsheet would interpret the text of an
        aberration as a formula.
    OutputExistsError
        The file exists, and ``overwrite`` is False.
    StorageError
        The file cannot be written.

    Examples
    --------
    >>> from ocelot_em import Optics, find_peaks, write_leopard_csv
    >>> microscope, defocus = (300.0, 2.7, 0.07, 2.5), (5200.0, 4900.0, 25.0, 0.0)
    >>> optics = Optics(*microscope, *defocus, "micrograph.mrc", "60S.mrc", 56)
    >>> write_leopard_csv(find_peaks("MERGED.zarr"), "leopard.csv", optics=optics).name
    'leopard.csv'
    """
    _require_types(table, optics)
    own, extra, size = table.columns, optics.leopard_columns, optics.pixel_size_angstrom
    formulas = [name for name in LEOPARD_ABERRATIONS if is_formula(extra.get(name, ""))]
    if formulas:
        raise InvalidInputError(
            f"{name}: expected no text that spreadsheets take for a formula, got {extra[name]!r}"
            for name in formulas
        )
    y, x, _, _ = _positions(table, optics)
    columns = {
        "particle_index": np.arange(len(table)),
        **{name: own[name] for name in (MIP, SCALED_MIP, MEAN)},
        "correlation_variance": own[STD],
        **{name: own[name] for name in ("total_correlations", "pos_x", "pos_y")},
        "pos_x_img": x,
        "pos_y_img": y,
        "pos_x_img_angstrom": x * size,
        "pos_y_img_angstrom": y * size,
        **{name: own[name] for name in ("phi", "theta", "psi", "relative_defocus")},
        "defocus_u": optics.defocus_u_angstrom,
        "defocus_v": optics.defocus_v_angstrom,
        "astigmatism_angle": optics.astigmatism_angle_degrees,
        "pixel_size": size,
        "refined_pixel_size": size,
        "voltage": optics.voltage_kv,
        "spherical_aberration": optics.spherical_aberration_mm,
        "amplitude_contrast_ratio": optics.amplitude_contrast,
        "phase_shift": optics.phase_shift_degrees,
        "ctf_B_factor": optics.ctf_b_factor_angstrom2,
        **{name: extra.get(name, "") for name in LEOPARD_ABERRATIONS},
    }
    paths = {"micrograph_path": optics.micrograph, "template_path": optics.template}
    paths |= {name: extra.get(name, "") for name in LEOPARD_MAPS}
    columns |= {name: f"./{p}" if is_formula(p) else p for name, p in paths.items()}
    more = *GROUP_COLUMNS, PRECISION, RECALL, *INCOMPLETE_COLUMNS
    columns |= {name: own[name] for name in more if name in own}
    text = _frame(table, columns).to_csv(index=False, lineterminator="\n")
    return write_file(output, text.encode(), overwrite=overwrite)


def write_relion_star(
    table: ParticleTable, output: str | PathLike[str], *, optics: Optics, overwrite: bool = False
) -> Path:
    """Write a STAR file of RELION 3.1 and later: one optics group and its particles.

    Coordinates are whole pixels, because RELION truncates them; the remainder is in
    ``rlnOriginXAngst`` and ``rlnOriginYAngst``, which RELION subtracts from the coordinates. Image
    size and pixel size are those of the template and the micrograph; images that RELION extracts
    have their own. ``rlnAutopickFigureOfMerit`` is the z-score. Defocus is the micrograph's plus
    the particle's. Rank, ``mip``, estimates and what is known of groups have columns that
    begin with ``ocelot``: RELION says that it does not know them, and keeps them.

    Raises
    ------
    InvalidInputError
        The optics belong to another search, or STAR files cannot hold the name of the micrograph
        or the label: it contains quotation marks, ``#`` or whitespace other than plain spaces, or
        stands for a missing value.
    OutputExistsError
        The file exists, and ``overwrite`` is False.
    StorageError
        The file cannot be written.

    Examples
    --------
    >>> from ocelot_em import Optics, find_peaks, write_relion_star
    >>> microscope, defocus = (300.0, 2.7, 0.07, 2.5), (5200.0, 4900.0, 25.0, 0.0)
    >>> optics = Optics(*microscope, *defocus, "micrograph.mrc", "60S.mrc", 56)
    >>> write_relion_star(find_peaks("MERGED.zarr"), "particles.star", optics=optics).name
    'particles.star'
    """
    _require_types(table, optics)
    groups = OpticsGroups([optics])
    blocks = {"optics": groups.block, "particles": groups.particles(table, optics)}
    text = format_star(blocks, table.incomplete_text) + STAR_END
    return write_file(output, text, overwrite=overwrite)


class OpticsGroups:
    """Optics groups of RELION: micrographs whose group has the same name and values share one.

    Where values differ, later groups of the same name get a number after it.

    Raises
    ------
    InvalidInputError
        STAR files cannot hold the name of a micrograph or of a group.
    """

    def __init__(self, several: Sequence[Optics]) -> None:
        self._numbers = dict[tuple[Any, ...], int]()
        """Numbers of groups, from 1, by their name and values."""
        for optics in several:
            _require_star_names({"micrograph": optics.micrograph, "label": optics.label})
            self._numbers.setdefault(_group_of(optics), len(self._numbers) + 1)

    @property
    def block(self) -> dict[str, list[Any]]:
        """The table of optics groups."""
        names = list[str]()
        for label, *_ in self._numbers:
            others = (f"{label}_{number}" for number in itertools.count(2))
            names.append(next(n for n in itertools.chain([label], others) if n not in names))
        _, *values = map(list, zip(*self._numbers, strict=True))
        # Numbers come first: parsers take any line that starts like a header for one.
        return {
            "rlnOpticsGroup": list(self._numbers.values()),
            "rlnOpticsGroupName": names,
            **dict(zip(_GROUP, values, strict=True)),
            "rlnImageDimensionality": [2] * len(names),
        }

    def particles(self, table: ParticleTable, optics: Optics) -> Any:
        """Return the particles of a micrograph as a data frame with RELION's columns."""
        own, size = table.columns, optics.pixel_size_angstrom
        y, x, u, v = _positions(table, optics)
        columns = {
            "rlnCoordinateX": x.astype(np.float64),
            "rlnCoordinateY": y.astype(np.float64),
            "rlnOriginXAngst": _residual(own["pos_x"], own["pos_x_subpixel"]) * size,
            "rlnOriginYAngst": _residual(own["pos_y"], own["pos_y_subpixel"]) * size,
            "rlnAngleRot": own["phi"],
            "rlnAngleTilt": own["theta"],
            "rlnAnglePsi": own["psi"],
            "rlnAutopickFigureOfMerit": own[SCALED_MIP],
            "rlnDefocusU": u,
            "rlnDefocusV": v,
            "rlnDefocusAngle": optics.astigmatism_angle_degrees,
            "rlnPhaseShift": optics.phase_shift_degrees,
            "rlnOpticsGroup": self._numbers[_group_of(optics)],
            "rlnMicrographName": optics.micrograph,
            **_own_columns(table),
        }
        return _frame(table, columns)


_GROUP = {
    "rlnVoltage": "voltage_kv",
    "rlnSphericalAberration": "spherical_aberration_mm",
    "rlnAmplitudeContrast": "amplitude_contrast",
    "rlnImagePixelSize": "pixel_size_angstrom",
    "rlnImageSize": "template_box_px",
}
"""RELION's columns of an optics group, and where their values are in :class:`Optics`."""


def _group_of(optics: Optics) -> tuple[Any, ...]:
    """Return the name of an optics group and its values."""
    return (optics.label, *(getattr(optics, name) for name in _GROUP.values()))


def write_cistem_star(
    table: ParticleTable, output: str | PathLike[str], *, optics: Optics, overwrite: bool = False
) -> Path:
    """Write template matches in cisTEM's own STAR format.

    Positions are distances in Å from the micrograph's first pixel to the particle's centre, in
    whole pixels as in cisTEM; defocus is absolute; the score is the z-score. Rank, ``mip``,
    estimates and what is known of groups have columns that begin with ``ocelot``, which cisTEM
    ignores. It cannot read a file without particles.

    Raises
    ------
    InvalidInputError
        The optics belong to another search, or cisTEM cannot read the name of the micrograph or
        the template: it contains spaces, quotation marks or ``#``.
    OutputExistsError
        The file exists, and ``overwrite`` is False.
    StorageError
        The file cannot be written.

    Examples
    --------
    >>> from ocelot_em import Optics, find_peaks, write_cistem_star
    >>> microscope, defocus = (300.0, 2.7, 0.07, 2.5), (5200.0, 4900.0, 25.0, 0.0)
    >>> optics = Optics(*microscope, *defocus, "micrograph.mrc", "60S.mrc", 56)
    >>> write_cistem_star(find_peaks("MERGED.zarr"), "cistem.star", optics=optics).name
    'cistem.star'
    """
    _require_types(table, optics)
    blocks = {"": cistem_matches(table, optics)}
    text = format_star(blocks, table.incomplete_text) + STAR_END
    return write_file(output, text, overwrite=overwrite)


def cistem_matches(table: ParticleTable, optics: Optics, first: int = 1) -> Any:
    """Return the particles of a micrograph as a data frame with cisTEM's columns.

    ``first`` is the number of the first one. Errors as of :func:`write_cistem_star`.
    """
    names = {"micrograph": optics.micrograph, "template": optics.template}
    _require_star_names(names, spaces=False)
    own, size = table.columns, optics.pixel_size_angstrom
    y, x, u, v = _positions(table, optics)
    matches = {
        "cisTEMPositionInStack": np.arange(first, first + len(table)),
        "cisTEMAnglePsi": own["psi"],
        "cisTEMAngleTheta": own["theta"],
        "cisTEMAnglePhi": own["phi"],
        "cisTEMDefocus1": u,
        "cisTEMDefocus2": v,
        "cisTEMDefocusAngle": optics.astigmatism_angle_degrees,
        "cisTEMPhaseShift": optics.phase_shift_degrees,
        "cisTEMScore": own[SCALED_MIP],
        "cisTEMPixelSize": size,
        "cisTEMMicroscopeVoltagekV": optics.voltage_kv,
        "cisTEMMicroscopeCsMM": optics.spherical_aberration_mm,
        "cisTEMAmplitudeContrast": optics.amplitude_contrast,
        # cisTEM ignores a name that is not in single quotation marks.
        "cisTEMOriginalImageFilename": f"'{optics.micrograph}'",
        "cisTEMReference3DFilename": f"'{optics.template}'",
        "cisTEMOriginalXPosition": x * size,
        "cisTEMOriginalYPosition": y * size,
        **_own_columns(table),
    }
    return _frame(table, matches)


_OWN: Mapping[str, str] = {
    RANK: "ocelotRank",
    RANK_IN_MICROGRAPH: "ocelotRankInMicrograph",
    MIP: "ocelotMip",
    GROUP: "ocelotGroup",
    SECOND_ZSCORE: "ocelotSecondZscore",
    DIFFERENCE: "ocelotZscoreDifference",
    PRECISION: "ocelotPrecision",
    RECALL: "ocelotRecall",
}
"""Columns that have no name in other programs: RELION keeps them, cisTEM ignores them."""


def _own_columns(table: ParticleTable) -> dict[str, AnyArray]:
    return {title: table.columns[name] for name, title in _OWN.items() if name in table}


def _require_types(table: object, optics: object) -> None:
    require_table(table)
    require(optics, Optics, "optics: expected Optics, as from read_optics")


def _positions(table: ParticleTable, optics: Optics) -> tuple[Int64, Int64, AnyArray, AnyArray]:
    """Return the particles' centres y and x in pixels, and their absolute defocus u and v in Å.

    Optics that contradict the table's record of its search are refused.
    """
    if table.is_of_montage:
        raise InvalidInputError(
            "particles: expected those of one micrograph, got those of a montage, whose exposures "
            "have optics of their own: take one exposure's with --exposure ID "
            "(ParticleTable.of_exposure)"
        )
    if len(names := names_of(table)) > 1:
        raise InvalidInputError(
            "particles: expected those of one micrograph, which the optics are of, got those of "
            f"{len(names):,}; select one with --micrograph {names[0]}"
        )
    if (about := table.about) is not None:
        require_same_search(optics, about.store, about.template_box_px, about.pixel_size_angstrom)
    half, own = optics.template_box_px // 2, table.columns
    y, x = (own[name].astype(np.int64) + half for name in ("pos_y", "pos_x"))
    relative = own["relative_defocus"].astype(np.float64)
    return y, x, relative + optics.defocus_u_angstrom, relative + optics.defocus_v_angstrom


def require_same_search(
    optics: Optics, store: str, template_box_px: int | None, pixel_size_angstrom: float | None
) -> None:
    """Raise InvalidInputError if optics contradict what is known of a search."""
    got, problems = optics.pixel_size_angstrom, []
    if template_box_px not in (None, optics.template_box_px):
        problems.append(
            f"template_box_px: expected {template_box_px}, got {optics.template_box_px}"
        )
    if pixel_size_angstrom is not None and not math.isclose(pixel_size_angstrom, got, rel_tol=1e-4):
        problems.append(f"pixel_size_angstrom: expected {pixel_size_angstrom}, got {got}")
    if problems:
        raise InvalidInputError(f"{p}; are these the optics of {store}?" for p in problems)


def _frame(table: ParticleTable, columns: Mapping[str, Any]) -> Any:
    """Return a data frame with a row for each particle; single values are those of all rows."""
    import pandas as pd

    return pd.DataFrame(columns, index=range(len(table)))


def _residual(whole: AnyArray, subpixel: AnyArray) -> AnyArray:
    """Return whole minus sub-pixel positions; 0 where the latter are NaN."""
    return cast("AnyArray", np.nan_to_num(whole - subpixel.astype(np.float64)))


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
