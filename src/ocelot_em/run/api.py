"""The merge as one call: plan and validate, start the cluster, merge, stop the cluster."""

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
    """Receives the events of a merge; override the methods of interest."""

    def planned(self, ready: Preparation, options: MergeOptions) -> None:
        """Called with the plan, before anything starts."""

    def waiting(self, why: str) -> None:
        """Called when the merge has to wait."""

    def locked(self, stop: Callable[[], None]) -> None:
        """Called when the output is locked; ``stop`` ends the run after the running tiles.

        ``stop`` may be called at any time, from any thread or signal handler, and returns at once.
        """

    def started(self, cluster: Cluster) -> None:
        """Called when the cluster is ready."""

    def compiling(self) -> None:
        """Called before kernels are compiled here, once per installation, and before any tile."""

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
        self._observers = observers

    def planned(self, ready: Preparation, options: MergeOptions) -> None:
        """Notify all."""
        for observer in self._observers:
            observer.planned(ready, options)

    def waiting(self, why: str) -> None:
        """Notify all."""
        for observer in self._observers:
            observer.waiting(why)

    def locked(self, stop: Callable[[], None]) -> None:
        """Notify all."""
        for observer in self._observers:
            observer.locked(stop)

    def started(self, cluster: Cluster) -> None:
        """Notify all."""
        for observer in self._observers:
            observer.started(cluster)

    def compiling(self) -> None:
        """Notify all."""
        for observer in self._observers:
            observer.compiling()

    def compiled(self, seconds: float) -> None:
        """Notify all."""
        for observer in self._observers:
            observer.compiled(seconds)

    def tile_ended(self, outcome: Outcome) -> None:
        """Notify all."""
        for observer in self._observers:
            observer.tile_ended(outcome)

    def ending(self) -> None:
        """Notify all."""
        for observer in self._observers:
            observer.ending()

    def merged(self, report: MergeReport) -> None:
        """Notify all."""
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
    deviation and z-score follow. Exposures of a montage are merged separately and placed on one
    canvas. Memory is bounded by one tile per thread. Running an interrupted merge again resumes it:
    only missing tiles are merged, and tiles that new exposures touch.

    Parameters
    ----------
    inputs
        Paths or URLs of searches and earlier merges; their order decides ties.
    output
        Path or URL of the result.
    observer
        Receives the events of the merge.
    **options
        The fields of :class:`MergeOptions`: ``cluster``, ``workers``, ``threads``, ``device``,
        ``rmm_pool_size``, ``tile_size``, ``memory_limit``, ``nan``, ``poses``, ``overwrite``,
        ``worker_timeout``, ``tls``, ``slurm``; for montages ``overlap``, ``erode``, ``origins``.

    Returns
    -------
    MergeReport

    Raises
    ------
    InvalidInputError, PlanError
        Inputs do not belong together, or options cannot work; nothing has been written.
    MissingDependencyError, DeviceError
        A GPU was requested but cannot be used; nothing has been written.
    OutputExistsError
        The output path contains something else.
    OutputLockedError
        Another run is writing the output.
    TilesFailedError
        Some tiles failed; all others are done.
    StoppedError
        The run was stopped, or its cluster was lost; finished tiles are kept.

    Notes
    -----
    With ``cluster="local"``, worker processes import the calling script: guard it with
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
    """Plan a merge, and raise if it cannot fit; write nothing.

    Returns
    -------
    ready
        The merge that can start.
    options
        Options completed for the chosen device.

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
    """Memory available to this process, in bytes: the machine's, or its control group's limit."""
    from distributed.system import MEMORY_LIMIT

    return int(MEMORY_LIMIT)


class _NoExecutor:
    def run(self, *_: object) -> None:
        raise AssertionError("there is nothing left to run")
