"""Histograms of all correlations: read from cisTEM's files, added exactly, drawn."""

import re

import numpy as np
import pytest
from scipy.stats import norm

import ocelot_em
from builders import explicit_maps, idle_maps
from ocelot_em import CorrelationHistogram, MergedResult, plot_histogram, write_partial
from ocelot_em.errors import InvalidInputError
from ocelot_em.io.beside import _histogram_of

LOW, WIDTH, BINS = -12.5, 35 / 512, 512


def make_histogram(scale):
    edges = LOW + WIDTH * np.arange(BINS + 1)
    counts = np.round(scale * np.diff(norm.cdf(edges))).astype(np.int64)
    counts[-3:] = 7  # particles
    return {"low": LOW, "width": WIDTH, "counts": counts}


def write(place, histograms):
    for number, histogram in enumerate(histograms):
        own = {} if histogram is None else {"correlation_histogram": histogram}
        maps = explicit_maps((40, 50), number)
        write_partial(place, f"gpu{number}", maps | own, total_projections=1000 + number)
    return place


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    place = tmp_path_factory.mktemp("histograms")
    for number, scale in enumerate((1e16, 3e9, 5e5)):
        write(place / f"RUN{number}", [make_histogram(scale)])
    ocelot_em.merge([place / "RUN0", place / "RUN1"], place / "FIRST")
    ocelot_em.merge([place / "FIRST", place / "RUN2"], place / "OUT")
    return place / "OUT"


def test_sums_are_exact_also_in_steps(merged):
    counts = [make_histogram(scale)["counts"] for scale in (1e16, 3e9, 5e5)]
    found = MergedResult.open(merged).correlation_histogram
    assert (found.low, found.width) == (LOW, WIDTH)
    assert found.counts == tuple(np.sum(counts, axis=0).tolist())
    assert found.total == np.sum(counts) == found.survival[0]
    assert found.survival[-1] == 21
    assert (round(found.mean, 6), round(found.std, 3)) == (0, 1)
    noise, above = found.gaussian()
    np.testing.assert_allclose(above, found.total * norm.sf(found.edges[:-1]), rtol=1e-12)
    np.testing.assert_allclose(noise[:-3], found.counts[:-3], atol=100, rtol=1e-6)


def test_without_one_of_all_there_is_none_and_other_bins_are_named(tmp_path):
    search = write(tmp_path / "RUN", [make_histogram(1e6), None])
    ocelot_em.merge(search, tmp_path / "OUT")
    assert MergedResult.open(tmp_path / "OUT").correlation_histogram is None
    with pytest.raises(InvalidInputError, match="histogram of correlations in each partial"):
        plot_histogram(tmp_path / "OUT")
    other = {"low": -1.0, "width": 0.5, "counts": [1, 2]}
    write(tmp_path / "OTHER", [make_histogram(1e6), other])
    with pytest.raises(InvalidInputError, match=r"gpu1: correlation_histogram: .* 2 of 0\.5"):
        ocelot_em.merge(tmp_path / "OTHER", tmp_path / "NOT")
    for wrong in ({}, 5, other | {"counts": [-1]}, other | {"counts": []}, other | {"width": 0}):
        with pytest.raises(InvalidInputError, match="expected low, width and counts"):
            write(tmp_path / "WRONG", [wrong])


def test_idle_devices_have_none_and_sums_may_be_of_any_size(tmp_path):
    search = write(tmp_path / "RUN", [make_histogram(2**64)] * 2)
    nothing = idle_maps(explicit_maps((40, 50)))
    write_partial(search, "idle", nothing, total_projections=0)
    ocelot_em.merge(search, tmp_path / "OUT")
    assert MergedResult.open(tmp_path / "OUT").correlation_histogram.total > 1.9 * 2**64
    empty = CorrelationHistogram(low=0, width=1, counts=(0, 0))
    assert np.isnan([empty.mean, empty.std]).all()


def test_text_of_cistem():
    """Middles of bins, rounded to two digits after those that change; large counts are exact."""
    own = make_histogram(3e16)
    middles = LOW + WIDTH * (np.arange(BINS) + 0.5)
    rows = [
        [f"{x:.6f}", f"{n}.000000", "0.000000", "0.000000"]
        for x, n in zip(middles, own["counts"].tolist(), strict=True)
    ]
    found = _histogram_of(rows)
    assert found.counts == tuple(own["counts"].tolist())
    assert found.low == pytest.approx(LOW, abs=1e-6)
    assert found.width == pytest.approx(WIDTH, abs=1e-8)
    assert isinstance(found, CorrelationHistogram)


def test_the_report_shows_it_beside_a_gaussian(merged, tmp_path):
    axes = plot_histogram(merged, value="survival")
    (noise,) = axes.get_lines()
    total = MergedResult.open(merged).correlation_histogram.total
    values = dict(zip(np.round(noise.get_xdata(), 6), noise.get_ydata(), strict=True))
    nearest = min(values, key=abs)
    assert values[nearest] == pytest.approx(total * norm.sf(nearest))
    page = ocelot_em.write_report(merged, tmp_path / "report.html").read_text()
    assert re.search("as the program of the search counted them", page)
