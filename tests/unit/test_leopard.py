"""Importing result files: both kinds, both pose forms, and everything that must be refused."""

import collections
import contextlib
import dataclasses
import datetime
import hashlib
import io
import resource
import shutil
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from builders import (
    SPACE,
    explicit_maps,
    flip_byte,
    indexed_maps,
    same_bits,
    snapshot,
    write_explicit_search,
)
from helpers import bytes_read
from ocelot_em import (
    ImportOptions,
    check,
    describe,
    import_results,
    open_partials,
    read_search_space_file,
)
from ocelot_em.errors import InvalidInputError
from ocelot_em.io.result_file import open_result_file
from ocelot_em.model.maps import COUNT, INDEX, MIP, POSES, SQUARED_SUM, SUM
from ocelot_em.model.search_space import TABLES
from ocelot_em.store.local import LocalObjects
from ocelot_em.store.objects import open_objects
from ocelot_em.store.search import read_partials

TABLE_ARRAYS = {name: getattr(SPACE, name) for name in TABLES}


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return open, (self.file, "w")


def save_npz(path, maps, count=9, *, compressed=False, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    content = maps | more | ({} if count is None else {COUNT: np.asarray(count)})
    (np.savez_compressed if compressed else np.savez)(path, **content)
    return path


def save_pt(path, maps, count=9, **more):
    content = {key: torch.from_numpy(values) for key, values in maps.items()} | more
    torch.save(content | ({} if count is None else {COUNT: count}), path)
    return path


def save_search_space(path):
    np.savez(path, **TABLE_ARRAYS)
    return path


def refusal_of(files, output, options=None):
    """Problems of an import that is refused and writes nothing."""
    before = snapshot(output)
    existed = Path(output).exists()
    with pytest.raises(InvalidInputError) as refusal:
        import_results(files, output, options)
    assert snapshot(output) == before
    assert Path(output).exists() == existed
    return refusal.value.problems


def assert_mentions(problems, *parts):
    """Every part is in a problem, and there are no others."""
    for part in parts:
        assert any(part in problem for problem in problems), (part, problems)
    assert len(problems) == len(parts), problems


def assert_imported(output, name, maps):
    stored = open_partials(output).sel(partial=name)
    for key in stored.data_vars:
        assert same_bits(stored[key], maps[key]), key


# What can be imported


SAVERS = {
    "stored npz": lambda path, maps: save_npz(path.with_suffix(".npz"), maps),
    "compressed npz": lambda path, maps: save_npz(path.with_suffix(".npz"), maps, compressed=True),
    "pt": lambda path, maps: save_pt(path.with_suffix(".pt"), maps),
    "pt with a tensor as count": lambda path, maps: save_pt(
        path.with_suffix(".pt"), maps, torch.tensor(9)
    ),
}


@pytest.mark.parametrize("kind", SAVERS)
@pytest.mark.parametrize("indexed", [True, False])
def test_files_of_both_kinds_and_forms(tmp_path, small_chunks, kind, indexed):
    maps = indexed_maps((70, 40)) if indexed else explicit_maps((70, 40))
    file = SAVERS[kind](tmp_path / "gpu0", maps)
    tables = save_search_space(tmp_path / "tables.npz") if indexed else None
    shares = []
    names = import_results(
        [file],
        tmp_path / "R",
        ImportOptions(search_space=tables),
        lambda phase, share: shares.append((phase, share)),
    )
    assert names == ["gpu0"]
    assert_imported(tmp_path / "R", "gpu0", maps)
    assert check(tmp_path / "R") == []
    assert describe(tmp_path / "R").attributes.total_projections == 9
    assert shares == sorted(shares)
    assert shares[-1] == ("convert", 1.0)


def test_real_crops_in_both_forms(tmp_path, crops, tables):
    import_results(crops, tmp_path / "E")
    import_results(crops, tmp_path / "I", ImportOptions(search_space=tables))
    assert POSES[0] in open_partials(tmp_path / "E")
    assert POSES[0] not in open_partials(tmp_path / "I")
    for output in (tmp_path / "E", tmp_path / "I"):
        assert describe(output).attributes.total_projections == 129_600
        for crop in crops:
            assert_imported(output, crop.stem, np.load(crop))


def test_inputs_are_not_changed(tmp_path, crops):
    before = [crop.read_bytes() for crop in crops]
    import_results(crops, tmp_path / "R")
    assert [crop.read_bytes() for crop in crops] == before


def test_tables_that_the_files_carry_are_used(tmp_path):
    files = [
        save_npz(tmp_path / f"gpu{n}.npz", indexed_maps(seed=n), **TABLE_ARRAYS) for n in range(2)
    ]
    import_results(files, tmp_path / "R")
    assert describe(tmp_path / "R").attributes.search_space_digest == SPACE.digest


def test_big_endian_and_strided_arrays_and_what_is_left_out(tmp_path, caplog):
    maps = explicit_maps()
    swapped = {key: values.astype(">f4") for key, values in maps.items()}
    import_results([save_npz(tmp_path / "gpu0.npz", swapped)], tmp_path / "R")
    assert_imported(tmp_path / "R", "gpu0", maps)
    tensors = {key: torch.from_numpy(values.T.copy()).T for key, values in maps.items()}
    table = {"correlation_table": {"threshold": 5.0}}
    torch.save(tensors | table | {COUNT: 9}, tmp_path / "gpu1.pt")
    import_results([tmp_path / "gpu1.pt"], tmp_path / "S")
    assert "gpu1.pt: the correlation_table is left out" in caplog.text
    assert_imported(tmp_path / "S", "gpu1", maps)


def test_the_template_box_and_the_pixel_size_travel_with_the_search(tmp_path):
    file = save_npz(tmp_path / "gpu0.npz", explicit_maps())
    import_results([file], tmp_path / "R", ImportOptions(template_box=3, pixel_size_angstrom=1.25))
    attributes = describe(tmp_path / "R").attributes
    assert (attributes.valid_shape, attributes.pixel_size_angstrom) == ((3, 4), 1.25)


def test_counts_are_given_where_files_have_none(tmp_path):
    files = [save_npz(tmp_path / f"gpu{n}.npz", explicit_maps(seed=n), None) for n in range(2)]
    options = ImportOptions(total_projections=[2**40, 3])
    import_results(files, tmp_path / "R", options)
    assert [count for *_, count in describe(tmp_path / "R").partials] == [2**40, 3]


def test_an_import_into_an_existing_search_appends(tmp_path):
    files = [save_npz(tmp_path / f"gpu{n}.npz", explicit_maps(seed=n)) for n in range(3)]
    import_results([files[2]], tmp_path / "R")
    before = snapshot(tmp_path / "R")
    import_results(files[:2], tmp_path / "R")
    assert open_partials(tmp_path / "R").partial.values.tolist() == ["gpu2", "gpu0", "gpu1"]
    after = snapshot(tmp_path / "R")
    assert {key: after[key] for key in before if key != "zarr.json"} == {
        key: data for key, data in before.items() if key != "zarr.json"
    }


@pytest.mark.parametrize(
    ("files", "names"),
    [
        (["node0/gpu.npz", "node1/gpu.npz"], ["node0-gpu", "node1-gpu"]),
        (["a/x/y/z/gpu.npz", "b/x/y/z/gpu.npz"], ["a-x-y-z-gpu", "b-x-y-z-gpu"]),
        (["gpu.npz", "node1/gpu.npz"], None),
        (["gpu.0.npz", "gpu.1.npz"], ["gpu.0", "gpu.1"]),
    ],
)
def test_equal_file_names_are_told_apart_by_their_folders(tmp_path, monkeypatch, files, names):
    monkeypatch.chdir(tmp_path)
    for number, file in enumerate(files):
        save_npz(Path(file), explicit_maps(seed=number))
    found = import_results(files, "R")
    assert len(set(found)) == len(files)
    assert names is None or found == names


@pytest.mark.parametrize(
    ("stems", "names"),
    [
        (["my gpu.0 [1]"], ["my-gpu.0-1"]),
        (["Größe 5 Å", ".hidden"], ["Grosse-5-A", "hidden"]),
        (["zarr.json", "x" * 200], ["zarr-json", "x" * 110]),
        (["gpu_0.", "-"], ["gpu_0.", "partial"]),
        (["a b", "a-b", "a[b"], ["a-b-806c5cd3", "a-b", "a-b-4ca7fcee"]),
        (["микро", "скоп"], ["partial-9d39311f", "partial-facf45b6"]),
    ],
)
def test_any_file_name_gives_a_name_of_a_partial(tmp_path, stems, names):
    files = [
        save_npz(tmp_path / f"{stem}.npz", explicit_maps(seed=number))
        for number, stem in enumerate(stems)
    ]
    found = import_results(files, tmp_path / "R [1].zarr")
    assert found == names
    assert import_results(files, tmp_path / "R [1].zarr") == []


# What is refused


def test_no_files(tmp_path):
    assert_mentions(refusal_of([], tmp_path / "R"), "expected at least one file")


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.npz", None, "expected a file, got nothing there"),
        ("a.npz", b"", "expected a .npz or .pt dictionary"),
        ("a.npz", b"hello", "expected a .npz or .pt dictionary"),
        ("a.pt", b"", "expected a .npz or .pt dictionary of arrays; save it again with torch 1.6"),
        ("a.pt", b"hello", "expected a .npz or .pt dictionary"),
        ("a.npz", b"PK\x03\x04", "cannot be opened"),
        ("a.pt", b"PK\x03\x04", "cannot be opened"),
    ],
)
def test_what_is_no_result_file(tmp_path, name, content, problem):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    problems = refusal_of([tmp_path / name], tmp_path / "R")
    assert_mentions(problems, problem)
    assert problems[0].startswith(str(tmp_path / name))


