import csv
import dataclasses
import math
from functools import cache
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from conftest import SHARED
from ocelot_em.errors import InvalidInputError, OutputExistsError
from ocelot_em.kernels import reference
from ocelot_em.merge.stats.collected import candidate_level
from ocelot_em.model.maps import (
    INDEX,
    MIP,
    POSES,
    SCALED_MIP,
    SQUARED_SUM,
    SUM,
    MapSet,
    PartialMaps,
    PoseForm,
)
from ocelot_em.model.regions import Region
from ocelot_em.particles.gaussian import gaussian_cutoff
from ocelot_em.testing.noise import INDEPENDENT_SHARE, maximum_of_normals
from ocelot_em.testing.recovery import (
    TRUTH_DTYPE,
    TRUTH_POSES,
    Recovery,
    compare_with_truth,
)
from ocelot_em.testing.simulation import MIN_SPACING_PX, Simulation, simulate, write_truth

SHAPE = (530, 600)
SIMULATION = Simulation(SHAPE, n_partials=3, n_particles=40, seed=11, form=PoseForm.INDEXED)
EXPLICIT = dataclasses.replace(SIMULATION, form=PoseForm.EXPLICIT)


@cache
def whole(simulation, partial):
    return simulation.partial_block(partial, Region.whole(simulation.shape))


def merged(simulation):
    """All partials merged by the oracle."""
    maps = MapSet(simulation.form)
    space = simulation.search_space if simulation.form is PoseForm.INDEXED else None
    acc = reference.identity(simulation.shape, maps)
    for number, count in enumerate(simulation.counts):
        block = whole(simulation, number)
        partial = PartialMaps(
            block[MIP],
            tuple(block[name] for name in maps.pose),
            block[SUM],
            block[SQUARED_SUM],
            count,
            number,
        )
        assert not reference.fold(acc, partial, space)
    return reference.finalise(acc, maps, space)


def reader(maps):
    return lambda name, region: maps[name][region.slices]


def spans(length):
    return st.tuples(st.integers(0, length), st.integers(0, length)).map(sorted)


@given(spans(SHAPE[0]), spans(SHAPE[1]), st.integers(0, 2), st.booleans())
def test_a_pixel_does_not_depend_on_how_the_map_is_cut(rows, columns, partial, indexed):
    simulation = SIMULATION if indexed else EXPLICIT
    region = Region(*rows, *columns)
    maps = simulation.partial_block(partial, region)
    assert tuple(maps) == MapSet(simulation.form).partial
    for name, expected in whole(simulation, partial).items():
        assert maps[name].dtype == expected.dtype
        np.testing.assert_array_equal(maps[name], expected[region.slices])


def test_a_pixel_does_not_depend_on_the_size_of_the_map():
    small = Simulation((300, 280), 2, 0, seed=5)
    large = dataclasses.replace(small, shape=(900, 900))
    region = Region(200, 300, 100, 280)
    for name, values in small.partial_block(1, region).items():
        np.testing.assert_array_equal(values, large.partial_block(1, region)[name])


def test_equal_seeds_give_equal_maps_and_others_do_not():
    region = Region(250, 262, 0, 20)
    again = dataclasses.replace(SIMULATION)
    other = dataclasses.replace(SIMULATION, seed=12)
    np.testing.assert_array_equal(again.truth, SIMULATION.truth)
    assert not np.array_equal(other.truth, SIMULATION.truth)
    for name, values in SIMULATION.partial_block(0, region).items():
        np.testing.assert_array_equal(again.partial_block(0, region)[name], values)
        assert not np.array_equal(other.partial_block(0, region)[name], values)
        assert not np.array_equal(SIMULATION.partial_block(1, region)[name], values)


def test_blocks_differ():
    mip = whole(SIMULATION, 0)[MIP]
    assert (mip[:256, :256] == mip[256:512, :256]).mean() < 0.001
    assert (mip[:256, :256] == mip[:256, 256:512]).mean() < 0.001


