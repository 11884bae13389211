"""The report of a merged result: one page for looking, which needs no network and runs no script.

All but the overview and the zooms comes from what the merge has collected; the map is read chunk by
chunk and never held as a whole.
"""

import io
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from ocelot_em.errors import IncompleteError, InvalidInputError
from ocelot_em.merge.outcome import SUMMARY_FIELDS
from ocelot_em.merge.stats.records import (
    Summary,
    open_merged_result,
    read_exposure_statistics,
    read_summary,
)
from ocelot_em.model.maps import AnyArray, Float32
from ocelot_em.model.markup import (
    Markup,
    captioned,
    element,
    join,
    length_text,
    nbytes_text,
    page,
    pairs,
    percent,
    seconds_text,
    table,
)
from ocelot_em.model.regions import ceil_div
from ocelot_em.particles.picking import MergedMaps, all_candidates, find_peaks
from ocelot_em.particles.table import ALSO_SEEN, EXPOSURE, NEG_LOG_P, ParticleTable, write_file
from ocelot_em.store import attributes as fmt
from ocelot_em.store.arrays import read_table
from ocelot_em.store.objects import open_objects
from ocelot_em.view.montage_plots import (
    Coverage,
    Montage,
    montage_cards,
    montage_section,
    outline_exposures,
    partials_of_exposures_section,
    plot_exposures,
    plot_partials_of_exposures,
    plot_seams,
)
from ocelot_em.view.plots import (
    MOST_CIRCLES,
    map_positions,
    new_figure,
    plot_correlations,
    plot_crop,
    plot_defocus,
    plot_distributions,
    plot_joint,
    plot_partials,
    plot_poses,
    plot_psi,
    plot_survival,
    plot_zscore,
    pooled_zscore,
)

__all__ = [
    "plot_correlations",
    "plot_crop",
    "plot_defocus",
    "plot_distributions",
    "plot_exposures",
    "plot_joint",
    "plot_partials",
    "plot_partials_of_exposures",
    "plot_poses",
    "plot_psi",
    "plot_seams",
    "plot_survival",
    "plot_zscore",
    "pooled_zscore",
    "save_overview",
    "write_report",
]

OVERVIEW_PX = 640
"""Longest edge of the overview on a page."""

_INK = "#0a0b0c"  # stands for the page's own text colour, light or dark
_BEST_SHOWN = 12
_PARTIALS_SHOWN = 1000
_PROBLEMS_SHOWN = 8
_PROBLEMS_LISTED = 200
_STYLE = {
    "svg.fonttype": "none",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.14,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK
    ),
    "grid.color": _INK,
    "patch.edgecolor": _INK,
}


@dataclass(frozen=True)
class _Subject:
    """What a report is about."""

    store: str | PathLike[str]
    url: str
    attributes: fmt.MergedAttributes
    summary: Summary
    particles: ParticleTable
    trouble: str
    """Why no particles could be picked, if so."""
    montage: Montage | None
    """What is known of its exposures, if it is a montage."""

    @property
    def cutoff(self) -> tuple[float, float] | None:
        """Lowest and highest z-score that particles had to reach, if it was one."""
        about = self.particles.about
        if about is None or NEG_LOG_P in self.particles.columns:
            return None
        own = [cutoff for _, cutoff in about.exposure_cutoffs]
        return about.cutoff, max(own, default=about.cutoff)


