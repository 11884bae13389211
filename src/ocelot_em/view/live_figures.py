"""Figures and the table of the interactive part of a report, as models of bokeh.

Each takes particles: a source of them, and a view of those that are shown.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ocelot_em.merge.stats.summary import Summary
from ocelot_em.model.histograms import JOINT_MIP_AXIS, JOINT_Z_AXIS
from ocelot_em.model.maps import MIP, SCALED_MIP, SECOND_ZSCORE, AnyArray, Float32
from ocelot_em.particles.estimates import noise_above
from ocelot_em.particles.table import (
    ALSO_SEEN,
    DIFFERENCE,
    EXPOSURE,
    GROUP,
    NEG_LOG_P,
    PRECISION,
    RANK,
    RECALL,
)
from ocelot_em.store.attributes import MergedAttributes
from ocelot_em.view import figures, statistics_plots
from ocelot_em.view.page import INK

if TYPE_CHECKING:
    from bokeh.models import CDSView, ColumnDataSource, DataTable, Plot

PARTIAL, MAP_X, MAP_Y = "partial", "map_x", "map_y"
"""Columns of the page's particles beside those of their table."""

LISTED: Mapping[str, tuple[str, str]] = {
    RANK: ("rank", "0"),
    EXPOSURE: ("exposure", ""),
    GROUP: ("group", ""),
    "pos_y": ("y", "0"),
    "pos_x": ("x", "0"),
    "canvas_y": ("canvas y", "0"),
    "canvas_x": ("canvas x", "0"),
    MIP: ("mip", "0.000"),
    SCALED_MIP: ("z-score", "0.000"),
    SECOND_ZSCORE: ("second z", "0.000"),
    DIFFERENCE: ("difference", "0.000"),
    NEG_LOG_P: ("-ln p", "0.00"),
    PRECISION: ("precision", "0.00"),
    RECALL: ("recall", "0.00"),
    "phi": ("φ (°)", "0.0"),
    "theta": ("θ (°)", "0.0"),
    "psi": ("ψ (°)", "0.0"),
    "relative_defocus": ("defocus (Å)", "0"),
    PARTIAL: ("partial", ""),
    ALSO_SEEN: ("also seen in", ""),
}
"""Columns of the table: titles, and formats of numbers."""


@dataclass(frozen=True)
class Shown:
    """The particles of a page: their source, a view of those that are shown, and their columns."""

    source: "ColumnDataSource"
    view: "CDSView"
    listed: Mapping[str, tuple[str, str]]


@dataclass(frozen=True)
class Rings:
    """Circles, or other marks, of a fixed size on the screen.

    Columns for x and y; a colour and a marker, or ``{"field": column}``.
    """

    x: str
    y: str
    colour: Any
    size: int = 13
    marker: Any = "circle"


_MAGMA = 254
_TABLE_STYLE = """
:host { color: var(--ink); font: 13px/1.5 system-ui, sans-serif; }
.slick-header-columns, .slick-header-column, .slick-row, .slick-cell, .slick-viewport {
  background: var(--card) !important; color: var(--ink) !important;
  border-color: var(--line) !important; }
.slick-cell { font-variant-numeric: tabular-nums; white-space: nowrap; }
.slick-cell.selected { background: var(--accent) !important; color: var(--card) !important; }
"""


def unit_of(attributes: MergedAttributes) -> tuple[str, float]:
    """Return the unit of the map's axes, and the edge of a pixel in it."""
    size = attributes.pixel_size_angstrom
    return ("nm", size / 10) if size else ("pixels", 1.0)


