"""Broken and hostile files: each is read or refused by name, in little memory, and never run."""

import io
import os
import pickle
import struct
import tracemalloc
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import h5py
import mrcfile
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.fuzz.files import (
    KINDS,
    SHAPE,
    TABLE_ARRAYS,
    finished_maps,
    npz_bytes,
    particles,
    pt_bytes,
    tensors,
    with_member,
)

from builders import explicit_maps
from ocelot_em import import_results, read_search_space_file
from ocelot_em.errors import InvalidInputError, OcelotError
from ocelot_em.io.finished import import_finished
from ocelot_em.io.hdf5 import GROUP
from ocelot_em.io.import_options import ImportOptions
from ocelot_em.io.optics import Optics
from ocelot_em.io.origin import Origin
from ocelot_em.io.origins import read_origins
from ocelot_em.io.parquet import read_parquet, write_parquet
from ocelot_em.io.yaml_file import read_yaml
from ocelot_em.model.maps import COUNT, MIP
from ocelot_em.particles.table import ParticleTable
from work import assert_linear, calls_of, counted_calls

MEMORY_NBYTES = 50_000_000
"""No file here has more than a few kilobytes."""

MAX_CALLS = 1_000_000
"""Of functions, which take a few tenths of a second."""


@contextmanager
def bounded() -> Iterator[None]:
    """Fail if what is done takes much memory or work."""
    tracemalloc.start()
    try:
        with counted_calls() as calls:
            yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < MEMORY_NBYTES
    assert calls.n < MAX_CALLS


def refusal_of(read, *arguments) -> str:
    """Problems of a file, refused in little memory; the first argument's name is in each."""
    with pytest.raises(InvalidInputError) as refused, bounded():
        read(*arguments)
    place = Path(arguments[0][0] if isinstance(arguments[0], list) else arguments[0])
    assert all(place.stem in problem for problem in refused.value.problems)
    return str(refused.value)


# Anything


EXTREMES = [
    b"\0",
    b"\xff",
    b"\xff\xff\xff\x7f",
    b"\xff\xff\xff\xff",
    b"\0\0\0\x80",
    b"\0\0\0\0",
    b"\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"-1",
    b"nan",
    b"1e999",
    b"9" * 30,
    b"9" * 5000,
    b"\n",
    b'"',
    b"'",
    b"[",
    b"{",
    b"&a [*a]",
    "\N{ARABIC-INDIC DIGIT THREE}".encode(),
]


@st.composite
def mutations(draw, seed):
    """A file after a few changes: cut off, overwritten with extremes, repeated, left out."""
    data = bytearray(seed)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        end = min(at + draw(st.sampled_from([0, 1, 4, 8, 40, 1000])), len(data))
        change = draw(st.sampled_from(["cut", "overwrite", "insert", "repeat", "remove", "flip"]))
        extreme = draw(st.sampled_from(EXTREMES))
        if change == "cut":
            del data[at:]
        elif change == "overwrite":
            data[at : at + len(extreme)] = extreme
        elif change == "insert":
            data[at:at] = extreme
        elif change == "repeat":
            data[at:at] = data[at:end]
        elif change == "remove":
            del data[at:end]
        elif at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
    return bytes(data)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """Seeds and readers of all kinds of files."""
    return {name: kind(tmp_path_factory.mktemp(name)) for name, kind in KINDS.items()}


@pytest.mark.parametrize("name", KINDS)
def test_valid_files_are_read(kinds, name):
    seeds, read = kinds[name]
    for seed in seeds if name != "yaml" else seeds[:1]:  # the other has what is refused
        read(seed)


