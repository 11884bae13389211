"""Merging results where they lie: NumPy, torch, and stand-ins for a GPU and for CuPy's arrays."""

import contextlib
import functools
import sys
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracle
from builders import SPACE, explicit_maps, idle_maps, indexed_maps, same_bits
from host_device import HostDevice, LateDevice, host_kernels
from ocelot_em import SearchInfo, merge_arrays, open_partials
from ocelot_em import write_partial as write
from ocelot_em.errors import InvalidInputError, MissingDependencyError
from ocelot_em.kernels import device
from ocelot_em.kernels.cuda import CudaKernels
from ocelot_em.merge import in_memory
from ocelot_em.merge.in_memory import Processor, fold_bands
from ocelot_em.model import arrays
from ocelot_em.model.maps import COUNT, INDEX, MIP, POSES, SQUARED_SUM, SUM, MapSet, PoseForm
from ocelot_em.process_results import aggregate_distributed_results
from stacks import TABLES, assert_same_bits, stacks

SUMS = SUM, SQUARED_SUM
MAP_SETS = [MapSet(PoseForm.EXPLICIT), MapSet(PoseForm.EXPLICIT, False), MapSet(PoseForm.INDEXED)]


def results_of(n=6, shape=(23, 17), form="both"):
    """Devices with many ties, one of them idle; their sums are whole numbers."""
    makers = {"explicit": [explicit_maps], "indexed": [indexed_maps]}
    chosen = makers.get(form, [explicit_maps, indexed_maps])
    results = []
    for seed in range(n):
        maps = {name: array for make in chosen for name, array in make(shape, seed).items()}
        maps |= {name: np.round(maps[name]) for name in (MIP, *SUMS)}
        results.append((idle_maps(maps) if seed == 1 else maps) | {COUNT: 2**53 + seed})
    return results


def in_torch(results):
    def convert(value):
        return torch.from_numpy(value) if isinstance(value, np.ndarray) else value

    return [{name: convert(value) for name, value in result.items()} for result in results]


def host(merged):
    return {n: np.asarray(arrays.as_numpy(value)) for n, value in merged.items() if n != COUNT}


def assert_merged(merged, expected):
    assert merged.get(COUNT) == expected.get(COUNT)
    merged, expected = host(merged), host(expected)
    assert list(merged) == list(expected)
    for name, values in expected.items():
        assert_same_bits(merged[name], values, name)


def on_device(results, *, make_device=HostDevice, band_pixels=32, search_space=None):
    """As merge_arrays, with the kernels of a GPU on a stand-in."""
    stand_in = make_device()
    wide = any(result[name].dtype == np.float64 for result in results for name in SUMS)
    names = in_memory.check_results(
        results, in_memory.MapChecks((arrays.NUMPY,)), indexed=search_space is not None
    )
    merged = {
        name: np.full(results[0][MIP].shape, 77, "f8" if wide and name in SUMS else values.dtype)
        for name, values in ((name, results[0][name]) for name in names)
    }
    processor = Processor(
        CudaKernels(stand_in), stand_in.empty, np.ascontiguousarray, band_pixels=band_pixels
    )
    devices = [{name: result[name] for name in names} for result in results]
    counts = in_memory.counts_of(results)
    fold_bands(devices, merged, processor, counts, search_space)
    return merged | in_memory.total_count(counts)


late = functools.partial(on_device, make_device=LateDevice)
forms = pytest.mark.parametrize("form", ["explicit", "indexed", "both"])
mergers = pytest.mark.parametrize("merge", [merge_arrays, on_device, late])


# What is merged


@forms
@pytest.mark.parametrize("convert", [list, in_torch], ids=["numpy", "torch"])
def test_as_aggregate_distributed_results_in_the_same_kind(form, convert):
    results = convert(results_of(form=form))
    merged = merge_arrays(results)
    assert_merged(merged, aggregate_distributed_results(results))
    assert type(merged[COUNT]) is int
    assert merged[COUNT] == 6 * 2**53 + 15
    assert all(type(merged[name]) is type(results[0][name]) for name in host(merged))


@forms
@pytest.mark.parametrize("merge", [on_device, late])
@pytest.mark.parametrize("band_pixels", [5, 40, 10**6])
def test_a_device_gives_the_same_bits(form, merge, band_pixels):
    results = results_of(form=form)
    assert_merged(merge(results, band_pixels=band_pixels), merge_arrays(results))


