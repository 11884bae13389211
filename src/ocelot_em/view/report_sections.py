"""Data of a report and its sections: figures and values for its template."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, partial
from os import PathLike
from typing import Any

import numpy as np

from ocelot_em.errors import InvalidInputError
from ocelot_em.merge.outcome import SUMMARY_FIELDS, TileSummary
from ocelot_em.merge.result import MergedResult
from ocelot_em.merge.stats.summary import Summary
from ocelot_em.model.maps import MIP, SCALED_MIP, AnyArray, Float32, Float64
from ocelot_em.model.regions import ceil_div
from ocelot_em.model.text import count_text, seconds_text
from ocelot_em.particles.areas import Area
from ocelot_em.particles.candidate_rules import p_value_model
from ocelot_em.particles.estimates import Estimates, estimates_of, expected_above
from ocelot_em.particles.picking import all_candidates, find_peaks
from ocelot_em.particles.population import Population
from ocelot_em.particles.quality import (
    MIN_SHOWN,
    montage_warnings,
    partial_warnings,
    picking_warnings,
)
from ocelot_em.particles.significance import PValueModel
from ocelot_em.particles.table import (
    EXPOSURE,
    GROUP,
    NEG_LOG_P,
    PRECISION,
    RECALL,
    ParticleTable,
    require_table,
)
from ocelot_em.store import attributes as fmt
from ocelot_em.store import constants
from ocelot_em.store.tables import read_table
from ocelot_em.view import figures, montage_plots, plots, statistics_plots
from ocelot_em.view.hits import Hits, ReportImages, draw_picture, read_hits
from ocelot_em.view.page import Drawing

MAX_ROWS = 100
"""Maximum number of listed exposures, or partials of exposures; there may be thousands."""

_PARTICLES_LISTED = 12

_BETWEEN = 200
"""Number of cutoffs between particles for which precision and recall are drawn."""


@dataclass(frozen=True)
class ReportData:
    """The data of a report.

    ``no_particles_reason``: why no particles could be picked; otherwise empty.
    """

    merged: MergedResult
    summary: Summary
    particles: ParticleTable
    no_particles_reason: str

    @property
    def is_montage(self) -> bool:
        """Whether the result is a montage of exposures."""
        return self.merged.attributes.is_montage

    @property
    def has_parts(self) -> bool:
        """Whether the result has exposures or groups."""
        return bool(self.merged.attributes.exposures)

    @property
    def is_wide(self) -> bool:
        """Whether the maps are much wider than high: they take the full width of the page."""
        height, width = self.merged.valid_shape
        return width > 2 * height

    @property
    def cutoff(self) -> tuple[float, float] | None:
        """Lowest and highest z-score cutoff of the particles, if they have one."""
        about = self.particles.about
        if about is None or self.particles.ranked_by != SCALED_MIP:
            return None
        own = [cutoff for _, cutoff in about.exposure_cutoffs]
        return about.cutoff, max(own, default=about.cutoff)

    @cached_property
    def p_values(self) -> PValueModel | None:
        """The model that the particles were picked with, if it is one of p-values."""
        if NEG_LOG_P not in self.particles.columns:
            return None
        return p_value_model(Population(self.merged, 0, self.area))

    @cached_property
    def estimates(self) -> Sequence[AnyArray] | None:
        """Cutoffs, descending, with precision and recall: those of the particles and between."""
        if PRECISION in self.particles.columns:
            known = self.particles[np.isfinite(self.particles[PRECISION])]
            heights = known.columns[known.ranked_by].astype(np.float64)
        else:
            heights = np.empty(0) if self._by_noise is None else self._by_noise.cutoffs
        if not heights.size:
            return None
        about, lowest = self.particles.about, heights.min()
        lowest = lowest if about is None else min(lowest, about.cutoff)
        between = np.linspace(lowest, heights.max(), _BETWEEN)
        cutoffs = np.union1d(heights, between)[::-1]
        return cutoffs, *self.estimates_at(cutoffs)

    def estimates_at(self, cutoffs: Float64) -> tuple[AnyArray, AnyArray]:
        """Return precision and recall at cutoffs, descending; NaN where they are unknown.

        The particles' own are those of the last one at or above the cutoff.
        """
        if PRECISION in self.particles.columns:
            known = self.particles[np.isfinite(self.particles[PRECISION])]
            order = np.argsort(-known.columns[known.ranked_by], kind="stable")
            heights = known.columns[known.ranked_by][order].astype(np.float64)
            place = np.searchsorted(-heights, -cutoffs, "right") - 1
            own = (np.append(known.columns[name][order], np.nan) for name in (PRECISION, RECALL))
            precision, recall = (values[place] for values in own)
            return precision, recall
        assert self._by_noise is not None
        false = expected_above(self.merged, self.particles, cutoffs)
        return self._by_noise.at(cutoffs, false)

    @cached_property
    def _by_noise(self) -> Estimates | None:
        """Estimates by the model of noise, if there is one."""
        particles = self.particles
        if not len(particles) or particles.about is None or particles.ranked_by == MIP:
            return None
        return estimates_of(self.merged, particles)

    @cached_property
    def area(self) -> Area | None:
        """The area that the particles were picked from, if it was not all, and is known."""
        picking = self.particles.picking
        return None if picking is None else Area.of(self.merged, picking)

    def partial_name(self, number: int, exposure: str | None = None) -> str:
        """Return the name of a partial, by its number within its exposure or group, if any."""
        partials = self.merged.attributes.partials
        for own in self.merged.attributes.exposures:
            if own.id == exposure:
                partials = partials[own.first_partial :][: own.n_partials]
        return partials[number].name if 0 <= number < len(partials) else f"{number}"


def read_report_data(
    store: str | PathLike[str] | MergedResult, particles: ParticleTable | None
) -> ReportData:
    """Read the data of a report."""
    merged = MergedResult.open(store)
    summary, reason = merged.summary, ""
    if particles is None:
        try:
            particles = find_peaks(merged)
        except InvalidInputError as error:  # nothing was searched, or too little for a cutoff
            particles, reason = ParticleTable.empty(), str(error)
    _check_origin(require_table(particles), merged)
    return ReportData(merged, summary, particles, reason)


def _check_origin(particles: ParticleTable, merged: MergedResult) -> None:
    """Raise InvalidInputError for particles that cannot belong to a result."""
    kinds = {EXPOSURE: "a montage", GROUP: "groups", None: "one exposure"}
    attributes = merged.attributes
    own = None if not attributes.exposures else GROUP if attributes.group_by else EXPOSURE
    its = next((name for name in (EXPOSURE, GROUP) if name in particles.columns), None)
    known = {exposure.id for exposure in attributes.exposures}
    unknown = {*particles.columns.get(own or "", np.array([])).tolist()} - known
    expected, got = kinds[own], kinds[its]
    if own == its:
        expected, got = f"its {own}s", f"{own} {min(unknown, default='')!r}"
    if len(particles) and (unknown or own != its):
        raise InvalidInputError(
            f"particles: expected particles of {expected}, got particles of {got}; pick them with "
            f"find_peaks from {merged.url}"
        )


def warnings_of(data: ReportData) -> list[str]:
    """Return sentences about unusual results."""
    statistics = data.summary.attributes
    counted = (
        (statistics.unsearched_pixels, "not searched by any partial"),
        (statistics.nan_pixels, "NaN"),
        (statistics.zero_std_pixels, "without variance: the z-score is 0"),
    )
    # Canvas pixels without an exposure are not counted.
    where = f" (summed over all {data.merged.attributes.part}s)" if data.has_parts else ""
    problems = [
        f"{count_text(n, 'valid pixel')} {'is' if n == 1 else 'are'} {what}{where}."
        for n, what in counted
        if n
    ]
    if searched := data.merged.plan.progress:
        found = filter(None, [searched.incomplete_text, searched.warning])
        problems += [f"{text[0].upper()}{text[1:]}." for text in found]
    if edge := data.merged.attributes.edge_warning:
        problems.append(f"{edge[0].upper()}{edge[1:]}.")
    if data.no_particles_reason:
        problems.append(f"No particles could be picked: {data.no_particles_reason}")
    problems += picking_warnings(data.particles, data.summary.histograms.of_z())
    if data.has_parts:
        own, part = data.merged.statistics_of_exposures, data.merged.attributes.part
        return [*problems, *montage_warnings(statistics, own, part)]
    return [*partial_warnings(statistics), *problems]


def particles_section(
    data: ReportData, overview: tuple[Float32, int], max_zooms: int, images: ReportImages
) -> dict[str, object]:
    """Return the map with the particles, the best ones enlarged, and the rows of their table."""
    particles = data.particles
    height, width = data.merged.valid_shape
    across, tall = (12.0, 10.5) if data.is_wide else (7.4, 5.9)
    tall = float(np.clip(tall * height / width, 1.4, 8.5)) + 0.8

    def draw_overview(ax: Any) -> None:
        plots.plot_zscore(overview, ax, particles=particles)
        if data.area is not None:
            plots.hatch_excluded(data.merged, data.area, overview[1], ax)
        montage_plots.outline_exposures(ax, data.merged.attributes.outlined)

    score = particles.columns[particles.ranked_by]
    best = np.argsort(-np.nan_to_num(score, nan=-np.inf), kind="stable")
    zoomed = best[: max(max_zooms, 0)]
    is_shown = _which_are_shown(data, zoomed)
    hits = read_hits(data.merged, particles, zoomed, images)
    return {
        "pooling": overview[1],
        "overview": Drawing.of("overview", (across, tall), draw_overview),
        "zooms": _zooms(data, zoomed, is_shown, hits) if len(zoomed) else [],
        "hits": hits,
        "has_hidden": not is_shown.all(),
        "rows": [_particle_row(data, i) for i in best[:_PARTICLES_LISTED].tolist()],
    }


def _zooms(data: ReportData, particles: AnyArray, is_shown: AnyArray, hits: Hits) -> list[Drawing]:
    """Return the best particles; with pictures, a row for each, in two halves."""
    (y, x), z = plots.map_positions(data.particles), data.particles.columns["scaled_mip"]
    names = data.particles.columns.get(GROUP)

    def draw(number: int, ax: Any) -> None:
        i = particles[number]
        plots.plot_crop(data.merged, (y[i], x[i]), ax)
        hidden = "" if is_shown[number] else " (hidden)"
        group = f", {names[i]}" if names is not None else ""
        ax.set_title(f"{number + 1}: z = {z[i]:.2f}{group}{hidden}")
        ax.tick_params(labelsize=8)

    panels: list[list[Any]] = [[partial(draw, number)] for number in range(len(particles))]
    for row, crop in zip(panels, hits.crops, strict=False):
        row.append(partial(draw_picture, crop, "micrograph"))
    for row, projection in zip(panels, hits.projections, strict=False):
        row.append(partial(draw_picture, projection, "projection", is_dark=True))
    columns, n_parts = len(panels[0]), 2
    if columns == 1:
        columns, n_parts = min(6 if data.is_wide else 2, len(panels)), 1
    each = ceil_div(len(panels), n_parts)
    drawings = []
    for number, first in enumerate(range(0, len(panels), each)):
        own = [panel for row in panels[first : first + each] for panel in row]
        rows = ceil_div(len(own), columns)
        size, name = (2.9 * columns, 2.5 * rows + 0.2), f"zooms{number or ''}"
        drawings.append(Drawing.of(name, size, *own, nrows=rows, ncols=columns))
    return drawings


def _which_are_shown(data: ReportData, particles: AnyArray) -> AnyArray:
    """Return whether the map shows each particle; a montage may show another exposure there."""
    if not data.particles.is_of_montage:
        return np.ones(len(particles), np.bool_)
    merged = data.merged
    exposures = {exposure.id: exposure for exposure in merged.plan.exposures}
    (y, x), own = plots.map_positions(data.particles), data.particles.columns[EXPOSURE]
    at = [(exposures[str(own[i])], y[i : i + 1], x[i : i + 1]) for i in particles.tolist()]
    return np.array([merged.shows(*place)[0] for place in at], np.bool_)


def _particle_row(data: ReportData, i: int) -> dict[str, Any]:
    """Return the columns of a particle, and the name of the partial that won it."""
    row = {name: values[i].item() for name, values in data.particles.columns.items()}
    owner = row.get(GROUP, row.get(EXPOSURE))
    return {**row, "partial": data.partial_name(row["best_partial"], owner)}


def significance_section(data: ReportData) -> dict[str, Drawing]:
    """Return the survival histogram and the distributions of mip and z-score."""
    summary, candidates = data.summary, all_candidates(data.merged).rows
    survival = partial(statistics_plots.plot_survival, summary, cutoff=data.cutoff)
    distributions = partial(statistics_plots.plot_distributions, summary)
    found: Any = {"particles": data.particles, "candidates": candidates}
    if data.p_values is not None and data.particles.about is not None:
        found["contour"] = data.p_values, data.particles.about.cutoff
    joint = partial(statistics_plots.plot_joint, summary, **found)
    drawings = {}
    if data.estimates is not None:
        draw = partial(statistics_plots.draw_estimates, data.estimates, data.particles)
        drawings["estimates"] = Drawing.of("estimates", (5.4, 2.9), draw)
    if data.merged.correlation_histogram is not None:
        histogram = partial(statistics_plots.plot_histogram, data.merged)
        both = histogram, partial(histogram, value="survival")
        drawings["correlations"] = Drawing.of("all-correlations", (11.4, 3.6), *both, ncols=2)
    return drawings | {
        "survival": Drawing.of("survival", (5.4, 6.5), survival),
        "distributions": Drawing.of("distributions", (5.4, 2.7), distributions),
        "joint": Drawing.of("joint", (5.4, 3.3), joint),
    }


def poses_section(particles: ParticleTable) -> dict[str, Drawing] | None:
    """Return the distributions of the particles' poses; None without particles."""
    if not len(particles):
        return None
    views, psi, defocus = (
        partial(plot, particles) for plot in (plots.plot_poses, plots.plot_psi, plots.plot_defocus)
    )
    polar = {"projection": "polar"}
    return {
        "views": Drawing.of("views", (5.0, 4.2), views, subplot_kw=polar),
        "angles": Drawing.of("angles", (5.0, 4.2), psi, defocus, nrows=2),
    }


