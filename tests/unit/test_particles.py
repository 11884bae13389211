"""Particle tables: what makes one, and that CSV keeps every bit."""

import csv
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ocelot_em import Optics
from ocelot_em.errors import InvalidInputError, StorageError
from ocelot_em.particles.column_table import as_text
from ocelot_em.particles.table import (
    ALL_COLUMNS,
    COLUMNS,
    NEG_LOG_P,
    ParticleTable,
    PickInfo,
)
from ocelot_em.store.whole_file import write_file

ABOUT = PickInfo(
    store="OUT.zarr",
    method="gaussian",
    cutoff=6.4726,
    min_distance_px=5.0,
    false_positives=1.0,
    pixel_size_angstrom=2.5,
    shape=(432, 480),
    valid_shape=(377, 425),
)


def make_columns(n, *, neg_log_p=False):
    """Columns of different numbers, none of them simple."""
    rng = np.random.default_rng(n)
    names = [name for name in COLUMNS if neg_log_p or name != NEG_LOG_P]
    return {name: (1000 * rng.normal(size=n)).astype(COLUMNS[name].dtype) for name in names}


def assert_same(table, other):
    assert list(table.columns) == list(other.columns)
    for name, values in table.columns.items():
        assert values.dtype == other.columns[name].dtype == COLUMNS[name].dtype
        np.testing.assert_array_equal(values, other.columns[name], err_msg=name)


@st.composite
def tables(draw):
    n = draw(st.integers(0, 6))
    names = list(COLUMNS)[: draw(st.sampled_from([len(COLUMNS) - 1, len(COLUMNS)]))]
    return ParticleTable({name: draw(hnp.arrays(COLUMNS[name].dtype, n)) for name in names})


def problems_of(columns):
    with pytest.raises(InvalidInputError) as refusal:
        ParticleTable(columns)
    return refusal.value.problems


def problems_of_csv(path, text):
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InvalidInputError) as refusal:
        ParticleTable.read_csv(path)
    assert all(problem.startswith(f"{path}: ") for problem in refusal.value.problems)
    return [problem.removeprefix(f"{path}: ") for problem in refusal.value.problems]


# What makes a table


def test_columns_come_in_their_order_whatever_order_they_are_given_in():
    columns = make_columns(3, neg_log_p=True)
    table = ParticleTable(dict(reversed(columns.items())), ABOUT)
    assert list(table.columns) == list(COLUMNS)
    assert len(table) == 3
    assert all(table.columns[name] is values for name, values in columns.items())
    assert list(ParticleTable(make_columns(3)).columns) == list(COLUMNS)[:-1]


def test_everything_that_is_wrong_with_columns_is_named():
    columns = make_columns(3)
    del columns["phi"]
    columns |= {
        "mip": columns["mip"].astype(np.float64),
        "psi": columns["psi"][:2],
        "theta": columns["theta"].reshape(3, 1),
        "pos_x": [1, 2, 3],
        "pos_y": columns["pos_y"].astype(">i4"),
        "z": columns["mip"],
    }
    found = "\n".join(problems_of(columns))
    for problem in (
        "phi: missing",
        "'z': expected one of micrograph, rank,",
        "mip: expected dtype float32, got float64",
        "psi: expected 3 values, as in most columns, got 2",
        "theta: expected one dimension, got shape (3, 1)",
        "pos_x: expected an array, got list",
        "pos_y: expected dtype int32, got >i4",
    ):
        assert problem in found
    assert len(problems_of(columns)) == 7


def test_no_columns_are_no_table():
    assert problems_of({}) == tuple(f"{name}: missing" for name in list(COLUMNS)[:-1])


@pytest.mark.parametrize("neg_log_p", [False, True])
def test_an_empty_table_has_all_columns(neg_log_p):
    table = ParticleTable.empty(ABOUT, neg_log_p=neg_log_p)
    assert len(table) == 0
    assert (NEG_LOG_P in table.columns) == neg_log_p
    assert table.about is ABOUT


def test_the_template_box_follows_from_the_shapes_if_it_can():
    assert ABOUT.template_box_px == 56
    assert replace(ABOUT, shape=(377, 425)).template_box_px is None
    assert replace(ABOUT, shape=(377, 480)).template_box_px is None


# CSV


