"""Killed workers and full disks: nothing is lost and nothing wrong is written."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import ocelot_em
from chaos_common import (
    OCELOT,
    Gate,
    Undisturbed,
    digests,
    end,
    merge_command,
    start,
    undisturbed,
)
from ocelot_em.errors import PlanError, TilesFailedError
from ocelot_em.merge import resume
from ocelot_em.merge.outcome import Outcome
from ocelot_em.run.observer import Observer

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


@pytest.mark.parametrize("n_tiles", [1, 30, 60])
def test_a_killed_merge_in_shards_is_resumed(search, tmp_path: Path, n_tiles: int) -> None:
    """By another process, which appends to none of the shards that the first has created."""
    output, gate = tmp_path / "OUT.zarr", Gate(tmp_path / "gate", n_tiles, in_shards=True)
    run = start(merge_command(search.run, output, search.tile, "--threads", "2"), gate.environment)
    try:
        gate.wait_until_reached(output, run)
    finally:
        end(run)
    report = ocelot_em.merge(search.run, output, tile_size=search.tile)
    assert report.n_merged == search.n_tiles - n_tiles
    assert not (output / "mip/c").exists()
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


@pytest.mark.parametrize("min_nbytes", [0, 2**60], ids=["shards", "files"])
def test_a_full_disk_is_said_plainly_and_the_rerun_finishes(
    search: Undisturbed, small_disk: Path, min_nbytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resume, "MIN_NBYTES_IN_SHARDS", min_nbytes)
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


KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from ocelot_em.cli.main import run
from ocelot_em.io import ome_zarr

left, kinds = int(sys.argv[1]), {"write": ome_zarr._Pyramid, "rename": Path, "rmtree": shutil}
for name, kind in kinds.items():
    def killed(*arguments, original=getattr(kind, name), **options):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)
    setattr(kind, name, killed)
sys.exit(run(sys.argv[2:]))
"""
"""Runs a command that is killed before a step."""


@pytest.mark.parametrize("before", range(4), ids=["write", "set aside", "rename", "delete"])
def test_an_export_that_is_killed_leaves_nothing_behind_when_it_is_repeated(
    search: Undisturbed, tmp_path: Path, before: int
) -> None:
    folder = tmp_path / "images"
    image = folder / "a [1].zarr"
    ocelot_em.merge(search.run, tmp_path / "OUT.zarr")
    words = ["export", str(tmp_path / "OUT.zarr"), "--to", "ome-zarr", "--output", str(image)]
    subprocess.run([*OCELOT, *words], check=True)
    whole = digests(image)
    words += ["--overwrite"]
    killed = subprocess.run([sys.executable, "-c", KILLED, str(before), *words])
    assert killed.returncode == -9
    assert len([*folder.iterdir()]) == 2
    unrelated = folder / "a [1].zarr#1"
    unrelated.mkdir()
    done = subprocess.run([*OCELOT, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(folder.iterdir()) == [image, unrelated]
    assert digests(image) == whole
