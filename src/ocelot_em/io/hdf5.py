"""Leopard-EM 1.3's one HDF5 file of a result, out of a merged store and in as a partial, in bands.

The layout: eight float32 maps in the group ``tensors``, compressed with gzip, and on the root the
attributes ``leopard_em_version``, ``total_projections``, ``total_orientations`` and
``total_defocus``.
"""

import math
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from ocelot_em import __version__
from ocelot_em.errors import InvalidInputError, MissingDependencyError
from ocelot_em.io.leopard_maps import (
    OUR_NAMES,
    FinishedMaps,
    FinishedSearch,
    ImportedSearch,
    MapFiles,
    Tell,
    band_grid,
    import_map_files,
)
from ocelot_em.io.writing import refuse_existing, storage_errors, whole_or_nothing
from ocelot_em.model.maps import AnyArray
from ocelot_em.model.regions import Region, Tile, TileGrid, ceil_div
from ocelot_em.store.objects import open_objects
from ocelot_em.store.search import read_attributes, read_search_space

GROUP = "tensors"
GZIP_LEVEL = 4
CHUNK = 512
"""Edge of a chunk in pixels: 1 MiB, which HDF5 keeps in its cache while it is read in parts."""

MAX_CHUNK_NBYTES = 2**30
"""Of a file that is read: HDF5 reads a chunk whole."""

PIXEL_SIZE_ATTRIBUTE = "pixel_size_angstrom"
"""Ours, beside Leopard-EM's own attributes; it ignores what it does not know."""


def write_hdf5(
    store: str | PathLike[str], output: str | PathLike[str], *, overwrite: bool = False
) -> Path:
    """Write a merged result as the HDF5 file that Leopard-EM 1.3 writes and refines from.

    Its maps are those of :func:`ocelot_em.io.mrc.write_mrc_set`: valid pixels only, the
    standard deviation as ``correlation_variance``. ``total_orientations`` and ``total_defocus``
    are those of the search space, and 0 where poses are explicit and nobody knows;
    ``leopard_em_version`` says that another program wrote it.

    Parameters
    ----------
    store
        Path or URL of a complete merged result.
    output
        The file; its folder is made if it is not there.
    overwrite
        Whether to replace a file that is there.

    Returns
    -------
    pathlib.Path
        The file.

    Raises
    ------
    MissingDependencyError
        h5py is not installed.
    StoreNotFoundError, FormatError, IncompleteError, ChunkError
        The store cannot be read.
    OutputExistsError
        The file is there.
    StorageError
        Writing failed; nothing is left behind.
    """
    h5py = _h5py()
    maps, path = FinishedMaps(store), Path(output)
    refuse_existing([path], overwrite)
    n_orientations, n_defocus = _search_size(store)
    chunk = min(CHUNK, maps.shape[0]), min(CHUNK, maps.shape[1])
    grid = band_grid(maps.shape, (_whole_chunks(maps.chunk[0]), _whole_chunks(maps.chunk[1])))
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with (
        whole_or_nothing(path) as staged,
        h5py.File(staged, "w") as file,
        ThreadPoolExecutor(os.cpu_count()) as threads,
    ):
        file.attrs["leopard_em_version"] = f"none: ocelot-em {__version__}"
        file.attrs["total_projections"] = maps.total_projections
        file.attrs["total_orientations"] = n_orientations
        file.attrs["total_defocus"] = n_defocus
        if maps.pixel_size_angstrom is not None:
            file.attrs[PIXEL_SIZE_ATTRIBUTE] = maps.pixel_size_angstrom
        for theirs, ours in OUR_NAMES.items():
            dataset = file.create_dataset(
                f"{GROUP}/{theirs}",
                shape=maps.shape,
                dtype="<f4",
                chunks=chunk,
                compression="gzip",
                compression_opts=GZIP_LEVEL,
            )
            for band in grid:
                _write(dataset, band.region, maps.read(ours, band.region), threads)
    return path


