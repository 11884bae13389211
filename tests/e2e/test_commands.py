"""Every command once, as a user runs one after another, on crops of real searches."""

import csv
import json

import mrcfile
import numpy as np
import pandas as pd
import pytest

from conftest import CROPS, DATA
from helpers import chunk_bytes, read_maps
from ocelot_em import describe
from ocelot_em.cli import doctor, trial_commands
from ocelot_em.cli.exit_codes import DONE
from ocelot_em.cli.main import run
from ocelot_em.io.ome_zarr import read_level
from ocelot_em.io.star_file import parse_star
from ocelot_em.particles.table import ParticleTable

OPTICS = """\
micrograph_path: M.mrc
template_volume_path: T.mrc
optics_group: {label: A, pixel_size: 2.5, voltage: 200, defocus_u: 9000, defocus_v: 8600,
               astigmatism_angle: 30}
"""

MONTAGE = DATA / "montage"
ORIGINS = {"00": (0, 0), "01": (4, 150), "02": (3, 439)}
DESCRIPTION = "pixel_size: 3.0\nexposures:\n" + "".join(
    f'  - {{id: "{name}", origin: [{y}, {x}], acquired: {int(name)}, '
    f"partials: [{MONTAGE}/M_exp{name}_dev0.npz, {MONTAGE}/M_exp{name}_dev1.npz]}}\n"
    for name, (y, x) in ORIGINS.items()
)


