"""Plots of merged maps and particles.

The z-score map is read chunk by chunk and pooled, so that no full map is ever in memory. Every plot
takes matplotlib axes as ``ax``, by default those of a new figure, and returns them.
"""

import reprlib
from typing import TYPE_CHECKING, Any

import numpy as np

from ocelot_em.errors import InvalidInputError
from ocelot_em.merge.result import MergedResult
from ocelot_em.model.maps import MIP, SCALED_MIP, SECOND_ZSCORE, AnyArray, Float32, Float64
from ocelot_em.model.problems import kind_text
from ocelot_em.model.regions import Region, ceil_div
from ocelot_em.model.threads import map_in_threads
from ocelot_em.particles.areas import Area
from ocelot_em.particles.table import GROUP, ParticleTable, require_table
from ocelot_em.store.constants import DIMENSIONS
from ocelot_em.view import figures
from ocelot_em.view.figures import Store

if TYPE_CHECKING:
    from ocelot_em.view.figures import Axes

MAX_CIRCLES = 5000
"""Maximum number of circled particles; more circles would hide the map."""

_MAX_NAMED_GROUPS = 10

_THREADS = 4  # each holds a chunk in memory


def pooled_zscore(store: Store, longest_edge_px: int = figures.OVERVIEW_PX) -> tuple[Float32, int]:
    """Return the z-score map, pooled by maximum so that peaks survive, and the pooling factor.

    The values are (y, x) float32 of the valid pixels, NaN in blocks without searched pixels, with
    at most ``longest_edge_px`` rows or columns. The factor is the edge of the pooled blocks in
    pixels.
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


def pooled_further(z: Float32, factor: int, longest_edge_px: int) -> tuple[Float32, int]:
    """Pool a map and its factor, as of :func:`pooled_zscore`, to fewer rows or columns."""
    further = ceil_div(max(z.shape), longest_edge_px)
    for axis, length in enumerate(z.shape):
        z = np.fmax.reduceat(z, np.arange(0, length, further), axis=axis)
    return z, factor * further


def pooled_excluded(merged: MergedResult, area: Area, factor: int) -> AnyArray:
    """Return which blocks of the map, ``factor`` pixels wide, are mostly outside an area."""
    shape = tuple(ceil_div(length, factor) for length in merged.valid_shape)
    balance = np.zeros(shape, np.int64)
    for region in merged.regions():
        signs = np.where(area.on_canvas(merged, region), -1, 1)
        rows = np.arange(region.y0, region.y1) // factor
        columns = np.arange(region.x0, region.x1) // factor
        firsts = [np.flatnonzero(np.diff(own, prepend=-1)) for own in (rows, columns)]
        sums = np.add.reduceat(np.add.reduceat(signs, firsts[0], axis=0), firsts[1], axis=1)
        balance[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] += sums
    outside: AnyArray = balance > 0
    return outside


def hatch_excluded(merged: MergedResult, area: Area, factor: int, ax: "Axes") -> None:
    """Shade and hatch where no particles were picked."""
    excluded = pooled_excluded(merged, area, factor)
    height, width = (length * factor for length in excluded.shape)
    shade = np.zeros((*excluded.shape, 4), np.float32)
    shade[excluded] = (0.5, 0.5, 0.5, 0.6)
    ax.imshow(shade, extent=(0, width, height, 0), interpolation="none")
    if excluded.any() and min(excluded.shape) > 1:
        hatched: Any = {"levels": [0.5, 1.5], "hatches": ["///"], "colors": "none"}
        ax.contourf(excluded.astype(float), extent=(0, width, 0, height), **hatched)


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
    store, ax
        A merged result, or the return value of :func:`pooled_zscore` or, for a pyramid, of
        :func:`ocelot_em.io.ome_zarr.read_level`; and axes to draw into.
    truth
        Planted particles: records with fields ``y`` and ``x`` in pixels.
    particles
        Picked particles; the first (highest) :data:`MAX_CIRCLES` are circled, in a montage at their
        positions on the canvas. Where a mask excluded pixels, the map is hatched, unless ``store``
        is pooled.

    Examples
    --------
    >>> from ocelot_em import find_peaks, plot_zscore
    >>> axes = plot_zscore("MERGED.zarr", particles=find_peaks("MERGED.zarr"))
    >>> axes.figure.savefig("zscore.png")
    """
    if particles is not None:
        require_table(particles)
    pooled, factor = store if isinstance(store, tuple) else pooled_zscore(store)
    ax = figures.axes_or_new(ax)
    height, width = pooled.shape[0] * factor, pooled.shape[1] * factor
    interpolation = "none" if max(pooled.shape) > figures.OVERVIEW_PX else None
    _draw_map(ax, pooled, "z-score", extent=(0, width, height, 0), interpolation=interpolation)
    if particles is not None and len(particles):
        y, x = (place[:MAX_CIRCLES] + 0.5 for place in map_positions(particles))
        figures.circle(ax, x, y, figures.CYAN, "picked", size=90)
    if truth is not None:
        figures.circle(ax, truth["x"] + 0.5, truth["y"] + 0.5, figures.CYAN, "planted", size=90)
        ax.legend(loc="upper right")
    if particles is not None and particles.picking is not None and not isinstance(store, tuple):
        merged = MergedResult.open(store)
        area = Area.of(merged, particles.picking)
        if area is not None:
            hatch_excluded(merged, area, factor, ax)
    title = "z-score (pooled by maximum)" if factor > 1 else "z-score"
    ax.set(title=title, xlabel="x (pixels)", ylabel="y (pixels)", xlim=(0, width), ylim=(height, 0))
    return ax


