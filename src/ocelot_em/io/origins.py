"""Where the exposures of a montage lie on its canvas, as tables and SerialEM's files tell it.

An exposure's origin is the canvas pixel of its pixel (0, 0), the first pixel of its first row.

SerialEM's keys are described in its help, in "Image Metadata Files" on the page "File Formats and
Other Documentation" (https://bio3d.colorado.edu/SerialEM/hlp/html/about_formats.htm):

``PieceCoordinates``
    Where a piece was meant to be: x, y, and the number of its montage in the file, z.
``AlignedPieceCoords``
    The same, with the shifts that align the pieces best. It is there if SerialEM aligned the
    pieces while its option "Very sloppy" was off.
``AlignedPieceCoordsVS``
    The same with that option on, as is usual for montages that move the stage.

They count pixels of the images that the file is about, as these are stored: binned ones if the
camera binned. Images that were made from the frames in ``SubFramePath`` have to have the same
pixels, and the same rotation and flip.

The axes are right-handed: y counts upwards from the lower edge. An MRC file has its lowest line
first, so that rows of an array that was read from one as it is stored count upwards too, and
nothing is flipped. An image whose first row is its top, as TIFF files have it, needs ``flip_y``.
"""

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from ocelot_em.errors import InvalidInputError
from ocelot_em.io.star_file import parse_star
from ocelot_em.io.text_file import read_text

_MAX_NBYTES = 256_000_000
_MAX_COORDINATE_PX = 2**31
_PROBLEMS_SHOWN = 100
_NAMES_SHOWN = 20

_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "id": ("exposure", "id"),
    "y": ("y", "origin_y", "y0"),
    "x": ("x", "origin_x", "x0"),
    "acquired": ("acquired",),
}
"""What a column of a table may be called."""

_STAR_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "id": (*_COLUMNS["id"], "rlnMicrographName"),
    "y": (*_COLUMNS["y"], "rlnCoordinateY"),
    "x": (*_COLUMNS["x"], "rlnCoordinateX"),
    "acquired": _COLUMNS["acquired"],
}

_OPTIONAL = "acquired"
_PIECE_KEYS: Mapping[str, str] = {
    "aligned": "AlignedPieceCoords",
    "aligned-vs": "AlignedPieceCoordsVS",
    "piece": "PieceCoordinates",
}
"""What coordinates are called in an ``.mdoc`` file, the preferred first."""

_MDOC_KEYS = {*_PIECE_KEYS.values(), "SubFramePath", "DateTime"}
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_TITLE = re.compile(r"\[\s*T\s*=")
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")
_DATE = re.compile(
    r"(?:([0-9]{1,2})-([A-Za-z]{3})-([0-9]{4}|[0-9]{2})|([0-9]{4})-([A-Za-z]{3})-([0-9]{1,2}))"
    r"\s+([0-9]{1,2}):([0-9]{2}):([0-9]{2})"
)


@dataclass(frozen=True, slots=True)
class Origin:
    """Where an exposure lies on the canvas, and when it was taken.

    Parameters
    ----------
    y, x
        Canvas row and column of the exposure's pixel (0, 0), in pixels. They may be fractional and
        negative.
    acquired
        Place in the order of acquisition; None if the file does not tell it.
    """

    y: float
    x: float
    acquired: int | None


@dataclass(frozen=True, slots=True)
class _Row:
    """What a table says of an exposure, as text; None where a value is missing."""

    line: int
    values: Mapping[str, str | None]


@dataclass(frozen=True, slots=True)
class _Section:
    """A section of an ``.mdoc`` file: values and their lines by the keys that are read here."""

    line: int
    kind: str
    name: str
    values: dict[str, tuple[int, str]]

    @property
    def title(self) -> str:
        return f"[{self.kind} = {self.name}]"


