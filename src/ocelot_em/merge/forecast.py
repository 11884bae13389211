"""Prediction of a merge's input, output and memory."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from os import PathLike

import numpy as np

from ocelot_em.errors import PlanError
from ocelot_em.merge.memory_model import (
    ON_CPU,
    DeviceChoice,
    device_worker_nbytes,
    fitting_streams,
    partials_on_device,
    sample_of,
    storage_shape,
    worker_nbytes,
)
from ocelot_em.merge.plan import MergePlan
from ocelot_em.merge.stats.layout import Layout
from ocelot_em.model.maps import MAPS, SUM, MapSet
from ocelot_em.model.options import MergeOptions
from ocelot_em.model.regions import TileGrid, ceil_div
from ocelot_em.store.arrays import ChunkedMap
from ocelot_em.store.contract import Objects, at_once
from ocelot_em.store.objects import Stores, open_objects
from ocelot_em.store.result_shards import chunks_per_shard
from ocelot_em.store.sources import Source, open_one

CHUNKS_LISTED = 4096
"""Maximum number of chunks of a map to sum up; the size of larger maps is extrapolated."""

CHUNKS_SAMPLED = 64
"""Number of chunks from which the size of a larger map is extrapolated."""

BLANK_RATIO = 1 / 128
"""Stored size of a blank chunk relative to its decoded size."""


@dataclass(frozen=True)
class Forecast:
    """Predicted cost of a plan.

    ``n_done`` tiles were finished by an interrupted run. The stored size of the output is estimated
    from the inputs' compression ratio. ``worker_nbytes`` and ``device_nbytes`` are the peak memory
    of one worker, and of one on its device, where a thread holds ``partials_on_device`` at a time
    (0 on the CPU). ``n_inodes`` counts the files of the output, and its folders. ``free_nbytes``
    and ``free_inodes`` are None if the output's storage does not report it. A thread has up to
    ``streams`` transfers in flight where requests have latency.
    """

    n_tiles: int
    n_done: int
    decoded_nbytes_in: int
    stored_nbytes_in: int
    decoded_nbytes_out: int
    stored_nbytes_out: int
    worker_nbytes: int
    n_files: int
    n_inodes: int
    free_nbytes: int | None
    free_inodes: int | None
    device: DeviceChoice = ON_CPU
    partials_on_device: int = 0
    device_nbytes: int = 0
    streams: int = 0


def forecast(
    plan: MergePlan,
    output: str | PathLike[str],
    options: MergeOptions,
    n_done: int,
    device: DeviceChoice = ON_CPU,
    stores: Stores = open_objects,
) -> Forecast:
    """Predict the cost of a plan; lists the inputs' objects, but reads none."""
    decoded_in = 0
    for exposure in plan.exposures:
        for source in exposure.sources:
            pixel = sum(np.dtype(MAPS[n].dtypes[0]).itemsize for n in source.map_names(plan.maps))
            decoded_in += pixel * exposure.shape[0] * exposure.shape[1]
    sampled = sample_of(plan.sources)
    sizes = [size for source in sampled for size in _sizes_of(source, plan.maps, stores)]
    stored_in = sum(at_once(stores(sampled[0].url), sizes))
    stored_in = stored_in * len(plan.sources) // len(sampled)
    pixels = plan.shape[0] * plan.shape[1]
    storage = storage_shape(plan.exposures, output, stores)
    streams = fitting_streams(plan.tile, storage, plan.maps, options)
    storage = storage._replace(streams=streams)
    n_partials = partials_on_device(plan, storage, options, device)
    per_pixel = sum(np.dtype(plan.maps.merged_dtype(key)).itemsize for key in plan.maps.merged)
    covered = min(sum(exposure.region.size for exposure in plan.exposures), pixels)
    stored_out = covered * min(stored_in / max(decoded_in, 1), 1)
    stored_out += (pixels - covered) * BLANK_RATIO  # pixels without an exposure
    n_files, n_inodes = _files_and_inodes(plan)
    return Forecast(
        n_tiles=len(plan.grid),
        n_done=n_done,
        decoded_nbytes_in=decoded_in,
        stored_nbytes_in=stored_in,
        decoded_nbytes_out=per_pixel * pixels,
        stored_nbytes_out=int(per_pixel * stored_out),
        worker_nbytes=worker_nbytes(plan.tile, storage, plan.maps, options),
        n_files=n_files,
        n_inodes=n_inodes,
        free_nbytes=open_objects(output).free_bytes(),
        free_inodes=open_objects(output).free_inodes(),
        device=device,
        partials_on_device=n_partials,
        device_nbytes=n_partials
        and device_worker_nbytes(plan.tile, storage, plan.maps, options, n_partials=n_partials),
        streams=streams,
    )


