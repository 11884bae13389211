"""Optics of the micrograph, needed by some particle tables."""

import json
import math
import struct
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from os import PathLike
from pathlib import Path
from typing import Any

from ocelot_em.errors import InvalidInputError
from ocelot_em.io.yaml_file import as_number, read_yaml

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
"""Columns with map paths in Leopard-EM's table, and their keys in its configuration."""

LEOPARD_ABERRATIONS = ("even_zernikes", "odd_zernikes", "mag_matrix")
"""Columns of Leopard-EM's table with aberrations as text; also their configuration keys."""

LEOPARD_ONLY = (*LEOPARD_ABERRATIONS, *LEOPARD_MAPS)
"""Columns of Leopard-EM's table that other tables lack."""


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
        if isinstance(value, int | float) and not isinstance(value, bool):
            within = self.above < value and self.least <= value <= self.most
            if within and abs(value) <= sys.float_info.max:
                return None
        limits = (("above", self.above), ("from", self.least), ("to", self.most))
        bounds = "".join(f" {word} {limit:g}" for word, limit in limits if math.isfinite(limit))
        return f"expected a number{bounds} ({self.unit}), got {value!r}"


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
"""Numbers of :class:`Optics`, with Leopard-EM's defaults for values its configuration omits."""

_LEOPARD_PLACES: Mapping[str, str] = {
    **{name: f"optics_group.{quantity.key}" for name, quantity in _QUANTITIES.items()},
    "label": "optics_group.label",
    "micrograph": "micrograph_path",
    "template": "template_volume_path",
    **{name: f"optics_group.{name}" for name in LEOPARD_ABERRATIONS},
    **{c: f"match_template_result.{key}" for c, key in LEOPARD_MAPS.items()},
}
"""Keys of the values of :class:`Optics` in Leopard-EM's configuration."""


@dataclass(frozen=True, slots=True)
class Optics:
    """Imaging parameters of a micrograph, and the template of the search.

    Parameters
    ----------
    voltage_kv, spherical_aberration_mm, amplitude_contrast
        Microscope parameters; the contrast is a fraction.
    pixel_size_angstrom
        Pixel size of the micrograph.
    defocus_u_angstrom, defocus_v_angstrom
        Defocus of the micrograph, positive for underfocus.
    astigmatism_angle_degrees
        Angle between the x axis and the direction of ``defocus_u_angstrom``.
    phase_shift_degrees
        Phase shift of a phase plate.
    micrograph, template
        Names or paths.
    template_box_px
        Edge of the template.
    label
        Name of the optics group, by which RELION finds it.
    ctf_b_factor_angstrom2
        B-factor of the contrast transfer function, as Leopard-EM applies it.
    leopard_columns
        Text for the :data:`LEOPARD_ONLY` columns of Leopard-EM's table; omitted ones are empty.

    Raises
    ------
    InvalidInputError
        Naming every invalid value: numbers out of bounds, names that are empty or contain line
        breaks or other control characters.

    Examples
    --------
    >>> from ocelot_em import Optics
    >>> optics = Optics(
    ...     voltage_kv=300.0,
    ...     spherical_aberration_mm=2.7,
    ...     amplitude_contrast=0.07,
    ...     pixel_size_angstrom=2.5,
    ...     defocus_u_angstrom=5200.0,
    ...     defocus_v_angstrom=4900.0,
    ...     astigmatism_angle_degrees=25.0,
    ...     phase_shift_degrees=0.0,
    ...     micrograph="micrograph.mrc",
    ...     template="60S.mrc",
    ...     template_box_px=56,
    ... )
    >>> optics.label
    'opticsGroup1'
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
            Edge of the template. None: read from the header of the template named in the file; its
            path is relative to the working directory, as in Leopard-EM, or else to the
            configuration's folder.

        Raises
        ------
        InvalidInputError
            Naming every missing or invalid key.
        """
        return optics_of(*leopard_values(path, template_box_px), path)


