"""Optics from the files of other programs, and given values."""

import contextlib
import math
import sqlite3

import pytest

from ocelot_em import Simulation, find_peaks, merge, read_optics, simulate
from ocelot_em.cli.main import run
from ocelot_em.errors import InvalidInputError
from ocelot_em.io.optics import Optics
from ocelot_em.io.optics_files import read_optics_of
from ocelot_em.io.star_file import parse_star

RELION = """
# version 30001

data_optics

loop_
_rlnOpticsGroupName #1
_rlnOpticsGroup #2
_rlnMicrographOriginalPixelSize #3
_rlnVoltage #4
_rlnSphericalAberration #5
_rlnAmplitudeContrast #6
_rlnMicrographPixelSize #7
opticsGroup1            1     0.500000   300.000000     2.700000     0.100000     2.500000
second                  2     0.500000   200.000000     1.400000     0.080000     2.500000


# version 30001

data_micrographs

loop_
_rlnMicrographName #1
_rlnOpticsGroup #2
_rlnDefocusU #3
_rlnDefocusV #4
_rlnDefocusAngle #5
MotionCorr/job002/movies/A_01.mrc            1 39224.25 39029.5 -15.5
MotionCorr/job002/movies/A_02.mrc            2 39289.75 39136.5 -88.25
"""
RELION_3_0 = """
data_

loop_
_rlnMicrographName #1
_rlnVoltage #2
_rlnSphericalAberration #3
_rlnAmplitudeContrast #4
_rlnDefocusU #5
_rlnDefocusV #6
_rlnDefocusAngle #7
_rlnPhaseShift #8
A_01.mrc 300 2.7 0.1 9000 8000 10 90
"""
CTFFIND = """\
# Output from CTFFind version 4.1.14, run on 2023-02-02 15:13:07
# Input file: M 1.mrc ; Number of micrographs: 1
# Pixel size: 2.500 Angstroms ; acceleration voltage: 200.0 keV ; spherical aberration: 2.26 mm ; \
amplitude contrast: 0.07
# Columns: #1 - micrograph number; #2 - defocus 1 [Angstroms]; #3 - defocus 2; #4 - azimuth of \
astigmatism; #5 - additional phase shift [radians]; #6 - cross correlation; #7 - spacing
1.000000 9982.502930 9882.502930 12.5 1.570796 0.565683 1.980663
"""
REST = {"template": "T.mrc", "template_box_px": 56}


@pytest.mark.parametrize("name", ["MotionCorr/job002/movies/A_02.mrc", "x/A_02.mrc", "A_02"])
def test_relions_table_has_a_row_for_each_micrograph(tmp_path, name):
    (tmp_path / "ctf.star").write_text(RELION)
    found = read_optics(tmp_path / "ctf.star", micrograph=name, **REST)
    assert found == Optics(
        voltage_kv=200.0,
        spherical_aberration_mm=1.4,
        amplitude_contrast=0.08,
        pixel_size_angstrom=2.5,
        defocus_u_angstrom=39289.75,
        defocus_v_angstrom=39136.5,
        astigmatism_angle_degrees=-88.25,
        phase_shift_degrees=0.0,
        micrograph="MotionCorr/job002/movies/A_02.mrc",
        label="second",
        **REST,
    )


@pytest.mark.parametrize(
    ("name", "got"), [(None, "got 2; name"), ("B", "named B, got 0 of that name")]
)
def test_the_micrographs_of_a_table_are_named(tmp_path, name, got):
    (tmp_path / "ctf.star").write_text(RELION)
    with pytest.raises(InvalidInputError, match=rf"{got}.*A_01\.mrc, .*A_02\.mrc"):
        read_optics(tmp_path / "ctf.star", micrograph=name, **REST)


