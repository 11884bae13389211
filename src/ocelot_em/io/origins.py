"""Origins of a montage's exposures on the canvas, read from tables and SerialEM files.

An exposure's origin is the canvas pixel of its pixel (0, 0), the first pixel of its first row.

SerialEM's keys are described in its help, in "Image Metadata Files" on the page "File Formats and
Other Documentation" (https://bio3d.colorado.edu/SerialEM/hlp/html/about_formats.htm):

``PieceCoordinates``
    The intended position of a piece: x, y and z, the number of its montage in the file.
``AlignedPieceCoords``
    The same, with the shifts that align the pieces best. Present if SerialEM aligned the pieces
    with its option "Very sloppy" off.
``AlignedPieceCoordsVS``
    The same with that option on, as is usual for montages that move the stage.

Units are pixels of the stored images that the file describes: binned pixels if the camera binned.
Images made from the frames in ``SubFramePath`` must have the same pixels, rotation and flip.

The axes are right-handed: y increases upwards from the lower edge. An MRC file stores its lowest
line first, so the rows of an array read from it as stored also increase upwards and nothing is
flipped. An image whose first row is its top, as in TIFF files, needs ``flip_y``.
"""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Literal

from ocelot_em.errors import InvalidInputError
from ocelot_em.io.mdoc import PIECE_KEYS, read_mdoc
from ocelot_em.io.origin import NAMES_SHOWN, Origin, coordinate_of, id_problem, integer_of, stem_of
from ocelot_em.io.star_file import StarTable, parse_star
from ocelot_em.io.text_file import read_text

_MAX_NBYTES = 256_000_000
_PROBLEMS_SHOWN = 100

_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "id": ("exposure", "id"),
    "y": ("y", "origin_y", "y0"),
    "x": ("x", "origin_x", "x0"),
    "acquired": ("acquired",),
}
"""Accepted names of a table's columns."""

_STAR_COLUMNS = {
    **_COLUMNS,
    "id": (*_COLUMNS["id"], "rlnMicrographName"),
    "y": (*_COLUMNS["y"], "rlnCoordinateY"),
    "x": (*_COLUMNS["x"], "rlnCoordinateX"),
}

_OPTIONAL = "acquired"


def read_origins(
    path: str | PathLike[str],
    *,
    flip_y: bool = False,
    coordinates: Literal["aligned", "aligned-vs", "piece"] | None = None,
) -> dict[str, Origin]:
    """Read the origins of exposures by id from a table, or SerialEM's ``.mdoc`` file.

    The suffix names the format:

    ``.csv``
        A header line with the columns ``exposure`` or ``id``; ``y``, ``origin_y`` or ``y0``; ``x``,
        ``origin_x`` or ``x0``; and optionally ``acquired``, an integer. Others are ignored.
    ``.star``
        One block with the same columns, or with RELION's ``rlnMicrographName`` (used without folder
        and extension), ``rlnCoordinateY`` and ``rlnCoordinateX`` instead.
    ``.mdoc``
        The sections ``[ZValue = ...]`` or ``[Image = ...]`` of one montage. Ids are the names of
        the files in ``SubFramePath``, without folder and extension, if all sections have one; or
        the images' names without extension, or the Z values. Origins are shifted so that the lowest
        y and x are 0. The order of acquisition is the rank of ``DateTime``, counted from 0, with
        equal times in the order of the sections, if all sections have a readable one; otherwise the
        Z value, or the order of the sections.

    The last two parameters are for ``.mdoc`` only. With ``flip_y``, rows count downwards from the
    top edge, and ``y`` is the highest piece's y minus the piece's own; all images must have the
    same height. ``coordinates`` chooses ``AlignedPieceCoords`` (aligned), ``AlignedPieceCoordsVS``
    (aligned-vs) or ``PieceCoordinates`` (piece); by default, the first of these that every section
    has.

    Every unusable line is named in the error: missing or ambiguous columns, ragged rows, duplicate
    ids, coordinates that are not finite or exceed 2**31, and so on.
    """
    place = Path(path)
    suffix = place.suffix.lower()
    if suffix not in (".csv", ".star", ".mdoc"):
        raise InvalidInputError(
            f"{place}: expected a name that ends in .csv, .star or .mdoc (SerialEM), got {suffix!r}"
        )
    if coordinates is not None and coordinates not in PIECE_KEYS:
        raise InvalidInputError(
            f"coordinates: expected one of {_quoted(PIECE_KEYS)} or None, got {coordinates!r}"
        )
    if suffix != ".mdoc" and (flip_y or coordinates is not None):
        raise InvalidInputError(
            f"{place}: origins of a {suffix} file are taken as they are; leave out flip_y and "
            "coordinates, which are for .mdoc files"
        )
    text = read_text(
        place, _MAX_NBYTES, "a file with origins of exposures", lenient=suffix == ".mdoc"
    )
    if suffix == ".mdoc":
        origins, problems = read_mdoc(text, flip_y, coordinates)
    else:
        table, problems = (_csv_table if suffix == ".csv" else _star_table)(text)
        origins = dict[str, Origin]()
        if table is not None:
            origins, found = _from_table(table, _COLUMNS if suffix == ".csv" else _STAR_COLUMNS)
            problems += found
            if not problems and not origins:
                problems.append("expected a row for each exposure, got none")
    if problems:
        more = len(problems) - _PROBLEMS_SHOWN
        shown = problems[:_PROBLEMS_SHOWN] + ([f"and {more} more problems"] if more > 0 else [])
        raise InvalidInputError(f"{place}: {problem}" for problem in shown)
    return origins


