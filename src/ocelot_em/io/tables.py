"""Particle tables as other programs read them: Leopard-EM, RELION, cisTEM; and Parquet.

Here a particle lies at the upper left corner of its template box, as maps have it; elsewhere at the
box's centre, which is ``box // 2`` pixels further in both axes, counted from 0. That is so in
Leopard-EM (``pos_x_img``), RELION (the box that it extracts around a coordinate) and cisTEM (the
centre of its images).

Euler angles need no conversion. All three programs take the slice of the template's transform that
``Rz(phi) Ry(theta) Rz(psi)`` turns the image plane into, x first; RELION calls the angles rot, tilt
and psi, and its matrix is the inverse of this one. The astigmatism angle is the one between x and
``defocus_u`` in all of them, and defocus is positive for underfocus.
"""

import csv
import io
import json
import math
import struct
import sys
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from ocelot_em.errors import InvalidInputError, MissingDependencyError
from ocelot_em.io.star_file import load_starfile
from ocelot_em.io.yaml_file import read_yaml
from ocelot_em.model.maps import MEAN, MIP, SCALED_MIP, STD, AnyArray, Int64
from ocelot_em.particles.table import (
    ALL_COLUMNS,
    MONTAGE_COLUMNS,
    About,
    ParticleTable,
    as_text,
    text_array,
    write_file,
)

LEOPARD_MAPS: Mapping[str, str] = {
    "mip_path": "mip_path",
    "scaled_mip_path": "scaled_mip_path",
    "psi_path": "orientation_psi_path",
    "theta_path": "orientation_theta_path",
    "phi_path": "orientation_phi_path",
    "defocus_path": "relative_defocus_path",
    "correlation_average_path": "correlation_average_path",
    "correlation_variance_path": "correlation_variance_path",
}
"""Columns of Leopard-EM's table with paths of maps, and their keys in its configuration."""

LEOPARD_ABERRATIONS = ("even_zernikes", "odd_zernikes", "mag_matrix")
"""Columns of Leopard-EM's table with text of its own, and their keys in its configuration."""

LEOPARD_ONLY = (*LEOPARD_ABERRATIONS, *LEOPARD_MAPS)

_PARQUET_KEY = b"ocelot_em.about"
MAX_PARTICLES = 2**24
"""Of a table that is read; they take two gigabytes of memory."""

_TEXT_COLUMNS = [name for name, column in MONTAGE_COLUMNS.items() if column.dtype == "str"]


@dataclass(frozen=True, slots=True)
class _Quantity:
    """A number of :class:`Optics`: its key in Leopard-EM's configuration, its unit and bounds."""

    key: str
    unit: str
    above: float = -math.inf
    least: float = -math.inf
    most: float = math.inf
    default: float | None = None

    def problem(self, value: Any) -> str | None:
        bounds = f" above {self.above:g}" if self.above > -math.inf else ""
        bounds += f" from {self.least:g}" if self.least > -math.inf else ""
        bounds += f" to {self.most:g}" if self.most < math.inf else ""
        expected = f"expected a number{bounds} ({self.unit}), got {value!r}"
        if not isinstance(value, int | float) or isinstance(value, bool):
            return expected
        within = self.above < value and self.least <= value <= self.most
        return None if within and abs(value) <= sys.float_info.max else expected


_QUANTITIES: Mapping[str, _Quantity] = {
    "voltage_kv": _Quantity("voltage", "kV", above=0),
    "spherical_aberration_mm": _Quantity("spherical_aberration", "mm", least=0, default=2.7),
    "amplitude_contrast": _Quantity(
        "amplitude_contrast_ratio", "fraction", least=0, most=1, default=0.07
    ),
    "pixel_size_angstrom": _Quantity("pixel_size", "Å", above=0),
    "defocus_u_angstrom": _Quantity("defocus_u", "Å"),
    "defocus_v_angstrom": _Quantity("defocus_v", "Å"),
    "astigmatism_angle_degrees": _Quantity("astigmatism_angle", "degrees"),
    "phase_shift_degrees": _Quantity("phase_shift", "degrees", default=0.0),
    "ctf_b_factor_angstrom2": _Quantity("ctf_B_factor", "Å^2", least=0, default=0.0),
}
"""The defaults are what Leopard-EM searches with where its configuration says nothing."""

