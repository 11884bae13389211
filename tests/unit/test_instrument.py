"""The interactive part of the report: what is in its data, and what a browser does with it."""

import gzip
import json
import re
from base64 import b64decode

import numpy as np
import pytest

import ocelot_em
from browser import CHROMIUM, open_page, wait_for
from conftest import CROPS
from ocelot_em import ImportOptions, estimate, import_results
from ocelot_em.merge.result import MergedResult
from ocelot_em.particles.candidate_rules import p_value_model
from ocelot_em.particles.picking import find_peaks
from ocelot_em.particles.population import Population
from ocelot_em.particles.table import COLUMNS, ParticleTable
from ocelot_em.view import instrument, report
from ocelot_em.view.report import report_page, write_report
from report_pages import stub_rendering

INSIDE = """
var all = (root) => [...root.querySelectorAll("*")].flatMap(
  (one) => [one, ...(one.shadowRoot ? all(one.shadowRoot) : [])]);
var inside = (id, selector) => all(document.getElementById(id)).filter(
  (one) => one.matches(selector));
var middle = (one) => {
  one.scrollIntoView({ block: "center", behavior: "instant" });
  const box = one.getBoundingClientRect();
  return [box.x + box.width / 2, box.y + box.height / 2];
};
"""
"""Functions that find elements in the shadows of others, and their places in the window."""

FILTER = """{
  const field = document.getElementById("live-filter");
  field.value = "%s";
  field.dispatchEvent(new Event("input"));
}"""


@pytest.fixture(scope="module")
def crops(tmp_path_factory):
    """A merge of the real crops; tests do not change it."""
    place = tmp_path_factory.mktemp("crops")
    import_results(CROPS, place / "RUN.zarr", ImportOptions(pixel_size_angstrom=2.5))
    ocelot_em.merge(place / "RUN.zarr", place / "OUT.zarr")
    return place / "OUT.zarr"


@pytest.fixture(autouse=True)
def no_rendering(monkeypatch):
    """Leave out the static figures."""
    stub_rendering(monkeypatch)
    monkeypatch.setattr(report, "make_instrument", instrument.make_instrument)


def live_data(page):
    """The data of the interactive part of a page."""
    packed = re.findall(rb'<script type="text/plain" class="packed">(.*?)</script>', page)
    return json.loads(gzip.decompress(b64decode(packed[-1])))


def column_of(data, name):
    """A column of the particles in the data."""
    found = re.search(rf'\["{name}",(\{{.*?\}})\]', json.dumps(data, separators=(",", ":")))
    packed = b64decode(json.loads(found[1])["array"]["data"])
    return np.frombuffer(gzip.decompress(packed), np.float32)


def test_weaker_peaks_are_there_for_lower_cutoffs(crops):
    data = live_data(report_page(crops))
    strong, weak = find_peaks(crops), find_peaks(crops, cutoff=5.8)
    assert len(weak) > len(strong) > 0
    shown = re.search(
        r'"IndexFilter".*?"indices":\[([^]]*)\]', json.dumps(data, separators=(",", ":"))
    )
    assert len(shown[1].split(",")) == len(strong)


