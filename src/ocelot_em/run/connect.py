"""Talking to a Dask scheduler, in bounded time."""

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from ocelot_em.errors import ClusterLostError, OcelotError, PlanError

log = logging.getLogger(__name__)

CONNECT_SECONDS = 15.0
"""For a scheduler to answer."""

ANSWER_SECONDS = 30.0
"""For workers to answer a question."""

_T = TypeVar("_T")


@contextlib.contextmanager
def client_of(address: str) -> Iterator[Any]:
    """Connect to a running scheduler.

    Yields
    ------
    distributed.Client

    Raises
    ------
    PlanError
        None answers.
    """
    from distributed import Client

    try:
        # Not in this thread, in which there may be an event loop.
        within(CONNECT_SECONDS + 5, lambda: asyncio.run(_greet(address)))
        client = Client(address, timeout=CONNECT_SECONDS)
    except OcelotError:  # such as that of a signal that came meanwhile
        raise
    except Exception as error:
        raise PlanError(
            f"cluster: no Dask scheduler answers at {address}: {type(error).__name__}: {error}; "
            "start one with 'dask scheduler', or use --cluster local"
        ) from error
    with client:
        yield client


@contextlib.contextmanager
def staying_connected(address: str) -> Iterator[None]:
    """Be a client of a scheduler that does nothing but show that this process lives.

    Raises
    ------
    ClusterLostError
        None answers.
    """
    from distributed import Client

    try:
        client = Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, TimeoutError) as error:
        raise ClusterLostError(f"the Dask scheduler at {address} is gone: {error}") from error
    try:
        yield
    finally:
        client.close()


def closing_without_clients(first_seconds: float, seconds: float) -> Any:
    """Make a plugin that closes a scheduler, and so its workers, that nobody needs any more.

    Parameters
    ----------
    first_seconds
        For a client to come.
    seconds
        The scheduler goes on without clients, once there were some.

    Returns
    -------
    distributed.diagnostics.plugin.SchedulerPlugin
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
            log.error("the driver is gone: the scheduler and its workers end")
            await scheduler.close(reason="the driver is gone")

    return ClosesWithoutClients()


async def _greet(address: str) -> None:
    """See whether a scheduler answers: Dask's client waits for ever for one that says nothing."""
    from distributed.comm import connect
    from distributed.security import Security

    about = Security().get_connection_args("client")
    comm = await asyncio.wait_for(connect(address, CONNECT_SECONDS, **about), CONNECT_SECONDS)
    await comm.close()


def within(seconds: float, action: Callable[[], _T]) -> _T:
    """Do something in a thread, which is left to itself when it does not come back.

    Raises
    ------
    TimeoutError
        It did not come back in time; or whatever it raises.
    """
    done: queue.SimpleQueue[tuple[_T] | Exception] = queue.SimpleQueue()

    def run() -> None:
        try:
            done.put((action(),))
        except Exception as error:
            done.put(error)

    threading.Thread(target=run, name="ocelot-within", daemon=True).start()
    try:
        outcome = done.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer in {seconds:g} s") from None
    if isinstance(outcome, Exception):
        raise outcome
    return outcome[0]
