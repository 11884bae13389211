"""A search that runs, is killed and resumed while it is merged in a loop: no merge fails."""

import multiprocessing
import time
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

import numpy as np
import pytest

from ocelot_em import (
    SearchInfo,
    SearchRecorder,
    SearchSpace,
    check,
    describe,
    merge,
    open_merged,
    write_partial,
)
from ocelot_em.merge.lazy import lazy_merge
from ocelot_em.merge.result import MergedResult
from ocelot_em.model import ranges as sets
from ocelot_em.model.maps import INDEX, MIP, SQUARED_SUM, SUM, AnyArray
from ocelot_em.model.ranges import Range

pytestmark = pytest.mark.chaos

N, STEP, SHAPE = 240, 24, (48, 72)
SPACE = SearchSpace.from_tables(
    np.random.default_rng(0).uniform(0, 180, (N, 3)).astype("f4"), [0], [0]
)
INFO = SearchInfo(template_box=8, search_space=SPACE)


def search(maps: dict[str, AnyArray], start: int, stop: int) -> None:
    """Scores are multiples of 1/16, so that sums are exact in any order, and ties are frequent."""
    for number in range(start, stop):
        scores = np.random.default_rng(number).normal(size=SHAPE)
        scores = (scores * 16).round().astype("f4") / 16
        won = scores > maps[MIP]
        maps[MIP][won], maps[INDEX][won] = scores[won], number
        maps[SUM] += scores
        maps[SQUARED_SUM] += scores**2


def new_maps() -> dict[str, AnyArray]:
    maps = {MIP: np.full(SHAPE, -np.inf, "f4"), INDEX: np.full(SHAPE, -1, "i4")}
    return maps | {name: np.zeros(SHAPE, "f4") for name in (SUM, SQUARED_SUM)}


def device(run: Path, name: str, batches: list[Range], allowed: "Synchronized[int]") -> None:
    """Search batches, no further than the test allows; each may be a checkpoint."""
    maps = new_maps()
    recorder = SearchRecorder(run, name, maps, search=INFO, every=0.05)
    for start, stop in recorder.ranges(batches):
        while stop > allowed.value:
            time.sleep(0.01)
        search(maps, start, stop)
    recorder.finish()


def expected(place: str, ranges: sets.Ranges) -> dict[str, AnyArray]:
    maps = new_maps()
    for start, stop in ranges:
        search(maps, start, stop)
    write_partial(place, "all", maps, total_projections=sets.size(ranges), search=INFO)
    return {name: values.values for name, values in lazy_merge(place).items()}


def test_merges_of_a_running_search_have_the_bits_of_what_was_searched(tmp_path: Path) -> None:
    """The more merges, the further the search may go, so that it cannot end before it is merged."""
    run, output, spawn = tmp_path / "RUN", tmp_path / "OUT", multiprocessing.get_context("spawn")
    batches, allowed = [(start, start + 2) for start in range(0, N, 2)], spawn.Value("q", STEP)
    device(run, "first", batches[:4], allowed)  # complete, so that there is always something

    def start(number: int, of: int) -> multiprocessing.process.BaseProcess:
        arguments = run, f"gpu{number}", batches[number::of], allowed
        process = spawn.Process(target=device, args=arguments)
        process.start()
        return process

    processes, found = [start(0, 2), start(1, 2)], list[sets.Ranges]()
    while not found or sets.size(found[-1]) < N:
        merge(run, output, so_far=True, tile_size=32)
        result = MergedResult.open(output)
        ranges = sets.union(r for p in result.attributes.partials for r in p.coverage.ranges)
        wanted, got = expected(f"memory://so-far-{len(found)}", ranges), open_merged(result)
        for name in wanted.keys() - {"best_partial"}:
            np.testing.assert_array_equal(got[name], wanted[name], err_msg=f"{name}, {ranges}")
        found.append(ranges)
        if len(found) == 5:
            for process in processes:
                process.kill()
                process.join()
            processes = [start(number, 3) for number in range(3)]
        allowed.value += STEP
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len(found) > 5
    merge(run, output)
    assert describe(output).progress == describe(run).progress
    assert check(run) == check(output) == []
