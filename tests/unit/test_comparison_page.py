"""The page and the command of two searches side by side."""

import re
from dataclasses import replace

import numpy as np
import pytest

from browser import CHROMIUM, open_page, wait_for
from conftest import CROPS
from ocelot_em import compare, find_peaks, import_results, merge, write_comparison
from ocelot_em.cli.exit_codes import DONE, REFUSED
from ocelot_em.cli.main import run
from ocelot_em.view import comparison_page
from ocelot_em.view.live_page import LivePage
from report_pages import stub_rendering


@pytest.fixture(scope="module")
def searches(tmp_path_factory):
    """The real crops, merged with and without the first device; tests do not change them."""
    place = tmp_path_factory.mktemp("searches")
    import_results(CROPS, place / "RUN.zarr", pixel_size_angstrom=2.5)
    merge(place / "RUN.zarr", place / "A.zarr")
    merge(place / "RUN.zarr", place / "B.zarr", without="A_crop_shard0")
    return place


@pytest.fixture
def without_rendering(monkeypatch):
    stub_rendering(monkeypatch)
    monkeypatch.setattr(comparison_page, "_live", lambda *_: LivePage((), "", ""))


def words(place):
    """The text of a page, without figures and scripts."""
    text = re.sub(r"<(script|svg|style).*?</\1>", "", place.read_text(), flags=re.DOTALL)
    return " ".join(re.sub("<[^>]+>", " ", text).split())


def test_the_command_writes_a_page_and_a_table(searches, without_rendering, tmp_path, capsys):
    a, b = (str(searches / name) for name in ("A.zarr", "B.zarr"))
    page, table = tmp_path / "page.html", tmp_path / "both.csv"
    command = ["compare", a, b, "--output", f"{page}", "--table", f"{table}", "--symmetry", "c2"]
    assert run(command) == DONE
    found = compare(a, b, symmetry="C2")
    both, only_a, only_b = found.counts.values()
    assert both
    assert only_a
    assert capsys.readouterr().out.startswith(f"{both} in both, {only_a} only in A, {only_b} only")
    assert len(table.read_text().splitlines()) == 1 + len(found)
    said = words(page)
    assert f"{both} found in both {only_a} found only in A {only_b} found only in B" in said
    assert f"A has {both + only_a} particles, of which {both}" in said
    assert "symmetry C2" in said
    assert "A: A.zarr, B: B.zarr" in said
    assert run(command) == REFUSED
    assert "--overwrite" in capsys.readouterr().err


def test_a_page_of_tables_has_no_maps(searches, without_rendering, tmp_path):
    particles = find_peaks(searches / "A.zarr")
    empty = particles[particles["mip"] < 0]
    z = particles["scaled_mip"]
    group = {
        "group": np.full(len(z), "apo"),
        "second_zscore": z - 1,
        "zscore_difference": 0 * z + 1,
    }
    particles = replace(particles, columns=dict(particles.columns) | group)
    place = write_comparison(compare(particles, empty), tmp_path / "page.html")
    assert 'id="maps"' not in place.read_text()
    assert "No particle was found in both with its orientation" in words(place)
    assert "found in group in A z in A" in words(place)
    assert "only A apo" in words(place)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed here to open the page with")
def test_a_browser_filters_and_downloads(searches, tmp_path):
    found = compare(searches / "A.zarr", searches / "B.zarr")
    place = write_comparison(found, tmp_path / "page.html")
    with open_page(place.as_uri(), tmp_path) as page:
        shown = "Bokeh.documents[0].get_model_by_name('shown').indices.length"
        wait_for(lambda: page.evaluate("typeof Bokeh") == "object")
        wait_for(lambda: page.evaluate(f"Boolean(Bokeh.documents[0]) && {shown} === {len(found)}"))
        kind = "document.getElementById('live-filter')"
        for text, n in (("only a", found.counts["A"]), ("angle >= 0", found.counts["both"])):
            filtered = f"{kind}.value = '{text}'; {kind}.dispatchEvent(new Event('input')); {shown}"
            wait_for(lambda script=filtered, n=n: page.evaluate(script) == n)
        page.evaluate("document.getElementById('live-download').click()")
        file = tmp_path / "comparison.csv"
        wait_for(lambda: file.exists() and file.stat().st_size)
        assert len(file.read_text().splitlines()) == 1 + found.counts["both"]
        page.look_as(390, 900, is_mobile=True)
        wait_for(lambda: page.evaluate("document.documentElement.scrollWidth") <= 390)
        assert not [text for text in page.messages if "rror" in text and "log level" not in text]
