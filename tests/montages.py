"""Small montages, and their exposures merged alone."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import ocelot_em
from helpers import SPACE, make_result, read_maps
from ocelot_em.model.maps import AnyArray
from ocelot_em.store.partials import write_partial
from ocelot_em.store.search_info import Exposure, SearchInfo


@dataclass(frozen=True)
class Shot:
    """An exposure to be made, with partials of these counts."""

    id: str
    origin: tuple[float, float]
    acquired: int
    shape: tuple[int, int]
    valid_shape: tuple[int, int]
    counts: tuple[int, ...]
    idle: bool = False

    def results(self, seed: int = 0, *, ties: bool = False) -> list[dict[str, AnyArray]]:
        rng = np.random.default_rng((seed, *self.id.encode()))
        found = [make_result(rng, self.shape, count, ties=ties) for count in self.counts]
        for result in found:
            unsearched = rng.random(self.shape) < (1.0 if self.idle else 0.05)
            result["mip"][unsearched] = -np.inf
            result["best_global_index"][unsearched] = -1
        return found


def write_shots(place: Path, shots: Sequence[Shot], *, indexed: bool = False) -> Path:
    info = SearchInfo(search_space=SPACE if indexed else None, pixel_size_angstrom=2.0)
    for shot in shots:
        exposure = Exposure(shot.id, shot.origin, shot.acquired, shot.valid_shape)
        for number, (result, count) in enumerate(zip(shot.results(), shot.counts, strict=True)):
            write_partial(
                place,
                f"gpu{number}",
                result,
                total_projections=count,
                order=number,
                search=replace(info, exposure=exposure),
            )
    return place


def merged_alone(
    folder: Path, shot: Shot, *, indexed: bool = False, valid_only: bool = False
) -> dict[str, AnyArray]:
    """What a merge of one exposure's partials gives, as a search of its own."""
    search = folder / f"{shot.id}.zarr"
    info = SearchInfo(search_space=SPACE if indexed else None, pixel_size_angstrom=2.0)
    height, width = shot.valid_shape if valid_only else shot.shape
    for number, (result, count) in enumerate(zip(shot.results(), shot.counts, strict=True)):
        maps = {name: values[:height, :width] for name, values in result.items()}
        write_partial(
            search, f"gpu{number}", maps, total_projections=count, order=number, search=info
        )
    ocelot_em.merge(search, folder / f"{shot.id}_merged.zarr")
    return read_maps(folder / f"{shot.id}_merged.zarr")


SHOTS = [
    Shot("late", (0, 20), 7, (30, 34), (28, 31), (70_000, 31_000)),
    Shot("first", (3, 0), 1, (24, 26), (22, 25), (70_000, 20_000, 5_000)),
    Shot("below", (19, 11), 3, (25, 30), (25, 30), (10_000,)),
    Shot("far", (40, 60), 2, (12, 9), (10, 8), (40_000, 40_000)),
    Shot("again", (3, 2), 1, (20, 20), (20, 20), (90_000, 12_000)),
]
