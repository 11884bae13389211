"""Observers of a merge, and the progress that they share."""

from collections.abc import Callable
from functools import partial
from typing import Self

from ocelot_em.merge.outcome import MergeReport, Outcome
from ocelot_em.merge.resume import PreparedMerge
from ocelot_em.model.options import MergeOptions
from ocelot_em.model.progress import Bar, Pace
from ocelot_em.model.text import nbytes_text, seconds_text
from ocelot_em.run.clusters import Cluster

COMPILING = "compiling kernels (once, about 15 s)"
"""Label of the phase in which kernels are compiled, after an installation."""


class Observer:
    """Receives the events of a merge; override the methods of interest.

    Examples
    --------
    >>> from ocelot_em import Observer, merge
    >>> class Count(Observer):
    ...     n_tiles = 0
    ...
    ...     def tile_ended(self, outcome):
    ...         self.n_tiles += 1
    >>> count = Count()
    >>> report = merge("SEARCH.zarr", "RESULT.zarr", tile_size=256, observer=count)
    >>> count.n_tiles
    4
    """

    def planned(self, ready: PreparedMerge, options: MergeOptions) -> None:
        """Called with the plan, before anything starts."""

    def waiting(self, reason: str) -> None:
        """Called when the merge has to wait."""

    def locked(self, stop: Callable[[], None]) -> None:
        """Called when the output is locked; ``stop`` ends the run after the running tiles.

        ``stop`` may be called at any time, from any thread or signal handler, and returns at once.
        """

    def started(self, cluster: Cluster) -> None:
        """Called when the cluster is ready."""

    def compiling(self) -> None:
        """Called before kernels are compiled, once per installation, and before any tile."""

    def compiled(self, seconds: float) -> None:
        """Called after compilation, which took ``seconds``."""

    def tile_ended(self, outcome: Outcome) -> None:
        """Called when a tile is done or has failed."""

    def ending(self) -> None:
        """Called after the last tile; workers still run, unless they were lost."""

    def merged(self, report: MergeReport) -> None:
        """Called when the merge is complete."""


class Observers(Observer):
    """Notifies several observers, in order."""

    def __init__(self, *observers: Observer) -> None:
        def notify(hook: str, *arguments: object) -> None:
            for observer in observers:
                getattr(observer, hook)(*arguments)

        for hook in (name for name in vars(Observer) if not name.startswith("_")):
            setattr(self, hook, partial(notify, hook))


class TileProgress(Observer):
    """Counts the tiles of a merge, and estimates its rate and the time left.

    Each tile counts once, however often it is tried. Tiles that an earlier run has merged count as
    done, but not for the rate.
    """

    n_tiles = n_done = 0
    pace = Pace()

    def planned(self, ready: PreparedMerge, options: MergeOptions) -> None:  # noqa: ARG002
        """Count the tiles; those merged earlier are done."""
        self.n_tiles, self.n_done = ready.forecast.n_tiles, ready.forecast.n_done
        self._n_columns = ready.plan.grid.counts[1]
        self._is_done = bytearray(self.n_tiles)
        self.failed = set[tuple[int, int]]()

    def started(self, cluster: Cluster) -> None:
        """Start the clock."""
        self.pace = Pace(cluster.n_threads)

    def compiled(self, seconds: float) -> None:  # noqa: ARG002
        """Start the clock again."""
        self.pace.restart()

    def tile_ended(self, outcome: Outcome) -> None:
        """Count a tile."""
        where = outcome.iy, outcome.ix
        number = outcome.iy * self._n_columns + outcome.ix
        if outcome.summary is None:
            self.failed.add(where)
            self.n_done -= self._is_done[number]
            self._is_done[number] = 0
            return
        self.failed.discard(where)
        if not self._is_done[number]:
            self._is_done[number] = 1
            self.n_done += 1
            spent = outcome.summary.seconds
            own = spent["read"] + spent["fold"] + spent["write"]
            self.pace.step(round(outcome.summary.decoded_nbytes), own)

    def failure_text(self, outcome: Outcome) -> str:
        """State why a tile failed that has not been counted yet, and whether it is retried."""
        where = outcome.iy, outcome.ix
        again = outcome.is_transient and where not in self.failed
        return f"tile {where} failed{' and will be retried' * again}: {outcome.error}"

    @property
    def share(self) -> float:
        """Fraction of the tiles that are done."""
        return self.n_done / max(self.n_tiles, 1)

    @property
    def seconds_left(self) -> float | None:
        """Estimated time until all tiles are done; None until it is known."""
        return self.pace.seconds_left(self.n_tiles - self.n_done)

    @property
    def text(self) -> str:
        """State how many tiles are done, the rate, the time since the start, and that left."""
        parts = [f"{self.n_done:,} of {self.n_tiles:,} tiles"]
        if self.failed:
            parts.append(f"{len(self.failed):,} failed")
        if (rate := self.pace.bytes_per_second) is not None:
            parts.append(f"{nbytes_text(rate)}/s")
        parts.append(seconds_text(round(self.pace.seconds)))
        left = self.seconds_left
        if left is not None and self.n_done < self.n_tiles:
            parts.append(f"about {seconds_text(max(left, 1), is_rough=True)} left")
        return ", ".join(parts)


class MergeBar(TileProgress):
    """Shows the progress of a merge, and the link to the dashboard; a context manager."""

    def __init__(self, bar: Bar) -> None:
        self.bar = bar

    def waiting(self, reason: str) -> None:
        """Show why the merge is waiting."""
        self.bar.say(reason)

    def locked(self, stop: Callable[[], None]) -> None:  # noqa: ARG002
        """Show that the merge starts."""
        if self.n_done < self.n_tiles:
            self.bar.show("starting", None, now=True)

    def started(self, cluster: Cluster) -> None:
        """Show where the merge runs, and start the bar."""
        super().started(cluster)
        self.bar.say(f"running on {cluster.description}")
        if cluster.dashboard:
            self.bar.link("dashboard", cluster.dashboard)
        self._show(now=True)

    def compiling(self) -> None:
        """Show that kernels are compiled."""
        if self.bar.face != "notebook":
            self.bar.say(COMPILING)
        self.bar.show(COMPILING, None, lambda: seconds_text(round(self.pace.seconds)), now=True)

    def compiled(self, seconds: float) -> None:
        """Show the time that compilation took, and the bar of the tiles."""
        super().compiled(seconds)
        self.bar.say(f"compiled kernels in {seconds_text(seconds)}")
        self._show(now=True)

    def tile_ended(self, outcome: Outcome) -> None:
        """Count a tile, and say why it failed."""
        if outcome.summary is None:
            self.bar.say(self.failure_text(outcome))
        super().tile_ended(outcome)
        self._show(now=self.n_done == self.n_tiles)

    def merged(self, report: MergeReport) -> None:
        """Show that the merge is complete."""
        if report.n_merged:
            self.bar.show("merged", 1.0, self.text, now=True)

    def _show(self, *, now: bool = False) -> None:
        label = "finishing" if self.n_done == self.n_tiles else "merging"
        self.bar.show(label, self.share, lambda: self.text, now=now)

    def __enter__(self) -> Self:
        self.bar.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.__exit__()
