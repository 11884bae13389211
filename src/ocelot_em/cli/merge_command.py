"""The command ``merge``."""

import argparse
import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from rich.console import Console

from ocelot_em.cli.config_file import write_config

if TYPE_CHECKING:
    from ocelot_em.run.api import Observer
from ocelot_em.cli.exit_codes import DONE


def merge_stores(parsed: argparse.Namespace, console: Console) -> int:
    """Merge searches into an output."""
    from ocelot_em.cli.terminal import MergeProgress, print_plan, print_report
    from ocelot_em.model.options import MergeOptions
    from ocelot_em.run.api import Observers, merge, plan_merge
    from ocelot_em.run.clusters import within_job

    options = {name: getattr(parsed, name) for name in MergeOptions.model_fields}
    if parsed.dry_run:
        ready, checked = plan_merge(parsed.inputs, parsed.output, MergeOptions.parse(options))
        print_plan(console, ready, checked)
        return DONE
    with MergeProgress(console) as progress, stopped_by_signals(progress.stop):
        # The other tasks of a SLURM job never get past this line.
        with within_job(MergeOptions.parse(options)) as asked, run_kept(parsed) as others:
            report = merge(
                parsed.inputs,
                parsed.output,
                observer=Observers(progress, *others),
                **options | {"cluster": asked.cluster},
            )
        print_report(console, report)
    return DONE


@contextlib.contextmanager
def run_kept(parsed: argparse.Namespace) -> Iterator[list["Observer"]]:
    """Open the log and the run folder, if requested."""
    from ocelot_em.run.runlog import RunFolder, RunLog

    kept: list[Observer] = []
    with contextlib.ExitStack() as stack:
        logs = [parsed.log] if parsed.log else []
        if parsed.run_folder:
            effective = {
                name: value
                for name, value in vars(parsed).items()
                if name not in ("command", "config", "verbose")
            }
            folder = RunFolder(parsed.run_folder, lambda path: write_config(path, effective))
            kept.append(stack.enter_context(folder))
            logs.append(folder.log_file)
        writers = [stack.enter_context(RunLog(path)) for path in logs]
        kept += writers
        try:
            yield kept
        except BaseException as error:
            for writer in writers:
                writer.event("ended", state=type(error).__name__, text=str(error))
            raise
        for writer in writers:
            writer.event("ended", state="done", text="")


@contextlib.contextmanager
def stopped_by_signals(stop: Callable[[str], None]) -> Iterator[None]:
    """Stop a run cleanly on the signals that batch systems send before its time limit."""
    announcements = signal.SIGTERM, signal.SIGUSR1
    before = {number: signal.getsignal(number) for number in announcements}
    for number in announcements:
        signal.signal(number, lambda number, _frame: stop(signal.Signals(number).name))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
