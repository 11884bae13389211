"""The worker's view of a merge: the plan and all open inputs and outputs."""

import hashlib
import socket
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

import ocelot_em
from ocelot_em.errors import (
    FormatError,
    InvalidDataError,
    OcelotError,
    PlanError,
    StoreNotFoundError,
)
from ocelot_em.kernels import require_compiler
from ocelot_em.kernels.device import open_device
from ocelot_em.merge.device_fold import DeviceFold, DeviceMemory
from ocelot_em.merge.fold import Fold, PieceReport
from ocelot_em.merge.overlap import Canvas, WholeTile
from ocelot_em.merge.plan import MergePlan, Piece, PlannedExposure, read_plan
from ocelot_em.merge.stats import layout, records
from ocelot_em.merge.stats.collected import TileStatistics
from ocelot_em.merge.warm_up import CompileListener, CompileLog, compile_kernels
from ocelot_em.model.maps import MIP, SCALED_MIP, SUM
from ocelot_em.model.regions import Region, Tile
from ocelot_em.model.search_space import SearchSpace
from ocelot_em.model.workspace import Workspace
from ocelot_em.store import attributes as fmt
from ocelot_em.store.arrays import ChunkedMap
from ocelot_em.store.contract import Objects, ReusedMemory, at_once
from ocelot_em.store.fence import HeldObjects, RunLease, hold
from ocelot_em.store.lock import kernel_id
from ocelot_em.store.objects import open_objects
from ocelot_em.store.search import MapGroup, read_attributes, read_search_space
from ocelot_em.store.search_info import SearchInfo
from ocelot_em.store.sources import open_one, open_several
from ocelot_em.store.transfer import ReadAhead, Request, WriteBehind, chunks_ahead
from ocelot_em.store.validation import value_problems

Group = tuple[int, int, int]
"""Key of a piece's reads: row and column of the tile, and number of the exposure in the plan."""

MAX_OPEN_EXPOSURES = 64
"""Maximum number of exposures that a worker keeps open; others are reopened when needed."""


@cache
def code_version() -> str:
    """Return the version of this package and a digest of its source files."""
    package, digest = Path(ocelot_em.__file__).parent, hashlib.sha256()
    for file in sorted(package.rglob("*")):
        if file.suffix in (".py", ".cu"):
            digest.update(file.read_bytes())
    return f"{ocelot_em.__version__} ({digest.hexdigest()[:12]})"


@dataclass(frozen=True, slots=True)
class JobSpec:
    """Identifies the merge of a task; a worker receives only this and the tiles.

    Parameters
    ----------
    output
        Path or URL of the prepared output, which contains the plan.
    run_id
        Id of the output.
    lock, holder
        Key and id of the run's lock; tasks stop when the lock is lost. Empty: no lock.
    partials_on_device
        Number of partials that a thread holds on the GPU at a time; 0 to merge on the CPU.
    code
        Version and digest of the driver's package.
    kernel
        The kernel that brings writes to the disk when the merge ends: that of the driver.
    streams
        Number of concurrent transfers of a thread where requests have latency; 0 if not known.
    """

    output: str
    run_id: str
    lock: str = ""
    holder: str = ""
    partials_on_device: int = 0
    code: str = field(default_factory=lambda: code_version())
    kernel: str = field(default_factory=lambda: kernel_id())
    streams: int = 0


