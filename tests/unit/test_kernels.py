"""Every kernel against the independent oracle, and against what a merge must obey."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import oracle
from gpu_kernels import all_kernels
from ocelot_em.errors import InvalidInputError
from ocelot_em.kernels import load
from ocelot_em.model.maps import MapSet, PartialMaps, PoseForm
from stacks import (
    SHAPES,
    SPACE,
    TABLES,
    as_partial,
    assert_same,
    assert_same_bits,
    draw_partial,
    fold_at_once,
    fold_each,
    map_sets,
    space_of,
    sprinkle,
    stacks,
)

every_kernel = pytest.mark.parametrize("kernels", list(all_kernels()))


def assert_is_oracle(merged, acc, maps, partials):
    expected = oracle.merge(partials, TABLES if maps.form is PoseForm.INDEXED else None)
    counts = expected.pop("total_projections")
    if acc.count_map is None:
        assert acc.count == counts.flat[0]
    else:
        assert_same_bits(merged["total_projections"], counts.astype(np.int64))
    assert tuple(merged) == maps.merged
    decoded = {*maps.explicit_poses} - {*merged}
    assert bool(decoded) == (not maps.decoded)
    assert {*merged} - {"total_projections"} == {*expected} - decoded
    for name in {*expected} - decoded:
        assert_same_bits(merged[name], expected[name], name)


@every_kernel
@given(stack=stacks(nan=True))
def test_agrees_with_the_whole_stack_oracle(kernels, stack):
    maps, partials = stack
    acc, reports = fold_each(kernels, maps, partials)
    merged = kernels.finalise(acc, maps, space_of(maps))
    assert_is_oracle(merged, acc, maps, partials)
    for report, partial in zip(reports, partials, strict=True):
        n_bad = oracle.bad_pixels(partial)
        if maps.form is PoseForm.INDEXED:
            n_bad += oracle.invalid_indices(partial, SPACE.n_poses)
        assert report is (n_bad > 0)


@given(stack=stacks(nan=True))
def test_kernels_agree_bit_by_bit(stack):
    maps, partials = stack
    one, one_reports = fold_each(load("cpu"), maps, partials)
    other, other_reports = fold_each(load("reference"), maps, partials)
    assert one_reports == other_reports
    assert_same(one, other)
    left = load("cpu").finalise(one, maps, space_of(maps))
    right = load("reference").finalise(other, maps, space_of(maps))
    assert list(left) == list(right)
    for name in left:
        assert_same_bits(left[name], right[name], name)


@every_kernel
@given(stack=stacks(nan=True, max_partials=10), cut=st.integers(0, 10))
def test_folding_all_is_folding_one_by_one(kernels, stack, cut):
    maps, partials = stack
    acc, report = fold_at_once(kernels, maps, partials)
    expected, reports = fold_each(load("reference"), maps, partials)
    assert_same(acc, expected)
    assert report is any(reports)
    in_two = kernels.identity(acc.mip.shape, maps)
    for part in (partials[:cut], partials[cut:]):
        kernels.fold_all(in_two, part, space_of(maps))
    assert_same(in_two, acc)
    merged = kernels.finalise(acc, maps, space_of(maps))
    assert_is_oracle(merged, acc, maps, partials)


@pytest.mark.parametrize("maps", [MapSet(PoseForm.EXPLICIT), MapSet(PoseForm.INDEXED, counts=True)])
@pytest.mark.parametrize("sums", [(np.float32,), (np.float64,), (np.float32, np.float64)])
def test_folding_all_over_more_than_one_block(maps, sums):
    rng = np.random.default_rng(5)
    partials = [
        draw_partial(rng, (3, 11_003), maps, i, nan=1e-4, sum_dtype=sums[i % len(sums)])
        for i in range(7)
    ]
    mixed = replace(partials[3], correlation_sum=partials[3].correlation_sum.astype(np.float64))
    partials[3] = mixed
    if maps.form is PoseForm.INDEXED:
        for partial in partials:
            sprinkle(rng, partial.pose[0], SPACE.n_poses, 1e-4)
            sprinkle(rng, partial.pose[0], -2, 1e-4)
    acc, report = fold_at_once(load("cpu"), maps, partials)
    expected, expected_report = fold_at_once(load("reference"), maps, partials)
    assert report is expected_report is True
    assert_same(acc, expected)
    if maps.form is PoseForm.EXPLICIT:
        merged = load("cpu").finalise(acc, maps, None)
        for name, array in load("reference").finalise(expected, maps, None).items():
            assert_same_bits(merged[name], array, name)


@every_kernel
def test_folding_none_changes_nothing(kernels):
    maps = MapSet(PoseForm.EXPLICIT)
    acc = kernels.identity((2, 3), maps)
    assert kernels.fold_all(acc, [], None) is False
    assert_same(acc, kernels.identity((2, 3), maps))


@every_kernel
@given(stack=stacks(), cut=st.integers(0, 6))
def test_merging_merged_results_is_merging_at_once(kernels, stack, cut):
    maps, partials = stack
    at_once, _ = fold_each(kernels, maps, partials)
    groups = [group for group in (partials[:cut], partials[cut:]) if group]
    merged = [as_partial(fold_each(kernels, maps, group)[0]) for group in groups]
    grouped, _ = fold_each(kernels, maps, merged)
    # float64 addition is not associative: only what is picked agrees in every bit
    sums = {
        "correlation_sum": at_once.correlation_sum,
        "correlation_squared_sum": at_once.correlation_squared_sum,
    }
    assert_same(replace(grouped, **sums), at_once)


@every_kernel
@given(stack=stacks(sets=map_sets.filter(lambda m: m.form is PoseForm.INDEXED)), data=st.data())
def test_indexed_merge_does_not_depend_on_the_order(kernels, stack, data):
    maps, partials = stack
    shuffled = data.draw(st.permutations(partials))
    one, _ = fold_each(kernels, maps, partials)
    other, _ = fold_each(kernels, maps, shuffled)
    np.testing.assert_array_equal(one.mip, other.mip)
    np.testing.assert_array_equal(one.pose[0], other.pose[0])


@every_kernel
@given(stack=stacks(), at=st.integers(0, 6))
def test_an_idle_partial_changes_nothing(kernels, stack, at):
    maps, partials = stack
    idle = as_partial(kernels.identity(partials[0].mip.shape, maps))
    one, _ = fold_each(kernels, maps, partials)
    other, reports = fold_each(kernels, maps, [*partials[:at], idle, *partials[at:]])
    assert_same(other, one)
    assert not reports[min(at, len(partials))]


@every_kernel
@given(stack=stacks(shapes=SHAPES[:4], nan=True))
def test_masking_is_leaving_the_partial_out_there(kernels, stack):
    maps, partials = stack
    maps = replace(maps, counts=True)
    masked = [kernels.mask_nan(partial) for partial in partials]
    acc, reports = fold_each(kernels, maps, masked)
    assert not any(reports)
    merged = kernels.finalise(acc, maps, space_of(maps))
    for (y, x), here in oracle.drop_bad(partials):
        if not here:
            assert merged["mip"][y, x] == -np.inf
            assert merged["total_projections"][y, x] == 0
            assert np.isnan(merged["scaled_mip"][y, x])
            continue
        expected = oracle.merge(here, TABLES if maps.form is PoseForm.INDEXED else None)
        for name in {*expected} & {*merged}:
            array = expected[name]
            value = array.astype(np.int64) if array.dtype == object else array
            assert_same_bits(merged[name][y : y + 1, x : x + 1], value, name)


@every_kernel
@given(stack=stacks())
def test_a_reset_accumulator_is_as_good_as_new(kernels, stack):
    maps, partials = stack
    acc, _ = fold_each(kernels, maps, partials)
    own = acc.mip
    kernels.fold_all(acc, [], space_of(maps), fresh=True)
    assert acc.mip is own
    assert_same(acc, kernels.identity(own.shape, maps))


@every_kernel
@given(stack=stacks())
def test_finalise_fills_the_arrays_it_is_given(kernels, stack):
    maps, partials = stack
    acc, _ = fold_each(kernels, maps, partials)
    expected = kernels.finalise(acc, maps, space_of(maps))
    names = ["scaled_mip", "correlation_mean", "correlation_std", "correlation_squared_sum"]
    if maps.form is PoseForm.INDEXED:
        names += maps.computed_poses
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
        acc, reports = fold_each(kernels, maps, partials)
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
        acc, _ = fold_each(kernels, MapSet(PoseForm.EXPLICIT), partials)
        assert acc.count == sum(counts)
        acc, _ = fold_each(kernels, MapSet(PoseForm.EXPLICIT, counts=True), partials)
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

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_notices_values_that_no_search_produces(self, kernels, bad):
        fine = {"mip": 1.0, "pose": self.angles, "total": 0, "squared": 0, "count": 1}
        only_pose = {"pose": (1.0, bad, 3.0, 4.0, 5.0)}
        kinds = [{"total": bad}, {"squared": bad}, only_pose]
        kinds += [] if bad == -np.inf else [{"mip": bad}]
        for kind in kinds:
            explicit = one_pixel(**fine | kind)
            assert self.merged(kernels, MapSet(PoseForm.EXPLICIT), explicit)[1] == [True]
            if kind is not only_pose:
                indexed = one_pixel(**fine | {"pose": 3} | kind)
                assert self.merged(kernels, MapSet(PoseForm.INDEXED), indexed)[1] == [True]
        idle = one_pixel(-np.inf, (bad,) * 5, 0, 0, 0)
        assert self.merged(kernels, MapSet(PoseForm.EXPLICIT), idle)[1] == [False]

    def test_notices_indices_of_no_pose(self, kernels):
        n = SPACE.n_poses
        for mip, index, is_bad in [
            (1, 0, False),
            (1, n - 1, False),
            (1, n, True),
            (1, -1, True),
            (-np.inf, -1, False),
            (-np.inf, -2, True),
        ]:
            partial = one_pixel(mip, index, 0, 0, 1)
            acc = kernels.identity((1, 1), MapSet(PoseForm.INDEXED))
            assert kernels.fold_all(acc, [partial], SPACE) is is_bad
            if index == n:
                with pytest.raises(IndexError):
                    kernels.finalise(acc, MapSet(PoseForm.INDEXED), SPACE)

    def test_a_count_map_needs_a_count_map(self, kernels):
        acc = kernels.identity((1, 1), MapSet(PoseForm.EXPLICIT))
        partial = one_pixel(1, self.angles, 0, 0, np.ones((1, 1), np.int64))
        with pytest.raises(TypeError, match="counts=True"):
            kernels.fold_all(acc, [partial], None)
        fine = one_pixel(1, self.angles, 0, 0, 1)
        with pytest.raises(TypeError, match="counts=True"):
            kernels.fold_all(acc, [fine, partial], None)
        assert_same(acc, kernels.identity((1, 1), MapSet(PoseForm.EXPLICIT)))

    def test_read_only_inputs_are_accepted_and_unchanged(self, kernels):
        partial = one_pixel(1.0, self.angles, 2, 3, 4)
        for array in (partial.mip, *partial.pose, partial.correlation_sum):
            array.flags.writeable = False
        kernels.fold_all(kernels.identity((1, 1), MapSet(PoseForm.EXPLICIT)), [partial], None)
        assert partial.correlation_squared_sum.flags.writeable
        assert partial.mip[0, 0] == 1.0


def test_cpu_refuses_arrays_that_it_cannot_read_as_they_are():
    cpu, maps = load("cpu"), MapSet(PoseForm.EXPLICIT)
    acc, fine = cpu.identity((4, 4), maps), as_partial(cpu.identity((4, 4), maps))
    fine.mip[...] = 1
    narrow = np.zeros((4, 8), np.float32)[:, ::2]
    with pytest.raises(ValueError, match="C-contiguous"):
        cpu.fold_all(replace(acc, mip=narrow), [fine], None)
    unaligned = np.zeros(65, np.uint8)[1:].view(np.float32).reshape(4, 4)
    swapped = fine.mip.astype(">f4")
    read_only = fine.mip.copy()
    read_only.flags.writeable = False
    with pytest.raises(ValueError, match="writeable: False"):
        cpu.fold_all(replace(acc, mip=read_only), [fine], None)
    for mip in (narrow, unaligned, swapped, fine.mip.astype(np.float64)):
        with pytest.raises(ValueError, match="C-contiguous array of 16 values of float32"):
            cpu.fold_all(acc, [fine, replace(fine, mip=mip)], None)
    with pytest.raises(ValueError, match="16 values"):
        cpu.fold_all(acc, [fine, as_partial(cpu.identity((4, 5), maps))], None)
    with pytest.raises(ValueError, match="5 pose maps, got 4"):
        cpu.fold_all(acc, [fine, replace(fine, pose=fine.pose[:4])], None)
    assert_same(acc, cpu.identity((4, 4), maps))


def test_unknown_kernels_are_refused():
    with pytest.raises(InvalidInputError, match="cpu, reference"):
        load("abacus")
