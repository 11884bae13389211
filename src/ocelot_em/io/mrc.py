"""Export of merged results to Leopard-EM's eight MRC files, and reading of such files.

Maps are written and read in bands through memory maps, so files may be larger than memory.
"""

import math
import os
import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from ocelot_em.errors import InvalidInputError, optional_import
from ocelot_em.io.leopard_maps import OUR_NAMES, band_grid
from ocelot_em.io.map_files import CISTEM, PIXEL, FoundSearch, MapFiles, positive_or_none
from ocelot_em.merge.result import MergedResult
from ocelot_em.model.maps import AnyArray
from ocelot_em.store.whole_file import (
    finish_set,
    refuse_existing,
    storage_errors,
    whole_set_or_nothing,
)

_FLOAT32 = 2
"""MRC mode of float32 values."""

LABEL_LENGTH = 80
"""Maximum length of a label of the header."""


def write_mrc_set(
    source: str | PathLike[str] | MergedResult,
    output: str | PathLike[str],
    *,
    prefix: str = "",
    overwrite: bool = False,
) -> Path:
    """Write a merged result as the MRC files that Leopard-EM writes and refines from.

    Only valid pixels are written, as Leopard-EM does by default; a pixel remains the upper left
    corner of the template box. ``correlation_variance`` holds the standard deviation, as in
    Leopard-EM. Unsearched pixels are NaN, and -inf in ``mip``. These files cannot hold pixel-size
    offsets.

    Return the folder ``output`` with eight files: ``prefix`` followed by Leopard-EM's names of the
    maps, ``mip.mrc``, ``scaled_mip.mrc``, ``correlation_average.mrc`` and so on. Without
    ``overwrite`` existing ones are an error, which names all of them. If writing fails, or there is
    not enough space, nothing is left behind. Existing files are replaced as a set: files of two
    results are never mixed.
    """
    mrcfile = _mrcfile()
    merged, folder = MergedResult.open(source), Path(output)
    paths = _paths(folder, prefix)
    finish_set(folder)
    refuse_existing(paths.values(), overwrite)
    with whole_set_or_nothing(folder, [path.name for path in paths.values()]) as staged:
        for path, (name, final) in zip(staged, paths.items(), strict=True):
            with storage_errors(final):
                _write_map(mrcfile, path, merged, OUR_NAMES[name])
    return folder


def open_mrc_set(found: FoundSearch, stack: ExitStack) -> MapFiles:
    """Memory-map a finished search's maps until a stack is left; note the header's pixel size."""
    mrcfile = _mrcfile()
    finish_set(next(iter(found.files)).parent)
    opened: dict[str, Any] = {}
    problems: list[str] = []
    for name, path in found.paths.items():
        try:
            opened[name] = stack.enter_context(_opened(mrcfile, path))
        except InvalidInputError as error:
            problems += error.problems
    if problems:
        raise InvalidInputError(problems)
    if "mip" in opened:
        found.facts.add(PIXEL, _pixel_size(opened["mip"]), found.paths["mip"].name)
    arrays = {name: _picture(file.data) for name, file in opened.items()}
    return MapFiles(found.place, arrays, marks_unsearched=found.program == CISTEM)


@contextmanager
def open_mrc(path: str | PathLike[str]) -> Iterator[AnyArray]:
    """Memory-map the values of a file, an image if it has one section, until left.

    Raises
    ------
    InvalidInputError
        The file cannot be read as an MRC file.
    MissingDependencyError
        mrcfile is not installed.
    """
    with _opened(_mrcfile(), Path(path)) as file:
        yield _picture(file.data)


def _mrcfile() -> Any:
    with optional_import("MRC files need mrcfile", extra="maps"):
        import mrcfile
    return mrcfile


def _paths(folder: Path, prefix: str) -> dict[str, Path]:
    if prefix and Path(prefix).name != prefix:
        raise InvalidInputError(
            f"prefix {prefix!r}: expected the beginning of file names, got a path; give the folder "
            "by itself"
        )
    return {name: folder / f"{prefix}{name}.mrc" for name in OUR_NAMES}


def _write_map(mrcfile: Any, path: Path, merged: MergedResult, name: str) -> None:
    bands = list[tuple[float, ...]]()
    with mrcfile.new_mmap(path, merged.valid_shape, mrc_mode=_FLOAT32) as file:
        # Without enough space, writing to mapped memory would kill the process.
        with path.open("r+b") as reserved:
            os.posix_fallocate(reserved.fileno(), 0, path.stat().st_size)
        for band in band_grid(merged.valid_shape, merged.chunk):
            values = merged.read(band.region, name)
            file.data[band.region.slices] = values
            finite = values[np.isfinite(values)].astype(np.float64)
            if finite.size:
                low, high, total = finite.min(), finite.max(), finite.sum()
                squared_total = np.square(finite, out=finite).sum()
                bands.append((finite.size, low, high, total, squared_total))
        if merged.attributes.pixel_size_angstrom is not None:
            file.voxel_size = merged.attributes.pixel_size_angstrom
        if merged.incomplete_text:
            file.add_label(merged.incomplete_text[:LABEL_LENGTH])
        for field, value in _statistics(bands).items():
            file.header[field] = value


def _statistics(bands: Sequence[tuple[float, ...]]) -> dict[str, float]:
    """Return a header's statistics of finite values, given their number, range and sums by band.

    Without values, they are the format's markers for unknown ones.
    """
    if not bands:
        return {"dmin": 0, "dmax": -1, "dmean": -2, "rms": -1}
    n, low, high, total, squared_total = np.array(bands).T
    mean = total.sum() / n.sum()
    variance = max(squared_total.sum() / n.sum() - mean * mean, 0)
    return {"dmin": low.min(), "dmax": high.max(), "dmean": mean, "rms": math.sqrt(variance)}


@contextmanager
def _opened(mrcfile: Any, path: Path) -> Iterator[Any]:
    """Memory-map a file; its header and size must agree."""
    try:
        _check_extended_header(mrcfile, path)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # mrcfile only warns about files that are too long
            file = mrcfile.mmap(path, mode="r")
    except Exception as error:  # exceptions of mrcfile and NumPy are undocumented
        raise InvalidInputError(f"{path}: cannot be read as an MRC file: {error}") from error
    with file:
        yield file


def _check_extended_header(mrcfile: Any, path: Path) -> None:
    """Refuse one that is longer than the file: mrcfile allocates memory before reading it."""
    with path.open("rb") as file:
        header = file.read(1024)
    if len(header) < 1024:
        raise ValueError(f"expected a header of 1024 bytes, got {len(header)}")
    order = mrcfile.utils.byte_order_from_machine_stamp(header[212:216])
    (nbytes,) = struct.unpack_from(f"{order}i", header, 92)
    if not 0 <= nbytes <= path.stat().st_size - 1024:
        raise ValueError(f"expected room for an extended header, got none for {nbytes:,} bytes")


def _picture(data: AnyArray) -> AnyArray:
    """Return the image of a one-section volume, which some programs write."""
    return data[0] if data.ndim == 3 and len(data) == 1 else data


def _pixel_size(file: Any) -> float | None:
    """Return a header's pixel size without float32's spurious digits, or None."""
    n = int(file.header.mx)
    return positive_or_none(f"{float(file.header.cella.x) / n:.6g}") if n else None
