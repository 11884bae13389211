"""Origins of the exposures of a montage, from tables and from SerialEM's own files."""

import contextlib
import csv
import io
import locale
import os
import pickle
import sys

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ocelot_em.errors import InvalidInputError, MissingDependencyError
from ocelot_em.io.origin import Origin
from ocelot_em.io.origins import read_origins

TABLE = """\
exposure,y,x,acquired,defocus
00,0,0,3,-1.1
01,-12.5,3686.25,2,-1.2
10,3480,-7,1,-1.0
"""
TABLE_ORIGINS = {
    "00": Origin(0.0, 0.0, 3),
    "01": Origin(-12.5, 3686.25, 2),
    "10": Origin(3480.0, -7.0, 1),
}

STAR = """\
# version 30001

data_general

_rlnTomoTiltSeriesPixelSize 1.06

data_exposures

loop_
_exposure #1
_y #2
_x #3
_acquired #4
_note #5
00 0 0 3 a
01 -12.5 3686.25 2 b

10 3480 -7 1 "c d"
"""

RELION = """\
data_optics

loop_
_rlnOpticsGroup #1
_rlnImagePixelSize #2
1 1.06

data_micrographs

loop_
_rlnMicrographName #1
_rlnCoordinateX #2
_rlnCoordinateY #3
_rlnOpticsGroup #4
MotionCorr/job002/00.mrc 0.0 0.0 1
MotionCorr/job002/01.mrc 3686.25 -12.5 1
MotionCorr/job002/tilt_-10.0.mrc 7 3480 1
"""

# A montage of 2 x 2 pieces of a K3, as SerialEM 4.0 writes it, with the frames of every piece.
MONTAGE = r"""PixelSpacing = 4.603
Voltage = 300
Version = SerialEM Version 4.0.0 64-bit,  built Jan 31 2022  10:11:12
ImageFile = montage.mrc
ImageSize = 5760 4092
Montage = 1
DataMode = 1

[T = SerialEM: Krios G3i                                      17-Feb-20  14:29:58]

[T =     Tilt axis angle = 84.8, binning = 1  spot = 8  camera = 2
    ]

[ZValue = 0]
PieceCoordinates = 0 0 0
MinMaxMean = 0 1014 79.9226
TiltAngle = 0.00427435
StagePosition = 265.414 118.065
StageZ = 49.8675
Magnification = 19500
Intensity = 0.120144
ExposureDose = 1.66243
DoseRate = 2.86627
PixelSpacing = 4.603
SpotSize = 8
Defocus = -1.09678
ImageShift = -2.51756 0.229891
RotationAngle = 175.28
ExposureTime = 1.00134
Binning = 1
CameraIndex = 2
DividedBy2 = 0
MagIndex = 24
LowDoseConSet = 9
SubFramePath = X:\grid 1\frames\m_00000_Feb17_14.31.03.tif
NumSubFrames = 40
DateTime = 17-Feb-20  14:31:04
AlignedPieceCoords = -7 -10 0
XedgeDxy = -70.1522 50.0197
YedgeDxy = 14.8435 -32.5203

[ZValue = 1]
PieceCoordinates = 0 3683 0
TiltAngle = 0.00427435
StagePosition = 265.414 118.065
SubFramePath = X:\grid 1\frames\m_00001_Feb17_14.31.15.tif
DateTime = 17-Feb-20  14:31:16
AlignedPieceCoords = 8 3650 0
XedgeDxy = -60.1 44.2

[ZValue = 2]
PieceCoordinates = 4608 3683 0
TiltAngle = 0.00427435
StagePosition = 265.414 118.065
SubFramePath = X:\grid 1\frames\m_00002_Feb17_14.31.27.tif
DateTime = 17-Feb-20  14:31:28
AlignedPieceCoords = 4540 3699 0

[ZValue = 3]
PieceCoordinates = 4608 0 0
TiltAngle = 0.00427435
StagePosition = 265.414 118.065
SubFramePath = X:\grid 1\frames\m_00003_Feb17_14.31.39.tif
DateTime = 17-Feb-20  14:31:40
AlignedPieceCoords = 4531 41 0
YedgeDxy = 9.2 -28.7

[MontSection = 0]
TiltAngle = 0.00427435
StagePosition = 265.414 118.065
DateTime = 17-Feb-20  14:31:40
FullMontSize = 10368 7775
MoveStage = 0
"""
FRAMES = ["m_00000_Feb17_14.31.03", "m_00001_Feb17_14.31.15", "m_00002_Feb17_14.31.27"]
FRAMES.append("m_00003_Feb17_14.31.39")