def map_positions(particles: ParticleTable) -> tuple[AnyArray, AnyArray]:
    """Return rows and columns of particles on the merged maps; in a montage, on its canvas."""
    prefix = "canvas" if particles.is_of_montage else "pos"
    return particles.columns[f"{prefix}_y"], particles.columns[f"{prefix}_x"]


def plot_crop(
    store: Store, particle: tuple[int, int], ax: "Axes | None" = None, *, edge_px: int = 40
) -> "Axes":
    """Draw the z-scores around one pixel; only that part of the map is read.

    ``particle`` is the row and column of the centre on the merged maps; in a montage, on its
    canvas.

    Examples
    --------
    >>> from ocelot_em import plot_crop
    >>> axes = plot_crop("MERGED.zarr", (120, 150))
    """
    merged = MergedResult.open(store)
    try:
        y, x = map(int, particle)
    except (TypeError, ValueError):
        raise InvalidInputError(
            "particle: expected the row and the column of a pixel, such as (120, 150), got "
            f"{reprlib.repr(particle)}"
        ) from None
    half = edge_px // 2
    window = Region(max(y - half, 0), y + half + 1, max(x - half, 0), x + half + 1)
    region = window.intersect(Region.whole(merged.valid_shape))
    ax = figures.axes_or_new(ax)
    extent = (region.x0, region.x1, region.y1, region.y0)
    _draw_map(ax, merged.read(region, SCALED_MIP), extent=extent)
    ax.set_facecolor((0.5, 0.5, 0.5, 0.25))  # beyond the map
    ax.set(xlim=(x - half, x + half + 1), ylim=(y + half + 1, y - half))
    # A fixed number of ticks: otherwise a resizing layout leaves no room for their labels.
    ax.locator_params(nbins=5, integer=True)
    return ax


