"""Estimates of precision and recall against the truth of simulated searches."""

import functools

import numpy as np
import pytest

from ocelot_em import Simulation, estimate, find_peaks, merge, simulate
from ocelot_em.errors import InvalidInputError
from ocelot_em.particles.estimates import Estimates
from ocelot_em.particles.table import COLUMNS, GROUP_COLUMNS, ParticleTable, PickInfo
from ocelot_em.testing import noise


class Faint(Simulation):
    """A search whose particles reach from the noise to well above it."""

    @functools.cached_property
    def truth(self):
        table = super().truth.copy()
        table["amplitude"] = noise.generator(self.seed, 9).uniform(4.5, 9, len(table))
        return table


def merged_and_truth(place, seed):
    search = Faint((320, 330), n_partials=1, n_particles=90, seed=seed, template_box=20)
    simulate(place, search)
    merge(place / "RUN.zarr", place / "OUT.zarr")
    return place / "OUT.zarr", search.truth


def is_true(particles, truth):
    at = np.stack([particles["pos_y"], particles["pos_x"]], axis=1)[:, None]
    planted = np.stack([truth["y"], truth["x"]], axis=1)[None]
    return (np.abs(at - planted).max(axis=2) <= 2).any(axis=1)


@pytest.mark.parametrize(
    ("share", "lowest", "highest"), [(1.0, 0.15, 0.12), (noise.INDEPENDENT_SHARE, 0.45, 0.25)]
)
def test_estimates_are_near_the_truth(share, lowest, highest, tmp_path, monkeypatch):
    """Close for independent correlations; for others the precision is low, and the recall high."""
    monkeypatch.setattr(noise, "INDEPENDENT_SHARE", share)
    for seed in range(3):
        place, truth = merged_and_truth(tmp_path / f"{seed}", seed)
        # 30 of the pixels of noise are expected among them.
        particles = estimate(find_peaks(place, false_positives=30), place)
        right = np.cumsum(is_true(particles, truth))
        of_precision = particles["precision"] - right / np.arange(1, len(right) + 1)
        of_recall = particles["recall"] - right / right[-1]
        assert 55 < right[-1] < len(particles)
        assert -lowest < of_precision.min()
        assert of_precision.max() < 0.05
        assert of_recall.min() > -0.12
        assert of_recall.max() < highest


def test_arithmetic_by_hand():
    found = Estimates(np.array([9.0, 8, 7, 6]), np.array([1.0, 2, 4, 8]), np.array([0, 0, 1, 7.0]))
    assert found.precision == pytest.approx([1, 1, 0.75, 0.125])
    assert found.true == pytest.approx([1, 2, 3, 3])
    assert found.all_true == 2  # from 7 on, chance changes the number by more than a tenth
    assert found.recall == pytest.approx([0.5, 1, 1, 1])
    none = Estimates(np.array([5.0]), np.array([3.0]), np.array([30.0]))
    assert none.precision == 0
    assert np.isnan(none.recall).all()


def test_a_decoy_counts_the_false_ones(tmp_path):
    place, _ = merged_and_truth(tmp_path, 4)
    particles = find_peaks(place, cutoff=6.0)
    decoy = particles[1::3]
    found = estimate(particles, decoy=decoy)
    assert found["precision"][-1] == pytest.approx(1 - len(decoy) / len(particles))
    assert found["precision"][0] == 1
    assert found.to_csv(tmp_path / "P.csv").read_text().startswith("micrograph,rank,pos_y")
    assert type(found).read_csv(tmp_path / "P.csv")["recall"].tolist() == found["recall"].tolist()
    with pytest.raises(InvalidInputError, match="expected one, or a merged result"):
        estimate(particles)
    with pytest.raises(InvalidInputError, match=r"decoy .*name of a group \(none.*'mirror'"):
        estimate(particles, decoy="mirror")
    high = find_peaks(place, cutoff=8.0)
    by_high = estimate(particles, decoy=high)  # which has none below its own cutoff
    np.testing.assert_array_equal(np.isnan(by_high["precision"]), particles["scaled_mip"] < 8)
    with pytest.raises(InvalidInputError, match="decoy: expected particles picked by neg_log_p"):
        estimate(find_peaks(place, method="pvalue"), decoy=high)
    assert estimate(find_peaks(place, cutoff=-9.0), place)["precision"][-1] == 0
    by_mip = find_peaks(place, method="mip", cutoff=6.0)
    with pytest.raises(InvalidInputError, match="picked by mip"):
        estimate(by_mip, place)


def table(heights, groups=None, counts=1000, about=None):
    n, columns = len(heights), {**COLUMNS} | ({} if groups is None else {**GROUP_COLUMNS})
    del columns["neg_log_p"]
    found = {
        name: np.zeros(n, column.dtype.replace("str", "U9")) for name, column in columns.items()
    }
    found["scaled_mip"][:], found["total_correlations"][:] = heights, counts
    if groups is not None:
        found["group"][:] = groups
    return ParticleTable(found, about)


def test_a_decoy_stands_for_as_many_correlations_as_the_others_have():
    """A decoy that was searched with a sixth of their correlations finds a sixth as many."""
    names, counts = ["A", "A", "A", "mirror", "B"], [1000, 1000, 1000, 250, 500]
    particles = table([9.5, 9, 8, 7.5, 7], names, counts)
    found = estimate(particles, decoy="mirror")
    np.testing.assert_array_equal(found["precision"], [1, 1, 1, np.nan, 0])
    by_table = estimate(table([9.5, 9, 8, 7]), decoy=table([7.5], counts=500))
    np.testing.assert_array_equal(by_table["precision"], [1, 1, 1, 0.5])


def test_a_decoy_without_particles_leaves_all_true():
    about = PickInfo(
        "M", "gaussian", 6.0, 10, 1.0, None, (9, 9), (9, 9), "group", (("A", 6.0), ("mirror", 6.0))
    )
    particles = table([9, 8], ["A", "A"], about=about)
    assert estimate(particles, decoy="mirror")["precision"].tolist() == [1, 1]
    assert estimate(particles, decoy=table([]))["recall"].tolist() == [0.5, 1]
    with pytest.raises(InvalidInputError, match=r"a group \(A, mirror\), .* got 'C'"):
        estimate(particles, decoy="C")
