"""Prometheus metrics of a run, served with those of Dask's scheduler at ``/metrics``."""

import importlib.util
import logging
import time
from collections import defaultdict
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from ocelot_em.merge.outcome import Outcome

log = logging.getLogger(__name__)

COUNTERS = {
    "ocelot_tiles": ("state", "Tiles that were merged or failed."),
    "ocelot_bytes": ("kind", "Bytes read and written as stored, and decoded."),
    "ocelot_seconds": (
        "phase",
        "Seconds that workers spent on tiles; waited is included in the others.",
    ),
}
"""Label and description of each counter; counters start with the run."""

UPDATE_SECONDS = 2.0
"""Interval between updates of the scheduler."""

Increments = dict[tuple[str, str], float]
"""Increments by counter and label value."""


class Metrics:
    """Counts outcomes of tiles; ``call`` adds the counts in the scheduler's process."""

    def __init__(self, run_id: str, call: Callable[..., object]) -> None:
        self._run_id, self._call = run_id, call
        self._pending: defaultdict[tuple[str, str], float] = defaultdict(float)
        self._next = float("-inf")

    def count(self, outcome: Outcome) -> None:
        """Count a tile."""
        tile, pending = outcome.summary, self._pending
        pending["ocelot_tiles", "failed" if tile is None else "merged"] += 1
        if tile is None:
            return
        for phase, seconds in tile.seconds.items():
            pending["ocelot_seconds", phase] += seconds
        for kind, nbytes in tile.nbytes.items():
            pending["ocelot_bytes", kind] += nbytes

    def publish(self, *, force: bool = False) -> None:
        """Send the increments since the last update, at most every ``UPDATE_SECONDS``."""
        if not self._pending or (not force and time.monotonic() < self._next):
            return
        increments: Increments = dict(self._pending)
        self._pending.clear()
        self._next = time.monotonic() + UPDATE_SECONDS
        try:
            self._call(add, self._run_id, increments)
        except Exception as error:
            # Failing metrics must not end a run; the scheduler may lack this package.
            log.info("metrics cannot be published: %r", error)
            self._next = float("inf")


def add(run_id: str, increments: Increments) -> None:
    """Increment this process's counters; without prometheus-client, do nothing."""
    if importlib.util.find_spec("prometheus_client") is None:
        return
    for (name, label), value in increments.items():
        _counter(name).labels(run_id, label).inc(value)


@lru_cache
def _counter(name: str) -> Any:
    from prometheus_client import Counter as PrometheusCounter

    label, meaning = COUNTERS[name]
    return PrometheusCounter(name, meaning, ("run", label))
