"""Options as keywords of functions, for type checkers, editors and ``help``.

Models of options describe and check them; here are only their names, and the types of the values
that they accept. A test keeps both in step.
"""

import inspect
from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any, Literal, Protocol, TypedDict, TypeVar

from ocelot_em.model.options import Options, SlurmJobs
from ocelot_em.model.regions import GroupBy, Overlap

_Function = TypeVar("_Function", bound=Callable[..., Any])


class SlurmKeywords(TypedDict, total=False):
    """Those of :class:`ocelot_em.model.options.SlurmJobs`."""

    partition: str | None
    account: str | None
    walltime: str | None
    cores: int | None
    processes: int | None
    memory: str | None
    interface: str | None
    directives: str | Sequence[str]
    log_directory: str | None


class Scheduled(Protocol):
    """A ``distributed.Client``, or a cluster of Dask."""

    @property
    def dashboard_link(self) -> Any:
        """Link to its dashboard."""
        ...


class MergeKeywords(TypedDict, total=False):
    """Those of :class:`ocelot_em.MergeOptions`."""

    tile_size: int | None
    memory_limit: int | str | None
    device: Literal["auto", "cpu", "cuda"]
    rmm_pool_size: int | str | None
    nan: Literal["raise", "mask"]
    poses: Literal["decoded", "index"]
    derived: Literal["stored", "none"]
    without: str | Sequence[str]
    so_far: bool
    complete_only: bool
    overwrite: bool
    group_by: GroupBy | None
    overlap: Overlap
    erode: int
    origins: Literal["exact", "round"]
    cluster: str | Scheduled
    workers: int | None
    threads: int | None
    worker_timeout: float | None
    tls: bool
    slurm: SlurmKeywords | SlurmJobs


class PickKeywords(TypedDict, total=False):
    """Those of :class:`ocelot_em.PickOptions`."""

    method: Literal["gaussian", "gev", "pvalue", "mip"]
    false_positives: float
    cutoff: float | None
    min_distance: float
    min_angle: float | None
    mask: Any
    mask_of: Literal["micrograph", "map"] | None
    mask_marks: Literal["kept", "excluded"] | None
    mask_unit: Literal["pixels", "angstrom"]
    mask_box: int | None
    edge: int
    per: Literal["exposure", "montage"]
    same_distance: float | None
    same_angle: float
    same_defocus: float


class DetectionKeywords(TypedDict, total=False):
    """Those of :class:`ocelot_em.model.pick_options.DetectionOptions`."""

    cutoff: float | None
    false_positives: float
    min_distance: float
    min_angle: float
    symmetry: str
    micrograph: str | None
    mask: Any
    mask_of: Literal["micrograph", "map"] | None
    mask_marks: Literal["kept", "excluded"] | None
    mask_unit: Literal["pixels", "angstrom"]
    mask_box: int | None
    edge: int


class BatchKeywords(PickKeywords, MergeKeywords, total=False):
    """Those of :class:`ocelot_em.BatchOptions`."""

    tables: str | Sequence[str]
    reports: bool
    estimates: str | None
    skip_bad: bool


class ReportKeywords(TypedDict, total=False):
    """Those of :class:`ocelot_em.view.hits.ReportImages`."""

    pyramid: str | PathLike[str] | None
    micrograph: str | PathLike[str] | None
    template: str | PathLike[str] | None


def takes(model: type[Options]) -> Callable[[_Function], _Function]:
    """Return a decorator that shows the fields of a model in place of a function's ``**options``.

    >>> @takes(SlurmJobs)
    ... def submit(command, **options): ...
    >>> list(inspect.signature(submit).parameters)[:3]
    ['command', 'partition', 'account']
    """

    def show(function: _Function) -> _Function:
        signature = inspect.signature(function)
        *own, _ = signature.parameters.values()
        fields = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=field.get_default(call_default_factory=True),
                annotation=field.annotation,
            )
            for name, field in model.model_fields.items()
        ]
        function.__dict__["__signature__"] = signature.replace(parameters=[*own, *fields])
        return function

    return show
