"""Maps that are wrapped around are noticed, and no others."""

import logging

import numpy as np
import pytest

from builders import explicit_maps
from ocelot_em import ImportOptions, MergedResult, describe, find_peaks, import_results, merge
from ocelot_em.cli.main import run
from ocelot_em.io.edges import MIN_EDGE_PX, EdgeSample
from ocelot_em.model.maps import COUNT, SQUARED_SUM
from ocelot_em.model.regions import TileGrid
from ocelot_em.store.attributes import WRAPPED_EDGES

BOX = 20


def periodic_noise(shape, seed=0):
    """Smooth noise that continues beyond the edges, as correlations with a whole micrograph."""
    frequencies = np.fft.fftfreq(shape[0])[:, None], np.fft.rfftfreq(shape[1])
    smooth = np.exp(-sum(np.square(4 * f) for f in frequencies) * 8)
    white = np.random.default_rng(seed).standard_normal(shape)
    return np.fft.irfft2(np.fft.rfft2(white) * smooth, shape)


def sampled(values, cell):
    sample = EdgeSample(values.shape)
    for tile in TileGrid(values.shape, cell):
        sample.add(tile.region, values[tile.region.slices])
    return sample.looks_wrapped


@pytest.mark.parametrize("cell", [(200, 200), (7, 90), (1, 1)])
def test_periodic_maps_look_wrapped_in_whatever_parts_they_are_read(cell):
    values = periodic_noise((90, 120))
    assert sampled(values, cell)
    assert not sampled(values[: 1 - BOX, : 1 - BOX], cell)


def test_chance_does_not_make_edges_look_wrapped():
    for seed in range(300):
        valid = periodic_noise((MIN_EDGE_PX + BOX,) * 2, seed)[:-BOX, :-BOX]
        assert not sampled(valid, valid.shape), seed
        assert not sampled(np.random.default_rng(seed).standard_normal((40, 40)), (40, 40)), seed


@pytest.mark.parametrize("one_way", [np.s_[:, :-BOX], np.s_[:-BOX, :]])
def test_both_axes_must_continue(one_way):
    assert not sampled(periodic_noise((90, 120))[one_way], (200, 200))


@pytest.mark.parametrize("values", [np.zeros((40, 40)), np.full((40, 40), np.nan), np.eye(3)])
def test_maps_without_structure_are_not_judged(values):
    assert not sampled(values, (40, 40))


def result_files(folder, shape=(90, 120)):
    """Result files of two devices whose maps are wrapped around."""
    folder.mkdir(exist_ok=True)
    for number in range(2):
        maps = explicit_maps(shape, number)
        maps[SQUARED_SUM] = (1e3 * (3 + periodic_noise(shape, number))).astype(np.float32)
        np.savez(folder / f"gpu{number}.npz", **maps, **{COUNT: np.asarray(9)})
    return sorted(map(str, folder.glob("*.npz")))


def test_results_of_wrapped_maps_state_it_everywhere(tmp_path, caplog, capsys):
    files, search, merged = result_files(tmp_path / "in"), tmp_path / "S.zarr", tmp_path / "M.zarr"
    with caplog.at_level(logging.WARNING):
        import_results(files, search)
    assert [r.getMessage() for r in caplog.records] == [WRAPPED_EDGES]
    assert describe(search).attributes.edge_warning == WRAPPED_EDGES
    assert run(["merge", str(search), "--output", str(merged), "--dry-run"]) == 0
    assert WRAPPED_EDGES in capsys.readouterr().out
    merge(search, merged)
    assert run(["info", str(merged)]) == 0
    assert WRAPPED_EDGES in capsys.readouterr().out
    assert MergedResult.open(merged).attributes.edge_warning == WRAPPED_EDGES
    caplog.clear()
    find_peaks(merged)
    assert WRAPPED_EDGES in caplog.text
    page = tmp_path / "report.html"
    assert run(["report", str(merged), "--output", str(page)]) == 0
    assert WRAPPED_EDGES[1:].replace("'", "&#39;") in page.read_text()
    again = tmp_path / "again.zarr"
    merge(merged, again)
    assert MergedResult.open(again).attributes.edge_warning == WRAPPED_EDGES


def test_no_warning_where_the_template_box_is_given(tmp_path, caplog):
    files = result_files(tmp_path / "in")
    import_results(files, tmp_path / "S.zarr", ImportOptions(template_box=BOX))
    assert not describe(tmp_path / "S.zarr").attributes.edge_warning
    assert not caplog.records


def test_no_warning_for_exposures_with_a_valid_shape(tmp_path, caplog):
    files = result_files(tmp_path / "in")
    valid = [90 - BOX + 1, 120 - BOX + 1]
    rows = [
        f"- {{id: e{n}, origin: [0, {n * 80}], acquired: {n}, valid_shape: {valid}, partials: "
        f"[{file}]}}"
        for n, file in enumerate(files)
    ]
    text, description = "\n".join(["exposures:", *rows]), tmp_path / "lamella.yaml"
    for valid_text, warning in ((f"valid_shape: {valid}, ", ""), ("", WRAPPED_EDGES)):
        description.write_text(text.replace(f"valid_shape: {valid}, ", valid_text))
        search = tmp_path / f"S{len(warning)}.zarr"
        assert run(["import", str(description), "--output", str(search)]) == 0
        assert describe(search).attributes.edge_warning == warning
