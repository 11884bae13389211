"""Workers that SLURM starts: a job for each, or tasks of the job that this process belongs to."""

import contextlib
import importlib.util
import logging
import os
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask

from ocelot_em.connect import client_of
from ocelot_em.errors import MissingDependencyError, PlanError
from ocelot_em.plan import MergeOptions, SlurmJobs
from ocelot_em.security import (
    configured_security,
    forget,
    security_of_run,
    shared_credentials,
)

log = logging.getLogger(__name__)

DEFAULT_JOBS = 2
DEFAULT_CORES = 4
DEFAULT_MEMORY_OF_THREAD = 10**9

LEAVE_SECONDS = 60
"""Before the end of their time, workers finish what they have in hand and leave."""

ANNOUNCEMENTS = signal.SIGUSR1, signal.SIGTERM
"""Of the end of a job's time, and of its preemption."""

DEATH_SECONDS = 60
"""For a worker to find the scheduler; without one it ends."""

TASKS_BESIDES = 2
"""Of a job: one is the scheduler, one the driver; all others are workers."""


def require_jobqueue() -> None:
    """Raise unless dask-jobqueue is installed.

    Raises
    ------
    MissingDependencyError
    """
    if importlib.util.find_spec("dask_jobqueue") is None:
        raise MissingDependencyError(
            "cluster slurm: dask-jobqueue is not installed: pip install 'ocelot-em[cluster]'"
        )


def completed(jobs: SlurmJobs) -> SlurmJobs:
    """Return what jobs ask for, with Dask's configuration and defaults where nothing is said."""
    require_jobqueue()
    import dask_jobqueue  # noqa: F401  (it adds its own defaults to Dask's configuration)

    def choose(name: str, default: Any, key: str = "") -> Any:
        said = getattr(jobs, name)
        if said is None:
            said = dask.config.get(f"jobqueue.slurm.{key or name}", None)
        return default if said is None else said

    cores = int(choose("cores", DEFAULT_CORES))
    return jobs.model_copy(
        update={
            "cores": cores,
            "processes": int(choose("processes", 1)),
            "memory": str(choose("memory", f"{cores * DEFAULT_MEMORY_OF_THREAD}B")),
            "walltime": choose("walltime", None),
            "log_directory": choose("log_directory", None, "log-directory"),
        }
    )


@contextlib.contextmanager
def slurm_cluster(options: MergeOptions, environment: dict[str, str]) -> Iterator[Any]:
    """Ask SLURM for workers and keep asking for those that go; all are cancelled in the end.

    Yields
    ------
    dask_jobqueue.SLURMCluster

    Raises
    ------
    PlanError
        ``sbatch`` cannot be run or refuses.
    """
    from dask_jobqueue import SLURMCluster

    jobs, n_jobs = completed(options.slurm), options.workers or DEFAULT_JOBS
    prologue = [*(dask.config.get("jobqueue.slurm.job-script-prologue", None) or [])]
    prologue += [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    arguments = [*(dask.config.get("jobqueue.slurm.worker-extra-args", None) or [])]
    if jobs.walltime is not None and "--lifetime" not in arguments:
        left = max(_seconds(jobs.walltime) - LEAVE_SECONDS, LEAVE_SECONDS)
        arguments += ["--lifetime", f"{left}s", "--lifetime-stagger", f"{left // 20}s"]
    said = {
        "queue": jobs.partition,
        "account": jobs.account,
        "walltime": jobs.walltime,
        "interface": jobs.interface,
        "log_directory": jobs.log_directory,
        "job_extra_directives": [*jobs.directives] or None,
        "security": security_of_run() if options.tls else None,
    }
    scheduler = dict(dask.config.get("jobqueue.slurm.scheduler-options", None) or {})
    scheduler.setdefault("dashboard_address", "127.0.0.1:0")
    try:
        with SLURMCluster(
            cores=jobs.cores,
            processes=jobs.processes,
            memory=jobs.memory,
            job_script_prologue=prologue,
            worker_extra_args=arguments,
            scheduler_options=scheduler,
            **{name: value for name, value in said.items() if value is not None},
        ) as cluster:
            log.debug("job script:\n%s", cluster.job_script())
            # A job that goes, because it was cancelled, preempted or had its time, is replaced.
            cluster.adapt(minimum_jobs=n_jobs, maximum_jobs=n_jobs)
            yield cluster
    except (FileNotFoundError, RuntimeError) as error:
        if "sbatch" not in str(error):
            raise
        raise PlanError(f"cluster slurm: sbatch does not take the job: {error}") from error


def _seconds(walltime: str) -> int:
    days, _, rest = walltime.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    hours, minutes, seconds = (*parts, 0, 0)[:3] if len(parts) == 3 or days else (0, *parts)
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


@contextlib.contextmanager
def slurm_tasks(options: MergeOptions) -> Iterator[str]:
    """Divide the tasks of this job: the first is the scheduler, the second goes on from here.

    All others are workers. They, and the scheduler, never return from here: they exit when the
    second does. Signals that announce the end of the job's time are for the second alone.

    Yields
    ------
    str
        Address of the scheduler.

    Raises
    ------
    PlanError
        This is no task of a SLURM job, or there are too few.
    """
    require_jobqueue()
    number, name = _task_and_name()
    is_driver = number == 1
    if not is_driver:
        # A worker process inherits that they are ignored; a handler of ours it would not.
        for announcement in ANNOUNCEMENTS:
            signal.signal(announcement, signal.SIG_IGN)
        _print_elsewhere()
    credentials = Path(f"{name}.tls")
    named = shared_credentials(credentials, is_maker=number == 0) if options.tls else {}
    _take_gpu()
    deferred: contextlib.AbstractContextManager[list[int]] = (
        _deferred_signals() if is_driver else contextlib.nullcontext([])
    )
    with dask.config.set(named):
        with deferred as came:
            runner = _runner(options, f"{name}.json")
        try:
            for number_of_signal in came:  # now that the other tasks can be told to end, too
                signal.raise_signal(number_of_signal)
            yield runner.scheduler_address
        finally:
            with contextlib.suppress(
                PlanError, OSError, TimeoutError, ValueError
            ):  # it has ended before
                _end(runner.scheduler_address)
            runner.scheduler_comm = None
            runner.close()
            Path(f"{name}.json").unlink(missing_ok=True)
            forget(credentials)


@contextlib.contextmanager
def _deferred_signals() -> Iterator[list[int]]:
    """Collect announcements of the end that come meanwhile; the second is not deferred."""
    came: list[int] = []
    before = {number: signal.getsignal(number) for number in ANNOUNCEMENTS}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, _frame: object) -> None:
        came.append(number)
        restore()

    for number in ANNOUNCEMENTS:
        signal.signal(number, note)
    try:
        yield came
    finally:
        restore()


