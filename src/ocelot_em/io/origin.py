"""Origin of an exposure on the canvas, and parsing of its values."""

import re
from dataclasses import dataclass

_MAX_COORDINATE_PX = 2**31
NAMES_SHOWN = 20

_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")


@dataclass(frozen=True, slots=True)
class Origin:
    """Position of an exposure on the canvas, and its place in the order of acquisition.

    ``y`` and ``x`` are the canvas row and column, in pixels, of the exposure's pixel (0, 0); they
    may be fractional and negative. ``acquired`` is None if the file has no order.
    """

    y: float
    x: float
    acquired: int | None


def id_problem(name: str, line: int, lines: dict[str, int]) -> str | None:
    """Return an id's problem, if any; ``lines`` has the lines of previous ids, and is updated."""
    if not name:
        return "expected the exposure's id, got nothing"
    before = lines.setdefault(name, line)
    return None if before == line else f"expected every id once, got {name!r} as on line {before}"


def coordinate_of(text: str | None) -> float | None:
    """Return a coordinate in pixels; None if the text is not one."""
    # Python also accepts underscores in numbers and digits of other scripts.
    if text is None or not text.isascii() or "_" in text:
        return None
    try:
        value = float(text)
    except ValueError:
        return None
    return value if abs(value) <= _MAX_COORDINATE_PX else None  # NaN gives None


def integer_of(text: str | None) -> int | None:
    """Return an integer; None if the text is not one."""
    return int(text) if text is not None and _INTEGER.fullmatch(text) else None


def stem_of(path: str) -> str:
    """Return a Windows or POSIX file name without folder and extension."""
    name = re.split(r"[\\/]", path.rstrip("\\/"))[-1]
    # An extension starts with a letter: tilt_-10.0 has none.
    return re.sub(r"(?<=.)\.[A-Za-z][^.]*$", "", name).strip()
