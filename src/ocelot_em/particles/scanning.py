"""Search of merged maps for candidates that the merge did not record."""

from collections.abc import Sequence

import numpy as np

from ocelot_em.merge.result import MergedResult
from ocelot_em.merge.stats.collected import CANDIDATE_FIELDS, GATHERED, neighbours_of
from ocelot_em.model.maps import MIP, SCALED_MIP, SOURCE_EXPOSURE, AnyArray, Float64
from ocelot_em.model.regions import Region
from ocelot_em.model.threads import map_in_threads
from ocelot_em.particles.candidate_rules import CandidateRule


def scan(merged: MergedResult, rules: Sequence[CandidateRule]) -> list[Float64]:
    """Search maps chunk by chunk for the shown candidates of each exposure.

    Return rows of :data:`CANDIDATE_FIELDS` for each exposure; ``rules`` has one rule for each.
    """

    def look(region: Region) -> list[tuple[int, Float64]]:
        there = merged.plan.touching(region)
        if not there:
            return []
        mip, z = merged.read(region, MIP), merged.read(region, SCALED_MIP)
        if not merged.plan.is_montage:
            return [(0, rows_at(region, z, rules[0].accepts(mip, z), (0, 0)))]
        numbers = merged.read(region, SOURCE_EXPOSURE)
        found = []
        for k in there:
            exposure = merged.plan.exposures[k]
            own = numbers == exposure.number
            where = own.copy()
            where[own] = rules[k].accepts(mip[own], z[own])
            own_z = np.where(own, z, np.float32(np.nan))
            found.append((k, rows_at(region, own_z, where, exposure.origin)))
        return found

    def rows_at(region: Region, z: AnyArray, where: AnyArray, origin: tuple[int, int]) -> Float64:
        y, x = np.nonzero(where)
        rows = np.full((len(y), len(CANDIDATE_FIELDS)), np.nan)
        if not len(y):
            return rows
        _put(rows, "y", y + region.y0 - origin[0])
        _put(rows, "x", x + region.x0 - origin[1])
        for name in GATHERED:
            if name in merged.maps:
                _put(rows, name, merged.read(region, name)[y, x])
        for name, beside in neighbours_of(z, y, x):
            _put(rows, name, beside)
        return rows

    found: list[list[Float64]] = [[np.empty((0, len(CANDIDATE_FIELDS)))] for _ in rules]
    for own in map_in_threads(look, merged.regions()):
        for k, rows in own:
            found[k].append(rows)
    return [np.concatenate(rows) for rows in found]


def _put(rows: Float64, name: str, values: AnyArray) -> None:
    rows[:, CANDIDATE_FIELDS.index(name)] = values
