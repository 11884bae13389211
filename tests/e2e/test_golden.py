"""Stores that earlier versions wrote are read for ever, and still merge to the same maps."""

import re
import shutil
import tarfile
from pathlib import Path, PurePosixPath

import numpy as np
import pytest

import ocelot_em
from conftest import DATA
from helpers import SPACE, assert_same_maps, make_result, read_maps, with_tables
from ocelot_em.merge.result import MergedResult
from ocelot_em.particles.picking import all_candidates


def _packed() -> dict[str, list[str]]:
    """Names of the golden stores with those of their archives, by what they are."""
    found: dict[str, list[str]] = {}
    for archive in sorted(DATA.glob("golden_v*.tar.xz")):
        with tarfile.open(archive) as stores:
            names = {PurePosixPath(*PurePosixPath(name).parts[:2]) for name in stores.getnames()}
        for name in sorted(names):
            found.setdefault(name.stem.rpartition("_")[2], []).append(str(name))
    return found


STORES = _packed()


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("golden")
    for archive in DATA.glob("golden_v*.tar.xz"):
        with tarfile.open(archive) as stores:
            stores.extractall(place, filter="data")
    return place


@pytest.fixture
def golden(unpacked: Path, request: pytest.FixtureRequest) -> Path:
    """The path of a golden store, whose name is the parameter."""
    return unpacked / request.param


def each(kind: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("golden", STORES[kind], indirect=True)


@each("merged")
def test_golden_stores_are_intact_and_merge_to_the_same_bits(golden: Path, tmp_path: Path) -> None:
    merged = golden
    search = merged.with_name(merged.name.replace("_merged", ""))
    assert ocelot_em.check(search) == []
    assert ocelot_em.check(merged) == []
    is_montage = merged.name.startswith("montage")
    overlap = "max-zscore" if is_montage else "earliest"
    ocelot_em.merge(search, tmp_path / "OUT.zarr", tile_size=17, overlap=overlap)
    assert_same_maps(read_maps(merged), read_maps(tmp_path / "OUT.zarr"))
    if is_montage:
        again = ocelot_em.merge(search, tmp_path / "OUT.zarr", overlap=overlap)
        assert (again.n_merged, len(ocelot_em.describe(merged).exposures)) == (0, 3)
        found, now = (MergedResult.open(place).summary for place in (merged, tmp_path / "OUT.zarr"))
        rounded = {"sources", "exposures", "tables"}
        assert found.attributes.model_dump(exclude=rounded) == now.attributes.model_dump(
            exclude=rounded
        )
        assert len(ocelot_em.find_peaks(merged, cutoff=6.0)) > 0
    else:
        ocelot_em.merge(merged, tmp_path / "AGAIN.zarr")
        total = ocelot_em.describe(tmp_path / "AGAIN.zarr").attributes.total_projections
        assert total == 2**31 + 71


@pytest.mark.parametrize(
    ("name", "of", "n_redone"),
    [
        ("statistics", "indexed", 1),
        ("indexed_merged", "indexed", 2),
        ("explicit_merged", "explicit", 2),
    ],
)
def test_version_1_is_gone_on_with(
    name: str, of: str, n_redone: int, unpacked: Path, tmp_path: Path
) -> None:
    """A merge that was interrupted, with records of its tiles or without; and a new partial."""
    search = shutil.copytree(unpacked / f"golden_v1/{of}.zarr", tmp_path / "RUN.zarr")
    merged = shutil.copytree(unpacked / f"golden_v1/{name}.zarr", tmp_path / "OUT.zarr")
    root = merged / "zarr.json"
    moved = re.sub(rf'"[^"]*/{of}.zarr"', f'"{search}"', root.read_text())
    root.write_text(moved.replace('"complete"', '"writing"'))
    shutil.rmtree(merged / "progress/tile_summary/c/0/1")
    poses = "index" if name == "statistics" else "decoded"
    assert ocelot_em.merge(search, merged, tile_size=24, poses=poses).n_merged == n_redone
    assert_same_maps(read_maps(unpacked / f"golden_v1/{name}.zarr"), read_maps(merged))
    assert ocelot_em.check(merged) == []
    result = make_result(np.random.default_rng(0), (24, 40), 9)
    info = ocelot_em.SearchInfo(search_space=SPACE if of == "indexed" else None)
    ocelot_em.write_partial(search, "new", result, total_projections=9, search=info)
    assert ocelot_em.check(search) == []
    assert ocelot_em.describe(search).attributes.format_version == 3


@each("statistics")
def test_statistics_and_candidates_are_read_for_ever(golden: Path, tmp_path: Path) -> None:
    assert ocelot_em.check(golden) == []
    ocelot_em.merge(golden.with_name("indexed.zarr"), tmp_path / "OUT.zarr", tile_size=17)
    found, now = MergedResult.open(golden).summary, MergedResult.open(tmp_path / "OUT.zarr").summary
    exact = {"sources", "tables"}  # they have sums of floats; early versions had no digests
    assert found.attributes.model_dump(exclude=exact) == now.attributes.model_dump(exclude=exact)
    for one, other in zip(found.attributes.sources, now.attributes.sources, strict=True):
        assert one.model_dump(exclude={"name"}) == pytest.approx(
            other.model_dump(exclude={"name"}), rel=1e-12
        )
    for part in ("mip", "z", "joint"):
        one, other = (getattr(summary.histograms, part) for summary in (found, now))
        np.testing.assert_array_equal(one, other)
    assert len(all_candidates(golden).rows) == found.attributes.n_candidates
    assert len(ocelot_em.find_peaks(golden, cutoff=1.0)) > 0


@each("tables")
def test_correlation_tables_are_read_for_ever(golden: Path, tmp_path: Path) -> None:
    assert ocelot_em.check(golden) == []
    ocelot_em.merge(golden, tmp_path / "OUT.zarr", tile_size=24)
    columns = {"pos_y": "pos_y", "pos_x": "pos_x", "global_index": "global_idx"}
    columns["correlation"] = "corr_value"
    blocks = list(ocelot_em.read_correlations(tmp_path / "OUT.zarr", cutoff=-100))
    for number, result in enumerate(with_tables([{}, {}])):
        own = [block for block in blocks if (block["partial"] == number).all()]
        for name, stored in columns.items():
            found = sorted(np.concatenate([block[name] for block in own]))
            assert found == sorted(result["correlation_table"][stored])


@each("groups")
def test_groups_are_read_for_ever(golden: Path, tmp_path: Path) -> None:
    """The first group won about half of the pixels, and is merged again alone."""
    assert ocelot_em.check(golden) == []
    ocelot_em.merge(golden.with_name("indexed.zarr"), tmp_path / "OUT.zarr", tile_size=24)
    maps, alone = ocelot_em.open_merged(golden), ocelot_em.open_merged(tmp_path / "OUT.zarr")
    won = maps.best_group.values == 0
    assert 0.3 < won.mean() < 0.7
    for name in ("mip", "scaled_mip", "best_phi", "best_defocus", "correlation_std"):
        np.testing.assert_array_equal(maps[name].values[won], alone[name].values[won])
    np.testing.assert_array_equal(maps.second_zscore.values[~won], alone.scaled_mip.values[~won])
    assert (maps.best_phi.values[~won] == 7).all()
    assert {*ocelot_em.find_peaks(golden, cutoff=5.0)["group"]} == {"indexed", "other"}


def test_there_are_golden_stores() -> None:
    n_stores = {kind: len(STORES[kind]) for kind in ("merged", "statistics", "tables", "groups")}
    assert n_stores == {"merged": 9, "statistics": 3, "tables": 1, "groups": 1}