def test_a_folder_is_no_result_file(tmp_path):
    assert_mentions(refusal_of([tmp_path], tmp_path / "R"), "expected a file")


@pytest.mark.parametrize("save", [save_npz, save_pt], ids=["npz", "pt"])
def test_a_truncated_file(tmp_path, save):
    file = save(tmp_path / ("a.npz" if save is save_npz else "a.pt"), explicit_maps())
    whole = file.read_bytes()
    for share in (0.1, 0.5, 0.99):
        file.write_bytes(whole[: int(len(whole) * share)])
        assert_mentions(refusal_of([file], tmp_path / "R"), "a.")


@given(st.data(), st.booleans())
def test_a_flipped_byte_of_an_npz_is_refused_or_harmless(tmp_path_factory, data, compressed):
    folder = tmp_path_factory.mktemp("flip")
    maps = explicit_maps((3, 4), pixel_size=False)
    file = save_npz(folder / "a.npz", maps, compressed=compressed)
    position = data.draw(st.integers(0, file.stat().st_size - 1))
    flip_byte(file, position, data.draw(st.integers(1, 255)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile warns of names that are there twice
        with contextlib.suppress(InvalidInputError):
            import_results([file], folder / "R")
            assert_imported(folder / "R", "a", maps)
            assert describe(folder / "R").attributes.total_projections == 9
            return
    assert not (folder / "R").exists()


def test_a_member_that_ends_early_or_late(tmp_path):
    for name, change in {"short": lambda b: b[:-4], "long": lambda b: b + b"\0\0\0\0"}.items():
        file = save_npz(tmp_path / f"{name}.npz", explicit_maps())
        with zipfile.ZipFile(file) as archive:
            members = {member: archive.read(member) for member in archive.namelist()}
        members["mip.npy"] = change(members["mip.npy"])
        with zipfile.ZipFile(file, "w") as archive:
            for member, content in members.items():
                archive.writestr(member, content)
        assert_mentions(refusal_of([file], tmp_path / "R"), "mip: ")


def test_pickled_objects_are_refused_and_never_executed(tmp_path):
    trap, maps = Trap(tmp_path / "sprung"), explicit_maps()
    npz, pt, legacy = tmp_path / "a.npz", tmp_path / "b.pt", tmp_path / "c.pt"
    save_npz(npz, maps | {MIP: np.array([trap], dtype=object)})
    save_pt(pt, maps, mip=trap)
    tensors = {key: torch.from_numpy(values) for key, values in maps.items()}
    torch.save(tensors | {"trap": trap}, legacy, _use_new_zipfile_serialization=False)
    problems = refusal_of([npz, pt, legacy], tmp_path / "R")
    assert_mentions(
        problems,
        f"{npz}: mip.npy: holds Python objects, which are never unpickled",
        f"{pt}: mip: cannot be read without unpickling, which is never done: it would run",
        f"{legacy}: expected a .npz or .pt dictionary of arrays; save it again with torch 1.6",
    )
    assert not (tmp_path / "sprung").exists()


def test_what_is_no_dictionary_of_tensors(tmp_path):
    torch.save([torch.zeros(3)], tmp_path / "a.pt")
    assert_mentions(
        refusal_of([tmp_path / "a.pt"], tmp_path / "R"),
        "expected a dictionary of tensors, got list",
    )


def test_other_keys_of_a_pt_file_are_ignored(tmp_path):
    notes = {"config": {"batch": [1, [2, 3]]}, "extra": torch.zeros(2, dtype=torch.bfloat16)}
    import_results([save_pt(tmp_path / "a.pt", explicit_maps(), **notes)], tmp_path / "R")
    assert check(tmp_path / "R") == []


@dataclasses.dataclass
class Settings:
    """Unpickled by two instructions that maps do not have."""

    place: Path


FOREIGN = {
    "config": {"device": torch.device("cpu"), ("a", 1): [np.float64(2)], "type": torch.float16},
    "settings": Settings(Path("x")),
    "started": datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC),
    "counts": collections.defaultdict(list, {"a": [1]}),
    "tensor": torch.zeros(3, dtype=torch.uint16),
    "none": None,
    "mean": torch.device("cpu"),  # a map of a result, which nobody asks for here
}


def test_foreign_entries_beside_good_maps_are_ignored(tmp_path):
    files = [
        save_pt(tmp_path / "a.pt", explicit_maps(), best_partial=None, pixel_values=None, **FOREIGN)
    ]
    objects = {key: np.array(value, object) for key, value in FOREIGN.items() if key != "tensor"}
    files.append(save_npz(tmp_path / "b.npz", explicit_maps(seed=1), **objects))
    import_results(files, tmp_path / "R")
    assert check(tmp_path / "R") == []
    assert [p.total_projections for _, p in read_partials(open_objects(tmp_path / "R"))] == [9, 9]


@pytest.mark.parametrize("kind", ["i4", "i8", "u2", ">i8"])
def test_counts_of_numpy_are_read_as_numbers(tmp_path, kind):
    """torch pickles them as calls of NumPy's functions."""
    count = np.array([1234], kind)[0]
    import_results([save_pt(tmp_path / "a.pt", explicit_maps(), count)], tmp_path / "R")
    ((_, partial),) = read_partials(open_objects(tmp_path / "R"))
    assert partial.total_projections == 1234


@pytest.mark.parametrize("key", [COUNT, SUM, "best_pixel_size"])
def test_foreign_entries_that_matter_are_named(tmp_path, key):
    file = save_pt(tmp_path / "a.pt", explicit_maps(), **{key: torch.device("cpu")}, count=None)
    (problem,) = (p for p in refusal_of([file], tmp_path / "R") if "unpickling" in p)
    assert problem.startswith(f"{file}: {key}: cannot be read without unpickling")
    assert "it would run 'torch.device'" in problem


@pytest.mark.parametrize(
    "kind",
    ["npz", *(pytest.param(one, marks=pytest.mark.slow) for one in ("pt", "pt of another order"))],
)
def test_descriptors_do_not_grow_with_files_and_maps(tmp_path, kind):
    files = []
    for number in range(40):
        maps = explicit_maps((8, 6), number)
        file = tmp_path / f"gpu{number}.{kind[:3].strip()}"
        if kind == "npz":
            files.append(save_npz(file, maps | TABLE_ARRAYS))
            continue
        if kind == "pt of another order":
            maps = {key: np.asfortranarray(values) for key, values in maps.items()}
        files.append(save_pt(file, maps | TABLE_ARRAYS, torch.tensor(9)))
    import_results(files[:1], tmp_path / "warm-up.zarr")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = len(list(Path("/proc/self/fd").iterdir())) + 30
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
    try:
        import_results(files, tmp_path / "R.zarr")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert len(read_partials(open_objects(tmp_path / "R.zarr"))) == 40


@pytest.mark.parametrize("key", [MIP, SUM, SQUARED_SUM, "best_theta"])
def test_infinite_values_are_refused_by_place(tmp_path, key):
    maps = explicit_maps()
    maps[key][2, 3] = np.inf
    file = save_npz(tmp_path / "a.npz", maps)
    problem = f"{key}: NaN or infinite at 1 pixel, first (2, 3)"
    assert_mentions(refusal_of([file], tmp_path / "R"), problem)


def test_an_infinite_pose_counts_only_where_something_was_searched(tmp_path):
    maps = explicit_maps()
    maps["best_theta"][2, 3] = np.inf
    maps[MIP][2, 3] = -np.inf
    import_results([save_npz(tmp_path / "a.npz", maps)], tmp_path / "R")


def test_a_negative_squared_sum_is_refused_by_place(tmp_path):
    maps = explicit_maps()
    maps[SQUARED_SUM][4, 0] = -0.5
    file = save_npz(tmp_path / "a.npz", maps)
    problem = f"{SQUARED_SUM}: negative at 1 pixel, first (4, 0)"
    assert_mentions(refusal_of([file], tmp_path / "R"), problem)


def test_a_count_of_0_is_refused_if_something_was_searched(tmp_path):
    maps = explicit_maps()
    file = save_npz(tmp_path / "a.npz", maps, 0)
    maps[MIP][:] = -np.inf
    maps[SUM][:] = maps[SQUARED_SUM][:] = 0
    idle = save_npz(tmp_path / "idle.npz", maps, 0)
    problem = f"{file}: {COUNT}: 0, but {MIP} was searched, first at pixel (0, 0)"
    assert_mentions(refusal_of([file, idle], tmp_path / "R"), problem)
    import_results([idle], tmp_path / "R")


def test_a_file_that_is_replaced_while_it_is_checked(tmp_path):
    path = save_npz(tmp_path / "a.npz", explicit_maps())
    file = open_result_file(path)
    assert file.small(COUNT) == 9
    file.close()
    assert file.small(COUNT) == 9
    file.close()
    path.unlink()
    save_npz(path, explicit_maps(), 10)
    with pytest.raises(InvalidInputError, match="was changed while it was imported"):
        file.small(COUNT)
    file.close()


@pytest.mark.parametrize("replaced", ["a", "b"])
def test_a_file_that_is_replaced_before_or_while_it_is_converted(tmp_path, replaced):
    files = [
        save_npz(tmp_path / f"{name}.npz", explicit_maps(), 10 + i) for i, name in enumerate("ab")
    ]

    def replace(phase, _fraction):
        if phase == "convert":
            save_npz(tmp_path / f"{replaced}.npz", explicit_maps(seed=7), 10)

    with pytest.raises(InvalidInputError, match=f"{replaced}.npz: was changed while it was imp"):
        import_results(files, tmp_path / "R", progress=replace)
    complete = [
        name for name, p in read_partials(open_objects(tmp_path / "R")) if p.state == "complete"
    ]
    assert complete == ["a"] * (replaced == "b")


def test_metadata_are_read_as_often_for_each_of_many_files_as_of_few(tmp_path, monkeypatch):
    n_reads, get = [], LocalObjects.get
    monkeypatch.setattr(LocalObjects, "get", lambda *args: n_reads.append(1) or get(*args))
    files = [save_npz(tmp_path / f"g{i}.npz", explicit_maps((4, 5)), 9 + i) for i in range(40)]
    costs = []
    for n in (4, 16, 40):
        n_reads.clear()
        assert len(import_results(files[:n], tmp_path / f"R{n}")) == n
        costs.append(len(n_reads) / n)
    assert costs[0] > costs[1] > costs[2]
    assert describe(tmp_path / "R40").attributes.total_projections == sum(range(9, 49))


@pytest.mark.parametrize(
    ("tensor", "problem"),
    [
        (torch.zeros((5, 6), dtype=torch.bfloat16), f"{SUM}: NumPy has nothing like torch's BFlo"),
        (torch.zeros(5, 6).to_sparse(), "would run 'torch._utils._rebuild_sparse_tensor'"),
        (torch.zeros(1).expand(5, 6), "expected a value for each element of tensors, got 1"),
        ([1.0], f"{SUM}: expected a tensor or a number, got list"),
    ],
)
def test_tensors_that_cannot_be_read(tmp_path, tensor, problem):
    file = save_pt(tmp_path / "a.pt", explicit_maps(), **{SUM: tensor})
    assert_mentions(refusal_of([file], tmp_path / "R"), problem)


def test_a_compressed_archive_of_torch(tmp_path):
    file = save_pt(tmp_path / "a.pt", explicit_maps())
    with zipfile.ZipFile(file) as given:
        members = {member: given.read(member) for member in given.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as written:
        for member, content in members.items():
            written.writestr(member, content)
    problems = refusal_of([file], tmp_path / "R")
    assert_mentions(problems, "data.pkl: is compressed, which torch does not do")


@given(st.data())
def test_tensors_are_read_as_torch_reads_them(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("tensors") / "a.pt"
    names = ["float32", "float64", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"]
    tensor = torch.arange(60).to(getattr(torch, data.draw(st.sampled_from(names))))
    tensor = data.draw(
        st.sampled_from(
            [
                tensor,
                tensor.reshape(5, 12),
                tensor.reshape(5, 12).T,
                tensor.reshape(3, 4, 5)[:, 1],
                tensor[7:50:3],
                tensor[:0],
                tensor[9],
                tensor.reshape(12, 5)[2:4],
            ]
        )
    )
    other = tensor.view(tensor.shape)
    torch.save({MIP: tensor, SUM: other, "x": [(1, None), {}], 3: 2**70, "c": 1 + 0.5}, path)
    file = open_result_file(path)
    for key in (MIP, SUM):
        assert same_bits(file.small(key), tensor.numpy())
        assert file.info()[key] == (tuple(tensor.shape), tensor.numpy().dtype)
    file.close()


def test_column_major_maps(tmp_path):
    maps = explicit_maps()
    file = save_npz(tmp_path / "a.npz", maps | {MIP: np.asfortranarray(maps[MIP])})
    assert_mentions(refusal_of([file], tmp_path / "R"), "mip.npy: expected row-major order")


def change_one(key, value):
    maps = explicit_maps()
    maps[key] = value(maps[key])
    return maps


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="bytes read are counted by Linux")
@pytest.mark.parametrize("kind", SAVERS)
def test_a_file_is_read_twice_for_digest_checks_and_conversion(tmp_path, kind):
    maps = explicit_maps((600, 500)) | {"not a map": np.random.default_rng(0).random(200_000)}
    file = SAVERS[kind](tmp_path / "gpu0", maps)
    import_results([file], tmp_path / "warm-up.zarr")
    before = bytes_read()
    import_results([file], tmp_path / "R.zarr")
    n = (bytes_read() - before) / file.stat().st_size
    assert 1.5 < n < 2.05
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    ((_, partial),) = read_partials(open_objects(tmp_path / "R.zarr"))
    assert partial.provenance.input_sha256 == digest


def in_another_order(maps):
    """The same maps, with mip after the poses that depend on it."""
    return dict(reversed(maps.items()))


@pytest.mark.parametrize("order", [dict, in_another_order])
@pytest.mark.parametrize("kind", ["stored npz", "pt"])
def test_what_is_valid_only_where_nothing_was_searched(tmp_path, small_chunks, kind, order):
    explicit, indexed = explicit_maps((70, 40)), indexed_maps((70, 40))
    idle = np.zeros((70, 40), bool)
    idle[3:60, 5:] = True
    explicit[MIP][idle] = indexed[MIP][idle] = -np.inf
    for key in POSES[:-1]:
        explicit[key][idle] = np.nan
    indexed[INDEX][idle] = -1
    options = ImportOptions(search_space=save_search_space(tmp_path / "space.npz"))
    for name, maps, known in (("e", explicit, None), ("i", indexed, options)):
        file = SAVERS[kind](tmp_path / name, order(maps))
        import_results([file], tmp_path / f"{name}.zarr", known)
        assert_imported(tmp_path / f"{name}.zarr", name, maps)
    explicit["best_psi"][65, 2] = explicit["best_psi"][69, 39] = np.nan
    indexed[INDEX][65, 2] = -1
    for name, maps, known, problem in (
        ("e", explicit, None, "best_psi: NaN at 2 pixels, first (65, 2)"),
        ("i", indexed, options, f"{INDEX}: -1 where {MIP} was searched at 1 pixel, first (65, 2)"),
    ):
        file = SAVERS[kind](tmp_path / name, order(maps))
        assert_mentions(refusal_of([file], tmp_path / "R", known), problem)


def nan_at_corner(values):
    values = values.copy()
    values[0, 0] = np.nan
    return values


@pytest.mark.parametrize(
    ("maps", "problem"),
    [
        (change_one(MIP, nan_at_corner), "mip: NaN at 1 pixel, first (0, 0)"),
        (change_one("best_psi", nan_at_corner), "best_psi: NaN at 1 pixel"),
        (change_one(SUM, lambda v: v[:3]), f"{SUM}: expected shape (5, 6), got (3, 6)"),
        (change_one(SUM, lambda v: v.astype("f2")), f"{SUM}: expected dtype float32 or float64"),
        (change_one(MIP, lambda v: v.astype("i4")), "mip: expected dtype float32, got int32"),
        ({k: v for k, v in explicit_maps().items() if k != SUM}, f"{SUM}: missing"),
        ({k: v for k, v in explicit_maps().items() if k != MIP}, f"{MIP}: missing"),
        (indexed_maps(), "poses are indexed (best_global_index): give the tables"),
    ],
)
def test_bad_maps(tmp_path, maps, problem):
    file = save_npz(tmp_path / "a.npz", maps)
    problems = refusal_of([file], tmp_path / "R")
    assert_mentions(problems, problem)
    assert problems[0].startswith(str(file))


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4), (0, 4), ()])
def test_maps_that_are_no_maps(tmp_path, shape):
    maps = {key: np.zeros(shape, np.float32) for key in explicit_maps()}
    problems = refusal_of([save_npz(tmp_path / "a.npz", maps)], tmp_path / "R")
    assert any(str(shape) in problem for problem in problems)


