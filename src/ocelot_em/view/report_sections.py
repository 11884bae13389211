"""Sections of the report: figures, tables and facts, as data for its template."""

import functools
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

import numpy as np

from ocelot_em.merge.outcome import ACTIVITIES, SUMMARY_FIELDS
from ocelot_em.model.maps import AnyArray, Float32
from ocelot_em.model.regions import ceil_div
from ocelot_em.model.text import (
    area_text,
    nbytes_text,
    number_text,
    percent_text,
    seconds_text,
    shape_text,
)
from ocelot_em.particles.picking import all_candidates
from ocelot_em.particles.quality import montage_warnings, partial_warnings
from ocelot_em.particles.table import ALSO_SEEN, EXPOSURE, NEG_LOG_P, ParticleTable
from ocelot_em.store import attributes as fmt
from ocelot_em.store import constants
from ocelot_em.store.arrays import read_table
from ocelot_em.view.coverage import Coverage
from ocelot_em.view.montage_plots import outline_exposures
from ocelot_em.view.montage_sections import montage_cards
from ocelot_em.view.page import Drawing, Table
from ocelot_em.view.plots import (
    MAX_CIRCLES,
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
_PARTIALS_LISTED = 1000

_PARTICLE_COLUMNS = {
    "mip": ("mip", ".3f"),
    "z-score": ("scaled_mip", ".3f"),
    "φ (°)": ("phi", ".1f"),
    "θ (°)": ("theta", ".1f"),
    "ψ (°)": ("psi", ".1f"),
    "defocus (Å)": ("relative_defocus", ".0f"),
}
"""Columns of the particle table and their formats, by their names on the page."""


def headline(data: ReportData, coverage: Coverage | None) -> list[tuple[str, str]]:
    """Return the most important numbers, each with its label."""
    statistics, attributes = data.summary.attributes, data.merged.attributes
    size, about = attributes.pixel_size_angstrom, data.particles.about
    searched = percent_text(statistics.searched_pixels / max(statistics.valid_pixels, 1))
    cutoff, method = "—", "no cutoff"
    if about is not None:
        cutoff, method = f"{about.cutoff:.4g}", f"cutoff ({about.method})"
        if NEG_LOG_P in data.particles.columns:
            method = "cutoff (-ln p)"
        elif about.per is not None:
            where = "each exposure" if about.per == "exposure" else "the montage"
            cutoff, method = about.cutoff_text, f"cutoff in {where} ({about.method})"
    partials = (f"{len(attributes.partials):,}", "partial results")
    if coverage is None:
        everywhere = ""
        area = f", {area_text(attributes.valid_shape, size)}" if size else ""
        label = f"valid pixels of {shape_text(attributes.shape)}{area}"
        maps = [
            (shape_text(attributes.valid_shape), label),
            (searched, "of the valid pixels searched"),
            partials,
            (f"{attributes.total_projections:,}", "projections per pixel"),
        ]
    else:
        everywhere = " of all exposures"
        maps = [
            *montage_cards(data.merged, coverage),
            (searched, "of all exposures' pixels searched"),
            partials,
        ]
    z_range = statistics.scaled_mip_range
    return [
        (f"{len(data.particles):,}", "particles"),
        (cutoff, method),
        (number_text(z_range and z_range[1], ".2f"), f"highest z-score{everywhere}"),
        *maps,
        (f"{size:.4g} Å" if size else "unknown", "pixel size"),
    ]


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
        f"{n:,} valid pixel{' is' if n == 1 else 's are'} {what}{where}."
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
    """Return the map with the particles, the best ones enlarged, and their table."""
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
        "max_circles": MAX_CIRCLES if len(particles) > MAX_CIRCLES else None,
        "overview": Drawing.of("overview", (across, tall + 0.8), draw),
        "zooms": _zooms(data, zoomed, is_shown, 6 if is_wide else 2) if len(zoomed) else None,
        "has_hidden": not is_shown.all(),
        "table": Table(
            [_particle_row(data, n, i) for n, i in enumerate(best[:_PARTICLES_LISTED].tolist(), 1)],
            len(particles),
        ),
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

    return Drawing.of("zooms", (2.9 * columns, 2.45 * rows + 0.2), draw)


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


def _particle_row(data: ReportData, number: int, i: int) -> dict[str, object]:
    particle = {name: values[i] for name, values in data.particles.columns.items()}
    is_of_montage = data.particles.is_of_montage
    row: dict[str, object] = {"": number}
    if is_of_montage:
        row["exposure"] = str(particle[EXPOSURE])
    row |= {axis: int(particle[f"pos_{axis}"]) for axis in "yx"}
    if is_of_montage:
        row |= {f"canvas {axis}": int(particle[f"canvas_{axis}"]) for axis in "yx"}
    row |= {title: f"{particle[name]:{spec}}" for title, (name, spec) in _PARTICLE_COLUMNS.items()}
    row["partial"] = _partial_name(data, particle)
    if NEG_LOG_P in particle:
        row["-ln p"] = f"{particle[NEG_LOG_P]:.2f}"
    if is_of_montage:
        places = (place.split(":") for place in str(particle[ALSO_SEEN]).split())
        seen = "; ".join(f"{exposure} ({y}, {x})" for exposure, y, x in places)
        row["also seen in (y, x)"] = seen or "—"
    return row


def _partial_name(data: ReportData, particle: Mapping[str, Any]) -> str:
    """Return the name of the partial that won a particle, in a montage within its exposure."""
    partials, number = data.merged.attributes.partials, int(particle["best_partial"])
    for exposure in data.merged.attributes.exposures:
        if exposure.id == particle[EXPOSURE]:
            partials = partials[exposure.first_partial :][: exposure.n_partials]
    return partials[number].name if 0 <= number < len(partials) else f"{number}"


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

    size = (5.0, 3.9)
    return {
        "views": Drawing.of("views", size, draw_views),
        "angles": Drawing.of("angles", size, draw_angles),
    }


def partials_section(data: ReportData) -> dict[str, object]:
    """Return the contribution of each partial, and the statistics of each input."""
    statistics = data.summary.attributes
    partials, sources = statistics.partials, statistics.sources
    same = [partial.name for partial in partials] == [source.name for source in sources]

    def draw(figure: Any) -> None:
        won, mean, std = figure.subplots(1, 3)
        plot_partials(data.summary, won)
        plot_correlations(data.summary, mean, value="mean")
        plot_correlations(data.summary, std, value="std")
        std.tick_params(labelleft=False)
        mean.tick_params(labelleft=not same)

    tall = float(np.clip(0.34 * max(len(partials), len(sources)) + 1.3, 2.0, 12.0))
    pixels = max(sum(partial.won_pixels for partial in partials), 1)
    projections = max(sum(partial.total_projections for partial in partials), 1)
    contributions, inputs = [], []
    for partial in partials[:_PARTIALS_LISTED]:
        won, expected = partial.won_pixels / pixels, partial.total_projections / projections
        contributions.append(
            {
                "partial": partial.name,
                "projections": partial.total_projections,
                "share": percent_text(expected),
                "pixels won": percent_text(won),
                "won / expected": number_text(won / expected if expected else None, ".2f"),
            }
        )
    for source in sources[:_PARTIALS_LISTED]:
        inputs.append(
            {
                "input": source.name,
                "projections": source.total_projections,
                "mean": number_text(source.mean, ".5f"),
                "spread of mean": number_text(source.mean_spread, ".5f"),
                "std": number_text(source.std, ".5f"),
            }
        )
    return {
        "drawing": Drawing.of("partials-plot", (12.0, tall), draw),
        "table": Table(contributions, len(partials)),
        "inputs": Table(inputs, len(sources)),
    }


def timings_section(data: ReportData) -> dict[str, object]:
    """Return how the time was spent, and how much data was processed."""
    tiles = read_table(data.merged.objects, constants.TILE_SUMMARY)[..., : len(SUMMARY_FIELDS)]
    totals = dict(zip(SUMMARY_FIELDS, np.nansum(tiles, axis=(0, 1)).tolist(), strict=True))
    seconds = {activity: totals[f"{name}_seconds"] for name, activity in ACTIVITIES.items()}
    busy = sum(seconds.values())
    shares = {name: value / busy for name, value in seconds.items() if busy > 0}
    decoded = totals["decoded_nbytes"]
    rates = [("decoded by each thread", f"{nbytes_text(decoded / busy)}/s")] if busy > 0 else []
    return {
        "shares": shares.items(),
        "durations": [
            ("total of all threads", seconds_text(busy)),
            *(
                (name, f"{seconds_text(seconds[name])}, {percent_text(share)}")
                for name, share in shares.items()
            ),
            ("waiting for storage", seconds_text(totals["waited_seconds"])),
            ("from start to end", _elapsed(data.merged.attributes)),
        ],
        "amounts": [
            ("tiles", f"{tiles.shape[0] * tiles.shape[1]:,}"),
            ("read", nbytes_text(totals["read_nbytes"])),
            ("decoded", nbytes_text(decoded)),
            ("written", nbytes_text(totals["written_nbytes"])),
            *rates,
        ],
    }


def _elapsed(attributes: fmt.MergedAttributes) -> str:
    """Return the wall-clock time of a merge, including interruptions."""
    try:
        times = (attributes.provenance.created, attributes.finished or "")
        started, finished = map(datetime.fromisoformat, times)
        return seconds_text(max((finished - started).total_seconds(), 0.0))
    except (ValueError, TypeError):
        return "—"


def provenance_section(data: ReportData) -> dict[str, object]:
    """Return how the result was made."""
    attributes = data.merged.attributes
    made, about = attributes.provenance, data.particles.about
    facts = [
        ("store", data.merged.url),
        ("run", attributes.id),
        ("started", made.created),
        ("finished", attributes.finished or "—"),
        ("versions", ", ".join(f"{name} {version}" for name, version in made.versions.items())),
        ("poses", attributes.pose_form.value),
    ]
    if about is not None:
        cutoff = f"{about.cutoff:.6g}" if about.per is None else about.cutoff_text
        words = [f"method {about.method}", f"cutoff {cutoff}"]
        if about.false_positives is not None:
            per = {"exposure": " in each exposure", "montage": " in the montage", None: ""}
            words.append(f"expected false positives {about.false_positives:g}{per[about.per]}")
        words.append(f"minimum distance {about.min_distance_px:g} px")
        facts.append(("particles", ", ".join(filter(None, [*words, about.incomplete_text]))))
    options = [(name, _option_text(value)) for name, value in made.options.items()]
    return {"facts": facts, "options": options, "inputs": made.inputs}


def _option_text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        given = {name: one for name, one in value.items() if one not in (None, [], ())}
        return ", ".join(f"{name} {one}" for name, one in given.items()) or "not given"
    return "not given" if value is None else str(value)
