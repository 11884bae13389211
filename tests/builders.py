"""Small partial results, and looking at what a store has become."""

import json
import shutil
from pathlib import Path

import numpy as np

from ocelot_em import SearchInfo, SearchSpace, write_partial
from ocelot_em.model.maps import INDEX, MIP, POSES, SQUARED_SUM, SUM

SPACE = SearchSpace.from_tables(
    np.random.default_rng(0).uniform(0, 360, (7, 3)).astype(np.float32),
    [-200.0, 0.0, 200.0],
    [-0.01, 0.0],
)
INDEXED = SearchInfo(search_space=SPACE, chunk_files=True)


def common_maps(shape=(5, 6), seed=0):
    rng = np.random.default_rng(seed)
    return {
        MIP: rng.normal(5, 1, shape).astype(np.float32),
        SUM: rng.normal(0, 30, shape).astype(np.float32),
        SQUARED_SUM: rng.normal(1000, 30, shape).astype(np.float32),
    }


def explicit_maps(shape=(5, 6), seed=0, *, pixel_size=True):
    rng = np.random.default_rng((seed, 1))
    poses = POSES if pixel_size else POSES[:-1]
    return common_maps(shape, seed) | {
        name: rng.uniform(0, 180, shape).astype(np.float32) for name in poses
    }


def indexed_maps(shape=(5, 6), seed=0, dtype=np.int32):
    rng = np.random.default_rng((seed, 2))
    return common_maps(shape, seed) | {INDEX: rng.integers(0, SPACE.n_poses, shape).astype(dtype)}


def idle_maps(maps):
    """The same maps of a device that searched nothing."""
    idle = {name: np.zeros_like(values) for name, values in maps.items()}
    idle[MIP][...] = -np.inf
    for name in idle:
        if name in POSES:
            idle[name][...] = np.nan
        if name == INDEX:
            idle[name][...] = -1
    return idle


def write_explicit_search(place, shape=(5, 6), n_partials=3, **options):
    for number in range(n_partials):
        maps, options["total_projections"] = explicit_maps(shape, number), 1000 + number
        write_partial(place, f"gpu{number}", maps, **options)
    return place


def write_one_partial(place, number, shape=(5, 6)):
    maps, count = indexed_maps(shape, number), 1000 + number
    write_partial(place, f"gpu{number}", maps, total_projections=count, search=INDEXED)


def write_indexed_search(place, shape=(5, 6), n_partials=3):
    for number in range(n_partials):
        write_one_partial(place, number, shape)
    return place


def snapshot(place):
    """Contents of all files below a place, by path; empty where there is nothing."""
    root = Path(place)
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def flip_byte(path, position=-1, mask=0xFF):
    data = bytearray(Path(path).read_bytes())
    data[position] ^= mask
    Path(path).write_bytes(data)


def same_bits(a, b):
    """Whether arrays are equal, NaN and all."""
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def save_plain_npz(path, maps, count):
    """A result file as a device writes it; without a count if it is None."""
    np.savez(path, **maps, **({} if count is None else {"total_projections": np.int64(count)}))
    return path


def unsealed(store):
    """Turn a store into one of version 2, in which nothing covers metadata and places of chunks."""
    for file in store.rglob("zarr.json"):
        document = json.loads(file.read_text())
        own = document.get("attributes", {}).get("ocelot")
        if own is None:
            continue
        for key in ("seal", "manifest", "tables"):
            own.pop(key, None)
        if "format_version" in own:
            own["format_version"] = 2
        for exposure in own.get("plan", {}).get("exposures", []):
            for source in exposure["sources"]:
                source.pop("manifest", None)
        file.write_text(json.dumps(document))
    for folder in [*store.rglob("manifest"), *store.rglob("roster")]:
        shutil.rmtree(folder)
    return store


def root_of(file):
    """Return the store that a file of it belongs to."""
    folder = file.parent
    while (folder.parent / "zarr.json").exists():
        folder = folder.parent
    return folder