@pytest.mark.parametrize("name", KINDS)
@given(st.data())
def test_whatever_is_in_a_file_it_is_read_or_refused(kinds, name, data):
    seeds, read = kinds[name]
    content = data.draw(st.sampled_from(seeds).flatmap(mutations))
    with bounded(), suppress(OcelotError):
        read(content)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("F.npz", lambda path: import_results([path], path.with_name("R"))),
        ("F.npz", read_search_space_file),
        ("F.h5", lambda path: import_finished(path, path.with_name("R"))),
        ("mip.mrc", lambda path: import_finished(path.parent, path.with_name("R"), ABOUT)),
        ("F.csv", read_origins),
        ("F.star", read_origins),
        ("F.mdoc", read_origins),
        ("F.yaml", lambda path: read_yaml(path, "a mapping")),
        ("F.csv", ParticleTable.read_csv),
        ("F.parquet", read_parquet),
    ],
)
@pytest.mark.parametrize("kind", ["pipe", "endless", "folder", "link to itself"])
def test_what_is_no_file_is_not_opened(tmp_path, name, read, kind):
    path = tmp_path / name
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "endless":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(path)
    with pytest.raises(InvalidInputError, match=r"F\.|mip"), bounded():
        read(path)


# Nothing is run


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, place):
        self.place = str(place)

    def __reduce__(self):
        return os.mkdir, (self.place,)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("key", [MIP, COUNT, "config"])
def test_pickles_are_not_run(tmp_path, protocol, key):
    trap, maps = Trap(tmp_path / "sprung"), explicit_maps(SHAPE)
    array = np.empty((), object)
    array[()] = trap
    header = npz_bytes({key: array})
    with zipfile.ZipFile(io.BytesIO(header)) as archive:
        member = archive.read(f"{key}.npy")
    pickled = pickle.dumps(array, protocol)
    start = member.index(b"\n") + 1
    npz = with_member(npz_bytes(maps | {key: array}), f"{key}.npy", member[:start] + pickled)
    (tmp_path / "a.npz").write_bytes(npz)
    problem = "total_projections: missing" if key == "config" else "never unpickled"
    assert problem in refusal_of(import_results, [tmp_path / "a.npz"], tmp_path / "R")
    with pytest.raises(InvalidInputError):
        read_search_space_file(tmp_path / "a.npz")
    content = tensors(maps) | {COUNT: 9, key: trap}
    pt = with_member(
        pt_bytes(tensors(maps)), "archive/data.pkl", pickle.dumps(content[key], protocol)
    )
    for name, data in (("a.pt", pt), ("b.pt", pickle.dumps({key: trap}, protocol))):
        (tmp_path / name).write_bytes(data)
        refusal_of(import_results, [tmp_path / name], tmp_path / "R")
        with pytest.raises(InvalidInputError):
            read_search_space_file(tmp_path / name)
    assert not (tmp_path / "sprung").exists()


def test_yaml_makes_no_objects(tmp_path):
    path = tmp_path / "F.yaml"
    for tag in ("object/apply:os.mkdir", "object/new:os.mkdir", "name:os.mkdir", "module:os"):
        path.write_text(f"a: !!python/{tag} [{tmp_path / 'sprung'}]\n")
        assert "expected no tags" in refusal_of(read_yaml, path, "a mapping")
    assert not (tmp_path / "sprung").exists()


# Archives of NumPy


def npy_bytes(shape: str, descr: str = "<f4", data: bytes = b"") -> bytes:
    header = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}"
    header += " " * (-(len(header) + 11) % 64) + "\n"
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(header)) + header.encode() + data


@pytest.mark.parametrize(
    ("member", "problem"),
    [
        (npy_bytes("(1, 2147483647)"), "expected at most 134,217,728 columns"),
        (npy_bytes("(2147483647, 200000)"), "expected at most 131,072 columns"),
        (npy_bytes("(1099511627776, 1099511627776)"), "expected 1 to 2"),
        (npy_bytes("(-5, -6)"), "expected a shape of numbers from 0"),
        (npy_bytes("(True, 2.5)"), "mip"),
        (npy_bytes(f"(0x{'f' * 5000}, 1)"), "expected a shape of numbers from 0"),
        (npy_bytes("(5, 6)", "<f8000000000"), "mip"),
        (npy_bytes("(5, 6)", "|V800000000"), "expected dtype float32"),
        (npy_bytes("(5, 6)"), "mip: the file ends early"),
        (npy_bytes("(5, 6)").replace(b"'shape'", b"'shap\xff'"), "mip"),
        (npy_bytes("(5, 6)").replace(b"}", b"("), "mip"),
        (npy_bytes("("), "mip"),
        (b"\x93NUMPY\x02\0\xff\xff\xff\xff", "mip"),
        (b"\x93NUMPY\x01\0\xff\xff", "mip"),
        (b"\x93NUMPY\x09\0\x10\0", "mip"),
    ],
)
def test_headers_of_maps_that_lie(tmp_path, member, problem):
    file = tmp_path / "a.npz"
    archive = npz_bytes(explicit_maps(SHAPE) | {COUNT: np.int64(9)})
    file.write_bytes(with_member(archive, f"{MIP}.npy", member))
    assert problem in refusal_of(import_results, [file], tmp_path / "R")
    assert not (tmp_path / "R").exists()


