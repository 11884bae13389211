"""Memory needs of a merge, and the largest tiles that fit.

The constants were measured (``python -m benchmarks.memory``); ``tests/e2e/test_scale.py`` checks
that merges stay within the predictions.
"""

from collections.abc import Sequence
from os import PathLike
from typing import Literal, NamedTuple, TypeVar

import numpy as np

from ocelot_em.errors import PlanError
from ocelot_em.merge.device_fold import (
    CHUNK_NBYTES,
    PINNED_PLANES,
    accumulator_nbytes_per_pixel,
    partial_nbytes_per_pixel,
)
from ocelot_em.merge.plan import MergePlan, PlannedExposure
from ocelot_em.merge.stats.collected import tile_statistics_nbytes
from ocelot_em.model.control_groups import memory_nbytes, n_cpus
from ocelot_em.model.maps import SUM, MapSet, PoseForm
from ocelot_em.model.options import MergeOptions
from ocelot_em.model.regions import ceil_div
from ocelot_em.store import constants
from ocelot_em.store.bucket import STREAMS
from ocelot_em.store.objects import Stores, normalise_url, open_objects
from ocelot_em.store.sources import open_one
from ocelot_em.store.transfer import READ_TOGETHER, chunks_ahead, chunks_behind

DEFAULT_TILE = constants.DEFAULT_CHUNK
LARGE_TILE_NBYTES = 10**9
"""Maximum memory of a worker with tiles larger than the default, for inputs with large chunks."""

SOURCES_SAMPLED = 256
"""Maximum number of sources that are inspected to predict memory and size."""

PROCESS_NBYTES = 304 * 2**20
"""Most resident memory of a worker before its first tile, if it compiles the kernels: Python,
NumPy, numba, zarr, Dask, and parts of pyarrow and SciPy that pandas and numba import if installed.
``docs/benchmarks.md`` lists what was measured."""

DEVICE_TABLES_NBYTES = 64 * 2**20
"""Device memory that does not depend on the tile size: tables of poses, rounding."""

MAX_PARTIALS_ON_DEVICE = 64
"""Maximum number of partials on a device at a time; more are no faster."""


class DeviceChoice(NamedTuple):
    """The device of a merge, and the reason for the choice, for users.

    Each of the GPUs has a worker, and ``memory_nbytes`` may be allocated on the smallest of them.
    """

    kind: Literal["cpu", "cuda"]
    reason: str
    n_devices: int = 0
    memory_nbytes: int = 0


ON_CPU = DeviceChoice("cpu", "requested")


class StorageShape(NamedTuple):
    """Properties of inputs and output that determine the memory of a worker.

    The largest chunk of an input in pixels, bytes per value of the inputs' sums, and the number of
    concurrent transfers (:class:`ocelot_em.store.contract.Objects`).
    """

    chunk: tuple[int, int]
    sum_itemsize: int
    streams: int


def storage_shape(
    exposures: Sequence[PlannedExposure],
    output: str | PathLike[str],
    stores: Stores = open_objects,
) -> StorageShape:
    """Inspect the inputs' metadata: of all sources, or of a sample if there are many."""
    sources = sample_of([source for exposure in exposures for source in exposure.sources])
    sums = [open_one(source, SUM, stores) for source in sources]
    cells = [chunked.grid.cell for chunked in sums]
    urls = {*(source.url for e in exposures for source in e.sources), normalise_url(output)}
    return StorageShape(
        chunk=(max(height for height, _ in cells), max(width for _, width in cells)),
        sum_itemsize=max(chunked.dtype.itemsize for chunked in sums),
        streams=max(open_objects(url).streams for url in urls),
    )


_Item = TypeVar("_Item")


def sample_of(items: Sequence[_Item]) -> list[_Item]:
    """Return all items, or an evenly spaced sample if there are many."""
    if len(items) <= SOURCES_SAMPLED:
        return list(items)
    return [items[int(k)] for k in np.linspace(0, len(items) - 1, SOURCES_SAMPLED)]


def choose_tile(
    shape: tuple[int, int],
    storage: StorageShape,
    maps: MapSet,
    options: MergeOptions,
    device_nbytes: int,
) -> tuple[int, int]:
    """Choose the largest tile that fits; ``device_nbytes`` is 0 where there is no device."""
    size, storage = options.tile_size, storage._replace(streams=min(storage.streams, STREAMS[0]))
    if size is not None and size > constants.DEFAULT_CHUNK and size % constants.DEFAULT_CHUNK:
        below = size - size % constants.DEFAULT_CHUNK
        raise PlanError(
            f"tile size: expected at most {constants.DEFAULT_CHUNK} or a multiple of it, so that "
            f"tiles are made of whole chunks, got {size}; use {below} or "
            f"{below + constants.DEFAULT_CHUNK}"
        )
    candidates = [size] if size is not None else _tile_candidates(storage.chunk)
    predicted = on_device = 0
    for candidate in candidates:
        tile = min(candidate, shape[0]), min(candidate, shape[1])
        if maps.exposures:  # another exposure may enlarge the canvas, but not the tiles
            tile = candidate, candidate
        predicted = worker_nbytes(tile, storage, maps, options)
        limit = options.memory_limit
        if size is None and candidate > DEFAULT_TILE:
            limit = min(limit or LARGE_TILE_NBYTES, LARGE_TILE_NBYTES)
        if device_nbytes:
            on_device = device_worker_nbytes(tile, storage, maps, options, n_partials=1)
        if on_device > device_nbytes:
            continue
        if limit is None or predicted <= limit:
            return tile
    if on_device > device_nbytes:
        raise PlanError(
            f"device memory: {n_threads(options)} threads with tiles of {candidates[-1]} pixels "
            f"need {on_device:,} bytes for one partial at a time, but {device_nbytes:,} bytes are "
            "available; use fewer threads, smaller tiles, or --device cpu"
        )
    raise PlanError(
        f"memory limit: one worker with {n_threads(options)} threads and tiles of "
        f"{candidates[-1]} pixels needs {predicted:,} bytes, {PROCESS_NBYTES:,} of them before the "
        f"first tile, but {options.memory_limit:,} bytes are allowed; raise --memory-limit, or use "
        "fewer threads or smaller tiles"
    )


