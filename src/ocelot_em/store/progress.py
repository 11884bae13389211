"""How much of a search has been searched, from the orientations in its partials."""

import datetime
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from ocelot_em.model import ranges as sets
from ocelot_em.model.text import percent_text, seconds_text
from ocelot_em.store.attributes import Coverage, PartialAttributes

MISSED_HEARTBEATS = 3
"""Number of intervals without a checkpoint after which a device no longer counts as running."""


@dataclass(frozen=True)
class SearchProgress:
    """The progress of a search whose partials state their orientations.

    Parameters
    ----------
    n_searched, n_orientations
        Number of orientations in the partials, and of the whole search.
    warning
        Names a batch size with which Leopard-EM stores wrong poses; empty if there is none.
    last
        Name of the running partial that was written last, and when; None if there is none.
    seconds_left
        Estimated time to the end, in seconds; None if it is not known, or a device has stopped.
    stopped
        Name of a running partial that has missed several checkpoints, and when it was written; None
        if there is none.
    """

    n_searched: int
    n_orientations: int
    warning: str = ""
    last: tuple[str, datetime.datetime] | None = None
    seconds_left: float | None = None
    stopped: tuple[str, datetime.datetime] | None = None

    @property
    def share(self) -> float:
        """Searched share of the orientations, 0 to 1."""
        return self.n_searched / self.n_orientations

    @property
    def is_whole(self) -> bool:
        """Whether every orientation has been searched."""
        return self.n_searched >= self.n_orientations

    @property
    def incomplete_text(self) -> str:
        """Describe an incomplete search; empty if all was searched."""
        return "" if self.is_whole else f"incomplete search: {self.text}"

    @property
    def text(self) -> str:
        """Describe the progress in one sentence, without a full stop."""
        share = percent_text(self.share)
        parts = [f"searched {self.n_searched:,} of {self.n_orientations:,} orientations ({share})"]
        for said, last in ("wrote {} ago", self.last), ("has not written for {}", self.stopped):
            if last is not None and not self.is_whole:
                ago = seconds_text(max((_now() - last[1]).total_seconds(), 0), is_rough=True)
                parts.append(f"{last[0]} {said.format(ago)}")
        if self.seconds_left is not None and not self.is_whole:
            parts.append(f"about {seconds_text(self.seconds_left, is_rough=True)} left")
        return ", ".join(parts)


def progress_of(coverages: Iterable[Coverage | None]) -> SearchProgress | None:
    """Return the progress of one search; None if a partial does not state its orientations."""
    known, searched = list(coverages), list[sets.Range]()
    total, warnings = 0, list[str]()
    for coverage in known:
        if coverage is None:
            return None
        searched += coverage.ranges
        total = max(total, coverage.n_orientations)
        warnings.append(batch_warning(coverage))
    if not total:
        return None
    return SearchProgress(sets.size(sets.union(searched)), total, max(warnings))


def progress_of_partials(
    partials: Sequence[tuple[str, PartialAttributes]],
) -> SearchProgress | None:
    """Return the progress of one search, with the time since the last checkpoint, and what is left.

    Each device searches a share of its own, so that nothing is known of the end if one has stopped.
    """
    found = progress_of(partial.coverage for _, partial in partials)
    if found is None:
        return None
    now, rate, written = _now(), 0.0, list[tuple[str, datetime.datetime]]()
    stopped: tuple[str, datetime.datetime] | None = None
    for name, partial in partials:
        about, coverage = partial.recording, partial.coverage
        if partial.state != "running" or about is None or coverage is None:
            continue
        last, start = map(datetime.datetime.fromisoformat, (about.heartbeat, about.started))
        written.append((name, last))
        if (now - last).total_seconds() <= MISSED_HEARTBEATS * max(about.every_seconds, 60):
            rate += sets.size(coverage.ranges) / max((last - start).total_seconds(), 1)
        else:
            stopped = name, last
    left = (found.n_orientations - found.n_searched) / rate if rate and not stopped else None
    newest = max(written, key=lambda one: one[::-1], default=None)
    if newest == stopped:
        newest = None
    return replace(found, last=newest, seconds_left=left, stopped=stopped)


def combined(several: Sequence[SearchProgress | None]) -> SearchProgress | None:
    """Add up the progress of several exposures.

    None if that of one is not known, unless another one is known to be incomplete.
    """
    known = [one for one in several if one is not None]
    if not known or (len(known) < len(several) and all(one.is_whole for one in known)):
        return None
    newest = max((one.last for one in known if one.last), key=lambda last: last[1], default=None)
    left = [one.seconds_left for one in known if not one.is_whole]
    return SearchProgress(
        sum(one.n_searched for one in known),
        sum(one.n_orientations for one in known),
        max(one.warning for one in known),
        newest,
        None if None in left else sum(seconds for seconds in left if seconds is not None),
        next((one.stopped for one in known if one.stopped), None),
    )


def overlap_problems(coverages: Iterable[tuple[str, Coverage | None]]) -> list[str]:
    """Name every two partials in which the same orientations were searched."""
    known = [(place, coverage) for place, coverage in coverages if coverage is not None]
    everything = [ranges for _, coverage in known for ranges in coverage.ranges]
    if sets.size(sets.union(everything)) == sum(stop - start for start, stop in everything):
        return []
    problems = []
    for (one, own), (other, theirs) in combinations(known, 2):
        if twice := sets.shared(own.ranges, theirs.ranges):
            problems.append(
                f"{one} and {other}: {sets.size(twice):,} orientations are in both, from "
                f"{twice[0][0]:,} on, and would be counted twice; leave one of them out (--without)"
            )
    return problems


def batch_warning(coverage: Coverage) -> str:
    """Name a batch size that does not divide the orientations; empty if it does."""
    batch, total = coverage.batch_size, coverage.n_orientations
    if batch is None or total % batch == 0:
        return ""
    return (
        f"{total:,} orientations are not a multiple of the batch size {batch:,}: Leopard-EM gives "
        "wrong poses in the last batch if it searches several defocus values; choose a batch size "
        "that divides the number of orientations"
    )


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