def leopard_values(
    path: str | PathLike[str], template_box_px: int | None
) -> tuple[dict[str, Any], list[str]]:
    """Read values of :class:`Optics` in Leopard-EM's configuration; also return problems."""
    config = read_yaml(path, "the configuration of a match_template run")
    group, results = (config.get(k) or {} for k in ("optics_group", "match_template_result"))
    problems = list[str]()
    if not isinstance(group, Mapping):
        problems.append(f"optics_group: expected keys and values, got {group!r}")
        group = {}
    if not isinstance(results, Mapping):
        problems.append(f"match_template_result: expected keys and values, got {results!r}")
        results = {}
    texts = {c: _leopard_text(group.get(c)) for c in LEOPARD_ABERRATIONS}
    texts |= {c: results.get(key, "") for c, key in LEOPARD_MAPS.items()}
    template = config.get("template_volume_path")
    if template_box_px is None and isinstance(template, str):
        template_box_px, why_not = _template_edge(template, Path(path).parent)
        problems += why_not
    return {
        **{name: as_number(group.get(q.key, q.default)) for name, q in _QUANTITIES.items()},
        "label": group.get("label", "opticsGroup1"),
        "micrograph": config.get("micrograph_path"),
        "template": template,
        "template_box_px": template_box_px,
        "leopard_columns": texts,
    }, problems


def optics_of(
    values: Mapping[str, Any], problems: Sequence[str], leopard_path: str | PathLike[str]
) -> Optics:
    """Return optics of values from Leopard-EM's configuration, or raise all problems."""
    found = _optics_problems(values)
    if values["template_box_px"] is None:  # already reported as unreadable
        found.pop("template_box_px")
    problems = [*problems, *(f"{_LEOPARD_PLACES.get(n, n)}: {p}" for n, p in found.items())]
    if problems:
        raise InvalidInputError(f"{leopard_path}: {problem}" for problem in problems)
    return Optics(**values)


def with_maps_in(optics: Optics, folder: str | PathLike[str], prefix: str = "") -> Optics:
    """Return optics whose Leopard-EM columns name MRC files as written by ``write_mrc_set``.

    Paths are made absolute, because Leopard-EM resolves relative ones from its working directory.
    """
    root = Path(folder).absolute()
    files = {c: f"{prefix}{key.removesuffix('_path')}.mrc" for c, key in LEOPARD_MAPS.items()}
    paths = {c: str(root / file) for c, file in files.items()}
    return replace(optics, leopard_columns={**optics.leopard_columns, **paths})


def _optics_problems(values: Mapping[str, Any]) -> dict[str, str]:
    """Return problems with values of :class:`Optics` by name, or by Leopard-EM's column name."""
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
    # Control characters, surrogates, and line and paragraph separators.
    if any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in value):
        return f"expected text without line breaks and control characters, got {value!r}"
    return None


def _leopard_text(value: object) -> object:
    """Format aberrations as in Leopard-EM's table."""
    if isinstance(value, Mapping):
        try:
            return json.dumps(value, default=str)
        except TypeError:  # raised by keys such as dates
            return value
    if isinstance(value, list):
        return str(value)
    return "" if value is None else value


def _template_edge(template: str, beside: Path) -> tuple[int | None, list[str]]:
    """Return the edge of a cubic MRC volume, or None, and problems."""
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
    # Some programs end the stamp with a zero byte, not with the space of the standard.
    if len(header) == 1024 and header[208:212] in (b"MAP ", b"MAP\0"):
        shapes = [struct.unpack_from(f"{order}3i", header) for order in "<>"]
        # Small numbers become enormous in the wrong byte order.
        edges = min(shapes, key=lambda shape: max(map(abs, shape)))
        if len(set(edges)) == 1 and edges[0] > 0:
            return edges[0], []
    return None, [f"template_volume_path: expected a cubic MRC volume in {place}{hint}"]