@pytest.mark.parametrize("is_masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("method", ["gaussian", "gev", "pvalue"])
def test_the_expected_number_of_false_positives_is_that_of_the_picking(crops, method, is_masked):
    """At the cutoff, as many as the cutoff was computed for: of allowed pixels only."""
    mask = np.indices((128, 128)).sum(axis=0) < 150 if is_masked else None
    particles = find_peaks(crops, method=method, mask=mask)
    page = report_page(crops, particles=particles)
    data = live_data(page)
    assert (b"Grey areas are excluded" in page) == is_masked
    assert ('"excluded"' in json.dumps(data)) == is_masked
    y, x = (np.rint(column_of(data, name) * 4 - 0.5) for name in ("map_y", "map_x"))
    assert not is_masked or (y + x < 150).all()  # weaker peaks, too
    slider = next(root for root in data["document"]["roots"] if root["name"] == "Slider")
    start, step, value = (slider["attributes"][name] for name in ("start", "step", "value"))
    at_cutoff = data["expected"][round((value - start) / step)]
    pixels = 128 * 128 if mask is None else mask.sum()
    expected = pixels * np.exp(-8) if method == "pvalue" else 1.0
    assert at_cutoff == pytest.approx(expected, rel=1e-3)
    assert (np.diff(data["expected"]) <= 0).all()


@pytest.mark.parametrize("is_given", [False, True], ids=["noise", "decoy"])
def test_the_slider_has_the_estimates_at_every_cutoff(crops, is_given):
    """By the model of noise from the numbers beside them, else those of the last particle above."""
    particles = find_peaks(crops, cutoff=6.0)
    if is_given:
        particles = estimate(particles, decoy=particles[1::3])
    data = live_data(report_page(crops, particles=particles))
    slider = next(root for root in data["document"]["roots"] if root["name"] == "Slider")
    start, step, cutoff = (slider["attributes"][name] for name in ("start", "step", "value"))
    assert ("precision" in data["titles"]) == is_given  # also beside peaks below the cutoff
    assert ("recall" in data["columns"]) == is_given
    z = particles["scaled_mip"]
    for number, precision in enumerate(data["estimates"]["precision"]):
        level = start + step * number
        n = int((z >= level - 1e-6).sum())
        if level < cutoff - 1e-6:  # of weaker peaks
            continue
        if not n:
            assert precision is None
        elif is_given:
            assert precision == pytest.approx(particles["precision"][n - 1], abs=6e-4)
        else:
            expected = max(1 - data["expected"][number] / n, 0)
            assert precision == pytest.approx(expected, abs=2e-3)
    recall = estimate(particles, crops)["recall"] if not is_given else particles["recall"]
    at_cutoff = data["estimates"]["recall"][round((cutoff - start) / step)]
    assert at_cutoff == pytest.approx(recall[-1], abs=0.02)


def test_the_contour_of_p_values_separates_the_particles(crops):
    particles = find_peaks(crops, method="pvalue")
    data = live_data(report_page(crops, particles=particles))
    (mip,), (z,) = (data["contours"][0][name] for name in "xy")
    model = p_value_model(Population(MergedResult.open(crops), 0))
    # Ranks are steps, so lines between the points of a grid are near 8 only.
    assert np.median(model.neg_log_p(mip, z)) == pytest.approx(8, abs=0.5)
    assert not live_data(report_page(crops))["contours"]


def test_many_particles_fit_into_the_page(crops):
    rng, n = np.random.default_rng(5), 100_000
    columns = {name: np.zeros(n, column.dtype) for name, column in COLUMNS.items()}
    del columns["neg_log_p"]
    for name in ("pos_y", "pos_x"):
        columns[name] = rng.integers(0, 8000, n, np.int32)
    for name in ("phi", "theta", "psi"):
        columns[name] = 2.5 * rng.integers(0, 144, n).astype(np.float32)
    for name in ("mip", "scaled_mip"):
        columns[name] = (7 + rng.exponential(1, n)).astype(np.float32)
    columns["relative_defocus"] = 200 * rng.integers(-5, 6, n).astype(np.float32)
    page = report_page(crops, particles=ParticleTable(columns))
    assert len(page) < 4.2e6  # figures add 0.6 MB


def test_the_rest_of_the_particles_is_mentioned(crops, monkeypatch):
    monkeypatch.setattr(instrument, "MAX_PARTICLES", 2)
    monkeypatch.setattr(instrument, "FULL_ROWS", 2)
    page = report_page(crops, particles=find_peaks(crops, cutoff=5.5)).decode()
    assert re.search(r"\d+ more particles are not listed", page)
    assert "some columns are left out" in page


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed here to open the page with")
def test_a_browser_moves_the_cutoff_sorts_filters_and_downloads(crops, tmp_path):
    particles = find_peaks(crops, cutoff=5.5)
    place = write_report(crops, tmp_path / "report.html", particles=particles)
    with open_page(place.as_uri(), tmp_path) as page:
        count = "document.getElementById('live-count').textContent"
        wait_for(lambda: page.evaluate(count) == f"{len(particles)} particles")
        model = "Bokeh.documents[0].get_model_by_name"
        x, y = page.evaluate(INSIDE + "middle(inside('live-cutoff', '.noUi-handle')[0])")
        page.mouse("mouseMoved", x, y)
        page.mouse("mousePressed", x, y)
        page.mouse("mouseMoved", x + 100, y)
        page.mouse("mouseReleased", x + 100, y)
        cutoff = page.evaluate(f"{model}('cutoff').value")
        assert cutoff > particles.about.cutoff + 0.1
        left = int((particles.columns["scaled_mip"] >= cutoff).sum())
        assert 0 < left < len(particles)
        assert page.evaluate(count).startswith(f"{left} particle")
        assert page.evaluate(f"{model}('cutoff-line').location") == cutoff
        assert page.evaluate(f"{model}('shown').indices.length") == left
        headers = "inside('live-table', '.slick-header-column')"
        names = page.evaluate(INSIDE + headers + ".map((one) => one.textContent)")
        page.click(*page.evaluate(f"{INSIDE} middle({headers}[{names.index('y')}])"))
        rows = "inside('live-table', '.slick-row').map((row) => row.children[1].textContent)"
        lowest = [str(y) for y in sorted(particles.columns["pos_y"][:left].tolist())]
        wait_for(lambda: page.evaluate(INSIDE + rows)[:5] == lowest[:5])
        page.evaluate(FILTER % "z > 7, nothing = 1")
        problem = "document.getElementById('live-problem').textContent"
        assert page.evaluate(problem).startswith("“nothing = 1”: expected a column")
        assert page.evaluate(f"{model}('shown').indices.length") == left
        page.evaluate(FILTER % "psi >= 90 and psi < 270")
        assert not page.evaluate(problem)
        psi = particles.columns["psi"][:left]
        passing = np.flatnonzero((psi >= 90) & (psi < 270))
        assert 0 < len(passing) < left
        assert page.evaluate(count) == f"{len(passing)} of {left} particles"
        assert page.evaluate(f"{model}('shown').indices") == passing.tolist()
        partial = MergedResult.open(crops).attributes.partials[0].name
        page.evaluate(FILTER % f"partial = {partial}")
        of_partial = particles.columns["best_partial"][:left] == 0
        assert page.evaluate(count) == f"{of_partial.sum()} of {left} particles"
        page.evaluate(FILTER % "psi >= 90, psi < 270")
        page.evaluate("document.getElementById('live-download').click()")
        csv = tmp_path / "particles.csv"
        wait_for(csv.exists)
        assert not [text for text in page.messages if "log level" not in text]
    found = ParticleTable.read_csv(csv)
    for name, values in particles.columns.items():
        np.testing.assert_array_equal(found.columns[name], values[passing])
