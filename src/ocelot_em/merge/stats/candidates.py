"""Candidates of a merged result, read from the records of its tiles."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ocelot_em.merge.stats.collected import (
    CANDIDATE_FIELDS,
    EDGES,
    NEIGHBOUR_FIELDS,
    NEIGHBOURS,
    candidate_level,
)
from ocelot_em.merge.stats.layout import Layout
from ocelot_em.model.maps import (
    SCALED_MIP,
    Float64,
)
from ocelot_em.model.regions import Region
from ocelot_em.model.threads import map_in_threads
from ocelot_em.store.contract import Objects


class Candidates(NamedTuple):
    """The candidates of an exposure.

    Parameters
    ----------
    rows
        One row per candidate, with columns :data:`CANDIDATE_FIELDS`; pixels are in exposure
        coordinates. NaN for maps that the result does not have.
    level
        z-score (float32) at or above which the list is complete; infinite if there are no records.
        Of a record that was too small for its tile, some that tie with its lowest may be missing.
    """

    rows: Float64
    level: float

    @classmethod
    def unknown(cls) -> "Candidates":
        """Return an empty list, complete for no z-score."""
        return cls(np.empty((0, len(CANDIDATE_FIELDS))), float("inf"))


def read_candidates(objects: Objects, layout: Layout) -> Candidates:
    """Read the candidates of an exposure of a merged result.

    Neighbours in another record are looked up there, if it has edges.

    Raises
    ------
    ChunkError
    """
    level = float(np.float32(candidate_level(layout.exposure.total_projections)))
    z = CANDIDATE_FIELDS.index(SCALED_MIP)

    def read(number: int) -> tuple[Float64, float, Float64]:
        statistics, rows, edges = layout.record(objects, number)
        if len(rows) == statistics.n_candidates:
            return rows, level, edges
        return rows, float(np.nextafter(np.float32(rows[:, z].min()), np.float32(np.inf))), edges

    found, levels, edges = [np.empty((0, len(CANDIDATE_FIELDS)))], [level], []
    for rows, level_of_record, own_edges in map_in_threads(read, range(len(layout))):
        found.append(rows)
        levels.append(level_of_record)
        edges.append(own_edges)
    candidates = np.concatenate(found)
    if layout.has_parts:
        _add_neighbours_of_other_records(candidates, layout, edges)
    return Candidates(candidates, max(levels))


_ADJACENT_EDGE = {"z_above": "bottom", "z_below": "top", "z_left": "right", "z_right": "left"}
"""Edge of the adjacent record that contains a neighbour outside a record."""


def _add_neighbours_of_other_records(
    candidates: Float64, layout: Layout, edges: Sequence[Float64]
) -> None:
    """Fill in the candidates' neighbours from other records of the exposure."""
    (dy, dx), (height, width) = layout.exposure.origin, layout.tile
    ys, xs = (candidates[:, CANDIDATE_FIELDS.index(n)].astype(np.int64) for n in ("y", "x"))
    for name, (step_y, step_x) in zip(NEIGHBOUR_FIELDS, NEIGHBOURS, strict=True):
        column = candidates[:, CANDIDATE_FIELDS.index(name)]
        edge = EDGES.index(_ADJACENT_EDGE[name])
        for k in np.flatnonzero(np.isnan(column)).tolist():
            y, x = int(ys[k]) + step_y, int(xs[k]) + step_x
            if Region(y, y + 1, x, x + 1).intersect(layout.exposure.region).size:
                number = layout.number_of((y + dy) // height, (x + dx) // width)
                region = layout.region_of(number)
                if region.y0 <= ys[k] < region.y1 and region.x0 <= xs[k] < region.x1:
                    continue  # in the same record, so its z-score is NaN
                along = x - region.x0 if step_y else y - region.y0
                column[k] = edges[number][edge, along]
