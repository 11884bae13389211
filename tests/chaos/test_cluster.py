"""Clusters that lose their workers, their scheduler or their driver, and tiles that kill."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from chaos_common import Undisturbed, merge_command, start, tiles_done, undisturbed, wait_for
from ocelot_em.api import plan_merge
from ocelot_em.cluster import open_cluster
from ocelot_em.errors import OutputLockedError, TilesFailedError
from ocelot_em.execute import LOOK_SECONDS, ClientExecutor
from ocelot_em.lock import OutputLock
from ocelot_em.objects import open_objects
from ocelot_em.pipeline import Outcome, Work, attempt_tiles, merge
from ocelot_em.plan import MergeOptions

pytestmark = pytest.mark.chaos

BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Undisturbed]:
    folder = tmp_path_factory.mktemp("cluster")
    yield undisturbed(folder, 640, 32)
    shutil.rmtree(folder)


def begin_merge(search: Undisturbed, output: Path, *options: str) -> "subprocess.Popen[str]":
    return start(merge_command(search.run, output, search.tile, *options))


def finish(search: Undisturbed, output: Path, *options: str) -> str:
    """Run the same command again, undisturbed; what it printed."""
    again = begin_merge(search, output, *options)
    told, _ = again.communicate(timeout=200)
    assert again.returncode == 0, told
    search.assert_finished(output)
    return told


@pytest.fixture
def scheduler(
    tmp_path: Path,
) -> Iterator[Callable[[int], tuple[str, list["subprocess.Popen[bytes]"]]]]:
    """Start a scheduler, and workers of it without nannies; its address, and the processes."""
    processes: list[subprocess.Popen[bytes]] = []

    def begin(n_workers: int) -> tuple[str, list["subprocess.Popen[bytes]"]]:
        file = tmp_path / "scheduler.json"
        shared = ["--scheduler-file", str(file), "--interface", "lo"]
        commands = [
            ["scheduler", *shared, "--port", "0", "--dashboard-address", "127.0.0.1:0"],
            *[["worker", *shared, "--no-nanny", "--nthreads", "1"]] * n_workers,
        ]
        for command in commands:
            processes.append(
                subprocess.Popen(
                    [str(BIN / "dask"), *command],
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    cwd=tmp_path,
                )
            )
        wait_for(file.exists, "a scheduler")
        return str(json.loads(file.read_text())["address"]), processes

    yield begin
    for process in processes:
        process.kill()
        process.wait()


def test_without_workers_a_run_ends_in_the_stated_time(search, tmp_path, scheduler) -> None:
    output = tmp_path / "OUT.zarr"
    address, processes = scheduler(2)
    driver = begin_merge(search, output, "--cluster", address, "--worker-timeout", "5")
    wait_for(lambda: tiles_done(output) > 20, "tiles")
    for worker in processes[1:]:
        worker.kill()
    since = time.monotonic()
    told, _ = driver.communicate(timeout=60)
    assert driver.returncode == 75, told
    assert "the cluster has had no workers for 5 s" in told
    assert 5 - LOOK_SECONDS <= time.monotonic() - since < 25  # since it last looked and saw some
    assert 20 < tiles_done(output) < search.n_tiles
    finish(search, output)


def test_a_killed_scheduler_ends_the_run_in_time(search, tmp_path, scheduler) -> None:
    output = tmp_path / "OUT.zarr"
    address, processes = scheduler(2)
    driver = begin_merge(search, output, "--cluster", address)
    wait_for(lambda: tiles_done(output) > 20, "tiles")
    processes[0].kill()
    since = time.monotonic()
    told, _ = driver.communicate(timeout=120)
    assert driver.returncode == 75, told
    assert "the Dask scheduler is gone" in told
    assert time.monotonic() - since < 60
    finish(search, output)


@pytest.mark.parametrize("cluster", ["threads", "local"])
def test_a_killed_driver_leaves_no_process_and_no_lock(search, tmp_path, cluster) -> None:
    output = tmp_path / "OUT.zarr"
    driver = begin_merge(search, output, "--cluster", cluster)
    wait_for(lambda: tiles_done(output) > 20, "tiles")
    children = psutil.Process(driver.pid).children(recursive=True)
    assert bool(children) == (cluster == "local")
    driver.kill()
    driver.communicate()
    assert len(list(output.glob("lock/*"))) == 1
    wait_for(lambda: not any(child.is_running() for child in children), "the end of workers", 60)
    done = tiles_done(output)
    told = finish(search, output)
    assert f"{done} of them done before" in told


def test_a_killed_driver_of_a_running_cluster_stops_its_tasks(search, tmp_path, scheduler) -> None:
    output = tmp_path / "OUT.zarr"
    address, _ = scheduler(2)
    driver = begin_merge(search, output, "--cluster", address)
    wait_for(lambda: tiles_done(output) > 20, "tiles")
    driver.kill()
    driver.communicate()
    finish(search, output, "--cluster", address)


def test_a_run_that_is_stopped_goes_on_with_the_same_workers(search, tmp_path, scheduler) -> None:
    output = tmp_path / "OUT.zarr"
    address, _ = scheduler(2)
    driver = begin_merge(search, output, "--cluster", address)
    wait_for(lambda: tiles_done(output) > 20, "tiles")
    driver.terminate()
    told, _ = driver.communicate(timeout=60)
    assert driver.returncode == 75, told
    finish(search, output, "--cluster", address)


def test_a_second_run_on_the_same_output_is_refused(search, tmp_path) -> None:
    output = tmp_path / "OUT.zarr"
    first = begin_merge(search, output, "--threads", "1")
    wait_for(lambda: tiles_done(output) > 5, "tiles")
    for options in ([], ["--overwrite"]):
        second = begin_merge(search, output, *options)
        told, _ = second.communicate(timeout=60)
        assert second.returncode == 2, told
        assert f"another run is writing it: process {first.pid} on" in told
    told, _ = first.communicate(timeout=200)
    assert first.returncode == 0, told
    search.assert_finished(output)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("cluster", ["threads", "local"])
def test_a_run_that_is_stopped_ends_well_and_goes_on(search, tmp_path, cluster, number) -> None:
    output = tmp_path / "OUT.zarr"
    driver = begin_merge(search, output, "--cluster", cluster)
    wait_for(lambda: tiles_done(output) > 20, "tiles")
    since = time.monotonic()
    driver.send_signal(number)
    told, _ = driver.communicate(timeout=60)
    assert driver.returncode == 75, told
    assert time.monotonic() - since < 20
    assert f"{signal.Signals(number).name}: stopping after the tiles in hand" in told
    assert list(output.glob("lock/*")) == []
    done = tiles_done(output)
    assert f"{search.n_tiles - done} of {search.n_tiles} tiles are left" in told
    finish(search, output)


def poisoned(work: Work, tiles: Sequence[tuple[int, int]]) -> list[Outcome]:
    """Merge tiles, but die of one of them."""
    if (3, 5) in tiles:
        os.kill(os.getpid(), signal.SIGKILL)
    return attempt_tiles(work, tiles)


def test_a_tile_that_always_kills_its_worker_is_named_and_the_others_finish(
    search: Undisturbed, tmp_path: Path
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

    with OutputLock(open_objects(output)) as lock, open_cluster(options) as cluster:
        executor = cluster.executor
        assert isinstance(executor, ClientExecutor)
        executor.attempt = poisoned
        one = r"1 of 400 tiles failed.*\n.*tile \(3, 5\)"
        with pytest.raises(TilesFailedError, match=one) as told:
            merge(ready, options, executor, lock, note)
    assert "KilledWorker" in str(told.value)
    assert [(end.iy, end.ix) for end in failed] == [(3, 5)]
    assert tiles_done(output) == search.n_tiles - 1
    assert "399 of them done before" in finish(search, output)


def test_a_lock_is_not_left_behind_by_errors(tmp_path) -> None:
    output = open_objects(tmp_path / "OUT.zarr")
    with pytest.raises(RuntimeError), OutputLock(output):
        raise RuntimeError
    with OutputLock(output), pytest.raises(OutputLockedError), OutputLock(output):
        pass
    assert not (tmp_path / "OUT.zarr").exists()
