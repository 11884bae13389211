"""The options of a merge: the one place where an option is described."""

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ocelot_em.errors import InvalidInputError
from ocelot_em.model.regions import Overlap

LARGEST_TILE = 2**16
"""Edge of a tile in pixels."""


def parse_size(text: object) -> object:
    """Read a number of bytes such as ``800MB``, ``1GiB`` or ``2g``."""
    if not isinstance(text, str):
        return text
    from dask.utils import parse_bytes

    return int(parse_bytes(text))


def _by_key(value: object) -> object:
    """Turn ``KEY=VALUE`` texts, as of a command line, into a mapping; keys may be repeated."""
    if not isinstance(value, list):
        return value
    found: dict[str, list[str]] = {}
    for text in value:
        key, _, content = str(text).partition("=")
        found.setdefault(key, []).append(content)
    return {
        key: contents if key == "directives" else contents[-1] for key, contents in found.items()
    }


class SlurmJobs(BaseModel):
    """What each worker's SLURM job asks for; None: as Dask's configuration says (``jobqueue``).

    Parameters
    ----------
    partition, account
        Where it runs, and on whose account.
    walltime
        Most time, as ``HH:MM:SS``; workers leave, and are replaced, before it ends.
    cores
        Threads of a job in all; 4 if nothing says so.
    processes
        Worker processes of a job, which share the threads; 1 if nothing says so.
    memory
        Of a job, as text such as ``"8GB"``; 1 GB for each thread if nothing says so.
    interface
        Network on which they talk, such as ``ib0``.
    directives
        More options of ``sbatch``, such as ``--gres=gpu:1``.
    log_directory
        Folder, which all nodes see, of what the jobs print.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    partition: str | None = None
    account: str | None = None
    walltime: Annotated[str, Field(pattern=r"^(\d+-)?\d{1,3}:\d\d(:\d\d)?$")] | None = None
    cores: Annotated[int, Field(ge=1, le=10_000)] | None = None
    processes: Annotated[int, Field(ge=1, le=10_000)] | None = None
    memory: str | None = None
    interface: str | None = None
    directives: tuple[str, ...] = ()
    log_directory: str | None = None


class MergeOptions(BaseModel):
    """How to merge; the same names as the command line's options.

    Parameters
    ----------
    tile_size
        Edge of a tile in pixels: at most 1024, or a multiple of it. None: chosen.
    memory_limit
        Most memory of one worker, in bytes or as text such as ``"800MB"``. None: no limit but the
        machine's.
    nan
        ``raise``: NaN in a partial is an error. ``mask``: at such pixels the partial is left out,
        its count too.
    overlap
        Of a montage: which exposure wins a pixel that several have searched, for every map. The
        ``earliest`` acquired; that of the highest z-score (``max-zscore``); or the one whose edge
        is ``farthest-from-edge``. Ties: the earliest acquired, then the one with the lower number.
    erode
        Width in pixels of the edge that is left out of every exposure's valid region.
    origins
        ``exact``: origins that are not whole pixels are refused. ``round``: they are rounded to the
        nearest pixel, halves to even ones.
    poses
        ``decoded``: the pose maps of indexed poses are stored beside the index. ``index``: they are
        not, and are decoded by those who read them: a quarter less to write and to keep.
    overwrite
        Replace an existing merged result, finished or not.
    cluster
        ``threads`` (this process), ``local`` (worker processes on this machine, with a dashboard),
        ``cuda`` (one worker process for each GPU of this machine), ``slurm`` (a SLURM job for each
        worker), ``slurm-job`` (the tasks of the SLURM job that this process is one of) or the
        address of a running Dask scheduler.
    workers, threads
        Number of workers (of ``local`` and ``cuda``; of ``slurm`` the jobs), and of threads in
        each. None: one thread per CPU core; two jobs.
    worker_timeout
        Seconds to wait, of a cluster, while it has no workers. None: 300; of ``slurm``, whose jobs
        stand in a queue, a day.
    tls
        Whether driver, scheduler and workers talk encrypted and know each other by certificates:
        those of Dask's configuration, or such as are made for this run.
    slurm
        What the jobs of ``slurm`` ask for.
    device
        Where the arithmetic is done: ``cpu``, ``cuda``, or ``auto``: ``cuda`` if all workers of the
        cluster have a GPU.
    rmm_pool_size
        Device memory that each worker of ``cuda`` takes at its start, for RMM to give out, in bytes
        or as text. None: CuPy's own pool, which grows as needed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tile_size: Annotated[int, Field(ge=1, le=LARGEST_TILE)] | None = None
    memory_limit: Annotated[int, Field(ge=1), BeforeValidator(parse_size)] | None = None
    nan: Literal["raise", "mask"] = "raise"
    overlap: Overlap = "earliest"
    erode: Annotated[int, Field(ge=0, le=2**30)] = 0
    origins: Literal["exact", "round"] = "exact"
    poses: Literal["decoded", "index"] = "decoded"
    overwrite: bool = False
    cluster: str = "threads"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    rmm_pool_size: Annotated[int, Field(ge=1), BeforeValidator(parse_size)] | None = None
    workers: Annotated[int, Field(ge=1, le=10_000)] | None = None
    threads: Annotated[int, Field(ge=1, le=10_000)] | None = None
    worker_timeout: Annotated[float, Field(gt=0, le=1e7, allow_inf_nan=False)] | None = None
    tls: bool = False
    slurm: Annotated[SlurmJobs, BeforeValidator(_by_key)] = SlurmJobs()

    @classmethod
    def parse(cls, options: Mapping[str, object]) -> Self:
        """Check options by name.

        Raises
        ------
        InvalidInputError
            Naming every option that is unknown or has an unusable value.
        """
        try:
            return cls.model_validate(options)
        except ValidationError as error:
            raise InvalidInputError(_in_words(p) for p in error.errors()) from None


def _in_words(problem: Any) -> str:
    """Say what pydantic found wrong with an option."""
    *path, name = map(str, problem["loc"])
    says = f"option {'.'.join((*path, name))}: {problem['msg']}, got {problem['input']!r}"
    if problem["type"] != "extra_forbidden":
        return says
    known = SlurmJobs.model_fields if path == ["slurm"] else MergeOptions.model_fields
    nearest = difflib.get_close_matches(name, known, 1)
    return f"{says}; did you mean {nearest[0]}?" if nearest else says
