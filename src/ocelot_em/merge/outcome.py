"""Results of tiles and merges: summaries, outcomes, their tally, and the report of a merge."""

import logging
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import overload

import numpy as np
from numpy.typing import NDArray

from ocelot_em.errors import (
    FormatError,
    InputChangedError,
    InvalidInputError,
    StoppedError,
    StorageError,
    TilesFailedError,
)
from ocelot_em.merge.stats.totals import TileTotals
from ocelot_em.model.html import render
from ocelot_em.model.text import seconds_text
from ocelot_em.store.lock import OutputLock

log = logging.getLogger(__name__)

MAX_CONSECUTIVE_FAILURES = 50
"""Consecutive failures after which a run is aborted, as with a full disk or a lost network."""

MAX_FAILURES_SHOWN = 20
"""Maximum number of failed tiles that an error names."""


ACTIVITIES = {"read": "reading", "fold": "merging", "write": "writing"}
"""What people read for the activities that are timed."""


@dataclass(frozen=True, slots=True)
class TileSummary:
    """Summary of a written tile, stored in the output as its done-mark.

    Seconds are those of the thread that merged it. Merging includes decoding where one call does
    both, and reading where not; writing includes encoding. ``waited_seconds`` is the part of
    reading and writing spent waiting for the storage.
    """

    pixels: int
    searched_pixels: int
    read_seconds: float
    fold_seconds: float
    write_seconds: float
    waited_seconds: float
    read_nbytes: int
    decoded_nbytes: int
    written_nbytes: int

    def __add__(self, other: "TileSummary") -> "TileSummary":
        """Return the summary of both tiles together."""
        added = {name: getattr(self, name) + getattr(other, name) for name in SUMMARY_FIELDS}
        return replace(self, **added)

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by activity; ``waited`` is included in the others."""
        names = "read", "fold", "write", "waited"
        return {name: getattr(self, f"{name}_seconds") for name in names}

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes read, decoded and written."""
        return {name: getattr(self, f"{name}_nbytes") for name in ("read", "decoded", "written")}


SUMMARY_FIELDS = tuple(TileSummary.__dataclass_fields__)


TileChecksums = NDArray[np.uint32]
"""Checksums of the chunks of a tile, by map and by chunk, row by row; unused ones are 0."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Outcome of one tile: a summary, or the text of an error."""

    iy: int
    ix: int
    summary: TileSummary | None
    error: str = ""
    is_transient: bool = False
    """Whether a retry may succeed; False if the data are the cause."""
    where: str = ""
    """Host and process that merged the tile."""
    is_early: bool = False
    """Whether the same outcome follows with its checksums and statistics, as the task ends."""
    checksums: TileChecksums | None = field(default=None, compare=False)
    """Checksums of its chunks, for the manifest of the result."""
    statistics: TileTotals | None = field(default=None, compare=False)
    """Its statistics; None in a montage, of which the records are read at the end."""


Outcomes = Generator[Outcome, None, None]
"""Outcomes of tiles, which are merged as they are taken; closing it awaits what is in progress."""

OnOutcome = Callable[[Outcome], None]
"""Is called with the outcome of every tile."""


class Tiles(Sequence[tuple[int, int]]):
    """Rows and columns of some tiles of a grid, kept as numbers that count row by row."""

    def __init__(self, n_columns: int, numbers: NDArray[np.int64]) -> None:
        self._n_columns, self.numbers = n_columns, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> tuple[int, int]: ...
    @overload
    def __getitem__(self, index: slice) -> "Tiles": ...
    def __getitem__(self, index: int | slice) -> "tuple[int, int] | Tiles":
        if isinstance(index, slice):
            return Tiles(self._n_columns, self.numbers[index])
        return divmod(int(self.numbers[index]), self._n_columns)


