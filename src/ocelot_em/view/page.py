"""Figures of a page, as inline SVG."""

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True)
class Drawing:
    """A figure as an SVG element, and its maximum width on the page."""

    svg: str
    max_width_px: int

    @classmethod
    def of(
        cls,
        name: str,
        size_inches: tuple[float, float],
        *plots: Callable[[Any], object],
        **grid: Any,
    ) -> "Drawing":
        """Draw each plot into its axes of a figure with a unique name, in the page's text colour.

        ``grid`` is that of the axes; axes with a common y have labels on the left only.
        """
        figure = new_figure(size_inches)
        from matplotlib import rc_context

        with rc_context(_STYLE | {"svg.hashsalt": name}):
            panels = figure.subplots(squeeze=False, **grid).ravel()
            for ax in panels[len(plots) :]:
                ax.set_axis_off()
            for ax, plot in zip(panels, plots, strict=False):
                plot(ax)
                if grid.get("sharey"):
                    ax.label_outer()
            for ax in figure.axes:
                if ax.images:
                    ax.grid(visible=False)
            return cls(inline_svg(figure, name), round(110 * size_inches[0]))


def inline_svg(figure: Any, name: str) -> str:
    """Return a figure as an SVG element: ids prefixed with ``name``, no local fonts."""
    written = io.StringIO()
    metadata = dict.fromkeys(("Format", "Type", "Creator", "Date"))
    figure.savefig(written, format="svg", dpi=120, metadata=metadata)
    svg = written.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", svg)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", svg)
    return svg.replace(_INK, "currentColor")
