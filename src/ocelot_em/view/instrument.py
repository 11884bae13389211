"""The interactive part of a report: z-score map, survival curve, mip and z-score, table, cutoff.

bokeh draws everything in the browser, from data in the page. All show one source of particles
through one view of it, so that a selection, the cutoff and the filter are the same everywhere.
"""

from dataclasses import dataclass
from math import ceil, log10
from typing import TYPE_CHECKING, Any

import numpy as np

from ocelot_em.errors import optional_import
from ocelot_em.model.maps import SCALED_MIP, AnyArray, Float32, Float64
from ocelot_em.particles.estimates import expected_above, with_weaker
from ocelot_em.particles.table import (
    EXPOSURE,
    GROUP,
    PRECISION,
    RANK,
    RECALL,
    ParticleTable,
)
from ocelot_em.view import figures, live_figures, plots, statistics_plots
from ocelot_em.view.live_page import LivePage

if TYPE_CHECKING:
    from ocelot_em.view.report_sections import ReportData

MAP_PX = 1280
"""Longest edge of the zoomable map."""

FULL_ROWS = 25_000
"""Maximum number of particles with all columns; with more, only those of the table."""

MAX_CONTOURS = 50
"""Maximum number of contours of -ln p, of which the nearest below the cutoff is shown."""

MAX_PARTICLES = 100_000
"""Maximum number of particles."""


@dataclass(frozen=True)
class Instrument(LivePage):
    """Scripts and data of the interactive part of a report.

    ``n_left_out`` of the lowest particles are not in the data; ``has_all_columns`` states whether
    the others have all columns.
    """

    n_left_out: int
    has_all_columns: bool


def make_instrument(data: "ReportData", overview: tuple[Float32, int]) -> Instrument:
    """Return the interactive part of a report; ``overview`` is the pooled map.

    Raises
    ------
    MissingDependencyError
        bokeh is not installed.
    """
    with optional_import("interactive reports need bokeh", extra="viz"):
        from bokeh.models import CDSView, ColumnDataSource, IndexFilter, InlineStyleSheet, Slider

    table = with_weaker(data.merged, data.particles)
    if len(table) > FULL_ROWS:
        overview = plots.pooled_further(*overview, figures.PAGE_OVERVIEW_PX)
    score = table.ranked_by
    best = np.argsort(-np.nan_to_num(table.columns[score], nan=-np.inf), kind="stable")
    n_left_out = max(len(best) - MAX_PARTICLES, 0)
    columns = _columns(data, table, best[:MAX_PARTICLES])
    heights = columns[score].astype(np.float64)
    levels, cutoff = _levels(data, heights)
    source = ColumnDataSource(columns, name="particles")
    n_shown = int((heights >= cutoff - 1e-6).sum())
    view = CDSView(filter=IndexFilter(indices=list(range(n_shown)), name="shown"))
    shown = live_figures.Shown(source, view, live_figures.LISTED)
    style = InlineStyleSheet(css=":host { color: var(--ink); font: 14px/1.5 system-ui; }")
    look: Any = {"format": "0.00", "sizing_mode": "stretch_width", "stylesheets": [style]}
    slider = Slider(
        title=f"cutoff ({live_figures.LISTED[score][0]})",
        start=levels[0],
        end=levels[-1],
        step=round(levels[1] - levels[0], 9),
        value=cutoff,
        name="cutoff",
        **look,
    )
    summary, attributes, excluded = data.summary, data.merged.attributes, None
    if data.area is not None:
        excluded = plots.pooled_excluded(data.merged, data.area, overview[1])
    contours = _contours(data, levels[:: ceil(len(levels) / MAX_CONTOURS)])
    roots = {
        "live-cutoff": slider,
        "live-map": live_figures.zscore_map(overview, attributes, shown, excluded),
        "live-survival": live_figures.survival(summary, cutoff if score == SCALED_MIP else None),
        "live-joint": live_figures.joint(summary, shown, contours[:1]),
        "live-table": live_figures.table(shown),
    }
    content = {
        "score": score,
        "columns": [name for name in table.columns if name in columns],
        "titles": {
            name: title for name, (title, _) in live_figures.LISTED.items() if name in columns
        },
        "expected": [
            float(f"{one:.4g}") for one in expected_above(data.merged, data.particles, levels)
        ],
        "contours": contours,
        "estimates": _estimates(data, levels),
    }
    live = LivePage.of(roots, content, "report.js")
    return Instrument(live.packed, live.loader, live.policy, n_left_out, len(best) <= FULL_ROWS)


def _columns(data: "ReportData", table: ParticleTable, rows: AnyArray) -> dict[str, AnyArray]:
    """Return the columns of some particles: only those that are listed, if there are many."""
    columns = {name: values[rows] for name, values in table.columns.items()}
    scale = live_figures.unit_of(data.merged.attributes)[1]
    y, x = (
        ((place[rows] + 0.5) * scale).astype(np.float32) for place in plots.map_positions(table)
    )
    ranks = columns.get(RANK, np.arange(1, len(rows) + 1))
    own = {RANK: ranks.astype(np.int32), live_figures.MAP_Y: y, live_figures.MAP_X: x}
    if len(table) <= FULL_ROWS:
        places = [columns["best_partial"].tolist()]
        places += [columns[name].tolist() for name in (GROUP, EXPOSURE) if name in columns][:1]
        names = [data.partial_name(*place) for place in zip(*places, strict=True)]
        return columns | own | {live_figures.PARTIAL: np.array(names, str)}
    return own | {
        # Digits that are not shown would only take space.
        name: np.round(values, 3) if values.dtype.kind == "f" else values
        for name, values in columns.items()
        if name in live_figures.LISTED
    }


def _levels(data: "ReportData", heights: Float64) -> tuple[Float64, float]:
    """Return evenly spaced cutoffs, and the one that the particles were picked with among them."""
    known = heights[np.isfinite(heights)]
    about = data.particles.about
    lowest = known.min(initial=np.inf)
    cutoff = about.cutoff if about is not None else lowest if known.size else 0.0
    lowest, highest = min(lowest, cutoff), max(known.max(initial=cutoff), cutoff + 0.1)
    step = 10.0 ** max(ceil(log10((highest - lowest) / 2000)), -2)
    below, above = ceil((cutoff - lowest) / step), ceil((highest - cutoff) / step)
    levels = cutoff + step * np.arange(-below, above + 1)
    return levels, float(cutoff)


def _estimates(data: "ReportData", levels: Float64) -> dict[str, list[float | None]]:
    """Return precision and recall if the cutoff is at each level; None where they are unknown."""
    if data.estimates is None:
        return {}
    curves = data.estimates_at(levels[::-1] - 1e-6)
    found = {}
    for name, values in zip((PRECISION, RECALL), curves, strict=True):
        own = values[::-1].round(3).tolist()
        found[name] = [None if value != value else value for value in own]
    return found


def _contours(data: "ReportData", levels: Float64) -> list[dict[str, Any]]:
    """Return the contours of some -ln p as columns of lines; empty if picked by z-score."""
    if data.p_values is None:
        return []
    found = statistics_plots.p_value_contours(data.p_values, data.summary, levels.tolist())
    return [{"x": [x for x, _ in lines], "y": [y for _, y in lines]} for lines in found]
