"""Events of the tiles of a cluster: workers send them while a task runs, in a topic of Dask."""

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from ocelot_em.merge.outcome import ACTIVITIES, SUMMARY_FIELDS, Outcome, TileSummary
from ocelot_em.merge.warm_up import CompileLog

SEND_SECONDS = 0.3
"""Minimum interval between events of a task."""

Event = dict[str, Any]
"""What a worker sends: the number of its task, and merged tiles or the state of compilation."""


def topic_of(run_id: str) -> str:
    """Return the topic of a run."""
    return f"ocelot-{run_id[:12]}"


class TileEvents(CompileLog):
    """Sends the events of one task from its worker; a task that is run elsewhere sends none.

    Parameters
    ----------
    run_id, number
        Run and number of the task.
    """

    def __init__(self, run_id: str, number: int) -> None:
        from distributed import get_worker
        from distributed.metrics import context_meter

        self._meter = context_meter
        self._topic, self._number = topic_of(run_id), number
        self._send_to: Callable[[str, Event], None] | None = None
        with suppress(ValueError):  # not on a worker
            self._send_to = get_worker().log_event
        self._tiles: list[list[float]] = []
        self._where, self._next = "", time.perf_counter() + SEND_SECONDS

    def compiling(self) -> None:
        """Send that kernels are compiled."""
        super().compiling()
        self._send({"compiling": True})

    def compiled(self, seconds: float) -> None:
        """Send that kernels are compiled, and how long it took."""
        super().compiled(seconds)
        self._send({"compiled": seconds})

    def tile_ended(self, outcome: Outcome) -> None:
        """Send a merged tile, together with others that end soon before."""
        if outcome.summary is None:
            return  # the task decides whether it failed
        for phase in ACTIVITIES:  # for Dask's page of fine performance metrics
            self._meter.digest_metric(phase, outcome.summary.seconds[phase], "seconds")
        values = [float(getattr(outcome.summary, name)) for name in SUMMARY_FIELDS]
        self._tiles.append([outcome.iy, outcome.ix, *values])
        self._where = outcome.where
        if time.perf_counter() >= self._next:
            self._next = time.perf_counter() + SEND_SECONDS
            self._send({"tiles": self._tiles, "where": self._where})
            self._tiles = []

    def _send(self, event: Event) -> None:
        if self._send_to is not None:
            self._send_to(self._topic, {"task": self._number, **event})


def outcomes_of(event: Event) -> list[Outcome]:
    """Return the merged tiles of an event."""
    return [
        Outcome(int(iy), int(ix), TileSummary(*values), where=event["where"], is_early=True)
        for iy, ix, *values in event.get("tiles", ())
    ]
