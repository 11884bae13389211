"""The report: a self-contained page with all results, for any merged result."""

import gzip
import re
import shutil
from base64 import b64decode, b64encode
from hashlib import sha256
from html.parser import HTMLParser
from io import BytesIO

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from jinja2 import UndefinedError

import ocelot_em
from browser import CHROMIUM, open_page, wait_for
from builders import explicit_maps, idle_maps, unsealed
from helpers import make_result, read_maps, write_search
from ocelot_em import ImportOptions, import_results, write_partial
from ocelot_em.errors import FormatError, IncompleteError, InvalidInputError
from ocelot_em.io.ome_zarr import write_ome_zarr
from ocelot_em.merge.result import MergedResult
from ocelot_em.model.html import render
from ocelot_em.model.regions import Region
from ocelot_em.model.text import nbytes_text, number_text, percent_text, seconds_text
from ocelot_em.particles.picking import find_peaks
from ocelot_em.particles.table import ParticleTable
from ocelot_em.store.arrays import write_chunk
from ocelot_em.store.attributes import dump_attributes
from ocelot_em.store.groups import update_attributes
from ocelot_em.store.objects import open_objects
from ocelot_em.testing.simulation import Simulation, simulate
from ocelot_em.view.figures import MAX_NAMED_ROWS
from ocelot_em.view.plots import (
    plot_crop,
    plot_defocus,
    plot_poses,
    plot_psi,
    plot_zscore,
    pooled_zscore,
)
from ocelot_em.view.report import write_report
from ocelot_em.view.statistics_plots import (
    plot_correlations,
    plot_distributions,
    plot_joint,
    plot_partials,
    plot_survival,
)
from report_pages import RENDERING, stub_rendering

HOSTILE = "<img src=x onerror=alert(1)>&amp;\"'$x^2$.zarr"
SECTIONS = {"particles", "significance", "poses", "partials", "timings", "provenance"}


