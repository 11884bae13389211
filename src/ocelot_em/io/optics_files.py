"""Optics of a micrograph from the files of several programs, and from given values.

==============  ================================================================================
suffix          file
==============  ================================================================================
.yaml .yml      Leopard-EM's configuration of a search
.json           the same
.star           RELION's table of micrographs after CTF estimation (``micrographs_ctf.star``)
.db             cisTEM's database of a project
.txt            CTFFIND's results of one micrograph
==============  ================================================================================
"""

import math
import re
import sqlite3
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import MISSING, dataclass, fields
from functools import lru_cache
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ocelot_em.errors import InvalidInputError
from ocelot_em.io.optics import Optics, leopard_values, optics_of
from ocelot_em.io.origin import NAMES_SHOWN
from ocelot_em.io.star_file import parse_star
from ocelot_em.io.text_file import file_identity, local_path, read_text
from ocelot_em.io.yaml_file import as_number
from ocelot_em.model.problems import option_name

MAX_NBYTES = 256_000_000
"""Maximum size of a table."""

_RELION: Mapping[str, str] = {
    "rlnVoltage": "voltage_kv",
    "rlnSphericalAberration": "spherical_aberration_mm",
    "rlnAmplitudeContrast": "amplitude_contrast",
    "rlnMicrographPixelSize": "pixel_size_angstrom",
    "rlnDefocusU": "defocus_u_angstrom",
    "rlnDefocusV": "defocus_v_angstrom",
    "rlnDefocusAngle": "astigmatism_angle_degrees",
    "rlnPhaseShift": "phase_shift_degrees",
}
"""Numbers in RELION's columns, in the same units; angles are from the x axis, as here."""

_CISTEM = """
SELECT image.FILENAME, ctf.VOLTAGE, ctf.SPHERICAL_ABERRATION, ctf.AMPLITUDE_CONTRAST,
       image.PIXEL_SIZE, ctf.DEFOCUS1, ctf.DEFOCUS2, ctf.DEFOCUS_ANGLE, ctf.ADDITIONAL_PHASE_SHIFT
FROM IMAGE_ASSETS AS image
JOIN ESTIMATED_CTF_PARAMETERS AS ctf ON ctf.CTF_ESTIMATION_ID = image.CTF_ESTIMATION_ID
WHERE image.FILENAME IS NOT NULL
ORDER BY image.IMAGE_ASSET_ID
"""
"""The images of cisTEM's database with the estimate of each that is in use, in the order above.

Phase shifts are in radians, all others in the units that are used here.
"""

_CTFFIND_HEADER: Mapping[str, str] = {
    "pixel_size_angstrom": r"Pixel size: *(\S+) *Angstroms?",
    "voltage_kv": r"acceleration voltage: *(\S+) *keV",
    "spherical_aberration_mm": r"spherical aberration: *(\S+) *mm",
    "amplitude_contrast": r"amplitude contrast: *([^;\s]+)",
    "micrograph": r"Input file: *(.+?) *;",
}


def read_optics(
    path: str | PathLike[str] | None = None,
    *,
    defaults: Mapping[str, Any] = MappingProxyType({}),
    **given: Any,
) -> Optics:
    """Return optics from a file, given values, or both; given values take precedence.

    Parameters
    ----------
    path
        Leopard-EM's configuration of the search (``.yaml``, ``.json``), RELION's table of
        micrographs (``.star``), cisTEM's database of a project (``.db``), or CTFFIND's results of
        one micrograph (``.txt``). Of several, ``micrograph`` names one, by its path, its name or
        its name without suffix.
    defaults
        Values by name for what is neither given nor in the file.
    **given
        Values by the names of :class:`Optics`. None is the same as not given. A phase shift that
        nothing states is 0.

    Raises
    ------
    InvalidInputError
        Naming every value that is missing or invalid, or the micrographs of a table.

    Examples
    --------
    >>> from pathlib import Path
    >>> from ocelot_em import read_optics
    >>> _ = Path("M1.txt").write_text('''# Input file: M1.mrc ; Number of micrographs: 1
    ... # Pixel size: 1.06 Angstroms ; acceleration voltage: 300.0 keV ; amplitude contrast: 0.07
    ... 1.0 9982.5 9481.2 30.5 0.0 0.25 3.1''')
    >>> given = {"spherical_aberration_mm": 2.7, "template": "60S.mrc", "template_box_px": 512}
    >>> optics = read_optics("M1.txt", **given)
    >>> optics.micrograph, optics.defocus_u_angstrom
    ('M1.mrc', 9982.5)
    """
    known = {name: value for name, value in given.items() if value is not None}
    others = {"phase_shift_degrees": 0.0} | {n: v for n, v in defaults.items() if v is not None}
    if path is None:
        return _optics(others | known)
    suffix = Path(path).suffix.lower()
    if suffix in (".yaml", ".yml", ".json"):
        values, problems = leopard_values(path, known.get("template_box_px"))
        found = {name: value for name, value in values.items() if value is not None}
        return optics_of(values | others | found | known, problems, path)
    if suffix == ".txt":
        return _optics(others | _ctffind(Path(path)) | known)
    if suffix not in _OF_MANY:
        raise InvalidInputError(
            f"{path}: expected optics in a file that ends in .yaml (Leopard-EM), .star (RELION), "
            f".db (cisTEM) or .txt (CTFFIND), got {suffix!r}"
        )
    # Programs find micrographs by the names in their tables.
    micrograph = known.pop("micrograph", None)
    return _optics(others | _row_of(Path(path), micrograph, _OF_MANY[suffix]) | known)


