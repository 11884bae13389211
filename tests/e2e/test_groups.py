"""Groups: each is merged alone as if it were the only one, and the highest z-score wins."""

import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ocelot_em
from helpers import SPACE, assert_same_maps, chunk_bytes, expensive, make_result, read_maps
from host_device import LateDevice, host_kernels, lend_device
from ocelot_em.cli.main import run
from ocelot_em.errors import InvalidInputError, OutputExistsError, TilesFailedError
from ocelot_em.model.maps import INDEX, POSES
from ocelot_em.model.search_space import SearchSpace
from ocelot_em.particles.symmetry import rotation_between
from ocelot_em.store.local import LocalObjects
from ocelot_em.store.search_info import Exposure, SearchInfo
from report_pages import stub_rendering

SHAPE, BOX = (21, 34), 5
OTHER_SPACE = SearchSpace.from_tables(
    np.linspace(3, 90, 45).reshape(15, 3), [-50.0, 50.0], [-0.2, 0.2]
)
INFO = SearchInfo(template_box=BOX, pixel_size_angstrom=2.0)


def best_of_runs(runs, spaces):
    """The highest z-score of independent runs, as Leopard-EM's ``merge_runs_independent_zscore``.

    ``runs`` are lists of results and counts. It shares no code with the package.
    """
    alone = []
    for parts, space in zip(runs, spaces, strict=True):
        mips = np.stack([part["mip"] for part, _ in parts])
        indices = np.stack([part["best_global_index"] for part, _ in parts])
        winner = np.lexsort((indices, -mips), axis=0)[0] if space else mips.argmax(axis=0)
        mip, index = (np.take_along_axis(s, winner[None], 0)[0] for s in (mips, indices))
        n = sum(count for _, count in parts)
        mean = sum(p["correlation_sum"].astype(np.float64) for p, _ in parts) / n
        square = sum(p["correlation_squared_sum"].astype(np.float64) for p, _ in parts) / n
        std = np.sqrt(np.maximum(square - mean**2, 0))
        with np.errstate(all="ignore"):
            z = np.where(std == 0, 0, (mip - mean) / std).astype(np.float32)
        z[mip == -np.inf] = np.nan
        tables = space or SPACE  # explicit poses are made from these
        n_angles, n_defocus = len(tables.euler_angles), len(tables.defocus_values)
        pose = {"best_phi": tables.euler_angles[index % n_angles, 0]}
        pose["best_defocus"] = tables.defocus_values[index // n_angles % n_defocus]
        pose = {name: np.where(mip > -np.inf, own, np.nan) for name, own in pose.items()}
        alone.append({"mip": mip, "scaled_mip": z, "correlation_mean": mean, **pose})
    ranked = np.stack(
        [np.where(np.isnan(own["scaled_mip"]), -np.inf, own["scaled_mip"]) for own in alone]
    )
    best = ranked.argmax(axis=0)  # ties to the first run
    found = {
        name: np.take_along_axis(np.stack([own[name] for own in alone]), best[None], 0)[0]
        for name in alone[0]
    }
    np.put_along_axis(ranked, best[None], -np.inf, 0)
    second = ranked.max(axis=0)
    return found | {"best_group": best, "second_zscore": np.where(second > -np.inf, second, np.nan)}


def results_of(seed, counts, space, *, ties=False):
    """Results of devices, with a few pixels that were not searched."""
    rng, found = np.random.default_rng(seed), []
    for count in counts:
        result = make_result(rng, SHAPE, count, ties=ties)
        if space is not None:
            result[INDEX] = rng.integers(0, space.n_poses, SHAPE, np.int32)
        blank = rng.random(SHAPE) < 0.3
        result["mip"][blank], result[INDEX][blank] = -np.inf, -1
        for name in POSES:
            result[name][blank] = np.nan
        found.append((result, count))
    return found


def write_run(store, parts, space=None, info=INFO):
    for number, (result, count) in enumerate(parts):
        ocelot_em.write_partial(
            store,
            f"gpu{number}",
            result,
            total_projections=count,
            order=number,
            search=replace(info, search_space=space),
        )
    return store


groups = st.lists(
    st.tuples(st.integers(0, 3), st.lists(st.integers(1000, 9000), min_size=1, max_size=2)),
    min_size=1,
    max_size=4,
)


def written(place, drawn, *, indexed, ties=False):
    """Stores of templates, and what the best of them is; equal seeds give equal templates."""
    spaces = [(SPACE, OTHER_SPACE)[seed % 2] if indexed else None for seed, _ in drawn]
    runs = [
        results_of(seed, counts, space, ties=ties)
        for (seed, counts), space in zip(drawn, spaces, strict=True)
    ]
    stores = [
        write_run(place / f"T{number}.zarr", run, space)
        for number, (run, space) in enumerate(zip(runs, spaces, strict=True))
    ]
    return stores, best_of_runs(runs, spaces)


def assert_best(maps, expected):
    searched = expected["mip"] > -np.inf
    for name, values in expected.items():
        own = maps[name].values
        if name == "correlation_mean":
            np.testing.assert_allclose(own[searched], values[searched], rtol=1e-6)
        else:
            np.testing.assert_array_equal(own[searched], values[searched], err_msg=name)
    assert np.isnan(maps.scaled_mip.values[~searched]).all()


@expensive
@given(groups, st.integers(8, 40), st.booleans(), st.booleans())
def test_the_highest_z_score_of_independent_runs_wins(tmp_path_factory, drawn, tile, indexed, ties):
    place = tmp_path_factory.mktemp("groups")
    stores, expected = written(place, drawn, indexed=indexed, ties=ties)
    maps = ocelot_em.lazy_merge(stores, group_by="template", tile_size=tile)
    assert_best(maps.compute(), expected)


@pytest.mark.parametrize("options", [{}, {"derived": "none", "poses": "index", "nan": "mask"}])
def test_so_it_is_stored(tmp_path, options):
    drawn = [(0, [4000, 3000]), (1, [9000]), (2, [5000])]
    stores, expected = written(tmp_path, drawn, indexed=bool(options))
    ocelot_em.merge(stores, tmp_path / "OUT", group_by="template", tile_size=16, **options)
    maps = ocelot_em.open_merged(tmp_path / "OUT")
    assert_best(maps, expected)
    assert maps.attrs["groups"] == [store.stem for store in stores]
    assert maps.attrs["valid_shape"] == (SHAPE[0] - BOX + 1, SHAPE[1] - BOX + 1)
    counted = ocelot_em.MergedResult.open(tmp_path / "OUT").summary.attributes.exposures
    valid = np.s_[: 1 - BOX, : 1 - BOX]
    won = expected["best_group"][valid][expected["mip"][valid] > -np.inf]
    assert [own.shown_pixels for own in counted] == np.bincount(won, minlength=3).tolist()
    assert ocelot_em.check(tmp_path / "OUT") == []


PLACES = [(12 + 22 * row, 14 + 22 * column) for row in range(2) for column in range(7)]


def planted(own, template_of_particle, seed):
    """The search of a template: its own particles are high, those of the other one lower."""
    shape, count = (44, 164), 500_000
    rng = np.random.default_rng(seed)
    result = make_result(rng, shape, count)
    result["mip"] = rng.gumbel(4.5, 0.2, shape).astype(np.float32)
    for place, template in zip(PLACES, template_of_particle, strict=True):
        result["mip"][place] = 12 if template == own else 9
    result["correlation_sum"][:] = 0
    result["correlation_squared_sum"][:] = count
    return [(result, count)]


@pytest.fixture(scope="module")
def two_templates(tmp_path_factory):
    """Two templates and their 14 particles; each also correlates with the other template."""
    place = tmp_path_factory.mktemp("two")
    truth = np.random.default_rng(1).permutation(["apo"] * 7 + ["holo"] * 7)
    for number, name in enumerate(("apo", "holo")):
        info = SearchInfo(template_name=name, template_box=3)
        write_run(place / f"N{number}.zarr", planted(name, truth, number), SPACE, info)
    ocelot_em.merge([place / "N0.zarr", place / "N1.zarr"], place / "OUT", group_by="template")
    return place, dict(zip(PLACES, truth.tolist(), strict=True))


@pytest.mark.parametrize("method", ["gaussian", "gev"])
def test_each_of_14_particles_gets_its_template_by_name(two_templates, method):
    place, truth = two_templates
    found = ocelot_em.find_peaks(place / "OUT", method=method, false_positives=0.01)
    assert {(p["pos_y"], p["pos_x"]): p["group"] for p in found} == truth
    np.testing.assert_allclose(found["second_zscore"], 9, atol=1e-5)
    np.testing.assert_allclose(found["zscore_difference"], 3, atol=1e-5)
    assert [name for name, _ in found.about.exposure_cutoffs] == ["apo", "holo"]
    for form in ("csv", "parquet"):
        path = getattr(found, f"to_{form}")(place / f"particles.{form}")
        again = getattr(ocelot_em.ParticleTable, f"read_{form}")(path)
        assert all((again[name] == found[name]).all() for name in found.columns)


def test_gaussian_cutoffs_count_the_correlations_of_all_groups(two_templates):
    place, _ = two_templates
    merged = ocelot_em.MergedResult.open(place / "OUT")
    valid = merged.valid_shape[0] * merged.valid_shape[1]
    about = ocelot_em.find_peaks(merged).about
    cutoff = ocelot_em.gaussian_cutoff(valid, 2 * 500_000)
    assert [own for _, own in about.exposure_cutoffs] == [pytest.approx(cutoff)] * 2


def nearby(found, distance):
    """Pairs of particles closer than a distance: whether of one group, and their rotation."""
    y, x = (found[f"pos_{axis}"].astype(int) for axis in "yx")
    apart = np.hypot(y[:, None] - y, x[:, None] - x)
    i, j = np.nonzero(np.triu(apart < distance, 1))
    poses = ((found[name][i], found[name][j]) for name in ("phi", "theta", "psi"))
    return found["group"][i] == found["group"][j], rotation_between(*poses)


def test_orientations_are_compared_among_those_of_one_template(two_templates, tmp_path):
    place, _ = two_templates
    options = {"cutoff": 3.5, "min_distance": 6, "min_angle": 15}
    same, turned = nearby(ocelot_em.find_peaks(place / "OUT", **options), 6)
    assert len(same) > 10
    assert same.all()
    assert turned.min() > 15
    run = write_run(
        tmp_path / "RUN", planted("apo", [*"xx"] * 7, 3) + planted("", "x" * 14, 4), SPACE
    )
    ocelot_em.merge(run, tmp_path / "SECTORS", group_by="sector")
    same, turned = nearby(ocelot_em.find_peaks(tmp_path / "SECTORS", **options), 6)
    assert {*same.tolist()} == {True, False}
    assert turned.min() > 15


def test_of_two_equal_templates_the_first_wins_everywhere(tmp_path):
    parts = results_of(3, (4000, 5000), None)
    for name in ("A", "B"):
        write_run(tmp_path / f"{name}.zarr", parts)
    shutil.copytree(tmp_path / "B.zarr", tmp_path / "C.zarr")
    stores = [tmp_path / f"{name}.zarr" for name in "ABC"]
    with pytest.raises(InvalidInputError, match="the same partial is given 2 times"):
        ocelot_em.merge(stores, tmp_path / "NO", group_by="template")
    ocelot_em.merge(stores[:2], tmp_path / "O", group_by="template")
    ocelot_em.merge(tmp_path / "A.zarr", tmp_path / "ALONE")
    maps, alone = read_maps(tmp_path / "O"), read_maps(tmp_path / "ALONE")
    groups, second = maps.pop("best_group"), maps.pop("second_zscore")
    assert_same_maps(maps, alone)
    assert (groups == 0).all()
    np.testing.assert_array_equal(second, alone["scaled_mip"])
    found = ocelot_em.find_peaks(tmp_path / "O", cutoff=5.0)
    assert len(found) > 0
    assert {*found["group"]} == {"A"}
    assert (found["zscore_difference"] == 0).all()


@pytest.mark.parametrize("indexed", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_device_gives_the_groups_of_the_cpu(tmp_path, monkeypatch, indexed):
    host_kernels()
    drawn = [(0, [4000, 3000]), (1, [9000])]
    stores, expected = written(tmp_path, drawn, indexed=indexed, ties=True)
    options = {"group_by": "template", "tile_size": 16}
    ocelot_em.merge(stores, tmp_path / "CPU", **options)
    device = lend_device(monkeypatch, LateDevice())
    ocelot_em.merge(stores, tmp_path / "GPU", device="cuda", **options)
    assert "finalise" in device.launched
    assert_best(ocelot_em.open_merged(tmp_path / "GPU"), expected)
    assert_same_maps(read_maps(tmp_path / "GPU"), read_maps(tmp_path / "CPU"))


@pytest.mark.parametrize("group_by", ["template", "sector"])
@pytest.mark.parametrize(
    ("stores", "names"),
    [
        (("a/x/S", "b/x/S"), ("a.x", "b.x")),
        (("a/S", "a/T", "b/S"), ("a.S", "T", "b.S")),
        (("α", "β"), ("group", "group.2")),
        (("a b", "a-b"), ("a-b", "a-b.2")),
    ],
)
def test_searches_without_a_template_name_are_never_pooled(tmp_path, stores, names, group_by):
    parts = results_of(4, (4000,), None)
    paths = [write_run(tmp_path / f"{store}.zarr", parts) for store in stores]
    found = ocelot_em.lazy_merge(paths, group_by=group_by).attrs["groups"]
    if group_by == "template":
        assert found == [*names]
    assert len({*found}) == len(stores)


def test_sectors_and_exposures_are_groups_too(tmp_path):
    parts = results_of(8, (4000, 5000), SPACE)
    write_run(tmp_path / "RUN.zarr", parts, SPACE)
    ocelot_em.merge(tmp_path / "RUN.zarr", tmp_path / "SECTORS", group_by="sector")
    for number, part in enumerate(parts):
        exposure = Exposure(f"gpu{number}", (3, 7), number)
        write_run(tmp_path / "EXPOSURES.zarr", [part], SPACE, replace(INFO, exposure=exposure))
    ocelot_em.merge(tmp_path / "EXPOSURES.zarr", tmp_path / "E", group_by="exposure")
    sectors, exposures = read_maps(tmp_path / "SECTORS"), read_maps(tmp_path / "E")
    assert_same_maps(sectors, exposures)
    expected = best_of_runs([[part] for part in parts], [SPACE, SPACE])
    searched = expected["mip"] > -np.inf
    np.testing.assert_array_equal(sectors["best_group"][searched], expected["best_group"][searched])
    assert ocelot_em.open_merged(tmp_path / "SECTORS").attrs["groups"] == ["gpu0", "gpu1"]


def test_a_merge_of_groups_is_resumed_and_extended(tmp_path, monkeypatch):
    stores = [
        write_run(tmp_path / f"T{seed}.zarr", results_of(seed, (4000,), SPACE), SPACE)
        for seed in range(3)
    ]
    write, n_left = LocalObjects.put, [30]

    def dies(self, key, *arguments, **options):
        if "best_group/c" in key:
            n_left[0] -= 15
            if n_left[0] < 0:
                raise OSError("no space left on device")
        return write(self, key, *arguments, **options)

    monkeypatch.setattr(LocalObjects, "put", dies)
    options = {"group_by": "template", "tile_size": 16}
    with pytest.raises(TilesFailedError):
        ocelot_em.merge(stores[:2], tmp_path / "OUT", **options)
    monkeypatch.undo()
    report = ocelot_em.merge(stores[:2], tmp_path / "OUT", **options)
    assert 0 < report.n_merged < report.n_tiles
    assert ocelot_em.check(tmp_path / "OUT") == []
    ocelot_em.merge(stores, tmp_path / "OUT", **options)
    ocelot_em.merge(stores, tmp_path / "AT_ONCE", **options)
    assert chunk_bytes(tmp_path / "OUT") == chunk_bytes(tmp_path / "AT_ONCE")
    with pytest.raises(OutputExistsError, match="group_by: the output has template"):
        ocelot_em.merge(stores, tmp_path / "OUT", group_by="sector", tile_size=16)


def test_damaged_tables_of_a_group_are_reported(tmp_path):
    for name, space in (("A", SPACE), ("B", OTHER_SPACE)):
        write_run(tmp_path / f"{name}.zarr", results_of(1, (4000,), space), space)
    output = tmp_path / "OUT"
    ocelot_em.merge([tmp_path / "A.zarr", tmp_path / "B.zarr"], output, group_by="template")
    tables = output / "search_spaces" / OTHER_SPACE.digest
    assert (tables / "euler_angles").is_dir()
    for name in ("euler_angles", "defocus_values"):
        own = output / "search_space" / name
        shutil.rmtree(tables / name)
        shutil.copytree(own, tables / name)
    (problem,) = ocelot_em.check(output)
    assert f"search_spaces/{OTHER_SPACE.digest}: the tables are not the ones" in problem


def test_what_cannot_be_grouped_is_refused(tmp_path):
    parts = results_of(8, (4000, 5000), None)
    write_run(tmp_path / "RUN.zarr", parts)
    other_box = replace(INFO, template_box=7, template_name="large")
    write_run(tmp_path / "BOX.zarr", parts, info=other_box)
    for number, origin in enumerate([(0, 0), (0, 20)]):
        info = replace(INFO, exposure=Exposure(f"e{number}", origin, number))
        write_run(tmp_path / "MONTAGE.zarr", parts[number : number + 1], info=info)
    write_run(
        tmp_path / "SMALL.zarr", results_of(9, (70,), None), info=replace(INFO, template_name="a")
    )

    def message(*names, **options):
        with pytest.raises(InvalidInputError) as raised:
            ocelot_em.merge([tmp_path / f"{n}.zarr" for n in names], tmp_path / "OUT", **options)
        return str(raised.value)

    assert "templates must be in boxes of one size" in message("RUN", "BOX", group_by="template")
    assert "are merged as a montage" in message("MONTAGE", group_by="exposure")
    assert "expected a search without exposures" in message("MONTAGE", group_by="template")
    assert "expected exposures to group by" in message("RUN", group_by="exposure")
    assert "use --group-by template" in message("BOX", "SMALL")
    assert "overlap" in message("RUN", group_by="sector", overlap="farthest-from-edge")
    assert ocelot_em.describe(tmp_path / "BOX.zarr").attributes.template_name == "large"


def test_a_report_speaks_of_groups(two_templates, monkeypatch):
    stub_rendering(monkeypatch)
    place, _ = two_templates
    page = ocelot_em.write_report(place / "OUT", place / "report.html", max_zooms=1).read_text()
    assert "montage" not in page.lower().split("</style>")[1].split("<script")[0]
    assert "1: z = 12.00" in page
    assert re.search(r"<td>holo</td>.*>1</td>.*500,000", page)
    by_decoy = ["report", str(place / "OUT"), "--output", str(place / "d.html"), "--estimates"]
    assert run([*by_decoy, "holo"]) == 0
    assert "as they were estimated for these particles" in (place / "d.html").read_text()
    assert run([*by_decoy, "mirror", "--overwrite"]) != 0
