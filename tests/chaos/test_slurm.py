"""Merges in the jobs of a real SLURM with two nodes on this machine."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

import slurm_lab
from chaos_common import (
    Gate,
    Undisturbed,
    end,
    is_stopping,
    merge_command,
    start,
    tiles_done,
    undisturbed,
    wait_for,
)
from ocelot_em.run import slurm

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.skipif(bool(slurm_lab.missing()), reason=f"no SLURM: {slurm_lab.missing()}"),
]

ONE_WORKER = "--nodes=1", "--ntasks=3"

JOB_FILE = Path(__file__).parents[2] / "examples" / "slurm" / "merge.sbatch"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[slurm_lab.Slurm]:
    with slurm_lab.slurm(tmp_path_factory.mktemp("slurm")) as made:
        made.environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        yield made


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return undisturbed(tmp_path_factory.mktemp("search"), 60, 8)


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path / "gate", 10)


def through(gate: Gate, lab: slurm_lab.Slurm) -> slurm_lab.Slurm:
    """Submit jobs whose tiles go through a gate."""
    return dataclasses.replace(lab, environment={**lab.environment, **gate.environment})


def submit(
    lab: slurm_lab.Slurm, search: Undisturbed, cwd: Path, *sbatch: str, more: str = ""
) -> str:
    return lab.submit(
        *("--nodes=2", "--ntasks=6", "--ntasks-per-node=3", "--mem-per-cpu=1000M", *sbatch),
        *(str(JOB_FILE), str(search.run), "--output", "OUT.zarr"),
        *("--tile-size", str(search.tile), "--log", "log.jsonl", *more.split()),
        cwd=cwd,
    )


def events(folder: Path, kind: str) -> list[dict[str, object]]:
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["event"] == kind]


def assert_finished(search: Undisturbed, folder: Path) -> None:
    search.assert_finished(folder / "OUT.zarr")
    assert list(folder.glob(".ocelot*")) == []


def printed(folder: Path) -> str:
    return "".join(file.read_text() for file in sorted(folder.glob("ocelot-merge-*[0-9].log")))


def assert_no_worker_was_lost(folder: Path) -> None:
    (log,) = folder.glob("ocelot-merge-*-workers.log")
    assert "Restarting worker" not in log.read_text()


@pytest.mark.parametrize("more", ["", "--tls"])
def test_a_job_of_two_nodes(lab, search: Undisturbed, tmp_path: Path, more: str) -> None:
    gate = Gate(tmp_path / "gate", 0)
    job = submit(through(gate, lab), search, tmp_path, more=more)
    wait_for(lambda: gate.n_held() == 4, "four workers with a tile each")
    gate.open()
    lab.wait(job, "COMPLETED")
    assert_finished(search, tmp_path)
    text = printed(tmp_path)
    assert f"merged {search.n_tiles} tiles" in text
    assert "Traceback" not in text
    assert "dashboard: http://127.0.0.1:" in text
    assert ("is not protected" in text) == (more == "")
    assert ("tls://" in text) == (more == "--tls")
    assert len({line["worker"] for line in events(tmp_path, "tile")}) == 4


def test_at_the_end_of_its_time_a_job_is_queued_again_and_goes_on(
    lab, search: Undisturbed, tmp_path: Path, gate: Gate
) -> None:
    # SLURM looks at times twice a minute: the signal comes up to 30 s early, here after 30 to 60 s.
    job = submit(through(gate, lab), search, tmp_path, *ONE_WORKER, "--signal=USR1@60", "--time=2")

    def is_told() -> bool:
        # On a busy machine it may be told before it listens; then it is queued again, too.
        lab.hurry(job)
        return is_stopping(tmp_path / "OUT.zarr")

    wait_for(is_told, "a run that is told to stop", 500)
    gate.open(pause=0.5)
    lab.wait(job, "PENDING")
    assert "SIGUSR1: stop" in printed(tmp_path)
    done = tiles_done(tmp_path / "OUT.zarr")
    assert done < search.n_tiles
    gate.open()
    lab.call("scontrol", "update", f"JobId={job}", "TimeLimit=10")
    lab.finish(job)
    assert f"{done} of them done before" in printed(tmp_path)
    assert len(events(tmp_path, "tile")) == search.n_tiles  # no tile was done twice
    assert_no_worker_was_lost(tmp_path)
    assert_finished(search, tmp_path)


def test_a_job_that_is_told_before_it_listens_is_queued_again(
    lab, search: Undisturbed, tmp_path: Path
) -> None:
    gate = Gate(tmp_path / "gate", 0)
    job = submit(through(gate, lab), search, tmp_path)
    # Before there are tasks, there is nobody to be told.
    wait_for(lambda: all(processes_of_task(lab, job, n) for n in range(6)), "six tasks")
    lab.call("scancel", "--signal=USR1", job)
    gate.open(pause=1)  # should it listen already, it finds tiles left
    lab.wait(job, "PENDING")
    assert "was stopped: it is requeued" in printed(tmp_path)
    lab.call("scancel", job)


def test_a_cancelled_job_is_not_queued_again(
    lab, search: Undisturbed, tmp_path: Path, gate: Gate
) -> None:
    job = submit(through(gate, lab), search, tmp_path, *ONE_WORKER)
    gate.wait_until_reached(tmp_path / "OUT.zarr")
    lab.call("scancel", job)
    gate.open_for_a_run_that_stops(tmp_path / "OUT.zarr")
    lab.wait(job, "CANCELLED")
    assert "stopping after the running tiles" in printed(tmp_path)
    assert "it is requeued" not in printed(tmp_path)
    assert list(tmp_path.glob("OUT.zarr/lock/*")) == []
    assert tiles_done(tmp_path / "OUT.zarr") < search.n_tiles


def test_a_job_whose_driver_is_killed_ends(
    lab, search: Undisturbed, tmp_path: Path, gate: Gate
) -> None:
    job = submit(through(gate, lab), search, tmp_path, *ONE_WORKER)
    gate.wait_until_reached(tmp_path / "OUT.zarr")
    (driver,) = processes_of_task(lab, job, slurm.DRIVER)
    driver.kill()
    lab.wait(job, "FAILED")
    assert lab.exit_code(job) == "137:0"
    assert list(tmp_path.glob(".ocelot*")) == []
    assert tiles_done(tmp_path / "OUT.zarr") == gate.n_tiles
    lab.wait(submit(lab, search, tmp_path, *ONE_WORKER), "COMPLETED")
    assert_finished(search, tmp_path)


def test_a_preempted_job_makes_room_and_goes_on(
    lab, search: Undisturbed, tmp_path: Path, gate: Gate
) -> None:
    job = submit(through(gate, lab), search, tmp_path, *ONE_WORKER)
    gate.wait_until_reached(tmp_path / "OUT.zarr")
    urgent = lab.submit(
        *("--partition=urgent", "--nodes=2", "--ntasks=8", "--ntasks-per-node=4"),
        *("--output=urgent.log", "--wrap", "sleep 1"),
        cwd=tmp_path,
    )
    gate.open_for_a_run_that_stops(tmp_path / "OUT.zarr")
    lab.wait(urgent, "COMPLETED")
    assert tiles_done(tmp_path / "OUT.zarr") < search.n_tiles
    (end,) = events(tmp_path, "ended")
    assert end["state"] == "StoppedError"
    assert "SIGTERM: stopping after the running tiles" in printed(tmp_path)
    lab.wait(job, "PENDING")
    (tmp_path / f".ocelot-{job}-0-0.json").touch()  # as if all of its tasks had been killed
    gate.open()
    lab.finish(job)
    assert len(events(tmp_path, "tile")) == search.n_tiles
    assert_no_worker_was_lost(tmp_path)
    assert_finished(search, tmp_path)


def processes_of_task(lab: slurm_lab.Slurm, job: str, number: int) -> list[psutil.Process]:
    conf = lab.environment["SLURM_CONF"]  # another SLURM here has a job of this number, too
    named = {"SLURM_CONF": conf, "SLURM_JOB_ID": job, "SLURM_PROCID": str(number)}
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if named.items() <= process.environ().items():
                found.append(process)
    return found


@pytest.fixture
def start_driver(
    lab: slurm_lab.Slurm, search: Undisturbed, tmp_path: Path
) -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Start drivers here, whose workers are jobs; they sit on the loopback interface."""
    started: list[subprocess.Popen[str]] = []
    asks = ("interface=lo", "memory=1500MB", "cores=1", "walltime=00:10:00", "log_directory=logs")
    options = ["--cluster", "slurm", "--workers", "2", "--log", "log.jsonl"]
    options += [word for ask in asks for word in ("--slurm", ask)]
    local = {"DASK_JOBQUEUE__SLURM__SCHEDULER_OPTIONS__HOST": "127.0.0.1"}

    def begin(gate: Gate | None = None) -> "subprocess.Popen[str]":
        environment = {**lab.environment, **local, **(gate.environment if gate else {})}
        command = merge_command(search.run, "OUT.zarr", search.tile, *options)
        started.append(start(command, environment, cwd=tmp_path))
        return started[-1]

    yield begin
    for driver in started:
        end(driver)