def read_origins(
    path: str | PathLike[str],
    *,
    flip_y: bool = False,
    coordinates: Literal["aligned", "aligned-vs", "piece"] | None = None,
) -> dict[str, Origin]:
    """Read the origins of exposures from a CSV or STAR table, or SerialEM's ``.mdoc`` file.

    Parameters
    ----------
    path
        What it is, its suffix says:

        ``.csv``
            A header line, with a column ``exposure`` or ``id``; ``y``, ``origin_y`` or ``y0``;
            ``x``, ``origin_x`` or ``x0``; ``acquired``, an integer, may be there. Others are
            ignored.
        ``.star``
            One block with the same columns. RELION's ``rlnMicrographName``, of which the file's
            name without folder and extension is taken, ``rlnCoordinateY`` and ``rlnCoordinateX``
            may be there instead.
        ``.mdoc``
            The sections ``[ZValue = ...]`` or ``[Image = ...]`` of one montage.
    flip_y
        For ``.mdoc`` only: rows count downwards from the top edge, and ``y`` is the highest
        piece's y less the piece's own. The images have to be of one height.
    coordinates
        For ``.mdoc`` only: take ``AlignedPieceCoords`` ("aligned"), ``AlignedPieceCoordsVS``
        ("aligned-vs") or ``PieceCoordinates`` ("piece"). None: the first of them that every section
        has.

    Returns
    -------
    dict of str to Origin
        By the exposures' ids, in the order of the file. Ids are as they are written, without
        spaces around them. Those of an ``.mdoc`` file are the names of the files in
        ``SubFramePath``, without folder and extension, if all sections have one; otherwise the
        images' names without extension, or the Z values.

        Origins of tables are taken as they are. Those of an ``.mdoc`` file are shifted so that the
        lowest y and x are 0; their order of acquisition is the rank of ``DateTime``, counted from
        0, equal times in the order of the sections, if it can be read in all of them; otherwise the
        Z value, or the order of the sections.

    Raises
    ------
    InvalidInputError
        Naming every line that cannot be used: no or ambiguous columns, ragged rows, an id twice,
        coordinates that are no finite numbers or beyond 2**31, ``acquired`` that is no integer,
        sections without coordinates. Or the file is of another kind, larger than 256 MB, no text,
        or without exposures; an ``.mdoc`` file has more than one montage.
    MissingDependencyError
        The file is a STAR file, and starfile is not installed.
    """
    place = Path(path)
    suffix = place.suffix.lower()
    if suffix not in (".csv", ".star", ".mdoc"):
        raise InvalidInputError(
            f"{place}: expected a name that ends in .csv, .star or .mdoc (SerialEM), got {suffix!r}"
        )
    if coordinates is not None and coordinates not in _PIECE_KEYS:
        raise InvalidInputError(
            f"coordinates: expected one of {_quoted(_PIECE_KEYS)} or None, got {coordinates!r}"
        )
    if suffix != ".mdoc" and (flip_y or coordinates is not None):
        raise InvalidInputError(
            f"{place}: origins of a {suffix} file are taken as they are; leave out flip_y and "
            "coordinates, which are for .mdoc files"
        )
    what = "a file with origins of exposures"
    text = read_text(place, _MAX_NBYTES, what, lenient=suffix == ".mdoc")
    if suffix == ".mdoc":
        origins, problems = _read_mdoc(text, flip_y, coordinates)
    else:
        rows, problems = _csv_rows(text) if suffix == ".csv" else _star_rows(text)
        origins, found = _from_rows(rows)
        problems += found
        if not problems and not origins:
            problems.append("expected a row for each exposure, got none")
    if problems:
        more = len(problems) - _PROBLEMS_SHOWN
        shown = problems[:_PROBLEMS_SHOWN] + ([f"and {more} more problems"] if more > 0 else [])
        raise InvalidInputError(f"{place}: {problem}" for problem in shown)
    return origins


def _from_rows(rows: Iterable[_Row]) -> tuple[dict[str, Origin], list[str]]:
    """Origins of the rows of a table, and what is wrong with them."""
    origins, lines, problems = dict[str, Origin](), dict[str, int](), list[str]()
    for row in rows:
        values = row.values
        name, y, x = values["id"] or "", _coordinate(values["y"]), _coordinate(values["x"])
        found = [_id_problem(name, row.line, lines)]
        found += [
            f"{axis}: {_expected_coordinate(values[axis])}"
            for axis, value in (("y", y), ("x", x))
            if value is None
        ]
        acquired = None
        if _OPTIONAL in values:
            acquired = _integer(values[_OPTIONAL])
            if acquired is None:
                found.append(f"acquired: expected an integer, got {values[_OPTIONAL]!r}")
        problems += [f"line {row.line}: {problem}" for problem in found if problem]
        if y is not None and x is not None:
            origins[name] = Origin(y, x, acquired)
    return origins, problems