def write_report(
    store: str | PathLike[str],
    path: str | PathLike[str],
    *,
    particles: ParticleTable | None = None,
    max_zooms: int = 6,
    pyramid: str | PathLike[str] | None = None,
) -> Path:
    """Write a page to look at: particles, significance, poses, partials, timings, provenance.

    Of a montage it also tells where its exposures lie, and whether their edges can be seen. One
    file that refers to no other. Maps are read chunk by chunk, for the overview and zooms.

    Parameters
    ----------
    store
        Path or URL of a merged result.
    path
        Where to write it; an existing file is replaced.
    particles
        Picked ones; those of :func:`ocelot_em.particles.picking.find_peaks` by default.
    max_zooms
        How many particles to show from near, the best first.
    pyramid
        A picture that :func:`ocelot_em.io.ome_zarr.write_ome_zarr` made of this result: the
        overview is read from there.

    Returns
    -------
    pathlib.Path
        The page.

    Raises
    ------
    StoreNotFoundError, FormatError, IncompleteError, ChunkError
        It is not a finished merged result, was merged without statistics, or cannot be read.
    InvalidInputError
        The pyramid is of another result, or the particles are: of a montage, and the result is
        none, or the other way round, or of other exposures.
    MissingDependencyError
        matplotlib is not installed.
    StorageError
        The page cannot be written.
    """
    subject = _subject(store, particles)
    overview = _overview(subject, pyramid)
    montage = subject.montage
    coverage = None if montage is None else Coverage.of(montage.attributes)
    sections = [
        ("particles", "Particles", _particles_section(subject, overview, max_zooms)),
        ("significance", "Significance", _significance_section(subject)),
        ("poses", "Poses", _poses_section(subject.particles)),
        ("partials", "Partials", _partials_section(subject)),
        ("timings", "Timings", _timings_section(subject)),
        ("provenance", "Provenance", _provenance_section(subject)),
    ]
    if montage is not None and coverage is not None:
        told = montage_section(montage, subject.particles, coverage, _drawing)
        sections.insert(1, ("montage", "Montage", told))
    name = subject.url.rstrip("/").rpartition("/")[2] or subject.url
    links = [element("a", title, href=f"#{key}") for key, title, _ in sections]
    body = [
        element("header", element("h1", name), element("p", subject.url, class_="path")),
        element("nav", *links),
        element("main", _headline(subject, coverage), _notes(subject)),
        *(
            element("section", element("h2", title), content, id=key)
            for key, title, content in sections
        ),
    ]
    place = Path(path)
    write_file(place, page(f"{name} · Ocelot-EM report", body).encode())
    return place


def save_overview(
    store: str | PathLike[str],
    path: str | PathLike[str],
    *,
    cutoff: float | None = None,
    truth: AnyArray | None = None,
) -> None:
    """Save one picture: the z-score map and its survival histogram.

    Raises
    ------
    MissingDependencyError
        matplotlib is not installed.
    """
    figure = new_figure((13.0, 5.6))
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    plot_zscore(store, left, truth)
    outline_exposures(left, open_merged_result(open_objects(store)).exposures)
    plot_survival(store, right, cutoff)
    figure.savefig(path, dpi=110)


def _subject(store: str | PathLike[str], particles: ParticleTable | None) -> _Subject:
    objects = open_objects(store)
    attributes = open_merged_result(objects)
    summary = read_summary(store)
    if summary is None:
        raise IncompleteError(
            f"{objects.url}: it was merged without statistics, by an earlier version; merge again"
        )
    trouble = ""
    if particles is None:
        try:
            particles = find_peaks(store)
        except InvalidInputError as error:  # nothing was searched, or too little for a cutoff
            particles, trouble = ParticleTable.empty(), str(error)
    if problem := _misplaced(particles, attributes):
        raise InvalidInputError(f"particles: {problem}, as find_peaks gives them for {objects.url}")
    montage = None
    if attributes.exposures:
        of_exposures = read_exposure_statistics(store, summary.attributes)
        montage = Montage(attributes, summary, of_exposures)
    return _Subject(store, objects.url, attributes, summary, particles, trouble, montage)


def _misplaced(particles: ParticleTable, attributes: fmt.MergedAttributes) -> str:
    """Say so where particles cannot be of a result."""
    if not len(particles):
        return ""
    known = {exposure.id for exposure in attributes.exposures}
    if particles.is_of_montage != bool(known):
        expected, got = ("a montage", "one exposure") if known else ("one exposure", "a montage")
        return f"expected those of {expected}, got those of {got}"
    if particles.is_of_montage and (unknown := {*particles.columns[EXPOSURE].tolist()} - known):
        return f"expected those of its exposures, got some of {min(unknown)!r}"
    return ""