def test_indices_outside_the_search_space_come_with_a_hint(tmp_path):
    maps = indexed_maps()
    maps[INDEX][2, 3] = SPACE.n_poses
    file = save_npz(tmp_path / "a.npz", maps, **TABLE_ARRAYS)
    problems = refusal_of([file], tmp_path / "R")
    assert_mentions(problems, "expected -1 to 41, got 42 to 42 at 1 pixel, first (2, 3)")
    assert "Leopard-EM 1.2's wrong index in the last batch" in problems[0]


@pytest.mark.parametrize(
    ("stored", "given", "problem"),
    [
        ([None, None], (), "missing (Leopard-EM 1.1 and 1.2 write none); give one count"),
        ([None, None], (1,), "expected one count for each of 2 files, got 1"),
        ([7, 8], (1, 2, 3), "expected one count for each of 2 files, got 3"),
        ([7, 8], (7, 9), "the file has 8, --total-projections has 9"),
        ([None, None], (5, 5.0), "expected an integer, got float64"),
        ([None, None], (5, True), "expected an integer, got a bool"),
        ([None, None], (5, -1), "expected a count from 0"),
        ([7, -1], (), "expected a count from 0"),
        ([7, 1e6], (), "expected an integer, got float64"),
    ],
)
def test_bad_counts(tmp_path, stored, given, problem):
    files = []
    for number, count in enumerate(stored):
        more = {} if count is None else {COUNT: np.asarray(count)}
        file = tmp_path / f"gpu{number}.npz"
        files.append(save_npz(file, explicit_maps(seed=number) | more, None))
    problems = refusal_of(files, tmp_path / "R", ImportOptions(total_projections=given))
    assert any(problem in found for found in problems), problems


