"""Calls in several threads, in order, with a bounded number in flight."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from ocelot_em.model.control_groups import n_cpus

Item = TypeVar("Item")
Result = TypeVar("Result")

_MAX_THREADS = 8
"""Default maximum number of threads; more do not read a disk faster."""

_CALLS_PER_THREAD = 4
"""Maximum number of calls in flight per thread: running, waiting, or waiting to be consumed."""


def map_in_threads(
    function: Callable[[Item], Result], items: Iterable[Item], n_threads: int | None = None
) -> Iterator[Result]:
    """Apply a function to each item in threads; yield the results in the order of the items.

    Items are taken from the iterable as threads become free, so that there may be millions. The
    threads end with the iteration: at its end, at an error, or if it is abandoned; calls that have
    not started are then cancelled.

    There is one thread per processor by default, up to 8. The first error of a call, in the order
    of the items, is raised.

    Examples
    --------
    >>> list(map_in_threads(abs, [-2, 1, -3]))
    [2, 1, 3]
    """
    n_threads = n_threads or min(n_cpus(), _MAX_THREADS)
    with ThreadPoolExecutor(n_threads, "ocelot-map") as pool:
        in_flight: deque[Future[Result]] = deque()
        try:
            for item in items:
                if len(in_flight) == _CALLS_PER_THREAD * n_threads:
                    yield in_flight.popleft().result()
                in_flight.append(pool.submit(function, item))
            while in_flight:
                yield in_flight.popleft().result()
        finally:
            for future in in_flight:
                future.cancel()


def require_threads(n_threads: int) -> None:
    """Raise ``RuntimeError`` unless this process can start this many more threads at once."""
    checked = threading.Event()
    started: list[threading.Thread] = []
    try:
        for _ in range(n_threads):
            thread = threading.Thread(target=checked.wait, name="ocelot-check", daemon=True)
            thread.start()
            started.append(thread)
    finally:
        checked.set()
        for thread in started:
            thread.join()