def _overview(subject: _Subject, pyramid: str | PathLike[str] | None) -> tuple[Float32, int]:
    if pyramid is None:
        return pooled_zscore(subject.store, OVERVIEW_PX)
    from ocelot_em.io.ome_zarr import read_level

    values, factor = read_level(pyramid, OVERVIEW_PX)
    expected = tuple(ceil_div(length, factor) for length in subject.attributes.valid_shape)
    if values.shape != expected:
        raise InvalidInputError(
            f"{pyramid}: expected a picture of {subject.url}, which has {expected} pixels when it "
            f"is pooled by {factor}, got {values.shape}; make the picture again"
        )
    return values, factor


def _headline(subject: _Subject, coverage: Coverage | None) -> Markup:
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
    return f"{height:,} × {width:,}", f"valid pixels of {_shape_text(attributes.shape)}{area}"


def _notes(subject: _Subject) -> Markup:
    """What somebody should know before believing the rest."""
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


def _problems(subject: _Subject) -> list[str]:
    from ocelot_em.particles.quality import montage_out_of_line, partials_out_of_line

    statistics, montage = subject.summary.attributes, subject.montage
    counted = (
        (statistics.unsearched_pixels, "searched by no partial"),
        (statistics.nan_pixels, "NaN"),
        (statistics.zero_std_pixels, "without variance: their z-score is 0"),
    )
    # Pixels of the canvas where no exposure lies are not among them.
    of = "" if montage is None else " of the exposures, all counted together,"
    problems = [
        f"{n:,} valid pixel{'' if n == 1 else 's'}{of} {'is' if n == 1 else 'are'} {what}."
        for n, what in counted
        if n
    ]
    if subject.trouble:
        problems.append(f"No particles could be picked: {subject.trouble}")
    if montage is not None:
        return [*problems, *montage_out_of_line(statistics, montage.of_exposures)]
    return [*partials_out_of_line(statistics), *problems]


def _particles_section(subject: _Subject, overview: tuple[Float32, int], max_zooms: int) -> Markup:
    particles = subject.particles
    height, width = subject.attributes.valid_shape
    # Maps that are much wider than high have the page's width to themselves.
    wide = width > 2 * height
    across = 12.0 if wide else 7.4
    tall = float(np.clip((across - 1.5) * height / width, 1.4, 8.5))

    def draw(figure: Any) -> None:
        ax = plot_zscore(overview, figure.subplots(), particles=particles)
        outline_exposures(ax, subject.attributes.exposures)

    whole = _drawing(
        "overview", (across, tall + 0.8), draw, "z-score map with picked particles in circles"
    )
    explained = "Each particle's position is the upper left corner of its template box."
    if subject.montage is not None:
        explained += " Lines are the edges of exposures; where none lies, it is grey."
    if overview[1] > 1:
        pooled = f"A pixel of this picture is the highest z-score of {overview[1]} × {overview[1]}."
        explained = f"{pooled} {explained}"
    if len(particles) > MOST_CIRCLES:
        explained += f" The best {MOST_CIRCLES:,} are in circles."
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
    rows = [_particle_row(subject, number, i) for number, i in enumerate(best[:_BEST_SHOWN], 1)]
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


def _zooms(subject: _Subject, is_shown: Mapping[int, bool], columns: int) -> Markup:
    columns = min(columns, len(is_shown))
    rows = ceil_div(len(is_shown), columns)
    (y, x), z = map_positions(subject.particles), subject.particles.columns["scaled_mip"]

    def draw(figure: Any) -> None:
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for ax in panels:
            ax.set_axis_off()
        for number, (i, ax) in enumerate(zip(is_shown, panels, strict=False), 1):
            ax.set_axis_on()
            plot_crop(subject.store, (y[i], x[i]), ax)
            ax.grid(visible=False)
            ax.set_title(f"{number}: z = {z[i]:.2f}{'' if is_shown[i] else ' (hidden)'}")
            ax.tick_params(labelsize=8)

    what = "z-scores around the best particles"
    return _drawing("zooms", (2.9 * columns, 2.45 * rows + 0.2), draw, what)