def n_shards(counts: tuple[int, ...]) -> int:
    """Return the number of shards of an array of a result, by its numbers of chunks."""
    return prod(map(ceil_div, counts, chunks_per_shard(len(counts))))


def n_files_of_maps(n_maps: int, counts: tuple[int, int]) -> int:
    """Return the number of files of maps with these counts of chunks, or of shards."""
    return n_maps * (counts[0] * counts[1] + 1)


def _files_and_inodes(plan: MergePlan) -> tuple[int, int]:
    """Return the number of files of a result, and of its files and folders."""
    n_maps, layouts = len(plan.maps.merged), [Layout.of(plan, e) for e in plan.exposures]
    counts, n_kinds = TileGrid(plan.shape, plan.chunk).counts, 3 if plan.has_parts else 2
    n_records = [(len(layout),) for layout in layouts]
    # For each exposure also histograms; and for the result lists, the manifest and tables.
    n_files, n_folders = n_maps + 7 + 8 * len(layouts), n_maps + 7 + 12 * len(layouts)
    if plan.in_shards:
        n_files += n_maps * n_shards(counts) + n_shards(plan.grid.counts)
        n_files += n_kinds * sum(map(n_shards, n_records))
        n_folders -= 1 + n_kinds * len(layouts)
    else:
        n_tiles = len(plan.grid)
        n_files += n_maps * prod(counts) + n_tiles + n_kinds * sum(map(prod, n_records))
        n_folders += n_maps * (1 + counts[0]) + plan.grid.counts[0] + n_tiles
    n_files += 0 if plan.search_space_digest is None else 7 + 7 * len(plan.own_digests)
    return n_files, n_files + n_folders


def _sizes_of(source: Source, maps: MapSet, stores: Stores) -> list[Callable[[], int]]:
    """Return functions that look up the stored bytes of all maps of a source."""
    objects, sums = stores(source.url), open_one(source, SUM, stores)
    prefix = sums.path.removesuffix(SUM)
    names = source.map_names(maps)
    return [partial(_stored_nbytes, objects, f"{prefix}{name}", sums) for name in names]


def _stored_nbytes(objects: Objects, path: str, like: ChunkedMap) -> int:
    """Return the stored bytes of a map, extrapolated if it has many chunks."""
    grid = like.grid
    if len(grid) <= CHUNKS_LISTED or like.shards is not None:
        return sum(objects.sizes(path).values())
    some = (grid[int(number)] for number in np.linspace(0, len(grid) - 1, CHUNKS_SAMPLED))
    sizes = (objects.size(f"{path}/c/{chunk.iy}/{chunk.ix}") for chunk in some)
    return sum(size or 0 for size in sizes) * len(grid) // CHUNKS_SAMPLED


def require_resources(
    prediction: Forecast, output: str, n_workers: int, memory_nbytes: int
) -> None:
    """Raise PlanError if the disk is too small, or the memory that the workers here share.

    What an earlier version of the output takes is free, too: it is replaced object by object, or
    deleted before.
    """
    missing = 1 - prediction.n_done / prediction.n_tiles
    needed = int(prediction.stored_nbytes_out * missing)
    if prediction.free_nbytes is not None and needed > prediction.free_nbytes:
        held = sum(open_objects(output).sizes("").values())
        needed = min(needed, prediction.stored_nbytes_out - held)
    if prediction.free_nbytes is not None and needed > prediction.free_nbytes:
        raise PlanError(
            f"disk: the output needs about {needed:,} more bytes, {prediction.free_nbytes:,} are "
            "free; free some space, or choose another output"
        )
    n_inodes = int(prediction.n_inodes * missing)
    if prediction.free_inodes is not None and n_inodes > prediction.free_inodes:
        raise PlanError(
            f"disk: the output needs about {n_inodes:,} more files and folders, "
            f"{prediction.free_inodes:,} can be created; delete some, or choose another output"
        )
    total = n_workers * prediction.worker_nbytes
    if total > memory_nbytes:
        raise PlanError(
            f"memory: {n_workers} workers need {prediction.worker_nbytes:,} bytes each, {total:,} "
            f"in total, but this machine has {memory_nbytes:,}; use fewer workers or threads, or "
            "smaller tiles"
        )
