"""Connections to a Dask scheduler, with timeouts."""

import asyncio
import contextlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

from ocelot_em.errors import ClusterLostError, OcelotError, PlanError
from ocelot_em.model.text import count_text

log = logging.getLogger(__name__)

CONNECT_SECONDS = 15.0
"""Timeout for a scheduler to respond."""

RESPONSE_SECONDS = 30.0
"""Timeout for workers to answer a query."""

_T = TypeVar("_T")


_lent: ContextVar[Any] = ContextVar("lent", default=None)
"""Client of the caller, which is used for its scheduler instead of a new one."""


@contextlib.contextmanager
def address_of(cluster: Any) -> Iterator[Any]:
    """Yield the address of a Dask client or cluster, and use it meanwhile; anything else as it is.

    A client stays open. The workers of a cluster stay, too.
    """
    if not hasattr(cluster, "dashboard_link"):
        yield cluster
        return
    from distributed import Client

    with contextlib.ExitStack() as stack:
        client = cluster
        if not isinstance(cluster, Client):
            client = stack.enter_context(Client(cluster, set_as_default=False))
        if client.asynchronous or client.status != "running":
            raise PlanError(
                f"cluster: expected a client that is synchronous and connected, got {client}; "
                "pass the address of its scheduler, or Client(...) without asynchronous=True"
            )
        stack.callback(_lent.reset, _lent.set(client))
        yield client.scheduler.address


def warn_if_unused() -> None:
    """Warn that a client of Dask is active, but not used by a merge in threads."""
    if "distributed" not in sys.modules:
        return
    from distributed import Client

    with contextlib.suppress(ValueError):  # there is none
        client = Client.current()
        if client.status == "running":
            log.warning(
                "merging in threads of this process; the active Dask client of %s, with %s, is not "
                "used: pass cluster=client to use it, or cluster='threads' to silence this warning",
                client.scheduler.address,
                count_text(len(client.nthreads()), "worker"),
            )


@contextlib.contextmanager
def connect_client(address: str) -> Iterator[Any]:
    """Connect to a running scheduler; raise a PlanError if it does not respond."""
    from distributed import Client

    lent = _lent.get()
    if lent is not None and lent.scheduler is not None and lent.scheduler.address == address:
        yield lent
        return
    try:
        # Not in this thread, which may run an event loop.
        call_with_timeout(CONNECT_SECONDS + 5, lambda: asyncio.run(_require_scheduler(address)))
        client = Client(address, timeout=CONNECT_SECONDS)
    except OcelotError:  # such as one raised by a signal handler
        raise
    except Exception as error:
        raise PlanError(
            f"cluster: no Dask scheduler responds at {address}: {type(error).__name__}: {error}; "
            "start one with 'dask scheduler', or use --cluster local"
        ) from error
    with client:
        yield client


@contextlib.contextmanager
def keep_connected(address: str) -> Iterator[None]:
    """Keep an idle client connected, to show the scheduler that this process is alive."""
    from distributed import Client

    try:
        client = Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, TimeoutError) as error:
        raise ClusterLostError(
            f"the connection to the Dask scheduler at {address} was lost: {error}"
        ) from error
    with contextlib.closing(client):
        yield


def close_without_clients(first_seconds: float, seconds: float) -> Any:
    """Return a plugin that closes a scheduler without clients, and so its workers.

    ``first_seconds`` is the timeout for the first client, ``seconds`` that without clients later.
    """
    from distributed import Scheduler
    from distributed.diagnostics.plugin import SchedulerPlugin

    class ClosesWithoutClients(SchedulerPlugin):  # type: ignore[misc]
        def __init__(self) -> None:
            self._clients: set[str] = set()

        async def start(self, scheduler: Scheduler) -> None:
            self._watching = asyncio.create_task(self._watch(scheduler))

        def add_client(self, scheduler: Scheduler, client: str) -> None:  # noqa: ARG002
            self._clients.add(client)

        def remove_client(self, scheduler: Scheduler, client: str) -> None:  # noqa: ARG002
            self._clients.discard(client)

        async def _watch(self, scheduler: Scheduler) -> None:
            deadline = time.monotonic() + first_seconds
            while time.monotonic() < deadline:
                await asyncio.sleep(min(seconds / 4, 1))
                if self._clients:
                    deadline = time.monotonic() + seconds
            log.error("the driver has ended without notice: scheduler and workers exit")
            await scheduler.close(reason="the driver has ended")

    return ClosesWithoutClients()


async def _require_scheduler(address: str) -> None:
    """Raise unless a scheduler responds: Dask's client waits forever for one that does not."""
    from distributed.comm import connect
    from distributed.security import Security

    about = Security().get_connection_args("client")
    comm = await asyncio.wait_for(connect(address, CONNECT_SECONDS, **about), CONNECT_SECONDS)
    await comm.close()


def wait_for_file(path: Path, seconds: float, problem: str) -> None:
    """Wait for a file that another process writes; raise a PlanError after a timeout."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > deadline:
            raise PlanError(problem)
        time.sleep(0.2)


def call_with_timeout(seconds: float, action: Callable[[], _T]) -> _T:
    """Call ``action`` in a thread, which is abandoned after a timeout; raise what it raises."""
    outcome = Future[_T]()

    def run() -> None:
        try:
            outcome.set_result(action())
        except Exception as error:
            outcome.set_exception(error)

    threading.Thread(target=run, name="ocelot-timeout", daemon=True).start()
    if wait([outcome], seconds).not_done:
        raise TimeoutError(f"no response within {seconds:g} s")
    return outcome.result()
