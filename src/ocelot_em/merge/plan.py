"""The plan of a merge: what is merged, in which tiles, with how much memory and disk.

Made before anything starts, printed by ``--dry-run``, kept in the output so that a run can be
resumed, and refused with numbers where it cannot work.
"""

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from os import PathLike
from typing import Annotated, Any, Literal, NamedTuple, Self, TypeVar

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ocelot_em.errors import FormatError, InvalidInputError, PlanError
from ocelot_em.merge.device_fold import (
    PINNED_PLANES,
    WIDEST_NBYTES,
    accumulator_nbytes_per_pixel,
    partial_nbytes_per_pixel,
)
from ocelot_em.merge.stats.collected import tile_statistics_nbytes
from ocelot_em.model.maps import MAPS, MIP, SUM, Int64, MapSet, PoseForm
from ocelot_em.model.regions import Overlap, Region, Tile, TileGrid, ceil_div
from ocelot_em.store import attributes as fmt
from ocelot_em.store.objects import Objects, normalise_url, open_objects
from ocelot_em.store.search import Source, open_one, open_sources
from ocelot_em.store.transfer import READ_TOGETHER, chunks_ahead, chunks_behind

DEFAULT_TILE = fmt.DEFAULT_CHUNK

LARGEST_TILE = 2**16
"""Edge of a tile in pixels."""

MOST_PROJECTIONS = 2**62
"""Of all partials together; they are added as 64-bit integers."""

MOST_SOURCES = 2**15 - 1
"""Winners are numbered in 16 bits while a tile is merged."""

LARGE_TILE_NBYTES = 10**9
"""Tiles larger than the default, as inputs with larger chunks call for, keep workers below this."""

CHUNKS_LISTED = 4096
"""Chunks of a map up to which its size is added up; of a larger one, it is extrapolated."""

CHUNKS_SAMPLED = 64
"""Chunks that it is extrapolated from."""

SOURCES_SAMPLED = 256
"""Sources up to which all are looked at to predict memory and size; of more, so many."""

BLANK_RATIO = 1 / 128
"""To which chunks shrink in which nothing lies."""

PROCESS_NBYTES = 288 * 2**20
"""Resident memory of a worker before its first tile: Python, NumPy, numba, zarr, Dask, and what
pandas and numba import of pyarrow and SciPy where they are installed. What whole workers need is
measured by ``python -m benchmarks.memory``; figures are in ``docs/benchmarks.md``."""

DEVICE_TABLES_NBYTES = 64 * 2**20
"""Memory on a device for all that does not grow with tiles: tables of poses, rounding."""

MOST_TOGETHER = 64
"""Partials on a device at a time: more gain nothing."""


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


class DeviceChoice(NamedTuple):
    """Where the arithmetic of a merge is done, and why there.

    Parameters
    ----------
    kind
        ``cpu`` or ``cuda``.
    reason
        For people.
    n_devices
        GPUs, each with a worker; 0 for ``cpu``.
    memory_nbytes
        That may be allocated on the smallest of them.
    """

    kind: Literal["cpu", "cuda"]
    reason: str
    n_devices: int = 0
    memory_nbytes: int = 0


ON_CPU = DeviceChoice("cpu", "as asked for")


class PlannedExposure(fmt.PlacedExposure):
    """An exposure, and what is merged of it.

    The one exposure of a search that has no others has an empty id, and all its pixels are taken,
    valid or not.

    Parameters
    ----------
    sources
        Its partials, or what was merged of them before, numbered in the stated order.
    """

    sources: Annotated[fmt.Several[Source], Field(min_length=1)]

    @property
    def counted(self) -> Region:
        """The valid ones among them, in the exposure: those that statistics are of."""
        return self.region.intersect(Region.whole(self.valid_shape))

    @property
    def total_projections(self) -> int:
        """Sum of all counts."""
        return sum(source.total_projections for source in self.sources)

    @property
    def contributions(self) -> tuple[fmt.Contribution, ...]:
        """All partials, in the order of their numbers."""
        return tuple(c for source in self.sources for c in source.contributions)


class Piece(NamedTuple):
    """What an exposure has of a tile.

    Parameters
    ----------
    exposure
        Its place in the plan.
    region
        The pixels, in the exposure.
    within
        The same pixels, in the tile.
    """

    exposure: int
    region: Region
    within: Region


