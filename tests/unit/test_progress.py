"""The progress of a merge: tiles, rate and time left, as people see them."""

import io
import itertools
import json
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from distributed import Client
from rich.console import Console

from builders import write_explicit_search
from ocelot_em import find_peaks, import_results, merge
from ocelot_em.merge import job
from ocelot_em.merge.job import JobSpec
from ocelot_em.merge.outcome import Outcome, Tally, Tiles, TileSummary
from ocelot_em.model import progress as module
from ocelot_em.model.progress import Bar, Pace, choose_face, share_bar
from ocelot_em.run import executors, runlog
from ocelot_em.run.clusters import Cluster
from ocelot_em.run.executors import ClientExecutor, ThreadExecutor
from ocelot_em.run.observer import COMPILING, MergeBar, Observer, TileProgress
from ocelot_em.run.runlog import RunLog


@pytest.fixture
def clock(monkeypatch):
    """The time that progress is told; a list of one."""
    at = [100.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: at[0])
    return at


def merged(iy, ix, nbytes=5 * 10**6):
    return Outcome(iy, ix, TileSummary(1, 1, 1, 1, 1, 0, 1, nbytes, 1))


def failed(iy, ix):
    return Outcome(iy, ix, None, "no bytes", is_transient=True)


def begin(shown, counts=(1, 3), n_done=0, n_threads=1):
    """Plan and start a merge of so many rows and columns of tiles."""
    n_tiles = counts[0] * counts[1]
    forecast = SimpleNamespace(n_tiles=n_tiles, n_done=n_done)
    grid = SimpleNamespace(counts=counts)
    TileProgress.planned(
        shown, SimpleNamespace(forecast=forecast, plan=SimpleNamespace(grid=grid)), None
    )
    shown.started(Cluster(ThreadExecutor(n_threads), f"{n_threads} threads", None))
    return shown


def on_console(**settings):
    return MergeBar(Bar(console=Console(file=io.StringIO(), width=100, **settings)))


@pytest.mark.parametrize("n_threads", [1, 2, 16])
@pytest.mark.parametrize("burst", [0.0, 0.9])
def test_the_time_left_settles_after_a_few_tiles_of_each_thread(clock, n_threads, burst):
    """Threads that end together, or one after another; each needs 2 s for a tile."""
    pace, n_steps = Pace(lambda: n_threads), 100 * n_threads
    ends = sorted(
        2.0 * (k + 1) + burst * 2.0 * thread / n_threads
        for k, thread in itertools.product(range(100), range(n_threads))
    )
    for n_ended, at in enumerate(ends, 1):
        clock[0] = 100 + at
        pace.step(1000)
        left, truth = pace.seconds_left(n_steps - n_ended), ends[-1] - at
        if n_ended < n_threads:
            assert left is None
        elif n_ended >= 5 * n_threads:
            assert abs(left - truth) < 0.15 * truth + 2.5
        else:
            assert left == pytest.approx(truth, rel=0.5)


def test_a_rate_follows_workers_that_come_and_go(clock):
    pace = Pace(lambda: 4)
    for seconds in [0.25] * 200 + [1.0] * 60:
        clock[0] += seconds
        pace.step(10**6)
    assert pace.steps_per_second == pytest.approx(1, rel=0.1)
    assert pace.bytes_per_second == pytest.approx(1e6, rel=0.1)
    assert len(pace._moments) < 30


def test_no_estimate_of_the_first_moment(clock):
    pace = Pace()
    clock[0] += 0.5
    pace.step()
    assert pace.steps_per_second is pace.seconds_left(3) is pace.bytes_per_second is None


def test_many_short_steps_are_kept_as_few_moments(clock):
    pace = Pace()
    for _ in range(100_000):
        clock[0] += 0.001
        pace.step()
    assert len(pace._moments) < 250
    assert pace.steps_per_second == pytest.approx(1000, rel=0.01)


def test_tiles_of_an_earlier_run_are_counted_but_not_rated(clock):
    shown = begin(TileProgress(), (2, 50), n_done=90)
    assert shown.text == "90 of 100 tiles, 0 s"
    clock[0] += 2
    shown.tile_ended(merged(1, 49))
    assert shown.text == "91 of 100 tiles, 3.75 MB/s, 2 s, about 12 s left"


