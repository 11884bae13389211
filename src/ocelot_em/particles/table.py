"""Particle tables: one row per peak of a merged result, with the picking parameters."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from ocelot_em.errors import InvalidInputError
from ocelot_em.model.maps import BEST_PARTIAL, MEAN, MIP, SCALED_MIP, SECOND_ZSCORE, STD
from ocelot_em.model.problems import require
from ocelot_em.model.regions import template_box_of
from ocelot_em.model.text import percent_text
from ocelot_em.particles.column_table import Column, ColumnTable
from ocelot_em.particles.csv_columns import parse_column, ragged, read_rows

if TYPE_CHECKING:
    from ocelot_em import Optics, PickOptions

Method = Literal["gaussian", "gev", "pvalue", "mip", "cutoff"]
"""How the cutoff was determined: Gaussian noise model, extreme values, p-value, or set by hand, for
``mip`` or for the z-score."""

TABLE_EXPECTED = (
    "particles: expected a ParticleTable, as from find_peaks, read_parquet or "
    "ParticleTable.read_csv"
)
"""Beginning of the error about something else, such as the path of a table."""

NEG_LOG_P = "neg_log_p"
EXPOSURE = "exposure"
ALSO_SEEN = "also_seen"
SEARCHED = "searched_share"
GROUP = "group"
DIFFERENCE = "zscore_difference"
MICROGRAPH = "micrograph"
RANK = "rank"
RANK_IN_MICROGRAPH = "rank_in_micrograph"
PRECISION, RECALL = "precision", "recall"

COLUMNS: Mapping[str, Column] = {
    "pos_y": Column("int32", "pixel", "row of the template box's upper left corner in the map"),
    "pos_x": Column("int32", "pixel", "column of that corner"),
    MIP: Column("float32", "1", "highest cross-correlation"),
    SCALED_MIP: Column("float32", "1", "z-score: (mip - mean) / std"),
    "psi": Column("float32", "degree", "Euler angle psi (ZYZ)"),
    "theta": Column("float32", "degree", "Euler angle theta (ZYZ)"),
    "phi": Column("float32", "degree", "Euler angle phi (ZYZ)"),
    "relative_defocus": Column("float32", "angstrom", "defocus relative to the micrograph's"),
    "pixel_size_offset": Column("float32", "angstrom", "offset to the micrograph's pixel size"),
    MEAN: Column("float32", "1", "mean of all cross-correlations of the pixel"),
    STD: Column("float32", "1", "standard deviation of all cross-correlations of the pixel"),
    "total_correlations": Column("int64", "1", "number of these cross-correlations"),
    BEST_PARTIAL: Column("int32", "1", "number of the partial that won"),
    "pos_y_subpixel": Column("float32", "pixel", "pos_y of the maximum between pixels"),
    "pos_x_subpixel": Column("float32", "pixel", "pos_x of the maximum between pixels"),
    NEG_LOG_P: Column("float64", "1", "-ln of the p-value"),
}
"""Columns in order; the last is optional."""

MONTAGE_COLUMNS: Mapping[str, Column] = {
    EXPOSURE: Column("str", "", "id of the exposure that pos_y and pos_x are of"),
    "canvas_y": Column("int32", "pixel", "row of pos_y on the montage"),
    "canvas_x": Column("int32", "pixel", "column of pos_x on the montage"),
    ALSO_SEEN: Column("str", "", "other exposures that it was seen in, as id:pos_y:pos_x"),
}
"""Additional columns for particles of a montage: all or none are present."""

INCOMPLETE_COLUMNS: Mapping[str, Column] = {
    SEARCHED: Column("float64", "1", "share of the orientations that had been searched"),
}
"""Additional column for particles of an incomplete search, which marks them in every format."""

GROUP_COLUMNS: Mapping[str, Column] = {
    GROUP: Column("str", "", "name of the group with the highest z-score"),
    SECOND_ZSCORE: Column("float32", "1", "highest z-score of the other groups at this pixel"),
    DIFFERENCE: Column("float32", "1", "scaled_mip minus second_zscore"),
}
"""Additional columns for particles of groups: all or none are present."""

MICROGRAPH_COLUMNS: Mapping[str, Column] = {
    MICROGRAPH: Column("str", "", "name of the micrograph"),
    RANK: Column("int64", "1", "rank in the table; the highest particle has 1"),
    RANK_IN_MICROGRAPH: Column("int64", "1", "rank in the micrograph, in a table of several"),
}
"""First columns. Every table has the first two, but for those of earlier versions; the third, if it
is of many micrographs."""

ESTIMATE_COLUMNS: Mapping[str, Column] = {
    PRECISION: Column("float64", "1", "estimated share of true particles if the cutoff were here"),
    RECALL: Column("float64", "1", "estimated share of all true particles that are found then"),
}
"""Additional columns of :func:`ocelot_em.estimate`: all or none are present."""

ALL_COLUMNS: Mapping[str, Column] = {
    **MICROGRAPH_COLUMNS,
    **COLUMNS,
    **MONTAGE_COLUMNS,
    **GROUP_COLUMNS,
    **ESTIMATE_COLUMNS,
    **INCOMPLETE_COLUMNS,
}

_ALONE_OR_TOGETHER = (
    (MICROGRAPH, RANK),
    (RANK_IN_MICROGRAPH,),
    (NEG_LOG_P,),
    tuple(MONTAGE_COLUMNS),
    tuple(GROUP_COLUMNS),
    tuple(ESTIMATE_COLUMNS),
    (SEARCHED,),
)
"""Groups of optional columns; a group is present or absent as a whole."""

_OPTIONAL = frozenset(name for group in _ALONE_OR_TOGETHER for name in group)


@dataclass(frozen=True, slots=True)
class PickInfo:
    """Source and picking parameters of particles.

    ``cutoff`` is the lowest accepted value in the method's own scale: z-score, -ln p, or ``mip``.
    ``false_positives`` is None where it did not set the cutoff. ``shape`` and ``valid_shape`` are
    those (y, x) of the maps and of their valid part.

    In a montage, ``per`` states whether each exposure or the whole has its own cutoff, and
    ``false_positives`` is per exposure or in total. ``exposure_cutoffs`` and ``exposure_shapes``
    (shape, valid shape) are by exposure id; ``cutoff`` is the lowest. Where others are shown,
    particles of the ``incomplete_exposures`` may be missing, since their partials were not found.
    For groups, ``per`` is ``group``, and the cutoffs are by name.
    ``incomplete_search`` states how much was searched, unless it was all.

    ``area`` describes a mask or an edge, for which ``excluded_pixels`` of the searched pixels were
    left out. ``counted_pixels`` are the others, of which the cutoff counts ``correlations``; None
    if it is not known, or did not set the cutoff.
    """

    store: str
    method: Method
    cutoff: float
    min_distance_px: float
    false_positives: float | None
    pixel_size_angstrom: float | None
    shape: tuple[int, int]
    valid_shape: tuple[int, int]
    per: Literal["exposure", "montage", "group"] | None = None
    exposure_cutoffs: tuple[tuple[str, float], ...] = ()
    exposure_shapes: tuple[tuple[str, tuple[tuple[int, int], tuple[int, int]]], ...] = ()
    incomplete_exposures: tuple[str, ...] = ()
    incomplete_search: str = ""
    area: str = ""
    counted_pixels: int | None = None
    excluded_pixels: int = 0
    correlations: int | None = None
    min_angle_degrees: float | None = None

    @property
    def area_text(self) -> str:
        """Where particles were picked, and how many pixels count; empty if everywhere."""
        if not self.area or self.counted_pixels is None:
            return self.area
        counted, excluded = f"{self.counted_pixels:,}", f"{self.excluded_pixels:,}"
        return f"{self.area}: {counted} pixels count, {excluded} are excluded"

    @property
    def cutoff_text(self) -> str:
        """The cutoff, or the range of the exposures' cutoffs."""
        highest = max((own for _, own in self.exposure_cutoffs), default=self.cutoff)
        if f"{highest:.4f}" == f"{self.cutoff:.4f}":
            return f"{self.cutoff:.4f}"
        return f"{self.cutoff:.4f} to {highest:.4f}"

    @property
    def incomplete_text(self) -> str:
        """Where particles may be missing; empty if none are."""
        names = ", ".join(self.incomplete_exposures)
        part = "group" if self.per == "group" else "exposure"
        where = names and f"incomplete where others are shown: {part}s {names}"
        return ", ".join(filter(None, [where, self.incomplete_search]))

    @property
    def template_box_px(self) -> int | None:
        """Edge of the template box in pixels, derived from the shapes; None if unknown."""
        return template_box_of(self.shape, self.valid_shape)


