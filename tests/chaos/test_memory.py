"""A worker that the kernel kills, because its control group may not have the memory it needs."""

import re
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from chaos_common import (
    Undisturbed,
    end,
    merge_command,
    require,
    start,
    tiles_done,
    undisturbed,
    wait_for,
)

pytestmark = pytest.mark.chaos

GROUPS = Path("/sys/fs/cgroup/memory")
DASK = [sys.executable, "-m", "dask"]

THREADS = 3
"""Of the worker in the group: so many tiles it has at a time."""

SPARE_NBYTES = 16 * 1024 * 1024
"""That the group may have beyond an idle worker: far less than a tile of 1024^2 pixels needs."""


@dataclass(frozen=True)
class Group:
    """A control group of this kernel's first version."""

    folder: Path

    def number(self, of: str, name: str) -> int:
        """Read one of the named numbers in a file."""
        lines = (self.folder / of).read_text().splitlines()
        return int(dict(line.split() for line in lines)[name])

    def kills(self) -> int:
        """So often the kernel has killed a process of it for want of memory."""
        return self.number("memory.oom_control", "oom_kill")

    def limit(self, nbytes: int) -> None:
        """Give it no more than this."""
        (self.folder / "memory.limit_in_bytes").write_text(str(nbytes))

    def enter(self, command: list[str]) -> list[str]:
        """Return a command that runs another in the group."""
        script = f'echo $$ > {self.folder}/cgroup.procs && exec "$@"'
        return ["sh", "-c", script, "sh", *command]


@pytest.fixture
def group() -> Iterator[Group]:
    folder = GROUPS / f"ocelot-{uuid.uuid4().hex[:8]}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"cannot make control groups here: {error}")
    yield Group(folder)

    def removed() -> bool:
        try:
            folder.rmdir()
        except OSError:  # processes in it are still ending
            return False
        return True

    wait_for(removed, "the end of the group")


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Undisturbed]:
    require("sh")
    if not (GROUPS / "memory.oom_control").exists():
        pytest.skip(f"no memory control groups of version 1 at {GROUPS}")
    folder = tmp_path_factory.mktemp("memory")
    yield undisturbed(folder, 2048, 1024, n_partials=2)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return undisturbed(tmp_path_factory.mktemp("small"), 128, 64, n_partials=2)


@pytest.fixture
def cluster(
    group: Group, small: Undisturbed, tmp_path: Path
) -> Iterator[Callable[[int], tuple[str, "subprocess.Popen[str]"]]]:
    """Start a scheduler, a worker with little memory, and others; address, and the worker."""
    started: list[subprocess.Popen[str]] = []

    def begin(n_others: int) -> tuple[str, "subprocess.Popen[str]"]:
        log, shared = tmp_path / "scheduler.log", ["--host", "127.0.0.1", "--no-dashboard"]
        started.append(start([*DASK, "scheduler", *shared, "--port", "0"], log=log))
        wait_for(lambda: "Scheduler at:" in log.read_text(), "a scheduler")
        address = log.read_text().partition("Scheduler at:")[2].split()[0]

        def start_worker(name: str, n_threads: int, into: Group | None) -> None:
            n_before = log.read_text().count("Register worker")
            command = [*DASK, "worker", address, *shared, "--memory-limit", "0", "--nanny"]
            command += ["--nthreads", str(n_threads), "--local-directory", str(tmp_path / name)]
            command = command if into is None else into.enter(command)
            started.append(start(command, log=tmp_path / f"{name}.log"))
            wait_for(lambda: log.read_text().count("Register worker") > n_before, "a worker")

        start_worker("poor", THREADS, group)
        poor = started[-1]
        # Small tiles it can do. What it has then is what it needs for nothing but being there.
        printed = merged(small, tmp_path / "SMALL.zarr", address)
        assert printed[0] == 0, printed[1]
        small.assert_finished(tmp_path / "SMALL.zarr")
        group.limit(group.number("memory.stat", "total_rss") + SPARE_NBYTES)
        assert group.kills() == 0
        for number in range(n_others):
            start_worker(f"other-{number}", 1, None)
        return address, poor

    yield begin
    for process in started[::-1]:
        end(process)


def merged(search: Undisturbed, output: Path, address: str) -> tuple[int, str]:
    """Merge on a cluster: the exit code, and what was printed."""
    command = merge_command(search.run, output, search.tile, "--cluster", address)
    run = start(command)
    try:
        printed, _ = run.communicate(timeout=300)
    finally:
        end(run)
    return run.returncode, printed


def test_tiles_that_a_worker_has_no_memory_for_are_done_by_others_or_named(
    search, group, cluster, tmp_path
) -> None:
    output = tmp_path / "OUT.zarr"
    address, _ = cluster(1)
    code, printed = merged(search, output, address)
    done = tiles_done(output)
    print(f"{group.kills()} kills, {done} done, exit {code}")
    assert group.kills() > 0
    assert done > 0
    if code == 0:
        search.assert_finished(output)
        return
    assert code == 1, printed
    assert_failed_by_name(printed, search.n_tiles - done)
    group.limit(-1)
    code, printed = merged(search, output, address)
    assert code == 0, printed
    assert f"{done} of them done before" in printed
    search.assert_finished(output)


def test_tiles_that_no_worker_has_memory_for_fail_by_name(search, group, cluster, tmp_path) -> None:
    output = tmp_path / "OUT.zarr"
    address, _ = cluster(0)
    code, printed = merged(search, output, address)
    done = tiles_done(output)
    print(f"{group.kills()} kills, {done} done, exit {code}")
    assert group.kills() > 1
    assert (group.folder / "memory.failcnt").read_text() != "0\n"
    assert code == 1, printed
    assert_failed_by_name(printed, search.n_tiles - done)
    search.assert_inputs_untouched()
    group.limit(-1)
    code, printed = merged(search, output, address)
    assert code == 0, printed
    search.assert_finished(output)


def assert_failed_by_name(printed: str, n_failed: int) -> None:
    _, found, named = printed.partition(f"{n_failed} of 4 tiles failed")
    assert found, printed
    lost = re.findall(r"- tile \((\d), (\d)\): its task failed: KilledWorker", named)
    assert len(set(lost)) == n_failed, printed
