"""Exposures of a montage in pictures and tables: where they lie, their seams, their partials.

Nothing here reads a map: geometry and what the merge has counted tell it all.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ocelot_em.errors import InvalidInputError
from ocelot_em.merge.stats.records import Summary, open_merged_result, read_exposure_statistics
from ocelot_em.model.maps import Float64, Int64
from ocelot_em.model.markup import Markup, captioned, element, join, length_text, percent, table
from ocelot_em.model.regions import Region, ceil_div
from ocelot_em.particles.quality import (
    FEWEST_EXPECTED_WINS,
    FEWEST_SHOWN,
    SEAM,
    STD_RATIO,
    WIN_RATIO,
)
from ocelot_em.particles.table import EXPOSURE, ParticleTable
from ocelot_em.store.attributes import (
    ExposureStatistics,
    MergedAttributes,
    MergedExposure,
    PartialStatistics,
    ShownStatistics,
    SourceStatistics,
    StatisticsAttributes,
)
from ocelot_em.store.objects import open_objects
from ocelot_em.view.plots import (
    BLUE,
    MOST_BARS,
    ORANGE,
    OVERVIEW_PX,
    RED,
    Store,
    axes_or_new,
    foreground,
    name_rows,
    say,
    summary_of,
)

if TYPE_CHECKING:
    from ocelot_em.view.plots import Axes

Draw = Callable[[str, tuple[float, float], Callable[[Any], object], str], Markup]
"""Puts a picture on a page: its name there, size in inches, what draws into a figure, and what it
shows in words."""

MOST_LABELS = 40
"""Exposures that are labelled; with more, nothing else is seen."""

ROWS_SHOWN = 100
"""Rows of a table, of which there may be thousands."""

_LABEL_POINTS = 7.5
_MOST_SHADES = 12


@dataclass(frozen=True)
class Montage:
    """What is known of the exposures of a merged result.

    Parameters
    ----------
    attributes
        Of the result: where exposures lie.
    summary
        Of all exposures together.
    of_exposures
        What was counted of each, by their ids.
    """

    attributes: MergedAttributes
    summary: Summary
    of_exposures: Mapping[str, StatisticsAttributes]

    @classmethod
    def read(cls, store: Store) -> "Montage":
        """Read it.

        Raises
        ------
        StoreNotFoundError, FormatError, IncompleteError
            It is not a finished merged result, or was merged without statistics.
        InvalidInputError
            It is not a montage.
        """
        attributes, summary = _attributes_of(store), summary_of(store)
        return cls(attributes, summary, read_exposure_statistics(store, summary.attributes))

    @property
    def exposures(self) -> tuple[ExposureStatistics, ...]:
        """What was counted of each, and what is shown of it."""
        return self.summary.attributes.exposures


def _attributes_of(store: Store) -> MergedAttributes:
    objects = open_objects(store)
    attributes = open_merged_result(objects)
    if not attributes.exposures:
        raise InvalidInputError(f"{objects.url}: expected a montage, got a result of one exposure")
    return attributes


@dataclass(frozen=True)
class Coverage:
    """How many exposures cover the pixels of a canvas.

    Parameters
    ----------
    most
        (y, x) int64: the highest number in each block of pixels.
    factor
        Edge of the blocks in pixels.
    areas
        Pixels by number of exposures, from those that none covers.
    """

    most: Int64
    factor: int
    areas: tuple[int, ...]

    @classmethod
    def of(cls, attributes: MergedAttributes, longest_edge_px: int = OVERVIEW_PX) -> "Coverage":
        """Count, exactly, from where the exposures lie.

        Lines along all edges cut the canvas into cells in which all pixels have one number. Rows of
        cells are counted one after another, so that memory grows with a row.
        """
        height, width = attributes.valid_shape
        factor = ceil_div(max(height, width), longest_edge_px)
        bounds = np.array([e.on_canvas.bounds for e in attributes.exposures], np.int64)
        y0, y1, x0, x1 = bounds.reshape(-1, 4).clip(0, [height, height, width, width]).T
        # Edges of blocks are lines, too, so that a cell lies in one block.
        rows = np.unique(np.concatenate([y0, y1, np.arange(0, height, factor), [height]]))
        columns = np.unique(np.concatenate([x0, x1, np.arange(0, width, factor), [width]]))
        first_of_block = np.searchsorted(columns, np.arange(0, width, factor))
        widths = np.diff(columns)
        begins, ends = (np.searchsorted(columns, x) for x in (x0, x1))
        first, last = (np.searchsorted(rows, y) for y in (y0, y1))
        opening, closing = np.argsort(first, kind="stable"), np.argsort(last, kind="stable")
        n_open = np.searchsorted(first[opening], np.arange(len(rows)), side="right")
        n_closed = np.searchsorted(last[closing], np.arange(len(rows)), side="right")
        most = np.zeros((ceil_div(height, factor), ceil_div(width, factor)), np.int64)
        areas: Counter[int] = Counter()
        steps = np.zeros(len(columns), np.int64)
        opened = closed = 0
        for row, (top, bottom) in enumerate(pairwise(rows.tolist())):
            new, old = opening[opened : n_open[row]], closing[closed : n_closed[row]]
            opened, closed = n_open[row], n_closed[row]
            for change, exposures in ((1, new), (-1, old)):
                np.add.at(steps, begins[exposures], change)
                np.add.at(steps, ends[exposures], -change)
            covers = np.cumsum(steps)[:-1]
            for number, pixels in enumerate(np.bincount(covers, widths).tolist()):
                areas[number] += int(pixels) * (bottom - top)
            into = most[top // factor]
            np.maximum(into, np.maximum.reduceat(covers, first_of_block), out=into)
        highest = max((number for number, pixels in areas.items() if pixels), default=0)
        return cls(most, factor, tuple(areas[number] for number in range(highest + 1)))

    @property
    def covered_pixels(self) -> int:
        """Those that at least one exposure covers."""
        return sum(self.areas[1:])

    @property
    def overlap_pixels(self) -> int:
        """Those that several cover."""
        return sum(self.areas[2:])


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
        It is not a montage.
    """
    attributes = store if isinstance(store, MergedAttributes) else _attributes_of(store)
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
    image.set_cmap(shades.resampled(most) if most <= _MOST_SHADES else shades)
    ticks = range(1, most + 1, ceil_div(most, _MOST_SHADES))
    ax.figure.colorbar(image, ax=ax, label="exposures", shrink=0.8, ticks=ticks)
    height, width = attributes.valid_shape
    ax.set(title="exposures that cover a pixel", xlabel="x (pixels)", ylabel="y (pixels)")
    ax.set(xlim=(0, width), ylim=(height, 0))
    outline_exposures(ax, attributes.exposures)
    return ax


