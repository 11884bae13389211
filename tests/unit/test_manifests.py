"""What is read is what was written: everything in its place, or an error that names the place."""

import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import ocelot_em
from builders import (
    explicit_maps,
    flip_byte,
    unsealed,
    write_explicit_search,
    write_indexed_search,
)
from helpers import chunk_bytes
from montages import Shot, write_shots
from ocelot_em import PartialWriter, Region, merge, write_partial
from ocelot_em.errors import (
    CorruptChunkError,
    FormatError,
    IncompleteError,
    InputChangedError,
    InvalidInputError,
    OcelotError,
    OutputExistsError,
    TilesFailedError,
)
from ocelot_em.merge import job
from ocelot_em.merge.merge import attempt_tiles
from ocelot_em.merge.plan import read_plan
from ocelot_em.merge.resume import confirm, create_output
from ocelot_em.model.options import MergeOptions
from ocelot_em.run.api import plan_merge
from ocelot_em.store import groups, local
from ocelot_em.store.lock import OutputLock
from ocelot_em.store.objects import open_objects
from ocelot_em.store.search import read_attributes
from ocelot_em.store.sources import check_unchanged
from ocelot_em.store.upgrade import upgrade

SHAPE = (40, 50)
TILE = 20


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search and its result, of which tests get copies."""
    folder = tmp_path_factory.mktemp("intact")
    write_explicit_search(folder / "RUN.zarr", SHAPE, 3)
    merge(folder / "RUN.zarr", folder / "OUT.zarr", tile_size=TILE)
    return folder


@pytest.fixture
def run(intact: Path, tmp_path: Path) -> Path:
    return shutil.copytree(intact / "RUN.zarr", tmp_path / "RUN.zarr")


@pytest.fixture
def merged(intact: Path, tmp_path: Path) -> Path:
    return shutil.copytree(intact / "OUT.zarr", tmp_path / "OUT.zarr")


READERS = {
    "merge": lambda store: merge(store, store.with_name("AGAIN.zarr")),
    "open_partials": lambda store: ocelot_em.open_partials(store).compute(),
    "open_merged": lambda store: ocelot_em.open_merged(store).compute(),
}


def swap(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def assert_refused(store: Path, *readers: str) -> None:
    for name in readers:
        with pytest.raises(OcelotError):
            READERS[name](store)
    assert ocelot_em.check(store)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("gpu0/mip/c/0/0", "gpu1/mip/c/0/0"),
        ("gpu0/correlation_sum/c/0/0", "gpu0/correlation_squared_sum/c/0/0"),
        ("gpu0/best_phi/c/0/0", "gpu0/best_psi/c/0/0"),
        ("gpu0/mip/zarr.json", "gpu0/best_phi/zarr.json"),
        ("gpu0/zarr.json", "gpu1/zarr.json"),
        ("gpu0/manifest/content/c/0", "gpu1/manifest/content/c/0"),
        ("gpu0", "gpu1"),
    ],
)
def test_things_of_a_search_in_each_others_places_are_refused(
    run: Path, one: str, other: str
) -> None:
    swap(run / "partials" / one, run / "partials" / other)
    assert_refused(run, "merge", "open_partials")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("mip/c/0/0", "mip/c/0/1"),
        ("scaled_mip/c/1/1", "scaled_mip/c/0/1"),
        ("correlation_mean/c/0/0", "correlation_std/c/0/0"),
    ],
)
def test_chunks_of_a_result_in_each_others_places_are_refused(
    merged: Path, one: str, other: str
) -> None:
    swap(merged / one, merged / other)
    assert_refused(merged, "open_merged", *(["merge"] if one.startswith("mip") else []))
    with pytest.raises(CorruptChunkError, match="belongs elsewhere"):
        ocelot_em.open_merged(merged).compute()


@pytest.mark.parametrize("what", ["counts/c", "numbers/c", "tile_summary/c"])
def test_records_in_each_others_places_are_refused(run: Path, merged: Path, what: str) -> None:
    ends = ("0/0/0", "0/1/0") if what.startswith("tile") else ("0", "1")
    swap(*(merged / "progress" / what / end for end in ends))
    if what.startswith("tile"):  # only a run that resumes reads marks: it merges both again
        assert merge(run, merged, tile_size=TILE).n_merged == 2
        assert ocelot_em.check(merged) == []
        return
    assert any("belongs to another tile or result" in text for text in ocelot_em.check(merged))
    if what.startswith("numbers"):
        with pytest.raises(CorruptChunkError, match="belongs to another"):
            ocelot_em.find_peaks(merged)


def test_records_of_another_result_are_refused(run: Path, merged: Path, tmp_path: Path) -> None:
    merge(run, tmp_path / "OTHER.zarr", tile_size=TILE)
    shutil.copy(tmp_path / "OTHER.zarr/progress/numbers/c/0", merged / "progress/numbers/c/0")
    with pytest.raises(CorruptChunkError, match="belongs to another tile or result"):
        ocelot_em.find_peaks(merged)


@pytest.mark.parametrize("name", ["mip", "scaled_mip"])
def test_chunks_of_another_search_are_refused(
    run: Path, merged: Path, tmp_path: Path, name: str
) -> None:
    for number in range(3):
        maps = explicit_maps(SHAPE, seed=number + 10)
        write_partial(tmp_path / "B.zarr", f"gpu{number}", maps, total_projections=10 + number)
    merge(tmp_path / "B.zarr", tmp_path / "B_OUT.zarr", tile_size=TILE)
    shutil.copy(tmp_path / "B_OUT.zarr" / name / "c/0/0", merged / name / "c/0/0")
    assert_refused(merged, "open_merged")
    if name == "mip":
        chunk = "partials/gpu1/mip/c/0/0"
        shutil.copy(tmp_path / "B.zarr" / chunk, run / chunk)
        assert_refused(run, "merge", "open_partials")


@pytest.mark.parametrize("n_bits", [2, pytest.param(30, marks=pytest.mark.slow)])
@pytest.mark.parametrize("of", ["explicit", "indexed", "merged"])
def test_no_flipped_bit_of_any_metadata_is_read_as_something_else(
    tmp_path: Path, of: str, n_bits: int
) -> None:
    """Each is refused, or changes nothing of what is read."""
    writer = write_indexed_search if of == "indexed" else write_explicit_search
    store = writer(tmp_path / "RUN.zarr", (5, 6), 2)
    if of == "merged":
        merge(store, tmp_path / "OUT.zarr", tile_size=4)
        store = tmp_path / "OUT.zarr"

    def look() -> object:
        about = ocelot_em.describe(store)
        read = ocelot_em.open_merged if of == "merged" else ocelot_em.open_partials
        opened = read(store).compute(scheduler="synchronous")
        values = {name: array.values.tobytes() for name, array in opened.items()}
        coordinates = {name: array.values.tolist() for name, array in opened.coords.items()}
        return about, values, coordinates, str(opened.attrs)

    expected, n_silent = look(), []
    progress = store / "progress"
    files = [file for file in store.rglob("zarr.json") if progress not in file.parents]
    rng = np.random.default_rng(0)
    for file in sorted([*files, *store.rglob("manifest/content/c/0")]):
        content = file.read_bytes()
        for position in rng.choice(len(content), min(len(content), n_bits), replace=False):
            flipped = bytearray(content)
            flipped[position] ^= 1 << rng.integers(8)
            file.write_bytes(flipped)
            try:
                if look() != expected:
                    n_silent.append((file, position))
            except OcelotError:
                pass
        file.write_bytes(content)
    assert n_silent == []
    assert look() == expected


@pytest.mark.parametrize("what", ["partials/gpu1", "partials/gpu1/zarr.json", "partials"])
def test_a_lost_partial_is_missed(run: Path, what: str) -> None:
    lost = run / what
    shutil.rmtree(lost) if lost.is_dir() else lost.unlink()
    with pytest.raises(FormatError, match=r"partial 'gpu1' is missing, which the search has"):
        merge(run, run.with_name("OUT.zarr"))
    assert any("'gpu1' is missing" in problem for problem in ocelot_em.check(run))


def test_a_lost_partial_can_be_written_again(run: Path) -> None:
    shutil.rmtree(run / "partials/gpu1")
    write_partial(run, "gpu1", explicit_maps(SHAPE, 1), total_projections=11)
    assert ocelot_em.check(run) == []


def test_a_lost_entry_of_the_list_is_missed(run: Path) -> None:
    shutil.rmtree(run / "roster/2")
    with pytest.raises(FormatError, match=r"'gpu2' is not on the list of the search"):
        merge(run, run.with_name("OUT.zarr"))
    shutil.rmtree(run / "partials/gpu2")
    merge(run, run.with_name("OUT.zarr"))


SHOTS = [Shot(name, (0.0, 9.0 * n), n, (12, 14), (12, 14), (5,)) for n, name in enumerate("ABC")]


@pytest.mark.parametrize("what", ["A", "C/zarr.json", "B"])
def test_a_lost_exposure_is_missed(tmp_path: Path, what: str) -> None:
    run = write_shots(tmp_path / "RUN.zarr", SHOTS)
    damage(run / "exposures" / what, "lost")
    with pytest.raises(FormatError, match=rf"exposure '{what[0]}' is missing, which the search"):
        merge(run, tmp_path / "OUT.zarr")
    assert any(f"'{what[0]}' is missing" in problem for problem in ocelot_em.check(run))
    assert merge(run, tmp_path / "OUT.zarr", without=[what[0]]).n_merged == 1
    if what != "B":
        return
    shutil.rmtree(tmp_path / "OUT.zarr")
    write_shots(run, SHOTS[1:2])
    assert merge(run, tmp_path / "OUT.zarr").n_merged == 1
    assert ocelot_em.check(run) == []


@pytest.mark.parametrize("what", ["0", "2"])
def test_a_lost_entry_of_the_list_of_exposures_is_missed(tmp_path: Path, what: str) -> None:
    run = write_shots(tmp_path / "RUN.zarr", SHOTS)
    damage(run / "exposure_numbers" / what, "lost")
    with pytest.raises(FormatError, match=r"exposure 'C' is not on the list of the search"):
        merge(run, tmp_path / "OUT.zarr")
    assert ocelot_em.check(run)


@pytest.mark.parametrize("how", ["lost", "emptied", "flipped"])
@pytest.mark.parametrize("state", ["complete", "writing"])
def test_a_damaged_chunk_of_a_done_tile_is_merged_again(
    run: Path, merged: Path, how: str, state: str
) -> None:
    if state == "writing":
        interrupt(merged)
    chunk = merged / "correlation_std/c/1/1"
    content = chunk.read_bytes()
    damage(chunk, how)
    assert merge(run, merged, tile_size=TILE).n_merged == 1
    assert chunk.read_bytes() == content
    assert ocelot_em.check(merged) == []
    assert merge(run, merged, tile_size=TILE).n_merged == 0


@pytest.mark.parametrize("state", ["complete", "writing"])
@pytest.mark.parametrize(
    "file",
    [
        "manifest/content/c/0",
        "statistics/zarr.json",
        "statistics/mip_histogram/zarr.json",
        "statistics/mip_histogram/c/0",
        "mip/zarr.json",
        "progress/counts/c/0",
        "progress/tile_summary/zarr.json",
        "progress/tile_summary/c/0/0/0",
    ],
)
def test_what_is_lost_or_damaged_is_written_again_by_the_same_command(
    run: Path, merged: Path, state: str, file: str
) -> None:
    before = ocelot_em.open_merged(merged).compute()
    for damage in (Path.unlink, lambda path: path.write_bytes(b"\0")):
        if state == "writing":
            interrupt(merged)
        (merged / file).parent.mkdir(parents=True, exist_ok=True)
        (merged / file).touch()
        damage(merged / file)
        merge(run, merged, tile_size=TILE)
        assert ocelot_em.check(merged) == []
        assert before.identical(ocelot_em.open_merged(merged).compute())


@pytest.mark.parametrize("state", ["complete", "writing"])
def test_notes_of_somebody_change_nothing(run: Path, merged: Path, state: str) -> None:
    before = ocelot_em.open_merged(merged).compute()
    if state == "writing":
        interrupt(merged)
    for folder in [merged, *filter(Path.is_dir, merged.rglob("*"))]:
        (folder / "notes.txt").write_text("of somebody")
    merge(run, merged, tile_size=TILE)
    assert ocelot_em.check(merged) == []
    assert before.identical(ocelot_em.open_merged(merged).compute())


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"{")])
def test_a_lost_or_damaged_root_names_the_command_that_mends_it(
    run: Path, merged: Path, damage: Callable[[Path], object]
) -> None:
    damage(merged / "zarr.json")
    with pytest.raises(OutputExistsError, match=r"zarr\.json, cannot be read .* --overwrite"):
        merge(run, merged, tile_size=TILE)
    merge(run, merged, tile_size=TILE, overwrite=True)
    assert ocelot_em.check(merged) == []


@pytest.mark.parametrize("state", ["complete", "writing"])
@pytest.mark.parametrize(
    ("what", "how"),
    [
        ("mip", "lost"),
        ("progress", "lost"),
        ("progress/numbers/zarr.json", "lost"),
        ("progress/tile_summary/c/0/0/0", "shortened"),
        ("progress/tile_summary/c/9/9/0", "stray"),
        ("progress/tile_summary/c/x", "stray"),
    ],
)
def test_no_state_of_a_result_is_stuck(
    run: Path, merged: Path, what: str, how: str, state: str
) -> None:
    expected = chunk_bytes(merged)
    if state == "writing":
        interrupt(merged)
    damage(merged / what, how)
    merge(run, merged, tile_size=TILE)
    assert ocelot_em.check(merged) == []
    assert chunk_bytes(merged) == expected


def damage(place: Path, how: str) -> None:
    if how == "lost":
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    elif how == "stray":
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(b"of something else")
    elif how == "flipped":
        flip_byte(place, 3, 1)
    else:
        place.write_bytes(b"" if how == "emptied" else place.read_bytes()[:-3])


def interrupt(merged: Path) -> None:
    """Make a finished result one that a run has left just before its end."""
    from ocelot_em.store import attributes, groups

    objects = open_objects(merged)
    found = read_attributes(objects)
    unfinished = found.model_copy(update={"state": "writing", "finished": None, "manifest": None})
    groups.replace_attributes(objects, "", attributes.dump_attributes(unfinished))
    shutil.rmtree(merged / "manifest", ignore_errors=True)


def test_a_resumed_result_has_the_manifest_of_an_uninterrupted_one(run: Path, merged: Path) -> None:
    before = (merged / "manifest/content/c/0").read_bytes().partition(b"\n")[2]
    interrupt(merged)
    for tile in ("0/0", "1/2"):
        shutil.rmtree(merged / "progress/tile_summary/c" / tile)
    assert merge(run, merged, tile_size=TILE).n_merged == 2
    assert (merged / "manifest/content/c/0").read_bytes().partition(b"\n")[2] == before


def test_an_input_that_was_written_again_since_the_plan_is_refused(
    run: Path, tmp_path: Path
) -> None:
    merge(run, tmp_path / "OUT.zarr")
    plan = read_plan(read_attributes(open_objects(tmp_path / "OUT.zarr")), "")
    for source in plan.sources:
        check_unchanged(source)
    shutil.rmtree(run / "partials/gpu1")
    write_partial(run, "gpu1", explicit_maps(SHAPE, 5), total_projections=11)
    with pytest.raises(InputChangedError, match=r"'gpu1'.*changed since the merge was planned"):
        check_unchanged(plan.sources[1])


def test_an_opened_result_that_is_replaced_is_not_read_as_the_new_one(
    run: Path, merged: Path
) -> None:
    opened = ocelot_em.open_merged(merged)
    write_partial(run, "gpu9", explicit_maps(SHAPE, 9), total_projections=12)
    merge(run, merged, tile_size=TILE, overwrite=True)
    with pytest.raises(CorruptChunkError, match="belongs elsewhere"):
        opened.compute()


def test_an_input_that_is_replaced_while_it_is_merged_fails_the_merge(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ocelot_em.merge import merge as story

    begin = story.create_output
    calls = itertools.count()

    def replaced_first(*args, **kwargs):
        if next(calls) == 0:
            shutil.rmtree(run / "partials/gpu1")
            write_partial(run, "gpu1", explicit_maps(SHAPE, 7), total_projections=11)
        return begin(*args, **kwargs)

    monkeypatch.setattr(story, "create_output", replaced_first)
    with pytest.raises(OcelotError, match="changed since the merge was planned"):
        merge(run, tmp_path / "OUT.zarr", tile_size=TILE)


def test_of_two_writers_of_a_partial_one_wins_and_nothing_mixes(tmp_path: Path) -> None:
    shape, run = (1500, 20), tmp_path / "RUN.zarr"
    whole = Region.whole(shape)
    late, early = explicit_maps(shape, 1), explicit_maps(shape, 2)
    upper = Region(0, 1024, 0, 20)
    lower = Region(1024, 1500, 0, 20)

    def part(maps, region):
        return {name: values[region.slices] for name, values in maps.items()}

    first = PartialWriter(run, "gpu0", shape, total_projections=7)
    second = PartialWriter(run, "gpu0", shape, total_projections=9)

    def write_both() -> None:
        with first:
            first.write(upper, part(late, upper))
            with second:
                second.write(whole, early)
                first.write(lower, part(late, lower))

    with pytest.raises(IncompleteError, match="taken over by another writer"):
        write_both()
    found = ocelot_em.open_partials(run).compute()
    for name, values in early.items():
        np.testing.assert_array_equal(found[name][0], values)
    assert found.total_projections.values.tolist() == [9]
    assert ocelot_em.check(run) == []
    with pytest.raises(InvalidInputError, match="already there and complete"):
        PartialWriter(run, "gpu0", shape, total_projections=7)


def test_a_writer_that_died_between_manifest_and_attributes_has_finished(run: Path) -> None:
    file = run / "partials/gpu1/zarr.json"
    complete = file.read_text()
    record = json.loads(complete)["attributes"]["ocelot"]
    unfinished = {**record, "state": "writing", "id": "0" * 32, "manifest": None}
    groups.replace_attributes(open_objects(run), "partials/gpu1", {"ocelot": unfinished})
    for reader in READERS:
        if reader != "open_merged":
            READERS[reader](run)  # as one that came too late may have changed it back
    with pytest.raises(InvalidInputError, match="already there and complete"):
        write_partial(run, "gpu1", explicit_maps(SHAPE, 1), total_projections=11)
    assert json.loads(file.read_text()) == json.loads(complete)
    assert ocelot_em.check(run) == []


def test_indexed_partials_have_manifests_too(tmp_path: Path) -> None:
    run = write_indexed_search(tmp_path / "RUN.zarr", SHAPE, 2)
    swap(
        run / "partials/gpu0/best_global_index/c/0/0", run / "partials/gpu1/best_global_index/c/0/0"
    )
    assert_refused(run, "merge", "open_partials")


def test_a_worker_with_another_version_is_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = iter(["0.1.0 (the driver's)"])
    monkeypatch.setattr(job, "code_version", lambda: next(versions, "0.1.0 (a worker's)"))
    with pytest.raises(TilesFailedError, match=r"expected ocelot-em 0.1.0 \(the driver's\)"):
        merge(run, tmp_path / "OUT.zarr")


def test_a_store_of_an_earlier_version_is_upgraded(run: Path, merged: Path) -> None:
    for store in (unsealed(run), unsealed(merged)):
        assert ocelot_em.describe(store).without_manifest
        assert upgrade(store) > 0
        assert ocelot_em.describe(store).without_manifest == ()
        assert ocelot_em.describe(store).attributes.format_version == 3
        assert ocelot_em.check(store) == []
        assert upgrade(store) == 0
    swap(run / "partials/gpu0/mip/c/0/0", run / "partials/gpu1/mip/c/0/0")
    assert_refused(run, "merge", "open_partials")


def test_a_moved_search_is_resumed(run: Path, merged: Path, tmp_path: Path) -> None:
    interrupt(merged)
    shutil.rmtree(merged / "progress/tile_summary/c/0/0")
    moved = run.rename(tmp_path / "MOVED.zarr")
    assert merge(moved, merged, tile_size=TILE).n_merged == 1
    assert ocelot_em.check(merged) == []


def test_a_merge_is_resumed_after_its_input_was_upgraded(run: Path, tmp_path: Path) -> None:
    merge(unsealed(run), tmp_path / "OUT.zarr", tile_size=TILE)
    interrupt(tmp_path / "OUT.zarr")
    shutil.rmtree(tmp_path / "OUT.zarr/progress/tile_summary/c/0/0")
    assert upgrade(run) == 3
    assert merge(run, tmp_path / "OUT.zarr", tile_size=TILE).n_merged == 1
    assert ocelot_em.check(tmp_path / "OUT.zarr") == []


def test_another_erosion_is_the_only_difference_named(run: Path, merged: Path) -> None:
    with pytest.raises(OutputExistsError) as refusal:
        merge(run, merged, erode=2)
    assert "erode_px" in str(refusal.value)
    assert "inputs" not in str(refusal.value)


@pytest.mark.parametrize("host", ["driver", "other"])
def test_another_host_brings_a_tile_to_the_disk_before_its_mark(
    run: Path, tmp_path: Path, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, events = tmp_path / "OUT.zarr", list[str]()
    ready, options = plan_merge(run, output, MergeOptions(tile_size=TILE))
    with OutputLock(open_objects(output)) as lock:
        attributes = create_output(lock.objects, confirm(ready, lock.objects), options)
        spec = job.JobSpec(str(output), attributes.id, lock.key, lock.id)
        stage, sync = local.LocalObjects.put, local.sync_file_system
        monkeypatch.setattr(
            local.LocalObjects, "put", lambda *args: (events.append(args[1]), stage(*args))
        )
        monkeypatch.setattr(
            local, "sync_file_system", lambda disk: (events.append("sync"), sync(disk))
        )
        if host == "other":
            spec = replace(spec, kernel="of the driver")
        assert [end.error for end in attempt_tiles(spec, [(0, 0)])] == [""]
        written = [event for event in events if "/c/" in event or event == "sync"]
        job.close_job()
    assert written[-1].startswith("progress/tile_summary/c/0/0")
    assert [event for event in written if event == "sync"] == ["sync"] * (host == "other")
    assert written[-2] == "sync" or host == "driver"
