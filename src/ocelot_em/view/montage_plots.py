"""Plots of the exposures of a montage: placement, seams, partials.

Every plot takes a merged montage as ``store``, and matplotlib axes as ``ax``, by default those of a
new figure, and returns the axes. It raises InvalidInputError for a result of one exposure. No map
is read: all data come from the placement and the merge statistics.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ocelot_em.errors import InvalidInputError
from ocelot_em.merge.result import MergedResult
from ocelot_em.model.maps import AnyArray
from ocelot_em.model.regions import Region, ceil_div
from ocelot_em.particles.quality import (
    MIN_EXPECTED_WINS,
    MIN_PROJECTIONS,
    RMS_DIFFERENCE,
    SEAM,
    WIN_RATIO,
    difference_in_std,
    expected_wins,
    rms_deviations,
)
from ocelot_em.store import statistics_attributes as statistics
from ocelot_em.store.attributes import MergedExposure
from ocelot_em.view import figures
from ocelot_em.view.coverage import Coverage
from ocelot_em.view.figures import Store

if TYPE_CHECKING:
    from ocelot_em.view.figures import Axes

MAX_LABELS = 40
"""Maximum number of labelled exposures; more labels would hide the map."""

_LABEL_POINTS = 7.5
_LABEL: Any = {
    "fontsize": _LABEL_POINTS,
    "color": "white",
    "ha": "center",
    "va": "center",
    "parse_math": False,
    "bbox": {"facecolor": "black", "alpha": 0.6, "linewidth": 0, "pad": 1.2},
}
_RINGS = [0, 0, 1, 1, 0, 4], [2, 3, 3, 2, 2, 4]  # y and x among bounds and NaN
_MAX_SHADES = 12
_LEGEND_ROOM = 1.7


def _open_montage(store: Store, *, of_groups: bool = False) -> MergedResult:
    merged = MergedResult.open(store)
    attributes = merged.attributes
    if not (attributes.is_montage or (of_groups and attributes.group_by)):
        got = "groups" if attributes.group_by else "one exposure"
        raise InvalidInputError(f"{merged.url}: expected a montage, got a result of {got}")
    return merged


def plot_exposures(store: Store, ax: "Axes | None" = None) -> "Axes":
    """Draw how many exposures of a montage cover each pixel, and their outlines.

    Examples
    --------
    >>> from ocelot_em import plot_exposures
    >>> [text.get_text() for text in plot_exposures("MONTAGE.zarr").texts]
    ['00', '01']
    """
    attributes = _open_montage(store).attributes
    coverage, ax = Coverage.of(attributes), figures.axes_or_new(ax)
    (rows, columns), factor = coverage.most.shape, coverage.factor
    most = max(len(coverage.areas) - 1, 1)
    covered = np.where(coverage.most > 0, coverage.most, np.nan)
    extent = (0, columns * factor, rows * factor, 0)
    limits: Any = {"vmin": 0.5, "vmax": most + 0.5, "extent": extent}
    bar = figures.draw_image(ax, covered, "exposures", "viridis", **limits)
    if most <= _MAX_SHADES:
        bar.mappable.set_cmap(bar.cmap.resampled(most))
    bar.set_ticks(range(1, most + 1, ceil_div(most, _MAX_SHADES)))
    height, width = attributes.valid_shape
    ax.set(title="exposures per pixel", xlabel="x (pixels)", ylabel="y (pixels)")
    ax.set(xlim=(0, width), ylim=(height, 0))
    outline_exposures(ax, attributes.exposures)
    return ax


def outline_exposures(ax: "Axes", exposures: Sequence[MergedExposure]) -> None:
    """Draw thin outlines of exposures on the canvas, with their ids where there is room.

    At most :data:`MAX_LABELS` exposures are labelled.
    """
    # Around each exposure, and a gap before the next.
    bounds = [(*exposure.on_canvas.bounds, np.nan) for exposure in exposures]
    y, x = (np.array(bounds).reshape(-1, 5)[:, ring].ravel() for ring in _RINGS)
    many = len(exposures) > MAX_LABELS
    # Above the map, below particles.
    look: Any = {"alpha": 0.75, "zorder": 0.5, "scalex": False, "scaley": False}
    # White on black, to be visible on maps and on light and dark pages.
    for colour, thickness in (("black", 1.6), ("white", 0.7)):
        ax.plot(x, y, color=colour, linewidth=thickness / 2 if many else thickness, **look)
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
        for y, x in product(
            (own.y0 + edge, own.y1 - edge - height), (own.x0 + edge, own.x1 - edge - width)
        ):
            place = Region(y, y + height, x, x + width)
            if place.intersect(own) == place and not any(place.intersect(o).size for o in placed):
                placed.append(place)
                ax.text(x + width / 2, y + height / 2, exposure.id, **_LABEL)
                break


def plot_seams(
    store: Store, ax: "Axes | None" = None, *, value: Literal["mean", "difference"] = "mean"
) -> "Axes":
    """Draw the mean shown z-score of each exposure of a montage: alone, and in overlaps.

    ``mean``: both means, with the standard deviations of z-scores; many exposures are sorted by
    their mean. ``difference``: difference of the means in standard deviations, where enough pixels
    of both are shown. A seam is visible from about 0.25.

    Examples
    --------
    >>> from ocelot_em import plot_seams
    >>> plot_seams("MONTAGE.zarr", value="difference").figure.savefig("seams.png")
    """
    exposures, ax = _open_montage(store).summary.attributes.exposures, figures.axes_or_new(ax)
    draw = _draw_means if value == "mean" else _draw_differences
    draw(ax, exposures)
    return ax


def _draw_means(ax: "Axes", exposures: Sequence[statistics.ExposureStatistics]) -> None:
    # Unknown ones become NaN.
    alone, overlap = (
        np.array([(shown.mean, shown.std) for shown in kind], np.float64).reshape(-1, 2)
        for kind in ([e.alone for e in exposures], [e.overlap for e in exposures])
    )
    places, named = np.arange(len(exposures)), figures.has_names(len(exposures))
    # Exposures that are shown only in overlaps (NaN) come last.
    order = places if named else np.argsort(alone[:, 0], kind="stable")
    for numbers, label, colour, aside in (
        (alone, "alone", figures.BLUE, -0.14),
        (overlap, "in overlaps", figures.ORANGE, 0.14),
    ):
        mean, std = numbers[order].T
        look: Any = {"color": colour, "label": label}
        if named:
            ax.errorbar(mean, places + aside, None, std, "o", ms=5, elinewidth=1, **look)
            continue
        # The means that define the order are a line, on top of the other dots.
        is_line = label == "alone"
        ax.plot(places, mean, ".-" if is_line else ".", ms=3.5, lw=1.6, zorder=2 + is_line, **look)
        ax.fill_between(places, mean - std, mean + std, color=colour, alpha=0.18, linewidth=0)
    ax.set(title="z-scores shown in the montage")
    if named:
        figures.name_rows(
            ax, [exposure.id for exposure in exposures], "exposure", above=_LEGEND_ROOM
        )
        ax.set(xlabel="mean ± std")
    else:
        ax.set(xlabel="exposures, sorted by mean", ylabel="mean ± std", xlim=(-1, len(exposures)))
    ax.legend(loc="upper right" if named else "best", ncols=2 if named else 1)


def _draw_differences(ax: "Axes", exposures: Sequence[statistics.ExposureStatistics]) -> None:
    seams = np.array([seam_of(exposure) for exposure in exposures], np.float64)
    known = np.isfinite(seams)
    ax.set(title="overlaps minus alone", xlabel="difference of means (std)")
    widest = max(float(np.abs(seams[known]).max(initial=0)) * 1.15, 1.6 * SEAM)
    ax.set_xlim(-widest, widest)
    ax.axvspan(-SEAM, SEAM, color=figures.foreground(), alpha=0.08, linewidth=0)
    if figures.has_names(len(exposures)):
        places = np.arange(len(seams))
        _draw_dots(ax, seams[known], places[known], np.abs(seams[known]) > SEAM)
        figures.name_rows(
            ax, [exposure.id for exposure in exposures], "exposure", above=_LEGEND_ROOM
        )
    elif known.any():
        ax.hist(seams[known], np.linspace(-widest, widest, 41).tolist(), color=figures.BLUE)
        ax.set(ylabel="exposures")
        ax.locator_params(axis="y", integer=True)
    if not known.any():
        figures.explain_empty(ax, "too few pixels to compare")


def _draw_dots(
    ax: "Axes", x: AnyArray, y: AnyArray, is_unusual: AnyArray, usual_size: float = 5
) -> None:
    """Draw blue dots, and unusual ones in red on top."""
    usual, unusual = (~is_unusual, figures.BLUE, usual_size), (is_unusual, figures.RED, 5)
    for which, colour, size in (usual, unusual):
        ax.plot(x[which], y[which], "o", markersize=size, color=colour, alpha=0.85)


def seam_of(exposure: statistics.ExposureStatistics) -> float | None:
    """Return mean in overlaps minus mean alone, in standard deviations; None if pixels are few."""
    return difference_in_std(exposure.overlap, exposure.alone)


@dataclass(frozen=True)
class ComparedPartial:
    """A partial's wins and correlations, compared with those of its exposure's others."""

    exposure: str
    partial: statistics.PartialStatistics
    source: statistics.SourceStatistics
    share: float
    """Its share of the exposure's projections."""
    won_ratio: float
    """Won pixels / those expected from its share; NaN if there is nothing to compare."""
    is_won_unusual: bool
    rms_ratio: float
    """Root mean square of its correlations / that of its exposure's others; or NaN."""
    is_rms_unusual: bool
    """Whether this ratio gives a warning."""

    @property
    def deviation(self) -> float:
        """Deviation from the other partials, for sorting."""
        ratios = np.array([self.won_ratio, self.rms_ratio])
        known = np.maximum(ratios[np.isfinite(ratios)], 1e-6)
        return float(np.abs(np.log(known)).max(initial=0))