def montage_section(data: ReportData) -> dict[str, object]:
    """Return the placement of the exposures, their seams, and the rows of their table."""
    merged, placed = data.merged, data.merged.attributes.exposures
    exposures, particles = data.summary.attributes.exposures, data.particles
    found = Counter(particles.columns[EXPOSURE].tolist() if particles.is_of_montage else ())
    height, width = merged.valid_shape
    across, tall = (11.6, 10.2) if data.is_wide else (5.4, 4.0)
    tall = float(np.clip(tall * height / width, 1.2, 7.5)) + 0.8
    seams = np.array([montage_plots.seam_of(exposure) for exposure in exposures], np.float64)
    n_compared, named = int(np.isfinite(seams).sum()), figures.has_names(len(exposures))
    is_beside = named or data.is_wide
    seam_plot = partial(montage_plots.plot_seams, merged)
    panels = [seam_plot, partial(seam_plot, value="difference")]
    grid = (
        {"ncols": 2, "width_ratios": (1.6, 1)}
        if is_beside
        else {"nrows": 2, "height_ratios": (1.4, 1)}
    )
    if not n_compared:
        panels, grid = panels[:1], {}
    seams_tall = float(np.clip(0.25 * len(exposures) + 1.7, 2.4, 12.0))
    if not named:
        seams_tall = 3.2 if is_beside else 5.2
    return {
        "width": "full" if data.is_wide else "half",
        "coverage": Drawing.of(
            "coverage", (across, tall), partial(montage_plots.plot_exposures, merged)
        ),
        "seams": Drawing.of("seams", (across, seams_tall), *panels, sharey=named, **grid),
        "has_names": named,
        "is_beside": is_beside,
        "n_compared": n_compared,
        "min_shown": MIN_SHOWN,
        "rows": [
            (exposures[k], placed[k], seams[k], found[placed[k].id])
            for k in _chosen_rows(np.abs(seams))
        ],
    }


