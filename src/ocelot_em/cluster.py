"""Where tiles run: threads in this process, worker processes on this machine, or a scheduler."""

import contextlib
import importlib.util
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import dask
from dask.system import CPU_COUNT

from ocelot_em.errors import PlanError
from ocelot_em.execute import ClientExecutor, ThreadExecutor
from ocelot_em.pipeline import Executor
from ocelot_em.plan import MergeOptions, n_threads

log = logging.getLogger(__name__)

DASHBOARD_PORT = 8787
"""Dask's usual one; another where it is taken."""

WORKER_ENVIRONMENT = {
    # Keep freed memory and reuse it: Dask's default returns it to the system, and every chunk
    # would be decoded into pages that have to be mapped anew.
    "MALLOC_TRIM_THRESHOLD_": "2147483648",
    "MALLOC_MMAP_THRESHOLD_": "33554432",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}


@dataclass(frozen=True)
class Cluster:
    """A place to run tiles.

    Parameters
    ----------
    executor
        Runs them.
    description
        What it is, for people.
    dashboard
        URL of the Dask dashboard, if there is one.
    """

    executor: Executor
    description: str
    dashboard: str | None


def n_workers(options: MergeOptions) -> int:
    """Workers that share this machine's memory: 1 for threads, 0 for a cluster elsewhere."""
    if options.cluster == "threads":
        return 1
    if options.cluster == "local":
        return options.workers or max(int(CPU_COUNT) // n_threads(options), 1)
    return 0


@contextlib.contextmanager
def open_cluster(options: MergeOptions) -> Iterator[Cluster]:
    """Start or attach to what the options name; stopped at the end if it was started here.

    Raises
    ------
    PlanError
        The cluster's name is not known, or there is no scheduler at the address.
    """
    kind = options.cluster
    if kind == "threads":
        if options.workers not in (None, 1):
            raise PlanError(
                f"workers: cluster 'threads' is one process, got {options.workers}; use --threads, "
                "or --cluster local"
            )
        threads = n_threads(options)
        yield Cluster(ThreadExecutor(threads), f"{threads} threads in this process", None)
    elif kind == "local":
        with _local_cluster(options) as cluster:
            yield cluster
    elif ":" in kind:
        with _attached(kind) as cluster:
            yield cluster
    else:
        raise PlanError(
            f"cluster: expected threads, local, or the address of a Dask scheduler such as "
            f"tcp://host:8786, got {kind!r}"
        )


@contextlib.contextmanager
def _local_cluster(options: MergeOptions) -> Iterator[Cluster]:
    from distributed import Client, LocalCluster

    workers, threads = n_workers(options), n_threads(options)
    has_dashboard = importlib.util.find_spec("bokeh") is not None
    with (
        dask.config.set({"distributed.nanny.pre-spawn-environ": WORKER_ENVIRONMENT}),
        _taking_another_port_quietly(),
        LocalCluster(
            n_workers=workers,
            threads_per_worker=threads,
            processes=True,
            host="127.0.0.1",
            dashboard_address=f"127.0.0.1:{DASHBOARD_PORT}" if has_dashboard else None,
            # The plan keeps workers within their memory; Dask's own limits would pause or
            # restart a worker that is doing what was planned.
            memory_limit=0,
        ) as cluster,
        Client(cluster) as client,
    ):
        if not has_dashboard:
            log.warning("no dashboard: pip install 'ocelot-em[viz]' for the bokeh that it needs")
        yield Cluster(
            ClientExecutor(client),
            f"{workers} worker processes of {threads} threads",
            cluster.dashboard_link if has_dashboard else None,
        )


@contextlib.contextmanager
def _taking_another_port_quietly() -> Iterator[None]:
    """Let Dask choose another port for the dashboard; its link is printed anyway."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Port .* is already in use", UserWarning)
        yield


@contextlib.contextmanager
def _attached(address: str) -> Iterator[Cluster]:
    from distributed import Client

    try:
        client = Client(address, timeout="15s")
    except (OSError, TimeoutError, ValueError) as error:
        raise PlanError(
            f"cluster: no Dask scheduler answers at {address}: {error}; start one with "
            "'dask scheduler', or use --cluster local"
        ) from error
    with client:
        n = len(client.nthreads())
        yield Cluster(
            ClientExecutor(client), f"{n} workers of {address}", client.dashboard_link or None
        )