_LEOPARD_PLACES: Mapping[str, str] = {
    **{name: f"optics_group.{quantity.key}" for name, quantity in _QUANTITIES.items()},
    "label": "optics_group.label",
    "micrograph": "micrograph_path",
    "template": "template_volume_path",
    **{name: f"optics_group.{name}" for name in LEOPARD_ABERRATIONS},
    **{c: f"match_template_result.{key}" for c, key in LEOPARD_MAPS.items()},
}
"""Where Leopard-EM's configuration has what :class:`Optics` has."""


@dataclass(frozen=True, slots=True)
class Optics:
    """How a micrograph was taken, and what was searched for in it.

    Parameters
    ----------
    voltage_kv, spherical_aberration_mm, amplitude_contrast
        Of the microscope; the contrast as a fraction.
    pixel_size_angstrom
        Of the micrograph.
    defocus_u_angstrom, defocus_v_angstrom
        Of the micrograph, positive for underfocus.
    astigmatism_angle_degrees
        Between the x axis and the direction of ``defocus_u_angstrom``.
    phase_shift_degrees
        Of a phase plate.
    micrograph, template
        Their names or paths.
    template_box_px
        Edge of the template.
    label
        Name of the optics group; RELION finds the micrograph's by it.
    ctf_b_factor_angstrom2
        Of the contrast transfer function, as Leopard-EM applies it.
    leopard_columns
        Text for the columns of Leopard-EM's table that are :data:`LEOPARD_ONLY`; what is left out
        is empty there.

    Raises
    ------
    InvalidInputError
        Naming every value that cannot be: numbers out of bounds, names that are empty or hold line
        breaks or other control characters.
    """

    voltage_kv: float
    spherical_aberration_mm: float
    amplitude_contrast: float
    pixel_size_angstrom: float
    defocus_u_angstrom: float
    defocus_v_angstrom: float
    astigmatism_angle_degrees: float
    phase_shift_degrees: float
    micrograph: str
    template: str
    template_box_px: int
    label: str = "opticsGroup1"
    ctf_b_factor_angstrom2: float = 0.0
    leopard_columns: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        found = _optics_problems({f.name: getattr(self, f.name) for f in fields(self)})
        if found:
            raise InvalidInputError(f"{name}: {problem}" for name, problem in found.items())

    @classmethod
    def from_leopard_yaml(
        cls, path: str | PathLike[str], template_box_px: int | None = None
    ) -> "Optics":
        """Read the configuration of a ``match_template`` run of Leopard-EM.

        Parameters
        ----------
        path
            The YAML file.
        template_box_px
            Edge of the template. None: read from the header of the template that is named there,
            which is looked for from the working directory, as Leopard-EM does, then beside the
            configuration.

        Raises
        ------
        InvalidInputError
            Naming every key that is missing or cannot be.
        """
        config, problems = read_yaml(path, "the configuration of a match_template run"), list[str]()
        sections: dict[str, Mapping[str, Any]] = {}
        for name in ("optics_group", "match_template_result"):
            section = config.get(name) or {}
            if not isinstance(section, Mapping):
                problems.append(f"{name}: expected keys and values, got {section!r}")
            sections[name] = section if isinstance(section, Mapping) else {}
        group, results = sections["optics_group"], sections["match_template_result"]
        texts = {c: _leopard_text(group.get(c)) for c in LEOPARD_ABERRATIONS}
        texts |= {c: results.get(key, "") for c, key in LEOPARD_MAPS.items()}
        template = config.get("template_volume_path")
        if template_box_px is None and isinstance(template, str):
            template_box_px, why_not = _template_edge(template, Path(path).parent)
            problems += why_not
        values: dict[str, Any] = {
            **{name: _number(group.get(q.key, q.default)) for name, q in _QUANTITIES.items()},
            "label": group.get("label", "opticsGroup1"),
            "micrograph": config.get("micrograph_path"),
            "template": template,
            "template_box_px": template_box_px,
            "leopard_columns": texts,
        }
        found = _optics_problems(values)
        if template_box_px is None:  # why it could not be read has been said
            found.pop("template_box_px")
        problems += [f"{_LEOPARD_PLACES.get(name, name)}: {p}" for name, p in found.items()]
        if problems:
            raise InvalidInputError(f"{path}: {problem}" for problem in problems)
        return cls(**values)