@pytest.mark.parametrize(
    "count",
    [
        -1,
        1e30,
        np.nan,
        np.inf,
        2**63,
        2**80,
        True,
        "5",
        [1, 2],
        [],
        None,
        1 + 1j,
        np.datetime64("2026-01-01"),
    ],
)
def test_counts_that_are_none(tmp_path, count):
    maps = explicit_maps(SHAPE)
    (tmp_path / "a.npz").write_bytes(npz_bytes(maps | {COUNT: np.asarray(count)}))
    assert COUNT in refusal_of(import_results, [tmp_path / "a.npz"], tmp_path / "R")
    if not isinstance(count, np.datetime64 | complex):  # torch does not pickle these itself
        (tmp_path / "a.pt").write_bytes(pt_bytes(tensors(maps) | {COUNT: count}))
        assert COUNT in refusal_of(import_results, [tmp_path / "a.pt"], tmp_path / "R")


def test_a_count_that_unpacks_to_gigabytes(tmp_path):
    for shape, descr in (("(250000000,)", "<i4"), ("()", "|S250000000"), ("()", "<U250000000")):
        buffer = io.BytesIO(npz_bytes(explicit_maps(SHAPE)))
        with zipfile.ZipFile(buffer, "a", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(f"{COUNT}.npy", npy_bytes(shape, descr, bytes(2**26)))
        (tmp_path / "a.npz").write_bytes(buffer.getvalue())
        problem = refusal_of(import_results, [tmp_path / "a.npz"], tmp_path / "R")
        assert f"{COUNT}: expected one integer" in problem


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_ways_of_compression_without_a_limit(tmp_path, method):
    member = npy_bytes("(5, 6)", data=bytes(1_000_000))
    with zipfile.ZipFile(tmp_path / "a.npz", "w", method) as archive:
        archive.writestr(f"{MIP}.npy", member)
    problem = refusal_of(import_results, [tmp_path / "a.npz"], tmp_path / "R")
    assert "mip.npy: is compressed in a way that NumPy does not use" in problem


def test_names_of_members(tmp_path):
    data = npy_bytes("(5, 6)", data=bytes(120))
    folder = tmp_path / "some" / "where"
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "a.npz", "w") as archive:
        for name in ("../mip.npy", "/mip.npy", "a/../../mip.npy", "mip.npy/", "mip"):
            archive.writestr(name, data)
    before = sorted(tmp_path.rglob("*"))
    problem = refusal_of(import_results, [folder / "a.npz"], folder / "R")
    assert "mip: missing" in problem
    assert sorted(tmp_path.rglob("*")) == before
    assert not Path("/mip.npy").exists()
    with zipfile.ZipFile(folder / "a.npz", "w") as archive:
        archive.writestr("mip.npy", data)
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("mip.npy", data)
    problem = refusal_of(import_results, [folder / "a.npz"], folder / "R")
    assert "mip.npy: expected once, got it 2 times" in problem


def test_a_table_that_is_larger_than_memory(tmp_path):
    for shape in ("(1000000000000, 3)", "(0, 3)", "(7, 3, 1)", "(-7, 3)"):
        archive = with_member(npz_bytes(TABLE_ARRAYS), "euler_angles.npy", npy_bytes(shape))
        (tmp_path / "s.npz").write_bytes(archive)
        assert "euler_angles" in refusal_of(read_search_space_file, tmp_path / "s.npz")


