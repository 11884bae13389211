"""A map as text: two pixels to a character in colour, or one of a few shades."""

import numpy as np
from rich.color import Color
from rich.console import Console
from rich.style import Style
from rich.text import Text

from ocelot_em.model.maps import Float32

_COLOURS = np.array(
    [
        *((0, 0, 4), (28, 16, 68), (79, 18, 123), (129, 37, 129), (181, 54, 122)),
        *((229, 80, 100), (251, 135, 97), (254, 194, 135), (252, 253, 191)),
    ]
)
"""The colour map magma, from low to high."""


def map_text(pooled: Float32, console: Console, n_lines: int) -> Text:
    """Draw a map that fits the width of the console and some lines; NaN is blank.

    The median and everything below are dark, the maximum is bright.
    """
    in_colour = console.color_system in ("truecolor", "256") and not console.no_color
    height, width = pooled.shape
    n_columns = max(console.width - 1, 1)
    factor = max(width / n_columns, height / (2 * n_lines), 1)
    z = _pooled(pooled, max(int(height / factor), 1), max(int(width / factor), 1))
    known = z[np.isfinite(z)]
    low, high = (np.median(known), known.max()) if known.size else (0.0, 1.0)
    shade = np.clip((z - low) / max(high - low, 1e-6), 0, 1)
    text = Text(no_wrap=True, end="")
    for row in range(0, len(shade), 2):
        pair = shade[row : row + 2]
        text.append_text(_in_colour(pair) if in_colour else _shaded(pair, console.encoding))
        text.append("\n")
    return text


def _pooled(values: Float32, n_rows: int, n_columns: int) -> Float32:
    """Pool a map by maximum to a number of rows and columns; NaN only where all are."""
    rows, columns = (
        np.arange(n) * length // n
        for n, length in zip((n_rows, n_columns), values.shape, strict=True)
    )
    by_row = np.fmax.reduceat(values, rows, axis=0)
    pooled: Float32 = np.fmax.reduceat(by_row, columns, axis=1)
    return pooled


def _in_colour(pair: Float32) -> Text:
    """Draw one or two rows as the upper and lower halves of a line."""
    line, n = Text(), len(_COLOURS) - 1
    positions = np.linspace(0, 1, n + 1)
    upper, *rest = [
        np.stack([np.interp(row, positions, channel) for channel in _COLOURS.T], axis=1)
        for row in np.nan_to_num(pair)
    ]
    for column in range(pair.shape[1]):
        below = Color.from_rgb(*rest[0][column].round()) if rest else None
        style = Style(color=Color.from_rgb(*upper[column].round()), bgcolor=below)
        line.append("▀", style)
    return line


def _shaded(pair: Float32, encoding: str) -> Text:
    """Draw one or two rows, pooled, as characters of different weights."""
    shades = " ░▒▓█" if encoding.lower().startswith("utf") else " .:*#"
    row = np.nan_to_num(_pooled(pair, 1, pair.shape[1])[0])
    return Text("".join(shades[round(value * (len(shades) - 1))] for value in row.tolist()))


def strip_text(ranges: tuple[tuple[int, int], ...], n: int, width: int, encoding: str) -> str:
    """Draw which part of n numbers is in some ranges, as a strip of characters."""
    edges = np.linspace(0, n, width + 1)
    covered = np.zeros(width)
    for start, stop in ranges:
        covered += np.clip(np.minimum(stop, edges[1:]) - np.maximum(start, edges[:-1]), 0, None)
    shades = "·░▒▓█" if encoding.lower().startswith("utf") else ".:+*#"
    shares = covered / max(n / width, 1e-9)
    return "".join(shades[int(np.ceil(min(share, 1) * 4 - 1e-6))] for share in shares.tolist())
