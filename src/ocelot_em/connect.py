"""Talking to a Dask scheduler, in bounded time."""

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from ocelot_em.errors import OcelotError, PlanError

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
