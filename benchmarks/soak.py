"""Merges that are disturbed at random, for some minutes: what survives, what is done twice.

``python -m benchmarks.soak [--minutes M] [--seed S] [--data FOLDER]``. A Dask scheduler and workers
as processes of their own; one after another, merges of thousands of small tiles. Meanwhile workers
are killed, stopped for a while, asked to leave and started; drivers are killed, or told to stop;
now and then the scheduler is killed. A merge that ended early is started again, until it is
complete; then its bytes are compared with those of one that nothing disturbed.
"""

import collections
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import ocelot_em
from benchmarks import common
from ocelot_em.testing.simulation import Simulation, simulate

SIDE = 1600
TILE = 32
N_PARTIALS = 3
N_WORKERS = 3

PAUSE_SECONDS = 0.5, 4.0
"""Between two disturbances, at least and at most."""

LOOK_SECONDS = 0.2
"""Between two looks at the done-marks."""

EXPECTED_CODES = 0, 75, -signal.SIGKILL
"""Of drivers: done; stopped, or without a cluster; killed."""

ENVIRONMENT = {
    "DASK_DISTRIBUTED__COMM__TIMEOUTS__TCP": "15s",
    "DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "15s",
    "DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL": "30s",
    "DASK_LOGGING__DISTRIBUTED": "critical",
}


