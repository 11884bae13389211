"""The report of a montage: placement of exposures, their shown pixels, their own partials."""

import re
from html import unescape
from types import SimpleNamespace

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgba
from scipy.special import ndtr, ndtri

import ocelot_em
from builders import explicit_maps, idle_maps
from helpers import read_maps
from ocelot_em import Exposure, SearchInfo, write_partial
from ocelot_em.errors import InvalidInputError
from ocelot_em.merge.result import MergedResult
from ocelot_em.model.regions import Region
from ocelot_em.particles.picking import find_peaks
from ocelot_em.particles.table import ParticleTable
from ocelot_em.view.coverage import Coverage
from ocelot_em.view.figures import RED
from ocelot_em.view.montage_plots import (
    outline_exposures,
    plot_exposures,
    plot_partials_of_exposures,
    plot_seams,
)
from ocelot_em.view.plots import plot_zscore
from ocelot_em.view.report import save_overview, write_report
from ocelot_em.view.statistics_plots import (
    plot_correlations,
    plot_distributions,
    plot_joint,
    plot_partials,
    plot_survival,
)
from report_pages import RENDERING, stub_rendering

SHAPE = (60, 70)
VALID = (56, 66)
ORIGINS = {"left": (2, -3), "right": (0, 50), "below": (46, 10)}
COUNTS = {"left": (1000, 3000), "right": (500, 500), "below": (20_000, 10_000)}


@pytest.fixture(autouse=True)
def no_windows():
    matplotlib.use("Agg")
    yield
    plt.close("all")


def noise(rng, shape, count):
    """Maxima of as many Gaussian draws as a partial has projections."""
    maps = explicit_maps(shape, int(rng.integers(1000)))
    maps["mip"] = ndtri(rng.random(shape) ** (1 / count)).astype(np.float32)
    maps["correlation_sum"] = (count * rng.normal(0, 0.01, shape)).astype(np.float32)
    maps["correlation_squared_sum"] = np.full(shape, count, np.float32)
    return maps


def plant(maps, y, x, height):
    maps["mip"][y, x] = height
    for name in ("best_phi", "best_theta", "best_psi", "best_defocus"):
        maps[name][y, x] = 30


def write_exposure(place, name, origin, acquired, partials, valid=VALID):
    for number, (maps, count) in enumerate(partials):
        write_partial(
            place / "RUN.zarr",
            f"{name}-gpu{number}",
            maps,
            total_projections=count,
            order=number,
            search=SearchInfo(
                pixel_size_angstrom=3.0, exposure=Exposure(name, origin, acquired, valid)
            ),
        )


@pytest.fixture(scope="module")
def montages(tmp_path_factory):
    """Three exposures, merged by two overlap rules; tests do not change them."""
    place, rng = tmp_path_factory.mktemp("montages"), np.random.default_rng(7)
    for acquired, (name, counts) in enumerate(COUNTS.items()):
        partials = [(noise(rng, SHAPE, count), count) for count in counts]
        if name == "left":
            plant(partials[1][0], 5, 60, 12)  # canvas 7, 60
            plant(partials[1][0], 30, 20, 11)
        if name == "right":
            plant(partials[0][0], 7, 7, 10)  # the same particle, seen later
            plant(partials[1][0], 20, 3, 9.5)  # where the earlier exposure is shown
        write_exposure(place, name, ORIGINS[name], acquired, partials)
    for overlap in ("earliest", "max-zscore"):
        ocelot_em.merge(place / "RUN.zarr", place / f"{overlap}.zarr", overlap=overlap, threads=2)
    return place


@pytest.fixture
def montage(montages):
    return montages / "earliest.zarr"


@pytest.fixture(params=RENDERING)
def words_of(request, monkeypatch):
    """Write a report; figures are not rendered in the fast tier."""
    if request.param == "stubbed":
        stub_rendering(monkeypatch)
    return words_of_drawn


