"""Many micrographs in one run: one table, one page, only new work, and bad ones named."""

import shutil
import sys
from pathlib import Path

import gemmi
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import flip_byte
from ocelot_em import (
    MergedResult,
    Observer,
    Optics,
    ParticleTable,
    Simulation,
    estimate,
    find_peaks,
    merge,
    merge_many,
    read_parquet,
    simulate,
)
from ocelot_em.cli.exit_codes import DONE, FAILED, REFUSED
from ocelot_em.cli.main import run
from ocelot_em.errors import (
    IncompleteError,
    InvalidInputError,
    MissingDependencyError,
    OutputExistsError,
    OutputLockedError,
    TilesFailedError,
)
from ocelot_em.io.tables import OpticsGroups
from ocelot_em.particles.micrographs import ranks_of
from ocelot_em.run.micrographs import find_micrographs
from ocelot_em.store.whole_file import write_file

NAMES = ("M1", "M2", "M3 grid 2", "M4", "M5")
N_PARTICLES = (6, 3, 2, 5, 4)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Five searches in one folder, and a report of the other programs between them."""
    folder = tmp_path_factory.mktemp("made")
    for number, (name, n) in enumerate(zip(NAMES, N_PARTICLES, strict=True)):
        simulated = Simulation((140, 150), n_partials=2, n_particles=n, seed=number)
        simulate(folder / "work", simulated).rename(folder / f"{name}.zarr")
        shutil.rmtree(folder / "work")
    (folder / "notes.txt").write_text("nothing of interest")
    return folder


@pytest.fixture
def searches(made, tmp_path):
    """A copy that may be damaged."""
    return shutil.copytree(made, tmp_path / "searches")


class Tiles(Observer):
    """Outputs that tiles were merged for."""

    def __init__(self, most=None):
        self.outputs, self._left = [], most

    def planned(self, ready, options):
        self._output = Path(ready.output).stem

    def tile_ended(self, outcome):
        self.outputs.append(self._output)
        if self._left is not None:
            self._left -= 1
            if self._left == 0:
                raise KeyboardInterrupt


def optics(micrograph, label="og1", **changes):
    known = {
        "voltage_kv": 300.0,
        "spherical_aberration_mm": 2.7,
        "amplitude_contrast": 0.07,
        "pixel_size_angstrom": 2.5,
        "defocus_u_angstrom": 9000.0,
        "defocus_v_angstrom": 8900.0,
        "astigmatism_angle_degrees": 10.0,
        "phase_shift_degrees": 0.0,
        "template": "T.mrc",
        "template_box_px": 56,
    }
    return Optics(**known | {"micrograph": micrograph, "label": label} | changes)


def rows_of(path, block):
    """Rows of a STAR file's loop, as a list of dictionaries."""
    (loop,) = (item.loop for item in gemmi.cif.read(str(path))[block] if item.loop)
    width = len(loop.tags)
    rows = [loop.values[k : k + width] for k in range(0, len(loop.values), width)]
    return [dict(zip(loop.tags, map(gemmi.cif.as_string, row), strict=True)) for row in rows]


def test_all_micrographs_are_in_one_table_with_their_names_and_ranks(searches, tmp_path):
    by_name = {name: optics(f"Micrographs/{name}.mrc") for name in NAMES}
    by_name["M2"] = optics("Micrographs/M2.mrc", voltage_kv=200.0, defocus_u_angstrom=7000.0)
    kinds, folder = ("csv", "parquet", "relion"), tmp_path / "out"
    report = merge_many(searches, folder, tables=kinds, optics=by_name, tile_size=100)
    assert (report.n_micrographs, report.n_merged, report.skipped) == (5, 5, {})
    table = ParticleTable.read_csv(folder / "particles.csv")
    own = {name: find_peaks(folder / f"{name}.zarr") for name in NAMES}
    assert report.n_particles == len(table) == sum(map(len, own.values()))
    for name, particles in own.items():
        here = table[table["micrograph"] == name]
        for column in particles.columns:
            other = "rank_in_micrograph" if column == "rank" else column
            np.testing.assert_array_equal(here[other], particles[column])
        assert here["rank_in_micrograph"].tolist() == list(range(1, len(here) + 1))
        alone = ParticleTable.read_csv(folder / "tables" / f"{name}.csv")
        np.testing.assert_array_equal(alone["rank"], here["rank_in_micrograph"])
    z = table["scaled_mip"][np.argsort(table["rank"])]
    assert sorted(table["rank"]) == list(range(1, len(table) + 1))
    assert (np.diff(z) <= 0).all()
    parquet = read_parquet(folder / "particles.parquet")
    assert parquet.to_pandas().equals(table.to_pandas())
    particles = rows_of(folder / "particles.star", "particles")
    groups = {row["_rlnOpticsGroup"]: row for row in rows_of(folder / "particles.star", "optics")}
    assert len({row["_rlnOpticsGroupName"] for row in groups.values()}) == len(groups) == 2
    for row, name, x in zip(particles, table["micrograph"], table["pos_x"], strict=True):
        assert row["_rlnMicrographName"] == f"Micrographs/{name}.mrc"
        assert float(row["_rlnCoordinateX"]) == x + 28
        voltage = groups[row["_rlnOpticsGroup"]]["_rlnVoltage"]
        assert float(voltage) == (200 if name == "M2" else 300)
    page = (folder / "index.html").read_text()
    assert all(name in page for name in NAMES)
    assert "index_reports" not in page
    assert pd.read_csv(folder / "index_results.csv")["micrograph"].tolist() == list(NAMES)


