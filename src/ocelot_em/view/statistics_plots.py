"""Plots of the statistics of a merged result: distributions, partials, correlations.

Every plot takes a merged result or its summary as ``store``, and matplotlib axes as ``ax``, by
default those of a new figure, and returns the axes. No map is read. For a montage, the pixels of
all exposures are counted, shown or not.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ocelot_em.errors import InvalidInputError
from ocelot_em.merge.result import MergedResult
from ocelot_em.merge.stats.collected import CANDIDATE_FIELDS
from ocelot_em.merge.stats.summary import Summary
from ocelot_em.model.histograms import JOINT_MIP_AXIS, JOINT_Z_AXIS, MIP_AXIS, Z_AXIS
from ocelot_em.model.maps import MIP, SCALED_MIP, AnyArray, Float64
from ocelot_em.particles.estimates import noise_above
from ocelot_em.particles.significance import PValueModel
from ocelot_em.particles.table import NEG_LOG_P, ParticleTable, require_table
from ocelot_em.view import figures
from ocelot_em.view.figures import Store

if TYPE_CHECKING:
    from ocelot_em.view.figures import Axes

_MAX_CANDIDATES = 20_000


def plot_survival(
    store: Store | Summary,
    ax: "Axes | None" = None,
    cutoff: float | tuple[float, float] | None = None,
) -> "Axes":
    """Draw the survival histogram of z-scores, and its expectation for Gaussian noise.

    The expectation is for the maximum of as many independent Gaussian draws per pixel as the search
    has projections. Neighbouring projections are correlated, so that real noise is below it. In a
    montage, the expectation is the sum over exposures, each with its own number of projections.

    ``cutoff`` is a z-score to mark, or the lowest and highest of several.

    Examples
    --------
    >>> from ocelot_em import plot_survival
    >>> axes = plot_survival("MERGED.zarr")
    """
    summary, ax = figures.summary_of(store), figures.axes_or_new(ax)
    cutoffs = cutoff if isinstance(cutoff, tuple) else () if cutoff is None else (cutoff, cutoff)
    z, pixels = survival_curve(summary)
    if z.size:
        bounds = summary.attributes.scaled_mip_range or (0.0, 1.0)
        levels = figures.coarse(summary.histograms.of_z().counts, Z_AXIS, 16)[0][:-1]
        noise = noise_above(levels, summary.attributes)
        look: Any = {"color": figures.foreground(), "alpha": 0.65, "label": "Gaussian noise"}
        ax.semilogy(levels, noise, "--", **look)
        figures.name_powers(ax.yaxis)
        ax.step(z, pixels, where="pre", color=figures.BLUE, linewidth=1.8, label="this search")
        # A cutoff far above all z-scores would squeeze the curves.
        right = max(min(bounds[1], Z_AXIS.high), *(c for c in cutoffs if c < 2 * bounds[1]), 0.0)
        top = 2 * summary.attributes.valid_pixels
        ax.set(xlim=(z[0] - 0.25, right + 0.5), ylim=(0.5, top))
    else:
        figures.explain_empty(ax, "no pixel was searched")
    if cutoffs:
        ends = sorted({f"{z:.2f}" for z in cutoffs}, key=float)
        label = f"cutoff{'s' * (len(ends) > 1)} {' to '.join(ends)}"
        ax.axvline(cutoffs[0], color=figures.RED, linewidth=1.2, label=label)
        if len(ends) > 1:
            ax.axvspan(*cutoffs, color=figures.RED, alpha=0.25, linewidth=0)
    ax.set(title="pixels above a z-score", xlabel="z-score", ylabel="pixels")
    if ax.get_legend_handles_labels()[0]:
        ax.legend()
    return ax


def survival_curve(summary: Summary) -> tuple[Float64, Float64]:
    """Return z-scores and the numbers of pixels that reach them, 0.5 for none.

    Both are empty if nothing was searched.
    """
    histogram = summary.histograms.of_z()
    edges, counts = figures.coarse(histogram.counts, Z_AXIS, 16)
    above = histogram.overflow + counts[::-1].cumsum()[::-1]
    found = np.flatnonzero(counts)
    if not histogram.pixels:
        return np.empty(0), np.empty(0)
    lowest, highest = (int(found[0]), int(found[-1])) if found.size else (0, 0)
    first, last = max(lowest - 1, 0), min(highest + 2, len(counts))
    return edges[first:last], np.maximum(above[first:last], 0.5)


def draw_estimates(curves: Sequence[AnyArray], particles: ParticleTable, ax: "Axes") -> None:
    """Draw precision and recall by cutoff, and the cutoff of the particles.

    ``curves`` are cutoffs, descending, precision and recall.
    """
    for values, name, colour in zip(
        curves[1:], ("precision", "recall"), (figures.BLUE, figures.ORANGE), strict=True
    ):
        if np.isfinite(values).any():
            ax.step(curves[0], values, where="post", linewidth=1.6, color=colour, label=name)
    if particles.about is not None:
        ax.axvline(particles.about.cutoff, color=figures.RED, linewidth=1.2, label="cutoff")
    name = {NEG_LOG_P: "-ln p", MIP: "mip"}.get(particles.ranked_by, "z-score")
    ax.set(xlabel=f"cutoff ({name})", ylim=(-0.03, 1.03))
    ax.set_title("estimates", loc="left")
    beside: Any = {"loc": "lower right", "bbox_to_anchor": (1.02, 0.97), "ncols": 3}
    ax.legend(**beside, columnspacing=1.0, handlelength=1.2)


def plot_distributions(store: Store | Summary, ax: "Axes | None" = None) -> "Axes":
    """Draw the distributions of ``mip`` and z-score.

    Examples
    --------
    >>> from ocelot_em import plot_distributions
    >>> axes = plot_distributions("MERGED.zarr")
    """
    summary, ax = figures.summary_of(store), figures.axes_or_new(ax)
    kinds = (
        ("mip", summary.histograms.of_mip(), MIP_AXIS, figures.ORANGE),
        ("z-score", summary.histograms.of_z(), Z_AXIS, figures.BLUE),
    )
    filled = [np.flatnonzero(histogram.counts) for _, histogram, _, _ in kinds]
    widest = max((int(found[-1] - found[0]) for found in filled if found.size), default=0)
    together = min(2 ** max((widest // 160).bit_length(), 1), 512)
    for label, histogram, axis, colour in kinds:
        edges, counts = figures.coarse(histogram.counts, axis, together)
        used = np.flatnonzero(counts)
        if used.size:
            first, last = used[0], used[-1] + 1
            density = counts[first:last] / (edges[1] - edges[0]) / histogram.pixels
            ax.stairs(density, edges[first : last + 1], color=colour, linewidth=1.6, label=label)
    if ax.patches:
        ax.set_yscale("log")
        figures.name_powers(ax.yaxis)
        ax.legend()
    else:
        figures.explain_empty(ax, "no pixel was searched")
    ax.set(title="mip and z-score", xlabel="value", ylabel="share of pixels per unit")
    return ax


def plot_joint(
    store: Store | Summary,
    ax: "Axes | None" = None,
    *,
    particles: ParticleTable | None = None,
    candidates: Float64 | None = None,
    contour: tuple[PValueModel, float] | None = None,
) -> "Axes":
    """Draw the joint density of ``mip`` and z-score, with candidates and particles.

    Particles are drawn as circles. The highest 20,000 ``candidates``, which are rows of
    :func:`ocelot_em.particles.picking.all_candidates`, are drawn as dots. ``contour`` is a model
    of p-values and the -ln p at which to draw its contour.

    Examples
    --------
    >>> from ocelot_em import plot_joint
    >>> axes = plot_joint("MERGED.zarr")
    """
    if particles is not None:
        require_table(particles)
    summary, ax = figures.summary_of(store), figures.axes_or_new(ax)
    from matplotlib.colors import LogNorm

    joint = summary.histograms.joint
    ax.set(title="mip and z-score of each pixel", xlabel="mip", ylabel="z-score")
    if not joint.any():
        figures.explain_empty(ax, "no pixel was searched")
        return ax
    # The part of both axes where there are pixels.
    used = [np.flatnonzero(joint.any(axis=axis)) for axis in (1, 0)]
    (y0, y1), (x0, x1) = ((int(bins[0]), int(bins[-1]) + 1) for bins in used)
    (left, right), (low, high) = JOINT_MIP_AXIS.edges[[y0, y1]], JOINT_Z_AXIS.edges[[x0, x1]]
    shown = joint[y0:y1, x0:x1].T.astype(np.float64)
    shown[shown == 0] = np.nan
    look: Any = {"norm": LogNorm(1, max(np.nanmax(shown), 2)), "origin": "lower", "aspect": "auto"}
    look["extent"] = (left, right, low, high)
    bar = figures.draw_image(ax, shown, "pixels", "viridis", blank=0, **look)
    figures.name_powers(bar.ax.yaxis)
    if candidates is not None and len(candidates):
        mip, z = (candidates[:, CANDIDATE_FIELDS.index(name)] for name in (MIP, SCALED_MIP))
        best = np.argsort(-z, kind="stable")[:_MAX_CANDIDATES]
        dots: Any = {"s": 5, "color": figures.ORANGE, "linewidths": 0, "rasterized": True}
        ax.scatter(mip[best], z[best], label="candidates", **dots)
    if particles is not None and len(particles):
        mip, z = (particles.columns[name] for name in (MIP, SCALED_MIP))
        figures.circle(ax, mip, z, figures.RED, "particles", size=36)
    if contour is not None:
        lines = p_value_contours(contour[0], summary, [contour[1]])[0]
        for number, (x, y) in enumerate(lines):
            name = None if number else f"-ln p = {contour[1]:.4g}"
            ax.plot(x, y, "--", color=figures.RED, linewidth=1, label=name)
    margin_x, margin_y = 0.03 * (right - left) + 0.1, 0.03 * (high - low) + 0.1
    ax.set(xlim=(left - margin_x, right + margin_x), ylim=(low - margin_y, high + margin_y))
    if ax.get_legend_handles_labels()[0]:
        ax.legend(loc="upper left")
    return ax


def p_value_contours(
    model: PValueModel, summary: Summary, levels: Sequence[float]
) -> list[list[tuple[list[float], list[float]]]]:
    """Return the lines of pixels with each -ln p, as ``mip`` and z-scores, where pixels are."""
    from contourpy import contour_generator

    statistics = summary.attributes
    ranges = statistics.mip_range, statistics.scaled_mip_range
    mip, z = (np.linspace(*(ends or (0.0, 1.0)), 200) for ends in ranges)
    found = contour_generator(mip, z, model.neg_log_p(*np.meshgrid(mip, z)))
    lines: Any = [found.lines(level) for level in levels]
    return [[tuple(np.round(line, 3).T.tolist()) for line in own] for own in lines]


def plot_histogram(
    store: Store, ax: "Axes | None" = None, *, value: Literal["counts", "survival"] = "counts"
) -> "Axes":
    """Draw the histogram of all correlations, as cisTEM records it, and a standard Gaussian's.

    With ``survival``, it is the number of correlations at or above each value.

    Raises
    ------
    InvalidInputError
        A partial has no histogram.

    Examples
    --------
    >>> from ocelot_em import MergedResult, plot_histogram
    >>> MergedResult.open("MERGED.zarr").correlation_histogram is None
    True
    """
    merged = MergedResult.open(store)
    if (found := merged.correlation_histogram) is None:
        raise InvalidInputError(
            f"{merged.url}: expected a histogram of correlations in each partial, got none in "
            "some; cisTEM's are imported with its maps"
        )
    ax, edges = figures.axes_or_new(ax), found.edges
    counts = np.array(found.counts if value == "counts" else found.survival, np.float64)
    used = np.flatnonzero(found.counts)
    first, last = (int(used[0]), int(used[-1]) + 1) if used.size else (0, len(counts))
    shown = np.maximum(counts, 0.5)[first:last]
    label = f"this search\nmean {found.mean:.3f}\nstd {found.std:.3f}"
    ax.stairs(shown, edges[first : last + 1], baseline=None, color=figures.BLUE, label=label)
    noise = found.gaussian()[value == "survival"]
    x = edges[:-1] + (found.width / 2 if value == "counts" else 0)
    look: Any = {"color": figures.foreground(), "alpha": 0.65, "label": "Gaussian"}
    ax.semilogy(x, np.maximum(noise, 1e-9), "--", **look)
    figures.name_powers(ax.yaxis)
    ax.set(xlim=(edges[first] - 0.5, edges[last] + 0.5), ylim=(0.5, 3 * max(shown.max(), 1)))
    title = "all correlations" if value == "counts" else "correlations above a value"
    ax.set(title=title, xlabel="correlation", ylabel="correlations")
    if value == "counts":
        ax.legend(loc="upper right")
    return ax


def plot_partials(store: Store | Summary, ax: "Axes | None" = None) -> "Axes":
    """Draw each partial's share of won pixels, and the share expected from its projections.

    For a montage, pass the summary of one exposure, because partials of different exposures win
    different pixels, or use :func:`ocelot_em.plot_partials_of_exposures`.

    Examples
    --------
    >>> from ocelot_em import plot_partials
    >>> axes = plot_partials("MERGED.zarr")
    """
    summary, ax = figures.summary_of(store), figures.axes_or_new(ax)
    partials = summary.attributes.partials
    won = np.array([partial.won_pixels for partial in partials], np.float64)
    expected = np.array([partial.projections for partial in partials], np.float64)
    won, expected = (100 * share / max(share.sum(), 1.0) for share in (won, expected))
    places = np.arange(len(partials))
    mark: Any = {"color": figures.ORANGE, "label": "expected", "marker": "|", "linestyle": ""}
    if figures.has_names(len(partials)):
        ax.barh(places, won, height=0.62, color=figures.BLUE, label="won")
        ax.plot(expected, places, markersize=13, markeredgewidth=2, **mark)
    else:
        ax.plot(won, places, ".", color=figures.BLUE, label="won", rasterized=True)
        ax.plot(expected, places, rasterized=True, **mark)
    figures.name_rows(ax, [partial.name for partial in partials], "partial")
    ax.set(title="pixels won", xlabel="share (%)")
    ax.set_xlim(left=0)
    if len(partials):
        ax.legend()
    return ax


def plot_correlations(
    store: Store | Summary, ax: "Axes | None" = None, *, value: Literal["mean", "std"] = "mean"
) -> "Axes":
    """Draw the mean of each input's own correlations, with its spread over pixels, or their std.

    Both are normally about the same for all inputs of one search.

    Examples
    --------
    >>> from ocelot_em import plot_correlations
    >>> axes = plot_correlations("MERGED.zarr")
    """
    summary, ax = figures.summary_of(store), figures.axes_or_new(ax)
    sources = summary.attributes.sources
    # Unknown ones become NaN.
    numbers = np.array([getattr(source, value) for source in sources], np.float64)
    spread = np.array([source.mean_spread for source in sources], np.float64)
    named = figures.has_names(len(sources))
    xerr = spread if value == "mean" and len(sources) else None
    look: Any = {"fmt": "o", "markersize": 5 if named else 2, "capsize": 3 if named else 0}
    ax.errorbar(numbers, np.arange(len(sources)), xerr=xerr, color=figures.BLUE, **look)
    figures.name_rows(ax, [source.name for source in sources], "input")
    known = numbers[np.isfinite(numbers)]
    if value == "std" and known.size:
        # Negligible differences should not look large.
        middle = float(known.max() + known.min()) / 2
        half = max(0.6 * float(np.ptp(known)), 0.02 * abs(middle), 1e-6)
        ax.set_xlim(middle - half, middle + half)
    ax.locator_params(axis="x", nbins=5)
    label = "mean ± spread over pixels" if value == "mean" else "standard deviation"
    ax.set(title=f"correlations: {value}", xlabel=label)
    return ax
