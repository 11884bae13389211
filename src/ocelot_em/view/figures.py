"""Figures, axes, colours and labels that all plots share."""

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

from ocelot_em.errors import MissingDependencyError
from ocelot_em.merge.result import MergedResult
from ocelot_em.merge.stats.summary import Summary
from ocelot_em.model.histograms import Axis
from ocelot_em.model.maps import AnyArray, Float64

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Axes  # for modules that do not import matplotlib


Store = str | PathLike[str] | MergedResult
"""Path or URL of a merged result, or an open one."""


MAX_BARS = 48
"""Maximum number of plot rows with room for names."""

MAX_VECTOR_MARKERS = 400  # more are rasterized: they would slow down a page


def new_figure(size_inches: tuple[float, float]) -> Any:
    """Make a figure without a window.

    Raises
    ------
    MissingDependencyError
        matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "pictures need matplotlib: pip install 'ocelot-em[viz]'"
        ) from error
    return Figure(figsize=size_inches, layout="constrained")


def axes_or_new(ax: "Axes | None", **options: str) -> Any:
    """Return the given axes, or those of a new figure.

    Raises
    ------
    MissingDependencyError
        matplotlib is not installed.
    """
    if ax is not None:
        return ax
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise MissingDependencyError(
            "pictures need matplotlib: pip install 'ocelot-em[viz]'"
        ) from error
    return pyplot.figure(layout="constrained").add_subplot(**options)


def summary_of(store: Store | Summary) -> Summary:
    """Return the given summary, or that of a merged result.

    Raises
    ------
    IncompleteError
        The result was merged without statistics.
    """
    return store if isinstance(store, Summary) else MergedResult.open(store).summary


def coarse(counts: AnyArray, axis: Axis, together: int) -> tuple[Float64, AnyArray]:
    """Return edges and counts with ``together`` bins merged into one; it divides their number."""
    return axis.edges[::together], counts.reshape(-1, together).sum(axis=1)


def name_rows(ax: "Axes", names: Sequence[str]) -> None:
    """Label the rows, the first on top; with numbers if there are too many for names."""
    if len(names) <= MAX_BARS:
        # Names are text, not formulas.
        short = [name if len(name) <= 24 else f"{name[:12]}…{name[-11:]}" for name in names]
        ax.set_yticks(range(len(names)), labels=short, parse_math=False)
    else:
        ax.set_ylabel("number of the partial")
    ax.set_ylim(max(len(names), 1) - 0.4, -0.6)


def short_number(value: float | None) -> float:
    """Return a number for a plot; NaN for None."""
    return float("nan") if value is None else value


def foreground() -> Any:
    """Return the colour of text."""
    from matplotlib import rcParams

    return rcParams["text.color"]


def magma() -> Any:
    """Return the colormap of maps."""
    from matplotlib import colormaps

    return colormaps["magma"].with_extremes(bad=(0.5, 0.5, 0.5, 0.35))


def say(ax: "Axes", words: str) -> None:
    """Write into empty axes why nothing is drawn."""
    ax.text(0.5, 0.5, words, ha="center", va="center", transform=ax.transAxes, alpha=0.7)
