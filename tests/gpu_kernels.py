"""A GPU's kernels for tests that have NumPy arrays: everything is copied there and back."""

import dataclasses

import numpy as np
import pytest

from host_device import HostDevice, host_kernels
from ocelot_em.errors import OcelotError
from ocelot_em.kernels import load
from ocelot_em.kernels.cuda import CudaKernels
from ocelot_em.kernels.device import find_devices, open_device
from ocelot_em.model.maps import Accumulator


def why_no_gpu():
    """In one sentence; empty if there is a GPU."""
    try:
        find_devices()
    except OcelotError as error:
        return str(error)
    return ""


needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(bool(why_no_gpu()), reason=why_no_gpu())]


class OnGpu:
    """The kernels' interface over NumPy arrays, on the GPU."""

    def __init__(self):
        import cupy

        self._cupy, self._device = cupy, open_device()
        self._kernels = CudaKernels(self._device)

    def _there(self, record):
        """Copy a partial or an accumulator to the device."""
        self._device.empty(1, "i8")  # makes this thread's stream the current one

        def copy(value):
            if isinstance(value, tuple):
                return tuple(map(copy, value))
            return self._cupy.asarray(value) if isinstance(value, np.ndarray) else value

        fields = dataclasses.fields(record)
        return type(record)(**{f.name: copy(getattr(record, f.name)) for f in fields})

    def _back(self, acc: Accumulator, there: Accumulator):
        acc.count = there.count
        acc.mip[...], acc.best_partial[...] = there.mip.get(), there.best_partial.get()
        for mine, theirs in zip(acc.pose, there.pose, strict=True):
            mine[...] = theirs.get()
        acc.correlation_sum[...] = there.correlation_sum.get()
        acc.correlation_squared_sum[...] = there.correlation_squared_sum.get()
        if acc.count_map is not None:
            acc.count_map[...] = there.count_map.get()

    def identity(self, shape, maps):
        return load("reference").identity(shape, maps)

    def fold_all(self, acc, partials, space, *, fresh=False):
        there = self._there(acc)
        partials = [self._there(p) for p in partials]
        report = self._kernels.fold_all(there, partials, space, fresh=fresh)
        self._back(acc, there)
        return report

    def finalise(self, acc, maps, space, out=None):
        there = self._there(acc)
        merged = self._kernels.finalise(there, maps, space)
        own = load("reference").finalise(acc, maps, space)
        result = {}
        for name, values in merged.items():
            computed = own[name].dtype == np.float32 and name not in ("mip", *maps.pose)
            if not computed:
                result[name] = own[name]  # the accumulator's, as the interface says
                continue
            result[name] = (out or {}).get(name, np.empty(acc.mip.shape, np.float32))
            result[name][...] = values.get()
        return result

    def mask_nan(self, partial):
        there = self._kernels.mask_nan(self._there(partial))
        self._device.empty(1, "i8")

        def back(value):
            if isinstance(value, tuple):
                return tuple(map(back, value))
            return value.get() if hasattr(value, "get") else value

        fields = dataclasses.fields(there)
        return type(there)(**{f.name: back(getattr(there, f.name)) for f in fields})


def all_kernels():
    """Every kernel, as parameters of a test; those that cannot run here say why."""
    yield from (pytest.param(load(name), id=name) for name in ("cpu", "reference"))
    try:
        host_kernels()
    except pytest.skip.Exception as reason:
        yield pytest.param(None, id="cuda-source", marks=pytest.mark.skip(reason=str(reason)))
    else:
        yield pytest.param(CudaKernels(HostDevice()), id="cuda-source")
    reason = why_no_gpu()
    yield pytest.param(None if reason else OnGpu(), id="cuda", marks=needs_gpu)
