"""Schedulers that end when nobody needs them, and drivers that show that they live."""

import asyncio
import threading

import pytest
from distributed import Client, Scheduler, default_client

from ocelot_em.connect import closing_without_clients, staying_connected
from ocelot_em.errors import ClusterLostError


def scheduler(first_seconds: float, seconds: float) -> Scheduler:
    plugin = closing_without_clients(first_seconds, seconds)
    return Scheduler(host="127.0.0.1", port=0, dashboard=False, plugins=[plugin])


def test_a_scheduler_goes_on_while_it_has_a_client_and_ends_soon_after() -> None:
    async def live() -> None:
        async with scheduler(30, 0.4) as own:
            async with Client(own.address, asynchronous=True):
                await asyncio.sleep(1.5)
                assert own.status.name == "running"
            await asyncio.wait_for(own.finished(), 10)

    asyncio.run(live())


def test_a_scheduler_to_which_no_client_comes_ends() -> None:
    async def live() -> None:
        async with scheduler(0.4, 0.4) as own:
            await asyncio.wait_for(own.finished(), 10)

    asyncio.run(live())


def test_staying_connected_keeps_a_scheduler_and_is_nobodys_default() -> None:
    async def live() -> None:
        async with scheduler(30, 0.4) as own:
            stay = threading.Event()

            def drive() -> None:
                with staying_connected(own.address):
                    with pytest.raises(ValueError, match="No client"):
                        default_client()
                    stay.wait(30)

            driving = asyncio.create_task(asyncio.to_thread(drive))
            await asyncio.sleep(1.5)
            assert own.status.name == "running"
            stay.set()
            await driving
            await asyncio.wait_for(own.finished(), 10)

    asyncio.run(live())


def test_a_scheduler_that_is_gone_is_named(monkeypatch) -> None:
    monkeypatch.setattr("ocelot_em.connect.CONNECT_SECONDS", 0.5)
    with (
        pytest.raises(ClusterLostError, match=r"tcp://127\.0\.0\.1:9 is gone"),
        staying_connected("tcp://127.0.0.1:9"),
    ):
        pass