def outline_exposures(ax: "Axes", exposures: Sequence[MergedExposure]) -> None:
    """Draw thin lines around what was taken of exposures, with their ids where there is room.

    Parameters
    ----------
    ax
        Axes that show the canvas, in pixels.
    exposures
        Of a merged result, if it has any; labelled if they are at most :data:`MOST_LABELS`.
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
    many = len(regions) > MOST_LABELS
    # Light on dark, so that they are seen on maps and on both kinds of pages.
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
    """Write ids into corners of exposures, where they fit and meet no other."""
    window, (left, right), (bottom, top) = ax.get_window_extent(), ax.get_xlim(), ax.get_ylim()
    dots = min(window.width / abs(right - left), window.height / abs(top - bottom))
    # Pixels of the canvas in a point; layouts take a part of the axes later.
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
    """Draw the mean z-score that a montage shows of each exposure: alone, and in overlaps.

    Parameters
    ----------
    store
        A merged result, or its summary; maps are not read.
    ax
        Axes to draw into; new ones by default.
    value
        ``mean``: both means, and the standard deviations of z-scores. Of many exposures, in the
        order of their means. ``difference``: how many standard deviations they are apart, where
        enough pixels of both are shown to tell. From about 0.25 on a seam can be seen.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    InvalidInputError
        It is not a montage.
    """
    exposures, ax = summary_of(store).attributes.exposures, axes_or_new(ax)
    if not exposures:
        raise InvalidInputError("store: expected a montage, got a result of one exposure")
    few = len(exposures) <= MOST_BARS
    if value == "difference":
        _draw_differences(ax, exposures, few=few)
        return ax
    kinds = (
        ("alone", _shown(e.alone for e in exposures), BLUE, -0.14),
        ("in overlaps", _shown(e.overlap for e in exposures), ORANGE, 0.14),
    )
    places = np.arange(len(exposures))
    # Those of which nothing is shown alone come last.
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
        # The line of those in whose order they are, on top of the others' dots.
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
    apart = np.array([_apart(exposure) for exposure in exposures])
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


def _apart(exposure: ExposureStatistics) -> float:
    """Standard deviations between the mean in overlaps and that alone; NaN if few pixels tell."""
    alone, overlap = exposure.alone, exposure.overlap
    if min(alone.pixels, overlap.pixels) < FEWEST_SHOWN or not alone.std:
        return float("nan")
    return (_number(overlap.mean) - _number(alone.mean)) / alone.std


def _shown(statistics: Iterator[ShownStatistics]) -> Float64:
    """(n, 2) means and standard deviations; NaN where nothing is shown."""
    rows = [(_number(shown.mean), _number(shown.std)) for shown in statistics]
    return np.array(rows, np.float64).reshape(-1, 2)


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


@dataclass(frozen=True)
class _OwnPartial:
    """A partial among those of its exposure."""

    place: int
    exposure: str
    partial: PartialStatistics
    source: SourceStatistics
    expected_pixels: float
    won_ratio: float
    """Pixels won, of those that its projections let expect; NaN if it has no others beside it."""
    std_ratio: float
    """Standard deviation of its correlations, of the median of the exposure's; or NaN."""

    @property
    def is_out_of_line(self) -> bool:
        """As :mod:`ocelot_em.particles.quality` says it in words."""
        wins = self.expected_pixels >= FEWEST_EXPECTED_WINS and _beyond(self.won_ratio, WIN_RATIO)
        return wins or _beyond(self.std_ratio, STD_RATIO)

    @property
    def unusual(self) -> float:
        """How far it is from the others, for sorting."""
        ratios = np.array([self.won_ratio, self.std_ratio])
        known = np.maximum(ratios[np.isfinite(ratios)], 1e-6)
        return float(np.abs(np.log(known)).max(initial=0))