def test_only_what_is_new_is_merged_and_picked(searches, tmp_path):
    folder = tmp_path / "out"
    for name in NAMES[3:]:
        shutil.rmtree(searches / f"{name}.zarr")
    late = (searches / "M2.zarr").rename(tmp_path / "late.zarr")
    assert merge_many(searches, folder).n_merged == 2
    before = (folder / "M1.zarr" / "zarr.json").stat().st_mtime_ns
    late.rename(searches / "M2.zarr")
    watching = Tiles()
    report = merge_many(searches, folder, observer=watching)
    assert (report.n_merged, report.n_picked, set(watching.outputs)) == (1, 1, {"M2"})
    assert (folder / "M1.zarr" / "zarr.json").stat().st_mtime_ns == before
    table = ParticleTable.read_csv(folder / "particles.csv")
    assert list(dict.fromkeys(table["micrograph"].tolist())) == list(NAMES[:3])
    # Options of picking apply to all, without another merge.
    strict = merge_many(searches, folder, cutoff=9.0, observer=watching)
    assert (strict.n_merged, strict.n_picked) == (0, 3)
    assert ParticleTable.read_csv(folder / "particles.csv")["scaled_mip"].min() >= 9
    with pytest.raises(OutputExistsError, match=r"micrograph M1: .*delete its result"):
        merge_many(searches, folder, nan="mask")
    shutil.rmtree(folder / "M3 grid 2.zarr")
    several = merge_many(searches, folder, nan="mask", skip_bad=True)
    assert [*several.skipped] == ["M1", "M2"]


def test_an_interrupted_run_is_resumed(searches, tmp_path):
    folder, options = tmp_path / "out", {"tile_size": 100, "threads": 1}
    for name in NAMES[3:]:
        shutil.rmtree(searches / f"{name}.zarr")
    with pytest.raises(KeyboardInterrupt):
        merge_many(searches, folder, observer=Tiles(most=7), **options)
    assert not (folder / "particles.csv").exists()
    with pytest.raises(IncompleteError):
        MergedResult.open(folder / "M2.zarr")
    watching = Tiles()
    assert merge_many(searches, folder, observer=watching, **options).n_merged == 2
    assert watching.outputs.count("M1") == 0
    assert watching.outputs.count("M2") < 4
    merge_many(searches, tmp_path / "at once", **options)
    for name in ("particles.csv", "tables/M2.csv"):
        assert (folder / name).read_bytes() == (tmp_path / "at once" / name).read_bytes()


