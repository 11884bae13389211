"""Tests that every executor of tiles must pass; importing this module needs pytest."""

import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest

from ocelot_em.merge.in_memory import merge_arrays
from ocelot_em.merge.job import JobSpec
from ocelot_em.merge.merge import Executor, attempt_tiles, merge
from ocelot_em.merge.outcome import SUMMARY_FIELDS, Outcome, Outcomes, Tiles, TileSummary
from ocelot_em.merge.resume import confirm, prepare
from ocelot_em.model.options import MergeOptions
from ocelot_em.model.regions import Region
from ocelot_em.store.lock import OutputLock
from ocelot_em.store.objects import open_objects
from ocelot_em.store.search import MapGroup
from ocelot_em.testing.simulation import Simulation, simulate

Attempt = Callable[[JobSpec, Iterable[tuple[int, int]]], Outcomes]
"""Function that an executor calls with some tiles; it takes them one by one."""

SPEC = JobSpec("memory://nowhere", "run", "lock/0", "holder", 3)


def attempt(spec: JobSpec, tiles: Iterable[tuple[int, int]]) -> Outcomes:
    """Pretend to merge tiles; those of odd columns fail."""
    done = TileSummary(*(0 for _ in SUMMARY_FIELDS))
    for iy, ix in tiles:
        yield Outcome(iy, ix, None if ix % 2 else done, "odd" if ix % 2 else "", where=repr(spec))


class _WatchedTiles(Tiles):
    n_taken = 0

    def __getitem__(self, index: int | slice) -> "tuple[int, int] | Tiles":  # type: ignore[override]
        self.n_taken += len(range(*index.indices(len(self)))) if isinstance(index, slice) else 1
        return super().__getitem__(index)


class ExecutorContract:
    """Contract of :class:`~ocelot_em.merge.merge.Executor`, for pytest.

    An executor that passes can run merges. What the package relies on:

    - Each tile has exactly one outcome, of the attempt function called with the given job, in any
      order; outcomes with errors are passed on like others. Merged tiles may have early outcomes
      before, without checksums and statistics.
    - ``on_outcome`` is called in the thread that called ``run``, and never after it has returned.
    - Tiles are taken from the sequence as workers become free: there may be millions.
    - Once ``stopping`` is set, no batch starts, and ``run`` returns after the running ones.

    Subclass it in a test module, with a fixture that makes an executor for an attempt function.
    Workers in other processes must be able to import this module::

        from ocelot_em.testing.executor_contract import ExecutorContract

        class TestMyExecutor(ExecutorContract):
            @pytest.fixture
            def make_executor(self):
                return MyExecutor  # called with an attempt function
    """

    @pytest.fixture
    def make_executor(self) -> Callable[[Attempt], Executor]:
        """Return a function that makes an executor for an attempt function."""
        raise NotImplementedError("return a function from the fixture 'make_executor'")

    @pytest.mark.parametrize("n_tiles", [0, 1, 7, 500])
    def test_each_tile_has_one_outcome(
        self, make_executor: Callable[[Attempt], Executor], n_tiles: int
    ) -> None:
        outcomes: list[Outcome] = []
        threads = set()

        def note(outcome: Outcome) -> None:
            outcomes.extend([outcome] * (not outcome.is_early))
            threads.add(threading.current_thread())

        tiles = Tiles(10, np.arange(1000, 1000 + n_tiles))
        make_executor(attempt).run(SPEC, tiles, note, threading.Event())
        outcomes.sort(key=lambda outcome: (outcome.iy, outcome.ix))
        assert outcomes == list(attempt(SPEC, tiles))
        assert threads <= {threading.current_thread()}

    def test_a_stopped_run_ends(self, make_executor: Callable[[Attempt], Executor]) -> None:
        n, stopping = 200_000, threading.Event()
        tiles, outcomes = _WatchedTiles(1000, np.arange(n)), list[Outcome]()

        def stop(outcome: Outcome) -> None:
            outcomes.append(outcome)
            stopping.set()

        executor = make_executor(attempt)
        executor.run(SPEC, tiles, stop, stopping)
        assert 0 < len(outcomes) <= tiles.n_taken < n / 10
        n_ended = len(outcomes)
        executor.run(SPEC, tiles, stop, stopping)
        assert len(outcomes) == n_ended

    def test_a_whole_merge_is_that_of_arrays_in_memory(
        self, make_executor: Callable[[Attempt], Executor], tmp_path: Path
    ) -> None:
        simulation = Simulation((150, 130), n_partials=3, n_particles=2, seed=1)
        options = MergeOptions(tile_size=40)
        ready = prepare([simulate(tmp_path, simulation)], tmp_path / "OUT.zarr", options)
        objects, ended = open_objects(ready.output), list[Outcome]()
        with OutputLock(objects) as lock:
            ready = confirm(ready, lock.objects)
            report = merge(ready, options, make_executor(attempt_tiles), lock, ended.append)
        assert report.n_merged == len(ended) == len(ready.plan.grid) == 16
        whole = Region.whole(simulation.shape)
        expected = merge_arrays([simulation.partial_block(n, whole) for n in range(3)])
        for name, chunked in MapGroup(objects).open(tuple(expected)).items():
            np.testing.assert_array_equal(chunked.read(whole)[0], expected[name], err_msg=name)
