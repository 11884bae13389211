"""Stores that somebody has broken, or made to do harm: an OcelotError, soon, in little memory.

What single arrays and chunks may say is in ``test_store.py``, single attributes in
``test_format.py``; here whole stores are read by everything that reads stores.
"""

import contextlib
import copy
import json
import os
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import dask
import google_crc32c
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numcodecs.blosc import Blosc

import ocelot_em
from builders import (
    INDEXED,
    explicit_maps,
    indexed_maps,
    unsealed,
    write_explicit_search,
    write_indexed_search,
)
from ocelot_em.errors import (
    CorruptChunkError,
    FormatError,
    InvalidDataError,
    OcelotError,
    StorageError,
)
from ocelot_em.merge.planning import make_plan
from ocelot_em.merge.result import MergedResult
from ocelot_em.model.options import MergeOptions
from ocelot_em.particles.picking import all_candidates
from ocelot_em.store import arrays as store
from ocelot_em.store.local import _CHECKED_SECONDS
from ocelot_em.store.objects import open_objects
from ocelot_em.store.partials import write_partial
from ocelot_em.store.search_info import Exposure, SearchInfo
from ocelot_em.store.tables import write_table
from work import assert_linear, calls_of

SHAPE = (40, 50)
TILE = 24
KINDS = (
    "explicit",
    "indexed",
    "montage",
    "explicit_merged",
    "indexed_merged",
    "index_only_merged",
    "montage_merged",
)


def lean(kinds, *fast):
    """All kinds as parameters, of which only some are in the fast tier."""
    return [kind if kind in fast else pytest.param(kind, marks=pytest.mark.slow) for kind in kinds]


def write_montage(place):
    for number, origin in enumerate([(0, 0), (-3, 30)]):
        for name in ("a", "b"):
            write_partial(
                place,
                name,
                explicit_maps(SHAPE, number),
                total_projections=70,
                search=SearchInfo(template_box=3, exposure=Exposure(f"e{number}", origin, number)),
            )


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """One valid store of each kind, of version 2; who changes something puts it back.

    What is refused here is refused by itself, not only because it was changed.
    """
    place = tmp_path_factory.mktemp("stores")
    write_explicit_search(place / "explicit", SHAPE, 2)
    write_indexed_search(place / "indexed", SHAPE, 2)
    write_montage(place / "montage")
    for kind in ("explicit", "indexed", "montage"):
        ocelot_em.merge(place / kind, place / f"{kind}_merged", tile_size=TILE)
    ocelot_em.merge(place / "indexed", place / "index_only_merged", tile_size=TILE, poses="index")
    for kind in KINDS:
        unsealed(place / kind)
    return place


# What reads stores


def look_at_candidates(place):
    assert np.isfinite(all_candidates(place).rows[:, :2]).all()


READERS = {
    "describe": ocelot_em.describe,
    "check": ocelot_em.check,
    "open_merged": lambda place: ocelot_em.open_merged(place).compute(),
    "open_partials": lambda place: ocelot_em.open_partials(place).compute(),
    "open_exposure": lambda place: ocelot_em.open_partials(place, "e0").compute(),
    "plan": lambda place: make_plan([place], f"{place}-none", MergeOptions()),
    "summary": lambda place: MergedResult.open(place).summary,
    "candidates": look_at_candidates,
    "find_peaks": ocelot_em.find_peaks,
    "find_p_values": lambda place: ocelot_em.find_peaks(place, method="pvalue"),
}


def read_by_all(place, *more):
    """Names of the readers that refused, and what ``check`` says."""
    refused = {}
    for name, read in {**READERS, **dict(more)}.items():
        try:
            read(place)
        except OcelotError as error:
            refused[name] = error
    lengths = [len(str(error).strip()) for error in refused.values()]
    assert all(0 < n < 20_000 for n in lengths), refused
    return refused, ocelot_em.check(place)


@pytest.mark.parametrize("kind", KINDS)
def test_valid_stores_are_read_by_all_that_reads_such(stores, kind):
    refused, problems = read_by_all(stores / kind)
    assert problems == []
    others = {"open_exposure"} if "montage" not in kind else {"open_partials", "plan"}
    searches = {"open_merged", "summary", "candidates", "find_peaks", "find_p_values"}
    merged = kind.endswith("_merged")
    expected = others | {"open_partials", "open_exposure"} if merged else others | searches
    if kind == "montage":
        expected -= {"plan"}
    assert set(refused) - {"find_p_values"} == expected - {"find_p_values"}


# Metadata


HOSTILE = [
    None,
    True,
    "",
    "../x",
    "/etc",
    "a/b",
    "a\0b",
    "\u202egnp.zarr",
    "x" * 10**5,
    0,
    -1,
    1,
    7,
    2**31 - 1,
    2**31,
    2**62,
    2**63,
    2**80,
    10**400,
    0.5,
    float("nan"),
    float("inf"),
    1e308,
    [],
    {},
    [[]],
    [2**31 - 1, 2**31 - 1],
    [1, 1],
    [0, 0],
    [-1, 5],
    [True, True],
    [None] * 1000,
    {"name": "numcodecs.pickle", "configuration": {}},
    {"name": "sharding_indexed", "configuration": {"chunk_shape": [1, 1]}},
    {"name": "rectilinear", "configuration": {"chunk_shape": [[1], [1]]}},
    "numcodecs.pickle",
    "object",
    "complete",
    "writing",
    "float64",
    {"name": "fixed_length_utf32", "configuration": {"length_bytes": 2**40}},
    [["x", "int32"]],
]


