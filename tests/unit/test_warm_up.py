"""Compiling kernels before the first tile: that it is told, and that nothing is left to compile."""

import json
import logging

import numpy as np
import pytest
from numba import njit

from builders import explicit_maps, write_explicit_search
from helpers import make_result, write_search
from ocelot_em import Exposure, SearchInfo, kernels, lazy_merge, merge, write_partial
from ocelot_em.errors import PlanError
from ocelot_em.kernels import (
    build,
    by_chunk,
    by_map,
    collect,
    compositing,
    cpu,
    cpu_statistics,
    jit,
    streams,
)
from ocelot_em.kernels import compiling as compiling_module
from ocelot_em.merge import fold, job, resume
from ocelot_em.merge import merge as pipeline
from ocelot_em.model.options import MergeOptions
from ocelot_em.run.observer import Observer
from ocelot_em.run.runlog import RunLog
from ocelot_em.store.lock import OutputLock
from ocelot_em.store.objects import open_objects


class Calls:
    """Which compiled functions Python calls, with arguments of which types, and when."""

    def __init__(self, monkeypatch):
        self.now, self.seen = "elsewhere", {"warm-up": set(), "elsewhere": set()}
        for module, name in (
            (cpu, "_fold"),
            (cpu_statistics, "compute"),
            (cpu_statistics, "_decode"),
        ):
            monkeypatch.setattr(module, name, self.noted(getattr(module, name)))
        for module in (by_chunk, by_map, collect, compositing, streams):
            name = module.__name__.rpartition(".")[2]
            for place in (kernels, fold):
                if hasattr(place, name):
                    monkeypatch.setattr(place, name, self.of(module))
        monkeypatch.setattr(job, "compile_kernels", self.warm_up(job.compile_kernels))

    def noted(self, kernel):
        def call(*arguments):
            self.seen[self.now].add(f"{kernel.name} {compiling_module.types_of(arguments, [])}")
            return kernel(*arguments)

        return call

    def of(self, module):
        calls = self

        class Watched:
            def __getattr__(self, name):
                value = getattr(module, name)
                return calls.noted(value) if isinstance(value, compiling_module.Kernel) else value

        return Watched()

    def warm_up(self, function):
        def call(*arguments):
            self.now = "warm-up"
            try:
                return function(*arguments)
            finally:
                self.now = "elsewhere"

        return call


def searches(place, rng, kind):
    """Inputs of a merge, with pixels that nobody searched, and many candidates."""
    shape = (70, 90)
    if kind == "montage":
        for number, origin in enumerate([(0, 0), (0, 50), (46, 10)]):
            for own in range(2):
                maps = explicit_maps(shape, 2 * number + own)
                info = SearchInfo(exposure=Exposure(f"e{number}", origin, number, (60, 80)))
                name = f"{number}-{own}"
                write_partial(place / "M", name, maps, total_projections=9, order=own, search=info)
        return place / "M"
    results = [make_result(rng, shape, 1000) for _ in range(3)]
    for number, result in enumerate(results):
        result["mip"][:9, :9] = -np.inf
        result["best_global_index"][:9, :9] = -1
        result["mip"][20:40] += 20
        for name in ("correlation_sum", "correlation_squared_sum"):
            if kind == "wide" or (kind == "mixed" and number == 1):
                result[name] = result[name].astype("f8")
    search = write_search(place / "R", results, [1000, 900, 800], indexed=kind == "indexed")
    if kind not in ("again", "counts"):
        return search
    merge(search, place / "ONCE", nan="mask" if kind == "counts" else "raise")
    return [place / "ONCE", write_search(place / "R2", [make_result(rng, shape, 90)], [90])]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("explicit", {}),
        ("explicit", {"nan": "mask"}),
        ("indexed", {}),
        ("indexed", {"nan": "mask", "poses": "index"}),
        ("mixed", {}),
        ("wide", {}),
        ("again", {}),
        ("counts", {}),
        ("montage", {"overlap": "earliest"}),
        ("montage", {"overlap": "max-zscore", "nan": "mask"}),
        ("montage", {"overlap": "farthest-from-edge", "erode": 2}),
    ],
)
def test_tiles_call_nothing_that_was_not_compiled_before(tmp_path, rng, monkeypatch, kind, options):
    inputs = searches(tmp_path, rng, kind)
    calls = Calls(monkeypatch)
    for tile_size in (64, 1024):
        merge(inputs, tmp_path / f"OUT-{tile_size}", tile_size=tile_size, **options)
    called = {one.partition(" ")[0].partition(".")[2] for one in calls.seen["elsewhere"]}
    finished = {"count_pixels", "compute"} if "nan" in options else {"fold_sums"}
    assert {"look_up_neighbours"} | finished <= called
    assert calls.seen["elsewhere"] <= calls.seen["warm-up"] <= set(build.signatures())


