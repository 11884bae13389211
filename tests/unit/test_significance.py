"""Cutoffs and p-values: known answers, exact ranks against histograms, Leopard-EM's own fit."""

import math
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.stats import genextreme, norm, rankdata

from conftest import DATA, SHARED
from exact_ranks import from_maps, histogram_of, joint_histogram_of
from ocelot_em.errors import InvalidInputError
from ocelot_em.model.histograms import (
    JOINT_MIP_AXIS,
    JOINT_Z_AXIS,
    MIP_AXIS,
    Z_AXIS,
    Axis,
)
from ocelot_em.particles.gaussian import gaussian_cutoff
from ocelot_em.particles.significance import (
    EXACT_PIXELS,
    GEV_LIMIT,
    NEG_LOG_P_CUTOFF,
    PValueModel,
    fit_gev,
    gev_cutoff,
)

needs_whole_search = pytest.mark.skipif(
    not SHARED.is_dir(), reason="the whole real search is not on this machine"
)
NOT_SEARCHED = (-np.inf, np.nan)  # mip and z


def real_maps(file, region=np.s_[:, :]):
    with np.load(file, allow_pickle=False) as maps:
        return maps["mip"][region], maps["scaled_mip"][region]


def simulated_maps(rng, pixels=200_000, particles=30):
    """Noise whose standard deviation varies over the map, as it does where ice does; particles."""
    std = rng.normal(1.1, 0.1, pixels)
    z = genextreme.rvs(0.04, loc=4, scale=0.24, size=pixels, random_state=rng)
    z[:particles] += rng.uniform(1, 8, particles)
    return (z * std).astype(np.float32), z.astype(np.float32)


def from_histograms(mip, z):
    return PValueModel.from_histogram(
        joint_histogram_of(mip, z), histogram_of(mip, MIP_AXIS), histogram_of(z, Z_AXIS)
    )


# Histograms


@given(st.lists(st.floats(-3, 8, width=16), max_size=50))
def test_bins_are_half_open(values):
    axis = Axis(-1.0, 1 / 4, 20)
    histogram = histogram_of(np.array(values), axis)
    expected = [
        sum(low <= v < high for v in values)
        for low, high in zip(axis.edges[:-1], axis.edges[1:], strict=True)
    ]
    assert histogram.counts.tolist() == expected
    assert histogram.underflow == sum(v < -1 for v in values)
    assert histogram.overflow == sum(v >= axis.high for v in values)
    assert histogram.pixels == len(values)


def test_a_float32_just_below_an_edge_stays_below_it():
    edge = np.float32(4)
    below = np.nextafter(edge, np.float32(0))
    assert MIP_AXIS.bin_of(np.array([below, edge])).tolist() == [8 * 1024 - 1, 8 * 1024]


def test_pixels_that_were_not_searched_are_not_counted():
    mip, z = np.array([[4.0, -np.inf], [5.0, 6.0]]), np.array([[3.0, np.nan], [0.0, 99.0]])
    assert histogram_of(mip, MIP_AXIS).pixels == histogram_of(z, Z_AXIS).pixels == 3
    joint = joint_histogram_of(mip, z)
    assert joint.pixels == 3
    assert joint.counts[10 * 16, -1] == 1  # 99 is beyond the axis


@given(st.integers(0, 40))
def test_histograms_of_tiles_add_up(cut):
    rng = np.random.default_rng(1)
    mip, z = rng.normal(4, 40, 40), rng.normal(4, 40, 40)
    tiles = (np.s_[:cut], np.s_[cut:])
    first, second, whole = (histogram_of(z[part], Z_AXIS) for part in (*tiles, np.s_[:]))
    np.testing.assert_array_equal(first.counts + second.counts, whole.counts)
    assert first.underflow + second.underflow == whole.underflow
    assert first.overflow + second.overflow == whole.overflow
    assert first.pixels + second.pixels == whole.pixels == z.size
    left, right, both = (joint_histogram_of(mip[part], z[part]) for part in (*tiles, np.s_[:]))
    np.testing.assert_array_equal(left.counts + right.counts, both.counts)