def groups_section(data: ReportData) -> dict[str, object]:
    """Return how clearly groups win, and the rows of their table."""
    particles = data.particles.columns
    found = Counter(particles[GROUP].tolist() if GROUP in particles else ())
    about = data.particles.about
    cutoffs = dict(about.exposure_cutoffs) if about else {}
    drawing = partial(plots.plot_groups, data.particles)
    exposures = data.summary.attributes.exposures
    return {
        "drawing": Drawing.of("groups-plot", (5.4, 4.2), drawing) if found else None,
        "rows": [
            (exposures[k], placed, cutoffs.get(placed.id), found[placed.id])
            for k, placed in enumerate(data.merged.attributes.exposures[:MAX_ROWS])
        ],
    }


def partials_section(data: ReportData) -> dict[str, object]:
    """Return the contribution of each partial, compared within each exposure or group, if any."""
    if data.has_parts:
        return _montage_partials(data)
    partials, sources = data.summary.attributes.partials, data.summary.attributes.sources
    correlations = partial(statistics_plots.plot_correlations, data.summary)
    drawing = Drawing.of(
        "partials-plot",
        (12.0, figures.rows_height(max(len(partials), len(sources)))),
        partial(statistics_plots.plot_partials, data.summary),
        partial(correlations, value="mean"),
        partial(correlations, value="std"),
        ncols=3,
        sharey=[own.name for own in partials] == [source.name for source in sources],
    )
    return {"drawing": drawing}