def test_a_tile_counts_once_however_often_it_is_tried(clock):
    shown = begin(TileProgress())
    for outcome, n_done, n_failed in [
        (failed(0, 1), 0, 1),
        (failed(0, 1), 0, 1),
        (merged(0, 1), 1, 0),
        (merged(0, 1), 1, 0),  # by two workers
        (failed(0, 1), 0, 1),  # its worker was lost afterwards
        (merged(0, 1), 1, 0),
        (merged(0, 0), 2, 0),
        (merged(0, 2), 3, 0),
        (merged(0, 2), 3, 0),
    ]:
        shown.tile_ended(outcome)
        assert (shown.n_done, len(shown.failed)) == (n_done, n_failed)
    assert shown.share == 1


def test_the_time_left_is_reckoned_without_compiling(clock):
    shown = begin(on_console(force_terminal=False))
    shown.compiling()
    clock[0] += 12.5
    shown.compiled(12.5)
    clock[0] += 10
    shown.tile_ended(merged(0, 0))
    assert shown.bar.console.file.getvalue().splitlines() == [
        "running on 1 threads",
        COMPILING,
        "compiled kernels in 12 s",
        "merging, 1 of 3 tiles, 2.5 MB/s, 10 s, about 4 s left",
    ]


def test_lines_tell_failures_at_once(clock):
    shown = begin(on_console(force_terminal=False))
    shown.tile_ended(failed(0, 1))
    shown.tile_ended(failed(0, 1))
    assert shown.bar.console.file.getvalue().splitlines()[1:] == [
        "tile (0, 1) failed and will be retried: no bytes",
        "tile (0, 1) failed: no bytes",
    ]


def test_a_terminal_has_a_bar_of_each_phase():
    shown = on_console(force_terminal=True, color_system=None)
    with shown:
        begin(shown)
        (task,) = shown.bar._bar.tasks
        assert (task.description, task.total, task.completed) == ("merging", 1, 0)
        shown.compiling()
        assert (task.description, task.total) == (COMPILING, None)
        shown.compiled(12.5)
        assert (task.description, task.total) == ("merging", 1)
        shown.tile_ended(merged(0, 0))
        assert task.completed == pytest.approx(1 / 3)
        for ix in (1, 2):
            shown.tile_ended(merged(0, ix))
        assert (task.description, task.completed) == ("finishing", 1)
    text = shown.bar.console.file.getvalue()
    assert "compiled kernels in 12 s" in text
    assert "3 of 3 tiles" in text


@pytest.mark.parametrize(
    ("progress", "is_terminal", "is_session", "face"),
    [
        (None, True, False, "none"),  # a script
        (None, True, True, "terminal"),
        (None, False, True, "none"),
        (True, True, False, "terminal"),
        (True, False, False, "lines"),
        (False, True, True, "none"),
    ],
)
def test_scripts_are_silent_unless_asked(monkeypatch, progress, is_terminal, is_session, face):
    monkeypatch.setattr(module.sys, "stderr", SimpleNamespace(isatty=lambda: is_terminal))
    monkeypatch.delattr(module.sys, "ps1", raising=False)
    if is_session:
        monkeypatch.setattr(module.sys, "ps1", ">>> ", raising=False)
    assert choose_face(progress) == face


def test_a_share_is_shown_by_phase(clock):
    console = Console(file=io.StringIO(), force_terminal=False)
    with share_bar(console=console) as on_progress:
        on_progress("read", 0.1)
        clock[0] += 6
        on_progress("read", 0.5)
    assert console.file.getvalue() == "read, 50%\n"


def test_early_outcomes_are_announced_once_and_gathered_at_the_end():
    announced, gathered = [], []
    tally = Tally(announced.append, list, gathered.append)
    early = replace(merged(0, 0), is_early=True)
    for outcome in (early, early, merged(0, 0)):  # its task was run again by another worker
        tally.count(outcome)
    assert (announced, gathered, tally.n_merged) == ([early], [merged(0, 0)], 1)
    tally.count(replace(merged(0, 1), is_early=True))
    for outcome in (failed(0, 1), merged(0, 1)):  # the worker was lost afterwards
        tally.count(outcome)
    assert [bool(outcome.summary) for outcome in announced[1:]] == [True, False, True]
    assert tally.n_merged == 2


