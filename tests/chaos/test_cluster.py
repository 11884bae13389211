"""Clusters that lose their workers, their scheduler or their driver, and tiles that kill."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import dask.config
import psutil
import pytest

import ocelot_em
from chaos_common import (
    Gate,
    Undisturbed,
    end,
    merge_command,
    start,
    tiles_done,
    undisturbed,
    wait_for,
)
from ocelot_em.errors import OutputLockedError, TilesFailedError
from ocelot_em.merge.job import JobSpec
from ocelot_em.merge.merge import attempt_tiles, merge
from ocelot_em.merge.outcome import Outcome
from ocelot_em.model.options import MergeOptions
from ocelot_em.run.api import plan_merge
from ocelot_em.run.clusters import open_cluster
from ocelot_em.run.executors import ClientExecutor
from ocelot_em.store.lock import OutputLock
from ocelot_em.store.objects import open_objects

pytestmark = pytest.mark.chaos

BIN = Path(sys.executable).parent

THREADS = "--cluster", "threads", "--threads", "2"
LOCAL = "--cluster", "local", "--workers", "2", "--threads", "1"

Begin = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return undisturbed(tmp_path_factory.mktemp("cluster"), 60, 8)


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path / "gate", 10)


@pytest.fixture
def begin_merge(search: Undisturbed, tmp_path: Path) -> Iterator[Begin]:
    """Start merges, through a gate or not; whatever of them is left in the end is killed."""
    started: list[subprocess.Popen[str]] = []

    def begin(output: Path, *options: str, through: Gate | None = None) -> "subprocess.Popen[str]":
        command = merge_command(search.run, output, search.tile, *options)
        started.append(start(command, through.environment if through else None))
        return started[-1]

    yield begin
    for process in started:
        end(process)


@pytest.fixture
def finish(search: Undisturbed, begin_merge: Begin) -> Callable[..., str]:
    """Run the same command again, undisturbed; what it printed."""

    def finish(output: Path, *options: str) -> str:
        again = begin_merge(output, *options)
        printed, _ = again.communicate(timeout=300)
        assert again.returncode == 0, printed
        search.assert_finished(output)
        return printed

    return finish


@pytest.fixture
def scheduler(
    tmp_path: Path, gate: Gate
) -> Iterator[Callable[..., tuple[str, list["subprocess.Popen[bytes]"]]]]:
    """Start a scheduler, and workers of it without nannies; its address, and the processes."""
    processes: list[subprocess.Popen[bytes]] = []

    def begin(n_workers: int, *options: str) -> tuple[str, list["subprocess.Popen[bytes]"]]:
        file = tmp_path / "scheduler.json"
        shared = ["--scheduler-file", str(file), "--interface", "lo"]
        commands = [
            ["scheduler", *shared, "--port", "0", "--dashboard-address", "127.0.0.1:0"],
            *[["worker", *shared, "--no-nanny", "--nthreads", "1", "--no-dashboard", *options]]
            * n_workers,
        ]
        for command in commands:
            processes.append(
                subprocess.Popen(
                    [str(BIN / "dask"), *command],
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    cwd=tmp_path,
                    env={**os.environ, **gate.environment},
                )
            )
        wait_for(lambda: bool(content_of(file)), "a scheduler")
        return str(content_of(file)["address"]), processes

    yield begin
    for process in processes:
        process.kill()
        process.wait()


def content_of(file: Path) -> Mapping[str, object]:
    """What a scheduler's file says, which is there before it is whole."""
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
        return dict(json.loads(file.read_text()))
    return {}


def test_a_run_without_workers_ends_after_the_stated_wait(
    search, tmp_path, scheduler, begin_merge, finish, gate
) -> None:
    output = tmp_path / "OUT.zarr"
    address, processes = scheduler(2)
    driver = begin_merge(output, "--cluster", address, "--worker-timeout", "5")
    gate.wait_until_reached(output, driver)
    for worker in processes[1:]:
        worker.kill()
    printed, _ = driver.communicate(timeout=300)
    assert driver.returncode == 75, printed
    assert "the cluster has had no workers for 5 s" in printed
    assert tiles_done(output) == gate.n_tiles
    assert f"{gate.n_tiles} of them done before" in finish(output)


def test_a_run_whose_workers_are_all_paused_ends_after_the_stated_wait(
    tmp_path, scheduler, begin_merge, finish
) -> None:
    output = tmp_path / "OUT.zarr"
    address, _ = scheduler(2, "--memory-limit", "20MB")  # less than an idle worker has
    driver = begin_merge(output, "--cluster", address, "--worker-timeout", "5")
    printed, _ = driver.communicate(timeout=300)
    assert driver.returncode == 75, printed
    assert "no workers (2 are paused, for lack of memory) for 5 s" in printed
    finish(output)


def test_a_run_ends_when_its_scheduler_is_killed(
    search, tmp_path, scheduler, begin_merge, finish, gate
) -> None:
    output = tmp_path / "OUT.zarr"
    address, processes = scheduler(2)
    driver = begin_merge(output, "--cluster", address)
    gate.wait_until_reached(output, driver)
    processes[0].kill()
    printed, _ = driver.communicate(timeout=300)
    assert driver.returncode == 75, printed
    assert "the connection to the Dask scheduler was lost" in printed
    assert tiles_done(output) == gate.n_tiles
    gate.open()
    finish(output)