@dataclass(frozen=True, eq=False, repr=False)
class ParticleTable(ColumnTable):
    """Particles, stored by column, that can be used like a data frame.

    A name selects the values of a column; names, columns as a pandas frame; a number, one particle
    as a dictionary; and a slice, numbers or a mask, particles as a table. Iteration is over the
    particles, and the length is their number.

    Parameters
    ----------
    columns
        One-dimensional arrays of equal length, with the names and dtypes of :data:`ALL_COLUMNS`;
        those of :data:`COLUMNS` but ``neg_log_p`` are required. They are not copied, only sorted
        into that order. NaN is allowed; text must not contain commas, quotation marks or line
        breaks.
    about
        Picking parameters, if known.
    picking
        Options of the picking, if it was just now: files do not have them.

    Raises
    ------
    InvalidInputError
        Lists every column that is missing, unknown, or has a wrong dtype or length.

    Examples
    --------
    >>> from ocelot_em import ParticleTable, find_peaks
    >>> particles = find_peaks("MERGED.zarr")
    >>> particles["scaled_mip"][:2]
    array([12.813256, 12.608299], dtype=float32)
    >>> best = particles[0]
    >>> best["pos_y"], best["pos_x"]
    (39, 249)
    >>> len(particles[particles["scaled_mip"] > 10]), len(particles.head(3))
    (17, 3)
    >>> particles.to_csv("particles.csv").name
    'particles.csv'
    >>> len(ParticleTable.read_csv("particles.csv"))
    20
    """

    described: ClassVar[Mapping[str, Column]] = ALL_COLUMNS

    about: PickInfo | None = None
    picking: "PickOptions | None" = None

    def __post_init__(self) -> None:
        problems = _column_problems(self.columns)
        if problems:
            raise InvalidInputError(problems)
        ordered = {name: self.columns[name] for name in ALL_COLUMNS if name in self.columns}
        object.__setattr__(self, "columns", ordered)

    @classmethod
    def empty(cls, about: PickInfo | None = None, *, neg_log_p: bool = False) -> "ParticleTable":
        """Return an empty table, with or without ``neg_log_p``."""
        names = [name for name in COLUMNS if neg_log_p or name != NEG_LOG_P]
        return cls({name: np.empty(0, ALL_COLUMNS[name].dtype) for name in names}, about)

    @property
    def ranked_by(self) -> str:
        """Column by which particles were accepted, and are sorted."""
        if self.about is not None and self.about.method == "mip":
            return MIP
        return NEG_LOG_P if NEG_LOG_P in self.columns else SCALED_MIP

    @property
    def is_of_montage(self) -> bool:
        """Whether the particles come from a montage."""
        return EXPOSURE in self.columns

    def of_exposure(self, exposure: str) -> "ParticleTable":
        """Return the particles of one exposure of a montage, without the montage columns.

        Raises
        ------
        InvalidInputError
            If the particles do not come from a montage.
        """
        if not self.is_of_montage:
            raise InvalidInputError(
                "exposure: expected particles of a montage, got those of one exposure"
            )
        own = self.columns[EXPOSURE] == exposure
        shapes = dict(self.about.exposure_shapes) if self.about else {}
        about = self.about
        if about is not None and exposure in shapes:
            shape, valid_shape = shapes[exposure]
            about = replace(about, shape=shape, valid_shape=valid_shape, per=None)
        columns = {n: v[own] for n, v in self.columns.items() if n not in MONTAGE_COLUMNS}
        return ParticleTable(columns, about)

    @classmethod
    def read_csv(cls, path: str | PathLike[str]) -> "ParticleTable":
        """Read a file written by :meth:`to_csv`, without loss; columns may be in any order.

        CSV files do not contain picking parameters: ``about`` is None. That a search was incomplete
        is known from ``searched_share``.

        Raises
        ------
        InvalidInputError
            Lists every invalid column with its first invalid line.
        """
        names, rows = read_rows(path)
        problems = _name_problems(names)
        problems += ragged(rows, len(names))
        if problems:
            raise InvalidInputError(f"{path}: {problem}" for problem in problems)
        texts = zip(*rows, strict=True) if rows else [() for _ in names]
        columns = {}
        for name, column in zip(names, texts, strict=True):
            columns[name], found = parse_column(column, ALL_COLUMNS[name].dtype)
            problems += [f"{path}: {name}: {problem}" for problem in found]
        if problems:
            raise InvalidInputError(problems)
        return cls(columns)

    @classmethod
    def read_parquet(cls, path: str | PathLike[str]) -> "ParticleTable":
        """Read a file written by :meth:`to_parquet`, without loss, with the picking parameters.

        Files of other programs with the same columns are read without picking parameters.

        Raises
        ------
        InvalidInputError
            The file is not a table of particles; lists every problem.
        MissingDependencyError
            pyarrow is not installed.
        """
        from ocelot_em import read_parquet

        return read_parquet(path)

    @property
    def incomplete_text(self) -> str:
        """Where particles may be missing; empty if none are, as far as is known."""
        if (self.about is not None and self.about.incomplete_text) or SEARCHED not in self.columns:
            return self.about.incomplete_text if self.about else ""
        shares = [
            f": searched {percent_text(x)} of the orientations"
            for x in self.columns[SEARCHED][:1].tolist()
        ]
        return "".join(["incomplete search", *shares])

    def facts(self) -> Mapping[str, object] | None:
        """Return the picking parameters; None if they are not known."""
        return None if self.about is None else asdict(self.about)

    def to_star(
        self,
        path: str | PathLike[str],
        *,
        optics: "Optics",
        program: Literal["relion", "cistem"] = "relion",
        overwrite: bool = True,
    ) -> Path:
        """Write a STAR file for RELION or cisTEM; return the path.

        :func:`ocelot_em.write_relion_star` and :func:`ocelot_em.write_cistem_star` describe the
        files and raise errors.
        """
        from ocelot_em import write_cistem_star, write_relion_star

        writers = {"relion": write_relion_star, "cistem": write_cistem_star}
        if program not in writers:
            raise InvalidInputError(f"program: expected relion or cistem, got {program!r}")
        return writers[program](self, path, optics=optics, overwrite=overwrite)

    def _summary(self) -> str:
        plural = "" if len(self) == 1 else "s"
        parts = [f"{len(self)} particle{plural}"]
        if self.about is not None:
            about = self.about
            parts[0] += f" of {about.store}"
            parts.append(f"method {about.method}")
            parts.append(f"cutoff {about.cutoff_text}")
            if about.false_positives is not None:
                each = " in each exposure" if about.per == "exposure" else ""
                parts.append(f"false positives {about.false_positives:g}{each}")
            parts.append(f"minimum distance {about.min_distance_px:g} px")
            if about.min_angle_degrees is not None:
                parts[-1] += f" or {about.min_angle_degrees:g}°"
            parts += filter(None, [about.area_text])
        parts += filter(None, [self.incomplete_text])
        return ", ".join(parts)


