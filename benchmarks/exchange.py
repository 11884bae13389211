"""What import, export and the report cost: each against reading and writing the same bytes.

``python -m benchmarks.exchange [--quick] [--data FOLDER] [--repeats N]``. A merged result, the maps
of a finished search as MRC and HDF5 files, and the partials of a search as ``.npz`` files. Each way
and its floor run alone, in turn; the processor time of a process counts, without its imports. The
floor of an export reads and decodes the eight maps and writes as many bytes as they have; that of
an import reads the files, encodes all maps, and writes them; that of the report picks particles,
reads the z-score map, and draws its image once.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np

import ocelot_em
from benchmarks import common
from ocelot_em.io.beside import find_search
from ocelot_em.io.hdf5 import open_hdf5, write_hdf5
from ocelot_em.io.leopard_maps import OUR_NAMES, band_grid
from ocelot_em.io.mrc import open_mrc_set, write_mrc_set
from ocelot_em.model.maps import SQUARED_SUM, SUM, MapSet, PoseForm
from ocelot_em.model.regions import Region, TileGrid
from ocelot_em.store.arrays import open_map
from ocelot_em.store.blosc import encode
from ocelot_em.store.objects import open_objects
from ocelot_em.store.search import partial_path
from ocelot_em.view.figures import PAGE_OVERVIEW_PX
from ocelot_em.view.plots import pooled_zscore

SIDE, QUICK_SIDE = 4096, 512
N_PARTIALS = 2


def copy_maps(store: Path, output: Path) -> None:
    """Read the maps that are exported, and write their values."""
    merged = ocelot_em.MergedResult.open(store)
    with output.open("wb") as file:
        for name in OUR_NAMES.values():
            for band in band_grid(merged.valid_shape, merged.chunk):
                file.write(merged.read(band.region, name))


def copy_partials(files: Path, search: Path, output: Path) -> None:
    """Read files of partials, and write their maps, encoded as in a search, to one file."""
    objects, shape = open_objects(search), (1024, 1024)
    with output.open("wb") as written:
        for number, path in enumerate(sorted(files.iterdir())):
            with np.load(path) as file:
                for name in file.files:
                    at = f"{partial_path(f'device_{number}')}/{name}"
                    codec = open_map(objects, at, name, [file[name].dtype.name]).codec
                    values = file[name]
                    for cell in TileGrid(values.shape, shape):
                        written.writelines(encode(values[cell.region.slices].copy(), codec))


def copy_finished(source: Path, search: Path, output: Path) -> None:
    """Read the maps of a finished search, and write those of a partial as :func:`copy_partials`."""
    objects, chunk, found = open_objects(search), (1024, 1024), find_search(source, "")
    with ExitStack() as stack, output.open("wb") as written:
        files = (open_hdf5 if found.is_hdf5 else open_mrc_set)(found, stack)
        for band in band_grid(files.shape, chunk):
            maps = files.read(band.region)
            stored = {OUR_NAMES[name]: values for name, values in maps.items()}
            mean, std = stored.pop("correlation_mean"), stored.pop("correlation_std")
            sums = {SUM: mean.astype(np.float64), SQUARED_SUM: std.astype(np.float64)}
            del stored["scaled_mip"]
            for name, values in (stored | sums).items():
                at = f"{partial_path('device_0')}/{name}"
                codec = open_map(objects, at, name, ["float32"]).codec
                for cell in TileGrid(values.shape, chunk):
                    written.writelines(encode(values[cell.region.slices].copy(), codec))


def import_maps(source: Path, output: Path) -> None:
    """Import the maps of a finished search."""
    facts = {"pixel_size_angstrom": 1.0, "pixel_size_offset_angstrom": 0}
    ocelot_em.import_finished(source, output, total_projections=10, **facts)


def draw_overview(store: Path, output: Path) -> None:
    """Read what the report reads, and draw one figure of its eight."""
    from matplotlib.figure import Figure

    merged = ocelot_em.MergedResult.open(store)
    ocelot_em.find_peaks(merged)
    figure = Figure()
    figure.add_subplot().imshow(pooled_zscore(merged, PAGE_OVERVIEW_PX)[0])
    figure.savefig(output, format="svg")


def import_files(files: Path, output: Path) -> None:
    """Import files of partials."""
    facts = {"template_box": 8, "pixel_size_angstrom": 1.0}
    counts = (10,) * N_PARTIALS
    ocelot_em.import_results(sorted(files.iterdir()), output, total_projections=counts, **facts)


def ways_of(folder: Path) -> dict[str, Callable[[Path], object]]:
    """Return all ways, by name; each writes to a path that it is given."""
    merged, files, search = (folder / name for name in ("MERGED.zarr", "files", "search"))
    return {
        "export: floor": partial(copy_maps, merged),
        "export --to mrc": partial(write_mrc_set, merged),
        "export --to hdf5": partial(write_hdf5, merged),
        "import: floor": partial(copy_partials, files, search),
        "import": partial(import_files, files),
        "MRC: floor": partial(copy_finished, folder / "mrc", search),
        "MRC import": partial(import_maps, folder / "mrc"),
        "HDF5: floor": partial(copy_finished, folder / "maps.h5", search),
        "HDF5 import": partial(import_maps, folder / "maps.h5"),
        "report: floor": partial(draw_overview, merged),
        "report": partial(ocelot_em.write_report, merged),
    }


def measure(folder: str, way: str) -> tuple[float, float, int]:
    """Processor and wall seconds, and peak memory of one way in this process."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        output = Path(name, "output.html" if way == "report" else "output")
        cpu, wall = time.process_time(), time.perf_counter()
        ways_of(Path(folder))[way](output)
        return time.process_time() - cpu, time.perf_counter() - wall, common.peak_nbytes()


