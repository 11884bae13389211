"""The drop-in functions against the stacking way, written out plainly here."""

import builtins
import math
import sys
import tracemalloc

import numpy as np
import pytest

import ocelot_em.process_results as module
from conftest import DATA
from ocelot_em.errors import InvalidInputError, MissingDependencyError
from ocelot_em.merge import runs as runs_module
from ocelot_em.process_results import (
    aggregate_distributed_results,
    correlation_sum_and_squared_sum_to_mean_and_variance,
    merge_runs_independent_zscore,
    merge_runs_pooled_zscore,
    scale_mip,
)

torch = pytest.importorskip("torch")

POSES = ("best_phi", "best_theta", "best_psi", "best_defocus")
SUMS = ("correlation_sum", "correlation_squared_sum")


def make_device(rng, shape, *, explicit=True, indexed=False, pixel_size=False, count=None):
    device = {"mip": rng.integers(0, 6, shape).astype(np.float32)}  # many ties
    if explicit:
        for name in (*POSES, *(("best_pixel_size",) if pixel_size else ())):
            device[name] = rng.uniform(0, 360, shape).astype(np.float32)
    if indexed:
        device["best_global_index"] = rng.integers(0, 2**31 - 2, shape, dtype=np.int32)
    device["correlation_sum"] = rng.normal(3, 1, shape).astype(np.float32)
    device["correlation_squared_sum"] = rng.normal(900, 1, shape).astype(np.float32)
    if count is not None:
        device["total_projections"] = count
    return device


def make_devices(n=4, shape=(37, 29), seed=0, **kinds):
    rng = np.random.default_rng(seed)
    return [make_device(rng, shape, **kinds) for _ in range(n)]


def stack_and_pick(devices):
    """Everything in one array, as Leopard-EM does it."""
    stacks = {
        name: np.stack([np.asarray(device[name]) for device in devices])
        for name in devices[0]
        if name != "total_projections"
    }
    if "best_phi" in stacks:
        winner = stacks["mip"].argmax(axis=0)
    else:
        tied = stacks["mip"] == stacks["mip"].max(axis=0)
        index = stacks["best_global_index"].astype(np.int64)
        winner = np.where(tied, index, 2**40).argmin(axis=0)
    out = {}
    for name, stack in stacks.items():
        if name in SUMS:
            out[name] = stack.astype(np.float64).sum(axis=0).astype(np.float32)
        else:
            out[name] = np.take_along_axis(stack, winner[None], axis=0)[0]
    return out


def as_torch(devices):
    return [
        {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in device.items()}
        for device in devices
    ]


def as_strided(devices):
    """Every map a tensor that is every other column of a wider one."""
    return [
        {
            k: torch.from_numpy(np.repeat(v, 2, axis=-1))[..., ::2]
            if isinstance(v, np.ndarray)
            else v
            for k, v in device.items()
        }
        for device in devices
    ]


def as_read_only(devices):
    devices = [
        {k: v.copy() if isinstance(v, np.ndarray) else v for k, v in device.items()}
        for device in devices
    ]
    for device in devices:
        for value in device.values():
            if isinstance(value, np.ndarray):
                value.flags.writeable = False
    return devices


kinds = pytest.mark.parametrize(
    "kind",
    [
        {},
        {"pixel_size": True},
        {"explicit": False, "indexed": True},
        {"indexed": True, "pixel_size": True},
    ],
    ids=["explicit", "pixel size", "indexed", "both"],
)


@kinds
@pytest.mark.parametrize("given", [list, as_torch, as_strided, as_read_only])
def test_aggregate_is_the_stacking_way(kind, given):
    devices = make_devices(**kind)
    merged = aggregate_distributed_results(given(devices))
    expected = stack_and_pick(devices)
    assert set(merged) == set(expected)
    for name, array in expected.items():
        assert merged[name].device.type == "cpu"
        assert merged[name].numpy().dtype == array.dtype
        np.testing.assert_array_equal(merged[name].numpy(), array, err_msg=name)