def fitting_streams(
    tile: tuple[int, int], storage: StorageShape, maps: MapSet, options: MergeOptions
) -> int:
    """Return the number of concurrent transfers of a thread: fewer where memory is limited.

    The tile is chosen for the least number, so that it does not depend on the latency at hand.
    """
    here = options.workers or max(n_cpus() // n_threads(options), 1)
    limit = options.memory_limit or memory_nbytes() // 2 // here
    for streams in range(storage.streams, STREAMS[0], -1):
        if worker_nbytes(tile, storage._replace(streams=streams), maps, options) <= limit:
            return streams
    return min(storage.streams, STREAMS[0])


def _tile_candidates(chunk: tuple[int, int]) -> list[int]:
    """Tile sizes, best first; several tiles in one chunk would each decode it."""
    n_chunks = min(ceil_div(max(chunk), constants.DEFAULT_CHUNK), 2**16 // constants.DEFAULT_CHUNK)
    return [*(n * constants.DEFAULT_CHUNK for n in range(max(n_chunks, 1), 0, -1)), 512, 256, 128]


def n_threads(options: MergeOptions) -> int:
    """Return the number of threads in one worker."""
    if options.threads is not None:
        return options.threads
    return n_cpus() if options.cluster == "threads" else 1


def worker_nbytes(
    tile: tuple[int, int], storage: StorageShape, maps: MapSet, options: MergeOptions
) -> int:
    """Predicted peak memory of one worker: the process, and one tile per thread.

    For a tile a thread holds the highest correlation and its source, the sums, incoming maps, and
    the maps computed at the end; or, where NaN is masked, all maps of a partial and copies. It also
    holds the encoded chunks that are prefetched or not written yet.
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
        # Winner, the kept pose or index, and bit planes of winners.
        per_pixel += 2 + 4 + (4 if indexed else 2)
        # Decoded incoming maps: part by part, but whole at the edge of a map.
        per_pixel += 2 * 4 + wide + READ_TOGETHER * wide
    if maps.exposures:
        # For the canvas of a tile: maps, number of exposures, distance from the edge. For a piece:
        # distance from the edge, where it wins, and the maps that arrive before that is known.
        canvas = sum(np.dtype(maps.merged_dtype(n)).itemsize for n in maps.with_derived.merged)
        per_pixel += canvas + 2 + 4 + 4 + 1 + 4 * (3 + len(maps.explicit_poses))
    written = min(tile[0], constants.DEFAULT_CHUNK) * min(tile[1], constants.DEFAULT_CHUNK)
    encoded = chunks_ahead(storage.streams) + (storage.chunk != tile)  # one decoded, to crop
    if options.device == "cuda":
        per_pixel += PINNED_PLANES * CHUNK_NBYTES
    per_thread = (
        tile[0] * tile[1] * per_pixel
        + encoded * storage.chunk[0] * storage.chunk[1] * wide * 17 // 16  # room to grow
        + (chunks_behind(storage.streams) + 2) * written * wide  # 2: being encoded
        + 3 * tile_statistics_nbytes(tile)  # statistics, their record, and its bytes
    )
    return PROCESS_NBYTES + n_threads(options) * per_thread


def device_worker_nbytes(
    tile: tuple[int, int],
    storage: StorageShape,
    maps: MapSet,
    options: MergeOptions,
    *,
    n_partials: int,
) -> int:
    """Predicted device memory of a worker that holds ``n_partials`` of a tile at a time."""
    partial = partial_nbytes_per_pixel(maps, storage.sum_itemsize, mask_nan=options.nan == "mask")
    per_pixel = accumulator_nbytes_per_pixel(maps) + n_partials * partial
    return n_threads(options) * tile[0] * tile[1] * per_pixel + DEVICE_TABLES_NBYTES


def partials_on_device(
    plan: "MergePlan", storage: StorageShape, options: MergeOptions, device: DeviceChoice
) -> int:
    """Number of partials that a thread holds on the device at a time: all, if they fit."""
    if device.kind == "cpu":
        return 0
    n_sources = min(max(len(e.sources) for e in plan.exposures), MAX_PARTIALS_ON_DEVICE)
    for n_partials in range(n_sources, 1, -1):
        needed = device_worker_nbytes(plan.tile, storage, plan.maps, options, n_partials=n_partials)
        if needed <= device.memory_nbytes:
            return n_partials
    return 1