def words_of_drawn(store, tmp_path, **options):
    page = write_report(store, tmp_path / "page.html", **options).read_text(encoding="utf-8")
    assert len(page) < 3e6
    ids = re.findall(r' id="([^"]*)"', page)
    assert len(set(ids)) == len(ids)
    page = re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]*>", " ", page)))


def test_the_page_describes_the_montage(montage, tmp_path):
    words = words_of_drawn(montage, tmp_path)
    for text in (
        "3 exposures",
        "102 × 119 pixels of the canvas, 30.6 × 35.7 nm",
        "1,000 to 30,000 projections per pixel of an exposure",
        "cutoff in each exposure (gaussian)",
        "of all exposures' pixels searched",
        "whose first pixel is (0, -3) in the search",
        "shown or not",
        "expected false positives 1 in each exposure",
    ):
        assert text in words, text
    assert find_peaks(montage).about.cutoff_text in words
    # Both positions, the exposure's own partial, and the other sighting.
    assert "1 left 5 60 7 60 12.000" in words
    assert re.search(r"1 left 5 60 .* left-gpu1 right \(7, 7\) 2 left", words)
    assert re.search(r"3 right 20 3 20 56 9.500 .* right-gpu1 — ", words)
    # Of which pixels the montage shows, and how many particles there are.
    shown = [(read_maps(montage)["source_exposure"] == k).sum() for k in range(3)]
    assert f"left 0 2, 0 3,696 {shown[0]:,}" in words
    assert f"below 2 46, 13 3,696 {shown[2]:,}" in words


def test_other_results_have_no_montage_section(words_of, tmp_path):
    write_partial(tmp_path / "RUN.zarr", "p", explicit_maps((20, 20)), total_projections=1000)
    ocelot_em.merge(tmp_path / "RUN.zarr", tmp_path / "OUT.zarr")
    words = words_of(tmp_path / "OUT.zarr", tmp_path)
    assert "exposure" not in words.lower()
    assert "Montage" not in words
    for plot in (plot_exposures, plot_seams, plot_partials_of_exposures):
        with pytest.raises(InvalidInputError, match="expected a montage"):
            plot(tmp_path / "OUT.zarr")


def test_particles_are_shown_at_their_canvas_positions(words_of, montage, tmp_path, monkeypatch):
    particles = find_peaks(montage)
    y, x = (particles.columns[f"canvas_{axis}"] for axis in "yx")
    drawn = plot_zscore(montage, particles=particles).collections[-1].get_offsets()
    np.testing.assert_array_equal(drawn, np.stack([x, y], axis=1) + 0.5)
    cut_out = []
    monkeypatch.setattr("ocelot_em.view.plots.plot_crop", lambda *given: cut_out.append(given[1]))
    words = words_of(montage, tmp_path, particles=particles, max_zooms=3)
    assert cut_out == list(zip(y[:3].tolist(), x[:3].tolist(), strict=True))
    assert "3: z = 9.50 (hidden)" in words
    assert words.count("(hidden)") == 1
    assert "Where a particle is marked as hidden, the montage shows another exposure." in words


def test_particles_of_another_result_are_refused(montage, tmp_path, rng):
    write_partial(tmp_path / "RUN.zarr", "p", noise(rng, (20, 20), 10), total_projections=10)
    ocelot_em.merge(tmp_path / "RUN.zarr", tmp_path / "OUT.zarr")
    own, page = find_peaks(montage), tmp_path / "page.html"
    other = find_peaks(tmp_path / "OUT.zarr", cutoff=0)
    with pytest.raises(InvalidInputError, match=r"expected particles of a montage, got .* of one"):
        write_report(montage, page, particles=other)
    with pytest.raises(InvalidInputError, match=r"expected particles of one exposure, got .* of a"):
        write_report(tmp_path / "OUT.zarr", page, particles=own)
    columns = {**own.columns, "exposure": np.full(len(own), "elsewhere")}
    with pytest.raises(InvalidInputError, match=r"its exposures, got .* of exposure 'elsewhere'"):
        write_report(montage, page, particles=ParticleTable(columns))
    assert not page.exists()


