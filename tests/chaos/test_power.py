"""A loss of power: what had not reached the disk is gone, and nothing wrong is left.

Outputs are on a file system in a file. A copy of that file is what its disk had at that moment:
what the system still kept in memory is not in it.
"""

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest

import ocelot_em
from chaos_common import (
    OCELOT,
    Gate,
    Undisturbed,
    digests,
    do,
    end,
    merge_command,
    require,
    start,
    tiles_done,
    undisturbed,
    wait_for,
)
from helpers import make_result, write_search
from ocelot_em.store import groups
from ocelot_em.store.objects import open_objects

pytestmark = pytest.mark.chaos

DISK_NBYTES = 64 * 1024 * 1024

PROGRAMS = "mkfs.ext4", "mount", "umount", "findmnt"


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    require(*PROGRAMS)
    return undisturbed(tmp_path_factory.mktemp("power"), 60, 8)


@contextmanager
def mounted(image: Path, folder: Path, options: str = "") -> Iterator[Path]:
    folder.mkdir(exist_ok=True)
    do("mount", "-o", ",".join(["loop", *filter(None, [options])]), image, folder)
    try:
        yield folder
    finally:
        do("umount", folder)


@dataclass
class Disk:
    """A file system in a file, and copies of it as they were without power."""

    image: Path
    folder: Path

    def __post_init__(self) -> None:
        device = do("findmnt", "-n", "-o", "SOURCE", self.folder).strip()
        self._statistics = Path("/sys/block", Path(device).name, "stat")

    def without_power(self) -> Path:
        """Copy what is on the disk now, all of one moment."""
        copy = self.image.with_name("without-power.img")
        deadline = time.monotonic() + 300
        while True:
            before = self._written()
            do("cp", "--sparse=always", self.image, copy)
            if self._written() == before:
                return copy
            assert time.monotonic() < deadline, "the disk is never at rest"

    def _written(self) -> tuple[str, ...]:
        """Writes that the disk has completed, and whether any is under way."""
        # Fields 5 and 9 of Documentation/block/stat.rst.
        fields = self._statistics.read_text().split()
        return fields[4], fields[8]


@pytest.fixture
def disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Disk]:
    """A small disk, of which a file that nobody waited for is shown not to be there yet."""
    require(*PROGRAMS)
    image = tmp_path / "disk.img"
    with image.open("wb") as file:
        file.truncate(DISK_NBYTES)
    do("mkfs.ext4", "-q", "-F", image)
    probe = subprocess.run(
        ["mount", "-o", "loop", image, _made(tmp_path / "probe")], capture_output=True, text=True
    )
    if probe.returncode:
        pytest.skip(f"cannot mount a disk here: {probe.stderr.strip()}")
    do("umount", tmp_path / "probe")
    with mounted(image, tmp_path / "disk", getattr(request, "param", "")) as folder:
        made = Disk(image, folder)
        (folder / "asked-for").write_bytes(b"yes")
        do("sync", "-f", folder)
        (folder / "never-asked-for").write_bytes(b"no")
        with mounted(made.without_power(), tmp_path / "probe") as left:
            assert (left / "asked-for").read_bytes() == b"yes"
            lost = left / "never-asked-for"
            assert not lost.exists() or lost.read_bytes() == b""
        yield made


def _made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


@contextmanager
def started_again(copy: Path, folder: Path) -> Iterator[Path]:
    """Mount a disk after the power has come back: locks on it are of before."""
    with mounted(copy, folder) as disk:
        for lock in disk.glob("OUT.zarr/lock/[0-9]*"):
            if content := lock.read_bytes():
                lock.write_text(json.dumps({**json.loads(content), "boot": "the one before"}))
        yield disk