def import_hdf5(
    path: str | PathLike[str],
    output: str | PathLike[str],
    about: FinishedSearch | None = None,
    *,
    on_progress: Tell | None = None,
) -> ImportedSearch:
    """Read the HDF5 file of a finished search as a partial, as far as it carries what it needs.

    As :func:`ocelot_em.io.mrc.import_mrc_set` reads MRC files; the number of projections is
    taken from the file.

    Parameters
    ----------
    path
        A file that Leopard-EM 1.3, or :func:`write_hdf5`, wrote.
    output
        Path or URL of a search, made if it is not there.
    about
        What the file does not say.
    on_progress
        Called with the phase (``check`` or ``convert``) and the share done, 0 to 1.

    Returns
    -------
    ImportedSearch
        The partial's name, and in words what the file lacks.

    Raises
    ------
    MissingDependencyError
        h5py is not installed.
    InvalidInputError
        Listing everything that is wrong.
    """
    h5py = _h5py()
    place = Path(path)
    if not place.is_file():
        raise InvalidInputError(f"{place}: expected an HDF5 file, got nothing there")
    with ExitStack() as stack:
        try:
            file = stack.enter_context(h5py.File(place, "r"))
            maps, problems = _maps(h5py, file)
            count = file.attrs.get("total_projections")
            size = file.attrs.get(PIXEL_SIZE_ATTRIBUTE)
        except Exception as error:  # h5py has no list of what it raises
            raise InvalidInputError(f"{place}: cannot be read as HDF5: {error}") from error
        if problems:
            raise InvalidInputError(f"{place}: {problem}" for problem in problems)
        files = MapFiles(
            place=str(place),
            name=place.stem,
            maps=maps,
            paths=[place],
            pixel_size_angstrom=_positive(size),
            total_projections=count,
        )
        return import_map_files(files, output, about or FinishedSearch(), on_progress)


def _maps(h5py: Any, file: Any) -> tuple[dict[str, Any], list[str]]:
    """Datasets of the maps, and what is wrong with them; nothing outside the file is touched."""
    maps, problems = dict[str, Any](), list[str]()
    for path in (GROUP, *(f"{GROUP}/{name}" for name in OUR_NAMES)):
        link = file.get(path, getlink=True)
        if link is None:
            continue
        if not isinstance(link, h5py.HardLink):
            problems.append(f"{path}: expected it in this file, got a link")
            if path == GROUP:
                break
            continue
        found = file[path]
        if path == GROUP or not isinstance(found, h5py.Dataset):
            continue
        problem = _dataset_problem(found)
        if problem:
            problems.append(f"{path}: {problem}")
        maps[path.rpartition("/")[2]] = found
    return maps, problems


def _dataset_problem(dataset: Any) -> str | None:
    """Say why a map should not be read, if it should not."""
    shape, chunk = dataset.shape, dataset.chunks
    if shape is None:
        return "expected a map (y, x), got nothing"
    if dataset.is_virtual or dataset.external:
        return "expected its values in this file, got a reference to others"
    # Where there is nothing, HDF5 makes up values: a map of any size would fit into few bytes.
    if chunk is None:
        expected, got = dataset.nbytes, dataset.id.get_storage_size()
        return f"expected {expected:,} bytes, got {got:,}" if got < expected else None
    nbytes = math.prod(chunk) * dataset.dtype.itemsize
    if nbytes > MAX_CHUNK_NBYTES:
        return f"expected chunks of at most {MAX_CHUNK_NBYTES:,} bytes, got {nbytes:,}"
    expected = math.prod(map(ceil_div, shape, chunk))
    got = dataset.id.get_num_chunks()
    return f"expected {expected:,} chunks, got {got:,}" if got != expected else None


def _h5py() -> Any:
    try:
        import h5py
    except ImportError as error:
        raise MissingDependencyError(
            "HDF5 files need h5py: pip install 'ocelot-em[maps]'"
        ) from error
    return h5py


def _write(dataset: Any, region: Region, values: AnyArray, threads: ThreadPoolExecutor) -> None:
    """Write whole chunks, compressed by many threads at once: HDF5 itself has one at a time."""
    cells = list(TileGrid(dataset.shape, dataset.chunks).touching(region))

    def compressed(cell: Tile) -> bytes:
        whole = np.zeros(dataset.chunks, dataset.dtype)  # at the edge it reaches beyond the map
        height, width = cell.region.shape
        whole[:height, :width] = values[cell.region.relative_to(region).slices]
        return zlib.compress(whole.data, GZIP_LEVEL)

    for cell, data in zip(cells, threads.map(compressed, cells), strict=True):
        dataset.id.write_direct_chunk((cell.region.y0, cell.region.x0), data)


def _whole_chunks(length: int) -> int:
    """At least this many pixels, in whole chunks of the file."""
    return ceil_div(length, CHUNK) * CHUNK


def _search_size(store: str | PathLike[str]) -> tuple[int, int]:
    """Numbers of orientations and of defocus values; 0 where the store does not know them."""
    objects = open_objects(store)
    space = read_search_space(objects, read_attributes(objects).search_space_digest)
    return (0, 0) if space is None else (len(space.euler_angles), len(space.defocus_values))


def _positive(size: Any) -> float | None:
    try:
        number = float(size)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) and number > 0 else None