@given(hnp.arrays(np.float32, st.integers(1, 60), elements=st.floats(-2, 12, width=32)))
def test_ranks_from_bins_are_ranks_within_the_bin(values):
    histogram = histogram_of(values, Axis(0.0, 1 / 2, 20))
    order = np.sort(values)
    below = histogram.below(order)
    assert (np.diff(below) >= 0).all()
    bins = histogram.axis.bin_of(order)
    exact = rankdata(order) - 0.5
    in_bin = np.array([(bins == b).sum() for b in bins])
    assert (np.abs(below - exact) <= np.maximum(in_bin - 1, 0)).all()


# Cutoffs


def test_the_gaussian_cutoff_of_the_real_search():
    assert gaussian_cutoff(377 * 425, 129_600) == pytest.approx(6.4726, abs=5e-5)


@pytest.mark.parametrize("shape", [-0.05, 0.0, 0.08])
def test_gev_is_found_again(shape, rng):
    z = genextreme.rvs(shape, loc=4, scale=0.25, size=400_000, random_state=rng)
    c, loc, scale = fit_gev(histogram_of(z, Z_AXIS))
    assert c == pytest.approx(shape, abs=0.005)
    assert (loc, scale) == pytest.approx((4, 0.25), abs=0.002)


def test_gev_of_bins_is_that_of_values(rng):
    z = genextreme.rvs(0.04, loc=4, scale=0.25, size=20_000, random_state=rng)
    unbinned = genextreme.isf(1 / z.size, *genextreme.fit(z))
    for width, tolerance in ((1 / 1024, 0.001), (1 / 256, 0.002), (1 / 16, 0.02)):
        axis = Axis(0.0, width, int(16 / width))
        assert gev_cutoff(histogram_of(z, axis)) == pytest.approx(unbinned, abs=tolerance)


def test_gev_ignores_particles_and_pixels_without_variance(rng):
    z = genextreme.rvs(0.04, loc=4, scale=0.25, size=20_000, random_state=rng)
    others = np.concatenate([rng.uniform(GEV_LIMIT, 200, 500), np.zeros(5000), [-0.1, np.nan]])
    alone = fit_gev(histogram_of(z, Z_AXIS))
    assert fit_gev(histogram_of(np.concatenate([z, others]), Z_AXIS)) == alone


def test_gev_cutoff_is_exceeded_as_often_as_asked(rng):
    histogram = histogram_of(simulated_maps(rng, particles=0)[1], Z_AXIS)
    fit = fit_gev(histogram)
    for false_positives in (0.01, 1.0, 100.0):
        cutoff = gev_cutoff(histogram, false_positives)
        assert genextreme.sf(cutoff, *fit) * histogram.pixels == pytest.approx(false_positives)


@needs_whole_search
def test_gev_cutoff_of_the_real_search():
    _, z = real_maps(SHARED / "A_official_full.npz", np.s_[:377, :425])
    # What Leopard-EM 1.2's fit to the single values gives; see the next test.
    assert gev_cutoff(histogram_of(z, Z_AXIS)) == pytest.approx(6.2776, abs=5e-4)
    assert gev_cutoff(histogram_of(z, Axis(0.0, 1 / 16, 256))) == pytest.approx(6.28, abs=5e-3)


@needs_whole_search
@pytest.mark.slow
def test_leopard_em_fits_the_same():
    _, z = real_maps(SHARED / "A_official_full.npz", np.s_[:377, :425])
    unbinned = genextreme.isf(1 / z.size, *genextreme.fit(z[z <= GEV_LIMIT]))
    assert unbinned == pytest.approx(6.2776, abs=1e-4)


def test_gev_cannot_be_fitted():
    for z in (np.zeros(100), np.full(100, 4.0), np.array([])):
        with pytest.raises(InvalidInputError, match=r"at least 3 bins .*, got [01]"):
            fit_gev(histogram_of(z, Z_AXIS))
    with pytest.raises(InvalidInputError, match="fits its 30 pixels"):
        fit_gev(histogram_of(np.repeat([1.0, 4.0, 8.0], 10), Z_AXIS))
    histogram = histogram_of(np.linspace(3, 5, 10), Z_AXIS)
    for false_positives in (0, -1, 10, math.nan):
        with pytest.raises(InvalidInputError, match="less than the 10 pixels"):
            gev_cutoff(histogram, false_positives)


# p-values