# What importers of single TIFF images make of it; the last piece was taken first.
IMAGES = """DataMode = 1
ImageSize = 1024 1024
ImageSeries = 1
Montage = 1

[Image = tile_00.tif]
PieceCoordinates = 0 0 0

[Image = D:\\tiles\\tile_01.tif]
PieceCoordinates = 900 0 0
"""


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def problems_of(path, **options):
    with pytest.raises(InvalidInputError) as caught:
        read_origins(path, **options)
    for problem in caught.value.problems:
        assert str(path) in problem
    return [problem.removeprefix(f"{path}: ") for problem in caught.value.problems]


def without(key, text=MONTAGE, sections=None):
    """The file without a key, in all or the given sections (by Z value)."""
    kept, z = [], None
    for line in text.splitlines(keepends=True):
        if line.startswith("[ZValue"):
            z = int(line.split()[2].rstrip("]"))
        if not line.startswith(f"{key} =") or (sections is not None and z not in sections):
            kept.append(line)
    return "".join(kept)


def line_of(start, text=MONTAGE):
    return next(i for i, line in enumerate(text.splitlines(), 1) if line.startswith(start))


# CSV


def test_csv(write):
    origins = read_origins(write("o.csv", TABLE))
    assert origins == TABLE_ORIGINS
    assert list(origins) == ["00", "01", "10"]
    assert type(origins["00"].y) is float


@pytest.mark.parametrize("path_type", [str, os.fspath, lambda path: path])
@pytest.mark.parametrize("name", ["o.csv", "o.CSV"])
def test_csv_by_any_path(write, path_type, name):
    assert read_origins(path_type(write(name, TABLE))) == TABLE_ORIGINS


@pytest.mark.parametrize(
    "content",
    [
        "\ufeff" + TABLE,
        TABLE.replace("\n", "\r\n"),
        TABLE.replace("\n", "\n\n"),
        TABLE.rstrip("\n"),
        TABLE.replace("exposure,y,x", " id , origin_y , origin_x "),
        TABLE.replace("y,x", "y0,x0"),
        TABLE.replace("00,0", "' 00 ', 0 ").replace("'", '"'),
    ],
    ids=["BOM", "CRLF", "blank lines", "no last newline", "names", "more names", "quotes"],
)
def test_csv_as_other_programs_write_it(write, content):
    assert read_origins(write("o.csv", content)) == TABLE_ORIGINS


def test_csv_does_not_have_to_tell_the_order_of_acquisition(write):
    assert read_origins(write("o.csv", "x,y,id\n2,1,a\n")) == {"a": Origin(1.0, 2.0, None)}


@pytest.mark.parametrize(
    ("header", "expected", "got"),
    [
        ("name,y,x", "'exposure', 'id'", "'name', 'y', 'x'"),
        ("id,y,why", "'x', 'origin_x', 'x0'", "'id', 'y', 'why'"),
        ("id,y,x,y0", "'y', 'origin_y', 'y0'", "'y', 'y0'"),
        ("id,y,x,x", "'x', 'origin_x', 'x0'", "'x', 'x'"),
        ("id,exposure,y,x", "'exposure', 'id'", "'id', 'exposure'"),
        ("id,y,x,acquired,acquired", "'acquired'", "'acquired', 'acquired'"),
        ("id;y;x", "'exposure', 'id'", "'id;y;x'"),
        ("ID,y,x", "'exposure', 'id'", "'ID', 'y', 'x'"),
    ],
)
def test_missing_and_ambiguous_columns(write, header, expected, got):
    problems = problems_of(write("o.csv", f"{header}\n"))
    assert f"line 1: expected one column of {expected}, got {got}" in problems


