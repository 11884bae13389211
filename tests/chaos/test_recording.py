"""Recorded searches whose processes are killed or stopped at random moments and writes.

On one host, on two that share a folder, and in a bucket.
"""

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from ocelot_em import check, describe, merge, open_merged
from ocelot_em.errors import StoreNotFoundError
from ocelot_em.store.objects import open_objects
from recording import N, new_maps, search
from s3 import BUCKET, bucket, server

__all__ = ["bucket", "server"]  # fixtures

pytestmark = pytest.mark.chaos

TESTS = Path(__file__).parents[1]

DEVICES = """
import sys
from multiprocessing import get_context

import recording
from ocelot_em.store import constants

constants.DEFAULT_CHUNK = 32  # so that maps have shards, but in buckets


def device(run, name, taken, last):
    recorder, maps = recording.recorder(run, name)

    def next_range():
        with taken.get_lock():
            taken.value += 1
            return (taken.value - 1, taken.value) if taken.value <= last else None

    for start, stop in recorder.ranges(next_range):
        recording.search(maps, start, stop)
    recorder.finish()


if __name__ == "__main__":
    run, (n_devices, first, last) = sys.argv[1], map(int, sys.argv[2:])
    context = get_context("spawn")
    taken = context.Value("i", first)
    processes = [
        context.Process(target=device, args=(run, f"gpu{number}", taken, last))
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


def start(
    script: Path,
    run: Path | str,
    n_devices: int,
    share: tuple[int, int] = (0, N),
    on: tuple[str, ...] = (),
) -> "subprocess.Popen[str]":
    path = os.pathsep.join([str(TESTS), *filter(None, sys.path)])
    return subprocess.Popen(
        [*on, sys.executable, str(script), str(run), *map(str, (n_devices, *share))],
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )


def n_searched(run: Path | str) -> int:
    """Number of orientations that are recorded, read while the search goes on."""
    try:
        progress = describe(run).progress
    except StoreNotFoundError:
        return 0
    return progress.n_searched if progress else 0


def assert_whole(run: Path | str, output: Path, *about: object) -> None:
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


@pytest.mark.parametrize(("place", "n_kills"), [("{}/RUN", 6), (f"s3://{BUCKET}/RUN", 3)])
def test_a_search_that_is_killed_again_and_again_ends_whole(
    place: str, n_kills: int, script: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    in_bucket = place.startswith("s3:")
    if in_bucket:
        request.getfixturevalue("bucket")
    run, seed, seen = place.format(tmp_path), random.randrange(10**6), 0
    moments = random.Random(seed)
    for number in range(n_kills):
        processes = start(script, run, number % 3 + 1)
        while processes.poll() is None and n_searched(run) == seen < N:
            time.sleep(0.5 if in_bucket else 0.05)  # to look takes the server's time
        time.sleep(moments.uniform(0, 0.1))
        with suppress(ProcessLookupError):  # all have ended
            os.killpg(processes.pid, signal.SIGKILL)
        processes.communicate()
        now = n_searched(run)
        assert now >= seen, seed  # what was recorded once stays
        seen = now
    # Who records last finds nothing to do, and nothing is left of what was not finished.
    for n_devices in (2, 1):
        processes = start(script, run, n_devices)
        _, errors = processes.communicate()
        assert processes.returncode == 0, (seed, errors)
        assert_whole(run, tmp_path / f"M{n_devices}", seed)
    objects = open_objects(run)
    for partial in objects.children("partials"):
        assert sum("/mip/zarr.json" in key for key in objects.keys(f"partials/{partial}")) <= 1
    assert [*tmp_path.rglob("c/*/*#*")] == []


def test_two_hosts_record_in_one_folder(script: Path, tmp_path: Path) -> None:
    """One sees no process of the other. One or both are killed; restarts have the other half."""
    run, seed, halves = tmp_path / "RUN", random.randrange(10**6), [(0, N // 2), (N // 2, N)]
    moments = random.Random(seed)
    name = ("unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c")
    hosts = [(*name, f'hostname host{number}; exec "$0" "$@"') for number in range(2)]
    if subprocess.run([*hosts[0], "true"]).returncode:
        pytest.skip("needs hosts of their own: unshare --uts --pid")
    for number, killed in enumerate((slice(2), slice(1), slice(2), slice(1, 2), slice(0))):
        each = [
            start(script, run, number % 2 + 1, half, host)
            for half, host in zip(halves[:: (-1) ** number], hosts, strict=True)
        ]
        seen = n_searched(run)
        while any(host.poll() is None for host in each) and n_searched(run) == seen < N:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.1))
        for host in each[killed]:  # the other one, if any, searches its half to the end
            with suppress(ProcessLookupError):  # it has ended
                os.killpg(host.pid, signal.SIGKILL)
        for host in each:
            _, errors = host.communicate()
            assert host.returncode in (0, -9), (seed, number, errors)
    # Whether a process of another host has ended is not known, and need not be: its partial may
    # be left as running, depending on the moment of the kill.
    assert {state for _, state, _ in describe(run).partials} <= {"running", "complete"}, seed
    assert_whole(run, tmp_path / "M", seed)


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
