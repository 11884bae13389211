"""Searches of Leopard-EM 1.2 or 1.3 that are killed while they are recorded, and resumed.

Leopard-EM is no dependency of the tests: CONTRIBUTING.md says how to install it.
"""

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from leopard_manager import BATCH
from ocelot_em import check, merge, open_merged
from ocelot_em.model import ranges as sets
from ocelot_em.model.ranges import Ranges
from ocelot_em.store.objects import open_objects
from ocelot_em.store.search import read_partials

pytest.importorskip("leopard_em", reason="Leopard-EM is not installed; see CONTRIBUTING.md")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(0)]  # every start imports Leopard-EM anew

SCRIPT = Path(__file__).parents[1] / "leopard_search.py"
AT_ONCE = 10 * BATCH
"""Number of orientations that Leopard-EM's queue gives to a device at a time."""


def search(folder: Path, run: Path | str, n_devices: int, kill: str = "") -> int:
    """Search in a process group of its own, with some processes as devices."""
    command = [sys.executable, str(SCRIPT), str(folder), str(run), str(n_devices)]
    environment = {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    environment |= {"KILL": kill} if kill else {}
    with (folder / "log.txt").open("w") as output:
        return subprocess.run(
            command,
            cwd=folder if run == "-" else Path(run).parent,
            stdout=output,
            stderr=output,
            start_new_session=True,
            env={**os.environ, **environment},
        ).returncode


def recorded(run: Path) -> Ranges:
    """The orientations in all partials."""
    partials = read_partials(open_objects(run)) if run.exists() else []
    found = [partial.coverage for _, partial in partials]
    return sets.union(one for coverage in found if coverage for one in coverage.ranges)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a search that was not recorded, with its inputs and results."""
    folder = tmp_path_factory.mktemp("alone")
    assert search(folder, "-", 1) == 0, (folder / "log.txt").read_text()
    return folder


@pytest.mark.parametrize(("who", "n_rounds"), [("all", 10), ("both", 10), ("device", 2)])
def test_killed_searches_end_as_one_that_was_not(
    who: str, n_rounds: int, alone: Path, tmp_path: Path
) -> None:
    """Killed at random moments, every second time during a write; restarts have other devices."""
    run, seed, n_kills = tmp_path / "RUN", random.randrange(10**6), 0
    moments, killed, given = random.Random(seed), tmp_path / "killed", tmp_path / "given"
    for number in range(n_rounds):
        before, n_devices = recorded(run), number % 3 + 1
        for file in (killed, given):
            file.unlink(missing_ok=True)
        where, most = ("write", 36) if number % 2 else ("given", 3)  # in up to 3 checkpoints
        kill = f"{who} {where} {moments.randint(1, most)} {moments.uniform(0, 0.2)}"
        ended = search(alone, run, n_devices, kill)
        about, log = (seed, number, kill, before), (alone / "log.txt").read_text()
        if not killed.exists():  # of a device that had nothing left to search
            assert ended == 0, (about, log)
            continue
        n_kills += 1
        if who == "device" or (who == "both" and n_devices == 1):
            # It may have been killed after its last checkpoint.
            assert ended == 0 or "a device ended before its time" in log, (about, log)
        else:
            assert ended == -9, (about, log)
        if where == "write" and who == "all":  # otherwise another device may have deleted it
            assert any("#" in file.name for file in run.rglob("*")), about
        # Every interval is one request for orientations here: of each, only the last may be lost.
        lines = given.read_text().split("\n")[:-1] if given.exists() else []
        asked = sets.union((int(one), int(other)) for one, other in map(str.split, lines))
        now = recorded(run)
        assert sets.minus(before, now) == (), about
        assert sets.size(sets.minus(asked, now)) <= n_devices * AT_ONCE, (about, asked, now)
    assert n_kills >= n_rounds / 2, seed
    assert search(alone, run, 4) == 0, (seed, (alone / "log.txt").read_text())
    assert check(run) == [], seed
    assert [*run.rglob("c/*/*#*")] == [], seed
    one, resumed = (np.load(alone / f"{name}.npz") for name in ("alone", "recorded"))
    for key, expected in one.items():
        is_sum = key.startswith(("scaled", "correlation"))
        tolerance = 1e-5 if is_sum else 0
        np.testing.assert_allclose(resumed[key], expected, tolerance, tolerance, err_msg=f"{seed}")
    merge(run, tmp_path / "M")
    merged = open_merged(tmp_path / "M")
    (height, width), count = one["mip"].shape, int(one["count"])
    assert merged.total_projections == count
    np.testing.assert_array_equal(merged.mip[:height, :width], one["mip"])
    np.testing.assert_array_equal(merged.best_phi[:height, :width], one["orientation_phi"])