class MergePlan(fmt.Attributes):
    """Everything that decides the bytes of the output; two equal plans give equal maps.

    Parameters
    ----------
    exposures
        The inputs, by number; the maps of a search that is none of several exposures are one.
    shape, valid_shape
        Height and width of the maps, and of their valid pixels.
    pixel_size_angstrom
        Pixel size, if known.
    pose_form, has_pixel_size, has_counts
        Which maps the output has.
    search_space_digest
        Fingerprint of the search space of indexed inputs.
    tile
        Height and width of a tile.
    nan
        ``raise`` or ``mask``.
    has_decoded_poses
        Whether the output has pose maps beside an index.
    canvas_origin
        As in :class:`ocelot_em.store.attributes.MergedAttributes`.
    overlap
        Which exposure wins a pixel that several have.
    erode_px
        Width of the edge that was left out of all exposures.
    """

    exposures: Annotated[fmt.Several[PlannedExposure], Field(min_length=1)]
    shape: fmt.Shape
    valid_shape: fmt.Shape
    pixel_size_angstrom: fmt.Angstrom | None
    pose_form: PoseForm
    has_pixel_size: bool
    has_counts: bool
    search_space_digest: str | None
    tile: fmt.Shape
    nan: Literal["raise", "mask"]
    has_decoded_poses: bool = True
    canvas_origin: tuple[fmt.CanvasPixel, fmt.CanvasPixel] = (0, 0)
    overlap: Overlap = "earliest"
    erode_px: int = 0

    @property
    def is_montage(self) -> bool:
        """Whether exposures are put together, rather than one search is merged."""
        return bool(self.exposures[0].id)

    @property
    def maps(self) -> MapSet:
        """Which maps the output has."""
        return MapSet(
            self.pose_form,
            self.has_pixel_size,
            self.has_counts,
            self.has_decoded_poses,
            self.is_montage,
        )

    @property
    def maps_of_exposure(self) -> MapSet:
        """Which maps there are of an exposure that is merged alone."""
        return replace(self.maps, exposures=False)

    @property
    def grid(self) -> TileGrid:
        """The tiles."""
        return TileGrid(self.shape, self.tile)

    @property
    def chunk(self) -> tuple[int, int]:
        """Chunks of the output: those of a tile, or the tile itself if it is smaller."""
        return min(self.tile[0], fmt.DEFAULT_CHUNK), min(self.tile[1], fmt.DEFAULT_CHUNK)

    @property
    def sources(self) -> tuple[Source, ...]:
        """The inputs of all exposures."""
        return tuple(source for exposure in self.exposures for source in exposure.sources)

    @property
    def total_projections(self) -> int:
        """Sum of all counts."""
        return sum(exposure.total_projections for exposure in self.exposures)

    @property
    def contributions(self) -> tuple[fmt.Contribution, ...]:
        """The partials of all exposures, each in the order of their numbers."""
        return tuple(c for exposure in self.exposures for c in exposure.contributions)

    @cached_property
    def _bounds(self) -> Int64:
        """Bounds of the exposures on the canvas, (n, 4); in the order in which they are laid."""
        return np.array([self.exposures[k].on_canvas.bounds for k in self._order], np.int64)

    @cached_property
    def _order(self) -> list[int]:
        everyone = range(len(self.exposures))
        return sorted(everyone, key=lambda k: (self.exposures[k].acquired, k))

    def pieces(self, tile: Tile) -> list[Piece]:
        """Return what exposures have of a tile, the earliest acquired first; ties by number."""
        own, pieces = tile.region, []
        for place in self.touching(own):
            exposure = self.exposures[place]
            shared = exposure.on_canvas.intersect(own)
            dy, dx = exposure.origin
            pieces.append(Piece(place, shared.shifted(-dy, -dx), shared.relative_to(own)))
        return pieces

    def touching(self, region: Region) -> list[int]:
        """Places of the exposures that lie on some pixels of the canvas, in the same order."""
        y0, y1, x0, x1 = self._bounds.T
        lies = (y0 < region.y1) & (y1 > region.y0) & (x0 < region.x1) & (x1 > region.x0)
        return [self._order[number] for number in np.flatnonzero(lies)]

    def merged_exposures(self) -> tuple[fmt.MergedExposure, ...]:
        """Return what the output's attributes say of exposures; nothing if it is no montage."""
        if not self.is_montage:
            return ()
        first, described = 0, []
        for exposure in self.exposures:
            n = len(exposure.contributions)
            described.append(
                fmt.MergedExposure(
                    **exposure.model_dump(exclude={"sources"}),
                    total_projections=exposure.total_projections,
                    first_partial=first,
                    n_partials=n,
                )
            )
            first += n
        return tuple(described)