def plot_map(
    values: Any, ax: "Axes | None" = None, *, particles: ParticleTable | None = None
) -> "Axes":
    """Draw a map of a dataset, or a part of one, at its coordinates, with the first row on top.

    Parameters
    ----------
    values
        Map of :func:`ocelot_em.open_merged` or :func:`ocelot_em.lazy_merge`, an
        ``xarray.DataArray``. Of a map that is too large, the maximum of each block is drawn if it
        has scores, otherwise one pixel of each block.
    ax
        Axes to draw into.
    particles
        Picked particles; the first (highest) :data:`MAX_CIRCLES` are circled.

    Examples
    --------
    >>> from ocelot_em import open_merged, plot_map
    >>> maps = open_merged("MERGED.zarr")
    >>> axes = plot_map(maps.best_psi[:100, :150])
    >>> axes.get_xlabel(), axes.get_ylabel()
    ('x (Å)', 'y (Å)')
    """
    if particles is not None:
        require_table(particles)
    what = "values: expected a map of a dataset, such as open_merged(store).scaled_mip"
    if getattr(values, "dims", None) != DIMENSIONS:
        raise InvalidInputError(f"{what}, got {kind_text(values)}")
    factor, has_scores = (
        ceil_div(max(values.shape), figures.OVERVIEW_PX),
        values.name in (MIP, SCALED_MIP),
    )
    if has_scores and factor > 1:
        values = values.coarsen(y=factor, x=factor, boundary="pad").max(keep_attrs=True)
    pixels = values if has_scores else values[::factor, ::factor]
    y, x = (pixels[axis].to_numpy() for axis in ("y", "x"))
    half_y, half_x = (np.diff(places[:2]).sum() / 2 or 0.5 for places in (y, x))
    extent = (x[0] - half_x, x[-1] + half_x, y[-1] + half_y, y[0] - half_y)
    ax, name, units = (
        figures.axes_or_new(ax),
        str(values.name),
        values.y.attrs.get("units", "pixel"),
    )
    label = "z-score" if name == SCALED_MIP else name
    lowest = 50 if has_scores else 0
    _draw_map(ax, pixels.to_numpy(), label, lowest=lowest, extent=extent)
    if particles is not None and len(particles):
        size = particles.about.pixel_size_angstrom if particles.about else None
        scale = size if size is not None and units == "Å" else 1.0
        rows, columns = (place[:MAX_CIRCLES] * scale for place in map_positions(particles))
        figures.circle(ax, columns, rows, figures.CYAN, "picked", size=90)
    ax.set(
        title=label, xlabel=f"x ({units})", ylabel=f"y ({units})", xlim=extent[:2], ylim=extent[2:]
    )
    return ax


def _draw_map(
    ax: "Axes", z: AnyArray, label: str = "", *, lowest: float = 50, **options: Any
) -> None:
    """Draw from the ``lowest`` percentile to the 99.99th: of scores the median, for peaks."""
    known = z[np.isfinite(z)]
    low, high = np.percentile(known, (lowest, 99.99)).tolist() if known.size else (0.0, 1.0)
    high = max(high, low + 1) if lowest else high
    figures.draw_image(ax, z, label, "magma", vmin=low, vmax=high, **options)


def plot_groups(particles: ParticleTable, ax: "Axes | None" = None) -> "Axes":
    """Draw the z-scores of particles against those of the group that came second there.

    Each group has a colour; up to ten are named. On the line, both z-scores are equal. Particles at
    pixels that only one group searched are ignored.

    Examples
    --------
    >>> from ocelot_em import find_peaks, merge, plot_groups
    >>> report = merge("SEARCH.zarr", "SECTORS.zarr", group_by="sector")
    >>> axes = plot_groups(find_peaks("SECTORS.zarr"))
    """
    if GROUP not in require_table(particles).columns:
        raise InvalidInputError(
            "particles: expected those of a merge with group_by, got particles without groups"
        )
    ax, columns = figures.axes_or_new(ax), particles.columns
    names, own = np.unique(columns[GROUP], return_inverse=True)
    z, second = columns[SCALED_MIP], columns[SECOND_ZSCORE]
    for number, name in enumerate(names.tolist()):
        here = own == number
        label = name if number < _MAX_NAMED_GROUPS else None
        look: Any = {"s": 16, "alpha": 0.8, "linewidth": 0, "label": label}
        ax.scatter(second[here], z[here], color=f"C{number % 10}", **look)
    if not np.isfinite(second).any():
        figures.explain_empty(ax, "no particle with a second group")
        return ax
    ends = [np.nanmin(second), np.nanmax(z)]
    ax.plot(ends, ends, color=figures.foreground(), alpha=0.4, linewidth=0.8)
    ax.set(title="best and second group", xlabel="z-score of the second", ylabel="z-score")
    ax.legend()
    return ax


