"""Stores that earlier versions wrote are read for ever, and still merge to the same maps."""

from pathlib import Path

import numpy as np
import pytest

import ocelot_em
from conftest import DATA
from helpers import assert_same_maps, read_maps
from ocelot_em.picking import all_candidates
from ocelot_em.records import read_summary

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


def test_statistics_and_candidates_are_read_for_ever(tmp_path: Path) -> None:
    golden = DATA / "golden_v1/statistics.zarr"
    assert ocelot_em.check(golden) == []
    ocelot_em.merge(golden.with_name("indexed.zarr"), tmp_path / "OUT.zarr", tile_size=17)
    found, now = read_summary(golden), read_summary(tmp_path / "OUT.zarr")
    assert found is not None
    assert now is not None
    assert found.attributes == now.attributes
    np.testing.assert_array_equal(found.histograms.flat, now.histograms.flat)
    assert len(all_candidates(golden).rows) == found.attributes.n_candidates
    assert len(ocelot_em.find_peaks(golden, cutoff=1.0)) > 0


def test_there_are_golden_stores() -> None:
    assert len(GOLDEN) == 2
