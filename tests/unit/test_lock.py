"""One writer of an output: who is refused, what is left behind, who has to stop."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from ocelot_em.errors import LockLostError, OutputLockedError, StorageError
from ocelot_em.store import fence, lock
from ocelot_em.store.fence import RunLease
from ocelot_em.store.local import LocalObjects
from ocelot_em.store.lock import OutputLock
from ocelot_em.store.objects import open_objects

HANGING_SECONDS = 60
"""For a thread to do what it does every tenth of a second."""


class Clock:
    """Whoever sleeps by it, makes it later."""

    def __init__(self):
        self.now, self.slept, self.at_each_sleep = 1000.0, 0.0, lambda: None

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        self.slept += seconds
        self.at_each_sleep()


@pytest.fixture
def clock(monkeypatch):
    """The clock by which locks are watched."""
    clock = Clock()
    monkeypatch.setattr(lock, "time", clock)
    monkeypatch.setattr(fence, "now", clock.monotonic)
    return clock


@pytest.fixture(params=["local", "memory"])
def place(request, tmp_path, monkeypatch, clock):
    """An output; its lock is written anew often, and nobody really waits."""
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.1)
    url = tmp_path / "OUT.zarr" if request.param == "local" else f"memory://{tmp_path}/OUT.zarr"
    return open_objects(url)


def left_by(objects, number=0, **changes):
    """Leave a lock behind, as a process of this machine that is no more would."""
    this = {"id": "x", **lock.this_process(), "beat": 3}
    objects.put(f"lock/{number}", [json.dumps({**this, **changes}).encode()])


def keys(objects):
    return sorted(objects.keys("lock"))


def test_a_lock_is_there_as_long_as_it_is_held(place):
    with OutputLock(place) as held:
        assert keys(place) == [held.key] == ["lock/0"]
        content = json.loads(place.get(held.key))
        assert {"id", "host", "boot", "pid", "since", "started", "beat", "stops"} == set(content)
    assert keys(place) == []


def test_a_second_holder_is_refused_at_once_and_told_who_holds_it(place, clock):
    with OutputLock(place):
        with pytest.raises(OutputLockedError, match=r"another run is writing it: process \d+ on"):
            OutputLock(place).__enter__()
        assert clock.slept == 0
    with OutputLock(place):
        pass


def test_the_lock_of_a_process_that_is_gone_is_replaced_at_once(place, clock):
    left_by(place, started=1)
    with OutputLock(place) as held:
        assert clock.slept == 0
        assert keys(place) == [held.key] == ["lock/1"]


def test_a_step_of_the_clock_does_not_make_a_living_process_look_dead(place, monkeypatch):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as living:
        left_by(place, pid=living.pid, started=lock._started(living.pid))
        create_time = psutil.Process.create_time
        monkeypatch.setattr(psutil.Process, "create_time", lambda p: create_time(p) + 3600)
        with pytest.raises(OutputLockedError, match=f"process {living.pid} on"):
            OutputLock(place).__enter__()
        living.communicate(b"\n")
    with OutputLock(place) as held:
        assert held.key == "lock/1"


def test_a_process_takes_again_what_it_could_not_release(place, clock, monkeypatch):
    def fails(_key):
        raise StorageError("no")

    with OutputLock(place) as held:
        monkeypatch.setattr(held.objects, "delete_one", fails)
    assert keys(place) == ["lock/0"]
    with OutputLock(place) as again:
        assert again.key == "lock/1"
        assert clock.slept == 0
    assert keys(place) == []


def test_a_lock_that_vanished_is_not_held(place):
    with OutputLock(place) as held:
        held.objects.put("a", [b"mine"])
        place.delete_one("lock/0")
        with pytest.raises(LockLostError, match="its lock is gone"):
            held.prove()
        with pytest.raises(LockLostError):
            held.objects.put("a", [b"late"])
        assert held.stopping.is_set()
    assert place.get("a") == b"mine"


LATE = {
    "put": lambda objects: objects.put("a/b", [b"late"]),
    "put anew": lambda objects: objects.put("new/b", [b"late"]),
    "create": lambda objects: objects.create("new/c", b"late"),
    "delete_one": lambda objects: objects.delete_one("a/b"),
    "delete": lambda objects: objects.delete("a"),
    "delete all": lambda objects: objects.delete("", keep="lock"),
    "set_aside": lambda objects: objects.set_aside(),
    "heartbeat": lambda objects: objects.put("lock/0", [b"{}"]),
}


@pytest.mark.parametrize("has_proof", [True, False])
@pytest.mark.parametrize("late", LATE.values(), ids=LATE)
def test_a_run_that_was_replaced_writes_nothing(place, late, has_proof, clock, monkeypatch):
    """Whether it was stopped longer than a proof is valid, or, in a directory, right after it."""
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 1000)
    with OutputLock(place) as old:
        old.objects.put("a/b", [b"old"])
        monkeypatch.setattr(lock, "_held_here", set())  # as if the old one were a dead process
        with OutputLock(place) as new:
            new.objects.put("a/b", [b"new"])
            if not (has_proof and isinstance(place, LocalObjects)):
                clock.now += 1.5 * fence.CHECK_SECONDS
            with pytest.raises(
                LockLostError, match=r"process \d+ on .* since 20.* has taken it over"
            ):
                late(old.objects)
            assert place.get("a/b") == b"new"
            assert sorted(place.sizes("")) == ["a/b", new.key]
    assert sorted(place.sizes("")) == ["a/b"]


@pytest.mark.parametrize("changes", [{"host": "another"}, {"boot": "before"}, {"pid": "no number"}])
def test_a_lock_of_elsewhere_is_watched_and_replaced_if_it_does_not_change(place, clock, changes):
    left_by(place, **changes)
    reasons = []
    with OutputLock(place, reasons.append):
        assert 0 <= clock.slept - lock.STALE_SECONDS < lock.CHECK_SECONDS
    assert len(reasons) == 1
    assert "for a heartbeat of that run" in reasons[0]


@pytest.mark.parametrize("looks", [1, 80])
def test_a_lock_of_elsewhere_that_changes_is_respected(place, clock, looks):
    left_by(place, host="another")

    def beat():
        if clock.slept >= looks * lock.CHECK_SECONDS:
            left_by(place, host="another", beat=4)

    clock.at_each_sleep = beat
    with pytest.raises(OutputLockedError, match="on another"):
        OutputLock(place).__enter__()
    assert clock.slept == looks * lock.CHECK_SECONDS


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"null", b'{"pid": 1e400}', b"[" * 60_000])
def test_a_lock_that_says_nothing_is_watched_too(place, clock, content):
    place.put("lock/4", [content])
    with OutputLock(place) as held:
        assert clock.slept >= lock.STALE_SECONDS
        assert held.key == "lock/5"
        assert keys(place) == ["lock/5"]


def test_other_files_beside_a_lock_do_not_matter(place):
    for name in ("x", "-1", "1.old", "\u0663", "9" * 200, "3/4"):
        place.put(f"lock/{name}", [b"{}"])
    with OutputLock(place) as held:
        assert held.key == "lock/0"


def test_of_many_that_want_a_left_lock_one_gets_it(place):
    left_by(place, started=1)
    n = 8
    together, done = (threading.Barrier(n, timeout=HANGING_SECONDS) for _ in range(2))
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


def test_a_run_that_gives_up_while_its_folder_is_taken_over_does_not_matter(tmp_path, monkeypatch):
    listed = Path.iterdir

    def with_one_that_has_gone(folder):
        yield from listed(folder)
        if folder.name == "lock":
            yield folder / "#7"

    monkeypatch.setattr(Path, "iterdir", with_one_that_has_gone)
    place = open_objects(tmp_path / "OUT.zarr")
    with OutputLock(place) as held:
        assert keys(place) == [held.key]
    assert keys(place) == []


def test_a_holder_that_was_replaced_notices(place):
    with OutputLock(place) as held:
        left_by(place, number=7)
        assert held.lost.wait(HANGING_SECONDS)
        assert held.stopping.is_set()
        with pytest.raises(LockLostError, match=r"process \d+ on .* has taken it over"):
            held.prove()
    assert "lock/7" in keys(place)


def test_workers_have_leave_until_the_run_ends_is_stopped_or_replaced(place, clock):
    with OutputLock(place) as held:
        leave = RunLease(place, held.key, held.id)
        assert leave.is_held
        assert not RunLease(place, held.key, "another").is_held
        held.stop()
        deadline = time.monotonic() + HANGING_SECONDS
        while not json.loads(place.get(held.key))["stops"]:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert leave.is_held  # it does not look again for a moment
        clock.now += 1.5 * lock.CHECK_SECONDS
        assert not leave.is_held
    assert keys(place) == []
    assert not RunLease(place, held.key, held.id).is_held
    with OutputLock(place) as again:
        # The number is the same, but it is another run's.
        assert again.key == held.key
        assert not RunLease(place, held.key, held.id).is_held


def test_writes_that_wait_share_a_proof_whatever_expires_meanwhile(clock):
    """Threads of a bucket would else prove the lock one after the other, for every write."""
    n_threads, n_waiting, n_proofs = 8, 0, 0

    class Checking:
        lock = threading.Lock()

        def __enter__(self):
            nonlocal n_waiting
            n_waiting += 1
            self.lock.acquire()

        def __exit__(self, *_):
            self.lock.release()

    class Place:
        def get(self, *_):
            nonlocal n_proofs
            n_proofs += 1
            while n_waiting < n_threads:
                time.sleep(0.001)
            clock.now += 0.01
            lease.expire()  # by a tile of another thread
            return b'{"id": "x"}'

    lease = RunLease(Place(), "lock/0", "x")
    lease._checking = Checking()
    threads = [threading.Thread(target=lease.refresh) for _ in range(n_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert n_proofs == 1
    lease.refresh()
    assert n_proofs == 2
