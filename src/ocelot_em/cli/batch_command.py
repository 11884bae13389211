"""The command ``batch``."""

import signal
from typing import TYPE_CHECKING, Annotated

from cyclopts import Group, Parameter

from ocelot_em.cli.console import open_console
from ocelot_em.cli.examples import epilogue
from ocelot_em.cli.exit_codes import DONE, FAILED
from ocelot_em.cli.merge_command import DEFAULTS, GroupedApp
from ocelot_em.cli.parameters import AS_COMMAND, PathOrUrl
from ocelot_em.cli.particle_commands import DEFAULTS as PICK_DEFAULTS
from ocelot_em.cli.particle_commands import NO_OPTICS, OPTICS, PICKING, OpticsOptions
from ocelot_em.model.batch_options import BatchOptions, ManyOptions
from ocelot_em.model.options import MergeOptions
from ocelot_em.model.pick_options import PickOptions
from ocelot_em.model.text import count_text, nbytes_text, seconds_text

if TYPE_CHECKING:
    from rich.console import Console

    from ocelot_em.run.batch_plan import BatchPlan

MANY = Parameter(name="*", group=Group.create_ordered("Many micrographs", sort_key=0))

app = GroupedApp(name="batch", help_epilogue=epilogue("batch"), **AS_COMMAND)


class BatchRun(ManyOptions):
    """Those of a batch, and whether it is a trial."""

    dry_run: Annotated[bool, Parameter(help="Print the plan, and merge nothing.")] = False


BatchRun.__doc__ = ManyOptions.__doc__  # which the help takes descriptions from
DEFAULT_RUN = BatchRun()


@app.default
def batch(
    searches: list[PathOrUrl],
    /,
    *,
    output: PathOrUrl,
    many: Annotated[BatchRun, MANY] = DEFAULT_RUN,
    merging: Annotated[MergeOptions, Parameter(name="*")] = DEFAULTS,
    picking: Annotated[PickOptions, PICKING] = PICK_DEFAULTS,
    optics: Annotated[OpticsOptions, OPTICS] = NO_OPTICS,
) -> int:
    """Merge many micrographs, pick their particles, and write one table and one page of all.

    Parameters
    ----------
    searches
        Paths or URLs of searches or of merged results; folders that contain them; or files with a
        list: a path a line, or a CSV table with the columns ``search`` and ``micrograph``. With
        ``--group-by``, searches of one name are the groups of one micrograph.
    output
        Folder for the merged results, tables and the page. The same command again does only what
        is new.
    """
    from ocelot_em.model.progress import Bar
    from ocelot_em.run.batch import optics_from, run_batch
    from ocelot_em.run.batch_plan import plan_batch
    from ocelot_em.run.batch_progress import BatchProgress
    from ocelot_em.run.clusters import within_job
    from ocelot_em.run.observer import Observer
    from ocelot_em.run.shared_cluster import SharedCluster
    from ocelot_em.run.slurm import handled_signals

    console, kinds = open_console(), many.tables
    given = {**optics.model_dump(exclude={"optics"}), "template_box_px": optics.template_box}
    del given["template_box"]
    known = optics_from(optics.optics, needs_template="cistem" in kinds, **given)
    own = many.model_dump(exclude={"dry_run"})
    progress = BatchProgress(bar := Bar(console=console))

    def stop(number: int, _frame: object) -> None:
        progress.stop(signal.Signals(number).name)

    with bar, handled_signals(stop), within_job(merging) as asked, SharedCluster() as shared:
        options = BatchOptions(**own, **dict(asked), **dict(picking))
        plan = plan_batch(searches, output, options, shared, known)
        print_batch(console, plan)
        if many.dry_run:
            return FAILED if plan.bad else DONE
        report = run_batch(plan, shared, progress, Observer())
    for name, problem in report.skipped.items():
        console.print(f"skipped {name}: {problem}")
    done = f"{report.n_merged:,} merged, {report.n_picked:,} picked"
    skipped = f", {len(report.skipped):,} skipped" if report.skipped else ""
    console.print(
        f"{count_text(report.n_micrographs, 'micrograph')} ({done}{skipped}) in "
        f"{seconds_text(report.seconds)}: {count_text(report.n_particles, 'particle')}"
    )
    console.print(f"result: {', '.join(map(str, [report.page, *report.tables]))}")
    return FAILED if report.skipped else DONE


def print_batch(console: "Console", plan: "BatchPlan") -> None:
    """Print what there is to do for all micrographs."""
    to_merge = [one for one in plan.good if one.n_tiles]
    n_updates = sum(one.is_update for one in to_merge)
    n_to_pick = sum(one.judged is None for one in plan.good)
    updates = f", {n_updates:,} of them have results of less" if n_updates else ""
    n_searches = sum(len(one.micrograph.urls) for one in plan.micrographs)
    several = f", {n_searches:,} searches" if n_searches > len(plan.micrographs) else ""
    memory = max((one.worker_nbytes for one in to_merge), default=0)
    rows = (
        ("searches", count_text(len(plan.micrographs), "micrograph") + several),
        ("to merge", f"{len(to_merge):,}{updates}"),
        ("to pick", f"{n_to_pick:,}"),
        ("bad", f"{len(plan.bad):,}"),
        ("tiles", f"{sum(one.n_tiles for one in to_merge):,}"),
        ("to read", nbytes_text(sum(one.nbytes_in for one in to_merge))),
        ("to write", f"about {nbytes_text(sum(one.nbytes_out for one in to_merge))}"),
        ("memory", f"{nbytes_text(memory)} in each worker"),
    )
    for label, value in rows:
        console.print(f"{label:10}  {value}")
    for name, problem in plan.bad.items():
        console.print(f"bad: {name}: {problem}")
