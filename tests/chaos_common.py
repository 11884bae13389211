"""Searches that faults strike while they are merged, and what must hold when the run has ended."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

import ocelot_em
from helpers import chunk_bytes, make_result, write_search
from ocelot_em.store.constants import TILE_SUMMARY
from ocelot_em.store.objects import open_objects
from ocelot_em.store.result_shards import places_of_chunks

GATE_FOLDER = Path(__file__).parent / "chaos" / "gate"

OCELOT = [sys.executable, "-m", "ocelot_em"]


@dataclass(frozen=True)
class Undisturbed:
    """A search, and what a merge of it gives that nothing disturbs.

    Parameters
    ----------
    run
        The search.
    tile
        Edge of the tiles, in pixels.
    n_tiles
        Of the canvas.
    merged
        Bytes of all chunks of the merged maps, by key.
    inputs
        Digests of all files of the search, by path.
    """

    run: Path
    tile: int
    n_tiles: int
    merged: Mapping[str, bytes] = field(repr=False)
    inputs: Mapping[str, str] = field(repr=False)

    def assert_finished(self, output: Path) -> None:
        """The output is whole and right, nothing is left beside it, and the inputs are as before.

        Parameters
        ----------
        output
            A merged store on this machine.
        """
        assert chunk_bytes(output) == self.merged
        assert ocelot_em.check(output) == []
        left_over = [path for path in output.rglob("*") if "#" in path.name]
        assert left_over + list(output.glob("lock/*")) == []
        self.assert_inputs_untouched()

    def assert_inputs_untouched(self) -> None:
        """The search is byte for byte what it was."""
        assert digests(self.run) == self.inputs


def undisturbed(folder: Path, edge: int, tile: int, n_partials: int = 3) -> Undisturbed:
    """Write a square search of some pixels a side, and merge it with nothing in the way."""
    run = folder / "RUN.zarr"
    rng = np.random.default_rng(edge + tile)
    results = [make_result(rng, (edge, edge), 1000 + i, ties=True) for i in range(n_partials)]
    write_search(run, results, [1000 + i for i in range(n_partials)])
    inputs, output = digests(run), folder / "EXPECTED.zarr"
    ocelot_em.merge(run, output, tile_size=tile)
    merged = chunk_bytes(output)
    shutil.rmtree(output)
    return Undisturbed(run, tile, (-(-edge // tile)) ** 2, merged, inputs)


@dataclass(frozen=True)
class Gate:
    """Lets some tiles of a merge be done, and holds the others until it is opened.

    So a fault strikes while tiles are left, however fast or busy the machine is.

    Parameters
    ----------
    folder
        That the processes of the merge can see; new.
    n_tiles
        That may be done before it is opened.
    in_shards
        Whether results are in shards, however small they are.
    """

    folder: Path
    n_tiles: int
    in_shards: bool = False

    def __post_init__(self) -> None:
        self.folder.mkdir()

    @property
    def environment(self) -> dict[str, str]:
        """Of the driver and of the workers."""
        return {
            "PYTHONPATH": os.pathsep.join([str(GATE_FOLDER), *sys.path]),
            "OCELOT_TEST_GATE": str(self.folder),
            "OCELOT_TEST_GATE_TILES": str(self.n_tiles),
            "OCELOT_TEST_SHARDS": "1" if self.in_shards else "",
        }

    def wait_until_reached(
        self, output: Path, alive: "subprocess.Popen[str] | None" = None, seconds: float = 300
    ) -> None:
        """Wait until the first tiles are done, so that all others are held or not begun."""
        wait_for(lambda: tiles_done(output) >= self.n_tiles, "tiles", seconds, alive)
        assert tiles_done(output) == self.n_tiles

    def n_held(self) -> int:
        """Processes that have had to wait with a tile."""
        return len(list(self.folder.glob("held-*")))

    def open(self, pause: float = 0) -> None:
        """Let all tiles go, each after a pause in seconds: a run that is to stop has to notice."""
        new = self.folder / "new"
        new.write_text(str(pause))
        new.rename(self.folder / "open")

    def open_for_a_run_that_stops(self, output: Path) -> None:
        """Let the tiles in hand go as soon as all processes of a run can see that it is stopped.

        They look once a second, so that tiles that take a while go no further.
        """
        wait_for(lambda: is_stopping(output), "a run that is stopped")
        self.open(pause=0.5)


def is_stopping(output: Path) -> bool:
    """Whether the lock of an output says that its run is being stopped."""
    for lock in filter(Path.is_file, output.glob("lock/*")):
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
            if json.loads(lock.read_bytes())["stops"]:
                return True
    return False


def digests(store: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder."""
    return {
        str(path.relative_to(store)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(store.rglob("*"))
        if path.is_file()
    }


def fetched(url: str, folder: Path) -> Path:
    """Copy all objects of a store in a bucket to a folder, to look at them there."""
    objects = open_objects(url)
    for key in objects.sizes(""):
        target = folder / key
        target.parent.mkdir(parents=True, exist_ok=True)
        content = objects.get(key)
        assert content is not None, key
        target.write_bytes(content)
    return folder


def merge_command(run: Path | str, output: Path | str, tile: int, *options: str) -> list[str]:
    """The command line of a merge."""
    named = ["--output", str(output), "--tile-size", str(tile)]
    return [*OCELOT, "merge", str(run), *named, *options]


def start(
    command: Sequence[str],
    environment: Mapping[str, str] | None = None,
    log: Path | None = None,
    cwd: Path | None = None,
) -> "subprocess.Popen[str]":
    """Start a command in a session of its own; both its outputs are in one pipe, or in a file."""
    with log.open("a") if log else contextlib.nullcontext(subprocess.PIPE) as output:
        return subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            cwd=cwd,
            env={**os.environ, **(environment or {})},
        )


def end(process: "subprocess.Popen[str]") -> None:
    """Kill what :func:`start` started, with all that it started itself."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    if process.stdout is None or process.stdout.closed:
        process.wait()
    else:
        process.communicate()


def tiles_done(output: Path) -> int:
    """Tiles of an output on this machine that are marked as done."""
    return len({*places_of_chunks(open_objects(output), TILE_SUMMARY)})


def wait_for(
    holds: Callable[[], bool],
    what: str,
    seconds: float = 300,
    alive: "subprocess.Popen[str] | None" = None,
) -> None:
    """Wait until something holds, unless a process ends meanwhile; the time only ends a hang."""
    deadline = time.monotonic() + seconds
    while not holds():
        if alive is not None and alive.poll() is not None:
            printed = alive.stdout.read() if alive.stdout else ""
            raise AssertionError(
                f"it ended ({alive.returncode}) before there was {what}: {printed}"
            )
        assert time.monotonic() < deadline, f"not in {seconds} s: {what}"
        time.sleep(0.01)


def do(*command: str | Path) -> str:
    """Run a command that has to go well; what it printed."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def require(*programs: str) -> None:
    """Skip where programs are not there, or root's rights to make networks, disks or groups."""
    lacks = [program for program in programs if shutil.which(program) is None]
    if os.geteuid() != 0:
        lacks.append("the rights of root")
    if lacks:
        pytest.skip(f"not here: {', '.join(lacks)}")
