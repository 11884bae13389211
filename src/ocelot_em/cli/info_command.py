"""The commands ``info`` and ``check``, which describe stores."""

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from ocelot_em.cli.console import missing_manifests_text, open_console
from ocelot_em.cli.exit_codes import DONE, FAILED
from ocelot_em.cli.parameters import PathOrUrl

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
    from ocelot_em.store.upgrade import upgrade as upgrade_store
    from ocelot_em.view.inspection import examine

    console, found_any = open_console(), False
    for place in stores:
        if upgrade:
            console.print(f"{place}: {upgrade_store(place)} manifests written", markup=False)
        problems, without_manifest = examine(place)
        found_any |= bool(problems)
        console.print(
            f"{place}: {len(problems) or 'no'} problem{'s' * (len(problems) != 1)}", markup=False
        )
        for problem in problems:
            console.print(f"  - {problem}", markup=False)
        if without_manifest:
            console.print(f"  {missing_manifests_text(without_manifest)}", markup=False)
    return FAILED if found_any else DONE


def info(store: PathOrUrl, /) -> int:
    """Print a description of a store.

    Parameters
    ----------
    store
        Path or URL of a search or a merged result.
    """
    from ocelot_em.model.text import nbytes_text
    from ocelot_em.store.attributes import MergedAttributes
    from ocelot_em.view.inspection import describe

    console, info = open_console(), describe(store)
    attributes = info.attributes
    rows: list[tuple[str, object]] = [
        ("store", info.url),
        ("kind", f"{attributes.kind}, format version {attributes.format_version}"),
        ("shape", pixels_text(attributes.shape)),
        ("valid", pixels_text(attributes.valid_shape)),
        (
            "pixel size",
            f"{attributes.pixel_size_angstrom} Å" if attributes.pixel_size_angstrom else "unknown",
        ),
        ("poses", attributes.pose_form.value),
        ("maps", ", ".join(attributes.maps.merged if info.n_tiles else attributes.maps.partial)),
        ("projections", projections_text(info)),
        ("stored", nbytes_text(info.stored_nbytes)),
        ("created", attributes.provenance.created),
    ]
    if info.without_manifest:
        rows.append(("manifests", missing_manifests_text(info.without_manifest)))
    if isinstance(attributes, MergedAttributes):
        rows.append(("state", attributes.state))
        rows.append(("tiles", f"{info.tiles_done} of {info.n_tiles} done"))
        if attributes.finished:
            rows.append(("finished", attributes.finished))
    for label, value in rows:
        console.print(f"{label:12}  {value}", markup=False)
    if info.exposures:
        print_exposures(console, info)
    table = Table("partial", "state", "projections")
    table.columns[2].justify = "right"
    for name, state, count in info.partials[:ROWS_SHOWN]:
        table.add_row(name, state, f"{count:,}")
    console.print(table)
    print_more(console, len(info.partials))
    if info.merged is not None:
        print_statistics(console, info.merged)
    return DONE


def projections_text(info: "StoreInfo") -> str:
    """Format the cross-correlations per pixel; a range if exposures differ."""
    if not info.exposures:
        return f"{info.attributes.total_projections:,}"
    counts = sorted({exposure.total_projections for exposure in info.exposures})
    return " to ".join(f"{count:,}" for count in dict.fromkeys((counts[0], counts[-1])))


def pixels_text(shape: tuple[int, int] | None) -> str:
    """Format a shape; None if each exposure has its own."""
    return "of each exposure" if shape is None else f"{shape[0]} x {shape[1]} pixels"


def print_more(console: Console, n: int) -> None:
    """Print the number of rows that are not shown."""
    if n > ROWS_SHOWN:
        console.print(f"and {n - ROWS_SHOWN:,} more")


def print_exposures(console: Console, info: "StoreInfo") -> None:
    """Print the origin and other facts of each exposure."""
    table = Table("exposure", "number", "origin", "acquired", "valid", "projections")
    for exposure in info.exposures[:ROWS_SHOWN]:
        y, x = exposure.origin
        table.add_row(
            exposure.id,
            f"{exposure.number}",
            f"{y:g}, {x:g}",
            f"{exposure.acquired}",
            f"{exposure.valid_shape[0]} x {exposure.valid_shape[1]}",
            f"{exposure.total_projections:,}",
        )
    console.print(table)
    print_more(console, len(info.exposures))


def print_statistics(console: Console, merged: "MergedResult") -> None:
    """Print merge statistics, and warnings about unusual partials."""
    from ocelot_em.particles.quality import partial_warnings

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
        rows.append(
            (
                "candidates",
                f"{counted.n_candidates:,} pixels above z = {counted.candidate_level:.2f}",
            )
        )
    for label, value in rows:
        console.print(f"{label:12}  {value}", markup=False)
    if counted.exposures:
        print_shown(console, merged, counted)
        return
    table = Table("partial", "pixels won", "expected", title_justify="left")
    total = sum(partial.total_projections for partial in counted.partials) or 1
    won = sum(partial.won_pixels for partial in counted.partials)
    for partial in counted.partials:
        expected = won * partial.total_projections / total
        table.add_row(partial.name, f"{partial.won_pixels:,}", f"{expected:,.0f}")
    for column in table.columns[1:]:
        column.justify = "right"
    console.print(table)
    sources = Table("input", "mean", "spread of means", "standard deviation")
    for source in counted.sources:
        numbers = (source.mean, source.mean_spread, source.std)
        sources.add_row(source.name, *("-" if n is None else f"{n:.4g}" for n in numbers))
    console.print(sources)
    for sentence in partial_warnings(counted):
        console.print(f"  - {sentence}", markup=False)


def print_shown(console: Console, merged: "MergedResult", counted: "StatisticsAttributes") -> None:
    """Print what a montage shows of each exposure, and warnings."""
    from ocelot_em.particles.quality import montage_warnings

    table = Table(
        "exposure", "valid pixels", "shown", "of them in overlaps", "mean z there", "elsewhere"
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for exposure in counted.exposures[:ROWS_SHOWN]:
        means = (exposure.overlap.mean, exposure.alone.mean)
        table.add_row(
            exposure.id,
            f"{exposure.valid_pixels:,}",
            f"{exposure.shown_pixels:,}",
            f"{exposure.overlap.pixels:,}",
            *("-" if mean is None else f"{mean:.4g}" for mean in means),
        )
    console.print(table)
    print_more(console, len(counted.exposures))
    for sentence in montage_warnings(counted, merged.statistics_of_exposures):
        console.print(f"  - {sentence}", markup=False)
