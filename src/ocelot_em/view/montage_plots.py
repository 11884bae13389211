"""Plots of the exposures of a montage: placement, seams, partials.

No map is read: all data come from the placement and the merge statistics.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from ocelot_em.errors import InvalidInputError
from ocelot_em.merge.stats.summary import Summary
from ocelot_em.model.maps import Float64
from ocelot_em.model.regions import Region, ceil_div
from ocelot_em.particles.quality import (
    MIN_EXPECTED_WINS,
    MIN_SHOWN,
    SEAM,
    STD_RATIO,
    WIN_RATIO,
)
from ocelot_em.store.attributes import MergedAttributes, MergedExposure
from ocelot_em.store.statistics_attributes import (
    ExposureStatistics,
    PartialStatistics,
    ShownStatistics,
    SourceStatistics,
)
from ocelot_em.view.figures import (
    MAX_BARS,
    Store,
    axes_or_new,
    foreground,
    name_rows,
    say,
    short_number,
    summary_of,
)
from ocelot_em.view.plots import BLUE, ORANGE, RED

if TYPE_CHECKING:
    from ocelot_em.view.plots import Axes
from ocelot_em.view.montage import Coverage, Montage, attributes_of

MAX_LABELS = 40
"""Maximum number of labelled exposures; more labels would hide the map."""

_LABEL_POINTS = 7.5
_MAX_SHADES = 12


def plot_exposures(store: Store | MergedAttributes, ax: "Axes | None" = None) -> "Axes":
    """Draw how many exposures of a montage cover each pixel, and their outlines.

    Parameters
    ----------
    store
        A merged result, or its attributes; no map is read.
    ax
        Axes to draw into; new ones by default.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    InvalidInputError
        The result is not a montage.
    """
    attributes = store if isinstance(store, MergedAttributes) else attributes_of(store)
    coverage, ax = Coverage.of(attributes), axes_or_new(ax)
    (rows, columns), factor = coverage.most.shape, coverage.factor
    most = max(len(coverage.areas) - 1, 1)
    image = ax.imshow(
        np.where(coverage.most > 0, coverage.most, np.nan),
        cmap="viridis",
        vmin=0.5,
        vmax=most + 0.5,
        extent=(0, columns * factor, rows * factor, 0),
        interpolation="none",
    )
    shades = image.get_cmap().with_extremes(bad=(0.5, 0.5, 0.5, 0.25))
    image.set_cmap(shades.resampled(most) if most <= _MAX_SHADES else shades)
    ticks = range(1, most + 1, ceil_div(most, _MAX_SHADES))
    ax.figure.colorbar(image, ax=ax, label="exposures", shrink=0.8, ticks=ticks)
    height, width = attributes.valid_shape
    ax.set(title="exposures that cover a pixel", xlabel="x (pixels)", ylabel="y (pixels)")
    ax.set(xlim=(0, width), ylim=(height, 0))
    outline_exposures(ax, attributes.exposures)
    return ax


def outline_exposures(ax: "Axes", exposures: Sequence[MergedExposure]) -> None:
    """Draw thin outlines of exposures on the canvas, with their ids where there is room.

    Parameters
    ----------
    ax
        Axes that show the canvas in pixels.
    exposures
        Exposures of a merged result, possibly none; labelled if at most :data:`MAX_LABELS`.
    """
    if not exposures:
        return
    regions = [exposure.on_canvas for exposure in exposures]
    y0, y1, x0, x1 = np.array([region.bounds for region in regions], float).reshape(-1, 4).T
    gap = np.full(len(regions), np.nan)
    x, y = (
        np.stack(corners, axis=1).ravel()
        for corners in ((x0, x1, x1, x0, x0, gap), (y0, y0, y1, y1, y0, gap))
    )
    many = len(regions) > MAX_LABELS
    # White on black, to be visible on maps and on light and dark pages.
    for colour, thickness in (("black", 1.6), ("white", 0.7)):
        ax.plot(
            x,
            y,
            color=colour,
            linewidth=thickness / 2 if many else thickness,
            alpha=0.75,
            scalex=False,
            scaley=False,
            solid_joinstyle="miter",
            zorder=0.5,  # above the map, below particles
        )
    if not many:
        _label(ax, exposures)


def _label(ax: "Axes", exposures: Sequence[MergedExposure]) -> None:
    """Write ids into corners of exposures where they fit and overlap no other id."""
    window, (left, right), (bottom, top) = ax.get_window_extent(), ax.get_xlim(), ax.get_ylim()
    dots = min(window.width / abs(right - left), window.height / abs(top - bottom))
    # Canvas pixels per point; 0.85 because the layout shrinks the axes later.
    per_point = ax.figure.dpi / 72 / max(dots, 1e-9) / 0.85
    placed: list[Region] = []
    for exposure in exposures:
        own, edge = exposure.on_canvas, int(3 * per_point) + 1
        height = int(1.5 * _LABEL_POINTS * per_point) + 1
        width = int((0.62 * len(exposure.id) + 0.5) * _LABEL_POINTS * per_point) + 1
        corners = (
            (y, x)
            for y in (own.y0 + edge, own.y1 - edge - height)
            for x in (own.x0 + edge, own.x1 - edge - width)
        )
        for y, x in corners:
            place = Region(y, y + height, x, x + width)
            inside = place.intersect(own) == place
            if inside and not any(place.intersect(other).size for other in placed):
                placed.append(place)
                ax.text(
                    x + width / 2,
                    y + height / 2,
                    exposure.id,
                    fontsize=_LABEL_POINTS,
                    color="white",
                    ha="center",
                    va="center",
                    parse_math=False,
                    bbox={"facecolor": "black", "alpha": 0.6, "linewidth": 0, "pad": 1.2},
                )
                break


def plot_seams(
    store: Store | Summary,
    ax: "Axes | None" = None,
    *,
    value: Literal["mean", "difference"] = "mean",
) -> "Axes":
    """Draw the mean shown z-score of each exposure of a montage: alone, and in overlaps.

    Parameters
    ----------
    store
        A merged result, or its summary; maps are not read.
    ax
        Axes to draw into; new ones by default.
    value
        ``mean``: both means, with the standard deviations of z-scores; many exposures are sorted
        by their mean. ``difference``: difference of the means in standard deviations, where enough
        pixels of both are shown. A seam is visible from about 0.25.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    InvalidInputError
        The result is not a montage.
    """
    exposures, ax = summary_of(store).attributes.exposures, axes_or_new(ax)
    if not exposures:
        raise InvalidInputError("store: expected a montage, got a result of one exposure")
    few = len(exposures) <= MAX_BARS
    if value == "difference":
        _draw_differences(ax, exposures, few=few)
        return ax
    kinds = (
        ("alone", _shown(e.alone for e in exposures), BLUE, -0.14),
        ("in overlaps", _shown(e.overlap for e in exposures), ORANGE, 0.14),
    )
    places = np.arange(len(exposures))
    # Exposures that are shown only in overlaps (NaN) come last.
    order = places if few else np.argsort(kinds[0][1][:, 0], kind="stable")
    for label, numbers, colour, aside in kinds:
        mean, std = numbers[order].T
        if few:
            ax.errorbar(
                mean,
                places + aside,
                xerr=std,
                fmt="o",
                markersize=5,
                elinewidth=1,
                color=colour,
                label=label,
            )
            continue
        # The means that define the order are a line, on top of the other dots.
        look = (
            {"linewidth": 1.6, "zorder": 3} if label == "alone" else {"linestyle": "", "zorder": 2}
        )
        ax.plot(places, mean, marker=".", markersize=3.5, color=colour, label=label, **look)
        ax.fill_between(places, mean - std, mean + std, color=colour, alpha=0.18, linewidth=0)
    if few:
        name_rows(ax, [exposure.id for exposure in exposures])
        ax.set(xlabel="mean ± std")
    else:
        ax.set(xlabel="exposures, by their mean", ylabel="mean ± std", xlim=(-1, len(exposures)))
    ax.set(title="shown z-scores")
    if few:
        bottom, top = ax.get_ylim()
        ax.set_ylim(bottom, top - 1.1)  # room for the legend
    ax.legend(loc="upper right" if few else "best", ncols=2 if few else 1)
    return ax


def _draw_differences(ax: "Axes", exposures: Sequence[ExposureStatistics], *, few: bool) -> None:
    apart = np.array([seam_of(exposure) for exposure in exposures])
    known = np.isfinite(apart)
    ax.set(title="overlaps less alone", xlabel="difference / std")
    widest = max(float(np.abs(apart[known]).max(initial=0)) * 1.15, 1.6 * SEAM)
    ax.set_xlim(-widest, widest)
    ax.axvspan(-SEAM, SEAM, color=foreground(), alpha=0.08, linewidth=0)
    if few:
        seen = known & (np.abs(apart) > SEAM)
        for which, colour in ((known & ~seen, BLUE), (seen, RED)):
            ax.plot(apart[which], np.flatnonzero(which), "o", markersize=6, color=colour)
        name_rows(ax, [exposure.id for exposure in exposures])
    elif known.any():
        ax.hist(apart[known], np.linspace(-widest, widest, 41).tolist(), color=BLUE)
        ax.set(ylabel="exposures")
        ax.locator_params(axis="y", integer=True)
    if not known.any():
        say(ax, "too few pixels to tell")


def seam_of(exposure: ExposureStatistics) -> float:
    """Return mean in overlaps minus mean alone, in standard deviations; NaN if pixels are few."""
    alone, overlap = exposure.alone, exposure.overlap
    if min(alone.pixels, overlap.pixels) < MIN_SHOWN or not alone.std:
        return float("nan")
    return (short_number(overlap.mean) - short_number(alone.mean)) / alone.std


def _shown(statistics: Iterator[ShownStatistics]) -> Float64:
    """Return (n, 2) means and standard deviations; NaN where nothing is shown."""
    rows = [(short_number(shown.mean), short_number(shown.std)) for shown in statistics]
    return np.array(rows, np.float64).reshape(-1, 2)


@dataclass(frozen=True)
class OwnPartial:
    """A partial, compared with the others of its exposure."""

    place: int
    exposure: str
    partial: PartialStatistics
    source: SourceStatistics
    expected_pixels: float
    won_ratio: float
    """Won pixels / those expected from its projections; NaN if there is nothing to compare."""
    std_ratio: float
    """Standard deviation of its correlations / median of its exposure's; or NaN."""

    @property
    def is_out_of_line(self) -> bool:
        """Whether :mod:`ocelot_em.particles.quality` warns about it."""
        wins = self.expected_pixels >= MIN_EXPECTED_WINS and _beyond(self.won_ratio, WIN_RATIO)
        return wins or _beyond(self.std_ratio, STD_RATIO)

    @property
    def unusual(self) -> float:
        """Deviation from the other partials, for sorting."""
        ratios = np.array([self.won_ratio, self.std_ratio])
        known = np.maximum(ratios[np.isfinite(ratios)], 1e-6)
        return float(np.abs(np.log(known)).max(initial=0))