def _id_problem(name: str, line: int, lines: dict[str, int]) -> str | None:
    """What is wrong with an id, if anything; ``lines`` has those before it, and gets it too."""
    if not name:
        return "expected the exposure's id, got nothing"
    before = lines.setdefault(name, line)
    return None if before == line else f"expected every id once, got {name!r} as on line {before}"


def _coordinate(text: str | None) -> float | None:
    # Python's own syntax has underscores in numbers, and digits of other scripts.
    if text is None or not text.isascii() or "_" in text:
        return None
    try:
        value = float(text)
    except ValueError:
        return None
    return value if abs(value) <= _MAX_COORDINATE_PX else None  # which NaN is not


def _expected_coordinate(text: str | None) -> str:
    return f"expected a number of pixels from -2**31 to 2**31, got {text!r}"


def _integer(text: str | None) -> int | None:
    return int(text) if text is not None and _INTEGER.fullmatch(text) else None


def _quoted(names: Iterable[str]) -> str:
    listed = list(names)
    more = len(listed) - _NAMES_SHOWN
    return ", ".join(map(repr, listed[:_NAMES_SHOWN])) + (f" and {more} more" if more > 0 else "")


def _choose(
    names: Sequence[str], known: Mapping[str, tuple[str, ...]]
) -> tuple[dict[str, int], list[str]]:
    """Places of the columns that are read, and which are missing or ambiguous."""
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


