"""Montages: exposures that are merged alone and laid on a canvas are what a merge gives at once."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from benchmarks.montage import montage_of, peak_of
from hypothesis import given
from hypothesis import strategies as st

import ocelot_em
from builders import unsealed
from helpers import assert_same_maps, chunk_bytes, combinations, expensive, read_maps
from montages import SHOTS, Shot, merged_alone, write_shots
from ocelot_em.errors import (
    FormatError,
    IncompleteError,
    InvalidInputError,
    OutputExistsError,
    TilesFailedError,
)
from ocelot_em.io.hdf5 import write_hdf5
from ocelot_em.io.ome_zarr import read_level, write_ome_zarr
from ocelot_em.merge import resume
from ocelot_em.model.maps import MAPS, AnyArray, PoseForm
from ocelot_em.model.options import MergeOptions
from ocelot_em.run.api import plan_merge
from ocelot_em.store.creation import ensure_search
from ocelot_em.store.local import LocalObjects
from ocelot_em.store.objects import open_objects
from ocelot_em.store.partials import write_partial
from ocelot_em.store.search_info import Exposure, SearchInfo
from ocelot_em.testing.simulation import Simulation, simulate

FILL = {name: info.fill for name, info in MAPS.items()}


def laid(
    alone: dict[str, dict[str, AnyArray]], shots: Sequence[Shot], overlap: str, erode: int = 0
) -> dict[str, AnyArray]:
    """Place exposures on a canvas pixel by pixel, the obvious way; numbers are places in shots."""
    top = min(0, *(int(s.origin[0]) + erode for s in shots))
    left = min(0, *(int(s.origin[1]) + erode for s in shots))
    shape = tuple(
        max(int(s.origin[k]) + s.valid_shape[k] - erode for s in shots) - (top, left)[k]
        for k in (0, 1)
    )
    names = next(iter(alone.values()))
    canvas = {n: np.full(shape, FILL[n], values.dtype) for n, values in names.items()}
    canvas["source_exposure"] = np.full(shape, -1, np.int32)
    best: dict[tuple[int, int], tuple[float, ...]] = {}
    for number, shot in enumerate(shots):
        maps, (height, width) = alone[shot.id], shot.valid_shape
        for y in range(erode, height - erode):
            for x in range(erode, width - erode):
                searched = maps["mip"][y, x] > -np.inf
                reach = min(y - erode, height - erode - 1 - y, x - erode, width - erode - 1 - x)
                rank = {"earliest": 0.0, "max-zscore": float(maps["scaled_mip"][y, x])}.get(
                    overlap, float(reach)
                )
                key = (float(searched), rank if searched else 0.0, -shot.acquired, -number)
                at = y + int(shot.origin[0]) - top, x + int(shot.origin[1]) - left
                if at not in best or key > best[at]:
                    best[at] = key
                    for name, values in maps.items():
                        canvas[name][at] = values[y, x]
                    canvas["source_exposure"][at] = number
    return canvas


@pytest.fixture(scope="module")
def separate(tmp_path_factory):
    """A montage and its exposures merged alone, by form; nobody may change them."""

    @cache
    def made(form):
        place, indexed = tmp_path_factory.mktemp(form), form == "indexed"
        search = write_shots(place / "RUN.zarr", SHOTS, indexed=indexed)
        return search, {shot.id: merged_alone(place, shot, indexed=indexed) for shot in SHOTS}

    return made


OVERLAPS = ["earliest", "max-zscore", "farthest-from-edge"]
FORMS = ["explicit", "indexed"]


@pytest.mark.parametrize(
    ("overlap", "form", "erode"),
    combinations(
        *(OVERLAPS, FORMS, [0, 2]),
        fast=[
            ("earliest", "explicit", 0),
            ("max-zscore", "indexed", 2),
            ("farthest-from-edge", "explicit", 2),
        ],
    ),
)
def test_a_montage_is_each_exposure_merged_alone_and_placed(
    tmp_path, separate, overlap, form, erode
):
    search, alone = separate(form)
    expected = laid(alone, SHOTS, overlap, erode)
    options = {"overlap": overlap, "erode": erode}
    for size in (1024, 16):
        output = tmp_path / f"OUT{size}.zarr"
        ocelot_em.merge(search, output, tile_size=size, **options)
        assert_same_maps(expected, read_maps(output))
        assert ocelot_em.check(output) == []
    lazy = ocelot_em.lazy_merge(search, tile_size=26, **options).compute()
    assert_same_maps(expected, {name: lazy[name].values for name in lazy})
    opened = ocelot_em.open_merged(tmp_path / "OUT16.zarr").compute()
    assert_same_maps(expected, {name: opened[name].values for name in opened})
    numbers = dict(zip(opened.attrs["exposure_numbers"], opened.attrs["exposures"], strict=True))
    assert numbers == dict(enumerate(s.id for s in SHOTS))


@pytest.mark.slow
@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("erode", [0, 2])
def test_so_is_one_of_many_small_tiles(tmp_path, separate, overlap, form, erode):
    search, alone = separate(form)
    output = tmp_path / "OUT.zarr"
    ocelot_em.merge(search, output, tile_size=7, overlap=overlap, erode=erode)
    assert_same_maps(laid(alone, SHOTS, overlap, erode), read_maps(output))
    assert ocelot_em.check(output) == []


shots = st.lists(
    st.builds(
        lambda origin, acquired, valid, margin, counts, idle: Shot(
            "",
            origin,
            acquired,
            (valid[0] + margin[0], valid[1] + margin[1]),
            valid,
            tuple(counts),
            idle,
        ),
        st.tuples(st.integers(-9, 20), st.integers(-9, 20)),
        st.integers(0, 3),
        st.tuples(st.integers(1, 12), st.integers(1, 12)),
        st.tuples(st.integers(0, 3), st.integers(0, 3)),
        st.lists(st.integers(1, 9), min_size=1, max_size=3),
        st.integers(0, 5).map(lambda n: n == 0),
    ),
    min_size=1,
    max_size=5,
).map(lambda drawn: [replace(shot, id=f"e{k}") for k, shot in enumerate(drawn)])


@expensive
@given(
    shots,
    st.sampled_from(["earliest", "max-zscore", "farthest-from-edge"]),
    st.sampled_from([5, 8, 1024]),
)
def test_drawn_montages_are_their_exposures(tmp_path_factory, drawn, overlap, size):
    folder = tmp_path_factory.mktemp("montage")
    search = write_shots(folder / "RUN.zarr", drawn)
    alone = {shot.id: merged_alone(folder, shot) for shot in drawn}
    ocelot_em.merge(search, folder / "OUT.zarr", tile_size=size, overlap=overlap)
    assert_same_maps(laid(alone, drawn, overlap), read_maps(folder / "OUT.zarr"))


def test_an_exposure_that_comes_later_changes_only_tiles_that_it_touches(tmp_path):
    """Also one that was acquired before the others, or makes the canvas larger."""
    search = write_shots(tmp_path / "RUN.zarr", SHOTS[:2])
    output = tmp_path / "OUT.zarr"
    ocelot_em.merge(search, output, tile_size=16)
    for more, n_touched in ((SHOTS[2:4], 11), ([replace(SHOTS[4], acquired=-5)], 6)):
        marks = {p: p.stat().st_mtime_ns for p in output.rglob("progress/tile_summary/c/*/*/0")}
        write_shots(search, more)
        report = ocelot_em.merge(search, output, tile_size=16)
        new_tiles = report.n_tiles - len(marks)
        kept = [p for p, time in marks.items() if p.stat().st_mtime_ns == time]
        assert report.n_merged == report.n_tiles - len(kept)
        assert report.n_merged <= n_touched + new_tiles
        assert len(kept) > 0
        scratch = tmp_path / f"{more[0].id}_scratch.zarr"
        ocelot_em.merge(search, scratch, tile_size=16)
        assert chunk_bytes(output) == chunk_bytes(scratch)
        assert ocelot_em.check(output) == []
        cutoff = {"cutoff": 0.5, "min_distance": 2.0, "micrograph": "M1"}
        table, again = (ocelot_em.find_peaks(p, **cutoff) for p in (output, scratch))
        for name, values in table.columns.items():
            np.testing.assert_array_equal(values, again.columns[name], err_msg=name)
    assert ocelot_em.merge(search, output, tile_size=16).n_merged == 0


def test_a_partial_that_comes_later_changes_its_exposure(tmp_path):
    search = write_shots(tmp_path / "RUN.zarr", SHOTS)
    output = tmp_path / "OUT.zarr"
    ocelot_em.merge(search, output, tile_size=16)
    far = SHOTS[3]
    exposure = Exposure(far.id, far.origin, far.acquired, far.valid_shape)
    extra = replace(far, id="extra").results()[0]
    info = SearchInfo(pixel_size_angstrom=2.0, exposure=exposure)
    write_partial(search, "gpu9", extra, total_projections=9, order=9, search=info)
    report = ocelot_em.merge(search, output, tile_size=16)
    assert 0 < report.n_merged <= 4
    ocelot_em.merge(search, tmp_path / "SCRATCH.zarr", tile_size=16)
    assert chunk_bytes(output) == chunk_bytes(tmp_path / "SCRATCH.zarr")


def test_an_update_that_died_is_gone_on_with(tmp_path, monkeypatch):
    search = write_shots(tmp_path / "RUN.zarr", SHOTS[:2])
    output = tmp_path / "OUT.zarr"
    ocelot_em.merge(search, output, tile_size=16)
    write_shots(search, SHOTS[2:4])
    with monkeypatch.context() as patch:
        patch.setattr(resume.store, "create_array", lambda *_: (_ for _ in ()).throw(MemoryError()))
        with pytest.raises(MemoryError):
            ocelot_em.merge(search, output, tile_size=16)
    with pytest.raises(IncompleteError):
        ocelot_em.open_merged(output)
    write_shots(search, SHOTS[4:])
    ocelot_em.merge(search, output, tile_size=16)
    ocelot_em.merge(search, tmp_path / "SCRATCH.zarr", tile_size=16)
    assert chunk_bytes(output) == chunk_bytes(tmp_path / "SCRATCH.zarr")


def test_what_is_no_continuation_is_refused_by_name(tmp_path):
    search = write_shots(tmp_path / "RUN.zarr", SHOTS[:3])
    other = write_shots(tmp_path / "OTHER.zarr", [SHOTS[0], replace(SHOTS[1], origin=(4, 0))])
    output = tmp_path / "OUT.zarr"
    ocelot_em.merge(search, output, tile_size=16)
    with pytest.raises(OutputExistsError, match=r"'below'.*not in the inputs") as refused:
        ocelot_em.merge(other, output, tile_size=16)
    assert "exposure 'first': origin: the output has (3, 0), requested is (4, 0)" in str(
        refused.value
    )
    with pytest.raises(
        OutputExistsError, match="overlap: the output has earliest, requested is max"
    ):
        ocelot_em.merge(search, output, tile_size=16, overlap="max-zscore")
    with pytest.raises(OutputExistsError, match="erode_px"):
        ocelot_em.merge(search, output, tile_size=16, erode=1)


def test_several_searches_of_exposures_are_joined(tmp_path):
    """Exposures of one id pool their partials; others come after those of the first."""
    first = write_shots(tmp_path / "A.zarr", SHOTS[:3])
    second = write_shots(tmp_path / "B.zarr", SHOTS[3:])
    whole = write_shots(tmp_path / "RUN.zarr", SHOTS)
    ocelot_em.merge([first, second], tmp_path / "TWO.zarr")
    ocelot_em.merge(whole, tmp_path / "ONE.zarr")
    assert_same_maps(read_maps(tmp_path / "TWO.zarr"), read_maps(tmp_path / "ONE.zarr"))
    moved = write_shots(tmp_path / "C.zarr", [replace(SHOTS[0], acquired=9)])
    with pytest.raises(InvalidInputError, match=r"exposure 'late': acquired: .*has 7, .*has 9"):
        ocelot_em.merge([first, moved], tmp_path / "NO.zarr")


def test_fractional_origins_are_refused_or_rounded(tmp_path):
    shots_between = [SHOTS[0], replace(SHOTS[1], origin=(2.6, 0.5))]
    search = write_shots(tmp_path / "RUN.zarr", shots_between)
    with pytest.raises(InvalidInputError, match=r"'first': origin: expected whole pixels.*round"):
        ocelot_em.merge(search, tmp_path / "OUT.zarr")
    ocelot_em.merge(search, tmp_path / "OUT.zarr", origins="round")
    whole = write_shots(tmp_path / "WHOLE.zarr", [SHOTS[0], replace(SHOTS[1], origin=(3, 0))])
    ocelot_em.merge(whole, tmp_path / "EXPECTED.zarr")
    assert_same_maps(read_maps(tmp_path / "OUT.zarr"), read_maps(tmp_path / "EXPECTED.zarr"))


def test_erosion_that_leaves_nothing_is_refused(tmp_path):
    search = write_shots(tmp_path / "RUN.zarr", SHOTS)
    with pytest.raises(InvalidInputError, match=r"'far': erode: .*10 x 8 pixels, got 4"):
        ocelot_em.merge(search, tmp_path / "OUT.zarr", erode=4)


def test_an_exposure_that_cannot_be_opened_fails_its_own_tiles(tmp_path):
    search = write_shots(tmp_path / "RUN.zarr", SHOTS)
    ocelot_em.merge(search, tmp_path / "EXPECTED.zarr", tile_size=16)
    broken = search / "exposures/far/partials/gpu0/best_psi/zarr.json"
    kept = broken.read_bytes()
    broken.unlink()
    with pytest.raises(TilesFailedError) as failed:
        ocelot_em.merge(search, tmp_path / "OUT.zarr", tile_size=16, threads=1)
    message = str(failed.value)
    assert "of 20 tiles failed" in message
    assert message.count("exposure 'far'") == message.count("\n  - tile (") <= 4
    assert "the array is missing" in message
    broken.write_bytes(kept)
    ocelot_em.merge(search, tmp_path / "OUT.zarr", tile_size=16)
    assert chunk_bytes(tmp_path / "OUT.zarr") == chunk_bytes(tmp_path / "EXPECTED.zarr")


def test_nan_can_be_masked_in_a_montage(tmp_path):
    search = unsealed(write_shots(tmp_path / "RUN.zarr", SHOTS[:2]))
    late = SHOTS[0].results()[0]
    late["mip"][5, 6] = np.nan
    # A partial with NaN cannot be written, so that it is put there behind the writer's back.
    from ocelot_em.store.search import MapGroup

    maps = MapGroup(open_objects(search), "exposures/late/partials/gpu0", "gpu0").open(("mip",))
    maps["mip"].write(ocelot_em.Region.whole(SHOTS[0].shape), late["mip"])
    with pytest.raises(TilesFailedError, match=r"exposure 'late': partial 'gpu0': mip: NaN"):
        ocelot_em.merge(search, tmp_path / "OUT.zarr")
    ocelot_em.merge(search, tmp_path / "MASKED.zarr", nan="mask")
    masked = read_maps(tmp_path / "MASKED.zarr")
    assert masked["total_projections"][5, 26] in (0, 31_000, 95_000)
    assert masked["total_projections"][27, 0] == 0


def test_the_canvas_is_exported_as_it_is(tmp_path):
    """Blank pixels stay blank in pictures; counts that differ are not made one."""
    search = write_shots(tmp_path / "RUN.zarr", SHOTS)
    ocelot_em.merge(search, tmp_path / "OUT.zarr")
    expected = read_maps(tmp_path / "OUT.zarr")
    picture = write_ome_zarr(tmp_path / "OUT.zarr", tmp_path / "Z.ome.zarr")
    values, factor = read_level(picture, 10_000)
    assert factor == 1
    np.testing.assert_array_equal(values, expected["scaled_mip"])
    assert np.isnan(values[expected["source_exposure"] == -1]).all()
    with pytest.raises(InvalidInputError, match="10,000 to 102,000 in different exposures"):
        write_hdf5(tmp_path / "OUT.zarr", tmp_path / "OUT.h5")


def test_a_merged_montage_is_not_merged_again(tmp_path):
    search = write_shots(tmp_path / "RUN.zarr", SHOTS[:2])
    ocelot_em.merge(search, tmp_path / "OUT.zarr")
    with pytest.raises(FormatError, match="merge their searches instead"):
        ocelot_em.merge(tmp_path / "OUT.zarr", tmp_path / "AGAIN.zarr")


def test_exposures_keep_their_numbers_and_say_what_differs(tmp_path):
    search = write_shots(tmp_path / "RUN.zarr", SHOTS)
    about = {e.id: e for e in ocelot_em.describe(search).exposures}
    assert [about[s.id].number for s in SHOTS] == list(range(5))
    assert about["first"].total_projections == 95_000
    with pytest.raises(InvalidInputError, match=r"exposure 'far': origin: the search has"):
        write_shots(search, [replace(SHOTS[3], origin=(1, 1), counts=(1, 1, 1))])
    with pytest.raises(InvalidInputError, match="a partial 'gpu0' is already there"):
        write_shots(search, [SHOTS[3]])
    with pytest.raises(InvalidInputError, match="the search has exposures, the new partial"):
        write_partial(search, "x", SHOTS[3].results()[0], total_projections=1)
    with pytest.raises(InvalidInputError, match=r"exposure id '\.\./up': expected up to 128"):
        write_shots(search, [replace(SHOTS[3], id="../up")])


def test_exposures_without_partials_are_named(tmp_path):
    search = write_shots(tmp_path / "RUN.zarr", SHOTS[:2])
    import shutil

    for folder in ("partials", "roster"):
        shutil.rmtree(search / "exposures/first" / folder)
    with pytest.raises(IncompleteError, match="exposure 'first': has no partials yet"):
        ocelot_em.merge(search, tmp_path / "OUT.zarr")


def test_processes_that_come_at_once_get_different_numbers(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    many = [replace(SHOTS[3], id=f"e{k}", origin=(k, 0)) for k in range(24)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda shot: write_shots(tmp_path / "RUN.zarr", [shot]), many))
    numbers = {e.number for e in ocelot_em.describe(tmp_path / "RUN.zarr").exposures}
    assert numbers == set(range(24))


def test_the_result_says_where_its_exposures_lie(tmp_path):
    search = write_shots(tmp_path / "RUN.zarr", [replace(SHOTS[0], origin=(-3, 4)), SHOTS[1]])
    ocelot_em.merge(search, tmp_path / "OUT.zarr")
    content = json.loads((tmp_path / "OUT.zarr/zarr.json").read_text())["attributes"]["ocelot"]
    assert content["canvas_origin"] == [-3, 0]
    assert [(e["id"], e["origin"]) for e in content["exposures"]] == [
        ("late", [0, 4]),
        ("first", [6, 0]),
    ]
    assert [e["total_projections"] for e in content["exposures"]] == [101_000, 95_000]
    first = content["exposures"][1]["first_partial"]
    assert [p["name"] for p in content["partials"][first:]] == ["gpu0", "gpu1", "gpu2"]


@pytest.mark.alone
@pytest.mark.parametrize("n_rows", [3, pytest.param(5, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("form", list(PoseForm))
def test_memory_is_as_predicted_and_does_not_grow_with_exposures(tmp_path, form, n_rows):
    """Each in its own process, with tiles that are whole, cut, and covered up to four times."""
    small = simulate(tmp_path, Simulation((1024, 1024), 2, 0, seed=0, form=form))
    peaks = []
    for n in (2, n_rows):
        many = montage_of(small, n, tmp_path / f"{n}.zarr")
        predicted, peak = peak_of(many, tmp_path)
        assert peak <= predicted
        peaks.append(peak)
    assert peaks[1] <= 1.15 * peaks[0]


@pytest.mark.parametrize("n", [150, pytest.param(1000, marks=pytest.mark.slow)])
def test_planning_many_exposures_reads_little_of_each(tmp_path, monkeypatch, n):
    """Without maps but for the first one's: a plan reads attributes, and the metadata of a few."""
    one = Shot("e0", (0, 0), 0, (300, 280), (290, 270), (1000,))
    search = write_shots(tmp_path / "RUN.zarr", [one])
    objects = open_objects(search)
    maps = [p for p in (search / "exposures/e0/partials/gpu0").iterdir() if p.is_dir()]
    group = json.loads((search / "exposures/e0/partials/gpu0/zarr.json").read_text())
    for number in range(1, n):
        exposure = Exposure(f"e{number}", (85 * number, 64_720 * number // n), number, (290, 270))
        info = SearchInfo(pixel_size_angstrom=2.0, exposure=exposure)
        ensure_search(objects, one.shape, info)
        place = search / f"exposures/e{number}/partials/gpu0"
        for source in maps:
            (place / source.name).mkdir(parents=True)
            (place / source.name / "zarr.json").write_bytes((source / "zarr.json").read_bytes())
        group["attributes"]["ocelot"]["id"] = f"{number:032x}"
        (place / "zarr.json").write_text(json.dumps(group))
    unsealed(search)
    read = Counter()

    def count(name):
        method = getattr(LocalObjects, name)

        def counted(self, key, *rest):
            read[key] += 1
            return method(self, key, *rest)

        return counted

    with monkeypatch.context() as patched:
        for name in ("get", "get_into"):
            patched.setattr(LocalObjects, name, count(name))
        ready, _ = plan_merge(search, tmp_path / "OUT.zarr", MergeOptions())
    assert max(read.values()) <= 4
    of_maps = [key for key in read if key.count("/") == 5]
    of_others = [key for key in read if key.count("/") < 5]
    assert len(of_maps) <= 100 * len(maps)
    assert len(of_others) <= 2 * n + 10  # of the exposure and of its one partial
    assert ready.plan.shape == (85 * (n - 1) + 290, 64_720 * (n - 1) // n + 270)
    touched = sum(bool(ready.plan.pieces(tile)) for tile in ready.plan.grid)
    assert 0 < touched < len(ready.plan.grid) / (10 if n == 1000 else 4)  # they lie in a row
