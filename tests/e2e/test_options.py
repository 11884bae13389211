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
    "erode beyond a tile": {"erode": 9},
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
def search(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("searches") / "RUN.zarr"
    if request.param == "montage":
        return write_shots(place, SHOTS[:3])
    rng = np.random.default_rng(0)
    results = [make_result(rng, (40, 37), count, ties=True) for count in (70, 90)]
    return write_search(place, results, (70, 90), indexed=request.param == "indexed")


@pytest.mark.parametrize(("search", "name"), CASES, indirect=["search"])
def test_an_option_gives_the_same_maps_wherever_it_is_merged(
    search: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"tile_size": 8, **OPTIONS[name]}
    ocelot_em.merge(search, tmp_path / "CPU.zarr", **options)
    expected = read_maps(tmp_path / "CPU.zarr")
    lazy = ocelot_em.lazy_merge(search, **options).compute()
    assert set(lazy.data_vars) >= set(expected)
    for key, values in expected.items():
        assert lazy[key].values.tobytes() == values.tobytes(), key
    host_kernels()
    lend_device(monkeypatch, HostDevice())
    ocelot_em.merge(search, tmp_path / "DEVICE.zarr", device="cuda", **options)
    assert_same_maps(expected, read_maps(tmp_path / "DEVICE.zarr"))