def zscore_map(
    overview: tuple[Float32, int],
    attributes: MergedAttributes,
    shown: Shown,
    excluded: AnyArray | None = None,
    rings: Rings = Rings(MAP_X, MAP_Y, figures.CYAN),
) -> "Plot":
    """Return the map of z-scores with particles, in nm, or pixels if their size is unknown.

    ``excluded`` are the pixels of the overview that are shaded.
    """
    from bokeh import models

    z, factor = overview
    unit, scale = unit_of(attributes)
    across, down = (length * factor * scale for length in (z.shape[1], z.shape[0]))
    known = z[np.isfinite(z)]
    low, high = np.percentile(known, (50, 99.99)).tolist() if known.size else (0.0, 1.0)
    high = max(high, low + 1)
    # 0: not searched.
    shades = np.nan_to_num((z - low) / (high - low) * _MAGMA, nan=-np.inf, posinf=_MAGMA)
    bytes_ = np.where(np.isfinite(z), np.clip(shades, 0, _MAGMA) + 1, 0).astype(np.uint8)
    plot = empty_plot(
        f"x ({unit})",
        f"y ({unit})",
        x_range=models.DataRange1d(range_padding=0, default_span=1),
        y_range=models.DataRange1d(range_padding=0, default_span=1, flipped=True),
        match_aspect=True,
        aspect_ratio=float(np.clip(across / down, 0.7, 3.0)) * 0.95,
        background_fill_color="#80808040",
        name="map",
    )
    colours = models.LinearColorMapper(palette=["#80808040", *_magma()], low=0, high=_MAGMA + 1)
    image = plot.add_glyph(
        models.ColumnDataSource({"image": [bytes_]}),
        models.Image(image="image", x=0, y=0, dw=across, dh=down, color_mapper=colours),
    )
    plot.x_range.renderers = plot.y_range.renderers = [image]
    if excluded is not None:
        shade = models.LinearColorMapper(palette=["#00000000", "#808080c0"], low=0, high=1)
        plot.add_glyph(
            models.ColumnDataSource({"image": [excluded.astype(np.uint8)]}, name="excluded"),
            models.Image(image="image", x=0, y=0, dw=across, dh=down, color_mapper=shade),
        )
    if attributes.is_montage:
        bounds = np.array([exposure.on_canvas.bounds for exposure in attributes.exposures]) * scale
        edges = dict(zip(("top", "bottom", "left", "right"), bounds.T, strict=True))
        look: Any = {"fill_color": None, "line_color": "white", "line_alpha": 0.75}
        plot.add_glyph(
            models.ColumnDataSource(edges), models.Quad(**{edge: edge for edge in edges}, **look)
        )
    plot.add_tools(hover(shown, add_rings(plot, shown, rings)))
    look = {"background_fill_color": None, "width": 12, "padding": 4}
    look["major_label_text_color"] = INK
    bar = models.LinearColorMapper(palette=_magma(), low=low, high=high)
    plot.add_layout(models.ColorBar(color_mapper=bar, **look), "right")
    plot.add_layout(_scale_bar(plot, unit))
    return plot


def survival(summary: Summary, cutoff: float | None) -> "Plot":
    """Return the numbers of pixels above z-scores, with a line at the cutoff."""
    from bokeh import models

    z, pixels = statistics_plots.survival_curve(summary)
    right = max(z.max(initial=0.0), min(cutoff or 0.0, 2 * z.max(initial=1.0))) + 0.5
    levels = np.linspace(z.min(initial=right - 0.5) - 0.25, right, 200)
    noise = noise_above(levels, summary.attributes)
    plot = empty_plot(
        "z-score",
        "pixels",
        x_range=models.Range1d(levels[0], right),
        y_range=models.Range1d(0.5, 2 * max(summary.attributes.valid_pixels, 1)),
        y_scale=models.LogScale(),
        aspect_ratio=0.95,
        name="survival",
    )
    curve = plot.add_glyph(
        models.ColumnDataSource({"z": z, "pixels": pixels}),
        models.Step(x="z", y="pixels", mode="after", line_color=figures.BLUE, line_width=2),
    )
    expected = plot.add_glyph(
        models.ColumnDataSource({"z": levels, "pixels": noise}),
        models.Line(x="z", y="pixels", line_color=INK, line_alpha=0.65, line_dash="dashed"),
    )
    names = {"this search": curve, "Gaussian noise": expected}
    items = [models.LegendItem(label=name, renderers=[own]) for name, own in names.items()]
    plot.add_layout(legend(items))
    if cutoff is not None:
        look: Any = {"line_color": figures.RED, "line_width": 2}
        plot.add_layout(
            models.Span(location=cutoff, dimension="height", name="cutoff-line", **look)
        )
    return plot


def joint(summary: Summary, shown: Shown, contour: Sequence[Mapping[str, Any]]) -> "Plot":
    """Return the joint density of ``mip`` and z-score, with particles and the cutoff's contour."""
    from bokeh import models

    counts = summary.histograms.joint
    used = [np.flatnonzero(counts.any(axis=axis)) for axis in (1, 0)]
    plot = empty_plot(
        "mip",
        "z-score",
        x_range=models.DataRange1d(default_span=1),
        y_range=models.DataRange1d(default_span=1),
        aspect_ratio=1.4,
        name="joint",
    )
    if all(own.size for own in used):
        (y0, y1), (x0, x1) = ((int(own[0]), int(own[-1]) + 1) for own in used)
        (left, right), (low, high) = JOINT_MIP_AXIS.edges[[y0, y1]], JOINT_Z_AXIS.edges[[x0, x1]]
        shares = np.log1p(counts[y0:y1, x0:x1].T) / np.log1p(counts.max())
        bytes_ = np.ceil(255 * shares).astype(np.uint8)
        colours = models.LinearColorMapper(palette=["#00000000", *_viridis()], low=0, high=255)
        place = {"x": left, "y": low, "dw": right - left, "dh": high - low}
        plot.add_glyph(
            models.ColumnDataSource({"image": [bytes_]}),
            models.Image(image="image", color_mapper=colours, **place),
        )
    for lines in contour:
        dashes: Any = {"line_color": figures.RED, "line_dash": "dashed", "line_width": 1.5}
        plot.add_glyph(
            models.ColumnDataSource(dict(lines), name="contour"),
            models.MultiLine(xs="x", ys="y", **dashes),
        )
    rings = add_rings(plot, shown, Rings(MIP, SCALED_MIP, figures.RED, 9))
    plot.add_tools(hover(shown, rings))
    return plot