def plot_poses(particles: ParticleTable, ax: "Axes | None" = None) -> "Axes":
    """Draw the view directions of particles, coloured by z-score.

    The angle is phi, the radius sin(theta / 2), so that equal areas are equal solid angles:
    uniformly distributed views fill the circle uniformly. Particles without a pose are ignored.
    The axes must be polar.

    Examples
    --------
    >>> from ocelot_em import find_peaks, plot_poses
    >>> axes = plot_poses(find_peaks("MERGED.zarr"))
    """
    require_table(particles)
    ax = polar = figures.axes_or_new(ax, projection="polar")
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
    polar.set_title("view directions (angle: φ, radius: θ)", y=1.1)
    if not known.any():
        figures.explain_empty(polar, "no poses")
        return ax
    angle, radius = np.radians(phi[known]), np.sin(np.radians(theta[known]) / 2)
    z, many = particles.columns[SCALED_MIP][known], len(angle) > figures.MAX_VECTOR_MARKERS
    look: Any = {"s": 6 if many else 22, "cmap": "plasma", "rasterized": many}
    # Dark dots need a rim on a dark page.
    look |= {"linewidths": 0 if many else 0.5, "edgecolors": "#888"}
    look["clip_on"] = False  # all points are inside, and clipping each to a circle takes long
    dots = polar.scatter(angle, radius, c=z, **look)
    polar.figure.colorbar(dots, ax=polar, label="z-score", shrink=0.7, pad=0.1)
    return ax


def plot_psi(particles: ParticleTable, ax: "Axes | None" = None) -> "Axes":
    """Draw a histogram of the in-plane angles of particles; those without a pose are ignored.

    Examples
    --------
    >>> from ocelot_em import find_peaks, plot_psi
    >>> axes = plot_psi(find_peaks("MERGED.zarr"))
    """
    psi = np.round(_known(particles, "psi"), 3) % 360
    ax = figures.axes_or_new(ax)
    if psi.size:
        width = _bin_width(np.unique(psi))
        ax.hist(psi, [float(edge) for edge in range(0, 361, width)], color=figures.BLUE)
        even = psi.size * width / 360
        ax.axhline(even, linestyle="--", color=figures.foreground(), alpha=0.65, label="uniform")
        ax.set_ylim(top=1.3 * ax.get_ylim()[1])  # room for the legend
        ax.legend(loc="upper right")
    else:
        figures.explain_empty(ax, "no poses")
    ax.set(title="in-plane angle", xlabel="ψ (°)", ylabel="particles", xlim=(0, 360))
    ax.set_xticks(np.arange(0, 361, 90))
    ax.locator_params(axis="y", integer=True)
    return ax


def _known(particles: ParticleTable, column: str) -> Float64:
    values = require_table(particles).columns[column]
    return values[np.isfinite(values)].astype(np.float64)


def _bin_width(angles: Float64) -> int:
    """Return a bin width that divides 360° and holds equally many of the search's angles."""
    step = float(np.diff(angles).min()) if len(angles) > 1 else 1.0
    widths = (15, 20, 24, 30, 36, 40, 45)
    fitting = (w for w in widths if abs(w / step - round(w / step)) < 0.01 and w >= step)
    return next(fitting, 30)


def plot_defocus(particles: ParticleTable, ax: "Axes | None" = None) -> "Axes":
    """Draw a histogram of the relative defocus of particles, one bar per plane of the search.

    Particles without a pose are ignored.

    Examples
    --------
    >>> from ocelot_em import find_peaks, plot_defocus
    >>> axes = plot_defocus(find_peaks("MERGED.zarr"))
    """
    defocus, ax = _known(particles, "relative_defocus"), figures.axes_or_new(ax)
    planes, counts = np.unique(defocus, return_counts=True)
    step = float(np.diff(planes).min(initial=np.inf)) if len(planes) > 1 else 100.0
    if not planes.size:
        figures.explain_empty(ax, "no poses")
    elif np.ptp(planes) <= 60 * step:
        ax.bar(planes, counts, width=0.8 * step, color=figures.BLUE)
    else:
        ax.hist(defocus, 40, color=figures.BLUE)
    ax.set(title="defocus", xlabel="relative defocus (Å)", ylabel="particles")
    ax.locator_params(axis="y", integer=True)
    return ax