def test_a_table_of_one_micrograph_and_of_an_earlier_version(tmp_path):
    (tmp_path / "ctf.star").write_text(RELION_3_0)
    found = read_optics(tmp_path / "ctf.star", **REST, defaults={"pixel_size_angstrom": 1.5})
    assert (found.micrograph, found.phase_shift_degrees) == ("A_01.mrc", 90)
    assert (found.pixel_size_angstrom, found.label) == (1.5, "opticsGroup1")


def test_ctffinds_results(tmp_path):
    (tmp_path / "M1.txt").write_text(CTFFIND)
    found = read_optics(tmp_path / "M1.txt", voltage_kv=300, **REST)
    assert found == Optics(
        300, 2.26, 0.07, 2.5, 9982.50293, 9882.50293, 12.5, math.degrees(1.570796), "M 1.mrc",
        "T.mrc", 56,
    )  # fmt: skip


def cistem_database(path, images=()):
    """Write the two tables that are read, as cisTEM 1 creates them, with a few of their columns."""
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute(
            "CREATE TABLE IMAGE_ASSETS(IMAGE_ASSET_ID INTEGER PRIMARY KEY, NAME TEXT,"
            " FILENAME TEXT, CTF_ESTIMATION_ID INTEGER, PIXEL_SIZE REAL, VOLTAGE REAL)"
        )
        database.execute(
            "CREATE TABLE ESTIMATED_CTF_PARAMETERS(CTF_ESTIMATION_ID INTEGER PRIMARY KEY,"
            " IMAGE_ASSET_ID INTEGER, VOLTAGE REAL, SPHERICAL_ABERRATION REAL, PIXEL_SIZE REAL,"
            " AMPLITUDE_CONTRAST REAL, DEFOCUS1 REAL, DEFOCUS2 REAL, DEFOCUS_ANGLE REAL,"
            " ADDITIONAL_PHASE_SHIFT REAL)"
        )
        database.executemany("INSERT INTO IMAGE_ASSETS VALUES (?, '', ?, ?, 1.06, 300)", images)
        database.executemany(
            "INSERT INTO ESTIMATED_CTF_PARAMETERS VALUES (?, ?, 300, 2.7, 0.5, 0.07, ?, ?, 30, ?)",
            [(1, 1, 9000, 8000, 0.0), (2, 1, 9100, 8100, math.pi / 2), (3, 2, 7000, 6000, 0.0)],
        )


def test_cistems_database_gives_the_estimate_in_use(tmp_path):
    images = [(1, "/d/A_01.mrc", 2), (2, "/d/A_02.mrc", 3), (3, "/d/A_03.mrc", -1)]
    cistem_database(tmp_path / "P.db", images)
    found = read_optics(tmp_path / "P.db", micrograph="A_01", **REST)
    assert found == Optics(300, 2.7, 0.07, 1.06, 9100, 8100, 30, 90, "/d/A_01.mrc", "T.mrc", 56)
    many = read_optics_of("A_02", tmp_path / "P.db", **REST)
    assert (many.micrograph, many.defocus_u_angstrom) == ("/d/A_02.mrc", 7000)
    with pytest.raises(InvalidInputError, match="got 0 of that name"):  # its CTF was not estimated
        read_optics(tmp_path / "P.db", micrograph="A_03", **REST)