def _beyond(ratio: float, most: float) -> bool:
    return bool(np.isfinite(ratio)) and not 1 / most <= ratio <= most


def own_partials(montage: Montage) -> list[OwnPartial]:
    """Return the partials of all exposures, compared within each exposure."""
    found = []
    for place, (exposure, own) in enumerate(montage.of_exposures.items()):
        won = sum(partial.won_pixels for partial in own.partials)
        projections = sum(partial.total_projections for partial in own.partials)
        stds = np.array([short_number(source.std) for source in own.sources])
        usual = float(np.median(stds[np.isfinite(stds)])) if np.isfinite(stds).any() else 0.0
        several = len(own.partials) > 1
        # The sources of an exposure are its partials, because a montage is not merged again.
        for partial, source in zip(own.partials, own.sources, strict=True):
            expected = won * partial.total_projections / projections if projections else 0.0
            found.append(
                OwnPartial(
                    place,
                    exposure,
                    partial,
                    source,
                    expected,
                    partial.won_pixels / expected if several and expected else float("nan"),
                    short_number(source.std) / usual if several and usual else float("nan"),
                )
            )
    return found


def plot_partials_of_exposures(
    store: Store | Montage,
    ax: "Axes | None" = None,
    *,
    value: Literal["wins", "std"] = "wins",
) -> "Axes":
    """Draw the partials of a montage, compared within each exposure.

    Parameters
    ----------
    store
        A merged montage, or its :class:`ocelot_em.view.montage.Montage`; maps are not read.
    ax
        Axes to draw into; new ones by default.
    value
        ``wins``: won pixels / those expected from the partial's share of its exposure's
        projections. ``std``: standard deviation of its correlations / median of its exposure's.
        Both are normally about 1; unusual partials are red. An exposure with one partial has
        nothing to compare.

    Returns
    -------
    matplotlib.axes.Axes
    """
    montage = store if isinstance(store, Montage) else Montage.read(store)
    ax = axes_or_new(ax)
    partials = own_partials(montage)
    most = WIN_RATIO if value == "wins" else STD_RATIO
    ratios = np.array([p.won_ratio if value == "wins" else p.std_ratio for p in partials])
    places = np.array([p.place for p in partials])
    bad = np.array(
        [
            _beyond(ratio, most) and p.is_out_of_line
            for ratio, p in zip(ratios, partials, strict=True)
        ]
    )
    names = list(montage.of_exposures)
    few = len(names) <= MAX_BARS
    mark, line = (ax.axvspan, ax.axvline) if few else (ax.axhspan, ax.axhline)
    mark(1 / most, most, color=foreground(), alpha=0.08, linewidth=0)
    line(1, color=foreground(), alpha=0.4, linewidth=0.8)
    for which, colour in ((~bad, BLUE), (bad, RED)):
        along, across = (ratios[which], places[which]) if few else (places[which], ratios[which])
        size = 5 if few or colour == RED else 2.5
        ax.plot(along, across, "o", markersize=size, color=colour, alpha=0.85)
    what = "pixels won / expected" if value == "wins" else "std / median"
    ax.set(title="pixels won" if value == "wins" else "own correlations: std")
    known = ratios[np.isfinite(ratios)]
    low = min(float(known.min(initial=1)), 1 / most) - (most - 1) / 2
    high = max(float(known.max(initial=1)), most) + (most - 1) / 2
    if few:
        name_rows(ax, names)
        ax.set(xlabel=what, xlim=(low, high))
    else:
        ax.set(xlabel="exposure", ylabel=what, xlim=(-1, len(names)), ylim=(low, high))
    if not known.size:
        say(ax, "nothing to compare")
    return ax
