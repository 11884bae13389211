"""Particle tables in other programs' formats, read back by the libraries that read them there."""

import csv
import json
import math
import struct
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from gemmi import cif
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from conftest import SHARED
from ocelot_em.errors import InvalidInputError, MissingDependencyError, OutputExistsError
from ocelot_em.io.napari import write_napari_csv
from ocelot_em.io.optics import LEOPARD_MAPS, Optics
from ocelot_em.io.parquet import read_parquet, write_parquet
from ocelot_em.io.star_file import parse_star
from ocelot_em.io.tables import write_cistem_star, write_leopard_csv, write_relion_star, write_table
from ocelot_em.particles.micrographs import of_micrograph, renamed
from ocelot_em.particles.table import (
    COLUMNS,
    GROUP_COLUMNS,
    NEG_LOG_P,
    ParticleTable,
    PickInfo,
)

LEOPARD_HEADER = (
    "particle_index,mip,scaled_mip,correlation_mean,correlation_variance,total_correlations,pos_x,"
    "pos_y,pos_x_img,pos_y_img,pos_x_img_angstrom,pos_y_img_angstrom,phi,theta,psi,"
    "relative_defocus,defocus_u,defocus_v,astigmatism_angle,pixel_size,refined_pixel_size,voltage,"
    "spherical_aberration,amplitude_contrast_ratio,phase_shift,ctf_B_factor,even_zernikes,"
    "odd_zernikes,mag_matrix,micrograph_path,template_path,mip_path,scaled_mip_path,psi_path,"
    "theta_path,phi_path,defocus_path,correlation_average_path,correlation_variance_path"
)
OPTICS = Optics(
    voltage_kv=300.0,
    spherical_aberration_mm=2.7,
    amplitude_contrast=0.07,
    pixel_size_angstrom=1.06,
    defocus_u_angstrom=9123.4,
    defocus_v_angstrom=8600.0,
    astigmatism_angle_degrees=30.5,
    phase_shift_degrees=0.0,
    micrograph="micrographs/M1.mrc",
    template="T.mrc",
    template_box_px=57,
)
ABOUT = PickInfo(
    store="s3://bucket/OUT.zarr",
    method="pvalue",
    cutoff=8.0,
    min_distance_px=5.0,
    false_positives=None,
    pixel_size_angstrom=1.06,
    shape=(432, 480),
    valid_shape=(376, 424),
)
NAMES = {
    "spaces in it": "a b/c d.mrc",
    "Å": "Å/é.mrc",
    "backslashes": r"C:\M\1.mrc",
    "comma": "a,b;$",
}
"""Names that every format must keep."""


def make_table(n, *, neg_log_p=False, about=None):
    rng = np.random.default_rng(n)
    names = [name for name in COLUMNS if neg_log_p or name != NEG_LOG_P]
    columns = {name: (300 * rng.random(n)).astype(COLUMNS[name].dtype) for name in names}
    for axis in "yx":
        offset = rng.uniform(-0.5, 0.5, n)
        columns[f"pos_{axis}_subpixel"] = (columns[f"pos_{axis}"] + offset).astype(np.float32)
    return ParticleTable(columns, about)


def assert_same(table, other, names=None):
    assert list(table.columns) == list(other.columns)
    for name in names or table.columns:
        values, again = table.columns[name], other.columns[name]
        assert values.dtype == again.dtype
        np.testing.assert_array_equal(again, values, err_msg=name)


def refused(function, *arguments, **options):
    with pytest.raises(InvalidInputError) as refusal:
        function(*arguments, **options)
    return refusal.value.problems


def write_mrc(path, shape=(56, 56, 56), order="<", stamp=b"MAP "):
    header = bytearray(1024)
    struct.pack_into(f"{order}3i", header, 0, *shape)
    header[208:212] = stamp
    path.write_bytes(header)


# Optics

YAML = """\
micrograph_path: M.mrc
template_volume_path: T.mrc
optics_group: {label: group 7, pixel_size: 1.5, voltage: 300, defocus_u: 1e4, defocus_v: 9000.0,
               astigmatism_angle: -20}
"""


def test_leopard_configuration_with_its_own_defaults(tmp_path):
    (tmp_path / "C.yaml").write_text(YAML)
    write_mrc(tmp_path / "T.mrc")
    assert Optics.from_leopard_yaml(tmp_path / "C.yaml") == Optics(
        voltage_kv=300.0,
        spherical_aberration_mm=2.7,
        amplitude_contrast=0.07,
        pixel_size_angstrom=1.5,
        defocus_u_angstrom=10_000.0,
        defocus_v_angstrom=9000.0,
        astigmatism_angle_degrees=-20.0,
        phase_shift_degrees=0.0,
        micrograph="M.mrc",
        template="T.mrc",
        template_box_px=56,
        label="group 7",
        leopard_columns=dict.fromkeys(
            ("even_zernikes", "odd_zernikes", "mag_matrix", *LEOPARD_MAPS), ""
        ),
    )