def merge_again(search: Undisturbed, output: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Merge after the power has come back, with less patience; tiles that it merged."""
    monkeypatch.setattr("ocelot_em.store.lock.STALE_SECONDS", 1.0)
    monkeypatch.setattr("ocelot_em.store.lock.CHECK_SECONDS", 0.2)
    return ocelot_em.merge(search.run, output, tile_size=search.tile).n_merged


@contextmanager
def merging(search: Undisturbed, disk: Disk, gate: Gate) -> Iterator["subprocess.Popen[str]"]:
    """A merge onto a disk that has done the tiles before the gate; killed in the end."""
    output = disk.folder / "OUT.zarr"
    command = merge_command(search.run, output, search.tile, "--threads", "1")
    run = start(command, gate.environment)
    try:
        gate.wait_until_reached(output, run)
        yield run
    finally:
        end(run)


def torn_files(output: Path) -> list[Path]:
    """Files whose names reached the disk, but not what is in them."""
    return [path for path in output.rglob("*") if path.is_file() and path.stat().st_size == 0]


def is_marked(output: Path, chunk: Path) -> bool:
    """Whether the tile of a chunk is marked as done: tiles here are chunks."""
    return (output / "progress/tile_summary/c" / chunk.parent.name / chunk.name / "0").exists()


OPTIONS = ["", "commit=1,noauto_da_alloc"]
"""A disk as it is by default; and one that writes names each second, and content no sooner when a
file replaces another, as other file systems do."""


@pytest.mark.parametrize(
    ("disk", "seed", "in_shards"),
    [(OPTIONS[seed % 2], seed, in_shards) for seed in range(4) for in_shards in (False, True)],
    indirect=["disk"],
)
def test_a_run_that_power_was_taken_from_goes_on(
    search, tmp_path, disk, seed, in_shards, monkeypatch
) -> None:
    moment = random.Random(seed).randrange(5, search.n_tiles - 5)
    with merging(search, disk, Gate(tmp_path / "gate", moment, in_shards)):
        copy = disk.without_power()
        there = tiles_done(disk.folder / "OUT.zarr")
    with started_again(copy, tmp_path / "again") as again:
        output = again / "OUT.zarr"
        left, n_torn = tiles_done(output), len(torn_files(output))
        merged = merge_again(search, output, monkeypatch)
        print(f"{there} tiles, {left} of them on the disk, {n_torn} torn files, {merged} merged")
        assert search.n_tiles - left <= merged <= search.n_tiles
        search.assert_finished(output)


def without_power_when(
    disk: Disk, probe: Path, holds: Callable[[Path], bool], name: str = "OUT.zarr"
) -> Path:
    """A copy of the disk as soon as something holds for a store on it."""
    deadline = time.monotonic() + 300
    while True:
        copy = disk.without_power()
        with mounted(copy, probe) as left:
            if holds(left / name):
                break
        assert time.monotonic() < deadline, "it never held"
        time.sleep(0.5)
    return copy


def test_tiles_whose_marks_alone_reached_the_disk_are_merged_again(
    search, tmp_path, disk, monkeypatch
) -> None:
    with merging(search, disk, Gate(tmp_path / "gate", 20)) as run:
        os.killpg(run.pid, signal.SIGSTOP)  # so that names are written, but nothing new comes
        wait_for(lambda: psutil.Process(run.pid).status() == "stopped", "the run's standstill")
        done = tiles_done(disk.folder / "OUT.zarr")
        copy = without_power_when(disk, tmp_path / "probe", lambda out: tiles_done(out) == done)
    with started_again(copy, tmp_path / "again") as again:
        output = again / "OUT.zarr"
        torn = [path for path in torn_files(output / "mip") if is_marked(output, path)]
        print(f"{done} tiles done, {len(torn)} of them torn")
        if not torn:
            pytest.skip("something made the system write everything at that moment")
        # Of other tiles, another map than this one may be torn.
        merged = merge_again(search, output, monkeypatch)
        assert search.n_tiles - done + len(torn) <= merged <= search.n_tiles
        search.assert_finished(output)


def test_a_stopped_run_that_power_is_taken_from_later_goes_on(
    search, tmp_path, disk, monkeypatch
) -> None:
    output, gate = disk.folder / "OUT.zarr", Gate(tmp_path / "gate", 20)
    with merging(search, disk, gate) as run:
        run.send_signal(signal.SIGTERM)
        gate.open_for_a_run_that_stops(output)
        printed, _ = run.communicate(timeout=300)
        assert run.returncode == 75, printed
        done = tiles_done(output)
        assert gate.n_tiles < done < search.n_tiles
        copy = without_power_when(
            disk, tmp_path / "probe", lambda out: not list(out.glob("lock/*"))
        )
    with started_again(copy, tmp_path / "again") as again:
        assert torn_files(again / "OUT.zarr") == []
        assert merge_again(search, again / "OUT.zarr", monkeypatch) == search.n_tiles - done
        search.assert_finished(again / "OUT.zarr")


@pytest.mark.parametrize("disk", OPTIONS, indirect=True)
def test_what_is_called_complete_stays_complete(search, tmp_path, disk, monkeypatch) -> None:
    run = start(merge_command(search.run, disk.folder / "OUT.zarr", search.tile, "--threads", "1"))
    try:
        printed, _ = run.communicate(timeout=300)
        copy = disk.without_power()
        assert run.returncode == 0, printed
    finally:
        end(run)
    with started_again(copy, tmp_path / "again") as again:
        output = again / "OUT.zarr"
        assert ocelot_em.describe(output).attributes.state == "complete"
        assert ocelot_em.check(output) == []
        assert merge_again(search, output, monkeypatch) == 0
        search.assert_finished(output)


@pytest.mark.parametrize("disk", OPTIONS, indirect=True)
def test_a_partial_that_is_written_stays_written(tmp_path, disk) -> None:
    rng = np.random.default_rng(8)
    for number in range(2):
        write_search(
            disk.folder / "RUN.zarr", [make_result(rng, (300, 200), 1000)], [1000], first=number
        )
        copy = disk.without_power()
        with mounted(copy, tmp_path / "again") as again:
            assert ocelot_em.check(again / "RUN.zarr") == []
            found = ocelot_em.describe(again / "RUN.zarr")
            assert [state for _, state, _ in found.partials] == ["complete"] * (number + 1)
            assert found.attributes.total_projections == 1000 * (number + 1)
            np.testing.assert_array_equal(
                ocelot_em.open_partials(again / "RUN.zarr")["mip"],
                ocelot_em.open_partials(disk.folder / "RUN.zarr")["mip"],
            )


@pytest.mark.parametrize("disk", OPTIONS, indirect=True)
def test_metadata_that_is_replaced_is_never_lost(tmp_path, disk) -> None:
    run = disk.folder / "RUN.zarr"
    write_search(run, [make_result(np.random.default_rng(8), (30, 20), 1000)], [1000])
    for number in range(3):
        do("sync", "-f", disk.folder)
        before = (run / "zarr.json").read_bytes()
        groups.update_attributes(open_objects(run), "", {"of-another-program": number})

        def is_replaced(there: Path, before: bytes = before) -> bool:
            return (there / "zarr.json").read_bytes() != before

        copy = without_power_when(disk, tmp_path / "probe", is_replaced, "RUN.zarr")
        with mounted(copy, tmp_path / "again") as again:
            assert digests(again / "RUN.zarr") == digests(run)
            assert ocelot_em.check(again / "RUN.zarr") == []


@pytest.mark.parametrize("disk", OPTIONS, indirect=True)
def test_files_that_are_imported_stay_imported(tmp_path, disk, crops, tables) -> None:
    run = disk.folder / "RUN.zarr"
    files = [str(crop) for crop in crops]
    importing = start(
        [*OCELOT, "import", *files, "--output", str(run), "--search-space", str(tables)]
    )
    printed, _ = importing.communicate(timeout=300)
    copy = disk.without_power()
    assert importing.returncode == 0, printed
    with mounted(copy, tmp_path / "again") as again:
        assert ocelot_em.check(again / "RUN.zarr") == []
        assert digests(again / "RUN.zarr") == digests(run)


def test_exports_are_on_the_disk_when_they_are_announced(
    search: Undisturbed, disk: Disk, tmp_path: Path
) -> None:
    merged = tmp_path / "OUT.zarr"
    ocelot_em.merge(search.run, merged, tile_size=search.tile)
    place = disk.folder
    for options in (
        ["peaks", merged, "--output", place / "particles.csv", "--cutoff", "3"],
        ["report", merged, "--output", place / "report.html"],
        *(
            ["export", merged, "--to", to, "--output", place / name]
            for to, name in (("mrc", "maps"), ("hdf5", "maps.h5"), ("ome-zarr", "image.ome.zarr"))
        ),
    ):
        do(*OCELOT, *map(str, options))
        copy = disk.without_power()
        with mounted(copy, tmp_path / "again") as again:
            assert contents(again) == contents(place)


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    found = {str(path.relative_to(folder)): path.read_bytes() for path in files}
    return {name: data for name, data in found.items() if name != "never-asked-for"}
