"""Stored statistics and candidates of a merged result: a record for each tile, then the sums.

In a montage every exposure has its own records of all its pixels, shown or not.

Workers write a tile's records before its done-mark; the driver adds up the statistics of tiles.
Readers do not need the maps.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from ocelot_em.errors import (
    OcelotError,
)
from ocelot_em.merge.overlap import SHOWN_FIELDS
from ocelot_em.merge.plan import MergePlan, PlannedExposure
from ocelot_em.merge.stats.collected import (
    CANDIDATE_FIELDS,
    TILE_FIELDS,
    TileStatistics,
    candidate_capacity,
)
from ocelot_em.merge.stats.layout import COUNTS, NUMBERS, SHOWN, Layout
from ocelot_em.merge.stats.summary import (
    STATISTICS,
    read_histograms,
    read_statistics,
    statistics_path,
)
from ocelot_em.model.maps import (
    Float64,
)
from ocelot_em.model.threads import map_in_threads
from ocelot_em.store import arrays as store
from ocelot_em.store import constants, groups
from ocelot_em.store.contract import Objects, at_once

_ROOM = np.zeros(1)
"""Room for the identity of a record, behind its values."""


def new_tile_statistics(plan: MergePlan) -> TileStatistics:
    """Create the reusable statistics for the pieces of exposures."""
    return TileStatistics(candidate_capacity(plan.tile), max(plan.tile) if plan.has_parts else 0)


def create_records(objects: Objects, plan: MergePlan) -> None:
    """Write the metadata of the tiles' records."""
    fields = {"tile_fields": list(TILE_FIELDS), "candidate_fields": list(CANDIDATE_FIELDS)}
    if plan.has_parts:
        groups.create_group(objects, f"progress/{constants.EXPOSURES}", {})

    def create(exposure: PlannedExposure) -> None:
        layout = Layout.of(plan, exposure)
        arrays: list[tuple[str, str, dict[str, Any]]] = [
            (COUNTS, "uint32", {}),
            (NUMBERS, "float64", fields),
        ]
        if plan.has_parts:
            groups.create_group(objects, layout.folder, {})
            arrays.append((SHOWN, "float64", {"fields": list(SHOWN_FIELDS)}))

        def create_one(path: str, dtype: str, attributes: dict[str, Any]) -> None:
            n, fill = layout.length(path), 0 if path == COUNTS else float("nan")
            array = store.ArrayLayout(
                (len(layout) * n,), (n,), dtype, fill, ("record",), attributes
            )
            store.create_array(objects, f"{layout.folder}/{path}", plan.laid_out(array))

        at_once(objects, [partial(create_one, *array) for array in arrays])

    deque(map_in_threads(create, plan.exposures, objects.requests), maxlen=0)


def has_records(objects: Objects, plan: MergePlan) -> bool:
    """Whether the tiles of a merge have records; early versions wrote none."""
    if plan.identity is not None:
        return True
    first = Layout.of(plan, plan.exposures[0])
    return objects.get(f"{first.folder}/{NUMBERS}/zarr.json") is not None


def encode_records(
    layout: Layout, statistics: TileStatistics, number: int
) -> Iterator[tuple[str, list[bytes]]]:
    """Yield the objects of a record: keys, and parts of their bytes."""
    numbers = np.concatenate(
        [
            statistics.statistics.flat,
            statistics.candidates.reshape(-1),
            statistics.edges.reshape(-1),
            _ROOM,
        ]
    )
    for what, record in ((COUNTS, statistics.counts_with_room), (NUMBERS, numbers)):
        yield layout.encode(what, number, record)


def encode_shown(layout: Layout, shown: Float64, number: int) -> tuple[str, list[bytes]]:
    """Return the object with statistics of a record's shown pixels: key and parts of its bytes."""
    return layout.encode(SHOWN, number, np.append(shown, _ROOM))


def record_problems(objects: Objects, plan: MergePlan) -> Iterator[str]:
    """Yield every problem with the statistics of a finished merged result."""
    if not has_records(objects, plan):
        return  # merged by an earlier version
    for exposure in plan.exposures:
        layout = Layout.of(plan, exposure)
        reads: list[Callable[[Objects, int], object]] = [layout.counts, layout.record]
        if plan.has_parts:
            reads.append(layout.shown)

        def problems_of(
            number: int, reads: Sequence[Callable[[Objects, int], object]] = reads
        ) -> list[str]:
            found = []
            for read in reads:
                try:
                    read(objects, number)
                except OcelotError as error:
                    found.append(str(error))
            return found

        for found in map_in_threads(problems_of, range(len(layout)), objects.requests):
            yield from found
    exposures = plan.exposures if plan.has_parts else ()
    for path in (STATISTICS, *(statistics_path(exposure.number) for exposure in exposures)):
        try:
            statistics = read_statistics(objects, path)
            if statistics is None:
                yield f"{objects.url}: the group {path!r} is missing; merge again"
            else:
                read_histograms(objects, path, statistics)
        except OcelotError as error:
            yield str(error)