def _beyond(ratio: float, most: float) -> bool:
    return bool(np.isfinite(ratio)) and not 1 / most <= ratio <= most


def _own_partials(montage: Montage) -> list[_OwnPartial]:
    found = []
    for place, (exposure, own) in enumerate(montage.of_exposures.items()):
        won = sum(partial.won_pixels for partial in own.partials)
        projections = sum(partial.total_projections for partial in own.partials)
        stds = np.array([_number(source.std) for source in own.sources])
        usual = float(np.median(stds[np.isfinite(stds)])) if np.isfinite(stds).any() else 0.0
        several = len(own.partials) > 1
        # The sources of an exposure are its partials, because a montage is not merged again.
        for partial, source in zip(own.partials, own.sources, strict=True):
            expected = won * partial.total_projections / projections if projections else 0.0
            found.append(
                _OwnPartial(
                    place,
                    exposure,
                    partial,
                    source,
                    expected,
                    partial.won_pixels / expected if several and expected else float("nan"),
                    _number(source.std) / usual if several and usual else float("nan"),
                )
            )
    return found


def plot_partials_of_exposures(
    store: Store | Montage,
    ax: "Axes | None" = None,
    *,
    value: Literal["wins", "std"] = "wins",
) -> "Axes":
    """Draw the partials of each exposure of a montage, compared among themselves.

    Parameters
    ----------
    store
        A merged result, or what is known of its exposures; maps are not read.
    ax
        Axes to draw into; new ones by default.
    value
        ``wins``: pixels that each won, over those that its share of the exposure's projections lets
        expect. ``std``: standard deviation of its correlations, over the median of the exposure's.
        Both are about 1 for healthy partials; those out of line are red. An exposure with one
        partial has nothing to compare.

    Returns
    -------
    matplotlib.axes.Axes
    """
    montage = store if isinstance(store, Montage) else Montage.read(store)
    ax = axes_or_new(ax)
    partials = _own_partials(montage)
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
    few = len(names) <= MOST_BARS
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


