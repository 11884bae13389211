"""Every option that changes maps, on plain searches and montages: stored, lazy, on a device."""

from pathlib import Path

import numpy as np
import pytest

import ocelot_em
from helpers import assert_same_maps, make_result, read_maps, write_search
from host_device import HostDevice, host_kernels, lend_device
from montages import SHOTS, write_shots

SLOW = pytest.mark.slow

OPTIONS = {
    "none": {},
    "erode": {"erode": 3},
    "erode beyond a tile": {"erode": 9, "tile_size": 8},
    "mask": {"nan": "mask"},
    "index": {"poses": "index"},
    "all": {"erode": 2, "nan": "mask", "poses": "index"},
    "max-zscore": {"overlap": "max-zscore", "erode": 1},
    "farthest": {"overlap": "farthest-from-edge"},
}


KINDS = ("explicit", "indexed", "montage")
LEAN = {("indexed", "all"), ("montage", "all"), ("montage", "max-zscore")}
CASES = [
    pytest.param(kind, name, marks=() if kind == "explicit" or (kind, name) in LEAN else SLOW)
    for kind in KINDS
    for name in OPTIONS
]


@pytest.fixture(scope="module")
def search(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, int]:
    """A search, and the size of tiles that makes about ten of it."""
    place = tmp_path_factory.mktemp("searches") / "RUN.zarr"
    if request.param == "montage":
        return write_shots(place, SHOTS[:3]), 20
    rng = np.random.default_rng(0)
    results = [make_result(rng, (24, 21), count, ties=True) for count in (70, 90)]
    return write_search(place, results, (70, 90), indexed=request.param == "indexed"), 8


@pytest.mark.parametrize(("search", "name"), CASES, indirect=["search"])
def test_an_option_gives_the_same_maps_wherever_it_is_merged(
    search: tuple[Path, int], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, tile_size = search
    options = {"tile_size": tile_size, **OPTIONS[name]}
    ocelot_em.merge(place, tmp_path / "CPU.zarr", **options)
    expected = read_maps(tmp_path / "CPU.zarr")
    lazy = ocelot_em.lazy_merge(place, **options).compute()
    assert set(lazy.data_vars) >= set(expected)
    for key, values in expected.items():
        assert lazy[key].values.tobytes() == values.tobytes(), key
    host_kernels()
    lend_device(monkeypatch, HostDevice())
    ocelot_em.merge(place, tmp_path / "DEVICE.zarr", device="cuda", **options)
    assert_same_maps(expected, read_maps(tmp_path / "DEVICE.zarr"))