@pytest.mark.parametrize(
    ("options", "kill"), [(THREADS, "driver"), (LOCAL, "driver"), (LOCAL, "all")]
)
def test_a_killed_driver_leaves_no_process_and_no_lock(
    search, tmp_path, begin_merge, finish, gate, options, kill
) -> None:
    output = tmp_path / "OUT.zarr"
    driver = begin_merge(output, *options, through=gate)
    gate.wait_until_reached(output, driver)
    children = psutil.Process(driver.pid).children(recursive=True)
    assert bool(children) == (options == LOCAL)
    if kill == "all":
        end(driver)
    else:
        driver.kill()
        driver.communicate()
    assert len(list(output.glob("lock/[0-9]*"))) == 1
    wait_for(lambda: not any(child.is_running() for child in children), "the end of workers")
    info = ocelot_em.describe(output)
    assert info.attributes.state == "writing"
    assert info.tiles_done == gate.n_tiles
    assert f"{gate.n_tiles} of them done before" in finish(output)


def test_a_killed_driver_of_a_running_cluster_stops_its_tasks(
    search, tmp_path, scheduler, begin_merge, finish, gate
) -> None:
    output = tmp_path / "OUT.zarr"
    address, _ = scheduler(2)
    driver = begin_merge(output, "--cluster", address)
    gate.wait_until_reached(output, driver)
    driver.kill()
    driver.communicate()
    gate.open()
    finish(output, "--cluster", address)


def test_a_run_that_is_stopped_goes_on_with_the_same_workers(
    search, tmp_path, scheduler, begin_merge, finish, gate
) -> None:
    output = tmp_path / "OUT.zarr"
    address, _ = scheduler(2)
    driver = begin_merge(output, "--cluster", address)
    gate.wait_until_reached(output, driver)
    driver.terminate()
    gate.open_for_a_run_that_stops(output)
    printed, _ = driver.communicate(timeout=300)
    assert driver.returncode == 75, printed
    assert tiles_done(output) < search.n_tiles
    finish(output, "--cluster", address)


def test_a_second_run_on_the_same_output_is_refused(search, tmp_path, begin_merge, gate) -> None:
    output = tmp_path / "OUT.zarr"
    first = begin_merge(output, through=gate)
    gate.wait_until_reached(output, first)
    for options in ([], ["--overwrite"]):
        second = begin_merge(output, *options)
        printed, _ = second.communicate(timeout=300)
        assert second.returncode == 2, printed
        assert f"another run is writing it: process {first.pid} on" in printed
    gate.open()
    printed, _ = first.communicate(timeout=300)
    assert first.returncode == 0, printed
    search.assert_finished(output)


@pytest.mark.parametrize(
    ("options", "number"),
    [(THREADS, signal.SIGTERM), (THREADS, signal.SIGUSR1), (LOCAL, signal.SIGTERM)],
)
def test_a_run_that_is_stopped_ends_well_and_goes_on(
    search, tmp_path, begin_merge, finish, gate, options, number
) -> None:
    output = tmp_path / "OUT.zarr"
    driver = begin_merge(output, *options, through=gate)
    gate.wait_until_reached(output, driver)
    driver.send_signal(number)
    gate.open_for_a_run_that_stops(output)
    printed, _ = driver.communicate(timeout=300)
    assert driver.returncode == 75, printed
    assert f"{signal.Signals(number).name}: stopping after the running tiles" in printed
    assert list(output.glob("lock/*")) == []
    done = tiles_done(output)
    assert gate.n_tiles < done < search.n_tiles
    assert f"{search.n_tiles - done} of {search.n_tiles} tiles left" in printed
    finish(output)


def poisoned(work: JobSpec, tiles: Sequence[tuple[int, int]]) -> Iterator[Outcome]:
    """Merge tiles, but die of one of them."""
    if (3, 5) in tiles:
        os.kill(os.getpid(), signal.SIGKILL)
    return attempt_tiles(work, tiles)


def test_a_tile_that_always_kills_its_worker_is_named_and_the_others_finish(
    search: Undisturbed, tmp_path: Path, finish: Callable[..., str]
) -> None:
    import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    output = tmp_path / "OUT.zarr"
    options = MergeOptions(tile_size=search.tile, cluster="local", workers=2, threads=1)
    ready, options = plan_merge(search.run, output, options)
    failed: list[Outcome] = []

    def note(outcome: Outcome) -> None:
        if outcome.summary is None:
            failed.append(outcome)

    # It fails after its second kill instead of the fourth.
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 1}),
        OutputLock(open_objects(output)) as lock,
        open_cluster(options) as cluster,
    ):
        executor = cluster.executor
        assert isinstance(executor, ClientExecutor)
        executor.attempt = poisoned
        one = rf"1 of {search.n_tiles} tiles failed.*\n.*tile \(3, 5\)"
        with pytest.raises(TilesFailedError, match=one) as printed:
            merge(ready, options, executor, lock, note)
    assert "KilledWorker" in str(printed.value)
    assert [(end.iy, end.ix) for end in failed] == [(3, 5)]
    assert tiles_done(output) == search.n_tiles - 1
    assert f"{search.n_tiles - 1} of them done before" in finish(output)


def test_a_lock_is_not_left_behind_by_errors(tmp_path) -> None:
    output = open_objects(tmp_path / "OUT.zarr")
    with pytest.raises(RuntimeError), OutputLock(output):
        raise RuntimeError
    with OutputLock(output), pytest.raises(OutputLockedError), OutputLock(output):
        pass
    assert not (tmp_path / "OUT.zarr").exists()
