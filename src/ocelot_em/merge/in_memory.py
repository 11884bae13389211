"""In-memory merging of results, on the CPU or the GPU that holds them.

Search programs call :func:`merge_arrays`. :mod:`ocelot_em.process_results` provides Leopard-EM's
functions on top of the same checks, bands and fold.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ocelot_em.errors import InvalidInputError
from ocelot_em.kernels import Kernels, load
from ocelot_em.kernels.cuda import CudaKernels
from ocelot_em.kernels.device import borrow_device
from ocelot_em.model.arrays import (
    CUPY,
    NUMPY,
    TORCH_CPU,
    TORCH_CUDA,
    as_cupy,
    as_numpy,
    dtype_name,
    exact_count,
    gpu_number,
    kind_of,
    new_like,
)
from ocelot_em.model.correlations import merge_tables
from ocelot_em.model.maps import (
    COUNT,
    INDEX,
    MAPS,
    MEAN,
    MIP,
    NOT_SEARCHED,
    PIXEL_SIZE,
    POSES,
    SCALED_MIP,
    SQUARED_SUM,
    STD,
    SUM,
    Accumulator,
    AnyArray,
    MapSet,
    PartialMaps,
    PoseForm,
)
from ocelot_em.model.search_space import SearchSpace
from ocelot_em.store.validation import BadValues, is_map_of_counts

BAND_PIXELS = 256 * 1024
"""Pixels folded at a time on the CPU; the accumulator's band stays in the processor's cache."""

_GPU_BAND_PIXELS = 4 * 2**20
"""Pixels folded at a time on a GPU: enough to stream its memory; the band's sums take 80 MiB."""

_TOGETHER = 4
"""Devices folded at a time, and the maximum number of copied bands that are held."""

_INTEGERS = tuple(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))

_Band = tuple[int | slice, ...]


