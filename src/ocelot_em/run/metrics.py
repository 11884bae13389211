"""Metrics of a run in the process of Dask's scheduler: for Prometheus, and for the dashboard."""

import importlib.util
import logging
import time
from collections import defaultdict
from functools import lru_cache
from typing import Any

import numpy as np

from ocelot_em.merge.outcome import Outcome
from ocelot_em.merge.resume import PreparedMerge
from ocelot_em.model.options import MergeOptions
from ocelot_em.run import panel
from ocelot_em.run.clusters import Cluster
from ocelot_em.run.observer import TileProgress

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

GAUGES = {
    "ocelot_planned_tiles": "All tiles of the result.",
    "ocelot_done_tiles": "Tiles that are done, by this run or an earlier one.",
    "ocelot_left_seconds": "Estimated time until all tiles are done.",
}
"""Description of each gauge."""

UPDATE_SECONDS = 1.0
"""Interval between updates of the scheduler."""

Increments = dict[tuple[str, str], float]
"""Increments by counter and label value."""


class Metrics(TileProgress):
    """Counts tiles in the process of a scheduler.

    Parameters
    ----------
    run_id
        Label of the run.
    client
        Client of the scheduler.
    """

    def __init__(self, run_id: str, client: Any) -> None:
        self._run_id, self._client, self._call = run_id, client, client.run_on_scheduler
        self._pending: defaultdict[tuple[str, str], float] = defaultdict(float)
        self._ended: list[tuple[int, int, int]] = []
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._next = float("-inf")
        self._has_panel = False

    def planned(self, ready: PreparedMerge, options: MergeOptions) -> None:
        """Show the run on the dashboard."""
        super().planned(ready, options)
        missing = np.asarray(ready.missing.numbers, np.int64).tobytes()
        try:
            self._has_panel = self._call(panel.install)
            self._call(panel.begin, self._run_id, ready.output, ready.plan.grid.counts, missing)
        except Exception as error:
            log.info("the dashboard has no page of tiles: %r", error)

    def page(self, dashboard: str | None) -> str | None:
        """Return the link to the page of tiles, given that to the dashboard."""
        if dashboard is None or not self._has_panel:
            return dashboard
        return dashboard.removesuffix("status") + panel.PAGE

    def started(self, cluster: Cluster) -> None:
        """Publish the number of tiles."""
        super().started(cluster)
        self._publish()

    def tile_ended(self, outcome: Outcome) -> None:
        """Count a tile."""
        super().tile_ended(outcome)
        tile, pending = outcome.summary, self._pending
        if self._has_panel:
            self._ended.append((outcome.iy, outcome.ix, 3 if tile is None else 2))
        pending["ocelot_tiles", "failed" if tile is None else "merged"] += 1
        if tile is not None:
            for phase, seconds in tile.seconds.items():
                pending["ocelot_seconds", phase] += seconds
                self._seconds[phase] += seconds
            for kind, nbytes in tile.nbytes.items():
                pending["ocelot_bytes", kind] += nbytes
        if time.monotonic() >= self._next:
            self._publish()

    def ending(self) -> None:
        """Publish what is left."""
        self._publish()

    def _publish(self) -> None:
        if self._client.status != "running":  # a call would wait for the connection
            return
        increments: Increments = dict(self._pending)
        self._pending.clear()
        self._next = time.monotonic() + UPDATE_SECONDS
        values: dict[str, float] = {
            "ocelot_planned_tiles": self.n_tiles,
            "ocelot_done_tiles": self.n_done,
        }
        if (left := self.seconds_left) is not None:
            values["ocelot_left_seconds"] = left
        try:
            self._call(add, self._run_id, increments, values)
            if self._has_panel:
                self._call(panel.update, self._run_id, self.text, self._ended, dict(self._seconds))
                self._ended = []
        except Exception as error:
            # Failing metrics must not end a run; the scheduler may lack this package.
            log.info("metrics cannot be published: %r", error)
            self._next, self._has_panel = float("inf"), False


def add(run_id: str, increments: Increments, values: dict[str, float]) -> None:
    """Increment counters and set gauges of this process; without prometheus-client, do nothing."""
    if importlib.util.find_spec("prometheus_client") is None:
        return
    for (name, label), value in increments.items():
        _counter(name).labels(run_id, label).inc(value)
    for name, value in values.items():
        _gauge(name).labels(run_id).set(value)


@lru_cache
def _counter(name: str) -> Any:
    from prometheus_client import Counter as PrometheusCounter

    label, meaning = COUNTERS[name]
    return PrometheusCounter(name, meaning, ("run", label))


@lru_cache
def _gauge(name: str) -> Any:
    from prometheus_client import Gauge

    return Gauge(name, GAUGES[name], ("run",))