def test_one_file_given_twice(tmp_path):
    file = save_npz(tmp_path / "a.npz", explicit_maps())
    (tmp_path / "link.npz").symlink_to(file)
    assert_mentions(refusal_of([file, file], tmp_path / "R"), "a.npz: given 2 times")
    twice = refusal_of([file, tmp_path / "link.npz"], tmp_path / "R")
    assert_mentions(twice, "a.npz: given 2 times")


def test_one_result_under_two_names(tmp_path):
    file = save_npz(tmp_path / "a.npz", explicit_maps())
    shutil.copy(file, tmp_path / "b.npz")
    problems = refusal_of([file, tmp_path / "b.npz"], tmp_path / "R")
    assert_mentions(problems, f"b.npz: has the same content as {file}")


def test_one_result_again_into_its_search(tmp_path):
    file = save_npz(tmp_path / "a.npz", explicit_maps())
    import_results([file], tmp_path / "R")
    before = snapshot(tmp_path / "R")
    assert import_results([file], tmp_path / "R") == []
    assert snapshot(tmp_path / "R") == before
    problems = refusal_of([file], tmp_path / "R", ImportOptions(template_box=3))
    assert_mentions(problems, "valid_shape: ")
    shutil.copy(file, tmp_path / "b.npz")
    problems = refusal_of([tmp_path / "b.npz"], tmp_path / "R")
    assert_mentions(problems, "already there as partial 'a'")


