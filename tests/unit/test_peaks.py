"""Which candidates are peaks: against the obvious greedy choice, and Leopard-EM's own."""

import csv

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import SHARED
from exact_ranks import from_maps, histogram_of, joint_histogram_of
from ocelot_em.errors import InvalidInputError
from ocelot_em.io.import_options import read_search_space_file
from ocelot_em.kernels import suppression
from ocelot_em.kernels.compiling import Kernel
from ocelot_em.merge.stats.collected import CANDIDATE_FIELDS
from ocelot_em.model.histograms import MIP_AXIS, Z_AXIS
from ocelot_em.model.maps import POSES
from ocelot_em.model.regions import Region
from ocelot_em.particles import scanning
from ocelot_em.particles.gaussian import gaussian_cutoff
from ocelot_em.particles.peaks import select_peaks, subpixel_offsets
from ocelot_em.particles.significance import NEG_LOG_P_CUTOFF, PValueModel, gev_cutoff
from ocelot_em.particles.symmetry import rotation_between
from work import assert_linear, lines_of

VALID = np.s_[:377, :425]


def greedy(candidates, min_distance):
    """All pairs: (y, x, height) of the chosen, highest first."""
    chosen = []
    for y, x, height in sorted(candidates, key=lambda c: (-c[2], c[0], c[1])):
        near = ((y - v) ** 2 + (x - u) ** 2 < min_distance**2 for v, u, _ in chosen)
        if not np.isnan(height) and not any(near):
            chosen.append((y, x, height))
    return chosen


def choose(candidates, min_distance):
    y, x, height = (np.array(column) for column in zip(*candidates, strict=True))
    return [candidates[i] for i in select_peaks(y, x, height, min_distance)]


def clouds(heights, span=40, most=60):
    pixel = st.integers(0, span)
    return st.lists(st.tuples(pixel, pixel, heights), min_size=1, max_size=most)


few_heights = st.integers(0, 4).map(float)
any_height = st.floats(-20, 20, width=32)
distances = st.one_of(st.sampled_from([0, 1, 2, 5, 5.0, 10]), st.floats(0, 30))


@given(st.one_of(clouds(few_heights), clouds(any_height)), distances)
def test_it_is_the_greedy_choice(candidates, min_distance):
    assert choose(candidates, min_distance) == greedy(candidates, min_distance)


@given(clouds(few_heights, span=12, most=150), st.sampled_from([1.5, 3, 5]))
def test_it_is_the_greedy_choice_in_a_crowd(candidates, min_distance):
    assert choose(candidates, min_distance) == greedy(candidates, min_distance)


@given(st.data(), clouds(few_heights), distances)
def test_the_order_of_candidates_does_not_matter(data, candidates, min_distance):
    shuffled = data.draw(st.permutations(candidates))
    assert choose(shuffled, min_distance) == choose(candidates, min_distance)


@given(clouds(few_heights), st.integers(-(10**6), 10**6), st.integers(-(10**6), 10**6))
def test_where_the_map_begins_does_not_matter(candidates, dy, dx):
    moved = [(y + dy, x + dx, height) for y, x, height in candidates]
    assert choose(moved, 5) == [(y + dy, x + dx, h) for y, x, h in choose(candidates, 5)]


@given(clouds(any_height), st.floats(0.1, 30))
def test_peaks_keep_their_distance_and_nobody_else_could_be_one(candidates, min_distance):
    peaks = choose(candidates, min_distance)
    for i, (y, x, height) in enumerate(peaks):
        assert all((y - v) ** 2 + (x - u) ** 2 >= min_distance**2 for v, u, _ in peaks[:i])
        assert height <= min((h for *_, h in peaks[:i]), default=np.inf)
    for y, x, height in set(candidates) - set(peaks):
        assert any(
            (y - v) ** 2 + (x - u) ** 2 < min_distance**2 and h >= height for v, u, h in peaks
        )


orientations = st.tuples(*[st.sampled_from([0.0, 20.0, 90.0, 180.0, 200.0])] * 3)
posed = st.tuples(
    st.integers(0, 12), st.integers(0, 12), few_heights, orientations, st.integers(0, 1)
)


@given(
    st.lists(posed, min_size=1, max_size=60),
    st.sampled_from([0, 3, 6.5]),
    st.sampled_from([0.0, 30.0, 95.0, 180.0]),
    st.randoms(),
)
def test_by_orientation_it_is_the_greedy_choice_too(candidates, min_distance, angle, random):
    """Also where candidates share a pixel, and whatever their order.

    Orientations of different templates are not compared: their distance decides.
    """

    def is_suppressed(one, other):
        (y, x, _, pose, template), (v, u, _, peak, its_template) = one, other
        turn = rotation_between(*(np.array(pair)[:, None] for pair in zip(pose, peak, strict=True)))
        is_similar = turn[0] <= angle + 1e-3 or template != its_template
        return (y - v) ** 2 + (x - u) ** 2 < min_distance**2 and is_similar

    chosen = []
    for one in sorted(candidates, key=lambda c: (-c[2], c[0], c[1], *c[3:])):
        if not any(is_suppressed(one, peak) for peak in chosen):
            chosen.append(one)
    random.shuffle(candidates)
    y, x, height, poses, template = (np.array(own) for own in zip(*candidates, strict=True))
    found = select_peaks(y, x, height, min_distance, (*poses.T, template), angle)
    assert [candidates[i] for i in found] == chosen


