"""Plots of merged maps and particles in matplotlib axes.

The z-score map is read chunk by chunk and pooled, so that no full map is ever in memory.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from ocelot_em.errors import InvalidInputError
from ocelot_em.merge.result import MergedResult
from ocelot_em.model.maps import SCALED_MIP, AnyArray, Float32, Float64
from ocelot_em.model.regions import Region, ceil_div
from ocelot_em.model.threads import map_in_threads
from ocelot_em.particles.table import ParticleTable

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Axes  # for modules that do not import matplotlib
from ocelot_em.view.figures import MAX_VECTOR_MARKERS, Store, axes_or_new, foreground, magma, say

OVERVIEW_PX = 400
"""Longest edge of an overview; with more pixels than axes have, drawing averages peaks away."""

BLUE, ORANGE, RED, CYAN = "#3f8fd2", "#e08214", "#d9434e", "#35c4d7"
"""Colours that are visible on white and on black."""

MAX_CIRCLES = 5000
"""Maximum number of circled particles; more circles would hide the map."""

_THREADS = 4
"""Number of threads that read maps; each holds a chunk in memory."""


def pooled_zscore(store: Store, longest_edge_px: int = OVERVIEW_PX) -> tuple[Float32, int]:
    """Return the z-score map, pooled by maximum so that peaks survive, and the pooling factor.

    Parameters
    ----------
    store
        Path or URL of a merged result.
    longest_edge_px
        Maximum number of rows or columns to return.

    Returns
    -------
    values : array
        (y, x) float32 of the valid pixels; NaN in blocks without searched pixels.
    factor : int
        Edge of the pooled blocks in pixels.
    """
    merged = MergedResult.open(store)
    height, width = merged.valid_shape
    factor = ceil_div(max(height, width), longest_edge_px)
    pooled = np.full((ceil_div(height, factor), ceil_div(width, factor)), np.nan, np.float32)

    def pool(region: Region) -> tuple[int, int, Float32]:
        z = merged.read(region, SCALED_MIP)
        rows = np.arange(region.y0, region.y1) // factor
        columns = np.arange(region.x0, region.x1) // factor
        first_row, first_column = (
            np.flatnonzero(np.diff(block, prepend=-1)) for block in (rows, columns)
        )
        highest = np.fmax.reduceat(np.fmax.reduceat(z, first_row, axis=0), first_column, axis=1)
        return int(rows[0]), int(columns[0]), highest

    for y, x, highest in map_in_threads(pool, merged.regions(), _THREADS):
        # Chunks need not start at block edges, so that two may share a block.
        into = pooled[y : y + highest.shape[0], x : x + highest.shape[1]]
        np.fmax(into, highest, out=into)
    return pooled, factor


def plot_zscore(
    store: Store | tuple[Float32, int],
    ax: "Axes | None" = None,
    truth: AnyArray | None = None,
    *,
    particles: ParticleTable | None = None,
) -> "Axes":
    """Draw the z-score map, pooled by maximum, and particles in circles.

    Parameters
    ----------
    store
        A merged result, or the return value of :func:`pooled_zscore` or, for a pyramid, of
        :func:`ocelot_em.io.ome_zarr.read_level`.
    ax
        Axes to draw into; new ones by default.
    truth
        Planted particles: records with fields ``y`` and ``x`` in pixels.
    particles
        Picked particles; the first (highest) :data:`MAX_CIRCLES` are circled, in a montage at their
        positions on the canvas.

    Returns
    -------
    matplotlib.axes.Axes
    """
    pooled, factor = store if isinstance(store, tuple) else pooled_zscore(store)
    ax = axes_or_new(ax)
    height, width = pooled.shape[0] * factor, pooled.shape[1] * factor
    low, high = colour_limits(pooled)
    image = ax.imshow(pooled, cmap=magma(), vmin=low, vmax=high, extent=(0, width, height, 0))
    image.set_interpolation("none" if max(pooled.shape) > OVERVIEW_PX else None)
    ax.figure.colorbar(image, ax=ax, label="z-score", shrink=0.8)
    if truth is not None:
        _circle(ax, truth["y"], truth["x"], "planted")
    if particles is not None and len(particles):
        y, x = map_positions(particles)
        _circle(ax, y[:MAX_CIRCLES], x[:MAX_CIRCLES], "picked")
    if truth is not None:
        ax.legend(loc="upper right")
    title = "z-score (pooled by maximum)" if factor > 1 else "z-score"
    ax.set(title=title, xlabel="x (pixels)", ylabel="y (pixels)", xlim=(0, width), ylim=(height, 0))
    return ax


def map_positions(particles: ParticleTable) -> tuple[AnyArray, AnyArray]:
    """Return rows and columns of particles on the merged maps; in a montage, on its canvas."""
    names = ("canvas_y", "canvas_x") if particles.is_of_montage else ("pos_y", "pos_x")
    return particles.columns[names[0]], particles.columns[names[1]]


def _circle(ax: "Axes", y: AnyArray, x: AnyArray, label: str) -> None:
    many = len(y) > MAX_VECTOR_MARKERS
    ax.scatter(
        np.asarray(x) + 0.5,
        np.asarray(y) + 0.5,
        s=12 if many else 90,
        facecolors="none",
        edgecolors=CYAN,
        linewidths=0.4 if many else 1.1,
        label=label,
        rasterized=many,
    )


def plot_crop(
    store: Store, particle: tuple[int, int], ax: "Axes | None" = None, *, edge_px: int = 40
) -> "Axes":
    """Draw the z-scores around one pixel; only that part of the map is read.

    Parameters
    ----------
    store
        A merged result.
    particle
        Row and column of the centre on the merged maps; in a montage, on its canvas.
    ax
        Axes to draw into; new ones by default.
    edge_px
        Edge of the crop.
    """
    merged = MergedResult.open(store)
    y, x = (int(position) for position in particle)
    half = edge_px // 2
    window = Region(max(y - half, 0), y + half + 1, max(x - half, 0), x + half + 1)
    region = window.intersect(Region.whole(merged.valid_shape))
    z = merged.read(region, SCALED_MIP)
    ax = axes_or_new(ax)
    low, high = colour_limits(z)
    image = ax.imshow(
        z,
        cmap=magma(),
        vmin=low,
        vmax=high,
        extent=(region.x0, region.x1, region.y1, region.y0),
        interpolation="none",
    )
    ax.figure.colorbar(image, ax=ax, shrink=0.8)
    ax.set_facecolor((0.5, 0.5, 0.5, 0.25))  # beyond the map
    ax.set(xlim=(x - half, x + half + 1), ylim=(y + half + 1, y - half))
    # A fixed number of ticks: otherwise a resizing layout leaves no room for their labels.
    ax.locator_params(nbins=5, integer=True)
    return ax


def colour_limits(z: Float32) -> tuple[float, float]:
    """Return the median and the 99.99th percentile of z-scores, so that peaks stand out."""
    known = z[np.isfinite(z)]
    if not known.size:
        return 0.0, 1.0
    low, high = np.percentile(known, (50, 99.99))
    return float(low), float(max(high, low + 1))


def plot_poses(particles: ParticleTable, ax: "Axes | None" = None) -> "Axes":
    """Draw the view directions of particles, coloured by z-score.

    The angle is phi, the radius sin(theta / 2), so that equal areas are equal solid angles:
    uniformly distributed views fill the circle uniformly.

    Parameters
    ----------
    particles
        Particles; those without a pose are ignored.
    ax
        Polar axes to draw into; new ones by default.

    Raises
    ------
    InvalidInputError
        The axes are not polar.
    """
    polar: Any = axes_or_new(ax, projection="polar")
    if polar.name != "polar":
        raise InvalidInputError(
            "ax: expected polar axes, for example figure.add_subplot(projection='polar'), got "
            f"{polar.name} ones"
        )
    theta, phi = particles.columns["theta"], particles.columns["phi"]
    known = np.isfinite(theta) & np.isfinite(phi)
    ticks = np.array([30, 60, 90, 180])
    labels = [f"θ {tick}°" if tick < 180 else "" for tick in ticks]
    polar.set_rticks(np.sin(np.radians(ticks) / 2), labels=labels, fontsize="small")
    polar.set_rlim(0, 1.02)
    polar.set_rlabel_position(67.5)
    polar.set_title("view directions (phi around, theta outwards)")
    if known.any():
        many = int(known.sum()) > MAX_VECTOR_MARKERS
        dots = polar.scatter(
            np.radians(phi[known]),
            np.sin(np.radians(theta[known]) / 2),
            c=particles.columns[SCALED_MIP][known],
            s=6 if many else 22,
            cmap="plasma",
            linewidths=0,
            rasterized=many,
        )
        polar.figure.colorbar(dots, ax=polar, label="z-score", shrink=0.7, pad=0.1)
    else:
        say(polar, "no poses")
    drawn: Axes = polar
    return drawn


def plot_psi(particles: ParticleTable, ax: "Axes | None" = None) -> "Axes":
    """Draw a histogram of the in-plane angles of particles.

    Parameters
    ----------
    particles
        Particles; those without a pose are ignored.
    ax
        Axes to draw into; new ones by default.
    """
    ax = axes_or_new(ax)
    psi = particles.columns["psi"]
    psi = np.round(psi[np.isfinite(psi)].astype(np.float64), 3) % 360
    if psi.size:
        width = _whole_steps(np.unique(psi))
        ax.hist(psi, [float(edge) for edge in range(0, 361, width)], color=BLUE)
        ax.axhline(
            psi.size * width / 360, linestyle="--", color=foreground(), alpha=0.65, label="if even"
        )
        ax.set_ylim(top=1.3 * ax.get_ylim()[1])  # room for the legend
        ax.legend(loc="upper right")
    else:
        say(ax, "no poses")
    ax.set(title="in-plane angle", xlabel="psi (°)", ylabel="particles", xlim=(0, 360))
    ax.set_xticks(np.arange(0, 361, 90))
    ax.locator_params(axis="y", integer=True)
    return ax


def _whole_steps(angles: Float64) -> int:
    """Return a bin width that divides 360° and holds equally many of the search's angles."""
    step = float(np.diff(angles).min()) if len(angles) > 1 else 1.0
    widths = (15, 20, 24, 30, 36, 40, 45)
    fitting = (w for w in widths if abs(w / step - round(w / step)) < 0.01 and w >= step)
    return next(fitting, 30)


def plot_defocus(particles: ParticleTable, ax: "Axes | None" = None) -> "Axes":
    """Draw a histogram of the relative defocus of particles, one bar per plane of the search.

    Parameters
    ----------
    particles
        Particles; those without a pose are ignored.
    ax
        Axes to draw into; new ones by default.
    """
    ax = axes_or_new(ax)
    defocus = particles.columns["relative_defocus"]
    defocus = defocus[np.isfinite(defocus)].astype(np.float64)
    planes, counts = np.unique(defocus, return_counts=True)
    if not planes.size:
        say(ax, "no poses")
    elif len(planes) <= 60:
        step = float(np.diff(planes).min()) if len(planes) > 1 else 100.0
        ax.bar(planes, counts, width=0.8 * step, color=BLUE)
    else:
        ax.hist(defocus, 40, color=BLUE)
    ax.set(title="defocus", xlabel="relative defocus (Å)", ylabel="particles")
    ax.locator_params(axis="y", integer=True)
    return ax