@given(tables())
def test_csv_keeps_every_number(tmp_path, table):
    table.to_csv(tmp_path / "T.csv")
    again = ParticleTable.read_csv(tmp_path / "T.csv")
    assert_same(table, again)
    assert again.about is None


@given(hnp.arrays(np.float32, st.integers(0, 30)))
def test_float32_has_as_many_digits_as_it_needs(values):
    texts = as_text(values)
    np.testing.assert_array_equal(np.array([float(t) for t in texts], np.float32), values)
    for value, text in zip(values, texts, strict=True):
        digits = len(text.partition("e")[0].replace(".", "").strip("-0"))
        if np.isfinite(value) and digits > 1:
            assert np.float32(f"{value:.{digits - 2}e}") != value


def test_csv_is_what_pandas_reads_and_writes(tmp_path):
    table = ParticleTable(make_columns(4, neg_log_p=True))
    table.to_csv(tmp_path / "T.csv")
    frame = pd.read_csv(tmp_path / "T.csv")
    assert list(frame.columns) == list(COLUMNS)
    for name, values in table.columns.items():
        np.testing.assert_array_equal(frame[name].to_numpy(values.dtype), values)
    table.to_pandas().to_csv(tmp_path / "P.csv", index=False)
    assert_same(table, ParticleTable.read_csv(tmp_path / "P.csv"))


def test_csv_that_a_spreadsheet_saved_is_read(tmp_path):
    """With a byte order mark, carriage returns, quotation marks and another order of columns."""
    table = ParticleTable(make_columns(2))
    with (tmp_path / "T.csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        writer.writerow(reversed(table.columns))
        writer.writerows(zip(*map(as_text, reversed(table.columns.values())), strict=True))
    assert_same(table, ParticleTable.read_csv(tmp_path / "T.csv"))


def test_lines_that_are_no_particles_are_named(tmp_path):
    path = tmp_path / "T.csv"
    ParticleTable(make_columns(3)).to_csv(path)
    header, *rows = path.read_text().splitlines()
    cells = [row.split(",") for row in rows]
    cells[1][0] = "2147483648"
    cells[0][1] = "1.5"
    cells[1][2] = "1e39"
    cells[2][3] = "high"
    cells[0][3] = ""
    cells[1][11] = "9223372036854775808"
    text = "\n".join([header, *(",".join(row) for row in cells)])
    assert problems_of_csv(path, text) == [
        "pos_y: line 3: expected int32, got '2147483648'",
        "pos_x: line 2: expected int32, got '1.5'",
        "mip: line 3: expected float32, got '1e39'",
        "scaled_mip: line 2: expected float32, got ''; and 1 more such line",
        "total_correlations: line 3: expected int64, got '9223372036854775808'",
    ]
    assert problems_of_csv(path, "\n".join([header, rows[0], rows[1] + ",1", "1", ""])) == [
        "line 3: expected 15 values, got 16; and 1 more such line"
    ]
    names = header.replace("psi", "phi").replace("mip,", " mip,", 1)
    assert problems_of_csv(path, names) == [
        "mip: missing",
        "psi: missing",
        f"' mip': expected one of {', '.join(ALL_COLUMNS)}",
        "phi: expected once, got 2 columns",
    ]


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xff\xfe\x00", b'"pos_y', b"pos_y\x00"])
def test_what_is_no_csv_is_refused(tmp_path, content):
    (tmp_path / "T.csv").write_bytes(content)
    with pytest.raises(InvalidInputError, match=r"T\.csv: "):
        ParticleTable.read_csv(tmp_path / "T.csv")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InvalidInputError, match="expected a CSV file, got nothing there"):
        ParticleTable.read_csv(tmp_path / "T.csv")


# Files


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    write_file(tmp_path / "a", b"before")
    monkeypatch.setattr(
        "pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "full"))
    )
    with pytest.raises(StorageError, match="a: cannot be written: full"):
        write_file(tmp_path / "a", b"after")
    assert (tmp_path / "a").read_bytes() == b"before"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    monkeypatch.undo()
    write_file(tmp_path / "a", b"after")
    assert (tmp_path / "a").read_bytes() == b"after"


def test_places_that_cannot_be_written_are_named(tmp_path):
    table = ParticleTable.empty()
    (tmp_path / "FILE").touch()
    with pytest.raises(StorageError, match=r"FILE.T\.csv: cannot be written"):
        table.to_csv(tmp_path / "FILE" / "T.csv")
    with pytest.raises(StorageError, match="cannot be written: Is a directory"):
        table.to_csv(tmp_path)