def with_maps_in(optics: Optics, folder: str | PathLike[str], prefix: str = "") -> Optics:
    """Have Leopard-EM's table name the MRC files of a folder, as ``write_mrc_set`` writes them.

    Parameters
    ----------
    optics
        Left as they are.
    folder
        Where the files are; their paths are written in full, because Leopard-EM looks for others
        from the directory it is started in.
    prefix
        Of their names.
    """
    place = Path(folder).absolute()
    paths = {
        column: str(place / f"{prefix}{key.removesuffix('_path')}.mrc")
        for column, key in LEOPARD_MAPS.items()
    }
    return replace(optics, leopard_columns={**optics.leopard_columns, **paths})


def _optics_problems(values: Mapping[str, Any]) -> dict[str, str]:
    """What is wrong with values of :class:`Optics`, by name; of Leopard-EM's columns by theirs."""
    found = {name: quantity.problem(values[name]) for name, quantity in _QUANTITIES.items()}
    for name in ("micrograph", "template", "label"):
        found[name] = _text_problem(values[name]) or (
            None if values[name] else "expected a name, got none"
        )
    box = values["template_box_px"]
    if not isinstance(box, int) or isinstance(box, bool) or box < 1:
        found["template_box_px"] = f"expected 1 pixel or more, got {box!r}"
    for name, text in values["leopard_columns"].items():
        known = name in LEOPARD_ONLY
        found[name] = _text_problem(text) if known else f"expected one of {', '.join(LEOPARD_ONLY)}"
    return {name: problem for name, problem in found.items() if problem}


def _text_problem(value: object) -> str | None:
    if not isinstance(value, str):
        return f"expected text, got {value!r}"
    # Control characters, halves of surrogate pairs, and separators of lines and paragraphs.
    if any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in value):
        return f"expected text without line breaks and control characters, got {value!r}"
    return None


def _number(value: object) -> object:
    """A float where it can be one: YAML takes 300 for an integer, and 1e4 for text."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        return value
    try:
        return float(value)
    except (ValueError, OverflowError):
        return value


def _leopard_text(value: object) -> object:
    """Aberrations as Leopard-EM's table has them."""
    if isinstance(value, Mapping):
        try:
            return json.dumps(value, default=str)
        except TypeError:  # of keys such as dates
            return value
    if isinstance(value, list):
        return str(value)
    return "" if value is None else value


def _template_edge(template: str, beside: Path) -> tuple[int | None, list[str]]:
    """Edge of a cubic MRC volume, or why it is not known."""
    place, hint = None, "; say how large the template is (--template-box, template_box_px)"
    try:
        place = next((p for p in (Path(template), beside / template) if p.is_file()), None)
        if place is None:
            return None, [f"template_volume_path: expected a file, got {template!r}{hint}"]
        with place.open("rb") as file:
            header = file.read(1024)
    except OSError as error:
        return None, [
            f"template_volume_path: {place or template} cannot be read: {error.strerror}{hint}"
        ]
    if len(header) == 1024 and header[208:212] == b"MAP ":
        shapes = [struct.unpack_from(f"{order}3i", header) for order in "<>"]
        # In the wrong byte order small numbers are enormous.
        edges = min(shapes, key=lambda shape: max(map(abs, shape)))
        if len(set(edges)) == 1 and edges[0] > 0:
            return edges[0], []
    return None, [f"template_volume_path: expected a cubic MRC volume in {place}{hint}"]