class Cluster:
    """A scheduler, and workers that come and go."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._n_schedulers = 0
        self.workers: list[subprocess.Popen[bytes]] = []
        self.start_scheduler()

    def start_scheduler(self) -> None:
        self._n_schedulers += 1
        self.file = self._folder / f"scheduler-{self._n_schedulers}.json"
        self.scheduler = self._start("scheduler", "--port", "0")
        while not self.file.exists():
            time.sleep(0.05)
        self.address = json.loads(self.file.read_text())["address"]

    def start_worker(self) -> None:
        self.workers.append(
            self._start("worker", "--no-nanny", "--nthreads", "1", "--death-timeout", "20")
        )

    def fill(self) -> None:
        """Have as many workers as there should be."""
        self.workers = [worker for worker in self.workers if worker.poll() is None]
        while len(self.workers) < N_WORKERS:
            self.start_worker()

    def _start(self, *command: str) -> "subprocess.Popen[bytes]":
        shared = ["--scheduler-file", str(self.file), "--interface", "lo"]
        shared += ["--dashboard-address", "127.0.0.1:0"]
        return subprocess.Popen(
            [str(Path(sys.executable).parent / "dask"), *command, *shared],
            env={**os.environ, **ENVIRONMENT},
            cwd=self._folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def close(self) -> None:
        for process in (*self.workers, self.scheduler):
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()


class Soak:
    """Disturbs merges, and counts.

    Parameters
    ----------
    folder
        For everything.
    choices
        Decides.
    side
        Pixels of the maps, in each direction.
    """

    def __init__(self, folder: Path, choices: random.Random, side: int) -> None:
        self._folder, self._choices = folder, choices
        self._tiles_of_a_run = (side // TILE) ** 2
        self.faults: collections.Counter[str] = collections.Counter()
        self.exits: collections.Counter[str] = collections.Counter()
        self.n_runs = self.n_tiles = self.n_again = self.n_failed = 0
        self.n_differing = self.n_orphans = 0
        simulation = Simulation((side, side), n_partials=N_PARTIALS, n_particles=20, seed=1)
        self._search = simulate(folder, simulation, n_threads=2)
        ocelot_em.merge(self._search, folder / "EXPECTED.zarr", tile_size=TILE)
        self._expected = bytes_of(folder / "EXPECTED.zarr")

    def run_for(self, seconds: float) -> None:
        """Merge again and again; the last one is finished, too."""
        cluster = Cluster(self._folder)
        end = time.monotonic() + seconds
        try:
            while self.n_runs == 0 or time.monotonic() < end:
                self._one(cluster, end)
        finally:
            cluster.close()

    def _one(self, cluster: Cluster, end: float) -> None:
        """One merge, started as often as it needs."""
        output, log = self._folder / "OUT.zarr", self._folder / "log.jsonl"
        log.unlink(missing_ok=True)
        marks = Marks(output)
        marks.start()
        while True:
            if cluster.scheduler.poll() is not None:
                cluster.start_scheduler()
            cluster.fill()
            code = self._drive(cluster, output, log, disturb=time.monotonic() < end)
            self.exits[str(code)] += 1
            if code == 0:
                break
        self.n_runs += 1
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        tiles = [line for line in lines if line["event"] == "tile"]
        merged = [line for line in tiles if line["state"] == "merged"]
        self.n_again += marks.end()
        self.n_failed += len(tiles) - len(merged)
        self.n_tiles += self._tiles_of_a_run
        found = bytes_of(output)
        self.n_differing += sum(
            found.get(name) != content for name, content in self._expected.items()
        ) + len(found.keys() - self._expected.keys())
        self.n_orphans += len([*output.rglob("*#*"), *output.glob("lock/*")])
        shutil.rmtree(output)

    def _drive(self, cluster: Cluster, output: Path, log: Path, *, disturb: bool) -> int:
        command = [sys.executable, "-m", "ocelot_em", "merge", str(self._search)]
        command += ["--output", str(output), "--tile-size", str(TILE), "--log", str(log)]
        command += ["--cluster", cluster.address, "--worker-timeout", "60"]
        with (self._folder / "driver.log").open("w") as told:
            driver = subprocess.Popen(command, stdout=told, stderr=told)
        while driver.poll() is None:
            try:
                driver.wait(self._choices.uniform(*PAUSE_SECONDS))
            except subprocess.TimeoutExpired:
                if disturb:
                    self._disturb(cluster, driver)
                cluster.fill()
        if driver.returncode not in EXPECTED_CODES:
            print((self._folder / "driver.log").read_text()[-3000:], flush=True)
        return driver.returncode

    def _disturb(self, cluster: Cluster, driver: "subprocess.Popen[bytes]") -> None:
        faults = {
            "worker killed": 8,
            "worker asked to leave": 4,
            "worker added": 3,
            "worker frozen for 3 s": 3,
            "driver killed": 2,
            "driver told to stop": 2,
            "scheduler killed": 1,
        }
        (fault,) = self._choices.choices([*faults], [*faults.values()])
        worker = self._choices.choice(cluster.workers)
        self.faults[fault] += 1
        if fault == "worker killed":
            worker.kill()
        elif fault == "worker asked to leave":
            worker.terminate()
        elif fault == "worker added":
            cluster.start_worker()
        elif fault == "worker frozen for 3 s":
            worker.send_signal(signal.SIGSTOP)
            time.sleep(3)
            worker.send_signal(signal.SIGCONT)
        elif fault == "driver killed":
            driver.kill()
        elif fault == "driver told to stop":
            driver.terminate()
        else:
            cluster.scheduler.kill()


class Marks(threading.Thread):
    """Watches the done-marks of tiles: one that is written anew is of a tile merged again."""

    def __init__(self, output: Path) -> None:
        super().__init__(daemon=True)
        self._folder = output / "progress" / "tile_summary" / "c"
        self._seen: dict[str, int] = {}
        self._over = threading.Event()
        self.n_again = 0

    def run(self) -> None:
        while not self._over.wait(LOOK_SECONDS):
            self._look()

    def _look(self) -> None:
        with contextlib.suppress(OSError):  # what is there now may be gone then
            for mark in self._folder.glob("*/*/[0-9]"):
                number = mark.stat().st_ino
                self.n_again += self._seen.get(str(mark), number) != number
                self._seen[str(mark)] = number

    def end(self) -> int:
        """Tiles that were merged again."""
        self._over.set()
        self.join()
        self._look()
        return self.n_again


def bytes_of(store: Path) -> dict[str, bytes]:
    """Every chunk of a result's maps and statistics; records and manifests name the result."""
    return {
        str(path.relative_to(store)): path.read_bytes()
        for path in sorted(store.rglob("c/*"))
        for path in ([path] if path.is_file() else sorted(path.rglob("*")))
        if path.is_file() and not {"progress", "manifest"} & {*path.parts}
    }


@contextlib.contextmanager
def folder_in(place: Path) -> Iterator[Path]:
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="ocelot-soak-", dir=place) as name:
        yield Path(name)


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    print(common.machine())
    with folder_in(asked.data) as folder:
        soak = Soak(folder, random.Random(asked.seed), 256 if asked.quick else SIDE)
        soak.run_for(1 if asked.quick else asked.minutes * 60)
    rows = [
        ("faults", f"{sum(soak.faults.values())}"),
        *((f"  {fault}", f"{count}") for fault, count in sorted(soak.faults.items())),
        ("merges that became complete", f"{soak.n_runs}"),
        ("commands that they took", f"{sum(soak.exits.values())}"),
        *((f"  ended with {code}", f"{count}") for code, count in sorted(soak.exits.items())),
        ("tiles", f"{soak.n_tiles}"),
        ("tiles that were merged again", f"{soak.n_again} ({soak.n_again / soak.n_tiles:.2%})"),
        ("tiles that failed, and were tried again", f"{soak.n_failed}"),
        ("files that differ", f"{soak.n_differing}"),
        ("files left over", f"{soak.n_orphans}"),
    ]
    print()
    common.table(("", ""), rows)
    sys.exit(soak.n_differing + soak.n_orphans > 0)


if __name__ == "__main__":
    main()
