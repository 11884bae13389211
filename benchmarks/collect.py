"""What collecting statistics and candidates costs a merge: the same merges with and without.

``python -m benchmarks.collect [--quick] [--data FOLDER] [--repeats N]``. Four partials of 8192 x
8192 pixels, 2 threads, page cache warm. In wall time: the median over all rounds of the ratio of
one to the other; and in processor time of the program itself (not of the system for it): the
steadier figure where others use the machine, too.
"""

import contextlib
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from unittest import mock

from benchmarks import common
from benchmarks.common import Run
from benchmarks.merge import CASES, N_PARTIALS, N_WORKERS, merge_once
from ocelot_em.merge.outcome import MergeReport
from ocelot_em.merge.stats import records, summary
from ocelot_em.run.executors import ThreadExecutor


@contextlib.contextmanager
def nothing_collected() -> Iterator[None]:
    with (
        mock.patch.object(records, "new_tile_statistics", return_value=None),
        mock.patch.object(summary, "finish", return_value=None),
    ):
        yield


class Merges:
    """All merges of one way, in turn with those of the other.

    Parameters
    ----------
    once
        Merges.
    patch
        In which to do so.
    """

    def __init__(
        self,
        once: Callable[[], MergeReport],
        patch: Callable[[], contextlib.AbstractContextManager[None]],
    ) -> None:
        self._once, self._patch = once, patch
        self._user_seconds: list[float] = []

    def __call__(self) -> Run:
        before = os.times().user
        with self._patch():
            report = self._once()
        self._user_seconds.append(os.times().user - before)
        return Run(report.seconds)

    @property
    def user_seconds(self) -> float:
        """Median of the processor time of all threads together; the first was to warm up."""
        return statistics.median(self._user_seconds[1:])


def main() -> None:
    asked = common.arguments(__doc__).parse_args()
    side, repeats = (256, 1) if asked.quick else (8192, asked.repeats)
    asked.data.mkdir(parents=True, exist_ok=True)
    print(common.machine())
    rows = []
    for case, (form, options) in CASES.items():
        search = common.search_of(side, N_PARTIALS, form, folder=asked.data)
        with (
            tempfile.TemporaryDirectory(prefix="ocelot-bench-", dir=asked.data) as name,
            common.full_memory(asked.data, quick=asked.quick) as fill,
        ):
            once = partial(merge_once, search, Path(name), ThreadExecutor(N_WORKERS), options)

            def before(fill: Callable[[], None] = fill, search: Path = search) -> None:
                fill()
                common.warm(search)

            collecting = Merges(once, contextlib.nullcontext)
            without = Merges(once, nothing_collected)
            ways = {"with": collecting, "without": without}
            measured = common.in_turn(ways, repeats, before=before)
        one, other = measured["with"], measured["without"]
        ratios = [a / b for a, b in zip(one.seconds, other.seconds, strict=True)]
        rows.append(
            (
                case,
                f"{one.median:.2f} ({one.spread})",
                f"{other.median:.2f} ({other.spread})",
                f"{statistics.median(ratios) - 1:+.1%}",
                f"{collecting.user_seconds:.2f}",
                f"{without.user_seconds:.2f}",
                f"{collecting.user_seconds / without.user_seconds - 1:+.1%}",
            )
        )
    print(f"\n{N_PARTIALS} partials x {side}^2, medians of {repeats}, seconds\n")
    header = ("poses", "with statistics", "without", "cost", "CPU with", "CPU without", "CPU cost")
    common.table(header, rows)


if __name__ == "__main__":
    main()
