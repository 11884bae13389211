"""What collecting statistics and candidates costs a merge: the same merges with and without.

``python -m benchmarks.collect [--quick] [--data FOLDER] [--repeats N]``. Four partials of 8192 x
8192 pixels, 2 threads, page cache warm.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from unittest import mock

from benchmarks import common
from benchmarks.common import Run
from benchmarks.merge import CASES, N_PARTIALS, N_WORKERS, merge_once
from ocelot_em.execute import ThreadExecutor


@contextlib.contextmanager
def nothing_collected() -> Iterator[None]:
    with (
        mock.patch("ocelot_em.pipeline.records.new_collection", return_value=None),
        mock.patch("ocelot_em.pipeline.records.finish", return_value=None),
    ):
        yield


def main() -> None:
    asked = common.arguments(__doc__).parse_args()
    side, repeats = (2048, 1) if asked.quick else (8192, asked.repeats)
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

            def with_statistics(once: Callable[[], object] = once) -> Run:
                return Run(once().seconds)  # type: ignore[attr-defined]

            def without(once: Callable[[], object] = once) -> Run:
                with nothing_collected():
                    return Run(once().seconds)  # type: ignore[attr-defined]

            def before(fill: Callable[[], None] = fill, search: Path = search) -> None:
                fill()
                common.warm(search)

            ways = {"with": with_statistics, "without": without}
            measured = common.in_turn(ways, repeats, before=before)
        one, other = measured["with"], measured["without"]
        rows.append(
            (
                case,
                f"{one.median:.2f} ({one.spread})",
                f"{other.median:.2f} ({other.spread})",
                f"{one.median / other.median - 1:+.1%}",
            )
        )
    print(f"\n{N_PARTIALS} partials x {side}^2, medians of {repeats}\n")
    common.table(("poses", "with statistics", "without", "cost"), rows)


if __name__ == "__main__":
    main()
