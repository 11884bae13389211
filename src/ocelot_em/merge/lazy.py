"""Stores and merges as lazy xarray datasets, which read only the chunks of the pixels computed."""

import operator
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from os import PathLike
from typing import TYPE_CHECKING, Any, Unpack

import dask.array as da
import dask.threaded
import numpy as np
import xarray as xr
from dask.base import tokenize
from dask.highlevelgraph import HighLevelGraph

from ocelot_em.errors import FormatError, InvalidInputError
from ocelot_em.merge.job import Job
from ocelot_em.merge.merge import merge_in_memory
from ocelot_em.merge.plan import MergePlan
from ocelot_em.merge.planning import make_plan
from ocelot_em.merge.result import DerivedMap, MergedResult, decoded_by_group
from ocelot_em.model.keywords import MergeKeywords, PickKeywords, takes
from ocelot_em.model.maps import COUNT, INDEX, MAPS, MIP, SCALED_MIP, AnyArray
from ocelot_em.model.options import MergeOptions
from ocelot_em.model.pick_options import PickOptions
from ocelot_em.model.problems import kind_text, suggestion
from ocelot_em.model.regions import Region, TileGrid
from ocelot_em.model.search_space import SearchSpace
from ocelot_em.store.arrays import ChunkedMap
from ocelot_em.store.attributes import Contribution, MergedAttributes, SearchAttributes
from ocelot_em.store.constants import DIMENSIONS, map_attributes
from ocelot_em.store.objects import as_places, open_objects
from ocelot_em.store.sources import open_source_maps, open_sources

if TYPE_CHECKING:
    from ocelot_em import ParticleTable


def open_partials(store: str | PathLike[str], exposure: str | None = None) -> xr.Dataset:
    """Open a search, or one of its exposures, lazily.

    Parameters
    ----------
    store
        Path or URL of a search whose partials are all complete, or recorded while it runs.
    exposure
        Id of an exposure, if the search has any.

    Returns
    -------
    xarray.Dataset
        Maps with dimensions ``partial`` (in the stated order), ``y``, ``x``; coordinates
        ``partial`` (names), ``total_projections`` (exact counts) and those of :func:`open_merged`.
        If a partial has a map of counts, ``total_projections`` is a map of all partials instead.

    Raises
    ------
    StoreNotFoundError, FormatError, IncompleteError
        The store cannot be opened.
    InvalidInputError
        There is no such exposure, or an id is needed and was not given.
    ChunkError
        On computation, if a chunk is missing or corrupt.

    Examples
    --------
    >>> from ocelot_em import open_partials
    >>> maps = open_partials("SEARCH.zarr")
    >>> dict(maps.sizes)
    {'partial': 3, 'y': 300, 'x': 400}
    >>> maps.total_projections.values.tolist()
    [8242560, 6868800, 5495040]
    """
    objects = open_objects(store)
    attributes, exposures = open_sources(objects)
    if not isinstance(attributes, SearchAttributes):
        raise FormatError(f"{objects.url}: is a merged result; use open_merged")
    by_id = {about.id: (about, sources) for about, sources in exposures}
    if (exposure or "") not in by_id:
        raise InvalidInputError(
            f"{objects.url}: exposure: expected one of {', '.join(by_id)}, got {exposure!r}"
            if attributes.has_exposures
            else f"{objects.url}: exposure: expected none, since it has none, got {exposure!r}"
        )
    about, sources = by_id[exposure or ""]
    counts: dict[str, Any] = {COUNT: ("partial", [source.total_projections for source in sources])}
    opened = []
    for source in sources:
        maps = open_source_maps(source, attributes.maps, about.shape)
        opened.append({name: _as_dask(chunked, source.id) for name, chunked in maps.items()})
    names = attributes.maps.partial
    if any(source.has_counts for source in sources):
        names, counts = (*names, COUNT), {}
        for source, own in zip(sources, opened, strict=True):
            if not source.has_counts:
                own[COUNT] = da.full_like(own[MIP], source.total_projections, dtype=np.int64)
    return xr.Dataset(
        {
            name: (
                ("partial", *DIMENSIONS),
                da.stack([own[name] for own in opened]),
                map_attributes(name),
            )
            for name in names
        },
        coords={
            **_coordinates(about.shape, about.valid_shape, attributes.pixel_size_angstrom),
            "partial": [source.name for source in sources],
            **counts,
        },
        attrs={
            "total_projections": about.total_projections,
            "valid_shape": about.valid_shape,
            "pixel_size_angstrom": attributes.pixel_size_angstrom,
        },
    )


