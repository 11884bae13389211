"""Stores of objects: the contract of all, and what directories add to it."""

import os

import pytest

from ocelot_em.errors import StorageError
from ocelot_em.store.bucket import BucketObjects
from ocelot_em.store.objects import open_objects
from ocelot_em.testing.objects_contract import ObjectsContract
from s3 import BUCKET, bucket, server

__all__ = ["bucket", "server"]  # fixtures


class TestDirectory(ObjectsContract):
    @pytest.fixture
    def objects(self, tmp_path):
        return open_objects(tmp_path / "place")


class TestMemory(ObjectsContract):
    @pytest.fixture
    def objects(self, tmp_path):
        return open_objects(f"memory://{tmp_path}")


class TestBucket(ObjectsContract):
    @pytest.fixture
    def objects(self, bucket):
        return open_objects(f"s3://{BUCKET}/place")


@pytest.fixture
def objects(tmp_path):
    return open_objects(tmp_path / "place")


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


def test_a_process_forked_from_a_user_of_buckets_is_told(monkeypatch):
    monkeypatch.setattr(BucketObjects, "_used_by", os.getppid())
    with pytest.raises(StorageError, match=r"open s3://b/x: .* was forked from .*get_context"):
        open_objects("s3://b/x").get("key")


def test_an_object_created_by_a_request_whose_answer_was_lost_is_created(tmp_path, monkeypatch):
    def link(source, target, link=os.link):
        link(source, target)
        raise FileExistsError

    monkeypatch.setattr(os, "link", link)
    assert open_objects(tmp_path / "x").create("key", b"1")
    assert not open_objects(tmp_path / "x").create("key", b"2")
    assert [*open_objects(tmp_path / "x").keys("")] == ["key"]
