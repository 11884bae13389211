"""The page of many results: every result on it, its report beside it, and a table of all."""

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pandas as pd
import pytest

from browser import CHROMIUM, open_page
from builders import flip_byte
from ocelot_em import (
    MergedResult,
    Simulation,
    find_peaks,
    merge,
    simulate,
    write_index,
)
from ocelot_em.cli.exit_codes import DONE, FAILED, REFUSED
from ocelot_em.cli.main import run
from ocelot_em.errors import InvalidInputError
from ocelot_em.store.whole_file import write_file
from ocelot_em.view.index import find_results
from report_pages import stub_rendering


class Rows(HTMLParser):
    """Cells of the table, as text and as values to sort by, and what the page refers to."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.references, self.pictures, self.is_over = [], [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        own = dict(attrs)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append(["", own.get("data-value")])
        if tag == "a":
            self.references.append(unquote(own["href"]))
        if tag == "img":
            self.pictures.append(own["src"])

    def handle_endtag(self, tag):
        self.is_over = self.is_over or tag == "table"

    def handle_data(self, data):
        if self.rows and self.rows[-1] and not self.is_over:
            self.rows[-1][-1][0] += data.strip()

    def texts(self):
        return [[text for text, _ in row] for row in self.rows[1:]]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two runs, whose results have the same name, and a third one that cannot be read."""
    place = tmp_path_factory.mktemp("runs")
    for name, n in (("one", 6), ("two", 3)):
        planted = Simulation(shape=(150, 180), n_partials=2, n_particles=n, seed=n)
        merge(simulate(place / name, planted), place / name / "MERGED.zarr")
    shutil.copytree(place / "two" / "MERGED.zarr", place / "three" / "MERGED.zarr")
    flip_byte(place / "three" / "MERGED.zarr" / "scaled_mip" / "c" / "0" / "0")
    return place


@pytest.fixture
def runs(made, monkeypatch):
    """The same, with reports that only say whose they are; the example has a real one."""

    def write_report(merged, path, particles):
        write_file(path, f"Particles of {merged.url}: {len(particles)}".encode())

    monkeypatch.setattr("ocelot_em.view.index.write_report", write_report)
    return made


def test_every_result_is_on_the_page_with_its_report(runs, tmp_path):
    table = write_index([runs / "one/MERGED.zarr", runs / "two/MERGED.zarr"], tmp_path / "all.html")
    page = Rows((tmp_path / "all.html").read_text())
    names = [row[1] for row in page.texts()]
    assert names == ["one", "two"]
    reports = ["all_reports/one.html", "all_reports/two.html"]
    assert set(page.references) == {*reports, "all_results.csv"}
    for reference in page.references:
        assert (tmp_path / reference).is_file()
    assert str(runs / "two/MERGED.zarr") in (tmp_path / reports[1]).read_text()
    assert all(src.startswith("data:image/jpeg;base64,") for src in page.pictures)
    assert len(page.pictures) == 2
    particles = [find_peaks(url) for url in table["result"]]
    assert [row[2] for row in page.texts()] == [str(len(found)) for found in particles]
    assert [row[3] for row in page.texts()] == [f"{found.about.cutoff:.4f}" for found in particles]
    assert [row[-1] for row in page.texts()] == ["all passed"] * 2
    assert table["report"].tolist() == reports


def test_a_result_that_cannot_be_read_is_named_and_the_others_are_there(runs, tmp_path):
    seen = []
    places = [runs / "three/MERGED.zarr", runs / "one/MERGED.zarr", tmp_path / "NOTHING.zarr"]
    table = write_index(places, tmp_path, on_result=seen.append)
    page = (tmp_path / "index.html").read_text()
    bad, good, missing = Rows(page).texts()
    assert "could not be read: scaled_mip: chunk (0, 0)" in bad[2]
    assert "expected an ocelot-em store" in missing[2]
    assert good[-1] == "all passed"
    assert [bool(row.error) for row in seen] == [True, False, True]
    assert table["particles"].isna().tolist() == [True, False, True]
    assert "corrupt" in table["error"][0]
    assert re.search(r"<strong>2</strong><span>results could not be read", page)


@pytest.mark.parametrize("there", ["index.html", "index_results.csv", "index_reports/MERGED.html"])
def test_no_file_is_replaced_unless_asked(runs, tmp_path, there):
    output = tmp_path / "night.2"  # a folder, in spite of its dot
    (output / there).parent.mkdir(parents=True)
    (output / there).write_text("precious")
    command = ["report", str(runs / "two/MERGED.zarr"), "--output", str(output)]
    assert run(command) == REFUSED
    assert [path.name for path in output.rglob("*.*")] == [Path(there).name]
    assert (output / there).read_text() == "precious"
    assert run([*command, "--overwrite"]) == DONE
    assert (output / there).read_text() != "precious"


def test_the_table_is_beside_the_page(runs, tmp_path):
    table = write_index(runs / "one/MERGED.zarr", tmp_path, cutoff=7.0)
    read = pd.read_csv(tmp_path / "index_results.csv").iloc[0]
    merged = MergedResult.open(runs / "one/MERGED.zarr")
    assert read["particles"] == len(find_peaks(merged, cutoff=7.0)) == table["particles"][0]
    assert (read["method"], read["cutoff"]) == ("cutoff", 7.0)
    assert (read["height"], read["width"]) == merged.valid_shape
    assert read["highest_z"] == merged.statistics.scaled_mip_range[1]
    assert read["highest_mip"] == merged.statistics.mip_range[1]
    assert (read["micrograph"], read["rank"]) == ("MERGED", 1)
    assert (tmp_path / read["report"]).is_file()