def open_merged(store: str | PathLike[str] | MergedResult) -> xr.Dataset:
    """Open a merged result lazily.

    Parameters
    ----------
    store
        Path or URL of the merged result, or an open one.

    Returns
    -------
    xarray.Dataset
        Maps with dimensions ``y``, ``x``; pose maps that are not stored are decoded from the index.
        The coordinates ``y`` and ``x`` are in Å, or in pixels if the pixel size is unknown: the
        numbers ``pos_y`` and ``pos_x`` of particles times the pixel size. Only pixels whose
        coordinates ``valid_y`` and ``valid_x`` are true are meaningful. In a montage,
        ``source_exposure`` holds the ``exposure_numbers`` of its ``exposures`` (attributes); in a
        result of groups, ``best_group`` holds the ``group_numbers`` of its ``groups``.
        The attribute ``incomplete_search`` is present if not all was searched.

        ``maps.ocelot.valid`` is the valid part, ``maps.ocelot.plot()`` draws a map, and
        ``maps.ocelot.peaks()`` picks particles.

    Raises
    ------
    StoreNotFoundError, FormatError
        The store does not exist, or is a search.
    IncompleteError
        The merge was never finished.

    Examples
    --------
    >>> from ocelot_em import open_merged
    >>> maps = open_merged("MERGED.zarr")
    >>> dict(maps.ocelot.valid.sizes)
    {'y': 245, 'x': 345}
    >>> round(float(maps.scaled_mip[:200, :200].max()), 2)
    12.38
    >>> best = maps.ocelot.peaks()[0]
    >>> best["pos_y"], best["pos_x"], maps.pixel_size_angstrom, maps.y.units
    (39, 249, 2.5, 'Å')
    >>> round(float(maps.scaled_mip.sel(y=98, x=622, method="nearest")), 2)
    12.81
    """
    merged = MergedResult.open(store)
    attributes = merged.attributes
    arrays = {name: _as_dask(chunked, attributes.id) for name, chunked in merged.maps.items()}
    for number, name in enumerate(merged.decoded_names):
        groups = arrays[merged.source if merged.has_own_spaces else INDEX]
        arrays[name] = arrays[INDEX].map_blocks(
            _decoded, groups, merged.search_spaces, number, dtype="float32"
        )
    names = replace(attributes.maps, decoded=True, derived=True).merged
    return xr.Dataset(
        {name: (DIMENSIONS, arrays[name], map_attributes(name)) for name in names},
        coords=_coordinates(
            attributes.shape, attributes.valid_shape, attributes.pixel_size_angstrom
        ),
        attrs={
            **_dataset_attributes(attributes, attributes.partials, merged.incomplete_text),
            "store": merged.url,
        },
    )


def _decoded(
    index: AnyArray, groups: AnyArray, spaces: dict[int, SearchSpace | None], number: int
) -> AnyArray:
    """Decode one pose map from a block of indices."""
    return decoded_by_group(index, groups, spaces)[number]


