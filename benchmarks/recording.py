"""What a checkpoint of a recorded search costs: the first one, and those merged with one before.

``python -m benchmarks.recording [--quick] [--data FOLDER] [--repeats N]``. One device, maps of 4096
x 4096 pixels with 20 scores of noise each, one thread. The share is that of processor time, at one
checkpoint every ten minutes, the default.
"""

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks import common
from ocelot_em import SearchInfo, SearchRecorder, SearchSpace
from ocelot_em.model.maps import INDEX, MIP, SQUARED_SUM, SUM, AnyArray

EVERY_SECONDS, N_SCORES = 600, 20
KINDS = "first", "later"


def search(maps: dict[str, AnyArray], number: int) -> None:
    """Write what a device has found in one interval to its maps."""
    rng = np.random.default_rng(number)
    best = rng.integers(number * N_SCORES, (number + 1) * N_SCORES, maps[MIP].shape)
    maps[MIP][:] = rng.standard_normal(maps[MIP].shape, np.float32) / 2 + 2
    maps[INDEX][:] = best
    for name, scale, mean in ((SUM, N_SCORES**0.5, 0), (SQUARED_SUM, 6, N_SCORES)):
        maps[name] += np.abs(rng.standard_normal(maps[name].shape, np.float32) * scale + mean)


def main() -> None:
    asked = common.arguments(__doc__).parse_args()
    side, n_later = (256, 1) if asked.quick else (4096, asked.repeats)
    asked.data.mkdir(parents=True, exist_ok=True)
    angles = np.random.default_rng(0).uniform(0, 180, ((n_later + 1) * N_SCORES, 3))
    space = SearchSpace.from_tables(angles.astype(np.float32), [0], [0])
    maps: dict[str, AnyArray] = {
        MIP: np.full((side, side), -np.inf, np.float32),
        INDEX: np.full((side, side), -1, np.int32),
        SUM: np.zeros((side, side), np.float32),
        SQUARED_SUM: np.zeros((side, side), np.float32),
    }
    print(common.machine())
    with tempfile.TemporaryDirectory(prefix="ocelot-bench-", dir=asked.data) as folder:
        place = Path(folder, "RUN")
        recorder = SearchRecorder(
            place, "gpu0", maps, search=SearchInfo(search_space=space), every=1e9
        )
        cpu, wall = list[float](), list[float]()
        for number in range(n_later + 1):
            every = [(number * N_SCORES, (number + 1) * N_SCORES)]
            for _ in recorder.ranges(every):
                search(maps, number)
            before = time.process_time(), time.perf_counter()
            recorder.write()
            cpu.append(time.process_time() - before[0])
            wall.append(time.perf_counter() - before[1])
        stored = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
    print(f"\n{side}^2, {n_later} later checkpoints, two of which take {stored:,} bytes; seconds\n")
    rows = [
        (
            kind,
            f"{statistics.median(cpu[part]):.2f} ({min(cpu[part]):.2f} - {max(cpu[part]):.2f})",
            f"{statistics.median(wall[part]):.2f} ({min(wall[part]):.2f} - {max(wall[part]):.2f})",
            f"{statistics.median(cpu[part]) / EVERY_SECONDS:.2%}",
        )
        for kind, part in zip(KINDS, (slice(1), slice(1, None)), strict=True)
    ]
    common.table(("checkpoint", "processor time", "wall time", "share of ten minutes"), rows)


if __name__ == "__main__":
    main()