# Archives of torch


def key_and(value: bytes) -> bytes:
    """A pickle of a dictionary in which ``mip`` is what these instructions make."""
    return b"\x80\x02}X\x03\x00\x00\x00mip" + value + b"s."


NESTED = b")" + b"".join(b"q%c\x68%c\x86" % (i, i) for i in range(60))
"""A tuple of 2**60 elements in all, which would take forever to hash."""

STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + b"K\x1etQ%s\x89ccollections\n"
TENSOR += b"OrderedDict\n)RtR"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (key_and(b"cbuiltins\nbytearray\nJ\0\0\0\x70\x85R"), "would run 'builtins.bytearray'"),
        (key_and(b"ctorch\nFloatTensor\nJ\0\0\0\x70\x85R"), "would run 'torch.FloatTensor'"),
        (key_and(b"ctorch\nFloatStorage\nJ\0\0\0\x70\x85R"), "would run 'torch.FloatStorage'"),
        (b"\x80\x02}" + NESTED + b"K\x01s.", "mip: missing"),
        (key_and(b"ccollections\nOrderedDict\n(" + NESTED + b"K\x01\x86\x85tR"), "would run"),
        (key_and(b"Nr\xff\xff\xff\x7f"), "mip: missing"),
        (key_and(TENSOR % b"K\0J\0\0\0\x70J\0\0\0\x70\x86K\0K\0\x86"), "expected a value for"),
        (key_and(TENSOR % b"K\x01K\x05K\x06\x86K\x06K\x01\x86"), "expected a value for each"),
        (key_and(TENSOR % b"K\0K\x05K\x06\x86J\xff\xff\xff\xffK\x01\x86"), "is damaged"),
        (key_and(TENSOR % (b"\x8a\xff" + b"\x7f" * 255 + b"))")), "expected a size or a place"),
        (key_and(TENSOR % (b"K\0" + 2 * (b"(" + b"K\x01" * 90 + b"t"))), "a tensor with 90 axes"),
        (key_and(b"\x8a\xff" + b"\x7f" * 255), "mip"),
        (b"\x80\x02].", "expected a dictionary of tensors, got list"),
        (b"\x80\x02}u.", "data.pkl: is damaged"),
        (b"\x80\x02}", "data.pkl"),
        (b"\x80\x02(((((((((", "data.pkl"),
        (b"\x80\x02}(t0.", "data.pkl"),
        (b"", "data.pkl"),
        (b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f}.", "data.pkl"),
        (b"\x80\x02]" + b"q\0]q\1a" * 200_000 + b".", "expected at most 1,048,576 bytes"),
    ],
)
def test_pickles_of_torch_that_lie(tmp_path, content, problem):
    archive = pt_bytes({MIP: torch.zeros(SHAPE), COUNT: 9})
    (tmp_path / "a.pt").write_bytes(with_member(archive, "archive/data.pkl", content))
    assert problem in refusal_of(import_results, [tmp_path / "a.pt"], tmp_path / "R")


def test_values_of_tensors_are_all_there_and_as_they_were_written(tmp_path):
    maps = explicit_maps(SHAPE)
    archive, file = pt_bytes(tensors(maps) | {COUNT: 9}), tmp_path / "a.pt"
    for values, problem in ((b"", "expected 120 bytes, got 0"), (bytes(124), "got 124")):
        file.write_bytes(with_member(archive, "archive/data/0", values))
        assert problem in refusal_of(import_results, [file], tmp_path / "R")
    at = archive.index(maps[MIP].tobytes())
    file.write_bytes(archive[:at] + b"\x7f" + archive[at + 1 :])
    assert "archive/data/0: Bad CRC-32" in refusal_of(import_results, [file], tmp_path / "R")
    buffer = io.BytesIO(archive)
    with zipfile.ZipFile(buffer, "a") as opened:
        opened.writestr("other/data.pkl", b"")
    file.write_bytes(buffer.getvalue())
    assert "expected one data.pkl, got 2" in refusal_of(import_results, [file], tmp_path / "R")


# MRC

ABOUT = ImportOptions(total_projections=(1000,))