def read_plan(attributes: fmt.MergedAttributes, url: str) -> MergePlan:
    """Read the plan that a merged result was, or is being, made by.

    Raises
    ------
    FormatError
        Naming the problems, or how it differs from what the result says of itself.
    """
    plan = fmt.validated(MergePlan, attributes.plan, f"{url}: plan")
    if problems := _impossible(plan) or _disagreements(plan, attributes):
        raise FormatError(f"{url}: plan: {'; '.join(problems[:20])}")
    return plan


_REPEATED = (
    "shape",
    "valid_shape",
    "pixel_size_angstrom",
    "pose_form",
    "has_pixel_size",
    "has_counts",
    "has_decoded_poses",
    "search_space_digest",
    "canvas_origin",
)
"""Attributes of a merged result that its plan repeats."""


def _impossible(plan: MergePlan) -> list[str]:
    """Say what no merge can have been made by."""
    problems, canvas = [], Region.whole(plan.shape)
    for exposure in plan.exposures:
        place, region = f"exposure {exposure.id!r}", exposure.region
        if len(plan.exposures) > 1 and not exposure.id:
            problems.append(f"{place}: expected an id of each of several exposures")
        if wrong := fmt.not_taken(exposure):
            problems.append(f"{place}: {wrong}")
        elif exposure.on_canvas.intersect(canvas) != exposure.on_canvas:
            problems.append(
                f"{place}: expected {region} to lie in {canvas}, got {exposure.on_canvas}"
            )
    numbers = [exposure.number for exposure in plan.exposures]
    if numbers != sorted(set(numbers)):
        problems.append("exposures: expected them by number, each once")
    if (total := plan.total_projections) > MOST_PROJECTIONS:
        problems.append(f"total_projections: expected at most 2**62, got {total}")
    if max(plan.tile) > LARGEST_TILE:
        problems.append(f"tile: expected at most {LARGEST_TILE:,} pixels, got {plan.tile}")
    if (n := len(TileGrid(plan.shape, plan.chunk))) > fmt.MOST_TILES:
        problems.append(f"tile: expected at most {fmt.MOST_TILES:,} chunks, got {n:,}")
    return problems


def _disagreements(plan: MergePlan, attributes: fmt.MergedAttributes) -> list[str]:
    """Say where a plan is not that of a result with these attributes."""
    problems = [
        f"{key}: expected {getattr(attributes, key)} as in the result, got {getattr(plan, key)}"
        for key in _REPEATED
        if getattr(plan, key) != getattr(attributes, key)
    ]
    if plan.contributions != attributes.partials:
        problems.append("expected the partials of the result, got others")
    if plan.merged_exposures() != attributes.exposures:
        problems.append("expected the exposures of the result, got others")
    return problems


def tile_size_of(plan: MergePlan) -> int:
    """Return a tile size that gives the plan's tiles again, also where the map cut them short."""
    edge = max(plan.tile)
    if edge <= fmt.DEFAULT_CHUNK:
        return edge
    return ceil_div(edge, fmt.DEFAULT_CHUNK) * fmt.DEFAULT_CHUNK


