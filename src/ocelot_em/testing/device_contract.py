"""Tests that kernels, and devices that run them, must pass; importing this module needs pytest."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from typing import Any, TypeVar

import numpy as np
import pytest

from ocelot_em.errors import DeviceMemoryError
from ocelot_em.kernels import Kernels, load
from ocelot_em.kernels.cuda import CudaKernels
from ocelot_em.kernels.device import Device
from ocelot_em.model.maps import Accumulator, AnyArray, MapSet, PartialMaps, PoseForm
from ocelot_em.model.search_space import SearchSpace

SHAPE = (33, 125)
SPACE = SearchSpace.from_tables(
    np.arange(21).reshape(7, 3) * 17.0, [-100.0, 0.0, 100.0], [0.0, 0.01]
)

Record = TypeVar("Record", PartialMaps, Accumulator)

MAP_SETS = [
    MapSet(PoseForm.EXPLICIT, pixel_size=False),
    *(MapSet(form, counts=counts) for form in PoseForm for counts in (False, True)),
    MapSet(PoseForm.INDEXED, decoded=False),
]
"""Every combination of maps that kernels distinguish."""

every_map_set = pytest.mark.parametrize("maps", MAP_SETS, ids=str)


def draw_partials(maps: MapSet, *, nan: bool) -> list[PartialMaps]:
    """Draw partials with ties, unsearched pixels and, if asked for, NaN and infinities."""
    rng = np.random.default_rng(7)
    partials = []
    for number, sum_dtype in enumerate(("f4", "f8", "f4")):
        mip = rng.integers(0, 4, SHAPE).astype("f4")
        idle = rng.random(SHAPE) < 0.1
        mip[idle] = -np.inf
        count = 2**31 + number
        if maps.form is PoseForm.INDEXED:
            index = rng.integers(0, SPACE.n_poses, SHAPE, np.int32)
            pose: tuple[AnyArray, ...] = (np.where(idle, np.int32(-1), index),)
        else:
            pose = tuple(rng.uniform(-180, 360, SHAPE).astype("f4") for _ in maps.pose)
        sums = [rng.normal(scale * count, 1e4, SHAPE).astype(sum_dtype) for scale in (0.1, 2)]
        if nan:
            for values in (mip, *pose, *sums):
                if values.dtype.kind == "f":
                    bad = rng.random(SHAPE) < 0.01
                    values[bad] = rng.choice([np.nan, np.inf], bad.sum())
        counts = rng.integers(1, count, SHAPE) if maps.counts and number else count
        partials.append(PartialMaps(mip, pose, sums[0], sums[1], counts, number))
    return partials


def assert_same_bits(actual: AnyArray, expected: AnyArray, name: str = "") -> None:
    """Fail unless two arrays are equal bit by bit; all NaN count as one."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), name
    both_nan = (actual != actual) & (expected != expected)
    bits = f"u{actual.dtype.itemsize}"
    other = np.argwhere((actual.view(bits) != expected.view(bits)) & ~both_nan)
    assert not len(other), f"{name}: {len(other)} pixels differ, first {other[0]}"


def assert_same(actual: Record, expected: Record) -> None:
    """Fail unless all maps of two accumulators or partials are equal bit by bit."""
    for field in fields(expected):
        one, other = getattr(actual, field.name), getattr(expected, field.name)
        if isinstance(other, int | None):
            assert one == other, field.name
        else:
            pairs = zip(one, other, strict=True) if isinstance(other, tuple) else [(one, other)]
            for left, right in pairs:
                assert_same_bits(left, right, field.name)


class KernelsContract:
    """Contract of :class:`~ocelot_em.kernels.Kernels`, for pytest: the bits of the reference.

    Subclass it in a test module, with a fixture that returns the kernels. For arrays that are not
    in host memory, override :meth:`sent` and :meth:`fetched`, too::

        from ocelot_em.testing.device_contract import KernelsContract

        class TestMyKernels(KernelsContract):
            @pytest.fixture
            def kernels(self):
                return my_kernels
    """

    @pytest.fixture
    def kernels(self) -> Kernels:
        """Return the kernels."""
        raise NotImplementedError("return kernels from the fixture 'kernels'")

    def sent(self, values: AnyArray) -> AnyArray:
        """Return a copy of a C-contiguous array where the kernels read it."""
        return values.copy()

    def fetched(self, values: AnyArray) -> AnyArray:
        """Return a copy in host memory of an array of the kernels."""
        return values

    def _each(self, copy: Any, record: Record) -> Record:
        """Apply a copy to all arrays of a record."""

        def copied(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(copied, value))
            return value if isinstance(value, int | None) else copy(value)

        return replace(record, **{f.name: copied(getattr(record, f.name)) for f in fields(record)})

    def _assert_same(self, actual: Record, expected: Record) -> None:
        assert_same(self._each(self.fetched, actual), expected)

    @pytest.mark.parametrize("nan", [False, True], ids=["finite", "nan"])
    @every_map_set
    def test_a_merge_is_that_of_the_reference(
        self, kernels: Kernels, maps: MapSet, nan: bool
    ) -> None:
        space = SPACE if maps.form is PoseForm.INDEXED else None
        partials, reference = draw_partials(maps, nan=nan), load("reference")
        expected = reference.identity(SHAPE, maps)
        expected_report = reference.fold_all(expected, partials, space)
        there = [self._each(self.sent, partial) for partial in partials]
        at_once, one_by_one = kernels.identity(SHAPE, maps), kernels.identity(SHAPE, maps)
        assert kernels.fold_all(at_once, there, space, fresh=True) == expected_report
        for partial in there:
            kernels.fold_all(one_by_one, [partial], space)
        self._assert_same(at_once, expected)
        self._assert_same(one_by_one, expected)
        merged = kernels.finalise(at_once, maps, space)
        for name, values in reference.finalise(expected, maps, space).items():
            assert_same_bits(self.fetched(merged[name]), values, name)
        assert not kernels.fold_all(at_once, [], space, fresh=True)
        self._assert_same(at_once, reference.identity(SHAPE, maps))

    @every_map_set
    def test_nan_is_masked_as_by_the_reference(self, kernels: Kernels, maps: MapSet) -> None:
        for partial in draw_partials(maps, nan=True):
            there = self._each(self.sent, partial)  # must exist until the kernel has ended
            self._assert_same(kernels.mask_nan(there), load("reference").mask_nan(partial))