hostile = st.sampled_from(HOSTILE).map(copy.deepcopy)


def places_in(value, place=()):
    """Paths to everything within a JSON document."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*place, key)
        if isinstance(inner, (dict, list)):
            yield from places_in(inner, (*place, key))


def inner_of(document, parents):
    for key in parents:
        document = document[key]
    return document


@st.composite
def mangled(draw, text):
    """A JSON document of which values were replaced, deleted, moved or written twice."""
    document = json.loads(text)
    for _ in range(draw(st.integers(1, 3))):
        places = list(places_in(document))
        if not places:
            break
        *parents, last = draw(st.sampled_from(places))
        inner = inner_of(document, parents)
        how = draw(st.sampled_from(["replace", "delete", "other", "more", "many"]))
        if how == "delete":
            del inner[last]
        elif how == "more" and isinstance(inner[last], dict):
            inner[last]["more"] = draw(hostile)
        elif how == "many" and isinstance(inner[last], list) and inner[last]:
            inner[last] = inner[last] * 300
        elif how == "other":
            *others, other = draw(st.sampled_from(places))
            with contextlib.suppress(KeyError, IndexError, TypeError):
                inner[last] = json.loads(json.dumps(inner_of(document, [*others, other])))
        else:
            inner[last] = draw(hostile)
    return json.dumps(document)


@contextlib.contextmanager
def changed(file, content):
    """A file with other content, for a while."""
    before = file.read_bytes()
    file.write_bytes(content)
    try:
        yield
    finally:
        file.write_bytes(before)


def merge_into(folder):
    def merge(place):
        shutil.rmtree(folder, ignore_errors=True)
        ocelot_em.merge(place, folder)

    return "merge", merge


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
@pytest.mark.parametrize("kind", lean(KINDS, "explicit", "indexed_merged"))
@given(data=st.data())
def test_mangled_metadata_is_read_or_refused(stores, tmp_path, kind, data):
    place = stores / kind
    names = sorted(str(path.relative_to(place)) for path in place.rglob("zarr.json"))
    file = place / data.draw(st.sampled_from(["zarr.json", *names]))
    with changed(file, data.draw(mangled(file.read_text())).encode()):
        read_by_all(place, merge_into(tmp_path / "OUT"))


@pytest.mark.parametrize("kind", ["explicit", "montage_merged"])
@given(data=st.data())
def test_metadata_of_wild_bytes_is_read_or_refused(stores, kind, data):
    place = stores / kind
    file = place / data.draw(st.sampled_from(["zarr.json", "mip/zarr.json"]))
    file = file if file.is_file() else place / "partials/gpu0/mip/zarr.json"
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(content) - 1))
        content[position : position + data.draw(st.integers(0, 3))] = data.draw(
            st.sampled_from([b"", b"{", b"[", b'"', b"\\ud800", b"\xff", b"9" * 5000, b"1e999"])
        )
    with changed(file, bytes(content)):
        read_by_all(place)


def refusal(place, read=ocelot_em.describe):
    with pytest.raises(OcelotError) as caught:
        read(place)
    return str(caught.value)


BOMBS = {
    "deep lists": ("[" * 10**6, "nested too deeply"),
    "deep objects": ('{"a":' * 10**5 + "1" + "}" * 10**5, "nested too deeply"),
    "a long number": ('{"a": ' + "9" * 10**6 + "}", "cannot be read as Zarr"),
    "a key twice": (
        '{"zarr_format": 3, "node_type": "group", "node_type": "array"}',
        "'node_type' is there more than once",
    ),
    "many keys": (
        "{" + ",".join(f'"k{number}":0' for number in range(10**4)) + "}",
        "at most 1000 keys",
    ),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_json_bombs_are_refused(tmp_path, bomb):
    text, says = BOMBS[bomb]
    (tmp_path / "zarr.json").write_text(text)
    assert says in refusal(tmp_path)


def edit_root(place, change):
    file = place / "zarr.json"
    document = json.loads(file.read_text())
    change(document["attributes"]["ocelot"])
    return changed(file, json.dumps(document).encode())


def test_attributes_that_nest_less_deeply_than_json_may_are_refused(stores):
    deep = json.loads("[" * 500 + "]" * 500)
    with edit_root(stores / "explicit", lambda a: a["provenance"].update(options={"x": deep})):
        assert refusal(stores / "explicit")


@pytest.mark.parametrize("key", ["partials", "exposures"])
def test_of_very_many_wrong_entries_few_are_named(stores, key):
    with edit_root(stores / "montage_merged", lambda a: a.update({key: [{}] * 10**5})):
        assert len(refusal(stores / "montage_merged")) < 5000


def test_names_in_metadata_cannot_write_to_the_terminal(stores):
    with edit_root(stores / "explicit", lambda a: a.update({"\x1b[2J\u202e": 1})):
        printed = refusal(stores / "explicit")
    assert "\\x1b[2J\\u202e" in printed
    assert printed.isprintable()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda p: p["tile"].__setitem__(0, 10**9), "tile: expected at most 65,536"),
        (lambda p: p.update(exposures=[]), "exposures"),
        (lambda p: p["exposures"][0].update(sources=[]), "sources"),
        (lambda p: p["exposures"][0].update(origin=[2**33, 0]), "to be inside"),
        (lambda p: p["exposures"][0].update(taken=[0, 0, 0, 0]), "taken: expected pixels of"),
        (lambda p: p["exposures"][0].update(taken=[0, 41, 0, 50]), "taken: expected pixels of"),
        (lambda p: p.update(shape=[41, 50]), "shape: expected (40, 50) as in the result"),
        (lambda p: p.update(pose_form="explicit"), "pose_form: expected indexed as in the result"),
        (lambda p: p.update(has_counts=1), "has_counts"),
        (lambda p: p["exposures"][0]["sources"].pop(), "partials: expected those of the result"),
        (lambda p: p["exposures"][0]["sources"][0].update(path="../../x"), "path"),
        (lambda p: p["exposures"][0]["sources"][0].update(total_projections=2**80), "at most"),
        (lambda p: p["exposures"].append(p["exposures"][0]), "expected an id, since there"),
        (lambda p: p["exposures"][0].update(id="e0"), "exposures: expected those of the result"),
    ],
)
def test_plans_that_lie_are_refused(stores, change, says):
    place = stores / "indexed_merged"
    with edit_root(place, lambda a: change(a["plan"])):
        assert says in refusal(place)
        assert says in " ".join(ocelot_em.check(place))
        assert says in refusal(place, ocelot_em.find_peaks)


def test_a_plan_of_more_tiles_than_anybody_has_is_refused(stores):
    def change(attributes):
        for about in (attributes, attributes["plan"], attributes["plan"]["exposures"][0]):
            about["shape"] = about["valid_shape"] = [2**31 - 1, 2**31 - 1]
        attributes["plan"]["exposures"][0]["taken"] = [0, 2**31 - 1, 0, 2**31 - 1]
        attributes["plan"]["tile"] = [1, 1]

    with edit_root(stores / "explicit_merged", change):
        assert "chunks" in refusal(stores / "explicit_merged")


@pytest.mark.parametrize(
    "change",
    [
        lambda e: e[0].update(n_partials=10**9),
        lambda e: e[0].update(n_partials=2**80),
        lambda e: e[1].update(first_partial=0),
        lambda e: e[1].update(first_partial=-1),
        lambda e: e.pop(),
        lambda e: e[0].update(taken=[5, 5, 0, 9]),
    ],
)
def test_exposures_that_do_not_share_the_partials_are_refused(stores, change):
    with edit_root(stores / "montage_merged", lambda a: change(a["exposures"])):
        assert "exposures" in refusal(stores / "montage_merged")


def test_a_plan_of_other_stores_opens_none_of_them(stores, tmp_path):
    """A pipe at the place that the plan names: who opens it, waits for ever."""
    os.mkfifo(tmp_path / "zarr.json")

    def change(attributes):
        for source in attributes["plan"]["exposures"][0]["sources"]:
            source["url"] = str(tmp_path)

    with edit_root(stores / "indexed_merged", change):
        refused, problems = read_by_all(stores / "indexed_merged")
    assert problems == []
    assert not {"describe", "open_merged", "find_peaks"} & set(refused)


def test_more_projections_than_64_bits_hold_are_refused(stores, tmp_path):
    place = shutil.copytree(stores / "explicit", tmp_path / "RUN")
    for name in ("gpu0", "gpu1"):
        file = place / f"partials/{name}/zarr.json"
        document = json.loads(file.read_text())
        document["attributes"]["ocelot"]["total_projections"] = 2**62
        file.write_text(json.dumps(document))
    assert "2**62 projections" in refusal(place, lambda p: ocelot_em.merge(p, tmp_path / "OUT"))


def test_a_merge_of_more_tiles_than_are_read_is_refused(stores, tmp_path):
    place = shutil.copytree(stores / "explicit", tmp_path / "RUN")
    huge_maps(place, [2**10, 2**10], edge=2**13)

    def merge(place):
        return ocelot_em.merge(place, tmp_path / "OUT", tile_size=1)

    assert "at most 16,777,216 chunks of a map, got 67,108,864" in refusal(place, merge)
    assert not (tmp_path / "OUT").exists()


def test_maps_of_one_partial_have_the_same_chunks(stores, tmp_path):
    """Or a map of large chunks would be decoded anew for each small one of another."""
    place = shutil.copytree(stores / "explicit", tmp_path / "RUN")
    objects = open_objects(place)
    store.create_map(objects, "partials/gpu1/best_phi", "best_phi", SHAPE, (5, 5))
    says = "best_phi: expected chunks of (40, 50) pixels"
    assert says in " ".join(ocelot_em.check(place))
    assert says in refusal(place, lambda p: ocelot_em.merge(p, tmp_path / "OUT"))


def test_of_very_many_problems_the_first_are_named(stores, tmp_path):
    place = shutil.copytree(stores / "explicit", tmp_path / "RUN")
    for file in place.glob("partials/*/*/zarr.json"):
        document = json.loads(file.read_text())
        document["chunk_grid"]["configuration"]["chunk_shape"] = [1, 1]
        file.write_text(json.dumps(document))
    problems = ocelot_em.check(place)
    assert len(problems) == 1001
    assert "more than 1,000 problems" in problems[-1]


# Names


NAMES = ["..x", "a b", "a\nb", "\u202egnp", "-", "x" * 129, "é", "\udc80", "a:b", "a\\b"]


@pytest.mark.parametrize(
    ("kind", "at", "name"),
    [("explicit", "partials/gpu0", name) for name in NAMES]
    + [("montage", "exposures/e0", name) for name in NAMES[:2]],
)
def test_groups_with_names_that_no_writer_gives_are_refused(stores, tmp_path, kind, at, name):
    place = shutil.copytree(stores / kind, tmp_path / "RUN")
    (place / at).rename((place / at).with_name(name))
    refused, problems = read_by_all(place)
    assert {"describe", "plan"} <= set(refused)
    assert problems
    assert all(problem.isprintable() for problem in problems)


def test_folders_that_are_no_groups_may_have_any_name(stores, tmp_path):
    place = shutil.copytree(stores / "explicit", tmp_path / "RUN")
    for name in NAMES[:5]:
        (place / "partials" / name).mkdir()
    assert ocelot_em.check(place) == []


@pytest.mark.parametrize("name", ["9" * 200, "\u0663", "007", "-1", str(2**31 - 2)])
def test_numbers_of_exposures_that_are_none_do_no_harm(stores, tmp_path, name):
    place = shutil.copytree(stores / "montage", tmp_path / "RUN")
    (place / "exposure_numbers" / name).mkdir()
    (place / "exposure_numbers" / name / "zarr.json").write_text("{}")
    with contextlib.suppress(OcelotError):
        write_partial(
            place,
            "a",
            explicit_maps(SHAPE, 0),
            total_projections=70,
            search=SearchInfo(template_box=3, exposure=Exposure("new", (0, 0), 3)),
        )
    assert ocelot_em.check(place) == []


# Chunks, tables and records


def put_chunk(place, key, values):
    store.write_chunk(open_objects(place), key, np.ascontiguousarray(values))


def framed(frame):
    return frame + google_crc32c.value(frame).to_bytes(4, "little")


@pytest.mark.parametrize("kind", lean(["explicit", "indexed_merged", "montage_merged"], "explicit"))
@given(data=st.data())
def test_mangled_chunks_are_read_or_refused(stores, tmp_path, kind, data):
    place = stores / kind
    chunks = [path for path in sorted(place.rglob("c/**/*")) if path.is_file()]
    file = data.draw(st.sampled_from(chunks))
    content = bytearray(file.read_bytes()[:-4])
    how = data.draw(st.sampled_from(["cut", "header", "anywhere", "other", "bytes"]))
    if how == "cut":
        del content[data.draw(st.integers(0, len(content))) :]
    elif how == "other":
        content = bytearray(data.draw(st.sampled_from(chunks)).read_bytes()[:-4])
    elif how == "bytes":
        content = bytearray(data.draw(st.binary(max_size=60)))
    else:
        end = min(len(content), 40 if how == "header" else len(content))
        for _ in range(data.draw(st.integers(1, 5))):
            content[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
    checked = data.draw(st.booleans())
    with changed(file, framed(bytes(content)) if checked else bytes(content)):
        _, problems = read_by_all(place)
        if not checked and "lock" not in str(file):
            assert problems or "tile_summary" in str(file)


NUMBERS = "progress/numbers/c/0"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("counts", np.nan),
        ("counts", -1.0),
        ("counts", 0.5),
        ("counts", np.inf),
        ("y", -1.0),
        ("y", 1e300),
        ("x", 0.5),
        ("x", 24.0),
        ("best_partial", 2.0),
        ("best_partial", np.nan),
        ("best_global_index", -1.0),
        ("best_global_index", 1e300),
        ("scaled_mip", np.nan),
    ],
)
def test_records_of_impossible_numbers_are_corrupt(stores, field, value):
    from ocelot_em.merge.stats.collected import CANDIDATE_FIELDS, EXTREMES, TILE_FIELDS

    place = stores / "index_only_merged"
    file, about = place / NUMBERS, json.loads((place / "progress/numbers/zarr.json").read_text())
    values = np.empty(about["chunk_grid"]["configuration"]["chunk_shape"][0])
    store.decode_chunk(file.read_bytes(), values.nbytes, store.ReusedMemory(), "here")
    values[:] = np.frombuffer(
        store.decode_chunk(file.read_bytes(), values.nbytes, store.ReusedMemory(), "here")
    )
    n_statistics = len(TILE_FIELDS) + 2 + 2 * 2 * 3
    if field == "counts":
        values[len(EXTREMES)] = value
    else:
        candidate = values[n_statistics : n_statistics + len(CANDIDATE_FIELDS)]
        candidate[:] = 0
        candidate[CANDIDATE_FIELDS.index(field)] = value
    with changed(file, b"".join(store.encode_chunk(values))):
        with pytest.raises(CorruptChunkError, match=r"numbers: record 0, pixels .*expected"):
            all_candidates(place)
        assert any("record 0" in problem for problem in ocelot_em.check(place))
        read_by_all(place)


def test_candidates_beyond_the_search_space_are_refused(stores):
    place, wrong = stores / "index_only_merged", 2**30
    objects = open_objects(place)
    maps = store.open_map(objects, "best_global_index", "here", ["int32"])
    cell = maps.grid.at(0, 0)
    file = place / maps.key(cell)
    values = np.full(cell.region.shape, wrong, np.int32)
    refused = pytest.raises(InvalidDataError, match="expected -1 to 41")
    with changed(file, b"".join(store.encode_chunk(values))), refused:
        ocelot_em.open_merged(place).compute()


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("mip_histogram", np.zeros(5, np.int64)),
        ("mip_histogram", np.full(65538, -1, np.int64)),
        ("scaled_mip_histogram", np.zeros(65538, np.float64)),
        ("joint_histogram", np.zeros((512, 511), np.int64)),
        ("joint_histogram", np.zeros(512 * 512, np.int64)),
    ],
)
def test_statistics_of_another_size_are_refused(stores, tmp_path, name, values):
    place = shutil.copytree(stores / "explicit_merged", tmp_path / "OUT")
    shutil.rmtree(place / "statistics" / name)
    dimensions = ("i", "j")[: values.ndim]
    write_table(open_objects(place), f"statistics/{name}", values, dimensions)
    with pytest.raises(FormatError, match=name):
        _ = MergedResult.open(place).summary
    assert any(name in problem for problem in ocelot_em.check(place))


@pytest.mark.parametrize("values", [np.zeros((7, 2)), np.full((7, 3), np.nan), np.zeros(7)])
def test_tables_that_are_no_search_space_are_a_format_error(stores, tmp_path, values):
    place = shutil.copytree(stores / "indexed", tmp_path / "RUN")
    shutil.rmtree(place / "search_space/euler_angles")
    table = values.astype(np.float32)
    path = "search_space/euler_angles"
    write_table(open_objects(place), path, table, ("i", "j")[: table.ndim])
    with pytest.raises(FormatError, match="search_space: euler_angles: expected"):
        ocelot_em.merge(place, tmp_path / "OUT")
    assert any("euler_angles" in problem for problem in ocelot_em.check(place))


def test_a_codec_that_would_run_code_is_not_looked_up(stores, tmp_path, monkeypatch):
    import zarr.registry

    place = shutil.copytree(stores / "indexed", tmp_path / "RUN")
    asked = []
    monkeypatch.setattr(zarr.registry, "get_codec_class", lambda name, **_: asked.append(name))
    for path in ("partials/gpu0/mip", "search_space/euler_angles"):
        file = place / path / "zarr.json"
        document = json.loads(file.read_text())
        document["codecs"] = [{"name": "numcodecs.pickle", "configuration": {}}]
        file.write_text(json.dumps(document))
    _, problems = read_by_all(place)
    assert sum("got 'numcodecs.pickle'" in problem for problem in problems) == 2
    assert asked == []


# What lies where files should be


def put_fifo(file):
    os.mkfifo(file)


def put_folder(file):
    file.mkdir()
    (file / "x").touch()


def put_loop(file):
    file.symlink_to(file.name)


def put_dangling(file):
    file.symlink_to("nothing")


PUTS = {f.__name__: f for f in (put_fifo, put_folder, put_loop, put_dangling)}
FILES = [
    ("explicit", "zarr.json"),
    ("explicit", "partials/gpu0/zarr.json"),
    ("explicit", "partials/gpu0/mip/zarr.json"),
    ("explicit", "partials/gpu0/mip/c/0/0"),
    ("indexed", "search_space/euler_angles/zarr.json"),
    ("indexed", "search_space/euler_angles/c/0/0"),
    ("montage", "exposures/e0/zarr.json"),
    ("indexed_merged", "mip/c/0/0"),
    ("indexed_merged", "progress/numbers/c/0"),
    ("indexed_merged", "progress/numbers/zarr.json"),
    ("indexed_merged", "statistics/zarr.json"),
    ("indexed_merged", "statistics/joint_histogram/c/0/0"),
]


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("kind", "file", "what"),
    [
        # Each file is replaced by two of them, each of them replaces half of the files.
        (*FILES[number], list(PUTS)[(number + more) % len(PUTS)])
        for number, more in product(range(len(FILES)), (0, 1))
    ],
)
def test_what_is_no_file_is_refused_and_nobody_waits(stores, tmp_path, kind, file, what):
    place = shutil.copytree(stores / kind, tmp_path / "S")
    (place / file).unlink()
    PUTS[what](place / file)
    _, problems = read_by_all(place, merge_into(tmp_path / "OUT"))
    tolerated = ("progress/numbers/zarr.json", "partials/gpu0/zarr.json", "exposures/e0/zarr.json")
    assert problems or file in tolerated


@pytest.mark.parametrize("folder", ["partials", "partials/gpu0/mip", "partials/gpu0/mip/c"])
def test_a_file_where_a_folder_should_be_is_refused(stores, tmp_path, folder):
    place = shutil.copytree(stores / "explicit", tmp_path / "RUN")
    shutil.rmtree(place / folder)
    (place / folder).touch()
    refused, problems = read_by_all(place, merge_into(tmp_path / "OUT"))
    assert {"plan" if folder == "partials" else "merge"} <= set(refused)
    assert problems


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is unreadable for the superuser")
@pytest.mark.parametrize("file", ["zarr.json", "partials", "partials/gpu0/mip/c/0/0"])
def test_what_may_not_be_read_is_an_error_of_the_storage(stores, tmp_path, file):
    place = shutil.copytree(stores / "explicit", tmp_path / "RUN")
    (place / file).chmod(0)
    try:
        assert "ermission" in " ".join(ocelot_em.check(place))
        with pytest.raises(StorageError):
            ocelot_em.merge(place, tmp_path / "OUT")
    finally:
        (place / file).chmod(0o700)


# Links


@pytest.fixture
def outside(stores, tmp_path):
    """A copy of a store that nobody has asked for."""
    return shutil.copytree(stores / "explicit", tmp_path / "OUTSIDE")


LEAVING = "leads out of the store"


@pytest.mark.parametrize(
    ("at", "reads"),
    [
        ("zarr.json", ocelot_em.describe),
        ("partials", ocelot_em.describe),
        ("partials/gpu0", ocelot_em.describe),
        ("partials/gpu0/zarr.json", ocelot_em.describe),
        ("partials/gpu0/mip", ocelot_em.open_partials),
        ("partials/gpu0/mip/zarr.json", ocelot_em.open_partials),
        ("partials/gpu0/correlation_sum", lambda p: make_plan([p], f"{p}-none", MergeOptions())),
        ("partials/gpu0/mip/c", lambda p: ocelot_em.open_partials(p).compute()),
        ("partials/gpu0/mip/c/0", lambda p: ocelot_em.open_partials(p).compute()),
        ("partials/gpu0/mip/c/0/0", lambda p: ocelot_em.open_partials(p).compute()),
    ],
)
def test_a_link_that_leads_out_is_not_read(stores, tmp_path, monkeypatch, outside, at, reads):
    monkeypatch.setattr("ocelot_em.store.local._CHECKED_SECONDS", 0.0)
    place = shutil.copytree(stores / "explicit", tmp_path / "RUN")
    reads(place)  # what was looked at before, is looked at again
    target = place / at
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    target.symlink_to(outside / at)
    says = refusal(place, reads)
    assert LEAVING in says
    assert str(outside / at) in says
    assert any(LEAVING in problem for problem in ocelot_em.check(place))


def test_folders_that_were_looked_at_are_looked_at_again_after_a_while(
    stores, tmp_path, monkeypatch, outside
):
    now = [1000.0]
    monkeypatch.setattr("ocelot_em.store.local.time", SimpleNamespace(monotonic=lambda: now[0]))
    place = shutil.copytree(stores / "explicit", tmp_path / "RUN")
    objects, key = open_objects(place), "partials/gpu0/mip/zarr.json"
    before = objects.get(key)
    shutil.rmtree(place / "partials")
    (place / "partials").symlink_to(outside / "partials")
    now[0] += _CHECKED_SECONDS / 2
    assert objects.get(key) == before
    now[0] += _CHECKED_SECONDS
    with pytest.raises(StorageError, match=LEAVING):
        objects.get(key)


def test_links_within_a_store_and_to_it_are_followed(stores, tmp_path):
    place = shutil.copytree(stores / "explicit", tmp_path / "RUN")
    (place / "partials/gpu0/mip").rename(place / "elsewhere")
    (place / "partials/gpu0/mip").symlink_to("../../elsewhere")
    chunk = place / "partials/gpu1/mip/c/0/0"
    chunk.rename(place / "chunk")
    chunk.symlink_to(place / "chunk")
    (tmp_path / "LINK").symlink_to(place)
    for name in ("RUN", "LINK"):
        assert ocelot_em.check(tmp_path / name) == []
        ocelot_em.merge(tmp_path / name, tmp_path / f"{name}-OUT")


def test_folders_that_contain_themselves_are_listed_once(stores, tmp_path):
    place = shutil.copytree(stores / "explicit", tmp_path / "RUN")
    before = ocelot_em.describe(place).stored_nbytes
    (place / "partials/gpu0/more").symlink_to("..")
    (place / "everything").symlink_to(tmp_path)
    assert ocelot_em.describe(place).stored_nbytes == before


def everything_below(place):
    return {
        str(path.relative_to(place)): path.read_bytes() if path.is_file() else None
        for path in sorted(place.rglob("*"))
    }


@pytest.mark.parametrize(
    "at", ["mip", "mip/c", "mip/c/0", "progress", "progress/tile_summary", "statistics"]
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_nothing_is_written_or_deleted_behind_a_link_that_leads_out(
    stores, tmp_path, at, overwrite
):
    """An output that somebody has left half-finished, with a trap."""
    place = shutil.copytree(stores / "explicit_merged", tmp_path / "OUT")
    outside = shutil.copytree(stores / "explicit_merged", tmp_path / "OUTSIDE")
    for name in (*everything_below(outside), "mip/c/0/0#17"):
        if not (outside / name).is_dir():
            (outside / name).write_text("not ours")
    root = place / "zarr.json"
    root.write_text(root.read_text().replace('"state": "complete"', '"state": "writing"'))
    shutil.rmtree(place / "progress/tile_summary/c/0")
    shutil.rmtree(place / at)
    (place / at).symlink_to(outside / at)
    before = everything_below(outside)
    with contextlib.suppress(OcelotError):
        ocelot_em.merge(stores / "explicit", place, overwrite=overwrite, tile_size=TILE)
    assert everything_below(outside) == before
    assert ocelot_em.check(place) == [] or not overwrite


@pytest.mark.parametrize("at", ["partials", "partials/gpu0", "partials/gpu0/mip", "search_space"])
def test_no_partial_is_written_behind_a_link_that_leads_out(stores, tmp_path, at):
    place = tmp_path / "RUN"
    place.mkdir()
    (tmp_path / "OUTSIDE").mkdir()
    (place / at).parent.mkdir(parents=True, exist_ok=True)
    (place / at).symlink_to(tmp_path / "OUTSIDE")
    with pytest.raises(StorageError, match=LEAVING):
        write_partial(place, "gpu0", indexed_maps(SHAPE), total_projections=70, search=INDEXED)
    assert list((tmp_path / "OUTSIDE").iterdir()) == []


@pytest.mark.parametrize("key", ["../x", "a/../../x", "/etc/passwd/../../tmp/x"])
def test_keys_do_not_lead_out(tmp_path, key):
    (tmp_path / "x").write_text("not ours")
    objects = open_objects(tmp_path / "RUN")
    objects.put("a/b", [b""])
    for read in (objects.get, objects.size, objects.delete):
        with contextlib.suppress(StorageError):
            assert read(key) is None
    with contextlib.suppress(StorageError):
        objects.put(key, [b"ours"])
    assert (tmp_path / "x").read_text() == "not ours"


# Memory and time


LIMIT_NBYTES = 5 * 2**29
"""Over what the process has before a store is read: a document of 64 MiB takes more than half."""

MEASURED_READERS = ("describe", "check", "merge", "open_merged", "open_partials", "find_peaks")

MEASURED = """
import json, pathlib, resource, sys
tests, *measured = sys.argv[1:]
sys.path.insert(0, tests)
import test_hostile_stores as t
for place, limit in zip(map(pathlib.Path, measured[::2]), map(int, measured[1::2]), strict=True):
    with open("/proc/self/status") as status:
        have = int(next(line for line in status if line.startswith("VmSize")).split()[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (have + limit, resource.RLIM_INFINITY))
    print(f"{place.name}:", file=sys.stderr, flush=True)
    readers, refused = dict([*t.READERS.items(), t.merge_into(place.with_suffix(".out"))]), {}
    for name in t.MEASURED_READERS:
        try:
            problems = readers[name](place)
            if name == "check" and problems:
                refused[name] = problems[0]
        except t.OcelotError as error:
            refused[name] = str(error)
        problems = None
    print(json.dumps([place.name, refused]), flush=True)
"""


def edit_json(file, change):
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


def huge_maps(place, chunk, edge=2**31 - 1):
    """A search of so many pixels squared, of which one chunk of each map is there."""
    for file in place.rglob("zarr.json"):

        def change(document):
            about = document["attributes"].get("ocelot", {})
            for each in (about, document):
                if each.get("shape") == list(SHAPE):
                    each["shape"] = [edge, edge]
            if "valid_shape" in about:
                about["valid_shape"] = [edge, edge]
            if document["node_type"] == "array":
                document["chunk_grid"]["configuration"]["chunk_shape"] = chunk

        edit_json(file, change)


def huge_table(place):
    edit_json(
        place / "search_space/euler_angles/zarr.json",
        lambda d: (
            d.update(shape=[2**29 // 12, 3]),
            d["chunk_grid"]["configuration"].update(chunk_shape=[2**29 // 12, 3]),
        ),
    )


def many_partials(place, n=10**6):
    partials = [{"name": f"p{i}", "id": "", "total_projections": 1} for i in range(n)]
    edit_json(place / "zarr.json", lambda d: d["attributes"]["ocelot"].update(partials=partials))


def many_bad_partials(place, n=10**6):
    partials = [{} for _ in range(n)]
    edit_json(place / "zarr.json", lambda d: d["attributes"]["ocelot"].update(partials=partials))


def huge_records(place):
    def change(document):
        about = document["attributes"]["ocelot"]
        for each in (about, about["plan"], about["plan"]["exposures"][0]):
            each["shape"] = each["valid_shape"] = [2**16, 2**16]
        about["plan"]["exposures"][0]["taken"] = [0, 2**16, 0, 2**16]
        about["plan"]["tile"] = [2**16, 2**16]

    edit_json(place / "zarr.json", change)


def sparse(file, nbytes):
    with file.open("wb") as opened:
        opened.truncate(nbytes)


def zeros_of_256_mib(place):
    """Chunks that decode to 256 MiB each, of a few hundred kB."""
    frame = Blosc(cname="zstd").encode(np.zeros(2**26, np.float32))
    for file in place.rglob("zarr.json"):

        def change(document):
            if document["node_type"] == "array":
                document["chunk_grid"]["configuration"]["chunk_shape"] = [2**13, 2**13]

        edit_json(file, change)
    for file in place.glob("partials/*/*/c/0/0"):
        file.write_bytes(framed(frame))


HUGE = {
    "huge maps": ("explicit", lambda p: huge_maps(p, [1024, 1024])),
    "huge maps of small chunks": ("explicit", lambda p: huge_maps(p, [1, 1])),
    "huge maps of large chunks": ("explicit", lambda p: huge_maps(p, [8192, 8192])),
    "a huge table": ("indexed", huge_table),
    "huge records": ("explicit_merged", huge_records),
    "zeros": ("explicit", zeros_of_256_mib),
    "endless metadata": ("explicit", lambda p: sparse(p / "zarr.json", 2**40)),
    "large metadata": ("explicit", lambda p: sparse(p / "partials/gpu0/mip/zarr.json", 2**31)),
    "endless chunk": ("explicit", lambda p: sparse(p / "partials/gpu0/mip/c/0/0", 2**40)),
    "large chunk": ("explicit", lambda p: sparse(p / "partials/gpu0/mip/c/0/0", 2**31)),
    "endless record": ("indexed_merged", lambda p: sparse(p / NUMBERS, 2**40)),
    "endless table": ("indexed", lambda p: sparse(p / "search_space/pixel_values/c/0", 2**40)),
}
"""Kinds of stores, and what is done to them."""

LONG = {
    "a million bad partials": ("explicit_merged", many_bad_partials),
    "a tenth of a million partials": ("explicit_merged", lambda p: many_partials(p, 10**5)),
    "a million partials": ("explicit_merged", many_partials),
}
"""Stores that are as large as they say."""


def refused_in_little_memory(stores, tmp_path, measured, limit=LIMIT_NBYTES):
    """What reading each of these stores says, by store and reader, from one process."""
    for name, (kind, make_huge) in measured.items():
        make_huge(shutil.copytree(stores / kind, tmp_path / name))
    places = [argument for name in measured for argument in (tmp_path / name, str(limit))]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", MEASURED, Path(__file__).parent, *places],
        capture_output=True,
        text=True,
        timeout=540,  # so long only if something hangs, or takes time in vain
        # Threads of their own arenas reserve addresses, which the limit counts.
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "MALLOC_ARENA_MAX": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    refused = dict(map(json.loads, done.stdout.splitlines()))
    assert list(refused) == list(measured)
    return refused


needs_linux = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="the limit needs Linux"
)


@needs_linux
@pytest.mark.slow
def test_what_is_only_said_to_be_huge_takes_little_memory(stores, tmp_path):
    refused = refused_in_little_memory(stores, tmp_path, HUGE)
    # What decodes to much memory, but follows the format, is read: in little memory, all the same.
    assert {name for name in HUGE if "check" not in refused[name]} == {"zeros"}


@needs_linux
@pytest.mark.parametrize(
    ("what", "limit"),
    [
        pytest.param("a million bad partials", LIMIT_NBYTES, marks=pytest.mark.slow),
        pytest.param("a tenth of a million partials", LIMIT_NBYTES // 4, marks=pytest.mark.slow),
        pytest.param("a million partials", LIMIT_NBYTES, marks=pytest.mark.exhaustive),
    ],
)
def test_what_is_large_takes_memory_in_proportion(stores, tmp_path, what, limit):
    assert "check" in refused_in_little_memory(stores, tmp_path, {what: LONG[what]}, limit)[what]


@pytest.mark.parametrize("make_long", [many_partials, many_bad_partials])
@pytest.mark.parametrize("reader", ["describe", "check", "open_merged", "find_peaks"])
def test_work_is_in_proportion_to_the_entries_of_a_list(stores, tmp_path, reader, make_long):
    place = shutil.copytree(stores / "explicit_merged", tmp_path / "LONG")

    def look():
        # Threads that wait for each other call functions as often as they happen to wait.
        with contextlib.suppress(OcelotError), dask.config.set(scheduler="synchronous"):
            READERS[reader](place)

    def work(n):
        make_long(place, n)
        return calls_of(look)

    assert_linear(work, 4000)  # what Dask does besides varies by a thousand calls or two