def ocelot(*arguments):
    assert run([str(argument) for argument in arguments]) == DONE


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A search and a montage, imported, merged and picked; every test only adds to it."""
    place = tmp_path_factory.mktemp("commands")
    search, montage = place / "RUN.zarr", place / "MONTAGE.zarr"
    (place / "montage.yaml").write_text(DESCRIPTION)
    (place / "optics.yaml").write_text(OPTICS)
    ocelot("import", *CROPS, "--output", search, "--search-space", DATA / "search_space.npz")
    ocelot("merge", search, "--output", place / "M.zarr", "--tile-size", 64)
    ocelot("peaks", place / "M.zarr", "--output", place / "P.csv")
    ocelot("import", place / "montage.yaml", "--output", montage)
    ocelot("merge", montage, "--output", place / "MM.zarr", "--overlap", "max-zscore")
    ocelot("peaks", place / "MM.zarr", "--output", place / "MP.csv", "--same-angle", 30)
    return place


def test_import_and_merge(place):
    merged = describe(place / "M.zarr").attributes
    assert merged.total_projections == 129_600
    assert [partial.name for partial in merged.partials] == [crop.stem for crop in CROPS]
    montage = describe(place / "MM.zarr")
    assert [exposure.id for exposure in montage.exposures] == list(ORIGINS)
    assert {exposure.total_projections for exposure in montage.exposures} == {26_496}


def test_merge_on_a_local_cluster(place):
    output = place / "M-local.zarr"
    cluster = ["--cluster", "local", "--workers", 1, "--threads", 2]
    ocelot("merge", place / "RUN.zarr", "--output", output, "--tile-size", 64, *cluster)
    assert chunk_bytes(output) == chunk_bytes(place / "M.zarr")


@pytest.mark.parametrize(
    ("store", "count"),
    [("RUN", "129,600"), ("M", "129,600"), ("MONTAGE", "26,496"), ("MM", "26,496")],
)
def test_info_and_check(place, store, count, capsys):
    ocelot("info", place / f"{store}.zarr")
    assert count in capsys.readouterr().out
    ocelot("check", place / f"{store}.zarr")
    assert "no problems" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["P", "MP"])
def test_peaks(place, name):
    table = ParticleTable.read_csv(place / f"{name}.csv")
    assert len(table) > 0
    maps = read_maps(place / ("M.zarr" if name == "P" else "MM.zarr"))
    axes = ("pos_y", "pos_x") if name == "P" else ("canvas_y", "canvas_x")
    at = tuple(table.columns[axis] for axis in axes)
    np.testing.assert_array_equal(maps["scaled_mip"][at], table.columns["scaled_mip"])


@pytest.mark.parametrize("store", ["M", "MM"])
def test_export_of_maps(place, store):
    merged, expected = place / f"{store}.zarr", read_maps(place / f"{store}.zarr")["scaled_mip"]
    ocelot("export", merged, "--to", "mrc", "--output", place / f"{store}-mrc")
    (file,) = (place / f"{store}-mrc").glob("*scaled_mip.mrc")
    np.testing.assert_array_equal(mrcfile.read(file), expected)
    ocelot("export", merged, "--to", "ome-zarr", "--output", place / f"{store}.ome.zarr")
    np.testing.assert_array_equal(read_level(place / f"{store}.ome.zarr", 10_000)[0], expected)


def test_export_as_hdf5_and_import_of_it(place):
    ocelot("export", place / "M.zarr", "--to", "hdf5", "--output", place / "M.h5")
    ocelot("import", place / "M.h5", "--output", place / "AGAIN.zarr", "--pixel-size-offset", 0)
    assert describe(place / "AGAIN.zarr").attributes.total_projections == 129_600


@pytest.mark.parametrize("form", ["leopard", "relion", "cistem"])
@pytest.mark.parametrize(("store", "options"), [("M", []), ("MM", ["--exposure", "01"])])
def test_export_of_particles_with_optics(place, store, options, form):
    output = place / f"{store}.{form}"
    optics = ["--optics", place / "optics.yaml", "--template-box", 56]
    table = place / ("P.csv" if store == "M" else "MP.csv")
    ocelot(
        *("export", place / f"{store}.zarr", "--to", form, "--output", output),
        *("--particles", table, *optics, *options),
    )
    picked = ParticleTable.read_csv(table)
    n = len(picked) if store == "M" else len(picked.of_exposure("01"))
    assert n > 0
    if form == "leopard":
        assert len(list(csv.DictReader(output.read_text().splitlines()))) == n
    else:
        tables, problems = parse_star(output.read_text())
        assert not problems
        assert n == len(tables[-1].rows)


@pytest.mark.parametrize(("store", "table"), [("M", "P"), ("MM", "MP")])
def test_export_as_parquet(place, store, table):
    output = place / f"{table}.parquet"
    particles = ["--particles", place / f"{table}.csv"]
    ocelot("export", place / f"{store}.zarr", "--to", "parquet", "--output", output, *particles)
    read, picked = pd.read_parquet(output), ParticleTable.read_csv(place / f"{table}.csv")
    np.testing.assert_array_equal(read["mip"], picked.columns["mip"])


@pytest.mark.parametrize("store", ["M", "MM"])
def test_report(place, store):
    ocelot("report", place / f"{store}.zarr", "--output", place / f"{store}.html")
    page = (place / f"{store}.html").read_text()
    assert "<svg" in page or "data:image/png" in page


def test_doctor(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "SPEED_NBYTES", 10**7)
    ocelot("doctor", "--folder", tmp_path)
    assert "disk speed" in capsys.readouterr().out


def test_simulate_and_merge_with_a_run_folder(tmp_path):
    shape = ["--shape", 160, 180, "--partials", 2, "--particles", 3, "--form", "indexed"]
    ocelot("simulate", tmp_path, *shape)
    (search,) = tmp_path.glob("*.zarr")
    kept = ["--run-folder", tmp_path / "kept", "--log", tmp_path / "log.jsonl"]
    ocelot("merge", search, "--output", tmp_path / "M.zarr", *kept)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in lines].count("tile") == 1
    assert any((tmp_path / "kept").iterdir())


def test_demo(tmp_path, monkeypatch, capsys):
    small = {"shape": (256, 320), "n_partials": 3, "n_particles": 6, "seed": 20}
    monkeypatch.setattr(trial_commands, "DEMO", small)
    ocelot("demo", "--output", tmp_path / "demo")
    assert "of 6 planted particles 6 are above" in capsys.readouterr().out
