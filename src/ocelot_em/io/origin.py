"""Where an exposure is on the canvas, and how its numbers are read."""

import re
from dataclasses import dataclass

_MAX_COORDINATE_PX = 2**31
NAMES_SHOWN = 20


_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")


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


def id_problem(name: str, line: int, lines: dict[str, int]) -> str | None:
    """What is wrong with an id, if anything; ``lines`` has those before it, and gets it too."""
    if not name:
        return "expected the exposure's id, got nothing"
    before = lines.setdefault(name, line)
    return None if before == line else f"expected every id once, got {name!r} as on line {before}"


def coordinate_of(text: str | None) -> float | None:
    """Return a coordinate in pixels; None if the text is none."""
    # Python's own syntax has underscores in numbers, and digits of other scripts.
    if text is None or not text.isascii() or "_" in text:
        return None
    try:
        value = float(text)
    except ValueError:
        return None
    return value if abs(value) <= _MAX_COORDINATE_PX else None  # which NaN is not


def expected_coordinate(text: str | None) -> str:
    """Say that a coordinate was expected."""
    return f"expected a number of pixels from -2**31 to 2**31, got {text!r}"


def integer_of(text: str | None) -> int | None:
    """Return a whole number; None if the text is none."""
    return int(text) if text is not None and _INTEGER.fullmatch(text) else None


def stem_of(path: str) -> str:
    """Name of a file, of Windows or elsewhere, without folder and extension."""
    name = re.split(r"[\\/]", path.rstrip("\\/"))[-1]
    # What starts with a digit is no extension: folders are called tilt_-10.0.
    return re.sub(r"(?<=.)\.[A-Za-z][^.]*$", "", name).strip()
