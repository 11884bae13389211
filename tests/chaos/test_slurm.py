"""Merges in the jobs of a real SLURM with two nodes on this machine."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import slurm_lab
from chaos_common import Undisturbed, merge_command, tiles_done, undisturbed, wait_for
from ocelot_em import slurm

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.skipif(bool(slurm_lab.missing()), reason=f"no SLURM: {slurm_lab.missing()}"),
]

JOB_FILE = Path(__file__).parents[2] / "examples" / "slurm" / "merge.sbatch"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[slurm_lab.Slurm]:
    with slurm_lab.slurm(tmp_path_factory.mktemp("slurm")) as made:
        made.environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        yield made


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return undisturbed(tmp_path_factory.mktemp("search"), 640, 32)


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
    job = submit(lab, search, tmp_path, more=more)
    lab.wait(job, "COMPLETED")
    assert_finished(search, tmp_path)
    told = printed(tmp_path)
    assert f"merged {search.n_tiles} tiles" in told
    assert "Traceback" not in told
    assert "dashboard: http://127.0.0.1:" in told
    assert ("asks nobody who they are" in told) == (more == "")
    assert ("tls://" in told) == (more == "--tls")
    assert len({line["worker"] for line in events(tmp_path, "tile")}) == 4


def test_at_the_end_of_its_time_a_job_is_queued_again_and_goes_on(lab, tmp_path: Path) -> None:
    search = undisturbed(tmp_path, 960, 32)
    # SLURM looks at times twice a minute: the signal comes up to 30 s early, here after 10 to 40 s.
    few = "--nodes=1", "--ntasks=3"  # one worker, which has not done all by then
    job = submit(lab, search, tmp_path, *few, "--signal=USR1@20", "--time=1")
    lab.wait(job, "RUNNING", seconds=60)
    lab.wait(job, "PENDING", seconds=120)
    assert "SIGUSR1: stop" in printed(tmp_path)
    done = tiles_done(tmp_path / "OUT.zarr")
    assert done < search.n_tiles
    lab.call("scontrol", "update", f"JobId={job}", "TimeLimit=10")
    lab.finish(job, seconds=400)
    assert f"{done} of them done before" in printed(tmp_path) or done == 0
    assert len(events(tmp_path, "tile")) == search.n_tiles  # no tile was done twice
    assert_no_worker_was_lost(tmp_path)
    assert_finished(search, tmp_path)


def test_a_job_that_is_told_before_it_listens_is_queued_again(
    lab, search: Undisturbed, tmp_path: Path
) -> None:
    job = submit(lab, search, tmp_path)
    lab.wait(job, "RUNNING", seconds=60)
    lab.call("scancel", "--signal=USR1", job)
    lab.wait(job, "PENDING", seconds=60)
    assert "was stopped, and is queued again" in printed(tmp_path)
    lab.call("scancel", job)


def test_a_cancelled_job_is_not_queued_again(lab, search: Undisturbed, tmp_path: Path) -> None:
    job = submit(lab, search, tmp_path)
    wait_for(lambda: tiles_done(tmp_path / "OUT.zarr") > 20, "tiles")
    lab.call("scancel", job)
    lab.wait(job, "CANCELLED", seconds=60)
    assert "stopping after the tiles in hand" in printed(tmp_path)
    assert "queued again" not in printed(tmp_path).replace("not queued again", "")
    assert list(tmp_path.glob("OUT.zarr/lock/*")) == []
    assert tiles_done(tmp_path / "OUT.zarr") < search.n_tiles


def test_a_job_whose_driver_is_killed_ends(lab, search: Undisturbed, tmp_path: Path) -> None:
    job = submit(lab, search, tmp_path)
    wait_for(lambda: tiles_done(tmp_path / "OUT.zarr") > 20, "tiles")
    (driver,) = processes_of_task(job, slurm.DRIVER)
    driver.kill()
    lab.wait(job, "FAILED", seconds=90)
    assert lab.exit_code(job) == "137:0"
    assert list(tmp_path.glob(".ocelot*")) == []
    assert tiles_done(tmp_path / "OUT.zarr") < search.n_tiles
    lab.wait(submit(lab, search, tmp_path), "COMPLETED", seconds=300)
    assert_finished(search, tmp_path)


def test_a_preempted_job_makes_room_and_goes_on(lab, search: Undisturbed, tmp_path: Path) -> None:
    job = submit(lab, search, tmp_path)
    wait_for(lambda: tiles_done(tmp_path / "OUT.zarr") > 20, "tiles")
    urgent = lab.submit(
        *("--partition=urgent", "--nodes=2", "--ntasks=8", "--ntasks-per-node=4"),
        *("--output=urgent.log", "--wrap", "sleep 1"),
        cwd=tmp_path,
    )
    lab.wait(urgent, "COMPLETED")
    assert tiles_done(tmp_path / "OUT.zarr") < search.n_tiles
    (end,) = events(tmp_path, "ended")
    assert end["state"] == "StoppedError"
    assert "SIGTERM: stopping after the tiles in hand" in printed(tmp_path)
    lab.wait(job, "PENDING")
    (tmp_path / f".ocelot-{job}-0-0.json").touch()  # as if all of its tasks had been killed
    lab.finish(job, seconds=400)
    assert len(events(tmp_path, "tile")) == search.n_tiles
    assert_no_worker_was_lost(tmp_path)
    assert_finished(search, tmp_path)


def processes_of_task(job: str, number: int) -> list[psutil.Process]:
    named = {"SLURM_JOB_ID": job, "SLURM_PROCID": str(number)}
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if named.items() <= process.environ().items():
                found.append(process)
    return found


def start_driver(lab: slurm_lab.Slurm, search: Undisturbed, cwd: Path) -> "subprocess.Popen[str]":
    """A driver here, whose workers are jobs; they sit on the loopback interface."""
    environment = {**lab.environment, "DASK_JOBQUEUE__SLURM__SCHEDULER_OPTIONS__HOST": "127.0.0.1"}
    asks = ("interface=lo", "memory=1500MB", "cores=1", "walltime=00:10:00", "log_directory=logs")
    options = ["--cluster", "slurm", "--workers", "2", "--log", "log.jsonl"]
    options += [word for ask in asks for word in ("--slurm", ask)]
    return subprocess.Popen(
        merge_command(search.run, "OUT.zarr", search.tile, *options),
        env=environment,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def worker_jobs(lab: slurm_lab.Slurm) -> list[str]:
    return lab.call(
        "squeue", "-h", "-n", "dask-worker", "-t", "running,pending", "-o", "%i"
    ).split()


def test_a_cancelled_worker_is_replaced(lab, search: Undisturbed, tmp_path: Path) -> None:
    driver = start_driver(lab, search, tmp_path)
    wait_for(lambda: tiles_done(tmp_path / "OUT.zarr") > 20, "tiles")
    first = worker_jobs(lab)
    lab.call("scancel", first[0])
    told, _ = driver.communicate(timeout=200)
    assert driver.returncode == 0, told
    assert len(first) == 2
    assert_finished(search, tmp_path)
    wait_for(lambda: not worker_jobs(lab), "the end of all worker jobs", 30)


def test_a_driver_that_is_stopped_cancels_its_jobs(
    lab, search: Undisturbed, tmp_path: Path
) -> None:
    driver = start_driver(lab, search, tmp_path)
    wait_for(lambda: tiles_done(tmp_path / "OUT.zarr") > 20, "tiles")
    driver.send_signal(signal.SIGTERM)
    told, _ = driver.communicate(timeout=60)
    assert driver.returncode == 75, told
    assert "the same command goes on" in told
    wait_for(lambda: not worker_jobs(lab), "the end of all worker jobs", 30)
    again = start_driver(lab, search, tmp_path)
    told, _ = again.communicate(timeout=200)
    assert again.returncode == 0, told
    assert_finished(search, tmp_path)