def write_table(
    table: ParticleTable, path: str | PathLike[str], optics: Optics | None = None
) -> None:
    """Write a table in the format that the file's suffix names; an existing file is replaced.

    Parameters
    ----------
    table
        The particles.
    path
        ``.csv``: all columns. ``.parquet``: all columns, and what they were picked by. ``.star``:
        for RELION.
    optics
        Needed for RELION.

    Raises
    ------
    InvalidInputError
        Another suffix, or no optics for RELION.
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

    All of its 39 columns are there, in its order. ``correlation_variance`` is the standard
    deviation, as in Leopard-EM; ``refined_pixel_size`` is the micrograph's, as it is before a
    refinement. Zernike coefficients, magnification matrix and the paths of the maps are text of
    the optics, or empty. The table has no place for ``pixel_size_offset``, ``best_partial``,
    sub-pixel positions and ``neg_log_p``.

    Raises
    ------
    InvalidInputError
        The optics are of another search.
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
    # pandas, which Leopard-EM writes and reads this with, has nothing where a number is NaN.
    writer.writerows(
        ["" if cell == "nan" else cell for cell in row]
        for row in zip(*columns.values(), strict=True)
    )
    write_file(path, text.getvalue().encode())


def write_relion_star(table: ParticleTable, optics: Optics, path: str | PathLike[str]) -> None:
    """Write a STAR file of RELION 3.1 and later: one optics group, and its particles.

    Coordinates are whole pixels, because RELION cuts off what is behind the point; the rest is in
    ``rlnOriginXAngst`` and ``rlnOriginYAngst``, which RELION subtracts from the coordinates. Image
    size and pixel size are the template's and the micrograph's: what RELION will extract has its
    own. ``rlnAutopickFigureOfMerit`` is the z-score. Defocus is the micrograph's plus the
    particle's.

    Raises
    ------
    InvalidInputError
        The optics are of another search, or the micrograph or the label has a name that STAR files
        cannot hold: with quotation marks, ``#`` or other spaces than the plain one, or one that
        stands for a missing value.
    MissingDependencyError
        starfile is not installed.
    StorageError
        The file cannot be written.
    """
    _require_same_search(table, optics)
    _require_star_names({"micrograph": optics.micrograph, "label": optics.label})
    own, constant = table.columns, _constants(table)
    y, x = _centres(table, optics)
    u, v = _defocus(table, optics)
    size = optics.pixel_size_angstrom
    # Parsers take a line for a header if it starts like one, so that numbers come first.
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
    _write_star({"optics": group, "particles": particles}, path)


def write_cistem_star(table: ParticleTable, optics: Optics, path: str | PathLike[str]) -> None:
    """Write template matches as cisTEM's own STAR files have them.

    Positions are Å from the micrograph's first pixel to the particle's centre, in whole pixels as
    in cisTEM; defocus is absolute; the score is the z-score. cisTEM cannot read a file without
    particles.

    Raises
    ------
    InvalidInputError
        The optics are of another search, or micrograph or template have a name that cisTEM cannot
        read: with spaces, quotation marks or ``#``.
    MissingDependencyError
        starfile is not installed.
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
        # cisTEM takes a name that is not in single quotation marks for none.
        "cisTEMOriginalImageFilename": constant(f"'{optics.micrograph}'"),
        "cisTEMReference3DFilename": constant(f"'{optics.template}'"),
        "cisTEMOriginalXPosition": as_text(x * size),
        "cisTEMOriginalYPosition": as_text(y * size),
    }
    _write_star({"": matches}, path)


def write_parquet(table: ParticleTable, path: str | PathLike[str]) -> None:
    """Write all columns with their units, and what they were picked by in the schema's metadata.

    Raises
    ------
    MissingDependencyError
        pyarrow is not installed.
    StorageError
        The file cannot be written.
    """
    pa = _pyarrow()
    schema = pa.schema(
        [
            pa.field(
                name,
                pa.from_numpy_dtype(values.dtype),
                nullable=False,
                metadata={"unit": ALL_COLUMNS[name].unit, "meaning": ALL_COLUMNS[name].meaning},
            )
            for name, values in table.columns.items()
        ],
        metadata={_PARQUET_KEY: json.dumps(asdict(table.about)) if table.about else "null"},
    )
    arrays = [pa.array(values) for values in table.columns.values()]
    buffer = pa.BufferOutputStream()
    pa.parquet.write_table(pa.Table.from_arrays(arrays, schema=schema), buffer)
    write_file(path, buffer.getvalue().to_pybytes())


