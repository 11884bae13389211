"""Work that is counted, not timed: the same on any machine, however busy it is."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Calls:
    """How many functions were called in this thread, in Python and in C."""

    n = 0

    def __call__(self, _frame: FrameType, event: str, _argument: object) -> None:
        self.n += event in ("call", "c_call")


@contextmanager
def counted_calls() -> Iterator[Calls]:
    """Count what is called meanwhile."""
    calls, before = Calls(), sys.getprofile()
    sys.setprofile(calls)
    try:
        yield calls
    finally:
        sys.setprofile(before)


def calls_of(action: Callable[[], object]) -> int:
    """Return how many functions an action calls."""
    with counted_calls() as calls:
        action()
    return calls.n


def lines_of(action: Callable[[], object]) -> int:
    """Return how many lines of Python an action runs, also within loops that call nothing."""
    n = 0

    def count(_frame: FrameType, event: str, _argument: object) -> Callable[..., object]:
        nonlocal n
        n += event == "line"
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        action()
    finally:
        sys.settrace(before)
    return n


def assert_linear(work: Callable[[int], int], n: int) -> None:
    """Fail if work on n, 2 n and 4 n things grows faster than the things do.

    The second step is twice the first if it is linear, four times if it is quadratic.
    """
    work(n)  # what is imported and cached once
    few, more, many = work(n), work(2 * n), work(4 * n)
    assert many - more < 2.5 * (more - few) + n / 2, (few, more, many)
