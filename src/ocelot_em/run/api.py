"""The merge as one call: plan, refuse what cannot work, start the cluster, merge, stop it."""

from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any

from ocelot_em.merge.forecast import refuse_what_cannot_fit
from ocelot_em.merge.merge import merge as merge_tiles
from ocelot_em.merge.outcome import MergeReport, Outcome
from ocelot_em.merge.resume import Preparation, confirm, prepare
from ocelot_em.model.options import MergeOptions
from ocelot_em.run.clusters import Cluster, choose_device, n_workers, open_cluster, within_job
from ocelot_em.run.executors import ThreadExecutor
from ocelot_em.store.lock import OutputLock
from ocelot_em.store.objects import open_objects

Place = str | PathLike[str]


class Observer:
    """Is told how a merge goes; override what is of interest."""

    def planned(self, ready: Preparation, options: MergeOptions) -> None:
        """Nothing has started yet."""

    def waiting(self, why: str) -> None:
        """Nothing goes on for some time."""

    def locked(self, stop: Callable[[], None]) -> None:
        """Nobody else writes the output now; ``stop`` ends the run after the tiles in hand.

        It may be called at any time, from any thread or signal handler, and returns at once.
        """

    def started(self, cluster: Cluster) -> None:
        """The workers are there."""

    def compiling(self) -> None:
        """Kernels are compiled in this process, once after an installation; no tile has begun."""

    def compiled(self, seconds: float) -> None:
        """They are, since ``seconds`` ago; tiles begin."""

    def tile_ended(self, outcome: Outcome) -> None:
        """A tile is done, or has failed."""

    def ending(self) -> None:
        """No tile will follow; the workers are still there, unless they were lost."""

    def merged(self, report: MergeReport) -> None:
        """All is done."""


class Observers(Observer):
    """Tells several observers, in their order."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    def planned(self, ready: Preparation, options: MergeOptions) -> None:
        """Tell them."""
        for observer in self._observers:
            observer.planned(ready, options)

    def waiting(self, why: str) -> None:
        """Tell them."""
        for observer in self._observers:
            observer.waiting(why)

    def locked(self, stop: Callable[[], None]) -> None:
        """Tell them."""
        for observer in self._observers:
            observer.locked(stop)

    def started(self, cluster: Cluster) -> None:
        """Tell them."""
        for observer in self._observers:
            observer.started(cluster)

    def compiling(self) -> None:
        """Tell them."""
        for observer in self._observers:
            observer.compiling()

    def compiled(self, seconds: float) -> None:
        """Tell them."""
        for observer in self._observers:
            observer.compiled(seconds)

    def tile_ended(self, outcome: Outcome) -> None:
        """Tell them."""
        for observer in self._observers:
            observer.tile_ended(outcome)

    def ending(self) -> None:
        """Tell them."""
        for observer in self._observers:
            observer.ending()

    def merged(self, report: MergeReport) -> None:
        """Tell them."""
        for observer in self._observers:
            observer.merged(report)


def merge(
    inputs: Place | Sequence[Place],
    output: Place,
    *,
    observer: Observer | None = None,
    **options: Any,
) -> MergeReport:
    """Merge the partials of one or more stores into a merged result, tile by tile.

    Per pixel the highest ``mip`` wins with its pose, sums and counts add, and mean, standard
    deviation and z-score follow. The exposures of a montage are merged each by itself, and laid on
    one canvas. Memory is bounded by a tile in each thread. Running an interrupted merge again does
    only the tiles that are missing; when exposures have come since, those that they touch.

    Parameters
    ----------
    inputs
        Paths or URLs of searches and of earlier merges, in the order that decides ties.
    output
        Path or URL of the result.
    observer
        Is told how it goes.
    **options
        The fields of :class:`MergeOptions`: ``cluster``, ``workers``, ``threads``, ``device``,
        ``rmm_pool_size``, ``tile_size``, ``memory_limit``, ``nan``, ``poses``, ``overwrite``,
        ``worker_timeout``, ``tls``, ``slurm``; of montages ``overlap``, ``erode``, ``origins``.

    Returns
    -------
    MergeReport

    Raises
    ------
    InvalidInputError, PlanError
        Before anything is written: inputs that do not belong together, options that cannot work.
    MissingDependencyError, DeviceError
        Before anything is written: a GPU was asked for and cannot be used.
    OutputExistsError
        Something else is at the output.
    OutputLockedError
        Another run is writing the output.
    TilesFailedError
        Some tiles failed; the others are done.
    StoppedError
        It was told to stop, or there was nothing left to run on; what was done is kept.

    Notes
    -----
    With ``cluster="local"`` worker processes import the calling script: guard it with
    ``if __name__ == "__main__":``.
    """
    watcher = observer or Observer()
    with within_job(MergeOptions.parse(options)) as asked:
        ready, checked = plan_merge(inputs, output, asked)
        watcher.planned(ready, checked)
        with OutputLock(open_objects(ready.output), watcher.waiting) as lock:
            watcher.locked(lock.stop)
            ready = confirm(ready, lock)
            report = _merge(ready, checked, lock, watcher)
    watcher.merged(report)
    return report


def _merge(
    ready: Preparation, options: MergeOptions, lock: OutputLock, watcher: Observer
) -> MergeReport:
    if not ready.missing:
        return merge_tiles(ready, options, _NoExecutor(), lock, watcher.tile_ended)
    with open_cluster(options) as cluster:
        watcher.started(cluster)
        try:
            here = watcher if isinstance(cluster.executor, ThreadExecutor) else None
            return merge_tiles(ready, options, cluster.executor, lock, watcher.tile_ended, here)
        finally:
            watcher.ending()


def plan_merge(
    inputs: Place | Sequence[Place], output: Place, options: MergeOptions
) -> tuple[Preparation, MergeOptions]:
    """Plan a merge and refuse it, with numbers, if it cannot fit; writes nothing.

    Returns
    -------
    ready
        The merge that can start.
    options
        With the device that was chosen, and what follows from it.

    Raises
    ------
    OcelotError
        As :func:`merge`.
    """
    places = [inputs] if isinstance(inputs, (str, PathLike)) else list(inputs)
    device, chosen = choose_device(options)
    ready = prepare(places, output, chosen, device)
    if ready.missing:
        refuse_what_cannot_fit(ready.forecast, n_workers(chosen), memory_nbytes())
    return ready, chosen


def memory_nbytes() -> int:
    """Memory that this process may use, in bytes: the machine's, or its control group's."""
    from distributed.system import MEMORY_LIMIT

    return int(MEMORY_LIMIT)


class _NoExecutor:
    def run(self, *_: object) -> None:
        raise AssertionError("there is nothing left to run")