@takes(MergeOptions)
def lazy_merge(
    inputs: str | PathLike[str] | Sequence[str | PathLike[str]],
    **options: Unpack[MergeKeywords],
) -> xr.Dataset:
    """Merge lazily, only where values are computed; nothing is written.

    Parameters
    ----------
    inputs
        One or more searches or merged results.
    **options
        Options of :class:`ocelot_em.MergeOptions` that affect the merged maps or the tiles:
        ``tile_size``, ``nan``, ``poses``, ``without``, ``so_far``, ``complete_only``,
        ``group_by``, ``overlap``, ``erode``, ``origins``.

    Returns
    -------
    xarray.Dataset
        Maps identical to those that a merge writes, as Dask arrays with one chunk per tile.

    Raises
    ------
    OcelotError
        As in :func:`ocelot_em.merge`.

    Examples
    --------
    >>> from ocelot_em import lazy_merge
    >>> maps = lazy_merge("SEARCH.zarr", tile_size=256)
    >>> maps.scaled_mip.chunks
    ((256, 44), (256, 144))
    >>> round(float(maps.scaled_mip[:10, :10].max()), 2)  # merges one tile
    5.87
    """
    settings = MergeOptions.parse(options).model_copy(update={"derived": "stored"})
    plan = make_plan(as_places(inputs), "memory://lazy", settings)
    token = tokenize(plan.model_dump_json())
    plan_key, tile_layer = f"plan-{token}", f"merge_tile-{token}"
    grid = plan.grid
    tiles: dict[Any, Any] = {plan_key: plan.model_dump_json()}
    for tile in grid:
        tiles[tile_layer, tile.iy, tile.ix] = (_merge_for_dask, plan_key, tile.iy, tile.ix)
    chunks = da.core.normalize_chunks(plan.tile, plan.shape)

    def lazy_map(name: str) -> da.Array:
        layer = f"{name}-{token}"
        picks = {
            (layer, t.iy, t.ix): (operator.getitem, (tile_layer, t.iy, t.ix), name) for t in grid
        }
        graph = HighLevelGraph(
            {layer: picks, tile_layer: tiles}, {layer: {tile_layer}, tile_layer: set()}
        )
        return da.Array(graph, layer, chunks, dtype=MAPS[name].dtypes[0])

    return xr.Dataset(
        {name: (DIMENSIONS, lazy_map(name), map_attributes(name)) for name in plan.maps.merged},
        coords=_coordinates(plan.shape, plan.valid_shape, plan.pixel_size_angstrom),
        attrs=_dataset_attributes(plan, plan.contributions, plan.incomplete_text),
    )


def _merge_for_dask(plan: str, iy: int, ix: int) -> dict[str, AnyArray]:
    job = _open_lazy_job(plan)
    return merge_in_memory(job, job.plan.grid.at(iy, ix))


def _forget_pools() -> None:
    """Make Dask start threads of its own in a forked process: those of its parent are missing."""
    dask.threaded.default_pool = None
    dask.threaded.pools.clear()


os.register_at_fork(after_in_child=_forget_pools)


@lru_cache(maxsize=8)
def _open_lazy_job(plan: str) -> Job:
    return Job(MergePlan.model_validate_json(plan), None)


class _LazyMap:
    """Minimal array interface with which Dask slices blocks of a stored map."""

    ndim = 2

    def __init__(self, chunked: ChunkedMap | DerivedMap) -> None:
        self.chunked, self.shape, self.dtype = chunked, chunked.shape, chunked.dtype

    def __getitem__(self, index: tuple[int | slice, ...]) -> AnyArray:
        # Dask fuses later indexing with the slicing of blocks, so integers and steps occur.
        (y0, y1, rows), (x0, x1, columns) = map(_bounds, index, self.shape)
        picked: AnyArray = self.chunked.read(Region(y0, y1, x0, x1))[0][rows, columns]
        return picked


def _bounds(index: int | slice, length: int) -> tuple[int, int, int | slice]:
    """Return the half-open bounds of an index on an axis, and the index relative to them."""
    if not isinstance(index, slice):
        position = range(length)[index]
        return position, position + 1, 0
    picked = range(length)[index]
    if not picked:
        return 0, 0, index
    return min(picked), max(picked) + 1, slice(None, None, picked.step)


