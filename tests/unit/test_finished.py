"""Finished searches: what lies beside the maps, and files named and laid out as their programs do.

Leopard-EM 1.2 was run to see its files; those of cisTEM and pytom-match-pick are written here as
their source code writes them (``match_template.cpp``, ``MatchTemplatePanel.cpp``, ``tmjob.py``).
"""

import csv
import json
import math
import sqlite3
import warnings
from pathlib import Path

import h5py
import mrcfile
import numpy as np
import pytest
import yaml

from helpers import bytes_read
from ocelot_em import MergedResult, describe, merge, open_partials
from ocelot_em.cli.main import run
from ocelot_em.errors import InvalidInputError
from ocelot_em.io.finished import import_finished
from ocelot_em.io.import_options import ImportOptions
from ocelot_em.io.leopard_maps import OUR_NAMES
from ocelot_em.io.map_files import MapFiles

SHAPE, BOX, PIXEL = (40, 37), 8, 2.5


def maps_of(shape=SHAPE, seed=0):
    rng = np.random.default_rng(seed)
    maps = {name: rng.normal(1, 0.1, shape).astype("f4") for name in OUR_NAMES}
    maps["scaled_mip"] = (maps["mip"] - maps["correlation_average"]) / maps["correlation_variance"]
    return maps


def write_leopard(place, prefix="output_", **changed):
    """A search as Leopard-EM leaves it, started in ``place``; changes of its configuration."""
    folder = place / "match_template_results"
    folder.mkdir(parents=True)
    for name, values in maps_of().items():
        with mrcfile.new(folder / f"{prefix}{name}.mrc") as file:  # a voxel size of 0
            file.set_data(values)
    for name, shape in (("micrograph", (47, 44)), ("template", (BOX,) * 3)):
        mrcfile.write(place / f"{name}.mrc", np.zeros(shape, "f4"))
    paths = {f"{name}_path": f"match_template_results/{prefix}{name}.mrc" for name in OUR_NAMES}
    counts = {"total_projections": 360, "total_orientations": 72, "total_defocus": 5}
    content = {
        "micrograph_path": "micrograph.mrc",
        "template_volume_path": "template.mrc",
        "optics_group": {"pixel_size": PIXEL, "voltage": 300.0},
        "match_template_result": {"allow_file_overwrite": True} | paths | counts,
    } | changed
    (place / "config.yaml").write_text(yaml.safe_dump(content))
    row = {"particle_index": 0, "mip": 1.5, "total_correlations": 360, "pixel_size": PIXEL} | paths
    write_table(folder / "results.csv", [row | {"micrograph_path": "micrograph.mrc"}] * 2)
    return folder