def _montage_partials(data: ReportData) -> dict[str, object]:
    n_exposures, partials = (
        len(data.merged.attributes.exposures),
        montage_plots.compared_partials(data.merged),
    )
    named = figures.has_names(n_exposures)
    plot = partial(montage_plots.plot_partials_of_exposures, data.merged)
    size, grid = (12.0, figures.rows_height(n_exposures)), {"ncols" if named else "nrows": 2}
    drawing = None
    if any(np.isfinite([own.won_ratio, own.rms_ratio]).any() for own in partials):
        panels = partial(plot, value="wins"), partial(plot, value="rms")
        drawing = Drawing.of("partials-plot", size, *panels, sharey=named, **grid)
    chosen = _chosen_rows(np.array([own.deviation for own in partials]))
    return {"drawing": drawing, "rows": [partials[k] for k in chosen]}


def _chosen_rows(interest: AnyArray) -> list[int]:
    """Return the rows to list: all in order, or the most interesting if there are too many."""
    if len(interest) <= MAX_ROWS:
        return list(range(len(interest)))
    order: list[int] = np.argsort(-np.nan_to_num(interest), kind="stable").tolist()
    return order[:MAX_ROWS]


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
    options = data.merged.attributes.provenance.options
    return [(name, _option_text(value)) for name, value in options.items()]


def _option_text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        given = {name: one for name, one in value.items() if one not in (None, [], ())}
        return ", ".join(f"{name} {one}" for name, one in given.items()) or "not given"
    return "not given" if value in (None, [], ()) else str(value)
