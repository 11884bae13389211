"""The merge as one call: plan and validate, start the cluster, merge, stop the cluster."""

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from typing import Unpack

from ocelot_em.errors import (
    ChunkError,
    FormatError,
    IncompleteError,
    InputChangedError,
    TilesFailedError,
)
from ocelot_em.merge.forecast import require_resources
from ocelot_em.merge.merge import merge as merge_tiles
from ocelot_em.merge.outcome import MergeReport
from ocelot_em.merge.resume import PreparedMerge, confirm, prepare
from ocelot_em.model.control_groups import memory_nbytes
from ocelot_em.model.keywords import MergeKeywords, takes
from ocelot_em.model.options import MergeOptions
from ocelot_em.model.problems import require
from ocelot_em.model.progress import Bar
from ocelot_em.run.clusters import choose_device, n_workers, open_cluster, within_job
from ocelot_em.run.connect import address_of, warn_if_unused
from ocelot_em.run.executors import ClientExecutor, ThreadExecutor
from ocelot_em.run.metrics import Metrics
from ocelot_em.run.observer import MergeBar, Observer, Observers
from ocelot_em.run.shared_cluster import SharedCluster
from ocelot_em.store.lock import OutputLock
from ocelot_em.store.objects import as_places, open_objects
from ocelot_em.store.sources import is_current

log = logging.getLogger(__name__)

PathOrUrl = str | PathLike[str]

MAX_PLANS = 6
"""Maximum number of times that the merge of a running search is planned."""

REPLAN_SECONDS = 0.1
"""Pause before it is planned again."""


@takes(MergeOptions)
def merge(
    inputs: PathOrUrl | Sequence[PathOrUrl],
    output: PathOrUrl,
    *,
    progress: bool | None = None,
    observer: Observer | None = None,
    **options: Unpack[MergeKeywords],
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
    progress
        Whether to show a bar and the link to the dashboard. None: in a notebook, and in an
        interactive session on a terminal; not in a script.
    observer
        Receives the events of the merge.
    **options
        The fields of :class:`MergeOptions`, which describes them. ``cluster`` may also be a
        ``distributed.Client`` or a cluster of Dask, which stay open; without it, an active client
        is not used, and a warning says so.

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

    Examples
    --------
    >>> from ocelot_em import merge, open_merged
    >>> report = merge("SEARCH.zarr", "RESULT.zarr")
    >>> float(open_merged("RESULT.zarr").scaled_mip.max()) > 9
    True
    """
    own = require(observer or Observer(), Observer, "observer: expected an Observer")
    if "cluster" not in options:
        warn_if_unused()
    with address_of(options.get("cluster", "threads")) as cluster:
        parsed = MergeOptions.parse({**options, "cluster": cluster})
        with within_job(parsed) as requested, MergeBar(Bar(progress)) as bar:
            return run_merge(inputs, output, requested, Observers(bar, own))


def run_merge(
    inputs: PathOrUrl | Sequence[PathOrUrl],
    output: PathOrUrl,
    options: MergeOptions,
    observer: Observer,
    shared: SharedCluster | None = None,
) -> MergeReport:
    """Merge as :func:`merge` does, with options that are parsed, in the driver of a SLURM job.

    ``shared`` is the cluster of several merges; by default, one is started for this merge.
    A running search may replace checkpoints while they are merged. Then the merge is planned again,
    in the end with the partials only that can no longer change.
    """
    asked = options
    for n_left in reversed(range(MAX_PLANS)):
        plan = None
        try:
            ready, completed = plan_merge(inputs, output, options, shared)
            plan = ready.plan
            observer.planned(ready, completed)
            with OutputLock(open_objects(ready.output), observer.waiting) as lock:
                observer.locked(lock.stop)
                held = confirm(ready, lock.objects)
                report = _merge(held, completed, lock, observer, shared)
            break
        except IncompleteError as error:
            if n_left or options == asked:
                raise
            raise IncompleteError(
                f"{inputs}: checkpoints were replaced {MAX_PLANS - 1} times before they were "
                "merged, and every partial can still change; write checkpoints less often (every "
                "of the recording), merge faster (more threads), or run this again later"
            ) from error
        except (TilesFailedError, InputChangedError, ChunkError, FormatError) as error:
            is_replaced = plan is None or not all(map(is_current, plan.sources))
            if not (options.takes_incomplete and is_replaced and n_left):
                raise
            log.debug("the merge is planned again", exc_info=error)
        time.sleep(REPLAN_SECONDS)
        if plan is not None:
            observer.waiting("the search has replaced what was being merged; planning again")
        if n_left == 1:
            observer.waiting("checkpoints come faster than a merge; leaving running partials out")
            options = options.model_copy(update={"complete_only": True})
    observer.merged(report)
    return report


def _merge(
    ready: PreparedMerge,
    options: MergeOptions,
    lock: OutputLock,
    observer: Observer,
    shared: SharedCluster | None,
) -> MergeReport:
    if not ready.missing:  # without starting a cluster
        return merge_tiles(ready, options, ThreadExecutor(1), lock, observer.tile_ended)
    with (shared.opened if shared else open_cluster)(options) as cluster:
        local: Observer | None = observer
        if isinstance(cluster.executor, ClientExecutor):
            metrics = Metrics(lock.id[:12], cluster.executor.client)
            metrics.planned(ready, options)
            observer, local = Observers(metrics, observer), None
            cluster.executor.on_compile = observer
            cluster = replace(cluster, dashboard=metrics.page(cluster.dashboard))
        observer.started(cluster)
        try:
            return merge_tiles(ready, options, cluster.executor, lock, observer.tile_ended, local)
        finally:
            observer.ending()


def plan_merge(
    inputs: PathOrUrl | Sequence[PathOrUrl],
    output: PathOrUrl,
    options: MergeOptions,
    shared: SharedCluster | None = None,
) -> tuple[PreparedMerge, MergeOptions]:
    """Plan a merge, and raise if it cannot fit; write nothing.

    Return the merge that can start, and the options completed for the chosen device.
    """
    device, completed = (shared.choose_device if shared else choose_device)(options)
    ready = prepare(as_places(inputs), output, completed, device)
    if ready.missing:
        require_resources(ready.forecast, ready.output, n_workers(completed), memory_nbytes())
    return ready, completed