def read_optics_of(
    name: str,
    place: str | PathLike[str] | None = None,
    *,
    defaults: Mapping[str, Any] = MappingProxyType({}),
    **given: Any,
) -> Optics:
    """Return the optics of one of many micrographs, as :func:`read_optics` does.

    Parameters
    ----------
    name
        Name of the micrograph.
    place
        RELION's table of micrographs or cisTEM's database, in which it is named; or a folder with
        a file for each micrograph that has its name and one of the other suffixes above.
    defaults, **given
        Values for all micrographs. The micrograph's name is that in the file, or else ``name``.

    Raises
    ------
    InvalidInputError
        As of :func:`read_optics`; or the folder has no file, or several, for the micrograph; or
        ``place`` is a file of a single micrograph.
    """
    if given.get("micrograph") is not None:
        raise InvalidInputError("micrograph: expected no name, since there are many micrographs")
    path = None if place is None else Path(place)
    if path is not None and path.is_dir():
        files = [path / f"{name}{suffix}" for suffix in _SUFFIXES]
        found = [file for file in files if file.is_file()]
        if len(found) != 1:
            raise InvalidInputError(
                f"{path}: expected one file {name}.yaml, .json, .star or .txt with the "
                f"optics of the micrograph, got {len(found)}"
            )
        path = found[0]
    elif path is not None and path.suffix.lower() not in _OF_MANY:
        raise InvalidInputError(
            f"{path}: expected the optics of many micrographs: RELION's table (.star), cisTEM's "
            "database (.db), or a folder with a file for each micrograph, named like it"
        )
    else:
        given |= {"micrograph": name}
    return read_optics(path, defaults={**defaults, "micrograph": name}, **given)


_SUFFIXES = (".yaml", ".yml", ".json", ".star", ".txt")


def _optics(values: Mapping[str, Any]) -> Optics:
    """Return optics, or name all values that are missing."""
    needed = [f.name for f in fields(Optics) if f.default is f.default_factory is MISSING]
    if missing := [name for name in needed if name not in values]:
        raise InvalidInputError(
            f"optics: {name}: missing; give it (--{option_name(name)}), or a file that states it "
            "(--optics)"
            for name in missing
        )
    return Optics(**values)


def _row_of(path: Path, micrograph: str | None, reader: "_Reader") -> dict[str, Any]:
    """Return what a table or database states of one micrograph."""
    try:
        identity = file_identity(local_path(path))
    except OSError:
        identity = ()
    table = _read_table(path, identity, reader)
    return dict(table.rows[_number_of(table, micrograph, path)])


_SPELLINGS: tuple[Callable[[Path], object], ...] = (str, lambda p: p.name, lambda p: p.stem)
"""How a micrograph is named: by its path, its name, or its name without suffix."""


@dataclass(frozen=True)
class _Micrographs:
    """Optics of micrographs, and numbers of rows by each spelling of their names."""

    rows: Sequence[Mapping[str, Any]]
    numbers: Sequence[Mapping[object, Sequence[int]]]


@lru_cache(maxsize=2)
def _read_table(path: Path, _identity: tuple[int, ...], reader: "_Reader") -> _Micrographs:
    """Read a table of micrographs, once until the file is replaced or written."""
    rows = reader(path)
    if not rows:
        raise InvalidInputError(
            f"{path}: expected micrographs with CTF estimates, got none; estimate their CTF first"
        )
    numbers = [defaultdict[object, list[int]](list) for _ in _SPELLINGS]
    for number, row in enumerate(rows):
        named = Path(row["micrograph"])
        for spelling, known in zip(_SPELLINGS, numbers, strict=True):
            known[spelling(named)].append(number)
    return _Micrographs(rows, numbers)


