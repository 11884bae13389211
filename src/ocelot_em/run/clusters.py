"""Where tiles run: local threads, local worker processes or GPU workers, or a Dask scheduler."""

import contextlib
import importlib.util
import logging
import os
import socket
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

import dask

from ocelot_em.errors import (
    ClusterLostError,
    DeviceError,
    MissingDependencyError,
    OcelotError,
    PlanError,
)
from ocelot_em.kernels import require_compiler
from ocelot_em.kernels.device import DeviceFacts, find_devices, open_device
from ocelot_em.merge.memory_model import DeviceChoice, n_threads
from ocelot_em.merge.merge import Executor
from ocelot_em.model.control_groups import n_cpus
from ocelot_em.model.options import MergeOptions
from ocelot_em.model.text import count_text
from ocelot_em.model.threads import require_threads
from ocelot_em.run import slurm
from ocelot_em.run.connect import connect_client
from ocelot_em.run.executors import WORKER_TIMEOUT_SECONDS, ClientExecutor, ThreadExecutor
from ocelot_em.run.main_guard import require_main_guard
from ocelot_em.run.security import is_loopback, security_of_run, warn_if_open

log = logging.getLogger(__name__)

_T = TypeVar("_T")
Profile = contextlib.AbstractContextManager[object]

DASHBOARD_PORT = 8787
"""Dask's default port; another one is used if it is taken."""

WORKER_ENVIRONMENT = {
    # Keep freed memory for reuse: Dask's default returns it to the system, and the pages for every
    # decoded chunk would have to be mapped again.
    "MALLOC_TRIM_THRESHOLD_": "2147483648",
    "MALLOC_MMAP_THRESHOLD_": "33554432",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    # Opened and closed connections are routine, above all at the end of a run.
    "DASK_LOGGING__DISTRIBUTED": os.environ.get("DASK_LOGGING__DISTRIBUTED", "warning"),
}


@dataclass(frozen=True)
class Cluster:
    """A place to run tiles."""

    executor: Executor
    description: str
    dashboard: str | None

    def n_threads(self) -> int:
        """Return the latest known number of threads, from any thread."""
        executor = self.executor
        if isinstance(executor, ClientExecutor):
            return executor.latest_n_threads
        return executor.n_threads if isinstance(executor, ThreadExecutor) else 1

    def profiled(self, path: Path) -> Profile:
        """Profile the tasks; on exit, write an HTML page that needs no network."""
        if importlib.util.find_spec("bokeh") is None:
            log.warning("no performance report: it needs bokeh: pip install 'ocelot-em[viz]'")
            return contextlib.nullcontext()
        if isinstance(self.executor, ClientExecutor):
            from distributed import performance_report

            return cast("Profile", performance_report(path, mode="inline"))
        return _profiled(path)


KINDS = ("threads", "local", "cuda", "slurm", "slurm-job")
"""Kinds of clusters; the address of a scheduler is also accepted."""

ASSUMED_GPU_NBYTES = 8 * 10**9
"""Assumed memory of a GPU that SLURM has not allocated yet."""

WORKER_TIMEOUT_IN_QUEUE_SECONDS = 86_400.0
"""Default timeout for workers that wait in a queue."""

TIMEOUTS = {
    # A disconnected host is detected within seconds, and its tasks run elsewhere; with shorter
    # timeouts, Dask considers busy workers lost.
    "distributed.comm.timeouts.tcp": "15s",
    "distributed.comm.timeouts.connect": "15s",
    "distributed.scheduler.worker-ttl": "30s",
    "distributed.nanny.pre-spawn-environ": WORKER_ENVIRONMENT,
}


NO_LIMITS = {
    f"distributed.worker.memory.{action}": False
    for action in ("target", "spill", "pause", "terminate")
}
"""The plan bounds the memory of workers; Dask's own limits would pause or restart a worker that
follows the plan. Its reports show the limit."""


@contextlib.contextmanager
def _profiled(path: Path) -> Iterator[None]:
    """Profile Dask's threaded scheduler, which has no performance report."""
    from dask.diagnostics import Profiler, visualize

    profiler = Profiler()
    with profiler:
        yield
    if profiler.results:
        visualize([profiler], filename=str(path), show=False, mode="inline")


_users = set[int]()
"""Ids of processes that have used a Dask cluster: this one, or those that it was forked from."""

MAX_GPU_THREADS = 16
"""Maximum default number of threads of a GPU worker; they decode while the GPU waits."""