@pytest.fixture
def mrc_set(tmp_path):
    for name, values in finished_maps().items():
        mrcfile.new(tmp_path / f"{name}.mrc", values).close()
    return tmp_path


@pytest.mark.parametrize(
    ("at", "field"),
    [
        (92, struct.pack("<i", 2**31 - 1)),  # extended header
        (92, struct.pack("<i", -(2**31))),
        (92, struct.pack("<i", -120)),
        (92, struct.pack("<i", 64)),
        (0, struct.pack("<3i", 2**31 - 1, 2**31 - 1, 1)),  # shape
        (0, struct.pack("<3i", 2**31 - 1, 2**31 - 1, 2**31 - 1)),
        (0, struct.pack("<3i", -6, -5, 1)),
        (0, struct.pack("<3i", 0, 5, 1)),
        (0, struct.pack("<3i", 6, 5, 0)),
        (0, struct.pack("<3i", 6, 4, 1)),
        (12, struct.pack("<i", 0)),  # mode
        (12, struct.pack("<i", 4)),
        (12, struct.pack("<i", 101)),
        (12, struct.pack("<i", -1)),
        (88, struct.pack("<i", 401)),  # volumes
        (208, b"PAM "),
        (212, b"\x11\x11\0\0"),  # byte order
        (212, b"\0\0\0\0"),
    ],
)
def test_headers_of_mrc_files_that_lie(mrc_set, at, field):
    path = mrc_set / "mip.mrc"
    data = bytearray(path.read_bytes())
    data[at : at + len(field)] = field
    path.write_bytes(data)
    with pytest.raises(InvalidInputError, match="mip"), bounded():
        import_finished(mrc_set, mrc_set / "R", ABOUT)


def test_mrc_files_that_end_early(mrc_set):
    path = mrc_set / "mip.mrc"
    data = path.read_bytes()
    for n in (0, 3, 1023, 1024, 1025, len(data) - 1):
        path.write_bytes(data[:n])
        with pytest.raises(InvalidInputError, match=r"mip\.mrc: cannot be read"), bounded():
            import_finished(mrc_set, mrc_set / "R", ABOUT)


@pytest.mark.parametrize(
    ("n", "edge"), [(0, 1.0), (-5, 1.0), (6, 0.0), (6, np.nan), (6, np.inf), (6, -1.0), (6, 1e38)]
)
def test_pixel_sizes_that_are_none(mrc_set, n, edge):
    path = mrc_set / "mip.mrc"
    data = bytearray(path.read_bytes())
    struct.pack_into("<i", data, 28, n)
    struct.pack_into("<f", data, 40, edge)
    path.write_bytes(data)
    notes = import_finished(mrc_set, mrc_set / "R", ABOUT).notes
    assert any("pixel size: neither" in note for note in notes) == (edge != 1e38)


# HDF5


@contextmanager
def changed_hdf5(path):
    with h5py.File(path, "w") as file:
        file.attrs["total_projections"] = 1000
        for name, values in finished_maps().items():
            file[f"{GROUP}/{name}"] = values
        yield file


def external_link(file):
    file[f"{GROUP}/mip"] = h5py.ExternalLink("secret.h5", "/tensors/mip")


def soft_link(file):
    file[f"{GROUP}/mip"] = h5py.SoftLink("/tensors/mip")


def group_elsewhere(file):
    del file[GROUP]
    file[GROUP] = h5py.ExternalLink("secret.h5", GROUP)


def virtual(file):
    layout = h5py.VirtualLayout(SHAPE, "f4")
    layout[...] = h5py.VirtualSource("secret.h5", f"{GROUP}/mip", SHAPE)
    file.create_virtual_dataset(f"{GROUP}/mip", layout)


def external_values(file):
    file.create_dataset(f"{GROUP}/mip", SHAPE, "f4", external=[("secret.h5", 0, 120)])


def unwritten(file):
    file.create_dataset(f"{GROUP}/mip", (2**31 - 1,) * 2, "f4", chunks=(1024, 1024))


def partly_written(file):
    file.create_dataset(f"{GROUP}/mip", SHAPE, "f4", chunks=(2, 2))[:3] = 1