def test_leopard_aberrations_are_kept_as_its_table_has_them(tmp_path):
    (tmp_path / "C.yaml").write_text(
        YAML.replace(
            "label", "even_zernikes: {Z44c: 1.5}, mag_matrix: [1.0, 0.0, 0.0, 1.01], label"
        )
    )
    optics = Optics.from_leopard_yaml(tmp_path / "C.yaml", template_box_px=40)
    assert optics.leopard_columns["even_zernikes"] == '{"Z44c": 1.5}'
    assert optics.leopard_columns["mag_matrix"] == "[1.0, 0.0, 0.0, 1.01]"
    assert optics.template_box_px == 40
    write_leopard_csv(make_table(1), tmp_path / "L.csv", optics=optics)
    row = pd.read_csv(tmp_path / "L.csv").iloc[0]
    assert json.loads(row["even_zernikes"]) == {"Z44c": 1.5}
    assert row["mag_matrix"] == "[1.0, 0.0, 0.0, 1.01]"


@pytest.mark.parametrize("first", "=+-@")
def test_no_cell_starts_a_formula(tmp_path, first):
    """Paths mean the same files, numbers stay numbers, and other tables have the names as given."""
    name = f"{first}cmd!A1.mrc"
    columns = {"mip_path": name, "mag_matrix": "-1.5"}
    optics = replace(OPTICS, micrograph=name, template=name, leopard_columns=columns)
    table = make_table(2)
    write_leopard_csv(table, tmp_path / "L.csv", optics=optics)
    with (tmp_path / "L.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    for row in rows:
        for cell in row:
            assert not cell.startswith(tuple("=+-@\t\r")) or math.isfinite(float(cell)), cell
    row = dict(zip(header, rows[0], strict=True))
    assert row["mip_path"] == f"./{name}"
    assert row["mag_matrix"] == "-1.5"
    write_relion_star(table, tmp_path / "R.star", optics=optics)
    assert f"./{first}" not in (tmp_path / "R.star").read_text()
    wrong = replace(optics, leopard_columns={"mag_matrix": f"{first}cmd!A1"})
    (problem,) = refused(lambda: write_leopard_csv(table, tmp_path / "L.csv", optics=wrong))
    assert problem.startswith("mag_matrix: expected no text that spreadsheets take for a formula")
    exposures = np.array(["a", f"{first}b"])
    problems = refused(lambda: ParticleTable({**table.columns, "exposure": exposures}))
    assert any("exposure: expected no text that spreadsheets take" in p for p in problems)


def test_everything_that_is_wrong_with_a_configuration_is_named(tmp_path):
    path = tmp_path / "C.yaml"
    path.write_text(
        "template_volume_path: NONE.mrc\n"
        "optics_group: {pixel_size: 0, voltage: high, defocus_u: .nan, astigmatism_angle: true,\n"
        "               amplitude_contrast_ratio: 7, label: null, odd_zernikes: 3}\n"
        "match_template_result: [mip.mrc]\n"
    )
    problems = refused(Optics.from_leopard_yaml, path)
    assert all(problem.startswith(f"{path}: ") for problem in problems)
    assert [problem.removeprefix(f"{path}: ") for problem in problems] == [
        "match_template_result: expected keys and values, got ['mip.mrc']",
        "template_volume_path: expected a file, got 'NONE.mrc'; say how large the template is "
        "(--template-box, template_box_px)",
        "optics_group.voltage: expected a number above 0 (kV), got 'high'",
        "optics_group.amplitude_contrast_ratio: expected a number from 0 to 1 (fraction), got 7.0",
        "optics_group.pixel_size: expected a number above 0 (Å), got 0.0",
        "optics_group.defocus_u: expected a number (Å), got nan",
        "optics_group.defocus_v: expected a number (Å), got None",
        "optics_group.astigmatism_angle: expected a number (degrees), got True",
        "micrograph_path: expected text, got None",
        "optics_group.label: expected text, got None",
        "optics_group.odd_zernikes: expected text, got 3",
    ]


@pytest.mark.parametrize(
    "content", [b"[1, 2]", b"", b"a: [", b"\xff", b"a: 2020-13-45", b"a: !!python/name:os.system"]
)
def test_what_is_no_configuration_is_refused(tmp_path, content):
    (tmp_path / "C.yaml").write_bytes(content)
    (problem,) = refused(Optics.from_leopard_yaml, tmp_path / "C.yaml")
    assert problem.startswith(f"{tmp_path / 'C.yaml'}: ")


def test_a_missing_configuration_is_refused(tmp_path):
    (problem,) = refused(Optics.from_leopard_yaml, tmp_path / "C.yaml")
    assert "expected the configuration of a match_template run, got no file" in problem


@pytest.mark.parametrize("order", "<>")
def test_the_template_is_looked_for_where_leopard_does_first(tmp_path, monkeypatch, order):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "C.yaml").write_text(YAML)
    write_mrc(tmp_path / "there" / "T.mrc", (40, 40, 40), order)
    monkeypatch.chdir(tmp_path)
    assert Optics.from_leopard_yaml("there/C.yaml").template_box_px == 40
    write_mrc(tmp_path / "T.mrc", (300, 300, 300), order, b"MAP\0")
    assert Optics.from_leopard_yaml("there/C.yaml").template_box_px == 300


