"""Sections of the report of a montage: figures and values for its template."""

from collections import Counter
from typing import Any

import numpy as np

from ocelot_em.model.maps import Float64
from ocelot_em.particles.quality import MIN_SHOWN
from ocelot_em.particles.table import EXPOSURE
from ocelot_em.view.figures import has_names, rows_height
from ocelot_em.view.montage_plots import (
    compared_partials,
    plot_exposures,
    plot_partials_of_exposures,
    plot_seams,
    seam_of,
)
from ocelot_em.view.page import Drawing
from ocelot_em.view.report_data import ReportData

MAX_ROWS = 100
"""Maximum number of listed exposures or partials; there may be thousands."""


def montage_section(data: ReportData) -> dict[str, object]:
    """Return the placement of the exposures, their seams, and the rows of their table."""
    merged, attributes = data.merged, data.merged.attributes
    exposures, particles = data.summary.attributes.exposures, data.particles
    found = Counter(particles.columns[EXPOSURE].tolist() if particles.is_of_montage else ())
    height, width = attributes.valid_shape
    is_wide = width > 2 * height
    across = 11.6 if is_wide else 5.4
    tall = float(np.clip((across - 1.4) * height / width, 1.2, 7.5))
    seams = np.array([seam_of(exposure) for exposure in exposures])
    n_compared = int(np.isfinite(seams).sum())
    named = has_names(len(exposures))
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

    seams_tall = float(np.clip(0.25 * len(exposures) + 1.7, 2.4, 12.0))
    if not named:
        seams_tall = 3.2 if is_beside else 5.2
    return {
        "width": "full" if is_wide else "half",
        "coverage": Drawing.of(
            "coverage",
            (across, tall + 0.8),
            lambda figure: plot_exposures(merged, figure.subplots()),
        ),
        "seams": Drawing.of("seams", (across, seams_tall), draw_seams),
        "has_names": named,
        "is_beside": is_beside,
        "n_compared": n_compared,
        "min_shown": MIN_SHOWN,
        "rows": [
            (exposures[k], attributes.exposures[k], seams[k], found[exposures[k].id])
            for k in _chosen_rows(np.abs(seams))
        ],
    }


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

    is_comparable = any(np.isfinite([own.won_ratio, own.rms_ratio]).any() for own in partials)
    tall = rows_height(len(statistics))
    return {
        "drawing": Drawing.of("partials-plot", (12.0, tall), draw) if is_comparable else None,
        "rows": [partials[k] for k in _chosen_rows(np.array([own.deviation for own in partials]))],
    }


def _chosen_rows(interest: Float64) -> list[int]:
    """Return the rows to list: all in order, or the most interesting if there are too many."""
    if len(interest) <= MAX_ROWS:
        return list(range(len(interest)))
    order: list[int] = np.argsort(-np.nan_to_num(interest), kind="stable").tolist()
    return order[:MAX_ROWS]
