"""Leopard-EM's in-memory functions with the same names and arguments, in a quarter of the memory.

Leopard-EM stacks the maps of all devices; these stream over the devices in bands of rows with the
kernel that merges stores, so that only the results and one small band are held besides the inputs::

    from ocelot_em.process_results import aggregate_distributed_results, scale_mip

Inputs are torch tensors on any device or NumPy arrays, of any shape that all maps share. Results
are torch tensors on the CPU. Inputs are never changed, except ``mip_scaled``, which is there to be
filled. PyTorch is imported by the first call.
"""

import math
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ocelot_em.errors import InvalidInputError, MissingDependencyError
from ocelot_em.kernels import load
from ocelot_em.maps import (
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
from ocelot_em.search_space import SearchSpace

if TYPE_CHECKING:
    import torch

_BAND_PIXELS = 256 * 1024
"""Pixels folded at a time: the accumulator's band stays in the processor's cache."""

_Band = tuple[int | slice, ...]


def aggregate_distributed_results(
    results: "Sequence[Mapping[str, torch.Tensor | AnyArray | int]]",
) -> "dict[str, torch.Tensor | int]":
    """Merge the results of the devices that searched one micrograph.

    The highest ``mip`` wins a pixel with its pose. Equal: explicit poses keep the earlier device,
    indexed poses the lower index. Sums add in float64 and are rounded to float32 once. Where no
    device searched (``mip`` -inf), ``mip`` is -inf, pose NaN, index -1.

    Parameters
    ----------
    results
        One dictionary per device: ``mip``, ``correlation_sum``, ``correlation_squared_sum`` and
        the pose, which is explicit (``best_phi``, ``best_theta``, ``best_psi``, ``best_defocus``,
        optionally ``best_pixel_size``), or indexed (``best_global_index``), or both: then the
        explicit rule decides, and the index is that of the same winner. Maps are float32, sums
        float32 or float64, the index int32. ``total_projections``: optional, an integer. Other
        keys are ignored.

    Returns
    -------
    dict
        The same keys, with tensors on the CPU; ``total_projections`` is an exact integer, and is
        there if the devices have it.

    Raises
    ------
    InvalidInputError
        With every problem found: no devices, missing keys, other shapes or dtypes, NaN (except in
        a pose where ``mip`` is -inf), indices below -1 or missing where something was searched, a
        count that only some devices have.
    MissingDependencyError
        If PyTorch is not installed.
    """
    torch = _torch()
    names = _check_results(torch, results)
    poses = tuple(name for name in names if name in POSES)
    maps = MapSet(PoseForm.EXPLICIT if poses else PoseForm.INDEXED, PIXEL_SIZE in poses)
    both_forms = bool(poses) and INDEX in names
    space = None if poses else _space_of_unknown_tables()
    devices = [{name: _unwrapped(result[name]) for name in names} for result in results]
    shape = tuple(devices[0][MIP].shape)
    merged = {
        name: np.empty(shape, np.int32 if name == INDEX else np.float32)
        for name in (MIP, *poses, INDEX, SUM, SQUARED_SUM)
        if name in names
    }
    kernels, scratch, findings = load("cpu"), _Scratch(shape), _Findings("device {}, {}")
    for band in _bands(shape):
        target = {name: array[band] for name, array in merged.items()}
        acc = scratch.accumulator(target[MIP], tuple(target[name] for name in maps.pose))
        kernels.reset(acc)
        for number, device in enumerate(devices):
            part = {name: _on_cpu(array[band]) for name, array in device.items()}
            pose = tuple(part[name] for name in maps.pose)
            # The counts are one per device and are added apart.
            partial = PartialMaps(part[MIP], pose, part[SUM], part[SQUARED_SUM], 0, number)
            report = kernels.fold(acc, partial, space)
            if report.nan_pixels or report.invalid_indices:
                findings.look_into(number, part, names, band)
            elif both_forms:
                findings.look_into(number, part, (INDEX,), band)
            if both_forms:
                np.copyto(target[INDEX], part[INDEX], where=acc.best_partial == number)
        if both_forms:
            np.copyto(target[INDEX], NOT_SEARCHED, where=acc.best_partial == NOT_SEARCHED)
        with np.errstate(over="ignore"):
            np.copyto(target[SUM], acc.correlation_sum, casting="same_kind")
            np.copyto(target[SQUARED_SUM], acc.correlation_squared_sum, casting="same_kind")
    findings.refuse()
    given_shape = cast("Any", results[0][MIP]).shape  # one axis less where there was none
    tensors = {n: torch.from_numpy(array).reshape(given_shape) for n, array in merged.items()}
    if COUNT in results[0]:
        tensors[COUNT] = sum(operator.index(cast("int", result[COUNT])) for result in results)
    return tensors


def correlation_sum_and_squared_sum_to_mean_and_variance(
    correlation_sum: "torch.Tensor | AnyArray",
    correlation_squared_sum: "torch.Tensor | AnyArray",
    total_correlation_positions: int,
) -> "tuple[torch.Tensor, torch.Tensor]":
    """Turn the sums into mean and **standard deviation**; the name is Leopard-EM's.

    ``mean = S / N``, ``std = sqrt(max(Q / N - mean**2, 0))``, in float64, rounded to float32 once.

    Parameters
    ----------
    correlation_sum, correlation_squared_sum
        Sums over all cross-correlations and over their squares, float32 or float64, of one shape.
    total_correlation_positions
        Number of cross-correlations in the sums.

    Returns
    -------
    tuple
        Mean and standard deviation (not the variance), float32 tensors on the CPU.

    Raises
    ------
    InvalidInputError
        With every problem found: no maps, other shapes or dtypes, NaN, a count that is not a
        positive integer.
    MissingDependencyError
        If PyTorch is not installed.
    """
    torch = _torch()
    inputs = {SUM: correlation_sum, SQUARED_SUM: correlation_squared_sum}
    count = _check_inputs(torch, inputs, total_correlation_positions)
    mean, std = _statistics({name: _unwrapped(value) for name, value in inputs.items()}, count)
    shape = correlation_sum.shape
    return torch.from_numpy(mean).reshape(shape), torch.from_numpy(std).reshape(shape)


def scale_mip(
    mip: "torch.Tensor | AnyArray",
    mip_scaled: "torch.Tensor | AnyArray",
    correlation_sum: "torch.Tensor | AnyArray",
    correlation_squared_sum: "torch.Tensor | AnyArray",
    total_correlation_positions: int,
) -> "tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]":
    """Turn the highest correlations into z-scores, ``(mip - mean) / std``.

    In float64, rounded to float32 once. z is 0 where the standard deviation is 0, and NaN where no
    device searched (``mip`` -inf).

    Parameters
    ----------
    mip
        Highest cross-correlations, float32.
    mip_scaled
        float32, of the same shape; is filled with the z-scores. Nothing is written to it if
        anything is refused.
    correlation_sum, correlation_squared_sum
        Sums over all cross-correlations and over their squares, float32 or float64; unchanged.
    total_correlation_positions
        Number of cross-correlations in the sums.

    Returns
    -------
    tuple
        ``mip``, ``mip_scaled``, mean, standard deviation: float32 tensors on the CPU. The first two
        share memory with the arguments where these are on the CPU and PyTorch can view them.

    Raises
    ------
    InvalidInputError
        With every problem found: no maps, other shapes or dtypes, NaN, a count that is not a
        positive integer, a ``mip_scaled`` that cannot be written or shares memory with an input.
    MissingDependencyError
        If PyTorch is not installed.
    """
    torch = _torch()
    inputs = {MIP: mip, SUM: correlation_sum, SQUARED_SUM: correlation_squared_sum}
    count = _check_inputs(torch, inputs, total_correlation_positions, ("mip_scaled", mip_scaled))
    arrays = {name: _unwrapped(value) for name, value in inputs.items()}
    mean, std = _statistics(arrays, count, _unwrapped(mip_scaled))
    shape = correlation_sum.shape
    return (
        _as_tensor(torch, mip),
        _as_tensor(torch, mip_scaled),
        torch.from_numpy(mean).reshape(shape),
        torch.from_numpy(std).reshape(shape),
    )


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise MissingDependencyError(
            "ocelot_em.process_results returns PyTorch tensors, and PyTorch is not installed: "
            "pip install 'ocelot-em[torch]'"
        ) from error
    return torch


# -- what was handed in ------------------------------------------------------------------------


def _check_results(torch: Any, results: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Refuse what cannot be merged; otherwise the names of the maps to merge."""
    if not isinstance(results, Sequence) or not results:
        raise InvalidInputError(
            "results: expected a list of at least one dictionary, one per device, "
            f"got {'an empty one' if isinstance(results, Sequence) else type(results).__name__}"
        )
    problems = [
        f"device {number}: expected a dictionary of maps, got {type(result).__name__}"
        for number, result in enumerate(results)
        if not isinstance(result, Mapping)
    ]
    if problems:
        raise InvalidInputError(problems)
    given = {key for result in results for key in result}
    names = [MIP, SUM, SQUARED_SUM]
    if given.intersection(POSES):
        names += [name for name in POSES if name != PIXEL_SIZE or name in given]
        if all(INDEX in result for result in results):
            names.append(INDEX)
    elif INDEX in given:
        names.append(INDEX)
    else:
        problems.append(f"no device has a pose: expected {', '.join(POSES[:4])}, or {INDEX}")
    reference = None
    for number, result in enumerate(results):
        for name in names:
            if name not in result:
                problems.append(
                    f"device {number}, {name}: missing; all devices need the same maps, "
                    f"and it has {', '.join(sorted(map(str, result))) or 'none'}"
                )
                continue
            place, value = f"device {number}, {name}", result[name]
            problems += _map_problems(torch, place, value, MAPS[name].dtypes, reference)
            if reference is None and hasattr(value, "shape"):
                reference = place, tuple(value.shape)
        if COUNT in result:
            problems += _count_problems(f"device {number}, {COUNT}", result[COUNT], 0)
        elif COUNT in given:
            problems.append(
                f"device {number}, {COUNT}: missing, but other devices have it; "
                "give it for all of them, or for none"
            )
    if problems:
        raise InvalidInputError(problems)
    return tuple(names)


def _check_inputs(
    torch: Any, inputs: Mapping[str, Any], count: object, out: tuple[str, Any] | None = None
) -> int:
    """Refuse maps that give no statistics, before anything is written; otherwise the count."""
    problems, reference = [], None
    for name, value in inputs.items():
        problems += _map_problems(torch, name, value, MAPS[name].dtypes, reference)
        if reference is None and hasattr(value, "shape"):
            reference = name, tuple(value.shape)
    if out is not None:
        problems += _map_problems(torch, *out, MAPS[SCALED_MIP].dtypes, reference)
    problems += _count_problems("total_correlation_positions", count, 1)
    if problems:
        raise InvalidInputError(problems)
    arrays = {name: _unwrapped(value) for name, value in inputs.items()}
    if out is not None:
        name, written = out[0], _unwrapped(out[1])
        if isinstance(written, np.ndarray) and not written.flags.writeable:
            problems.append(f"{name}: is read-only, and is to be filled; hand in a writable map")
        problems += [
            f"{name}: shares memory with {other}, which would be overwritten; hand in a new map"
            for other, array in arrays.items()
            if out[1] is inputs[other]
            or (
                isinstance(written, np.ndarray)
                and isinstance(array, np.ndarray)
                and np.shares_memory(written, array)
            )
        ]
    findings = _Findings("{1}")
    shape = tuple(next(iter(arrays.values())).shape)
    for band in _bands(shape):
        part = {name: _on_cpu(array[band]) for name, array in arrays.items()}
        findings.look_into(0, part, tuple(part), band)
    findings.refuse(problems)
    return operator.index(cast("int", count))


def _map_problems(
    torch: Any,
    place: str,
    value: object,
    dtypes: tuple[str, ...],
    reference: tuple[str, tuple[int, ...]] | None,
) -> list[str]:
    """Say why a value is not a map of these dtypes and of the shape of the reference."""
    if isinstance(value, torch.Tensor):
        dtype = str(cast("Any", value).dtype).removeprefix("torch.")
    elif isinstance(value, np.ndarray):
        dtype = value.dtype.name if value.dtype.isnative else f"byte-swapped {value.dtype.name}"
    else:
        return [
            f"{place}: expected a torch tensor or a NumPy array, got {type(value).__name__}",
        ]
    problems = []
    if dtype not in dtypes:
        problems.append(f"{place}: expected dtype {' or '.join(dtypes)}, got {dtype}; convert it")
    shape = tuple(cast("Any", value).shape)
    if reference is not None and shape != reference[1]:
        problems.append(f"{place}: expected shape {reference[1]} as {reference[0]}, got {shape}")
    return problems


def _count_problems(place: str, value: Any, least: int) -> list[str]:
    """Say why a value is not a count."""
    expected = "a positive integer" if least else "an integer, 0 or more"
    try:
        if isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool"):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        return [f"{place}: expected {expected}, got {value!r} ({type(value).__name__})"]
    return [] if number >= least else [f"{place}: expected {expected}, got {number}"]


class _Findings:
    """Values that no search produces: how many per map, and where the first is.

    Parameters
    ----------
    place
        How to name a map, with device number and name to be filled in.
    """

    def __init__(self, place: str) -> None:
        self._place = place
        self._found: dict[tuple[int, str], tuple[int, tuple[int, ...]]] = {}

    def look_into(
        self, device: int, part: Mapping[str, AnyArray], names: Iterable[str], band: "_Band"
    ) -> None:
        """Note what is wrong in one band of the named maps of a device."""
        for name in names:
            if name == INDEX:
                bad = _unusable(part[INDEX], part[MIP])
            else:
                bad = np.isnan(part[name])
                if name in POSES:
                    bad &= part[MIP] > -np.inf
            if bad.any():
                first = np.unravel_index(int(bad.argmax()), bad.shape)
                *leading, rows = band
                start = cast("slice", rows).start
                at = (*cast("list[int]", leading), start + int(first[0]), *map(int, first[1:]))
                count, at = self._found.get((device, name), (0, at))
                self._found[device, name] = count + int(np.count_nonzero(bad)), at

    def refuse(self, problems: Iterable[str] = ()) -> None:
        """Raise with these problems and all that was found, if there are any."""
        problems = list(problems)
        for (device, name), (count, at) in sorted(self._found.items()):
            what = (
                "indices below -1, or -1 where something was searched," if name == INDEX else "NaN"
            )
            problems.append(
                f"{self._place.format(device, name)}: {what} in {count} pixels, the first at "
                f"{at}; a search does not write that, so search again or leave it out"
            )
        if problems:
            raise InvalidInputError(problems)


def _unusable(index: AnyArray, mip: AnyArray) -> AnyArray:
    """Mark indices that no search space holds."""
    nothing = (index == NOT_SEARCHED) & (mip > -np.inf)
    return np.asarray((index < NOT_SEARCHED) | (index == np.iinfo(np.int32).max) | nothing)


# -- arrays and bands --------------------------------------------------------------------------


def _unwrapped(value: Any) -> Any:
    """Return a map's own memory as an array of at least one axis; a tensor if not on the CPU."""
    if isinstance(value, np.ndarray):
        return np.atleast_1d(value)
    tensor = value.detach()
    tensor = tensor.reshape(1) if tensor.ndim == 0 else tensor
    return tensor.numpy() if tensor.device.type == "cpu" else tensor


def _on_cpu(part: Any) -> AnyArray:
    """Return one band of a map as the kernels take it; copied only where it has to be."""
    if not isinstance(part, np.ndarray):
        part = part.cpu().numpy()
    return np.require(part, requirements=["C", "A"])


def _as_tensor(torch: Any, value: Any) -> Any:
    """Return a map as a tensor on the CPU, over the same memory if PyTorch can do that."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    shareable = value.flags.writeable and all(stride >= 0 for stride in value.strides)
    return torch.from_numpy(value if shareable else value.copy())


def _bands(shape: tuple[int, ...]) -> "Iterator[_Band]":
    """Cut a map into runs of rows that are contiguous where the map is."""
    inner = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    axis = next(axis for axis, size in enumerate(inner) if size <= _BAND_PIXELS)
    rows = _BAND_PIXELS // max(inner[axis], 1)
    for leading in np.ndindex(shape[:axis]):
        for start in range(0, shape[axis], rows):
            yield (*leading, slice(start, start + rows))


class _Scratch:
    """Memory for one band, used again for every band of a map of this shape."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        size = min(_BAND_PIXELS, math.prod(shape))
        self._numbers = np.empty(size, np.int32)
        self._sums = np.empty((2, size), np.float64)

    def accumulator(self, mip: AnyArray, pose: tuple[AnyArray, ...]) -> Accumulator:
        """Return an accumulator that keeps its picks in the given maps, and its sums here."""
        size, shape = mip.size, mip.shape
        total, squared_total = (row[:size].reshape(shape) for row in self._sums)
        return Accumulator(
            mip, pose, self._numbers[:size].reshape(shape), total, squared_total, None
        )


def _space_of_unknown_tables() -> SearchSpace:
    """Return a space that holds every index: results do not carry their tables.

    The table takes no memory; only its length is read.
    """
    zeros = np.zeros(1, np.float32)
    return SearchSpace(np.broadcast_to(zeros, (np.iinfo(np.int32).max, 3)), zeros, zeros)


def _statistics(
    inputs: Mapping[str, Any], count: int, z_scores: Any | None = None
) -> tuple[AnyArray, AnyArray]:
    """Mean and standard deviation of the sums, and z-scores of ``mip`` into ``z_scores``."""
    shape = tuple(inputs[SUM].shape)
    mean, std = np.empty(shape, np.float32), np.empty(shape, np.float32)
    kernels, scratch, maps = load("cpu"), _Scratch(shape), MapSet(PoseForm.EXPLICIT)
    size = min(_BAND_PIXELS, mean.size)
    unused, z_buffer, no_mip = np.empty(size, np.float32), np.empty(size, np.float32), None
    if MIP not in inputs:
        no_mip = np.zeros(size, np.float32)
    for band in _bands(shape):
        in_band, n = mean[band].shape, mean[band].size
        mip = no_mip[:n].reshape(in_band) if no_mip is not None else _on_cpu(inputs[MIP][band])
        # Poses pass through finalise untouched, so any arrays do for them.
        acc = scratch.accumulator(mip, (mip,) * len(POSES))
        np.copyto(acc.correlation_sum, _on_cpu(inputs[SUM][band]))
        np.copyto(acc.correlation_squared_sum, _on_cpu(inputs[SQUARED_SUM][band]))
        acc.count = count
        given = None if z_scores is None else z_scores[band]
        direct = isinstance(given, np.ndarray) and given.flags.c_contiguous and given.flags.aligned
        z = cast("AnyArray", given) if direct else z_buffer[:n].reshape(in_band)
        rounded = unused[:n].reshape(in_band)
        out = {SCALED_MIP: z, MEAN: mean[band], STD: std[band], SUM: rounded, SQUARED_SUM: rounded}
        kernels.finalise(acc, maps, None, out)
        if given is not None and not direct:
            given[...] = z if isinstance(given, np.ndarray) else _torch().from_numpy(z)
    return mean, std