def _as_dask(chunked: ChunkedMap | DerivedMap, identity: str) -> da.Array:
    """Return a stored map as a Dask array; ``identity`` differs from that of earlier data there."""
    token = tokenize(chunked.objects.url, chunked.path, identity)
    name = f"read-{chunked.path.replace('/', '.')}-{token}"
    grid: TileGrid = chunked.grid
    return da.from_array(
        _LazyMap(chunked),
        chunks=grid.cell,
        name=name,
        asarray=False,
        fancy=False,
        lock=False,
        meta=np.empty((0, 0), chunked.dtype),
    )


def _coordinates(
    shape: tuple[int, int], valid_shape: tuple[int, int], pixel_size_angstrom: float | None
) -> dict[str, Any]:
    """Return the positions of rows and columns, and which of them are valid."""
    size, units = (1.0, "pixel") if pixel_size_angstrom is None else (pixel_size_angstrom, "Å")
    found = dict[str, Any]()
    for axis, n, n_valid in zip(DIMENSIONS, shape, valid_shape, strict=True):
        found[axis] = (axis, np.arange(n) * size, {"long_name": axis, "units": units})
        found[f"valid_{axis}"] = (axis, np.arange(n) < n_valid)
    return found


@xr.register_dataset_accessor("ocelot")  # type: ignore[no-untyped-call]  # of xarray
class _Maps:
    """What can be done with a dataset of merged maps, or with a part of it: ``maps.ocelot``."""

    def __init__(self, maps: xr.Dataset) -> None:
        self._maps = maps

    def __repr__(self) -> str:
        return "<maps.ocelot: valid, plot(), peaks()>"

    @property
    def valid(self) -> xr.Dataset:
        """The part of the maps that is valid."""
        rows = {axis: np.flatnonzero(self._maps[f"valid_{axis}"]) for axis in DIMENSIONS}
        return self._maps.isel(
            {axis: slice(min(n), max(n) + 1) if n.size else slice(0) for axis, n in rows.items()}
        )

    def plot(
        self,
        name: str = SCALED_MIP,
        ax: Any = None,
        *,
        particles: "ParticleTable | None" = None,
    ) -> Any:
        """Draw the valid part of a map, the first row on top, as :func:`ocelot_em.plot_map`."""
        from ocelot_em import plot_map

        names = [str(own) for own in self._maps]
        if name not in names:
            near = suggestion(name, names) if isinstance(name, str) else ""
            raise InvalidInputError(
                f"name: expected a map ({', '.join(names)}), got {kind_text(name)}{near}"
            )
        return plot_map(self.valid[name], ax, particles=particles)

    @takes(PickOptions)
    def peaks(self, **options: Unpack[PickKeywords]) -> "ParticleTable":
        """Pick particles as :func:`ocelot_em.find_peaks`; of a part of the maps, those in it."""
        from ocelot_em import find_peaks

        if "store" not in self._maps.attrs:
            raise InvalidInputError(
                "peaks: expected maps from open_merged, got maps without a store; write the result "
                "with merge first, then use open_merged"
            )
        found = find_peaks(self._maps.attrs["store"], **options)
        size = found.about.pixel_size_angstrom if found.about else None
        prefix = "canvas" if found.is_of_montage else "pos"
        inside = [
            np.isin(found[f"{prefix}_{axis}"] * (size or 1.0), self._maps[axis])
            for axis in DIMENSIONS
        ]
        return found[np.logical_and(*inside)]


def _dataset_attributes(
    merged: MergedAttributes | MergePlan, partials: Sequence[Contribution], incomplete: str
) -> dict[str, Any]:
    """Return the attributes of a dataset of merged maps."""
    exposures, part = [e for e in merged.exposures if e.id], merged.part
    of_montage = {
        f"{part}s": [exposure.id for exposure in exposures],
        f"{part}_numbers": [exposure.number for exposure in exposures],
        f"{part}_projections": [exposure.total_projections for exposure in exposures],
    }
    return {
        "total_projections": merged.total_projections,
        "valid_shape": merged.valid_shape,
        "pixel_size_angstrom": merged.pixel_size_angstrom,
        "partials": [partial.name for partial in partials],
        **(of_montage if exposures else {}),
        **({"incomplete_search": incomplete} if incomplete else {}),
    }