def test_bad_micrographs_are_named_and_skipped_on_request(searches, tmp_path, capsys):
    next((searches / "M2.zarr" / "partials").glob("*/zarr.json")).write_text("{")
    flip_byte(next((searches / "M4.zarr").rglob("mip/c/0/0")))
    (searches / "M5.zarr/zarr.json").write_text("damaged")
    folder = tmp_path / "out"
    with pytest.raises(InvalidInputError) as refusal:
        merge_many(searches, folder)
    assert [p.partition(":")[0] for p in refusal.value.problems[:2]] == [
        "micrograph M2",
        "micrograph M5",
    ]
    assert len(refusal.value.problems) == 2  # the hint is no problem
    assert "\n  mend them, or leave them out (--skip-bad)" in str(refusal.value)
    assert not folder.exists()
    words = ["batch", str(searches), "--output", str(folder)]
    assert run([*words, "--skip-bad", "--dry-run"]) == FAILED
    assert not folder.exists()
    assert run([*words, "--skip-bad"]) == FAILED
    printed = capsys.readouterr().out
    assert "skipped M4: " in printed
    assert printed.count("M4: tile (0, 0) failed: ") == 1
    assert printed.count("M4: tile (0, 0) failed and will be retried: ") == 1
    assert "corrupt" in printed
    table = pd.read_csv(folder / "index_results.csv").set_index("micrograph")
    assert list(table.index) == list(NAMES)
    assert table["error"].notna().tolist() == [False, True, False, True, True]
    assert "corrupt" in table["error"]["M4"]
    assert "micrographs skipped" in (folder / "index.html").read_text()
    assert {*ParticleTable.read_csv(folder / "particles.csv")["micrograph"]} == {"M1", "M3 grid 2"}
    with pytest.raises(TilesFailedError, match=r"(?s)micrograph M4: .*corrupt.*--skip-bad"):
        merge_many([searches / "M4.zarr", searches / "M1.zarr"], folder)


def test_results_are_not_merged_again(searches, tmp_path):
    results = tmp_path / "results"
    for name in NAMES[:2]:
        merge(searches / f"{name}.zarr", results / f"{name}.zarr")
    report = merge_many(results, tmp_path / "out")
    assert (report.n_merged, report.n_picked) == (0, 2)
    assert not (tmp_path / "out" / "M1.zarr").exists()
    # A folder that has searches, too, gives these.
    shutil.copytree(searches / "M3 grid 2.zarr", results / "deep" / "er.zarr")
    assert merge_many(results, tmp_path / "other").n_merged == 1
    assert MergedResult.open(tmp_path / "other" / "deep_er.zarr")


def test_each_micrograph_has_its_own_mask(searches, tmp_path):
    two, masks = [searches / "M1.zarr", searches / "M2.zarr"], tmp_path / "masks"
    masks.mkdir()
    np.save(masks / "M1.npy", np.zeros((140, 150), np.uint8))
    with pytest.raises(InvalidInputError, match=r"micrograph M2: .*expected one mask"):
        merge_many(two, tmp_path / "out", mask=masks, mask_marks="excluded")
    upper = np.zeros((140, 150), np.uint8)
    upper[:60] = 1
    np.save(masks / "M2.npy", upper)
    report = merge_many(two, tmp_path / "out", mask=masks, mask_marks="excluded")
    table = ParticleTable.read_csv(tmp_path / "out" / "particles.csv")
    own = find_peaks(tmp_path / "out/M2.zarr", mask=masks / "M2.npy", mask_marks="excluded")
    assert (table["micrograph"] == "M2").sum() == len(own) < N_PARTICLES[1]
    assert report.n_picked == 2
    np.save(masks / "M2.npy", np.zeros_like(upper))
    again = merge_many(two, tmp_path / "out", mask=masks, mask_marks="excluded")
    assert (again.n_merged, again.n_picked) == (0, 1)


def test_a_mask_that_does_not_fit_is_an_error_of_its_micrograph(searches, tmp_path, monkeypatch):
    one, folder, mask = searches / "M1.zarr", tmp_path / "out", tmp_path / "mask.npy"
    with pytest.raises(InvalidInputError, match=r"micrograph M1: .*mask\.npy: expected a mask"):
        merge_many(one, folder, mask=mask)
    np.save(mask, np.ones((10, 10), np.uint8))
    with pytest.raises(TilesFailedError, match=r"micrograph M1: mask\.npy: .*got 10 × 10"):
        merge_many(one, folder, mask=mask)
    report = merge_many(one, folder, mask=mask, skip_bad=True)
    assert ([*report.skipped], report.n_particles) == (["M1"], 0)
    with pytest.raises(InvalidInputError, match="cutoff: expected one for the method mip"):
        merge_many(one, tmp_path / "other", method="mip")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingDependencyError, match="pyarrow"):
        merge_many(one, tmp_path / "other", tables="parquet")
    assert not (tmp_path / "other").exists()


