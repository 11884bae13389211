"""What several tests share."""

import os
from pathlib import Path

import numpy as np
import pytest

DATA = Path(__file__).parent / "data"
CROPS = [DATA / f"A_crop_shard{i}.npz" for i in range(4)]
_BESIDE = Path(__file__).parents[2] / "shared" / "data"
SHARED = Path(os.environ.get("OCELOT_SHARED_DATA", _BESIDE)) / "leopard_em_shards"
"""The whole real search, where it exists: too large for the repository."""


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
    monkeypatch.setattr("ocelot_em.format.DEFAULT_CHUNK", edge)
    monkeypatch.setattr("ocelot_em.interop.leopard.DEFAULT_CHUNK", edge)
    return edge


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20260101)
