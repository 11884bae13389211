"""Pictures of merged maps and particles, into matplotlib axes.

Histograms and health come from what the merge has collected; the z-score map is read chunk by chunk
and pooled, so that no full map is ever in memory.
"""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from math import erfc, sqrt
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ocelot_em.errors import IncompleteError, InvalidInputError, MissingDependencyError
from ocelot_em.merge.stats.collected import CANDIDATE_FIELDS
from ocelot_em.merge.stats.records import Summary, read_summary
from ocelot_em.model.histograms import JOINT_MIP_AXIS, JOINT_Z_AXIS, MIP_AXIS, Z_AXIS, Axis
from ocelot_em.model.maps import MIP, SCALED_MIP, AnyArray, Float32, Float64
from ocelot_em.model.regions import Region, ceil_div
from ocelot_em.particles.picking import MergedMaps
from ocelot_em.particles.table import ParticleTable
from ocelot_em.store.attributes import StatisticsAttributes
from ocelot_em.store.objects import open_objects

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Axes  # for modules that import nothing of matplotlib

Store = str | PathLike[str]

OVERVIEW_PX = 400
"""Longest edge of an overview: no more pixels than axes have, or drawing averages peaks away."""

BLUE, ORANGE, RED, CYAN = "#3f8fd2", "#e08214", "#d9434e", "#35c4d7"
"""Colours that are seen on white and on black."""

MOST_CIRCLES = 5000
"""Particles that are circled: with more, nothing else is seen."""

MOST_BARS = 48
"""Rows of a picture that have room for names."""

_THREADS = 4  # a chunk of each is in memory
_MOST_VECTOR_MARKERS = 400  # more are drawn as pixels, or a page with them gets slow
_MOST_CANDIDATES = 20_000


def pooled_zscore(store: Store, longest_edge_px: int = OVERVIEW_PX) -> tuple[Float32, int]:
    """Return the z-score map, pooled by maximum so that peaks survive, and the pooling factor.

    Parameters
    ----------
    store
        Path or URL of a merged result.
    longest_edge_px
        Most rows or columns to return.

    Returns
    -------
    values : array
        (y, x) float32 of the valid pixels; NaN in blocks that nobody searched.
    factor : int
        Edge in pixels of the blocks of which the values are the maximum.
    """
    merged = MergedMaps.open(store)
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

    with ThreadPoolExecutor(_THREADS) as pool_of_threads:
        for y, x, highest in pool_of_threads.map(pool, merged.regions()):
            # Chunks need not begin where blocks do, so that two may share one.
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
        A merged result; or what :func:`pooled_zscore` or a pyramid's
        :func:`ocelot_em.io.ome_zarr.read_level` has returned.
    ax
        Axes to draw into; new ones by default.
    truth
        Planted particles: records with fields ``y`` and ``x`` in pixels.
    particles
        Picked ones; circled are the first :data:`MOST_CIRCLES`, which are the highest. Those of a
        montage are where they lie on the canvas.

    Returns
    -------
    matplotlib.axes.Axes
    """
    pooled, factor = store if isinstance(store, tuple) else pooled_zscore(store)
    ax = axes_or_new(ax)
    height, width = pooled.shape[0] * factor, pooled.shape[1] * factor
    low, high = colour_limits(pooled)
    image = ax.imshow(pooled, cmap=_magma(), vmin=low, vmax=high, extent=(0, width, height, 0))
    image.set_interpolation("none" if max(pooled.shape) > OVERVIEW_PX else None)
    ax.figure.colorbar(image, ax=ax, label="z-score", shrink=0.8)
    if truth is not None:
        _circle(ax, truth["y"], truth["x"], "planted")
    if particles is not None and len(particles):
        y, x = map_positions(particles)
        _circle(ax, y[:MOST_CIRCLES], x[:MOST_CIRCLES], "picked")
    if truth is not None:
        ax.legend(loc="upper right")
    title = "z-score (pooled by maximum)" if factor > 1 else "z-score"
    ax.set(title=title, xlabel="x (pixels)", ylabel="y (pixels)", xlim=(0, width), ylim=(height, 0))
    return ax


def map_positions(particles: ParticleTable) -> tuple[AnyArray, AnyArray]:
    """Rows and columns of particles on the merged maps: of a montage, on its canvas."""
    names = ("canvas_y", "canvas_x") if particles.is_of_montage else ("pos_y", "pos_x")
    return particles.columns[names[0]], particles.columns[names[1]]


def _circle(ax: "Axes", y: AnyArray, x: AnyArray, label: str) -> None:
    many = len(y) > _MOST_VECTOR_MARKERS
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
        Row and column of the middle on the merged maps; of a montage, on its canvas.
    ax
        Axes to draw into; new ones by default.
    edge_px
        Edge of the part.
    """
    merged = MergedMaps.open(store)
    y, x = (int(position) for position in particle)
    half = edge_px // 2
    window = Region(max(y - half, 0), y + half + 1, max(x - half, 0), x + half + 1)
    region = window.intersect(Region.whole(merged.valid_shape))
    z = merged.read(region, SCALED_MIP)
    ax = axes_or_new(ax)
    low, high = colour_limits(z)
    image = ax.imshow(
        z,
        cmap=_magma(),
        vmin=low,
        vmax=high,
        extent=(region.x0, region.x1, region.y1, region.y0),
        interpolation="none",
    )
    ax.figure.colorbar(image, ax=ax, shrink=0.8)
    ax.set_facecolor((0.5, 0.5, 0.5, 0.25))  # beyond the map
    ax.set(xlim=(x - half, x + half + 1), ylim=(y + half + 1, y - half))
    # As many ticks at every size, or layouts that change the size leave no room for their labels.
    ax.locator_params(nbins=5, integer=True)
    return ax


