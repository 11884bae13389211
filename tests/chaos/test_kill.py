"""Killed drivers, killed workers, full disks: nothing is lost and nothing wrong is written."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import ocelot_em
from helpers import chunk_bytes, make_result, write_search
from ocelot_em.api import Observer
from ocelot_em.errors import PlanError, TilesFailedError
from ocelot_em.pipeline import Outcome

pytestmark = pytest.mark.chaos

TILE = 64
SHAPE = (640, 640)
OCELOT = [sys.executable, "-m", "ocelot_em"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A search, and its undisturbed merge."""
    place, rng = tmp_path_factory.mktemp("chaos"), np.random.default_rng(3)
    results = [make_result(rng, SHAPE, 1000 + i, ties=True) for i in range(3)]
    write_search(place / "RUN.zarr", results, [1000, 1001, 1002])
    ocelot_em.merge(place / "RUN.zarr", place / "EXPECTED.zarr", tile_size=TILE)
    yield place
    shutil.rmtree(place)


def start_merge(place: Path, output: Path, *options: str) -> "subprocess.Popen[str]":
    command = [*OCELOT, "merge", str(place / "RUN.zarr"), "--output", str(output)]
    return subprocess.Popen(
        [*command, "--tile-size", str(TILE), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for_tiles(output: Path, n: int) -> None:
    """Wait until some tiles are done."""
    deadline = time.monotonic() + 120
    while len(list(output.glob("progress/tile_summary/c/*/*/0"))) < n:
        assert time.monotonic() < deadline, "no tile was done in time"
        time.sleep(0.01)


@pytest.mark.parametrize("options", [(), ("--cluster", "local", "--workers", "2")])
def test_a_killed_driver_resumes_with_the_same_command(
    place: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    output = tmp_path / "OUT.zarr"
    driver = start_merge(place, output, *options)
    wait_for_tiles(output, 10)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.communicate()
    assert ocelot_em.describe(output).attributes.state == "writing"
    done = ocelot_em.describe(output).tiles_done
    assert 10 <= done < 100
    again = start_merge(place, output)
    printed, _ = again.communicate(timeout=200)
    assert again.returncode == 0, printed
    assert f"{done} of them done before" in printed
    assert chunk_bytes(output) == chunk_bytes(place / "EXPECTED.zarr")
    assert ocelot_em.check(output) == []


class KillsAWorker(Observer):
    """Sends SIGKILL to one worker process after some tiles."""

    def __init__(self) -> None:
        self.n = 0

    def tile_ended(self, outcome: Outcome) -> None:
        import psutil

        self.n += 1
        if self.n == 10:
            workers = [
                child
                for child in psutil.Process().children(recursive=True)
                if "spawn_main" in " ".join(child.cmdline())
            ]
            workers[0].kill()


def test_a_killed_worker_changes_nothing(place: Path, tmp_path: Path) -> None:
    output, killer = tmp_path / "OUT.zarr", KillsAWorker()
    ocelot_em.merge(
        place / "RUN.zarr", output, tile_size=TILE, cluster="local", workers=2, observer=killer
    )
    assert killer.n == 100
    assert chunk_bytes(output) == chunk_bytes(place / "EXPECTED.zarr")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk here: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_said_plainly_and_the_rerun_finishes(place: Path, small_disk: Path) -> None:
    output, ballast = small_disk / "OUT.zarr", small_disk / "ballast"

    class FillsTheDisk(Observer):
        def tile_ended(self, outcome: Outcome) -> None:
            if not ballast.exists():
                with ballast.open("wb") as file:
                    free = shutil.disk_usage(small_disk).free
                    file.write(bytes(max(free - 1_000_000, 0)))

    def merge(observer: Observer | None = None) -> None:
        ocelot_em.merge(place / "RUN.zarr", output, tile_size=TILE, threads=2, observer=observer)

    with pytest.raises(TilesFailedError, match="the disk is full: free some space") as error:
        merge(FillsTheDisk())
    assert str(output) in str(error.value)
    done = ocelot_em.describe(output).tiles_done
    assert 0 < done < 100
    with pytest.raises(PlanError, match=r"disk: the output needs about [\d,]+ bytes more"):
        merge()
    ballast.unlink()
    merge()
    assert chunk_bytes(output) == chunk_bytes(place / "EXPECTED.zarr")
    left_over = [path for path in output.rglob("*") if "#" in path.name]
    assert left_over == []