def merge_arrays(
    results: Sequence[Mapping[str, Any]], *, search_space: SearchSpace | None = None
) -> dict[str, Any]:
    """Merge the results of the devices of a node in memory, without writing anything.

    At each pixel the device with the highest ``mip`` wins, and its pose is kept. Ties: the earlier
    device wins with explicit poses, the lower index with indexed poses. Sums are added in float64
    and rounded once. Where no device searched (``mip`` -inf), ``mip`` is -inf, the pose NaN and the
    index -1. Merging in two steps thus selects the same winners as merging all at once.

    Maps on a GPU are read in place (torch tensors through DLPack); only the result and one band of
    pixels are allocated. Results on other GPUs are copied band by band to the first one's GPU. The
    function waits for earlier work on these GPUs; the merged maps are complete when it returns.

    Parameters
    ----------
    results
        One dictionary per device, earlier ones first: ``mip``, ``correlation_sum``,
        ``correlation_squared_sum`` and the pose, which is explicit (``best_phi``, ``best_theta``,
        ``best_psi``, ``best_defocus``, optionally ``best_pixel_size``), or indexed
        (``best_global_index``), or both: then the explicit rule decides, and the index is that of
        the same winner. ``total_projections`` is optional: an integer, or a map of integers if it
        differs from pixel to pixel. ``correlation_table`` is optional, too. Other keys are ignored.

        All maps have the same shape, which is arbitrary, and the same kind: NumPy arrays, CuPy
        arrays, torch tensors on the CPU or torch tensors on a GPU. They are float32, the index
        int32, the sums float32 or float64. They are not changed.
    search_space
        The tables of an indexed search. If given, indices outside the search space are an error,
        and explicit poses are ignored, as in :func:`~ocelot_em.write_partial`.

    Returns
    -------
    dict
        New arrays of the same kind and names, on the device of the first result's ``mip``;
        :func:`~ocelot_em.write_partial` accepts the dictionary unchanged. Both sums are float32, or
        float64 if any device has float64 sums. ``total_projections`` is an exact integer, or an
        int64 map if any device has a map; ``correlation_table`` has all rows, in NumPy arrays; they
        are present if the devices have them.

    Raises
    ------
    InvalidInputError
        Lists every problem: no devices, missing keys, mismatched kinds, shapes or dtypes, a count
        or table that only some devices have; or, with their number and first pixel, NaN and
        infinities (except -inf in ``mip``, and any pose where ``mip`` is -inf), negative squared
        sums, indices that are outside the search space, or -1 where something was searched, and
        counts that are negative, or 0 where something was.
    MissingDependencyError, DeviceError
        Arrays are on a GPU, and CuPy is not installed or cannot use it.

    Examples
    --------
    >>> import numpy as np
    >>> from ocelot_em import merge_arrays
    >>> def result(mip, phi):
    ...     names = "best_theta", "best_psi", "best_defocus", "correlation_sum"
    ...     maps = {name: np.zeros(2, np.float32) for name in names}
    ...     maps["correlation_squared_sum"] = np.full(2, 900, np.float32)
    ...     maps |= {"mip": np.float32(mip), "best_phi": np.full(2, phi, np.float32)}
    ...     return maps | {"total_projections": 1000}
    >>> merged = merge_arrays([result([8, 5], phi=10), result([6, 7], phi=20)])
    >>> merged["mip"], merged["best_phi"], merged["total_projections"]
    (array([8., 7.], dtype=float32), array([10., 20.], dtype=float32), 2000)
    """
    checks = MapChecks((NUMPY, CUPY, TORCH_CPU, TORCH_CUDA), one_kind=True)
    by_pixel = any(is_map_of_counts(result.get(COUNT)) for result in results)
    names = check_results(results, checks, indexed=search_space is not None, by_pixel=by_pixel)
    tables = merge_tables(results)
    first, counts = results[0][MIP], counts_of(results)
    wide = any(dtype_name(r[name]) == "float64" for r in results for name in (SUM, SQUARED_SUM))
    merged = {name: new_like(first, MAPS[name].dtypes[0]) for name in names}
    if wide:
        merged |= {name: new_like(first, "float64") for name in (SUM, SQUARED_SUM)}
    if by_pixel:
        merged[COUNT] = new_like(first, "int64")

    def fold(view: Callable[[Any], AnyArray], processor: Processor) -> None:
        *devices, out = (
            {name: at_least_1d(view(maps[name])) for name in names} for maps in (*results, merged)
        )
        fold_bands(devices, out, processor, counts, search_space)
        if by_pixel:
            _add_counts(results, view(merged[COUNT]), processor, view)

    if kind_of(first) in (CUPY, TORCH_CUDA):
        producers = {gpu_number(maps[name]) for maps in (*results, merged) for name in names}
        with borrow_device(gpu_number(first), producers) as device:
            kernels = CudaKernels(device)
            fold(as_cupy, Processor(kernels, device.empty, device.bring, _GPU_BAND_PIXELS))
    else:
        fold(as_numpy, cpu_processor(BAND_PIXELS))
    return merged | ({} if by_pixel else total_count(counts)) | tables


# -- input checks ------------------------------------------------------------------------------


class MapChecks:
    """Checks that values are maps of one shape, and collects the problems.

    ``kinds`` are the allowed ones: prefixes of :func:`~ocelot_em.model.arrays.kind_of`. With
    ``one_kind``, all maps must be of the same kind.
    """

    def __init__(self, kinds: tuple[str, ...], *, one_kind: bool = False) -> None:
        self.problems: list[str] = []
        self._kinds, self._one_kind = kinds, one_kind
        self._reference: tuple[str, tuple[int, ...], str] | None = None

    def check(self, place: str, value: Any, dtypes: tuple[str, ...]) -> None:
        """Check one value."""
        kind = kind_of(value)
        if not kind.startswith(self._kinds):
            expected = " or a ".join(self._kinds)
            self.problems.append(f"{place}: expected a {expected}, got {kind}")
            return
        dtype, shape = dtype_name(value), tuple(value.shape)
        if dtype not in dtypes:
            expected = " or ".join(dtypes)
            self.problems.append(f"{place}: expected dtype {expected}, got {dtype}; convert it")
        if self._reference is None:
            self._reference = place, shape, kind
        other, expected_shape, expected_kind = self._reference
        if shape != expected_shape:
            self.problems.append(
                f"{place}: expected shape {expected_shape} as {other}, got {shape}"
            )
        if self._one_kind and kind != expected_kind:
            self.problems.append(
                f"{place}: expected a {expected_kind} as {other}, got a {kind}; "
                "hand in arrays of one kind"
            )


