"""Leopard-EM's in-memory functions with the same names and arguments, in a quarter of the memory.

Leopard-EM stacks the maps of all devices. These functions process bands of rows with the kernel
that merges stores, and hold only the results and one small band in addition to the inputs::

    from ocelot_em.process_results import aggregate_distributed_results, scale_mip

Inputs are torch tensors on any device or NumPy arrays, all of one arbitrary shape. Results are
torch tensors on the CPU. Inputs are never changed, except ``mip_scaled``, which is an output
argument. PyTorch is imported by the first call.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ocelot_em.errors import InvalidInputError, optional_import
from ocelot_em.kernels import load
from ocelot_em.merge import in_memory
from ocelot_em.merge.in_memory import MapChecks, at_least_1d, on_host
from ocelot_em.model.arrays import NUMPY, TORCH, as_numpy, exact_count
from ocelot_em.model.maps import (
    INDEX,
    MAPS,
    MEAN,
    MIP,
    POSES,
    SCALED_MIP,
    SQUARED_SUM,
    STD,
    SUM,
    AnyArray,
    MapSet,
    PoseForm,
)
from ocelot_em.store.validation import BadValues

if TYPE_CHECKING:
    import torch

_BAND_PIXELS = in_memory.BAND_PIXELS

_KINDS = TORCH, NUMPY
"""Allowed kinds of maps."""


def aggregate_distributed_results(
    results: "Sequence[Mapping[str, torch.Tensor | AnyArray | int]]",
) -> "dict[str, torch.Tensor | int]":
    """Merge the results of the devices that searched one micrograph.

    At each pixel the device with the highest ``mip`` wins, and its pose is kept. Ties: the earlier
    device wins with explicit poses, the lower index with indexed poses. Sums are added in float64
    and rounded to float32 once. Where no device searched (``mip`` -inf), ``mip`` is -inf, the pose
    NaN and the index -1.

    Parameters
    ----------
    results
        One dictionary per device: ``mip``, ``correlation_sum``, ``correlation_squared_sum`` and
        the pose, which is explicit (``best_phi``, ``best_theta``, ``best_psi``, ``best_defocus``,
        optionally ``best_pixel_size``), or indexed (``best_global_index``), or both: then the
        explicit rule decides, and the index is that of the same winner. Maps are float32, sums
        float32 or float64, the index int32. ``total_projections`` is an optional integer. Other
        keys are ignored.

    Returns
    -------
    dict
        The same keys, with tensors on the CPU; ``total_projections`` is an exact integer, present
        if the devices have it.

    Raises
    ------
    InvalidInputError
        Lists every problem: no devices, missing keys, mismatched shapes or dtypes, NaN and
        infinities (except -inf in ``mip``, and any pose where ``mip`` is -inf), indices below -1,
        or -1 where something was searched, a count that only some devices have, or that is 0 where
        something was searched.
    MissingDependencyError
        PyTorch is not installed.
    """
    torch = _torch()
    names = in_memory.check_results(results, MapChecks(_KINDS))
    devices = [{name: _unwrapped(result[name]) for name in names} for result in results]
    shape = devices[0][MIP].shape
    merged = {
        name: np.empty(tuple(shape), np.int32 if name == INDEX else np.float32) for name in names
    }
    counts = in_memory.counts_of(results)
    in_memory.fold_bands(devices, merged, in_memory.cpu_processor(_BAND_PIXELS), counts)
    given_shape = cast("Any", results[0][MIP]).shape  # one axis less where there was none
    tensors = {n: torch.from_numpy(array).reshape(given_shape) for n, array in merged.items()}
    return tensors | in_memory.total_count(counts)


def correlation_sum_and_squared_sum_to_mean_and_variance(
    correlation_sum: "torch.Tensor | AnyArray",
    correlation_squared_sum: "torch.Tensor | AnyArray",
    total_correlation_positions: int,
) -> "tuple[torch.Tensor, torch.Tensor]":
    """Compute mean and **standard deviation** from the sums; the name is Leopard-EM's.

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
        Lists every problem: no maps, mismatched shapes or dtypes, NaN, a count that is not a
        positive integer.
    MissingDependencyError
        PyTorch is not installed.
    """
    torch = _torch()
    inputs = {SUM: correlation_sum, SQUARED_SUM: correlation_squared_sum}
    count = _check_inputs(inputs, total_correlation_positions)
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
    """Compute z-scores of the highest correlations, ``(mip - mean) / std``.

    They are computed in float64 and rounded to float32 once. z is 0 where the standard deviation is
    0, and NaN where no device searched (``mip`` -inf).

    Parameters
    ----------
    mip
        Highest cross-correlations, float32.
    mip_scaled
        Output, float32, of the same shape; filled with the z-scores. Not written if an error is
        raised.
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
        Lists every problem: no maps, mismatched shapes or dtypes, NaN, a count that is not a
        positive integer, a ``mip_scaled`` that is read-only or shares memory with an input.
    MissingDependencyError
        PyTorch is not installed.
    """
    torch = _torch()
    inputs = {MIP: mip, SUM: correlation_sum, SQUARED_SUM: correlation_squared_sum}
    count = _check_inputs(inputs, total_correlation_positions, ("mip_scaled", mip_scaled))
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
    with optional_import("process_results returns PyTorch tensors, which need PyTorch", "torch"):
        import torch
    return torch


def _check_inputs(
    inputs: Mapping[str, Any], count: object, out: tuple[str, Any] | None = None
) -> int:
    """Check the inputs before anything is written; return the count."""
    checks = MapChecks(_KINDS)
    for name, value in inputs.items():
        checks.check(name, value, MAPS[name].dtypes)
    if out is not None:
        checks.check(*out, MAPS[SCALED_MIP].dtypes)
    problems = checks.problems
    problems += in_memory.count_problems("total_correlation_positions", count, 1)
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
    found = BadValues("")
    shape = tuple(next(iter(arrays.values())).shape)
    for band in in_memory.bands(shape, _BAND_PIXELS):
        part = {name: on_host(array[band]) for name, array in arrays.items()}
        found.look(part, in_memory.start_of(band, len(shape)))
    in_memory.refuse_bad_values([found], problems)
    return exact_count(count)


def _unwrapped(value: Any) -> Any:
    """Return a map, without a copy, with at least one axis; a tensor if it is not on the CPU."""
    on_cpu = isinstance(value, np.ndarray) or value.device.type == "cpu"
    return at_least_1d(as_numpy(value) if on_cpu else value.detach())


def _as_tensor(torch: Any, value: Any) -> Any:
    """Return a map as a tensor on the CPU, sharing its memory if PyTorch can."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    shareable = value.flags.writeable and all(stride >= 0 for stride in value.strides)
    return torch.from_numpy(value if shareable else value.copy())