def compared_partials(store: Store) -> list[ComparedPartial]:
    """Return the partials of all exposures, or groups, compared within each."""
    found = []
    for exposure, own in _open_montage(store, of_groups=True).statistics_of_exposures.items():
        projections = max(sum(partial.projections for partial in own.partials), 1)
        # The sources of an exposure are its partials, because a montage is not merged again.
        wins, deviations = expected_wins(own.partials), rms_deviations(own.sources)
        for partial, source, expected, deviation in zip(
            own.partials, own.sources, wins, deviations, strict=True
        ):
            is_comparable = len(own.partials) > 1 and expected
            ratio = partial.won_pixels / expected if is_comparable else float("nan")
            is_certain = (
                expected >= MIN_EXPECTED_WINS and partial.total_projections >= MIN_PROJECTIONS
            )
            unusual = is_certain and (ratio > WIN_RATIO or ratio < 1 / WIN_RATIO)
            share = partial.projections / projections
            found.append(
                ComparedPartial(exposure, partial, source, share, ratio, unusual, *deviation)
            )
    return found


def plot_partials_of_exposures(
    store: Store, ax: "Axes | None" = None, *, value: Literal["wins", "rms"] = "wins"
) -> "Axes":
    """Draw the partials of a montage or of groups, compared within each exposure or group.

    ``wins``: won pixels / those expected from the partial's share of its exposure's projections.
    ``rms``: root mean square of its correlations / that of its exposure's others. Both are normally
    about 1; unusual partials are red. An exposure with one partial has nothing to compare.

    Examples
    --------
    >>> from ocelot_em import plot_partials_of_exposures
    >>> plot_partials_of_exposures("MONTAGE.zarr", value="rms").figure.savefig("rms.png")
    """
    merged, ax = _open_montage(store, of_groups=True), figures.axes_or_new(ax)
    part = merged.attributes.part
    partials, names = compared_partials(merged), list(merged.statistics_of_exposures)
    row_of = {name: row for row, name in enumerate(names)}
    places = np.array([row_of[partial.exposure] for partial in partials])
    if value == "wins":
        most, title, label = WIN_RATIO, "pixels won", "won / expected"
        found = [(partial.won_ratio, partial.is_won_unusual) for partial in partials]
    else:
        most, title, label = 1 + RMS_DIFFERENCE, "rms of correlations", "rms / others"
        found = [(partial.rms_ratio, partial.is_rms_unusual) for partial in partials]
    ratios, is_unusual = np.array(found).T
    known = ratios[np.isfinite(ratios)]
    low = min(float(known.min(initial=1)), 1 / most) - (most - 1) / 2
    high = max(float(known.max(initial=1)), most) + (most - 1) / 2
    named = figures.has_names(len(names))
    x, y = (ratios, places) if named else (places, ratios)
    _draw_dots(ax, x, y, is_unusual > 0, 5 if named else 2.5)
    mark, line = (ax.axvspan, ax.axvline) if named else (ax.axhspan, ax.axhline)
    mark(1 / most, most, color=figures.foreground(), alpha=0.08, linewidth=0)
    line(1, color=figures.foreground(), alpha=0.4, linewidth=0.8)
    if named:
        figures.name_rows(ax, names, part)
        ax.set(xlabel=label, xlim=(low, high))
    else:
        ax.set(xlabel=f"{part} number", ylabel=label, xlim=(-1, len(names)), ylim=(low, high))
    ax.set(title=title)
    if not known.size:
        figures.explain_empty(ax, "nothing to compare")
    return ax