def choose_device(options: MergeOptions) -> tuple[DeviceChoice, MergeOptions]:
    """Choose the device for the arithmetic, before anything is planned or started.

    Return the choice and its reason, and the options completed with the device and, for GPU
    workers, their number and threads.
    """
    requested, cluster = options.device, options.cluster
    if cluster not in KINDS and ":" not in cluster:
        raise PlanError(
            f"cluster: expected {', '.join(KINDS)}, or the address of a Dask scheduler such as "
            f"tcp://host:8786, got {cluster!r}"
        )
    require_compiler()
    if cluster in ("local", "cuda"):
        require_main_guard(cluster)
    if cluster != "threads" and _users - {os.getpid()}:
        raise PlanError(
            f"cluster {cluster!r}: this process was forked from one that used a Dask cluster, and "
            "Dask's threads do not survive that; use cluster 'threads', or start this process "
            "with multiprocessing.get_context('spawn')"
        )
    if cluster == "cuda" and requested == "cpu":
        raise PlanError("device cpu: cluster 'cuda' needs GPUs; use --cluster local or threads")
    if cluster == "local" and requested == "cuda":
        raise PlanError(
            "device cuda: the processes of cluster 'local' would all use the same GPU; use "
            "--cluster cuda, or --cluster threads for one GPU"
        )
    if requested == "cpu":
        choice = DeviceChoice("cpu", "requested")
    elif cluster == "cuda" or (cluster == "threads" and requested == "cuda"):
        found = find_devices()
        if cluster == "cuda":
            _require_dask_cuda()
        n_devices = min(options.workers or len(found), len(found)) if cluster == "cuda" else 1
        choice = _cuda(found[:n_devices], "requested", options)
    elif cluster == "slurm" and requested == "cuda":
        memory = options.rmm_pool_size or ASSUMED_GPU_NBYTES
        jobs = options.workers or slurm.DEFAULT_JOBS
        choice = DeviceChoice("cuda", "requested, on SLURM jobs", jobs, memory)
    elif ":" in cluster:
        choice, threads = _device_of_workers(options)
        if choice.kind == "cuda":
            options = options.model_copy(update={"threads": options.threads or threads})
    else:
        choice = DeviceChoice("cpu", "auto: reading and decoding take most of the time")
    changes: dict[str, Any] = {"device": choice.kind}
    if cluster == "slurm":
        jobs_ask = slurm.with_defaults(options.slurm)
        share = max((jobs_ask.cores or 1) // (jobs_ask.processes or 1), 1)
        changes |= {"slurm": jobs_ask, "threads": options.threads or share}
    if cluster == "cuda":
        share = max(min(n_cpus() // choice.n_devices, MAX_GPU_THREADS), 1)
        changes |= {"workers": choice.n_devices, "threads": options.threads or share}
    return choice, options.model_copy(update=changes)


def _cuda(found: list[DeviceFacts], reason: str, options: MergeOptions) -> DeviceChoice:
    memory = min(facts.memory_nbytes for facts in found)
    names = " and ".join(dict.fromkeys(facts.name for facts in found))
    usable = int(memory * USABLE_SHARE)
    if options.rmm_pool_size is not None:
        usable = min(usable, options.rmm_pool_size)
    return DeviceChoice("cuda", f"{reason}: {len(found)} x {names}", len(found), usable)


USABLE_SHARE = 0.9
"""Usable fraction of a GPU's memory; its driver and other libraries need the rest."""


def _device_of_workers(options: MergeOptions) -> tuple[DeviceChoice, int]:
    """Choose a device from the workers' GPUs; also return the largest thread count of a worker."""
    with connect_client(options.cluster) as client:
        responses = _query_workers(client, lambda: find_devices()[0])
        threads = max(client.nthreads().values(), default=1)
    found = [response for response in responses if isinstance(response, DeviceFacts)]
    if responses and len(found) == len(responses):
        kind = "requested" if options.device == "cuda" else "auto"
        return _cuda(found, f"{kind}; all workers have a GPU", options), threads
    without = f"{len(responses) - len(found)} of {len(responses)} workers have no GPU"
    if options.device == "cuda":
        first = next((reason for reason in responses if isinstance(reason, str)), "no workers")
        raise DeviceError(f"device cuda: {without} at {options.cluster}: {first}")
    return DeviceChoice("cpu", f"auto: {without}"), threads


def _query_workers(client: Any, question: Callable[[], _T]) -> list[_T | str]:
    """Return the answers of all workers, or why they have none; lost workers are omitted."""
    try:
        return list(client.run(_answer_or_reason, question, on_error="ignore").values())
    except OcelotError:  # such as one raised by a signal handler
        raise
    except (OSError, TimeoutError, RuntimeError) as error:
        raise ClusterLostError(f"the connection to the Dask scheduler was lost: {error}") from error


def _answer_or_reason(question: Callable[[], _T]) -> _T | str:
    try:
        return question()
    except OcelotError as error:
        return str(error)


def _require_dask_cuda() -> None:
    if importlib.util.find_spec("dask_cuda") is None:
        raise MissingDependencyError(
            "cluster cuda: dask-cuda is not installed: pip install 'ocelot-em[cuda13]', or "
            "'ocelot-em[cuda12]' for drivers of CUDA 12"
        )


def n_workers(options: MergeOptions) -> int:
    """Number of workers that share this machine's memory: 1 for threads, 0 for a remote cluster."""
    if options.cluster == "threads":
        return 1
    if options.cluster == "cuda":
        return options.workers or 1
    if options.cluster == "local":
        return options.workers or max(n_cpus() // n_threads(options), 1)
    return 0


@contextlib.contextmanager
def open_cluster(options: MergeOptions) -> Iterator[Cluster]:
    """Start or connect to the cluster in the options; on exit, stop it if it was started here."""
    kind = options.cluster
    if kind != "threads":
        _users.add(os.getpid())
    if kind == "threads":
        if options.workers not in (None, 1):
            raise PlanError(
                f"workers: expected 1 for cluster 'threads', which is one process, got "
                f"{options.workers}; use --threads, or --cluster local"
            )
        threads = n_threads(options)
        if options.device == "cuda":
            open_device()
        yield Cluster(
            ThreadExecutor(threads), f"{count_text(threads, 'thread')} in this process", None
        )
    elif kind in ("local", "cuda", "slurm"):
        with (_slurm_cluster if kind == "slurm" else _local_cluster)(options) as cluster:
            yield cluster
    elif ":" in kind:
        with connect_client(kind) as client:
            if options.tls and not kind.startswith("tls:"):
                raise PlanError(
                    f"cluster {kind}: expected an address that starts with tls://, because of --tls"
                )
            warn_if_open(kind)
            _open_gpus(client, options)
            n = len(client.nthreads())
            yield Cluster(
                _executor(client, options), f"{n} workers of {kind}", _dashboard_of(client)
            )
    else:
        raise PlanError(
            f"cluster {kind}: only ocelot_em.merge and the command line assign roles to SLURM tasks"
        )


@contextlib.contextmanager
def within_job(options: MergeOptions) -> Iterator[MergeOptions]:
    """Assign roles to the tasks of a SLURM job, if this is one, before anything else starts.

    Yield, in the driver, options with the address of the scheduler. The other tasks never return:
    they exit after the driver.
    """
    if options.cluster != "slurm-job":
        yield options
        return
    with dask.config.set(TIMEOUTS | NO_LIMITS), slurm.slurm_tasks(options) as address:
        _wait_for_a_worker(address, options)
        yield options.model_copy(update={"cluster": address})


def _wait_for_a_worker(address: str, options: MergeOptions) -> None:
    timeout = options.worker_timeout or WORKER_TIMEOUT_SECONDS
    with connect_client(address) as client:
        try:
            client.wait_for_workers(1, timeout=timeout)
        except TimeoutError:
            raise ClusterLostError(
                f"no worker has connected to {address} within {timeout:.0f} s"
            ) from None


def _executor(client: Any, options: MergeOptions) -> ClientExecutor:
    queues = options.cluster == "slurm"
    default = WORKER_TIMEOUT_IN_QUEUE_SECONDS if queues else WORKER_TIMEOUT_SECONDS
    timeout = options.worker_timeout or default
    return ClientExecutor(client, worker_timeout_seconds=timeout)


@contextlib.contextmanager
def _slurm_cluster(options: MergeOptions) -> Iterator[Cluster]:
    from distributed import Client

    with (
        _dask_settings(),
        slurm.slurm_cluster(options, WORKER_ENVIRONMENT) as cluster,
        Client(cluster) as client,
    ):
        warn_if_open(cluster.scheduler_address)
        jobs, threads = options.workers or slurm.DEFAULT_JOBS, options.slurm.cores or 1
        yield Cluster(
            _executor(client, options),
            f"up to {count_text(jobs, 'SLURM job')} of {count_text(threads, 'thread')}",
            _dashboard_of(client),
        )


_MAX_SPARE_THREADS = 64
"""Maximum number of threads that are tried: the stack of each takes addresses (``ulimit -v``)."""


@contextlib.contextmanager
def _local_cluster(options: MergeOptions) -> Iterator[Cluster]:
    from distributed import Client, LocalCluster

    workers, threads = n_workers(options), n_threads(options)
    kind, settings = "worker process", dict[str, Any](memory_limit="auto")
    cluster_class: Any = LocalCluster
    if options.cluster == "cuda":
        from dask_cuda import LocalCUDACluster

        # Tasks leave nothing on a device for Dask to spill and return only summaries, so TCP is
        # fast enough.
        kind, cluster_class = "GPU worker", LocalCUDACluster
        settings = {
            "memory_limit": 0,
            "device_memory_limit": 0,
            "protocol": "tls" if options.tls else "tcp",
        }
        if options.rmm_pool_size is not None:
            settings["rmm_pool_size"] = options.rmm_pool_size
            settings["rmm_allocator_external_lib_list"] = "cupy"
    has_dashboard = importlib.util.find_spec("bokeh") is not None
    with (
        _restored_environment(),
        _dask_settings(),
        # Dask looks for a lost worker once, 15 s later, and closes its nanny if the next one is
        # just then lost as well. Nannies restart their workers without that.
        dask.config.set({"distributed.deploy.lost-worker-timeout": "10000 days"} | NO_LIMITS),
        _started(
            cluster_class,
            min(workers * (2 * threads + 1) + 4, _MAX_SPARE_THREADS),
            # Without it, nannies wait for ever for workers that cannot start.
            death_timeout=options.worker_timeout or WORKER_TIMEOUT_SECONDS,
            n_workers=workers,
            threads_per_worker=threads,
            processes=True,
            host="127.0.0.1",
            dashboard_address=_dashboard_address() if has_dashboard else None,
            security=security_of_run() if options.tls else None,
            **settings,
        ) as cluster,
        Client(cluster) as client,
    ):
        _open_gpus(client, options)
        if not has_dashboard:
            log.warning("no dashboard: it needs bokeh: pip install 'ocelot-em[viz]'")
        yield Cluster(
            _executor(client, options),
            f"{count_text(workers, kind)} of {count_text(threads, 'thread')}",
            _dashboard_of(client) if has_dashboard else None,
        )


def _started(cluster_class: Any, n_spare_threads: int, **settings: Any) -> Any:
    """Start a cluster; there must then be threads to spare for its tiles, which may not end."""
    try:
        with contextlib.ExitStack() as on_error:
            cluster = on_error.enter_context(cluster_class(**settings))
            require_threads(n_spare_threads)
            on_error.pop_all()
            return cluster
    except OcelotError:  # such as one raised by a signal handler
        raise
    except Exception as error:
        raise PlanError(
            f"cluster: {cluster_class.__name__} cannot start: {_innermost(error)}; its processes "
            "need a network interface for 127.0.0.1 and enough threads ('ulimit -u', 'ulimit -v'); "
            "or use --cluster threads"
        ) from error


def _innermost(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"


@contextlib.contextmanager
def _restored_environment() -> Iterator[None]:
    """Restore the variables that Dask's nannies set in this process for their workers."""
    names = (*WORKER_ENVIRONMENT, "PYTHONHASHSEED")
    before = {name: os.environ[name] for name in names if name in os.environ}
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)
        os.environ.update(before)


def _dashboard_of(client: Any) -> str | None:
    """Return the link to the dashboard; a loopback address if it is reachable only on its host."""
    link: str | None = client.dashboard_link or None
    with contextlib.suppress(Exception):  # a scheduler of another version, or a lost one
        # Dask's link has the scheduler's host whatever address the dashboard listens on. A lambda
        # is pickled by value, so the scheduler needs no ocelot_em.
        bound = client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.http_server.address)
        if link and is_loopback(bound):
            return str(urlsplit(link)._replace(netloc=f"{bound}:{urlsplit(link).port}").geturl())
    return link


def _dashboard_address() -> str:
    """Return the default address, or any free port if that is taken.

    Dask's own check leaves a socket open.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", DASHBOARD_PORT))
        except OSError:
            return "127.0.0.1:0"
    return f"127.0.0.1:{DASHBOARD_PORT}"


@contextlib.contextmanager
def _dask_settings() -> Iterator[None]:
    """Set timeouts, and ignore warnings about another dashboard port; the link is printed."""
    with dask.config.set(TIMEOUTS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Port .* is already in use", UserWarning)
        yield


def _open_gpus(client: Any, options: MergeOptions) -> None:
    """Open the GPU of every worker; raise a DeviceError with the first failure's reason."""
    if options.device != "cuda":
        return
    answers = _query_workers(client, lambda: open_device() is None)  # devices stay where they are
    reasons = [answer for answer in answers if isinstance(answer, str)]
    if reasons:
        raise DeviceError(f"{len(reasons)} workers cannot use their GPUs: {reasons[0]}")