def test_other_ways_of_picking_have_a_page(words_of, montage, tmp_path):
    particles = find_peaks(montage, per="montage")
    words = words_of(montage, tmp_path, particles=particles)
    assert "cutoff in the montage (gaussian)" in words
    assert "cutoff (-ln p)" in words_of(
        montage, tmp_path, particles=find_peaks(montage, method="pvalue")
    )
    none = find_peaks(montage, cutoff=1e6)
    assert "There are no particles" in words_of(montage, tmp_path, particles=none)
    particles.to_csv(tmp_path / "particles.csv")
    read = ParticleTable.read_csv(tmp_path / "particles.csv")
    assert "no cutoff" in words_of(montage, tmp_path, particles=read)


def test_exposures_are_expected_to_have_noise_of_their_own(montage):
    expected, found = (line.get_data() for line in plot_survival(montage).lines[:2])
    levels = np.asarray(expected[0])
    above = sum(
        3696 * -np.expm1(sum(counts) * np.log1p(-ndtr(-levels))) for counts in COUNTS.values()
    )
    np.testing.assert_allclose(expected[1], above, rtol=1e-6, atol=1e-200)
    # This noise is Gaussian: it is where it is expected.
    at = np.searchsorted(levels, 4.0)
    seen = found[1][np.searchsorted(found[0], 4.0)]
    assert abs(seen - above[at]) < 5 * np.sqrt(above[at])


def test_several_cutoffs_are_marked(montage):
    axes = plot_survival(montage, cutoff=(5.0, 5.5))
    assert "cutoffs 5.00 to 5.50" in [text.get_text() for text in axes.get_legend().get_texts()]
    assert axes.get_xlim()[1] > 5.5
    one = plot_survival(montage, cutoff=(5.0, 5.0))
    assert "cutoff 5.00" in [text.get_text() for text in one.get_legend().get_texts()]


regions = st.builds(
    lambda y, x, height, width: Region(y, min(y + height, 40), x, min(x + width, 50)),
    st.integers(0, 39),
    st.integers(0, 49),
    st.integers(1, 40),
    st.integers(1, 50),
)