def test_neither_old_reports_nor_damaged_tables_are_used(searches, tmp_path, monkeypatch, caplog):
    def write_report(_merged, path, particles):
        write_file(path, repr(particles).encode())

    monkeypatch.setattr("ocelot_em.view.index.write_report", write_report)
    one, folder = searches / "M1.zarr", tmp_path / "out"
    merge_many(one, folder, reports=True)
    assert merge_many(one, folder, reports=True).n_picked == 0
    page, table = folder / "index_reports" / "M1.html", folder / "tables" / "M1.csv"
    old = page.read_bytes()
    merge_many(one, folder, cutoff=12.0)
    assert merge_many(one, folder, cutoff=12.0, reports=True).n_picked == 1
    assert page.read_bytes() != old
    lines = table.read_text().splitlines(keepends=True)
    table.write_text("".join(lines[:-1]))
    assert merge_many(one, folder, cutoff=12.0).n_particles == len(lines) - 1
    assert not caplog.messages
    merge_many(one, folder, tables="parquet")
    assert "particles.csv: this table of an earlier run is not renewed" in caplog.text


def test_links_are_followed_once_and_name_their_micrographs(searches, tmp_path):
    links = tmp_path / "links"
    links.mkdir()
    (links / "first.zarr").symlink_to(searches / "M1.zarr")
    (links / "more").symlink_to(searches)
    (links / "loop").symlink_to(links)
    found = find_micrographs([links], tmp_path / "out")
    assert [one.name for one in found] == ["first", *(f"more_{name}" for name in NAMES[1:])]
    (one,) = find_micrographs([links / "first.zarr"], tmp_path / "out")
    assert one.name == "first"


def test_searches_of_one_name_are_groups_of_one_micrograph(searches, tmp_path, capsys):
    holo = tmp_path / "holo"
    for name, other in (("M1", "M4"), ("M2", "M5")):
        shutil.copytree(searches / f"{other}.zarr", holo / f"{name}.zarr")
    apo = [searches / f"{name}.zarr" for name in NAMES[:2]]
    with pytest.raises(InvalidInputError, match="with --group-by, searches of one name are groups"):
        merge_many([*apo, holo], tmp_path / "out")
    words = ["batch", *map(str, [*apo, holo]), "--output", str(tmp_path / "out")]
    assert run([*words, "--group-by", "template", "--estimates", "holo"]) == DONE
    assert "2 micrographs, 4 searches" in capsys.readouterr().out
    merge([apo[0], holo / "M1.zarr"], tmp_path / "alone", group_by="template")
    table = ParticleTable.read_csv(tmp_path / "out" / "particles.csv")
    own = estimate(find_peaks(tmp_path / "alone"), decoy="holo")
    assert {*own["group"]} == {"searches", "holo"}
    here = table[table["micrograph"] == "M1"]
    for column in ("pos_y", "pos_x", "scaled_mip", "group", "zscore_difference", "precision"):
        np.testing.assert_array_equal(here[column], own[column])
    assert (np.isnan(here["precision"]) == (here["group"] == "holo")).all()
    options = {"group_by": "template", "method": "mip", "cutoff": 1.0}
    with pytest.raises(InvalidInputError, match="there is no model of noise for the method mip"):
        merge_many([*apo, holo], tmp_path / "out", estimates="noise", **options)
    again = merge_many([*apo, holo], tmp_path / "out", group_by="template", estimates="noise")
    assert (again.n_merged, again.n_picked) == (0, 2)
    table = ParticleTable.read_csv(tmp_path / "out" / "particles.csv")
    assert ((table["precision"] > 0.5) & (table["recall"] > 0)).all()
    assert pd.read_csv(tmp_path / "out" / "index_results.csv")["exposures"].tolist() == [0, 0]


def test_two_runs_do_not_write_one_folder(searches, tmp_path):
    folder, other = tmp_path / "out", list[str]()

    class Meddling(Observer):
        def merged(self, _report):
            with pytest.raises(OutputLockedError) as locked:
                merge_many(searches / "M2.zarr", folder)
            other.append(str(locked.value))

    merge_many(searches / "M1.zarr", folder, observer=Meddling())
    assert "another run is writing it" in other[0]