def make_plan(
    inputs: Sequence[str | PathLike[str]],
    output: str | PathLike[str],
    options: MergeOptions,
    device: DeviceChoice = ON_CPU,
) -> MergePlan:
    """Look at the inputs and decide how to merge them; reads metadata only.

    Raises
    ------
    StoreNotFoundError, FormatError, IncompleteError
        An input cannot be read, or was never finished.
    InvalidInputError
        The inputs do not belong together; every difference is named.
    PlanError
        It cannot work: the tile size, the memory limit, or the device's memory.
    """
    urls = [normalise_url(place) for place in inputs]
    if not urls:
        raise InvalidInputError("merge: expected at least one input store, got none")
    problems = [f"{url}: given more than once" for url, n in Counter(urls).items() if n > 1]
    if normalise_url(output) in urls:
        problems.append(f"{normalise_url(output)}: is an input; inputs are never written")
    if problems:
        raise InvalidInputError(problems)

    opened = [open_sources(open_objects(url)) for url in urls]
    first = opened[0][0]
    for url, (attributes, _) in zip(urls[1:], opened[1:], strict=True):
        for key in fmt.SHARED_BY_PARTIALS:
            if getattr(attributes, key) != getattr(first, key):
                problems.append(
                    f"{url}: {key}: expected {getattr(first, key)} as in {urls[0]}, "
                    f"got {getattr(attributes, key)}"
                )
    if problems:
        raise InvalidInputError(problems)
    joined, problems = _joined([exposures for _, exposures in opened])
    placed, canvas_origin, shape, found = _placed(joined, options)
    problems += found
    sources = [source for exposure in placed for source in exposure.sources]
    problems += _duplicates(sources)
    problems += [
        f"inputs: expected at most {MOST_SOURCES:,} partials at a time, got "
        f"{len(exposure.sources):,}; merge some of them first, then the results"
        for exposure in placed
        if len(exposure.sources) > MOST_SOURCES
    ]
    if (total := sum(source.total_projections for source in sources)) > MOST_PROJECTIONS:
        problems.append(f"inputs: expected at most 2**62 projections in all, got {total}")
    if problems:
        raise InvalidInputError(problems)
    several = first.shape is None
    maps = MapSet(
        first.pose_form,
        first.has_pixel_size,
        counts=options.nan == "mask" or any(source.has_counts for source in sources),
        decoded=options.poses == "decoded" or first.pose_form is PoseForm.EXPLICIT,
        exposures=several,
    )
    plan = MergePlan(
        exposures=placed,
        shape=shape,
        valid_shape=first.valid_shape or shape,
        pixel_size_angstrom=first.pixel_size_angstrom,
        pose_form=maps.form,
        has_pixel_size=maps.pixel_size,
        has_counts=maps.counts,
        search_space_digest=first.search_space_digest,
        tile=_choose_tile(
            shape, storage_shape(placed, output), maps, options, device.memory_nbytes
        ),
        nan=options.nan,
        has_decoded_poses=maps.decoded,
        canvas_origin=canvas_origin,
        overlap=options.overlap if several else "earliest",
        erode_px=options.erode,
    )
    if (n := len(TileGrid(plan.shape, plan.chunk))) > fmt.MOST_TILES:
        raise PlanError(
            f"tile size: expected at most {fmt.MOST_TILES:,} chunks of a map, got {n:,} for "
            f"{shape[0]} x {shape[1]} pixels; use larger tiles"
        )
    return plan


_Opened = list[tuple[fmt.ExposureAttributes, list[Source]]]


def _joined(stores: Sequence[_Opened]) -> tuple[_Opened, list[str]]:
    """Exposures of several stores: those of one id are one, whose partials add up."""
    joined: dict[str, tuple[fmt.ExposureAttributes, list[Source]]] = {}
    problems, next_number = [], 0
    for exposures in stores:
        first_number = next_number
        for exposure, sources in exposures:
            if exposure.id not in joined:
                number = first_number + exposure.number
                own = exposure.model_copy(update={"number": number})
                joined[exposure.id] = own, list(sources)
                next_number = max(next_number, number + 1)
                continue
            found, known = joined[exposure.id]
            known += sources
            if exposure.id:
                problems += [
                    f"exposure {exposure.id!r}: {key}: {known[0].url} has {getattr(found, key)}, "
                    f"{sources[0].url} has {getattr(exposure, key)}"
                    for key in fmt.SHARED_BY_EXPOSURE
                    if getattr(found, key) != getattr(exposure, key)
                ]
    return list(joined.values()), problems