def test_another_result_under_a_name_that_is_there(tmp_path):
    import_results([save_npz(tmp_path / "a.npz", explicit_maps())], tmp_path / "R")
    file = save_npz(tmp_path / "a.npz", explicit_maps(seed=1))
    assert_mentions(refusal_of([file], tmp_path / "R"), "has a partial 'a' already")


def test_files_of_another_search_than_the_one_there(tmp_path):
    run = write_explicit_search(tmp_path / "R")
    file = save_npz(tmp_path / "a.npz", explicit_maps((6, 6)))
    assert_mentions(refusal_of([file], run), f"{run}: shape: ", f"{run}: valid_shape: ")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (ImportOptions(template_box=6), "template box: expected 1 to 5"),
        (ImportOptions(pixel_size_angstrom=-1.0), "pixel size: expected a positive"),
        (ImportOptions(search_space="nowhere.npz"), "nowhere.npz: expected a file"),
    ],
)
def test_bad_options(tmp_path, options, problem):
    file = save_npz(tmp_path / "a.npz", explicit_maps())
    assert_mentions(refusal_of([file], tmp_path / "R", options), problem)


def test_files_with_unequal_or_unusable_tables(tmp_path):
    other = TABLE_ARRAYS | {"pixel_values": np.float32([0, 1])}
    broken = TABLE_ARRAYS | {"pixel_values": np.float32([])}
    files = [
        save_npz(tmp_path / f"gpu{n}.npz", indexed_maps(seed=n), **tables)
        for n, tables in enumerate([TABLE_ARRAYS, other, broken])
    ]
    assert_mentions(
        refusal_of(files, tmp_path / "R"),
        f"{files[1]}: its search space is not the one of {files[0]}",
        f"{files[2]}: pixel_values: expected at least one value",
    )


