"""Names of micrographs, and ranks of particles, in tables of one micrograph and of many."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import PurePath

import numpy as np

from ocelot_em.errors import InvalidInputError
from ocelot_em.model.maps import MIP, SCALED_MIP, AnyArray, Int64
from ocelot_em.particles.table import (
    ALL_COLUMNS,
    MICROGRAPH,
    NEG_LOG_P,
    RANK,
    RANK_IN_MICROGRAPH,
    SEARCHED,
    ParticleTable,
    is_formula,
)

_SAME_PLACE = {"canvas_y": "pos_y", "canvas_x": "pos_x"}
"""Columns of a montage that have the values of others where there is none."""

_SHOWN = 20  # names in an error


def store_name(url: str) -> str:
    """Return the name of a store without its folder and suffix.

    It is also the name of the micrograph that was searched, unless the user gives another one.

    >>> store_name("s3://bucket/session/M1.zarr")
    'M1'
    """
    return url.rstrip("/").rpartition("/")[2].removesuffix(".zarr")


def plain_name(name: str) -> str:
    """Return a name as tables can have it: other characters are replaced by underscores.

    >>> plain_name("a,b"), plain_name("-1a")
    ('a_b', '_-1a')
    """
    plain = re.sub(r'[,"\r\n\t]', "_", name)
    return f"_{plain}" if is_formula(plain) else plain


def of_micrograph(table: ParticleTable, name: str) -> ParticleTable:
    """Return a table, highest first, whose particles have this micrograph and their ranks.

    Characters that tables cannot have are replaced by underscores.
    """
    ranks = np.arange(1, len(table) + 1, dtype=np.int64)
    return replace(table, columns={**table.columns, **_named(table, name), RANK: ranks})


def renamed(table: ParticleTable, name: str) -> ParticleTable:
    """Return a table with this name of its micrograph; of several micrographs, the one's particles.

    Ranks stay, if there are any. The name may be that of a file: with or without folder and suffix.
    """
    names = names_of(table)
    if len(names) < 2:
        if RANK not in table:
            return of_micrograph(table, name)
        return replace(table, columns={**table.columns, **_named(table, name)})
    spellings = name, PurePath(name).name, PurePath(name).stem
    same = next((own for own in spellings if own in names), None)
    if same is None:
        shown = ", ".join(names[:_SHOWN]) + ", ..." * (len(names) > _SHOWN)
        raise InvalidInputError(f"micrograph: expected one of {shown}, got {name!r}")
    is_own: AnyArray = table.columns[MICROGRAPH] == same
    return table[is_own]


def names_of(table: ParticleTable) -> list[str]:
    """Return the names of the micrographs of a table; an early one has none."""
    names: list[str] = np.unique(table.columns.get(MICROGRAPH, np.empty(0, str))).tolist()
    return names


def _named(table: ParticleTable, name: str) -> dict[str, AnyArray]:
    return {MICROGRAPH: np.full(len(table), plain_name(name))}


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
    return np.split(ranks, np.cumsum([len(own) for own in several]))[:-1]


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
