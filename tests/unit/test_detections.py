"""Detections in correlation tables: those of a comparison of all pairs, in any chunks and runs."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet as pq
from scipy.spatial.transform import Rotation

import ocelot_em
from builders import idle_maps
from ocelot_em import SearchInfo, SearchSpace, find_detections, write_partial
from ocelot_em.cli.exit_codes import DONE, REFUSED
from ocelot_em.cli.main import run
from ocelot_em.errors import InputChangedError, InvalidInputError
from ocelot_em.kernels import build, suppression
from ocelot_em.particles import detections, peaks
from ocelot_em.particles.correlations import POSE_COLUMNS
from ocelot_em.particles.detections import DETECTION_COLUMNS
from ocelot_em.store import correlations

SHAPE, N, BOX = (50, 60), 1000, 7
ANGLES = [[20.0 * i, 15.0 * j, 6.0 * k] for i in range(3) for j in range(2) for k in range(4)]
SPACE = SearchSpace.from_tables(ANGLES, [-100.0, 100.0], [0.0])
TURNS = Rotation.from_euler("ZYZ", ANGLES, degrees=True)
BETWEEN = {
    name: np.degrees(
        [
            np.min([(one.inv() * g * TURNS).magnitude() for g in Rotation.create_group(name)], 0)
            for one in TURNS
        ]
    )
    for name in ("C1", "C4", "D3")
}
INFO = SearchInfo(search_space=SPACE, template_box=BOX)


def results(seed, n_rows=(150, 0, 70), n_values=30):
    """Results of devices with tables, of few different values so that there are ties."""
    rng = np.random.default_rng(seed)
    found = []
    for n in n_rows:
        mip = rng.uniform(6, 8, SHAPE).astype("f4")
        maps = {
            "mip": mip,
            "best_global_index": rng.integers(0, SPACE.n_poses, SHAPE, dtype=np.int32),
            "correlation_sum": np.float32(rng.choice([-100, 0, 100], SHAPE)),
            "correlation_squared_sum": np.full(SHAPE, 1.1 * N, "f4"),
        }
        table = {
            "threshold": 5.5,
            "global_idx": rng.integers(0, SPACE.n_poses, n, dtype=np.int32),
            "pos_y": rng.integers(0, SHAPE[0], n),
            "pos_x": rng.integers(0, SHAPE[1], n),
            "corr_value": (5.6 + rng.integers(0, n_values, n) / 8).astype("f4"),
        }
        found.append(maps | {"correlation_table": table})
    return found


def write(place, found):
    for number, result in enumerate(found):
        write_partial(place, f"gpu{number}", result, total_projections=N, search=INFO)
    return place


def rows_above(found, cutoff, group=0):
    """All rows at or above a cutoff: (-z, y, x, index, group, partial, correlation)."""
    count = N * len(found)
    mean, square = (
        sum(result[name].astype("f8") for result in found) / count
        for name in ("correlation_sum", "correlation_squared_sum")
    )
    mean, std = mean.astype("f4"), np.sqrt(square - mean**2).astype("f4")
    height, width = (edge - BOX + 1 for edge in SHAPE)
    rows = []
    for partial, result in enumerate(found):
        table = result["correlation_table"]
        names = "pos_y", "pos_x", "global_idx", "corr_value"
        for y, x, index, value in zip(*(table[name].tolist() for name in names), strict=True):
            z = float(np.float32((value - float(mean[y, x])) / float(std[y, x])))
            if z >= cutoff and y < height and x < width:
                rows.append((-z, y, x, index, group, partial, value))
    return rows


def by_all_pairs(found, cutoff, distance, angle, symmetry="C1"):
    """Detections as they are defined: (partial, y, x, index, correlation, z), highest first."""
    kept = suppressed(rows_above(found, cutoff), distance, angle, symmetry)
    return [(partial, y, x, index, value, -z) for z, y, x, index, _, partial, value in kept]


def suppressed(rows, distance, angle, symmetry="C1"):
    kept = []
    for row in sorted(rows):
        if not any(
            (row[1] - other[1]) ** 2 + (row[2] - other[2]) ** 2 < distance**2
            and BETWEEN[symmetry][row[3] % len(ANGLES), other[3] % len(ANGLES)] <= angle + 1e-4
            for other in kept
        ):
            kept.append(row)
    return kept


def all_rows(found):
    blocks = list(found)
    rows = {
        name: np.concatenate([np.empty(0, dtype), *(block[name] for block in blocks)])
        for name, dtype in found.columns.items()
    }
    names = {*rows["micrograph"].tolist()}
    assert names <= {found.correlations.result.url.rpartition("/")[2]}
    dtypes = {name: values.dtype for name, values in rows.items() if values.dtype.kind != "U"}
    own = {name: dtype for name, dtype in found.columns.items() if dtype != "str"}
    assert dtypes == own
    assert found.columns.items() >= DETECTION_COLUMNS.items()
    assert rows["rank"].tolist() == list(range(1, found.n_found + 1))
    return rows


def as_tuples(rows):
    names = "partial", "pos_y", "pos_x", "global_index", "correlation", "zscore"
    return list(zip(*(rows[name].tolist() for name in names), strict=True))


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """A search and its result, in several chunks of maps, tiles and chunks of columns."""
    place = tmp_path_factory.mktemp("detections")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ocelot_em.store.constants.DEFAULT_CHUNK", 32)
        patch.setattr(correlations, "ROWS_PER_CHUNK", 100)
        ocelot_em.merge(write(place / "RUN", results(1)), place / "OUT", tile_size=32)
    return place / "OUT"


@given(
    cutoff=st.sampled_from([-10.0, 6.0, 7.5, 9.9]),
    distance=st.sampled_from([0, 1, 1.5, 4, 5, 12, 500]),
    symmetry=st.sampled_from([*BETWEEN]),
    angle=st.sampled_from([0, 6, 11, 20, 45, 180]),
    run_rows=st.sampled_from([7, 60, 10_000]),
    block_rows=st.sampled_from([2, 30, 10_000]),
    n_cells=st.sampled_from([1, 8, 2**24]),
)
def test_rows_are_those_of_all_pairs(
    merged, cutoff, distance, symmetry, angle, run_rows, block_rows, n_cells
):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detections, "RUN_ROWS", run_rows)
        patch.setattr(detections, "_BLOCK_ROWS", block_rows)
        patch.setattr(peaks, "MAX_CELLS", n_cells)
        options = {
            "cutoff": cutoff,
            "min_distance": distance,
            "min_angle": angle,
            "symmetry": symmetry,
        }
        rows = all_rows(find_detections(merged, **options))
    expected = by_all_pairs(results(1), cutoff, distance, angle, symmetry)
    assert as_tuples(rows) == expected
    poses = SPACE.decode(rows["global_index"])
    for name, values in zip(("phi", "theta", "psi", "relative_defocus"), poses, strict=False):
        np.testing.assert_array_equal(rows[name], values)


def test_without_suppression_there_are_the_rows_of_leopard_em(tmp_path):
    """Leopard-EM 1.3 keeps every correlation above its threshold at the valid pixels.

    Beside them, it keeps the mean and the deviation over all poses.
    """
    height, width = (edge - BOX + 1 for edge in SHAPE)
    rng = np.random.default_rng(3)
    dense = rng.normal(0.1, 1.1, (SPACE.n_poses, height, width)).astype("f4")
    threshold, devices = 2.5, []
    for poses in np.array_split(np.arange(SPACE.n_poses), [11, 30]):
        own = dense[poses]
        pose, y, x = np.nonzero(own > threshold)
        table = {
            "threshold": threshold,
            "global_idx": poses[pose],
            "pos_y": y,
            "pos_x": x,
            "corr_value": own[pose, y, x],
        }
        devices.append(
            {
                "mip": own.max(axis=0),
                "best_global_index": poses[own.argmax(axis=0)].astype("i4"),
                "correlation_sum": own.sum(axis=0, dtype="f8"),
                "correlation_squared_sum": np.square(own, dtype="f8").sum(axis=0),
                "correlation_table": table,
            }
        )
        search = SearchInfo(search_space=SPACE)
        name, count = f"gpu{len(devices)}", len(poses)
        write_partial(tmp_path / "RUN", name, devices[-1], total_projections=count, search=search)
    ocelot_em.merge(tmp_path / "RUN", tmp_path / "OUT")
    rows = all_rows(find_detections(tmp_path / "OUT", cutoff=-100, min_distance=0))
    pose, y, x = np.nonzero(dense > threshold)
    z = (dense - dense.mean(axis=0, dtype="f8")) / dense.std(axis=0, dtype="f8")
    found = np.lexsort([rows[name] for name in ("pos_x", "pos_y", "global_index")])
    assert len(pose) > 1000
    for name, expected in (
        ("global_index", pose),
        ("pos_y", y),
        ("pos_x", x),
        ("correlation", dense[pose, y, x]),
    ):
        np.testing.assert_array_equal(rows[name][found], expected)
    np.testing.assert_allclose(rows["zscore"][found], z[pose, y, x], rtol=2e-6)
    assert (np.diff(rows["zscore"]) <= 0).all()


def test_exposures_do_not_suppress_each_other(tmp_path):
    alone = {}
    for number in range(2):
        name, found = f"e{number}", results(number)
        exposure = ocelot_em.Exposure(name, origin=(5 * number, 7 * number), acquired=number)
        for place, info in (("RUN", replace(INFO, exposure=exposure)), (name, INFO)):
            for device, result in enumerate(found):
                own = {"total_projections": N, "search": info}
                write_partial(tmp_path / place, f"gpu{device}", result, **own)
        ocelot_em.merge(tmp_path / name, tmp_path / f"{name}-OUT")
        alone[name] = as_tuples(all_rows(find_detections(tmp_path / f"{name}-OUT", cutoff=6)))
    ocelot_em.merge(tmp_path / "RUN", tmp_path / "OUT")
    found = find_detections(tmp_path / "OUT", cutoff=6)
    found.to_parquet(tmp_path / "ROWS")
    table = pq.read_table(tmp_path / "ROWS")
    rows = {name: table[name].to_numpy() for name in found.columns}
    assert rows["rank"].tolist() == list(range(1, sum(map(len, alone.values())) + 1))
    assert (np.diff(rows["zscore"]) <= 0).all()
    for name, expected in alone.items():
        own = rows["exposure"] == name
        assert 10 < len(expected) == own.sum()
        assert as_tuples({column: values[own] for column, values in rows.items()}) == expected
        of_one = find_detections(tmp_path / "OUT", cutoff=6, exposure=name)
        assert as_tuples({n: np.concatenate([b[n] for b in of_one]) for n in rows}) == expected
    only_first = np.zeros(ocelot_em.MergedResult.open(tmp_path / "OUT").valid_shape, bool)
    only_first[:5] = True  # no pixel of the other exposure
    masked = find_detections(tmp_path / "OUT", mask=only_first)
    assert [*masked.facts["exposures"]] == ["e0"]
    assert {name for rows in masked for name in rows["exposure"]} == {"e0"}


MORE_ANGLES = [[7.0 * i, 30.0, 12.0 * i] for i in range(35)]


@pytest.mark.parametrize("group_by", ["template", "sector"])
def test_groups_of_one_template_suppress_each_other(tmp_path, group_by):
    """Each row has the z-score of its group; templates have search spaces of their own."""
    spaces = {"A": SPACE, "B": SearchSpace.from_tables(MORE_ANGLES, [0.0], [0.0])}
    runs = {"A": results(5, (300,)), "B": results(6, (250,))}
    if group_by == "sector":
        stores, spaces["B"] = [tmp_path / "RUN"], SPACE
    else:
        stores = [tmp_path / name for name in runs]
    for number, (name, found) in enumerate(runs.items()):
        for result in found:  # poses of the smaller search space
            for own in (result, result["correlation_table"]):
                for key in {"best_global_index", "global_idx"} & {*own}:
                    own[key] %= spaces[name].n_poses
        info = replace(INFO, search_space=spaces[name])
        for place in {tmp_path / f"{name}-ALONE", stores[number % len(stores)]}:
            write_partial(place, name, found[0], total_projections=N, search=info)
    ocelot_em.merge(stores, tmp_path / "OUT", group_by=group_by)
    found = find_detections(tmp_path / "OUT", cutoff=6, min_distance=6, min_angle=25)
    rows = all_rows(found)
    every = [rows_above(own, 6, number) for number, own in enumerate(runs.values())]
    if group_by == "sector":
        expected = suppressed(sorted(every[0] + every[1]), 6, 25)
        assert len(expected) < sum(len(suppressed(own, 6, 25)) for own in every)
    else:
        expected = []
    zs = []
    for number, name in enumerate(runs):
        alone = tmp_path / f"{name}-OUT"
        ocelot_em.merge(tmp_path / f"{name}-ALONE", alone)
        zs.append(ocelot_em.open_merged(alone)["scaled_mip"].to_numpy())
        if group_by == "template":
            own = as_tuples(
                all_rows(find_detections(alone, cutoff=6, min_distance=6, min_angle=25))
            )
            expected += [(-z, y, x, index, number, *rest) for _, y, x, index, *rest, z in own]
    groups = [[*runs].index(name) for name in rows["group"]]
    names = "pos_y", "pos_x", "global_index", "correlation"
    kept = zip(-rows["zscore"], *(rows[name].tolist() for name in names[:3]), groups, strict=True)
    assert list(kept) == [row[:5] for row in sorted(expected)]
    second = np.array(
        [zs[1 - g][y, x] for g, y, x in zip(groups, rows["pos_y"], rows["pos_x"], strict=True)]
    )
    np.testing.assert_array_equal(rows["second_zscore"], second)
    np.testing.assert_array_equal(rows["zscore_difference"], rows["zscore"] - second)
    for name in runs:
        here = rows["group"] == name
        poses = spaces[name].decode(rows["global_index"][here])
        np.testing.assert_array_equal(
            np.stack(poses[:4]), [rows[n][here] for n in POSE_COLUMNS[:4]]
        )
    every = find_detections(tmp_path / "OUT").correlations
    pixels = np.prod([edge - BOX + 1 for edge in SHAPE])
    assert every.cutoff == ocelot_em.gaussian_cutoff(pixels, 2 * N, 1)
    assert [*every.facts["groups"]] == [*runs]
    (one,) = {*all_rows(find_detections(tmp_path / "OUT", cutoff=6, exposure="B"))["group"]}
    assert one == "B"


def test_command_line_after_a_move_of_the_search(tmp_path, capsys):
    ocelot_em.merge(write(tmp_path / "RUN", results(4)), tmp_path / "OUT")
    (tmp_path / "RUN").rename(tmp_path / "MOVED")
    output = tmp_path / "new" / "ROWS.parquet"
    command = ["detections", str(tmp_path / "OUT"), "--output", str(output), "--cutoff", "7"]
    assert run([*command[:3], str(output.with_suffix(".csv"))]) == REFUSED
    assert "ends in .parquet, got '.csv'" in capsys.readouterr().err.replace("\n", " ")
    assert run(command) != DONE
    assert "RUN" in capsys.readouterr().err
    command += ["--search", str(tmp_path / "MOVED"), "--min-distance", "8", "--min-angle", "30"]
    assert run(command) == DONE
    written, expected = pq.read_table(output), by_all_pairs(results(4), 7, 8, 30)
    out = capsys.readouterr().out
    assert f"{len(expected)} detections among" in out
    assert "of 220 correlations" in out
    assert "above threshold 5.5" in out.replace("\n", " ")
    rows = {name: written[name].to_numpy() for name in written.column_names}
    assert as_tuples(rows) == expected
    assert json.loads(written.schema.metadata[b"ocelot_em.about"]) == {
        "threshold": 5.5,
        "cutoff": 7.0,
        "min_distance_px": 8.0,
        "min_angle_degrees": 30.0,
        "symmetry": "C1",
    }
    assert written.schema.field("phi").metadata[b"unit"] == b"degree"
    assert run(command) != DONE
    assert "already there" in capsys.readouterr().err
    assert list(output.parent.iterdir()) == [output]


def test_both_selections_were_compiled_ahead(merged):
    suppression.suppress._ready.clear()
    all_rows(find_detections(merged))
    peaks.select_peaks([3, 1], [3, 1], [1.0, 2.0], 5)
    called = {f"{suppression.suppress.name} {types}" for types in suppression.suppress._ready}
    assert called
    assert called <= set(build.signatures())


def test_a_device_that_searched_nothing_needs_no_table(tmp_path):
    found = results(8)
    idle = idle_maps({name: found[0][name] for name in found[0].keys() - {"correlation_table"}})
    for number, result in enumerate([idle, *found]):
        own = {"total_projections": N if number else 0, "search": INFO, "order": number}
        write_partial(tmp_path / "RUN", f"gpu{number}", result, **own)
    ocelot_em.merge(tmp_path / "RUN", tmp_path / "OUT")
    rows = all_rows(find_detections(tmp_path / "OUT", cutoff=6, min_distance=0))
    expected = by_all_pairs(found, 6, 0, 0)
    assert as_tuples(rows) == [(number + 1, *rest) for number, *rest in expected]


def test_the_cutoff_follows_from_the_false_positives(merged):
    found = find_detections(merged, false_positives=5)
    pixels = np.prod([edge - BOX + 1 for edge in SHAPE])
    assert found.correlations.cutoff == ocelot_em.gaussian_cutoff(pixels, 3 * N, 5)
    with pytest.raises(InvalidInputError, match=r"option min_angl: .*mean min_angle"):
        find_detections(merged, min_angl=5)


def test_a_mask_leaves_out_rows_and_pixels_of_the_cutoff(merged, tmp_path, capsys):
    allowed = np.zeros([edge - BOX + 1 for edge in SHAPE], bool)
    allowed[5:30, 10:40] = True
    found = find_detections(merged, mask=allowed)
    assert found.correlations.cutoff == ocelot_em.gaussian_cutoff(25 * 30, 3 * N, 1)
    every = all_rows(find_detections(merged, cutoff=6, min_distance=0))
    rows = all_rows(find_detections(merged, cutoff=6, min_distance=0, mask=allowed))
    kept = allowed[every["pos_y"], every["pos_x"]]
    assert 0 < len(rows["rank"]) < len(kept)
    for name in {*rows} - {"rank"}:
        np.testing.assert_array_equal(rows[name], every[name][kept])
    np.save(tmp_path / "ice.npy", allowed)
    command = [
        "detections",
        merged,
        "--output",
        tmp_path / "ICE.parquet",
        "--mask",
        tmp_path / "ice.npy",
    ]
    assert run([*map(str, command), "--cutoff", "6"]) == DONE
    assert "mask ice.npy of the map" in capsys.readouterr().out.replace("\n", " ")
    about = json.loads(pq.read_schema(tmp_path / "ICE.parquet").metadata[b"ocelot_em.about"])
    assert about["area"] == "mask ice.npy of the map"


def test_another_search_is_refused(merged, tmp_path):
    write(tmp_path / "OTHER", results(5))
    with pytest.raises(InputChangedError, match=r"OTHER.*gpu0"):
        find_detections(merged, search=tmp_path / "OTHER")
