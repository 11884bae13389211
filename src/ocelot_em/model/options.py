"""The options of a merge, with their only description."""

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ocelot_em.errors import InvalidInputError
from ocelot_em.model.regions import Overlap

LARGEST_TILE = 2**16
"""Maximum edge length of a tile in pixels."""


def parse_size(text: object) -> object:
    """Parse a number of bytes such as ``800MB``, ``1GiB`` or ``2g``."""
    if not isinstance(text, str):
        return text
    from dask.utils import parse_bytes

    return int(parse_bytes(text))


def _by_key(value: object) -> object:
    """Parse ``KEY=VALUE`` texts from a command line into a mapping; keys may be repeated."""
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
    """Resources of each worker's SLURM job; None: from Dask's configuration (``jobqueue``).

    Parameters
    ----------
    partition, account
        SLURM partition and account.
    walltime
        Time limit, as ``HH:MM:SS``; workers are replaced before it expires.
    cores
        Total number of threads of a job; 4 if not configured.
    processes
        Number of worker processes of a job, which share the threads; 1 if not configured.
    memory
        Memory of a job, as text such as ``"8GB"``; 1 GB per thread if not configured.
    interface
        Network interface, such as ``ib0``.
    directives
        Additional options of ``sbatch``, such as ``--gres=gpu:1``.
    log_directory
        Folder on shared storage for the output of the jobs.
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
    """Options of a merge, with the same names as on the command line.

    Parameters
    ----------
    tile_size
        Edge length of a tile in pixels: at most 1024, or a multiple of it. None: automatic.
    memory_limit
        Maximum memory of one worker, in bytes or as text such as ``"800MB"``. None: limited only by
        the machine.
    nan
        ``raise``: NaN in a partial is an error. ``mask``: the partial and its count are omitted at
        such pixels.
    overlap
        Rule for pixels that several exposures of a montage have searched; one wins, for every map:
        the ``earliest`` acquired, the one with the highest z-score (``max-zscore``), or the one
        whose edge is farthest away (``farthest-from-edge``). Ties: the earliest acquired, then the
        lower number.
    erode
        Width in pixels of the edge removed from every exposure's valid region.
    origins
        ``exact``: origins must be whole pixels. ``round``: they are rounded to the nearest pixel,
        halves to even.
    poses
        ``decoded``: the pose maps of indexed poses are stored in addition to the index. ``index``:
        they are decoded when read, which reduces the output by a quarter.
    overwrite
        Replace an existing merged result, finished or not.
    cluster
        ``threads`` (this process), ``local`` (worker processes on this machine, with a dashboard),
        ``cuda`` (one worker process for each GPU of this machine), ``slurm`` (a SLURM job for each
        worker), ``slurm-job`` (the tasks of the SLURM job that includes this process) or the
        address of a running Dask scheduler.
    workers, threads
        Number of workers (``local`` and ``cuda``) or jobs (``slurm``), and of threads in each.
        None: one thread per CPU core; two jobs.
    worker_timeout
        Seconds to wait for workers while a cluster has none. None: 300; a day for ``slurm``, whose
        jobs may be queued.
    tls
        Whether driver, scheduler and workers use encryption and certificates, either those of
        Dask's configuration or new ones for this run.
    slurm
        Resources of the jobs of ``slurm``.
    device
        Device of the computation: ``cpu``, ``cuda``, or ``auto``: ``cuda`` if all workers of the
        cluster have a GPU.
    rmm_pool_size
        Size of the RMM pool that each worker of ``cuda`` allocates on its device at the start, in
        bytes or as text. None: CuPy's own pool, which grows as needed.
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
            Names every option that is unknown or has an invalid value.
        """
        try:
            return cls.model_validate(options)
        except ValidationError as error:
            raise InvalidInputError(_in_words(p) for p in error.errors()) from None


def _in_words(problem: Any) -> str:
    """Format a problem that pydantic found with an option."""
    *path, name = map(str, problem["loc"])
    says = f"option {'.'.join((*path, name))}: {problem['msg']}, got {problem['input']!r}"
    if problem["type"] != "extra_forbidden":
        return says
    known = SlurmJobs.model_fields if path == ["slurm"] else MergeOptions.model_fields
    nearest = difflib.get_close_matches(name, known, 1)
    return f"{says}; did you mean {nearest[0]}?" if nearest else says
