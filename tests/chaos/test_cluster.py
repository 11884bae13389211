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

import numpy as np
import psutil
import pytest

import ocelot_em
from helpers import chunk_bytes, make_result, write_search
from ocelot_em.api import plan_merge
from ocelot_em.cluster import open_cluster
from ocelot_em.errors import OutputLockedError, TilesFailedError
from ocelot_em.execute import ClientExecutor
from ocelot_em.lock import OutputLock
from ocelot_em.objects import open_objects
from ocelot_em.pipeline import Outcome, Work, attempt_tiles, merge
from ocelot_em.plan import MergeOptions

pytestmark = pytest.mark.chaos

TILE = 32
SHAPE = (640, 640)
N_TILES = 400
OCELOT = [sys.executable, "-m", "ocelot_em"]
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A search, and its undisturbed merge."""
    place, rng = tmp_path_factory.mktemp("chaos"), np.random.default_rng(7)
    results = [make_result(rng, SHAPE, 1000 + i, ties=True) for i in range(3)]
    write_search(place / "RUN.zarr", results, [1000, 1001, 1002])
    ocelot_em.merge(place / "RUN.zarr", place / "EXPECTED.zarr", tile_size=TILE)
    yield place
    shutil.rmtree(place)


def start(place: Path, output: Path, *options: str) -> "subprocess.Popen[str]":
    command = [*OCELOT, "merge", str(place / "RUN.zarr"), "--output", str(output)]
    return subprocess.Popen(
        [*command, "--tile-size", str(TILE), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def tiles_done(output: Path) -> int:
    return len(list(output.glob("progress/tile_summary/c/*/*/0")))


def wait_for(holds: Callable[[], bool], what: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not in {seconds} s: {what}"
        time.sleep(0.02)


def assert_undisturbed(place: Path, output: Path) -> None:
    assert chunk_bytes(output) == chunk_bytes(place / "EXPECTED.zarr")
    assert ocelot_em.check(output) == []
    assert [*output.rglob("*#*"), *output.glob("lock/*")] == []


def finish(place: Path, output: Path) -> str:
    """Run the same command again, undisturbed; what it printed."""
    again = start(place, output)
    told, _ = again.communicate(timeout=200)
    assert again.returncode == 0, told
    assert_undisturbed(place, output)
    return told


Start = Callable[[int], tuple[str, list["subprocess.Popen[bytes]"]]]


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


def test_without_workers_a_run_ends_in_the_stated_time(place, tmp_path, scheduler) -> None:
    output = tmp_path / "OUT.zarr"
    address, processes = scheduler(2)
    driver = start(place, output, "--cluster", address, "--worker-timeout", "5")
    wait_for(lambda: tiles_done(output) > 20, "tiles")
    for worker in processes[1:]:
        worker.kill()
    since = time.monotonic()
    told, _ = driver.communicate(timeout=60)
    assert driver.returncode == 75, told
    assert "the cluster has had no workers for 5 s" in told
    assert 5 <= time.monotonic() - since < 25
    assert 20 < tiles_done(output) < N_TILES
    finish(place, output)


def test_a_killed_scheduler_ends_the_run_in_time(place, tmp_path, scheduler) -> None:
    output = tmp_path / "OUT.zarr"
    address, processes = scheduler(2)
    driver = start(place, output, "--cluster", address)
    wait_for(lambda: tiles_done(output) > 20, "tiles")
    processes[0].kill()
    since = time.monotonic()
    told, _ = driver.communicate(timeout=120)
    assert driver.returncode == 75, told
    assert "the Dask scheduler is gone" in told
    assert time.monotonic() - since < 60
    finish(place, output)


@pytest.mark.parametrize("cluster", ["threads", "local"])
def test_a_killed_driver_leaves_no_process_and_no_lock(place, tmp_path, cluster) -> None:
    output = tmp_path / "OUT.zarr"
    driver = start(place, output, "--cluster", cluster)
    wait_for(lambda: tiles_done(output) > 20, "tiles")
    children = psutil.Process(driver.pid).children(recursive=True)
    assert bool(children) == (cluster == "local")
    driver.kill()
    driver.communicate()
    assert len(list(output.glob("lock/*"))) == 1
    wait_for(lambda: not any(child.is_running() for child in children), "the end of workers", 60)
    done = tiles_done(output)
    told = finish(place, output)
    assert f"{done} of them done before" in told


def test_a_killed_driver_of_a_running_cluster_stops_its_tasks(place, tmp_path, scheduler) -> None:
    output = tmp_path / "OUT.zarr"
    address, _ = scheduler(2)
    driver = start(place, output, "--cluster", address)
    wait_for(lambda: tiles_done(output) > 20, "tiles")
    driver.kill()
    driver.communicate()
    again = start(place, output, "--cluster", address)
    told, _ = again.communicate(timeout=200)
    assert again.returncode == 0, told
    assert_undisturbed(place, output)


def test_a_run_that_is_stopped_goes_on_with_the_same_workers(place, tmp_path, scheduler) -> None:
    output = tmp_path / "OUT.zarr"
    address, _ = scheduler(2)
    driver = start(place, output, "--cluster", address)
    wait_for(lambda: tiles_done(output) > 20, "tiles")
    driver.terminate()
    told, _ = driver.communicate(timeout=60)
    assert driver.returncode == 75, told
    again = start(place, output, "--cluster", address)
    told, _ = again.communicate(timeout=200)
    assert again.returncode == 0, told
    assert_undisturbed(place, output)


def test_a_second_run_on_the_same_output_is_refused(place, tmp_path) -> None:
    output = tmp_path / "OUT.zarr"
    first = start(place, output, "--threads", "1")
    wait_for(lambda: tiles_done(output) > 5, "tiles")
    for options in ([], ["--overwrite"]):
        second = start(place, output, *options)
        told, _ = second.communicate(timeout=60)
        assert second.returncode == 2, told
        assert f"another run is writing it: process {first.pid} on" in told
    told, _ = first.communicate(timeout=200)
    assert first.returncode == 0, told
    assert_undisturbed(place, output)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("cluster", ["threads", "local"])
def test_a_run_that_is_stopped_ends_well_and_goes_on(place, tmp_path, cluster, number) -> None:
    output = tmp_path / "OUT.zarr"
    driver = start(place, output, "--cluster", cluster)
    wait_for(lambda: tiles_done(output) > 20, "tiles")
    since = time.monotonic()
    driver.send_signal(number)
    told, _ = driver.communicate(timeout=60)
    assert driver.returncode == 75, told
    assert time.monotonic() - since < 20
    assert f"{signal.Signals(number).name}: stopping after the tiles in hand" in told
    assert list(output.glob("lock/*")) == []
    done = tiles_done(output)
    assert f"{N_TILES - done} of {N_TILES} tiles are left" in told
    finish(place, output)


def poisoned(work: Work, tiles: Sequence[tuple[int, int]]) -> list[Outcome]:
    """Merge tiles, but die of one of them."""
    if (3, 5) in tiles:
        os.kill(os.getpid(), signal.SIGKILL)
    return attempt_tiles(work, tiles)


def test_a_tile_that_always_kills_its_worker_is_named_and_the_others_finish(
    place: Path, tmp_path: Path
) -> None:
    import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    output = tmp_path / "OUT.zarr"
    options = MergeOptions(tile_size=TILE, cluster="local", workers=2, threads=1)
    ready, options = plan_merge(place / "RUN.zarr", output, options)
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
    assert tiles_done(output) == N_TILES - 1
    assert "399 of them done before" in finish(place, output)


def test_a_lock_is_not_left_behind_by_errors(place, tmp_path) -> None:
    output = open_objects(tmp_path / "OUT.zarr")
    with pytest.raises(RuntimeError), OutputLock(output):
        raise RuntimeError
    with OutputLock(output), pytest.raises(OutputLockedError), OutputLock(output):
        pass
    assert not (tmp_path / "OUT.zarr").exists()
