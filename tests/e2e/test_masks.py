"""Picking with masks: the same as from maps of which only the allowed pixels are known."""

import numpy as np
import pytest
import zarr

import ocelot_em
from builders import unsealed
from conftest import SHARED
from exact_ranks import from_maps, histogram_of
from helpers import make_result, read_maps
from montages import SHOTS, write_shots
from ocelot_em.cli.main import run
from ocelot_em.errors import InvalidInputError
from ocelot_em.merge.result import MergedResult
from ocelot_em.model.histograms import Z_AXIS
from ocelot_em.model.pick_options import PickOptions
from ocelot_em.particles.areas import Area
from ocelot_em.particles.estimates import expected_above
from ocelot_em.particles.gaussian import gaussian_cutoff
from ocelot_em.particles.peaks import select_peaks
from ocelot_em.particles.picking import find_peaks
from ocelot_em.particles.population import populations_of
from ocelot_em.particles.significance import gev_cutoff
from ocelot_em.store.partials import write_partial
from ocelot_em.store.search_info import SearchInfo

SHAPE, BOX, COUNTS = (79, 93), 10, (600, 400)
VALID = tuple(length - BOX + 1 for length in SHAPE)
RNG = np.random.default_rng(5)
MASK = np.kron(RNG.random((8, 10)) > 0.3, np.ones((10, 10)))[: SHAPE[0], : SHAPE[1]] > 0
ALLOWED = MASK[BOX // 2 :, BOX // 2 :][: VALID[0], : VALID[1]]


def write_run(place, *, damaged=False):
    """Noise as maxima of Gaussian correlations; with damage, NaN in a partial, and no search."""
    rng = np.random.default_rng(20261129)
    info = SearchInfo(template_box=BOX, pixel_size_angstrom=2.0)
    for number, count in enumerate(COUNTS):
        result = make_result(rng, SHAPE, count)
        result["mip"] = rng.standard_normal((count // 20, *SHAPE)).max(axis=0).astype(np.float32)
        result["mip"][rng.random(SHAPE) < 0.01] += 3
        result["correlation_sum"] = (count * rng.normal(0, 0.05, SHAPE)).astype(np.float32)
        result["correlation_squared_sum"] = np.full(SHAPE, 1.0 * count, np.float32)
        if damaged:
            result["mip"][10:20, 5:60] = -np.inf
        write_partial(
            place, f"gpu{number}", result, total_projections=count, order=number, search=info
        )
    if damaged:
        for number in range(len(COUNTS)):
            sums = unsealed(place) / f"partials/gpu{number}/correlation_sum"
            zarr.open_array(sums, mode="r+")[30:40, 20 * number : 60] = np.nan
    return place


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("masks")
    for name, damaged in (("plain", False), ("damaged", True)):
        write_run(folder / f"{name}_run", damaged=damaged)
        for tile in (16, None):
            output = folder / f"{name}_{tile}"
            nan = "mask" if damaged else "raise"
            ocelot_em.merge(folder / f"{name}_run", output, tile_size=tile, nan=nan, threads=2)
    return folder


def maps_of(store):
    return {name: values[: VALID[0], : VALID[1]] for name, values in read_maps(store).items()}


def assert_same_rows(one, other):
    assert list(one.columns) == list(other.columns)
    for name in {*one.columns} - {"micrograph", "rank"}:  # of the store, and in its table
        np.testing.assert_array_equal(one.columns[name], other.columns[name], err_msg=name)


@pytest.mark.parametrize("method", ["gaussian", "gev", "pvalue", "mip"])
@pytest.mark.parametrize("kind", ["plain", "damaged"])
def test_cutoff_and_particles_are_those_of_the_allowed_pixels(place, kind, method):
    maps = maps_of(place / f"{kind}_None")
    mip, z = maps["mip"].astype(float), maps["scaled_mip"].astype(float)
    counted = ALLOWED & np.isfinite(z)
    counts = maps["total_projections"] if kind == "damaged" else np.full(VALID, sum(COUNTS))
    options = {"gev": {"false_positives": 40}, "pvalue": {"cutoff": 4}, "mip": {"cutoff": 4.5}}
    options = options.get(method, {})
    table = find_peaks(place / f"{kind}_None", method=method, mask=MASK, **options)
    about = table.about
    assert about.counted_pixels == counted.sum()
    assert about.excluded_pixels == np.isfinite(z).sum() - counted.sum()
    if method == "gaussian":
        height, cutoff = z, gaussian_cutoff(int(counts[counted].sum()), 1)
        assert about.correlations == counts[counted].sum()
    elif method == "gev":
        height, cutoff = z, gev_cutoff(histogram_of(z[counted], Z_AXIS), 40)
    elif method == "pvalue":
        height, cutoff = from_maps(mip[counted], z[counted]).neg_log_p(mip, z), 4
    else:
        height, cutoff = mip, 4.5
    assert about.cutoff == pytest.approx(cutoff, abs=1e-9)
    y, x = np.nonzero(counted & (height >= np.float32(cutoff)))
    best = select_peaks(y, x, height[y, x], 10)
    assert 3 <= len(best) == len(table)
    assert table["pos_y"].tolist() == y[best].tolist()
    assert table["pos_x"].tolist() == x[best].tolist()
    tiled = find_peaks(place / f"{kind}_16", method=method, mask=MASK, **options)
    assert_same_rows(tiled, table)
    assert tiled.about.cutoff == about.cutoff


def test_a_mask_of_everything_changes_nothing(place):
    merged, everywhere = MergedResult.open(place / "plain_16"), np.ones(SHAPE, bool)
    area = Area.of(merged, PickOptions(mask=everywhere))
    (own,), (whole,) = populations_of(merged, area), populations_of(merged, None)
    assert (own.pixels, own.correlations) == (whole.pixels, whole.correlations)
    for name in ("mip", "z", "joint"):
        np.testing.assert_array_equal(
            getattr(own.histograms, name), getattr(whole.histograms, name)
        )
    assert_same_rows(find_peaks(merged, mask=everywhere), find_peaks(merged))


def test_without_a_mask_counts_of_pixels_set_the_cutoff(place):
    """Where a partial was left out, its correlations do not count."""
    maps = maps_of(place / "damaged_None")
    counts = maps["total_projections"][np.isfinite(maps["scaled_mip"])]
    assert set(counts.tolist()) > {sum(COUNTS)}
    about = find_peaks(place / "damaged_16").about
    assert about.correlations == counts.sum()
    assert about.cutoff == gaussian_cutoff(int(counts.sum()), 1)
    assert about.area == about.area_text == ""


def test_what_a_mask_is_of(place):
    merged = place / "plain_16"
    by_image = find_peaks(merged, mask=MASK)
    assert "of the micrograph (or of the map with --mask-of map)" in by_image.about.area
    assert_same_rows(find_peaks(merged, mask=ALLOWED), by_image)
    assert_same_rows(find_peaks(merged, mask=~MASK, mask_marks="excluded"), by_image)
    of_map = np.zeros(SHAPE, bool)
    of_map[: VALID[0], : VALID[1]] = ALLOWED
    assert_same_rows(find_peaks(merged, mask=of_map, mask_of="map"), by_image)
    edge = np.zeros(VALID, bool)
    edge[7:-7, 7:-7] = ALLOWED[7:-7, 7:-7]
    both = find_peaks(merged, mask=MASK, edge=7)
    assert_same_rows(both, find_peaks(merged, mask=edge))
    assert both.about.area.endswith(", without an edge of 7 px")


def test_polygons_in_pixels_and_in_angstrom(place):
    square = np.array([[20.0, 30], [20, 70], [60, 70], [60, 30]])
    image = np.ones(SHAPE, bool)
    image[20:60, 30:70] = False
    expected = find_peaks(place / "plain_16", mask=image)
    for polygons, options in (
        ([square], {}),
        ([2 * square], {"mask_unit": "angstrom"}),
        ([square - BOX // 2], {"mask_of": "map"}),
    ):
        assert_same_rows(find_peaks(place / "plain_16", mask=polygons, **options), expected)
    inside = find_peaks(place / "plain_16", mask=[square], mask_marks="kept")
    assert inside.about.counted_pixels == 1600
    assert inside.about.excluded_pixels == expected.about.counted_pixels


def test_polygons_over_maps_of_valid_pixels_only(tmp_path):
    """Those do not state the template box."""
    result = make_result(np.random.default_rng(2), VALID, 600)
    write_partial(tmp_path / "RUN", "gpu0", result, total_projections=600)
    ocelot_em.merge(tmp_path / "RUN", tmp_path / "OUT")
    square = np.array([[20.0, 30], [20, 70], [60, 70], [60, 30]])
    with pytest.raises(InvalidInputError, match=r"--mask-box"):
        find_peaks(tmp_path / "OUT", mask=[square])
    by_map = find_peaks(tmp_path / "OUT", mask=[square - BOX // 2], mask_of="map", cutoff=-9.0)
    own = find_peaks(tmp_path / "OUT", mask=[square], mask_box=BOX, cutoff=-9.0)
    assert_same_rows(own, by_map)
    assert own.about.excluded_pixels == 1600


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"mask": [np.eye(3)[:, :2]], "mask_box": 12}, "mask_box: expected 10.* got 12"),
        ({"mask": MASK[1:]}, r"expected 70 × 84 pixels, .* or 79 × 93 pixels, .*, got 78 × 93"),
        ({"mask": MASK[1:, 1:]}, "got 78 × 92"),
        ({"mask": ALLOWED, "mask_of": "micrograph"}, "expected 79 × 93 pixels.*got 70 × 84"),
        ({"mask": MASK[:-2, :-2], "mask_of": "map"}, "expected 70 × 84 pixels.*got 77 × 91"),
        ({"mask": ~(MASK | True)}, "expected searched pixels where .*--mask-marks"),
        ({"edge": 40}, "without an edge of 40 px: expected .*, got none$"),
        ({"method": "mip"}, "cutoff: expected one for the method mip"),
        ({"mask": 5}, "expected an image"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(place, options, problem):
    with pytest.raises(InvalidInputError, match=problem) as refusal:
        find_peaks(place / "plain_16", **options)
    assert len(refusal.value.problems) == 1


def test_orientations_apart_are_peaks_of_their_own(place):
    merged = place / "plain_None"
    many = find_peaks(merged, cutoff=3.0, min_distance=20, min_angle=15.0)
    assert len(many) > len(find_peaks(merged, cutoff=3.0, min_distance=20))
    assert_same_rows(
        find_peaks(merged, cutoff=3.0, min_distance=20, min_angle=180),
        find_peaks(merged, cutoff=3.0, min_distance=20),
    )
    every = find_peaks(merged, cutoff=3.0, min_distance=0)
    poses = every["phi"], every["theta"], every["psi"]
    best = select_peaks(every["pos_y"], every["pos_x"], every["scaled_mip"], 20, poses, 15.0)
    assert_same_rows(many, every[best])
    assert "minimum distance 20 px or 15°" in repr(many)


@pytest.fixture(scope="module")
def montages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("montages")
    search = write_shots(folder / "RUN", SHOTS)
    for overlap in ("earliest", "max-zscore"):
        ocelot_em.merge(search, folder / overlap, overlap=overlap, tile_size=16)
    return folder


@pytest.mark.parametrize("overlap", ["earliest", "max-zscore"])
def test_a_mask_of_the_canvas(montages, overlap):
    merged = MergedResult.open(montages / overlap)
    mask = np.random.default_rng(7).random(merged.valid_shape) < 0.6
    by_exposure = find_peaks(merged, mask=mask, cutoff=0.5, same_distance=0)
    everywhere = find_peaks(merged, cutoff=0.5, same_distance=0, min_distance=0)
    assert mask[by_exposure["canvas_y"], by_exposure["canvas_x"]].all()
    kept = mask[everywhere["canvas_y"], everywhere["canvas_x"]]
    own = find_peaks(merged, mask=mask, cutoff=0.5, same_distance=0, min_distance=0)
    assert_same_rows(own, everywhere[kept])
    # Every valid, searched pixel of every exposure, shown or hidden.
    pixels = [own.values()[1].size for own in populations_of(merged, None)]
    area = Area.of(merged, PickOptions(mask=mask))
    for population, n in zip(populations_of(merged, area), pixels, strict=True):
        assert population.pixels == population.values()[1].size <= n
        assert population.pixels == population.histograms.z.sum()
    of_all = find_peaks(merged, mask=mask, per="montage")
    maps = read_maps(montages / overlap)
    if overlap == "earliest":
        shown = mask & np.isfinite(maps["scaled_mip"])
        projections = {one.number: one.total_projections for one in merged.plan.exposures}
        numbers, n = np.unique(maps["source_exposure"][shown], return_counts=True)
        expected = sum(
            projections[k] * m for k, m in zip(numbers.tolist(), n.tolist(), strict=True)
        )
    else:
        expected = sum(one.correlations for one in populations_of(merged, area))
    assert of_all.about.cutoff == gaussian_cutoff(expected, 1)
    for per, options in (("montage", {"mask": mask}), ("montage", {}), ("exposure", {})):
        by_gev = find_peaks(merged, method="gev", false_positives=9.0, per=per, **options)
        cutoffs = np.array([cutoff for _, cutoff in by_gev.about.exposure_cutoffs])
        above = expected_above(merged, by_gev, cutoffs)
        n = 9 * len(cutoffs) if per == "exposure" else 9
        assert 0.999 * above.min() < n < 1.001 * above.max()


def test_the_command_says_what_counts(place, tmp_path, capsys):
    np.save(tmp_path / "carbon.npy", ~MASK)
    words = ["--mask", tmp_path / "carbon.npy", "--mask-marks", "excluded", "--edge", "5"]
    table = tmp_path / "p.parquet"
    assert run(["peaks", str(place / "plain_16"), "--output", str(table), *map(str, words)]) == 0
    inner = ALLOWED[5:-5, 5:-5]
    counted, excluded = f"{inner.sum():,}", f"{ALLOWED.size - inner.sum():,}"
    said = f"without an edge of 5 px: {counted} pixels count, {excluded} are excluded"
    assert said in capsys.readouterr().out.replace("\n", " ")
    assert said in ocelot_em.read_parquet(table).about.area_text


@pytest.mark.skipif(not SHARED.exists(), reason=f"the larger real data is not at {SHARED}")
def test_a_constraint_of_leopard_em_sets_the_cutoff(tmp_path):
    """Its cutoff counts sum(n_orientations * n_defocus) of the pixels, times the pixel sizes."""
    import h5py

    options = ocelot_em.ImportOptions(search_space=SHARED / "search_space.npz", template_box=56)
    shards = [SHARED / f"A_shard{number}.npz" for number in range(4)]
    ocelot_em.import_results(shards, tmp_path / "RUN", options)
    ocelot_em.merge(tmp_path / "RUN", tmp_path / "M")
    eligible = np.zeros((432, 480), np.uint8)
    eligible[100:300, 50:400] = 1
    with h5py.File(tmp_path / "constraint.h5", "w") as file:
        file["maps/eligible"], file["maps/n_orientations"] = eligible, eligible * np.int32(1000)
    only_orientations = find_peaks(tmp_path / "M", mask=tmp_path / "constraint.h5").about
    assert only_orientations.correlations == 200 * 350 * 1000 * 5 * 3
    with h5py.File(tmp_path / "constraint.h5", "a") as file:
        n_defocus = np.full(eligible.shape, 2, np.int32)
        n_defocus[:150] = 0
        file["maps/n_defocus"] = n_defocus
    about = find_peaks(tmp_path / "M", mask=tmp_path / "constraint.h5").about
    assert about.counted_pixels == 150 * 350
    assert about.correlations == 150 * 350 * 1000 * 2 * 3
    assert about.cutoff == gaussian_cutoff(150 * 350, 6000)
