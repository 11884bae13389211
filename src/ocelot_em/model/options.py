"""The options of a merge, with their only description: of the API and of the command line."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ocelot_em.errors import InvalidInputError
from ocelot_em.model.problems import in_words, suggestion
from ocelot_em.model.regions import GroupBy, Overlap

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

LARGEST_TILE = 2**16
"""Maximum edge length of a tile in pixels."""

_SIZE = re.compile(r"([\d_]*\.?\d+|\d+\.)(e[+-]?\d+)?(?:([kmgtp])(i?))?b?", re.IGNORECASE)


def parse_size(text: object) -> object:
    """Parse a number of bytes such as ``800MB``, ``1.5 GiB`` or ``2g``."""
    if not isinstance(text, str):
        return text
    match = _SIZE.fullmatch(text.replace(" ", ""))
    if match is None:
        raise ValueError(f"expected a size such as 800MB or 2GiB, got {text!r}")
    number, exponent, prefix, binary = match.groups(default="")
    power = " kmgtp".index(prefix.lower()) if prefix else 0
    return int(float(number + exponent) * (1024 if binary else 1000) ** power)


Size = Annotated[int, Field(ge=1), BeforeValidator(parse_size)]
Count = Annotated[int, Field(ge=1, le=10_000)]


def _time_limit(text: str) -> str:
    if re.fullmatch(r"(\d+-)?\d{1,3}:\d\d(:\d\d)?", text) is None:
        raise ValueError(f"expected a time such as 04:00:00 or 1-12:00:00, got {text!r}")
    return text


def one_or_many(value: object) -> object:
    """Make a text or a number a tuple of one; leave other values as they are."""
    return (value,) if isinstance(value, (str, int)) else value


Names = Annotated[tuple[str, ...], BeforeValidator(one_or_many)]


@dataclass(frozen=True)
class Shown:
    """How the command line shows an option: under a heading, with a placeholder of its value."""

    heading: str
    placeholder: str = ""


class Options(BaseModel):
    """Base of options that are parsed once, wherever they come from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def parse(cls, options: Mapping[str, object]) -> Self:
        """Check options by name; raise an InvalidInputError that names all invalid ones."""
        try:
            return cls.model_validate(options)
        except ValidationError as error:
            raise InvalidInputError(map(cls._problem, error.errors())) from None

    @classmethod
    def of(cls, options: Self | None, keywords: Mapping[str, object]) -> Self:
        """Return options with others, by name, that override them; errors as of :meth:`parse`."""
        if options is None:
            return cls.parse(keywords)
        if not isinstance(options, cls):
            raise InvalidInputError(
                f"options: expected {cls.__name__}, got {type(options).__name__}; give options by "
                f"name, such as {next(iter(cls.model_fields))}=..."
            )
        given = {name: getattr(options, name) for name in options.model_fields_set}
        return cls.parse({**given, **keywords}) if keywords else options

    @classmethod
    def _problem(cls, problem: "ErrorDetails") -> str:
        """Describe a problem that pydantic found, and suggest a name for an unknown option."""
        *path, name = map(str, problem["loc"])
        text = f"option {'.'.join((*path, name))}: {in_words(problem)}"
        if problem["type"] != "extra_forbidden":
            return text
        model: Any = cls
        for outer in path:
            model = model.model_fields[outer].annotation
        return text + suggestion(name, model.model_fields)


class SlurmJobs(Options):
    """Resources of each worker's SLURM job; the default is Dask's configuration (``jobqueue``).

    Parameters
    ----------
    partition
        SLURM partition. Default: the cluster's own.
    account
        SLURM account. Default: the cluster's own.
    walltime
        Time limit, as ``HH:MM:SS``; workers are replaced before it expires.
        Default: 30 minutes.
    cores
        Total number of threads of a job. Default: 4.
    processes
        Number of worker processes of a job, which share the threads. Default: 1.
    memory
        Memory of a job, such as ``8GB``. Default: 1 GB per thread.
    interface
        Network interface, such as ``ib0``. Default: Dask's choice.
    directives
        Additional option of ``sbatch``, such as ``--gres=gpu:1``; repeat it for several.
        Default: none.
    log_directory
        Folder on shared storage for the output of the jobs. Default: ``jobs`` in the run folder, if
        there is one, or the current folder.
    """

    partition: str | None = None
    account: str | None = None
    walltime: Annotated[str, AfterValidator(_time_limit)] | None = None
    cores: Count | None = None
    processes: Count | None = None
    memory: str | None = None
    interface: str | None = None
    directives: Names = ()
    log_directory: str | None = None


_TILES, _RESULT, _MONTAGES, _GROUPS = "Tiles and memory", "Result", "Montages", "Groups"
_WORKERS, _SLURM = "Workers", "SLURM jobs (--cluster slurm)"