@pytest.mark.parametrize(
    "file",
    [{"shape": (56, 56, 1)}, {"shape": (0, 0, 0)}, {"shape": (-5, -5, -5)}, {"stamp": b"    "}],
)
def test_a_template_that_is_no_cubic_volume_is_refused(tmp_path, file):
    (tmp_path / "C.yaml").write_text(YAML)
    write_mrc(tmp_path / "T.mrc", **file)
    (problem,) = refused(Optics.from_leopard_yaml, tmp_path / "C.yaml")
    assert "expected a cubic MRC volume" in problem
    assert "template_box_px" in problem


def test_a_template_that_cannot_be_read_is_refused(tmp_path, monkeypatch):
    (tmp_path / "C.yaml").write_text(YAML)
    write_mrc(tmp_path / "T.mrc")

    def fail(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", fail)
    monkeypatch.setattr("pathlib.Path.read_bytes", lambda _: YAML.encode())
    (problem,) = refused(Optics.from_leopard_yaml, tmp_path / "C.yaml")
    assert "T.mrc cannot be read: Permission denied; say how large" in problem


def test_optics_that_cannot_be_are_refused():
    problems = refused(
        lambda: replace(
            OPTICS,
            voltage_kv=0,
            defocus_u_angstrom=math.inf,
            micrograph="a\nb",
            template="",
            label="\ud800",
            template_box_px=0,
            leopard_columns={"mip_path": "a\x00", "nip_path": ""},
        )
    )
    assert [problem.partition(":")[0] for problem in problems] == [
        "voltage_kv",
        "defocus_u_angstrom",
        "micrograph",
        "template",
        "label",
        "template_box_px",
        "mip_path",
        "nip_path",
    ]


# Leopard-EM


def official_table():
    """Leopard-EM's own results as a particle table; what it has no column for is 0."""
    frame = pd.read_csv(SHARED / "A_official_results.csv")
    theirs = {"correlation_std": "correlation_variance"}
    zeros = np.zeros(len(frame))
    return ParticleTable(
        {
            name: np.asarray(frame.get(theirs.get(name, name), zeros), column.dtype)
            for name, column in COLUMNS.items()
            if name != NEG_LOG_P
        }
    )


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real search is not on this machine")
def test_the_table_of_a_real_search_is_leopards_own(tmp_path):
    optics = Optics.from_leopard_yaml(SHARED / "A_official_config.yaml", template_box_px=56)
    write_leopard_csv(official_table(), tmp_path / "L.csv", optics=optics)
    assert (tmp_path / "L.csv").read_bytes() == (SHARED / "A_official_results.csv").read_bytes()


@pytest.mark.parametrize("n", [0, 1, 3])
def test_leopards_table_has_its_columns_in_its_order(tmp_path, n):
    table = make_table(n, neg_log_p=True)
    write_leopard_csv(table, tmp_path / "L.csv", optics=OPTICS)
    assert (tmp_path / "L.csv").read_text().partition("\n")[0] == LEOPARD_HEADER
    frame = pd.read_csv(tmp_path / "L.csv")
    assert len(frame) == n
    assert frame["particle_index"].tolist() == list(range(n))
    for axis in "yx":
        centre = table.columns[f"pos_{axis}"] + 28
        np.testing.assert_array_equal(frame[f"pos_{axis}_img"], centre)
        angstrom = frame[f"pos_{axis}_img_angstrom"].to_numpy(np.float64)
        np.testing.assert_allclose(angstrom, centre * 1.06, rtol=1e-15)
    np.testing.assert_array_equal(
        frame["correlation_variance"].to_numpy(np.float32), table.columns["correlation_std"]
    )
    assert frame["mip_path"].isna().all()


def test_leopards_table_has_nothing_where_a_number_is_nan(tmp_path):
    table = make_table(2)
    table.columns["relative_defocus"][0] = np.nan
    write_leopard_csv(table, tmp_path / "L.csv", optics=replace(OPTICS, micrograph="nan.mrc"))
    frame = pd.read_csv(tmp_path / "L.csv")
    assert frame["relative_defocus"].isna().tolist() == [True, False]
    assert frame["micrograph_path"].tolist() == ["nan.mrc", "nan.mrc"]


@pytest.mark.parametrize("name", ['q"uote', "co,mma", "apo'strophe", "#1", *NAMES.values()])
def test_leopards_table_keeps_any_name(tmp_path, name):
    optics = replace(OPTICS, micrograph=name, leopard_columns={"mip_path": name})
    write_leopard_csv(make_table(1), tmp_path / "L.csv", optics=optics)
    row = pd.read_csv(tmp_path / "L.csv").iloc[0]
    assert row["micrograph_path"] == row["mip_path"] == name


# RELION

IN_STAR = (
    *("pos_y", "pos_x", "scaled_mip", "psi", "theta", "phi", "relative_defocus"),
    *("pos_y_subpixel", "pos_x_subpixel"),
)


def read_star(path):
    """Blocks of a STAR file as data frames, with numbers where a column has nothing else."""
    tables, problems = parse_star(path.read_text(encoding="utf-8"))
    assert not problems
    blocks = {}
    for table in tables:
        frame = pd.DataFrame(table.rows, columns=table.columns, dtype=object)
        blocks[table.block] = frame.apply(numbers)
        for name in {"rlnMicrographName", "rlnOpticsGroupName"} & set(table.columns):
            blocks[table.block][name] = frame[name]
    assert len(blocks) == len(tables)
    return blocks


def numbers(column):
    try:
        return pd.to_numeric(column)
    except ValueError:
        return column


def columns_in_star(path, optics):
    """Columns of ours as they follow from those of a RELION file."""
    found = read_star(path)["particles"]
    columns = {
        "psi": found["rlnAnglePsi"],
        "theta": found["rlnAngleTilt"],
        "phi": found["rlnAngleRot"],
        "scaled_mip": found["rlnAutopickFigureOfMerit"],
        "relative_defocus": found["rlnDefocusU"] - optics.defocus_u_angstrom,
    }
    for axis in "yx":
        corner = found[f"rlnCoordinate{axis.upper()}"] - optics.template_box_px // 2
        origin = found[f"rlnOrigin{axis.upper()}Angst"] / optics.pixel_size_angstrom
        columns |= {f"pos_{axis}": corner, f"pos_{axis}_subpixel": corner - origin}
    return {name: columns[name].to_numpy(COLUMNS[name].dtype) for name in IN_STAR}


def assert_in_star(table, path, optics):
    for name, values in columns_in_star(path, optics).items():
        np.testing.assert_array_equal(values, table.columns[name], err_msg=name)


@st.composite
def particles(draw):
    """Tables of a few particles at any place, in any pose."""
    n = draw(st.integers(0, 4))
    table = make_table(n)
    for name in ("psi", "theta", "phi", "scaled_mip"):
        table.columns[name][:] = draw(hnp.arrays(np.float32, n))
    sixteenths = hnp.arrays(np.int32, n, elements=st.integers(-480_000, 480_000))
    table.columns["relative_defocus"][:] = draw(sixteenths) / 16
    for axis in "yx":
        corner = draw(hnp.arrays(np.int32, n, elements=st.integers(0, 90_000)))
        offset = draw(hnp.arrays(np.float32, n, elements=st.floats(-0.5, 0.5, width=32)))
        table.columns[f"pos_{axis}"][:] = corner
        table.columns[f"pos_{axis}_subpixel"][:] = corner + offset
    return table


@given(particles(), st.integers(1, 512))
def test_a_relion_file_keeps_what_it_has_columns_for(tmp_path, table, box):
    optics = replace(OPTICS, template_box_px=box)
    write_relion_star(table, tmp_path / "P.star", optics=optics, overwrite=True)
    assert_in_star(table, tmp_path / "P.star", optics)


@pytest.mark.parametrize("n", [1, 3])
def test_relion_finds_its_columns(tmp_path, n):
    table = make_table(n, neg_log_p=True)
    write_relion_star(table, tmp_path / "P.star", optics=replace(OPTICS, label="group 7"))
    blocks = read_star(tmp_path / "P.star")
    assert list(blocks) == ["optics", "particles"]
    assert blocks["optics"].to_dict("records") == [
        {
            "rlnOpticsGroup": 1,
            "rlnOpticsGroupName": "group 7",
            "rlnVoltage": 300.0,
            "rlnSphericalAberration": 2.7,
            "rlnAmplitudeContrast": 0.07,
            "rlnImagePixelSize": 1.06,
            "rlnImageSize": 57,
            "rlnImageDimensionality": 2,
        }
    ]
    found, own = blocks["particles"], table.columns
    assert found["rlnMicrographName"].tolist() == [OPTICS.micrograph] * n
    assert found["rlnOpticsGroup"].tolist() == [1] * n
    assert found["rlnDefocusAngle"].tolist() == [30.5] * n
    for theirs, ours in (
        ("AngleRot", own["phi"]),
        ("AngleTilt", own["theta"]),
        ("AnglePsi", own["psi"]),
        ("AutopickFigureOfMerit", own["scaled_mip"]),
        ("CoordinateX", own["pos_x"] + 28),
        ("CoordinateY", own["pos_y"] + 28),
    ):
        values = found[f"rln{theirs}"].to_numpy(ours.dtype)
        np.testing.assert_array_equal(values, ours, err_msg=theirs)
    relative = own["relative_defocus"].astype(np.float64)
    np.testing.assert_allclose(found["rlnDefocusU"], relative + 9123.4, rtol=1e-15)
    np.testing.assert_allclose(found["rlnDefocusV"], relative + 8600.0, rtol=1e-15)
    # RELION takes a particle's centre to be its coordinate less its origin.
    for axis in "yx":
        origin = found[f"rlnOrigin{axis.upper()}Angst"] / 1.06
        centre = found[f"rlnCoordinate{axis.upper()}"] - origin
        np.testing.assert_allclose(centre, own[f"pos_{axis}_subpixel"] + 28.0, rtol=1e-7)


RELION_FILE = """\
# Created by ocelot-em


data_optics

loop_
_rlnOpticsGroup #1
_rlnOpticsGroupName #2
_rlnVoltage #3
_rlnSphericalAberration #4
_rlnAmplitudeContrast #5
_rlnImagePixelSize #6
_rlnImageSize #7
_rlnImageDimensionality #8
1\t"group 7"\t300.0\t2.7\t0.07\t1.06\t57\t2


data_particles

loop_
_rlnCoordinateX #1
_rlnCoordinateY #2
_rlnOriginXAngst #3
_rlnOriginYAngst #4
_rlnAngleRot #5
_rlnAngleTilt #6
_rlnAnglePsi #7
_rlnAutopickFigureOfMerit #8
_rlnDefocusU #9
_rlnDefocusV #10
_rlnDefocusAngle #11
_rlnPhaseShift #12
_rlnOpticsGroup #13
_rlnMicrographName #14
_ocelotRank #15
_ocelotMip #16
88.0\t48.0\t0.0\t-0.265\t1.5\t90.0\t-0.1\t9.25\t9323.4\t8800.0\t30.5\t0.0\t1\tmicrographs/M1.mrc\t1\t8.5


"""
CISTEM_FILE = """\
# Created by ocelot-em


data_

loop_
_cisTEMPositionInStack #1
_cisTEMAnglePsi #2
_cisTEMAngleTheta #3
_cisTEMAnglePhi #4
_cisTEMDefocus1 #5
_cisTEMDefocus2 #6
_cisTEMDefocusAngle #7
_cisTEMPhaseShift #8
_cisTEMScore #9
_cisTEMPixelSize #10
_cisTEMMicroscopeVoltagekV #11
_cisTEMMicroscopeCsMM #12
_cisTEMAmplitudeContrast #13
_cisTEMOriginalImageFilename #14
_cisTEMReference3DFilename #15
_cisTEMOriginalXPosition #16
_cisTEMOriginalYPosition #17
_ocelotRank #18
_ocelotMip #19
1\t-0.1\t90.0\t1.5\t9323.4\t8800.0\t30.5\t0.0\t9.25\t1.06\t300.0\t2.7\t0.07\t'micrographs/M1.mrc'\t'T.mrc'\t93.28\t50.88\t1\t8.5


"""


@pytest.mark.parametrize(
    ("write", "expected"), [(write_relion_star, RELION_FILE), (write_cistem_star, CISTEM_FILE)]
)
def test_star_files_to_the_byte(tmp_path, write, expected):
    table = of_micrograph(make_table(1), "M1")
    values = {"phi": 1.5, "theta": 90, "psi": -0.1, "scaled_mip": 9.25, "relative_defocus": 200}
    values |= {"mip": 8.5, "pos_y": 20, "pos_x": 60, "pos_y_subpixel": 20.25, "pos_x_subpixel": 60}
    for name, value in values.items():
        table.columns[name][:] = value
    write(table, tmp_path / "P.star", optics=replace(OPTICS, label="group 7"))
    assert (tmp_path / "P.star").read_text() == expected


@pytest.mark.parametrize("name", ["_x", "loop_", "LOOP_", "data_x", "save_", "?", ".", "$a", ";a"])
def test_names_that_mean_something_in_star_files_are_quoted(tmp_path, name):
    write_relion_star(make_table(2), tmp_path / "P.star", optics=replace(OPTICS, micrograph=name))
    block = cif.read(str(tmp_path / "P.star"))["particles"]
    values = [cif.as_string(value) for value in block.find_values("_rlnMicrographName")]
    assert values == [name, name]


def test_a_particle_whose_place_between_pixels_is_not_known_is_at_its_pixel(tmp_path):
    table = make_table(2)
    table.columns["pos_x_subpixel"][0] = np.nan
    write_relion_star(table, tmp_path / "P.star", optics=OPTICS)
    again = columns_in_star(tmp_path / "P.star", OPTICS)
    assert again["pos_x_subpixel"][0] == table.columns["pos_x"][0]


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_relion_files_keep_names(tmp_path, name):
    optics = replace(OPTICS, micrograph=name, label=f"{name} group")
    write_relion_star(make_table(2), tmp_path / "P.star", optics=optics)
    blocks = read_star(tmp_path / "P.star")
    assert blocks["particles"]["rlnMicrographName"].tolist() == [name, name]
    assert blocks["optics"]["rlnOpticsGroupName"].tolist() == [f"{name} group"]


@given(st.text(min_size=1, max_size=12))
@example("a\u3000")
def test_relion_files_keep_a_name_or_refuse_it(tmp_path, name):
    def attempt():
        try:
            optics = replace(OPTICS, micrograph=name, label=name)
            write_relion_star(make_table(2), tmp_path / "P.star", optics=optics, overwrite=True)
        except InvalidInputError as refusal:
            return None, refusal.problems
        return optics, ()

    optics, problems = attempt()
    assert all(problem.startswith(("micrograph: ", "label: ")) for problem in problems)
    if optics:
        blocks = read_star(tmp_path / "P.star")
        assert blocks["particles"]["rlnMicrographName"].tolist() == [name, name]
        assert blocks["optics"]["rlnOpticsGroupName"].tolist() == [name]
        assert_in_star(make_table(2), tmp_path / "P.star", optics)


@pytest.mark.parametrize("name", ["a'b", 'a"b', "a#b", "nan", "NaN", "<NA>", "a\xa0"])
@pytest.mark.parametrize("write", [write_relion_star, write_cistem_star])
def test_names_that_star_files_cannot_hold_are_refused(tmp_path, write, name):
    (problem,) = refused(
        write, make_table(1), tmp_path / "P.star", optics=replace(OPTICS, micrograph=name)
    )
    assert problem.startswith("micrograph: expected a name without")
    assert not list(tmp_path.iterdir())


# cisTEM


@pytest.mark.parametrize("n", [0, 1, 3])
def test_cistem_finds_its_columns(tmp_path, n):
    table = make_table(n, neg_log_p=True)
    write_cistem_star(table, tmp_path / "C.star", optics=replace(OPTICS, phase_shift_degrees=90.0))
    found, own = read_star(tmp_path / "C.star")[""], table.columns
    assert len(found) == n
    for theirs, ours in (
        ("PositionInStack", np.arange(1, n + 1)),
        ("AnglePsi", own["psi"]),
        ("AngleTheta", own["theta"]),
        ("AnglePhi", own["phi"]),
        ("Score", own["scaled_mip"]),
        ("Defocus1", own["relative_defocus"].astype(np.float64) + 9123.4),
        ("Defocus2", own["relative_defocus"].astype(np.float64) + 8600.0),
        ("OriginalXPosition", (own["pos_x"] + 28) * 1.06),
        ("OriginalYPosition", (own["pos_y"] + 28) * 1.06),
        ("PixelSize", np.full(n, 1.06)),
        ("MicroscopeVoltagekV", np.full(n, 300.0)),
        ("MicroscopeCsMM", np.full(n, 2.7)),
        ("AmplitudeContrast", np.full(n, 0.07)),
        ("DefocusAngle", np.full(n, 30.5)),
        ("PhaseShift", np.full(n, 90.0)),
    ):
        values = found[f"cisTEM{theirs}"].to_numpy(ours.dtype)
        np.testing.assert_allclose(values, ours, rtol=1e-15, err_msg=theirs)
    assert found["cisTEMOriginalImageFilename"].tolist() == [OPTICS.micrograph] * n
    assert found["cisTEMReference3DFilename"].tolist() == ["T.mrc"] * n


def test_cistem_reads_names_between_single_quotation_marks_only(tmp_path):
    write_cistem_star(make_table(1), tmp_path / "C.star", optics=OPTICS)
    text = (tmp_path / "C.star").read_text()
    assert f"\t'{OPTICS.micrograph}'\t'T.mrc'\t" in text
    assert "\ndata_\n\nloop_\n_cisTEMPositionInStack #1\n" in text
    problems = refused(
        write_cistem_star,
        make_table(1),
        tmp_path / "C",
        optics=replace(OPTICS, micrograph="a b", template="c d"),
    )
    assert [p[:45] for p in problems] == [
        "micrograph: expected a name without quotation",
        "template: expected a name without quotation m",
    ]


# Parquet


@st.composite
def any_table(draw):
    n = draw(st.integers(0, 5))
    names = list(COLUMNS)[: draw(st.sampled_from([len(COLUMNS) - 1, len(COLUMNS)]))]
    columns = {name: draw(hnp.arrays(COLUMNS[name].dtype, n)) for name in names}
    store = draw(st.text(max_size=20))
    return ParticleTable(columns, draw(st.sampled_from([None, replace(ABOUT, store=store)])))


@given(any_table())
def test_parquet_keeps_everything(tmp_path, table):
    write_parquet(table, tmp_path / "P.parquet", overwrite=True)
    again = read_parquet(tmp_path / "P.parquet")
    assert_same(table, again)
    assert again.about == table.about


def test_parquet_has_many_long_names(tmp_path):
    n, name = 2**18, "a" * 70
    columns = {k: np.zeros(n, c.dtype) for k, c in COLUMNS.items() if k != NEG_LOG_P}
    table = of_micrograph(ParticleTable(columns), name)
    write_parquet(table, tmp_path / "P.parquet")
    assert pq.read_table(tmp_path / "P.parquet")["micrograph"].unique().to_pylist() == [name]


def test_parquet_says_what_columns_are(tmp_path):
    write_parquet(make_table(3, about=ABOUT), tmp_path / "P.parquet")
    schema = pq.read_schema(tmp_path / "P.parquet")
    assert schema.field("psi").metadata[b"unit"] == b"degree"
    assert json.loads(schema.metadata[b"ocelot_em.about"])["method"] == "pvalue"
    frame = pd.read_parquet(tmp_path / "P.parquet")
    pd.testing.assert_frame_equal(frame, make_table(3).to_pandas())


def test_parquet_of_another_program_is_read(tmp_path):
    table = make_table(3)
    table.to_pandas().iloc[:, ::-1].to_parquet(tmp_path / "P.parquet")
    again = read_parquet(tmp_path / "P.parquet")
    assert_same(table, again)
    assert again.about is None


def test_everything_that_is_wrong_with_a_parquet_file_is_named(tmp_path):
    path = tmp_path / "P.parquet"
    columns = {**make_table(2).columns, "mip": pa.array([1.0, None], pa.float32())}
    about = json.dumps({"store": "x", "method": "guess"})
    pq.write_table(pa.table(columns).replace_schema_metadata({"ocelot_em.about": about}), path)
    problems = "\n".join(refused(read_parquet, path))
    assert "mip: expected a value for each particle, got 1 without" in problems
    assert "ocelot_em.about: method: " in problems
    assert "ocelot_em.about: cutoff: " in problems
    pq.write_table(pa.table({**make_table(2).columns, "z": [1, 2], "psi": [1, 2]}), path)
    problems = refused(read_parquet, path)
    assert [p.removeprefix(f"{path}: ")[:29] for p in problems] == [
        "'z': expected one of microgra",
        "psi: expected dtype float32, ",
    ]


@pytest.mark.parametrize("content", [None, b"", b"PAR1", b"PAR1" + bytes(20) + b"PAR1"])
def test_what_is_no_parquet_file_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "P.parquet").write_bytes(content)
    (problem,) = refused(read_parquet, tmp_path / "P.parquet")
    assert problem.startswith(f"{tmp_path / 'P.parquet'}: cannot be read as Parquet: ")


