"""Workers started by SLURM: in jobs of their own, or as tasks of this process's job."""

import contextlib
import importlib.util
import logging
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NoReturn

import dask

from ocelot_em.errors import InvalidInputError, MissingDependencyError, PlanError
from ocelot_em.model.options import MergeOptions, SlurmJobs
from ocelot_em.run.connect import (
    close_without_clients,
    connect_client,
    keep_connected,
    wait_for_file,
)
from ocelot_em.run.security import (
    configured_security,
    remove_certificates,
    security_of_run,
    share_certificates,
)

log = logging.getLogger(__name__)

DEFAULT_JOBS = 2
DEFAULT_CORES = 4
DEFAULT_MEMORY_OF_THREAD = 10**9

WALLTIME_MARGIN_SECONDS = 60
"""Time before the end of a job at which its workers finish their tasks and exit."""

STOP_SIGNALS = signal.SIGUSR1, signal.SIGTERM
"""Signals that SLURM sends before a job's time limit and at its preemption."""

LOST_JOB_SECONDS = 20
"""Interval at which the queue is searched for worker jobs that ended before they connected."""

NO_SCHEDULER_TIMEOUT_SECONDS = 60
"""Time after which a worker that finds no scheduler exits."""

SUBMIT_TIMEOUT_SECONDS = 60
"""Timeout for sbatch to accept or reject the first worker job."""

START_TIMEOUT_SECONDS = 300
"""Timeout for all tasks of a job to start and find each other."""

NO_DRIVER_TIMEOUT_SECONDS = 20
"""Time after which a scheduler without a driver exits."""

EXIT_GRACE_SECONDS = 10
"""Time that workers have to exit by themselves after the driver."""

DRIVER = 1
"""Rank of the driver task."""

N_OTHER_TASKS = 2
"""Number of tasks of a job that are not workers: the scheduler and the driver."""


def require_jobqueue() -> None:
    """Raise unless dask-jobqueue is installed."""
    if importlib.util.find_spec("dask_jobqueue") is None:
        raise MissingDependencyError(
            "cluster slurm: dask-jobqueue is not installed: pip install 'ocelot-em[cluster]'"
        )


def with_defaults(jobs: SlurmJobs) -> SlurmJobs:
    """Return job options with unset ones taken from Dask's configuration or the defaults."""
    require_jobqueue()
    import dask_jobqueue  # noqa: F401  (it adds its own defaults to Dask's configuration)

    def choose(name: str, default: Any) -> Any:
        value = getattr(jobs, name)
        if value is None:
            value = _configured(name)
        return default if value is None else value

    cores = choose("cores", DEFAULT_CORES)
    return jobs.model_copy(
        update={
            "cores": cores,
            "processes": choose("processes", 1),
            "memory": choose("memory", f"{cores * DEFAULT_MEMORY_OF_THREAD}B"),
            "walltime": choose("walltime", None),
            "log_directory": choose("log_directory", None),
        }
    )


def with_logs_in(folder: Path, options: MergeOptions) -> MergeOptions:
    """Return options whose worker jobs write their output to a folder, if nothing else is set."""
    # The folder becomes part of a line of the job script, which has no quotes.
    is_one_word = not any(map(str.isspace, str(folder)))
    if options.cluster != "slurm" or options.slurm.log_directory or not is_one_word:
        return options
    if _configured("log_directory") is not None:
        return options
    jobs = options.slurm.model_copy(update={"log_directory": str(folder)})
    return options.model_copy(update={"slurm": jobs})


def _configured(name: str) -> Any:
    """Return a job option in Dask's configuration; None if there is none."""
    key = name.replace("_", "-")
    value = dask.config.get(f"jobqueue.slurm.{key}", None)
    if value is None:
        return None
    place = f"Dask's configuration: jobqueue.slurm.{key}"
    if name == "walltime":  # YAML turns 1:30:00 without quotes into a number of seconds
        try:
            _seconds(value)
        except (AttributeError, ValueError):
            raise PlanError(
                f"{place}: expected a text such as '01:30:00', in quotes, got {value!r}; or give "
                "--slurm.walltime HH:MM:SS"
            ) from None
        return value
    if name == "memory" and type(value) is int:
        value = f"{value}B"
    try:
        return getattr(SlurmJobs.parse({name: value}), name)
    except InvalidInputError as error:
        problem = error.problems[0].partition(": ")[2]
        raise PlanError(f"{place}: {problem}; or give --slurm.{name} VALUE") from None