def test_folders_are_searched_for_results(runs, tmp_path):
    assert find_results(runs) == [str(runs / n / "MERGED.zarr") for n in ("one", "three", "two")]
    assert find_results(runs / "one/MERGED.zarr") == [str(runs / "one/MERGED.zarr")]
    other = tmp_path / "other.zarr"
    other.mkdir()
    (other / "zarr.json").write_text('{"attributes": {"ome": 1}}')
    assert find_results(tmp_path) == [str(tmp_path)]
    (problem,) = write_index(tmp_path, tmp_path / "page")["error"]
    assert problem == f"{tmp_path}: expected merged results in this folder, found none"
    (other / "zarr.json").write_text('{"attributes": {"ocelot": 1}}')
    assert find_results(tmp_path) == [str(other)]


def test_reports_of_similar_names_are_different_files(runs, tmp_path):
    for name in ("a b.zarr", "a_b.zarr", "A_B.zarr"):
        shutil.copytree(runs / "one/MERGED.zarr", tmp_path / name)
    table = write_index([tmp_path / n for n in ("a b.zarr", "a_b.zarr", "A_B.zarr")], tmp_path)
    files = [Path(report).name for report in table["report"]]
    assert files == ["a_b.html", "a_b-2.html", "A_B-3.html"]


def test_names_are_text(runs, tmp_path):
    name = "<img src=x onerror=alert(1)>&amp;\"'.zarr"
    shutil.copytree(runs / "one/MERGED.zarr", tmp_path / name)
    write_index([tmp_path / name, tmp_path / "no<b>where.zarr"], tmp_path)
    page = (tmp_path / "index.html").read_text()
    good, bad = Rows(page).texts()
    assert (good[1], bad[1]) == (name.removesuffix(".zarr"), "no<b>where")
    assert "<img src=x" not in page
    assert "<b>" not in page


def test_warnings_are_shown_and_counted(runs, tmp_path, monkeypatch):
    monkeypatch.setattr("ocelot_em.view.index.warnings_of", lambda _: ["First.", "Second."])
    table = write_index(runs / "one/MERGED.zarr", tmp_path)
    (row,) = Rows((tmp_path / "index.html").read_text()).rows[1:]
    assert row[1][0] == "MERGED2 warningsFirst.Second."
    assert row[-1] == ["2 warnings", "2"]
    assert (table["n_warnings"][0], table["warnings"][0]) == (2, "First.\nSecond.")


def test_too_little_for_a_cutoff_is_a_warning(runs, tmp_path, monkeypatch):
    def refuse(*_):
        raise InvalidInputError("nothing was searched")

    monkeypatch.setattr("ocelot_em.view.index.pick_particles", refuse)
    table = write_index(runs / "one/MERGED.zarr", tmp_path)
    assert table["particles"][0] == 0
    assert table["warnings"][0] == "No particles could be picked: nothing was searched"
    assert table["error"][0] == ""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed here to open the page with")
def test_headings_sort_the_rows_in_a_browser(runs, tmp_path):
    places = [runs / "two/MERGED.zarr", runs / "three/MERGED.zarr", runs / "one/MERGED.zarr"]
    table = write_index(places, tmp_path)
    assert table["particles"][0] < table["particles"][2]
    names = "[...document.querySelectorAll('tbody tr')].map(row => row.cells[1].innerText)"
    with open_page((tmp_path / "index.html").as_uri(), tmp_path) as page:

        def order_by(heading):
            buttons = "[...document.querySelectorAll('thead button')]"
            page.evaluate(f"{buttons}.find(own => own.textContent === '{heading}').click()")
            return page.evaluate(names)

        assert page.evaluate(names) == ["two", "three", "one"]
        # What cannot be read is last, whatever the order.
        assert order_by("particles") == ["one", "two", "three"]
        assert order_by("particles") == ["two", "one", "three"]
        assert order_by("result") == ["one", "three", "two"]
        assert order_by("result") == ["two", "three", "one"]
        page.look_as(390, 800, is_mobile=True)
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        assert page.messages == []


def test_no_page_is_written_into_a_store(runs):
    with pytest.raises(InvalidInputError, match="is inside the Zarr store"):
        write_index(runs / "one/MERGED.zarr", runs / "two/MERGED.zarr")


def test_the_command_still_writes_one_report_of_one_result(runs, tmp_path, monkeypatch, capsys):
    stub_rendering(monkeypatch)
    output = tmp_path / "one.html"
    assert run(["report", str(runs / "one/MERGED.zarr"), "--output", str(output)]) == DONE
    assert "particles, gaussian cutoff" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [output]


def test_the_command_takes_a_folder_and_says_what_could_not_be_read(runs, tmp_path, capsys):
    assert run(["report", str(runs), "--output", str(tmp_path / "all.html")]) == FAILED
    out = capsys.readouterr().out.replace("\n", " ")
    assert "3 results, 1 could not be read" in out
    one, two = (str(runs / n / "MERGED.zarr") for n in ("one", "two"))
    assert run(["report", one, two, "--output", str(tmp_path / "folder")]) == DONE
    assert (tmp_path / "folder" / "index.html").is_file()