def test_csv_problems_are_reported_all_at_once(write):
    content = (
        "id,y,x,acquired\n"
        "a,1,2,0\n"
        "a,1,2,1\n"
        "b,nan,inf,2\n"
        "c,one,1_0,3\n"
        "d,1,2\n"
        ",1,2,4\n"
        "e,1e10,-2147483649,5\n"
        "f,2147483648,-2147483648,5.0\n"
        "g,,٣,\n"
        "h,1,2,3,4\n"
    )
    number = "expected a number of pixels from -2**31 to 2**31"
    assert problems_of(write("o.csv", content)) == [
        "line 6: expected 4 values, as the header has, got 3",
        "line 11: expected 4 values, as the header has, got 5",
        "line 3: expected every id once, got 'a' as on line 2",
        f"line 4: y: {number}, got 'nan'",
        f"line 4: x: {number}, got 'inf'",
        f"line 5: y: {number}, got 'one'",
        f"line 5: x: {number}, got '1_0'",
        "line 7: expected the exposure's id, got nothing",
        f"line 8: y: {number}, got '1e10'",
        f"line 8: x: {number}, got '-2147483649'",
        "line 9: acquired: expected an integer, got '5.0'",
        f"line 10: y: {number}, got ''",
        f"line 10: x: {number}, got '٣'",
        "line 10: acquired: expected an integer, got ''",
    ]


def test_the_report_of_problems_ends_somewhere(write):
    problems = problems_of(write("o.csv", "id,y,x\n" + "a,b,0\n" * 1000))
    assert len(problems) == 101
    assert problems[-1] == "and 1899 more problems"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "expected a header line"),
        ("\n\n", "expected a header line"),
        ("id,y,x\n", "expected a row for each exposure, got none"),
        ('id,y,x\n"a,1,2\n', "cannot be read as CSV"),
        ('id,y,x\n"a"b,1,2\n', "line 2: cannot be read as CSV"),
        (TABLE.encode("utf-16"), "binary data"),
        ("id,y,x\nä,1,2\n".encode("latin-1"), "expected text in UTF-8"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "binary data"),
    ],
)
def test_no_csv_file(write, content, problem):
    (found,) = problems_of(write("o.csv", content))
    assert problem in found


CELLS = st.text(
    st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=8
).filter(lambda text: text.strip() == text)
COORDINATES = st.floats(-(2.0**31), 2.0**31)


@given(
    st.dictionaries(
        CELLS,
        st.builds(Origin, COORDINATES, COORDINATES, st.integers(-(10**17), 10**17)),
        min_size=1,
    ),
    st.permutations(["exposure", "y", "x", "acquired", "note"]),
)
@example({"\ufffd": Origin(1.0, 2.0, 3)}, ["exposure", "y", "x", "acquired", "note"])
@example({'a"b,\n\rc': Origin(-0.0, 5e-324, 0)}, ["note", "x", "acquired", "y", "exposure"])
def test_csv_round_trip(tmp_path_factory, origins, columns):
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(columns)
    for name, origin in origins.items():
        cells = {"exposure": name, "y": origin.y, "x": origin.x, "acquired": origin.acquired}
        writer.writerow([cells.get(column, "") for column in columns])
    path = tmp_path_factory.getbasetemp() / "round_trip.csv"
    path.write_bytes(text.getvalue().encode())
    found = read_origins(path)
    assert list(found.items()) == list(origins.items())


# STAR


def test_star_ids_stay_text(write):
    origins = read_origins(write("o.star", STAR))
    assert origins == TABLE_ORIGINS
    assert list(origins) == ["00", "01", "10"]


STARFILE = """\
# Created by the starfile Python package (version 0.5.13) at 18:17:06 on 28/11/2026


data_a

_n\t\t\t3


data_b

loop_
_id #1
_y #2
_x #3
00\t1.500000\t0
1e3\t2.000000\t-1
"b c"\t3.000000\t2
Ä/50%.mrc\t4.000000\t3


"""


def test_star_that_starfile_wrote(write):
    assert read_origins(write("o.star", STARFILE)) == {
        "00": Origin(1.5, 0.0, None),
        "1e3": Origin(2.0, -1.0, None),
        "b c": Origin(3.0, 2.0, None),
        "Ä/50%.mrc": Origin(4.0, 3.0, None),
    }