def unwritten_in_one(file):
    file.create_dataset(f"{GROUP}/mip", (2**31 - 1,) * 2, "f4")


def one_huge_chunk(file):
    shape = (2**14, 2**14 + 1)
    file.create_dataset(f"{GROUP}/mip", shape, "f4", chunks=shape)


def texts(file):
    file.create_dataset(f"{GROUP}/mip", data=np.full(SHAPE, "a", object), dtype=h5py.string_dtype())


def nothing(file):
    file[f"{GROUP}/mip"] = h5py.Empty("f4")


def one_number(file):
    file[f"{GROUP}/mip"] = np.float32(1)


def references(file):
    file.create_dataset(f"{GROUP}/mip", SHAPE, h5py.ref_dtype)[...] = file.ref


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (external_link, "tensors/mip: expected it in this file, got a link"),
        (soft_link, "tensors/mip: expected it in this file, got a link"),
        (group_elsewhere, "tensors: expected it in this file, got a link"),
        (virtual, "tensors/mip: expected its values in this file, got a reference"),
        (external_values, "tensors/mip: expected its values in this file, got a reference"),
        (unwritten, "tensors/mip: expected 4,398,046,511,104 chunks, got 0"),
        (partly_written, "tensors/mip: expected 9 chunks, got 6"),
        (unwritten_in_one, "tensors/mip: expected 18,446,744,056,529,682,436 bytes, got 0"),
        (one_huge_chunk, "tensors/mip: expected chunks of at most 1,073,741,824 bytes, got"),
        (texts, "mip: expected"),
        (nothing, "tensors/mip: expected a map (y, x), got nothing"),
        (one_number, "mip: expected a map (y, x), got shape ()"),
        (references, "mip: expected"),
    ],
)
def test_maps_of_hdf5_files_that_are_none(tmp_path, change, problem):
    with changed_hdf5(tmp_path / "secret.h5"):
        pass
    with changed_hdf5(tmp_path / "a.h5") as file:
        del file[f"{GROUP}/mip"]
        change(file)
    assert problem in refusal_of(import_finished, tmp_path / "a.h5", tmp_path / "R")
    assert not (tmp_path / "R").exists()


@pytest.mark.parametrize(
    "count",
    [-1, 1e30, np.nan, 2**63, "5", b"5", [1, 2], [], True, h5py.Empty("i4"), ["a", "b"], 0, [0]],
)
@pytest.mark.parametrize("given", [None, 1000])
def test_counts_of_hdf5_files_that_are_none(tmp_path, count, given):
    with changed_hdf5(tmp_path / "a.h5") as file:
        file.attrs["total_projections"] = count
    about = ImportOptions(total_projections=() if given is None else (given,))
    if given and count in (0, [0]):  # the file does not say, then
        import_finished(tmp_path / "a.h5", tmp_path / "R", about)
        return
    problem = refusal_of(import_finished, tmp_path / "a.h5", tmp_path / "R", about)
    assert "total_projections: " in problem