# All of them

ESTIMATES = ("precision", "recall")
IN_EVERY_TABLE = ("micrograph", "rank", "mip", "scaled_mip", *GROUP_COLUMNS, *ESTIMATES)
LEOPARDS = {"micrograph_path": "micrograph"}
IN_STAR_FILES = {
    "rlnMicrographName": "micrograph",
    "cisTEMOriginalImageFilename": "micrograph",
    "rlnAutopickFigureOfMerit": "scaled_mip",
    "cisTEMScore": "scaled_mip",
    "ocelotRank": "rank",
    "ocelotMip": "mip",
    "ocelotGroup": "group",
    "ocelotSecondZscore": "second_zscore",
    "ocelotZscoreDifference": "zscore_difference",
    "ocelotPrecision": "precision",
    "ocelotRecall": "recall",
}


@pytest.mark.parametrize("form", ["csv", "parquet", "napari", "leopard", "relion", "cistem"])
def test_every_table_has_micrograph_rank_group_scores_and_estimates(tmp_path, form):
    plain, rng = make_table(5), np.random.default_rng(2)
    scores = rng.random(5).astype("f4")
    groups = np.array(["apo", "holo", "data_1", "apo", "loop_"])
    columns = dict(zip(GROUP_COLUMNS, (groups, scores, plain["scaled_mip"] - scores), strict=True))
    columns |= {"precision": np.linspace(1, 0.5, 5), "recall": np.array([0.25, 0.5, 1, 1, np.nan])}
    table = of_micrograph(ParticleTable({**plain.columns, **columns}), "M1")[[3, 0, 2]]
    path = tmp_path / "T"
    optics = replace(OPTICS, micrograph="M1")
    if form == "csv":
        found = ParticleTable.read_csv(table.to_csv(path)).columns
    elif form == "parquet":
        found = read_parquet(table.to_parquet(path)).columns
    elif form == "napari":
        found = pd.read_csv(write_napari_csv(table, path))
    elif form == "leopard":
        found = pd.read_csv(write_leopard_csv(table, path, optics=optics)).rename(columns=LEOPARDS)
    else:
        blocks = read_star(table.to_star(path, optics=optics, program=form))
        found = blocks["particles" if form == "relion" else ""].rename(columns=IN_STAR_FILES)
    for name in IN_EVERY_TABLE:
        if (form, name) == ("leopard", "rank"):  # it numbers the rows
            assert found["particle_index"].tolist() == [0, 1, 2]
            continue
        values = np.asarray(found[name]).astype(table[name].dtype)
        np.testing.assert_array_equal(values, table[name], err_msg=name)