def test_star_of_relion(write):
    assert read_origins(write("o.star", RELION)) == {
        "00": Origin(0.0, 0.0, None),
        "01": Origin(-12.5, 3686.25, None),
        "tilt_-10.0": Origin(3480.0, 7.0, None),
    }


def test_star_with_one_exposure_without_a_loop(write):
    path = write("o.star", "data_\n\n_id 007\n_y 1\n_x 2\n_acquired 5\n")
    assert read_origins(path) == {"007": Origin(1.0, 2.0, 5)}


@pytest.mark.parametrize(
    "content",
    [
        "\ufeff" + STAR,
        STAR.replace("\n", "\r\n"),
        STAR.rstrip(),
        STAR.replace("_note", "_note\n_note")
        .replace("3 a", "3 a a")
        .replace("2 b", "2 b <NA>")
        .replace('"c d"', '"c d" ""'),
    ],
    ids=["BOM", "CRLF", "no last newline", "other columns"],
)
def test_star_as_other_programs_write_it(write, content):
    assert read_origins(write("o.star", content)) == TABLE_ORIGINS


def test_star_problems_are_reported_all_at_once(write):
    content = (
        "data_\nloop_\n_id\n_y\n_x\n_acquired\n_note\n"
        "a 1 2 0 nan\n"
        "a 1 2 1 n\n"
        "# a comment\n"
        "b nan inf 2 n\n"
        "c one 3 3.0 n\n"
        "d 1 2 3\n"
        "\n"
        "<NA> 1 99999999999 4 <NA>\n"
    )
    number = "expected a number of pixels from -2**31 to 2**31"
    assert problems_of(write("o.star", content)) == [
        "line 13: expected 5 values, got 4",
        "line 9: expected every id once, got 'a' as on line 8",
        f"line 11: y: {number}, got ''",
        f"line 11: x: {number}, got 'inf'",
        f"line 12: y: {number}, got 'one'",
        "line 12: acquired: expected an integer, got '3.0'",
        "line 15: expected the exposure's id, got nothing",
        f"line 15: x: {number}, got '99999999999'",
    ]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "got no block"),
        ("hello\n", "cannot be read as a STAR file: line 1: expected block header"),
        ("data_a\n", "got no block"),
        ("data_a\nloop_\n_id\n_y\n_x\n", "expected a row for each exposure, got none"),
        ("data_a\nloop_\n_id\n_y\na 1\n", "block 'a' with 'id', 'y'"),
        (STAR + STAR, "got block 'exposures' with 'exposure', 'y', 'x', 'acquired', 'note', block"),
        (
            STAR + STAR.replace("data_exposures", "data_more").replace("data_general", "data_g"),
            "got block 'exposures' with 'exposure', 'y', 'x', 'acquired', 'note', block 'more'",
        ),
        (STAR.replace("10 3480", "data_10 3480"), "a STAR file: line 18: parse error"),
        (
            STAR.replace("10 3480", "data_10 3480") + "data_b\nloop_\n_n\n1\n",
            "expected blocks that start with 'data_'",
        ),
        (STAR.replace("_note", "_origin_y"), "got 'y', 'origin_y'"),
        (STAR.replace("_note", "_rlnMicrographName"), "got 'exposure', 'rlnMicrographName'"),
        (STAR.replace("3 a", "3 a b"), "line 15: expected 5 values, got 6"),
        (STAR.replace("3 a", "3"), "line 15: expected 5 values, got 4"),
        (STAR.replace('"c d"', '"c\nd"'), 'line 18: unterminated "string"'),
        (STAR.replace("loop_\n", "loop_ "), "every row of the loop on a line of its own"),
        (STAR.replace("_note", "_x"), "block 'exposures': expected one column of 'x', "),
        (STAR.encode("utf-16"), "binary data"),
    ],
)
def test_no_star_file_with_origins(write, content, problem):
    (found,) = problems_of(write("o.star", content))
    assert problem in found


def test_rows_of_star_files_that_are_folded(write):
    assert problems_of(write("o.star", STAR.replace("3 a", "3\na"))) == [
        "line 15: expected 5 values, got 4",
        "line 16: expected 5 values, got 1",
    ]