def test_compiling_is_told_before_the_first_function_and_only_then(monkeypatch):
    monkeypatch.setattr(jit, "ANNOUNCE_AFTER_SECONDS", 0)
    one, two = njit(lambda x: x + 1), njit(lambda x: x * 2)
    calls = []

    def work():
        calls.append(one(1) + two(1))

    assert jit.seconds_compiling(work, lambda: calls.append("compiling")) > 0
    assert calls == ["compiling", 4]
    assert jit.seconds_compiling(work, lambda: calls.append("compiling")) == 0
    assert calls == ["compiling", 4, 4]


def test_a_few_kernels_are_compiled_without_a_word(monkeypatch):
    monkeypatch.setattr(jit, "ANNOUNCE_AFTER_SECONDS", 1e9)
    calls, triple = [], njit(lambda x: x * 3)
    assert jit.seconds_compiling(lambda: triple(1), lambda: calls.append("compiling")) > 0
    assert calls == []


class Recorder(Observer):
    def __init__(self):
        self.events = []

    def started(self, cluster):
        self.events.append("started")

    def compiling(self):
        self.events.append("compiling")

    def compiled(self, seconds):
        self.events.append(("compiled", seconds))

    def tile_ended(self, outcome):
        assert outcome.summary is not None, outcome.error
        self.events.append("tile")


@pytest.fixture
def search(tmp_path):
    return write_explicit_search(tmp_path / "RUN.zarr", (20, 30), n_partials=2)


@pytest.fixture
def nothing_compiled(monkeypatch):
    """As after an installation, but for the time that it takes; its seconds."""

    def seconds_compiling(work, compiling):
        compiling()
        work()
        return 1e6

    monkeypatch.setattr(compiling_module, "seconds_compiling", seconds_compiling)
    return 1e6


def test_nothing_is_told_where_kernels_are_at_hand(search, tmp_path):
    merge(search, tmp_path / "ONCE.zarr")
    observer = Recorder()
    report = merge(search, tmp_path / "AGAIN.zarr", observer=observer)
    assert observer.events == ["started", "tile"]
    assert report.compile_seconds == 0


def test_compiling_is_a_phase_of_its_own(search, tmp_path, nothing_compiled):
    observer = Recorder()
    report = merge(search, tmp_path / "OUT.zarr", observer=observer, tile_size=16)
    compiled = ["compiling", ("compiled", nothing_compiled)]
    assert observer.events == ["started", *compiled, *["tile"] * 4]
    assert report.compile_seconds == nothing_compiled
    assert -nothing_compiled < report.seconds < 0  # which has what really passed, without it
    assert sum(report.shares.values()) == pytest.approx(1)
    assert report.totals.fold_seconds < nothing_compiled


def test_compiling_is_in_the_log(search, tmp_path, nothing_compiled):
    with RunLog(tmp_path / "log.jsonl") as log:
        merge(search, tmp_path / "OUT.zarr", observer=log)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    events = ["planned", "locked", "started", "compiling", "compiled", "tile", "merged", "ended"]
    assert [line["event"] for line in lines] == events
    assert lines[4]["seconds"] == nothing_compiled
    assert lines[6]["compile_seconds"] == nothing_compiled


def test_workers_compile_before_their_first_tile(search, tmp_path, nothing_compiled, caplog):
    class Elsewhere:
        def run(self, work, tiles, on_outcome, stopping):
            for outcome in pipeline.attempt_tiles(work, tiles):
                on_outcome(outcome)

    caplog.set_level(logging.INFO, "ocelot_em")
    options, outcomes = MergeOptions(), []
    ready = resume.prepare([search], tmp_path / "OUT.zarr", options)
    with OutputLock(open_objects(ready.output)) as lock:
        report = pipeline.merge(ready, options, Elsewhere(), lock, outcomes.append)
    assert report.compile_seconds == 0
    assert report.seconds > 0
    assert outcomes[0].summary.fold_seconds < nothing_compiled
    logged = [record.getMessage() for record in caplog.records]
    assert [words for words in logged if "kernels" in words] == [
        "compiling kernels",
        "compiled kernels in 1000000.0 s",
    ]


def test_tiles_are_merged_where_nothing_can_be_compiled_before(search, tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("no place for a cache")

    monkeypatch.setattr(compiling_module, "seconds_compiling", broken)
    assert merge(search, tmp_path / "OUT.zarr").n_merged == 1


def test_merges_without_the_compiler_are_refused(tmp_path, monkeypatch):
    search = write_explicit_search(tmp_path / "RUN.zarr", (20, 30))
    lazy = lazy_merge(search)
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    with pytest.raises(PlanError, match="unset it"):
        merge(search, tmp_path / "OUT.zarr")
    with pytest.raises(PlanError, match="unset it"):
        lazy.mip.compute()
    assert not (tmp_path / "OUT.zarr").exists()
