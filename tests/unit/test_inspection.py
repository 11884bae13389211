"""Checking a store: silence if it is intact, and otherwise the place of every damage."""

import json
import shutil

import numpy as np
import pytest

from builders import (
    SPACE,
    flip_byte,
    root_of,
    snapshot,
    unsealed,
    write_explicit_search,
    write_indexed_search,
)
from ocelot_em import check, describe, merge
from ocelot_em.errors import FormatError, StoreNotFoundError
from ocelot_em.model.maps import INDEX, MAPS, MIP, SUM
from ocelot_em.model.regions import Region
from ocelot_em.store import arrays as store
from ocelot_em.store.objects import open_objects

pytestmark = pytest.mark.usefixtures("small_chunks")

SHAPE = (40, 50)


@pytest.fixture
def run(tmp_path):
    return write_indexed_search(tmp_path / "R", SHAPE, n_partials=2)


@pytest.fixture
def merged(run, tmp_path):
    merge(run, tmp_path / "M", tile_size=32)
    return tmp_path / "M"


def edit(file, *keys, value):
    """Change one value of a JSON document, in a store whose metadata nothing covers."""
    unsealed(root_of(file))
    document = json.loads(file.read_text())
    inner = document
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    file.write_text(json.dumps(document))


def set_pixel(group, name, pixel, value):
    unsealed(root_of(group / "zarr.json"))
    chunked = store.open_map(open_objects(group), name, name, MAPS[name].dtypes)
    values, _ = chunked.read(Region.whole(chunked.shape))
    values[pixel] = value
    chunked.write(Region.whole(chunked.shape), values)


def assert_one_problem(place, *parts):
    problems = check(place)
    assert len(problems) == 1, problems
    assert all(part in problems[0] for part in (str(place), *parts)), problems


def test_intact_stores_have_no_problems(run, merged, crops_search, tmp_path):
    explicit = write_explicit_search(tmp_path / "E", SHAPE)
    merge([merged, write_indexed_search(tmp_path / "S", SHAPE, 1)], tmp_path / "N", nan="mask")
    shares = []
    for place in (run, merged, crops_search, explicit, tmp_path / "N"):
        assert check(place, shares.append) == []
        assert shares[-1] == 1.0
    assert shares[:2] == [0.5, 1.0]


def test_checking_changes_nothing(run, merged):
    before = snapshot(run), snapshot(merged)
    check(run)
    check(merged)
    assert (snapshot(run), snapshot(merged)) == before


# What is wrong with a search


DAMAGE = {
    "flipped byte": (
        lambda p: flip_byte(p / "mip/c/1/1"),
        ["'gpu1': mip: chunk (1, 1), pixels [32:40, 32:50], is corrupt"],
    ),
    "truncated chunk": (
        lambda p: (p / "mip/c/0/0").write_bytes(b"1234"),
        ["'gpu1': mip: chunk (0, 0)", "is corrupt"],
    ),
    "deleted chunk": (
        lambda p: (p / "correlation_sum/c/0/1").unlink(),
        ["'gpu1': correlation_sum: chunk (0, 1), pixels [0:32, 32:50], is missing"],
    ),
    "deleted map": (
        lambda p: shutil.rmtree(p / "mip"),
        ["'gpu1': mip: the array is missing"],
    ),
    "map of another shape": (
        lambda p: edit(p / "mip/zarr.json", "shape", value=[40, 49]),
        ["'gpu1': mip: expected shape (40, 50), got (40, 49)"],
    ),
    "map of another type": (
        lambda p: edit(p / "mip/zarr.json", "data_type", value="float64"),
        ["'gpu1': mip: data_type: expected float32, got 'float64'"],
    ),
    "metadata cut short": (
        lambda p: (p / "mip/zarr.json").write_text('{"zarr_format"'),
        ["partials/gpu1/mip: cannot be read as Zarr"],
    ),
    "NaN": (
        lambda p: set_pixel(p, "mip", (33, 40), np.nan),
        ["partial 'gpu1': mip: NaN at 1 pixel, first (33, 40)"],
    ),
    "index beyond": (
        lambda p: set_pixel(p, INDEX, (33, 40), SPACE.n_poses),
        ["partial 'gpu1': best_global_index: expected -1 to 41, got 42", "first (33, 40)"],
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_of_a_partial_is_named_with_its_place(run, damage):
    do, parts = DAMAGE[damage]
    unsealed(run)
    do(run / "partials" / "gpu1")
    assert_one_problem(run, *parts)


def test_an_unfinished_partial_is_named(run):
    edit(run / "partials/gpu1/zarr.json", "attributes", "ocelot", "state", value="writing")
    problems = check(run)
    assert len(problems) == 2
    assert "partial 'gpu1' was never finished" in problems[0]
    assert "the partials add up to 1000, the root has 2001" in problems[1]


def test_counts_that_do_not_add_up_are_named(run):
    edit(run / "zarr.json", "attributes", "ocelot", "total_projections", value=7)
    assert_one_problem(run, "the partials add up to 2001, the root has 7")


def test_tables_that_are_missing_or_others_are_named(run, tmp_path):
    shutil.copytree(run, tmp_path / "S")
    shutil.rmtree(run / "search_space" / "defocus_values")
    assert_one_problem(run, "search_space/defocus_values")
    flip_byte(tmp_path / "S" / "search_space/euler_angles/c/0/0", 30)
    assert_one_problem(tmp_path / "S", "search_space/euler_angles")


def test_attributes_of_one_partial_do_not_hide_the_problems_of_another(run):
    edit(run / "partials/gpu0/zarr.json", "attributes", "ocelot", "order", value="first")
    flip_byte(run / "partials/gpu1/mip/c/0/0")
    problems = check(run)
    assert len(problems) == 3
    assert "partials/gpu0: order" in problems[0]
    assert "add up" in problems[1]
    assert "'gpu1': mip: chunk (0, 0)" in problems[2]


def test_every_damage_is_named_at_once(run):
    partials = run / "partials"
    flip_byte(partials / "gpu0/mip/c/0/0")
    (partials / "gpu0/mip/c/1/1").unlink()
    flip_byte(partials / "gpu1/correlation_squared_sum/c/1/0")
    set_pixel(partials / "gpu1", SUM, (0, 0), np.nan)
    problems = check(run)
    assert len(problems) == 4
    assert [MIP in problem for problem in problems] == [True, True, False, False]


def test_a_search_without_partials_has_a_problem(run):
    shutil.rmtree(run / "partials")
    edit(run / "zarr.json", "attributes", "ocelot", "total_projections", value=0)
    assert_one_problem(run, "the search has no partials")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "expected an ocelot-em store, got nothing there"),
        ("", "cannot be read as Zarr"),
        ('{"zarr_format": 3, "node_type": "group"}', "not an ocelot-em store"),
    ],
)
def test_what_is_no_store_is_one_problem(tmp_path, content, problem):
    if content is not None:
        (tmp_path / "X").mkdir()
        (tmp_path / "X" / "zarr.json").write_text(content)
    assert_one_problem(tmp_path / "X", problem)