def test_a_search_space_file_names_what_is_missing(tmp_path):
    np.savez(tmp_path / "t.npz", euler_angles=np.zeros((2, 2)), defocus_values=np.zeros(1))
    with pytest.raises(InvalidInputError, match=r"t\.npz: pixel_values: missing"):
        read_search_space_file(tmp_path / "t.npz")
    np.savez(tmp_path / "t.npz", **TABLE_ARRAYS | {"euler_angles": np.zeros((2, 2))})
    with pytest.raises(InvalidInputError, match=r"t\.npz: euler_angles: expected shape"):
        read_search_space_file(tmp_path / "t.npz")
    torch.save({k: torch.from_numpy(v) for k, v in TABLE_ARRAYS.items()}, tmp_path / "t.pt")
    assert read_search_space_file(tmp_path / "t.pt").digest == SPACE.digest


def test_all_problems_of_all_files_come_in_one_message(tmp_path):
    good = explicit_maps()
    no_sum = {key: values for key, values in good.items() if key != SUM}
    files = [
        save_npz(tmp_path / "a.npz", good),
        save_npz(tmp_path / "b.npz", no_sum, 5.5),
        save_npz(tmp_path / "c.npz", good | {MIP: good[MIP].astype("f8")}, None),
        tmp_path / "d.npz",
    ]
    problems = refusal_of(files, tmp_path / "R", ImportOptions(template_box=99))
    assert_mentions(
        problems,
        f"b.npz: {SUM}: missing",
        f"b.npz: {COUNT}: expected an integer",
        f"c.npz: {MIP}: expected dtype float32",
        f"c.npz: {COUNT}: missing",
        "d.npz: expected a file",
        "template box: expected 1 to 5",
    )


def test_bad_values_of_all_files_come_in_one_message(tmp_path):
    files = [
        save_npz(tmp_path / "a.npz", change_one(MIP, nan_at_corner)),
        save_npz(tmp_path / "b.npz", change_one(SUM, nan_at_corner)),
        save_npz(tmp_path / "c.npz", explicit_maps()),
    ]
    problems = refusal_of(files, tmp_path / "R")
    assert_mentions(problems, f"a.npz: {MIP}: NaN", f"b.npz: {SUM}: NaN")


def test_a_huge_table_is_not_read(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f4", "fortran_order": False, "shape": (2**40,)}
    )
    file = save_npz(tmp_path / "a.npz", indexed_maps())
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("defocus_values.npy", header.getvalue())
        for name in ("euler_angles", "pixel_values"):
            with archive.open(f"{name}.npy", "w") as member:
                np.save(member, TABLE_ARRAYS[name])
    problems = refusal_of([file], tmp_path / "R")
    assert any("defocus_values: expected at most" in problem for problem in problems)