@pytest.mark.parametrize("last", ["7", "text", "nan"])
def test_short_rows_of_star_files(write, last):
    content = f"data_\nloop_\n_id\n_y\n_x\n_n\na 1 2 {last}\nb 3 4\nc 5 6 {last}\n"
    assert problems_of(write("o.star", content)) == ["line 8: expected 4 values, got 3"]


def test_a_mended_star_file_is_read_anew(write):
    path = write("o.star", STAR.replace("3 a", "3 a b"))
    problems_of(path)
    write("o.star", STAR)
    assert read_origins(path) == TABLE_ORIGINS


def test_star_needs_gemmi(write, monkeypatch):
    path = write("o.star", STAR)
    monkeypatch.setitem(sys.modules, "gemmi", None)
    with pytest.raises(MissingDependencyError, match=r"gemmi: pip install 'ocelot-em\[tables"):
        read_origins(path)
    assert read_origins(write("o.csv", TABLE)) == TABLE_ORIGINS


# SerialEM


def test_aligned_coordinates_of_a_montage(write):
    origins = read_origins(write("montage.mrc.mdoc", MONTAGE))
    assert origins == {
        FRAMES[0]: Origin(0.0, 0.0, 0),
        FRAMES[1]: Origin(3660.0, 15.0, 1),
        FRAMES[2]: Origin(3709.0, 4547.0, 2),
        FRAMES[3]: Origin(51.0, 4538.0, 3),
    }
    assert list(origins) == FRAMES


def test_nominal_coordinates_of_a_montage(write):
    path = write("montage.mrc.mdoc", MONTAGE)
    positions = [(o.y, o.x) for o in read_origins(path, coordinates="piece").values()]
    assert positions == [(0, 0), (3683, 0), (3683, 4608), (0, 4608)]


def test_rows_of_flipped_images_count_from_the_top(write):
    origins = read_origins(write("montage.mdoc", MONTAGE), flip_y=True)
    assert [(o.y, o.x) for o in origins.values()] == [(3709, 0), (49, 15), (0, 4547), (3658, 4538)]


@pytest.mark.parametrize("flip_y", [False, True])
def test_flipped_or_not_the_same_image_is_put_together(write, flip_y):
    """Pieces cut from a picture, stored either way round, give the picture back."""
    upwards = np.random.default_rng(0).normal(size=(30, 40))  # rows as IMOD counts them
    corners = {"0": (-3, 5), "1": (11, 4), "2": (17, -2)}  # y, x in the file
    height, width = 10, 12
    text = "".join(
        f"[ZValue = {z}]\nPieceCoordinates = {x} {y} 0\n" for z, (y, x) in corners.items()
    )
    found = read_origins(write("m.mdoc", text), flip_y=flip_y)
    canvas = np.zeros((30, 31))
    expected = np.zeros((30, 31))
    for z, (y, x) in corners.items():
        piece = upwards[y + 3 : y + 3 + height, x + 2 : x + 2 + width]
        expected[y + 3 : y + 3 + height, x + 2 : x + 2 + width] = piece
        stored = piece[::-1] if flip_y else piece
        top, left = int(found[z].y), int(found[z].x)
        canvas[top : top + height, left : left + width] = stored
    assert (canvas == (expected[::-1] if flip_y else expected)).all()


def test_nominal_coordinates_are_taken_unless_all_are_aligned(write):
    path = write("m.mdoc", without("AlignedPieceCoords", sections={2}))
    origins = read_origins(path)
    assert origins == read_origins(path, coordinates="piece")
    assert problems_of(path, coordinates="aligned") == [
        f"line {line_of('[ZValue = 2]')}: [ZValue = 2]: expected AlignedPieceCoords, got none"
    ]


def test_coordinates_of_very_sloppy_alignment_are_better_than_none(write):
    aligned = read_origins(write("a.mdoc", MONTAGE))
    path = write("m.mdoc", MONTAGE.replace("AlignedPieceCoords =", "AlignedPieceCoordsVS ="))
    assert read_origins(path) == read_origins(path, coordinates="aligned-vs") == aligned
    assert read_origins(path, coordinates="piece") != aligned
    assert len(problems_of(path, coordinates="aligned")) == 4


