"""Stores in buckets and other places with URLs: the same maps as on a local disk."""

import logging
import re
import urllib.request

import boto3
import pytest
from moto.server import ThreadedMotoServer

from builders import explicit_maps, same_bits, write_explicit_search
from ocelot_em import (
    ImportOptions,
    check,
    describe,
    import_results,
    merge,
    open_merged,
    open_partials,
    write_partial,
)
from ocelot_em.cli import main as cli
from ocelot_em.errors import (
    IncompleteError,
    InvalidInputError,
    MissingChunkError,
    StorageError,
    StoreNotFoundError,
    TilesFailedError,
)
from ocelot_em.model.maps import MIP
from ocelot_em.store.bucket import BucketObjects

BUCKET = "ocelot-tests"


@pytest.fixture(scope="module")
def server():
    # The server logs every request.
    logger = logging.getLogger("werkzeug")
    level = logger.level
    logger.setLevel(logging.ERROR)
    moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    yield f"http://{host}:{port}"
    moto.stop()
    logger.setLevel(level)


@pytest.fixture
def bucket(server, monkeypatch):
    """A client of a new bucket; obstore finds the server by its environment."""
    environment = {
        "AWS_ENDPOINT_URL": server,
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_REGION": "us-east-1",
        "AWS_VIRTUAL_HOSTED_STYLE_REQUEST": "false",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    # A process opens each place once, with the environment of that moment.
    BucketObjects.opened.cache_clear()
    client = boto3.client("s3", endpoint_url=server, region_name="us-east-1")
    client.create_bucket(Bucket=BUCKET)
    yield client
    BucketObjects.opened.cache_clear()
    urllib.request.urlopen(f"{server}/moto-api/reset", data=b"").close()


def assert_same_datasets(a, b):
    assert set(a.data_vars) == set(b.data_vars)
    for name in a.data_vars:
        assert same_bits(a[name], b[name]), name


def test_a_search_and_its_merge_in_a_bucket_are_those_of_a_local_disk(
    bucket, tmp_path, crops, tables, capsys
):
    run, out = f"s3://{BUCKET}/x/RUN.zarr", f"s3://{BUCKET}/x/OUT.zarr"
    files = [str(crop) for crop in crops[:2]]
    assert cli.run(["import", *files, "--output", run, "--search-space", str(tables)]) == 0
    assert cli.run(["merge", run, "--output", out, "--tile-size", "64"]) == 0
    for place in (run, out):
        assert cli.run(["info", place]) == 0
        assert cli.run(["check", place]) == 0
    assert "no problems" in capsys.readouterr().out

    import_results(files, tmp_path / "R", ImportOptions(search_space=tables))
    merge(tmp_path / "R", tmp_path / "M", tile_size=64)
    assert_same_datasets(open_partials(run), open_partials(tmp_path / "R"))
    assert_same_datasets(open_merged(out), open_merged(tmp_path / "M"))


def test_a_missing_object_is_named(bucket, tmp_path):
    run = write_explicit_search(f"s3://{BUCKET}/RUN.zarr", n_partials=2)
    bucket.delete_object(Bucket=BUCKET, Key="RUN.zarr/partials/gpu1/mip/c/0/0")
    place = rf"{run}: partial 'gpu1': mip: chunk \(0, 0\).* is missing"
    with pytest.raises(MissingChunkError, match=place):
        open_partials(run)[MIP].compute()
    with pytest.raises(TilesFailedError, match=place):
        merge(run, tmp_path / "M")
    (problem,) = check(run)
    assert re.search(place, problem)


def test_a_merge_in_a_bucket_goes_on_and_is_replaced(bucket, small_chunks):
    run = write_explicit_search(f"s3://{BUCKET}/RUN.zarr", (20, 50), n_partials=1)
    out = f"s3://{BUCKET}/OUT.zarr"
    assert merge(run, out, tile_size=32).n_merged == 2
    bucket.delete_object(Bucket=BUCKET, Key="OUT.zarr/progress/tile_summary/c/0/1/0")
    assert merge(run, out, tile_size=32).n_merged == 1
    assert merge(run, out, tile_size=32, overwrite=True).n_merged == 2
    assert check(out) == []


def test_an_interrupted_writer_in_a_bucket_is_refused_and_can_write_again(bucket):
    run = write_explicit_search(f"s3://{BUCKET}/RUN.zarr", n_partials=2)
    key = "RUN.zarr/partials/gpu1/zarr.json"
    body = bucket.get_object(Bucket=BUCKET, Key=key)["Body"].read()
    bucket.put_object(Bucket=BUCKET, Key=key, Body=body.replace(b'"complete"', b'"writing"'))
    with pytest.raises(IncompleteError, match="gpu1"):
        open_partials(run)
    write_partial(run, "gpu1", explicit_maps(seed=8), total_projections=5)
    assert check(run) == []
    assert describe(run).attributes.total_projections == 1000 + 5


def test_places_that_are_not_there(bucket):
    with pytest.raises(StoreNotFoundError):
        describe(f"s3://{BUCKET}/nothing")
    with pytest.raises((StorageError, StoreNotFoundError), match="no-such-bucket"):
        describe("s3://no-such-bucket/RUN.zarr")


def test_a_store_may_be_in_memory(tmp_path):
    run, out = "memory://ocelot/RUN.zarr", "memory://ocelot/OUT.zarr"
    write_explicit_search(run, (40, 50))
    merge(run, out)
    assert check(run) == check(out) == []
    write_explicit_search(tmp_path / "R", (40, 50))
    merge(tmp_path / "R", tmp_path / "M")
    assert_same_datasets(open_partials(run), open_partials(tmp_path / "R"))
    assert_same_datasets(open_merged(out), open_merged(tmp_path / "M"))
    assert merge(run, out, overwrite=True).n_merged == 1


def test_an_unknown_kind_of_url_is_refused():
    with pytest.raises(InvalidInputError, match=r"nowhere://x/RUN\.zarr: expected a path"):
        describe("nowhere://x/RUN.zarr")