def test_a_device_is_written_to_and_not_replaced():
    write_file("/dev/null", b"data")


# In a notebook


class Page(HTMLParser):
    """Tags and text of a page; fails on tags that are not closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self._open = [], [], []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_a_notebook_shows_what_it_is_and_the_first_rows():
    columns = make_columns(12)
    columns["total_correlations"][0] = 20_500_000
    page = Page(ParticleTable(columns, replace(ABOUT, store="<script>x.zarr"))._repr_html_())
    assert "script" not in page.tags
    assert page.texts[0] == (
        "12 particles of <script>x.zarr, method gaussian, cutoff 6.4726, false positives 1, "
        "minimum distance 5 px"
    )
    assert page.tags.count("tr") == 11
    assert "20500000" in page.texts
    assert page.texts[-1] == "2 more"


def test_a_notebook_shows_tables_without_particles_and_without_record():
    assert Page(ParticleTable.empty()._repr_html_()).texts[0] == "0 particles"
    page = Page(ParticleTable(make_columns(1))._repr_html_())
    assert page.texts[0] == "1 particle"
    assert "more" not in page.texts[-1]


def test_in_a_terminal_it_is_a_line_above_the_rows():
    given_cutoff = replace(ABOUT, method="cutoff", cutoff=8.0, false_positives=None)
    head, *rows = repr(ParticleTable(make_columns(1), given_cutoff)).splitlines()
    assert "pos_y" in rows[0]
    assert head == ("<1 particle of OUT.zarr, method cutoff, cutoff 8.0000, minimum distance 5 px>")


def test_pandas_has_the_same_columns():
    table = ParticleTable(make_columns(2, neg_log_p=True), ABOUT)
    frame = table.to_pandas()
    assert list(frame.columns) == list(COLUMNS)
    assert [str(dtype) for dtype in frame.dtypes] == [c.dtype for c in COLUMNS.values()]
    assert len(ParticleTable.empty().to_pandas()) == 0


def test_a_table_is_used_like_a_frame():
    table = ParticleTable(make_columns(7), ABOUT)
    assert table["mip"] is table.columns["mip"]
    assert "mip" in table
    assert "no" not in table
    frame = table[["pos_x", "mip"]]
    assert list(frame.columns) == ["pos_x", "mip"]
    rows = list(table)
    assert rows[2] == table[2] == {name: v[2].item() for name, v in table.columns.items()}
    assert rows[-1] == table[np.int64(-1)]
    chosen = table["mip"] > np.median(table["mip"])
    for part, places in (
        (table.head(2), [0, 1]),
        (table[::-3], [6, 3, 0]),
        (table[chosen], np.flatnonzero(chosen)),
        (table[frame["mip"] > np.median(table["mip"])], np.flatnonzero(chosen)),
        (table[[4, 1]], [4, 1]),
        (table[[]], []),
    ):
        assert part.about is ABOUT
        assert len(part) == len(places)
        for name, values in table.columns.items():
            assert part[name].tolist() == values[places].tolist()
    with pytest.raises(InvalidInputError, match=r"'mipp': expected one of .*did you mean mip\?"):
        table["mipp"]
    with pytest.raises(InvalidInputError, match="'no'"):
        table[["mip", "no"]]
    with pytest.raises(IndexError):
        table[7]


def test_a_table_writes_itself_in_every_format(tmp_path):
    table = ParticleTable(make_columns(3), ABOUT)
    again = ParticleTable.read_parquet(table.to_parquet(tmp_path / "t.parquet"))
    assert (again.about, list(again)) == (table.about, list(table))
    microscope, defocus = (300.0, 2.7, 0.07, 2.5), (5200.0, 4900.0, 25.0, 0.0)
    optics = Optics(*microscope, *defocus, "micrograph.mrc", "60S.mrc", 56)
    relion = table.to_star(tmp_path / "r.star", optics=optics).read_text()
    cistem = table.to_star(tmp_path / "c.star", optics=optics, program="cistem").read_text()
    assert "_rlnCoordinateX" in relion
    assert "_cisTEMAnglePsi" in cistem
    with pytest.raises(InvalidInputError, match="relion or cistem, got 'cryosparc'"):
        table.to_star(tmp_path / "x.star", optics=optics, program="cryosparc")
