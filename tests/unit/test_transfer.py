"""Chunks on their way: order, errors, overlap, bounds."""

import itertools
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from obstore.store import MemoryStore

from ocelot_em.errors import CorruptChunkError, MissingChunkError, StorageError
from ocelot_em.merge.memory_model import (
    StorageShape,
    choose_tile,
    fitting_streams,
    worker_nbytes,
)
from ocelot_em.model.maps import MAPS, MIP, MapSet, PoseForm
from ocelot_em.model.options import MergeOptions
from ocelot_em.model.regions import Region
from ocelot_em.store import arrays as store
from ocelot_em.store import bucket
from ocelot_em.store.bucket import BucketObjects
from ocelot_em.store.contract import ReusedMemory
from ocelot_em.store.objects import open_objects
from ocelot_em.store.transfer import ReadAhead, Request, WriteBehind, chunks_ahead, chunks_behind


@pytest.fixture
def stored(tmp_path, rng):
    """A map of 6 x 5 chunks of 4 x 4, and what is in it."""
    objects = open_objects(tmp_path / "store")
    store.create_map(objects, "mip", MIP, (24, 20), (4, 4))
    chunked = store.open_map(objects, "mip", "test", MAPS[MIP].dtypes)
    values = rng.normal(size=(24, 20)).astype(np.float32)
    for chunk in chunked.grid:
        chunked.write(chunk.region, values[chunk.region.slices])
    return chunked, values


def memory(streams):
    return [ReusedMemory() for _ in range(chunks_ahead(streams))]


def read(reader, request, out):
    incoming = reader.group(request.group, lambda *_: np.empty(out.shape, out.dtype))
    with incoming.take(1) as (arrival,):
        arrival.decode(out.reshape(-1))


def requests_for(chunked):
    return [Request((c.iy, c.ix), chunked, c.region) for c in chunked.grid]


HANGING_SECONDS = 60
"""Nothing here takes long: whoever waits so long waits in vain."""


class Watched:
    """Objects that count what goes on at once.

    The first ``together`` requests wait for each other: they come back only if all of them are
    under way at the same time.
    """

    def __init__(self, objects, together=1):
        self._objects, self._together = objects, together
        self.url, self.streams = objects.url, objects.streams
        self.running = self.most_running = self.started = 0
        self._changed = threading.Condition()
        self._barrier = threading.Barrier(together, timeout=HANGING_SECONDS)

    def _watch(self, action, *arguments):
        with self._changed:
            self.started += 1
            self.running += 1
            self.most_running = max(self.most_running, self.running)
            is_first = self.started <= self._together
            self._changed.notify_all()
        try:
            if is_first:
                self._barrier.wait()
            return action(*arguments)
        finally:
            with self._changed:
                self.running -= 1

    def wait_until_started(self, n):
        with self._changed:
            return self._changed.wait_for(lambda: self.started >= n, HANGING_SECONDS)

    def get_into(self, key, memory, *most_nbytes):
        return self._watch(self._objects.get_into, key, memory, *most_nbytes)

    def put(self, key, parts):
        self._watch(self._objects.put, key, parts)


def watched(chunked, together=1):
    objects = Watched(chunked.objects, together)
    return objects, store.ChunkedMap(**{**vars(chunked), "objects": objects})


@pytest.mark.parametrize("streams", [1, 3, 8])
def test_reads_what_is_there(stored, streams):
    chunked, values = stored
    requests = [*requests_for(chunked), Request("all", chunked, Region.whole(values.shape))]
    with ReadAhead(requests, streams, memory(streams)) as incoming:
        for request in requests:
            out = np.empty(request.region.shape, np.float32)
            read(incoming, request, out)
            np.testing.assert_array_equal(out, values[request.region.slices])


def test_requests_may_be_left_out_but_not_repeated(stored):
    chunked, values = stored
    requests = requests_for(chunked)
    with ReadAhead(requests, 2, memory(2)) as incoming:
        for request in (requests[0], requests[7], requests[29]):
            out = np.empty((4, 4), np.float32)
            read(incoming, request, out)
            np.testing.assert_array_equal(out, values[request.region.slices])
        with pytest.raises(LookupError):
            read(incoming, requests[3], np.empty((4, 4), np.float32))


def test_a_group_has_what_was_announced_for_it_and_no_more(stored):
    chunked, values = stored
    regions = [chunk.region for chunk in chunked.grid]
    requests = [Request("ab"[number > 2], chunked, region) for number, region in enumerate(regions)]
    out = np.empty((4, 4), np.float32)
    with ReadAhead(requests, 2, memory(2)) as reader:
        first = reader.group("a", None)
        with first.take(2) as arrivals:
            for arrival, region in zip(arrivals, regions, strict=False):
                arrival.decode(out.reshape(-1))
                np.testing.assert_array_equal(out, values[region.slices])
        with pytest.raises(LookupError), first.take(2):
            pass
        second = reader.group("b", None)
        with second.take(1) as (arrival,):
            arrival.decode(out.reshape(-1))
        np.testing.assert_array_equal(out, values[regions[3].slices])