@given(st.lists(regions, min_size=1, max_size=8), st.integers(1, 60))
def test_coverage_is_counted_pixel_by_pixel(drawn, longest_edge_px):
    canvas = SimpleNamespace(
        valid_shape=(40, 50), exposures=[SimpleNamespace(on_canvas=region) for region in drawn]
    )
    covers = np.zeros((40, 50), int)
    for region in drawn:
        covers[region.slices] += 1
    coverage = Coverage.of(canvas, longest_edge_px)
    assert coverage.areas == tuple(np.bincount(covers.ravel()))
    assert coverage.covered_pixels == (covers > 0).sum()
    assert coverage.overlap_pixels == (covers > 1).sum()
    factor = coverage.factor
    assert coverage.most.shape == (-(-40 // factor), -(-50 // factor))
    assert max(coverage.most.shape) <= longest_edge_px
    for y, x in np.ndindex(coverage.most.shape):
        block = covers[y * factor : (y + 1) * factor, x * factor : (x + 1) * factor]
        assert coverage.most[y, x] == block.max()


def test_coverage_of_a_large_montage_takes_little_time():
    edges = range(0, 100_000, 3_000)
    fields = [Region(y, y + 4_000, x, x + 4_000) for y in edges for x in edges]
    canvas = SimpleNamespace(
        valid_shape=(103_000, 103_000),
        exposures=[SimpleNamespace(on_canvas=region) for region in fields],
    )
    coverage = Coverage.of(canvas)
    assert sum(coverage.areas) == 103_000**2
    assert sum(n * pixels for n, pixels in enumerate(coverage.areas)) == 4_000**2 * len(fields)


@pytest.mark.parametrize("plot", [plot_exposures, plot_seams, plot_partials_of_exposures])
def test_plots_of_exposures(montage, plot):
    own = plot(montage)
    assert own.figure in map(plt.figure, plt.get_fignums())
    given_axes = plt.figure().add_subplot()
    assert plot(MergedResult.open(montage), given_axes) is given_axes
    given_axes.figure.canvas.draw()


@pytest.mark.parametrize(
    "plot",
    [plot_zscore, plot_survival, plot_distributions, plot_joint, plot_partials, plot_correlations],
)
def test_plots_of_any_merge_are_plots_of_montages(montage, plot):
    plot(montage).figure.canvas.draw()


def test_exposures_are_outlined_and_named_where_there_is_room(montage, tmp_path):
    axes = plot_exposures(montage)
    assert [text.get_text() for text in axes.texts] == list(ORIGINS)
    corners = {(x, y) for x, y in zip(*axes.lines[0].get_data(), strict=True) if x == x}
    assert {(0, 2), (66, 58), (53, 0), (119, 56), (13, 46), (79, 102)} <= corners
    save_overview(montage, tmp_path / "overview.png")

    def labelled(n, step, side):
        plt.close("all")
        axes = plt.figure(figsize=(4, 4), layout="constrained").add_subplot()
        axes.imshow(np.zeros((100, 100)), extent=(0, 100, 100, 0))
        places = [Region(k * step, k * step + side, 0, side) for k in range(n)]
        outline_exposures(
            axes, [SimpleNamespace(id=f"e{k}", on_canvas=own) for k, own in enumerate(places)]
        )
        axes.figure.canvas.draw()
        boxes = [text.get_window_extent() for text in axes.texts]
        assert not any(a.overlaps(b) for k, a in enumerate(boxes) for b in boxes[:k])
        return len(boxes)

    assert labelled(4, 20, 30) == 4
    assert 0 < labelled(9, 1, 60) < 9  # on top of each other
    assert labelled(9, 9, 4) == 0  # too small
    assert labelled(41, 2, 20) == 0  # too many


def test_partials_are_compared_within_their_exposure(words_of, tmp_path, rng):
    """Not with those of an exposure whose correlations are others."""
    scales = {"a": 1.0, "b": 3.0}
    for number, (name, scale) in enumerate(scales.items()):
        partials = [(noise(rng, SHAPE, 1000), 1000) for _ in range(3)]
        for k, (maps, _) in enumerate(partials):
            own = scale * (1.3 if (name, k) == ("b", 2) else 1.0)
            maps["mip"] *= np.float32(own)
            maps["correlation_squared_sum"] *= np.float32(own**2)
        write_exposure(tmp_path, name, (0, 66 * number), number, partials)
    ocelot_em.merge(tmp_path / "RUN.zarr", tmp_path / "OUT.zarr")
    words = words_of(tmp_path / "OUT.zarr", tmp_path)
    assert "Exposure b: input b-gpu2: the correlations of b-gpu2 have a root mean square" in words
    assert "Exposure a:" not in words
    bad = [
        line
        for line in plot_partials_of_exposures(tmp_path / "OUT.zarr", value="rms").lines
        if to_rgba(line.get_color()) == to_rgba(RED)
    ]
    np.testing.assert_allclose(bad[0].get_xdata(), [1.3], rtol=1e-3)
    assert bad[0].get_ydata().tolist() == [1]


def test_a_seam_is_reported(words_of, montages, tmp_path, monkeypatch):
    """The highest of two z-scores is higher than one: overlaps look brighter."""
    for module in ("particles.quality", "view.report_sections"):
        monkeypatch.setattr(f"ocelot_em.{module}.MIN_SHOWN", 100)
    store = montages / "max-zscore.zarr"
    shift = {
        exposure.id: (exposure.overlap.mean - exposure.alone.mean) / exposure.alone.std
        for exposure in MergedResult.open(store).statistics.exposures
        if exposure.overlap.pixels >= 100
    }
    assert len(shift) == 3
    assert max(shift.values()) > 0.25
    words = words_of(store, tmp_path)
    for name, difference in shift.items():
        assert f" {difference:.2f} " in words, name
    # Said once where all overlaps are brighter; of those exposures that are, otherwise.
    assert "Visible seams: the z-scores have a mean of" in words
    assert ": visible seam:" not in words
    drawn = np.concatenate(
        [line.get_xdata() for line in plot_seams(store, value="difference").lines]
    )
    np.testing.assert_allclose(sorted(drawn), sorted(shift.values()))


def test_more_exposures_than_rows(words_of, tmp_path, rng, monkeypatch):
    monkeypatch.setattr("ocelot_em.view.figures.MAX_NAMED_ROWS", 5)
    monkeypatch.setattr("ocelot_em.view.montage_plots.MAX_LABELS", 5)
    monkeypatch.setattr("ocelot_em.view.report_sections.MAX_ROWS", 6)
    for module in ("particles.quality", "view.report_sections"):
        monkeypatch.setattr(f"ocelot_em.{module}.MIN_SHOWN", 10)
    monkeypatch.setattr("ocelot_em.view.report.MAX_WARNINGS", 1)
    monkeypatch.setattr("ocelot_em.view.report.MAX_FOLDED_WARNINGS", 2)
    for k in range(10):
        partials = [(noise(rng, (12, 12), 100), 100) for _ in range(2)]
        for maps, _ in partials:
            maps["mip"][0, 0] = -np.inf  # not searched
            maps["correlation_sum"][3, 3] = maps["correlation_squared_sum"][3, 3] = 0
        write_exposure(tmp_path, f"e{k}", (0, 8 * k), k, partials, (12, 12))
    ocelot_em.merge(tmp_path / "RUN.zarr", tmp_path / "OUT.zarr")
    words = words_of(tmp_path / "OUT.zarr", tmp_path)
    assert "6 of 10 exposures, the largest differences first." in words
    assert "6 of 20 partials, the most unusual first." in words
    assert "10 valid pixels are not searched by any partial (summed over all exposures)." in words
    listed = r"and 4 more 10 valid pixels are without variance.* \(summed over .*\)\. and 3 more "
    assert re.search(listed, words)
    assert not plot_exposures(tmp_path / "OUT.zarr").texts
    montage = MergedResult.open(tmp_path / "OUT.zarr")
    assert list(montage.statistics_of_exposures) == [f"e{k}" for k in range(10)]
    means = plot_seams(montage).lines[0].get_ydata()
    assert (np.diff(means) >= 0).all()


def test_exposures_without_statistics(words_of, tmp_path, rng):
    """One without a search, one of which no pixel is shown, one with a single partial."""
    idle = idle_maps(explicit_maps((20, 20)))
    hidden = noise(rng, (8, 8), 100)
    write_exposure(tmp_path, "shown", (0, 0), 0, [(noise(rng, (20, 20), 100), 100)], (20, 20))
    write_exposure(tmp_path, "hidden", (4, 4), 1, [(hidden, 100)], (8, 8))
    write_exposure(tmp_path, "idle", (0, 30), 2, [(idle, 0)], (20, 20))
    ocelot_em.merge(tmp_path / "RUN.zarr", tmp_path / "OUT.zarr")
    words = words_of(tmp_path / "OUT.zarr", tmp_path)
    assert "No exposure has several partials that could be compared" in words
    assert "No particles could be picked" in words
    assert "400 valid pixels are not searched by any partial" in words
    assert re.search(r"hidden 1 4, 4 64 0 — 100 — — —", words)
    for value in ("mean", "difference"):
        plot_seams(tmp_path / "OUT.zarr", value=value).figure.canvas.draw()
    statistics = MergedResult.open(tmp_path / "OUT.zarr").statistics_of_exposures
    assert set(statistics) == {"shown", "hidden", "idle"}


def test_a_montage_of_one_unsearched_exposure(words_of, tmp_path):
    idle = idle_maps(explicit_maps((12, 9)))
    write_exposure(tmp_path, "only", (0, 0), 0, [(idle, 0), (idle, 0)], (12, 9))
    ocelot_em.merge(tmp_path / "RUN.zarr", tmp_path / "OUT.zarr")
    words = words_of(tmp_path / "OUT.zarr", tmp_path)
    assert "108 valid pixels are not searched by any partial (summed over all exposures)" in words