def check_results(
    results: Sequence[Mapping[str, Any]],
    checks: MapChecks,
    *,
    indexed: bool = False,
    by_pixel: bool = False,
) -> tuple[str, ...]:
    """Reject results that cannot be merged; return the names of the maps to merge.

    ``indexed``: the index is used even if there are explicit poses. ``by_pixel``: counts may be
    maps.
    """
    if not isinstance(results, Sequence) or not results:
        raise InvalidInputError(
            "results: expected a list of at least one dictionary, one per device, "
            f"got {'an empty one' if isinstance(results, Sequence) else type(results).__name__}"
        )
    problems = checks.problems
    problems += [
        f"device {number}: expected a dictionary of maps, got {type(result).__name__}"
        for number, result in enumerate(results)
        if not isinstance(result, Mapping)
    ]
    if problems:
        raise InvalidInputError(problems)
    given = {key for result in results for key in result}
    poses: tuple[str, ...] = ()
    if indexed or (INDEX in given and not given.intersection(POSES)):
        poses = (INDEX,)
    elif given.intersection(POSES):
        poses = tuple(name for name in POSES if name != PIXEL_SIZE or name in given)
        if all(INDEX in result for result in results):
            poses += (INDEX,)
    else:
        problems.append(f"no device has a pose: expected {', '.join(POSES[:4])}, or {INDEX}")
    names = MIP, *poses, SUM, SQUARED_SUM
    for number, result in enumerate(results):
        for name in names:
            if name in result:
                checks.check(f"device {number}, {name}", result[name], MAPS[name].dtypes)
            else:
                problems.append(
                    f"device {number}, {name}: missing; all devices need the same maps, "
                    f"and it has {', '.join(sorted(map(str, result))) or 'none'}"
                )
        if by_pixel and is_map_of_counts(result.get(COUNT)):
            checks.check(f"device {number}, {COUNT}", result[COUNT], _INTEGERS)
        elif COUNT in result:
            problems += count_problems(f"device {number}, {COUNT}", result[COUNT], 0)
        elif COUNT in given:
            problems.append(
                f"device {number}, {COUNT}: missing, but other devices have it; "
                "give it for all of them, or for none"
            )
    if problems:
        raise InvalidInputError(problems)
    return names


def _add_counts(
    results: Sequence[Mapping[str, Any]],
    total: AnyArray,
    processor: "Processor",
    view: Callable[[Any], AnyArray],
) -> None:
    """Add counts, some of which are maps, into given memory; wrong ones are an error."""
    found = [BadValues(f"device {number}") for number in range(len(results))]
    for band in bands(total.shape, processor.band_pixels):
        total[band] = 0
        for bad, result in zip(found, results, strict=True):
            if not is_map_of_counts(result[COUNT]):
                total[band] += exact_count(result[COUNT])
                continue
            own = {name: processor.bring(view(result[name])[band]) for name in (MIP, COUNT)}
            bad.look(own, start_of(band, total.ndim))
            total[band] += own[COUNT].astype(np.int64)
    refuse_bad_values(found)


def count_problems(place: str, value: object, least: int) -> list[str]:
    """Return why a value is not a count of at least ``least``."""
    try:
        count = exact_count(value)
    except (ValueError, RuntimeError) as error:  # such as a torch tensor without data
        return [f"{place}: {error}"]
    return [] if count >= least else [f"{place}: expected at least {least}, got {count}"]


