"""Storage that fails for a moment, or for good: what is tried again, and what is named."""

import errno
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import ocelot_em
from helpers import chunk_bytes, make_result, write_search
from ocelot_em.errors import StorageError, TilesFailedError
from ocelot_em.merge.outcome import Outcome
from ocelot_em.run.observer import Observer
from ocelot_em.store import contract, local

pytestmark = pytest.mark.chaos

TILE = 32
SHAPE = (128, 128)
N_TILES = 16


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    place, rng = tmp_path_factory.mktemp("retries"), np.random.default_rng(3)
    results = [make_result(rng, SHAPE, 1000 + i, ties=True) for i in range(2)]
    with pytest.MonkeyPatch.context() as patched:  # in shards
        patched.setattr("ocelot_em.store.constants.DEFAULT_CHUNK", TILE)
        write_search(place / "RUN.zarr", results, [1000, 1001])
    ocelot_em.merge(place / "RUN.zarr", place / "EXPECTED.zarr", tile_size=TILE)
    yield place
    shutil.rmtree(place)


class Failing:
    """System calls that fail now and then; how often they did."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int, every: int) -> None:
        self.n_failed = 0
        self._of_thread = threading.local()
        self._number, self._every = number, every
        for name in ("readv", "preadv", "writev"):
            monkeypatch.setattr(os, name, self._failing(getattr(os, name)))
        monkeypatch.setattr(contract, "PAUSES_SECONDS", (0.001, 0.002, 0.004))

    def _failing(self, call):
        def sometimes(*arguments):
            # Of a thread's own calls: so nothing fails twice in a row.
            self._of_thread.n_calls = getattr(self._of_thread, "n_calls", 0) + 1
            if self._of_thread.n_calls % self._every == 0:
                self.n_failed += 1
                raise OSError(self._number, os.strerror(self._number))
            return call(*arguments)

        return sometimes


class Outcomes(Observer):
    def __init__(self) -> None:
        self.failed: list[Outcome] = []

    def tile_ended(self, outcome: Outcome) -> None:
        if outcome.summary is None:
            self.failed.append(outcome)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_errors_that_pass_are_tried_again(place, tmp_path, monkeypatch, number) -> None:
    failing, seen = Failing(monkeypatch, number, every=5), Outcomes()
    ocelot_em.merge(place / "RUN.zarr", tmp_path / "OUT.zarr", tile_size=TILE, observer=seen)
    monkeypatch.undo()
    assert failing.n_failed > 20
    assert seen.failed == []
    assert chunk_bytes(tmp_path / "OUT.zarr") == chunk_bytes(place / "EXPECTED.zarr")
    assert list((tmp_path / "OUT.zarr").rglob("*#*")) == []


def test_a_tile_that_failed_is_tried_again_when_the_others_are_done(
    place, tmp_path, monkeypatch
) -> None:
    put, n_failed = local.LocalObjects.put, 0

    def fails_twice(self, key, parts):
        nonlocal n_failed
        if key.startswith("mip/c/1/2") and n_failed < 2:
            n_failed += 1
            raise StorageError(f"cannot write {key}: a server was restarted")
        put(self, key, parts)

    monkeypatch.setattr(local.LocalObjects, "put", fails_twice)
    seen = Outcomes()
    with pytest.raises(TilesFailedError, match=r"1 of 16 tiles failed.*\n.*a server was restarted"):
        ocelot_em.merge(place / "RUN.zarr", tmp_path / "OUT.zarr", tile_size=TILE, observer=seen)
    assert [(end.iy, end.ix, end.is_transient) for end in seen.failed] == [(1, 2, True)] * 2
    report = ocelot_em.merge(place / "RUN.zarr", tmp_path / "OUT.zarr", tile_size=TILE)
    assert report.n_merged == 1
    n_failed, seen = 1, Outcomes()
    ocelot_em.merge(place / "RUN.zarr", tmp_path / "AGAIN.zarr", tile_size=TILE, observer=seen)
    assert len(seen.failed) == 1
    for name in ("OUT.zarr", "AGAIN.zarr"):
        assert chunk_bytes(tmp_path / name) == chunk_bytes(place / "EXPECTED.zarr")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EIO])
def test_errors_that_stay_are_named(place, tmp_path, monkeypatch, number) -> None:
    failing = Failing(monkeypatch, number, every=10**9)
    real = os.preadv

    def broken(descriptor, buffers, start):
        if str(Path(f"/proc/self/fd/{descriptor}").readlink()).endswith("p1/mip/c/0/0"):
            failing.n_failed += 1
            raise OSError(number, os.strerror(number))
        return real(descriptor, buffers, start)

    monkeypatch.setattr(os, "preadv", broken)
    reason = os.strerror(number)
    with pytest.raises(TilesFailedError, match=f"p1/mip/c/0/0: .*{reason}") as caught:
        ocelot_em.merge(place / "RUN.zarr", tmp_path / "OUT.zarr", tile_size=TILE)
    assert f"{N_TILES} of {N_TILES} tiles failed" in str(caught.value)
    # What may pass is tried four times, each time the tile is.
    tries = 2 * N_TILES * (4 if number == errno.EIO else 1)
    assert failing.n_failed == tries
    monkeypatch.undo()
    ocelot_em.merge(place / "RUN.zarr", tmp_path / "OUT.zarr", tile_size=TILE)
    assert chunk_bytes(tmp_path / "OUT.zarr") == chunk_bytes(place / "EXPECTED.zarr")