def test_an_error_comes_to_the_one_who_asks(stored):
    chunked, values = stored
    requests = requests_for(chunked)
    folder = chunked.objects.url
    Path(folder, "mip/c/0/2").unlink()
    Path(folder, "mip/c/0/4").write_bytes(b"x" * 100)
    out = np.empty((4, 4), np.float32)
    with ReadAhead(requests, 2, memory(2)) as incoming:
        for number, request in enumerate(requests[:6]):
            if number == 2:
                with pytest.raises(MissingChunkError, match="chunk \\(0, 2\\)"):
                    read(incoming, request, out)
            elif number == 4:
                with pytest.raises(CorruptChunkError, match="chunk \\(0, 4\\)"):
                    read(incoming, request, out)
            else:
                read(incoming, request, out)
                np.testing.assert_array_equal(out, values[request.region.slices])


def test_the_next_chunks_are_fetched_while_one_is_used(stored):
    objects, chunked = watched(stored[0])
    requests = requests_for(chunked)
    out = np.empty((4, 4), np.float32)
    with ReadAhead(requests, 1, memory(1)) as incoming:
        for number, request in enumerate(requests[:10]):
            with incoming.group(request.group, None).take(1) as (arrival,):
                assert objects.wait_until_started(number + 2)
                arrival.decode(out.reshape(-1))
    assert objects.most_running == 1


def test_no_more_is_fetched_than_is_said(stored):
    objects, chunked = watched(stored[0])
    requests = requests_for(chunked)
    taken = []

    def announced():
        for request in requests:
            taken.append(request)
            yield request

    with ReadAhead(announced(), 3, memory(3)) as incoming:
        read(incoming, requests[0], np.empty((4, 4), np.float32))
        # Whatever is taken is fetched, sooner or later.
        assert len(taken) == chunks_ahead(3) + 1
        assert objects.wait_until_started(len(taken))
    assert objects.started == len(taken)


def test_streams_are_used_at_once(stored):
    objects, chunked = watched(stored[0], together=4)
    requests = requests_for(chunked)
    with ReadAhead(requests, 4, memory(4)) as incoming:
        for request in requests:
            read(incoming, request, np.empty((4, 4), np.float32))
        assert incoming.meter.waited_seconds > 0
    assert objects.most_running == 4


def test_writes_arrive_and_are_bounded(tmp_path):
    watching = Watched(open_objects(tmp_path / "store"), together=2)
    with WriteBehind(2) as outgoing:
        written = []
        for number in range(12):
            written.append(outgoing.put(watching, f"a/{number}", [bytes([number])]))
            assert sum(not future.done() for future in written) <= chunks_behind(2)
        outgoing.wait(written)
        assert all(future.done() for future in written)
    objects = open_objects(tmp_path / "store")
    assert [objects.get(f"a/{n}") for n in range(12)] == [bytes([n]) for n in range(12)]
    assert watching.most_running == 2


@pytest.mark.parametrize(("seconds", "expected"), [(0.001, 16), (0.049, 25), (0.3, 64)])
def test_transfers_follow_the_fastest_request_and_memory_bounds_them(
    seconds, expected, monkeypatch
):
    times = itertools.accumulate([0, 10, 0, seconds, 0, 20])  # of the start and end of requests
    monkeypatch.setattr(bucket, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    objects = BucketObjects("memory://latency")
    monkeypatch.setattr(objects, "_opened", MemoryStore(), raising=False)
    with objects.snapshot() as known:
        assert [known.size("a"), objects.size("a"), known.size("b")] == [None] * 3
        assert known.streams == objects.streams == expected
    maps, tile = MapSet(PoseForm.EXPLICIT), (1024, 1024)
    storage = StorageShape(tile, 4, expected)
    least = worker_nbytes(tile, storage._replace(streams=16), maps, MergeOptions(threads=2))
    options = MergeOptions(threads=2, memory_limit=least)
    assert fitting_streams(tile, storage, maps, options) == 16
    assert choose_tile((4096, 4096), storage, maps, options, 0) == tile
    options = options.model_copy(update={"memory_limit": 2 * least})
    assert fitting_streams(tile, storage, maps, options) == expected


def test_a_failed_write_is_told_to_the_one_who_waits_for_it(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "file").write_bytes(b"")
    objects = open_objects(tmp_path / "store")
    with WriteBehind(1) as outgoing:
        bad = outgoing.put(objects, "file/below", [b"1"])
        good = [outgoing.put(objects, f"x/{n}", [b"1"]) for n in range(5)]
        outgoing.wait(good)
        with pytest.raises(StorageError, match="file/below"):
            outgoing.wait([bad])
