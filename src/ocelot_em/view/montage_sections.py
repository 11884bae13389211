"""Report sections about exposures."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from ocelot_em.model.maps import Float64
from ocelot_em.model.markup import Markup, captioned, element, join, length_text, percent, table
from ocelot_em.particles.quality import (
    MIN_SHOWN,
)
from ocelot_em.particles.table import EXPOSURE, ParticleTable
from ocelot_em.view.figures import (
    MAX_BARS,
    short_number,
)
from ocelot_em.view.montage import Coverage, Montage
from ocelot_em.view.montage_plots import (
    own_partials,
    plot_exposures,
    plot_partials_of_exposures,
    plot_seams,
    seam_of,
)

Draw = Callable[[str, tuple[float, float], Callable[[Any], object], str], Markup]
"""Adds a figure to a page: name, size in inches, function that draws it, text description."""

ROWS_SHOWN = 100
"""Maximum number of rows shown of a table; there may be thousands."""


def montage_cards(montage: Montage, coverage: Coverage) -> list[tuple[str, str]]:
    """Return headline numbers, each with its label."""
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
    """Show the exposures of a montage: placement, seams, and a table."""
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
    n_known = int(np.isfinite([seam_of(exposure) for exposure in montage.exposures]).sum())
    few = n <= MAX_BARS
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
            f"of {n:,} exposures that show {MIN_SHOWN:,} pixels or more of both kinds; beyond "
            "the grey band a seam can be seen."
        )
    else:
        told += f"No exposure shows {MIN_SHOWN:,} pixels of both kinds, to tell them apart."
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
    apart = np.array([seam_of(exposure) for exposure in montage.exposures])
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
                _decimals(short_number(exposure.alone.mean), 3),
                _decimals(short_number(exposure.overlap.mean), 3),
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
    """Show the partials, compared within each exposure."""
    partials = own_partials(montage)
    few = len(montage.of_exposures) <= MAX_BARS

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
                *(_decimals(short_number(v), 5) for v in (own.source.mean, own.source.mean_spread)),
                _decimals(short_number(own.source.std), 5),
                _decimals(own.std_ratio, 3),
            )
        )
    parts.append(element("div", table(header, rows), class_="scroll numbers"))
    if len(partials) > len(rows):
        more = f"Those most unlike the others, and {len(partials) - len(rows):,} more."
        parts.append(element("p", more, class_="caption"))
    return join(parts)


def _telling(interest: Float64) -> list[int]:
    """Return the rows to show: all in order, or the most interesting if there are too many."""
    if len(interest) <= ROWS_SHOWN:
        return list(range(len(interest)))
    order: list[int] = np.argsort(-np.nan_to_num(interest), kind="stable").tolist()
    return order[:ROWS_SHOWN]


def _decimals(value: float, n: int) -> str:
    return f"{value:.{n}f}" if np.isfinite(value) else "—"