def test_an_unknown_orientation_is_suppressed():
    unknown = (np.array([0.0, np.nan]), np.array([0.0, 0.0]), np.array([0.0, 0.0]))
    assert select_peaks([5, 5], [5, 6], [2.0, 1.0], 5, unknown, 10).tolist() == [0]


def test_the_distance_is_strict_and_euclidean():
    y, x, height = np.array([10, 13, 10, 12]), np.array([10, 14, 15, 14]), np.arange(4, 0, -1.0)
    assert select_peaks(y[:3], x[:3], height[:3], 5).tolist() == [0, 1]  # 5, 5 and sqrt(10) away
    assert select_peaks(y, x, height, 5).tolist() == [0, 1]
    assert select_peaks(y, x, height, 5.001).tolist() == [0]


def test_what_is_suppressed_suppresses_nobody():
    x = np.array([0, 4, 8])
    assert select_peaks(x * 0, x, np.array([3.0, 2.0, 1.0]), 5).tolist() == [0, 2]


def test_ties_are_broken_by_y_then_x():
    y, x = np.array([3, 3, 1, 1]), np.array([0, 2, 9, 4])
    assert select_peaks(y, x, np.full(4, 7.0), 0).tolist() == [3, 2, 0, 1]
    assert select_peaks(y, x, np.full(4, 7.0), 100).tolist() == [3]
    # An equal height at the very same pixel is the same peak.
    assert select_peaks([5, 5], [5, 5], [1.0, 1.0], 0.5).size == 1


def test_no_and_one_candidate():
    nothing = select_peaks([], [], [], 5)
    assert nothing.dtype == np.int64
    assert nothing.shape == (0,)
    one = select_peaks(np.array([3], np.uint16), np.array([4], np.uint16), [np.float32(7)], 5)
    assert one.dtype == np.int64
    assert one.tolist() == [0]


def test_a_height_that_is_nan_is_no_candidate():
    y = np.array([0, 1, 2, 30])
    height = np.array([np.nan, 1.0, np.inf, np.nan], np.float32)
    assert select_peaks(y, y, height, 0).tolist() == [2, 1]
    assert select_peaks(y, y, height, 5).tolist() == [2]
    assert select_peaks(y, y, np.full(4, np.nan), 5).size == 0


def test_an_infinite_distance_leaves_the_highest():
    assert select_peaks([0, 9000], [0, 0], [1.0, 2.0], np.inf).tolist() == [1]


def test_candidates_that_cannot_be():
    with pytest.raises(InvalidInputError) as caught:
        select_peaks(np.zeros(2), np.zeros(3, int), np.zeros(2), np.nan)
    assert [problem.partition(":")[0] for problem in caught.value.problems] == [
        "y, x, height",
        "y",
        "min_distance_px",
    ]
    with pytest.raises(InvalidInputError, match="one-dimensional arrays of equal length"):
        select_peaks([[1]], [[1]], [[1.0]], 5)
    with pytest.raises(InvalidInputError, match="0 or more pixels, got -1"):
        select_peaks([1], [1], [1.0], -1)