class Page(HTMLParser):
    """Tags, ids, references and text of a page."""

    def __init__(self, text):
        super().__init__()
        text = re.sub(r"(<script[^>]*>).*?</script>", r"\1</script>", text, flags=re.DOTALL)
        self.text, self.words = text, ""
        self.tags, self.ids, self.references, self.handlers = [], [], [], []
        self.feed(text)
        self.references += re.findall(r"url\(([^)]*)\)", text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href", "srcset", "action", "data"):
                self.references.append(value)
            if name.startswith("on"):
                self.handlers.append(name)

    def handle_data(self, data):
        if self.tags[-1:] != ["style"]:
            self.words += f"{data} "


def drawn_report_of(store, tmp_path, **options):
    return checked(write_report(store, tmp_path / "report.html", **options))


def checked(place):
    """Check that a page is self-contained, and parse it."""
    assert place.stat().st_size < 5e6
    page = Page(place.read_text(encoding="utf-8"))
    assert set(page.ids) >= SECTIONS
    assert len(set(page.ids)) == len(page.ids)
    assert not page.handlers
    assert not {"link", "iframe", "object", "base"} & set(page.tags)
    for reference in page.references:
        inside = reference.startswith("#") and reference[1:] in page.ids
        assert inside or reference.startswith("data:image/png;base64,"), reference
    return page


@pytest.fixture(params=RENDERING)
def report_of(request, monkeypatch):
    """Write a report of a store; figures are not rendered in the fast tier."""
    if request.param == "stubbed":
        stub_rendering(monkeypatch)
    return drawn_report_of


@pytest.fixture(scope="module")
def crops(tmp_path_factory):
    """A merge of the real crops; tests do not change it."""
    from conftest import CROPS

    place = tmp_path_factory.mktemp("crops")
    import_results(CROPS, place / "RUN.zarr", ImportOptions(pixel_size_angstrom=2.5))
    ocelot_em.merge(place / "RUN.zarr", place / "OUT.zarr", tile_size=50)
    return place / "OUT.zarr"


@pytest.fixture(scope="module")
def crops_page(crops):
    """The report of the crops, drawn."""
    return write_report(crops, crops.parent / "report.html")


@pytest.fixture(autouse=True)
def no_windows():
    matplotlib.use("Agg")
    yield
    plt.close("all")


def merge_of(place, maps_of_partials, count=1000, **options):
    for number, maps in enumerate(maps_of_partials):
        write_partial(place / "RUN.zarr", f"p{number}", maps, total_projections=count)
    ocelot_em.merge(place / "RUN.zarr", place / "OUT.zarr", **options)
    return place / "OUT.zarr"


def test_the_page_has_all_results(crops, crops_page):
    page = checked(crops_page)
    particles = find_peaks(crops)
    assert 0 < len(particles) < 12
    for words in (
        "128 × 128",
        "129,600",
        "2.5 Å",
        f"{particles.about.cutoff:.4g}",
        "A_crop_shard3",
        "RUN.zarr",
        "tile_size",
        "All checks passed",
        "decoded",
        f"{float(particles.columns['scaled_mip'][0]):.3f}",
    ):
        assert words in page.words, words
    assert page.tags.count("svg") == 9
    assert "fill: #ffffff" not in page.text  # figures are as dark as the page
    assert "http:" not in page.text
    assert "https:" not in page.text


def test_browsers_run_only_the_scripts_of_the_report(crops_page):
    text = crops_page.read_text(encoding="utf-8")
    policy = re.search(r"script-src ([^;]*);", text)[1]
    scripts = re.findall(r"<script>(.*?)</script>", text, flags=re.DOTALL)
    assert len(scripts) == 1
    packed = re.findall(r'<script type="text/plain" class="packed">(.*?)</script>', text)
    scripts = [*(gzip.decompress(b64decode(part)).decode() for part in packed[:-1]), *scripts]
    hashes = [b64encode(sha256(script.encode()).digest()).decode() for script in scripts]
    assert policy.split() == [f"'sha256-{one}'" for one in hashes]
    assert "unsafe" not in policy


def test_the_same_merge_gives_the_same_page(crops, crops_page, tmp_path):
    assert write_report(crops, tmp_path / "again").read_bytes() == crops_page.read_bytes()


def test_the_page_of_a_simulated_search(tmp_path):
    """As the demonstration writes it."""
    simulation = Simulation(shape=(160, 200), n_partials=4, n_particles=5, seed=20)
    search = simulate(tmp_path, simulation)
    ocelot_em.merge(search, tmp_path / "MERGED.zarr")
    page = drawn_report_of(tmp_path / "MERGED.zarr", tmp_path)
    assert "160 × 200" in page.words
    assert len(find_peaks(tmp_path / "MERGED.zarr")) > 0
    assert page.tags.count("svg") == 9


def test_names_are_text(report_of, tmp_path):
    place = tmp_path / HOSTILE
    place.mkdir()
    merged = merge_of(place, [explicit_maps((20, 20))])
    page = report_of(merged, tmp_path)
    assert "img" not in page.tags
    assert HOSTILE in page.words
    assert f"{place}/RUN.zarr" in page.words


def test_given_particles_are_shown(report_of, crops, tmp_path):
    page = report_of(crops, tmp_path, particles=find_peaks(crops, method="pvalue"))
    assert "-ln p" in page.words
    assert "cutoff 8" in page.words
    assert not re.search(r"cutoff 8\.00", page.words)  # which is no z-score to draw a line at
    csv = tmp_path / "particles.csv"
    find_peaks(crops).to_csv(csv)
    assert "no cutoff" in report_of(crops, tmp_path, particles=ParticleTable.read_csv(csv)).words


def test_without_particles(report_of, crops, tmp_path):
    page = report_of(crops, tmp_path, particles=find_peaks(crops, cutoff=1e6))
    assert "There are no particles" in page.words
    assert page.tags.count("svg") == 5


@pytest.mark.parametrize("max_zooms", [-1, 0, 1, 2])
def test_number_of_zooms(report_of, crops, tmp_path, max_zooms):
    page = report_of(crops, tmp_path, max_zooms=max_zooms)
    assert len(re.findall(r"\d: z = ", page.words)) == max(max_zooms, 0)


def test_one_pixel(report_of, tmp_path):
    report_of(merge_of(tmp_path, [explicit_maps((1, 1))]), tmp_path)


def test_one_pixel_of_one_projection(report_of, tmp_path):
    page = report_of(merge_of(tmp_path, [explicit_maps((1, 1))], count=1), tmp_path)
    assert "No particles could be picked" in page.words


def test_nothing_searched(report_of, tmp_path):
    idle = idle_maps(explicit_maps((12, 9)))
    page = report_of(merge_of(tmp_path, [idle, idle], count=0), tmp_path)
    assert "108 valid pixels are not searched by any partial" in page.words
    assert "no pixel was searched" in page.words


def test_nan_without_variance_and_unsearched(tmp_path, rng):
    maps = explicit_maps((40, 30))
    maps["correlation_sum"][...] = 1000 * rng.normal(0, 0.1, (40, 30))
    maps["correlation_squared_sum"][...] = 1100
    idle = idle_maps(maps)
    for name, values in maps.items():
        values[3:5, 4:9] = idle[name][3:5, 4:9]
    maps["correlation_sum"][20, 20] = maps["correlation_squared_sum"][20, 20] = 0
    maps["mip"][7, 7] = 50
    write_partial(tmp_path / "RUN.zarr", "p0", maps, total_projections=1000)
    maps["mip"][30, 2] = np.nan
    run = unsealed(tmp_path / "RUN.zarr")
    write_chunk(open_objects(run / "partials/p0/mip/c/0"), "0", maps["mip"])
    ocelot_em.merge(tmp_path / "RUN.zarr", tmp_path / "OUT.zarr", nan="mask")
    page = drawn_report_of(tmp_path / "OUT.zarr", tmp_path)
    assert "without variance" in page.words
    assert "not searched by any partial" in page.words


def test_particles_without_poses(report_of, crops, tmp_path):
    found = dict(find_peaks(crops).columns)
    for name in ("phi", "theta", "psi", "relative_defocus"):
        found[name] = np.full_like(found[name], np.nan)
    assert "no poses" in report_of(crops, tmp_path, particles=ParticleTable(found)).words


def test_an_unusual_partial_is_named(report_of, tmp_path, rng):
    results = [make_result(rng, (80, 80), 1000) for _ in range(3)]
    results[1]["mip"] += 2
    write_search(tmp_path / "RUN.zarr", results, [1000] * 3)
    ocelot_em.merge(tmp_path / "RUN.zarr", tmp_path / "OUT.zarr")
    page = report_of(tmp_path / "OUT.zarr", tmp_path)
    assert "Partial p1 won" in page.words
    assert "All checks passed" not in page.words


@pytest.mark.parametrize("n_partials", [13, pytest.param(60, marks=pytest.mark.slow)])
def test_many_partials_and_particles(report_of, tmp_path, rng, monkeypatch, n_partials):
    for module in ("plots", "report"):
        monkeypatch.setattr(f"ocelot_em.view.{module}.MAX_CIRCLES", 1000)
    n_named = min(n_partials - 1, MAX_NAMED_ROWS)
    monkeypatch.setattr("ocelot_em.view.figures.MAX_NAMED_ROWS", n_named)
    results = [make_result(rng, (60, 60), 1000) for _ in range(n_partials)]
    write_search(tmp_path / "RUN.zarr", results, [1000] * n_partials)
    ocelot_em.merge(tmp_path / "RUN.zarr", tmp_path / "OUT.zarr")
    particles = find_peaks(tmp_path / "OUT.zarr", cutoff=0, min_distance=1)
    assert len(particles) == 3600
    page = report_of(tmp_path / "OUT.zarr", tmp_path, particles=particles)
    assert "Only the best 1,000 particles are circled" in page.words


def test_a_map_much_wider_than_high(report_of, tmp_path):
    report_of(merge_of(tmp_path, [explicit_maps((9, 200))]), tmp_path)


@pytest.fixture(scope="module")
def chunked(tmp_path_factory):
    """A map of several chunks, each read alone; tests do not change it."""
    place, rng = tmp_path_factory.mktemp("chunked"), np.random.default_rng(3)
    results = [make_result(rng, (90, 150), 1000) for _ in range(2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ocelot_em.store.constants.DEFAULT_CHUNK", 32)
        write_search(place / "RUN.zarr", results, [1000, 1000])
        ocelot_em.merge(place / "RUN.zarr", place / "OUT.zarr", tile_size=32)
    return place / "OUT.zarr"


def test_maps_are_read_in_parts(report_of, chunked, tmp_path, monkeypatch):
    read, sizes = MergedResult.read, []

    def watched(self, region: Region, name: str):
        sizes.append(region.shape)
        return read(self, region, name)

    monkeypatch.setattr(MergedResult, "read", watched)
    report_of(chunked, tmp_path, particles=find_peaks(chunked, cutoff=6))
    assert len(sizes) > 15
    assert np.max(sizes) <= 41


@pytest.mark.parametrize("longest_edge_px", [1, 7, 40, 149, 150, 1000])
def test_pooling_does_not_depend_on_chunks(chunked, longest_edge_px):
    pooled, factor = pooled_zscore(chunked, longest_edge_px)
    z = read_maps(chunked)["scaled_mip"]
    rows, columns = (-(-n // factor) for n in z.shape)
    assert pooled.shape == (rows, columns)
    assert max(pooled.shape) <= longest_edge_px
    for y, x in np.ndindex(rows, columns):
        block = z[y * factor : (y + 1) * factor, x * factor : (x + 1) * factor]
        assert pooled[y, x] == block.max()


def test_the_overview_may_come_from_a_pyramid(report_of, chunked, crops, tmp_path, monkeypatch):
    picture = write_ome_zarr(chunked, tmp_path / "picture.zarr")
    monkeypatch.setattr(
        "ocelot_em.view.report.pooled_zscore", lambda *_: pytest.fail("read the map")
    )
    report_of(chunked, tmp_path, pyramid=picture)
    with pytest.raises(InvalidInputError, match=r"expected an image of .*, got \(90, 150\)"):
        write_report(crops, tmp_path / "none.html", pyramid=picture)
    assert not (tmp_path / "none.html").exists()


def test_only_a_finished_merge_is_accepted(crops, tmp_path):
    place = tmp_path / "none.html"
    with pytest.raises(FormatError, match="is a search"):
        write_report(crops.parent / "RUN.zarr", place)
    copy = tmp_path / "OUT.zarr"
    shutil.copytree(crops, copy)
    objects = open_objects(copy)
    writing = MergedResult.open(objects).attributes.model_copy(update={"state": "writing"})
    update_attributes(objects, "", dump_attributes(writing))
    with pytest.raises(IncompleteError, match="never finished"):
        write_report(copy, place)
    assert not place.exists()


def test_a_merge_without_statistics_is_refused(crops, tmp_path):
    copy = tmp_path / "OUT.zarr"
    shutil.copytree(crops, copy)
    shutil.rmtree(copy / "statistics")
    with pytest.raises(IncompleteError, match="without statistics"):
        write_report(copy, tmp_path / "none.html", particles=ParticleTable.empty())
    with pytest.raises(IncompleteError, match="without statistics"):
        plot_survival(copy)


STORE_PLOTS = (
    plot_zscore,
    plot_survival,
    plot_distributions,
    plot_joint,
    plot_partials,
    plot_correlations,
)


@pytest.mark.parametrize("plot", STORE_PLOTS)
def test_plots_of_a_merge(crops, plot):
    own = plot(crops)
    assert own.figure in map(plt.figure, plt.get_fignums())
    given = plt.figure().add_subplot()
    assert plot(crops, given) is given
    if plot is not plot_zscore:
        assert plot(MergedResult.open(crops).summary, given) is given
    given.figure.canvas.draw()


@pytest.mark.parametrize("plot", [plot_poses, plot_psi, plot_defocus])
def test_plots_of_particles(crops, plot):
    particles = find_peaks(crops)
    given = plt.figure().add_subplot(projection="polar" if plot is plot_poses else None)
    for table_of in (particles, ParticleTable.empty()):
        assert plot(table_of, given) is given
        plot(table_of).figure.canvas.draw()


def test_view_directions_need_polar_axes(crops):
    with pytest.raises(InvalidInputError, match="expected polar axes"):
        plot_poses(find_peaks(crops), plt.figure().add_subplot())


def test_the_survival_curve_counts_pixels(crops):
    drawn = plot_survival(crops, cutoff=6.0).lines
    noise, found, mark = (np.asarray(line.get_data()) for line in drawn)
    z = read_maps(crops)["scaled_mip"]
    for edge, above in found.T:
        assert max((z >= edge).sum(), 0.5) == above
    assert noise[1, 0] == z.size
    assert (np.diff(noise[1]) <= 0).all()
    assert mark[0].tolist() == [6.0, 6.0]


def test_a_crop_reaches_beyond_the_map(crops):
    with pytest.raises(InvalidInputError, match=r"row and the column of a pixel.*, got 7"):
        plot_crop(crops, 7)
    axes = plot_crop(crops, (0, 127), edge_px=20)
    assert axes.get_xlim() == (117, 138)
    assert axes.images[0].get_array().shape == (11, 11)


def test_a_merge_report_in_a_notebook(crops, tmp_path):
    report = ocelot_em.merge(crops, tmp_path / "<b>.zarr")
    shown = report._repr_html_()
    assert "&lt;b&gt;.zarr" in shown
    assert "1 of 1" in shown
    assert "GB/s" in shown


def test_templates_escape_values_and_require_them():
    pairs = [("<", "\"&'\x1b\u202e")]
    assert r"<tr><th>&lt;</th><td>&#34;&amp;&#39;\x1b\u202e</td></tr>" in render(
        "model/templates/facts.html.j2", pairs=pairs
    )
    with pytest.raises(UndefinedError, match="'data' is undefined"):
        render("view/templates/report.html.j2", name="", url="", montage=None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (nbytes_text(0), "0 B"),
        (nbytes_text(999), "999 B"),
        (nbytes_text(1234), "1.23 kB"),
        (nbytes_text(2.5e9), "2.5 GB"),
        (nbytes_text(1.5e15), "1500 TB"),
        (seconds_text(0.1234), "0.12 s"),
        (seconds_text(9.96), "10 s"),
        (seconds_text(59.99), "1 min 00 s"),
        (seconds_text(89, is_rough=True), "89 s"),
        (seconds_text(61), "1 min 01 s"),
        (seconds_text(7265), "2 h 01 min"),
        (number_text(None, ".2f"), "—"),
        (number_text(np.nan, ".2f"), "—"),
        (number_text(1234.5, ",.2f"), "1,234.50"),
        (percent_text(0), "0%"),
        (percent_text(1e-9), "0.1%"),
        (percent_text(1 - 1e-9), "99.9%"),
        (percent_text(1), "100%"),
    ],
)
def test_quantities_in_words(text, expected):
    assert text == expected


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed here to open the page with")
def test_a_browser_shows_the_page_without_messages(crops_page, tmp_path):
    def are_figures_drawn():
        """The map and the zooms are dark, the survival curve is blue, wherever they are."""
        shown = plt.imread(BytesIO(page.picture()), format="png")[..., :3]
        dark = (shown.max(axis=2) < 0.1).mean()
        blue = (np.abs(shown - np.array([0x3F, 0x8F, 0xD2]) / 255).max(axis=2) < 0.02).sum()
        return dark > 0.01 and blue > 500

    with open_page(crops_page.as_uri(), tmp_path) as page:
        page.look_as(1366, 5000)
        wait_for(are_figures_drawn)
        # Browsers report violations of the page's policy there.
        assert not [text for text in page.messages if "log level" not in text]
