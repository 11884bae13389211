"""Figures of a report as inline SVG."""

import io
import re
from collections.abc import Callable
from typing import Any

from ocelot_em.model.markup import (
    Markup,
)
from ocelot_em.view.figures import new_figure

_INK = "#0a0b0c"  # placeholder for the page's text colour, light or dark
_STYLE = {
    "svg.fonttype": "none",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.14,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK
    ),
    "grid.color": _INK,
    "patch.edgecolor": _INK,
}


def drawing(
    name: str, size_inches: tuple[float, float], draw: Callable[[Any], object], label: str
) -> Markup:
    """Draw a figure in the text colour of the page."""
    figure = new_figure(size_inches)
    from matplotlib import rc_context

    with rc_context(_STYLE | {"svg.hashsalt": name}):
        draw(figure)
        for ax in figure.axes:
            if ax.images:
                ax.grid(visible=False)
        written = io.StringIO()
        figure.savefig(
            written,
            format="svg",
            dpi=120,
            metadata=dict.fromkeys(("Format", "Type", "Creator", "Date")),
        )
    return _inline(written.getvalue(), name, label, round(110 * size_inches[0]))


def _inline(svg: str, name: str, label: str, max_width_px: int) -> Markup:
    """Make an SVG file part of a page: ids prefixed with ``name``, no local fonts."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", svg)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", svg)
    svg = svg.replace(_INK, "currentColor")
    opening = f'<svg role="img" aria-label="{label}" style="max-width: {max_width_px}px"'
    return Markup(svg.replace("<svg", opening, 1))