def candidates_of_kind(kind, n, rng):
    if kind == "ramp":
        return np.zeros(n, int), np.arange(n), np.arange(n, dtype=float)
    y, x = rng.integers(0, int(32.768 * n**0.5), (2, n))  # as dense for any n
    if kind == "crowded":  # 5000 around each particle
        centre = np.arange(n) % -(-n // 5000)
        y, x = y[centre] + rng.integers(-40, 41, n), x[centre] + rng.integers(-40, 41, n)
    return y, x, rng.normal(8, 1, n)


KINDS = ["scattered", "crowded", "ramp"]


@pytest.mark.parametrize("kind", KINDS)
def test_work_is_in_proportion_to_the_candidates(kind, monkeypatch):
    for name, kernel in vars(suppression).copy().items():
        if isinstance(kernel, Kernel):  # in Python, whose lines are counted
            monkeypatch.setattr(suppression, name, kernel.function)

    def work(n):
        candidates = candidates_of_kind(kind, n, np.random.default_rng(n))
        return lines_of(lambda: select_peaks(*candidates, 5))

    assert_linear(work, 500)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_million_candidates(kind, rng):
    n = 10**6
    peaks = select_peaks(*candidates_of_kind(kind, n, rng), 5)
    assert peaks.size == (n // 5 if kind == "ramp" else np.unique(peaks).size)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the whole real search is not on this machine")
@pytest.mark.parametrize(
    ("method", "exact"), [("zscore", True), ("gev", False), ("pvalue", True), ("pvalue", False)]
)
def test_leopard_em_picks_the_same(method, exact):
    with np.load(SHARED / "A_official_full.npz", allow_pickle=False) as file:
        maps = {name: file[name] for name in file if file[name].ndim}
    mip, z = maps["mip"][VALID], maps["scaled_mip"][VALID]
    if method == "pvalue":
        fine = histogram_of(mip, MIP_AXIS), histogram_of(z, Z_AXIS)
        model = (
            from_maps(mip, z)
            if exact
            else PValueModel.from_histogram(joint_histogram_of(mip, z), *fine)
        )
        height, cutoff = model.neg_log_p(mip, z), NEG_LOG_P_CUTOFF
    elif method == "gev":
        height, cutoff = z, gev_cutoff(histogram_of(z, Z_AXIS))
    else:
        height, cutoff = z, gaussian_cutoff(z.size, 129_600)
        assert cutoff == pytest.approx(6.4726, abs=5e-5)
    y, x = np.nonzero(height >= cutoff)
    chosen = select_peaks(y, x, height[y, x], 5)
    y, x = y[chosen], x[chosen]

    with (SHARED / f"A_official_peaks_{method}.csv").open(encoding="utf-8") as file:
        theirs = list(csv.DictReader(file))
    assert [(int(row["pos_y"]), int(row["pos_x"])) for row in theirs] == list(
        zip(y.tolist(), x.tolist(), strict=True)
    )
    space = read_search_space_file(SHARED / "search_space.npz")
    poses = dict(zip(POSES, space.decode(maps["best_global_index"]), strict=True))
    for name in theirs[0]:
        values = [float(row[name]) for row in theirs]
        if name == "total_correlations":
            assert set(values) == {129_600}
        elif not name.startswith("pos_"):
            ours = {"relative_defocus": "best_defocus"}.get(name, f"best_{name}")
            plane = poses[ours] if ours in poses else maps[name]
            np.testing.assert_allclose(plane[y, x], values, rtol=1e-6, err_msg=name)


def paraboloid(dy, dx, curvature=(1.0, 2.0)):
    y, x = np.mgrid[-1:2, -1:2]
    return 9 - curvature[0] * (y - dy) ** 2 - curvature[1] * (x - dx) ** 2


@given(st.floats(-0.5, 0.5), st.floats(-0.5, 0.5), st.floats(0.01, 10), st.floats(0.01, 10))
def test_a_parabola_is_found_where_it_is(dy, dx, a, b):
    found = subpixel_offsets(paraboloid(dy, dx, (a, b)))
    np.testing.assert_allclose(found, (dy, dx), atol=1e-9)


@given(st.lists(st.floats(allow_nan=True, width=32), min_size=9, max_size=9))
def test_offsets_are_within_the_pixel(values):
    around = np.array(values).reshape(3, 3)
    for offset, three in zip(subpixel_offsets(around), (around[:, 1], around[1]), strict=True):
        assert -0.5 <= offset <= 0.5
        if not np.isfinite(three).all():
            assert offset == 0


def test_offsets_of_many_peaks_at_once():
    around = np.stack([paraboloid(0.25, -0.125), np.full((3, 3), 4.0), paraboloid(0.9, 0)])
    around[2, 1, 2] = np.nan  # no neighbour to the right
    dy, dx = subpixel_offsets(around.astype(np.float32))
    np.testing.assert_allclose(dy, [0.25, 0, 0.5], atol=1e-6)  # a plateau; a peak next door
    np.testing.assert_allclose(dx, [-0.125, 0, 0], atol=1e-6)
    assert subpixel_offsets(np.zeros((0, 3, 3)))[0].shape == (0,)
    with pytest.raises(InvalidInputError, match=r"shape \(\.\.\., 3, 3\) .* got \(3,\)"):
        subpixel_offsets([1, 2, 1])


def test_a_valley_has_no_peak():
    dy, dx = subpixel_offsets(-paraboloid(0.1, 0.1))
    assert (dy, dx) == (0, 0)


def test_a_signalling_nan_of_a_damaged_map_is_one_of_a_candidate():
    z, psi = np.full((1, 2), 9, np.float32), np.frombuffer(b"\x01\x00\x80\x7f" * 2, np.float32)
    maps = {"scaled_mip": z, "best_psi": psi.reshape(1, 2)}
    rows = scanning._rows_at(np.ones((1, 2), np.bool_), z, maps, Region(0, 1, 0, 2))
    assert np.isnan(rows[:, CANDIDATE_FIELDS.index("best_psi")]).all()
    assert (rows[:, CANDIDATE_FIELDS.index("scaled_mip")] == 9).all()
