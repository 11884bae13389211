"""Stores that earlier versions wrote are read for ever, and still merge to the same maps."""

from pathlib import Path

import pytest

import ocelot_em
from conftest import DATA
from helpers import assert_same_maps, read_maps

GOLDEN = sorted(DATA.glob("golden_v*/*_merged.zarr"))


@pytest.mark.parametrize("merged", GOLDEN, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_golden_stores_are_intact_and_merge_to_the_same_bits(merged: Path, tmp_path: Path) -> None:
    search = merged.with_name(merged.name.replace("_merged", ""))
    assert ocelot_em.check(search) == []
    assert ocelot_em.check(merged) == []
    ocelot_em.merge(search, tmp_path / "OUT.zarr", tile_size=17)
    assert_same_maps(read_maps(merged), read_maps(tmp_path / "OUT.zarr"))
    ocelot_em.merge(merged, tmp_path / "AGAIN.zarr")
    assert ocelot_em.describe(tmp_path / "AGAIN.zarr").attributes.total_projections == 2**31 + 71


def test_there_are_golden_stores() -> None:
    assert len(GOLDEN) == 2
