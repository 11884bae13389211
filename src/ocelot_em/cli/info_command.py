"""The commands ``info``, ``check`` and ``watch``, which describe stores."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from ocelot_em.cli.console import missing_manifests_text, open_console
from ocelot_em.cli.exit_codes import DONE, FAILED
from ocelot_em.cli.parameters import PathOrUrl, require_stores
from ocelot_em.errors import OcelotError

if TYPE_CHECKING:
    from ocelot_em.merge.result import MergedResult
    from ocelot_em.store.statistics_attributes import StatisticsAttributes
    from ocelot_em.view.inspection import StoreInfo

ROWS_SHOWN = 60
"""Maximum number of table rows; the rest is counted."""


def check(stores: list[PathOrUrl], /, *, upgrade: bool = False) -> int:
    """Print everything that is wrong with stores.

    Parameters
    ----------
    stores
        Paths or URLs of searches and merged results.
    upgrade
        First give data of format versions 1 and 2 the manifests that later versions have; this
        reads everything and writes metadata only.
    """
    console, found_any = open_console(), False
    for place in stores:
        problems, without_manifest = _problems_of(console, place, upgrade)
        found_any |= bool(problems)
        console.print(f"{place}: {len(problems) or 'no'} problem{'s' * (len(problems) != 1)}")
        print_list(console, problems)
        if without_manifest:
            console.print(f"  {missing_manifests_text(without_manifest)}")
    return FAILED if found_any else DONE


def _problems_of(console: Console, place: PathOrUrl, upgrade: bool) -> tuple[list[str], list[str]]:
    """Return the problems of a store and what has no manifest, at once if nothing is there."""
    try:
        require_stores(place)
    except OcelotError as error:
        return [str(error)], []
    from ocelot_em.store.upgrade import upgrade as upgrade_store
    from ocelot_em.view.inspection import examine

    if upgrade:
        console.print(f"{place}: {upgrade_store(place)} manifests written")
    return examine(place)


def info(store: PathOrUrl, /) -> None:
    """Print a description of a store.

    Parameters
    ----------
    store
        Path or URL of a search or a merged result.
    """
    require_stores(store)
    from ocelot_em.model.text import nbytes_text
    from ocelot_em.store.attributes import MergedAttributes
    from ocelot_em.view.inspection import describe

    console, info = open_console(), describe(store)
    attributes, pixel_size = info.attributes, info.attributes.pixel_size_angstrom
    rows: list[tuple[str, object]] = [
        ("store", info.url),
        ("kind", f"{attributes.kind}, format version {attributes.format_version}"),
        ("shape", pixels_text(attributes.shape)),
        ("valid", pixels_text(attributes.valid_shape)),
        ("pixel size", f"{pixel_size} Å" if pixel_size else "unknown"),
        ("poses", attributes.pose_form.value),
        ("maps", ", ".join(attributes.maps.merged if info.n_tiles else attributes.maps.partial)),
        ("projections", projections_text(info)),
        ("stored", nbytes_text(info.stored_nbytes)),
        ("created", attributes.provenance.created),
    ]
    if names := info.with_counts:
        more = ", ..." * (len(names) > 5)
        rows.append(("counts", f"differ from pixel to pixel in {', '.join(names[:5])}{more}"))
    if info.progress is not None:
        rows.append(("search", info.progress.incomplete_text or info.progress.text))
        rows += [("warning", info.progress.warning)] * bool(info.progress.warning)
    if attributes.edge_warning:
        rows.append(("warning", attributes.edge_warning))
    if info.unfinished_text:
        rows.append(("unfinished", info.unfinished_text))
    if info.without_manifest:
        rows.append(("manifests", missing_manifests_text(info.without_manifest)))
    if isinstance(attributes, MergedAttributes):
        rows += [("groups", f"by {attributes.group_by}")] * bool(attributes.group_by)
        rows.append(("state", attributes.state))
        rows.append(("tiles", f"{info.tiles_done} of {info.n_tiles} done"))
        if attributes.finished:
            rows.append(("finished", attributes.finished))
    print_rows(console, rows)
    if info.exposures:
        print_exposures(console, info)
    columns, right = ["partial", "state", "projections"], [2]
    partials = [
        [name, state, "up to " * (name in info.with_counts) + f"{count:,}"]
        for name, state, count in info.partials
    ]
    if tables := {name: rest for name, *rest in info.correlation_tables}:
        columns, right = [*columns, "correlations"], [2, 3]
        for row in partials:
            found = tables.get(row[0])
            row.append("none" if found is None else f"{found[1]:,} above {found[0]:g}")
    print_table(console, columns, partials, right)
    if info.merged is not None:
        print_statistics(console, info.merged)


def watch(
    run: PathOrUrl,
    /,
    *,
    output: PathOrUrl | None = None,
    page: PathOrUrl | None = None,
    once: bool = False,
    without: tuple[str, ...] = (),
    threads: int = 1,
) -> None:
    """Show the progress of a running search, and what it has found so far.

    Merges the search whenever a device has written a checkpoint. Ends when it is complete.

    Parameters
    ----------
    run
        Path or URL of the search.
    output
        Path or URL of the merged result, which is kept and updated. Default: a temporary folder.
    page
        HTML file for the report, which browsers reload until the search is complete. Default: none.
    once
        Show the current state once, and exit.
    without
        Partials to leave out, by name. Default: none.
    threads
        Number of threads that merge. The default leaves the other cores to the search.
    """
    require_stores(run)
    from ocelot_em.cli.watch_command import watch_search

    watch_search(run, output, page, {"once": once, "without": without, "threads": threads})


def print_rows(console: Console, rows: Iterable[tuple[str, object]]) -> None:
    """Print labels and values."""
    for label, value in rows:
        console.print(f"{label:12}  {value}")


def print_list(console: Console, sentences: Iterable[str]) -> None:
    """Print sentences as a list."""
    for sentence in sentences:
        console.print(f"  - {sentence}")


def print_table(
    console: Console,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    right: Iterable[int] = (),
) -> None:
    """Print a table with some right-justified columns, and the number of rows not shown."""
    table, shown = Table(*columns), [*rows]
    for number in right:
        table.columns[number].justify = "right"
    for row in shown[:ROWS_SHOWN]:
        table.add_row(*row)
    console.print(table)
    if len(shown) > ROWS_SHOWN:
        console.print(f"and {len(shown) - ROWS_SHOWN:,} more")


def projections_text(info: "StoreInfo") -> str:
    """Format the cross-correlations per pixel; a range if exposures differ."""
    if not info.exposures:
        return f"{info.attributes.total_projections:,}"
    counts = sorted({exposure.total_projections for exposure in info.exposures})
    return " to ".join(f"{count:,}" for count in dict.fromkeys((counts[0], counts[-1])))


def pixels_text(shape: tuple[int, int] | None) -> str:
    """Format a shape; None if each exposure has its own."""
    return "of each exposure" if shape is None else f"{shape[0]} x {shape[1]} pixels"


def print_exposures(console: Console, info: "StoreInfo") -> None:
    """Print the origin and other facts of each exposure, or of each group."""
    if getattr(info.attributes, "group_by", None):
        groups = ((e.id, f"{e.number}", f"{e.total_projections:,}") for e in info.exposures)
        print_table(console, ("group", "number", "projections"), groups, right=(1, 2))
        return
    rows = (
        (
            *(e.id, f"{e.number}", "{:g}, {:g}".format(*e.origin), f"{e.acquired}"),
            *("{} x {}".format(*e.valid_shape), f"{e.total_projections:,}"),
        )
        for e in info.exposures
    )
    columns = ("exposure", "number", "origin", "acquired", "valid", "projections")
    print_table(console, columns, rows)


def print_statistics(console: Console, merged: "MergedResult") -> None:
    """Print merge statistics, and warnings about unusual partials."""
    from ocelot_em.particles.quality import expected_wins, partial_warnings

    counted = merged.statistics
    if counted is None:
        console.print("no statistics: merged by an earlier version")
        return
    rows = [
        ("pixels", f"{counted.valid_pixels:,} valid, {counted.searched_pixels:,} searched"),
        ("no variance", f"{counted.zero_std_pixels:,} pixels"),
        ("NaN", f"{counted.nan_pixels:,} pixels"),
    ]
    if counted.mip_range is not None and counted.scaled_mip_range is not None:
        rows.append(("mip", "{:.4g} to {:.4g}".format(*counted.mip_range)))
        rows.append(("z-score", "{:.4g} to {:.4g}".format(*counted.scaled_mip_range)))
    if counted.candidate_level is not None:
        level = f"{counted.candidate_level:.2f}"
        rows.append(("candidates", f"{counted.n_candidates:,} pixels above z = {level}"))
    print_rows(console, rows)
    if counted.exposures:
        print_shown(console, merged, counted)
        return
    partials = (
        (partial.name, f"{partial.won_pixels:,}", f"{expected:,.0f}")
        for partial, expected in zip(counted.partials, expected_wins(counted.partials), strict=True)
    )
    print_table(console, ("partial", "pixels won", "expected"), partials, right=(1, 2))
    sources = (
        (source.name, *map(mean_text, (source.mean, source.mean_spread, source.std)))
        for source in counted.sources
    )
    print_table(console, ("input", "mean", "spread of means", "standard deviation"), sources)
    print_list(console, partial_warnings(counted))


def mean_text(value: float | None) -> str:
    """Format a number that may not be known."""
    return "-" if value is None else f"{value:.4g}"


def print_shown(console: Console, merged: "MergedResult", counted: "StatisticsAttributes") -> None:
    """Print what a montage shows of each exposure, or what each group won, and warnings."""
    from ocelot_em.particles.quality import montage_warnings

    part, own = merged.attributes.part, merged.statistics_of_exposures
    if merged.attributes.group_by:
        groups = (
            (e.id, f"{e.searched_pixels:,}", f"{e.shown_pixels:,}", mean_text(e.overlap.mean))
            for e in counted.exposures
        )
        titles = ("group", "searched pixels", "pixels won", "mean z there")
        print_table(console, titles, groups, right=range(1, 4))
        print_list(console, montage_warnings(counted, own, part))
        return
    columns = ("exposure", "valid pixels", "shown", "of them in overlaps", "mean z there")
    rows = (
        (
            *(e.id, f"{e.valid_pixels:,}", f"{e.shown_pixels:,}", f"{e.overlap.pixels:,}"),
            *map(mean_text, (e.overlap.mean, e.alone.mean)),
        )
        for e in counted.exposures
    )
    print_table(console, (*columns, "elsewhere"), rows, right=range(1, 6))
    print_list(console, montage_warnings(counted, own))
