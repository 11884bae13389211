"""Export of merged results to Leopard-EM 1.3's HDF5 file, in bands, and reading of such files.

The file has eight float32 maps in the group ``tensors``, with HDF5's own filters shuffle and gzip,
which every reader has, and the root attributes ``leopard_em_version``, ``total_projections``,
``total_orientations`` and ``total_defocus``. Where counts differ from pixel to pixel, they are an
additional int64 map ``total_projections``, which Leopard-EM ignores, and the attribute is an upper
bound.
"""

import math
import struct
from contextlib import ExitStack, suppress
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from ocelot_em import __version__
from ocelot_em.errors import InvalidInputError, MissingDependencyError, optional_import
from ocelot_em.io.leopard_maps import OUR_NAMES, band_grid
from ocelot_em.io.map_files import (
    COUNT_FACT,
    OFFSET,
    PIXEL,
    FoundSearch,
    MapFiles,
    positive_or_none,
    single_offset,
)
from ocelot_em.merge.result import MergedResult
from ocelot_em.model.maps import COUNT, AnyArray
from ocelot_em.model.regions import Region, Tile, TileGrid, ceil_div
from ocelot_em.model.threads import map_in_threads
from ocelot_em.store.whole_file import refuse_existing, whole_or_nothing

GROUP = "tensors"
GZIP_LEVEL = 1
"""Level of ISA-L. With shuffled bytes, it is 7 times as fast as zlib at the same level, and
compresses as well (measured once, on eight maps)."""

SAMPLE_NBYTES = 8192
"""Bytes of a plane that show whether it can be compressed."""

_STORED = struct.Struct("<BHH")
"""Header of a stored deflate block: whether it is the last, its length, and its complement."""

CHUNK = 512
"""Edge of a chunk in pixels: 1 MiB, so that HDF5 caches it while it is read in parts."""

MAX_GZIP_CHUNK_NBYTES = 2**24
"""Maximum chunk size that threads decompress, each several at a time."""

_DEFLATE, _SHUFFLE = 1, 2
"""HDF5's numbers of its filters."""

MAX_CHUNK_NBYTES = 2**30
"""Maximum chunk size of a file to import: HDF5 reads chunks whole."""

PIXEL_SIZE_ATTRIBUTE = "pixel_size_angstrom"
"""An attribute in addition to Leopard-EM's own; Leopard-EM ignores unknown ones."""

INCOMPLETE_ATTRIBUTE = "incomplete_search"
"""States how much had been searched, unless it was all."""


def write_hdf5(
    source: str | PathLike[str] | MergedResult,
    output: str | PathLike[str],
    *,
    overwrite: bool = False,
) -> Path:
    """Write a merged result as the HDF5 file that Leopard-EM 1.3 writes and refines from.

    Its maps are those of :func:`ocelot_em.io.mrc.write_mrc_set`: valid pixels only, the standard
    deviation as ``correlation_variance``. ``total_orientations`` and ``total_defocus`` come from
    the search space, or are 0 if poses are explicit and these numbers unknown;
    ``leopard_em_version`` states that another program wrote the file.

    Return the file. Without ``overwrite`` an existing file is an error; if writing fails, nothing
    is left behind.
    """
    h5py, _ = _h5py(), _isal()  # before anything is written
    merged, path = MergedResult.open(source), Path(output)
    refuse_existing([path], overwrite)
    shape, space = merged.valid_shape, merged.search_space
    chunk = min(CHUNK, shape[0]), min(CHUNK, shape[1])
    height, width = (ceil_div(edge, CHUNK) * CHUNK for edge in merged.chunk)  # whole chunks of both
    with whole_or_nothing(path) as staged, _opened(h5py, staged, "w") as file:
        file.attrs["leopard_em_version"] = f"none: ocelot-em {__version__}"
        file.attrs["total_projections"] = merged.projections_per_pixel
        file.attrs["total_orientations"] = 0 if space is None else len(space.euler_angles)
        file.attrs["total_defocus"] = 0 if space is None else len(space.defocus_values)
        if merged.attributes.pixel_size_angstrom is not None:
            file.attrs[PIXEL_SIZE_ATTRIBUTE] = merged.attributes.pixel_size_angstrom
        if merged.incomplete_text:
            file.attrs[INCOMPLETE_ATTRIBUTE] = merged.incomplete_text
        layout = {"shape": shape, "chunks": chunk, "shuffle": True, "compression": "gzip"}
        add = partial(file.create_dataset, **layout, compression_opts=GZIP_LEVEL)
        for theirs, ours in OUR_NAMES.items():
            dataset = add(f"{GROUP}/{theirs}", dtype="<f4")
            for band in band_grid(shape, (height, width)):
                _write(dataset, band.region, merged.read(band.region, ours))
        if merged.attributes.has_counts:
            dataset = add(f"{GROUP}/{COUNT}", dtype="<i8")
            for band in band_grid(shape, (height, width)):
                dataset[band.region.slices] = merged.read(band.region, COUNT)
    return path


