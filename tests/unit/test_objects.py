"""Objects in a directory: whole or not there, whatever else lies about."""

import os

import pytest

from ocelot_em.errors import StorageError
from ocelot_em.store.contract import ReusedMemory
from ocelot_em.store.objects import open_objects


@pytest.fixture
def objects(tmp_path):
    return open_objects(tmp_path / "place")


def test_put_and_get(objects):
    objects.put("a/b/c", [b"12", b"", b"3" * 100_000])
    assert objects.get("a/b/c") == b"12" + b"3" * 100_000
    objects.put("a/b/c", [b"4"])
    assert objects.get("a/b/c") == b"4"
    assert objects.size("a/b/c") == 1
    assert objects.sizes("") == {"a/b/c": 1}
    assert list(objects.keys("a")) == ["a/b/c"]


def test_what_is_not_there(objects):
    assert objects.get("a") is None
    assert objects.size("a") is None
    assert list(objects.keys("")) == []
    objects.put("a/b", [b"1"])
    assert objects.get("a/b/c") is None  # below a file
    assert objects.get("a") is None  # a folder


def test_memory_is_used_again_and_grows(objects):
    memory = ReusedMemory()
    objects.put("small", [b"1" * 10])
    objects.put("large", [b"2" * 1000])
    for _ in range(2):
        assert bytes(objects.get_into("small", memory)) == b"1" * 10
        large = objects.get_into("large", memory)
        assert bytes(large) == b"2" * 1000
        assert not large.readonly


def test_what_is_half_written_is_not_listed_and_can_be_tidied(objects, tmp_path):
    objects.put("m/c/0/1", [b"1"])
    left = tmp_path / "place/m/c/0/1#123456789"
    left.write_bytes(b"half")
    (tmp_path / "place/m/c/0/note#me").write_bytes(b"somebody's")
    assert "m/c/0/1#123456789" not in objects.sizes("")
    objects.tidy("m")
    assert not left.exists()
    assert (tmp_path / "place/m/c/0/note#me").exists()
    assert objects.get("m/c/0/1") == b"1"
    open_objects(tmp_path / "nowhere").tidy("")


def test_a_failed_write_leaves_nothing(objects, tmp_path):
    objects.put("m/a", [b"1"])
    (tmp_path / "place/m/b").mkdir()
    (tmp_path / "place/m/b/inside").write_bytes(b"")
    with pytest.raises(StorageError, match="m/b"):
        objects.put("m/b", [b"2"])
    assert sorted(path.name for path in (tmp_path / "place/m").iterdir()) == ["a", "b"]


def test_a_pipe_is_no_object(objects, tmp_path):
    objects.put("m/a", [b"1"])
    os.mkfifo(tmp_path / "place/m/pipe")
    with pytest.raises(StorageError, match="expected a file"):
        objects.get("m/pipe")