@kinds
@pytest.mark.parametrize(
    "shape", [(), (7,), (3, 5, 11), (2, 13, 3), (1, 1), (0, 4), (4, 0)], ids=str
)
def test_any_shape_and_band(kind, shape, monkeypatch):
    devices = make_devices(n=3, shape=(*shape, 1), **kind)
    devices = [{k: np.asarray(v[..., 0]) for k, v in device.items()} for device in devices]
    expected = stack_and_pick(devices)
    for band in (4, 20, 256 * 1024):
        monkeypatch.setattr(module, "_BAND_PIXELS", band)
        merged = aggregate_distributed_results(devices)
        for name, array in expected.items():
            assert tuple(merged[name].shape) == shape
            np.testing.assert_array_equal(merged[name].numpy(), array, err_msg=name)


def test_maps_larger_than_a_band():
    devices = make_devices(n=2, shape=(700, 501))
    merged = aggregate_distributed_results(devices)
    for name, array in stack_and_pick(devices).items():
        np.testing.assert_array_equal(merged[name].numpy(), array, err_msg=name)


def test_counts_are_exact_and_optional():
    one, other = make_devices(n=2)
    assert "total_projections" not in aggregate_distributed_results([one, other])
    counts = (2**53 + 1, np.int64(2**40))
    both = [{**d, "total_projections": n} for d, n in zip((one, other), counts, strict=True)]
    total = aggregate_distributed_results(both)["total_projections"]
    assert type(total) is int
    assert total == 2**53 + 1 + 2**40
    both[1]["total_projections"] = torch.tensor(0)  # an idle device
    both[1]["mip"] = both[1]["mip"] * 0 - np.inf
    assert aggregate_distributed_results(both)["total_projections"] == 2**53 + 1


@kinds
def test_idle_devices_and_pixels(kind):
    devices = make_devices(n=3, **kind)
    for name, array in devices[1].items():  # searched nothing
        array[...] = {"mip": -np.inf, "best_global_index": -1}.get(
            name, 0 if name in SUMS else np.nan
        )
    merged = aggregate_distributed_results(devices)
    for name, array in stack_and_pick([devices[0], devices[2]]).items():
        np.testing.assert_array_equal(merged[name].numpy(), array, err_msg=name)
    merged = aggregate_distributed_results([devices[1]] * 2)
    assert (merged["mip"] == -math.inf).all()
    assert (merged.get("best_global_index", torch.tensor(-1)) == -1).all()
    assert torch.isnan(merged.get("best_phi", torch.tensor(math.nan))).all()


def test_sums_are_accumulated_in_float64():
    devices = make_devices(n=3, shape=(2, 2))
    for device, value in zip(devices, (2.0**24, 1.0, 1.0), strict=True):
        device["correlation_sum"][:] = value
    devices[0]["correlation_squared_sum"] = np.full((2, 2), 3e38)  # float64, beyond float32 summed
    devices[1]["correlation_squared_sum"] = np.full((2, 2), 3e38)
    devices[2]["correlation_squared_sum"] = np.full((2, 2), 3e38)
    merged = aggregate_distributed_results(devices)
    assert (merged["correlation_sum"] == 2**24 + 2).all()
    assert (merged["correlation_squared_sum"] == math.inf).all()


@pytest.mark.parametrize("given", [list, as_torch])
def test_inputs_are_unchanged(given):
    devices = make_devices(indexed=True, count=5)
    before = [{k: np.copy(v) for k, v in device.items()} for device in devices]
    merged = aggregate_distributed_results(given(devices))
    for name in ("mip", "best_phi", "correlation_sum"):
        merged[name].fill_(-99)  # results share no memory with inputs
    for device, old in zip(devices, before, strict=True):
        for name, value in old.items():
            np.testing.assert_array_equal(device[name], value)


def problems_of(results):
    with pytest.raises(InvalidInputError) as caught:
        aggregate_distributed_results(results)
    assert isinstance(caught.value, ValueError)
    return caught.value.problems