class DeviceContract(KernelsContract):
    """Contract of :class:`~ocelot_em.kernels.device.Device`, for pytest.

    A device that passes can merge. What the package relies on:

    - Copies and kernels of one thread are executed in the order of the calls, and are complete at
      the mark that follows them; threads do not disturb each other.
    - Arrays have the interface of NumPy for ``reshape``, ``fill``, slices of leading elements,
      ``dtype``, ``shape``, ``size`` and ``flags``; they begin at multiples of 16 bytes.
    - Memory that is not available is a :class:`~ocelot_em.errors.DeviceMemoryError`.
    - The kernels of ``kernels/merge.cu`` give the bits of the reference: products and sums are
      rounded separately, and subnormal values are kept.

    Subclass it in a test module, with a fixture that returns the device::

        from ocelot_em.testing.device_contract import DeviceContract

        class TestMyDevice(DeviceContract):
            @pytest.fixture
            def device(self):
                return MyDevice()
    """

    @pytest.fixture
    def device(self) -> Device:
        """Return the device."""
        raise NotImplementedError("return a device from the fixture 'device'")

    @pytest.fixture
    def kernels(self, device: Device) -> Kernels:
        """Return the kernels of the device."""
        self._device = device
        return CudaKernels(device)

    def sent(self, values: AnyArray) -> AnyArray:
        """Return a copy on the device."""
        there = self._device.empty(values.size, values.dtype)
        self._device.copy_in(np.ascontiguousarray(values).reshape(-1), there).synchronize()
        return there.reshape(values.shape)

    def fetched(self, values: AnyArray) -> AnyArray:
        """Return a copy in host memory."""
        host = np.empty(values.shape, values.dtype)
        self._device.copy_out(values.reshape(-1), host.reshape(-1)).synchronize()
        return host

    @pytest.mark.parametrize("dtype", ["u1", "i4", "f4", "i8", "f8"])
    def test_arrays(self, device: Device, dtype: str) -> None:
        values = device.empty(1000, dtype)
        assert (values.shape, values.size, values.dtype) == ((1000,), 1000, np.dtype(dtype))
        assert values.reshape(10, 100).shape == (10, 100)
        assert values[:300].flags.c_contiguous
        assert device.address(values) == device.address(values[:300])
        assert device.address(values) % 16 == 0

    def test_pinned_memory_is_memory_of_the_host(self, device: Device) -> None:
        pinned, there = device.pinned(4000), device.empty(1000, "f4")
        assert pinned.dtype == np.uint8
        assert pinned.shape == (4000,)
        values = pinned.view(np.float32)
        values[:] = np.arange(1000)
        device.copy_in(values, there).synchronize()
        values[:] = 0
        device.copy_out(there, values).synchronize()
        np.testing.assert_array_equal(values, np.arange(1000))

    def test_calls_run_in_order(self, device: Device) -> None:
        sent: Sequence[AnyArray] = [np.full(5000, number, "i4") for number in range(6)]
        back = [np.empty(5000, "i4") for _ in sent]
        there = device.empty(5000, "i4")
        for before, after in zip(sent, back, strict=True):
            device.copy_in(before, there)
            last = device.copy_out(there, after)
        last.synchronize()
        np.testing.assert_array_equal(back, sent)

    def test_threads_do_not_disturb_each_other(self, device: Device) -> None:
        together = threading.Barrier(4)

        def there_and_back(number: int) -> bool:
            values, back = np.full(5000, number, "i4"), np.empty(5000, "i4")
            there = device.empty(5000, "i4")
            together.wait()
            device.copy_in(values, there)
            device.copy_out(there, back).synchronize()
            return bool((back == number).all())

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(there_and_back, range(4)))

    def test_memory_that_is_not_there(self, device: Device) -> None:
        with pytest.raises(DeviceMemoryError):
            device.empty(2**45, "f8")