def _print_elsewhere() -> None:
    """Have what scheduler and workers say, most of it when they end, not disturb the driver."""
    job = os.environ.get("SLURM_JOB_NAME", "ocelot"), os.environ["SLURM_JOB_ID"]
    with Path("{}-{}-workers.log".format(*job)).open("a") as log_of_workers:
        for stream in (1, 2):
            os.dup2(log_of_workers.fileno(), stream)


def _runner(options: MergeOptions, scheduler_file: str) -> Any:
    """Take this task's part; returns in the driver alone."""
    interrupt = signal.getsignal(signal.SIGINT)
    logging.getLogger("distributed").setLevel(logging.WARNING)
    # It takes the interrupt for itself as it is imported; in the other tasks, to end with it.
    from dask_jobqueue.slurm import SLURMRunner

    said: dict[str, Any] = {"protocol": "tls", "security": configured_security()}
    if not options.tls:
        said.clear()
    if options.slurm.interface is not None:
        said["interface"] = options.slurm.interface
    threads = options.threads or int(os.environ.get("SLURM_CPUS_PER_TASK", "1"))
    runner = SLURMRunner(
        scheduler_file=scheduler_file,
        scheduler_options={"dashboard_address": "127.0.0.1:0", **said},
        worker_class="distributed.Nanny",
        worker_options={
            "nthreads": threads,
            "memory_limit": 0,
            # One that its nanny starts anew while everything ends must not look for a scheduler
            # until the job's time is over.
            "death_timeout": DEATH_SECONDS,
            **said,
        },
    )
    signal.signal(signal.SIGINT, interrupt)
    return runner


def _end(address: str) -> None:
    """Have a scheduler and its workers end."""
    with client_of(address) as client:
        client.shutdown()


def _task_and_name() -> tuple[int, str]:
    """Return the number of this task, and a name that all tasks of its step agree on."""
    try:
        number, n_tasks = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
        job, step = os.environ["SLURM_JOB_ID"], os.environ["SLURM_STEP_ID"]
    except (KeyError, ValueError):
        raise PlanError(
            "cluster slurm-job: this is no task of a SLURM job; submit examples/slurm/merge.sbatch "
            "with sbatch, or use --cluster slurm to have workers submitted"
        ) from None
    if n_tasks <= TASKS_BESIDES:
        raise PlanError(
            f"cluster slurm-job: expected at least {TASKS_BESIDES + 1} tasks (a scheduler, a "
            f"driver, workers), got {n_tasks}; use sbatch --ntasks"
        )
    # A job that is started again keeps its number.
    again = os.environ.get("SLURM_RESTART_COUNT", "0")
    return number, f".ocelot-{job}-{again}-{step}"


def _take_gpu() -> None:
    """Have each task of a node see a GPU of its own, as far as there are."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if visible:
        devices = visible.split(",")
        local = int(os.environ.get("SLURM_LOCALID", "0"))
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[local % len(devices)]
