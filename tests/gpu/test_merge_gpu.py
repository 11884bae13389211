"""Whole merges on a GPU; everything here is skipped, with the reason, where there is none."""

import importlib.util

import numpy as np
import pytest

import ocelot_em
from gpu_kernels import needs_gpu
from helpers import chunk_values, make_result, write_search
from ocelot_em.errors import DeviceMemoryError
from ocelot_em.kernels.device import find_devices, open_device
from ocelot_em.testing.simulation import Simulation, simulate

pytestmark = needs_gpu

COUNTS = (1000, 2**31 + 7, 300, 25, 3)


@pytest.mark.parametrize("nan", ["raise", "mask"])
@pytest.mark.parametrize("indexed", [False, True], ids=["explicit", "indexed"])
@pytest.mark.parametrize("tile_size", [100, None])
def test_the_gpu_gives_the_bytes_of_the_cpu(tmp_path, rng, indexed, nan, tile_size):
    results = [make_result(rng, (1100, 1500), count, ties=True) for count in COUNTS]
    results[1]["mip"][:3], results[1]["best_global_index"][:3] = -np.inf, -1
    search = write_search(tmp_path / "RUN.zarr", results, COUNTS, indexed=indexed)
    options = {"tile_size": tile_size, "nan": nan, "threads": 4}
    ocelot_em.merge(search, tmp_path / "CPU.zarr", **options)
    ocelot_em.merge(search, tmp_path / "GPU.zarr", device="cuda", **options)
    assert chunk_values(tmp_path / "GPU.zarr") == chunk_values(tmp_path / "CPU.zarr")


@pytest.fixture
def limited_pool():
    """CuPy's memory pool, empty, with a limit of 1 GiB."""
    import cupy

    pool = cupy.get_default_memory_pool()
    pool.free_all_blocks()
    before = pool.get_limit()
    pool.set_limit(size=2**30)
    yield pool
    pool.set_limit(size=before)


@pytest.mark.slow
def test_a_search_larger_than_the_memory_limit(tmp_path, limited_pool):
    # 16 partials of 4096 x 4096 explicit maps: 8.6 GB.
    search = simulate(tmp_path, Simulation((4096, 4096), 16, 10, 1), n_threads=8)
    plan = {}

    class Note(ocelot_em.Observer):
        def planned(self, ready, options):
            plan["device"], plan["nbytes"] = ready.forecast.device, ready.forecast.device_nbytes

    ocelot_em.merge(search, tmp_path / "GPU.zarr", device="cuda", threads=4, observer=Note())
    assert plan["device"].memory_nbytes <= 2**30
    assert limited_pool.total_bytes() <= plan["nbytes"] <= 2**30
    ocelot_em.merge(search, tmp_path / "CPU.zarr", threads=4)
    assert chunk_values(tmp_path / "GPU.zarr") == chunk_values(tmp_path / "CPU.zarr")


def test_no_memory_is_said_in_numbers(limited_pool):
    with pytest.raises(DeviceMemoryError, match="bytes more do not fit"):
        open_device().empty(2**28 + 1, "f4")


def test_facts():
    facts = find_devices()
    assert facts[0].name
    assert facts[0].memory_nbytes > 2**30


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("dask_cuda") is None, reason="needs dask-cuda")
def test_a_cluster_of_gpu_workers(tmp_path, rng):
    results = [make_result(rng, (600, 700), count, ties=True) for count in COUNTS]
    search = write_search(tmp_path / "RUN.zarr", results, COUNTS)
    ocelot_em.merge(search, tmp_path / "CPU.zarr", tile_size=128)
    ocelot_em.merge(search, tmp_path / "GPU.zarr", tile_size=128, cluster="cuda", threads=2)
    assert chunk_values(tmp_path / "GPU.zarr") == chunk_values(tmp_path / "CPU.zarr")
