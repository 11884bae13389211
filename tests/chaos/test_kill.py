"""Killed workers and full disks: nothing is lost and nothing wrong is written."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import ocelot_em
from chaos_common import Undisturbed, undisturbed
from ocelot_em.errors import PlanError, TilesFailedError
from ocelot_em.merge.outcome import Outcome
from ocelot_em.run.api import Observer

pytestmark = pytest.mark.chaos


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return undisturbed(tmp_path_factory.mktemp("kill"), 250, 32)


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


def test_a_killed_worker_changes_nothing(search: Undisturbed, tmp_path: Path) -> None:
    output, killer = tmp_path / "OUT.zarr", KillsAWorker()
    ocelot_em.merge(
        search.run, output, tile_size=search.tile, cluster="local", workers=2, observer=killer
    )
    assert killer.n == search.n_tiles
    search.assert_finished(output)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk here: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_said_plainly_and_the_rerun_finishes(
    search: Undisturbed, small_disk: Path
) -> None:
    output, ballast = small_disk / "OUT.zarr", small_disk / "ballast"

    class FillsTheDisk(Observer):
        def tile_ended(self, outcome: Outcome) -> None:
            if not ballast.exists():
                # The other thread writes meanwhile: fill what there is, then free a little of it.
                with ballast.open("wb", buffering=0) as file, suppress(OSError):
                    while True:
                        file.write(bytes(100_000))
                os.truncate(ballast, ballast.stat().st_size - 200_000)

    def merge(observer: Observer | None = None) -> None:
        ocelot_em.merge(search.run, output, tile_size=search.tile, threads=2, observer=observer)

    with pytest.raises(TilesFailedError, match="the disk is full: free some space") as error:
        merge(FillsTheDisk())
    assert str(output) in str(error.value)
    done = ocelot_em.describe(output).tiles_done
    assert 0 < done < search.n_tiles
    with pytest.raises(PlanError, match=r"disk: the output needs about [\d,]+ more bytes"):
        merge()
    ballast.unlink()
    merge()
    search.assert_finished(output)