def is_result(path: Path) -> bool:
    """Return whether a file can be a result, and not, for example, a table of correlations."""
    h5py = _h5py()
    with suppress(OSError), _opened(h5py, path, "r") as file:
        return GROUP in file
    return False


def open_hdf5(found: FoundSearch, stack: ExitStack) -> MapFiles:
    """Open a finished search's file until a stack is left; note what its attributes have."""
    h5py, place = _h5py(), found.paths[""]
    try:
        file = stack.enter_context(_opened(h5py, place, "r"))
        maps, problems = _maps(h5py, file)
        attributes = dict(file.attrs)
    except Exception as error:  # h5py's exceptions are undocumented
        raise InvalidInputError(f"{place}: cannot be read as HDF5: {error}") from error
    if problems:
        raise InvalidInputError(f"{place}: {problem}" for problem in problems)
    found.facts.add(OFFSET, single_offset(attributes), place.name)
    found.facts.add(COUNT_FACT, attributes.get("total_projections"), place.name)
    found.facts.add(PIXEL, positive_or_none(attributes.get(PIXEL_SIZE_ATTRIBUTE)), place.name)
    return MapFiles(found.place, maps)


def open_images(place: Path) -> tuple[dict[str, Any], str | None, Any]:
    """Open the images (y, x) of a file, also those that are the only section of a stack, by path.

    Also return the root attribute ``coordinate_frame``, as Leopard-EM's spatial constraints have
    it, and the file, which is open as long as it is kept.

    Raises
    ------
    InvalidInputError
        The file cannot be read.
    """
    h5py, images, problems = _h5py(), dict[str, Any](), list[str]()

    def look(path: str, found: Any) -> None:
        """Add an image; links to other files are not visited."""
        if isinstance(found, h5py.Dataset) and found.ndim > 1 and {1}.issuperset(found.shape[:-2]):
            problem = _dataset_problem(found)
            problems.extend([f"{place}: {path}: {problem}"] if problem else [])
            images[path] = found

    try:
        file = _opened(h5py, place, "r")
        file.visititems(look)
        frame = file.attrs.get("coordinate_frame")
    except Exception as error:  # h5py's exceptions are undocumented
        raise InvalidInputError(f"{place}: cannot be read as HDF5: {error}") from error
    if problems:
        raise InvalidInputError(problems)
    return images, frame if isinstance(frame, str) else None, file


def _maps(h5py: Any, file: Any) -> tuple[dict[str, Any], list[str]]:
    """Return the maps' datasets, and problems; nothing outside the file is accessed."""
    maps, problems = dict[str, Any](), list[str]()
    for path in (GROUP, *(f"{GROUP}/{name}" for name in (*OUR_NAMES, COUNT))):
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
        maps[path.rpartition("/")[2]] = _GzipMap.of(found) or found
    return maps, problems


class _GzipMap:
    """A map in chunks that are compressed with gzip, which threads decompress with ISA-L.

    HDF5 itself uses one thread, and zlib. It reads what this class cannot, and reports the errors.
    """

    def __init__(self, dataset: Any, isal: Any, *, is_shuffled: bool) -> None:
        self._dataset, self._isal, self._is_shuffled = dataset, isal, is_shuffled
        self.shape, self.dtype = dataset.shape, dataset.dtype

    @classmethod
    def of(cls, dataset: Any) -> "_GzipMap | None":
        """Return a dataset's map, or None if it is stored in another way, or isal is missing."""
        if dataset.ndim != 2 or dataset.chunks is None or dataset.dtype != np.dtype("<f4"):
            return None
        if 4 * math.prod(dataset.chunks) > MAX_GZIP_CHUNK_NBYTES:
            return None
        about = dataset.id.get_create_plist()
        filters = [about.get_filter(number)[0] for number in range(about.get_nfilters())]
        if filters not in ([_DEFLATE], [_SHUFFLE, _DEFLATE]):
            return None
        try:
            return cls(dataset, _isal(), is_shuffled=filters[0] == _SHUFFLE)
        except MissingDependencyError:
            return None

    def __getitem__(self, slices: tuple[slice, slice]) -> AnyArray:
        """Read a region."""
        (y0, y1, _), (x0, x1, _) = map(slice.indices, slices, self.shape)
        region = Region(y0, y1, x0, x1)
        values = np.empty(region.shape, self.dtype)
        cells = list(TileGrid(self.shape, self._dataset.chunks).touching(region))
        try:
            for cell, chunk in zip(cells, map_in_threads(self._chunk, cells), strict=True):
                shared = cell.region.intersect(region)
                found = chunk[shared.relative_to(cell.region).slices]
                values[shared.relative_to(region).slices] = found
        except (OSError, RuntimeError, ValueError, self._isal.error):
            values = self._dataset[slices]
        return values

    def _chunk(self, cell: Tile) -> AnyArray:
        """Decompress a chunk."""
        shape = self._dataset.chunks
        skipped, data = self._dataset.id.read_direct_chunk((cell.region.y0, cell.region.x0))
        stream = self._isal.decompressobj()
        decoded = stream.decompress(data, 4 * math.prod(shape) + 1)
        if skipped or not stream.eof:
            raise ValueError("expected a chunk that all filters have encoded, got another")
        if not self._is_shuffled:
            return np.frombuffer(decoded, self.dtype).reshape(shape)
        planes = np.frombuffer(decoded, np.uint8).reshape(4, -1)
        words = planes[3].astype("<u4")
        for plane in planes[2::-1]:
            words <<= 8
            words |= plane
        values: AnyArray = words.view(self.dtype)
        return values.reshape(shape)


