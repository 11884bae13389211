"""What all plots share: figures, axes, colours, labels."""

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np

from ocelot_em.errors import optional_import
from ocelot_em.merge.result import MergedResult
from ocelot_em.merge.stats.summary import Summary
from ocelot_em.model.histograms import Axis
from ocelot_em.model.maps import AnyArray, Float64
from ocelot_em.model.problems import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Axes  # for modules that do not import matplotlib

Store = str | PathLike[str] | MergedResult
"""Path or URL of a merged result, or an open one."""

BLUE, ORANGE, RED, CYAN = "#3f8fd2", "#e08214", "#d9434e", "#35c4d7"
"""Colours that are visible on white and on black."""

OVERVIEW_PX = 400
"""Longest edge of an overview; with more pixels than axes have, drawing averages peaks away."""

PAGE_OVERVIEW_PX = 640
"""Longest edge of the overview on a page, where axes are larger."""

MAX_NAMED_ROWS = 48
"""Maximum number of plot rows with room for names."""

MAX_VECTOR_MARKERS = 400  # more are rasterized: they would slow down a page

_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def new_figure(
    size_inches: tuple[float, float] | None = None,
    *,
    in_pyplot: bool = False,
    layout: str = "constrained",
) -> Any:
    """Make a figure without a window, or one that pyplot shows."""
    with optional_import("plots need matplotlib", extra="viz"):
        if in_pyplot:
            from matplotlib.pyplot import figure
        else:
            from matplotlib.figure import Figure as figure  # noqa: N813
    return figure(figsize=size_inches, layout=layout)


def axes_or_new(ax: "Axes | None", **options: str) -> Any:
    """Return the given axes, or those of a new figure."""
    if ax is None:
        return new_figure(in_pyplot=True).add_subplot(**options)
    from matplotlib.axes import Axes

    return require(ax, Axes, "ax: expected axes of matplotlib")


def summary_of(store: Store | Summary) -> Summary:
    """Return the given summary, or that of a merged result."""
    return store if isinstance(store, Summary) else MergedResult.open(store).summary


def coarse(counts: AnyArray, axis: Axis, together: int) -> tuple[Float64, AnyArray]:
    """Return edges and counts with ``together`` bins merged into one; it divides their number."""
    return axis.edges[::together], counts.reshape(-1, together).sum(axis=1)


def has_names(n_rows: int) -> bool:
    """Whether a plot has room for the names of its rows."""
    return n_rows <= MAX_NAMED_ROWS


def rows_height(n_rows: int) -> float:
    """Return the height of a plot with rows, in inches."""
    return min(max(0.34 * n_rows + 1.3, 2.0), 12.0) if has_names(n_rows) else 4.6


def name_rows(ax: "Axes", names: Sequence[str], what: str, *, above: float = 0.6) -> None:
    """Label the rows, the first on top; with numbers of ``what`` if there are too many names.

    ``above`` is the room above the first row, in rows.
    """
    if has_names(len(names)):
        # Names are text, not formulas.
        short = [name if len(name) <= 24 else f"{name[:12]}…{name[-11:]}" for name in names]
        ax.set_yticks(range(len(names)), labels=short, parse_math=False)
    else:
        ax.set_ylabel(f"{what} number")
    ax.set_ylim(max(len(names), 1) - 0.4, -above)


def circle(ax: "Axes", x: AnyArray, y: AnyArray, colour: str, label: str, *, size: float) -> None:
    """Mark points with circles, with small ones if there are many."""
    many = len(x) > MAX_VECTOR_MARKERS
    look: Any = {"facecolors": "none", "edgecolors": colour, "label": label, "rasterized": many}
    ax.scatter(x, y, s=size / 7 if many else size, linewidths=0.45 if many else 1.1, **look)


def foreground() -> Any:
    """Return the colour of text."""
    from matplotlib import rcParams

    return rcParams["text.color"]


def draw_image(
    ax: "Axes", values: AnyArray, label: str, cmap: str, *, blank: float = 0.3, **options: Any
) -> Any:
    """Draw an image, in a grey of opacity ``blank`` where values are NaN; return its colour bar."""
    from matplotlib import colormaps

    shades = colormaps[cmap].with_extremes(bad=(0.5, 0.5, 0.5, blank))
    image = ax.imshow(values, cmap=shades, **{"interpolation": "none"} | options)
    return ax.figure.colorbar(image, ax=ax, label=label, shrink=0.8, fraction=0.06)


def name_powers(axis: Any) -> None:
    """Label the powers of ten of a logarithmic axis with plain text: formulas take long to set.

    Ticks between them would take as long as all the others.
    """
    axis.set_major_formatter(lambda value, _: f"10{f'{np.log10(value):.0f}'.translate(_RAISED)}")
    axis.minorticks_off()


def explain_empty(ax: "Axes", reason: str) -> None:
    """Write into empty axes why nothing is drawn."""
    ax.text(0.5, 0.5, reason, ha="center", va="center", transform=ax.transAxes, alpha=0.7)