class TestRefusals:
    def test_no_devices(self):
        assert "at least one" in problems_of([])[0]
        assert "got dict" in problems_of({"mip": 1})[0]
        assert "device 1" in problems_of([{}, None])[0]

    def test_all_problems_at_once(self):
        devices = make_devices(n=4, indexed=True, count=3)
        devices[0]["mip"] = devices[0]["mip"].astype(np.float64)
        devices[1]["best_phi"] = devices[1]["best_phi"][1:]
        del devices[2]["best_theta"]
        devices[2]["correlation_sum"] = [1, 2]
        devices[3]["total_projections"] = True
        del devices[1]["total_projections"]
        problems = problems_of(devices)
        assert len(problems) == 6
        for text in (
            "device 0, mip: expected dtype float32, got float64",
            "device 1, best_phi: expected shape (37, 29) as device 0, mip, got (36, 29)",
            "device 2, best_theta: missing",
            "device 2, correlation_sum: expected a torch tensor or a NumPy array, got list",
            "device 3, total_projections: expected an integer, got a bool",
            "device 1, total_projections: missing",
        ):
            assert any(text in problem for problem in problems), text

    def test_some_forms_only(self):
        explicit, indexed = make_devices(1), make_devices(1, explicit=False, indexed=True)
        assert len(problems_of(explicit + indexed)) == 4
        poseless = [{k: v for k, v in explicit[0].items() if not k.startswith("best")}]
        assert "no device has a pose" in problems_of(poseless)[0]
        sized = make_devices(1, pixel_size=True)
        assert "device 1, best_pixel_size: missing" in problems_of(sized + explicit)[0]
        both = make_devices(1, indexed=True)
        assert "best_global_index" not in aggregate_distributed_results(both + explicit)

    @pytest.mark.parametrize("count", [True, np.bool_(1), torch.tensor(True), 3.0, "3", -1, None])
    def test_counts(self, count):
        assert "total_projections" in problems_of(make_devices(1, count=count or -1))[0]

    @pytest.mark.parametrize("name", ["mip", "best_psi", *SUMS])
    def test_nan(self, name):
        devices = make_devices(n=3, indexed=True)
        devices[1][name][5, 7] = devices[1][name][30, 2] = np.nan
        (problem,) = problems_of(devices)
        assert problem.startswith(f"device 1: {name}: NaN at 2 pixels, first (5, 7)")

    @pytest.mark.parametrize("explicit", [True, False])
    def test_indices(self, explicit):
        devices = make_devices(n=2, explicit=explicit, indexed=True)
        devices[1]["best_global_index"][3, 4] = -2
        devices[1]["best_global_index"][3, 5] = -1  # although mip is not -inf
        devices[1]["best_global_index"][3, 6] = 2**31 - 1
        outside, missing = problems_of(devices)
        assert outside.startswith("device 1: best_global_index: expected -1 or more, got -2 to")
        assert "2 pixels, first (3, 4)" in outside
        assert "1 pixel, first (3, 5)" in missing

    def test_positions_in_later_bands(self, monkeypatch):
        monkeypatch.setattr(module, "_BAND_PIXELS", 64)
        devices = make_devices(n=1, shape=(3, 10, 20))
        devices[0]["mip"][2, 9, 13] = np.nan
        devices[0]["correlation_sum"][1, 4, 1] = np.nan
        problems = problems_of(devices)
        assert "mip: NaN at 1 pixel, first (2, 9, 13)" in problems[0]
        assert "correlation_sum: NaN at 1 pixel, first (1, 4, 1)" in problems[1]

    def test_byte_swapped_and_half(self):
        (device,) = make_devices(1)
        device["mip"] = device["mip"].astype(">f4")
        device["best_phi"] = torch.from_numpy(device["best_phi"]).half()
        problems = problems_of([device])
        assert "got byte-swapped float32" in problems[0]
        assert "got float16" in problems[1]


def make_table(threshold, *rows):
    index, x, y, value = np.array(rows, np.float64).reshape(-1, 4).T
    columns = {"global_idx": index, "pos_x": x, "pos_y": y}
    columns = {name: torch.from_numpy(column.astype(np.int32)) for name, column in columns.items()}
    return columns | {
        "corr_value": torch.from_numpy(value.astype(np.float32)),
        "threshold": threshold,
    }


