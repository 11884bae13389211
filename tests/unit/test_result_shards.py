"""Merged results in shards: the same bits in few files, however the merge was interrupted."""

import shutil
import threading
from unittest.mock import Mock

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

import ocelot_em
from helpers import assert_same_maps, combinations, make_result, read_maps, write_search
from montages import SHOTS, write_shots
from ocelot_em.errors import (
    ChunkError,
    FormatError,
    LockLostError,
    OutputExistsError,
    StoppedError,
)
from ocelot_em.merge import resume
from ocelot_em.merge.resume import prepare
from ocelot_em.model.options import MergeOptions
from ocelot_em.run import api
from ocelot_em.store import local, lock, result_shards
from ocelot_em.store.lock import OutputLock
from ocelot_em.store.objects import open_objects
from ocelot_em.store.result_shards import pack, places_of_chunks, slot_of

SHAPE = (40, 60)
OPTIONS = {"tile_size": 16, "threads": 2}  # 3 x 4 tiles of a chunk each, in 2 x 2 shards of 2 x 2


pytestmark = pytest.mark.usefixtures("plain", "small")


@pytest.fixture
def small(monkeypatch):
    small_shards(monkeypatch)


def small_shards(monkeypatch):
    monkeypatch.setattr(result_shards, "EDGE", 2)
    monkeypatch.setattr(result_shards, "N_CHUNKS", 4)
    monkeypatch.setattr(resume, "MIN_NBYTES_IN_SHARDS", 0)


@pytest.fixture(scope="module")
def search(tmp_path_factory):
    rng, counts = np.random.default_rng(5), (100, 70)
    results = [make_result(rng, SHAPE, count) for count in counts]
    return write_search(tmp_path_factory.mktemp("search") / "RUN.zarr", results, counts)


@pytest.fixture(scope="module")
def plain(search):
    """The result in files of chunks."""
    output = search.parent / "PLAIN.zarr"
    ocelot_em.merge(search, output, **OPTIONS)  # without the fixture `small`
    assert (output / "mip/c/0/0").exists()
    return output