class OpenExposure:
    """An exposure with all open inputs, and the fold of its pieces on the CPU or a device."""

    def __init__(
        self,
        plan: MergePlan,
        exposure: PlannedExposure,
        opened: Sequence[dict[str, ChunkedMap]],
        space: SearchSpace | None,
        device_memory: DeviceMemory | None,
    ) -> None:
        self._plan, self._exposure, self._maps, self._space = plan, exposure, opened, space
        sources, maps, mask_nan = exposure.sources, plan.maps_of_exposure, plan.nan == "mask"
        self.fold: Fold | DeviceFold
        if device_memory is None:
            self.fold = Fold(sources, maps, space, mask_nan=mask_nan)
        else:
            self.fold = DeviceFold(sources, maps, space, device_memory, mask_nan=mask_nan)
        self.layout = layout.Layout.of(plan, exposure)
        self.number, self.region = exposure.number, exposure.region
        self.decoded_nbytes_per_pixel = sum(
            chunked.dtype.itemsize for maps in self._maps for chunked in maps.values()
        )

    def dtype_of(self, number: int, name: str) -> "np.dtype[np.generic]":
        """Return the dtype of a map of a source."""
        return self._maps[number][name].dtype

    def requests(self, group: Group, piece: Piece) -> Iterator[Request]:
        """All reads of a piece, in order."""
        for number, name in self.fold.order():
            yield Request(group, self._maps[number][name], piece.region)

    def uncounted(self, region: Region) -> list[int]:
        """Return the sources with a count of 0 that have searched something in a region."""
        idle = [n for n, s in enumerate(self._exposure.sources) if not s.total_projections]
        return [n for n in idle if (self._maps[n][MIP].read(region)[0] > -np.inf).any()]

    def check_suspects(self, region: Region, report: PieceReport) -> None:
        """Raise ``InvalidDataError`` if a suspect source has an unusable value, naming it."""
        while report.suspects:
            number = report.suspects.pop(0)
            maps = {name: chunked.read(region)[0] for name, chunked in self._maps[number].items()}
            info = SearchInfo(search_space=self._space, has_pixel_size=self._plan.maps.pixel_size)
            source = self._exposure.sources[number]
            count = source.total_projections
            if problems := value_problems(maps, region, info, source.place, count):
                hint = "write the partial again, or leave it out (--without NAME)"
                if count:
                    hint = "use nan='mask' (--nan mask) to omit the partial at these pixels"
                raise InvalidDataError(f"pixels {region}: {'; '.join(problems)}; {hint}")


class TileMemory:
    """Memory of one thread, reused for every tile; each part is allocated at its first use."""

    def __init__(self, plan: MergePlan) -> None:
        self._plan = plan

    @cached_property
    def workspace(self) -> Workspace:
        """Memory for the maps of a piece."""
        return Workspace(self._plan.tile[0] * self._plan.tile[1])

    @cached_property
    def canvas(self) -> Canvas:
        """Memory for the maps of a tile on which exposures are placed."""
        return Canvas(self._plan.maps, self._plan.overlap, self.workspace.max_pixels)

    @cached_property
    def statistics(self) -> TileStatistics | None:
        """Statistics of a piece; None if they are not collected."""
        return records.new_tile_statistics(self._plan)