def worker_jobs(lab: slurm_lab.Slurm) -> list[str]:
    return lab.call(
        "squeue", "-h", "-n", "dask-worker", "-t", "running,pending", "-o", "%i"
    ).split()


def test_a_cancelled_worker_is_replaced(
    lab, search: Undisturbed, tmp_path: Path, start_driver, gate: Gate
) -> None:
    driver = start_driver(gate)
    gate.wait_until_reached(tmp_path / "OUT.zarr", driver)
    first = worker_jobs(lab)
    lab.call("scancel", first[0])
    wait_for(lambda: bool({*worker_jobs(lab)} - {*first}), "another worker", alive=driver)
    gate.open()
    text, _ = driver.communicate(timeout=300)
    assert driver.returncode == 0, text
    assert len(first) == 2
    assert_finished(search, tmp_path)
    wait_for(lambda: not worker_jobs(lab), "the end of all worker jobs")


def test_a_worker_that_is_cancelled_before_it_connects_is_replaced(
    lab, search: Undisturbed, tmp_path: Path, start_driver, gate: Gate
) -> None:
    driver = start_driver(gate)
    wait_for(lambda: len(worker_jobs(lab)) == 2, "two worker jobs", alive=driver)
    first = worker_jobs(lab)
    for job in first:  # at once, so before a worker can have been imported
        lab.call("scancel", job)
    wait_for(lambda: len({*worker_jobs(lab)} - {*first}) == 2, "two others", 120, alive=driver)
    gate.open()
    text, _ = driver.communicate(timeout=300)
    assert driver.returncode == 0, text
    assert_finished(search, tmp_path)


def test_a_driver_that_is_stopped_cancels_its_jobs(
    lab, search: Undisturbed, tmp_path: Path, start_driver, gate: Gate
) -> None:
    driver = start_driver(gate)
    gate.wait_until_reached(tmp_path / "OUT.zarr", driver)
    driver.send_signal(signal.SIGTERM)
    gate.open_for_a_run_that_stops(tmp_path / "OUT.zarr")
    text, _ = driver.communicate(timeout=300)
    assert driver.returncode == 75, text
    assert "run the same command again to resume" in text
    wait_for(lambda: not worker_jobs(lab), "the end of all worker jobs")
    again = start_driver()
    text, _ = again.communicate(timeout=300)
    assert again.returncode == 0, text
    assert_finished(search, tmp_path)