def counts_of(results: Sequence[Mapping[str, Any]]) -> list[int | None]:
    """Return the count of each result, or None if it has none, or a map."""
    given = (result.get(COUNT) for result in results)
    return [None if own is None or is_map_of_counts(own) else exact_count(own) for own in given]


def total_count(counts: Iterable[int | None]) -> dict[str, int]:
    """Return the sum of all counts under its name; empty if the results have none."""
    known = [count for count in counts if count is not None]
    return {COUNT: sum(known)} if known else {}


def refuse_bad_values(found: Iterable[BadValues], problems: Iterable[str] = ()) -> None:
    """Raise an error that lists bad values, after other ``problems``, if there are any."""
    bad = [
        f"{problem}; a search does not write that, so search again or leave it out"
        for own in found
        for problem in own.problems()
    ]
    if listed := [*problems, *bad]:
        raise InvalidInputError(listed)


def start_of(band: "_Band", n_axes: int) -> tuple[int, ...]:
    """Return the position of a band's first pixel in a map with this number of axes."""
    starts = [part.start if isinstance(part, slice) else part for part in band]
    return (*starts, *[0] * (n_axes - len(band)))


def _space_of_unknown_tables() -> SearchSpace:
    """Return a space that contains every index, for results without tables; it has no memory."""
    zeros = np.zeros(1, np.float32)
    return SearchSpace(np.broadcast_to(zeros, (np.iinfo(np.int32).max, 3)), zeros, zeros)


# -- bands and the fold ------------------------------------------------------------------------


@dataclass(frozen=True)
class Processor:
    """The CPU or GPU that folds bands of at most ``band_pixels``.

    ``empty`` allocates values of a dtype in its memory; ``bring`` converts one band of a map to an
    array for the kernels, and copies it only if necessary.
    """

    kernels: Kernels
    empty: Callable[[int, str], AnyArray]
    bring: Callable[[Any], AnyArray]
    band_pixels: int


def cpu_processor(band_pixels: int) -> Processor:
    """Return the CPU."""
    return Processor(load("cpu"), np.empty, on_host, band_pixels)


def on_host(part: Any) -> AnyArray:
    """Return one band of a map as an array for the CPU kernels."""
    return np.require(as_numpy(part), requirements=["C", "A"])


def at_least_1d(values: Any) -> Any:
    """Give an array of any kind an axis if it has none."""
    return values if values.ndim else values.reshape(1)


def fold_bands(
    devices: Sequence[Mapping[str, Any]],
    merged: Mapping[str, AnyArray],
    processor: Processor,
    counts: Sequence[int | None],
    space: SearchSpace | None = None,
) -> None:
    """Merge maps of devices, in the stated order and with at least one axis, into given memory.

    The merged maps are C-contiguous, on the device of the kernels. If explicit poses are among
    them, the explicit rule decides, and the index is that of the winner. ``space`` is that of the
    indices, if known. Values that no search produces are an InvalidInputError that names all; the
    merged maps are then unusable.
    """
    poses = tuple(name for name in merged if name in POSES)
    maps = MapSet(PoseForm.EXPLICIT if poses else PoseForm.INDEXED, PIXEL_SIZE in poses)
    carried = (INDEX,) if poses and INDEX in merged else ()
    folded_space = None if poses else space or _space_of_unknown_tables()
    shape = merged[MIP].shape
    scratch = Scratch(shape, processor.band_pixels, processor.empty)
    found = [BadValues(f"device {number}", space, count) for number, count in enumerate(counts)]
    for band in bands(shape, processor.band_pixels):
        target = {name: array[band] for name, array in merged.items()}
        acc = scratch.accumulator(target[MIP], tuple(target[name] for name in maps.pose))
        for start in range(0, len(devices), _TOGETHER):
            parts = {
                start + i: {name: processor.bring(array[band]) for name, array in device.items()}
                for i, device in enumerate(devices[start : start + _TOGETHER])
            }
            # total_count adds the counts, one per device.
            partials = []
            for number, part in parts.items():
                pose = tuple(part[name] for name in maps.pose)
                own = PartialMaps(part[MIP], pose, part[SUM], part[SQUARED_SUM], 0, number)
                partials.append(own)
            bad = processor.kernels.fold_all(acc, partials, folded_space, fresh=start == 0)
            for number, part in parts.items():
                # Kernels take negative squared sums.
                is_bad = bad or bool((part[SQUARED_SUM] < 0).any())
                if is_bad or carried or counts[number] == 0:
                    names = tuple(merged) if is_bad else (MIP, *carried)
                    looked_at = {name: part[name] for name in names}
                    found[number].look(looked_at, start_of(band, len(shape)))
                for name in carried:
                    np.copyto(target[name], part[name], where=acc.best_partial == number)
        for name in carried:
            np.copyto(target[name], NOT_SEARCHED, where=acc.best_partial == NOT_SEARCHED)
        with np.errstate(over="ignore"):
            np.copyto(target[SUM], acc.correlation_sum, casting="same_kind")
            np.copyto(target[SQUARED_SUM], acc.correlation_squared_sum, casting="same_kind")
    refuse_bad_values(found)