def test_databases_that_are_something_else(tmp_path):
    cistem_database(tmp_path / "empty.db")
    with contextlib.closing(sqlite3.connect(tmp_path / "other.db")) as database:
        database.execute("CREATE TABLE A(B TEXT)")
    (tmp_path / "text.db").write_text("text" * 1000)
    problems = {
        "empty": "got none; estimate their CTF first",
        "other": "no such table: IMAGE_ASSETS",
        "text": "file is not a database",
        "missing": "got no file",
    }
    for name, problem in problems.items():
        with pytest.raises(InvalidInputError, match=rf"{name}\.db: expected .*{problem}"):
            read_optics(tmp_path / f"{name}.db", **REST)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("o.txt", CTFFIND + CTFFIND, "got 2 rows"),
        ("o.txt", "1 2 3\n", "at least 5 numbers"),
        ("o.txt", "1 2 high 4 5\n", "at least 5 numbers"),
        ("o.star", "data_\n\nloop_\n_a #1\n_b #2\n1 2\n3\n", "line 7: expected 2 values"),
        ("o.star", RELION.partition("data_micrographs")[0], "rlnMicrographName and rlnDefocusU"),
        ("o.star", "{", "cannot be read as a STAR file"),
        ("o.ctf", "", "ends in .yaml (Leopard-EM), .star (RELION), .db (cisTEM) or .txt (CTFFIND)"),
        ("o.txt", "1 9000 8000 1 0\n", "voltage_kv: missing; give it (--voltage)"),
    ],
)
def test_files_that_are_something_else(tmp_path, name, content, problem):
    (tmp_path / name).write_text(content)
    with pytest.raises(InvalidInputError) as refused:
        read_optics(tmp_path / name, **REST)
    assert problem in str(refused.value)


def test_everything_that_is_missing_is_named_with_its_option():
    with pytest.raises(InvalidInputError) as refused:
        read_optics(voltage_kv=300)
    assert [p.split(":")[1].strip() for p in refused.value.problems] == [
        "spherical_aberration_mm",
        "amplitude_contrast",
        "pixel_size_angstrom",
        "defocus_u_angstrom",
        "defocus_v_angstrom",
        "astigmatism_angle_degrees",
        "micrograph",
        "template",
        "template_box_px",
    ]


@pytest.fixture
def finished_store(tmp_path):
    search = simulate(tmp_path / "sim", Simulation((128, 160), 2, 5, 0))
    merge(search, tmp_path / "M.zarr")
    return tmp_path / "M.zarr"


MICROSCOPE = ["--voltage", "300", "--cs", "2.7", "--amplitude-contrast", "0.07"]
DEFOCUS = ["--defocus-u", "5000", "--defocus-v", "4900", "--astigmatism-angle", "20"]


def test_tables_need_no_configuration_and_ask_for_no_box(finished_store, tmp_path, capsys):
    command = ["export", str(finished_store), "--output", str(tmp_path / "p.star"), "--overwrite"]
    given = [*MICROSCOPE, *DEFOCUS, "--micrograph", "M1.mrc"]
    assert run([*command, "--to", "relion", *given]) == 0
    (optics, particles), _ = parse_star((tmp_path / "p.star").read_text())
    group = dict(zip(optics.columns, optics.rows[0], strict=True))
    about = find_peaks(finished_store).about
    assert float(group["rlnImageSize"]) == about.template_box_px
    assert float(group["rlnImagePixelSize"]) == about.pixel_size_angstrom
    assert float(group["rlnVoltage"]) == 300
    assert len(particles.rows) == len(find_peaks(finished_store))
    capsys.readouterr()
    assert run([*command, "--to", "cistem", *given]) == 2
    assert "template: missing; give it (--template)" in capsys.readouterr().err
    assert run([*command, "--to", "cistem", *given, "--template", "60S.mrc"]) == 0
    (tmp_path / "ctf.star").write_text(RELION)
    table = ["--optics", str(tmp_path / "ctf.star"), "--micrograph", "A_01"]
    assert run(["peaks", str(finished_store), "--output", str(tmp_path / "q.star"), *table]) == 0
    assert "MotionCorr/job002/movies/A_01.mrc" in (tmp_path / "q.star").read_text()


@pytest.mark.parametrize(("command", "name"), [("peaks", "p.csv"), ("report", "r.html")])
def test_existing_files_are_replaced_on_request_only(finished_store, tmp_path, command, name):
    words, path = [command, str(finished_store), "--output", str(tmp_path / name)], tmp_path / name
    path.write_text("precious")
    assert run(words) == 2
    assert path.read_text() == "precious"
    assert run([*words, "--overwrite"]) == 0
    assert path.read_text() != "precious"
