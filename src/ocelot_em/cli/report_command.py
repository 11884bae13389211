"""The command ``report``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from ocelot_em.cli.console import open_console
from ocelot_em.cli.exit_codes import DONE, FAILED
from ocelot_em.cli.parameters import PathOrUrl, require_stores
from ocelot_em.cli.particle_commands import DEFAULTS, PICKING, print_particles, with_estimates
from ocelot_em.errors import InvalidInputError
from ocelot_em.model.html import is_html
from ocelot_em.model.options import Options
from ocelot_em.model.pick_options import PickOptions
from ocelot_em.model.text import count_text

if TYPE_CHECKING:
    from ocelot_em.view.index import IndexRow


class ShownOptions(Options):
    """What the report of one result shows besides.

    Parameters
    ----------
    micrograph
        MRC file of the micrograph that was searched: the report then shows the best particles in
        it. For the report of one result that is no montage. Default: none.
    template
        MRC file of the template that was searched: the report then shows its projections at the
        poses of the best particles. For the report of one result. Default: none.
    estimates
        What counts false particles for the estimated precision and recall: ``noise``, or a decoy,
        by the name of its group, or its table (.csv, .parquet). For the report of one result.
        Default: the model of noise, if the method of picking has one.
    """

    micrograph: Path | None = None
    template: Path | None = None
    estimates: PathOrUrl | None = None


NOTHING_ELSE = ShownOptions()


def report(
    stores: list[PathOrUrl],
    /,
    *,
    output: PathOrUrl,
    overwrite: bool = False,
    shown: Annotated[ShownOptions, Parameter(name="*")] = NOTHING_ELSE,
    picking: Annotated[PickOptions, PICKING] = DEFAULTS,
) -> int:
    """Write the report of a merged result, or one page for many results with a report of each.

    Parameters
    ----------
    stores
        Paths or URLs of merged results, or a folder in which all are found.
    output
        HTML file to write (.html). For many results: one page, or a folder for it, with the reports
        and a table (CSV) beside it.
    overwrite
        Replace existing files.
    """
    if len(stores) == 1 and is_html(output) and not _is_folder_of_results(stores[0]):
        from ocelot_em.store.whole_file import refuse_existing

        refuse_existing([Path(output)], overwrite)
        _write_one(stores[0], output, picking, shown)
        return DONE
    if names := [name for name, value in shown if value]:
        raise InvalidInputError(
            f"--{names[0]}: expected one merged result and an HTML file as the output, got many "
            "results or a folder; write a report of each"
        )
    from ocelot_em.view.index import write_index

    table = write_index(stores, output, overwrite=overwrite, on_result=_print_row, **dict(picking))
    n_failed = int((table["error"] != "").sum())
    failed = f", {n_failed} could not be read" if n_failed else ""
    open_console().print(f"{count_text(len(table), 'result')}{failed}: {output}")
    return FAILED if n_failed else DONE


def _write_one(
    store: PathOrUrl, output: PathOrUrl, picking: PickOptions, shown: ShownOptions
) -> None:
    require_stores(store, kind="merged")
    from ocelot_em.merge.result import MergedResult
    from ocelot_em.particles.picking import pick_particles
    from ocelot_em.view.report import write_report

    merged = MergedResult.open(store)
    table = with_estimates(pick_particles(merged, picking), merged, shown.estimates)
    images = shown.model_dump(exclude={"estimates"})
    write_report(merged, output, particles=table, **images)
    print_particles(table, output)


def _is_folder_of_results(place: PathOrUrl) -> bool:
    return Path(place).is_dir() and not (Path(place) / "zarr.json").exists()


def _print_row(row: "IndexRow") -> None:
    if row.error:
        open_console().print(f"could not be read: {row.error}")
        return
    warned = f", {count_text(row.n_warnings, 'warning')}" if row.n_warnings else ""
    open_console().print(f"{row.result}: {count_text(row.particles or 0, 'particle')}{warned}")