def _placed(
    exposures: _Opened, options: MergeOptions
) -> tuple[tuple[PlannedExposure, ...], tuple[int, int], tuple[int, int], list[str]]:
    """Place exposures on a canvas; with its origin and shape, and what is wrong with them."""
    problems, placed, erode = [], [], options.erode
    for exposure, sources in exposures:
        y, x = exposure.origin
        if options.origins == "exact" and not (y.is_integer() and x.is_integer()):
            problems.append(
                f"exposure {exposure.id!r}: origin: expected whole pixels, got ({y}, {x}); maps "
                "are never interpolated: ask for rounded origins with --origins round"
            )
        height, width = exposure.valid_shape if exposure.id or erode else exposure.shape
        if min(height, width) <= 2 * erode:
            of = f"exposure {exposure.id!r}" if exposure.id else "inputs"
            problems.append(
                f"{of}: erode: expected less than half of the valid {height} x {width} pixels, "
                f"got {erode}"
            )
        placed.append(
            PlannedExposure(
                **exposure.model_dump(exclude={"origin", "total_projections"}),
                origin=(round(y), round(x)),
                taken=(erode, height - erode, erode, width - erode),
                sources=_numbered(sources),
            )
        )
    several = bool(placed[0].id)
    corners = [exposure.on_canvas for exposure in placed]
    top, left = (min(0, *(getattr(c, key) for c in corners)) for key in ("y0", "x0"))
    shape = placed[0].shape
    if several:
        shape = max(c.y1 for c in corners) - top, max(c.x1 for c in corners) - left
        placed = [
            e.model_copy(update={"origin": (e.origin[0] - top, e.origin[1] - left)}) for e in placed
        ]
        if not all(1 <= n < 2**31 for n in shape):
            problems.append(f"canvas: expected at most 2**31 - 1 rows and columns, got {shape}")
            shape = 1, 1
    return tuple(placed), (top, left), shape, problems


def _numbered(sources: Sequence[Source]) -> tuple[Source, ...]:
    numbered, number = [], 0
    for source in sources:
        numbered.append(source.model_copy(update={"first_number": number}))
        number += len(source.contributions)
    return tuple(numbered)


def _duplicates(sources: Sequence[Source]) -> list[str]:
    places: dict[str, list[str]] = {}
    for source in sources:
        for contribution in source.contributions:
            places.setdefault(contribution.id, []).append(
                source.place
                if source.path
                else f"{source.place} (which holds {contribution.name!r})"
            )
    return [
        f"the same partial comes in {len(found)} times, and its projections would be counted so "
        f"often: {'; '.join(found)}"
        for found in places.values()
        if len(found) > 1
    ]


class StorageShape(NamedTuple):
    """What the memory of a worker depends on, of inputs and output.

    Parameters
    ----------
    chunk
        Height and width in pixels of the largest chunk of an input.
    sum_itemsize
        Bytes of a value of the inputs' sums.
    streams
        Transfers at a time that the storage is worth, see :class:`ocelot_em.store.objects.Objects`.
    """

    chunk: tuple[int, int]
    sum_itemsize: int
    streams: int


def storage_shape(
    exposures: Sequence[PlannedExposure], output: str | PathLike[str]
) -> StorageShape:
    """Look at the inputs' metadata: of all sources, or of some if there are very many.

    Raises
    ------
    FormatError
        A source has no usable sums.
    """
    sources = _sample([source for exposure in exposures for source in exposure.sources])
    sums = [open_one(source, SUM) for source in sources]
    cells = [chunked.grid.cell for chunked in sums]
    places = {*(source.url for e in exposures for source in e.sources), normalise_url(output)}
    return StorageShape(
        chunk=(max(height for height, _ in cells), max(width for _, width in cells)),
        sum_itemsize=max(chunked.dtype.itemsize for chunked in sums),
        streams=max(open_objects(place).streams for place in places),
    )


_Item = TypeVar("_Item")


def _sample(items: Sequence[_Item]) -> list[_Item]:
    """All items; of very many, some at equal distances."""
    if len(items) <= SOURCES_SAMPLED:
        return list(items)
    return [items[int(k)] for k in np.linspace(0, len(items) - 1, SOURCES_SAMPLED)]