def write_table(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def notes_of(source, output, **options):
    return import_finished(source, output, ImportOptions(**options)).notes


def problem_of(source, output, **options):
    with pytest.raises(InvalidInputError) as refused:
        import_finished(source, output, ImportOptions(**options))
    assert not Path(output).exists()
    return str(refused.value)


@pytest.mark.parametrize("source", [".", "results.csv", "output_mip.mrc", "../config.yaml"])
def test_leopards_folder_needs_no_options(tmp_path, source):
    folder = write_leopard(tmp_path)
    notes = notes_of(folder / source, tmp_path / "R")
    assert "total_projections: 360, from" in "\n".join(notes)
    assert any(note.startswith("pixel size: 2.5 Å, from") for note in notes)
    assert "pixel-size offset: 0.0 Å, from config.yaml" in notes
    assert any(f"template box: {BOX}, from the shape of" in note for note in notes)
    found = describe(tmp_path / "R")
    assert list(found.partials) == [("output", "complete", 360)]
    assert found.attributes.pixel_size_angstrom == PIXEL
    assert found.attributes.valid_shape == SHAPE
    assert found.attributes.has_pixel_size


def test_what_leopard_has_not_written_is_asked_for_in_one_sentence(tmp_path):
    folder = write_leopard(tmp_path / "S")
    (folder / "results.csv").unlink()
    (tmp_path / "S" / "config.yaml").unlink()
    assert "give it with --total-projections" in problem_of(folder, tmp_path / "R")
    notes = "\n".join(notes_of(folder, tmp_path / "R", total_projections=(7,)))
    assert "total_projections: 7, as given" in notes
    for option in ("--pixel-size", "--pixel-size-offset", "--template-box"):
        assert f"give it with {option}" in notes


def test_contradictions_are_named_and_options_win(tmp_path):
    results = {"total_projections": 361, "mip_path": "match_template_results/output_mip.mrc"}
    optics = {"pixel_size": 1.5}
    folder = write_leopard(tmp_path / "S", match_template_result=results, optics_group=optics)
    problem = problem_of(folder, tmp_path / "R")
    assert "total_projections: results.csv has 360, config.yaml has 361; give the right" in problem
    assert "pixel size: results.csv has 2.5, config.yaml has 1.5; give the right" in problem
    given = {"total_projections": (360,), "pixel_size_angstrom": 2.5}
    assert "pixel size: 2.5 Å, as given; config.yaml has 1.5" in notes_of(
        folder, tmp_path / "R", **given
    )


@pytest.mark.parametrize("template", [True, False])
def test_maps_of_the_micrographs_shape_are_cropped_by_the_templates_box(tmp_path, template):
    folder = write_leopard(tmp_path / "S")
    mrcfile.write(tmp_path / "S" / "micrograph.mrc", np.zeros(SHAPE, "f4"), overwrite=True)
    if template:
        notes_of(folder, tmp_path / "R")
        found = describe(tmp_path / "R").attributes
        assert found.valid_shape == (SHAPE[0] - BOX + 1, SHAPE[1] - BOX + 1)
    else:
        (tmp_path / "S" / "template.mrc").unlink()
        assert "give its edge with --template-box" in problem_of(folder, tmp_path / "R")


def test_one_of_several_searches_is_chosen_by_its_file_or_prefix(tmp_path):
    folder = write_leopard(tmp_path)
    for path in folder.glob("*.mrc"):
        (folder / path.name.replace("output", "second")).write_bytes(path.read_bytes())
    assert "got 2; give a file of one of them" in problem_of(folder, tmp_path / "R")
    assert notes_of(folder, tmp_path / "R", prefix="output")[1].startswith("total_projections: 360")
    assert "--total-projections" in problem_of(folder / "second_mip.mrc", tmp_path / "R2")
    assert "such as mip.mrc, as Leopard-EM or cisTEM name them, got none" in problem_of(
        tmp_path, tmp_path / "R2"
    )


def test_an_hdf5_result_beside_a_table_of_correlations(tmp_path):
    with h5py.File(tmp_path / "out.h5", "w") as file:
        file.attrs.update(total_projections=360, total_orientations=72, total_defocus=5)
        for name, values in maps_of().items():
            file[f"tensors/{name}"] = values
    with h5py.File(tmp_path / "table.h5", "w") as file:
        file["positions"] = np.zeros(3)
    content = {
        "optics_group": {"pixel_size": PIXEL},
        "match_template_result": {"hdf5_path": "somewhere/out.h5"},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    notes = notes_of(tmp_path, tmp_path / "R")
    assert "total_projections: 360, from out.h5" in notes
    assert "pixel-size offset: 0.0 Å, from out.h5" in notes
    assert "pixel size: 2.5 Å, from config.yaml" in notes


# cisTEM

PROGRAM = [
    "mip",
    "mip_scaled",
    "corr_average",
    "corr_stddev",
    "psi",
    "theta",
    "phi",
    "defocus",
    "pixel_size",
]
PROJECT = ["mip", "scaled_mip", "avg", "std", "psi", "theta", "phi", "defocus", "pixel_size"]
NAMES = (*OUR_NAMES, "best_pixel_size")
UNSEARCHED = (slice(0, 12), slice(0, 9))


def write_cistem(folder, tokens, pattern, dtype):
    """A search whose corner was not searched: sums of 0, and -FLT_MAX in the other maps."""
    folder.mkdir(parents=True)
    maps = maps_of() | {"best_pixel_size": np.full(SHAPE, -0.02, "f4")}
    for name, values in maps.items():
        is_sum = name.startswith("correlation")
        values[UNSEARCHED] = 0 if is_sum else np.finfo("f4").min
    with np.errstate(over="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mrcfile warns of infinities
        for name, token in zip(NAMES, tokens, strict=True):
            path = folder / pattern.format(token)
            mrcfile.write(path, maps[name].astype(dtype), voxel_size=PIXEL)
    n_searched = math.prod(SHAPE) - 12 * 9
    lines = ["# Expected threshold = 7.50", "# SNR, histogram, survival histogram, random survival"]
    lines += [f"{-1 + i} {n_searched * 100:.6f} 0.000000 0.000000" for i in range(3)]
    (folder / pattern.format("histogram").replace(".mrc", ".txt")).write_text("\n".join(lines))
    return maps


def write_project(path, mip, box):
    with sqlite3.connect(path) as database:
        database.execute(
            "CREATE TABLE TEMPLATE_MATCH_LIST (TEMPLATE_MATCH_ID INTEGER PRIMARY KEY, "
            "USED_PIXEL_SIZE REAL, REF_BOX_SIZE_IN_ANGSTROMS REAL, MIP_OUTPUT_FILE TEXT)"
        )
        database.execute("INSERT INTO TEMPLATE_MATCH_LIST VALUES (1, ?, ?, ?)", (PIXEL, box, mip))
    database.close()


@pytest.mark.parametrize("dtype", ["f4", "f2"])
@pytest.mark.parametrize("is_project", [True, False])
def test_cistems_maps_become_those_of_box_corners(tmp_path, dtype, is_project):
    if is_project:
        folder = tmp_path / "P" / "Assets" / "TemplateMatching"
        maps = write_cistem(folder, PROJECT, "img_{}_3_0.mrc", dtype)
        write_project(tmp_path / "P" / "p.db", f"/elsewhere/{'img_mip_3_0.mrc'}", BOX * PIXEL)
        notes, name = notes_of(folder, tmp_path / "R"), "img_3_0"
        assert f"template box: {BOX}, from p.db" in notes
    else:
        folder, name = tmp_path / "SEARCH", "SEARCH"
        maps = write_cistem(folder, PROGRAM, "{}.mrc", dtype)
        assert "give it with --template-box" in problem_of(folder, tmp_path / "R")
        notes = notes_of(folder, tmp_path / "R", template_box=BOX)
    assert any(note.startswith("total_projections: 300, from") for note in notes)
    found = describe(tmp_path / "R")
    merge(tmp_path / "R", tmp_path / "OUT")
    histogram = MergedResult.open(tmp_path / "OUT").correlation_histogram
    n = 100 * (math.prod(SHAPE) - 12 * 9)
    assert (histogram.low, histogram.width, histogram.counts) == (-1.5, 1.0, (n, n, n))
    assert list(found.partials) == [(name, "complete", 300)]
    assert found.attributes.pixel_size_angstrom == PIXEL
    half = BOX // 2
    inside = np.s_[half : half + SHAPE[0] - BOX + 1, half : half + SHAPE[1] - BOX + 1]
    stored = open_partials(tmp_path / "R").isel(partial=0).compute()
    searched = maps["correlation_variance"][inside] > 0
    mip = np.where(searched, maps["mip"][inside], -np.inf).astype(dtype)
    assert np.array_equal(stored["mip"], mip)
    assert np.isnan(stored["best_psi"].to_numpy()[~searched]).all()
    assert (
        stored["best_pixel_size"].to_numpy()[searched] == np.float32(np.asarray(-0.02, dtype))
    ).all()
    assert (stored["correlation_sum"].to_numpy()[~searched] == 0).all()


def test_pytoms_volumes_are_refused_by_name(tmp_path):
    for name in ("scores", "angles"):
        mrcfile.write(tmp_path / f"tomo_{name}.mrc", np.zeros((4, 5, 6), "f4"), voxel_size=5)
    job = {"job_key": "tomo_job", "tomo_id": "tomo", "n_rotations": 500, "job_stats": {"std": 0.1}}
    (tmp_path / "tomo_job.json").write_text(json.dumps(job))
    for source in (tmp_path, tmp_path / "tomo_scores.mrc"):
        problem = problem_of(source, tmp_path / "R")
        assert "got pytom-match-pick's of a tomogram: its scores are volumes with one" in problem


def test_every_value_is_read_twice_and_a_changed_file_is_refused(tmp_path, monkeypatch):
    shape = (600, 500)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.attrs["total_projections"] = 360
        for name, values in maps_of(shape).items():
            file.create_dataset(
                f"tensors/{name}", data=values, compression="gzip", chunks=(200, 500)
            )
            mrcfile.write(tmp_path / f"{name}.mrc", values)
    read, n_pixels = MapFiles.read, []
    monkeypatch.setattr(
        MapFiles, "read", lambda files, region: n_pixels.append(region) or read(files, region)
    )
    given = ImportOptions(total_projections=(360,))
    for source in (tmp_path / "a.h5", tmp_path / "mip.mrc"):
        for output in ("WARM-UP", "R"):
            n_pixels.clear()
            before = bytes_read()
            import_finished(
                source, tmp_path / output / source.stem, ImportOptions(total_projections=(360,))
            )
        size = (tmp_path / "a.h5").stat().st_size
        assert bytes_read() - before < 2.05 * size
        assert sum(math.prod(region.shape) for region in n_pixels) == 2 * math.prod(shape)

    def change(phase, fraction):
        if phase == "convert" and fraction == 1:
            mrcfile.write(tmp_path / "mip.mrc", np.zeros(shape, "f4"), overwrite=True)

    with pytest.raises(InvalidInputError, match=r"mip\.mrc: was changed while it was imported"):
        import_finished(tmp_path / "mip.mrc", tmp_path / "C", given, change)


def test_the_command_says_what_it_took_from_where(tmp_path, capsys):
    def ocelot_import(*words):
        code = run(["import", *map(str, words), "--output", str(tmp_path / "R")])
        out, err = capsys.readouterr()
        return code, " ".join((out + err).split())

    folder = write_leopard(tmp_path)
    code, text = ocelot_import(folder, "--pixel-size", "2.4")
    assert code == 0
    for note in (
        "its partial is named output",
        "total_projections: 360, from results.csv",
        "pixel size: 2.4 Å, as given; results.csv has 2.5",
    ):
        assert note in text
    assert "expected one finished search, got 2 files" in ocelot_import(folder, folder)[1]
    np.savez(tmp_path / "a.npz")
    refusal = ocelot_import(tmp_path / "a.npz", "--prefix", "x")[1]
    assert "prefix: expected with a finished search" in refusal
