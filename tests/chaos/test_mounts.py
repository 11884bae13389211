"""Two hosts of a cluster, of which one has something else at the path of an input or an output."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ocelot_em
from chaos_common import (
    Gate,
    Undisturbed,
    end,
    merge_command,
    require,
    start,
    undisturbed,
    wait_for,
)

pytestmark = pytest.mark.chaos

DASK = [sys.executable, "-m", "dask"]

MOUNTS = {
    "another search": ("RUN.zarr", "mount --bind other/RUN.zarr {at}"),
    "nothing": ("OUT.zarr", "mount -t tmpfs none {at}"),
    "a copy on write": (
        "OUT.zarr",
        "mount -t tmpfs none own && mkdir own/upper own/work && "
        "mount -t overlay -o lowerdir={at},upperdir=own/upper,workdir=own/work none {at}",
    ),
}
"""The path, and what makes a host see something else there."""

SAID = {
    "another search": (1, "changed since the merge was planned"),
    "nothing": (1, "all workers need access to the driver's storage under the same path"),
    "a copy on write": (2, "is missing: expected an object progress/"),
}
"""Exit codes and messages."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a search, and another one of the same shape and names."""
    folder = tmp_path_factory.mktemp("mounts")
    (folder / "other").mkdir()
    return folder


@pytest.fixture(scope="module")
def search(made: Path) -> Undisturbed:
    require("unshare", "mount")
    undisturbed(made / "other", 60, 12)
    return undisturbed(made, 60, 6)


@pytest.fixture
def started() -> "Iterator[list[subprocess.Popen[str]]]":
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        end(process)


def failed_tiles(log: Path) -> bool:
    lines = log.read_text().splitlines() if log.exists() else []
    return any(event.get("error") for event in map(json.loads, lines) if event["event"] == "tile")


@pytest.mark.parametrize("case", MOUNTS)
def test_a_host_that_sees_something_else_writes_nothing_that_counts(
    case: str, made: Path, search: Undisturbed, started, tmp_path: Path
) -> None:
    path, mount = MOUNTS[case]
    output, log, gate = made / "OUT.zarr", tmp_path / "log.jsonl", Gate(tmp_path / "gate", 1)
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    (made / "own").mkdir(exist_ok=True)
    file, registered = tmp_path / "scheduler.json", tmp_path / "scheduler.log"

    def begin(*command: str, log: Path | None = None) -> "subprocess.Popen[str]":
        started.append(start(command, gate.environment, log, cwd=made))
        return started[-1]

    options = ["--host", "127.0.0.1", "--port", "0", "--no-dashboard"]
    begin(*DASK, "scheduler", *options, "--scheduler-file", str(file), log=registered)
    worker = [*DASK, "worker", "--scheduler-file", str(file), "--nthreads", "1"]
    worker += ["--memory-limit", "0", "--no-nanny", "--no-dashboard", "--local-directory"]
    begin(*worker, str(tmp_path / "same"), log=tmp_path / "same.log")
    tried = mount.format(at=path)
    if subprocess.run(["unshare", "-m", "sh", "-c", tried], cwd=made).returncode:
        pytest.skip(f"cannot mount here: {tried}")
    apart = ["unshare", "-m", "sh", "-c", f'{tried} && exec "$0" "$@"']
    other = begin(*apart, *worker, str(tmp_path / "other"), log=tmp_path / "other.log")
    wait_for(lambda: registered.read_text().count("Register worker") == 2, "two workers")
    address = json.loads(file.read_text())["address"]
    command = merge_command(search.run, output, search.tile, "--cluster", address)
    driver = begin(*command, "--log", str(log))
    wait_for(lambda: failed_tiles(log) or gate.n_held() == 2, "tiles of both", alive=driver)
    gate.open()
    printed = " ".join(driver.communicate(timeout=300)[0].split())
    code, said = SAID[case]
    assert driver.returncode == code, printed
    assert said in printed
    assert ocelot_em.describe(output).attributes.state == "writing"
    end(other)
    again = begin(*command)
    printed, _ = again.communicate(timeout=300)
    assert again.returncode == 0, printed
    search.assert_finished(output)
