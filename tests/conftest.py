"""What several tests share."""

from pathlib import Path

import numpy as np
import pytest

DATA = Path(__file__).parent / "data"
CROPS = [DATA / f"A_crop_shard{i}.npz" for i in range(4)]
SHARED = Path(__file__).parents[2] / "shared" / "data" / "leopard_em_shards"


@pytest.fixture
def crops() -> list[Path]:
    """Crops of a real search's four results, both pose forms, 128 x 128 pixels."""
    return CROPS


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20260101)