class TestCorrelationTables:
    """As Leopard-EM 1.3 records them: all correlations above a threshold."""

    def merge(self, *tables):
        devices = make_devices(n=len(tables), explicit=False, indexed=True)
        devices = [d | {"correlation_table": t} for d, t in zip(devices, tables, strict=True)]
        return aggregate_distributed_results(devices)["correlation_table"]

    def test_they_are_concatenated_in_the_order_of_the_devices(self):
        one = make_table(torch.tensor(5.5), (7, 1, 2, 6.0), (3, 0, 0, 5.6))
        one["pos_x"] = one["pos_x"].long()  # a device that found something has int64
        merged = self.merge(one, make_table(5.5), make_table(5.5, (3, 0, 0, 5.75)))
        assert merged.pop("threshold") == 5.5
        dtypes = {name: column.dtype for name, column in merged.items()}
        assert list(dtypes.values()) == [torch.int32, torch.int64, torch.int32, torch.float32]
        assert merged["global_idx"].tolist() == [7, 3, 3]
        assert (merged["pos_x"].tolist(), merged["pos_y"].tolist()) == ([1, 0, 0], [2, 0, 0])
        np.testing.assert_allclose(merged["corr_value"], [6.0, 5.6, 5.75])

    def test_the_highest_threshold_applies_to_all(self):
        merged = self.merge(make_table(5, (1, 0, 0, 6.0), (2, 0, 0, 5.9)), make_table(6.0))
        assert merged["threshold"] == 6.0
        assert not len(merged["global_idx"])

    @pytest.mark.parametrize(
        ("change", "problem"),
        [
            (None, "device 1, correlation_table: missing"),
            ({"threshold": None}, "device 1, correlation_table: expected a dictionary of columns"),
            ({"corr_value": torch.ones(2)}, "device 1, correlation_table: expected columns of one"),
            ({"more": torch.ones(0)}, "device 1, correlation_table: expected columns ['corr_value"),
        ],
    )
    def test_refusals(self, change, problem):
        devices = make_devices(n=2)
        devices[0]["correlation_table"] = make_table(5)
        if change is not None:
            devices[1]["correlation_table"] = make_table(5) | change
        assert problems_of(devices)[0].startswith(problem)


def test_the_results_are_those_of_leopard_em_13():
    """Recorded; `test_leopard_search.py` compares with Leopard-EM where it is installed."""
    with np.load(DATA / "leopard_13_devices.npz") as file:
        groups = {}
        for name, values in file.items():
            where, _, name = name.partition("/")
            groups.setdefault(where, {"correlation_table": {}})
            where, name = (
                (groups[where], name)
                if "table/" not in name
                else (groups[where]["correlation_table"], name.removeprefix("table/"))
            )
            where[name] = values
    expected = groups.pop("merged")
    found = aggregate_distributed_results([groups["device0"], groups["device1"]])
    # Theirs takes the earlier device of a tie, ours the lower index.
    devices = groups["device0"], groups["device1"]
    ties = devices[0]["mip"] == devices[1]["mip"]
    lower = np.minimum(*(device["best_global_index"] for device in devices))
    assert 0 < ties.sum() < 30
    expected["best_global_index"] = np.where(ties, lower, expected["best_global_index"])
    table, their_table = found.pop("correlation_table"), expected.pop("correlation_table")
    for ours, theirs in ((found, expected), (table, their_table)):
        assert set(ours) == set(theirs)
        for name, values in theirs.items():
            np.testing.assert_array_equal(ours[name], values, err_msg=name)
            assert np.asarray(ours[name]).dtype == values.dtype, name


def test_what_else_devices_have_is_passed_on():
    devices = make_devices(n=2)
    config, same = {"spam": np.ones(2)}, np.arange(3)
    devices[0] |= {"scaled_mip": same, "rows": same, "part": (0, 5), "n": 3, "config": config}
    devices[1] |= {"rows": torch.arange(3), "part": (5, 9), "n": 3, "config": {"spam": np.ones(2)}}
    merged = aggregate_distributed_results(devices)
    assert set(merged) == {*make_devices(1)[0], "rows", "part", "n", "config"}
    assert merged["rows"] is same
    assert merged["n"] == 3
    assert merged["part"] == [(0, 5), (5, 9)]
    assert merged["config"][0] is config


