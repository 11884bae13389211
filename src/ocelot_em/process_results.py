"""Leopard-EM's in-memory functions with the same names and arguments, in a quarter of the memory.

Leopard-EM stacks the maps of all devices. These functions process bands of rows with the kernel
that merges stores, and hold only the results and one small band in addition to the inputs::

    from ocelot_em.process_results import aggregate_distributed_results, scale_mip

Inputs are torch tensors on any device or NumPy arrays, all of one arbitrary shape. Results are
torch tensors on the CPU. Inputs are never changed, except ``mip_scaled``, which is an output
argument. PyTorch is imported by the first call.

The functions that merge runs are those of Leopard-EM's pull request 137. They also read and write
maps that are larger than memory.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ocelot_em.errors import InvalidInputError, optional_import
from ocelot_em.merge import in_memory
from ocelot_em.merge.in_memory import MapChecks, at_least_1d, on_host
from ocelot_em.merge.runs import TAG, WINNER, merge_runs, open_runs
from ocelot_em.model.arrays import NUMPY, TORCH, as_numpy, exact_count
from ocelot_em.model.correlations import TABLE, THRESHOLD, merge_tables
from ocelot_em.model.maps import (
    INDEX,
    MAPS,
    MEAN,
    MIP,
    SCALED_MIP,
    SQUARED_SUM,
    STD,
    SUM,
    AnyArray,
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
        or -1 where something was searched, a count or table that only some devices have, or a count
        of 0 where something was searched.
    MissingDependencyError
        PyTorch is not installed.
    """
    torch = _torch()
    names = in_memory.check_results(results, MapChecks(_KINDS))
    others: dict[str, Any] = merge_tables(results)
    for key, value in others.get(TABLE, {}).items():
        others[TABLE][key] = value if key == THRESHOLD else torch.from_numpy(value)
    devices = [{name: _unwrapped(result[name]) for name in names} for result in results]
    shape = devices[0][MIP].shape
    merged = {
        name: np.empty(tuple(shape), np.int32 if name == INDEX else np.float32) for name in names
    }
    counts = in_memory.counts_of(results)
    in_memory.fold_bands(devices, merged, in_memory.cpu_processor(_BAND_PIXELS), counts)
    given_shape = cast("Any", results[0][MIP]).shape  # one axis less where there was none
    tensors = {n: torch.from_numpy(array).reshape(given_shape) for n, array in merged.items()}
    return tensors | in_memory.total_count(counts) | others | _passed_on(results)


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