def prepare(folder: Path, search: Path) -> None:
    """Write a merged result, and the partials as files."""
    ocelot_em.merge(search, folder / "MERGED.zarr", threads=2)
    write_mrc_set(folder / "MERGED.zarr", folder / "mrc")
    write_hdf5(folder / "MERGED.zarr", folder / "maps.h5")
    (folder / "search").symlink_to(search.resolve())
    (folder / "files").mkdir()
    objects = open_objects(search)
    for number in range(N_PARTIALS):
        path = partial_path(f"device_{number}")
        values = {}
        for name in MapSet(PoseForm.EXPLICIT).partial:
            stored = open_map(objects, f"{path}/{name}", name, ["float32"])
            values[name], _ = stored.read(Region.whole(stored.shape))
        np.savez(folder / "files" / f"device_{number}.npz", **values)


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(measure(*asked.one)))
        return
    side, repeats = (QUICK_SIDE, 1) if asked.quick else (SIDE, asked.repeats)
    asked.data.mkdir(parents=True, exist_ok=True)
    print(common.machine())
    search = common.search_of(side, N_PARTIALS, PoseForm.EXPLICIT, folder=asked.data)
    with tempfile.TemporaryDirectory(prefix="ocelot-bench-", dir=asked.data) as name:
        folder = Path(name)
        prepare(folder, search)
        runs: dict[str, list[tuple[float, float, int]]] = {way: [] for way in ways_of(folder)}
        for _ in range(repeats):
            common.warm(folder)
            for way, measured in runs.items():
                measured.append(common.in_own_process("benchmarks.exchange", str(folder), way))
        shutil.rmtree(folder / "files")
    rows = []
    for way, measured in runs.items():
        cpu, wall, peak = (statistics.median(column) for column in zip(*measured, strict=True))
        floor = runs.get(f"{way.split()[0]}: floor")
        ratios = [own[0] / least[0] for own, least in zip(measured, floor or (), strict=False)]
        ratio = f"{statistics.median(ratios):.2f}" if ratios else ""
        rows.append((way, f"{cpu:.2f}", f"{wall:.2f}", f"{peak / 1e6:.0f}", ratio))
    print(f"\n{side}^2, {N_PARTIALS} partials to import, medians of {repeats}\n")
    common.table(("way", "processor s", "seconds", "peak MB", "to its floor"), rows)


if __name__ == "__main__":
    main()