def colour_limits(z: Float32) -> tuple[float, float]:
    """z-scores from the middle of the noise, so that peaks stand out, to nearly the highest."""
    known = z[np.isfinite(z)]
    if not known.size:
        return 0.0, 1.0
    low, high = np.percentile(known, (50, 99.99))
    return float(low), float(max(high, low + 1))


def plot_survival(
    store: Store | Summary,
    ax: "Axes | None" = None,
    cutoff: float | tuple[float, float] | None = None,
) -> "Axes":
    """Draw how many valid pixels reach a z-score, against what Gaussian noise would give.

    The expectation is that of the maximum of as many independent Gaussian draws per pixel as the
    search has projections; neighbouring projections are alike, so that real noise lies below it.
    Of a montage, the valid pixels of all exposures count, shown or not, and the expectation is the
    sum of those of the exposures, each with its own projections.

    Parameters
    ----------
    store
        A merged result, or its summary; the map is not read.
    ax
        Axes to draw into; new ones by default.
    cutoff
        z-score to mark; or the lowest and the highest of several.
    """
    summary, ax = summary_of(store), axes_or_new(ax)
    cutoffs = cutoff if isinstance(cutoff, tuple) else () if cutoff is None else (cutoff, cutoff)
    histogram = summary.histograms.of_z()
    edges, counts = _coarse(histogram.counts, Z_AXIS, 16)
    above = histogram.overflow + counts[::-1].cumsum()[::-1]
    pixels = summary.attributes.valid_pixels
    found = np.flatnonzero(counts)
    if histogram.pixels:
        bounds = summary.attributes.scaled_mip_range or (0.0, 1.0)
        last = min(int(found[-1]) + 2 if found.size else 2, len(counts))
        first = max(int(found[0]) - 1 if found.size else 0, 0)
        noise = _noise_above(edges[:-1], summary.attributes)
        ax.semilogy(edges[:-1], noise, "--", color=foreground(), alpha=0.65, label="Gaussian noise")
        shown = slice(first, last)
        ax.step(
            edges[:-1][shown],
            np.maximum(above[shown], 0.5),
            where="pre",
            color=BLUE,
            linewidth=1.8,
            label="this search",
        )
        right = max(min(bounds[1], Z_AXIS.high), *cutoffs, 0.0)
        ax.set(xlim=(edges[first] - 0.25, right + 0.5), ylim=(0.5, 2 * pixels))
    else:
        say(ax, "no pixel was searched")
    if cutoffs:
        lowest, highest = (f"{z:.2f}" for z in cutoffs)
        several = f"cutoffs {lowest} to {highest}"
        ax.axvline(
            cutoffs[0],
            color=RED,
            linewidth=1.2,
            label=f"cutoff {lowest}" if lowest == highest else several,
        )
        if lowest != highest:
            ax.axvspan(*cutoffs, color=RED, alpha=0.25, linewidth=0)
    ax.set(title="pixels above a z-score", xlabel="z-score", ylabel="pixels")
    if ax.get_legend_handles_labels()[0]:
        ax.legend()
    return ax


