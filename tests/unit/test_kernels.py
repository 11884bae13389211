"""Every kernel against the independent oracle, and against what a merge must obey."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import oracle
from ocelot_em.errors import InvalidInputError
from ocelot_em.kernels import NAMES, load
from ocelot_em.maps import Accumulator, MapSet, PartialMaps, PoseForm
from ocelot_em.search_space import SearchSpace

KERNELS = [pytest.param(load(name), id=name) for name in NAMES]
every_kernel = pytest.mark.parametrize("kernels", KERNELS)
checked = settings(
    max_examples=60,
    deadline=None,  # the first example compiles
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.differing_executors],
)

SPACE = SearchSpace.from_tables(
    np.random.default_rng(1).uniform(0, 360, (7, 3)), [-100.0, 0.0, 100.0], [0.0, 0.01]
)
TABLES = SPACE.euler_angles, SPACE.defocus_values, SPACE.pixel_values
SHAPES = [(1, 1), (1, 9), (5, 1), (3, 4), (1, 2047), (1, 2048), (1, 2049), (2, 2049), (33, 125)]
COUNTS = [0, 1, 3, 1000, 20_500_000, 2**31 + 5, 2**53 + 1]
MIPS = np.array([1, 1, 2, 2.5, -3, 0.0, -0.0, np.inf, -np.inf, 3.4e38, 1e-45], np.float32)
SUMS = np.array([0, -0.0, 1, 3, 1e7, -2, 1e-30, 3.2e38, -3.4e38, np.inf, -np.inf], np.float32)

# form (4 or 5 explicit maps, or indexed) and counts
map_sets = st.sampled_from(
    [
        MapSet(PoseForm.EXPLICIT, pixel_size=False),
        MapSet(PoseForm.EXPLICIT),
        MapSet(PoseForm.EXPLICIT, counts=True),
        MapSet(PoseForm.INDEXED),
        MapSet(PoseForm.INDEXED, counts=True),
    ]
)


def space_of(maps):
    return SPACE if maps.form is PoseForm.INDEXED else None


def sprinkle(rng, array, value, share):
    array[rng.random(array.shape) < share] = value
    return array


def draw_partial(rng, shape, maps, number, *, nan=0.0, sum_dtype=np.float32):
    """One device: mostly ties and special values, in places idle."""
    plain = rng.random() < 0.5
    mip = rng.standard_normal(shape).astype(np.float32) if plain else rng.choice(MIPS, shape)
    idle = rng.random(shape) < rng.choice([0.0, 0.2, 1.0], p=[0.5, 0.4, 0.1])
    mip[idle] = -np.inf
    if maps.form is PoseForm.INDEXED:
        pose = (rng.integers(0, SPACE.n_poses, shape, dtype=np.int32),)
        pose[0][idle | (mip == -np.inf)] = -1
    else:
        pose = tuple(
            np.where(idle, np.nan, rng.choice([0.0, -0.0, 90.0, 270.5, -1.5], shape)).astype("f4")
            for _ in maps.pose
        )
        for values in pose:
            sprinkle(rng, values, np.nan, nan)
    if plain:
        count = int(rng.choice(COUNTS[1:5]))
        sums = [rng.normal(0.1 * count, count**0.5, shape), rng.normal(2 * count, 1, shape)]
    else:
        count = COUNTS[rng.integers(len(COUNTS))]
        sums = [rng.choice(SUMS, shape), rng.choice(SUMS, shape)]
    sums = [sprinkle(rng, np.where(idle, 0, s).astype(sum_dtype), np.nan, nan) for s in sums]
    if maps.counts and rng.random() < 0.7:
        count = np.where(idle, 0, rng.integers(0, 2**40, shape))
    best = number
    if rng.random() < 0.2:  # an earlier merge of the partials up to this one
        best = np.where(idle, -1, rng.integers(0, number + 1, shape)).astype(np.int32)
    return PartialMaps(sprinkle(rng, mip, np.nan, nan), pose, *sums, count, best)


@st.composite
def stacks(draw, shapes=SHAPES, sets=map_sets, nan=False, max_partials=6):
    maps, shape = draw(sets), draw(st.sampled_from(shapes))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    share = draw(st.sampled_from([0.0, 0.001, 0.2])) if nan else 0.0
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    n = draw(st.integers(1, max_partials))
    partials = [draw_partial(rng, shape, maps, i, nan=share, sum_dtype=dtype) for i in range(n)]
    return maps, partials


def fold_all(kernels, maps, partials):
    acc = kernels.identity(partials[0].mip.shape, maps)
    reports = [kernels.fold(acc, partial, space_of(maps)) for partial in partials]
    return acc, reports


def as_partial(acc: Accumulator) -> PartialMaps:
    return PartialMaps(
        acc.mip.copy(),
        tuple(p.copy() for p in acc.pose),
        acc.correlation_sum.copy(),
        acc.correlation_squared_sum.copy(),
        acc.count if acc.count_map is None else acc.count_map.copy(),
        acc.best_partial.copy(),
    )


def assert_same_bits(actual, expected, name=""):
    assert actual.dtype == expected.dtype, name
    assert actual.shape == expected.shape, name
    if actual.dtype.kind == "f":  # one NaN is as good as another
        actual = np.where(np.isnan(actual), np.array(np.nan, actual.dtype), actual)
        expected = np.where(np.isnan(expected), np.array(np.nan, expected.dtype), expected)
    np.testing.assert_array_equal(
        actual.view(f"i{actual.dtype.itemsize}"),
        expected.view(f"i{expected.dtype.itemsize}"),
        err_msg=name,
    )


def assert_same_accumulators(actual, expected):
    assert_same_bits(actual.mip, expected.mip, "mip")
    for number, (one, other) in enumerate(zip(actual.pose, expected.pose, strict=True)):
        assert_same_bits(one, other, f"pose {number}")
    assert_same_bits(actual.best_partial, expected.best_partial, "best_partial")
    assert_same_bits(actual.correlation_sum, expected.correlation_sum, "sum")
    assert_same_bits(actual.correlation_squared_sum, expected.correlation_squared_sum, "squared")
    assert actual.count == expected.count
    if expected.count_map is None:
        assert actual.count_map is None
    else:
        assert_same_bits(actual.count_map, expected.count_map, "count_map")


def assert_is_oracle(merged, acc, maps, partials):
    expected = oracle.merge(partials, TABLES if maps.form is PoseForm.INDEXED else None)
    counts = expected.pop("total_projections")
    if acc.count_map is None:
        assert acc.count == counts.flat[0]
    else:
        assert_same_bits(merged["total_projections"], counts.astype(np.int64))
    assert tuple(merged) == maps.merged
    assert {*merged} - {"total_projections"} == {*expected}
    for name, array in expected.items():
        assert_same_bits(merged[name], array, name)


@every_kernel
@checked
@given(stack=stacks(nan=True))
def test_agrees_with_the_whole_stack_oracle(kernels, stack):
    maps, partials = stack
    acc, reports = fold_all(kernels, maps, partials)
    merged = kernels.finalise(acc, maps, space_of(maps))
    assert_is_oracle(merged, acc, maps, partials)
    for report, partial in zip(reports, partials, strict=True):
        assert report.nan_pixels == oracle.nan_pixels(partial)
        if maps.form is PoseForm.INDEXED:
            assert report.invalid_indices == oracle.invalid_indices(partial, SPACE.n_poses)
        else:
            assert report.invalid_indices == 0


@checked
@given(stack=stacks(nan=True))
def test_kernels_agree_bit_by_bit(stack):
    maps, partials = stack
    one, one_reports = fold_all(load("cpu"), maps, partials)
    other, other_reports = fold_all(load("reference"), maps, partials)
    assert one_reports == other_reports
    assert_same_accumulators(one, other)
    left = load("cpu").finalise(one, maps, space_of(maps))
    right = load("reference").finalise(other, maps, space_of(maps))
    assert list(left) == list(right)
    for name in left:
        assert_same_bits(left[name], right[name], name)


@every_kernel
@checked
@given(stack=stacks(), cut=st.integers(0, 6))
def test_merging_merged_results_is_merging_at_once(kernels, stack, cut):
    maps, partials = stack
    at_once, _ = fold_all(kernels, maps, partials)
    groups = [group for group in (partials[:cut], partials[cut:]) if group]
    merged = [as_partial(fold_all(kernels, maps, group)[0]) for group in groups]
    grouped, _ = fold_all(kernels, maps, merged)
    # float64 addition is not associative: only what is picked agrees in every bit
    sums = {
        "correlation_sum": at_once.correlation_sum,
        "correlation_squared_sum": at_once.correlation_squared_sum,
    }
    assert_same_accumulators(replace(grouped, **sums), at_once)


@every_kernel
@checked
@given(stack=stacks(sets=map_sets.filter(lambda m: m.form is PoseForm.INDEXED)), data=st.data())
def test_indexed_merge_does_not_depend_on_the_order(kernels, stack, data):
    maps, partials = stack
    shuffled = data.draw(st.permutations(partials))
    one, _ = fold_all(kernels, maps, partials)
    other, _ = fold_all(kernels, maps, shuffled)
    np.testing.assert_array_equal(one.mip, other.mip)
    np.testing.assert_array_equal(one.pose[0], other.pose[0])


@every_kernel
@checked
@given(stack=stacks(), at=st.integers(0, 6))
def test_an_idle_partial_changes_nothing(kernels, stack, at):
    maps, partials = stack
    idle = as_partial(kernels.identity(partials[0].mip.shape, maps))
    one, _ = fold_all(kernels, maps, partials)
    other, reports = fold_all(kernels, maps, [*partials[:at], idle, *partials[at:]])
    assert_same_accumulators(other, one)
    assert all((r.nan_pixels, r.invalid_indices) == (0, 0) for r in reports)


@every_kernel
@settings(checked, max_examples=30)
@given(stack=stacks(shapes=SHAPES[:4], nan=True))
def test_masking_nan_is_leaving_the_partial_out_there(kernels, stack):
    maps, partials = stack
    maps = replace(maps, counts=True)
    masked = [kernels.mask_nan(partial) for partial in partials]
    acc, reports = fold_all(kernels, maps, masked)
    assert all((r.nan_pixels, r.invalid_indices) == (0, 0) for r in reports)
    merged = kernels.finalise(acc, maps, space_of(maps))
    for (y, x), here in oracle.drop_nan(partials):
        if not here:
            assert merged["mip"][y, x] == -np.inf
            assert merged["total_projections"][y, x] == 0
            assert np.isnan(merged["scaled_mip"][y, x])
            continue
        expected = oracle.merge(here, TABLES if maps.form is PoseForm.INDEXED else None)
        for name, array in expected.items():
            value = array.astype(np.int64) if array.dtype == object else array
            assert_same_bits(merged[name][y : y + 1, x : x + 1], value, name)


@every_kernel
@settings(checked, max_examples=30)
@given(stack=stacks())
def test_a_reset_accumulator_is_as_good_as_new(kernels, stack):
    maps, partials = stack
    acc, _ = fold_all(kernels, maps, partials)
    own = acc.mip
    kernels.reset(acc)
    assert acc.mip is own
    assert_same_accumulators(acc, kernels.identity(own.shape, maps))


@every_kernel
@settings(checked, max_examples=30)
@given(stack=stacks())
def test_finalise_fills_the_arrays_it_is_given(kernels, stack):
    maps, partials = stack
    acc, _ = fold_all(kernels, maps, partials)
    expected = kernels.finalise(acc, maps, space_of(maps))
    names = ["scaled_mip", "correlation_mean", "correlation_std", "correlation_squared_sum"]
    if maps.form is PoseForm.INDEXED:
        names += maps.explicit_poses
    out = {name: np.full(acc.mip.shape, 77, np.float32) for name in names}
    merged = kernels.finalise(acc, maps, space_of(maps), out=out)
    for name in maps.merged:
        assert_same_bits(merged[name], expected[name], name)
    assert all(merged[name] is out[name] for name in names)
    assert merged["mip"] is acc.mip
    assert merged["best_partial"] is acc.best_partial


def one_pixel(mip, pose, total, squared, count, number=0):
    def plane(value, dtype=np.float32):
        return np.full((1, 1), value, dtype)

    poses = (plane(pose, np.int32),) if isinstance(pose, int) else tuple(map(plane, pose))
    return PartialMaps(plane(mip), poses, plane(total), plane(squared), count, number)


@every_kernel
class TestKnownAnswers:
    angles = (1.0, 2.0, 3.0, 4.0, 5.0)

    def merged(self, kernels, maps, *partials):
        acc, reports = fold_all(kernels, maps, partials)
        merged = kernels.finalise(acc, maps, space_of(maps))
        return {name: array[0, 0] for name, array in merged.items()}, reports

    def test_statistics_by_hand(self, kernels):
        maps = MapSet(PoseForm.EXPLICIT)
        a = one_pixel(5.0, self.angles, 10.0, 40.0, 6, 0)
        b = one_pixel(7.0, (6.0,) * 5, 10.0, 60.0, 14, 1)
        merged, _ = self.merged(kernels, maps, a, b)
        assert merged["correlation_mean"] == 1.0  # 20 / 20
        assert merged["correlation_std"] == 2.0  # sqrt(100 / 20 - 1)
        assert merged["scaled_mip"] == 3.0  # (7 - 1) / 2
        assert (merged["best_phi"], merged["best_partial"]) == (6.0, 1)

    def test_ties(self, kernels):
        maps = MapSet(PoseForm.EXPLICIT)
        a, b = (one_pixel(5.0, (x,) * 5, 0, 0, 1, i) for i, x in enumerate((1.0, 2.0)))
        assert self.merged(kernels, maps, a, b)[0]["best_psi"] == 1.0
        assert self.merged(kernels, maps, b, a)[0]["best_psi"] == 2.0
        c, d = (one_pixel(5.0, x, 0, 0, 1, i) for i, x in enumerate((9, 4)))
        for order in ((c, d), (d, c)):
            merged, _ = self.merged(kernels, MapSet(PoseForm.INDEXED), *order)
            assert (merged["best_global_index"], merged["best_partial"]) == (4, 1)

    def test_zero_variance_gives_zero_and_never_a_root_of_less(self, kernels):
        maps = MapSet(PoseForm.EXPLICIT)
        for squared in (20.0, 19.0):  # variance 0, and -0.25 as rounding leaves it
            merged, _ = self.merged(kernels, maps, one_pixel(9, self.angles, 10, squared, 5))
            if squared == 20.0:
                assert merged["correlation_mean"] == 2.0
            assert (merged["correlation_std"], merged["scaled_mip"]) == (0.0, 0.0)

    def test_counts_are_exact(self, kernels):
        counts = [2**31 + 1, 2**53 + 1, 1]
        partials = [one_pixel(1, self.angles, 0, 0, n) for n in counts]
        acc, _ = fold_all(kernels, MapSet(PoseForm.EXPLICIT), partials)
        assert acc.count == sum(counts)
        acc, _ = fold_all(kernels, MapSet(PoseForm.EXPLICIT, counts=True), partials)
        assert acc.count_map.tolist() == [[sum(counts)]]

    def test_sums_do_not_lose_what_float32_would(self, kernels):
        partials = [one_pixel(1, self.angles, x, 0, 1) for x in (2.0**24, 1.0, 1.0)]
        merged, _ = self.merged(kernels, MapSet(PoseForm.EXPLICIT), *partials)
        assert merged["correlation_sum"] == 2.0**24 + 2
        big = [one_pixel(1, self.angles, 3e38, 3e38, 1) for _ in range(2)]
        merged, _ = self.merged(kernels, MapSet(PoseForm.EXPLICIT), *big)
        assert merged["correlation_sum"] == np.inf
        assert merged["correlation_mean"] == np.float32(3e38)

    def test_nothing_searched(self, kernels):
        for maps in (MapSet(PoseForm.EXPLICIT), MapSet(PoseForm.INDEXED)):
            acc = kernels.identity((2, 3), maps)
            merged = kernels.finalise(acc, maps, space_of(maps))
            assert (merged["mip"] == -np.inf).all()
            assert (merged["best_partial"] == -1).all()
            for name in ("scaled_mip", "correlation_mean", "correlation_std", "best_pixel_size"):
                assert np.isnan(merged[name]).all(), name

    def test_reports_nan_once_per_pixel_and_not_in_idle_poses(self, kernels):
        maps, nan = MapSet(PoseForm.EXPLICIT), np.nan
        everything = one_pixel(nan, (nan,) * 5, nan, nan, 1)
        assert self.merged(kernels, maps, everything)[1][0].nan_pixels == 1
        only_pose = one_pixel(1.0, (1.0, nan, nan, 1.0, 1.0), 0, 0, 1)
        assert self.merged(kernels, maps, only_pose)[1][0].nan_pixels == 1
        idle = one_pixel(-np.inf, (nan,) * 5, 0, 0, 0)
        assert self.merged(kernels, maps, idle)[1][0].nan_pixels == 0

    def test_reports_invalid_indices(self, kernels):
        acc = kernels.identity((1, 6), MapSet(PoseForm.INDEXED))
        zeros, n = np.zeros((1, 6), np.float32), SPACE.n_poses
        mip = np.array([[1, 1, 1, 1, -np.inf, -np.inf]], np.float32)
        index = np.array([[0, n - 1, n, -1, -1, -2]], np.int32)
        report = kernels.fold(acc, PartialMaps(mip, (index,), zeros, zeros, 1, 0), SPACE)
        assert (report.nan_pixels, report.invalid_indices) == (0, 3)
        with pytest.raises(IndexError):
            kernels.finalise(acc, MapSet(PoseForm.INDEXED), SPACE)

    def test_a_count_map_needs_a_count_map(self, kernels):
        acc = kernels.identity((1, 1), MapSet(PoseForm.EXPLICIT))
        partial = one_pixel(1, self.angles, 0, 0, np.ones((1, 1), np.int64))
        with pytest.raises(TypeError, match="counts=True"):
            kernels.fold(acc, partial, None)
        assert_same_accumulators(acc, kernels.identity((1, 1), MapSet(PoseForm.EXPLICIT)))

    def test_read_only_inputs_are_accepted_and_unchanged(self, kernels):
        partial = one_pixel(1.0, self.angles, 2, 3, 4)
        for array in (partial.mip, *partial.pose, partial.correlation_sum):
            array.flags.writeable = False
        kernels.fold(kernels.identity((1, 1), MapSet(PoseForm.EXPLICIT)), partial, None)
        assert partial.correlation_squared_sum.flags.writeable
        assert partial.mip[0, 0] == 1.0


def test_cpu_refuses_views_that_it_would_have_to_copy():
    cpu, maps = load("cpu"), MapSet(PoseForm.EXPLICIT)
    acc = cpu.identity((4, 4), maps)
    narrow = replace(acc, mip=np.zeros((4, 8), np.float32)[:, ::2])
    with pytest.raises(ValueError, match="C-contiguous"):
        cpu.fold(narrow, as_partial(acc), None)
    with pytest.raises(ValueError, match="16 values"):
        cpu.fold(acc, as_partial(cpu.identity((4, 5), maps)), None)


def test_unknown_kernels_are_refused():
    with pytest.raises(InvalidInputError, match="cpu, reference"):
        load("abacus")