def test_tables_of_earlier_versions_get_the_name_that_is_given(tmp_path):
    old = ParticleTable.read_csv(make_table(3).to_csv(tmp_path / "OLD.csv"))
    assert "micrograph" not in old
    table = renamed(old, "a,b")
    assert table["rank"].tolist() == [1, 2, 3]
    assert {*table["micrograph"].tolist()} == {"a_b"}


def test_a_table_of_several_micrographs_needs_one_to_be_named(tmp_path):
    names = np.array(["M1", "M2", "M1"])
    table = ParticleTable({**of_micrograph(make_table(3), "").columns, "micrograph": names})
    for write in (write_leopard_csv, write_relion_star, write_cistem_star):
        (problem,) = refused(write, table, tmp_path / "T", optics=OPTICS)
        assert problem.endswith("got those of 2; select one with --micrograph M1")
    assert renamed(table, "Micrographs/M1.mrc")["rank"].tolist() == [1, 3]
    (problem,) = refused(renamed, table, "M3.mrc")
    assert problem == "micrograph: expected one of M1, M2, got 'M3.mrc'"


def test_the_suffix_names_the_format(tmp_path):
    table = make_table(2, about=ABOUT)
    for name in ("T.csv", "T.CSV", "T.parquet", "T.star"):
        write_table(table, tmp_path / name, optics=OPTICS)
    assert_same(table, ParticleTable.read_csv(tmp_path / "T.csv"))
    assert_same(table, ParticleTable.read_csv(tmp_path / "T.CSV"))
    assert read_parquet(tmp_path / "T.parquet").about == ABOUT
    assert_in_star(table, tmp_path / "T.star", OPTICS)
    write_table(table, str(tmp_path / "U.csv"))
    for name in ("T.txt", "T", "T.csv.gz"):
        (problem,) = refused(write_table, table, tmp_path / name)
        assert "expected a name that ends in .csv, .star (RELION) or .parquet" in problem
    (problem,) = refused(write_table, table, tmp_path / "U.star")
    assert "needs the micrograph's optics" in problem