def read_parquet(path: str | PathLike[str]) -> ParticleTable:
    """Read what :func:`write_parquet` wrote, exactly.

    A file with the same columns that another program wrote is read too, without what they were
    picked by.

    Raises
    ------
    InvalidInputError
        No Parquet file, other columns, missing values, or a record that cannot be read.
    MissingDependencyError
        pyarrow is not installed.
    """
    pa = _pyarrow()
    try:
        found = _read_arrow(pa, Path(path))
    except InvalidInputError as error:
        raise InvalidInputError(f"{path}: {problem}" for problem in error.problems) from None
    except Exception as error:  # pyarrow has no list of what it raises
        raise InvalidInputError(f"{path}: cannot be read as Parquet: {error}") from error
    metadata = found.schema.metadata or {}
    problems = [
        f"{name}: expected a value for each particle, got {found[name].null_count} without"
        for name in found.column_names
        if found[name].null_count
    ]
    about = None
    try:
        about = TypeAdapter(About | None).validate_json(metadata.get(_PARQUET_KEY, b"null"))
    except ValidationError as error:
        problems += [
            f"{_PARQUET_KEY.decode()}: {'.'.join(map(str, e['loc']))}: {e['msg']}"
            for e in error.errors()
        ]
    if not problems:
        try:
            return ParticleTable(_to_columns(found), about)
        except InvalidInputError as error:
            problems += error.problems
    raise InvalidInputError(f"{path}: {problem}" for problem in problems)


def _read_arrow(pa: Any, path: Path) -> Any:
    """The table of a file, after a look at what it says that it has."""
    if not path.is_file():
        raise ValueError("expected a file, got nothing there")
    names = pa.parquet.read_schema(path).names
    texts = [name for name in _TEXT_COLUMNS if name in names]
    # A text that stands in many rows is in memory once.
    with pa.parquet.ParquetFile(path, read_dictionary=texts) as file:
        n = file.metadata.num_rows
        if n > MAX_PARTICLES:
            raise InvalidInputError(f"expected at most {MAX_PARTICLES:,} particles, got {n:,}")
        _to_columns(file.schema_arrow.empty_table())
        table = file.read()
    table.validate(full=True)
    return table


def _to_columns(table: Any) -> dict[str, AnyArray]:
    """Columns of an Arrow table, text as NumPy has it.

    Raises
    ------
    InvalidInputError
        They are not those of particles, or text is so long that its rows do not fit into memory.
    """
    counts = Counter(table.column_names)
    problems = [f"{n}: expected once, got {k} columns" for n, k in counts.items() if k > 1]
    columns = dict[str, AnyArray]()
    for name, column in zip(table.column_names, table.columns, strict=True):
        columns[name] = column.to_numpy()
        if name in _TEXT_COLUMNS and columns[name].dtype == object:
            columns[name], problem = text_array(columns[name].tolist())
            problems += [f"{name}: {problem}"] if problem else []
    if problems:
        raise InvalidInputError(problems)
    return dict(ParticleTable(columns).columns)


def _require_same_search(table: ParticleTable, optics: Optics) -> None:
    """Refuse optics that contradict what the table says of its search."""
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
    """Return what makes a column of one value."""
    return lambda value: [str(value)] * len(table)


def _centres(table: ParticleTable, optics: Optics) -> tuple[Int64, Int64]:
    """Rows and columns of the particles' centres, in pixels of the micrograph."""
    half = optics.template_box_px // 2
    y, x = (table.columns[name].astype(np.int64) + half for name in ("pos_y", "pos_x"))
    return y, x


def _defocus(table: ParticleTable, optics: Optics) -> tuple[AnyArray, AnyArray]:
    """Absolute defocus of the particles in Å, in both directions."""
    relative = table.columns["relative_defocus"].astype(np.float64)
    return relative + optics.defocus_u_angstrom, relative + optics.defocus_v_angstrom


def _residual(whole: AnyArray, subpixel: AnyArray) -> AnyArray:
    """What is subtracted from whole positions to give the exact ones; 0 where these are NaN."""
    residual: AnyArray = np.nan_to_num(whole - subpixel.astype(np.float64))
    return residual


def _require_star_names(names: Mapping[str, str], *, spaces: bool = True) -> None:
    """Refuse names that readers of STAR files would cut, take for none or not find the end of."""
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


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingDependencyError(
            "Parquet files need pyarrow: pip install 'ocelot-em[tables]'"
        ) from error
    return pyarrow


def _write_star(
    blocks: Mapping[str, Mapping[str, Sequence[str]]], path: str | PathLike[str]
) -> None:
    """Write blocks of columns that are text already."""
    starfile = load_starfile()
    import pandas as pd

    frames = {name: pd.DataFrame(columns, dtype=object) for name, columns in blocks.items()}
    write_file(path, starfile.to_string(frames).encode())
