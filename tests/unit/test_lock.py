"""One writer of an output: who is refused, what is left behind, who has to stop."""

import json
import threading
import time

import pytest

from ocelot_em import lock
from ocelot_em.errors import OutputLockedError
from ocelot_em.lock import Leave, OutputLock
from ocelot_em.objects import open_objects

STALE, LOOK = 0.6, 0.05


@pytest.fixture(params=["local", "memory"])
def place(request, tmp_path, monkeypatch):
    """An output; waits are short."""
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(lock, "STALE_SECONDS", STALE)
    monkeypatch.setattr(lock, "LOOK_SECONDS", LOOK)
    url = tmp_path / "OUT.zarr" if request.param == "local" else f"memory://{tmp_path}/OUT.zarr"
    return open_objects(url)


def left_by(objects, number=0, **changes):
    """Leave a lock behind, as a process of this machine that is no more would."""
    this = {"id": "x", **lock._this_process(), "beat": 3}
    objects.put(f"lock/{number}", [json.dumps({**this, **changes}).encode()])


def keys(objects):
    return sorted(objects.keys("lock"))


def test_a_lock_is_there_as_long_as_it_is_held(place):
    with OutputLock(place) as held:
        assert keys(place) == [held.key] == ["lock/0"]
        content = json.loads(place.get(held.key))
        assert {"id", "host", "boot", "pid", "process_started", "beat", "stops"} == set(content)
        assert held.left_behind is None
        assert not held.power_was_lost
    assert keys(place) == []


def test_a_second_holder_is_refused_at_once_and_told_who_holds_it(place):
    with OutputLock(place):
        since = time.monotonic()
        with pytest.raises(OutputLockedError, match=r"another run is writing it: process \d+ on"):
            OutputLock(place).__enter__()
        assert time.monotonic() - since < STALE
    with OutputLock(place):
        pass


def test_the_lock_of_a_process_that_is_gone_is_replaced_at_once(place):
    left_by(place, process_started=1.0)
    since = time.monotonic()
    with OutputLock(place) as held:
        assert time.monotonic() - since < STALE
        assert keys(place) == [held.key] == ["lock/1"]
        assert held.left_behind["beat"] == 3
        assert not held.power_was_lost  # this machine still runs


@pytest.mark.parametrize("changes", [{"host": "another"}, {"boot": "before"}, {"pid": "no number"}])
def test_a_lock_of_elsewhere_is_watched_and_replaced_if_it_does_not_change(place, changes):
    left_by(place, **changes)
    told = []
    since = time.monotonic()
    with OutputLock(place, told.append) as held:
        assert time.monotonic() - since >= STALE
        assert held.power_was_lost == ("boot" in changes)
    assert len(told) == 1
    assert "to see whether that run still lives" in told[0]


def test_a_lock_of_elsewhere_that_changes_is_respected(place):
    left_by(place, host="another")
    stop = threading.Event()

    def beat():
        number = 3
        while not stop.wait(0.1):
            number += 1
            left_by(place, host="another", beat=number)

    beating = threading.Thread(target=beat)
    beating.start()
    try:
        with pytest.raises(OutputLockedError, match="on another"):
            OutputLock(place).__enter__()
    finally:
        stop.set()
        beating.join()


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"null", b'{"pid": 1e400}', b"[" * 60_000])
def test_a_lock_that_says_nothing_is_watched_too(place, content):
    place.put("lock/4", [content])
    with OutputLock(place) as held:
        assert held.key == "lock/5"
        assert keys(place) == ["lock/5"]


def test_other_files_beside_a_lock_do_not_matter(place):
    for name in ("x", "-1", "1.old", "\u0663", "9" * 200, "3/4"):
        place.put(f"lock/{name}", [b"{}"])
    with OutputLock(place) as held:
        assert held.key == "lock/0"


def test_of_many_that_want_a_left_lock_one_gets_it(place):
    left_by(place, process_started=1.0)
    n = 8
    together, done = threading.Barrier(n), threading.Barrier(n)
    ends = []

    def contend():
        together.wait()
        try:
            with OutputLock(place):
                ends.append("held")
                done.wait()
        except OutputLockedError:
            ends.append("refused")
            done.wait()

    threads = [threading.Thread(target=contend) for _ in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(ends) == ["held", *["refused"] * (n - 1)]
    assert keys(place) == []


def test_a_holder_that_was_replaced_notices(place):
    with OutputLock(place) as held:
        left_by(place, number=7)
        assert held.lost.wait(5)
        assert held.stopping.is_set()
    assert keys(place) == ["lock/7"]


def test_workers_have_leave_until_the_run_ends_is_stopped_or_replaced(place):
    with OutputLock(place) as held:
        leave = Leave(place, held.key, held.id)
        assert leave.goes_on
        assert not Leave(place, held.key, "another").goes_on
        held.stop()
        deadline = time.monotonic() + 5
        while leave.goes_on:
            assert time.monotonic() < deadline
            time.sleep(LOOK)
    assert keys(place) == []
    assert not Leave(place, held.key, held.id).goes_on
    with OutputLock(place) as again:
        # The number is the same, but it is another run's.
        assert again.key == held.key
        assert not Leave(place, held.key, held.id).goes_on
