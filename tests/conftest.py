"""What several tests share."""

import gc
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

# Bytecode is kept, as wherever people work: without it every program that a test starts compiles
# the whole source again, and every process of the tests all tests.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

pytest.register_assert_rewrite("ocelot_em.testing")

DATA = Path(__file__).parent / "data"
CROPS = [DATA / f"A_crop_shard{i}.npz" for i in range(4)]
_BESIDE = Path(__file__).parents[2] / "shared" / "data"
SHARED = Path(os.environ.get("OCELOT_SHARED_DATA", _BESIDE)) / "leopard_em_shards"
"""The whole real search, where it exists: too large for the repository."""


# One profile for all hypothesis tests: no verdict depends on how busy the machine is, and the first
# example may compile. "thorough" only draws more.
settings.register_profile(
    "lean",
    deadline=None,
    max_examples=15,
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.function_scoped_fixture,
        HealthCheck.differing_executors,
    ],
)
settings.register_profile("thorough", settings.get_profile("lean"), max_examples=100)
settings.load_profile("lean")


# Collecting makes a million objects that stay: the garbage collector need not look at them.
gc.disable()


def pytest_collection_finish() -> None:
    """Look for garbage again, among what tests make."""
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Chaos tests, and those that run alone, are of the second tier."""
    for item in items:
        if item.get_closest_marker("chaos") or item.get_closest_marker("alone"):
            item.add_marker("slow")


@pytest.fixture(scope="session", autouse=True)
def own_dashboard_port() -> None:
    """Give every process of the tests a dashboard port of its own.

    Two clusters that start at the same moment both find the usual port free; Dask then leaves a
    socket open in the one that comes second.
    """
    from ocelot_em.run import clusters

    worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0")
    clusters.DASHBOARD_PORT += 1 + int(worker.removeprefix("gw"))


@pytest.fixture
def crops() -> list[Path]:
    """Crops of a real search's four results, both pose forms, 128 x 128 pixels."""
    return CROPS


@pytest.fixture
def tables() -> Path:
    """The search space of the crops."""
    return DATA / "search_space.npz"


@pytest.fixture
def crops_search(crops: list[Path], tmp_path: Path) -> Path:
    """The crops as a search with explicit poses."""
    from ocelot_em import import_results

    import_results(crops, tmp_path / "CROPS.zarr")
    return tmp_path / "CROPS.zarr"


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> int:
    """Write chunks of 32 instead of 1024 pixels, so that small maps have several; their edge."""
    edge = 32
    monkeypatch.setattr("ocelot_em.store.constants.DEFAULT_CHUNK", edge)
    return edge


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20260101)