def test_an_hdf5_file_without_a_group(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.attrs["total_projections"] = 1000
        file[GROUP] = np.zeros(3)
    assert "mip: missing" in refusal_of(import_finished, tmp_path / "a.h5", tmp_path / "R")


# Text


STAR = "data_\n\nloop_\n_exposure #1\n_y #2\n_x #3\n"


def test_a_star_file_is_utf8_whatever_it_says(tmp_path):
    path = tmp_path / "o.star"
    for cookie in ("latin-1", "utf-7", "rot13", "no such encoding", "ascii"):
        path.write_text(f"# -*- coding: {cookie} -*-\n{STAR}é+AOk- 1 2\n", encoding="utf-8")
        assert read_origins(path) == {"é+AOk-": Origin(1.0, 2.0, None)}


@pytest.mark.parametrize("cookie", ["", "# coding: nonsense\n", "# coding: ascii\n"])
def test_a_star_file_of_many_lines_takes_work_in_proportion(tmp_path, cookie):
    path = tmp_path / "o.star"

    def work(n):
        rows = "".join(f"e{i} 1 2\n" for i in range(n))
        path.write_text(f"{cookie}{STAR}é 1 2\n{rows}", encoding="utf-8")
        return calls_of(read)

    def read():
        with suppress(InvalidInputError):
            origins.append(len(read_origins(path)))

    origins = []
    assert_linear(work, 1000)
    assert origins == [1001, 1001, 2001, 4001]


def test_a_star_file_of_many_lines_is_read_or_refused(tmp_path):
    rows = "".join(f"e{i} 1 2\n" for i in range(20_000))
    path = tmp_path / "o.star"
    path.write_text(f"{STAR}é 1 2\n{rows}", encoding="utf-8")
    assert len(read_origins(path)) == 20_001
    path.write_bytes(f"{STAR}{rows}".encode() + b"\xff\xfe 1 2\n")
    assert "expected text in UTF-8" in refusal_of(read_origins, path)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("optics_group: {even_zernikes: {2026-01-02: 1}}", "optics_group.even_zernikes"),
        (f"template_volume_path: {'x' * 5000}", "value, got 5000; write"),
        (f"template_volume_path: '{'x' * 5000}'", "cannot be read: File name too long"),
        ("optics_group: 5", "optics_group: expected keys and values"),
        ("optics_group: {voltage: .nan}", "optics_group.voltage"),
        ("optics_group: {voltage: 1" + "0" * 400 + "}", "optics_group.voltage"),
    ],
)
def test_configurations_that_cannot_be(tmp_path, text, problem):
    path = tmp_path / "C.yaml"
    path.write_text(text)
    assert problem in refusal_of(Optics.from_leopard_yaml, path)


# Tables of particles


def test_long_text_in_one_row_of_many(tmp_path, monkeypatch):
    monkeypatch.setattr("ocelot_em.particles.csv_columns._MAX_CHARACTERS", 100)
    table, path = particles(20, montage=True), tmp_path / "P.csv"
    table.to_csv(path)
    assert ParticleTable.read_csv(path).columns["exposure"][19] == "e19"
    path.write_text(path.read_text().replace(",e19,", ",e123456789,"))
    expected = "exposure: expected at most 5 characters in each of 20 rows, got 10"
    assert expected in refusal_of(ParticleTable.read_csv, path)
    columns = dict(table.columns)
    columns["exposure"] = np.array([*columns["exposure"][:-1], "e123456789"])
    write_parquet(ParticleTable(columns, table.about), tmp_path / "P.parquet")
    assert expected in refusal_of(read_parquet, tmp_path / "P.parquet")


def test_a_table_larger_than_any(tmp_path, monkeypatch):
    path = tmp_path / "P.csv"
    with path.open("wb") as file:
        file.truncate(2**30 + 1)  # takes no room on the disk
    assert "expected at most 1,073,741,824 bytes" in refusal_of(ParticleTable.read_csv, path)
    write_parquet(particles(3), tmp_path / "P.parquet")
    monkeypatch.setattr("ocelot_em.io.parquet.MAX_PARTICLES", 2)
    problem = refusal_of(read_parquet, tmp_path / "P.parquet")
    assert "expected at most 2 particles, got 3" in problem


def test_parquet_files_of_other_columns_are_not_read(tmp_path, monkeypatch):
    path = tmp_path / "P.parquet"
    own = {name: pa.array(values) for name, values in particles(2).columns.items()}
    for columns, problem in (
        (own | {"x": pa.array([[1], [2]])}, "'x': expected one of"),
        (own | {MIP: pa.array([b"a", b"b"])}, "mip: expected dtype float32"),
        ({"pos_y": own["pos_y"]}, "pos_x: missing"),
    ):
        pq.write_table(pa.table(columns), path)
        with monkeypatch.context() as patched:
            patched.setattr(
                "pyarrow.parquet.ParquetFile.read", lambda *_, **__: pytest.fail("was read")
            )
            assert problem in refusal_of(read_parquet, path)
    names = [*own, MIP]
    pq.write_table(pa.Table.from_arrays([own[name] for name in names], names), path)
    assert "mip: expected once, got 2 columns" in refusal_of(read_parquet, path)
