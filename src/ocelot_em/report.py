"""Pictures of merged maps; they read tile by tile and never hold a full map."""

from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np

from ocelot_em.canvas import TileGrid, ceil_div
from ocelot_em.format import DEFAULT_CHUNK
from ocelot_em.lazy import open_merged
from ocelot_em.maps import SCALED_MIP, AnyArray, Float32

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OVERVIEW_PX = 400
"""Longest edge of an overview: no more pixels than axes have, or drawing averages peaks away."""


def pooled_zscore(store: str | PathLike[str]) -> tuple[Float32, int]:
    """Return the z-score map, pooled by maximum so that peaks survive, and the pooling factor.

    Only valid pixels are looked at; blocks of pixels that nobody searched are NaN.
    """
    merged = open_merged(store)
    height, width = merged.attrs["valid_shape"]
    factor = ceil_div(max(height, width), OVERVIEW_PX)
    pooled = np.full((ceil_div(height, factor), ceil_div(width, factor)), np.nan, np.float32)
    edge = max(DEFAULT_CHUNK // factor, 1) * factor
    for tile in TileGrid((height, width), (edge, edge)):
        z = merged[SCALED_MIP][tile.region.slices].to_numpy()
        rows, columns = (ceil_div(n, factor) for n in z.shape)
        padded = np.full((rows * factor, columns * factor), np.nan, np.float32)
        padded[: z.shape[0], : z.shape[1]] = z
        blocks = padded.reshape(rows, factor, columns, factor)
        y0, x0 = tile.region.y0 // factor, tile.region.x0 // factor
        pooled[y0 : y0 + rows, x0 : x0 + columns] = np.fmax.reduce(
            np.fmax.reduce(blocks, axis=3), axis=1
        )
    return pooled, factor


def zscore_histogram(store: str | PathLike[str], edges: AnyArray) -> AnyArray:
    """Count valid pixels by z-score, tile by tile; values beyond the edges are not counted."""
    merged = open_merged(store)
    counts = np.zeros(len(edges) - 1, np.int64)
    for tile in TileGrid(merged.attrs["valid_shape"], (DEFAULT_CHUNK, DEFAULT_CHUNK)):
        counts += np.histogram(merged[SCALED_MIP][tile.region.slices].to_numpy(), edges)[0]
    return counts


def plot_zscore(store: str | PathLike[str], ax: "Axes", truth: AnyArray | None = None) -> None:
    """Draw the z-score map, pooled by maximum; planted particles, if given, in circles.

    Parameters
    ----------
    store
        A merged result.
    ax
        Axes to draw into.
    truth
        Records with fields ``y`` and ``x`` in pixels.
    """
    pooled, factor = pooled_zscore(store)
    height, width = pooled.shape[0] * factor, pooled.shape[1] * factor
    # Most of a map is noise: start the colours at its middle, so that peaks stand out.
    low, high = np.nanpercentile(pooled, (50, 99.99))
    image = ax.imshow(
        pooled, cmap="magma", vmin=low, vmax=max(high, low + 1), extent=(0, width, height, 0)
    )
    ax.figure.colorbar(image, ax=ax, label="z-score", shrink=0.8)
    if truth is not None:
        ax.scatter(
            truth["x"] + 0.5,
            truth["y"] + 0.5,
            s=90,
            facecolors="none",
            edgecolors="tab:cyan",
            linewidths=0.9,
            label="planted",
        )
        ax.legend(loc="upper right")
    ax.set(title="z-score (pooled by maximum)", xlabel="x (pixels)", ylabel="y (pixels)")


def plot_survival(store: str | PathLike[str], ax: "Axes", cutoff: float | None = None) -> None:
    """Draw how many valid pixels exceed a z-score, against what Gaussian noise would give.

    The expectation is that of the maximum of as many independent Gaussian draws per pixel as the
    search has projections; neighbouring projections are alike, so that real noise lies below it.
    """
    from statistics import NormalDist

    merged = open_merged(store)
    edges = np.linspace(0, 20, 401)
    counts = zscore_histogram(store, edges)
    above = counts[::-1].cumsum()[::-1]
    valid_pixels = int(np.prod(merged.attrs["valid_shape"]))
    tail = np.array([NormalDist().cdf(-z) for z in edges[:-1]])
    expected = valid_pixels * -np.expm1(-tail * merged.attrs["total_projections"])
    shown = slice(int(np.argmax(above < above[0])) or 1, int(np.count_nonzero(above)) + 1)
    ax.semilogy(edges[:-1], expected, "--", color="0.4", label="Gaussian noise")
    ax.step(edges[:-1][shown], np.maximum(above[shown], 0.5), where="pre", label="this search")
    if cutoff is not None:
        ax.axvline(cutoff, color="tab:red", linewidth=1, label=f"cutoff {cutoff:.2f}")
    ax.set(
        title="pixels above a z-score",
        xlabel="z-score",
        ylabel="pixels",
        xlim=(edges[shown][0] - 0.5, edges[min(shown.stop, 400)] + 0.5),
        ylim=(0.5, 2 * valid_pixels),
    )
    ax.legend()


def save_overview(
    store: str | PathLike[str],
    path: str | PathLike[str],
    *,
    cutoff: float | None = None,
    truth: AnyArray | None = None,
) -> None:
    """Save one picture: the z-score map and its survival histogram.

    Raises
    ------
    MissingDependencyError
        matplotlib is not installed.
    """
    figure = _figure((13.0, 5.6))
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    plot_zscore(store, left, truth)
    plot_survival(store, right, cutoff)
    figure.savefig(path, dpi=110)


def _figure(size_inches: tuple[float, float]) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        from ocelot_em.errors import MissingDependencyError

        raise MissingDependencyError(
            "pictures need matplotlib: pip install 'ocelot-em[viz]'"
        ) from error
    return Figure(figsize=size_inches, layout="constrained")
