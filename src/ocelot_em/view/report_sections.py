"""The sections of the report."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ocelot_em.model.maps import AnyArray, Float32
from ocelot_em.model.markup import (
    Markup,
    captioned,
    element,
    join,
    length_text,
    percent,
    table,
)
from ocelot_em.model.regions import ceil_div
from ocelot_em.particles.picking import all_candidates
from ocelot_em.particles.table import ALSO_SEEN, EXPOSURE, NEG_LOG_P, ParticleTable
from ocelot_em.store import attributes as fmt
from ocelot_em.view.drawing import drawing
from ocelot_em.view.montage import Coverage
from ocelot_em.view.montage_plots import outline_exposures
from ocelot_em.view.montage_sections import montage_cards, partials_of_exposures_section
from ocelot_em.view.plots import (
    MAX_CIRCLES,
    map_positions,
    plot_crop,
    plot_defocus,
    plot_poses,
    plot_psi,
    plot_zscore,
)
from ocelot_em.view.statistics_plots import (
    plot_correlations,
    plot_distributions,
    plot_joint,
    plot_partials,
    plot_survival,
)
from ocelot_em.view.subject import Subject

_BEST_SHOWN = 12
_PARTIALS_SHOWN = 1000


_PROBLEMS_SHOWN = 8
_PROBLEMS_LISTED = 200


def headline(subject: Subject, coverage: Coverage | None) -> Markup:
    """Show the most important numbers."""
    statistics, montage = subject.summary.attributes, subject.montage
    size, about = subject.attributes.pixel_size_angstrom, subject.particles.about
    searched = statistics.searched_pixels / max(statistics.valid_pixels, 1)
    cutoff, method = "—", "no cutoff"
    if about is not None:
        cutoff, method = f"{about.cutoff:.4g}", f"cutoff ({about.method})"
        if NEG_LOG_P in subject.particles.columns:
            method = "cutoff (-ln p)"
        elif about.per is not None:
            of = "each exposure" if about.per == "exposure" else "the montage"
            cutoff, method = about.cutoff_text, f"cutoff in {of} ({about.method})"
    highest = statistics.scaled_mip_range
    partials = (f"{len(subject.attributes.partials):,}", "partial results")
    if montage is None or coverage is None:
        several = ""
        about_maps = [_valid_pixels(subject.attributes), (percent(searched), "of them searched")]
        counts = [partials, (f"{subject.attributes.total_projections:,}", "projections per pixel")]
    else:
        several = " of all exposures"
        about_maps = montage_cards(montage, coverage)
        counts = [(percent(searched), "of all exposures' pixels searched"), partials]
    cards = [
        (f"{len(subject.particles):,}", "particles"),
        (cutoff, method),
        ("—" if highest is None else f"{highest[1]:.2f}", f"highest z-score{several}"),
        *about_maps,
        *counts,
        ("unknown" if size is None else f"{size:.4g} Å", "pixel size"),
    ]
    return element(
        "div",
        *(element("div", element("strong", value), element("span", what)) for value, what in cards),
        class_="cards",
    )


def _valid_pixels(attributes: fmt.MergedAttributes) -> tuple[str, str]:
    (height, width), size = attributes.valid_shape, attributes.pixel_size_angstrom
    area = "" if size is None else f", {length_text(height * size, width * size)}"
    return f"{height:,} × {width:,}", f"valid pixels of {shape_text(attributes.shape)}{area}"


def notes(subject: Subject) -> Markup:
    """Show warnings about unusual results."""
    problems = _problems(subject)
    if not problems:
        return element("p", "Nothing is out of line.", class_="good")
    told = [element("li", problem) for problem in problems[:_PROBLEMS_LISTED]]
    shown, folded = told[:_PROBLEMS_SHOWN], told[_PROBLEMS_SHOWN:]
    if folded:
        if len(problems) > len(told):
            folded.append(element("li", f"and {len(problems) - len(told):,} more"))
        more = element("summary", f"and {len(problems) - len(shown):,} more")
        shown.append(element("li", element("details", more, element("ul", *folded))))
    return element("ul", *shown, class_="notes")


def _problems(subject: Subject) -> list[str]:
    from ocelot_em.particles.quality import montage_warnings, partial_warnings

    statistics, montage = subject.summary.attributes, subject.montage
    counted = (
        (statistics.unsearched_pixels, "searched by no partial"),
        (statistics.nan_pixels, "NaN"),
        (statistics.zero_std_pixels, "without variance: their z-score is 0"),
    )
    # Canvas pixels without an exposure are not counted.
    of = "" if montage is None else " of the exposures, all counted together,"
    problems = [
        f"{n:,} valid pixel{'' if n == 1 else 's'}{of} {'is' if n == 1 else 'are'} {what}."
        for n, what in counted
        if n
    ]
    if subject.trouble:
        problems.append(f"No particles could be picked: {subject.trouble}")
    if montage is not None:
        return [*problems, *montage_warnings(statistics, montage.of_exposures)]
    return [*partial_warnings(statistics), *problems]


def particles_section(subject: Subject, overview: tuple[Float32, int], max_zooms: int) -> Markup:
    """Show the particles."""
    particles = subject.particles
    height, width = subject.attributes.valid_shape
    # Maps much wider than high take the full width of the page.
    wide = width > 2 * height
    across = 12.0 if wide else 7.4
    tall = float(np.clip((across - 1.5) * height / width, 1.4, 8.5))

    def draw(figure: Any) -> None:
        ax = plot_zscore(overview, figure.subplots(), particles=particles)
        outline_exposures(ax, subject.attributes.exposures)

    whole = drawing(
        "overview", (across, tall + 0.8), draw, "z-score map with picked particles in circles"
    )
    explained = "Each particle's position is the upper left corner of its template box."
    if subject.montage is not None:
        explained += " Lines are the edges of exposures; where none lies, it is grey."
    if overview[1] > 1:
        pooled = f"A pixel of this picture is the highest z-score of {overview[1]} × {overview[1]}."
        explained = f"{pooled} {explained}"
    if len(particles) > MAX_CIRCLES:
        explained += f" The best {MAX_CIRCLES:,} are in circles."
    parts = [captioned(whole, explained, "full" if wide else "wide")]
    best = _best_first(particles)
    zoomed = best[: max(max_zooms, 0)]
    if len(zoomed):
        is_shown = _which_are_shown(subject, zoomed)
        drawn = _zooms(subject, is_shown, 6 if wide else 2)
        what = "The best particles, every pixel, each with its own colours."
        if not all(is_shown.values()):
            what += " Hidden: the montage shows another exposure there."
        parts.append(captioned(drawn, what, "full" if wide else "narrow"))
    rows = [particle_row(subject, number, i) for number, i in enumerate(best[:_BEST_SHOWN], 1)]
    shown: list[Markup] = [element("div", *parts, class_="row")]
    if rows:
        header = [
            "",
            "y",
            "x",
            "mip",
            "z-score",
            "φ (°)",
            "θ (°)",
            "ψ (°)",
            "defocus (Å)",
            "partial",
        ]
        header += ["-ln p"] * (NEG_LOG_P in particles.columns)
        if particles.is_of_montage:
            where = ["exposure", *header[1:3], "canvas y", "canvas x"]
            header = ["", *where, *header[3:], "also seen in (y, x)"]
        shown.append(element("div", table(header, rows), class_="scroll numbers"))
        if len(particles) > len(rows):
            more = f"The best {len(rows)} of {len(particles):,} particles."
            shown.append(element("p", more, class_="caption"))
    else:
        shown.append(element("p", "There are no particles.", class_="caption"))
    return join(shown)


def _best_first(particles: ParticleTable) -> AnyArray:
    height = particles.columns.get(NEG_LOG_P, particles.columns["scaled_mip"])
    return np.argsort(-np.nan_to_num(height, nan=-np.inf), kind="stable")


def _zooms(subject: Subject, is_shown: Mapping[int, bool], columns: int) -> Markup:
    columns = min(columns, len(is_shown))
    rows = ceil_div(len(is_shown), columns)
    (y, x), z = map_positions(subject.particles), subject.particles.columns["scaled_mip"]

    def draw(figure: Any) -> None:
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for ax in panels:
            ax.set_axis_off()
        for number, (i, ax) in enumerate(zip(is_shown, panels, strict=False), 1):
            ax.set_axis_on()
            plot_crop(subject.merged, (y[i], x[i]), ax)
            ax.grid(visible=False)
            ax.set_title(f"{number}: z = {z[i]:.2f}{'' if is_shown[i] else ' (hidden)'}")
            ax.tick_params(labelsize=8)

    what = "z-scores around the best particles"
    return drawing("zooms", (2.9 * columns, 2.45 * rows + 0.2), draw, what)


def _which_are_shown(subject: Subject, chosen: AnyArray) -> dict[int, bool]:
    """Whether the map shows each particle; a montage may show another exposure there."""
    if subject.montage is None:
        return dict.fromkeys(chosen.tolist(), True)
    merged = subject.merged
    exposures = {exposure.id: exposure for exposure in merged.plan.exposures}
    (y, x), own = map_positions(subject.particles), subject.particles.columns[EXPOSURE]
    return {
        i: bool(merged.shows(exposures[str(own[i])], y[i : i + 1], x[i : i + 1])[0])
        for i in chosen.tolist()
    }


def particle_row(subject: Subject, number: int, i: int) -> list[str]:
    """Return a row of the particle table."""
    particles = subject.particles
    record = {name: values[i] for name, values in particles.columns.items()}
    formats = {
        "pos_y": ",d",
        "pos_x": ",d",
        "mip": ".3f",
        "scaled_mip": ".3f",
        "phi": ".1f",
        "theta": ".1f",
        "psi": ".1f",
        "relative_defocus": ".0f",
    }
    row = [f"{number}", *(f"{record[name]:{spec}}" for name, spec in formats.items())]
    row.append(_partial_name(subject.attributes, record))
    if NEG_LOG_P in record:
        row.append(f"{record[NEG_LOG_P]:.2f}")
    if not particles.is_of_montage:
        return row
    others = (sighting.split(":") for sighting in str(record[ALSO_SEEN]).split())
    seen = "; ".join(f"{exposure} ({y}, {x})" for exposure, y, x in others)
    on_canvas = (f"{record[name]:,d}" for name in ("canvas_y", "canvas_x"))
    return [row[0], str(record[EXPOSURE]), *row[1:3], *on_canvas, *row[3:], seen or "—"]


def _partial_name(attributes: fmt.MergedAttributes, record: Mapping[str, Any]) -> str:
    """Return the name of the partial that won a particle, in a montage within its exposure."""
    partials, number = attributes.partials, int(record["best_partial"])
    for exposure in attributes.exposures:
        if exposure.id == record[EXPOSURE]:
            first = exposure.first_partial
            partials = partials[first : first + exposure.n_partials]
    return partials[number].name if 0 <= number < len(partials) else f"{number}"


def significance_section(subject: Subject) -> Markup:
    """Show the survival histogram and the distributions of mip and z-score."""
    summary = subject.summary
    candidates = all_candidates(subject.merged).rows
    survival = drawing(
        "survival",
        (5.4, 6.5),
        lambda figure: plot_survival(summary, figure.subplots(), subject.cutoff),
        "pixels above a z-score, and what Gaussian noise would give",
    )
    distributions = drawing(
        "distributions",
        (5.4, 2.7),
        lambda figure: plot_distributions(summary, figure.subplots()),
        "distributions of mip and z-score",
    )
    joint = drawing(
        "joint",
        (5.4, 3.3),
        lambda figure: plot_joint(
            summary, figure.subplots(), particles=subject.particles, candidates=candidates
        ),
        "joint density of mip and z-score",
    )
    of = "" if subject.montage is None else " of all exposures, shown or not"
    counted = f"Of all searched valid pixels{of}."
    several = ""
    dots = "Dots are the highest pixels of the map, picked or not."
    if subject.montage is not None:
        dots = f"Dots are the highest pixels{of}, picked or not."
        several = (
            f"Counted are the valid pixels{of}, and what Gaussian noise would give in each with "
            "its own projections. "
        )
    left = captioned(
        survival,
        f"{several}Noise should stay at or below the dashed line: that is independent Gaussian "
        "noise, and neighbouring projections are alike. Noise above it means that something is "
        "wrong with the statistics. Particles leave it to the right.",
        "half",
    )
    right = element(
        "div",
        captioned(joint, dots, "full"),
        captioned(distributions, counted, "full"),
        class_="half stack",
    )
    return element("div", left, right, class_="row")


def poses_section(particles: ParticleTable) -> Markup:
    """Show the poses of the particles."""
    if not len(particles):
        return element("p", "There are no particles.", class_="caption")
    views = drawing(
        "views",
        (5.0, 3.9),
        lambda figure: plot_poses(particles, figure.add_subplot(projection="polar")),
        "view directions",
    )

    def draw(figure: Any) -> None:
        above, below = figure.subplots(2, 1)
        plot_psi(particles, above)
        plot_defocus(particles, below)

    angles = drawing("angles", (5.0, 3.9), draw, "in-plane angles and defocus")
    return element(
        "div",
        captioned(views, "Equal areas are equal solid angles.", "half"),
        captioned(angles, "Of all picked particles.", "half"),
        class_="row",
    )


def partials_section(subject: Subject) -> Markup:
    """Show what each partial contributed."""
    if subject.montage is not None:
        return partials_of_exposures_section(subject.montage, drawing)
    statistics = subject.summary.attributes
    n_rows = max(len(statistics.partials), len(statistics.sources))
    height = float(np.clip(0.34 * n_rows + 1.3, 2.0, 12.0))

    same = [p.name for p in statistics.partials] == [s.name for s in statistics.sources]

    def draw(figure: Any) -> None:
        won, mean, std = figure.subplots(1, 3)
        plot_partials(subject.summary, won)
        plot_correlations(subject.summary, mean, value="mean")
        plot_correlations(subject.summary, std, value="std")
        std.tick_params(labelleft=False)
        mean.tick_params(labelleft=not same)

    drawn = drawing("partials-plot", (12.0, height), draw, "health of the partial results")
    pixels = max(sum(p.won_pixels for p in statistics.partials), 1)
    projections = max(sum(p.total_projections for p in statistics.partials), 1)
    won = [
        (
            p.name,
            f"{p.total_projections:,}",
            percent(p.total_projections / projections),
            percent(p.won_pixels / pixels),
            _ratio(p.won_pixels / pixels, p.total_projections / projections),
        )
        for p in statistics.partials[:_PARTIALS_SHOWN]
    ]
    own = [
        (s.name, f"{s.total_projections:,}", *map(_own, (s.mean, s.mean_spread, s.std)))
        for s in statistics.sources[:_PARTIALS_SHOWN]
    ]
    left = table(("partial", "projections", "share of them", "pixels won", "won / expected"), won)
    right = table(("input", "projections", "mean", "its spread", "std"), own)
    parts = [
        captioned(
            drawn,
            "Left: a partial should win the share of the pixels that it has of the projections, "
            "about. Right: each input's own correlations, over all valid pixels; those of one "
            "search should agree.",
            "full",
        ),
        element(
            "div",
            element("div", left, class_="scroll numbers half"),
            element("div", right, class_="scroll numbers half"),
            class_="row",
        ),
    ]
    if n_rows > _PARTIALS_SHOWN:
        parts.append(
            element("p", f"The first {_PARTIALS_SHOWN:,} of {n_rows:,}.", class_="caption")
        )
    return join(parts)


def _own(value: float | None) -> str:
    return "—" if value is None else f"{value:.5f}"


def _ratio(won: float, expected: float) -> str:
    return "—" if expected == 0 else f"{won / expected:.2f}"


def shape_text(shape: tuple[int, int]) -> str:
    """Return the shape of a map as text."""
    return f"{shape[0]:,} × {shape[1]:,}"
