"""Sections of the report: figures and values for its template."""

import functools
from collections.abc import Callable
from datetime import datetime
from typing import Any

import numpy as np

from ocelot_em.merge.outcome import SUMMARY_FIELDS, TileSummary
from ocelot_em.model.maps import AnyArray, Float32
from ocelot_em.model.regions import ceil_div
from ocelot_em.model.text import count_text, seconds_text
from ocelot_em.particles.picking import all_candidates
from ocelot_em.particles.quality import montage_warnings, partial_warnings
from ocelot_em.particles.table import EXPOSURE, NEG_LOG_P, ParticleTable
from ocelot_em.store import attributes as fmt
from ocelot_em.store import constants
from ocelot_em.store.arrays import read_table
from ocelot_em.view.figures import rows_height
from ocelot_em.view.montage_plots import outline_exposures
from ocelot_em.view.page import Drawing
from ocelot_em.view.plots import (
    map_positions,
    plot_crop,
    plot_defocus,
    plot_poses,
    plot_psi,
    plot_zscore,
)
from ocelot_em.view.report_data import ReportData
from ocelot_em.view.statistics_plots import (
    plot_correlations,
    plot_distributions,
    plot_joint,
    plot_partials,
    plot_survival,
)

_PARTICLES_LISTED = 12


def warnings_of(data: ReportData) -> list[str]:
    """Return sentences about unusual results."""
    statistics = data.summary.attributes
    counted = (
        (statistics.unsearched_pixels, "not searched by any partial"),
        (statistics.nan_pixels, "NaN"),
        (statistics.zero_std_pixels, "without variance: the z-score is 0"),
    )
    # Canvas pixels without an exposure are not counted.
    where = " (summed over all exposures)" if data.is_montage else ""
    problems = [
        f"{count_text(n, 'valid pixel')} {'is' if n == 1 else 'are'} {what}{where}."
        for n, what in counted
        if n
    ]
    if data.no_particles_reason:
        problems.append(f"No particles could be picked: {data.no_particles_reason}")
    if data.is_montage:
        return [*problems, *montage_warnings(statistics, data.merged.statistics_of_exposures)]
    return [*partial_warnings(statistics), *problems]


def particles_section(
    data: ReportData, overview: tuple[Float32, int], max_zooms: int
) -> dict[str, object]:
    """Return the map with the particles, the best ones enlarged, and the rows of their table."""
    particles = data.particles
    height, width = data.merged.attributes.valid_shape
    # Maps much wider than high take the full width of the page.
    is_wide = width > 2 * height
    across = 12.0 if is_wide else 7.4
    tall = float(np.clip((across - 1.5) * height / width, 1.4, 8.5))

    def draw(figure: Any) -> None:
        ax = plot_zscore(overview, figure.subplots(), particles=particles)
        outline_exposures(ax, data.merged.attributes.exposures)

    score = particles.columns.get(NEG_LOG_P, particles.columns["scaled_mip"])
    best = np.argsort(-np.nan_to_num(score, nan=-np.inf), kind="stable")
    zoomed = best[: max(max_zooms, 0)]
    is_shown = _which_are_shown(data, zoomed)
    return {
        "is_wide": is_wide,
        "pooling": overview[1],
        "overview": Drawing.of("overview", (across, tall + 0.8), draw),
        "zooms": _zooms(data, zoomed, is_shown, 6 if is_wide else 2) if len(zoomed) else None,
        "has_hidden": not is_shown.all(),
        "rows": [_particle_row(data, i) for i in best[:_PARTICLES_LISTED].tolist()],
    }


def _zooms(data: ReportData, particles: AnyArray, is_shown: AnyArray, columns: int) -> Drawing:
    columns = min(columns, len(particles))
    rows = ceil_div(len(particles), columns)
    (y, x), z = map_positions(data.particles), data.particles.columns["scaled_mip"]

    def draw(figure: Any) -> None:
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for ax in panels[len(particles) :]:
            ax.set_axis_off()
        for number, (i, ax) in enumerate(zip(particles, panels, strict=False), 1):
            plot_crop(data.merged, (y[i], x[i]), ax)
            hidden = "" if is_shown[number - 1] else " (hidden)"
            ax.set_title(f"{number}: z = {z[i]:.2f}{hidden}")
            ax.tick_params(labelsize=8)

    return Drawing.of("zooms", (2.9 * columns, 2.5 * rows + 0.2), draw)


