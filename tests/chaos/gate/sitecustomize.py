"""Hold tiles until a test lets them go; Python runs this at its start where it is on its path.

A fault has to strike while tiles are left, on a fast machine as on a busy one. So only some tiles
of a merge are marked as done, in whichever processes they are; all others wait until the test
opens the gate. ``chaos_common.Gate`` is the test's side of it. It must work in drivers and in
workers that Dask or SLURM start, hence an environment and no argument.
"""

import contextlib
import importlib.abc
import importlib.machinery
import os
import sys
import time
from pathlib import Path


def pass_gate(folder: Path, n_tiles: int) -> None:
    """Return when this tile is one of the first, or the gate is open."""
    for number in range(n_tiles):
        with contextlib.suppress(FileExistsError, FileNotFoundError):
            (folder / f"ticket-{number}").touch(exist_ok=False)
            return
    # Where the folder is gone, the test has ended.
    with contextlib.suppress(FileNotFoundError):
        (folder / f"held-{os.getpid()}").touch()
    while folder.exists() and not (folder / "open").exists():
        time.sleep(0.02)
    with contextlib.suppress(FileNotFoundError):
        time.sleep(float((folder / "open").read_text()))


class GatedLoader(importlib.abc.Loader):
    """Loads a module as another loader does, and changes it."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module) -> None:
        self._loader.exec_module(module)
        PATCHED[module.__name__](module)


def gate(module) -> None:
    """Put the gate before the marks of tiles."""
    folder = Path(os.environ["OCELOT_TEST_GATE"])
    n_tiles = int(os.environ["OCELOT_TEST_GATE_TILES"])
    mark_done = module.TileWriter._mark_done

    def mark_done_at_gate(*arguments):
        pass_gate(folder, n_tiles)
        return mark_done(*arguments)

    module.TileWriter._mark_done = mark_done_at_gate


def use_shards(module) -> None:
    """Write small results in shards, too."""
    if os.environ.get("OCELOT_TEST_SHARDS"):
        module.MIN_NBYTES_IN_SHARDS = 0


PATCHED = {"ocelot_em.merge.tile": gate, "ocelot_em.merge.resume": use_shards}


class GatedFinder(importlib.abc.MetaPathFinder):
    """Finds the modules that are changed."""

    def find_spec(self, name, path, target=None):
        if name not in PATCHED:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = GatedLoader(spec.loader)
        return spec


if "OCELOT_TEST_GATE" in os.environ:
    sys.meta_path.insert(0, GatedFinder())
