"""Writing partials: what is refused, what is left behind, and how many may write at once."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch

from builders import (
    INDEXED,
    SPACE,
    explicit_maps,
    idle_maps,
    indexed_maps,
    root_of,
    same_bits,
    snapshot,
    unsealed,
    write_explicit_search,
    write_indexed_search,
    write_one_partial,
)
from ocelot_em import (
    PartialWriter,
    Region,
    SearchInfo,
    SearchSpace,
    check,
    describe,
    import_results,
    merge,
    open_merged,
    open_partials,
    write_partial,
)
from ocelot_em.errors import (
    FormatError,
    IncompleteError,
    InvalidDataError,
    InvalidInputError,
    StoreNotFoundError,
    TilesFailedError,
)
from ocelot_em.model.maps import INDEX, MIP, PIXEL_SIZE, SQUARED_SUM, SUM
from ocelot_em.store import attributes as fmt
from ocelot_em.store import groups, partials, validation
from ocelot_em.store import search as searches
from ocelot_em.store import sources as sources_module
from ocelot_em.store.manifest import find_manifest
from ocelot_em.store.objects import open_objects
from ocelot_em.store.roster import register


def refusal_of(call, *arguments, **options):
    with pytest.raises(InvalidInputError) as refusal:
        call(*arguments, **options)
    return refusal.value.problems


def assert_mentions(problems, *parts):
    """Every part is in a problem of its own."""
    for part in parts:
        assert any(part in problem for problem in problems), (part, problems)
    assert len(problems) == len(parts), problems


def assert_written(place, name, maps):
    stored = open_partials(place).sel(partial=name)
    for key in stored.data_vars:
        assert same_bits(stored[key], np.asarray(maps[key], stored[key].dtype)), key


def change(maps, key, pixel, value):
    values = maps[key].copy()
    values[pixel] = value
    return maps | {key: values}


# What is written


@pytest.mark.parametrize("pixel_size", [True, False])
def test_explicit_poses_with_and_without_pixel_size(tmp_path, pixel_size):
    maps = explicit_maps(pixel_size=pixel_size)
    write_partial(tmp_path / "R", "gpu0", maps, total_projections=9)
    assert_written(tmp_path / "R", "gpu0", maps)
    assert (PIXEL_SIZE in open_partials(tmp_path / "R")) == pixel_size


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_indexed_poses(tmp_path, dtype):
    maps = indexed_maps(dtype=dtype)
    write_partial(tmp_path / "R", "gpu0", maps, total_projections=9, search=INDEXED)
    assert_written(tmp_path / "R", "gpu0", maps)
    assert set(open_partials(tmp_path / "R").data_vars) == set(maps)


def test_the_search_says_the_form_where_maps_have_both(tmp_path):
    both = explicit_maps() | indexed_maps()
    write_partial(tmp_path / "E", "gpu0", both, total_projections=9)
    write_partial(tmp_path / "I", "gpu0", both, total_projections=9, search=INDEXED)
    assert INDEX not in open_partials(tmp_path / "E")
    assert "best_phi" not in open_partials(tmp_path / "I")


@pytest.mark.parametrize(
    "convert",
    [
        torch.from_numpy,
        lambda array: torch.from_numpy(array).requires_grad_(array.dtype.kind == "f"),
        np.asfortranarray,
        lambda array: array.astype(array.dtype.newbyteorder(">")),
        lambda array: np.repeat(array, 2, axis=1)[:, ::2],
    ],
    ids=["torch", "torch-grad", "fortran", "big-endian", "strided"],
)
def test_arrays_of_any_library_and_layout(tmp_path, convert):
    maps = indexed_maps()
    converted = {key: convert(values) for key, values in maps.items()}
    count = torch.tensor(2**40 + 1)
    write_partial(tmp_path / "R", "gpu0", converted, total_projections=count, search=INDEXED)
    assert_written(tmp_path / "R", "gpu0", maps)
    assert describe(tmp_path / "R").attributes.total_projections == 2**40 + 1


def test_inputs_are_not_changed(tmp_path):
    maps = explicit_maps()
    before = {key: values.copy() for key, values in maps.items()}
    write_partial(tmp_path / "R", "gpu0", maps, total_projections=9)
    assert all(same_bits(maps[key], before[key]) for key in maps)


def test_what_partials_share_is_kept(tmp_path):
    info = SearchInfo(template_box=3, pixel_size_angstrom=1.5, search_space=SPACE)
    write_partial(tmp_path / "R", "gpu0", indexed_maps(), total_projections=9, search=info)
    attributes = describe(tmp_path / "R").attributes
    assert attributes.shape == (5, 6)
    assert attributes.valid_shape == (3, 4)
    assert attributes.pixel_size_angstrom == 1.5
    assert attributes.search_space_digest == SPACE.digest
    read = searches.read_search_space(open_objects(tmp_path / "R"), SPACE.digest)
    assert read is not None
    assert read.digest == SPACE.digest


@pytest.mark.parametrize("indexed", [True, False])
def test_an_idle_device_is_a_partial_that_changes_nothing(tmp_path, indexed):
    maps = indexed_maps() if indexed else explicit_maps()
    info = INDEXED if indexed else None
    for name in ("A", "B"):
        write_partial(tmp_path / name, "gpu0", maps, total_projections=9, search=info)
    idle = idle_maps(maps)
    write_partial(tmp_path / "B", "idle", idle, total_projections=0, order=-1, search=info)
    for name in ("A", "B"):
        assert check(tmp_path / name) == []
        merge(tmp_path / name, tmp_path / f"{name}.out")
    alone, with_idle = open_merged(tmp_path / "A.out"), open_merged(tmp_path / "B.out")
    for key in set(alone) - {"best_partial"}:
        assert same_bits(alone[key], with_idle[key]), key
    assert (with_idle["best_partial"] == 1).all()


class OnGpu:
    """An array on a GPU, which notes the most pixels that were brought to the host at once."""

    __cuda_array_interface__ = None
    most_pixels = 0

    def __init__(self, values):
        self._values, self.shape, self.dtype = values, values.shape, values.dtype

    def __getitem__(self, where):
        return OnGpu(self._values[where])

    def get(self):
        OnGpu.most_pixels = max(OnGpu.most_pixels, self._values.size)
        return self._values.copy()


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr(OnGpu, "most_pixels", 0)
    return lambda maps: {key: OnGpu(values) for key, values in maps.items()}


@pytest.mark.parametrize("indexed", [True, False])
def test_maps_on_a_gpu_come_to_the_host_in_bands(tmp_path, small_chunks, on_gpu, indexed):
    maps = (indexed_maps if indexed else explicit_maps)((5 * small_chunks + 3, 40))
    info = INDEXED if indexed else None
    write_partial(tmp_path / "R", "gpu0", on_gpu(maps), total_projections=9, search=info)
    assert OnGpu.most_pixels == small_chunks * 40
    assert_written(tmp_path / "R", "gpu0", maps)


def test_what_is_wrong_in_several_bands_is_said_once(tmp_path, small_chunks, on_gpu):
    maps = indexed_maps((3 * small_chunks, 40))
    for pixel, index in (((2, 3), -7), ((40, 5), 900), ((95, 39), 60)):
        maps[INDEX][pixel] = index
    maps[INDEX][70, 1:4] = -1
    maps[SUM][33, 2] = maps[SUM][34, 0] = maps[SUM][90, 7] = np.nan
    problems = refusal_of(
        write_partial, tmp_path / "R", "a", on_gpu(maps), total_projections=-1, search=INDEXED
    )
    assert_mentions(
        problems,
        f"a: {SUM}: NaN at 3 pixels, first (33, 2)",
        f"a: {INDEX}: expected -1 to 41, got -7 to 900 at 3 pixels, first (2, 3); either",
        f"a: {INDEX}: -1 where {MIP} was searched at 3 pixels, first (70, 1)",
        "total_projections: expected",
    )
    assert OnGpu.most_pixels == small_chunks * 40
    assert not (tmp_path / "R").exists()


@pytest.mark.parametrize("imported", [False, True])
def test_each_value_is_validated_once(tmp_path, monkeypatch, small_chunks, imported):
    maps = explicit_maps((2 * small_chunks + 3, 40))
    looked_at = Counter()
    look = validation.BadValues.look

    def watched(self, part, origin):
        looked_at.update({name: values.size for name, values in part.items()})
        look(self, part, origin)

    monkeypatch.setattr(validation.BadValues, "look", watched)
    if imported:
        np.savez(tmp_path / "gpu0.npz", total_projections=9, **maps)
        import_results([tmp_path / "gpu0.npz"], tmp_path / "R")
    else:
        write_partial(tmp_path / "R", "gpu0", maps, total_projections=9)
    assert looked_at[MIP] == looked_at[SUM] == maps[MIP].size
    assert_written(tmp_path / "R", "gpu0", maps)
    nan = change(maps, SUM, (0, 0), np.nan)
    with (
        pytest.raises(InvalidDataError, match="NaN at 1 pixel"),
        PartialWriter(tmp_path / "R", "gpu1", maps[MIP].shape, total_projections=9) as writer,
    ):
        writer.write(Region.whole(maps[MIP].shape), nan)


def test_lists_are_maps_too(tmp_path):
    maps = explicit_maps()
    listed = maps | {SUM: maps[SUM].tolist()}
    write_partial(tmp_path / "R", "gpu0", listed, total_projections=9)
    assert_written(tmp_path / "R", "gpu0", listed)


# What is refused, and leaves nothing behind


BAD_EXPLICIT = {
    "a missing map": (lambda m: {k: v for k, v in m.items() if k != SUM}, f"{SUM}: missing"),
    "another shape": (
        lambda m: m | {SUM: m[SUM][:4]},
        f"{SUM}: expected shape (5, 6), got (4, 6)",
    ),
    "another dtype": (
        lambda m: m | {MIP: m[MIP].astype(np.float64)},
        f"{MIP}: expected dtype float32, got float64",
    ),
    "half precision": (
        lambda m: m | {"best_phi": m["best_phi"].astype(np.float16)},
        "best_phi: expected dtype float32, got float16",
    ),
    "bfloat16": (
        lambda m: m | {SUM: torch.zeros((5, 6), dtype=torch.bfloat16)},
        f"{SUM}: cannot become a NumPy array",
    ),
    "NaN": (lambda m: change(m, MIP, (2, 3), np.nan), f"{MIP}: NaN at 1 pixel, first (2, 3)"),
    "NaN pose": (lambda m: change(m, "best_psi", (4, 5), np.nan), "best_psi: NaN at 1 pixel"),
    "infinite": (
        lambda m: change(m, MIP, (2, 3), np.inf),
        f"{MIP}: NaN or infinite at 1 pixel, first (2, 3)",
    ),
    "infinite pose": (
        lambda m: change(m, "best_psi", (4, 5), np.inf),
        "best_psi: NaN or infinite at 1 pixel, first (4, 5)",
    ),
    "infinite sum": (
        lambda m: change(m, SUM, (0, 1), -np.inf),
        f"{SUM}: NaN or infinite at 1 pixel, first (0, 1)",
    ),
    "infinite squared sum": (
        lambda m: change(m, SQUARED_SUM, (0, 1), np.inf),
        f"{SQUARED_SUM}: NaN or infinite at 1 pixel, first (0, 1)",
    ),
    "negative squared sum": (
        lambda m: change(m, SQUARED_SUM, (3, 1), -1.0),
        f"{SQUARED_SUM}: negative at 1 pixel, first (3, 1)",
    ),
    "masked": (
        lambda m: m | {MIP: np.ma.masked_greater(change(m, MIP, (1, 2), 99.0)[MIP], 98)},
        f"{MIP}: cannot become a NumPy array: expected no masked elements, got 1",
    ),
}
BAD_INDEXED = {
    "an index beyond": (
        lambda m: change(m, INDEX, (1, 1), SPACE.n_poses),
        f"{INDEX}: expected -1 to 41, got 42 to 42 at 1 pixel, first (1, 1)",
    ),
    "an index below": (lambda m: change(m, INDEX, (0, 0), -2), "got -2 to -2 at 1 pixel"),
    "an index beyond 32 bits": (
        lambda m: change(m | {INDEX: m[INDEX].astype(np.int64)}, INDEX, (0, 0), 2**32),
        f"got {2**32} to {2**32}",
    ),
    "-1 where it was searched": (
        lambda m: change(m, INDEX, (0, 5), -1),
        f"{INDEX}: -1 where {MIP} was searched at 1 pixel, first (0, 5)",
    ),
    "a floating index": (
        lambda m: m | {INDEX: m[INDEX].astype(np.float32)},
        f"{INDEX}: expected dtype int32 or int64, got float32",
    ),
}


def test_a_masked_array_without_masked_elements_is_a_map(tmp_path):
    maps = explicit_maps()
    masked = {key: np.ma.masked_array(values) for key, values in maps.items()}
    write_partial(tmp_path / "R", "gpu0", masked, total_projections=9)
    assert_written(tmp_path / "R", "gpu0", maps)


@pytest.mark.parametrize("bad", BAD_EXPLICIT)
def test_bad_explicit_maps_are_refused_and_nothing_is_written(tmp_path, bad):
    spoil, problem = BAD_EXPLICIT[bad]
    problems = refusal_of(
        write_partial, tmp_path / "R", "gpu0", spoil(explicit_maps()), total_projections=9
    )
    assert_mentions(problems, problem)
    assert problems[0].startswith("gpu0: ")
    assert not (tmp_path / "R").exists()


@pytest.mark.parametrize("bad", BAD_INDEXED)
def test_bad_indexed_maps_are_refused_and_nothing_is_written(tmp_path, bad):
    spoil, problem = BAD_INDEXED[bad]
    maps = spoil(indexed_maps())
    problems = refusal_of(
        write_partial, tmp_path / "R", "gpu0", maps, total_projections=9, search=INDEXED
    )
    assert_mentions(problems, problem)
    assert not (tmp_path / "R").exists()


def test_an_index_out_of_range_comes_with_the_hint_to_leopard_em(tmp_path):
    maps = change(indexed_maps(), INDEX, (1, 1), SPACE.n_poses)
    with pytest.raises(InvalidDataError, match=r"Leopard-EM 1\.2's wrong index in the last batch"):
        write_partial(tmp_path / "R", "gpu0", maps, total_projections=9, search=INDEXED)


@pytest.mark.parametrize("shape", [(), (5,), (2, 5, 6), (0, 6), (5, 0)])
def test_maps_that_are_no_maps_are_refused(tmp_path, shape):
    maps = {key: np.zeros(shape, np.float32) for key in explicit_maps()}
    problems = refusal_of(write_partial, tmp_path / "R", "gpu0", maps, total_projections=9)
    assert str(shape) in problems[0]
    assert not (tmp_path / "R").exists()


def test_a_missing_count_is_refused(tmp_path):
    with pytest.raises(TypeError, match="total_projections"):
        write_partial(tmp_path / "R", "gpu0", explicit_maps())  # type: ignore[call-arg]


@pytest.mark.parametrize(
    "count",
    [None, 5.0, np.float32(2e7), True, np.True_, -1, 2**62 + 1, "5", [1, 2], torch.tensor(5.0)],
    ids=repr,
)
def test_a_count_that_is_no_exact_integer_is_refused(tmp_path, count):
    problems = refusal_of(
        write_partial, tmp_path / "R", "gpu0", explicit_maps(), total_projections=count
    )
    assert_mentions(problems, "total_projections: expected")
    assert not (tmp_path / "R").exists()


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "../a", "a b", "-a", ".a", "å", "a\n", "a" * 129, "zarr.json"]
)
def test_a_bad_name_is_refused(tmp_path, name):
    problems = refusal_of(write_partial, tmp_path / "R", name, explicit_maps(), total_projections=9)
    assert_mentions(problems, "partial name")
    assert snapshot(tmp_path) == {}


@pytest.mark.parametrize(
    ("info", "problem"),
    [
        (SearchInfo(template_box=0), "template box: expected 1 to 5"),
        (SearchInfo(template_box=6), "template box: expected 1 to 5"),
        (SearchInfo(pixel_size_angstrom=0.0), "pixel size: expected a positive"),
        (SearchInfo(pixel_size_angstrom=float("nan")), "pixel size: expected a positive"),
    ],
)
def test_a_bad_search_is_refused(tmp_path, info, problem):
    problems = refusal_of(
        write_partial, tmp_path / "R", "a", explicit_maps(), total_projections=9, search=info
    )
    assert_mentions(problems, problem)
    assert not (tmp_path / "R").exists()


OTHER_SPACE = SearchSpace.from_tables(SPACE.euler_angles, SPACE.defocus_values, [0.0, 0.02])


@pytest.mark.parametrize(
    ("maps", "info", "keys"),
    [
        (indexed_maps((5, 7)), INDEXED, ["shape", "valid_shape"]),
        (indexed_maps(), SearchInfo(search_space=OTHER_SPACE), ["search_space_digest"]),
        (
            indexed_maps(),
            SearchInfo(search_space=SPACE, pixel_size_angstrom=2.0),
            ["pixel_size_angstrom"],
        ),
        (indexed_maps(), SearchInfo(search_space=SPACE, template_box=2), ["valid_shape"]),
        (explicit_maps(), SearchInfo(), ["pose_form", "search_space_digest"]),
        (
            explicit_maps(pixel_size=False),
            None,
            ["pose_form", "has_pixel_size", "search_space_digest"],
        ),
    ],
)
def test_a_partial_of_another_search_is_refused_and_nothing_changes(tmp_path, maps, info, keys):
    run = write_indexed_search(tmp_path / "R")
    before = snapshot(run)
    problems = refusal_of(write_partial, run, "late", maps, total_projections=9, search=info)
    assert_mentions(problems, *(f"{run}: {key}: the search has" for key in keys))
    assert snapshot(run) == before


def test_a_name_that_is_taken_is_refused_and_nothing_changes(tmp_path):
    run = write_explicit_search(tmp_path / "R")
    before = snapshot(run)
    problems = refusal_of(write_partial, run, "gpu1", explicit_maps(), total_projections=9)
    assert_mentions(problems, "a partial 'gpu1' is already there and complete")
    assert snapshot(run) == before


def test_a_merged_result_takes_no_partials(tmp_path):
    merge(write_explicit_search(tmp_path / "R"), tmp_path / "M")
    before = snapshot(tmp_path / "M")
    problems = refusal_of(
        write_partial, tmp_path / "M", "gpu9", explicit_maps(), total_projections=9
    )
    assert_mentions(problems, "expected a search, got a merged result")
    assert snapshot(tmp_path / "M") == before


@pytest.mark.parametrize("indexed", [True, False])
def test_a_count_of_0_where_something_was_searched_is_refused(tmp_path, indexed):
    maps, info = (indexed_maps(), INDEXED) if indexed else (explicit_maps(), None)
    problem = "total_projections: 0, but mip was searched, first at pixel (0, "
    place = tmp_path / "R"
    problems = refusal_of(write_partial, place, "a", maps, total_projections=0, search=info)
    assert_mentions(problems, problem)
    writer = PartialWriter(place, "a", maps[MIP].shape, total_projections=0, search=info)
    whole = Region.whole(maps[MIP].shape)
    with pytest.raises(InvalidDataError, match="but mip was searched"), writer:
        writer.write(whole, maps)

    # An earlier version took it.
    write_partial(place, "a", maps, total_projections=5, search=info)
    objects, path = open_objects(place), "partials/a"
    written = searches.read_partial_attributes(objects, "a")
    wrong = written.model_copy(update={"total_projections": 0})
    groups.replace_attributes(objects, path, fmt.dump_attributes(wrong))
    assert any(problem in found for found in check(place))
    for nan in ("raise", "mask"):
        with pytest.raises(TilesFailedError, match=r"partial 'a'.*but mip was searched.*--without"):
            merge(place, tmp_path / nan, nan=nan)


def test_values_out_of_bounds_come_in_one_message(tmp_path):
    options = {"total_projections": -1, "order": 10**400}
    problems = refusal_of(write_partial, tmp_path / "R", "a", explicit_maps(), **options)
    assert_mentions(problems, "expected a count from 0", f"order: expected at most {2**53}, got 1")
    assert not (tmp_path / "R").exists()


def test_all_problems_come_in_one_message(tmp_path):
    run = write_explicit_search(tmp_path / "R")
    before = snapshot(run)
    maps = change(explicit_maps(), MIP, (0, 0), np.nan)
    del maps["best_phi"]
    info = SearchInfo(template_box=2, pixel_size_angstrom=2.0)
    problems = refusal_of(write_partial, run, "gpu1", maps, total_projections=9.5, search=info)
    assert_mentions(
        problems,
        "best_phi: missing",
        f"{MIP}: NaN",
        "total_projections: expected an integer",
        "'gpu1' is already there",
        "valid_shape: the search has",
        "pixel_size_angstrom: the search has",
    )
    assert snapshot(run) == before


# Region by region


def write_in_bands(place, name, maps, edge, **options):
    shape = maps[MIP].shape
    with PartialWriter(place, name, shape, total_projections=9, **options) as writer:
        for y in reversed(range(0, shape[0], edge)):
            region = Region(y, min(y + edge, shape[0]), 0, shape[1])
            writer.write(region, {key: values[region.slices] for key, values in maps.items()})


@pytest.mark.parametrize("chunk_files", [False, True])
def test_regions_make_the_same_partial_as_the_whole(tmp_path, small_chunks, chunk_files):
    maps, info = explicit_maps((75, 40)), SearchInfo(chunk_files=chunk_files)
    write_partial(tmp_path / "A", "gpu0", maps, total_projections=9, search=info)
    maps |= {"notes": np.full((75, 40), "x")}
    write_in_bands(tmp_path / "B", "gpu0", maps, small_chunks, search=info)
    arrays = [
        find_manifest(open_objects(tmp_path / place), "partials/gpu0").arrays for place in "AB"
    ]
    for name in arrays[0].keys() | arrays[1].keys():
        ours, theirs = arrays[0][name], arrays[1][name]
        assert ours.metadata == theirs.metadata
        np.testing.assert_array_equal(ours.checksums, theirs.checksums)
    written = [name for name in snapshot(tmp_path / "A") if "/c/" in name and "manif" not in name]
    assert len(written) == (8 * 6 if chunk_files else 8)
    assert check(tmp_path / "A") == check(tmp_path / "B") == []


def test_a_partial_with_unwritten_regions_stays_incomplete(tmp_path, small_chunks):
    maps, region = explicit_maps((64, 40)), Region(0, 32, 0, 40)
    writer = PartialWriter(tmp_path / "R", "gpu0", (64, 40), total_projections=9)
    with pytest.raises(IncompleteError, match=r"2 of 4 chunks.*\[32:64, 0:32\]"), writer:
        writer.write(region, {key: values[region.slices] for key, values in maps.items()})
    register(open_objects(tmp_path / "R"), "", ["gpu1"])
    about = describe(tmp_path / "R")
    assert about.partials == (("gpu0", "writing", 9), ("gpu1", "missing", 0))
    assert about.unfinished_text.startswith("2 of 2 partials: gpu0, gpu1; unless")


@pytest.mark.parametrize(
    "region",
    [Region(0, 31, 0, 40), Region(1, 33, 0, 40), Region(0, 32, 0, 20), Region(64, 96, 0, 40)],
)
def test_a_misaligned_region_is_refused(tmp_path, small_chunks, region):
    maps = explicit_maps(region.shape)
    writer = PartialWriter(tmp_path / "R", "gpu0", (64, 40), total_projections=9)
    with pytest.raises(ValueError, match="not made of whole chunks"), writer:
        writer.write(region, maps)


def test_a_bad_region_is_refused_and_none_of_it_written(tmp_path, small_chunks):
    maps = change(explicit_maps((32, 40)), SUM, (3, 4), np.nan)
    writer = PartialWriter(tmp_path / "R", "gpu0", (64, 40), total_projections=9)
    with pytest.raises(InvalidDataError, match=r"NaN at 1 pixel, first \(35, 4\)"), writer:
        writer.write(Region(32, 64, 0, 40), maps)
    assert not [name for name in snapshot(tmp_path / "R") if "/c/" in name]


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (-1, 5), (2**31, 5)])
def test_a_writer_of_no_map_is_refused(tmp_path, shape):
    problems = refusal_of(PartialWriter, tmp_path / "R", "a", shape, total_projections=9)
    assert_mentions(problems, "shape: expected")
    assert not (tmp_path / "R").exists()


def test_a_writer_of_more_chunks_than_are_read_is_refused(tmp_path):
    with pytest.raises(InvalidInputError, match="at most 268,435,456 chunks"):
        PartialWriter(tmp_path / "RUN", "gpu0", (2**31 - 1, 2**31 - 1), total_projections=1)
    assert snapshot(tmp_path) == {}


def test_making_a_writer_writes_nothing(tmp_path):
    PartialWriter(tmp_path / "R", "a", (5, 6), total_projections=9)
    assert not (tmp_path / "R").exists()


# Writers that die


def assert_incomplete_and_can_be_written_again(run, name, maps):
    assert dict(p[:2] for p in describe(run).partials)[name] == "writing"
    with pytest.raises(IncompleteError, match=name):
        merge(run, run.parent / "OUT.zarr")
    assert not (run.parent / "OUT.zarr").exists()
    write_partial(run, name, maps, total_projections=77)
    assert_written(run, name, maps)
    assert check(run) == []


def test_an_exception_leaves_a_partial_that_is_refused_and_can_be_written_again(tmp_path):
    run, maps = write_explicit_search(tmp_path / "R"), explicit_maps(seed=9)

    def die_while_writing():
        with PartialWriter(run, "late", (5, 6), total_projections=5) as writer:
            writer.write(Region.whole((5, 6)), maps)
            raise RuntimeError("GPU fell off the bus")

    with pytest.raises(RuntimeError, match="GPU fell off the bus"):
        die_while_writing()
    assert describe(run).attributes.total_projections == 3003
    assert_incomplete_and_can_be_written_again(run, "late", maps)
    assert describe(run).attributes.total_projections == 3003 + 77


def test_a_killed_writer_leaves_a_partial_that_is_refused_and_can_be_written_again(tmp_path):
    run = write_explicit_search(tmp_path / "R")
    script = textwrap.dedent("""
        import sys, time
        from builders import explicit_maps
        from ocelot_em import PartialWriter, Region
        with PartialWriter(sys.argv[1], "late", (5, 6), total_projections=5) as writer:
            writer.write(Region.whole((5, 6)), explicit_maps())
            print("written", flush=True)
            time.sleep(60)
    """)
    tests = str(Path(__file__).parents[1])
    with subprocess.Popen(
        [sys.executable, "-c", script, str(run)],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([tests, *sys.path])},
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"written\n"
        writer.send_signal(signal.SIGKILL)
    assert_incomplete_and_can_be_written_again(run, "late", explicit_maps(seed=9))


def test_a_search_space_whose_writer_died_is_written_by_the_next(tmp_path):
    run = write_indexed_search(tmp_path / "R", n_partials=1)
    (run / "search_space" / "pixel_values" / "c" / "0").unlink()
    assert any("search_space" in problem for problem in check(run))
    write_partial(run, "next", indexed_maps(), total_projections=9, search=INDEXED)
    assert check(run) == []


def test_a_writer_that_was_replaced_does_not_complete(tmp_path):
    first, second = (
        PartialWriter(tmp_path / "R", "gpu0", (5, 6), total_projections=n) for n in (5, 6)
    )
    first.__enter__()
    second.__enter__()
    first.write(Region.whole((5, 6)), explicit_maps())
    with pytest.raises(IncompleteError, match="taken over by another writer"):
        first.__exit__(None, None, None)
    with pytest.raises(IncompleteError):
        merge(tmp_path / "R", tmp_path / "M")


# Several writers


def test_processes_may_write_partials_of_a_new_search_at_the_same_time(tmp_path):
    run, numbers = tmp_path / "R", range(8)
    with ProcessPoolExecutor(4, mp_context=get_context("spawn")) as pool:
        list(pool.map(write_one_partial, [run] * len(numbers), numbers))
    info = describe(run)
    assert [state for _, state, _ in info.partials] == ["complete"] * len(numbers)
    assert info.attributes.total_projections == sum(1000 + number for number in numbers)
    assert check(run) == []
    for number in numbers:
        assert_written(run, f"gpu{number}", indexed_maps((5, 6), number))


# Order, and reading back


def test_partials_come_by_order_and_then_as_people_count(tmp_path):
    names = [
        ("gpu10", 0),
        ("gpu9", 0),
        ("node2-gpu1", 0),
        ("node10-gpu1", 0),
        ("last", 1),
        ("z", -1),
    ]
    for name, order in names:
        write_partial(tmp_path / "R", name, explicit_maps(), total_projections=1, order=order)
    expected = ["z", "gpu9", "gpu10", "node2-gpu1", "node10-gpu1", "last"]
    assert open_partials(tmp_path / "R").partial.values.tolist() == expected
    _, [(exposure, sources)] = sources_module.open_sources(open_objects(tmp_path / "R"))
    assert exposure.id == ""
    assert [source.name for source in sources] == expected
    assert [source.first_number for source in sources] == list(range(6))


def test_opening_what_is_not_there(tmp_path):
    with pytest.raises(StoreNotFoundError):
        sources_module.open_sources(open_objects(tmp_path / "nothing"))
    assert not (tmp_path / "nothing").exists()


def test_a_search_without_partials_is_incomplete(tmp_path):
    partials.ensure_search(open_objects(tmp_path / "R"), (5, 6), SearchInfo())
    with pytest.raises(IncompleteError, match="no partials"):
        sources_module.open_sources(open_objects(tmp_path / "R"))


def edit_json(file, *keys, value):
    unsealed(root_of(file))
    document = json.loads(file.read_text())
    inner = document
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    file.write_text(json.dumps(document))


def test_a_map_of_another_shape_than_the_search_is_refused(tmp_path):
    run = write_explicit_search(tmp_path / "R")
    edit_json(run / "partials/gpu1/mip/zarr.json", "shape", value=[5, 4])
    for read in (open_partials, lambda place: merge(place, tmp_path / "M")):
        with pytest.raises(Exception, match=r"'gpu1': mip: expected shape \(5, 6\), got \(5, 4\)"):
            read(run)


def test_tables_that_were_exchanged_are_refused(tmp_path):
    run, other = write_indexed_search(tmp_path / "R"), tmp_path / "O"
    info = SearchInfo(search_space=OTHER_SPACE)
    write_partial(other, "gpu0", indexed_maps(), total_projections=9, search=info)
    table = "search_space/pixel_values/c/0"
    (run / table).write_bytes((other / table).read_bytes())
    with pytest.raises(FormatError, match="not the ones the search was written with"):
        searches.read_search_space(open_objects(run), SPACE.digest)
