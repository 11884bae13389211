"""The report of a merged result: one page for looking, which needs no network and runs no script.

All but the overview and the zooms comes from what the merge has collected; the map is read chunk by
chunk and never held as a whole.
"""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from ocelot_em import format as fmt
from ocelot_em.canvas import ceil_div
from ocelot_em.errors import IncompleteError, InvalidInputError
from ocelot_em.maps import AnyArray, Float32
from ocelot_em.markup import Markup, element, join, nbytes_text, page, pairs, seconds_text, table
from ocelot_em.objects import open_objects
from ocelot_em.particles import NEG_LOG_P, ParticleTable, write_file
from ocelot_em.picking import all_candidates, find_peaks
from ocelot_em.pipeline import SUMMARY_FIELDS
from ocelot_em.plots import (
    MOST_CIRCLES,
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
from ocelot_em.records import Summary, open_merged_result, read_summary
from ocelot_em.store import read_table

__all__ = [
    "plot_correlations",
    "plot_crop",
    "plot_defocus",
    "plot_distributions",
    "plot_joint",
    "plot_partials",
    "plot_poses",
    "plot_psi",
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
_PROBLEMS_SHOWN = 20
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

    @property
    def cutoff(self) -> float | None:
        """z-score that particles had to reach, if it was one."""
        about = self.particles.about
        return None if about is None or NEG_LOG_P in self.particles.columns else about.cutoff


def write_report(
    store: str | PathLike[str],
    path: str | PathLike[str],
    *,
    particles: ParticleTable | None = None,
    max_zooms: int = 6,
    pyramid: str | PathLike[str] | None = None,
) -> Path:
    """Write a page to look at: particles, significance, poses, partials, timings, provenance.

    One file that refers to no other. Maps are read chunk by chunk, for the overview and zooms.

    Parameters
    ----------
    store
        Path or URL of a merged result.
    path
        Where to write it; an existing file is replaced.
    particles
        Picked ones; those of :func:`ocelot_em.picking.find_peaks` by default.
    max_zooms
        How many particles to show from near, the best first.
    pyramid
        A picture that :func:`ocelot_em.interop.ome_zarr.write_ome_zarr` made of this result: the
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
        The pyramid is of another result.
    MissingDependencyError
        matplotlib is not installed.
    StorageError
        The page cannot be written.
    """
    subject = _subject(store, particles)
    overview = _overview(subject, pyramid)
    sections = [
        ("particles", "Particles", _particles_section(subject, overview, max_zooms)),
        ("significance", "Significance", _significance_section(subject)),
        ("poses", "Poses", _poses_section(subject.particles)),
        ("partials", "Partials", _partials_section(subject)),
        ("timings", "Timings", _timings_section(subject)),
        ("provenance", "Provenance", _provenance_section(subject)),
    ]
    name = subject.url.rstrip("/").rpartition("/")[2] or subject.url
    links = [element("a", title, href=f"#{key}") for key, title, _ in sections]
    body = [
        element("header", element("h1", name), element("p", subject.url, class_="path")),
        element("nav", *links),
        element("main", _headline(subject), _notes(subject)),
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
    return _Subject(store, objects.url, attributes, summary, particles, trouble)


def _overview(subject: _Subject, pyramid: str | PathLike[str] | None) -> tuple[Float32, int]:
    if pyramid is None:
        return pooled_zscore(subject.store, OVERVIEW_PX)
    from ocelot_em.interop.ome_zarr import read_level

    values, factor = read_level(pyramid, OVERVIEW_PX)
    expected = tuple(ceil_div(length, factor) for length in subject.attributes.valid_shape)
    if values.shape != expected:
        raise InvalidInputError(
            f"{pyramid}: expected a picture of {subject.url}, which has {expected} pixels when it "
            f"is pooled by {factor}, got {values.shape}; make the picture again"
        )
    return values, factor


def _headline(subject: _Subject) -> Markup:
    attributes, statistics = subject.attributes, subject.summary.attributes
    height, width = attributes.valid_shape
    size = attributes.pixel_size_angstrom
    searched = statistics.searched_pixels / max(statistics.valid_pixels, 1)
    about = subject.particles.about
    cutoff, method = "—", "no cutoff"
    if about is not None:
        cutoff, method = f"{about.cutoff:.4g}", f"cutoff ({about.method})"
        if NEG_LOG_P in subject.particles.columns:
            method = "cutoff (-ln p)"
    highest = statistics.scaled_mip_range
    area = "" if size is None else f", {_length_text(height * size, width * size)}"
    cards = (
        (f"{len(subject.particles):,}", "particles"),
        (cutoff, method),
        ("—" if highest is None else f"{highest[1]:.2f}", "highest z-score"),
        (f"{height:,} × {width:,}", f"valid pixels of {_shape_text(attributes.shape)}{area}"),
        (_percent(searched), "of them searched"),
        (f"{len(attributes.partials):,}", "partial results"),
        (f"{attributes.total_projections:,}", "projections per pixel"),
        ("unknown" if size is None else f"{size:.4g} Å", "pixel size"),
    )
    return element(
        "div",
        *(element("div", element("strong", value), element("span", what)) for value, what in cards),
        class_="cards",
    )


def _notes(subject: _Subject) -> Markup:
    """What somebody should know before believing the rest."""
    problems = _problems(subject)
    if not problems:
        return element("p", "Nothing is out of line.", class_="good")
    shown = [element("li", problem) for problem in problems[:_PROBLEMS_SHOWN]]
    if len(problems) > len(shown):
        shown.append(element("li", f"and {len(problems) - len(shown)} more"))
    return element("ul", *shown, class_="notes")


def _problems(subject: _Subject) -> list[str]:
    from ocelot_em.health import partials_out_of_line

    statistics = subject.summary.attributes
    counted = (
        (statistics.unsearched_pixels, "searched by no partial"),
        (statistics.nan_pixels, "NaN"),
        (statistics.zero_std_pixels, "without variance: their z-score is 0"),
    )
    problems = [
        f"{n:,} valid pixel{' is' if n == 1 else 's are'} {what}." for n, what in counted if n
    ]
    if subject.trouble:
        problems.append(f"No particles could be picked: {subject.trouble}")
    return [*partials_out_of_line(statistics), *problems]


def _particles_section(subject: _Subject, overview: tuple[Float32, int], max_zooms: int) -> Markup:
    particles = subject.particles
    height, width = subject.attributes.valid_shape
    # Maps that are much wider than high have the page's width to themselves.
    wide = width > 2 * height
    across = 12.0 if wide else 7.4
    tall = float(np.clip((across - 1.5) * height / width, 1.4, 8.5))
    whole = _drawing(
        "overview",
        (across, tall + 0.8),
        lambda figure: plot_zscore(overview, figure.subplots(), particles=particles),
        "z-score map with picked particles in circles",
    )
    explained = "Each particle's position is the upper left corner of its template box."
    if overview[1] > 1:
        pooled = f"A pixel of this picture is the highest z-score of {overview[1]} × {overview[1]}."
        explained = f"{pooled} {explained}"
    if len(particles) > MOST_CIRCLES:
        explained += f" The best {MOST_CIRCLES:,} are in circles."
    parts = [_figure(whole, explained, "full" if wide else "wide")]
    best = _best_first(particles)
    zoomed = best[: max(max_zooms, 0)]
    if len(zoomed):
        drawn = _zooms(subject, zoomed, 6 if wide else 2)
        what = "The best particles, every pixel, each with its own colours."
        parts.append(_figure(drawn, what, "full" if wide else "narrow"))
    names = [partial.name for partial in subject.attributes.partials]
    rows = [
        _particle_row(particles, number, i, names) for number, i in enumerate(best[:_BEST_SHOWN], 1)
    ]
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


def _zooms(subject: _Subject, chosen: AnyArray, columns: int) -> Markup:
    columns = min(columns, len(chosen))
    rows = ceil_div(len(chosen), columns)

    def draw(figure: Any) -> None:
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for ax in panels:
            ax.set_axis_off()
        for number, (i, ax) in enumerate(zip(chosen, panels, strict=False), 1):
            record = {name: values[i] for name, values in subject.particles.columns.items()}
            ax.set_axis_on()
            plot_crop(subject.store, (record["pos_y"], record["pos_x"]), ax)
            ax.grid(visible=False)
            ax.set_title(f"{number}: z = {record['scaled_mip']:.2f}")
            ax.tick_params(labelsize=8)

    what = "z-scores around the best particles"
    return _drawing("zooms", (2.9 * columns, 2.45 * rows + 0.2), draw, what)


def _particle_row(particles: ParticleTable, number: int, i: int, names: Sequence[str]) -> list[str]:
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
    partial = int(record["best_partial"])
    row.append(names[partial] if 0 <= partial < len(names) else f"{partial}")
    return [*row, f"{record[NEG_LOG_P]:.2f}"] if NEG_LOG_P in record else row


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
    left = _figure(
        survival,
        "Noise should stay at or below the dashed line: that is independent Gaussian noise, "
        "and neighbouring projections are alike. Noise above it means that something is wrong "
        "with the statistics. Particles leave it to the right.",
        "half",
    )
    right = element(
        "div",
        _figure(joint, "Dots are the highest pixels of the map, picked or not.", "full"),
        _figure(distributions, "Of all valid pixels that were searched.", "full"),
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
        _figure(views, "Equal areas are equal solid angles.", "half"),
        _figure(angles, "Of all picked particles.", "half"),
        class_="row",
    )


def _partials_section(subject: _Subject) -> Markup:
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
            _percent(p.total_projections / projections),
            _percent(p.won_pixels / pixels),
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
        _figure(
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
        *((name, f"{seconds_text(seconds[name])}, {_percent(share)}") for name, share in shares),
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
    words = [f"method {about.method}", f"cutoff {about.cutoff:.6g}"]
    if about.false_positives is not None:
        words.append(f"{about.false_positives:g} false positives accepted")
    words.append(f"at least {about.min_distance_px:g} px apart")
    return ", ".join(words)


def _option(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "not given" if value is None else str(value)


def _shape_text(shape: tuple[int, int]) -> str:
    return f"{shape[0]:,} × {shape[1]:,}"


def _length_text(height_angstrom: float, width_angstrom: float) -> str:
    unit, name = (1e4, "µm") if max(height_angstrom, width_angstrom) >= 1e4 else (10.0, "nm")
    return f"{height_angstrom / unit:.3g} × {width_angstrom / unit:.3g} {name}"


def _percent(share: float) -> str:
    """A share, rounded; neither nothing nor all unless it is that."""
    if share in (0.0, 1.0):
        return f"{share:.0%}"
    return f"{min(max(share, 0.001), 0.999):.1%}"


def _figure(drawing: Markup, caption: str, width: str) -> Markup:
    return element("figure", drawing, element("figcaption", caption), class_=width)


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