def test_a_file_in_place_of_a_store_is_one_to_import(tmp_path):
    (tmp_path / "gpu0.npz").touch()
    assert_one_problem(tmp_path / "gpu0.npz", "got a file", "ocelot import")


# What is wrong with a merged result


@pytest.mark.parametrize("key", ["mip", "scaled_mip", "best_partial", "best_phi", INDEX])
def test_damage_of_a_merged_map_is_named_with_its_place(merged, key):
    flip_byte(merged / key / "c/1/0")
    assert_one_problem(merged, f"{key}: chunk (1, 0), pixels [32:40, 0:32], is corrupt")


def test_an_unfinished_merge_is_named_with_its_progress(merged):
    edit(merged / "zarr.json", "attributes", "ocelot", "state", value="writing")
    (merged / "progress/tile_summary/c/1/1/0").unlink()
    assert_one_problem(merged, "never finished: 3 of 4 tiles are done")


def test_counts_of_a_merge_that_do_not_add_up_are_named(merged):
    edit(merged / "zarr.json", "attributes", "ocelot", "total_projections", value=7)
    assert_one_problem(merged, "its partials add up to 2001, the root has 7")


def test_a_plan_that_is_none_is_named(merged):
    edit(merged / "zarr.json", "attributes", "ocelot", "plan", "tile", value="large")
    assert_one_problem(merged, "plan: tile")
    with pytest.raises(FormatError, match="plan: tile"):
        describe(merged)


# What a store says of itself


def test_describing_a_search(run):
    info = describe(run)
    assert info.url == str(run)
    assert info.attributes.kind == "search"
    assert info.partials == (("gpu0", "complete", 1000), ("gpu1", "complete", 1001))
    assert (info.tiles_done, info.n_tiles) == (0, 0)
    files = [path for path in run.rglob("*") if path.is_file()]
    assert info.stored_nbytes == sum(path.stat().st_size for path in files)


def test_describing_a_merge(merged):
    info = describe(merged)
    assert info.attributes.kind == "merged"
    assert info.partials == (("gpu0", "complete", 1000), ("gpu1", "complete", 1001))
    assert (info.tiles_done, info.n_tiles) == (4, 4)
    (merged / "progress/tile_summary/c/1/1/0").unlink()
    assert describe(merged).tiles_done == 3


def test_describing_reads_no_maps(run, merged):
    for place in (run, merged):
        for chunk in place.rglob("mip/c"):
            shutil.rmtree(chunk)
        describe(place)


def test_describing_what_is_not_there(tmp_path):
    with pytest.raises(StoreNotFoundError):
        describe(tmp_path / "X")
    assert not (tmp_path / "X").exists()