@given(stacks(sets=st.sampled_from(MAP_SETS)))
def test_against_the_oracle(stack):
    maps, partials = stack
    largest = np.float32(3.3e38)  # infinities and negative squared sums are refused
    partials = [
        replace(
            p,
            mip=np.where(p.mip == np.inf, largest, p.mip),
            correlation_sum=np.clip(p.correlation_sum, -largest, largest),
            correlation_squared_sum=np.clip(p.correlation_squared_sum, 0, largest),
        )
        for p in partials
    ]
    indexed = maps.form is PoseForm.INDEXED
    results = [
        {MIP: p.mip, SUM: p.correlation_sum, SQUARED_SUM: p.correlation_squared_sum}
        | dict(zip(maps.pose, p.pose, strict=True))
        for p in partials
    ]
    expected = oracle.merge(partials, TABLES if indexed else None)
    for merge in (merge_arrays, on_device):
        merged = merge(results)
        for name in maps.partial:
            with np.errstate(over="ignore"):
                assert_same_bits(merged[name].astype(expected[name].dtype), expected[name], name)


@mergers
@pytest.mark.parametrize("form", ["explicit", "indexed"])
def test_two_steps_give_the_same(merge, form):
    results = results_of(form=form)
    steps = merge([merge(results[:2]), merge(results[2:5]), merge(results[5:])])
    assert_merged(steps, merge(results))


@mergers
def test_with_a_search_space_the_index_decides(merge):
    results = results_of()
    merged = merge(results, search_space=SPACE)
    indexed = [{n: v for n, v in result.items() if n not in POSES} for result in results]
    assert_merged(merged, merge(indexed))
    assert not same_bits(merged[INDEX], merge(results)[INDEX])  # ties


@mergers
@pytest.mark.parametrize("name", SUMS)
def test_float64_sums_stay(merge, name):
    results = results_of(3)
    results[1][name] = results[1][name].astype(np.float64) + 1 / 3
    merged = merge(results)
    for total in SUMS:
        expected = sum(result[total].astype(np.float64) for result in results)
        assert_same_bits(merged[total], expected, total)
    assert merged[MIP].dtype == np.float32


@mergers
def test_sums_are_rounded_once(merge):
    results = results_of(3, (2, 2))
    for result, value in zip(results, (2.0**24, 1.0, 1.0), strict=True):
        result[SUM][...] = value
    assert (merge(results)[SUM] == 2**24 + 2).all()


@pytest.mark.parametrize("shape", [(), (7,), (3, 5, 4), (0, 4), (4, 0)], ids=str)
@pytest.mark.parametrize("convert", [list, in_torch], ids=["numpy", "torch"])
def test_any_shape(shape, convert):
    n_pixels = int(np.prod(shape))
    results = [
        {n: v.ravel()[:n_pixels].reshape(shape) for n, v in result.items() if n != COUNT}
        for result in results_of(3, (60, 1))
    ]
    merged = merge_arrays(convert(results))
    assert {tuple(array.shape) for array in merged.values()} == {shape}
    assert_merged(merged, aggregate_distributed_results(results))


@mergers
def test_inputs_are_unchanged_and_not_in_the_result(merge):
    results = results_of(1)
    before = {name: np.copy(value) for name, value in results[0].items()}
    merged = merge(results)
    for name, values in before.items():
        assert same_bits(results[0][name], values)
        assert name == COUNT or not np.shares_memory(merged[name], results[0][name])