def test_lists_give_names_and_a_name_is_given_once(searches, tmp_path, capsys):
    folder = tmp_path / "out"
    other = shutil.copytree(searches / "M1.zarr", tmp_path / "other" / "m1.zarr")
    words = ["batch", str(searches), str(other), "--output", str(folder)]
    assert run(words) == REFUSED
    assert "micrograph 'M1': expected one search, got 2" in capsys.readouterr().err
    (tmp_path / "few.csv").write_text("micrograph,search\nA b,searches/M1.zarr\nC,other/m1.zarr\n")
    report = merge_many(tmp_path / "few.csv", folder)
    assert report.n_micrographs == 2
    assert {*ParticleTable.read_csv(folder / "particles.csv")["micrograph"]} == {"A b", "C"}
    (tmp_path / "few.txt").write_text("# of today\nsearches/M1.zarr\n\nmissing.zarr\n")
    with pytest.raises(InvalidInputError, match=r"micrograph missing: .*missing\.zarr"):
        merge_many(tmp_path / "few.txt", folder)
    assert [*merge_many(tmp_path / "few.txt", folder, skip_bad=True).skipped] == ["missing"]
    (tmp_path / "few.csv").write_text("micrograph,search\n=1+1,searches/M1.zarr\n")
    with pytest.raises(InvalidInputError, match="got '=1\\+1'"):
        merge_many(tmp_path / "few.csv", folder)
    assert run(["batch", str(tmp_path / "few.txt"), "--output", str(searches)]) == REFUSED


def test_optics_are_those_of_each_micrograph(searches, tmp_path):
    words = ["batch", str(searches / "M1.zarr"), str(searches / "M2.zarr"), "--tables", "cistem"]
    words += ["--output", str(tmp_path / "out"), "--template", "T.mrc"]
    given = ["--voltage", "300", "--cs", "2.7", "--amplitude-contrast", "0.07"]
    assert run(words) == REFUSED
    for kind in ("relion", "cistem"):
        unwritable = {"M1": optics("a#b"), "M2": optics("nan")}
        with pytest.raises(InvalidInputError, match=r"(?s)M1: micrograph: .*M2: micrograph: "):
            merge_many([*words[1:3]], tmp_path / "out", tables=kind, optics=unwritable)
    assert not (tmp_path / "out").exists()
    files = tmp_path / "ctf"
    files.mkdir()
    for name, defocus in (("M1", 9000), ("M2", 7000)):
        text = f"# Input file: raw/{name}.mrc ; x\n1.0 {defocus}.0 {defocus}.0 30.0 0.0 0.25 3.1\n"
        (files / f"{name}.txt").write_text(text)
    assert run([*words, *given, "--optics", str(files)]) == DONE
    table = ParticleTable.read_csv(tmp_path / "out" / "tables" / "M2.csv")
    rows = rows_of(tmp_path / "out" / "particles_cistem.star", 0)
    assert [int(row["_cisTEMPositionInStack"]) for row in rows] == [*range(1, len(rows) + 1)]
    mine = [row for row in rows if "raw/M2.mrc" in row["_cisTEMOriginalImageFilename"]]
    np.testing.assert_allclose(
        [float(row["_cisTEMDefocus1"]) for row in mine], 7000 + table["relative_defocus"]
    )


@given(st.lists(st.lists(st.integers(0, 5).map(float), max_size=4), min_size=1, max_size=5))
def test_ranks_are_those_of_all_heights_together(several):
    ranks = ranks_of([np.array(own) for own in several])
    flat = [(-z, k, i) for k, own in enumerate(several) for i, z in enumerate(own)]
    expected = {place[1:]: rank for rank, place in enumerate(sorted(flat), 1)}
    got = {(k, i): rank for k, own in enumerate(ranks) for i, rank in enumerate(own.tolist())}
    assert got == expected


def test_optics_groups_of_one_name_but_other_values_get_numbers():
    several = [optics("a"), optics("b"), optics("c", voltage_kv=200.0), optics("d", label="og1_2")]
    block = OpticsGroups(several).block
    assert block["rlnOpticsGroupName"] == ["og1", "og1_2", "og1_2_2"]
    assert block["rlnVoltage"] == [300.0, 200.0, 300.0]


@pytest.mark.slow
def test_one_cluster_serves_all_micrographs(searches, tmp_path, monkeypatch):
    from ocelot_em.run import shared_cluster

    opened, open_cluster = [], shared_cluster.open_cluster
    counted = lambda options: opened.append(options) or open_cluster(options)  # noqa: E731
    monkeypatch.setattr(shared_cluster, "open_cluster", counted)
    options = {"cluster": "local", "workers": 1, "threads": 1}
    assert merge_many(searches, tmp_path / "out", **options).n_merged == 5
    assert len(opened) == 1
    merge_many(searches, tmp_path / "here")
    one, other = ((tmp_path / n / "particles.csv").read_bytes() for n in ("out", "here"))
    assert one == other
