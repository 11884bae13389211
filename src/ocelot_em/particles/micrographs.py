"""Particles of many micrographs in one table: each has its micrograph's name, and its ranks."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from ocelot_em.model.maps import MIP, SCALED_MIP, AnyArray, Int64
from ocelot_em.particles.table import (
    ALL_COLUMNS,
    MICROGRAPH,
    NEG_LOG_P,
    RANK,
    RANK_IN_MICROGRAPH,
    SEARCHED,
    ParticleTable,
)

_SAME_PLACE = {"canvas_y": "pos_y", "canvas_x": "pos_x"}
"""Columns of a montage that have the values of others where there is none."""


def of_micrograph(table: ParticleTable, name: str) -> ParticleTable:
    """Return a table, highest first, whose particles have this micrograph and their ranks."""
    ranks = np.arange(1, len(table) + 1, dtype=np.int64)
    own = {MICROGRAPH: np.full(len(table), name), RANK: ranks}
    return replace(table, columns={**table.columns, **own})


def heights_of(table: ParticleTable, method: str) -> AnyArray:
    """Return what particles are ranked by: -ln p, ``mip`` or the z-score."""
    names = {"pvalue": NEG_LOG_P, "mip": MIP}
    name = names.get(method, SCALED_MIP)
    return table.columns[name if name in table else SCALED_MIP]


def ranks_of(several: Sequence[AnyArray]) -> list[Int64]:
    """Return the ranks of all heights together, micrograph by micrograph.

    The highest has rank 1; of equal ones, the earlier micrograph's, then the earlier particle.

    >>> [ranks.tolist() for ranks in ranks_of([np.array([9.0, 7.0]), np.array([8.0, 7.0])])]
    [[1, 3], [2, 4]]
    """
    heights = np.concatenate([np.empty(0), *several])
    ranks = np.empty(len(heights), np.int64)
    ranks[np.argsort(-heights, kind="stable")] = np.arange(1, len(heights) + 1)
    return np.split(ranks, np.cumsum([len(own) for own in several])[:-1])


def among_all(table: ParticleTable, ranks: Int64, names: Sequence[str]) -> ParticleTable:
    """Return the particles of a micrograph as part of a table of several.

    Parameters
    ----------
    table
        As of :func:`of_micrograph`.
    ranks
        Its part of :func:`ranks_of`.
    names
        Columns of the table of several. Those that this table lacks have the values of a complete
        search without a montage, or else NaN, 0 or no text.
    """
    found = table.columns
    columns = {**found, RANK: ranks, RANK_IN_MICROGRAPH: found[RANK]}
    columns |= {name: _missing(name, found) for name in names if name not in columns}
    return replace(table, columns=columns)


def _missing(name: str, columns: Mapping[str, AnyArray]) -> AnyArray:
    n, dtype = len(columns[SCALED_MIP]), np.dtype(ALL_COLUMNS[name].dtype)
    if name in _SAME_PLACE:
        return columns[_SAME_PLACE[name]]
    if dtype.kind == "U":
        return np.full(n, "")
    default = 1.0 if name == SEARCHED else np.nan if dtype.kind == "f" else 0
    return np.full(n, default, dtype)