class Job:
    """A merge on a worker: the plan and all open inputs and outputs.

    Without ``objects``, the prepared output, nothing is written.
    """

    def __init__(
        self, plan: MergePlan, objects: Objects | None, spec: JobSpec | None = None
    ) -> None:
        self.plan = plan
        require_compiler()
        partials_on_device = 0 if spec is None else spec.partials_on_device
        self._lease: RunLease | None = None
        self._must_sync = spec is not None and spec.kernel != kernel_id()
        self._held: HeldObjects | None = None
        if objects is not None and spec is not None and spec.lock:
            self._lease = RunLease(objects, spec.lock, spec.holder)
            objects = self._held = hold(objects, self._lease)
            self._held.appends = plan.in_shards
        self.objects = objects
        first = plan.exposures[0].sources[0]
        store = open_objects(first.url)
        self._first: list[list[dict[str, ChunkedMap]]] = []
        self._spaces: dict[str, SearchSpace | None] = {}
        steps: list[Callable[[], Any]] = [
            partial(self._space_of, plan.exposures[0]),
            self._open_output,
            self._open_first,
            lambda: self.may_begin,
        ]
        self._space, self.written, *_ = at_once(store, steps)
        self._device_memory = None
        if partials_on_device:
            maps, sum_dtype = plan.maps_of_exposure, open_one(first, SUM).dtype.name
            # A montage needs the values of its z-score.
            left_out = SCALED_MIP if plan.has_parts else ""
            written = {name: own for name, own in self.written.items() if name != left_out}
            self._device_memory = DeviceMemory(
                open_device(), maps, partials_on_device, sum_dtype, written
            )
        inputs = [open_objects(url) for url in {source.url for source in plan.sources}]
        self._streams_in, self._streams_out = (
            (spec.streams if spec is not None and any(one.requests for one in stores) else 0)
            or max((one.streams for one in stores), default=1)
            for stores in (inputs, [] if objects is None else [objects])
        )
        self._per_thread = threading.local()
        self._chunks: list[list[ReusedMemory]] = []  # for readers that are opened
        self._blank: dict[str, list[bytes]] = {}
        self._opened: OrderedDict[int, OpenExposure] = OrderedDict()
        self._opening = threading.Lock()
        self._is_compiled = False
        self.compile_seconds = 0.0
        """Time spent compiling kernels in this process; 0 if they were cached on disk."""

    def _space_of(self, exposure: PlannedExposure) -> SearchSpace | None:
        """Read the search space of an exposure or group, once."""
        digest = self.plan.digest_of(exposure) or ""
        if digest not in self._spaces:
            objects = open_objects(exposure.sources[0].url)
            self._spaces[digest] = read_search_space(objects, digest or None)
        return self._spaces[digest]

    def _maps_of(self, exposure: PlannedExposure) -> list[dict[str, ChunkedMap]]:
        return open_several(exposure.sources, self.plan.maps_of_exposure, exposure.shape)

    def _open_first(self) -> None:
        """Open the first exposure, which is nearly always needed, with all else at the start."""
        with suppress(OcelotError):  # only its tiles fail
            self._first.append(self._maps_of(self.plan.exposures[0]))

    def _open_output(self) -> dict[str, ChunkedMap]:
        """Open the maps of the output."""
        return {} if self.objects is None else MapGroup(self.objects).open(self.plan.maps.merged)

    def compile(self, listener: CompileListener) -> None:
        """Compile or load the kernels, so that compilation does not count as a tile's time."""
        if self._is_compiled:
            return
        self._is_compiled = True
        if self._device_memory is None:  # a GPU uses mostly other kernels
            exposure = self.plan.exposures[0]
            opened = self.open(Piece(0, exposure.region, exposure.region))
            self.compile_seconds = compile_kernels(
                self.plan, exposure, self._space, opened.dtype_of, listener
            )

    @property
    def may_begin(self) -> bool:
        """Whether another tile may start: the run still holds the lock and is not stopping."""
        return self._lease is None or self._lease.is_held

    def require_proof(self) -> None:
        """Make the next write prove that the run still holds the lock."""
        if self._lease is not None:
            self._lease.expire()

    def commit(self) -> None:
        """Make chunks visible that were appended to shards."""
        if self._held is not None:
            self._held.commit()

    def close(self) -> None:
        """Close files that are kept open for writing; one that is needed is opened again."""
        if self._held is not None:
            self._held.rest()

    def sync(self) -> None:
        """Bring what was written to the disk, unless the driver will, on the same host."""
        if self.objects is not None and self._must_sync:
            self.objects.sync()

    @property
    def memory(self) -> TileMemory:
        """Memory of this thread."""
        if not hasattr(self._per_thread, "memory"):
            self._per_thread.memory = TileMemory(self.plan)
        memory: TileMemory = self._per_thread.memory
        return memory

    def release_memory(self) -> None:
        """Release this thread's memory."""
        self._per_thread.__dict__.clear()
        self._chunks.clear()

    def open(self, piece: Piece) -> OpenExposure:
        """Return the open exposure of a piece; the most recently used ones stay open."""
        with self._opening:
            found = self._opened.get(piece.exposure)
            if found is None:
                exposure = self.plan.exposures[piece.exposure]
                is_first = piece.exposure == 0 and self._first
                opened = self._first.pop() if is_first else self._maps_of(exposure)
                space = self._space_of(exposure)
                found = OpenExposure(self.plan, exposure, opened, space, self._device_memory)
                self._opened[piece.exposure] = found
                if len(self._opened) > MAX_OPEN_EXPOSURES:
                    self._opened.popitem(last=False)
            self._opened.move_to_end(piece.exposure)
            return found

    @contextmanager
    def read_ahead(self, tiles: Iterable[Tile]) -> Iterator[ReadAhead]:
        """Open a reader of all chunks that some tiles need, in order."""
        # Not the memory of a thread: a task may continue in another one.
        memory = [ReusedMemory() for _ in range(chunks_ahead(self._streams_in))]
        with suppress(IndexError):
            memory = self._chunks.pop()
        with ReadAhead(self._requests(tiles), self._streams_in, memory) as reader:
            yield reader
        self._chunks.append(memory)

    def write_behind(self) -> WriteBehind:
        """Return a writer for the output."""
        return WriteBehind(self._streams_out)

    def canvas(self, tile: Tile, pieces: Sequence[Piece]) -> Canvas | WholeTile:
        """Return the canvas on which the pieces of a tile are placed."""
        if covers_alone(pieces, tile) and not self.plan.group_by:
            number = self.plan.exposures[pieces[0].exposure].number
            return WholeTile(number, self.plan.maps, tile.region.shape)
        canvas = self.memory.canvas
        canvas.begin(tile.region.shape, [piece.in_tile for piece in pieces])
        return canvas

    def report(self, piece: Piece) -> PieceReport:
        """Return an empty report for a piece, with this thread's statistics, if any."""
        statistics = self.memory.statistics
        if statistics is not None:
            statistics.begin(piece.region, self.open(piece).layout.scope)
        return PieceReport(statistics, suspects=self.open(piece).uncounted(piece.region))

    def workspace(self, piece: Piece) -> Workspace:
        """Return this thread's workspace with the shape of a piece."""
        work = self.memory.workspace
        work.shape = piece.region.shape
        return work

    def blank_chunk(self, name: str) -> list[bytes]:
        """Return the encoded chunk of a map without exposures; it is encoded once."""
        if name not in self._blank:
            self._blank[name] = self.written[name].encode_blank()
        return self._blank[name]

    def decoded_nbytes(self, tile: Tile) -> int:
        """Number of decoded bytes that a tile reads."""
        return sum(
            self.open(piece).decoded_nbytes_per_pixel * piece.region.size
            for piece in self.plan.pieces(tile)
        )

    def _requests(self, tiles: Iterable[Tile]) -> Iterator[Request]:
        for tile in tiles:
            for piece in self.plan.pieces(tile):
                # If an exposure cannot be opened, only the tile that needs it fails, not those
                # before it.
                with suppress(OcelotError):
                    yield from self.open(piece).requests(group_of(tile, piece), piece)


