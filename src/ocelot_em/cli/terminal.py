"""Console output of a merge: its plan, progress and result."""

from collections.abc import Callable

from rich.console import Console

from ocelot_em.cli.console import missing_manifests_text
from ocelot_em.errors import StoppedError
from ocelot_em.merge.forecast import Forecast
from ocelot_em.merge.memory_model import n_threads
from ocelot_em.merge.outcome import MergeReport
from ocelot_em.merge.plan import MergePlan
from ocelot_em.merge.resume import PreparedMerge
from ocelot_em.model.options import MergeOptions
from ocelot_em.model.progress import Bar
from ocelot_em.model.text import count_text, nbytes_text, seconds_text
from ocelot_em.run.clusters import n_workers
from ocelot_em.run.observer import MergeBar
from ocelot_em.store.attributes import WRAPPED_EDGES


class MergeProgress(MergeBar):
    """Shows the plan and progress of a merge, which can be stopped."""

    def __init__(self, console: Console, next_step: str = "") -> None:
        super().__init__(Bar(console=console))
        self._next_step = next_step
        self.console = console
        self._stop: Callable[[], None] | None = None
        self._is_to_stop = False

    def planned(self, ready: PreparedMerge, options: MergeOptions) -> None:
        """Print the plan; tiles merged earlier count as done."""
        super().planned(ready, options)
        print_plan(self.console, ready, options)
        if self.n_done == self.n_tiles:
            self.console.print("all tiles are already done; nothing is left to do")

    def locked(self, stop: Callable[[], None]) -> None:
        """Keep the function that stops the run."""
        super().locked(stop)
        self._stop = stop
        if self._is_to_stop:  # other code caught the StoppedError as its own error
            stop()

    def merged(self, report: MergeReport) -> None:
        """Print what was merged, before the report is written, and that it is written."""
        super().merged(report)
        if report.n_merged:
            shares = ", ".join(f"{name} {share:.0%}" for name, share in report.shares.items())
            self.console.print(
                f"merged {count_text(report.n_merged, 'tile')} in {seconds_text(report.seconds)}: "
                f"{report.gigabytes_per_second:.2f} GB/s decoded; {shares}; "
                f"waiting for storage {report.waiting_share:.0%}"
            )
        if self._next_step:
            self.console.print(self._next_step)

    def stop(self, why: str) -> None:
        """Stop the run after the running tiles; raise a StoppedError if it has not started."""
        self._is_to_stop = True
        if self._stop is None:
            raise StoppedError(f"{why}: stopped before anything was merged")
        self.console.print(f"{why}: stopping after the running tiles")
        self._stop()


def print_plan(console: Console, ready: PreparedMerge, options: MergeOptions) -> None:
    """Print the plan and cost of a merge."""
    plan, cost = ready.plan, ready.forecast
    workers = n_workers(options)

    left = 1 - cost.n_done / cost.n_tiles

    def sizes(stored: int, decoded: int) -> str:
        return f"{nbytes_text(int(stored * left))} ({nbytes_text(int(decoded * left))} decoded)"

    free = "unknown" if cost.free_nbytes is None else nbytes_text(cost.free_nbytes)
    free_inodes = "" if cost.free_inodes is None else f"; {cost.free_inodes:,} more are possible"
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
        ("files", f"about {cost.n_files:,}, or {cost.n_inodes:,} with folders{free_inodes}"),
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
    if not plan.has_parts:
        n, projections = len(plan.contributions), plan.total_projections
        up_to = "up to " * plan.has_counts
        return [("partials", f"{n}, {up_to}{projections:,} projections")]
    if plan.group_by:
        names = ", ".join(exposure.id for exposure in plan.exposures[:10])
        more = ", ..." * (len(plan.exposures) > 10)
        n, n_partials = len(plan.exposures), len(plan.contributions)
        return [
            ("groups", f"{n:,} by {plan.group_by}, of {n_partials:,} partials: {names}{more}"),
            ("winner", "highest z-score"),
        ]
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
    """Print where the result of a merge is."""
    console.print("; ".join(filter(None, [f"result: {report.output}", report.incomplete_search])))