def runs_by_hand(runs, counts, *, pooled):
    """Everything in one array, as in Leopard-EM's pull request 137."""
    stack = {name: np.stack([run[name].astype(np.float64) for run in runs]) for name in runs[0]}
    if pooled:
        stack |= {name: np.repeat(stack[name].sum(axis=0)[None], len(runs), 0) for name in SUMS}
    columns = stack["mip"], *(stack[name] for name in SUMS), counts
    each = [by_hand(*of_run) for of_run in zip(*columns, strict=True)]
    mean, std, z = map(np.stack, zip(*each, strict=True))
    winner = (stack["mip"] if pooled else z).argmax(axis=0)[None]
    out = {
        "mip": stack["mip"],
        "scaled_mip": z,
        "correlation_mean": mean,
        "correlation_variance": std,
        "best_global_index": stack["best_global_index"],
    }
    return winner[0], {k: np.take_along_axis(v, winner, axis=0)[0] for k, v in out.items()}


class TestRuns:
    @pytest.fixture(params=[(70, 45), (7,), (2, 3, 5), (0, 4)], ids=str)
    def runs(self, request, monkeypatch):
        monkeypatch.setattr(runs_module, "_SIDE", 32)
        runs = make_devices(n=3, shape=request.param, explicit=False, indexed=True)
        for run, factor in zip(runs, (900, 1600, 400), strict=True):
            run["correlation_squared_sum"] *= factor / 900
        return runs

    @pytest.mark.parametrize("given", [list, as_torch, as_strided])
    def test_the_best_z_score_wins(self, runs, given):
        counts = [900, 800, 700]
        found = merge_runs_independent_zscore(
            given(runs), total_correlation_positions_per_run=counts
        )
        winner, expected = runs_by_hand(runs, counts, pooled=False)
        assert found.pop("total_correlation_positions") == sum(counts)
        np.testing.assert_array_equal(found.pop("winner_run_index"), winner)
        assert set(found) == set(expected)
        for name, values in expected.items():
            np.testing.assert_array_equal(found[name].numpy(), values, err_msg=name)

    def test_the_best_mip_wins_with_one_noise_model(self, runs):
        found = merge_runs_pooled_zscore(
            runs, pooled_total_correlation_positions=2700, run_tag_values=[-100, 0, 100.5]
        )
        winner, expected = runs_by_hand(runs, [2700] * 3, pooled=True)
        tags = np.array([-100, 0, 100.5], np.float32)[winner]
        np.testing.assert_array_equal(found.pop("best_run_tag"), tags)
        assert set(found) == set(expected)
        for name, values in expected.items():
            np.testing.assert_array_equal(found[name].numpy(), values, err_msg=name)

    def test_where_nothing_was_searched(self):
        runs = make_devices(n=2, shape=(2, 2), explicit=False, indexed=True)
        for run, pixels in zip(runs, (np.s_[:, 0], np.s_[0]), strict=True):
            run["mip"][pixels], run["best_global_index"][pixels] = -np.inf, -1
        kinds = {"total_correlation_positions_per_run": 900}
        found = merge_runs_independent_zscore(runs, **kinds)
        assert found["winner_run_index"].tolist() == [[-1, 0], [1, found["winner_run_index"][1, 1]]]
        assert found["best_global_index"][0, 0] == -1
        assert math.isnan(found["scaled_mip"][0, 0])

    def test_maps_larger_than_memory(self, tmp_path, monkeypatch):
        """Only a region of each map is read and written at a time."""
        monkeypatch.setattr(runs_module, "_SIDE", 64)
        shape, largest = (100, 300), 0

        class OnDisk:
            def __init__(self, name, values):
                self.values = np.memmap(tmp_path / name, values.dtype, "w+", shape=shape)
                self.values[:] = values
                self.shape, self.dtype = shape, values.dtype

            def __getitem__(self, region):
                nonlocal largest
                part = self.values[region]
                largest = max(largest, part.size)
                return part

        runs = make_devices(n=2, shape=shape, explicit=False, indexed=True)
        stored = [
            {name: OnDisk(f"{i}-{name}", values) for name, values in run.items()}
            for i, run in enumerate(runs)
        ]
        z = np.memmap(tmp_path / "z", np.float32, "w+", shape=shape)
        counts = {"total_correlation_positions_per_run": [900, 800]}
        found = merge_runs_independent_zscore(stored, **counts, out={"scaled_mip": z})
        assert found["scaled_mip"] is z
        assert largest == 64**2
        expected = merge_runs_independent_zscore(runs, **counts)
        np.testing.assert_array_equal(z, expected["scaled_mip"])
        np.testing.assert_array_equal(found["winner_run_index"], expected["winner_run_index"])

    def test_refusals(self):
        runs = make_devices(n=2, explicit=False, indexed=True)

        def problems(runs, count=900, **more):
            with pytest.raises(InvalidInputError) as caught:
                merge_runs_independent_zscore(
                    runs, total_correlation_positions_per_run=count, **more
                )
            return caught.value.problems

        assert "at least one" in problems([])[0]
        assert "expected 2 numbers, got 1" in problems(runs, [900])[0]
        assert "run, run 1: expected at least 1, got 0" in problems(runs, [900, 0])[0]
        out = {"best_phi": runs[0]["mip"]}
        assert "out, best_phi: expected a result" in problems(runs, out=out)[0]
        broken = [runs[0], {"mip": runs[0]["mip"][1:]}]
        assert len(problems(broken)) == 4
        runs[1]["mip"][3, 4] = np.nan
        assert problems(runs)[0].startswith("run 1: mip: NaN at 1 pixel, first (3, 4)")
        with pytest.raises(InvalidInputError, match="run_tag_values: expected 2 numbers, got 1"):
            merge_runs_pooled_zscore(runs, pooled_total_correlation_positions=9, run_tag_values=[1])


