"""Real searches by Leopard-EM: our merge of its devices' results against its own answer."""

from pathlib import Path

import numpy as np
import pytest

import ocelot_em
from conftest import DATA, SHARED
from helpers import read_maps
from ocelot_em.io.import_options import ImportOptions, read_search_space_file
from ocelot_em.io.leopard import import_results
from ocelot_em.model.maps import POSES, AnyArray


def merged_maps(
    shards: list[Path], tables: Path, place: Path, *, indexed: bool, template_box: int | None
) -> dict[str, AnyArray]:
    import_results(
        shards,
        place / "RUN.zarr",
        ImportOptions(
            search_space=tables if indexed else None,
            template_box=template_box,
            pixel_size_angstrom=2.5,
        ),
    )
    ocelot_em.merge(place / "RUN.zarr", place / "OUT.zarr", tile_size=100)
    return read_maps(place / "OUT.zarr")


def assert_is_official(maps: dict[str, AnyArray], official: Path, tables: Path) -> None:
    with np.load(official, allow_pickle=False) as file:
        expected = dict(file)
    np.testing.assert_array_equal(maps["mip"], expected["mip"])
    poses = read_search_space_file(tables).decode(expected["best_global_index"])
    for name, pose in zip(POSES, poses, strict=True):
        np.testing.assert_array_equal(maps[name], pose, err_msg=name)
    if "best_global_index" in maps:
        np.testing.assert_array_equal(maps["best_global_index"], expected["best_global_index"])
    # Leopard-EM adds up in float32 and calls the standard deviation a variance.
    for name, theirs, tolerance in (
        ("correlation_mean", "correlation_mean", 1e-6),
        ("correlation_std", "correlation_variance", 2e-6),
        ("scaled_mip", "scaled_mip", 1e-5),
    ):
        assert np.abs(maps[name] - expected[theirs]).max() <= tolerance, name


@pytest.mark.parametrize("indexed", [False, True], ids=["explicit", "indexed"])
def test_crops_of_a_real_search(tmp_path: Path, crops: list[Path], indexed: bool) -> None:
    tables = DATA / "search_space.npz"
    maps = merged_maps(crops, tables, tmp_path, indexed=indexed, template_box=None)
    assert_is_official(maps, DATA / "A_crop_official.npz", tables)


@pytest.mark.skipif(
    not SHARED.is_dir(), reason="the whole real search is not on this machine; its crops were used"
)
@pytest.mark.parametrize("indexed", [False, True], ids=["explicit", "indexed"])
def test_a_whole_real_search(tmp_path: Path, indexed: bool) -> None:
    shards = [SHARED / f"A_shard{i}.npz" for i in range(4)]
    tables = SHARED / "search_space.npz"
    maps = merged_maps(shards, tables, tmp_path, indexed=indexed, template_box=56)
    assert_is_official(maps, SHARED / "A_official_full.npz", tables)
    attributes = ocelot_em.describe(tmp_path / "OUT.zarr").attributes
    assert attributes.total_projections == 129_600
    assert attributes.valid_shape == (377, 425)
