"""Small searches to merge, and maps to compare."""

from collections.abc import Collection, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import settings
from numcodecs import blosc

from ocelot_em.model.maps import INDEX, POSES, AnyArray
from ocelot_em.model.search_space import SearchSpace
from ocelot_em.store.attributes import dump_attributes
from ocelot_em.store.groups import update_attributes
from ocelot_em.store.manifest import MANIFEST
from ocelot_em.store.objects import open_objects
from ocelot_em.store.partials import write_partial
from ocelot_em.store.result_shards import places_of_chunks
from ocelot_em.store.search import partial_path, read_partial_attributes
from ocelot_em.store.search_info import SearchInfo

expensive = settings(max_examples=settings.default.max_examples // 4)
"""For drawn examples that merge: fewer than usual, in whatever profile."""

SPACE = SearchSpace.from_tables(
    np.linspace(0, 350, 36).reshape(12, 3), [-300.0, 0.0, 300.0], [-0.1, 0.1]
)


def combinations(*axes: Sequence[object], fast: Collection[tuple[object, ...]]) -> list[Any]:
    """Every combination of some values: the named ones for the fast tier, the others marked slow.

    Named should be corners, so that every value is in one of them.
    """
    every = list(product(*axes))
    assert set(fast) <= set(every)
    assert all({one[n] for one in fast} == set(axis) for n, axis in enumerate(axes))
    return [pytest.param(*one, marks=() if one in fast else pytest.mark.slow) for one in every]


def make_result(
    rng: np.random.Generator, shape: tuple[int, int], count: int, *, ties: bool = False
) -> dict[str, AnyArray]:
    """A device's result with both pose forms; with ties, few different correlations."""
    index = rng.integers(0, SPACE.n_poses, shape).astype(np.int32)
    mip = rng.normal(5, 1, shape).astype(np.float32)
    if ties:
        mip = np.round(mip).astype(np.float32)
    poses = SPACE.decode(index)
    return {
        "mip": mip,
        INDEX: index,
        **dict(zip(POSES, poses, strict=True)),
        "correlation_sum": (count * rng.normal(0, 0.2, shape)).astype(np.float32),
        "correlation_squared_sum": (count * rng.uniform(1, 1.5, shape)).astype(np.float32),
    }


def with_tables(results: Sequence[Mapping[str, AnyArray]]) -> list[dict[str, Any]]:
    """Add correlation tables, which are always the same, to results of 24 x 40 pixels or more."""
    rows = np.arange(12)
    table = {"global_idx": rows % 7, "pos_y": rows * 2, "pos_x": 39 - rows * 3, "threshold": 5.5}
    return [
        {**result, "correlation_table": table | {"corr_value": np.float32(6 + number + rows / 8)}}
        for number, result in enumerate(results)
    ]


def write_search(
    store: Path,
    results: Sequence[Mapping[str, AnyArray]],
    counts: Sequence[int | AnyArray],
    *,
    indexed: bool = False,
    first: int = 0,
) -> Path:
    """Write results as partials ``p0``, ``p1``, ... of a search."""
    info = SearchInfo(search_space=SPACE if indexed else None)
    for number, (result, count) in enumerate(zip(results, counts, strict=True), first):
        write_partial(
            store, f"p{number}", result, total_projections=count, order=number, search=info
        )
    return store


def unfinish(store: Path, name: str) -> None:
    """Make a partial look as if its writer had died."""
    objects = open_objects(store)
    writing = read_partial_attributes(objects, name).model_copy(update={"state": "writing"})
    update_attributes(objects, partial_path(name), dump_attributes(writing))
    objects.delete(f"{partial_path(name)}/{MANIFEST}")  # which comes last


def read_maps(store: Path | str) -> dict[str, AnyArray]:
    """All maps of a merged store, read by zarr itself."""
    group = zarr.open_group(store, mode="r", use_consolidated=False)
    return {name: np.asarray(array[...]) for name, array in group.arrays()}


def chunk_bytes(store: Path) -> dict[str, bytes]:
    """Every chunk of every map of a store, as stored; progress records hold timings and differ."""
    objects = open_objects(store)
    found = {
        str(path.relative_to(store)): path.read_bytes()
        for path in sorted(store.rglob("c/*/*"))
        if path.is_file() and "progress" not in path.parts
    }
    for folder in sorted({shard.parent.name for shard in store.glob("*/c.*.*")}):
        for iy, ix in sorted({*places_of_chunks(objects, folder)}):
            key = f"{folder}/c/{iy}/{ix}"
            found[key] = objects.get(key)
    return found


def chunk_values(store: Path) -> dict[str, bytes]:
    """The same, as numcodecs decodes it: a device encodes the same values in other bytes."""
    return {key: blosc.decompress(stored[:-4]) for key, stored in chunk_bytes(store).items()}


def assert_same_maps(
    left: Mapping[str, AnyArray], right: Mapping[str, AnyArray], *, rounded: Sequence[str] = ()
) -> None:
    """Bitwise equal, but for the maps named in ``rounded``: those to float32 rounding."""
    assert set(left) == set(right)
    for name, values in left.items():
        if name in rounded:
            np.testing.assert_allclose(values, right[name], rtol=1e-5, atol=2e-6, err_msg=name)
        else:
            same = values.view(f"V{values.itemsize}") == right[name].view(f"V{values.itemsize}")
            assert same.all(), name


def bytes_read():
    """Bytes that this process has read from files by system calls."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(lines[0].removeprefix("rchar: "))
