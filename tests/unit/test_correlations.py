"""Correlation tables of partials, and what the merged mean and deviation leave of them."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from pyarrow import parquet as pq

import ocelot_em
from builders import INDEXED, SPACE, indexed_maps
from ocelot_em import check, merge_arrays, read_correlations, write_partial
from ocelot_em.cli.exit_codes import DONE
from ocelot_em.cli.main import run
from ocelot_em.errors import (
    ChunkError,
    FormatError,
    IncompleteError,
    InputChangedError,
    InvalidInputError,
)
from ocelot_em.particles.correlations import COLUMNS
from ocelot_em.particles.gaussian import gaussian_cutoff
from ocelot_em.store import correlations
from ocelot_em.store.arrays import create_map, open_map
from ocelot_em.store.manifest import ArrayManifest
from ocelot_em.store.objects import open_objects

SHAPE, COUNTS = (70, 90), (1000, 1001, 1002)


def make_table(number, n, threshold=5.5):
    rng = np.random.default_rng((number, 9))
    return {
        "threshold": threshold,
        "global_idx": rng.integers(0, SPACE.n_poses, n, dtype=np.int32),
        "pos_y": rng.integers(0, SHAPE[0], n),
        "pos_x": rng.integers(0, SHAPE[1], n),
        "corr_value": (threshold + rng.exponential(1, n)).astype(np.float32) + np.float32(0.001),
    }


def make_results(rows=(3000, 0, 500)):
    return [
        indexed_maps(SHAPE, number) | {"correlation_table": make_table(number, n)}
        for number, n in enumerate(rows)
    ]


def write(place, results):
    for number, result in enumerate(results):
        name, count = f"gpu{number}", COUNTS[number]
        write_partial(place, name, result, total_projections=count, search=INDEXED)
    return place


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """A search and its result, in several chunks of maps and of columns, which differ."""
    place = tmp_path_factory.mktemp("tables")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ocelot_em.store.constants.DEFAULT_CHUNK", 32)
        patch.setattr(correlations, "ROWS_PER_CHUNK", 100)
        search = write(place / "RUN", make_results())
        ocelot_em.merge(search, place / "OUT", tile_size=24)
    return search, place / "OUT"


def all_rows(blocks):
    blocks = list(blocks)
    assert all(len(block["pos_y"]) <= 100 for block in blocks)
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def by_hand(results, merged, cutoff):
    """All rows at or above a cutoff, sorted."""
    maps = {name: merged[name].to_numpy() for name in ("correlation_mean", "correlation_std")}
    found = []
    for number, result in enumerate(results):
        table = result["correlation_table"]
        y, x, value = (table[name] for name in ("pos_y", "pos_x", "corr_value"))
        mean, std = (values[y, x].astype(np.float64) for values in maps.values())
        z = ((value - mean) / std).astype(np.float32)
        rows = zip(*(a.tolist() for a in (y, x, table["global_idx"], value, z)), strict=True)
        found += [(number, *row) for row in rows if row[-1] >= cutoff]
    return sorted(found)


@pytest.mark.parametrize("cutoff", [0, 6.5, None])
def test_tables_of_all_devices_with_the_merged_mean_and_deviation(stores, cutoff):
    search, output = stores
    assert check(search) == []
    rows = all_rows(read_correlations(output, cutoff=0))
    if cutoff is None:
        cutoff = ocelot_em.gaussian_cutoff(SHAPE[0] * SHAPE[1], sum(COUNTS))
        assert cutoff < 6
        rows = all_rows(read_correlations(output))
    elif cutoff:
        rows = all_rows(read_correlations(output, cutoff=cutoff))
    names = "partial", "pos_y", "pos_x", "global_index", "correlation", "zscore"
    found = sorted(zip(*(rows[name].tolist() for name in names), strict=True))
    expected = by_hand(make_results(), ocelot_em.open_merged(output), cutoff)
    assert 0 < len(expected) <= 3500
    assert found == expected
    poses = SPACE.decode(rows["global_index"])
    for name, values in zip(("phi", "theta", "psi", "relative_defocus"), poses, strict=False):
        np.testing.assert_array_equal(rows[name], values)


def test_info(stores, capsys):
    assert run(["info", str(stores[0])]) == DONE
    out = capsys.readouterr().out
    assert [f"{n} above 5.5" in out for n in ("3,000", "0", "500")] == [True] * 3


def test_export(stores, tmp_path, capsys):
    _, output = stores
    command = ["export", str(output), "--to", "correlations", "--output", str(tmp_path / "ROWS")]
    assert run([*command, "--cutoff", "6.5"]) == DONE
    written = pq.read_table(tmp_path / "ROWS")
    rows = all_rows(read_correlations(output, cutoff=6.5))
    assert f"{len(rows['pos_y']):,} of 3,500 correlations, cutoff 6.5000" in capsys.readouterr().out
    assert written.column_names == list(COLUMNS)
    for name, values in rows.items():
        np.testing.assert_array_equal(written[name], values)
    about = json.loads(written.schema.metadata[b"ocelot_em.about"])
    assert about == {"threshold": 5.5, "cutoff": 6.5}


def test_an_export_leaves_out_what_a_mask_excludes(stores, tmp_path):
    mask = np.indices(SHAPE).sum(axis=0) % 3 > 0
    np.save(tmp_path / "mask.npy", mask)
    words = ["export", stores[1], "--to", "correlations", "--output", tmp_path / "rows.parquet"]
    assert run([str(word) for word in [*words, "--mask", tmp_path / "mask.npy"]]) == DONE
    table = pq.read_table(tmp_path / "rows.parquet")
    about = json.loads(table.schema.metadata[b"ocelot_em.about"])
    searched = np.isfinite(ocelot_em.open_merged(stores[1])["scaled_mip"].to_numpy())
    assert about["cutoff"] == gaussian_cutoff(int((mask & searched).sum()), sum(COUNTS))
    rows = all_rows(read_correlations(stores[1], cutoff=about["cutoff"]))
    kept = mask[rows["pos_y"], rows["pos_x"]]
    assert 0 < kept.sum() < len(kept)
    assert table["zscore"].to_pylist() == rows["zscore"][kept].tolist()


def test_rows_of_a_montage_are_those_of_each_exposure_alone(tmp_path):
    """Also where another exposure is shown."""
    search_path, results = tmp_path / "RUN", {}
    for number in range(2):
        name, alone = f"e{number}", []
        for device in range(2):
            seed = 2 * number + device
            table = make_table(seed, 400, threshold=5.5 + number)
            alone.append(indexed_maps(SHAPE, seed) | {"correlation_table": table})
            exposure = ocelot_em.Exposure(name, origin=(20 * number, 30 * number), acquired=number)
            search = replace(INDEXED, exposure=exposure)
            count = COUNTS[seed % 3]
            write_partial(
                search_path, f"gpu{device}", alone[-1], total_projections=count, search=search
            )
            plain = tmp_path / name
            write_partial(plain, f"gpu{device}", alone[-1], total_projections=count, search=INDEXED)
        ocelot_em.merge(plain, tmp_path / f"{name}-merged")
        results[name] = all_rows_of_any_length(read_correlations(tmp_path / f"{name}-merged"))
        assert {*results[name].pop("micrograph").tolist()} == {f"{name}-merged"}
    ocelot_em.merge(search_path, tmp_path / "OUT", tile_size=64)
    rows = all_rows_of_any_length(read_correlations(tmp_path / "OUT"))
    for name, expected in results.items():
        of_one = all_rows_of_any_length(read_correlations(tmp_path / "OUT", exposure=name))
        own = rows["exposure"] == name
        assert 0 < len(expected["pos_y"]) == own.sum() == len(of_one["pos_y"])
        order = [np.lexsort([own[c] for c in expected]) for own in (expected, of_one)]
        for column, values in expected.items():
            np.testing.assert_array_equal(values[order[0]], of_one[column][order[1]])
            np.testing.assert_array_equal(rows[column][own], of_one[column])
    with pytest.raises(InvalidInputError, match=r"expected one of e0.*, got 'nine'"):
        read_correlations(tmp_path / "OUT", exposure="nine")
    output = tmp_path / "ROWS"
    command = ["export", str(tmp_path / "OUT"), "--to", "correlations", "--output", str(output)]
    assert run(command) == DONE
    assert pq.read_table(output)["exposure"].to_pylist() == rows["exposure"].tolist()
    about = json.loads(pq.read_schema(output).metadata[b"ocelot_em.about"])
    assert [own[0] for own in about["exposures"].values()] == [5.5, 6.5]


def test_rows_keep_their_order_in_a_chunk_of_the_maps(stores):
    _, output = stores
    table = make_results()[0]["correlation_table"]
    first = (table["pos_y"] < 24) & (table["pos_x"] < 24)
    rows = all_rows(read_correlations(output, cutoff=-100))
    n = first.sum()
    np.testing.assert_array_equal(rows["correlation"][:n], table["corr_value"][first])


def test_the_highest_threshold_applies_to_all(tmp_path):
    results = make_results()
    results[2]["correlation_table"] = make_table(2, 500, threshold=6.0)
    ocelot_em.merge(write(tmp_path / "RUN", results), tmp_path / "OUT")
    rows = all_rows_of_any_length(read_correlations(tmp_path / "OUT", cutoff=-100))
    assert rows["correlation"].min() > 6.0
    n = (results[0]["correlation_table"]["corr_value"] > 6.0).sum()
    assert len(rows["pos_y"]) == n + 500


def all_rows_of_any_length(blocks):
    blocks = list(blocks)
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def test_of_results_that_were_merged_in_steps(tmp_path):
    results = make_results()
    write(tmp_path / "RUN", results)
    ocelot_em.merge(tmp_path / "RUN", tmp_path / "FIRST")
    later = indexed_maps(SHAPE, 7) | {"correlation_table": make_table(7, 40)}
    write_partial(tmp_path / "LATER", "gpu3", later, total_projections=900, search=INDEXED)
    ocelot_em.merge([tmp_path / "FIRST", tmp_path / "LATER"], tmp_path / "OUT")
    rows = all_rows_of_any_length(read_correlations(tmp_path / "OUT", cutoff=-100))
    assert np.bincount(rows["partial"]).tolist() == [3000, 0, 500, 40]


def test_a_node_merges_the_tables_of_its_devices(tmp_path):
    results = make_results()
    one, several = tmp_path / "ONE", tmp_path / "SEVERAL"
    ocelot_em.merge(write(several, results), tmp_path / "SEVERAL_OUT")
    node = merge_arrays(results, search_space=SPACE)
    write_partial(one, "node", node, total_projections=sum(COUNTS), search=INDEXED)
    ocelot_em.merge(one, tmp_path / "ONE_OUT")
    tables = [
        all_rows_of_any_length(read_correlations(tmp_path / f"{name}_OUT", cutoff=0))
        for name in ("ONE", "SEVERAL")
    ]
    names = "pos_y", "pos_x", "global_index", "correlation"
    one, several = (sorted(zip(*(t[n].tolist() for n in names), strict=True)) for t in tables)
    assert one == several


def change(name, value):
    return lambda table: table.__setitem__(name, value)


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("pos_x", np.full(500, 90), "pos_x: expected 0 to 89, got 90 to 90"),
        ("pos_y", np.full(500, -1), "pos_y: expected 0 to 69, got -1 to -1"),
        ("global_idx", np.full(500, 10**6), "global_idx: expected 0 to"),
        ("global_idx", np.zeros(500), "global_idx: expected integers, got float64"),
        ("corr_value", np.full(500, np.nan, "f4"), "expected finite values above the threshold"),
        ("corr_value", np.full(500, 5.5, "f4"), "expected finite values above the threshold 5.5"),
        ("threshold", np.nan, "expected a finite threshold"),
        ("pos_x", None, "expected columns"),
    ],
)
def test_refusals(tmp_path, name, value, problem):
    result = indexed_maps(SHAPE) | {"correlation_table": make_table(0, 500)}
    result["correlation_table"][name] = value
    if value is None:
        del result["correlation_table"][name]
    with pytest.raises(InvalidInputError) as caught:
        write_partial(tmp_path / "RUN", "gpu0", result, total_projections=9, search=INDEXED)
    assert any(problem in found for found in caught.value.problems), caught.value.problems
    assert not (tmp_path / "RUN").exists()


def test_what_cannot_be_read_is_named(stores, tmp_path):
    search, output = stores
    extra = tmp_path / "EXTRA"
    write_partial(extra, "gpu9", indexed_maps(SHAPE), total_projections=9, search=INDEXED)
    ocelot_em.merge([search, extra], tmp_path / "BOTH")
    with pytest.raises(IncompleteError, match=r"1 of 4 partials have no correlation table.*gpu9"):
        read_correlations(tmp_path / "BOTH")
    (search / "partials/gpu1").rename(search / "gpu1")
    try:
        with pytest.raises(InputChangedError, match="gpu1"):
            read_correlations(output)
    finally:
        (search / "gpu1").rename(search / "partials/gpu1")


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("global_idx", "swapped"),
        ("offsets", "swapped"),
        ("corr_value", "flipped"),
        ("pos_y", "lost"),
    ],
)
def test_a_chunk_that_is_not_the_one_written(stores, name, damage):
    search, output = stores
    chunk = search / "partials/gpu0/correlation_table" / name / "c/0"
    written = chunk.read_bytes()
    if damage == "lost":
        chunk.unlink()
    elif damage == "swapped":
        shutil.copy(search / "partials/gpu2/correlation_table" / name / "c/0", chunk)
    else:
        middle = len(written) // 2
        chunk.write_bytes(written[:middle] + bytes([written[middle] ^ 4]) + written[middle + 1 :])
    try:
        with pytest.raises(ChunkError, match=f"'gpu0': correlation_table/{name}"):
            list(read_correlations(output, cutoff=0))
        assert any(f"'gpu0': correlation_table/{name}" in problem for problem in check(search))
    finally:
        chunk.write_bytes(written)


def test_a_manifest_for_other_chunks_is_refused():
    """Or looking up a checksum would fail later, without a place."""
    objects = open_objects("memory://other-chunks")
    digest = create_map(objects, "mip", "mip", (64, 64), (32, 32))
    for counts in ((1, 1), (2, 3)):
        expected = ArrayManifest(digest, np.zeros(counts, np.uint32))
        with pytest.raises(FormatError, match=r"MIP: expected \(.*got \(2, 2\)"):
            open_map(objects, "mip", "MIP", ("float32",), expected)
