"""Stores in buckets and other places with URLs: the same maps as on a local disk."""

import re

import pytest

from builders import same_bits, write_explicit_search
from ocelot_em import (
    ImportOptions,
    check,
    describe,
    import_results,
    merge,
    open_merged,
    open_partials,
)
from ocelot_em.cli import main as cli
from ocelot_em.errors import (
    CorruptChunkError,
    InvalidInputError,
    MissingChunkError,
    StorageError,
    StoreNotFoundError,
    TilesFailedError,
)
from ocelot_em.model.maps import MIP
from s3 import BUCKET, bucket, server

__all__ = ["bucket", "server"]  # fixtures


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
    merge(run, f"{out}.lean", tile_size=64, derived="none")
    assert_same_datasets(open_merged(f"{out}.lean"), open_merged(out))

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


def test_shards_that_were_copied_to_a_bucket_are_read_there(bucket, tmp_path, small_chunks):
    run, url = write_explicit_search(tmp_path / "RUN.zarr", (40, 50), 2), f"s3://{BUCKET}/RUN.zarr"
    for path in run.rglob("*"):
        if path.is_file():
            bucket.upload_file(path, BUCKET, str(path.relative_to(tmp_path)))
    assert_same_datasets(open_partials(url), open_partials(run))
    merge(url, tmp_path / "A")
    merge(run, tmp_path / "B")
    assert_same_datasets(open_merged(tmp_path / "A"), open_merged(tmp_path / "B"))
    shard = run / "partials/gpu1/mip/c/0/0"
    for end in (100, -9):
        key, data = "RUN.zarr/partials/gpu1/mip/c/0/0", shard.read_bytes()[:end]
        bucket.put_object(Bucket=BUCKET, Key=key, Body=data)
        place = rf"{url}: partial 'gpu1': mip: chunk .* is corrupt: .*truncated"
        with pytest.raises(CorruptChunkError, match=place):
            open_partials(url)[MIP].compute()


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


def test_an_unknown_kind_of_url_is_refused():
    with pytest.raises(InvalidInputError, match=r"nowhere://x/RUN\.zarr: expected a path"):
        describe("nowhere://x/RUN.zarr")