class MergeOptions(Options):
    """Options of a merge, with the same names as on the command line.

    Parameters
    ----------
    tile_size
        Edge length of a tile in pixels: at most 1024, or a multiple of it. Default: 1024, or less
        if the memory limit requires it.
    memory_limit
        Maximum memory of one worker, in bytes or as text such as ``800MB``. Default: limited only
        by the machine.
    device
        Device that computes the merge: ``cpu``, ``cuda``, or ``auto``: ``cuda`` if all workers have
        a GPU.
    rmm_pool_size
        Size of the RMM memory pool that each worker of ``--cluster cuda`` allocates on its GPU at
        the start, in bytes or as text. Default: CuPy's own pool, which grows as needed.
    nan
        Treatment of NaN and infinities in a partial. ``raise``: they are an error. ``mask``: the
        partial and its count are omitted at such pixels.
    poses
        Output for indexed poses. ``decoded``: the pose maps in addition to the index. ``index``:
        only the index, which is decoded when read; the output is 25 % smaller.
    derived
        Whether z-score, mean and standard deviation are ``stored``. ``none``: they are computed
        when they are read, from sums in float64 that are stored instead, with the same bits; the
        output is 30 % smaller.
    without
        Partials to leave out, by name, or as EXPOSURE/NAME in a search with exposures; also
        exposures whose folders were lost, by id. Default: none.
    so_far
        Merge what a search has recorded so far, although it is incomplete. The same command updates
        the result later.
    complete_only
        Merge an incomplete search, but only its partials that can no longer change.
    overwrite
        Replace an existing merged result, finished or not.
    group_by
        What the groups are whose z-scores are computed separately; the highest wins each pixel.
        ``template``: the searches of each template. ``sector``: each partial. ``exposure``: each
        exposure, where all cover the same pixels. Groups may have different search spaces.
        Default: no groups.
    overlap
        Rule for pixels that several exposures have searched. One exposure wins, for every map: the
        ``earliest`` acquired, the one with the highest z-score (``max-zscore``), or the one whose
        edge is farthest away (``farthest-from-edge``). Ties: the earliest acquired, then the lower
        number.
    erode
        Width in pixels of the edge to remove from every exposure's valid region.
    origins
        Treatment of exposures whose origin is not a whole pixel. ``exact``: it is an error.
        ``round``: the origin is rounded to the nearest pixel, halves to even.
    cluster
        Where tiles are merged: ``threads`` (this process), ``local`` (worker processes on this
        machine, with a dashboard), ``cuda`` (one worker process for each GPU of this machine),
        ``slurm`` (a SLURM job for each worker), ``slurm-job`` (the tasks of the SLURM job that
        includes this process) or the address of a running Dask scheduler.
    workers
        Number of worker processes (``local`` and ``cuda``) or jobs (``slurm``). Default: as many as
        the machine supports, or two jobs.
    threads
        Number of threads in each worker. Default: all workers together have one thread per CPU
        core.
    worker_timeout
        Seconds to wait for workers while a cluster has none. Default: 300; a day for ``slurm``,
        whose jobs may be queued.
    tls
        Encrypt the connections of driver, scheduler and workers with certificates, either those of
        Dask's configuration or new ones for this run.
    slurm
        Resources of each job of ``--cluster slurm``.

    Examples
    --------
    >>> from ocelot_em import MergeOptions
    >>> MergeOptions(tile_size=512, threads=4).overlap
    'earliest'
    """

    tile_size: Annotated[int | None, Field(ge=1, le=LARGEST_TILE), Shown(_TILES, "PX")] = None
    memory_limit: Annotated[Size | None, Shown(_TILES, "SIZE")] = None
    device: Annotated[Literal["auto", "cpu", "cuda"], Shown(_TILES)] = "auto"
    rmm_pool_size: Annotated[Size | None, Shown(_TILES, "SIZE")] = None
    nan: Annotated[Literal["raise", "mask"], Shown(_RESULT)] = "raise"
    poses: Annotated[Literal["decoded", "index"], Shown(_RESULT)] = "decoded"
    derived: Annotated[Literal["stored", "none"], Shown(_RESULT)] = "stored"
    without: Annotated[Names, Shown(_RESULT, "NAME")] = ()
    so_far: Annotated[bool, Shown(_RESULT)] = False
    complete_only: Annotated[bool, Shown(_RESULT)] = False
    overwrite: Annotated[bool, Shown(_RESULT)] = False
    group_by: Annotated[GroupBy | None, Shown(_GROUPS)] = None
    overlap: Annotated[Overlap, Shown(_MONTAGES)] = "earliest"
    erode: Annotated[int, Field(ge=0, le=2**30), Shown(_MONTAGES, "PX")] = 0
    origins: Annotated[Literal["exact", "round"], Shown(_MONTAGES)] = "exact"
    cluster: Annotated[str, Shown(_WORKERS, "NAME")] = "threads"
    workers: Annotated[Count | None, Shown(_WORKERS)] = None
    threads: Annotated[Count | None, Shown(_WORKERS)] = None
    worker_timeout: Annotated[
        float | None, Field(gt=0, le=1e7, allow_inf_nan=False), Shown(_WORKERS, "SECONDS")
    ] = None
    tls: Annotated[bool, Shown(_WORKERS)] = False
    slurm: Annotated[SlurmJobs, Shown(_SLURM)] = SlurmJobs()

    @property
    def takes_incomplete(self) -> bool:
        """Whether an incomplete search is merged."""
        return self.so_far or self.complete_only
