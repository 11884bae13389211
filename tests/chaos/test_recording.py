"""Recorded searches whose processes are killed or stopped at random moments and writes."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ocelot_em import check, describe, merge, open_merged
from recording import N, new_maps, search

pytestmark = pytest.mark.chaos

TESTS = Path(__file__).parents[1]

DEVICES = """
import sys
from multiprocessing import get_context

import recording


def device(run, name, taken):
    recorder, maps = recording.recorder(run, name)

    def next_range():
        with taken.get_lock():
            taken.value += 1
            return (taken.value - 1, taken.value) if taken.value <= recording.N else None

    for start, stop in recorder.ranges(next_range):
        recording.search(maps, start, stop)
    recorder.finish()


if __name__ == "__main__":
    run, n_devices = sys.argv[1], int(sys.argv[2])
    context = get_context("spawn")
    taken = context.Value("i", 0)
    processes = [
        context.Process(target=device, args=(run, f"gpu{number}", taken))
        for number in range(n_devices)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(any(process.exitcode for process in processes))
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "devices.py").write_text(DEVICES)
    return tmp_path / "devices.py"


def start(script: Path, run: Path, n_devices: int) -> "subprocess.Popen[str]":
    path = os.pathsep.join([str(TESTS), *filter(None, sys.path)])
    return subprocess.Popen(
        [sys.executable, str(script), str(run), str(n_devices)],
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )


def n_searched(run: Path) -> int:
    """Number of orientations that are recorded, read while the search goes on."""
    if not (run / "zarr.json").exists():
        return 0
    progress = describe(run).progress
    return progress.n_searched if progress else 0


def assert_whole(run: Path, output: Path, *about: object) -> None:
    """Each orientation is in it once, and the maps are those of a search without any fault."""
    assert check(run) == [], about
    maps = new_maps()
    search(maps, 0, N)
    merge(run, output)
    merged = open_merged(output)
    assert merged.total_projections == 2 * N
    for key in ("mip", "best_global_index"):
        np.testing.assert_array_equal(merged[key], maps[key], err_msg=str(about))
    for key in ("correlation_sum", "correlation_squared_sum"):
        np.testing.assert_allclose(merged[key], maps[key], 1e-5, 1e-4, err_msg=str(about))


def test_a_search_that_is_killed_again_and_again_ends_whole(script: Path, tmp_path: Path) -> None:
    run, seed, seen = tmp_path / "RUN", random.randrange(10**6), 0
    moments = random.Random(seed)
    for number in range(10):
        processes = start(script, run, number % 3 + 1)
        while processes.poll() is None and n_searched(run) == seen < N:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.1))
        os.killpg(processes.pid, signal.SIGKILL)
        processes.communicate()
        now = n_searched(run)
        assert now >= seen, seed  # what was recorded once stays
        seen = now
    processes = start(script, run, 2)
    _, errors = processes.communicate()
    assert processes.returncode == 0, (seed, errors)
    assert_whole(run, tmp_path / "M", seed)
    # Who records next finds nothing to do, and nothing is left of what was not finished.
    processes = start(script, run, 1)
    _, errors = processes.communicate()
    assert processes.returncode == 0, (seed, errors)
    assert check(run) == [], seed
    for partial in (run / "partials").iterdir():
        assert len([*partial.glob("*/mip")]) <= 1, seed
    assert list(run.rglob("c/*/*#*")) == []


def test_a_process_that_slept_records_nothing_twice(script: Path, tmp_path: Path) -> None:
    run, seed = tmp_path / "RUN", random.randrange(10**6)
    sleeper = start(script, run, 1)
    while sleeper.poll() is None and n_searched(run) < 2:
        time.sleep(0.01)
    time.sleep(random.Random(seed).uniform(0, 0.1))
    os.killpg(sleeper.pid, signal.SIGSTOP)
    _, errors = (other := start(script, run, 2)).communicate()
    assert other.returncode == 0, (seed, errors)
    os.killpg(sleeper.pid, signal.SIGCONT)
    _, errors = sleeper.communicate()
    assert sleeper.returncode == 0 or "must not be counted twice" in errors, (seed, errors)
    assert_whole(run, tmp_path / "M", seed)