def _csv_table(text: str) -> tuple[StarTable | None, list[str]]:
    """Return the rows of a CSV file without ragged ones, as a table without name; and problems."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        rows = [(reader.line_num, tuple(row)) for row in reader if row]
    except csv.Error as error:
        return None, [f"line {reader.line_num}: cannot be read as CSV: {error}"]
    if not rows:
        return None, ["expected a header line with the columns, got nothing"]
    (line, header), *body = rows
    names = tuple(name.strip() for name in header)
    _, problems = _choose(names, _COLUMNS)
    if problems:
        return None, [f"line {line}: {problem}" for problem in problems]
    whole = [(line, row) for line, row in body if len(row) == len(names)]
    return StarTable("", names, [row for _, row in whole], [line for line, _ in whole]), [
        f"line {line}: expected {len(names)} values, as the header has, got {len(row)}"
        for line, row in body
        if len(row) != len(names)
    ]


def _star_table(text: str) -> tuple[StarTable | None, list[str]]:
    """Return the only table with the necessary columns, and problems."""
    try:
        tables, problems = parse_star(text)
    except ValueError as error:
        return None, [
            f"cannot be read as a STAR file: {error}; expected blocks that start with 'data_', and "
            "values with quotation marks around them where they have spaces"
        ]
    needed = [accepted for kind, accepted in _STAR_COLUMNS.items() if kind != _OPTIONAL]
    having = [t for t in tables if all(set(names) & set(t.columns) for names in needed)]
    if len(having) != 1:
        got = [f"block {t.block!r} with {_quoted(t.columns)}" for t in having or tables]
        return None, [
            *problems,
            f"expected one block with one column of each of: {'; '.join(map(_quoted, needed))}; "
            f"got {', '.join(got[:NAMES_SHOWN]) or 'no block'}",
        ]
    _, found = _choose(having[0].columns, _STAR_COLUMNS)
    problems += [f"block {having[0].block!r}: {problem}" for problem in found]
    return None if found else having[0], problems


def _choose(
    names: Sequence[str], known: Mapping[str, tuple[str, ...]]
) -> tuple[dict[str, int], list[str]]:
    """Return the positions of the known columns, and problems: missing or ambiguous ones."""
    chosen, problems = dict[str, int](), list[str]()
    for kind, accepted in known.items():
        found = [i for i, name in enumerate(names) if name in accepted]
        if len(found) == 1:
            chosen[kind] = found[0]
        elif found or kind != _OPTIONAL:
            got = [names[i] for i in found] or names
            problems.append(
                f"expected one column of {_quoted(accepted)}, got {_quoted(got) or 'none'}"
            )
    return chosen, problems


def _from_table(
    table: StarTable, known: Mapping[str, tuple[str, ...]]
) -> tuple[dict[str, Origin], list[str]]:
    """Return the origins in a table's rows, and problems."""
    origins, lines, problems = dict[str, Origin](), dict[str, int](), list[str]()
    chosen, _ = _choose(table.columns, known)
    is_path = table.columns[chosen["id"]] == "rlnMicrographName"
    for line, row in zip(table.lines, table.rows, strict=True):
        values = {kind: row[i].strip() for kind, i in chosen.items()}
        name = stem_of(values["id"]) if is_path else values["id"]
        y, x = coordinate_of(values["y"]), coordinate_of(values["x"])
        acquired = integer_of(values.get(_OPTIONAL))
        found = [id_problem(name, line, lines)]
        found += [
            f"{axis}: expected a number of pixels from -2**31 to 2**31, got {values[axis]!r}"
            for axis, value in (("y", y), ("x", x))
            if value is None
        ]
        if _OPTIONAL in values and acquired is None:
            found.append(f"acquired: expected an integer, got {values[_OPTIONAL]!r}")
        problems += [f"line {line}: {problem}" for problem in found if problem]
        if y is not None and x is not None:
            origins[name] = Origin(y, x, acquired)
    return origins, problems


def _quoted(names: Iterable[str]) -> str:
    listed = list(names)
    more = len(listed) - NAMES_SHOWN
    return ", ".join(map(repr, listed[:NAMES_SHOWN])) + (f" and {more} more" if more > 0 else "")