def test_explicit_and_indexed_are_the_same_search():
    for partial in range(3):
        indexed, explicit = whole(SIMULATION, partial), whole(EXPLICIT, partial)
        for name in (MIP, SUM, SQUARED_SUM):
            np.testing.assert_array_equal(indexed[name], explicit[name])
        poses = SIMULATION.search_space.decode(indexed[INDEX])
        for name, pose in zip(POSES, poses, strict=True):
            np.testing.assert_array_equal(explicit[name], pose)


@pytest.mark.parametrize("n_partials", [1, 2, 3, 8, 64, 1000])
@pytest.mark.parametrize("factor", [1, 159])
def test_counts_are_exact_unequal_and_sum_to_the_search_space(n_partials, factor):
    simulation = Simulation((64, 64), n_partials, 0, 0, projections_per_pose=factor)
    counts = simulation.counts
    assert all(type(count) is int and count > 0 for count in counts)
    assert sum(counts) == simulation.search_space.n_poses * factor
    assert n_partials == 1 or len(set(counts)) > 1
    ranges = simulation.orientation_ranges
    assert ranges[0][0] == 0
    assert ranges[-1][1] == len(simulation.search_space.euler_angles)
    assert all(before[1] == after[0] for before, after in pairwise(ranges))


def test_poses_are_drawn_from_all_of_the_partials_own_share():
    space = SIMULATION.search_space
    for partial, (start, end) in enumerate(SIMULATION.orientation_ranges):
        index = whole(SIMULATION, partial)[INDEX]
        assert index.min() >= 0
        assert index.max() < space.n_poses
        n_orientations = len(space.euler_angles)
        others = n_orientations * np.arange(space.n_poses // n_orientations)
        share = (others[:, None] + np.arange(start, end)).ravel()
        background = index[~np.isin(index, SIMULATION.truth["global_index"])]
        assert np.isin(background, share).all()
        # Of the share, exp(-pixels / poses) is expected to stay undrawn, at random.
        drawn = len(np.unique(background)) / len(share)
        assert drawn == pytest.approx(1 - math.exp(-index.size / len(share)), abs=0.003)


@pytest.mark.parametrize("n", [1, 2, 15, 129_600, 20_500_000])
def test_the_table_is_accurate(n):
    rng = np.random.default_rng(n)
    draws = np.concatenate([rng.exponential(size=500), np.exp2(rng.uniform(-53, 5, 500)), [1.0]])
    normal = NormalDist()
    expected = []
    for e in (draws / n).tolist():
        p = -math.expm1(-e)
        expected.append(-normal.inv_cdf(p) if p < 0.5 else normal.inv_cdf(math.exp(-e)))
    np.testing.assert_allclose(maximum_of_normals(draws, n), expected, atol=1e-4, rtol=0)


def test_extreme_draws_stay_finite():
    draws = np.array([0.0, 5e-324, 1e-300, 63.9, 1e300])
    assert np.isfinite(maximum_of_normals(draws, 15)).all()
    assert (np.diff(maximum_of_normals(np.geomspace(1e-15, 60, 1000), 15)) <= 0).all()


def test_the_maximum_is_distributed_as_brute_force():
    n, size = 40, 20_000
    rng = np.random.default_rng(3)
    brute = np.sort(rng.standard_normal((size, n)).max(axis=1))
    fast = np.sort(maximum_of_normals(rng.standard_exponential(size), n))
    both = np.concatenate([brute, fast])
    distance = np.abs(np.searchsorted(brute, both) - np.searchsorted(fast, both)).max() / size
    assert distance < 1.63 * math.sqrt(2 / size)  # Kolmogorov-Smirnov, 1 %


def test_maps_have_the_statistics_of_a_search():
    noise = dataclasses.replace(SIMULATION, n_particles=0)
    for partial, count in enumerate(noise.counts):
        maps = {name: m.astype(np.float64) for name, m in whole(noise, partial).items()}
        mean = maps[SUM] / count
        std = np.sqrt(maps[SQUARED_SUM] / count - mean**2)
        assert np.abs(mean).max() < 0.33
        assert mean.std() > 0.02
        assert 0.83 < std.min() < 1 < std.max() < 1.51
        # Smooth over the field, but for what is left of the draws in the mean.
        assert np.abs(np.diff(std, axis=1)).max() < 0.05
        assert np.diff(mean, axis=1).std() < 0.02
        z = np.sort(((maps[MIP] - mean) / std).ravel())
        cdf = [NormalDist().cdf(value) ** (INDEPENDENT_SHARE * count) for value in z[::100]]
        empirical = np.arange(z.size)[::100] / z.size
        assert np.abs(cdf - empirical).max() < 0.02


def test_noise_alone_passes_the_cutoff_as_often_as_accepted():
    noise = dataclasses.replace(SIMULATION, n_particles=0)
    z = merged(noise)[SCALED_MIP]
    expected = 400  # of the independent correlations; the cutoff counts all as independent
    cutoff = gaussian_cutoff(z.size, sum(noise.counts), expected / INDEPENDENT_SHARE)
    assert np.count_nonzero(z > cutoff) == pytest.approx(expected, abs=4 * math.sqrt(expected))


def noise_figures(maps, counts, valid):
    """Median z-score, candidates, and correlation of adjacent pixels away from particles."""
    n = sum(counts)
    mean = sum(m[SUM].astype(np.float64) for m in maps) / n
    squares = sum(m[SQUARED_SUM].astype(np.float64) for m in maps) / n
    highest = np.maximum.reduce([m[MIP] for m in maps])
    z = ((highest - mean) / np.sqrt(squares - mean**2))[: valid[0], : valid[1]]
    noise = z.copy()
    for y, x in np.argwhere(z > 6.2):
        noise[max(y - 14, 0) : y + 15, max(x - 14, 0) : x + 15] = np.nan
    pairs = [(noise[:, 1:].ravel(), noise[:, :-1].ravel()), (noise[1:].ravel(), noise[:-1].ravel())]
    one, other = np.hstack(pairs)
    both = np.isfinite(one) & np.isfinite(other)
    adjacent = np.corrcoef(one[both], other[both])[0, 1]
    return np.median(z), np.count_nonzero(z >= candidate_level(n)), adjacent


@pytest.mark.parametrize("seed", range(3))
def test_simulated_maps_have_the_noise_of_a_real_search(seed):
    simulation = Simulation((432, 480), n_partials=4, n_particles=16, seed=seed)
    maps = [whole(simulation, partial) for partial in range(4)]
    median, candidates, adjacent = noise_figures(maps, simulation.counts, simulation.valid_shape)
    # Of the real search below: 4.047, 51 and 0.033.
    assert median == pytest.approx(4.047, abs=0.01)
    assert candidates == pytest.approx(51, abs=25)
    assert adjacent == pytest.approx(0.033, abs=0.007)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the whole real search is not on this machine")
def test_the_noise_of_the_real_search_is_what_the_simulation_imitates():
    maps = []
    for number in range(4):
        with np.load(SHARED / f"A_shard{number}.npz", allow_pickle=False) as shard:
            maps.append({name: shard[name] for name in (MIP, SUM, SQUARED_SUM)})
    median, candidates, adjacent = noise_figures(maps, (51_840, 38_880, 25_920, 12_960), (377, 425))
    assert median == pytest.approx(4.047, abs=0.002)
    assert candidates == 51
    assert adjacent == pytest.approx(0.0325, abs=0.0005)


def test_the_truth_is_consistent():
    truth = SIMULATION.truth
    space = SIMULATION.search_space
    assert truth.dtype == TRUTH_DTYPE
    assert truth.shape == (40,)
    assert not truth.flags.writeable
    poses = space.decode(truth["global_index"])
    for name, pose in zip(TRUTH_POSES, poses, strict=True):
        np.testing.assert_array_equal(truth[name], pose)
    for particle in truth:
        start, end = SIMULATION.orientation_ranges[particle["partial"]]
        assert start <= particle["global_index"] % len(space.euler_angles) < end
    assert len(np.unique(truth["partial"])) == 3
    assert (truth["amplitude"] >= 9).all()
    assert (truth["amplitude"] <= 14).all()


@given(st.integers(0, 2**32), st.integers(90, 400), st.integers(90, 400), st.data())
def test_particles_are_valid_and_apart(seed, height, width, data):
    cells = ((height - 55 - 6) // 24) * ((width - 55 - 6) // 24)
    n = data.draw(st.integers(0, cells))
    truth = Simulation((height, width), 2, n, seed).truth
    for axis, edge in (("y", height - 55), ("x", width - 55)):
        assert ((truth[axis] >= 2) & (truth[axis] < edge - 2)).all()
    dy, dx = (np.abs(truth[axis][:, None] - truth[axis]) for axis in ("y", "x"))
    apart = np.maximum(dy, dx)
    assert (apart[~np.eye(n, dtype=bool)] >= MIN_SPACING_PX).all()


def test_a_particle_peaks_in_its_own_partial_with_its_pose():
    for particle in SIMULATION.truth:
        y, x = particle["y"], particle["x"]
        for partial, count in enumerate(SIMULATION.counts):
            maps = whole(SIMULATION, partial)
            mean = maps[SUM][y, x] / count
            z = (maps[MIP][y, x] - mean) / math.sqrt(maps[SQUARED_SUM][y, x] / count - mean**2)
            if partial == particle["partial"]:
                assert maps[INDEX][y, x] == particle["global_index"]
                assert z == pytest.approx(particle["amplitude"], abs=0.1)
                assert maps[MIP][y, x] == maps[MIP][y - 5 : y + 6, x - 5 : x + 6].max()
                assert maps[MIP][y, x + 1] > 0.35 * maps[MIP][y, x]
            else:
                assert z < 7


@pytest.mark.parametrize("simulation", [SIMULATION, EXPLICIT])
def test_all_particles_are_recovered_from_a_merge(simulation):
    maps = merged(simulation)
    height, width = simulation.valid_shape
    cutoff = gaussian_cutoff(height * width, sum(simulation.counts))
    assert compare_with_truth(simulation.truth, reader(maps), cutoff) == Recovery(40, 40, 40)


def test_what_was_lost_is_noticed():
    maps = merged(SIMULATION)
    first, second, third = SIMULATION.truth[:3]
    maps["best_psi"][second["y"], second["x"]] += 12
    z = maps[SCALED_MIP]
    z[first["y"] - 2 : first["y"] + 3, first["x"] - 2 : first["x"] + 3] = np.nan
    z[third["y"], third["x"] + 1] = np.nan
    assert compare_with_truth(SIMULATION.truth, reader(maps), 8.0) == Recovery(40, 39, 38)
    assert compare_with_truth(SIMULATION.truth, reader(maps), 99.0) == Recovery(40, 0, 0)
    assert compare_with_truth(SIMULATION.truth[:0], reader(maps), 8.0) == Recovery(0, 0, 0)


def test_every_unusable_parameter_is_named():
    with pytest.raises(InvalidInputError) as caught:
        Simulation((100, 0), 0, 1, -1, form="angles", projections_per_pose=0)
    named = [problem.partition(":")[0] for problem in caught.value.problems]
    assert named == ["shape", "n_partials", "seed", "form", "projections_per_pose"]
    with pytest.raises(InvalidInputError, match="template_box: expected 1 to 50"):
        Simulation((50, 100), 1, 0, 0)
    with pytest.raises(InvalidInputError, match=r"n_particles: expected 0 to 4, .* got 5"):
        Simulation((109, 109), 1, 5, 0)
    assert len(Simulation((109, 109), 1, 4, 0).truth) == 4
    with pytest.raises(InvalidInputError, match="n_partials: expected 1 to 1000"):
        Simulation((109, 109), 1001, 0, 0)


def test_a_region_outside_the_map_and_an_unknown_partial_are_refused():
    with pytest.raises(InvalidInputError) as caught:
        SIMULATION.partial_block(3, Region(0, 531, 0, 5))
    assert [p.partition(":")[0] for p in caught.value.problems] == ["partial", "region"]
    with pytest.raises(InvalidInputError, match="partial: expected 0 to 2, got -1"):
        SIMULATION.partial_block(-1, Region(0, 5, 0, 5))


def test_cutoff_known_answers():
    # Quoted as 7.775 for "20.5 million"; an independent erfc gives 7.774227 for exactly that.
    assert gaussian_cutoff(3585**2, 20_500_000) == pytest.approx(7.774227, abs=1e-6)
    assert gaussian_cutoff(3585**2, 20_548_000) == pytest.approx(7.775, abs=5e-4)
    assert gaussian_cutoff(377 * 425, 129_600) == pytest.approx(6.4726, abs=5e-5)
    assert gaussian_cutoff(100, 100, 5000.0) == pytest.approx(0)
    # Far out, where 1 - p would be 1 in float64.
    cutoff = gaussian_cutoff(6 * 10**9, 20_500_000)
    p = math.erfc(cutoff / math.sqrt(2)) / 2
    assert p * 6e9 * 20_500_000 == pytest.approx(1, rel=1e-9)


def test_cutoff_refusals():
    with pytest.raises(InvalidInputError) as caught:
        gaussian_cutoff(0, -1, math.nan)
    assert len(caught.value.problems) == 3
    with pytest.raises(InvalidInputError, match="less than the 100 cross-correlations"):
        gaussian_cutoff(10, 10, 100)


def test_the_truth_reads_back_from_csv(tmp_path):
    path = tmp_path / "truth.csv"
    write_truth(SIMULATION, path)
    with path.open(newline="") as file:
        header, *rows = csv.reader(file)
    assert tuple(header) == TRUTH_DTYPE.names
    back = np.zeros(len(rows), TRUTH_DTYPE)
    for i, name in enumerate(header):
        back[name] = [float(row[i]) for row in rows]
    np.testing.assert_array_equal(back, SIMULATION.truth)


@pytest.mark.parametrize(("form", "n_threads"), [(PoseForm.EXPLICIT, 1), (PoseForm.INDEXED, 2)])
def test_a_search_is_written_chunk_by_chunk(tmp_path, form, n_threads):
    simulation = Simulation((1100, 130), 11, 5, 2, form)
    store = simulate(tmp_path / "new" / "demo", simulation, n_threads=n_threads)
    assert store == tmp_path / "new" / "demo" / "RUN.zarr"
    assert (store.parent / "truth.csv").read_text().count("\n") == 6
    root = zarr.open_group(store, mode="r")
    attributes = root.attrs["ocelot"]
    assert attributes["total_projections"] == simulation.search_space.n_poses
    assert attributes["valid_shape"] == [1045, 75]
    assert sorted(root["partials"].group_keys()) == [f"device_{i:02}" for i in range(11)]
    for number in (0, 10):
        partial = root["partials"][f"device_{number:02}"]
        assert partial.attrs["ocelot"]["state"] == "complete"
        assert partial.attrs["ocelot"]["order"] == number
        assert partial.attrs["ocelot"]["total_projections"] == simulation.counts[number]
        for name, values in whole(simulation, number).items():
            np.testing.assert_array_equal(partial[name][...], values)


@pytest.mark.parametrize("name", ["RUN.zarr", "truth.csv"])
def test_nothing_is_overwritten(tmp_path, name):
    (tmp_path / name).write_text("precious")
    with pytest.raises(OutputExistsError, match=name):
        simulate(tmp_path, Simulation((64, 64), 1, 0, 0))
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_threads_are_needed(tmp_path):
    with pytest.raises(InvalidInputError, match="n_threads"):
        simulate(tmp_path / "x", Simulation((64, 64), 1, 0, 0), n_threads=0)
    assert not (tmp_path / "x").exists()


def test_a_failure_leaves_the_search_incomplete(tmp_path, monkeypatch):
    def fail(self, partial, region):
        raise RuntimeError("power cut")

    monkeypatch.setattr(Simulation, "partial_block", fail)
    with pytest.raises(RuntimeError, match="power cut"):
        simulate(tmp_path, Simulation((64, 64), 3, 0, 0), n_threads=2)
    assert not Path(tmp_path, "truth.csv").exists()
    partial = zarr.open_group(tmp_path / "RUN.zarr", mode="r")["partials/device_0"]
    assert partial.attrs["ocelot"]["state"] == "writing"
