"""Round trips of a merge in a bucket: at its start and end, whatever the number of partials."""

import pytest
from benchmarks.object_store import as_bucket, round_trips, tiny_montage, tiny_search
from rich.console import Console

from ocelot_em import MergedResult, describe, merge
from ocelot_em.cli.watch_command import Watched
from ocelot_em.errors import StorageError, TilesFailedError
from ocelot_em.model.maps import MapSet, PoseForm
from ocelot_em.model.options import MergeOptions
from ocelot_em.store import constants
from ocelot_em.store.bucket import MemoryObjects

MAX_ROUND_TRIPS = 10


@pytest.fixture(scope="module")
def search():
    return tiny_search(18)


def test_a_merge_starts_and_ends_in_few_round_trips(search):
    found = round_trips(search, "memory://round-trips", tile_size=8)
    assert found.start <= MAX_ROUND_TRIPS
    assert found.end <= MAX_ROUND_TRIPS
    # Per partial: root, list, sizes of 7 maps, and in the worker manifest and 7 maps; then 28
    # chunks; and whether it has changed.
    assert found.n_requests <= 18 * (11 + 8 + 28 + 1) + 200


def test_a_result_is_opened_in_few_round_trips(search):
    merge(search, "memory://opened")
    with as_bucket() as stub:
        assert MergedResult.open("memory://opened").maps
        assert stub.round_trips == 3  # root; manifest; metadata of all maps


@pytest.mark.parametrize("make", [lambda: tiny_search(5), lambda: tiny_montage(4, 3)])
def test_a_search_is_described_and_watched_in_few_round_trips(make):
    url = make()
    with as_bucket() as stub:
        assert len(describe(url).partials) in (5, 12)
        assert stub.round_trips <= 5
    watched = Watched(url, ("memory://watched", None), MergeOptions(), Console())
    with as_bucket() as stub:
        watched.look()
        assert stub.round_trips <= 4
        # Root, lists of partials and exposures, exposures, and each partial with its manifest.
        assert len(stub.requests) <= 3 + 2 * 4 + 3 * 12


def test_a_tile_is_marked_as_done_after_its_last_chunk(search, monkeypatch):
    put, missing = MemoryObjects.put, {}

    def watched(self, key, parts):
        if key == "correlation_std/c/0/1":
            raise StorageError("no")
        if key.startswith(constants.TILE_SUMMARY) and "/c/" in key:
            at = key.split("/c/")[1].removesuffix("/0")
            maps = MapSet(PoseForm.EXPLICIT, pixel_size=False).merged
            missing[at] = [name for name in maps if self.size(f"{name}/c/{at}") is None]
        put(self, key, parts)

    monkeypatch.setattr(MemoryObjects, "put", watched)
    with as_bucket(0.001), pytest.raises(TilesFailedError, match="1 of 4"):
        merge(search, "memory://marked", tile_size=8, threads=1)
    assert missing == {"0/0": [], "1/0": [], "1/1": []}
