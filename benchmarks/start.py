"""How long people wait before their first result, with cold and warm caches of kernels.

``python -m benchmarks.start [--quick] [--data FOLDER] [--repeats N]`` merges 512 x 512 pixels of
two partials in new processes, with kernels that were compiled ahead, and with those that numba
compiles or loads from its cache; and runs the commands that people run most. Page cache warm.
"""

import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks import common
from ocelot_em.kernels import ahead
from ocelot_em.model.maps import PoseForm

MERGE = """
import sys
import ocelot_em
from ocelot_em.kernels import ahead
if sys.argv[3] == "numba":
    ahead.find = lambda *_: None
ocelot_em.merge(sys.argv[1], sys.argv[2], threads=1, overwrite=True)
"""


def processor_seconds(command: list[str], **variables: str) -> float:
    """Run a command, which may fail; return its processor time."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, env=os.environ | variables, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return sum(after[:2]) - sum(before[:2])


def main() -> None:
    options = common.arguments(__doc__).parse_args()
    side, repeats = (256, 1) if options.quick else (512, options.repeats)
    print(common.machine())
    if not any(map(ahead.is_current, ahead.cpus())):
        print("no kernels were compiled ahead: python -m ocelot_em.kernels.build")
    options.data.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="ocelot-bench-", dir=options.data) as name:
        search = common.search_of(side, 2, PoseForm.EXPLICIT, folder=options.data)
        cache, out = Path(name, "cache"), Path(name, "OUT.zarr")

        def merge(kernels: str) -> Callable[[], float]:
            command = [sys.executable, "-c", MERGE, str(search), str(out), kernels]
            return lambda: processor_seconds(command, NUMBA_CACHE_DIR=str(cache))

        def compiling() -> float:
            shutil.rmtree(cache, ignore_errors=True)
            return merge("numba")()

        def ocelot(*args: object) -> Callable[[], float]:
            command = [sys.executable, "-m", "ocelot_em", *map(str, args)]
            return lambda: processor_seconds(command)

        ways = {
            "first merge, kernels compiled ahead": merge("ahead"),
            "first merge, numba compiles": compiling,
            "next merge, numba loads": merge("numba"),
            "ocelot info OUT.zarr": ocelot("info", out),
            "ocelot info, nothing there": ocelot("info", Path(name, "NO.zarr")),
            "ocelot merge, nothing there": ocelot("merge", Path(name, "NO.zarr"), "--output", out),
            "ocelot --help": ocelot("--help"),
        }
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(repeats + 1):
            for way, run in ways.items():
                seconds[way].append(run())
    rows = []
    for way, own in seconds.items():
        measured = own[1:]
        spread = f"{min(measured):.2f} - {max(measured):.2f}"
        rows.append((way, f"{statistics.median(measured):.2f} ({spread})"))
    print(f"\nprocesses of their own, medians of {repeats}\n")
    common.table(("way", "processor seconds (lowest - highest)"), rows)


if __name__ == "__main__":
    main()
