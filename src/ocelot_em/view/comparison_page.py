"""The page of two searches side by side: one HTML file that needs no network."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ocelot_em.errors import optional_import
from ocelot_em.merge.result import MergedResult
from ocelot_em.model.html import render
from ocelot_em.model.maps import AnyArray, Float32, Float64
from ocelot_em.model.text import number_text
from ocelot_em.particles.comparison import BOTH, ONLY_A, ONLY_B, ComparedSearch, Comparison
from ocelot_em.particles.table import GROUP, MICROGRAPH
from ocelot_em.store.whole_file import refuse_existing, write_file
from ocelot_em.view import figures, live_figures, plots
from ocelot_em.view.index import short_names
from ocelot_em.view.instrument import MAP_PX, MAX_PARTICLES
from ocelot_em.view.live_page import LivePage
from ocelot_em.view.page import INK, Drawing, collector_paused

if TYPE_CHECKING:
    from bokeh.models import Plot

_GREEN = "#57c84d"


@dataclass(frozen=True)
class Kind:
    """How particles found in both searches, or only in one, are named and marked."""

    name: str
    colour: str
    marker: str
    drawn: str
    """Marker of matplotlib."""


KINDS: Mapping[str, Kind] = {
    BOTH: Kind("both", figures.CYAN, "circle", "o"),
    ONLY_A: Kind("only A", figures.ORANGE, "square", "s"),
    ONLY_B: Kind("only B", _GREEN, "diamond", "D"),
}

_LISTED: Mapping[str, tuple[str, str]] = {
    "rank": ("rank", "0"),
    MICROGRAPH: ("micrograph", ""),
    "found_in": ("found in", ""),
    f"{GROUP}_a": ("group in A", ""),
    f"{GROUP}_b": ("group in B", ""),
    "zscore_a": ("z in A", "0.000"),
    "zscore_b": ("z in B", "0.000"),
    "zscore_difference": ("z, B - A", "0.000"),
    "y_a": ("y in A", "0.0"),
    "x_a": ("x in A", "0.0"),
    "y_b": ("y in B", "0.0"),
    "x_b": ("x in B", "0.0"),
    "distance_px": ("distance (px)", "0.0"),
    "angle_difference": ("angle (°)", "0.0"),
    "defocus_difference": ("defocus, B - A (Å)", "0"),
}
"""Columns of the page's table: titles, and formats of numbers. The micrograph is only listed if
there are several, and a group if the search has any."""

_ROWS = 40
"""Maximum number of printed rows."""

_N_BARS = 36


def write_comparison(
    comparison: Comparison, path: str | PathLike[str], *, overwrite: bool = True
) -> Path:
    """Write an HTML page with two searches side by side; return its path.

    It has the numbers of particles of both and of one, the z-scores of one search against those of
    the other, the differences of the orientations, both maps with the particles marked, and a table
    to sort, filter and download. The file refers to no other.

    Parameters
    ----------
    comparison
        What :func:`ocelot_em.compare` returns. Maps are drawn of the merged results in it.
    path
        The file to write.
    overwrite
        Replace an existing file.

    Raises
    ------
    MissingDependencyError
        matplotlib or bokeh is not installed.
    OutputExistsError
        The file exists, and ``overwrite`` is False.
    ChunkError, StorageError
        A map cannot be read, or the page cannot be written.

    Examples
    --------
    >>> from ocelot_em import compare, find_peaks, write_comparison
    >>> both = compare("MERGED.zarr", find_peaks("MERGED.zarr", cutoff=10))
    >>> write_comparison(both, "comparison.html").name
    'comparison.html'
    """
    refuse_existing([Path(path)], overwrite)
    return write_file(path, comparison_page(comparison).encode())


@collector_paused()
def comparison_page(comparison: Comparison) -> str:
    """Return the page that :func:`write_comparison` writes."""
    searches = {"A": comparison.a, "B": comparison.b}
    names = short_names([own.name for own in searches.values()])
    if len({*names}) == 1:
        names = [own.name for own in searches.values()]
    maps = {
        side: plots.pooled_zscore(own.merged, MAP_PX)
        for side, own in searches.items()
        if own.merged is not None
    }
    columns = comparison.columns
    both = columns["found_in"] == BOTH
    angles = columns["angle_difference"][np.isfinite(columns["angle_difference"])]
    return render(
        "view/templates/comparison.html.j2",
        comparison=comparison,
        names=dict(zip(searches, names, strict=True)),
        searches=searches,
        counts=comparison.counts,
        incomplete=[
            (side, own.particles.incomplete_text)
            for side, own in searches.items()
            if own.particles.incomplete_text
        ],
        kinds=KINDS,
        medians={
            name: _median(columns[name][both])
            for name in ("zscore_difference", "angle_difference", "distance_px")
        },
        n_angles=len(angles),
        maps={side: factor for side, (_, factor) in maps.items()},
        drawings={
            "zscores": Drawing.of("zscores", (5.4, 4.6), partial(_draw_zscores, comparison)),
            "angles": Drawing.of("angles", (5.4, 4.6), partial(_draw_angles, angles)),
            **{side: _drawn_map(comparison, side, maps[side]) for side in maps},
        },
        live=_live(comparison, maps, angles),
        titles=[title for title, _ in _listed(comparison).values()],
        rows=_rows(comparison),
    )


def _listed(comparison: Comparison) -> Mapping[str, tuple[str, str]]:
    known = {*comparison.columns}
    if len(np.unique(comparison.columns[MICROGRAPH])) <= 1:
        known.discard(MICROGRAPH)
    return {name: look for name, look in _LISTED.items() if name in known}


def _median(values: AnyArray) -> float | None:
    known = values[np.isfinite(values)]
    return float(np.median(known)) if known.size else None


def _rows(comparison: Comparison) -> list[list[str]]:
    """Return the highest particles as text, for paper."""
    found, listed = [], _listed(comparison)
    for row in comparison[:_ROWS]:
        row |= {"found_in": KINDS[row["found_in"]].name}
        found.append(
            [
                number_text(row[name], f".{len(form.partition('.')[2])}f") if form else row[name]
                for name, (_, form) in listed.items()
            ]
        )
    return found


def _draw_zscores(comparison: Comparison, ax: Any) -> None:
    z_a, z_b = comparison.columns["zscore_a"], comparison.columns["zscore_b"]
    for kind, own in _by_kind(comparison):
        look: Any = {"marker": own.drawn, "facecolors": "none", "edgecolors": own.colour, "s": 22}
        ax.scatter(z_a[kind], z_b[kind], label=own.name, **look)
    ends = _ends(z_a, z_b)
    ax.plot(ends, ends, "--", color=figures.foreground(), alpha=0.5)
    for cutoff, line in ((comparison.a.cutoff, ax.axvline), (comparison.b.cutoff, ax.axhline)):
        if cutoff is not None:
            line(cutoff, color=figures.RED, linewidth=1.2)
    ax.set(title="z-scores", xlabel="z-score in A", ylabel="z-score in B")
    ax.legend()


def _by_kind(comparison: Comparison) -> list[tuple[AnyArray, Kind]]:
    return [(comparison.columns["found_in"] == name, kind) for name, kind in KINDS.items()]


def _ends(z_a: Float32, z_b: Float32) -> list[float]:
    """Return the lowest and the highest z-score of both."""
    known = np.concatenate([z_a, z_b])
    known = known[np.isfinite(known)]
    return [float(known.min(initial=1e9)), float(known.max(initial=0))] if known.size else [0, 1]


def _bars(angles: Float64) -> tuple[AnyArray, AnyArray]:
    """Return the histogram of angles: counts and edges in degrees."""
    return np.histogram(angles, _N_BARS, (0.0, max(float(angles.max(initial=0)) * 1.001, 1.0)))


def _draw_angles(angles: Float64, ax: Any) -> None:
    ax.stairs(*_bars(angles), fill=True, color=figures.BLUE)
    ax.set(title="orientations", xlabel="rotation between both (°)", ylabel="particles")
    ax.locator_params(axis="y", integer=True)


def _drawn_map(comparison: Comparison, side: str, overview: tuple[Float32, int]) -> Drawing:
    y, x = comparison.places_on(side).T + 0.5
    coarse = plots.pooled_further(*overview, figures.PAGE_OVERVIEW_PX)
    height, width = coarse[0].shape

    def draw(ax: Any) -> None:
        plots.plot_zscore(coarse, ax)
        for kind, own in _by_kind(comparison):
            look: Any = {"marker": own.drawn, "facecolors": "none", "s": 30, "linewidths": 0.9}
            ax.scatter(x[kind], y[kind], edgecolors=own.colour, **look)
        ax.set_title(f"z-scores of {side}")

    tall = float(np.clip(4.6 * height / width, 1.2, 7)) + 0.8
    return Drawing.of(f"map-{side.lower()}", (5.4, tall), draw)


def _live(
    comparison: Comparison, maps: Mapping[str, tuple[Float32, int]], angles: Float64
) -> LivePage:
    with optional_import("interactive pages need bokeh", extra="viz"):
        from bokeh.models import CDSView, ColumnDataSource, IndexFilter

    table = comparison[:MAX_PARTICLES]
    kinds = [KINDS[own] for own in table.columns["found_in"].tolist()]
    columns: dict[str, AnyArray] = {
        **table.columns,
        "rank": table.columns["rank"].astype(np.int32),
        "found_in": np.array([kind.name for kind in kinds], str),
        "colour": np.array([kind.colour for kind in kinds], str),
        "marker": np.array([kind.marker for kind in kinds], str),
    }
    searches: dict[str, ComparedSearch] = {"A": table.a, "B": table.b}
    for side in maps:
        size = live_figures.unit_of(_attributes(searches[side]))[1]
        places = (table.places_on(side) + 0.5) * size
        columns |= {f"map_y_{side}": places[:, 0], f"map_x_{side}": places[:, 1]}
    source = ColumnDataSource(columns, name="particles")
    every = IndexFilter(indices=list(range(len(table))), name="shown")
    listed = _listed(comparison)
    shown = live_figures.Shown(source, CDSView(filter=every), listed)
    roots = {
        "live-zscores": _live_zscores(table, shown),
        "live-angles": _live_angles(angles),
        "live-table": live_figures.table(shown),
    }
    for side, overview in maps.items():
        rings = _rings(f"map_x_{side}", f"map_y_{side}", 13)
        about = _attributes(searches[side])
        roots[f"live-map-{side}"] = live_figures.zscore_map(overview, about, shown, None, rings)
    if len(maps) == 2:
        _move_together(roots["live-map-A"], roots["live-map-B"], searches)
    content = {
        "columns": [*table.columns],
        "titles": {name: title for name, (title, _) in listed.items()},
    }
    return LivePage.of(roots, content, "comparison.js")


def _attributes(search: ComparedSearch) -> Any:
    assert isinstance(search.merged, MergedResult)
    return search.merged.attributes


def _rings(x: str, y: str, size: int) -> live_figures.Rings:
    return live_figures.Rings(x, y, {"field": "colour"}, size, {"field": "marker"})


def _move_together(one: "Plot", other: "Plot", searches: Mapping[str, ComparedSearch]) -> None:
    """Zoom and move two maps together if they have the same pixels."""
    from bokeh.models import ScaleBar

    a, b = (_attributes(own) for own in searches.values())
    if (a.valid_shape, a.pixel_size_angstrom) == (b.valid_shape, b.pixel_size_angstrom):
        other.x_range, other.y_range = one.x_range, one.y_range
        other.select_one(ScaleBar).range = one.x_range


def _live_zscores(table: Comparison, shown: live_figures.Shown) -> "Plot":
    from bokeh import models

    low, high = _ends(table.columns["zscore_a"], table.columns["zscore_b"])
    plot = live_figures.empty_plot(
        "z-score in A",
        "z-score in B",
        x_range=models.Range1d(low - 0.3, high + 0.3),
        y_range=models.Range1d(low - 0.3, high + 0.3),
        aspect_ratio=1.15,
        name="zscores",
    )
    dashes: Any = {"line_color": INK, "line_alpha": 0.5, "line_dash": "dashed"}
    plot.add_layout(models.Slope(gradient=1, y_intercept=0, **dashes))
    for cutoff, dimension in ((table.a.cutoff, "height"), (table.b.cutoff, "width")):
        if cutoff is not None:
            look: Any = {"line_color": figures.RED, "line_width": 1.5}
            plot.add_layout(models.Span(location=cutoff, dimension=dimension, **look))
    marks = live_figures.add_rings(plot, shown, _rings("zscore_a", "zscore_b", 8))
    plot.add_tools(live_figures.hover(shown, marks))
    return plot


def _live_angles(angles: Float64) -> "Plot":
    from bokeh import models

    counts, edges = _bars(angles)
    plot = live_figures.empty_plot(
        "rotation between both (°)",
        "particles",
        x_range=models.Range1d(0, edges[-1]),
        y_range=models.Range1d(0, 1.05 * max(counts.max(), 1)),
        aspect_ratio=1.15,
        name="angles",
    )
    bars = {"left": edges[:-1], "right": edges[1:], "top": counts}
    look: Any = {"fill_color": figures.BLUE, "line_color": None}
    quads = models.Quad(left="left", right="right", top="top", bottom=0, **look)
    plot.add_glyph(models.ColumnDataSource(bars), quads)
    plot.left[0].ticker.min_interval = 1  # of particles
    return plot