def group_of(tile: Tile, piece: Piece) -> Group:
    """Return the key of the reads for a piece of a tile."""
    return tile.iy, tile.ix, piece.exposure


def covers_alone(pieces: Sequence[Piece], tile: Tile) -> bool:
    """Whether a single exposure covers the whole tile and no other touches it."""
    return len(pieces) == 1 and pieces[0].in_tile.shape == tile.region.shape


def open_job(spec: JobSpec, listener: CompileListener | None = None) -> Job:
    """Open a prepared output once per process; the run's id prevents use of an old job."""
    with _opening:
        if spec not in _opened:
            close_job()
            _opened[spec] = _open_job(spec)
        job = _opened[spec]
        with suppress(OcelotError):  # the first exposure fails; other tiles may not need it
            job.compile(listener or CompileLog())
        return job


_opening = threading.Lock()
_opened: dict[JobSpec, Job] = {}
"""The open job of this process, if any."""


def _open_job(spec: JobSpec) -> Job:
    if spec.code != code_version():
        raise PlanError(
            f"worker on {socket.gethostname()}: expected ocelot-em {spec.code}, as the driver has, "
            f"got {code_version()}; install the same version for the driver and all workers"
        )
    objects = open_objects(spec.output)
    attributes = None
    with suppress(FormatError, StoreNotFoundError):
        attributes = read_attributes(objects)
    if not isinstance(attributes, fmt.MergedAttributes) or attributes.id != spec.run_id:
        raise StoreNotFoundError(
            f"{spec.output}: expected the output of run {spec.run_id[:8]}, got something else on "
            f"{socket.gethostname()}; all workers need access to the driver's storage under the "
            "same path"
        )
    return Job(read_plan(attributes, spec.output), objects, spec)


def close_job() -> None:
    """Close this process's job, and release its memory and files."""
    while _opened:
        _opened.popitem()[1].close()
