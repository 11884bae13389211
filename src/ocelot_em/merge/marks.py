"""Done-marks: what a tile's writer records after the last chunk of the tile.

A mark has the summary of the tile, a number that binds it to its result and place, and the
checksums of the chunks of the tile, from which the manifest of the result is made.
"""

from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from ocelot_em.errors import (
    CorruptChunkError,
    FormatError,
    MissingChunkError,
    OutputExistsError,
)
from ocelot_em.merge.outcome import SUMMARY_FIELDS, TileChecksums, Tiles, TileSummary
from ocelot_em.merge.plan import MergePlan
from ocelot_em.merge.stats.layout import Layout
from ocelot_em.model.regions import Tile, TileGrid, ceil_div
from ocelot_em.model.threads import map_in_threads
from ocelot_em.store import arrays as store
from ocelot_em.store import constants
from ocelot_em.store.arrays import ChunkedMap
from ocelot_em.store.blosc import max_encoded_nbytes
from ocelot_em.store.contract import Objects, ReusedMemory
from ocelot_em.store.manifest import Checksums, identity
from ocelot_em.store.result_shards import Place, pack, places_of_chunks


def done_mark_path(iy: int, ix: int) -> str:
    """Return the path of a tile's done-mark."""
    return f"{constants.TILE_SUMMARY}/c/{iy}/{ix}"


def chunks_per_tile(plan: MergePlan) -> int:
    """Return the number of chunks of a map in a whole tile."""
    (height, width), (rows, columns) = plan.tile, plan.chunk
    return ceil_div(height, rows) * ceil_div(width, columns)


def no_checksums(plan: MergePlan) -> TileChecksums:
    """Return the checksums of a tile before it is written."""
    return np.zeros((len(plan.maps.merged), chunks_per_tile(plan)), np.uint32)


def create_marks(objects: Objects, plan: MergePlan) -> None:
    """Write the metadata of the marks."""
    n = _length(plan)
    marks = store.ArrayLayout(
        shape=(*plan.grid.counts, n),
        chunk=(1, 1, n),
        dtype="float64",
        fill=float("nan"),
        dimensions=("tile_y", "tile_x", "field"),
        attributes={"fields": list(SUMMARY_FIELDS)},
    )
    store.create_array(objects, constants.TILE_SUMMARY, plan.laid_out(marks))


def delete_marks(objects: Objects, plan: MergePlan, tiles: Tiles) -> None:
    """Delete the marks of some tiles."""
    if plan.in_shards:
        pack(objects, constants.TILE_SUMMARY, _unless(tiles, plan.grid), drops=True)
        return
    for iy, ix in tiles:
        objects.delete(done_mark_path(iy, ix))


def pack_result(objects: Objects, plan: MergePlan, missing: Tiles | None = None) -> None:
    """Move chunks, records and marks that are objects of their own into shards.

    Shards that are of ``missing`` tiles only are deleted, so that they can be created again.
    """
    for path, tile_of in _arrays_of_tiles(plan):
        pack(objects, path, None if missing is None else _unless(missing, plan.grid, tile_of))


def require_packed(objects: Objects, plan: MergePlan) -> None:
    """Raise ``FormatError`` if a complete result in shards has a chunk that is its own object."""
    paths = [path for path, _ in _arrays_of_tiles(plan)] if plan.in_shards else []
    for key in chain.from_iterable(objects.keys(f"{path}/c") for path in paths):
        raise FormatError(f"{objects.url}: expected all chunks in shards, got {key}; merge again")


def require_appendable(objects: Objects, plan: MergePlan) -> None:
    """Raise ``OutputExistsError`` if tiles of a result in shards cannot be written here."""
    if plan.in_shards and not objects.can_append:
        raise OutputExistsError(
            f"{objects.url}: an unfinished or damaged merge in shards, which only a folder can "
            "hold, not a bucket; continue it where it was begun and copy it again, or choose "
            "another output"
        )


def _arrays_of_tiles(plan: MergePlan) -> list[tuple[str, Callable[..., tuple[int, int]]]]:
    """Return the paths of the arrays that tiles write, each with the tile of a chunk's position."""
    (height, width), (rows, columns) = plan.tile, plan.chunk

    def tile_of_chunk(iy: int, ix: int) -> tuple[int, int]:
        return iy * rows // height, ix * columns // width

    layouts = [Layout.of(plan, exposure) for exposure in plan.exposures]
    return [
        *((name, tile_of_chunk) for name in plan.maps.merged),
        *((path, layout.tile_of) for layout in layouts for path in layout.paths),
        (constants.TILE_SUMMARY, _same),
    ]


def _same(iy: int, ix: int) -> tuple[int, int]:
    return iy, ix


def _unless(
    missing: Tiles,
    grid: TileGrid,
    tile_of: Callable[..., tuple[int, int]] = _same,
) -> Callable[[Place], bool]:
    """Return a function that tells whether the tile of a chunk is there and not missing."""
    is_kept = np.ones(grid.counts, np.bool_)
    is_kept.flat[missing.numbers] = False
    rows, columns = grid.counts

    def keeps(place: Place) -> bool:
        iy, ix = tile_of(*place)
        return iy < rows and ix < columns and bool(is_kept[iy, ix])

    return keeps