def bands(shape: tuple[int, ...], band_pixels: int) -> Iterator[_Band]:
    """Cut a map into bands of rows, contiguous if the map is; yields none for an empty map."""
    if not math.prod(shape):
        return
    inner = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    axis = next(axis for axis, size in enumerate(inner) if size <= band_pixels)
    rows = band_pixels // inner[axis]
    for leading in np.ndindex(shape[:axis]):
        for start in range(0, shape[axis], rows):
            yield (*leading, slice(start, start + rows))


class Scratch:
    """Memory for one band, reused for every band of a map of this shape."""

    def __init__(
        self,
        shape: tuple[int, ...],
        band_pixels: int,
        empty: Callable[[int, str], AnyArray] = np.empty,
    ) -> None:
        size = min(band_pixels, math.prod(shape))
        self._numbers = empty(size, "int32")
        self._sums = empty(size, "float64"), empty(size, "float64")

    def accumulator(self, mip: AnyArray, pose: tuple[AnyArray, ...]) -> Accumulator:
        """Return an accumulator that writes to the given maps and keeps its sums here."""
        size, shape = mip.size, mip.shape
        total, squared_total = (row[:size].reshape(shape) for row in self._sums)
        return Accumulator(
            mip, pose, self._numbers[:size].reshape(shape), total, squared_total, None
        )


class Statistics:
    """Computes mean, standard deviation and z-score of bands, in memory that is reused."""

    def __init__(self, shape: tuple[int, ...], band_pixels: int) -> None:
        self._kernels, self._maps = load("cpu"), MapSet(PoseForm.EXPLICIT)
        self._scratch = Scratch(shape, band_pixels)
        self._unused = np.empty(min(band_pixels, math.prod(shape)), np.float32)

    def compute(
        self, sums: Mapping[str, AnyArray], count: int, out: Mapping[str, AnyArray]
    ) -> None:
        """Write ``correlation_mean``, ``correlation_std`` and ``scaled_mip`` of one band.

        The last one is meaningless without ``mip`` beside the sums.
        """
        shape = out[MEAN].shape
        unused = self._unused[: out[MEAN].size].reshape(shape)
        # finalise does not use poses; any arrays serve as placeholders.
        acc = self._scratch.accumulator(sums.get(MIP, unused), (unused,) * len(POSES))
        np.copyto(acc.correlation_sum, sums[SUM])
        np.copyto(acc.correlation_squared_sum, sums[SQUARED_SUM])
        acc.count = count
        wanted = {name: out[name] for name in (SCALED_MIP, MEAN, STD)}
        self._kernels.finalise(acc, self._maps, None, wanted | {SUM: unused, SQUARED_SUM: unused})