def _relion(path: Path) -> list[dict[str, Any]]:
    text = read_text(path, MAX_NBYTES, "RELION's table of micrographs")
    try:
        tables, problems = parse_star(text)
    except ValueError as error:
        raise InvalidInputError(f"{path}: cannot be read as a STAR file: {error}") from None
    if problems:
        raise InvalidInputError(f"{path}: {problem}" for problem in problems[:NAMES_SHOWN])
    wanted = {"rlnMicrographName", "rlnDefocusU"}
    found = [t for t in tables if wanted <= set(t.columns) and t.block != "particles"]
    if len(found) != 1:
        raise InvalidInputError(
            f"{path}: expected one table with rlnMicrographName and rlnDefocusU, as in "
            f"micrographs_ctf.star, got {len(found)}"
        )
    others = [dict(zip(t.columns, r, strict=True)) for t in tables for r in t.rows]
    groups = {g.get("rlnOpticsGroup", ""): g for g in others if "rlnOpticsGroupName" in g}
    rows = []
    for values in found[0].rows:
        row = dict(zip(found[0].columns, values, strict=True))
        row = {**groups.get(row.get("rlnOpticsGroup", ""), {}), **row}
        optics: dict[str, Any] = {
            name: as_number(row[column]) for column, name in _RELION.items() if row.get(column)
        }
        optics["micrograph"] = row["rlnMicrographName"]
        if row.get("rlnOpticsGroupName"):
            optics["label"] = row["rlnOpticsGroupName"]
        rows.append(optics)
    return rows


def _cistem(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise InvalidInputError(f"{path}: expected cisTEM's database, got no file")
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as database:
            found = database.execute(_CISTEM).fetchall()
    except sqlite3.Error as error:
        raise InvalidInputError(
            f"{path}: expected cisTEM's database, with IMAGE_ASSETS and ESTIMATED_CTF_PARAMETERS: "
            f"{error}"
        ) from None
    names = ("micrograph", *_RELION.values())
    rows = []
    for values in found:
        row = {k: v for k, v in zip(names, values, strict=True) if v is not None}
        if isinstance(row.get("phase_shift_degrees"), float):
            row["phase_shift_degrees"] = math.degrees(row["phase_shift_degrees"])
        rows.append(row)
    return rows


_Reader = Callable[[Path], list[dict[str, Any]]]
_OF_MANY: Mapping[str, _Reader] = {".star": _relion, ".db": _cistem}
"""Readers of the optics of many micrographs."""


def _number_of(table: _Micrographs, micrograph: str | None, path: Path) -> int:
    """Return the number of a micrograph's row; of a table with one row, that."""
    matching: Sequence[int] = range(len(table.rows))
    for spelling, numbers in zip(_SPELLINGS, table.numbers, strict=True):
        if micrograph is not None:
            matching = numbers.get(spelling(Path(micrograph)), [])
            if matching:
                break
    if len(matching) == 1:
        return matching[0]
    names = [row["micrograph"] for row in table.rows]
    shown = ", ".join(names[:NAMES_SHOWN]) + ", ..." * (len(names) > NAMES_SHOWN)
    got = f"{len(matching)} of that name" if micrograph is not None else f"{len(names)}"
    raise InvalidInputError(
        f"{path}: expected one micrograph{f' named {micrograph}' * (micrograph is not None)}, got "
        f"{got}; name one of them (--micrograph, micrograph): {shown}"
    )


def _ctffind(path: Path) -> dict[str, Any]:
    """Read CTFFIND's results: facts in comments, and one row of numbers."""
    text = read_text(path, MAX_NBYTES, "CTFFIND's results")
    values: dict[str, Any] = {}
    for name, pattern in _CTFFIND_HEADER.items():
        if match := re.search(pattern, text):
            values[name] = match[1] if name == "micrograph" else as_number(match[1])
    rows = [line.split() for line in text.splitlines() if line.strip() and line[0] != "#"]
    numbers = [as_number(word) for row in rows for word in row]
    if len(rows) != 1 or len(numbers) < 5 or not all(isinstance(n, float) for n in numbers[:5]):
        raise InvalidInputError(
            f"{path}: expected CTFFIND's results of one micrograph, a row of at least 5 numbers, "
            f"got {len(rows)} rows"
        )
    names = ("defocus_u_angstrom", "defocus_v_angstrom", "astigmatism_angle_degrees")
    values |= dict(zip(names, numbers[1:4], strict=True))
    phase_shift = numbers[4]
    assert isinstance(phase_shift, float)
    return values | {"phase_shift_degrees": math.degrees(phase_shift)}