@pytest.mark.parametrize("write", [write_leopard_csv, write_relion_star, write_cistem_star])
def test_optics_of_another_search_are_refused(tmp_path, write):
    table = make_table(1, about=ABOUT)
    write(table, tmp_path / "T", optics=OPTICS)
    other = replace(OPTICS, template_box_px=56, pixel_size_angstrom=1.07)
    assert refused(write, table, tmp_path / "U", optics=other) == (
        "template_box_px: expected 57, got 56; are these the optics of s3://bucket/OUT.zarr?",
        "pixel_size_angstrom: expected 1.06, got 1.07; are these the optics of "
        "s3://bucket/OUT.zarr?",
    )
    valid = replace(ABOUT, valid_shape=ABOUT.shape, pixel_size_angstrom=None)
    write(ParticleTable(table.columns, valid), tmp_path / "U", optics=other)


@pytest.mark.parametrize("write", [write_table, write_leopard_csv, write_parquet])
def test_a_folder_is_created_and_a_file_replaced_only_if_asked(tmp_path, write):
    path, optics = tmp_path / "new" / "T.csv", {} if write is write_parquet else {"optics": OPTICS}
    assert write(make_table(1), path, **optics) == path
    content = path.read_bytes()
    with pytest.raises(OutputExistsError, match=r"T\.csv: already there"):
        write(make_table(2), path, **optics)
    assert path.read_bytes() == content
    write(make_table(2), path, **optics, overwrite=True)
    assert path.read_bytes() != content


@pytest.mark.parametrize(
    ("package", "use"),
    [
        ("pyarrow", lambda place: write_parquet(make_table(1), place, overwrite=True)),
        ("pyarrow", read_parquet),
    ],
)
def test_a_package_that_is_not_installed_is_named(tmp_path, monkeypatch, package, use):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "T").touch()
    with pytest.raises(MissingDependencyError, match=rf"{package}: pip install 'ocelot-em\[tables"):
        use(tmp_path / "T")


def test_leopards_table_can_name_our_maps(tmp_path):
    from ocelot_em.io.leopard_maps import OUR_NAMES
    from ocelot_em.io.optics import LEOPARD_MAPS, with_maps_in

    optics = replace(OPTICS, leopard_columns={"mag_matrix": "kept"})
    named = with_maps_in(optics, tmp_path, "out_").leopard_columns
    assert named["mag_matrix"] == "kept"
    files = {str(tmp_path / f"out_{name}.mrc") for name in OUR_NAMES}
    assert {named[column] for column in LEOPARD_MAPS} == files
