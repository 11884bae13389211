"""The command ``merge``."""

import contextlib
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, ArgumentCollection, Group, Parameter

from ocelot_em.cli.console import open_console
from ocelot_em.cli.examples import epilogue
from ocelot_em.cli.parameters import AS_COMMAND, PathOrUrl, require_stores
from ocelot_em.model.options import MergeOptions, Shown

if TYPE_CHECKING:
    from ocelot_em.run.observer import Observer

SHOWN = {
    name: next(about for about in field.metadata if isinstance(about, Shown))
    for name, field in MergeOptions.model_fields.items()
}
GROUPS = {
    heading: Group.create_ordered(heading, sort_key=1)
    for heading in dict.fromkeys(about.heading for about in SHOWN.values())
}
RUN = Parameter(group=Group.create_ordered("This run", sort_key=1))

DEFAULTS = MergeOptions()


class GroupedApp(App):
    """An app whose options are shown as the model of their values says."""

    def assemble_argument_collection(self, **options: Any) -> ArgumentCollection:
        """Assemble the options, and add the headings and placeholders."""
        arguments = super().assemble_argument_collection(**options)
        for argument in arguments:
            if about := SHOWN.get("".join(argument.keys[:1])):
                shown = Parameter(group=GROUPS[about.heading], metavar=about.placeholder or None)
                argument.parameter = Parameter.combine(argument.parameter, shown)
        return arguments


app = GroupedApp(name="merge", help_epilogue=epilogue("merge"), **AS_COMMAND)


@app.default
def merge(
    inputs: list[PathOrUrl],
    /,
    *,
    output: PathOrUrl,
    options: Annotated[MergeOptions, Parameter(name="*")] = DEFAULTS,
    log: Annotated[PathOrUrl | None, RUN] = None,
    run_folder: Annotated[PathOrUrl | None, RUN] = None,
    dry_run: Annotated[bool, RUN] = False,
) -> None:
    """Merge the partials of searches, tile by tile.

    Parameters
    ----------
    inputs
        Paths or URLs of searches and earlier merges; their order decides ties.
    output
        Path or URL of the result.
    log
        File to which a log in JSON lines is appended; ``-`` is standard error. Default: no log.
    run_folder
        Folder for the configuration, versions, log, performance reports, statistics and report of
        this run. Default: none.
    dry_run
        Print the plan, and merge nothing.
    """
    require_stores(*inputs)
    from ocelot_em.cli.terminal import MergeProgress, print_plan, print_report
    from ocelot_em.run.api import plan_merge, run_merge
    from ocelot_em.run.clusters import within_job
    from ocelot_em.run.observer import Observers
    from ocelot_em.run.slurm import handled_signals, with_logs_in

    console = open_console()
    if dry_run:
        print_plan(console, *plan_merge(inputs, output, options))
        return
    if run_folder:
        options = with_logs_in(Path(_absolute(run_folder), "jobs"), options)
    effective = {"inputs": [_absolute(path) for path in inputs], "output": _absolute(output)}
    effective |= options.model_dump() | {
        "log": log and _absolute(log),
        "run_folder": run_folder and _absolute(run_folder),
    }

    def stop(number: int, _frame: object) -> None:
        progress.stop(signal.Signals(number).name)

    # Batch systems send signals before the time limit of a run.
    next_step = f"writing the report to {run_folder}" if run_folder else ""
    with MergeProgress(console, next_step) as progress, handled_signals(stop):
        # The other tasks of a SLURM job never get past this line.
        with within_job(options) as asked, run_kept(log, run_folder, effective) as others:
            report = run_merge(inputs, output, asked, Observers(progress, *others))
        print_report(console, report)


def _absolute(path: str | Path) -> str:
    """Return a path that means the same in any folder; URLs, and ``-``, are unchanged."""
    return str(path) if "://" in str(path) or str(path) == "-" else str(Path(path).absolute())


@contextlib.contextmanager
def run_kept(
    log: str | Path | None, run_folder: str | Path | None, effective: Mapping[str, object]
) -> Iterator[list["Observer"]]:
    """Open the log and the run folder, if requested."""
    from ocelot_em.cli.config_file import write_config
    from ocelot_em.run.observer import Observer
    from ocelot_em.run.runlog import RunFolder, RunLog

    with contextlib.ExitStack() as stack:
        kept, logs = list[Observer](), [log] if log else []
        if run_folder:
            folder = RunFolder(run_folder, lambda path: write_config(path, effective))
            kept.append(stack.enter_context(folder))
            logs.append(folder.log_file)
        # Logs have the end of the merge before the folder has its report, which takes a while.
        yield [stack.enter_context(RunLog(path)) for path in logs] + kept
