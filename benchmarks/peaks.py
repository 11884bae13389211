"""How long picking particles from a large merged map takes, and in how much memory.

``python -m benchmarks.peaks [--quick] [--data FOLDER] [--repeats N]``. A merge of 32768 x 32768
pixels (four indexed partials, made of hard links to the chunks of a small search; about 21 GB of
disk for the result, made once), each method in a process of its own.
"""

import json
import shutil
import sys
import time
from pathlib import Path

import ocelot_em
from benchmarks import common
from ocelot_em.model.maps import PoseForm
from ocelot_em.particles.picking import all_candidates, find_peaks

METHODS = ("gaussian", "gev", "pvalue")
NEEDED_NBYTES = 30 * 10**9


def merged_map(side: int, small_side: int, data: Path) -> Path:
    """A large merged result, made once."""
    place = data / f"peaks-{side}"
    if not (place / "done").exists():
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        small = common.search_of(small_side, 4, PoseForm.INDEXED, folder=data)
        common.repeated(small, place / "RUN.zarr", side, n_partials=4)
        ocelot_em.merge(place / "RUN.zarr", place / "MERGED.zarr", poses="index")
        (place / "done").touch()
    return place / "MERGED.zarr"


def pick(store: str, method: str) -> None:
    """Pick once, and print the figures."""
    started = time.perf_counter()
    table = find_peaks(store, method=method, min_distance=5)
    seconds = time.perf_counter() - started
    peak = common.peak_nbytes()
    found = {"seconds": seconds, "n": len(table), "cutoff": table.about and table.about.cutoff}
    print(json.dumps(found | {"peak_nbytes": peak}))


def main() -> None:
    if len(sys.argv) == 4 and sys.argv[1] == "--pick":
        pick(*sys.argv[2:])
        return
    asked = common.arguments(__doc__).parse_args()
    print(common.machine())
    asked.data.mkdir(parents=True, exist_ok=True)
    side, small, repeats = (256, 256, 1) if asked.quick else (32768, 2048, asked.repeats)
    done = (asked.data / f"peaks-{side}" / "done").exists()
    if not asked.quick and not done and shutil.disk_usage(asked.data).free < NEEDED_NBYTES:
        print(f"nothing was measured: {NEEDED_NBYTES / 1e9:.0f} GB of free disk are needed")
        return
    store = merged_map(side, small, asked.data)
    candidates, level = all_candidates(store)
    print(
        f"\n{side}^2, {len(candidates):,} candidates above z = {level:.2f}, medians of {repeats}\n"
    )
    rows = []
    for method in METHODS:
        command = [sys.executable, "-m", "benchmarks.peaks", "--pick", str(store), method]
        runs = [json.loads(common.run_and_watch(command).output) for _ in range(repeats)]
        seconds = sorted(run["seconds"] for run in runs)
        peak = max(run["peak_nbytes"] for run in runs)
        middle = seconds[len(seconds) // 2]
        figures = f"{runs[0]['n']:,}", f"{runs[0]['cutoff']:.4f}", f"{middle:.2f}"
        rows.append((method, *figures, f"{peak / 1e6:.0f}"))
    common.table(("method", "particles", "cutoff", "seconds", "peak MB"), rows)


if __name__ == "__main__":
    main()
