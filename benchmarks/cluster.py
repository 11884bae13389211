"""Which cluster is the default: threads of one process, or worker processes.

``python -m benchmarks.cluster [--quick]`` merges one simulated search both ways, by the command
line and start-up included, in turn, and prints medians. Page cache warm.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ocelot_em.testing.simulation import Simulation, simulate


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a small size, once")
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    size, repeats = (256, 1) if arguments.quick else (arguments.size, arguments.repeats)
    cores = os.cpu_count() or 1
    ways = {
        f"threads x {cores}": ["--cluster", "threads", "--threads", str(cores)],
        f"local, {cores} workers x 1": ["--cluster", "local", "--workers", str(cores)],
        f"local, 1 worker x {cores}": [
            "--cluster",
            "local",
            "--workers",
            "1",
            "--threads",
            str(cores),
        ],
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory(prefix="ocelot-bench-") as folder:
        place = Path(folder)
        search = simulate(place, Simulation((size, size), 4, 20, seed=1), n_threads=cores)
        # The first round warms caches and compiles; a quick run has no other.
        for repeat in range(1 if arguments.quick else repeats + 1):
            for way, options in ways.items():
                output = place / "OUT.zarr"
                command = [sys.executable, "-m", "ocelot_em", "merge", str(search)]
                started = time.perf_counter()
                subprocess.run(
                    [*command, "--output", str(output), *options], check=True, capture_output=True
                )
                if repeat or arguments.quick:
                    seconds[way].append(time.perf_counter() - started)
                shutil.rmtree(output)
    nbytes = 4 * 8 * 4 * size**2
    print(f"4 explicit partials, {size} x {size}, medians of {repeats}, start-up included")
    for way, times in seconds.items():
        median = statistics.median(times or [float("nan")])
        spread = f"{min(times):.1f} - {max(times):.1f}"
        print(f"{way:24}  {median:6.1f} s  ({spread})  {nbytes / median / 1e9:5.2f} GB/s decoded")


if __name__ == "__main__":
    main()