def table(shown: Shown) -> "DataTable":
    """Return the sortable table of particles."""
    from bokeh import models

    columns = []
    for name, (title, form) in shown.listed.items():
        if name not in shown.source.data:
            continue
        align: Any = {"text_align": "right"} if form else {}
        kind = models.NumberFormatter if form else models.StringFormatter
        width = 130 if not form else 52 if name == RANK else max(86, 8 * len(title))
        look: Any = {"format": form, "nan_format": "—", **align} if form else {}
        columns.append(
            models.TableColumn(field=name, title=title, formatter=kind(**look), width=width)
        )
    return models.DataTable(
        source=shown.source,
        view=shown.view,
        columns=columns,
        index_position=None,
        autosize_mode="none",
        sizing_mode="stretch_width",
        height=380,
        row_height=27,
        stylesheets=[_TABLE_STYLE],
        name="table",
    )


def empty_plot(x: str, y: str, **options: Any) -> "Plot":
    """Return an empty plot with axes, grid and tools."""
    from bokeh import models

    look: Any = {
        "axis_line_color": INK,
        "major_tick_line_color": INK,
        "minor_tick_line_color": None,
    }
    look |= {"major_label_text_color": INK, "axis_label_text_color": INK}
    look |= {"axis_label_text_font_style": "normal", "axis_label_text_font_size": "13px"}
    plot = models.Plot(
        sizing_mode="stretch_width",
        border_fill_color=None,
        outline_line_color=None,
        min_border=4,
        **{"background_fill_color": None} | options,
    )
    is_log = isinstance(plot.y_scale, models.LogScale)
    down = (
        models.LogAxis(axis_label=y, **look) if is_log else models.LinearAxis(axis_label=y, **look)
    )
    plot.add_layout(models.LinearAxis(axis_label=x, **look), "below")
    plot.add_layout(down, "left")
    for number, axis in enumerate((plot.below[0], down)):
        plot.add_layout(
            models.Grid(dimension=number, axis=axis, grid_line_color=INK, grid_line_alpha=0.1)
        )
    pan, wheel = models.PanTool(), models.WheelZoomTool(modifiers="ctrl")
    tools = [pan, wheel, models.BoxZoomTool(match_aspect=plot.match_aspect), models.ZoomInTool()]
    tools += [models.ZoomOutTool(), models.TapTool(), models.BoxSelectTool(), models.ResetTool()]
    plot.toolbar = models.Toolbar(tools=tools, active_drag=pan, active_scroll=wheel, logo=None)
    plot.toolbar_location = "above"
    return plot


def add_rings(plot: "Plot", shown: Shown, rings: Rings) -> Any:
    """Add circles or other marks; those selected are filled."""
    from bokeh import models

    ring: Any = {
        "x": rings.x,
        "y": rings.y,
        "size": rings.size,
        "marker": rings.marker,
        "line_color": rings.colour,
        "line_width": 1.6,
    }
    usual = models.Scatter(**ring, fill_color=rings.colour, fill_alpha=0.0)
    chosen = models.Scatter(**ring, fill_color=rings.colour, fill_alpha=0.7)
    look: Any = {"selection_glyph": chosen, "nonselection_glyph": usual}
    return plot.add_glyph(shown.source, usual, view=shown.view, **look)


def hover(shown: Shown, renderer: Any) -> Any:
    """Return what is shown of the particle at the pointer."""
    from bokeh import models

    tips = [
        (title, f"@{name}{{{form}}}" if form else f"@{name}")
        for name, (title, form) in shown.listed.items()
        if name in shown.source.data
    ]
    return models.HoverTool(renderers=[renderer], tooltips=tips, point_policy="snap_to_data")


def _scale_bar(plot: "Plot", unit: str) -> Any:
    from bokeh import models

    look: Any = {"background_fill_color": "black", "background_fill_alpha": 0.55}
    look |= {"bar_line_color": "white", "label_text_color": "white", "border_line_color": None}
    look |= {"label_text_font_size": "13px", "location": "bottom_left", "bar_line_width": 3}
    look |= {"range": plot.x_range, "bar_length": 0.2, "length_sizing": "adaptive"}
    metric = models.Metric(base_unit="m")
    if unit != "nm":
        unit, ticks = "px", [k * 10**power for power in range(6) for k in (1, 2, 5)]
        metric = models.Metric(base_unit=unit, include=[unit], ticks=ticks)
    return models.ScaleBar(unit=unit, dimensional=metric, **look)


def legend(items: Any) -> Any:
    """Return a legend in the page's colours."""
    from bokeh import models

    look: Any = {"background_fill_color": None, "border_line_color": None, "label_text_color": INK}
    return models.Legend(items=items, **look)


def _magma() -> list[str]:
    from bokeh.palettes import Magma256

    return list(Magma256[: _MAGMA + 1])


def _viridis() -> list[str]:
    from bokeh.palettes import Viridis256

    return list(Viridis256[1:])