@pytest.fixture(scope="module")
def packed(search):
    """The result in shards, of which tests get copies."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        small_shards(monkeypatch)
        ocelot_em.merge(search, search.parent / "PACKED.zarr", **OPTIONS)
    return search.parent / "PACKED.zarr"


def files_of(output):
    return sorted(str(p.relative_to(output)) for p in output.rglob("*") if p.is_file())


def is_packed(output):
    """Whether no chunk is a file of its own, but those of the tables of statistics."""
    chunks = [f for f in files_of(output) if "/c/" in f]
    return all(f.startswith(("statistics/", "manifest/")) for f in chunks)


class StopAfter(api.Observer):
    """Stops a merge after some tiles."""

    def __init__(self, n_tiles):
        self._n_left = n_tiles

    def locked(self, stop):
        self._stop = stop

    def tile_ended(self, outcome):
        self._n_left -= 1
        if self._n_left == 0:
            self._stop()


def interrupted(search, output, n_tiles, **options):
    with pytest.raises(StoppedError):
        ocelot_em.merge(search, output, observer=StopAfter(n_tiles), **{**OPTIONS, **options})


def test_a_result_has_few_files_that_zarr_reads_and_the_same_bits(search, plain, tmp_path):
    output = tmp_path / "OUT.zarr"
    forecast = prepare([search], output, MergeOptions(**OPTIONS)).forecast
    ocelot_em.merge(search, output, **OPTIONS)
    assert_same_maps(read_maps(output), read_maps(plain))
    maps, expected = ocelot_em.open_merged(output), ocelot_em.open_merged(plain)
    for name in expected:
        np.testing.assert_array_equal(maps[name], expected[name])
    assert ocelot_em.check(output) == []
    assert is_packed(output)
    assert [f for f in files_of(output) if f.startswith("mip/")] == [
        *(f"mip/c.{y}.{x}" for y in range(2) for x in range(2)),
        "mip/zarr.json",
    ]
    assert forecast.n_files == len(files_of(output))
    assert forecast.n_inodes == len([*output.rglob("*")]) + 1
    assert len(files_of(plain)) > 2 * forecast.n_files
    progress = zarr.open_group(output / "progress", mode="r")
    assert not np.isnan(progress["tile_summary"][...]).any()
    assert not np.isnan(progress["numbers"][...]).all()
    assert ocelot_em.describe(output).tiles_done == 12
    assert ocelot_em.merge(search, output, **OPTIONS).n_merged == 0


@pytest.mark.parametrize("n_tiles", [1, 6])
def test_an_interrupted_merge_is_resumed_to_the_same_bits(search, plain, tmp_path, n_tiles):
    output = tmp_path / "OUT.zarr"
    interrupted(search, output, n_tiles, threads=1)
    n_done = ocelot_em.describe(output).tiles_done
    assert n_tiles <= n_done < 12
    interrupted(search, output, 1, threads=1)  # of which some tiles are files
    n_done_now = ocelot_em.describe(output).tiles_done
    assert n_done_now > n_done
    report = ocelot_em.merge(search, output, **OPTIONS)
    assert report.n_merged == 12 - n_done_now
    assert is_packed(output)
    assert_same_maps(read_maps(output), read_maps(plain))
    assert ocelot_em.check(output) == []


@pytest.mark.slow
def test_a_cluster_finishes_what_one_process_began(search, plain, tmp_path, monkeypatch):
    monkeypatch.setattr(result_shards, "EDGE", 16)  # as in workers
    monkeypatch.setattr(result_shards, "N_CHUNKS", 256)
    output = tmp_path / "OUT.zarr"
    interrupted(search, output, 5, threads=1)
    ocelot_em.merge(search, output, tile_size=16, cluster="local", workers=2, threads=1)
    assert is_packed(output)
    assert_same_maps(read_maps(output), read_maps(plain))
    assert ocelot_em.check(output) == []


def flipped(file, at):
    content = bytearray(file.read_bytes())
    content[at] ^= 0xFF
    file.write_bytes(content)


DAMAGE = {
    "index": lambda file: flipped(file, 9),
    "checksum of the index": lambda file: flipped(file, 16 * 4 + 1),
    "first chunk": lambda file: flipped(file, 16 * 4 + 40),
    "last byte": lambda file: flipped(file, -1),
    "cut off": lambda file: file.write_bytes(file.read_bytes()[:-50]),
    "cut in the index": lambda file: file.write_bytes(file.read_bytes()[:30]),
    "empty": lambda file: file.write_bytes(b""),
    "gone": lambda file: file.unlink(),
    "another": lambda file: shutil.copy(file.with_name("zarr.json"), file),
}


SHARDS = ("mip/c.0.1", "progress/tile_summary/c.0.1.0", "progress/counts/c.2")


@pytest.mark.parametrize(
    ("damage", "shard"),
    combinations(
        list(DAMAGE),
        SHARDS,
        fast=[("index", SHARDS[0]), ("cut off", SHARDS[1]), ("gone", SHARDS[2])]
        + [(damage, SHARDS[0]) for damage in DAMAGE if damage not in ("index", "cut off", "gone")],
    ),
)
def test_damage_is_reported_and_mended(search, plain, packed, tmp_path, shard, damage):
    output = shutil.copytree(packed, tmp_path / "OUT.zarr")
    DAMAGE[damage](output / shard)
    if shard.startswith("mip/"):
        with pytest.raises(ChunkError):
            ocelot_em.open_merged(output)["mip"].compute()
    if "tile_summary" not in shard:
        assert ocelot_em.check(output)
    report = ocelot_em.merge(search, output, **OPTIONS)
    assert 1 <= report.n_merged <= 4
    assert_same_maps(read_maps(output), read_maps(plain))
    assert ocelot_em.check(output) == []
    assert is_packed(output)


def test_chunks_of_an_older_copy_are_reported_and_do_not_hide_damage(
    search, plain, packed, tmp_path
):
    output = shutil.copytree(packed, tmp_path / "OUT.zarr")
    objects, key = open_objects(output), "mip/c/2/2"
    loose = output / key
    loose.parent.mkdir(parents=True)
    loose.write_bytes(objects.get(key))
    assert [key in problem for problem in ocelot_em.check(output)] == [True]
    flipped(output / "mip/c.1.1", 16 * 4 + 40)
    ocelot_em.merge(search, output, **OPTIONS)
    assert_same_maps(read_maps(output), read_maps(plain))
    assert ocelot_em.check(output) == []
    assert is_packed(output)


@pytest.mark.parametrize("n_tiles", [0, 5])
def test_a_montage_is_extended(tmp_path, n_tiles):
    """Whether or not the update was interrupted; only tiles that the exposure touches change."""
    search, output = write_shots(tmp_path / "RUN.zarr", SHOTS[:2]), tmp_path / "OUT.zarr"
    ocelot_em.merge(search, output, **OPTIONS)
    write_shots(search, SHOTS[2:4])
    if n_tiles:
        interrupted(search, output, n_tiles, threads=1)
    report = ocelot_em.merge(search, output, **OPTIONS)
    assert 0 < report.n_merged < report.n_tiles
    ocelot_em.merge(search, tmp_path / "ANEW.zarr", **OPTIONS)
    assert_same_maps(read_maps(output), read_maps(tmp_path / "ANEW.zarr"))
    assert ocelot_em.check(output) == []
    assert is_packed(output)


def test_a_bucket_with_a_copy_is_read(search, plain, tmp_path):
    output = tmp_path / "OUT.zarr"
    interrupted(search, output, 3)
    for place in ("memory://unfinished-shards", "memory://finished-shards"):
        bucket = open_objects(place)
        for file in files_of(output):
            bucket.put(file, [(output / file).read_bytes()])
        if place.endswith("/finished-shards"):
            break
        with pytest.raises(OutputExistsError, match="only a folder can hold, not a bucket"):
            ocelot_em.merge(search, place, **OPTIONS)
        ocelot_em.merge(search, output, **OPTIONS)
    assert ocelot_em.check(place) == []
    maps, expected = ocelot_em.open_merged(place), ocelot_em.open_merged(plain)
    for name in expected:
        np.testing.assert_array_equal(maps[name], expected[name])
    assert ocelot_em.merge(search, place, **OPTIONS).n_merged == 0
    bucket.put("mip/c.1.1", [b"damaged"])
    with pytest.raises(OutputExistsError, match="only a folder can hold, not a bucket"):
        ocelot_em.merge(search, place, **OPTIONS)
    assert ocelot_em.describe(place).attributes.state == "complete"


def put(held, key, content):
    held.objects.appends = True
    held.objects.put(key, [content])
    held.objects.commit()


def test_what_a_replaced_run_appends_late_changes_nothing(tmp_path, monkeypatch):
    """It was stopped right after it had proved its lock, so that no proof prevents the write."""
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 1000)
    place = open_objects(tmp_path / "OUT.zarr")
    with OutputLock(place) as old:
        put(old, "m/c/0/0", b"old")
        monkeypatch.setattr(lock, "_held_here", set())  # as if the old one were a dead process
        with OutputLock(place) as new:
            put(old, "m/c/1/0", b"late")
            put(new, "m/c/1/0", b"new")
            assert place.get("m/c/1/0") == b"new"
            pack(new.objects, "m")
            put(old, "m/c/1/1", b"late")
            put(old, "m/c/0/0", b"late")
            assert place.get("m/c/0/0") == b"old"
            assert place.get("m/c/1/0") == b"new"
            assert place.get("m/c/1/1") is None
            with pytest.raises(LockLostError):
                put(old, "m/c/2/0", b"late")  # another shard
            put(new, "m/c/2/0", b"new")
            assert list(place.sizes("m")) == ["m/c.0.0", "m/c.1.0"]
            assert sorted(places_of_chunks(place, "m")) == [(0, 0), (1, 0), (2, 0)]


def test_no_late_mark_arrives_once_marks_are_deleted(tmp_path, monkeypatch):
    """It could be of a tile that the replaced run had merged without a new exposure."""
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 1000)
    place = open_objects(tmp_path / "OUT.zarr")
    with OutputLock(place) as old:
        put(old, "m/c/0/0", b"old")
        monkeypatch.setattr(lock, "_held_here", set())
        with OutputLock(place) as new:
            pack(new.objects, "m", lambda _: True, drops=True)
            put(old, "m/c/0/1", b"late")
            assert list(places_of_chunks(place, "m")) == [(0, 0)]


def test_a_failed_commit_is_repeated_by_the_next(tmp_path, monkeypatch):
    """Of several threads, one may fail to write the index for the chunk of another."""
    place = open_objects(tmp_path / "OUT.zarr")
    with OutputLock(place) as held:
        held.objects.appends = True
        held.objects.put("m/c/0/0", [b"chunk"])
        with monkeypatch.context() as patched:
            patched.setattr(local._AppendedFile, "update", Mock(side_effect=OSError("full")))
            with pytest.raises(OSError, match="full"):
                held.objects.commit()
        held.objects.commit()
        assert place.get("m/c/0/0") == b"chunk"


def test_threads_write_one_shard_together(tmp_path, monkeypatch):
    monkeypatch.setattr(result_shards, "EDGE", 16)
    monkeypatch.setattr(result_shards, "N_CHUNKS", 256)
    with OutputLock(open_objects(tmp_path / "OUT.zarr")) as held:

        def write(column):
            for row in range(32):
                put(held, f"m/c/{row}/{column}", f"{row} {column}".encode() * 100)

        threads = [threading.Thread(target=write, args=[column]) for column in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for row in range(32):
            for column in range(8):
                found = open_objects(tmp_path / "OUT.zarr").get(f"m/c/{row}/{column}")
                assert found == f"{row} {column}".encode() * 100
        assert files_of(tmp_path / "OUT.zarr/m") == ["c.0.0", "c.1.0"]


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=3))
def test_each_chunk_has_a_slot_of_its_own(place):
    slot = slot_of("/".join(["a/b/c", *map(str, place)]))
    others = [(*place[:n], place[n] + 1, *place[n + 1 :]) for n in range(min(len(place), 2))]
    assert slot not in [slot_of("/".join(["a/b/c", *map(str, other)])) for other in others]
    assert slot.number < result_shards.N_CHUNKS
    assert slot_of(slot.shard) is None
    assert result_shards._place(slot) == tuple(place[:2])


def test_shards_of_another_layout_are_refused(packed, monkeypatch):
    monkeypatch.setattr(result_shards, "EDGE", 4)
    with pytest.raises(FormatError, match=r"expected shards of \(4, 4\) chunks, whose keys have"):
        ocelot_em.open_merged(packed)["mip"].compute()
