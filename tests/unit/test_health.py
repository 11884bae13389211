"""Partials that are out of line are named."""

import numpy as np
import pytest

import ocelot_em
from helpers import make_result
from ocelot_em.health import partials_out_of_line
from ocelot_em.records import read_summary
from ocelot_em.search import write_partial

SHAPE, COUNTS = (120, 130), (1000, 2000, 1500)


def search_of(rng, counts=COUNTS):
    """Devices whose maxima follow from how much they searched."""
    results = []
    for count in counts:
        result = make_result(rng, SHAPE, count)
        draws = rng.random(SHAPE) ** (1 / count)
        result["mip"] = np.float32(-np.log(-np.log(draws)))
        result["correlation_sum"] = (count * rng.normal(0, 0.05, SHAPE)).astype(np.float32)
        result["correlation_squared_sum"] = np.full(SHAPE, count, np.float32)
        results.append(result)
    return results


def words(place, results, counts=COUNTS):
    for number, (result, count) in enumerate(zip(results, counts, strict=True)):
        write_partial(place / "RUN.zarr", f"gpu{number}", result, total_projections=count)
    ocelot_em.merge(place / "RUN.zarr", place / "OUT.zarr", threads=2)
    return partials_out_of_line(read_summary(place / "OUT.zarr").attributes)


def test_nothing_is_said_of_a_sound_search(tmp_path, rng):
    assert words(tmp_path, search_of(rng)) == []


def test_a_wrong_count(tmp_path, rng):
    said = words(tmp_path, search_of(rng), (1000, 4000, 1500))
    assert any("gpu1: its correlations have a standard deviation of 0.70" in s for s in said)
    assert any(s.startswith("gpu1: won") and "fewer" in s for s in said)


def test_a_share_that_was_searched_twice(tmp_path, rng):
    results = search_of(rng)
    said = words(tmp_path, [*results, results[1]], (*COUNTS, COUNTS[1]))
    assert any(s.startswith("gpu3: has the same sums as gpu1") for s in said)
    assert any(s.startswith("gpu3: won no pixel") for s in said)


def test_a_device_with_other_correlations(tmp_path, rng):
    results = search_of(rng)
    results[2]["correlation_sum"] += np.float32(0.3 * COUNTS[2])
    results[2]["mip"] += 5
    said = words(tmp_path, results)
    assert any(s.startswith("gpu2: its correlations have a mean of 0.3") for s in said)
    assert any(s.startswith("gpu2: won") and "more" in s for s in said)


@pytest.mark.parametrize("counts", [(0,), (5,)])
def test_one_partial_or_none_that_searched(tmp_path, rng, counts):
    results = search_of(rng, (5,))
    if counts == (0,):
        results[0]["mip"][...] = -np.inf
        results[0]["correlation_sum"][...] = results[0]["correlation_squared_sum"][...] = 0
    assert words(tmp_path, results, counts) == []