def joined(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Return the outcomes of a task with fewer bytes: the histograms of all are in one of them."""
    found = [one.statistics for one in outcomes if one.statistics is not None]
    if len(found) < 2:
        return list(outcomes)
    parts = iter(TileTotals.joined(found))
    return [
        one if one.statistics is None else replace(one, statistics=next(parts)) for one in outcomes
    ]


class Tally:
    """Counts merged and failed tiles; calls ``give_up`` after too many consecutive failures.

    Parameters
    ----------
    on_outcome
        Is called with every outcome.
    give_up
        Ends the run.
    gather
        Is called with the outcome of every merged tile.
    """

    def __init__(
        self, on_outcome: OnOutcome, give_up: Callable[[], None], gather: OnOutcome
    ) -> None:
        self._on_outcome, self._give_up, self._gather = on_outcome, give_up, gather
        self._n_consecutive = 0
        self.totals = TileSummary(*(0 for _ in SUMMARY_FIELDS))
        self.n_merged = 0
        self.failed: dict[tuple[int, int], Outcome] = {}
        self.has_given_up = False
        self._announced = set[tuple[int, int]]()

    def count(self, outcome: Outcome) -> None:
        """Count a tile, which may have failed before; an early outcome is only passed on, once."""
        tile = outcome.iy, outcome.ix
        if outcome.is_early:
            if tile not in self._announced:
                self._announced.add(tile)
                self._on_outcome(outcome)
            return
        is_known = tile in self._announced and outcome.summary is not None
        self._announced.discard(tile)
        if outcome.summary is None:
            self.failed[tile] = outcome
            self._n_consecutive += 1
            # A merge of a running search is planned again if its inputs change.
            is_changed = str(outcome.error).startswith(InputChangedError.__name__)
            level = logging.INFO if is_changed else logging.ERROR
            log.log(level, "tile (%d, %d): %s", *tile, outcome.error)
        else:
            self.failed.pop(tile, None)
            self._gather(outcome)
            self.totals = self.totals + outcome.summary
            self.n_merged += 1
            self._n_consecutive = 0
        if not is_known:
            self._on_outcome(outcome)
        if self._n_consecutive == MAX_CONSECUTIVE_FAILURES:
            self.has_given_up = True
            self._give_up()

    def transient_failures(self, n_columns: int) -> "Tiles":
        """Return the tiles that failed with a transient error."""
        failed = self.failed.values()
        numbers = [end.iy * n_columns + end.ix for end in failed if end.is_transient]
        return Tiles(n_columns, np.array(sorted(numbers), np.int64))

    def failures_text(self) -> str:
        """Name the tiles that failed."""
        shown = [
            f"\n  - tile ({end.iy}, {end.ix}): {end.error}"
            for end in islice(self.failed.values(), MAX_FAILURES_SHOWN)
        ]
        more = len(self.failed) - len(shown)
        return "".join(shown) + (f"\n  ... and {more} more" if more else "")


@dataclass(frozen=True)
class MergeReport:
    """Report of a merge.

    Parameters
    ----------
    output
        Path or URL of the merged store.
    n_tiles, n_merged
        Total number of tiles, and number merged by this run (the others were done before).
    seconds
        Wall-clock time of this run, excluding compilation.
    totals
        Sums over the tiles of this run.
    compile_seconds
        Time spent compiling kernels in this process, only in the first run after an installation.
    incomplete_search
        How much is merged of an incomplete search; empty if all.

    Examples
    --------
    >>> from ocelot_em import merge
    >>> report = merge("SEARCH.zarr", "RESULT.zarr", tile_size=256)
    >>> report.n_tiles, report.n_merged
    (4, 4)
    """

    output: str
    n_tiles: int
    n_merged: int
    seconds: float
    totals: TileSummary
    compile_seconds: float = 0.0
    incomplete_search: str = ""

    @property
    def gigabytes_per_second(self) -> float:
        """Decoded input bytes per wall-clock time."""
        return self.totals.decoded_nbytes / max(self.seconds, 1e-9) / 1e9

    @property
    def shares(self) -> dict[str, float]:
        """Fractions of the workers' time spent reading, merging and writing."""
        seconds, total = self.totals.seconds, self._busy_seconds or 1.0
        return {activity: seconds[name] / total for name, activity in ACTIVITIES.items()}

    @property
    def waiting_share(self) -> float:
        """Fraction of this time that workers spent waiting for the storage."""
        return self.totals.waited_seconds / (self._busy_seconds or 1.0)

    @property
    def _busy_seconds(self) -> float:
        totals = self.totals
        return totals.read_seconds + totals.fold_seconds + totals.write_seconds

    def _repr_html_(self) -> str:
        """Summarise the merge for a notebook."""
        shares = [f"{name} {share:.0%}" for name, share in self.shares.items()]
        facts = (
            ("merged", self.output),
            ("tiles", f"{self.n_merged:,} of {self.n_tiles:,} by this run"),
            ("time", f"{seconds_text(self.seconds)}: {', '.join(shares)}"),
            ("rate", f"{self.gigabytes_per_second:.3g} GB/s of decoded input"),
        )
        found = [("search", self.incomplete_search)] * bool(self.incomplete_search)
        return render("model/templates/facts.html.j2", pairs=[*facts, *found])


def failure(iy: int, ix: int, error: Exception) -> Outcome:
    """Return the outcome of a tile that failed; errors in the data are permanent."""
    in_data = isinstance(error, (InvalidInputError, FormatError))
    return Outcome(iy, ix, None, f"{type(error).__name__}: {error}", is_transient=not in_data)


def unfinished(
    output: str, left_of_all: tuple[int, int], tally: Tally, lock: OutputLock
) -> StoppedError | TilesFailedError:
    """Return the error that explains why some of all tiles of an output are left.

    Raises
    ------
    LockLostError
        The run no longer holds the output.
    """
    (n_left, n_tiles), n_failed = left_of_all, len(tally.failed)
    with suppress(StorageError):
        lock.prove()
    if lock.stopping.is_set() and not tally.has_given_up:
        return StoppedError(
            f"{output}: stopped with {n_left} of {n_tiles} tiles left; the others are done; "
            f"run the same command again to resume{tally.failures_text()}"
        )
    n_skipped = n_left - n_failed
    skipped = f", and {n_skipped} were not attempted" if n_skipped else ""
    return TilesFailedError(
        f"{output}: {n_failed} of {n_tiles} tiles failed{skipped}; the others are done; fix "
        f"the cause, and run the same command again:{tally.failures_text()}"
    )