def _csv_rows(text: str) -> tuple[list[_Row], list[str]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        lines = [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        return [], [f"line {reader.line_num}: cannot be read as CSV: {error}"]
    if not lines:
        return [], ["expected a header line with the columns, got nothing"]
    (line, names), *body = lines
    chosen, problems = _choose([name.strip() for name in names], _COLUMNS)
    if problems:
        return [], [f"line {line}: {problem}" for problem in problems]
    ragged = [
        f"line {line}: expected {len(names)} values, as the header has, got {len(row)}"
        for line, row in body
        if len(row) != len(names)
    ]
    return [
        _Row(line, {kind: row[i].strip() for kind, i in chosen.items()})
        for line, row in body
        if len(row) == len(names)
    ], ragged


def _star_rows(text: str) -> tuple[list[_Row], list[str]]:
    lines = [line.strip() for line in io.StringIO(text, newline=None)]
    headers = [line.removeprefix("data_") for line in lines if line.startswith("data_")]
    rows = [name for name in headers if len(name.split()) > 1]
    if rows:
        return [], [
            "expected no rows that start with 'data_', as blocks do, got "
            f"{_quoted('data_' + row for row in rows)}; have the ids in another column"
        ]
    try:
        blocks = parse_star(text, [name for names in _STAR_COLUMNS.values() for name in names])
    except ValueError as error:
        return [], [
            f"cannot be read as a STAR file: {error}; expected blocks that start with "
            "'data_' and have a table each, with as many values in every row as there are columns"
        ]
    if len(blocks) != len(headers):  # of several with one name, the last is kept
        return [], [f"expected blocks with names of their own, got {_quoted(headers)}"]
    names = {block: list(blocks[block]) for block in blocks}  # of data frames and dicts alike
    having = [
        block
        for block in blocks
        if all(
            set(accepted) & set(names[block])
            for kind, accepted in _STAR_COLUMNS.items()
            if kind != _OPTIONAL
        )
    ]
    if len(having) != 1:
        needed = "; ".join(
            _quoted(accepted) for kind, accepted in _STAR_COLUMNS.items() if kind != _OPTIONAL
        )
        got = [f"block {block!r} with {_quoted(names[block])}" for block in having or blocks]
        return [], [
            f"expected one block with one column of each of: {needed}; got "
            f"{', '.join(got[:_NAMES_SHOWN]) or 'no block'}"
        ]
    (block,) = having
    chosen, problems = _choose(names[block], _STAR_COLUMNS)
    if problems:
        return [], [f"block {block!r}: {problem}" for problem in problems]
    return _star_block(blocks[block], names[block], chosen, lines, lines.index(f"data_{block}"))


def _star_block(
    block: Any, names: list[str], chosen: Mapping[str, int], lines: Sequence[str], start: int
) -> tuple[list[_Row], list[str]]:
    """Rows of a block whose header is line ``start``, counted from 0; which of them are ragged."""
    if isinstance(block, dict):  # a value a line, without a loop
        columns = [[block[name]] for name in names]
        places = [start]
    else:
        columns = [block.iloc[:, i].tolist() for i in range(len(names))]
        places = _loop_rows(lines, start)
    if len(places) != len(columns[0]):
        return [], [
            f"line {start + 1}: expected every row of the block on a line of its own, got "
            f"{len(columns[0])} rows on {len(places)} lines"
        ]
    rows, problems = list[_Row](), list[str]()
    for i, at in enumerate(places):
        # What a short row lacks at its end is NaN or empty, as are "nan" and '""'.
        last = columns[-1][i]
        if last == "" or last != last:
            n = len(re.findall(r'"[^"]*"|\S+', lines[at].partition("#")[0].replace("'", '"')))
            if n < len(names):
                problems.append(f"line {at + 1}: expected {len(names)} values, got {n}")
                continue
        values: dict[str, str | None] = {}
        for kind, column in chosen.items():
            value = columns[column][i]
            values[kind] = value.strip() if isinstance(value, str) else None
        if names[chosen["id"]] == "rlnMicrographName":
            values["id"] = _stem(values["id"] or "")
        rows.append(_Row(at + 1, values))
    return rows, problems


def _loop_rows(lines: Sequence[str], start: int) -> list[int]:
    """Which lines have the rows of the first loop after a line, counted from 0."""
    at = start + 1
    while at < len(lines) and not lines[at].startswith("loop_"):
        at += 1
    at += 1
    while at < len(lines) and lines[at].startswith("_"):
        at += 1
    rows = []
    while at < len(lines) and not lines[at].startswith("data_"):
        if lines[at] and not lines[at].startswith("#"):
            rows.append(at)
        at += 1
    return rows


def _stem(path: str) -> str:
    """Name of a file, of Windows or elsewhere, without folder and extension."""
    name = re.split(r"[\\/]", path.rstrip("\\/"))[-1]
    # What starts with a digit is no extension: folders are called tilt_-10.0.
    return re.sub(r"(?<=.)\.[A-Za-z][^.]*$", "", name).strip()


def _read_mdoc(
    text: str, flip_y: bool, coordinates: Literal["aligned", "aligned-vs", "piece"] | None
) -> tuple[dict[str, Origin], list[str]]:
    sections, problems = _sections(text)
    if not sections:
        return {}, problems or ["expected sections [ZValue = ...] or [Image = ...], got none"]
    if coordinates is None:
        everywhere = [
            kind
            for kind, key in _PIECE_KEYS.items()
            if all(key in section.values for section in sections)
        ]
        piece_key = _PIECE_KEYS[everywhere[0] if everywhere else "piece"]
    else:
        piece_key = _PIECE_KEYS[coordinates]
    ids, found = _mdoc_ids(sections)
    problems += found
    pieces = list[tuple[float, float]]()
    montages = dict[str, int]()
    for section in sections:
        key = piece_key
        if key not in section.values:
            problems.append(f"line {section.line}: {section.title}: expected {key}, got none")
            continue
        line, written = section.values[key]
        numbers = [_coordinate(number) for number in written.split()]
        if len(numbers) != 3 or None in numbers:
            problems.append(
                f"line {line}: {key}: expected x, y and z, numbers from -2**31 to 2**31, got "
                f"{written!r}"
            )
            continue
        x, y, z = (number for number in numbers if number is not None)
        montages.setdefault(f"{z:g}", line)
        pieces.append((y, x))
    if len(montages) > 1:
        listed = [f"{z} (line {line})" for z, line in montages.items()]
        problems.append(
            f"expected the pieces of one montage, got z = {', '.join(listed[:_NAMES_SHOWN])}; keep "
            "the sections of each in a file of their own"
        )
    if problems:
        return {}, problems
    top, bottom, left = (max(pieces)[0], min(pieces)[0], min(x for _, x in pieces))
    ranks = _acquired(sections)
    return {
        name: Origin(top - y if flip_y else y - bottom, x - left, rank)
        for name, (y, x), rank in zip(ids, pieces, ranks, strict=True)
    }, []


def _sections(text: str) -> tuple[list[_Section], list[str]]:
    """Sections of images, in the order of the file, and what is wrong with them."""
    sections, problems = list[_Section](), list[str]()
    titles = dict[str, int]()
    current: _Section | None = None
    for line, written in enumerate(io.StringIO(text, newline=None), 1):
        content = written.strip()
        if content.startswith("["):
            current = None
            kind, equals, name = (part.strip() for part in content[1:-1].partition("="))
            if not (equals and content.endswith("]")):
                if not _TITLE.match(content):  # these may be broken into lines
                    problems.append(f"line {line}: expected [key = value], got {content!r}")
                continue
            if kind not in ("ZValue", "Image"):
                continue
            current = _Section(line, kind, name, {})
            before = titles.setdefault(current.title, line)
            if before != line:
                problems.append(
                    f"line {line}: expected every section once, got {current.title} as on line "
                    f"{before}"
                )
            sections.append(current)
        elif current is not None:
            key, _, value = (part.strip() for part in content.partition("="))
            if key not in _MDOC_KEYS:
                continue
            before, _ = current.values.setdefault(key, (line, value))
            if before != line:
                problems.append(
                    f"line {line}: expected {key} once in {current.title}, got it as on line "
                    f"{before}"
                )
    return sections, problems


def _mdoc_ids(sections: Sequence[_Section]) -> tuple[list[str], list[str]]:
    """Ids of the sections, and what is wrong with them."""
    framed = all(section.values.get("SubFramePath", (0, ""))[1] for section in sections)
    ids, lines, problems = list[str](), dict[str, int](), list[str]()
    for section in sections:
        line, name = section.line, section.name
        if framed:
            line, name = section.values["SubFramePath"]
        if framed or section.kind == "Image":
            name = _stem(name)
        problem = _id_problem(name, line, lines)
        if "\ufffd" in name:
            problem = f"expected a name in UTF-8, got {name!r}; save the file in that encoding"
        if problem:
            source = "SubFramePath" if framed else section.title
            problems.append(f"line {line}: {source}: {problem}")
        ids.append(name)
    return ids, problems


def _acquired(sections: Sequence[_Section]) -> list[int]:
    """Places of the sections in the order of acquisition, as far as they are known."""
    times = [_time(section.values.get("DateTime", (0, ""))[1]) for section in sections]
    known = [time for time in times if time is not None]
    if len(known) == len(times):
        order = sorted(range(len(known)), key=known.__getitem__)
        ranks = [0] * len(order)
        for rank, section in enumerate(order):
            ranks[section] = rank
        return ranks
    numbers = [_integer(s.name) if s.kind == "ZValue" else None for s in sections]
    known_numbers = [number for number in numbers if number is not None]
    return known_numbers if len(known_numbers) == len(numbers) else list(range(len(sections)))


def _time(text: str) -> datetime | None:
    """Read SerialEM's day-month-year (two digits of it before version 4.1) or year-month-day."""
    match = _DATE.fullmatch(text)
    if match is None:
        return None
    groups = match.groups()
    day, month, year = groups[:3] if groups[0] else groups[5:2:-1]
    if month.lower() not in _MONTHS:
        return None
    century = 2000 if len(year) == 2 else 0
    hour, minute, second = map(int, groups[6:])
    number = _MONTHS.index(month.lower()) + 1
    try:
        return datetime(century + int(year), number, int(day), hour, minute, second)
    except ValueError:
        return None