@pytest.mark.parametrize("coordinates", [None, "piece"])
def test_sections_without_coordinates(write, coordinates):
    text = without("PieceCoordinates", without("AlignedPieceCoords"), {1, 3})
    assert problems_of(write("m.mdoc", text), coordinates=coordinates) == [
        f"line {line_of(f'[ZValue = {z}]', text)}: [ZValue = {z}]: expected PieceCoordinates, "
        "got none"
        for z in (1, 3)
    ]


def test_ids_are_z_values_unless_all_sections_have_frames(write):
    origins = read_origins(write("m.mdoc", without("SubFramePath", sections={3})))
    assert list(origins) == ["0", "1", "2", "3"]
    empty = MONTAGE.replace("X:\\grid 1\\frames\\m_00003_Feb17_14.31.39.tif", "")
    assert list(read_origins(write("m.mdoc", empty))) == ["0", "1", "2", "3"]


def test_ids_and_order_of_single_images(write):
    assert read_origins(write("tiles.mdoc", IMAGES)) == {
        "tile_00": Origin(0.0, 0.0, 0),
        "tile_01": Origin(0.0, 900.0, 1),
    }


@pytest.mark.parametrize(
    ("frames", "name"),
    [
        (r"\\192.168.10.81\data\TS_001_-10.0.eer", "TS_001_-10.0"),
        ("/mnt/frames/a b.tiff", "a b"),
        (r"D:\frames\tilt_-10.0", "tilt_-10.0"),
        ("D:\\frames\\one\\", "one"),
        ("one.tif", "one"),
        ("D:/mixed\\one.v2.mrc", "one.v2"),
        ("D:\\Präparat\\one.mrc", "one"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "cp1252"])
def test_ids_of_frames(write, frames, name, encoding):
    text = f"[ZValue = 0]\nPieceCoordinates = 0 0 0\nSubFramePath = {frames}\n"
    assert list(read_origins(write("m.mdoc", text.encode(encoding)))) == [name]


def test_an_id_whose_encoding_is_not_known(write):
    text = "[ZValue = 0]\nPieceCoordinates = 0 0 0\nSubFramePath = D:\\ä.mrc\n"
    assert list(read_origins(write("m.mdoc", text))) == ["ä"]
    (problem,) = problems_of(write("m.mdoc", text.encode("cp1252")))
    assert problem.startswith("line 3: SubFramePath: expected a name in UTF-8")


def dated(*dates):
    return "".join(
        f"[ZValue = {z}]\nPieceCoordinates = {z} 0 0\nDateTime = {date}\n"
        for z, date in zip((7, 5, 9), dates, strict=True)
    )


@pytest.mark.parametrize(
    ("dates", "acquired"),
    [
        (("17-Feb-20  14:31:06", "17-Feb-20  14:31:05", "17-Feb-20  14:31:04"), [2, 1, 0]),
        (("01-Mar-2020  00:00:00", "29-Feb-2020  23:59:59", "31-Dec-2019  1:00:00"), [2, 1, 0]),
        (("2020-Feb-17  14:31:04", "2020-Feb-16 14:31:04", "2019-Dec-17  14:31:04"), [2, 1, 0]),
        (("17-Feb-20  14:31:04", "17-Feb-2020  14:31:04", "2020-Feb-17  14:31:03"), [1, 2, 0]),
        (("17-Feb-20  14:31:04",) * 3, [0, 1, 2]),
        (("17-FEB-20  14:31:04", "17-jan-20  14:31:04", "17-mAr-20  14:31:04"), [1, 0, 2]),
        # One that is none, and the Z values count.
        (("17-Feb-20  14:31:06", "17-Okt-20  14:31:05", "17-Feb-20  14:31:04"), [7, 5, 9]),
        (("17-Feb-20  14:31:06", "30-Feb-20  14:31:05", "17-Feb-20  14:31:04"), [7, 5, 9]),
        (("17-Feb-20  14:31:06", "17-Feb-20  24:31:05", "17-Feb-20  14:31:04"), [7, 5, 9]),
        (("17-Feb-20  14:31:06", "17-Feb-020  14:31:05", "17-Feb-20  14:31:04"), [7, 5, 9]),
        (("17-Feb-20  14:31:06", "", "17-Feb-20  14:31:04"), [7, 5, 9]),
    ],
)
def test_order_of_acquisition(write, dates, acquired):
    origins = read_origins(write("m.mdoc", dated(*dates)))
    assert [origin.acquired for origin in origins.values()] == acquired


@pytest.mark.parametrize("section", ["ZValue = b", "Image = 7"])
def test_order_of_acquisition_is_that_of_the_sections_where_nothing_else_is_known(write, section):
    text = f"[{section}]\nPieceCoordinates = 0 0 0\n[ZValue = 5]\nPieceCoordinates = 1 0 0\n"
    assert [o.acquired for o in read_origins(write("m.mdoc", text)).values()] == [0, 1]


def test_months_are_english_whatever_the_locale(write, monkeypatch):
    for name in ("de_DE.UTF-8", "fr_FR.UTF-8"):
        try:
            locale.setlocale(locale.LC_TIME, name)
        except locale.Error:
            continue
    try:
        path = write("m.mdoc", dated(*(f"17-{m}-20  14:31:06" for m in ("Dec", "May", "Oct"))))
        assert [o.acquired for o in read_origins(path).values()] == [2, 0, 1]
    finally:
        locale.setlocale(locale.LC_TIME, "C")


@pytest.mark.parametrize(
    "text",
    [
        MONTAGE.replace("\n", "\r\n"),
        "\ufeff" + MONTAGE,
        MONTAGE.replace(" = ", "="),
        MONTAGE.replace(" = ", "   =  "),
        "# PieceCoordinates = 1 1 1\nPieceCoordinates = 5 5 5\n" + MONTAGE,
        MONTAGE + "\n[FrameSet = 0]\nPieceCoordinates = a\n",
        MONTAGE.replace("TiltAngle", "a line of no meaning\n#AlignedPieceCoords = x\n]\nTiltAngle"),
        MONTAGE + "\n[T = added [later] = twice]\nPieceCoordinates = 9 9 9\n",
        MONTAGE.rstrip("\n"),
    ],
)
def test_what_does_not_matter_in_a_file_of_serialem(write, text):
    assert read_origins(write("m.mdoc", text)) == read_origins(write("n.mdoc", MONTAGE))


def test_problems_of_a_montage_are_reported_all_at_once(write):
    text = (
        "[ZValue = 0]\n"
        "AlignedPieceCoords = 0 0 0\n"
        "SubFramePath = D:\\a.tif\n"
        "[ZValue = 1]\n"
        "AlignedPieceCoords = 0 zero 0\n"
        "SubFramePath = E:\\a.mrc\n"
        "[ZValue = 1]\n"
        "AlignedPieceCoords = 0 0\n"
        "AlignedPieceCoords = 0 0 0\n"
        "SubFramePath = E:\\b.mrc\n"
        "[ZValue = 4\n"
        "AlignedPieceCoords = 1 1 1\n"
        "[ZValue = 5]\n"
        "AlignedPieceCoords = 0 nan 9999999999\n"
        "SubFramePath = E:\\c.mrc\n"
    )
    expected = "AlignedPieceCoords: expected x, y and z, numbers from -2**31 to 2**31, got"
    assert problems_of(write("m.mdoc", text)) == [
        "line 7: expected every section once, got [ZValue = 1] as on line 4",
        "line 9: expected AlignedPieceCoords once in [ZValue = 1], got it as on line 8",
        "line 11: expected [key = value], got '[ZValue = 4'",
        "line 6: SubFramePath: expected every id once, got 'a' as on line 3",
        f"line 5: {expected} '0 zero 0'",
        f"line 8: {expected} '0 0'",
        f"line 14: {expected} '0 nan 9999999999'",
    ]


def test_ids_of_sections_have_to_be_different(write):
    text = IMAGES.replace("D:\\tiles\\tile_01.tif", "tile_00.mrc").replace("[Image = ", "[Image=")
    (problem,) = problems_of(write("m.mdoc", text))
    assert problem == (
        "line 9: [Image = tile_00.mrc]: expected every id once, got 'tile_00' as on line 6"
    )
    (problem,) = problems_of(write("m.mdoc", "[ZValue = ]\nPieceCoordinates = 0 0 0\n"))
    assert "expected the exposure's id, got nothing" in problem


def test_one_montage_a_file(write):
    text = MONTAGE.replace("4540 3699 0", "4540 3699 1")
    (problem,) = problems_of(write("m.mdoc", text))
    lines = line_of("AlignedPieceCoords = -7"), line_of("AlignedPieceCoords = 4540 3699")
    assert f"got z = 0 (line {lines[0]}), 1 (line {lines[1]}); keep the sections" in problem


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "expected sections [ZValue = ...] or [Image = ...], got none"),
        ("DataMode = 1\n[T = title]\n[FrameSet = 0]\n", "expected sections"),
        (MONTAGE.encode("utf-16"), "binary data"),
        (bytes(range(1, 256)), "expected sections"),
        ("[ZValue 0]\nPieceCoordinates = 0 0 0\n", "line 1: expected [key = value]"),
    ],
)
def test_no_montage(write, content, problem):
    (found,) = problems_of(write("m.mdoc", content))
    assert problem in found