def _choose_tile(
    shape: tuple[int, int],
    storage: StorageShape,
    maps: MapSet,
    options: MergeOptions,
    device_nbytes: int,
) -> tuple[int, int]:
    """Choose the largest tile that fits; ``device_nbytes`` is 0 where there is no device."""
    size = options.tile_size
    if size is not None and size > fmt.DEFAULT_CHUNK and size % fmt.DEFAULT_CHUNK:
        below = size - size % fmt.DEFAULT_CHUNK
        raise PlanError(
            f"tile size: expected at most {fmt.DEFAULT_CHUNK} or a multiple of it, so that tiles "
            f"are made of whole chunks, got {size}; use {below} or {below + fmt.DEFAULT_CHUNK}"
        )
    candidates = [size] if size is not None else _tile_candidates(storage.chunk)
    predicted = on_device = 0
    for candidate in candidates:
        tile = min(candidate, shape[0]), min(candidate, shape[1])
        if maps.exposures:  # another exposure may make the canvas larger, but not the tiles
            tile = candidate, candidate
        predicted = worker_nbytes(tile, storage, maps, options)
        limit = options.memory_limit
        if size is None and candidate > DEFAULT_TILE:
            limit = min(limit or LARGE_TILE_NBYTES, LARGE_TILE_NBYTES)
        if device_nbytes:
            on_device = device_worker_nbytes(tile, storage, maps, options, together=1)
        if on_device > device_nbytes:
            continue
        if limit is None or predicted <= limit:
            return tile
    if on_device > device_nbytes:
        raise PlanError(
            f"device memory of {device_nbytes:,} bytes: {n_threads(options)} threads with tiles of "
            f"{candidates[-1]} pixels need {on_device:,} bytes for one partial at a time; use "
            "fewer threads, smaller tiles, or --device cpu"
        )
    raise PlanError(
        f"memory limit {options.memory_limit:,} bytes: one worker with {n_threads(options)} "
        f"threads and tiles of {candidates[-1]} pixels needs {predicted:,} bytes, "
        f"{PROCESS_NBYTES:,} of them before the first tile; "
        "allow more, use fewer threads, or smaller tiles"
    )


