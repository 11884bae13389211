"""Two searches side by side: what is the same particle, and what the table says of it."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from montages import Shot, write_shots
from ocelot_em import Comparison, ParticleTable, Simulation, compare, find_peaks, merge, simulate
from ocelot_em.errors import InvalidInputError
from ocelot_em.merge.result import MergedResult
from ocelot_em.model.maps import SCALED_MIP
from ocelot_em.model.regions import Region
from ocelot_em.particles.comparison import COMPARED, highest_near
from ocelot_em.particles.duplicates import join_nearest
from ocelot_em.particles.table import COLUMNS, NEG_LOG_P, PickInfo

SIMULATION = Simulation((180, 210), n_partials=3, n_particles=12, seed=5, template_box=24)
LOST = {(int(p["y"]), int(p["x"])) for p in SIMULATION.truth if p["partial"] == 2}
"""Places of the particles that only the last device sees."""


@pytest.fixture(scope="module")
def searches(tmp_path_factory):
    """A search by three devices, and the same without the last; chunks of 32 pixels."""
    place = tmp_path_factory.mktemp("searches")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ocelot_em.store.constants.DEFAULT_CHUNK", 32)
        simulate(place, SIMULATION)
        merge(place / "RUN.zarr", place / "A.zarr")
        merge(place / "RUN.zarr", place / "B.zarr", without="device_2")
    return MergedResult.open(place / "A.zarr"), MergedResult.open(place / "B.zarr")


def a_table(places, about=None, **values):
    """Particles at (y, x), with z-scores that descend from 20."""
    n = len(places)
    columns = {k: np.zeros(n, c.dtype) for k, c in COLUMNS.items() if k != NEG_LOG_P}
    for axis, at in zip("yx", np.reshape(places, (-1, 2)).T, strict=True):
        columns[f"pos_{axis}"] = at.astype(np.int32)
        columns[f"pos_{axis}_subpixel"] = at.astype(np.float32)
    columns[SCALED_MIP] = np.arange(20, 20 - n, -1, dtype=np.float32)
    return ParticleTable(columns | {k: np.array(v, "f4") for k, v in values.items()}, about)


def facts(shape, box=None, size=None):
    whole = tuple(edge + box - 1 for edge in shape) if box else shape
    return PickInfo("X.zarr", "gaussian", 7.0, 10.0, 1.0, size, whole, shape)


def pairs_of(comparison):
    rows = comparison[comparison["found_in"] == "both"]
    return sorted(zip(rows["row_a"].tolist(), rows["row_b"].tolist(), strict=True))


points = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), unique=True, max_size=14)


@given(points, points, st.sampled_from([1, 2**0.5, 2.5, 5]))
def test_pairs_are_joined_nearest_first(one, other, limit):
    one, other = (np.array(own, float).reshape(-1, 2) for own in (one, other))
    i, j = join_nearest(one, other, limit)
    joined = set(zip(i.tolist(), j.tolist(), strict=True))
    assert len({*i.tolist()}) == len({*j.tolist()}) == len(joined)
    apart = np.hypot(*(one[:, None] - other[None]).transpose(2, 0, 1))
    assert all(apart[pair] <= limit for pair in joined)
    # No pair is left, and none was taken at the cost of a nearer one.
    for pair in np.argwhere(apart <= limit).tolist():
        rivals = [apart[own] for own in joined if own[0] == pair[0] or own[1] == pair[1]]
        assert rivals
        assert min(rivals) <= apart[tuple(pair)]
    assert {
        *zip(*(own.tolist() for own in join_nearest(other, one, limit)[::-1]), strict=True)
    } == (joined)


places = st.tuples(st.floats(-20, 180), st.floats(-20, 210))


@given(st.lists(places, max_size=6), st.floats(0.5, 12))
def test_the_highest_z_near_a_place_is_that_of_all_pixels(searches, some, radius):
    merged = searches[0]
    z = merged.read(Region.whole(merged.valid_shape), SCALED_MIP)
    y, x = np.indices(z.shape)
    near = [z[np.hypot(y - at[0], x - at[1]) <= radius] for at in some]
    expected = [own.max() if own.size else np.nan for own in near]
    found = highest_near(merged, np.array(some).reshape(-1, 2), radius)
    np.testing.assert_array_equal(found, np.array(expected, np.float32))


def test_particles_of_one_search_have_the_z_of_the_other_map(searches):
    a, b = searches
    found = compare(a, b)
    assert found.counts == {"both": 12 - len(LOST), "A": len(LOST), "B": 0}
    only = found[found["found_in"] == "A"]
    assert {*zip(np.rint(only["y_a"]), np.rint(only["x_a"]), strict=True)} == LOST
    picked = find_peaks(a)
    own = picked[only["row_a"]]
    for ours, theirs in {"zscore": SCALED_MIP, "mip": "mip", "rank": "rank"}.items():
        assert only[f"{ours}_a"].tolist() == own[theirs].tolist()
    assert {*only["rank_b"].tolist()} == {-1}
    assert np.isnan(only["mip_b"]).all()
    assert found["rank"].tolist() == list(range(1, len(found) + 1))
    at = np.stack([only["y_a"], only["x_a"]], axis=1)
    assert only["zscore_b"].tolist() == highest_near(b, at, 10).tolist()
    assert np.isnan(only[["y_b", "angle_difference", "defocus_difference", "distance_px"]]).all(
        axis=None
    )
    both = found[found["found_in"] == "both"]
    assert both["angle_difference"] == pytest.approx(0, abs=1e-9)
    assert not both["defocus_difference"].any()
    assert np.diff(np.fmax(found["zscore_a"], found["zscore_b"])).max() <= 0


def test_the_exchanged_searches_give_the_exchanged_table(searches):
    found, other = compare(*searches).to_pandas(), compare(*searches[::-1]).to_pandas()
    names = {"both": "both", "A": "B", "B": "A"}
    assert other["found_in"].map(names).tolist() == found["found_in"].tolist()
    for name in ("row", "rank", "y", "x", "mip", "zscore"):
        for one, two in ("ab", "ba"):
            assert other[f"{name}_{one}"].equals(found[f"{name}_{two}"])
    assert other["zscore_difference"].equals(-found["zscore_difference"])
    assert {*found["micrograph"]} == {"A"}
    assert {*other["micrograph"]} == {"B"}  # B.zarr is the first


@given(points, points, st.sampled_from([1.0, 1.5, 3.0]))
def test_so_they_do_with_equal_z_scores_and_other_pixel_sizes(one, other, ratio):
    def table(places, size):
        edge = int(300 * 1.06 / size)
        return a_table([p[::-1] for p in places], facts((edge, edge), None, size))

    a, b = table(one, 1.06), table(other, 1.06 * ratio)
    found = compare(a, b, max_distance=6).to_pandas()
    swapped = compare(b, a, max_distance=6 / ratio).to_pandas()
    assert found["row_a"].tolist() == swapped["row_b"].tolist()
    assert found["row_b"].tolist() == swapped["row_a"].tolist()


def test_tables_of_particles_are_compared_as_results_are(searches, tmp_path):
    a, b = searches
    path = find_peaks(a).to_csv(tmp_path / "A.csv")
    saved = find_peaks(b).to_parquet(tmp_path / "B.parquet")
    results, tables = compare(a, b), compare(path, saved)
    assert tables.counts == results.counts
    assert np.isnan(tables["zscore_b"][tables["found_in"] == "A"]).all()
    written = results.to_parquet(tmp_path / "C.parquet")
    pandas = pytest.importorskip("pandas")
    assert pandas.read_parquet(written).equals(results.to_pandas())
    lines = results.to_csv(tmp_path / "C.csv").read_text().splitlines()
    assert lines[0] == ",".join([*COMPARED][:-2])  # without groups
    assert len(lines) == 13


def test_templates_of_different_sizes_are_compared_at_their_centres():
    small, large = facts((185, 185), 16), facts((161, 161), 40)
    found = compare(a_table([(30, 40)], small), a_table([(18, 28)], large))
    assert found["distance_px"].tolist() == [0]


def test_different_pixel_sizes_are_compared_in_angstroms():
    fine, coarse = facts((401, 301), 40, 1.0), facts((201, 151), 20, 2.0)
    # Corner + half a box, in Å: (100 + 20) * 1 and (51 + 10) * 2.
    a, b = a_table([(100, 120)], fine), a_table([(51, 60)], coarse)
    assert compare(a, b, max_distance=2)["distance_px"].tolist() == [2]
    assert compare(b, a, max_distance=1)["distance_px"].tolist() == [1]
    assert compare(a, b, max_distance=1.9).counts["both"] == 0


@pytest.mark.parametrize(
    ("one", "other", "says"),
    [
        (facts((200, 200), 16), facts((180, 200), 16), "215 × 215 pixels"),
        (facts((200, 200)), facts((180, 180)), "import both again with --template-box"),
        (facts((200, 200), 16, 1.0), facts((200, 200), 16, 2.0), "pixels of 2 Å"),
    ],
)
def test_searches_of_different_micrographs_are_refused(one, other, says):
    with pytest.raises(InvalidInputError, match="expected two searches of one micrograph") as error:
        compare(a_table([(5, 5)], one), a_table([(5, 5)], other))
    assert says in str(error.value)


@pytest.mark.parametrize("distance", [0, -1, np.nan, np.inf])
def test_a_distance_that_joins_nothing_is_refused(distance):
    with pytest.raises(InvalidInputError, match="max_distance: expected more than 0"):
        compare(a_table([]), a_table([]), max_distance=distance)


def test_poses_are_compared_under_the_symmetry():
    a = a_table([(9, 9), (40, 40)], phi=[10, 10], theta=[50, 50], psi=[5, 5])
    b = a_table([(9, 9), (40, 41)], phi=[130, 10], theta=[50, 50], psi=[5, 15])
    assert compare(a, b)["angle_difference"][0] > 60
    assert compare(a, b, symmetry="C3")["angle_difference"] == pytest.approx([0, 10], abs=1e-5)


@pytest.mark.parametrize("k", [3, 7, 11, 17])
def test_a_pair_at_the_maximum_distance_is_joined(k):
    corner, other = a_table([(0, 0)]), a_table([(k, k)])
    assert compare(corner, other, max_distance=float(np.hypot(k, k))).counts["both"] == 1
    fine, coarse = facts((400, 400), None, 1.1), facts((133, 133), None, 3.3)
    a, b = a_table([(120 + k, 120)], fine), a_table([(40, 40)], coarse)
    assert compare(a, b, max_distance=k).counts["both"] == 1
    assert compare(a, b, max_distance=k - 0.01).counts["both"] == 0


def test_micrographs_of_two_tables_are_compared_by_name(searches):
    def named(places, names, groups):
        table = a_table(places)
        own = {"micrograph": np.array(names), "group": np.array(groups)}
        own |= {"rank": np.arange(len(places)), "rank_in_micrograph": np.arange(len(places))}
        own |= dict.fromkeys(("second_zscore", "zscore_difference"), np.ones(len(places), "f4"))
        return replace(table, columns=table.columns | own)

    a = named([(9, 9), (9, 9), (50, 60)], ["M1", "M2", "M2"], ["apo", "apo", "holo"])
    b = named([(9, 9), (50, 60), (50, 60)], ["M2", "M3", "M1"], ["holo", "holo", "apo"])
    found = compare(a, b)
    assert pairs_of(found) == [(1, 0)]
    assert found["micrograph"].tolist() == ["M1", "M2", "M3", "M1", "M2"]
    assert found["group_a"].tolist() == ["apo", "apo", "", "", "holo"]
    assert found["group_b"].tolist() == ["", "holo", "holo", "apo", ""]
    with pytest.raises(InvalidInputError, match="expected particles of one micrograph"):
        compare(searches[0], a)
    with pytest.raises(InvalidInputError, match="expected tables of the same micrographs"):
        compare(a, named([(9, 9), (9, 9)], ["X", "Y"], ["", ""]))


def test_montages_are_compared_on_their_canvas(tmp_path):
    shots = [
        Shot("00", (0, 0), 0, (40, 50), (35, 45), (9,)),
        Shot("01", (7, 30), 1, (40, 50), (35, 45), (9,)),
    ]
    write_shots(tmp_path / "RUN.zarr", shots)
    merge(tmp_path / "RUN.zarr", tmp_path / "M.zarr")
    montage = find_peaks(tmp_path / "M.zarr", cutoff=1.0)
    found = compare(tmp_path / "M.zarr", montage, cutoff=1.0)
    assert pairs_of(found) == [(k, k) for k in range(len(montage))]
    assert np.rint(found["y_a"]).tolist() == montage["canvas_y"].tolist()
    with pytest.raises(InvalidInputError, match=r"only .*M\.zarr is a montage"):
        compare(tmp_path / "M.zarr", a_table([(1, 1)]))


def test_a_comparison_is_used_like_a_frame(searches):
    found = compare(*searches)
    assert isinstance(found[:3], Comparison)
    assert len(found[found["found_in"] == "both"]) == found.counts["both"]
    assert "only in A" in repr(found)
    assert "<th" in replace(found, symmetry="C2")._repr_html_()