def require_table(particles: object) -> ParticleTable:
    """Return particles; refuse what is no :class:`ParticleTable`, such as the path of one."""
    return require(particles, ParticleTable, TABLE_EXPECTED)


def _name_problems(names: Iterable[str]) -> list[str]:
    counts = Counter(list(names))
    known = ", ".join(ALL_COLUMNS)
    return [
        *(f"{n}: missing" for n in ALL_COLUMNS if n not in counts and n not in _OPTIONAL),
        *(
            f"{n}: missing, although {', '.join(m for m in group if m in counts)} is present"
            for group in _ALONE_OR_TOGETHER
            for n in group
            if n not in counts and any(m in counts for m in group)
        ),
        *(f"{n!r}: expected one of {known}" for n in counts if n not in ALL_COLUMNS),
        *(f"{n}: expected once, got {k} columns" for n, k in counts.items() if k > 1),
    ]


_NOT_IN_TEXT = frozenset(',"\n\r')

_FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""Beginnings of texts that a spreadsheet takes for formulas, which can start programs."""


def is_formula(text: str) -> bool:
    """Whether a spreadsheet takes a cell for a formula; numbers are none.

    >>> is_formula("=1+1"), is_formula("-1.5"), is_formula("gpu0")
    (True, False, False)
    """
    if not text.startswith(_FORMULA):
        return False
    try:
        float(text)
    except ValueError:
        return True
    return text.startswith(("\t", "\r"))


def _column_problems(columns: Mapping[str, object]) -> list[str]:
    problems = _name_problems(columns)
    lengths = {}
    for name, values in columns.items():
        if name not in ALL_COLUMNS:
            continue
        expected = np.dtype(ALL_COLUMNS[name].dtype)
        if not isinstance(values, np.ndarray):
            problems.append(f"{name}: expected an array, got {type(values).__name__}")
            continue
        if expected.kind == "U" and values.dtype.kind == "U":
            if any(set(text) & _NOT_IN_TEXT for text in values.ravel().tolist()):
                problems.append(f"{name}: expected no commas, quotation marks and line breaks")
            problems += [
                f"{name}: expected no text that spreadsheets take for a formula, got {text!r}"
                for text in dict.fromkeys(values.ravel().tolist())
                if is_formula(text)
            ]
        elif values.dtype != expected:
            problems.append(f"{name}: expected dtype {expected}, got {values.dtype}")
        if values.ndim != 1:
            problems.append(f"{name}: expected one dimension, got shape {values.shape}")
        else:
            lengths[name] = len(values)
    usual = Counter(lengths.values()).most_common(1)
    problems += [
        f"{name}: expected {usual[0][0]} values, as in most columns, got {n}"
        for name, n in lengths.items()
        if n != usual[0][0]
    ]
    return problems