def _tile_candidates(chunk: tuple[int, int]) -> list[int]:
    """Tile sizes from the best to the smallest: tiles smaller than a chunk decode it repeatedly."""
    n_chunks = min(ceil_div(max(chunk), fmt.DEFAULT_CHUNK), 2**16 // fmt.DEFAULT_CHUNK)
    return [*(n * fmt.DEFAULT_CHUNK for n in range(max(n_chunks, 1), 0, -1)), 512, 256, 128]


def n_threads(options: MergeOptions) -> int:
    """Threads in one worker."""
    if options.threads is not None:
        return options.threads
    if options.cluster == "threads":
        from dask.system import CPU_COUNT

        return int(CPU_COUNT)
    return 1


def worker_nbytes(
    tile: tuple[int, int], storage: StorageShape, maps: MapSet, options: MergeOptions
) -> int:
    """Predicted peak memory of one worker: the process, and per thread one tile.

    A thread holds, of a tile: the highest correlation and who has it, the sums, one map that comes
    in and those computed at the end; or, where NaN is masked, all maps of a partial, and copies.
    It also holds the encoded chunks that are fetched ahead or not written yet.

    Parameters
    ----------
    tile
        Height and width of a tile in pixels.
    storage
        What is known of inputs and output.
    maps
        Which maps the result has.
    options
        Threads, and what happens to NaN.
    """
    poses, indexed = 4 * len(maps.pose), maps.form is PoseForm.INDEXED
    wide = max(storage.sum_itemsize, 8 if maps.counts else 4)
    computed = 4 * (5 + len(maps.computed_poses))
    per_pixel = 4 + 4 + 8 + 8 + computed  # mip, best partial, sums
    per_pixel += 8 if maps.counts else 0
    if options.nan == "mask":
        incoming = 4 + 4 + poses + 2 * storage.sum_itemsize + 8
        per_pixel += poses + wide + 3 * incoming  # as read, masked, and in between
    else:
        per_pixel += 2 + 4 + (4 if indexed else 0)  # winner, and the pose or index that is kept
        # Maps that come in, decoded: part by part, but whole at the edge of a map.
        per_pixel += 2 * 4 + wide + READ_TOGETHER * wide
    if maps.exposures:
        # The canvas of a tile, how often and how far from an edge it is covered; and of a piece,
        # its distance from the edge, where it wins, and the maps that come before that is known.
        canvas = sum(np.dtype(MAPS[name].dtypes[0]).itemsize for name in maps.merged)
        per_pixel += canvas + 2 + 4 + 4 + 1 + 4 * (3 + len(maps.explicit_poses))
    written = min(tile[0], fmt.DEFAULT_CHUNK) * min(tile[1], fmt.DEFAULT_CHUNK)
    encoded = chunks_ahead(storage.streams) + (storage.chunk != tile)  # one decoded, to be cut
    if options.device == "cuda":
        per_pixel += PINNED_PLANES * WIDEST_NBYTES
    per_thread = (
        tile[0] * tile[1] * per_pixel
        + encoded * storage.chunk[0] * storage.chunk[1] * wide * 17 // 16  # room to grow
        + (chunks_behind(storage.streams) + 2) * written * wide  # 2: being encoded
        + 3 * tile_statistics_nbytes(tile)  # what is collected, a record of it, and its bytes
    )
    return PROCESS_NBYTES + n_threads(options) * per_thread


def device_worker_nbytes(
    tile: tuple[int, int],
    storage: StorageShape,
    maps: MapSet,
    options: MergeOptions,
    *,
    together: int,
) -> int:
    """Predicted memory on the device of one worker, with so many partials of a tile at a time."""
    partial = partial_nbytes_per_pixel(maps, storage.sum_itemsize, mask_nan=options.nan == "mask")
    per_pixel = accumulator_nbytes_per_pixel(maps) + together * partial
    return n_threads(options) * tile[0] * tile[1] * per_pixel + DEVICE_TABLES_NBYTES


def partials_on_device(
    plan: "MergePlan", storage: StorageShape, options: MergeOptions, device: DeviceChoice
) -> int:
    """Partials that a thread has on the device at a time: all of a tile, if they fit."""
    if device.kind == "cpu":
        return 0
    n_sources = min(max(len(e.sources) for e in plan.exposures), MOST_TOGETHER)
    for together in range(n_sources, 1, -1):
        needed = device_worker_nbytes(plan.tile, storage, plan.maps, options, together=together)
        if needed <= device.memory_nbytes:
            return together
    return 1


@dataclass(frozen=True)
class Forecast:
    """What a plan will cost.

    Parameters
    ----------
    n_tiles, n_done
        Tiles in all, and those an interrupted run has finished.
    decoded_nbytes_in, stored_nbytes_in
        Bytes of the inputs' maps in memory, and as stored.
    decoded_nbytes_out, stored_nbytes_out
        The same of the output; as stored it is estimated from how the inputs compressed.
    worker_nbytes
        Predicted peak memory of one worker.
    free_nbytes
        Free space at the output, or None where the storage does not say.
    device
        Where the arithmetic is done.
    partials_on_device
        How many a thread has on the device at a time; 0 on the CPU.
    device_nbytes
        Predicted memory of one worker on its device.
    """

    n_tiles: int
    n_done: int
    decoded_nbytes_in: int
    stored_nbytes_in: int
    decoded_nbytes_out: int
    stored_nbytes_out: int
    worker_nbytes: int
    free_nbytes: int | None
    device: DeviceChoice = ON_CPU
    partials_on_device: int = 0
    device_nbytes: int = 0


def forecast(
    plan: MergePlan,
    output: str | PathLike[str],
    options: MergeOptions,
    n_done: int,
    device: DeviceChoice = ON_CPU,
) -> Forecast:
    """Predict what a plan costs; lists the inputs' objects, reads none."""
    decoded_in = 0
    for exposure in plan.exposures:
        for source in exposure.sources:
            pixel = sum(np.dtype(MAPS[n].dtypes[0]).itemsize for n in source.map_names(plan.maps))
            decoded_in += pixel * exposure.shape[0] * exposure.shape[1]
    looked_at = _sample(plan.sources)
    stored_in = sum(_stored_nbytes_of(source, plan.maps) for source in looked_at)
    stored_in = stored_in * len(plan.sources) // len(looked_at)
    pixels = plan.shape[0] * plan.shape[1]
    storage = storage_shape(plan.exposures, output)
    together = partials_on_device(plan, storage, options, device)
    per_pixel = sum(np.dtype(MAPS[key].dtypes[0]).itemsize for key in plan.maps.merged)
    covered = min(sum(exposure.region.size for exposure in plan.exposures), pixels)
    stored_out = covered * min(stored_in / max(decoded_in, 1), 1)
    stored_out += (pixels - covered) * BLANK_RATIO  # where nothing lies
    return Forecast(
        n_tiles=len(plan.grid),
        n_done=n_done,
        decoded_nbytes_in=decoded_in,
        stored_nbytes_in=stored_in,
        decoded_nbytes_out=per_pixel * pixels,
        stored_nbytes_out=int(per_pixel * stored_out),
        worker_nbytes=worker_nbytes(plan.tile, storage, plan.maps, options),
        free_nbytes=open_objects(output).free_bytes(),
        device=device,
        partials_on_device=together,
        device_nbytes=together
        and device_worker_nbytes(plan.tile, storage, plan.maps, options, together=together),
    )


def _stored_nbytes_of(source: Source, maps: MapSet) -> int:
    """Bytes of all maps of a source as stored."""
    objects, mip = open_objects(source.url), open_one(source, MIP)
    prefix = mip.path.removesuffix(MIP)
    names = source.map_names(maps)
    return sum(_stored_nbytes(objects, f"{prefix}{name}", mip.grid) for name in names)


def _stored_nbytes(objects: Objects, path: str, grid: TileGrid) -> int:
    """Bytes of a map as stored; of one with very many chunks, extrapolated from some."""
    if len(grid) <= CHUNKS_LISTED:
        return sum(objects.sizes(path).values())
    some = (grid[int(number)] for number in np.linspace(0, len(grid) - 1, CHUNKS_SAMPLED))
    sizes = (objects.size(f"{path}/c/{chunk.iy}/{chunk.ix}") for chunk in some)
    return sum(size or 0 for size in sizes) * len(grid) // CHUNKS_SAMPLED


def refuse_what_cannot_fit(prediction: Forecast, n_workers: int, memory_nbytes: int) -> None:
    """Raise with numbers if the disk or the memory is too small.

    Parameters
    ----------
    prediction
        Of the plan.
    n_workers
        Workers that share this machine's memory.
    memory_nbytes
        Memory of this machine.

    Raises
    ------
    PlanError
    """
    missing = 1 - prediction.n_done / prediction.n_tiles
    needed = int(prediction.stored_nbytes_out * missing)
    if prediction.free_nbytes is not None and needed > prediction.free_nbytes:
        raise PlanError(
            f"disk: the output needs about {needed:,} bytes more, {prediction.free_nbytes:,} are "
            "free; free some space or choose another place"
        )
    total = n_workers * prediction.worker_nbytes
    if total > memory_nbytes:
        raise PlanError(
            f"memory: {n_workers} workers of {prediction.worker_nbytes:,} bytes need {total:,}, "
            f"this machine has {memory_nbytes:,}; use fewer workers or threads, or smaller tiles"
        )


def plan_differences(found: MergePlan, wanted: MergePlan) -> list[str]:
    """Why what was merged by one plan cannot be gone on with by another; empty if it can.

    A montage can be gone on with when exposures, or partials of exposures, have come since.
    """
    if not (found.is_montage and wanted.is_montage):
        return _differences(found, wanted, but=())
    differences = _differences(found, wanted, but=("exposures", "shape", "valid_shape"))
    wanted_by_id = {exposure.id: exposure for exposure in wanted.exposures}
    for old in found.exposures:
        new = wanted_by_id.get(old.id)
        if new is None:
            differences.append(f"exposure {old.id!r}: it has it, now not asked for")
            continue
        differences += [
            f"exposure {old.id!r}: {text}" for text in _differences(old, new, but=("sources",))
        ]
        if not {source.id for source in old.sources} <= {source.id for source in new.sources}:
            differences.append(f"exposure {old.id!r}: {_inputs(old.sources, new.sources)}")
    return differences


def _differences(found: fmt.Attributes, wanted: fmt.Attributes, but: tuple[str, ...]) -> list[str]:
    differences = []
    for key in sorted(set(type(found).model_fields) - set(but)):
        old, new = getattr(found, key), getattr(wanted, key)
        if old == new:
            continue
        if key == "exposures":
            differences.append(_inputs(*([s for e in es for s in e.sources] for es in (old, new))))
        else:
            differences.append(f"{key}: it has {old}, now asked for {new}")
    return differences


def _inputs(old: Sequence[Source], new: Sequence[Source]) -> str:
    one, other = ([f"{s.url} {s.name} {s.id[:8]}" for s in sources] for sources in (old, new))
    return f"inputs: it was made from {one}, now asked for {other}"


def tiles_changed(found: MergePlan, wanted: MergePlan) -> list[Tile]:
    """Tiles of the wanted plan that exposures touch which the other has not, or not so."""
    known = {exposure.id: exposure for exposure in found.exposures}
    changed = {
        (tile.iy, tile.ix)
        for exposure in wanted.exposures
        if known.get(exposure.id) != exposure
        for tile in wanted.grid.touching(exposure.on_canvas)
    }
    return [wanted.grid.at(iy, ix) for iy, ix in sorted(changed)]