def merge_runs_pooled_zscore(
    runs: Sequence[Mapping[str, Any]],
    *,
    pooled_total_correlation_positions: int,
    run_tag_values: "torch.Tensor | Sequence[float] | None" = None,
    out: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Merge runs of one micrograph, such as one per defocus, with one noise model for all.

    At each pixel the run with the highest ``mip`` wins, the earlier one of equal ones. Sums are
    added in float64, and give one mean and standard deviation.

    Parameters
    ----------
    runs
        One mapping per run: ``mip``, ``best_global_index``, ``correlation_sum`` and
        ``correlation_squared_sum``, as tensors, arrays, or anything else with a shape, a dtype and
        slices, such as memory-mapped files, Zarr arrays, or the lazy dataset of
        :func:`~ocelot_em.open_merged`. They are read in regions of 1024 x 1024 pixels.
    pooled_total_correlation_positions
        Number of cross-correlations in the sums of all runs.
    run_tag_values
        One number per run; that of the winner becomes the map ``best_run_tag``.
    out
        Arrays to fill, by the names of the results: anything that accepts slices. Other results are
        new tensors on the CPU. Nothing in them counts if an error is raised.

    Returns
    -------
    dict
        ``mip``, ``scaled_mip``, ``correlation_mean``, ``correlation_variance`` (the standard
        deviation; the name is Leopard-EM's), ``best_global_index``, and ``best_run_tag`` if asked
        for. Where no run searched, the z-score and the tag are NaN, and the index is -1.

    Raises
    ------
    InvalidInputError
        Lists every problem: no runs, missing maps, unequal shapes, bad values, wrong counts.
    MissingDependencyError
        PyTorch is not installed.
    """
    counts = {"pooled_total_correlation_positions": pooled_total_correlation_positions}
    tags = None if run_tag_values is None else as_numpy(run_tag_values).astype(np.float32).ravel()
    if tags is not None and tags.size != len(runs):
        raise InvalidInputError(f"run_tag_values: expected {len(runs)} numbers, got {tags.size}")
    return _merge_runs(runs, counts, out, pooled=True, tags=tags)


def merge_runs_independent_zscore(
    runs: Sequence[Mapping[str, Any]],
    *,
    total_correlation_positions_per_run: int | Sequence[int],
    out: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Merge runs of one micrograph, such as one per template, each with a noise model of its own.

    At each pixel the run with the highest z-score wins, the earlier one of equal ones, and all maps
    are its own. Indices are those of the winner's search space.

    Parameters
    ----------
    runs, out
        As of :func:`merge_runs_pooled_zscore`.
    total_correlation_positions_per_run
        Number of cross-correlations in the sums of each run, or one number for all.

    Returns
    -------
    dict
        ``mip``, ``scaled_mip``, ``correlation_mean``, ``correlation_variance`` (the standard
        deviation), ``best_global_index``, ``winner_run_index``, and
        ``total_correlation_positions``, the sum over the runs, with which cutoffs are computed.
        Where no run searched, the z-score is NaN and both indices are -1.

    Raises
    ------
    InvalidInputError, MissingDependencyError
        As :func:`merge_runs_pooled_zscore`.
    """
    given, name = total_correlation_positions_per_run, "total_correlation_positions_per_run"
    listed = list(given) if isinstance(given, Sequence) else [given] * len(runs)
    if len(listed) != len(runs):
        raise InvalidInputError(f"{name}: expected {len(runs)} numbers, got {len(listed)}")
    counts = {f"{name}, run {number}": count for number, count in enumerate(listed)}
    results = _merge_runs(runs, counts, out, pooled=False)
    return results | {"total_correlation_positions": sum(map(exact_count, listed))}


def _passed_on(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what results have beside maps, counts and tables, by key."""
    keys = dict.fromkeys(key for result in results for key in result)
    passed = {key: [r.get(key) for r in results] for key in keys if key not in (*MAPS, TABLE)}
    return {
        key: values[0] if all(_equal(value, values[0]) for value in values) else values
        for key, values in passed.items()
    }


def _equal(one: Any, other: Any) -> bool:
    try:
        return one is other or np.array_equal(as_numpy(one), as_numpy(other))
    except (TypeError, ValueError, RuntimeError):  # such as arrays within a dictionary
        return False


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
    statistics = in_memory.Statistics(shape, _BAND_PIXELS)
    z_buffer = np.empty(min(_BAND_PIXELS, mean.size), np.float32)
    for band in in_memory.bands(shape, _BAND_PIXELS):
        given = None if z_scores is None else z_scores[band]
        direct = isinstance(given, np.ndarray) and given.flags.c_contiguous and given.flags.aligned
        z = (
            cast("AnyArray", given)
            if direct
            else z_buffer[: mean[band].size].reshape(mean[band].shape)
        )
        part = {name: on_host(values[band]) for name, values in inputs.items()}
        statistics.compute(part, count, {SCALED_MIP: z, MEAN: mean[band], STD: std[band]})
        if given is not None and not direct:
            given[...] = z if isinstance(given, np.ndarray) else _torch().from_numpy(z)
    return mean, std


def _merge_runs(
    runs: Sequence[Mapping[str, Any]],
    counts: Mapping[str, int],
    out: Mapping[str, Any] | None,
    *,
    pooled: bool,
    tags: AnyArray | None = None,
) -> dict[str, Any]:
    torch = _torch()
    opened, given = open_runs(runs), out or {}
    shape = opened[0][MIP].shape
    names = {MIP: MIP, SCALED_MIP: SCALED_MIP, MEAN: MEAN, "correlation_variance": STD}
    names |= {name: name for name in (INDEX, *(() if pooled else (WINNER,)))}
    names |= {} if tags is None else {TAG: TAG}
    problems = [
        problem
        for name, count in counts.items()
        for problem in in_memory.count_problems(name, count, 1)
    ]
    problems += [
        f"out, {name}: expected a result of shape {shape}, got shape {tuple(target.shape)}"
        for name, target in given.items()
        if name not in names or tuple(target.shape) != shape
    ]
    if problems:
        raise InvalidInputError(problems)
    new = {
        name: np.empty(shape, np.int32 if name in (INDEX, WINNER) else np.float32)
        for name in names
        if name not in given
    }
    targets = {ours: new.get(name, given.get(name)) for name, ours in names.items()}
    merge_runs(opened, [*map(exact_count, counts.values())], targets, pooled=pooled, tags=tags)
    return {**given, **{name: torch.from_numpy(values) for name, values in new.items()}}