def _statistics(
    inputs: Mapping[str, Any], count: int, z_scores: Any | None = None
) -> tuple[AnyArray, AnyArray]:
    """Compute mean and standard deviation; write the z-scores of ``mip`` to ``z_scores``."""
    shape = tuple(inputs[SUM].shape)
    mean, std = np.empty(shape, np.float32), np.empty(shape, np.float32)
    kernels, maps = load("cpu"), MapSet(PoseForm.EXPLICIT)
    scratch = in_memory.Scratch(shape, _BAND_PIXELS)
    size = min(_BAND_PIXELS, mean.size)
    unused, z_buffer, no_mip = np.empty(size, np.float32), np.empty(size, np.float32), None
    if MIP not in inputs:
        no_mip = np.zeros(size, np.float32)
    for band in in_memory.bands(shape, _BAND_PIXELS):
        in_band, n = mean[band].shape, mean[band].size
        mip = no_mip[:n].reshape(in_band) if no_mip is not None else on_host(inputs[MIP][band])
        # finalise does not use poses; any arrays serve as placeholders.
        acc = scratch.accumulator(mip, (mip,) * len(POSES))
        np.copyto(acc.correlation_sum, on_host(inputs[SUM][band]))
        np.copyto(acc.correlation_squared_sum, on_host(inputs[SQUARED_SUM][band]))
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