@given(st.text(st.characters(codec="utf-8"), max_size=200) | st.binary(max_size=200))
@example("[" * 100_000)
@example("[ZValue = a" + " " * 100_000 + "b")
@example("[ " + "=" * 100_000 + "]")
@example("PieceCoordinates =" + " " * 100_000 + "0" * 100_000)
@example("SubFramePath = " + ".a" * 100_000 + "\\" * 100_000 + ".")
@example("DateTime = 1-Jan-20" + " " * 100_000)
@example("1" * 10_000 + " " + '"' * 1_001)
def test_noise_is_refused_in_an_orderly_way(tmp_path_factory, noise):
    content = noise.encode() if isinstance(noise, str) else noise
    for name, start in (
        ("noise.csv", TABLE),
        ("noise.star", STAR),
        ("noise.mdoc", "[ZValue = 0]\nPieceCoordinates = 0 0 0\n"),
    ):
        path = tmp_path_factory.getbasetemp() / name
        for text in (content, start.encode() + content):
            path.write_bytes(text)
            with contextlib.suppress(InvalidInputError):
                read_origins(path)


# All kinds


@pytest.mark.parametrize("name", ["o.txt", "o.idoc", "o", "csv", "o.csv.gz"])
def test_other_kinds_of_files_are_refused(write, name):
    (problem,) = problems_of(write(name, TABLE))
    assert all(suffix in problem for suffix in (".csv", ".star", ".mdoc"))


