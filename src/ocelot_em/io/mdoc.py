"""Origins of exposures in SerialEM's ``.mdoc`` files; see DESIGN.md for why not by mdocfile."""

import io
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

import numpy as np

from ocelot_em.io.origin import NAMES_SHOWN, Origin, coordinate_of, id_problem, integer_of, stem_of

PIECE_KEYS: Mapping[str, str] = {
    "aligned": "AlignedPieceCoords",
    "aligned-vs": "AlignedPieceCoordsVS",
    "piece": "PieceCoordinates",
}
"""Keys of coordinates in an ``.mdoc`` file, the preferred one first."""

_KEYS = {*PIECE_KEYS.values(), "SubFramePath", "DateTime"}
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_TITLE = re.compile(r"\[\s*T\s*=")
_DATE = re.compile(
    r"(?:([0-9]{1,2})-([A-Za-z]{3})-([0-9]{4}|[0-9]{2})|([0-9]{4})-([A-Za-z]{3})-([0-9]{1,2}))"
    r"\s+([0-9]{1,2}):([0-9]{2}):([0-9]{2})"
)


@dataclass(frozen=True, slots=True)
class _Section:
    """A section: its line, and lines and values by key."""

    line: int
    kind: str
    name: str
    values: dict[str, tuple[int, str]]

    @property
    def title(self) -> str:
        return f"[{self.kind} = {self.name}]"


def read_mdoc(
    text: str, flip_y: bool, coordinates: Literal["aligned", "aligned-vs", "piece"] | None
) -> tuple[dict[str, Origin], list[str]]:
    """Read origins from a SerialEM file; return them by id, and problems."""
    sections, problems = _sections(text)
    if not sections:
        return {}, problems or ["expected sections [ZValue = ...] or [Image = ...], got none"]
    everywhere = (k for k in PIECE_KEYS.values() if all(k in s.values for s in sections))
    key = PIECE_KEYS[coordinates] if coordinates else next(everywhere, PIECE_KEYS["piece"])
    ids, found = _ids(sections)
    problems += found
    pieces, montages = list[tuple[float, float]](), dict[str, int]()
    for section in sections:
        if key not in section.values:
            problems.append(f"line {section.line}: {section.title}: expected {key}, got none")
            continue
        line, written = section.values[key]
        numbers = [n for n in map(coordinate_of, written.split()) if n is not None]
        if not len(numbers) == len(written.split()) == 3:
            problems.append(
                f"line {line}: {key}: expected x, y and z, numbers from -2**31 to 2**31, got "
                f"{written!r}"
            )
            continue
        x, y, z = numbers
        montages.setdefault(f"{z:g}", line)
        pieces.append((y, x))
    if len(montages) > 1:
        listed = [f"{z} (line {line})" for z, line in montages.items()]
        problems.append(
            f"expected the pieces of one montage, got z = {', '.join(listed[:NAMES_SHOWN])}; keep "
            "the sections of each in a file of their own"
        )
    if problems:
        return {}, problems
    top, bottom, left = max(pieces)[0], min(pieces)[0], min(x for _, x in pieces)
    return {
        name: Origin(top - y if flip_y else y - bottom, x - left, rank)
        for name, (y, x), rank in zip(ids, pieces, _acquired(sections), strict=True)
    }, []


def _sections(text: str) -> tuple[list[_Section], list[str]]:
    """Return the image sections in the order of the file, and problems."""
    sections, problems, titles = list[_Section](), list[str](), dict[str, int]()
    current: _Section | None = None
    for line, written in enumerate(io.StringIO(text, newline=None), 1):
        content = written.strip()
        if content.startswith("["):
            current = None
            kind, equals, name = (part.strip() for part in content[1:-1].partition("="))
            if not (equals and content.endswith("]")):
                if not _TITLE.match(content):  # titles may span several lines
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
            if key not in _KEYS:
                continue
            before, _ = current.values.setdefault(key, (line, value))
            if before != line:
                problems.append(
                    f"line {line}: expected {key} once in {current.title}, got it as on line "
                    f"{before}"
                )
    return sections, problems


def _ids(sections: Sequence[_Section]) -> tuple[list[str], list[str]]:
    """Return the sections' ids, and problems."""
    framed = all(section.values.get("SubFramePath", (0, ""))[1] for section in sections)
    ids, lines, problems = list[str](), dict[str, int](), list[str]()
    for section in sections:
        line, name = section.line, section.name
        if framed:
            line, name = section.values["SubFramePath"]
        if framed or section.kind == "Image":
            name = stem_of(name)
        problem = id_problem(name, line, lines)
        if "\ufffd" in name:
            problem = f"expected a name in UTF-8, got {name!r}; save the file in that encoding"
        if problem:
            source = "SubFramePath" if framed else section.title
            problems.append(f"line {line}: {source}: {problem}")
        ids.append(name)
    return ids, problems


def _acquired(sections: Sequence[_Section]) -> list[int]:
    """Return the sections' order of acquisition: from times, Z values or the file's order."""
    times = [_time(section.values.get("DateTime", (0, ""))[1]) for section in sections]
    if None not in times:
        order = np.argsort(np.array(times, "datetime64[s]"), kind="stable")
        return [int(rank) for rank in np.argsort(order)]
    numbers = [integer_of(s.name) if s.kind == "ZValue" else None for s in sections]
    known = [number for number in numbers if number is not None]
    return known if len(known) == len(sections) else list(range(len(sections)))


def _time(text: str) -> datetime | None:
    """Read SerialEM's day-month-year (two-digit year before 4.1) or year-month-day."""
    match = _DATE.fullmatch(text)
    if match is None:
        return None
    groups = match.groups()
    day, month, year = groups[:3] if groups[0] else groups[5:2:-1]
    with suppress(ValueError):  # no such month or day
        number = _MONTHS.index(month.lower()) + 1
        century = 2000 if len(year) == 2 else 0
        hour, minute, second = map(int, groups[6:])
        return datetime(century + int(year), number, int(day), hour, minute, second)
    return None