def _noise_above(z: Float64, attributes: StatisticsAttributes) -> Float64:
    """Pixels of which the highest of independent Gaussian draws is above z-scores."""
    draws: Counter[int] = Counter()
    for exposure in attributes.exposures:
        draws[exposure.total_projections] += exposure.valid_pixels
    if not draws:
        projections = sum(partial.total_projections for partial in attributes.partials)
        draws[projections] = attributes.valid_pixels
    tail = np.array([erfc(level / sqrt(2)) / 2 for level in z])
    above = np.zeros(len(z))
    for projections, pixels in draws.items():
        above += pixels * -np.expm1(projections * np.log1p(-tail))
    return above


def plot_distributions(store: Store | Summary, ax: "Axes | None" = None) -> "Axes":
    """Draw how often ``mip`` and z-scores have which value.

    Parameters
    ----------
    store
        A merged result, or its summary; maps are not read. Of a montage, the pixels of all
        exposures count, shown or not.
    ax
        Axes to draw into; new ones by default.
    """
    summary, ax = summary_of(store), axes_or_new(ax)
    kinds = (
        ("mip", summary.histograms.of_mip(), MIP_AXIS, ORANGE),
        ("z-score", summary.histograms.of_z(), Z_AXIS, BLUE),
    )
    filled = [np.flatnonzero(histogram.counts) for _, histogram, _, _ in kinds]
    widest = max((int(found[-1] - found[0]) for found in filled if found.size), default=0)
    together = min(2 ** max((widest // 160).bit_length(), 1), 512)
    for label, histogram, axis, colour in kinds:
        edges, counts = _coarse(histogram.counts, axis, together)
        used = np.flatnonzero(counts)
        if not used.size:
            continue
        shown = slice(int(used[0]), int(used[-1]) + 1)
        ax.stairs(
            counts[shown] / (edges[1] - edges[0]) / histogram.pixels,
            edges[shown.start : shown.stop + 1],
            color=colour,
            linewidth=1.6,
            label=label,
        )
    if ax.patches:
        ax.set_yscale("log")
        ax.legend()
    else:
        say(ax, "no pixel was searched")
    ax.set(title="mip and z-score", xlabel="value", ylabel="share of pixels per unit")
    return ax


def plot_joint(
    store: Store | Summary,
    ax: "Axes | None" = None,
    *,
    particles: ParticleTable | None = None,
    candidates: Float64 | None = None,
) -> "Axes":
    """Draw how many pixels have which ``mip`` and z-score, with candidates and particles.

    Parameters
    ----------
    store
        A merged result, or its summary; maps are not read. Of a montage, the pixels of all
        exposures count, shown or not.
    ax
        Axes to draw into; new ones by default.
    particles
        Picked ones, in circles.
    candidates
        As :func:`ocelot_em.particles.picking.all_candidates` returns them, as dots: the highest
        20,000.
    """
    from matplotlib.colors import LogNorm

    summary, ax = summary_of(store), axes_or_new(ax)
    joint = summary.histograms.joint
    ax.set(title="mip and z-score of each pixel", xlabel="mip", ylabel="z-score")
    used_rows, used_columns = np.nonzero(joint)
    if not used_rows.size:
        say(ax, "no pixel was searched")
        return ax
    y0, y1 = int(used_rows.min()), int(used_rows.max()) + 1
    x0, x1 = int(used_columns.min()), int(used_columns.max()) + 1
    shown = joint[y0:y1, x0:x1].T.astype(np.float64)
    left, right = (float(JOINT_MIP_AXIS.edges[i]) for i in (y0, y1))
    low, high = (float(JOINT_Z_AXIS.edges[i]) for i in (x0, x1))
    image = ax.imshow(
        np.where(shown > 0, shown, np.nan),
        cmap="viridis",
        norm=LogNorm(1, max(shown.max(), 2)),
        origin="lower",
        aspect="auto",
        extent=(left, right, low, high),
        interpolation="none",
    )
    ax.figure.colorbar(image, ax=ax, label="pixels", shrink=0.8)
    if candidates is not None and len(candidates):
        mip, z = (candidates[:, CANDIDATE_FIELDS.index(name)] for name in (MIP, SCALED_MIP))
        best = np.argsort(-z, kind="stable")[:_MOST_CANDIDATES]
        ax.scatter(
            mip[best], z[best], s=2, color=ORANGE, linewidths=0, rasterized=True, label="candidates"
        )
    if particles is not None and len(particles):
        many = len(particles) > _MOST_VECTOR_MARKERS
        ax.scatter(
            particles.columns[MIP],
            particles.columns[SCALED_MIP],
            s=5 if many else 36,
            facecolors="none",
            edgecolors=RED,
            linewidths=0.5 if many else 1.0,
            label="particles",
            rasterized=many,
        )
    margin_x, margin_y = 0.03 * (right - left) + 0.1, 0.03 * (high - low) + 0.1
    ax.set(xlim=(left - margin_x, right + margin_x), ylim=(low - margin_y, high + margin_y))
    if ax.get_legend_handles_labels()[0]:
        ax.legend(loc="upper left")
    return ax


def plot_partials(store: Store | Summary, ax: "Axes | None" = None) -> "Axes":
    """Draw the share of pixels that each partial won, and that expected from its projections.

    Parameters
    ----------
    store
        A merged result, or its summary; maps are not read. Of a montage, give the summary of an
        exposure, because partials of different ones win different pixels; or see
        :func:`ocelot_em.view.montage_plots.plot_partials_of_exposures`.
    ax
        Axes to draw into; new ones by default.
    """
    summary, ax = summary_of(store), axes_or_new(ax)
    partials = summary.attributes.partials
    won = np.array([partial.won_pixels for partial in partials], np.float64)
    expected = np.array([partial.total_projections for partial in partials], np.float64)
    won, expected = (100 * share / max(share.sum(), 1.0) for share in (won, expected))
    places = np.arange(len(partials))
    if len(partials) <= MOST_BARS:
        ax.barh(places, won, height=0.62, color=BLUE, label="won")
        ax.plot(
            expected,
            places,
            linestyle="",
            marker="|",
            markersize=13,
            markeredgewidth=2,
            color=ORANGE,
            label="expected",
        )
    else:
        ax.plot(won, places, ".", color=BLUE, label="won", rasterized=True)
        ax.plot(expected, places, "|", color=ORANGE, label="expected", rasterized=True)
    name_rows(ax, [partial.name for partial in partials])
    ax.set(title="pixels won", xlabel="share (%)")
    ax.set_xlim(left=0)
    if len(partials):
        ax.legend()
    return ax


def plot_correlations(
    store: Store | Summary,
    ax: "Axes | None" = None,
    *,
    value: Literal["mean", "std"] = "mean",
) -> "Axes":
    """Draw the mean of each input's own correlations with its spread over pixels, or their std.

    Parameters
    ----------
    store
        A merged result, or its summary; maps are not read.
    ax
        Axes to draw into; new ones by default.
    value
        Which of both. Of healthy inputs of one search they are about the same.
    """
    summary, ax = summary_of(store), axes_or_new(ax)
    sources = summary.attributes.sources
    numbers = np.array([_number(getattr(source, value)) for source in sources])
    spread = np.array([_number(source.mean_spread) for source in sources])
    places = np.arange(len(sources))
    ax.errorbar(
        numbers,
        places,
        xerr=spread if value == "mean" and len(sources) else None,
        fmt="o",
        markersize=5 if len(sources) <= MOST_BARS else 2,
        color=BLUE,
        capsize=3 if len(sources) <= MOST_BARS else 0,
    )
    name_rows(ax, [source.name for source in sources])
    known = numbers[np.isfinite(numbers)]
    if value == "std" and known.size:
        # Differences that nobody need care about should not look large.
        middle = float(known.max() + known.min()) / 2
        half = max(0.6 * float(np.ptp(known)), 0.02 * abs(middle), 1e-6)
        ax.set_xlim(middle - half, middle + half)
    ax.locator_params(axis="x", nbins=5)
    what = "mean, and its spread over pixels" if value == "mean" else "standard deviation"
    ax.set(title=f"own correlations: {value}", xlabel=what)
    return ax


def plot_poses(particles: ParticleTable, ax: "Axes | None" = None) -> "Axes":
    """Draw the view directions of particles, coloured by z-score.

    The angle is phi, and the distance from the middle goes with theta so that equal areas are equal
    solid angles: views that come evenly from all sides fill the circle evenly.

    Parameters
    ----------
    particles
        Those without a pose are left out.
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
        many = int(known.sum()) > _MOST_VECTOR_MARKERS
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
    """Draw how many particles have which in-plane angle.

    Parameters
    ----------
    particles
        Those without a pose are left out.
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
    """Width of bins that divide a circle and hold equally many of the search's angles."""
    step = float(np.diff(angles).min()) if len(angles) > 1 else 1.0
    widths = (15, 20, 24, 30, 36, 40, 45)
    fitting = (w for w in widths if abs(w / step - round(w / step)) < 0.01 and w >= step)
    return next(fitting, 30)


def plot_defocus(particles: ParticleTable, ax: "Axes | None" = None) -> "Axes":
    """Draw how many particles have which relative defocus: a bar for each plane of the search.

    Parameters
    ----------
    particles
        Those without a pose are left out.
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


def new_figure(size_inches: tuple[float, float]) -> Any:
    """Make a figure that no window belongs to.

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
    """Return axes that were given, or those of a new figure.

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
    """Return a summary that was given, or that of a merged result.

    Raises
    ------
    IncompleteError
        It was merged without statistics.
    """
    if isinstance(store, Summary):
        return store
    summary = read_summary(store)
    if summary is None:
        raise IncompleteError(
            f"{open_objects(store).url}: it was merged without statistics, by an earlier version; "
            "merge again"
        )
    return summary


def _coarse(counts: AnyArray, axis: Axis, together: int) -> tuple[Float64, AnyArray]:
    """Edges and counts of bins of which each has several of the axis's; these divide its bins."""
    return axis.edges[::together], counts.reshape(-1, together).sum(axis=1)


def name_rows(ax: "Axes", names: Sequence[str]) -> None:
    """Label the rows, first on top; numbers if there are too many for names."""
    if len(names) <= MOST_BARS:
        # A name is text and no formula.
        short = [name if len(name) <= 24 else f"{name[:12]}…{name[-11:]}" for name in names]
        ax.set_yticks(range(len(names)), labels=short, parse_math=False)
    else:
        ax.set_ylabel("number of the partial")
    ax.set_ylim(max(len(names), 1) - 0.4, -0.6)


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def foreground() -> Any:
    """Colour of text."""
    from matplotlib import rcParams

    return rcParams["text.color"]


def _magma() -> Any:
    from matplotlib import colormaps

    return colormaps["magma"].with_extremes(bad=(0.5, 0.5, 0.5, 0.35))


def say(ax: "Axes", words: str) -> None:
    """Write into axes why nothing is drawn."""
    ax.text(0.5, 0.5, words, ha="center", va="center", transform=ax.transAxes, alpha=0.7)