@pytest.mark.parametrize("convert", [list, in_torch], ids=["numpy", "torch"])
@pytest.mark.parametrize("form", ["explicit", "indexed"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_merged_result_can_be_written(tmp_path, form, convert, dtype):
    results = results_of(form=form)
    for result in results:
        result |= {COUNT: 5} | {name: result[name].astype(dtype) for name in SUMS}
    space = SPACE if form == "indexed" else None
    merged = merge_arrays(convert(results), search_space=space)
    info = SearchInfo(search_space=space)
    write(tmp_path / "R", "node0", merged, total_projections=merged[COUNT], search=info)
    stored = open_partials(tmp_path / "R").sel(partial="node0")
    for name, values in host(merged).items():
        assert same_bits(stored[name], values), name


# What is refused


def problems_of(merge, *arguments, **options):
    with pytest.raises(InvalidInputError) as caught:
        merge(*arguments, **options)
    return caught.value.problems


def test_no_devices():
    assert "at least one" in problems_of(merge_arrays, [])[0]


def test_mixed_kinds():
    results = results_of(3, form="explicit")
    results[1] = in_torch(results)[1]
    results[2][SUM] = results[2][SUM].tolist()
    problems = problems_of(merge_arrays, results)
    assert problems[0] == (
        "device 1, mip: expected a NumPy array as device 0, mip, got a torch tensor on cpu; "
        "hand in arrays of one kind"
    )
    assert problems[-1].startswith("device 2, correlation_sum: expected a NumPy array or a CuPy")
    assert problems[-1].endswith("got list")
    assert len(problems) == 9
    meta = {n: torch.empty(2, 2, device="meta") for n in results[0]}
    assert "got torch tensor on meta" in problems_of(merge_arrays, [meta])[0]


def test_all_problems_at_once():
    results = results_of(3)
    results[0][SUM] = results[0][SUM].astype(np.float16)
    results[1][MIP] = results[1][MIP][1:]
    del results[2][INDEX], results[2][COUNT]
    text = "\n".join(problems_of(merge_arrays, results, search_space=SPACE))
    assert "device 0, correlation_sum: expected dtype float32 or float64, got float16" in text
    assert "device 1, mip: expected shape (23, 17) as device 0, mip, got (22, 17)" in text
    assert "device 2, best_global_index: missing" in text
    assert "device 2, total_projections: missing, but other devices have it" in text


@mergers
@pytest.mark.parametrize("name", [MIP, "best_psi", SUM, SQUARED_SUM])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinities_are_named(merge, name, bad):
    results = results_of()
    results[4][name][3, 5] = results[4][name][22, 1] = bad
    if (name, bad) == (MIP, -np.inf):  # nothing was searched
        merge(results)
        return
    (problem,) = problems_of(merge, results)
    kind = "NaN" if np.isnan(bad) else "NaN or infinite"
    assert problem.startswith(f"device 4: {name}: {kind} at 2 pixels, first (3, 5); ")


@mergers
@forms
def test_negative_squared_sums_are_named(merge, form):
    results = results_of(form=form)
    results[3][SQUARED_SUM][2, 1] = -1
    (problem,) = problems_of(merge, results)
    assert problem.startswith("device 3: correlation_squared_sum: negative at 1 pixel, first (2, 1")


@mergers
@forms
def test_a_count_of_nothing_where_something_was_searched_is_named(merge, form):
    results = results_of(form=form)
    results[2][COUNT] = 0
    (problem,) = problems_of(merge, results)
    assert problem.startswith("device 2: total_projections: 0, but mip was searched, first at")
    results[2][MIP][...] = -np.inf
    if INDEX in results[2]:
        results[2][INDEX][...] = -1
    assert merge(results)[COUNT] == sum(result[COUNT] for result in results)


@pytest.mark.parametrize("convert", [list, in_torch], ids=["numpy", "torch"])
def test_maps_of_counts_are_added(convert):
    results, by_pixel = results_of(form="indexed"), np.arange(1, 23 * 17 + 1).reshape(23, 17)
    plain = merge_arrays(results)
    results[2][COUNT], results[4][COUNT] = by_pixel.astype("i2"), by_pixel * 2**40
    merged = merge_arrays(convert(results))
    assert_merged({**merged, COUNT: 0}, {**plain, COUNT: 0})
    expected = by_pixel * (1 + 2**40) + 4 * 2**53 + 9
    np.testing.assert_array_equal(merged[COUNT], expected)
    assert type(merged[COUNT]) is type(merged[MIP])
    results[2][COUNT][3, 4] = 0
    (problem,) = problems_of(merge_arrays, convert(results))
    wrong = f"device 2: {COUNT}: 0 where {MIP} was searched at 1 pixel, first (3, 4)"
    assert problem.startswith(wrong)
    results[2][COUNT] = by_pixel.astype("f4")
    (problem,) = problems_of(merge_arrays, convert(results))
    assert f"device 2, {COUNT}: expected dtype int8 or" in problem


@mergers
@forms
def test_unusable_indices_are_named(merge, form):
    results = results_of(form=form)
    results[5][INDEX] = results[5].get(INDEX, np.zeros((23, 17), np.int32))
    results[5][INDEX][2, 2:6] = -2, -1, 2**31 - 1, SPACE.n_poses
    if form != "explicit":
        assert [problem.split(";")[0] for problem in problems_of(merge, results)] == [
            f"device 5: {INDEX}: expected -1 or more, got -2 to {2**31 - 1} at 2 pixels, "
            "first (2, 2)",
            f"device 5: {INDEX}: -1 where mip was searched at 1 pixel, first (2, 3)",
        ]
    for result in results:
        result[INDEX] = result.get(INDEX, np.zeros((23, 17), np.int32))
    outside, missing = problems_of(merge, results, search_space=SPACE)
    assert f"expected -1 to 41, got -2 to {2**31 - 1} at 3 pixels, first (2, 2)" in outside
    assert "-1 where mip was searched at 1 pixel, first (2, 3)" in missing


def test_without_cupy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(MissingDependencyError, match="CuPy is not installed"):
        device.borrow_device(0, [0]).__enter__()


# CuPy's arrays, played by arrays that never become NumPy's by themselves


class Gpu(contextlib.nullcontext):
    def __init__(self, number=0):
        super().__init__()
        self.id = number


class CupyArray(np.lib.mixins.NDArrayOperatorsMixin):
    """What CuPy's array has of all that is used; everything else fails."""

    fetched = 0
    __cuda_array_interface__ = None

    def __init__(self, values, number=0):
        self.values, self.device = values, Gpu(number)

    def _wrap(self, values):
        return CupyArray(np.asarray(values), self.device.id)

    def __array__(self, *_, **__):
        raise TypeError("Implicit conversion to a NumPy array is not allowed")

    def __array_ufunc__(self, ufunc, method, *inputs, out=()):
        assert method == "__call__"
        assert all(isinstance(value, (CupyArray, int, float)) for value in inputs)
        results = ufunc(*map(bare, inputs), **({"out": tuple(map(bare, out))} if out else {}))
        return out[0] if out else self._wrap(results)

    def __array_function__(self, function, _types, args, kwargs):
        assert function in (np.copyto, np.count_nonzero)
        result = function(*map(bare, args), **{name: bare(v) for name, v in kwargs.items()})
        return None if result is None else self._wrap(result)

    def __getattr__(self, name):
        if name in ("shape", "dtype", "size", "ndim", "flags", "itemsize", "nbytes", "fill"):
            return getattr(self.values, name)
        raise AttributeError(name)

    def __getitem__(self, where):
        return self._wrap(self.values[bare(where)])

    def reshape(self, *shape):
        return self._wrap(self.values.reshape(*shape))

    def any(self):
        return self._wrap(self.values.any())

    def argmax(self):
        return self._wrap(self.values.argmax())

    def min(self):
        return self._wrap(self.values.min())

    def max(self):
        return self._wrap(self.values.max())

    def __bool__(self):
        return bool(self.values)

    def __int__(self):
        return int(self.values)

    def get(self):
        CupyArray.fetched = max(CupyArray.fetched, self.values.size)
        return self.values.copy()


def bare(value):
    return value.values if isinstance(value, CupyArray) else value


class CupyDevice(LateDevice):
    """A stand-in whose memory is made of such arrays, as ``CudaDevice`` for what is used of it."""

    def __init__(self):
        super().__init__()
        self.brought = []

    def empty(self, n, dtype):
        return CupyArray(super().empty(n, dtype))

    def launch(self, kernel, n_threads, arguments):
        super().launch(kernel, n_threads, tuple(map(bare, arguments)))

    def copy_out(self, values, host):
        return super().copy_out(bare(values), host)

    def address(self, values):
        return super().address(bare(values))

    def bring(self, values):
        self.brought.append(values.size)
        return CupyArray(np.ascontiguousarray(values.values))


def in_cupy(results):
    """Every device's maps on a GPU of its own."""
    return [
        {name: CupyArray(np.asarray(value), number) for name, value in result.items()}
        for number, result in enumerate(results)
    ]


@pytest.fixture
def cupy(monkeypatch):
    """A GPU that is only played; what was asked of it."""
    host_kernels()
    stand_in = CupyDevice()
    seen = types.SimpleNamespace(device=stand_in, borrowed=[])

    @contextlib.contextmanager
    def borrow(number, producers):
        seen.borrowed.append((number, set(producers)))
        yield stand_in

    module = types.ModuleType("cupy")
    module.empty = lambda shape, dtype: CupyArray(np.full(shape, 77, dtype))
    monkeypatch.setitem(sys.modules, "cupy", module)
    monkeypatch.setattr(in_memory, "borrow_device", borrow)
    monkeypatch.setattr(in_memory, "_GPU_BAND_PIXELS", 64)
    monkeypatch.setattr(CupyArray, "fetched", 0)
    return seen


@forms
def test_cupy_arrays_stay_on_their_gpu(cupy, form):
    results = results_of(form=form)
    merged = merge_arrays(in_cupy(results))
    assert all(isinstance(merged[name], CupyArray) for name in merged if name != COUNT)
    assert CupyArray.fetched <= 1  # the counts
    assert type(merged[COUNT]) is int
    assert cupy.borrowed == [(0, set(range(6)))]
    assert max(cupy.device.brought) <= 64
    assert cupy.device.peak_nbytes < 64 * 20 + 200
    assert_merged(merged, merge_arrays(results))


def test_bad_values_on_a_gpu_are_named_without_fetching_maps(cupy):
    results = results_of(form="both")
    results[3][MIP][20, 3] = np.nan
    results[4][INDEX][7, 7] = -9
    problems = problems_of(merge_arrays, in_cupy(results))
    assert [problem.split(";")[0] for problem in problems] == [
        "device 3: mip: NaN at 1 pixel, first (20, 3)",
        "device 4: best_global_index: expected -1 or more, got -9 to -9 at 1 pixel, first (7, 7)",
    ]
    assert CupyArray.fetched <= 1


@pytest.mark.usefixtures("cupy")
def test_a_result_on_a_gpu_can_be_written(tmp_path, small_chunks):
    results = results_of(3, (3 * small_chunks + 1, 5), form="explicit")
    merged = merge_arrays(in_cupy(results))
    write(tmp_path / "R", "node0", merged, total_projections=merged[COUNT])
    assert CupyArray.fetched == small_chunks * 5
    stored = open_partials(tmp_path / "R").sel(partial="node0")
    for name, values in host(merge_arrays(results)).items():
        assert same_bits(stored[name], values), name


def test_tensors_on_a_gpu_are_read_through_dlpack(cupy, monkeypatch):
    class Tensor:
        device, dtype, shape = torch.device("cuda:1"), torch.float32, (2, 3)

        def detach(self):
            return "detached"

    current = []
    sys.modules["cupy"].from_dlpack = lambda values: (values, current[-1])
    monkeypatch.setattr(
        torch.cuda, "device", lambda d: contextlib.nullcontext(current.append(d.index))
    )
    assert arrays.kind_of(Tensor()) == arrays.TORCH_CUDA
    assert arrays.gpu_number(Tensor()) == 1
    assert arrays.as_cupy(Tensor()) == ("detached", 1)


@pytest.fixture
def log(monkeypatch):
    """What is done with CuPy, one after another: it is played by a fake."""
    log, stack, streams = [], [0], {}

    class Device(contextlib.AbstractContextManager):
        def __init__(self, number=None):
            self.id = stack[-1] if number is None else number

        def synchronize(self):
            log.append(f"wait for all of {self.id}")

        def __enter__(self):
            stack.append(self.id)

        def __exit__(self, *_):
            stack.pop()

    class Stream:
        def __init__(self, name="ours", non_blocking=True):
            self.name = f"{name} on {stack[-1]}"

        def use(self):
            streams[stack[-1]] = self

        def synchronize(self):
            log.append(f"wait for {self.name}")

    def get_current_stream():
        return streams.setdefault(stack[-1], Stream("caller's"))

    def act(what, values):
        log.append(f"{what} {values} on {get_current_stream().name}")
        return values

    class Values:
        def __init__(self, number):
            self.device = Device(number)

        def __str__(self):
            return f"values of {self.device.id}"

        def copy(self):
            return act("copy", self)

    module = types.ModuleType("cupy")
    module.cuda = types.SimpleNamespace(
        Device=Device,
        Stream=Stream,
        get_current_stream=get_current_stream,
        Module=lambda: types.SimpleNamespace(load=lambda _: None),
        compiler=types.SimpleNamespace(compile_using_nvrtc=lambda *_: (b"", {})),
    )
    module.ascontiguousarray = lambda values: act("see", values)
    monkeypatch.setitem(sys.modules, "cupy", module)
    monkeypatch.setattr(device, "find_devices", list)
    device._open_at.cache_clear()
    yield types.SimpleNamespace(
        lines=log, Values=Values, get_current_stream=get_current_stream, Device=Device
    )
    device._open_at.cache_clear()


def test_a_borrowed_gpu_waits_for_its_producers_and_is_done_in_the_end(log):
    with device.borrow_device(1, [1, 2]) as borrowed:
        borrowed.bring(log.Values(1))
        borrowed.bring(log.Values(2))
    assert log.lines == [
        "wait for all of 1",
        "wait for all of 2",
        "see values of 1 on ours on 1",
        "see values of 2 on caller's on 2",
        "wait for caller's on 2",
        "copy values of 2 on ours on 1",
        "wait for ours on 1",
        "wait for ours on 1",
    ]
    assert log.get_current_stream().name == "caller's on 0"
    with log.Device(1):
        assert log.get_current_stream().name == "caller's on 1"


def test_a_borrowed_gpu_is_given_back_after_an_error(log):
    def refuse():
        with device.borrow_device(0, [0]) as borrowed:
            borrowed.bring(log.Values(0))
            raise InvalidInputError("bad values")

    assert problems_of(refuse) == ("bad values",)
    assert log.lines[-1] == "wait for ours on 0"
    assert log.get_current_stream().name == "caller's on 0"