def by_hand(mip, total, squared, count):
    mean = total.astype(np.float64) / count
    std = np.sqrt(np.maximum(squared.astype(np.float64) / count - mean * mean, 0))
    z = np.divide(mip - mean, std, out=np.zeros_like(mean), where=std != 0)
    return mean.astype(np.float32), std.astype(np.float32), z.astype(np.float32)


@pytest.fixture
def sums():
    rng = np.random.default_rng(3)
    shape, count = (600, 501), 20_500_000
    mip = rng.uniform(5, 9, shape).astype(np.float32)
    total = rng.normal(0.01 * count, 100, shape).astype(np.float32)
    squared = rng.normal(count, 1000, shape).astype(np.float32)
    total[0, :5], squared[0, :5] = count, count  # variance 0
    total[1, :5], squared[1, :5] = count, count - 20  # and less by rounding
    return mip, total, squared, count


@pytest.mark.parametrize("as_given", [lambda a: a, torch.from_numpy], ids=["numpy", "torch"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
class TestStatistics:
    def test_mean_and_standard_deviation(self, sums, as_given, dtype):
        mip, total, squared, count = sums
        expected = by_hand(mip, total, squared, count)
        mean, std = correlation_sum_and_squared_sum_to_mean_and_variance(
            as_given(total.astype(dtype)), as_given(squared.astype(dtype)), count
        )
        np.testing.assert_array_equal(mean.numpy(), expected[0])
        np.testing.assert_array_equal(std.numpy(), expected[1])
        assert (std[:2, :5] == 0).all()

    def test_scale_mip_fills_in_place(self, sums, as_given, dtype):
        mip, total, squared, count = sums
        mean, std, z = by_hand(mip, total, squared, count)
        total, squared = total.astype(dtype), squared.astype(dtype)
        before = mip.copy(), total.copy(), squared.copy()
        scaled = np.full_like(mip, 7)
        out = scale_mip(*map(as_given, (mip, scaled, total, squared)), count)
        for tensor, expected in zip(out, (mip, z, mean, std), strict=True):
            np.testing.assert_array_equal(tensor.numpy(), expected)
        assert np.shares_memory(out[1].numpy(), scaled)
        assert np.shares_memory(out[0].numpy(), mip)
        for array, old in zip((mip, total, squared), before, strict=True):
            np.testing.assert_array_equal(array, old)
        wide = np.zeros((600, 1002), np.float32)
        out = scale_mip(*map(as_given, (mip, wide[:, ::2], total, squared)), count)
        np.testing.assert_array_equal(wide[:, ::2], z)
        assert not wide[:, 1::2].any()


class TestStatisticsRefusals:
    def test_everything_at_once(self, sums):
        mip, total, squared, _ = sums
        with pytest.raises(InvalidInputError) as caught:
            scale_mip(mip, np.zeros((3, 3)), total[1:], squared.astype(np.int32), 0)
        text = "\n".join(caught.value.problems)
        assert "mip_scaled: expected dtype float32, got float64" in text
        assert "mip_scaled: expected shape (600, 501) as mip, got (3, 3)" in text
        assert "correlation_sum: expected shape (600, 501) as mip, got (599, 501)" in text
        assert "correlation_squared_sum: expected dtype float32 or float64, got int32" in text
        assert "total_correlation_positions: expected at least 1, got 0" in text

    @pytest.mark.parametrize("count", [True, 2.5, 3.0, -4, 0, None, "7"])
    def test_counts(self, sums, count):
        _, total, squared, _ = sums
        with pytest.raises(InvalidInputError, match="total_correlation_positions: expected "):
            correlation_sum_and_squared_sum_to_mean_and_variance(total, squared, count)

    def test_nan_before_anything_is_written(self, sums):
        mip, total, squared, count = sums
        squared[599, 500] = np.nan
        scaled = np.full_like(mip, 7)
        with pytest.raises(InvalidInputError, match=r"correlation_squared_sum: NaN .*\(599, 500\)"):
            scale_mip(mip, scaled, total, squared, count)
        assert (scaled == 7).all()

    def test_overlap_and_read_only(self, sums):
        mip, total, squared, count = sums
        with pytest.raises(InvalidInputError, match="shares memory with mip"):
            scale_mip(torch.from_numpy(mip), mip, total, squared, count)
        scaled = np.zeros_like(mip)
        scaled.flags.writeable = False
        with pytest.raises(InvalidInputError, match="read-only"):
            scale_mip(mip, scaled, total, squared, count)

    def test_unsearched_pixels_have_no_z_score(self, sums):
        mip, total, squared, count = sums
        mip[2, 2] = -np.inf
        mip.flags.writeable = False  # PyTorch cannot view that, so it is copied
        out = scale_mip(mip, np.empty_like(mip), total, squared, count)
        assert torch.isnan(out[1]).sum() == 1
        assert torch.isnan(out[1][2, 2])
        assert out[0][2, 2] == -math.inf


def test_results_of_one_feed_the_other():
    devices = make_devices(count=1000)
    merged = aggregate_distributed_results(devices)
    _, z, mean, _ = scale_mip(
        merged["mip"],
        torch.empty_like(merged["mip"]),
        merged["correlation_sum"],
        merged["correlation_squared_sum"],
        merged["total_projections"],
    )
    assert torch.isfinite(z).all()
    assert torch.allclose(mean, merged["correlation_sum"] / 4000)


def test_without_torch(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch")
    real = builtins.__import__

    def no_torch(name, *args, **kwargs):
        if name == "torch":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_torch)
    with pytest.raises(MissingDependencyError, match=r"pip install 'ocelot-em\[torch\]'"):
        aggregate_distributed_results([])


def extra_bytes(function, devices):
    tracemalloc.start()
    try:
        function(devices)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "kind", [{}, {"explicit": False, "indexed": True}], ids=["explicit", "indexed"]
)
def test_a_quarter_of_the_memory_of_stacking(kind):
    def leopard_way(devices):  # as written in Leopard-EM, float32 sums and all
        mips = np.stack([device["mip"] for device in devices])
        poses = {
            name: np.stack([device[name] for device in devices])
            for name in devices[0]
            if name.startswith("best")
        }
        out, winner = {"mip": mips.max(axis=0)}, mips.argmax(axis=0)
        for name, stack in poses.items():
            out[name] = np.take_along_axis(stack, winner[None], axis=0)[0]
        for name in SUMS:
            out[name] = np.stack([device[name] for device in devices]).sum(axis=0)
        return out

    devices = make_devices(n=8, shape=(1024, 1024), **kind)
    small = [{k: v[:9, :9] for k, v in device.items()} for device in devices]
    aggregate_distributed_results(small)  # compiles
    ours = extra_bytes(aggregate_distributed_results, devices)
    assert ours <= extra_bytes(leopard_way, devices) / 4