def write_mark(
    objects: Objects, plan: MergePlan, tile: Tile, summary: TileSummary, checksums: TileChecksums
) -> None:
    """Write the mark of a tile, after its last chunk."""
    key = f"{done_mark_path(tile.iy, tile.ix)}/0"
    values = [np.array([getattr(summary, name) for name in SUMMARY_FIELDS], np.float64)]
    if plan.identity is not None:
        values += [np.array([identity(plan.identity, key)], np.float64)]
        values += [checksums.reshape(-1).astype(np.float64)]
    store.write_chunk(objects, key, np.concatenate(values)[None, None])


def read_mark(objects: Objects, plan: MergePlan, tile: Tile) -> TileChecksums | None:
    """Read the checksums of a done tile; None if the merge began with an earlier version.

    Raises
    ------
    MissingChunkError, CorruptChunkError
    """
    if plan.identity is None:
        return None
    key, nbytes = f"{done_mark_path(tile.iy, tile.ix)}/0", _length(plan) * 8
    place = f"{objects.url}: done-mark of {tile}"
    encoded = objects.get(key, max_encoded_nbytes(nbytes))
    if encoded is None:
        raise MissingChunkError(f"{place}: expected an object {key}; merge again")
    memory = ReusedMemory()
    values = np.frombuffer(store.decode_chunk(encoded, nbytes, memory, lambda: place), np.float64)
    own, checksums = values[len(SUMMARY_FIELDS)], values[len(SUMMARY_FIELDS) + 1 :]
    if own != identity(plan.identity, key):
        raise CorruptChunkError(f"{place}: belongs to another tile or result; merge again")
    if not ((checksums >= 0) & (checksums < 2**32)).all():
        raise CorruptChunkError(f"{place}: expected checksums, got other values; merge again")
    return checksums.astype(np.uint32).reshape(len(plan.maps.merged), -1)


def done_tiles(objects: Objects, grid: TileGrid) -> NDArray[np.bool_]:
    """Whether each tile is marked as done, by row and column; other files are ignored."""
    done = np.zeros(grid.counts, np.bool_)
    for iy, ix, *_ in places_of_chunks(objects, constants.TILE_SUMMARY):
        with suppress(IndexError):
            done[iy, ix] = True
    return done


def require_marks(objects: Objects, plan: MergePlan) -> None:
    """Raise ``MissingChunkError`` unless all tiles are marked as done where the driver looks.

    A worker may see other storage under the same path. Listings may not show new objects yet.
    """
    n_rows, n_columns = plan.grid.counts
    done = done_tiles(objects, plan.grid) if plan.in_shards else None

    def look(iy: int) -> None:
        if done is not None and done[iy].all():
            return
        marked = set(objects.children(f"{constants.TILE_SUMMARY}/c/{iy}"))
        for ix in range(n_columns):
            key = f"{done_mark_path(iy, ix)}/0"
            if str(ix) not in marked and objects.size(key) is None:
                raise MissingChunkError(
                    f"{objects.url}: done-mark of {plan.grid.at(iy, ix)} is missing: expected an "
                    f"object {key}; all workers need access to the driver's storage under the same "
                    "path; merge again"
                )

    deque(map_in_threads(look, range(n_rows), objects.requests), maxlen=0)


def verified(
    objects: Objects, plan: MergePlan, tile: Tile, maps: Mapping[str, ChunkedMap]
) -> TileChecksums:
    """Read the chunks of a done tile, and return their checksums.

    Parameters
    ----------
    maps
        The maps of the result, opened without a manifest.

    Raises
    ------
    ChunkError
        The mark or a chunk is missing or damaged, or a chunk is not the one that was written.
    """
    stated, memory = read_mark(objects, plan, tile), ReusedMemory()
    found = no_checksums(plan)
    for row, name in enumerate(plan.maps.merged):
        chunked = maps[name]
        for column, chunk in enumerate(chunked.grid.touching(tile.region)):
            fetched = chunked.fetch(chunk, memory)
            found[row, column] = fetched.checksum
            if stated is not None and fetched.checksum != stated[row, column]:
                raise CorruptChunkError(
                    f"{chunked.place}: chunk ({chunk.iy}, {chunk.ix}), pixels {chunk.region}, is "
                    "not the one that was written there; merge again"
                )
    return found


class ResultChecksums:
    """The checksums of all chunks of a result, collected tile by tile.

    Parameters
    ----------
    plan
        Plan of the merge.
    """

    def __init__(self, plan: MergePlan) -> None:
        grid, self._tiles, self._chunk = TileGrid(plan.shape, plan.chunk), plan.grid, plan.chunk
        self._table = np.zeros((len(plan.maps.merged), *grid.counts), np.uint32)
        self.maps: dict[str, Checksums] = dict(zip(plan.maps.merged, self._table, strict=True))

    def put(self, iy: int, ix: int, checksums: TileChecksums) -> None:
        """Enter the checksums of a tile."""
        region, (height, width) = self._tiles.at(iy, ix).region, self._chunk
        y, x = region.y0 // height, region.x0 // width
        places = self._table[:, y : ceil_div(region.y1, height), x : ceil_div(region.x1, width)]
        n_chunks = places.shape[1] * places.shape[2]
        places[...] = checksums[:, :n_chunks].reshape(places.shape)


def _length(plan: MergePlan) -> int:
    """Return the number of values in a mark."""
    if plan.identity is None:  # as versions 1 and 2 wrote it
        return len(SUMMARY_FIELDS)
    return len(SUMMARY_FIELDS) + 1 + no_checksums(plan).size
