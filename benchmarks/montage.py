"""What laying exposures on a canvas costs: a montage against a plain merge of as many bytes.

``python -m benchmarks.montage [--quick] [--data FOLDER] [--repeats N]``. Exposures of 2048 x 2048
pixels and four partials (hard links to those of one simulated search) with overlaps of a tenth, at
origins that fit no chunk; the same number of partials' pixels as one square search; 2 threads, page
cache warm. Seconds and processor seconds; the ratios of the latter are medians of those of each
round. Also the memory of montages of 4 and of 64 exposures, each in a process of its own.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from benchmarks import common
from benchmarks.common import Run
from ocelot_em.merge.resume import prepare
from ocelot_em.model.maps import PoseForm
from ocelot_em.model.options import MergeOptions
from ocelot_em.run.executors import ThreadExecutor
from ocelot_em.store import attributes as fmt
from ocelot_em.store import groups
from ocelot_em.store.creation import ensure_search
from ocelot_em.store.objects import open_objects
from ocelot_em.store.search import partial_path, read_attributes, read_partials, read_search_space
from ocelot_em.store.search_info import Exposure, SearchInfo

SIDE, QUICK_SIDE = 2048, 256
N_PARTIALS = 4
N_THREADS = 2
OVERLAP = 0.1


def montage_of(search: Path, n_rows: int, place: Path) -> Path:
    """Make exposures, in so many rows and columns, of a search's partials, as hard links."""
    source, target = open_objects(search), open_objects(place)
    about = read_attributes(source)
    assert about.shape is not None
    height, width = about.shape
    info = SearchInfo(
        pixel_size_angstrom=about.pixel_size_angstrom,
        search_space=read_search_space(source, about.search_space_digest),
        has_pixel_size=about.has_pixel_size,
    )
    step = int(height * (1 - OVERLAP))
    for number in range(n_rows * n_rows):
        y, x = divmod(number, n_rows)
        name = f"e{number:03d}"
        exposure = Exposure(name, (y * step + 5, x * step + 3), number, about.valid_shape)
        ensure_search(target, (height, width), replace(info, exposure=exposure))
        for partial_name, attributes in read_partials(source):
            path = partial_path(partial_name, name)
            shutil.copytree(
                search / partial_path(partial_name), place / path, copy_function=os.link
            )
            # A link to the metadata would be written through.
            (place / path / "zarr.json").unlink()
            shutil.rmtree(place / path / "manifest", ignore_errors=True)
            own = attributes.model_copy(update={"id": uuid.uuid4().hex, "manifest": None})
            groups.create_group(target, path, fmt.dump_attributes(own))
    root = read_attributes(target).model_copy(update={"format_version": 2})  # without manifests
    groups.replace_attributes(target, "", fmt.dump_attributes(root))
    return place


class Merge:
    """Merges of one search, and the processor seconds that they took."""

    def __init__(self, search: Path, folder: Path, options: MergeOptions) -> None:
        self._search, self._output, self._options = search, folder / "OUT.zarr", options
        self.processor_seconds: list[float] = []

    def __call__(self) -> Run:
        ready = prepare([self._search], self._output, self._options)
        before = time.process_time()
        report = common.merge_alone(ready, self._options, ThreadExecutor(N_THREADS))
        self.processor_seconds.append(time.process_time() - before)
        shutil.rmtree(self._output)
        return Run(report.seconds)

    def cost(self, plain: "Merge") -> tuple[str, str]:
        """Return the processor seconds, and their ratio to those of another merge in each round."""
        own, other = self.processor_seconds[1:], plain.processor_seconds[1:]
        ratios = sorted(a / b for a, b in zip(own, other, strict=True))
        spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} - {ratios[-1]:.2f})"
        return f"{statistics.median(own):.2f}", spread


def peak_of(search: Path, folder: Path) -> tuple[int, int]:
    """Predicted and measured memory of a merge, in a process of its own."""
    predicted, peak = common.in_own_process("benchmarks.montage", str(search), str(folder))
    return predicted, peak


def measure_memory(search: str, folder: str) -> tuple[int, int]:
    options = MergeOptions(threads=N_THREADS)
    ready = prepare([search], Path(folder) / "OUT.zarr", options)
    common.merge_alone(ready, options, ThreadExecutor(N_THREADS))
    shutil.rmtree(Path(folder) / "OUT.zarr")
    return ready.forecast.worker_nbytes, common.peak_nbytes()


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(measure_memory(*asked.one)))
        return
    side, n_rows, repeats = (QUICK_SIDE, 2, 1) if asked.quick else (SIDE, 3, asked.repeats)
    asked.data.mkdir(parents=True, exist_ok=True)
    print(common.machine())
    rows, memory = [], []
    for form in (PoseForm.EXPLICIT, PoseForm.INDEXED):
        one = common.search_of(side, N_PARTIALS, form, folder=asked.data)
        with tempfile.TemporaryDirectory(prefix="ocelot-bench-", dir=asked.data) as name:
            folder = Path(name)
            montage = montage_of(one, n_rows, folder / "MONTAGE.zarr")
            plain = common.repeated(
                one, folder / "PLAIN.zarr", n_rows * side, n_partials=N_PARTIALS
            )
            ways: dict[str, Merge] = {}
            for tile_size in (1024, 2048):
                options = MergeOptions(threads=N_THREADS, tile_size=tile_size)
                ways[f"plain {tile_size}"] = Merge(plain, folder, options)
                for overlap in ("earliest", "max-zscore"):
                    own = options.model_copy(update={"overlap": overlap})
                    ways[f"{overlap} {tile_size}"] = Merge(montage, folder, own)
            with common.full_memory(asked.data, quick=asked.quick) as fill:

                def before(fill: Callable[[], None] = fill, folder: Path = folder) -> None:
                    fill()
                    common.warm(folder)

                measured = common.in_turn(ways, repeats, before=before)
            for way, result in measured.items():
                floor = f"plain {way.split()[-1]}"
                rows.append(
                    (
                        form.value,
                        way,
                        f"{result.median:.2f} ({result.spread})",
                        f"{result.median / measured[floor].median:.2f}",
                        *ways[way].cost(ways[floor]),
                    )
                )
            for n in (2,) if asked.quick else (2, 8):
                many = montage_of(one, n, folder / f"MEMORY{n}.zarr")
                predicted, peak = peak_of(many, folder)
                memory.append((form.value, n * n, f"{predicted / 1e6:.0f}", f"{peak / 1e6:.0f}"))
                shutil.rmtree(many)
    n = n_rows * n_rows
    print(f"\n{n} exposures of {side}^2 and {N_PARTIALS} partials, medians of {repeats}\n")
    common.table(("poses", "merge, tile", "seconds", "of plain", "processor s", "of plain"), rows)
    print(f"\nMemory, {N_THREADS} threads\n")
    common.table(("poses", "exposures", "predicted MB", "peak MB"), memory)


if __name__ == "__main__":
    main()