def by_eigenvectors(mip, z):
    """-ln p of every pixel, the long way: rotate to the axes of the Gaussian, scale, measure."""
    scores = norm.ppf([(rankdata(v) - 0.5) / v.size for v in (z, mip)])
    variances, axes = np.linalg.eigh(scores @ scores.T / z.size)
    whitened = (axes.T @ scores) / np.sqrt(variances)[:, None]
    sides = (axes.T / np.sqrt(variances)[:, None]).T  # where the axes of the scores come to lie
    cosine = sides[0] @ sides[1] / np.linalg.norm(sides[0]) / np.linalg.norm(sides[1])
    p = np.exp(-0.5 * (whitened**2).sum(axis=0)) * math.acos(cosine) / (2 * math.pi)
    return np.where((scores > 0).all(axis=0), -np.log(p), 0)


def test_neg_log_p_is_that_of_the_rotated_gaussian(rng):
    mip, z = simulated_maps(rng, 20_000)
    np.testing.assert_allclose(
        from_maps(mip, z).neg_log_p(mip, z), by_eigenvectors(mip, z), atol=1e-8
    )


@pytest.mark.parametrize("correlation", [-0.5, 0.0, 0.7, 0.95])
def test_p_is_the_share_of_noise_further_out_in_the_quadrant(correlation, rng):
    n = 200_000
    u = rng.normal(size=n)
    v = correlation * u + math.sqrt(1 - correlation**2) * rng.normal(size=n)
    model = from_maps(u, v)
    assert model.correlation == pytest.approx(correlation, abs=0.01)
    neg_log_p = model.neg_log_p(u, v)
    for p in (0.1, 0.01):
        assert np.mean(neg_log_p >= -math.log(p)) == pytest.approx(p, rel=0.1)


def test_equal_pixels_share_a_rank_and_other_values_stand_between():
    mip = z = np.array([1.0, 2.0, 2.0, 3.0])
    ranks = from_maps(mip, z).z_ranks
    assert ranks.below([1, 2, 3]).tolist() == [0.5, 2, 3.5]
    assert ranks.below([0, 1.5, 9]).tolist() == [0, 1, 4]


def test_pixels_that_were_not_searched_change_nothing(rng):
    mip, z = simulated_maps(rng, 5000)
    hole_mip, hole_z = (
        np.append(m, [v] * 700) for m, v in zip((mip, z), NOT_SEARCHED, strict=True)
    )
    for make in (from_maps, from_histograms):
        without, with_holes = make(mip, z), make(hole_mip, hole_z)
        expected = without.neg_log_p(mip, z)
        found = with_holes.neg_log_p(hole_mip, hole_z)
        np.testing.assert_array_equal(found[:5000], expected)
        assert np.isnan(found[5000:]).all()


def test_results_have_the_shape_of_the_map(rng):
    mip, z = (m.reshape(20, 250) for m in simulated_maps(rng, 5000))
    model = from_histograms(mip, z)
    assert model.neg_log_p(mip, z).shape == (20, 250)
    assert model.neg_log_p(mip[0, 0], z[0, 0]).shape == ()
    assert model.neg_log_p([], []).shape == (0,)
    copy = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(copy.neg_log_p(mip, z), model.neg_log_p(mip, z))


def histogram_error(mip, z, far=1):
    """Greatest difference of -ln p from histograms around the cutoff, and of the correlation."""
    exact, binned = from_maps(mip, z), from_histograms(mip, z)
    expected, found = exact.neg_log_p(mip, z), binned.neg_log_p(mip, z)
    assert ((found > 0) == (expected > 0)).mean() > 0.999
    error = np.abs(found - expected)
    assert error[np.minimum(expected, found) > 0].max() < far  # the order of the very highest
    decisive = np.abs(expected - NEG_LOG_P_CUTOFF) < 1
    assert decisive.any()
    return error[decisive].max(), abs(binned.correlation - exact.correlation)


@pytest.mark.parametrize("seed", range(4))
def test_error_of_histograms_on_simulated_maps(seed):
    error, correlation_error = histogram_error(*simulated_maps(np.random.default_rng(seed)))
    assert error < 0.03
    assert correlation_error < 1.5e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spread", "mip_scale"), [(0.02, 1), (0.1, 1), (0.3, 1), (0.1, 0.1), (0.1, 3), (0.01, 1)]
)
def test_error_of_histograms_on_the_smallest_maps_that_they_rank(spread, mip_scale, rng):
    """Other spreads of mean and standard deviation, at the number of pixels that the docs state."""
    std = np.clip(rng.normal(1, spread, EXACT_PIXELS), 0.2, None)
    z = genextreme.rvs(0.04, loc=4, scale=0.24, size=EXACT_PIXELS, random_state=rng)
    mip = mip_scale * (z * std + rng.normal(0, spread, z.size))
    error, correlation_error = histogram_error(mip.astype(np.float32), z.astype(np.float32), 3)
    assert error < 0.06
    assert correlation_error < 3e-3


