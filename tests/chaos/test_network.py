"""Hosts of a cluster that are cut off: namespaces on a bridge, with one disk that all see."""

import json
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from chaos_common import (
    Gate,
    Undisturbed,
    do,
    end,
    merge_command,
    require,
    start,
    tiles_done,
    undisturbed,
    wait_for,
)

pytestmark = pytest.mark.chaos

HOSTS = {"driver": 1, "scheduler": 2, "a": 3, "b": 4}
"""Names, and the last number of their addresses."""

TIMEOUTS = {
    "DASK_DISTRIBUTED__COMM__TIMEOUTS__TCP": "15s",
    "DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "15s",
    "DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL": "30s",
}

AWAY_SECONDS = 20
"""Longer than connections wait for an answer."""


@dataclass
class Network:
    """Hosts of which each has one interface, ``eth0``, on one bridge."""

    folder: Path
    gate: Gate
    name: str = field(default_factory=lambda: f"oc{uuid.uuid4().hex[:6]}")
    started: "list[subprocess.Popen[str]]" = field(default_factory=list)

    def make(self) -> None:
        """Make the hosts; skip where that cannot be done."""
        bridge = ["ip", "link", "add", self.name, "type", "bridge"]
        tried = subprocess.run(bridge, capture_output=True, text=True)
        if tried.returncode:
            pytest.skip(f"cannot make networks here: {tried.stderr.strip()}")
        do("ip", "link", "set", self.name, "up")
        for host, number in HOSTS.items():
            space, cable = self._space(host), f"{self.name}v{number}"
            do("ip", "netns", "add", space)
            do("ip", "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", space)
            do("ip", "link", "set", cable, "master", self.name, "up")
            do("ip", "-n", space, "link", "set", "lo", "up")
            do("ip", "-n", space, "addr", "add", f"{address(host)}/24", "dev", "eth0")
            do("ip", "-n", space, "link", "set", "eth0", "up")

    def remove(self) -> None:
        """End what was started, and take the hosts away."""
        for process in self.started:
            end(process)
        for host in HOSTS:
            subprocess.run(["ip", "netns", "delete", self._space(host)], capture_output=True)
        subprocess.run(["ip", "link", "delete", self.name], capture_output=True)

    def start(self, host: str, *command: str, log: Path | None = None) -> "subprocess.Popen[str]":
        """Start a command on a host."""
        environment = {**TIMEOUTS, **self.gate.environment}
        started = start(["ip", "netns", "exec", self._space(host), *command], environment, log)
        self.started.append(started)
        return started

    def cut(self, host: str) -> None:
        """Take a host's network away."""
        do("ip", "-n", self._space(host), "link", "set", "eth0", "down")

    def mend(self, host: str) -> None:
        """Give it back."""
        do("ip", "-n", self._space(host), "link", "set", "eth0", "up")

    def _space(self, host: str) -> str:
        return f"{self.name}-{host}"


def address(host: str) -> str:
    return f"10.77.0.{HOSTS[host]}"


SCHEDULER = f"tcp://{address('scheduler')}:8786"
DASK = [sys.executable, "-m", "dask"]


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    require("ip")
    return undisturbed(tmp_path_factory.mktemp("network"), 60, 8)


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Network]:
    """Hosts with a scheduler, and two with a worker of one thread each."""
    made = Network(tmp_path, Gate(tmp_path / "gate", 10))
    try:
        made.make()
        here = address("scheduler")
        options = ["--host", here, "--port", "8786", "--no-dashboard"]
        made.start("scheduler", *DASK, "scheduler", *options, log=tmp_path / "scheduler.log")
        for host in ("a", "b"):
            asked = ["--nthreads", "1", "--memory-limit", "0", "--death-timeout", "60"]
            made.start(
                *(host, *DASK, "worker", SCHEDULER, *asked, "--no-dashboard"),
                *("--local-directory", str(tmp_path / host)),
                log=tmp_path / f"{host}.log",
            )
        wait_for(lambda: _registered(tmp_path) >= 2, "two workers")
        yield made
    finally:
        made.remove()


def _registered(folder: Path) -> int:
    return (folder / "scheduler.log").read_text().count("Register worker")


@dataclass
class Run:
    """A merge whose driver is on a host of its own."""

    network: Network
    search: Undisturbed

    @property
    def output(self) -> Path:
        return self.network.folder / "OUT.zarr"

    def start(self) -> None:
        """Start it."""
        log = str(self.network.folder / "log.jsonl")
        command = merge_command(self.search.run, self.output, self.search.tile)
        self.driver = self.network.start("driver", *command, "--cluster", SCHEDULER, "--log", log)

    def under_way(self) -> None:
        self.network.gate.wait_until_reached(self.output, self.driver)

    def ended(self) -> str:
        """Wait for its end; what it printed."""
        printed, _ = self.driver.communicate(timeout=300)
        lines = (self.network.folder / "log.jsonl").read_text().splitlines()
        tiles = [line for line in map(json.loads, lines) if line["event"] == "tile"]
        workers = Counter(line["worker"] for line in tiles)
        print(f"{len(tiles)} tiles: {sorted(workers.values())}")
        return printed

    def finished(self) -> None:
        printed = self.ended()
        assert self.driver.returncode == 0, printed
        self.search.assert_finished(self.output)


@pytest.fixture
def run(network: Network, search: Undisturbed) -> Run:
    return Run(network, search)


def test_hosts_that_stay(run: Run, network: Network) -> None:
    network.gate.open()
    run.start()
    run.finished()


def test_a_host_that_is_away_for_a_while_costs_time_only(run: Run, network: Network) -> None:
    run.start()
    run.under_way()
    network.cut("a")
    time.sleep(AWAY_SECONDS)
    network.mend("a")
    network.gate.open()
    run.finished()


def test_the_work_of_a_host_that_stays_away_is_done_by_others(run: Run, network: Network) -> None:
    run.start()
    run.under_way()
    network.cut("a")
    network.gate.open()
    run.finished()


def test_a_driver_that_is_cut_off_ends_and_goes_on_later(run: Run, network: Network) -> None:
    run.start()
    run.under_way()
    network.cut("driver")
    printed = run.ended()
    assert run.driver.returncode == 75, printed
    assert "the connection to the Dask scheduler was lost" in printed
    assert "run the same command again" in printed
    assert "Traceback" not in printed
    assert list(run.output.glob("lock/*")) == []
    assert tiles_done(run.output) == network.gate.n_tiles
    network.mend("driver")
    network.gate.open()
    run.start()
    run.finished()
