"""Chunks on their way: order, errors, overlap, bounds."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest

from ocelot_em import store
from ocelot_em.canvas import Region
from ocelot_em.errors import CorruptChunkError, MissingChunkError, StorageError
from ocelot_em.maps import MAPS, MIP
from ocelot_em.objects import ReusedMemory, open_objects
from ocelot_em.transfer import ReadAhead, Request, WriteBehind, chunks_ahead, chunks_behind


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


def read(incoming, request, out):
    arrival = incoming.open(request, out)
    arrival.decode(0, 1, out.reshape(-1))
    incoming.close()


def requests_for(chunked):
    return [Request((c.iy, c.ix), chunked, c.region) for c in chunked.grid]


class Slow:
    """Objects that take their time, and count what goes on at once."""

    def __init__(self, objects, seconds):
        self._objects, self._seconds = objects, seconds
        self.url, self.streams = objects.url, objects.streams
        self.running = self.most_running = self.started = 0
        self._lock = threading.Lock()

    def _take_time(self):
        with self._lock:
            self.started += 1
            self.running += 1
            self.most_running = max(self.most_running, self.running)
        time.sleep(self._seconds)
        with self._lock:
            self.running -= 1

    def get_into(self, key, memory, *most_nbytes):
        self._take_time()
        return self._objects.get_into(key, memory, *most_nbytes)

    def put(self, key, parts):
        self._take_time()
        self._objects.put(key, parts)


def slowed(chunked, seconds):
    slow = Slow(chunked.objects, seconds)
    return slow, store.ChunkedMap(**{**vars(chunked), "objects": slow})


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
    slow, chunked = slowed(stored[0], 0.02)
    requests = requests_for(chunked)
    out = np.empty((4, 4), np.float32)
    with ReadAhead(requests, 1, memory(1)) as incoming:
        started = time.perf_counter()
        for request in requests[:10]:
            read(incoming, request, out)
            time.sleep(0.02)
        seconds = time.perf_counter() - started
    assert seconds < 10 * 0.04 * 0.85  # one after the other takes 0.4 s
    assert slow.most_running == 1


def test_no_more_is_fetched_than_is_said(stored):
    slow, chunked = slowed(stored[0], 0.0)
    requests = requests_for(chunked)
    with ReadAhead(requests, 3, memory(3)) as incoming:
        read(incoming, requests[0], np.empty((4, 4), np.float32))
        time.sleep(0.1)
        assert slow.started <= chunks_ahead(3) + 1
    assert slow.started <= chunks_ahead(3) + 1


def test_streams_are_used_at_once(stored):
    slow, chunked = slowed(stored[0], 0.02)
    requests = requests_for(chunked)
    with ReadAhead(requests, 4, memory(4)) as incoming:
        for request in requests:
            read(incoming, request, np.empty((4, 4), np.float32))
        assert incoming.waited_seconds > 0
    assert slow.most_running == 4


def test_writes_arrive_and_are_bounded(tmp_path):
    slow = Slow(open_objects(tmp_path / "store"), 0.01)
    with WriteBehind(2) as outgoing:
        written = []
        for number in range(12):
            written.append(outgoing.put(slow, f"a/{number}", [bytes([number])]))
            assert sum(not future.done() for future in written) <= chunks_behind(2)
        outgoing.wait(written)
        assert all(future.done() for future in written)
    objects = open_objects(tmp_path / "store")
    assert [objects.get(f"a/{n}") for n in range(12)] == [bytes([n]) for n in range(12)]
    assert slow.most_running == 2


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
