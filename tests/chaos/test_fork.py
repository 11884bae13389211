"""Processes that are forked after the package was used: each command ends in them."""

import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.chaos

SHAPE = (60, 80)

TIMEOUT_SECONDS = 120

SCRIPT = """
import multiprocessing, sys
from pathlib import Path

import ocelot_em
from builders import explicit_maps
from ocelot_em.cli.main import run
from ocelot_em.errors import PlanError

folder = Path(sys.argv[1])

def ocelot(*words):
    assert run([*map(str, words)]) == 0, words

def write(n):
    for seed, name in enumerate("ab"):
        maps = explicit_maps(SHAPE, seed=seed)
        ocelot_em.write_partial(folder / f"RUN{n}", name, maps, total_projections=10**5)

def check(n):
    assert ocelot_em.check(folder / "RUN0") == []

def merge(n):
    ocelot("merge", folder / "RUN0", "--output", folder / f"OUT{n}")

def read(n):
    assert ocelot_em.open_merged(folder / "OUT0").mip.values.shape == SHAPE
    assert ocelot_em.lazy_merge(folder / "RUN0").mip.values.shape == SHAPE

def peaks(n):
    ocelot("peaks", folder / "OUT0", "--output", folder / f"{n}.csv", "--cutoff", "1")

def report(n):
    ocelot("report", folder / "OUT0", "--output", folder / f"{n}.html")

def export(n):
    ocelot("export", folder / "OUT0", "--to", "mrc", "--output", folder / f"maps{n}")

def cluster(n):
    options = {"cluster": "local", "workers": 1, "threads": 1}
    if not n:
        ocelot_em.merge(folder / "RUN0", folder / "LOCAL", **options)
        return
    try:
        ocelot_em.merge(folder / "RUN0", folder / f"LOCAL{n}", **options)
    except PlanError as error:
        assert "was forked from one that used a Dask cluster" in str(error)
    else:
        raise AssertionError("expected an error")

if __name__ == "__main__":
    context = multiprocessing.get_context("fork")
    jobs = [write, check, merge, read, peaks, report, export, cluster]
    for job in jobs:
        job(0)
    for job in jobs:
        children = [context.Process(target=job, args=(n,), daemon=True) for n in (1, 2)]
        for child in children:
            child.start()
        for child in children:
            child.join(TIMEOUT)
            assert child.exitcode == 0, (job.__name__, child.exitcode)
    print("all ended")
"""


@pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="no fork on this system"
)
def test_every_command_ends_in_children_forked_after_the_package_was_used(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    fixed = f"SHAPE, TIMEOUT = {SHAPE}, {TIMEOUT_SECONDS}\n"
    script.write_text(f"import sys\nsys.path[:0] = {sys.path}\n{fixed}{SCRIPT}")
    done = subprocess.run(
        [sys.executable, script, tmp_path], capture_output=True, text=True, timeout=500
    )
    assert done.stdout.endswith("all ended\n"), done.stdout[-2000:] + done.stderr[-4000:]
