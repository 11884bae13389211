"""Tests that every store of byte objects must pass; importing this module needs pytest."""

import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from ocelot_em.errors import StorageError
from ocelot_em.store.contract import Objects, ReusedMemory


class ObjectsContract:
    """Contract of :class:`~ocelot_em.store.contract.Objects`, for pytest.

    A store that passes can hold searches and merged results. What the package relies on:

    - An object is whole or absent, for readers in other threads too: :meth:`Objects.put` replaces
      it atomically.
    - Of several concurrent :meth:`Objects.create` of one key, exactly one succeeds. Locks, numbers
      of exposures and new groups depend on this.
    - What was written is found at once by every read and listing.
    - A prefix is a folder: ``a`` has ``a/b``, but not ``ab``.
    - Absence is a result (None, or an empty listing), not an error. Failures and objects above a
      size limit are a :class:`~ocelot_em.errors.StorageError` that names the object.
    - Several may delete the same at the same time.
    - A pickled store opens the same place in another process.

    Subclass it in a test module, with a fixture that returns an empty store. (The first call lets
    pytest show the values of failed assertions.) ::

        pytest.register_assert_rewrite("ocelot_em.testing.objects_contract")

        from ocelot_em.testing.objects_contract import ObjectsContract

        class TestMyStore(ObjectsContract):
            @pytest.fixture
            def objects(self, tmp_path):
                return MyStore(tmp_path)
    """

    @pytest.fixture
    def objects(self) -> Objects:
        """Return an empty store, of its own for each test."""
        raise NotImplementedError("return an empty store from the fixture 'objects'")

    def test_several_may_delete_the_same(self, objects: Objects) -> None:
        for key in range(200):
            objects.put(f"old/m/c/{key % 10}/{key}", [b"1"])
        with ThreadPoolExecutor(4) as pool:
            for done in [pool.submit(objects.delete, "old") for _ in range(4)]:
                done.result()
        assert not [*objects.children("old")]

    def test_a_snapshot_reads_once(self, objects: Objects) -> None:
        objects.put("a/b/c", [b"1"])
        with objects.snapshot() as known:
            known.prefetch(["a/b/c", "none"], ["a"])
            assert (known.get("a/b/c"), known.get("none")) == (b"1", None)
            assert known.children("a") == ["b"]
            objects.put("a/b/c", [b"22"])
            assert known.get("a/b/c") == b"1"
            with pytest.raises(StorageError, match="a/b/c: expected at most 0 bytes"):
                known.get("a/b/c", 0)
        assert known.get("a/b/c") == objects.get("a/b/c") == b"22"

    def test_what_is_put_is_read(self, objects: Objects) -> None:
        objects.put("a/b/c", [b"12", b"", b"3" * 100_000])
        assert objects.get("a/b/c") == b"12" + b"3" * 100_000
        assert objects.size("a/b/c") == 100_002
        objects.put("a/b/c", [b"4"])
        assert objects.get("a/b/c") == b"4"
        assert objects.size("a/b/c") == 1
        objects.put("a/empty", [])
        assert objects.get("a/empty") == b""

    def test_what_is_absent_is_no_error(self, objects: Objects) -> None:
        assert objects.get("zarr.json") is None
        assert objects.sizes("") == {}
        assert list(objects.keys("lock")) == []
        assert objects.children("partials") == []
        objects.tidy("")
        objects.sync()
        objects.put("a/b", [b"1"])
        for key in ("a", "a/b/c", "a/x", "x", "a/b.json"):
            assert objects.get(key) is None
            assert objects.get_into(key, ReusedMemory()) is None
            assert objects.size(key) is None
        for prefix in ("x", "a/b/c"):
            assert objects.sizes(prefix) == {}
            assert list(objects.keys(prefix)) == []
            assert objects.children(prefix) == []
            objects.delete_one(prefix)
            objects.tidy(prefix)
        assert objects.get("a/b") == b"1"

    def test_ranges_end_where_the_object_ends_and_follow_its_name(self, objects: Objects) -> None:
        objects.put("a/b", [b"9876543210"])
        read = objects.ranges("a/b")
        assert bytes(read(ReusedMemory(), 1, 1) or b"") == b"8"
        objects.put("a/b", [b"0123456789"])
        for start, n, expected in ((2, 3, b"234"), (8, 9, b"89"), (10, 1, b""), (2**61, 9, b"")):
            found = read(ReusedMemory(), n, start)
            assert found is not None
            assert bytes(found) == expected
        assert objects.ranges("a/c")(ReusedMemory(), 1, 0) is None

    def test_objects_are_read_into_memory_of_the_caller(self, objects: Objects) -> None:
        memory = ReusedMemory()
        contents = {"small": b"1" * 10, "large": b"2" * 1000}
        for key in (*contents, *contents):
            objects.put(key, [contents[key]])
            read = objects.get_into(key, memory)
            assert read is not None
            assert bytes(read) == contents[key]
            read[0] = 7  # the caller may write into it
            assert objects.get(key) == contents[key]

    def test_objects_above_the_limit_are_refused_by_name(self, objects: Objects) -> None:
        objects.put("a/large", [b"1" * 101])
        assert objects.get("a/large", 101) == b"1" * 101
        with pytest.raises(StorageError, match=r"a/large.*at most 100 bytes, got 101"):
            objects.get("a/large", 100)
        with pytest.raises(StorageError, match=r"a/large.*at most 100 bytes, got 101"):
            objects.get_into("a/large", ReusedMemory(), 100)

    def test_the_first_to_create_an_object_keeps_it(self, objects: Objects) -> None:
        assert objects.create("a/b", b"first")
        assert not objects.create("a/b", b"second")
        assert objects.get("a/b") == b"first"
        objects.put("a/b", [b"third"])
        objects.delete_one("a/b")
        assert objects.create("a/b", b"fourth")
        assert objects.get("a/b") == b"fourth"

    def test_of_many_that_create_an_object_one_succeeds(self, objects: Objects) -> None:
        n = 8
        together = threading.Barrier(n)

        def create(number: int) -> bool:
            together.wait()
            return objects.create("lock/0", str(number).encode())

        with ThreadPoolExecutor(n) as pool:
            created = list(pool.map(create, range(n)))
        assert sum(created) == 1
        assert objects.get("lock/0") == str(created.index(True)).encode()

    def test_readers_never_see_a_half_written_object(self, objects: Objects) -> None:
        whole = {bytes([number]) * 200_000 for number in range(2)}
        objects.put("a/b", [min(whole)])
        ended = threading.Event()

        def write() -> None:
            try:
                for _ in range(20):
                    for content in whole:
                        objects.put("a/b", [content[:7], content[7:]])
            finally:
                ended.set()

        writer = threading.Thread(target=write)
        writer.start()
        while not ended.is_set():
            assert objects.get("a/b") in whole
            assert set(objects.keys("a")) == {"a/b"}
        writer.join()

    def test_listings(self, objects: Objects) -> None:
        sizes = {"a/b/c/0/0": 1, "a/b/c/0/10": 2, "a/zarr.json": 0, "ab/x": 1, "r": 0}
        for key, size in sizes.items():
            objects.put(key, [b"1" * size])
        assert objects.sizes("") == sizes
        below = {key: size for key, size in sizes.items() if key.startswith("a/")}
        assert objects.sizes("a") == below
        assert sorted(objects.keys("a")) == sorted(below)
        assert sorted(objects.keys("a/b/c/0")) == ["a/b/c/0/0", "a/b/c/0/10"]
        assert objects.children("a") == ["b"]
        assert objects.children("a/b/c") == ["0"]

    def test_deleting(self, objects: Objects) -> None:
        for key in ("a/b/c", "a/b/d", "a/x", "ab/c", "lock/0", "r"):
            objects.put(key, [b"1"])
        objects.delete_one("a/x")
        objects.delete_one("a/x")
        objects.delete("a/b")
        assert set(objects.sizes("")) == {"ab/c", "lock/0", "r"}
        objects.delete("", keep="lock")
        assert set(objects.sizes("")) == {"lock/0"}
        objects.delete("")
        objects.delete("")
        assert objects.sizes("") == {}
        objects.put("a/b/c", [b"2"])
        assert objects.get("a/b/c") == b"2"

    def test_upkeep_changes_nothing(self, objects: Objects) -> None:
        objects.put("a/b", [b"1"])
        objects.tidy("a")
        objects.tidy("")
        objects.sync()
        assert objects.sizes("") == {"a/b": 1}
        free = objects.free_bytes()
        assert free is None or free > 0

    def test_a_pickled_store_opens_the_same_place(self, objects: Objects) -> None:
        objects.put("a/b", [b"1"])
        again: Objects = pickle.loads(pickle.dumps(objects))
        assert again.url == objects.url
        assert again.get("a/b") == b"1"
        assert again.streams == objects.streams >= 1

    def test_threads_share_a_store(self, objects: Objects) -> None:
        def write_and_read(number: int) -> bytes | None:
            objects.put(f"t/{number % 4}/{number}", [str(number).encode()])
            return objects.get(f"t/{number % 4}/{number}")

        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(write_and_read, range(64))) == [b"%d" % n for n in range(64)]
        assert len(objects.sizes("t")) == 64
