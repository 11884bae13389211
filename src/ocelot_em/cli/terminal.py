"""Console output of a merge: its plan, progress and result."""

import time
from collections.abc import Callable
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from ocelot_em.cli.console import missing_manifests_text
from ocelot_em.errors import StoppedError
from ocelot_em.merge.forecast import Forecast
from ocelot_em.merge.memory_model import n_threads
from ocelot_em.merge.outcome import MergeReport, Outcome
from ocelot_em.merge.plan import MergePlan
from ocelot_em.merge.resume import PreparedMerge
from ocelot_em.model.options import MergeOptions
from ocelot_em.model.text import count_text, nbytes_text, seconds_text
from ocelot_em.run.api import Observer
from ocelot_em.run.clusters import Cluster, n_workers
from ocelot_em.store.attributes import WRAPPED_EDGES

PLAIN_SECONDS = 5.0
"""Interval between progress lines if there is no terminal."""


class MergeProgress(Observer):
    """Shows the progress of a merge: a bar on a terminal, periodic lines elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar = Progress(
            TextColumn("merging"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("tiles  {task.fields[rate]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("merge", rate="")
        self._n_tiles = self._n_done = self._at_start = 0
        self._failed: set[tuple[int, int]] = set()
        self._stop: Callable[[], None] | None = None
        self._is_to_stop = False
        self._nbytes = 0
        self._start_clock()

    def _start_clock(self) -> None:
        self._started = self._printed = time.perf_counter()

    def planned(self, ready: PreparedMerge, options: MergeOptions) -> None:
        """Print the plan; tiles merged earlier count as done."""
        print_plan(self.console, ready, options)
        self._n_tiles = ready.forecast.n_tiles
        self._n_done = self._at_start = ready.forecast.n_done
        if self._n_done == self._n_tiles:
            self.console.print("all tiles are already done; nothing is left to do")

    def waiting(self, why: str) -> None:
        """Print why the merge is waiting."""
        self.console.print(why)

    def locked(self, stop: Callable[[], None]) -> None:
        """Keep the function that stops the run."""
        self._stop = stop
        if self._is_to_stop:  # other code caught the StoppedError as its own error
            stop()

    def stop(self, why: str) -> None:
        """Stop the run after the running tiles; raise a StoppedError if it has not started."""
        self._is_to_stop = True
        if self._stop is None:
            raise StoppedError(f"{why}: stopped before anything was merged")
        self.console.print(f"{why}: stopping after the running tiles")
        self._stop()

    def started(self, cluster: Cluster) -> None:
        """Print where the merge runs, and start the bar."""
        self.console.print(f"running on {cluster.description}")
        if cluster.dashboard:
            self.console.print(f"dashboard: {cluster.dashboard}")
        self._start_clock()
        self._bar.reset(self._task, total=self._n_tiles, completed=self._n_done)
        self._bar.start()

    def compiling(self) -> None:
        """Print a message, and hide the bar."""
        self.console.print("compiling kernels (once after an installation; about 15 s)")
        self._bar.update(self._task, visible=False)

    def compiled(self, seconds: float) -> None:
        """Print the compilation time, and restart the timer of the tiles."""
        self.console.print(f"compiled kernels in {seconds_text(seconds)}")
        self._start_clock()
        self._bar.reset(self._task, completed=self._n_done, visible=True)

    def tile_ended(self, outcome: Outcome) -> None:
        """Count a tile."""
        where = outcome.iy, outcome.ix
        if outcome.summary is None:
            again = outcome.is_transient and where not in self._failed
            self._failed.add(where)
            self.console.print(
                f"tile {where} failed{', to be tried again' * again}: {outcome.error}"
            )
        else:
            self._failed.discard(where)
            self._n_done += 1
            self._nbytes += outcome.summary.decoded_nbytes
        now = time.perf_counter()
        rate = f"{nbytes_text(round(self._nbytes / max(now - self._started, 1e-9)))}/s"
        self._bar.update(self._task, completed=self._n_done, rate=rate)
        if not self.console.is_terminal and now - self._printed >= PLAIN_SECONDS:
            self._printed = now
            here = self._n_done - self._at_start
            left = (now - self._started) / max(here, 1) * (self._n_tiles - self._n_done)
            failed = f", {len(self._failed)} failed" if self._failed else ""
            self.console.print(
                f"{self._n_done} of {self._n_tiles} tiles{failed}, {rate}, "
                f"about {seconds_text(left, is_rough=True)} left"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


def print_plan(console: Console, ready: PreparedMerge, options: MergeOptions) -> None:
    """Print the plan and cost of a merge."""
    plan, cost = ready.plan, ready.forecast
    workers = n_workers(options)

    def sizes(stored: int, decoded: int) -> str:
        return f"{nbytes_text(stored)} ({nbytes_text(decoded)} decoded)"

    free = "unknown" if cost.free_nbytes is None else nbytes_text(cost.free_nbytes)
    free_inodes = "" if cost.free_inodes is None else f"; {cost.free_inodes:,} can be created"
    done = f", {cost.n_done} of them done before" if cost.n_done else ""
    if ready.stale:
        done += f", {len(ready.stale)} again, because more has been searched or added since"
    rows = (
        *_what(plan),
        ("shape", f"{plan.shape[0]} x {plan.shape[1]} pixels, {plan.pose_form.value} poses"),
        ("tiles", f"{cost.n_tiles} of {plan.tile[0]} x {plan.tile[1]} pixels{done}"),
        ("to read", sizes(cost.stored_nbytes_in, cost.decoded_nbytes_in)),
        (
            "to write",
            f"about {sizes(cost.stored_nbytes_out, cost.decoded_nbytes_out)} to {ready.output}",
        ),
        ("files", f"about {cost.n_files:,}, with folders {cost.n_inodes:,}{free_inodes}"),
        (
            "memory",
            f"{nbytes_text(cost.worker_nbytes)} in each worker"
            + (f" ({workers} x {n_threads(options)} threads)" if workers else ""),
        ),
        ("free disk", free),
        ("device", _device(cost)),
    )
    for label, value in rows:
        console.print(f"{label:10}  {value}")
    if searched := plan.progress:
        console.print(f"{'search':10}  {searched.incomplete_text or searched.text}")
        if searched.warning:
            console.print(f"{'warning':10}  {searched.warning}")
    if plan.looks_wrapped:
        console.print(f"{'warning':10}  {WRAPPED_EDGES}")
    if names := [source.name for source in plan.sources if source.manifest is None]:
        console.print(f"{'manifests':10}  {missing_manifests_text(names)}")


def _what(plan: MergePlan) -> list[tuple[str, str]]:
    """Return rows that describe what is merged."""
    if not plan.is_montage:
        n, projections = len(plan.contributions), plan.total_projections
        return [("partials", f"{n}, {projections:,} projections")]
    edge = f", without {plan.erode_px} pixels at their edges" if plan.erode_px else ""
    return [
        ("exposures", f"{len(plan.exposures):,} of {len(plan.contributions):,} partials{edge}"),
        ("overlaps", plan.overlap),
    ]


def _device(cost: Forecast) -> str:
    """Describe the device of the arithmetic."""
    where = f"{cost.device.kind} ({cost.device.reason})"
    if cost.partials_on_device:
        where += (
            f", {nbytes_text(cost.device_nbytes)} of each GPU, {cost.partials_on_device} partials "
            "of a tile at a time"
        )
    return where


def print_report(console: Console, report: MergeReport) -> None:
    """Print the result of a merge."""
    if report.n_merged:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in report.shares.items())
        console.print(
            f"merged {count_text(report.n_merged, 'tile')} in {seconds_text(report.seconds)}: "
            f"{report.gigabytes_per_second:.2f} GB/s decoded; {shares}; "
            f"waiting for storage {report.waiting_share:.0%}"
        )
    console.print("; ".join(filter(None, [f"result: {report.output}", report.incomplete_search])))