def _which_are_shown(subject: _Subject, chosen: AnyArray) -> dict[int, bool]:
    """Whether the map shows particles; a montage may show another exposure where they are."""
    if subject.montage is None:
        return dict.fromkeys(chosen.tolist(), True)
    merged = MergedMaps.open(subject.store)
    exposures = {exposure.id: exposure for exposure in merged.plan.exposures}
    (y, x), own = map_positions(subject.particles), subject.particles.columns[EXPOSURE]
    return {
        i: bool(merged.shows(exposures[str(own[i])], y[i : i + 1], x[i : i + 1])[0])
        for i in chosen.tolist()
    }


def _particle_row(subject: _Subject, number: int, i: int) -> list[str]:
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
    """Name of the partial that won a particle; of a montage, one of its exposure's."""
    partials, number = attributes.partials, int(record["best_partial"])
    for exposure in attributes.exposures:
        if exposure.id == record[EXPOSURE]:
            first = exposure.first_partial
            partials = partials[first : first + exposure.n_partials]
    return partials[number].name if 0 <= number < len(partials) else f"{number}"


def _significance_section(subject: _Subject) -> Markup:
    summary = subject.summary
    candidates = all_candidates(subject.store).rows
    survival = _drawing(
        "survival",
        (5.4, 6.5),
        lambda figure: plot_survival(summary, figure.subplots(), subject.cutoff),
        "pixels above a z-score, and what Gaussian noise would give",
    )
    distributions = _drawing(
        "distributions",
        (5.4, 2.7),
        lambda figure: plot_distributions(summary, figure.subplots()),
        "distributions of mip and z-score",
    )
    joint = _drawing(
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


def _poses_section(particles: ParticleTable) -> Markup:
    if not len(particles):
        return element("p", "There are no particles.", class_="caption")
    views = _drawing(
        "views",
        (5.0, 3.9),
        lambda figure: plot_poses(particles, figure.add_subplot(projection="polar")),
        "view directions",
    )

    def draw(figure: Any) -> None:
        above, below = figure.subplots(2, 1)
        plot_psi(particles, above)
        plot_defocus(particles, below)

    angles = _drawing("angles", (5.0, 3.9), draw, "in-plane angles and defocus")
    return element(
        "div",
        captioned(views, "Equal areas are equal solid angles.", "half"),
        captioned(angles, "Of all picked particles.", "half"),
        class_="row",
    )


def _partials_section(subject: _Subject) -> Markup:
    if subject.montage is not None:
        return partials_of_exposures_section(subject.montage, _drawing)
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

    drawn = _drawing("partials-plot", (12.0, height), draw, "health of the partial results")
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


def _timings_section(subject: _Subject) -> Markup:
    tiles = read_table(open_objects(subject.store), fmt.TILE_SUMMARY)
    totals = dict(zip(SUMMARY_FIELDS, np.nansum(tiles, axis=(0, 1)).tolist(), strict=True))
    seconds = {name: totals[f"{name}_seconds"] for name in ("read", "fold", "write")}
    busy = sum(seconds.values())
    shares = [(name, value / busy) for name, value in seconds.items() if busy > 0]
    bars = [
        element("div", f"{name} {share:.0%}", class_=name, style=f"flex-grow: {share:.4f}")
        for name, share in shares
        if share >= 0.005
    ]
    threads = [
        ("time of all threads", seconds_text(busy)),
        *((name, f"{seconds_text(seconds[name])}, {percent(share)}") for name, share in shares),
        ("of these waiting", seconds_text(totals["waited_seconds"])),
        ("from start to end", _elapsed(subject.attributes)),
    ]
    moved = [
        ("tiles", f"{tiles.shape[0] * tiles.shape[1]:,}"),
        ("fetched", nbytes_text(totals["read_nbytes"])),
        ("decoded", nbytes_text(totals["decoded_nbytes"])),
        ("written", nbytes_text(totals["written_nbytes"])),
    ]
    if busy > 0:
        moved.append(
            ("by each thread", f"{nbytes_text(totals['decoded_nbytes'] / busy)}/s decoded")
        )
    return join([element("div", *bars, class_="bar"), _beside(pairs(threads), pairs(moved))])


def _elapsed(attributes: fmt.MergedAttributes) -> str:
    """Wall-clock time of a merge, with all the time in which it was interrupted."""
    try:
        times = (attributes.provenance.created, attributes.finished or "")
        started, finished = map(datetime.fromisoformat, times)
        return seconds_text(max((finished - started).total_seconds(), 0.0))
    except (ValueError, TypeError):
        return "—"


def _beside(left: Markup, right: Markup) -> Markup:
    """Two tables beside each other, where there is room."""
    halves = (element("div", content, class_="scroll half") for content in (left, right))
    return element("div", *halves, class_="row")


def _provenance_section(subject: _Subject) -> Markup:
    attributes = subject.attributes
    made, about = attributes.provenance, subject.particles.about
    facts = [
        ("store", subject.url),
        ("run", attributes.id),
        ("started", made.created),
        ("finished", attributes.finished or "—"),
        ("versions", ", ".join(f"{name} {version}" for name, version in made.versions.items())),
        ("poses", f"{attributes.pose_form.value}"),
    ]
    if about is not None:
        facts.append(("particles by", _method_text(subject)))
    inputs = element(
        "details",
        element("summary", f"{len(made.inputs):,} input{'' if len(made.inputs) == 1 else 's'}"),
        element("ul", *(element("li", place) for place in made.inputs), class_="path"),
        **({"open": ""} if len(made.inputs) <= 8 else {}),
    )
    options = pairs((name, _option(value)) for name, value in made.options.items())
    return join([_beside(pairs(facts), options), inputs])


def _method_text(subject: _Subject) -> str:
    about = subject.particles.about
    assert about is not None
    cutoff = f"{about.cutoff:.6g}" if about.per is None else about.cutoff_text
    words = [f"method {about.method}", f"cutoff {cutoff}"]
    if about.false_positives is not None:
        of = {"exposure": " in each exposure", "montage": " in the montage", None: ""}[about.per]
        words.append(f"{about.false_positives:g} false positives accepted{of}")
    words.append(f"at least {about.min_distance_px:g} px apart")
    return ", ".join(words)


def _option(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "not given" if value is None else str(value)


def _shape_text(shape: tuple[int, int]) -> str:
    return f"{shape[0]:,} × {shape[1]:,}"


def _drawing(
    name: str, size_inches: tuple[float, float], draw: Callable[[Any], object], label: str
) -> Markup:
    """Draw a figure in the page's own text colour."""
    figure = new_figure(size_inches)
    from matplotlib import rc_context

    with rc_context(_STYLE | {"svg.hashsalt": name}):
        draw(figure)
        for ax in figure.axes:
            if ax.images:
                ax.grid(visible=False)
        written = io.StringIO()
        figure.savefig(
            written,
            format="svg",
            dpi=120,
            metadata=dict.fromkeys(("Format", "Type", "Creator", "Date")),
        )
    return _inline(written.getvalue(), name, label, round(110 * size_inches[0]))


def _inline(svg: str, name: str, label: str, max_width_px: int) -> Markup:
    """Make an SVG file a part of a page: no names of its own, no fonts of this machine."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", svg)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", svg)
    svg = svg.replace(_INK, "currentColor")
    opening = f'<svg role="img" aria-label="{label}" style="max-width: {max_width_px}px"'
    return Markup(svg.replace("<svg", opening, 1))