def montage_cards(montage: Montage, coverage: Coverage) -> list[tuple[str, str]]:
    """Numbers for the head of a page, each with what it is."""
    attributes = montage.attributes
    height, width = attributes.valid_shape
    size, pixels = attributes.pixel_size_angstrom, height * width
    counts = [exposure.total_projections for exposure in montage.exposures]
    lowest, highest = (f"{count:,}" for count in (min(counts), max(counts)))
    several = percent(coverage.overlap_pixels / pixels)
    area = "" if size is None else f", {length_text(height * size, width * size)}"
    return [
        (f"{len(montage.exposures):,}", "exposures"),
        (f"{height:,} × {width:,}", f"pixels of the canvas{area}"),
        (percent(coverage.covered_pixels / pixels), f"of it covered, {several} more than once"),
        (
            lowest if lowest == highest else f"{lowest} to {highest}",
            "projections per pixel of an exposure",
        ),
    ]


def montage_section(
    montage: Montage, particles: ParticleTable, coverage: Coverage, draw: Draw
) -> Markup:
    """Tell of the exposures of a montage: where they lie, their seams, and a table."""
    height, width = montage.attributes.valid_shape
    wide = width > 2 * height
    across = 11.6 if wide else 5.4
    drawn = draw(
        "coverage",
        (across, float(np.clip((across - 1.4) * height / width, 1.2, 7.5)) + 0.8),
        lambda page: plot_exposures(montage.attributes, page.subplots()),
        "how many exposures cover each pixel",
    )
    told = "From where the exposures lie; what was left out of them does not count."
    if coverage.factor > 1:
        block = f"{coverage.factor} × {coverage.factor}"
        told += f" A pixel of this picture is the highest number of {block}."
    covered = captioned(drawn, told, "full" if wide else "half")
    pictures = element("div", covered, _seams(montage, draw, wide=wide), class_="row")
    return join([pictures, _exposure_table(montage, particles)])


def _seams(montage: Montage, draw: Draw, *, wide: bool) -> Markup:
    n = len(montage.exposures)
    n_known = int(np.isfinite([_apart(exposure) for exposure in montage.exposures]).sum())
    few = n <= MOST_BARS
    beside = few or wide

    def paint(page: Any) -> None:
        if not n_known:
            plot_seams(montage.summary, page.subplots())
            return
        ratios = {"width_ratios": (1.6, 1)} if beside else {"height_ratios": (1.4, 1)}
        means, differences = page.subplots(*((1, 2) if beside else (2, 1)), **ratios)
        plot_seams(montage.summary, means)
        plot_seams(montage.summary, differences, value="difference")
        if few:
            differences.set_ylim(means.get_ylim())
            differences.tick_params(labelleft=False)

    tall = float(np.clip(0.25 * n + 1.7, 2.4, 12.0)) if few else 3.2 if beside else 5.2
    drawn = draw("seams", (11.6 if wide else 5.4, tall), paint, "z-scores of exposures")
    told = (
        "z-scores that the montage shows of each exposure, where it is alone and where others "
        f"lie, too: means, with standard deviations as {'bars' if few else 'bands'}. "
    )
    if n_known:
        told += (
            f"{'Right' if beside else 'Below'}: how far both means are apart, for the {n_known:,} "
            f"of {n:,} exposures that show {FEWEST_SHOWN:,} pixels or more of both kinds; beyond "
            "the grey band a seam can be seen."
        )
    else:
        told += f"No exposure shows {FEWEST_SHOWN:,} pixels of both kinds, to tell them apart."
    return captioned(drawn, told, "full" if wide else "half")


