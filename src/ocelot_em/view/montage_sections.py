"""Sections of the report about exposures, as data for its template."""

from collections import Counter
from typing import Any

import numpy as np

from ocelot_em.merge.result import MergedResult
from ocelot_em.model.maps import Float64
from ocelot_em.model.text import area_text, number_text, percent_text, shape_text
from ocelot_em.particles.quality import MIN_SHOWN
from ocelot_em.particles.table import EXPOSURE
from ocelot_em.view.coverage import Coverage
from ocelot_em.view.figures import has_names
from ocelot_em.view.montage_plots import (
    compared_partials,
    plot_exposures,
    plot_partials_of_exposures,
    plot_seams,
    seam_of,
)
from ocelot_em.view.page import Drawing, Table
from ocelot_em.view.report_data import ReportData

MAX_ROWS = 100
"""Maximum number of listed exposures or partials; there may be thousands."""


def montage_cards(merged: MergedResult, coverage: Coverage) -> list[tuple[str, str]]:
    """Return headline numbers, each with its label."""
    attributes = merged.attributes
    shape, size = attributes.valid_shape, attributes.pixel_size_angstrom
    covered, overlap = (
        percent_text(pixels / (shape[0] * shape[1]))
        for pixels in (coverage.covered_pixels, coverage.overlap_pixels)
    )
    counts = [exposure.total_projections for exposure in attributes.exposures]
    projections = " to ".join(f"{count:,}" for count in sorted({min(counts), max(counts)}))
    area = f", {area_text(shape, size)}" if size else ""
    return [
        (f"{len(counts):,}", "exposures"),
        (shape_text(shape), f"pixels of the canvas{area}"),
        (covered, f"of the canvas covered, {overlap} more than once"),
        (projections, "projections per pixel of an exposure"),
    ]


def montage_section(data: ReportData, coverage: Coverage) -> dict[str, object]:
    """Return the exposures of a montage: placement, seams, and a table."""
    merged, attributes = data.merged, data.merged.attributes
    exposures, n_exposures = data.summary.attributes.exposures, len(attributes.exposures)
    height, width = attributes.valid_shape
    is_wide = width > 2 * height
    across = 11.6 if is_wide else 5.4
    tall = float(np.clip((across - 1.4) * height / width, 1.2, 7.5))
    seams = np.array([seam_of(exposure) for exposure in exposures])
    n_compared = int(np.isfinite(seams).sum())
    named = has_names(n_exposures)
    is_beside = named or is_wide

    def draw_seams(figure: Any) -> None:
        if not n_compared:
            plot_seams(merged, figure.subplots())
            return
        ratios = {"width_ratios": (1.6, 1)} if is_beside else {"height_ratios": (1.4, 1)}
        means, differences = figure.subplots(*((1, 2) if is_beside else (2, 1)), **ratios)
        plot_seams(merged, means)
        plot_seams(merged, differences, value="difference")
        if named:
            differences.set_ylim(means.get_ylim())
            differences.tick_params(labelleft=False)

    seams_tall = float(np.clip(0.25 * n_exposures + 1.7, 2.4, 12.0))
    if not named:
        seams_tall = 3.2 if is_beside else 5.2
    return {
        "width": "full" if is_wide else "half",
        "coverage": Drawing.of(
            "coverage",
            (across, tall + 0.8),
            lambda figure: plot_exposures(merged, figure.subplots()),
        ),
        "pooling": coverage.factor,
        "seams": Drawing.of("seams", (across, seams_tall), draw_seams),
        "has_names": named,
        "is_beside": is_beside,
        "n_exposures": n_exposures,
        "n_compared": n_compared,
        "min_shown": MIN_SHOWN,
        "table": _exposure_table(data, seams),
        "first_pixel": attributes.canvas_origin if any(attributes.canvas_origin) else None,
    }


def _exposure_table(data: ReportData, seams: Float64) -> Table:
    particles, exposures = data.particles, data.summary.attributes.exposures
    found = Counter(particles.columns[EXPOSURE].tolist() if particles.is_of_montage else ())
    rows = []
    for k in _chosen_rows(np.abs(seams)):
        exposure, placed = exposures[k], data.merged.attributes.exposures[k]
        shown = exposure.shown_pixels
        rows.append(
            {
                "exposure": exposure.id,
                "acquired": f"{placed.acquired}",
                "origin (y, x)": f"{placed.origin[0]:,}, {placed.origin[1]:,}",
                "valid pixels": exposure.valid_pixels,
                "shown": shown,
                "in overlaps": percent_text(exposure.overlap.pixels / shown) if shown else "—",
                "projections": exposure.total_projections,
                "mean z alone": number_text(exposure.alone.mean, ".3f"),
                "mean z in overlaps": number_text(exposure.overlap.mean, ".3f"),
                "difference (std)": number_text(seams[k], ".2f"),
                "particles": found[exposure.id],
            }
        )
    return Table(rows, len(seams))


def montage_partials_section(data: ReportData) -> dict[str, object]:
    """Return the partials, compared within each exposure."""
    merged, statistics = data.merged, data.merged.statistics_of_exposures
    partials, named = compared_partials(merged), has_names(len(statistics))

    def draw(figure: Any) -> None:
        wins, stds = figure.subplots(*((1, 2) if named else (2, 1)))
        plot_partials_of_exposures(merged, wins, value="wins")
        plot_partials_of_exposures(merged, stds, value="rms")
        if named:
            stds.tick_params(labelleft=False)

    rows = []
    for k in _chosen_rows(np.array([own.deviation for own in partials])):
        own = partials[k]
        partial, source = own.partial, own.source
        projections = sum(p.total_projections for p in statistics[own.exposure].partials)
        rows.append(
            {
                "exposure": own.exposure,
                "partial": partial.name,
                "projections": partial.total_projections,
                "share": percent_text(partial.total_projections / max(projections, 1)),
                "pixels won": partial.won_pixels,
                "won / expected": number_text(own.won_ratio, ".2f"),
                "mean": number_text(source.mean, ".5f"),
                "spread of mean": number_text(source.mean_spread, ".5f"),
                "std": number_text(source.std, ".5f"),
                "rms / others": number_text(own.rms_ratio, ".3f"),
            }
        )
    is_comparable = any(np.isfinite([own.won_ratio, own.rms_ratio]).any() for own in partials)
    tall = float(np.clip(0.34 * len(statistics) + 1.3, 2.0, 12.0)) if named else 4.6
    return {
        "drawing": Drawing.of("partials-plot", (12.0, tall), draw) if is_comparable else None,
        "table": Table(rows, len(partials)),
    }


def _chosen_rows(interest: Float64) -> list[int]:
    """Return the rows to list: all in order, or the most interesting if there are too many."""
    if len(interest) <= MAX_ROWS:
        return list(range(len(interest)))
    order: list[int] = np.argsort(-np.nan_to_num(interest), kind="stable").tolist()
    return order[:MAX_ROWS]
