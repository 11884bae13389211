"""Merge runs of one micrograph, which have search spaces and indices of their own.

Maps are read region by region, so that they may be larger than memory.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ocelot_em.errors import InvalidInputError
from ocelot_em.merge.in_memory import Statistics, bands, refuse_bad_values, start_of
from ocelot_em.model.arrays import HostRows, as_numpy
from ocelot_em.model.maps import (
    INDEX,
    MEAN,
    MIP,
    NOT_SEARCHED,
    SCALED_MIP,
    SQUARED_SUM,
    STD,
    SUM,
    AnyArray,
)
from ocelot_em.model.regions import TileGrid
from ocelot_em.store.constants import DEFAULT_CHUNK
from ocelot_em.store.validation import BadValues

WINNER, TAG = "winner_run_index", "best_run_tag"

INPUTS = {MIP: "f", INDEX: "iu", SUM: "f", SQUARED_SUM: "f"}
"""Maps of a run, and the kinds of their dtypes."""

_SIDE = DEFAULT_CHUNK
"""Edge of a region: that of stored chunks, so that each is decoded once."""


def regions(shape: tuple[int, ...]) -> Iterator[tuple[int | slice, ...]]:
    """Cut maps into regions; maps with two axes into squares."""
    if len(shape) == 2 and all(shape):
        return (tile.region.slices for tile in TileGrid((shape[0], shape[1]), (_SIDE, _SIDE)))
    return bands(shape, _SIDE**2)


def open_runs(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, HostRows]]:
    """Check the maps of runs, without reading them."""
    if not isinstance(runs, Sequence) or not runs:
        raise InvalidInputError("runs: expected a list of at least one dictionary of maps")
    problems, opened = list[str](), list[dict[str, HostRows]]()
    for number, run in enumerate(runs):
        opened.append({})
        for name, kinds in INPUTS.items():
            place = f"run {number}, {name}"
            try:
                opened[-1][name] = rows = HostRows(run[name])
            except KeyError:
                problems.append(f"{place}: missing")
                continue
            except (TypeError, ValueError, RuntimeError) as error:
                problems.append(f"{place}: cannot become a NumPy array: {error}")
                continue
            if rows.dtype.kind not in kinds:
                problems.append(f"{place}: expected {_WORDS[kinds]}, got {rows.dtype}")
            expected = opened[0].get(MIP, rows).shape
            if rows.shape != expected or not expected:
                problems.append(f"{place}: expected shape {expected or '(y, x)'}, got {rows.shape}")
    if problems:
        raise InvalidInputError(problems)
    return opened


_WORDS = {"f": "floating-point values", "iu": "integers"}


def merge_runs(
    runs: Sequence[Mapping[str, HostRows]],
    counts: Sequence[int],
    out: Mapping[str, Any],
    *,
    pooled: bool,
    tags: AnyArray | None = None,
) -> None:
    """Select the best run of each pixel, the earlier one of equal ones, and fill maps.

    Parameters
    ----------
    runs
        As of :func:`open_runs`.
    counts
        Number of cross-correlations of each run, or of all together if they are pooled.
    out
        Arrays to fill, by name: the winner's maps, its number (:data:`WINNER`) and tag
        (:data:`TAG`), its z-score, mean and standard deviation.
    pooled
        Whether the highest ``mip`` wins, and one mean and standard deviation of all runs apply.
        Otherwise each run has its own, and the highest z-score wins.
    tags
        One number per run.
    """
    shape = runs[0][MIP].shape
    statistics = Statistics(shape, _SIDE**2)
    found = [BadValues(f"run {n}", count=None if pooled else counts[n]) for n in range(len(runs))]
    for region in regions(shape):
        best, sums = dict[str, AnyArray](), dict[str, AnyArray]()
        for number, run in enumerate(runs):
            part = {name: as_numpy(run[name][region]) for name in INPUTS}
            found[number].look(part, start_of(region, len(shape)))
            part[MIP] = np.require(part[MIP], np.float32, "C")
            won = {MIP: part[MIP], INDEX: part[INDEX]}
            won[WINNER] = np.full(won[MIP].shape, number, np.int32)
            if pooled:
                sums = {n: np.add(sums.get(n, 0), part[n], dtype="f8") for n in (SUM, SQUARED_SUM)}
            else:
                won |= _computed(statistics, part, counts[number])
            _keep_best(best, won, MIP if pooled else SCALED_MIP)
        if pooled:
            best |= _computed(statistics, {MIP: best[MIP], **sums}, counts[0])
        unsearched = best[MIP] == -np.inf
        if tags is not None:
            best[TAG] = np.where(unsearched, np.float32(np.nan), tags[best[WINNER]])
        for name in (INDEX, WINNER):
            best[name] = np.where(unsearched, NOT_SEARCHED, best[name])
        for name, target in out.items():
            target[region] = best[name]
    refuse_bad_values(found)


def _computed(
    statistics: Statistics, maps: Mapping[str, AnyArray], count: int
) -> dict[str, AnyArray]:
    out = {n: np.empty(maps[MIP].shape, np.float32) for n in (SCALED_MIP, MEAN, STD)}
    statistics.compute(maps, count, out)
    return out


def _keep_best(best: dict[str, AnyArray], part: Mapping[str, AnyArray], score: str) -> None:
    """Keep what has the higher score at each pixel."""
    if not best:
        best.update(part)
        return
    # The z-score of an unsearched pixel is NaN.
    better = (part[score] > best[score]) | (np.isnan(best[score]) & ~np.isnan(part[score]))
    for name, values in part.items():
        best[name] = np.where(better, values, best[name])