def _exposure_table(montage: Montage, particles: ParticleTable) -> Markup:
    header = (
        "exposure",
        "acquired",
        "origin (y, x)",
        "valid pixels",
        "shown",
        "of it in overlaps",
        "projections",
        "mean z alone",
        "mean z in overlaps",
        "apart (std)",
        "particles",
    )
    found = Counter(particles.columns[EXPOSURE].tolist() if particles.is_of_montage else ())
    apart = np.array([_apart(exposure) for exposure in montage.exposures])
    rows = []
    for k in _telling(np.abs(apart)):
        exposure, lies = montage.exposures[k], montage.attributes.exposures[k]
        shown = exposure.shown_pixels
        rows.append(
            (
                exposure.id,
                f"{lies.acquired:d}",
                f"{lies.origin[0]:,}, {lies.origin[1]:,}",
                f"{exposure.valid_pixels:,}",
                f"{shown:,}",
                percent(exposure.overlap.pixels / shown) if shown else "—",
                f"{exposure.total_projections:,}",
                _decimals(_number(exposure.alone.mean), 3),
                _decimals(_number(exposure.overlap.mean), 3),
                _decimals(float(apart[k]), 2),
                f"{found[exposure.id]:,}",
            )
        )
    told = "Origins are pixels of the canvas."
    if any(montage.attributes.canvas_origin):
        first = ", ".join(f"{position:,}" for position in montage.attributes.canvas_origin)
        told = f"Origins are pixels of the canvas, whose first pixel is ({first}) of the search."
    if len(apart) > len(rows):
        told = f"Those with the largest differences, and {len(apart) - len(rows):,} more. {told}"
    numbers = element("div", table(header, rows), class_="scroll numbers")
    return join([numbers, element("p", told, class_="caption")])


def partials_of_exposures_section(montage: Montage, draw: Draw) -> Markup:
    """Tell of partials, each among those of its exposure."""
    partials = _own_partials(montage)
    few = len(montage.of_exposures) <= MOST_BARS

    def paint(page: Any) -> None:
        wins, stds = page.subplots(*((1, 2) if few else (2, 1)))
        plot_partials_of_exposures(montage, wins, value="wins")
        plot_partials_of_exposures(montage, stds, value="std")
        if few:
            stds.tick_params(labelleft=False)

    parts = []
    if any(np.isfinite(own.won_ratio) or np.isfinite(own.std_ratio) for own in partials):
        tall = float(np.clip(0.34 * len(montage.of_exposures) + 1.3, 2.0, 12.0)) if few else 4.6
        drawn = draw("partials-plot", (12.0, tall), paint, "health of the partial results")
        told = (
            "A dot is a partial, compared with the others of its exposure only. It should win the "
            "share of the exposure's pixels that it has of its projections, about, and the "
            "standard deviations of correlations should agree. Red ones are out of line."
        )
        parts.append(captioned(drawn, told, "full"))
    else:
        alone = "No exposure has several partials that could be compared with each other."
        parts.append(element("p", alone, class_="caption"))
    header = (
        "exposure",
        "partial",
        "projections",
        "share of them",
        "pixels won",
        "won / expected",
        "mean",
        "its spread",
        "std",
        "std / median",
    )
    rows = []
    for k in _telling(np.array([own.unusual for own in partials])):
        own = partials[k]
        statistics = montage.of_exposures[own.exposure]
        projections = max(sum(p.total_projections for p in statistics.partials), 1)
        rows.append(
            (
                own.exposure,
                own.partial.name,
                f"{own.partial.total_projections:,}",
                percent(own.partial.total_projections / projections),
                f"{own.partial.won_pixels:,}",
                _decimals(own.won_ratio, 2),
                *(_decimals(_number(v), 5) for v in (own.source.mean, own.source.mean_spread)),
                _decimals(_number(own.source.std), 5),
                _decimals(own.std_ratio, 3),
            )
        )
    parts.append(element("div", table(header, rows), class_="scroll numbers"))
    if len(partials) > len(rows):
        more = f"Those most unlike the others, and {len(partials) - len(rows):,} more."
        parts.append(element("p", more, class_="caption"))
    return join(parts)


def _telling(interest: Float64) -> list[int]:
    """Which rows are shown: all in their order, or the most interesting of too many."""
    if len(interest) <= ROWS_SHOWN:
        return list(range(len(interest)))
    order: list[int] = np.argsort(-np.nan_to_num(interest), kind="stable").tolist()
    return order[:ROWS_SHOWN]


def _decimals(value: float, n: int) -> str:
    return f"{value:.{n}f}" if np.isfinite(value) else "—"