def _which_are_shown(data: ReportData, particles: AnyArray) -> AnyArray:
    """Return whether the map shows each particle; a montage may show another exposure there."""
    if not data.particles.is_of_montage:
        return np.ones(len(particles), np.bool_)
    merged = data.merged
    exposures = {exposure.id: exposure for exposure in merged.plan.exposures}
    (y, x), own = map_positions(data.particles), data.particles.columns[EXPOSURE]
    return np.array(
        [
            merged.shows(exposures[str(own[i])], y[i : i + 1], x[i : i + 1])[0]
            for i in particles.tolist()
        ],
        np.bool_,
    )


def _particle_row(data: ReportData, i: int) -> dict[str, Any]:
    """Return the columns of a particle, and the name of the partial that won it."""
    row = {name: values[i].item() for name, values in data.particles.columns.items()}
    partials, number = data.merged.attributes.partials, row["best_partial"]
    for exposure in data.merged.attributes.exposures:
        if exposure.id == row[EXPOSURE]:  # numbers of partials are within their exposure
            partials = partials[exposure.first_partial :][: exposure.n_partials]
    name = partials[number].name if 0 <= number < len(partials) else f"{number}"
    return {**row, "partial": name}


def significance_section(data: ReportData) -> dict[str, Drawing]:
    """Return the survival histogram and the distributions of mip and z-score."""
    candidates = all_candidates(data.merged).rows
    joint = functools.partial(plot_joint, particles=data.particles, candidates=candidates)
    plots: dict[str, tuple[float, Callable[..., object]]] = {
        "survival": (6.5, functools.partial(plot_survival, cutoff=data.cutoff)),
        "distributions": (2.7, plot_distributions),
        "joint": (3.3, joint),
    }

    def drawing(name: str, tall: float, plot: Callable[..., object]) -> Drawing:
        return Drawing.of(name, (5.4, tall), lambda figure: plot(data.summary, figure.subplots()))

    return {name: drawing(name, *plot) for name, plot in plots.items()}


def poses_section(particles: ParticleTable) -> dict[str, Drawing] | None:
    """Return the distributions of the particles' poses; None without particles."""
    if not len(particles):
        return None

    def draw_angles(figure: Any) -> None:
        above, below = figure.subplots(2, 1)
        plot_psi(particles, above)
        plot_defocus(particles, below)

    def draw_views(figure: Any) -> None:
        plot_poses(particles, figure.add_subplot(projection="polar"))

    size = (5.0, 4.2)
    return {
        "views": Drawing.of("views", size, draw_views),
        "angles": Drawing.of("angles", size, draw_angles),
    }


def partials_section(data: ReportData) -> dict[str, object]:
    """Return the contribution of each partial, and the statistics of each input."""
    partials, sources = data.summary.attributes.partials, data.summary.attributes.sources
    same = [partial.name for partial in partials] == [source.name for source in sources]

    def draw(figure: Any) -> None:
        won, mean, std = figure.subplots(1, 3)
        plot_partials(data.summary, won)
        plot_correlations(data.summary, mean, value="mean")
        plot_correlations(data.summary, std, value="std")
        for ax, is_labelled in ((mean, not same), (std, False)):
            if not is_labelled:
                ax.tick_params(labelleft=False)
                ax.set_ylabel("")

    tall = rows_height(max(len(partials), len(sources)))
    return {"drawing": Drawing.of("partials-plot", (12.0, tall), draw)}


def timings_section(data: ReportData) -> dict[str, object]:
    """Return how the time was spent, and how much data was processed."""
    tiles = read_table(data.merged.objects, constants.TILE_SUMMARY)[..., : len(SUMMARY_FIELDS)]
    return {
        "totals": TileSummary(*np.nansum(tiles, axis=(0, 1)).tolist()),
        "n_tiles": tiles.shape[0] * tiles.shape[1],
        "elapsed": _elapsed(data.merged.attributes),
    }


def _elapsed(attributes: fmt.MergedAttributes) -> str:
    """Return the wall-clock time of a merge, including interruptions."""
    try:
        times = (attributes.provenance.created, attributes.finished or "")
        started, finished = map(datetime.fromisoformat, times)
        return seconds_text(max((finished - started).total_seconds(), 0.0))
    except (ValueError, TypeError):
        return "—"


def options_section(data: ReportData) -> list[tuple[str, str]]:
    """Return the options of the merge, as text."""
    return [
        (name, _option_text(value))
        for name, value in data.merged.attributes.provenance.options.items()
    ]


def _option_text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        given = {name: one for name, one in value.items() if one not in (None, [], ())}
        return ", ".join(f"{name} {one}" for name, one in given.items()) or "not given"
    return "not given" if value in (None, [], ()) else str(value)