@pytest.mark.parametrize("name", ["o.csv", "o.star", "o.mdoc"])
def test_no_file(tmp_path, name):
    assert problems_of(tmp_path / name) == [
        "expected a file with origins of exposures, got no file"
    ]
    (tmp_path / name).mkdir()
    assert problems_of(tmp_path / name) == [
        "expected a file with origins of exposures, got no file"
    ]


@pytest.mark.parametrize("name", ["o.csv", "o.star", "o.mdoc"])
def test_large_files_are_refused_unread(tmp_path, name, monkeypatch):
    path = tmp_path / name
    with path.open("wb") as file:
        file.truncate(256_000_001)  # takes no room on the disk
    monkeypatch.setattr("pathlib.Path.read_bytes", lambda _: pytest.fail("was read"))
    (problem,) = problems_of(path)
    assert "at most 256,000,000 bytes, got 256,000,001" in problem


@pytest.mark.parametrize("name", ["o.csv", "o.star", "o.mdoc"])
def test_files_that_cannot_be_read(write, name, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    path = write(name, TABLE)
    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    assert problems_of(path) == ["cannot be read: Permission denied"]


@pytest.mark.parametrize("options", [{"flip_y": True}, {"coordinates": "piece"}])
@pytest.mark.parametrize(("name", "content"), [("o.csv", TABLE), ("o.star", STAR)])
def test_tables_are_taken_as_they_are(write, name, content, options):
    (problem,) = problems_of(write(name, content), **options)
    assert "taken as they are" in problem


def test_other_coordinates_are_refused(write):
    with pytest.raises(InvalidInputError, match="expected one of 'aligned', 'aligned-vs', 'piece'"):
        read_origins(write("m.mdoc", MONTAGE), coordinates="AlignedPieceCoordsVS")


def test_origins_can_be_sent_to_workers():
    origin = Origin(-1.5, 2.0, None)
    assert pickle.loads(pickle.dumps(origin)) == origin
