"""Figures of a page, as inline SVG."""

import gc
import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ocelot_em.view.figures import new_figure

INK = "#0a0b0c"
"""Placeholder for the page's text colour, light or dark."""

_EM_INCHES = 10 / 72
_STYLE = {
    "svg.fonttype": "none",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titley": 1.0,
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
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK
    ),
    "grid.color": INK,
    "patch.edgecolor": INK,
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
        from matplotlib import rc_context

        with rc_context(_STYLE | {"svg.hashsalt": name}):
            figure = new_figure(size_inches, layout="none")
            panels = figure.subplots(squeeze=False, **grid)
            for ax in panels.flat[len(plots) :]:
                ax.set_axis_off()
            for ax, plot in zip(panels.flat, plots, strict=False):
                plot(ax)
                if grid.get("sharey"):
                    ax.label_outer()
            for ax in figure.axes:
                if ax.images:
                    ax.grid(visible=False)
            _make_room(figure, panels)
            return cls(inline_svg(figure, name), round(110 * size_inches[0]))


@contextmanager
def collector_paused() -> Iterator[None]:
    """Collect no cycles meanwhile: figures are full of live ones, and are searched for dead ones.

    That would take a tenth of the time of a report.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _make_room(figure: Any, panels: Any) -> None:
    """Place the panels with room for their labels and titles, from estimated widths.

    Browsers set text in a font of their own, which the layouts of matplotlib do not know either;
    they take longer than the drawing.
    """
    width, height = figure.get_size_inches() / _EM_INCHES
    bars = [ax for ax in figure.axes if ax not in panels.ravel()]
    ticks = {ax: _tick_label_width(ax) for ax in figure.axes}
    beside = {ax: ticks[ax] + 1.7 * _is_labelled(ax.yaxis) for ax in figure.axes}
    ring = 2.0 if panels[0, 0].name == "polar" else 0.0  # of labels around it
    first, *others = (max(beside[ax] for ax in column) for column in panels.T)
    left, inner = first, max(others, default=0.0)
    right = ring + max((beside[ax] for ax in bars), default=1.5)
    bottom = ring + (3.4 if any(ax.get_xlabel() for ax in panels.flat) else 1.9)
    titles = [ax.get_title(loc) for ax in panels.flat for loc in ("left", "center")]
    top = ring + (2.2 if any(titles) else 0.6)
    rows, columns = panels.shape
    across = (width - left - right - (columns - 1) * (inner + right)) / columns
    tall = (height - rows * (bottom + top)) / rows
    figure.subplots_adjust(
        left=left / width,
        right=1 - right / width,
        bottom=bottom / height,
        top=1 - top / height,
        wspace=(inner + right) / across,
        hspace=(bottom + top) / tall,
    )
    for ax, ticks_width in ticks.items():
        # Otherwise, matplotlib measures all text once more to place them.
        _place_label(ax.xaxis, (0.5, 0), (0, -2.1))
        side = 1 if ax in bars else 0
        _place_label(ax.yaxis, (side, 0.5), ((2 * side - 1) * (ticks_width + 0.3), 0))


def _place_label(axis: Any, at: tuple[float, float], offset_em: tuple[float, float]) -> None:
    """Place an axis label at a point of its axes plus an offset."""
    from matplotlib.transforms import ScaledTranslation

    x, y = (_EM_INCHES * offset for offset in offset_em)
    offset = ScaledTranslation(x, y, axis.figure.dpi_scale_trans)
    axis.set_label_coords(*at, transform=axis.axes.transAxes + offset)


def _tick_label_width(ax: Any) -> float:
    """Return the width of ticks and their labels on the left in em."""
    if ax.name == "polar":
        return 2.5
    ticks = [text for text in ax.get_yticklabels() if text.get_visible()]
    return 0.8 + 0.62 * max((len(text.get_text()) for text in ticks), default=0)


def _is_labelled(axis: Any) -> bool:
    label = axis.get_label()
    return bool(label.get_text()) and bool(label.get_visible())


def inline_svg(figure: Any, name: str) -> str:
    """Return a figure as an SVG element: ids prefixed with ``name``, no local fonts."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    written = io.StringIO()
    metadata = dict.fromkeys(("Format", "Type", "Creator", "Date"))
    figure.dpi = 120  # of its rasterized parts
    FigureCanvasSVG(figure).print_svg(written, metadata=metadata)
    svg = written.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", svg)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", svg)
    return svg.replace(INK, "currentColor")
