"""Searches of Leopard-EM 1.2 or 1.3 that are killed while they are recorded, and resumed.

Leopard-EM is no dependency of the tests: CONTRIBUTING.md says how to install it.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from ocelot_em import check, describe, merge, open_merged
from ocelot_em.errors import StoreNotFoundError

pytest.importorskip("leopard_em", reason="Leopard-EM is not installed; see CONTRIBUTING.md")

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[1] / "leopard_search.py"


def start(folder: Path, run: Path | str, n_devices: int) -> "subprocess.Popen[str]":
    """Start the search in a process group of its own, with some processes as devices."""
    command = [sys.executable, str(SCRIPT), str(folder), str(run), str(n_devices)]
    path = os.pathsep.join(entry for entry in sys.path if entry)
    with (folder / "log.txt").open("a") as output:
        return subprocess.Popen(
            command,
            text=True,
            stdout=output,
            stderr=output,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": path},
        )


def n_searched(run: Path) -> int:
    """Number of orientations that are recorded; read while the search goes on."""
    try:
        progress = describe(run).progress
    except StoreNotFoundError:
        return 0
    return progress.n_searched if progress else 0


def devices(search: "subprocess.Popen[str]") -> list[psutil.Process]:
    """The processes of the devices, without that of the shared results."""
    children = psutil.Process(search.pid).children(recursive=True)
    spawned = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
    return sorted(spawned, key=lambda child: child.pid)[1:]


def test_killed_searches_end_as_one_that_was_not(tmp_path: Path) -> None:
    """One device or everything is killed at random moments; each restart has other devices."""
    run, seed = tmp_path / "RUN", random.randrange(10**6)
    moments = random.Random(seed)
    assert start(tmp_path, "-", 1).wait() == 0
    lost = []
    for number, n_devices in enumerate((2, 1, 3, 2)):
        search, before = start(tmp_path, run, n_devices), n_searched(run)
        while search.poll() is None and n_searched(run) == before:
            time.sleep(0.05)
        time.sleep(moments.uniform(0, 0.7))
        if number == 0 and (running := devices(search)):
            running[0].kill()
            log = tmp_path / "log.txt"  # it may have been killed after its last checkpoint
            assert search.wait() == 0 or "a device ended before its time" in log.read_text()
        elif search.poll() is None:
            os.killpg(search.pid, signal.SIGKILL)
            search.wait()
        assert n_searched(run) >= before, seed
        lost.append(n_searched(run))
    assert start(tmp_path, run, 4).wait() == 0, (seed, (tmp_path / "log.txt").read_text())
    assert check(run) == [], (seed, lost)
    one, resumed = (np.load(tmp_path / f"{name}.npz") for name in ("alone", "recorded"))
    for key, expected in one.items():
        tolerance = 1e-5 if key == "scaled_mip" else 0
        np.testing.assert_allclose(resumed[key], expected, tolerance, tolerance, err_msg=f"{seed}")
    merge(run, tmp_path / "M")
    merged = open_merged(tmp_path / "M")
    (height, width), count = one["mip"].shape, int(one["count"])
    assert merged.total_projections == count
    np.testing.assert_array_equal(merged.mip[:height, :width], one["mip"])
    np.testing.assert_array_equal(merged.best_phi[:height, :width], one["orientation_phi"])
