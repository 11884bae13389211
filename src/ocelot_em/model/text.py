"""Numbers and quantities as people read and write them."""

import re
from math import isfinite, isnan


def count_text(n: int, what: str) -> str:
    """Format a count with its noun.

    >>> count_text(1, "worker"), count_text(1200, "process")
    ('1 worker', '1,200 processes')
    """
    plural = "es" if what.endswith("s") else "s"
    return f"{n:,} {what}{plural * (n != 1)}"


def number_text(value: float | None, spec: str) -> str:
    """Format a number; a dash for None and NaN.

    >>> number_text(1234.5, ",.2f"), number_text(None, ".2f")
    ('1,234.50', '—')
    """
    return "—" if value is None or isnan(value) else format(value, spec)


def percent_text(share: float) -> str:
    """Format a fraction as a percentage; only exact 0 and 1 give 0% and 100%.

    >>> percent_text(0.25), percent_text(0.00001), percent_text(1)
    ('25.0%', '0.1%', '100%')
    """
    if share in (0.0, 1.0):
        return f"{share:.0%}"
    return f"{min(max(share, 0.001), 0.999):.1%}"


def shape_text(shape: tuple[int, int]) -> str:
    """Format height and width in pixels.

    >>> shape_text((1000, 1400))
    '1,000 × 1,400'
    """
    return f"{shape[0]:,} × {shape[1]:,}"


def area_text(shape: tuple[int, int], pixel_size_angstrom: float) -> str:
    """Format the height and width of maps in nm or µm.

    >>> area_text((1000, 1400), 2.5)
    '250 × 350 nm'
    """
    edges = [length * pixel_size_angstrom for length in shape]
    unit, name = (1e4, "µm") if max(edges) >= 1e4 else (10.0, "nm")
    return f"{edges[0] / unit:.3g} × {edges[1] / unit:.3g} {name}"


def nbytes_text(nbytes: float) -> str:
    """Format a size in the largest decimal unit in which it is 1 or more.

    >>> nbytes_text(999), nbytes_text(2.5e9)
    ('999 B', '2.5 GB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}" if unit != "B" else f"{nbytes:.0f} B"
        nbytes /= 1000
    return f"{nbytes:.4g} TB"


def seconds_text(seconds: float, *, is_rough: bool = False) -> str:
    """Format a duration: two digits below 10 s, then whole seconds, minutes, hours.

    A rough one, such as an estimate, has a single unit, from seconds to days.

    >>> seconds_text(2.27), seconds_text(61), seconds_text(7265)
    ('2.3 s', '1 min 01 s', '2 h 01 min')
    >>> [seconds_text(s, is_rough=True) for s in (2.27, 119, 2425, 90_000, 900_000)]
    ['2 s', '2 min', '40 min', '25 h', '10 days']
    """
    if is_rough:
        units = (("days", 86400, 2), ("h", 3600, 2), ("min", 60, 1.5), ("s", 1, 0))
        name, size = next((n, size) for n, size, least in units if seconds >= least * size)
        return f"{seconds / size:.0f} {name}"
    if seconds < 9.95:
        return f"{seconds:.2g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if not hours:
        return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
    return f"{hours} h {minutes:02d} min"


_DURATION = re.compile(r"([\d.]+) *(s|min|h|d)?")
_SECONDS = {"": 1, "s": 1, "min": 60, "h": 3600, "d": 86400}


def parse_seconds(duration: str | float) -> float:
    """Parse a duration: seconds, or a text with a unit.

    >>> parse_seconds("10min"), parse_seconds("1.5 h"), parse_seconds(30)
    (600.0, 5400.0, 30.0)
    """
    match = _DURATION.fullmatch(str(duration).strip())
    try:
        assert match is not None
        seconds = float(match[1]) * _SECONDS[match[2] or ""]
        assert isfinite(seconds)
    except (AssertionError, ValueError):
        raise ValueError(
            f"expected a duration such as '10min', '90s' or seconds, got {duration!r}"
        ) from None
    return seconds


def exposure_prefix(exposure: str) -> str:
    """Begin a message about an exposure; nothing for a search without exposures, whose id is empty.

    >>> exposure_prefix("00"), exposure_prefix("")
    ("exposure '00': ", '')
    """
    return f"exposure {exposure!r}: " if exposure else ""


def partial_text(exposure: str, name: str) -> str:
    """Name a partial together with its exposure, if any.

    >>> partial_text("00", "gpu1"), partial_text("", "gpu1")
    ('00/gpu1', 'gpu1')
    """
    return f"{exposure}/{name}" if exposure else name