def _configured_list(key: str) -> list[str]:
    value = dask.config.get(f"jobqueue.slurm.{key}", None) or []
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise PlanError(
            f"Dask's configuration: jobqueue.slurm.{key}: expected a list of texts, got {value!r}"
        )
    return [*value]


@contextlib.contextmanager
def slurm_cluster(options: MergeOptions, environment: dict[str, str]) -> Iterator[Any]:
    """Submit worker jobs to SLURM, replace those that end, and cancel all of them on exit.

    Raise a PlanError if SLURM rejects them. What it accepted once is submitted again until it is
    accepted again.
    """
    jobs, n_jobs = with_defaults(options.slurm), options.workers or DEFAULT_JOBS
    prologue = _configured_list("job-script-prologue")
    prologue += [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    arguments = _configured_list("worker-extra-args")
    if jobs.walltime is not None and "--lifetime" not in arguments:
        left = max(_seconds(jobs.walltime) - WALLTIME_MARGIN_SECONDS, WALLTIME_MARGIN_SECONDS)
        arguments += ["--lifetime", f"{left}s", "--lifetime-stagger", f"{left // 20}s"]
    settings = {
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
    cluster_class, first = _reporting_cluster()
    with cluster_class(
        cores=jobs.cores,
        processes=jobs.processes,
        memory=jobs.memory,
        job_script_prologue=prologue,
        worker_extra_args=arguments,
        scheduler_options=scheduler,
        **{name: value for name, value in settings.items() if value is not None},
    ) as cluster:
        log.debug("job script:\n%s", cluster.job_script())
        # Replaces jobs that were cancelled or preempted, or that reached their time limit.
        cluster.adapt(Adaptive=_adaptive(), minimum_jobs=n_jobs, maximum_jobs=n_jobs)
        try:
            rejection = first.result(SUBMIT_TIMEOUT_SECONDS)
        except TimeoutError:
            rejection = f"sbatch has not answered within {SUBMIT_TIMEOUT_SECONDS} s"
        if rejection:
            raise PlanError(
                f"cluster slurm: no worker job can be submitted: {rejection}; check the --slurm "
                "options ('sinfo' lists the partitions), on a host that can submit jobs"
            )
        yield cluster


def _reporting_cluster() -> tuple[Any, "Future[str]"]:
    """Return Dask's cluster on SLURM, and why its first job was rejected; empty if it was not.

    Dask submits jobs in the background, and retries for ever.
    """
    from dask_jobqueue import SLURMCluster
    from dask_jobqueue.slurm import SLURMJob
    from distributed.deploy.spec import ProcessInterface

    first = Future[str]()

    class ReportingJob(SLURMJob):  # type: ignore[misc]
        async def start(self) -> None:
            rejection = ""
            try:
                await super().start()
            except (OSError, RuntimeError, ValueError) as error:
                rejection = _rejection(error)
                await ProcessInterface.start(self)  # without a job, it is lost, and replaced
            if not first.done():
                first.set_result(rejection)
            elif rejection and not first.result():
                log.warning("a worker job was rejected, and is submitted again: %s", rejection)

    return type("ReportingCluster", (SLURMCluster,), {"job_cls": ReportingJob}), first


def _rejection(error: Exception) -> str:
    """Return what sbatch prints, in one line, or why it cannot run."""
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}"
    printed = str(error).partition("stderr:\n")[2] or str(error)
    lines = (line.removeprefix("sbatch: error: ").strip() for line in printed.splitlines())
    return "; ".join(filter(None, lines))


def _adaptive() -> Any:
    """Return Dask's adaptive scaling, which then also replaces jobs that ended unnoticed.

    Dask replaces a job when its worker disconnects, so never one that was cancelled or that failed
    before its worker connected.
    """
    from distributed import Adaptive

    class ReplacingLostJobs(Adaptive):  # type: ignore[misc]
        searched = 0.0
        missing: frozenset[str] = frozenset()

        async def recommendations(self, target: int) -> Any:
            if time.monotonic() - self.searched > LOST_JOB_SECONDS:
                self.searched = time.monotonic()
                await self.forget_lost_jobs()
            return await super().recommendations(target)

        async def forget_lost_jobs(self) -> None:
            """Forget jobs missing from the queue twice in a row; Dask then submits new ones.

            By the second time Dask itself has replaced those whose workers had connected.
            """
            workers = self.cluster.workers
            try:
                queue = await self.cluster.job_cls._call(["squeue", "--me", "-h", "-o", "%A"])
            except (OSError, RuntimeError):  # the queue does not answer: nothing is known
                return
            queued, before = {*queue.split()}, self.missing
            lost = {name: job.job_id for name, job in workers.items() if job.job_id not in queued}
            self.missing = frozenset(lost.values())
            for name, job in lost.items():
                # Several workers of one job have its name with a suffix.
                is_connected = any(f"{worker}-".startswith(f"{name}-") for worker in self.observed)
                if job in before and not is_connected:
                    if job is not None:  # it was accepted
                        log.warning("job %s ended before its worker connected: replacing it", job)
                    del workers[name]

    return ReplacingLostJobs


def _seconds(walltime: str) -> int:
    days, _, rest = walltime.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    hours, minutes, seconds = (*parts, 0, 0)[:3] if len(parts) == 3 or days else (0, *parts, 0)[:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


@contextlib.contextmanager
def slurm_tasks(options: MergeOptions) -> Iterator[str]:
    """Assign roles to the tasks of this job: scheduler, driver, and workers, in this order.

    Only the driver returns; the scheduler and the workers exit after it. Only the driver handles
    signals that announce the end of the job, and its exit code is the job's. Yield the scheduler's
    address. Refuse a process that is not a task of a SLURM job, and too few tasks.
    """
    require_jobqueue()
    number, name, earlier = _task_and_names()
    if number != DRIVER:
        _serve(options, name, is_scheduler=number == 0)
    for killed in earlier:  # jobs killed as a whole, before any task could clean up
        _clean_up(killed)
    with contextlib.ExitStack() as stack:
        stack.callback(_clean_up, name)
        with _deferred_signals() as received:
            stack.enter_context(_credentials(options, name, creates=False))
            _wait_for_scheduler(name)
            runner = _runner(options, name)
        stack.callback(_end, runner)
        for number_of_signal in received:  # now the other tasks can be stopped, too
            signal.raise_signal(number_of_signal)
        stack.enter_context(keep_connected(runner.scheduler_address))  # keeps it running
        yield runner.scheduler_address


def _serve(options: MergeOptions, name: str, *, is_scheduler: bool) -> NoReturn:
    """Run the scheduler or a worker until the driver has ended.

    srun's exit code is the highest of all tasks, so this one always exits with 0.
    """
    for stop_signal in STOP_SIGNALS:
        # Worker processes inherit ignored signals, but not handlers.
        signal.signal(stop_signal, signal.SIG_IGN)
    _redirect_output()
    if not is_scheduler:
        # The scheduler cannot stop a worker that is not connected yet.
        threading.Thread(target=_exit_after, args=(_scheduler_file(name),), daemon=True).start()
    try:
        with _credentials(options, name, creates=is_scheduler):
            if not is_scheduler:
                _wait_for_scheduler(name)
                _take_gpu()
            _runner(options, name)
    except Exception:
        log.exception("a task has failed")
    finally:
        if is_scheduler:  # in case the driver was killed
            _clean_up(name)
        sys.stdout.flush()
        os._exit(0)


def _wait_for_scheduler(name: str) -> None:
    problem = f"cluster slurm-job: no scheduler has started within {START_TIMEOUT_SECONDS} s"
    hint = f"its output is in {_workers_log()}"
    wait_for_file(_scheduler_file(name), START_TIMEOUT_SECONDS, f"{problem}; {hint}")


def _exit_after(scheduler_file: Path) -> None:
    """Exit this process once the file has been missing for some seconds, or never appeared."""
    deadline = time.monotonic() + START_TIMEOUT_SECONDS
    while True:
        try:
            exists = scheduler_file.exists()
        except OSError:  # a network file system is unavailable
            exists = True
        if exists:
            deadline = time.monotonic() + EXIT_GRACE_SECONDS
        if time.monotonic() > deadline:
            os._exit(0)
        time.sleep(1)


def _credentials(options: MergeOptions, name: str, *, creates: bool) -> Any:
    """Return a context in which Dask has this run's certificates."""
    folder = _certificates_folder(name)
    return dask.config.set(share_certificates(folder, creates=creates) if options.tls else {})


def _scheduler_file(name: str) -> Path:
    """Return the file by which the other tasks find the scheduler."""
    return Path(f"{name}.json")


def _certificates_folder(name: str) -> Path:
    return Path(f"{name}.tls")


def _clean_up(name: str) -> None:
    _scheduler_file(name).unlink(missing_ok=True)
    remove_certificates(_certificates_folder(name))


@contextlib.contextmanager
def handled_signals(handler: Callable[[int, object], None]) -> Iterator[None]:
    """Handle ``STOP_SIGNALS``; restore the earlier handlers on exit."""
    before = {number: signal.signal(number, handler) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


@contextlib.contextmanager
def _deferred_signals() -> Iterator[list[int]]:
    """Defer the first of ``STOP_SIGNALS`` and collect it; a second is not deferred."""
    received: list[int] = []
    with contextlib.ExitStack() as stack:

        def record(number: int, _frame: object) -> None:
            received.append(number)
            stack.close()

        stack.enter_context(handled_signals(record))
        yield received


def _redirect_output() -> None:
    """Redirect the output of scheduler and workers to a log file, away from the driver's."""
    with _workers_log().open("a") as workers_log:
        for stream in (1, 2):
            os.dup2(workers_log.fileno(), stream)


def _workers_log() -> Path:
    job = os.environ.get("SLURM_JOB_NAME", "ocelot"), os.environ["SLURM_JOB_ID"]
    return Path("{}-{}-workers.log".format(*job))


def _runner(options: MergeOptions, name: str) -> Any:
    """Run this task's role; return only in the driver."""
    interrupt = signal.getsignal(signal.SIGINT)
    logging.getLogger("distributed").setLevel(logging.WARNING)
    # Its import replaces the handler of SIGINT; the other tasks need that to exit.
    from dask_jobqueue.slurm import SLURMRunner

    settings: dict[str, Any] = {"protocol": "tls", "security": configured_security()}
    if not options.tls:
        settings.clear()
    if options.slurm.interface is not None:
        settings["interface"] = options.slurm.interface
    n_cpus = int(os.environ.get("SLURM_CPUS_PER_TASK", "1"))
    megabytes = int(os.environ.get("SLURM_MEM_PER_CPU", "0")) * n_cpus
    runner = SLURMRunner(
        scheduler_file=str(_scheduler_file(name)),
        scheduler_options={
            "dashboard_address": "127.0.0.1:0",
            "plugins": [close_without_clients(START_TIMEOUT_SECONDS, NO_DRIVER_TIMEOUT_SECONDS)],
            **settings,
        },
        worker_class="distributed.Nanny",
        worker_options={
            "nthreads": options.threads or n_cpus,
            "memory_limit": megabytes * 2**20 or "auto",  # for Dask's pages only
            # A worker that its nanny restarts during shutdown must not look for a scheduler until
            # the job's time limit.
            "death_timeout": NO_SCHEDULER_TIMEOUT_SECONDS,
            **settings,
        },
    )
    signal.signal(signal.SIGINT, interrupt)
    return runner


def _end(runner: Any) -> None:
    """Shut down the scheduler and its workers."""
    # The scheduler may have exited already.
    with (
        contextlib.suppress(PlanError, OSError, TimeoutError, ValueError),
        connect_client(runner.scheduler_address) as client,
    ):
        client.shutdown()
    runner.scheduler_comm = None
    runner.close()


def _task_and_names() -> tuple[int, str, list[str]]:
    """Return this task's rank, a name shared by all tasks of its step, and earlier names.

    A restarted job keeps its number; the earlier names are those of its earlier starts.
    """
    try:
        number, n_tasks = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
        job, step = os.environ["SLURM_JOB_ID"], os.environ["SLURM_STEP_ID"]
    except (KeyError, ValueError):
        raise PlanError(
            "cluster slurm-job: this process is not a task of a SLURM job; submit "
            "examples/slurm/merge.sbatch with sbatch, or use --cluster slurm, which submits workers"
        ) from None
    if n_tasks <= N_OTHER_TASKS:
        raise PlanError(
            f"cluster slurm-job: expected at least {N_OTHER_TASKS + 1} tasks (a scheduler, a "
            f"driver, workers), got {n_tasks}; use sbatch --ntasks"
        )
    n_restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    *earlier, name = (f".ocelot-{job}-{start}-{step}" for start in range(n_restarts + 1))
    return number, name, earlier


def _take_gpu() -> None:
    """Assign one visible GPU to each task of a node; they share GPUs if there are too few."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if visible:
        devices = visible.split(",")
        local = int(os.environ.get("SLURM_LOCALID", "0"))
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[local % len(devices)]