def test_a_model_from_pixels_is_that_of_the_whole_maps(rng):
    mip, z = (m.reshape(40, 50) for m in simulated_maps(rng, 2000))
    mip[3], z[3] = NOT_SEARCHED
    ours, theirs = PValueModel.from_pixels(mip, z), from_maps(mip, z)
    assert ours.correlation == pytest.approx(theirs.correlation, abs=1e-12)
    np.testing.assert_allclose(ours.neg_log_p(mip, z), theirs.neg_log_p(mip, z), rtol=1e-9)


def test_error_of_histograms_on_a_crop_of_a_real_search():
    error, correlation_error = histogram_error(*real_maps(DATA / "A_crop_official.npz"))
    assert error < 0.03
    assert correlation_error < 5e-4


@needs_whole_search
def test_error_of_histograms_on_a_real_search():
    error, correlation_error = histogram_error(
        *real_maps(SHARED / "A_official_full.npz", np.s_[:377, :425])
    )
    assert error < 0.015
    assert correlation_error < 2e-4


def test_error_of_histograms_with_pixels_without_variance(rng):
    mip, z = simulated_maps(rng)
    z[-60_000:] = 0
    error, correlation_error = histogram_error(mip, z)
    assert error < 0.05
    assert correlation_error < 5e-3


def test_maps_that_say_the_same_have_p_values_too(rng):
    _, z = simulated_maps(rng, 50_000)
    for model in (from_maps(z, z), from_histograms(z, z)):
        assert model.correlation == 0.999
        neg_log_p = model.neg_log_p(z, z)
        rank = rankdata(z)
        assert np.argmax(neg_log_p) == np.argmax(rank)
        expected = norm.isf((z.size - rank + 0.5) / z.size) ** 2 / 2  # one value instead of two
        high = neg_log_p > 4
        np.testing.assert_allclose(neg_log_p[high], expected[high] + math.log(2), atol=0.1)


def test_maps_of_equal_pixels_have_no_significant_one():
    mip, z = np.full(50, 5.0), np.zeros(50)
    for make in (from_maps, from_histograms):
        assert make(mip, z).neg_log_p(mip, z).tolist() == [0] * 50
    one = from_maps([5.0], [4.0])
    assert one.neg_log_p([5.0], [4.0]).tolist() == [0]


def test_particles_beyond_the_axes_are_the_highest(rng):
    mip, z = simulated_maps(rng, 20_000)
    mip[:3], z[:3] = 500, 400
    neg_log_p = from_histograms(mip, z).neg_log_p(mip, z)
    assert (neg_log_p[:3] > NEG_LOG_P_CUTOFF).all()
    assert neg_log_p[:3].min() == neg_log_p.max()


def test_p_values_that_cannot_be():
    mip, z = np.linspace(3, 5, 40), np.linspace(2, 6, 40)
    joint, fine_mip, fine_z = (
        joint_histogram_of(mip, z),
        histogram_of(mip, MIP_AXIS),
        histogram_of(z, Z_AXIS),
    )
    with pytest.raises(InvalidInputError, match="40 in the joint histogram, 40 in the mip"):
        PValueModel.from_histogram(joint, fine_mip, histogram_of(z[1:], Z_AXIS))
    with pytest.raises(InvalidInputError, match="0 in the joint histogram"):
        from_histograms([], [])
    with pytest.raises(InvalidInputError, match=r"z histogram: expected most .* got 40 beyond"):
        from_histograms(mip, z + 100)
    wide = joint_histogram_of(mip, z, JOINT_MIP_AXIS, Axis(0, 4, 8))
    with pytest.raises(InvalidInputError, match=r"scaled_mip: expected bins .* bins of 4 that"):
        PValueModel.from_histogram(wide, fine_mip, fine_z)
    assert JOINT_Z_AXIS.high <= Z_AXIS.high
