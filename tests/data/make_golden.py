"""Make the golden stores of the current format version; run once for a new version, never again.

``PYTHONPATH=tests python tests/data/make_golden.py FOLDER`` makes stores that every later version
of the package must read, and packs them; copy the archive here. FOLDER is recorded in the stores:
let it name no machine.
"""

import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np

import ocelot_em
from helpers import make_result, with_tables, write_search
from montages import SHOTS, write_shots
from ocelot_em.model.search_space import SearchSpace
from ocelot_em.store.attributes import FORMAT_VERSION
from ocelot_em.store.partials import write_partial


def main() -> None:
    place = Path(sys.argv[1]) / f"golden_v{FORMAT_VERSION}"
    place.mkdir(parents=True)
    for form in ("explicit", "indexed"):
        rng = np.random.default_rng(FORMAT_VERSION)
        results = [make_result(rng, (24, 40), count, ties=True) for count in (70, 2**31 + 1)]
        results[1]["mip"][:3] = results[0]["mip"][:3] = -np.inf
        if form == "indexed":
            write_search(place / "tables.zarr", with_tables(results), (70, 2**31 + 1), indexed=True)
        search = place / f"{form}.zarr"
        write_search(search, results, (70, 2**31 + 1), indexed=form == "indexed")
        ocelot_em.merge(search, place / f"{form}_merged.zarr", tile_size=24)
    ocelot_em.merge(place / "indexed.zarr", place / "statistics.zarr", tile_size=24, poses="index")
    write_shots(place / "montage.zarr", SHOTS[:3])
    ocelot_em.merge(
        place / "montage.zarr", place / "montage_merged.zarr", tile_size=24, overlap="max-zscore"
    )
    make_groups(place)
    make_counts(place)
    with tarfile.open(place.with_suffix(".tar.xz"), "w:xz") as archive:
        for path in sorted(p for p in place.rglob("*") if p.is_file()):
            archive.add(path, path.relative_to(place.parent), filter=plain)


def plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """Remove what would be of this machine."""
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    return entry


def make_groups(place: Path) -> None:
    """Two templates with search spaces of their own; the searches are not needed any more."""
    other = SearchSpace.from_tables(np.full((5, 3), 7), [0], [0])
    rng = np.random.default_rng(0)
    result = make_result(rng, (24, 40), 70)
    result["best_global_index"] %= other.n_poses
    info = ocelot_em.SearchInfo(search_space=other, template_name="other")
    write_partial(place / "other.zarr", "p0", result, total_projections=70, search=info)
    searches = [place / "indexed.zarr", place / "other.zarr"]
    ocelot_em.merge(
        searches, place / "groups.zarr", tile_size=24, poses="index", group_by="template"
    )
    shutil.rmtree(place / "other.zarr")


def make_counts(place: Path) -> None:
    """Two partials, one of them with a map of counts, which is 0 where it searched nothing."""
    rng = np.random.default_rng(0)
    results = [make_result(rng, (24, 40), 70, ties=True) for _ in range(2)]
    counts = rng.integers(1, 70, (24, 40))
    counts[0, 0], counts[5:9] = 70, 0
    for name, values in results[0].items():
        values[5:9] = {"mip": -np.inf, "best_global_index": -1}.get(name, 0)
    write_partial(place / "counts.zarr", "p0", results[0], total_projections=counts)
    write_partial(place / "counts.zarr", "p1", results[1], total_projections=2**31 + 1)
    ocelot_em.merge(place / "counts.zarr", place / "counts_merged.zarr", tile_size=24)


if __name__ == "__main__":
    main()
