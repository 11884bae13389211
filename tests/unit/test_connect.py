"""Schedulers that end when nobody needs them, and drivers that show that they live."""

import asyncio
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from distributed import Client, Scheduler, default_client

from ocelot_em.errors import ClusterLostError
from ocelot_em.run import connect
from ocelot_em.run.connect import close_without_clients, keep_connected

HANGING_SECONDS = 60
"""Nothing here takes long: whoever waits so long waits in vain."""

FIRST_SECONDS, SECONDS = 600.0, 20.0


class Clock:
    """The clock by which schedulers wait, which stands still until it is told to run."""

    def __init__(self) -> None:
        self.now, self.runs = 1000.0, False

    def monotonic(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        if self.runs:
            self.now += seconds
        await asyncio.sleep(0.001)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(connect, "time", clock)
    waiting = SimpleNamespace(**vars(asyncio) | {"sleep": clock.sleep})
    monkeypatch.setattr(connect, "asyncio", waiting)
    return clock


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(HANGING_SECONDS):
        while not condition():
            await asyncio.sleep(0.001)


def scheduler() -> tuple[Scheduler, Any]:
    plugin = close_without_clients(FIRST_SECONDS, SECONDS)
    free = {"port": 0, "dashboard_address": "127.0.0.1:0"}
    return Scheduler(host="127.0.0.1", dashboard=False, plugins=[plugin], **free), plugin


async def goes_on_and_ends(own: Scheduler, clock: Clock, leave: Callable[[], Any]) -> None:
    """See that a scheduler goes on while it has a client, and ends when that leaves."""
    clock.runs = True
    connected_until = clock.now + 2 * FIRST_SECONDS
    await until(lambda: clock.now > connected_until)
    assert own.status.name == "running"
    clock.runs = False
    await leave()
    left = clock.now
    clock.runs = True
    await asyncio.wait_for(own.finished(), HANGING_SECONDS)
    assert clock.now - left < 2 * SECONDS


def test_a_scheduler_goes_on_while_it_has_a_client_and_ends_soon_after(clock: Clock) -> None:
    async def live() -> None:
        made, plugin = scheduler()
        async with made as own:
            client = await Client(own.address, asynchronous=True)
            await until(lambda: bool(plugin._clients))

            async def leave() -> None:
                await client.close()
                await until(lambda: not plugin._clients)

            await goes_on_and_ends(own, clock, leave)

    asyncio.run(live())


def test_a_scheduler_to_which_no_client_comes_ends(clock: Clock) -> None:
    async def live() -> None:
        made, _ = scheduler()
        async with made as own:
            clock.runs = True
            before = clock.now
            await asyncio.wait_for(own.finished(), HANGING_SECONDS)
            assert FIRST_SECONDS <= clock.now - before < FIRST_SECONDS + SECONDS

    asyncio.run(live())


def test_staying_connected_keeps_a_scheduler_and_is_nobodys_default(clock: Clock) -> None:
    async def live() -> None:
        made, plugin = scheduler()
        async with made as own:
            stay = threading.Event()

            def drive() -> None:
                with keep_connected(own.address):
                    with pytest.raises(ValueError, match="No client"):
                        default_client()
                    assert stay.wait(HANGING_SECONDS)

            driving = asyncio.create_task(asyncio.to_thread(drive))
            await until(lambda: bool(plugin._clients) or driving.done())

            async def leave() -> None:
                stay.set()
                await driving
                await until(lambda: not plugin._clients)

            await goes_on_and_ends(own, clock, leave)

    asyncio.run(live())


def test_a_scheduler_that_is_gone_is_named(monkeypatch) -> None:
    monkeypatch.setattr("ocelot_em.run.connect.CONNECT_SECONDS", 0.2)
    with (
        pytest.raises(ClusterLostError, match=r"scheduler at tcp://127\.0\.0\.1:9 was lost"),
        keep_connected("tcp://127.0.0.1:9"),
    ):
        pass