class Timeline(Observer):
    """When each tile is reported, and when all tasks have ended."""

    def __init__(self):
        self.tiles, self.phases = [], []

    def started(self, cluster):
        self.executor = cluster.executor

    def compiling(self):
        self.phases.append("compiling")

    def compiled(self, seconds):
        self.phases.append("compiled")

    def tile_ended(self, outcome):
        self.phases += ["tile"] * (not self.tiles)
        self.tiles.append(outcome)


def slow_tiles(spec, tiles):
    """Merge tiles of half a second each, on a worker, after compiling."""
    for iy, ix in tiles:
        time.sleep(0.5)
        yield merged(iy, ix)


@pytest.fixture(scope="module")
def client():
    with Client(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=":0") as one:
        yield one


def test_workers_report_tiles_before_their_task_ends(client, monkeypatch):
    ended, tiles = [], Tiles(8, np.arange(8))
    executor = ClientExecutor(client, slow_tiles)
    monkeypatch.setattr(executors, "BATCHES_PER_THREAD", 1)  # two tasks of four tiles
    executor.run(JobSpec("memory://nowhere", "run"), tiles, ended.append, threading.Event())
    early = [outcome for outcome in ended if outcome.is_early]
    assert {outcome.ix for outcome in early} >= {0, 1, 2, 4, 5, 6}
    assert {outcome.ix for outcome in ended if not outcome.is_early} == set(range(8))
    first_whole = next(n for n, outcome in enumerate(ended) if not outcome.is_early)
    assert first_whole >= 3
    assert early[0].summary == merged(0, 0).summary


def test_compiling_on_workers_is_a_phase(client, tmp_path, monkeypatch):
    def compile_kernels(_plan, _exposure, _space, _dtype_of, listener):
        listener.compiling()
        listener.compiled(12.5)
        return 12.5

    monkeypatch.setattr(job, "compile_kernels", compile_kernels)
    monkeypatch.setattr(executors, "MAX_TILES_PER_TASK", 2)
    search, seen = write_explicit_search(tmp_path / "RUN.zarr", (40, 50)), Timeline()
    options = {"tile_size": 16, "cluster": client.scheduler.address, "observer": seen}
    report = merge(search, tmp_path / "OUT.zarr", **options)
    assert seen.phases == ["compiling", "compiled", "tile"]
    assert len(seen.tiles) == report.n_merged == 12


def test_the_log_has_progress_as_well(clock, tmp_path, monkeypatch):
    monkeypatch.setattr(runlog, "LINE_SECONDS", 0)
    with RunLog(tmp_path / "log.jsonl") as log:
        begin(log, (1, 4), n_done=1)
        clock[0] += 2
        log.tile_ended(merged(0, 1))
        log.tile_ended(failed(0, 2))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    names = "tiles", "tiles_done", "tiles_failed", "bytes_per_second", "seconds_left"
    found = [[line[name] for name in names] for line in lines if line["event"] == "progress"]
    assert found == [[4, 2, 0, 3_750_000, 3], [4, 2, 1, 3_750_000, 3]]


def test_imports_and_picking_report_their_progress(tmp_path, capsys):
    crops = sorted((Path(__file__).parents[1] / "data").glob("A_crop_shard?.npz"))
    steps = []
    import_results(crops, tmp_path / "R", progress=lambda *step: steps.append(step))
    assert {phase for phase, _ in steps} == {"check", "convert"}
    assert steps[-1] == ("convert", 1.0)
    merge(tmp_path / "R", tmp_path / "M")
    steps.clear()
    find_peaks(tmp_path / "M", cutoff=4, progress=lambda *step: steps.append(step))
    assert steps == [("reading maps", 1.0)]
    assert capsys.readouterr().err == ""


def test_a_notebook_has_a_bar_by_itself(tmp_path, monkeypatch):
    """Of imports, merges and picking, whichever takes a while."""
    shell, shown = SimpleNamespace(kernel=object()), []
    monkeypatch.setattr("IPython.get_ipython", lambda: shell)
    monkeypatch.setattr("IPython.display.display", lambda data, **_: shown.append(data))
    crops = sorted((Path(__file__).parents[1] / "data").glob("A_crop_shard?.npz"))
    for call, phase in (
        (lambda: import_results(crops, tmp_path / "R"), "convert"),
        (lambda: merge(tmp_path / "R", tmp_path / "M"), "merged"),
        (lambda: find_peaks(tmp_path / "M", cutoff=4), "reading maps"),
    ):
        shown.clear()
        call()
        assert f'<div>{phase} <progress value="1.0000">' in shown[-1]["text/html"]