def _dataset_problem(dataset: Any) -> str | None:
    """Return the reason not to read a map, if there is one."""
    shape, chunk = dataset.shape, dataset.chunks
    if shape is None:
        return "expected a map (y, x), got nothing"
    if dataset.is_virtual or dataset.external:
        return "expected its values in this file, got a reference to others"
    # HDF5 fills missing data with a default: a tiny file could claim a map of any size.
    if chunk is None:
        expected, got = dataset.nbytes, dataset.id.get_storage_size()
        return f"expected {expected:,} bytes, got {got:,}" if got < expected else None
    nbytes = math.prod(chunk) * dataset.dtype.itemsize
    if nbytes > MAX_CHUNK_NBYTES:
        return f"expected chunks of at most {MAX_CHUNK_NBYTES:,} bytes, got {nbytes:,}"
    expected = math.prod(map(ceil_div, shape, chunk))
    got = dataset.id.get_num_chunks()
    return f"expected {expected:,} chunks, got {got:,}" if got != expected else None


def _opened(h5py: Any, place: Path, mode: str) -> Any:
    """Open a file; without a lock where the file system has none, as on some clusters."""
    try:
        return h5py.File(place, mode)
    except BlockingIOError:  # somebody else has locked it
        raise
    except OSError as error:
        if "unable to lock file" not in str(error):
            raise
        return h5py.File(place, mode, locking=False)


def _h5py() -> Any:
    with optional_import("HDF5 files need h5py", extra="maps"):
        import h5py
    return h5py


def _isal() -> Any:
    with optional_import("HDF5 files are written with isal", extra="maps"):
        from isal import isal_zlib
    return isal_zlib


def _write(dataset: Any, region: Region, values: AnyArray) -> None:
    """Write whole chunks, filtered in several threads: HDF5 itself uses one, and zlib."""
    cells = list(TileGrid(dataset.shape, dataset.chunks).touching(region))

    def compressed(cell: Tile) -> bytes:
        whole = np.zeros(dataset.chunks, dataset.dtype)  # edge chunks extend beyond the map
        height, width = cell.region.shape
        whole[:height, :width] = values[cell.region.relative_to(region).slices]
        words = whole.reshape(-1).view("<u4")
        planes = np.empty((4, words.size), np.uint8)
        for number, plane in enumerate(planes):
            np.right_shift(words, 8 * number, out=plane, casting="unsafe")
        return _compressed(planes)

    for cell, data in zip(cells, map_in_threads(compressed, cells), strict=True):
        dataset.id.write_direct_chunk((cell.region.y0, cell.region.x0), data)


def _compressed(planes: AnyArray) -> bytes:
    """Return planes of bytes as one zlib stream (RFC 1950, 1951).

    The low bytes of most maps are noise, which takes as long to compress as all else and gets no
    smaller. Such planes are stored as they are.
    """
    isal = _isal()
    deflate = isal.compressobj(GZIP_LEVEL, isal.DEFLATED, -isal.MAX_WBITS)
    pieces = [b"\x78\x01"]
    for plane in planes:
        sample = plane[:SAMPLE_NBYTES]
        if len(isal.compress(sample.data, GZIP_LEVEL)) < sample.nbytes:
            pieces += [deflate.compress(plane.data), deflate.flush(isal.Z_FULL_FLUSH)]
            continue
        for start in range(0, plane.nbytes, 0xFFFF):
            block = plane[start : start + 0xFFFF]
            pieces += [_STORED.pack(0, block.nbytes, block.nbytes ^ 0xFFFF), block.data]
    pieces += [_STORED.pack(1, 0, 0xFFFF), isal.adler32(planes.data).to_bytes(4, "big")]
    return b"".join(pieces)
