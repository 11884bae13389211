"""What the doctor finds: on this machine, and where something is wrong on purpose."""

import asyncio
import importlib.metadata
import os
import resource
import signal
import socket
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
from distributed import LocalCluster

from ocelot_em import __version__
from ocelot_em.cli import doctor, doctor_cluster
from ocelot_em.cli.doctor import examine
from ocelot_em.cli.doctor_cluster import Finding, WorkerFacts
from ocelot_em.errors import DeviceError
from ocelot_em.kernels import ahead, load
from ocelot_em.kernels.device import DeviceFacts
from ocelot_em.run import connect

NAMES = [
    *("versions", "extras", "other extras", "GPUs", "kernels", "codecs", "memory", "CPU cores"),
    *("file descriptors", "file mode", "file system", "disk space", "disk speed", "clock"),
]


@pytest.fixture
def fast(monkeypatch):
    """Write and read little."""
    monkeypatch.setattr(doctor, "SPEED_NBYTES", 10**7)


def test_this_machine(fast, tmp_path):
    findings = examine(tmp_path)
    assert [finding.name for finding in findings] == NAMES
    assert [finding for finding in findings if finding.state == "problem"] == []
    says = {finding.name: finding.text for finding in findings}
    assert f"ocelot_em {__version__}, " in says["versions"]
    assert f"zarr {importlib.metadata.version('zarr')}" in says["versions"]
    ready = says["kernels"].partition(", ")[2]
    assert ready == "compiled ahead" if ahead.are_loaded() else ready.startswith("cached in ")
    assert "lz4 encodes" in says["codecs"]
    assert "zstd encodes" in says["codecs"]
    assert "B/s" in says["disk speed"]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there(fast, tmp_path):
    findings = {finding.name: finding for finding in examine(tmp_path / "none")}
    wrong = [name for name, finding in findings.items() if finding.state == "problem"]
    assert wrong == ["file system", "disk space", "disk speed", "clock"]
    assert findings["disk speed"].text.startswith("FileNotFoundError: ")
    assert not (tmp_path / "none").exists()


def test_a_check_that_raises_or_hangs_is_a_finding(monkeypatch):
    def broken():
        raise ZeroDivisionError("of nothing")

    assert doctor._finding("x", broken) == Finding("x", "problem", "ZeroDivisionError: of nothing")
    monkeypatch.setattr(doctor, "CHECK_SECONDS", 0.2)
    release = threading.Event()
    finding = doctor._finding("x", release.wait)  # it comes back while that still waits
    release.set()
    assert finding == Finding("x", "problem", "no response within 0.2 s")


# the installation


def require(monkeypatch, *texts, extras=()):
    """Let this be what the package says that it needs."""
    about = types.SimpleNamespace(get_all=lambda _: list(extras))
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: list(texts))
    monkeypatch.setattr(importlib.metadata, "metadata", lambda _: about)


def test_packages_that_are_missing_or_too_old(monkeypatch):
    require(monkeypatch, "numpy>=1", "zarr>=99", "no-such-package", "torch>=99; extra == 'torch'")
    version = importlib.metadata.version("zarr")
    assert doctor._versions() == (
        "problem",
        f"zarr: expected >=99, got {version}; no-such-package is missing: "
        "pip install --upgrade ocelot-em",
    )


def test_extras(monkeypatch):
    needs = ["numpy>=99", "zarr>=3; extra == 'good'", "no-such-package; extra == 'bare'"]
    elsewhere = "nothing; sys_platform == 'mars' and extra == 'good'"
    require(monkeypatch, *needs, elsewhere, extras=["test", "good", "bare", "all"])
    assert doctor._extras() == ("ok", "good")
    assert doctor._other_extras() == (
        "absent",
        "no-such-package is missing: pip install 'ocelot-em[bare]'",
    )
    require(monkeypatch, "zarr>=99; extra == 'old'", extras=["old"])
    assert doctor._extras() == ("absent", "none")
    state, says = doctor._other_extras()
    assert state == "warning"
    assert says.startswith("zarr: expected >=99, got ")
    assert says.endswith(": pip install 'ocelot-em[old]'")
    of_drivers = ["numpy>=99; extra == 'cuda12'", "numpy>=1; extra == 'cuda13'"]
    require(monkeypatch, *of_drivers, extras=["cuda12", "cuda13"])
    assert doctor._extras() == ("ok", "cuda13")
    assert doctor._other_extras() == ("ok", "none is missing")


def test_gpus(monkeypatch, tmp_path):
    def none():
        raise DeviceError("cuda: the driver is for CUDA 11")

    monkeypatch.setattr(doctor, "find_devices", lambda: [DeviceFacts("H100", 80 * 10**9)] * 2)
    monkeypatch.setattr(doctor, "open_device", lambda: None)
    assert doctor._gpus() == ("ok", "H100 with 80 GB, H100 with 80 GB")
    monkeypatch.setattr(doctor, "_NVIDIA_GPUS", tmp_path)
    unusable = "1 on this machine, but none can be used: cuda: the driver is for CUDA 11"
    monkeypatch.setattr(doctor, "open_device", none)
    (tmp_path / "0000:01:00.0").mkdir()
    assert doctor._gpus() == ("warning", unusable)
    monkeypatch.setattr(doctor, "find_devices", none)
    assert doctor._gpus() == ("warning", unusable)
    (tmp_path / "0000:01:00.0").rmdir()
    assert doctor._gpus() == ("absent", "none; merges run on the CPU")


def test_kernels_that_compute_something_else(monkeypatch):
    good = load("reference")

    def finalise(*arguments):
        merged = good.finalise(*arguments)
        return merged | {"scaled_mip": np.nextafter(merged["scaled_mip"], np.float32(9))}

    bad = types.SimpleNamespace(identity=good.identity, fold_all=good.fold_all, finalise=finalise)
    monkeypatch.setattr(doctor, "load", lambda name: bad if name == "cpu" else good)
    state, says = doctor._kernels()
    assert (state, says.partition(";")[0]) == (
        "problem",
        "the compiled kernels compute scaled_mip incorrectly",
    )


def test_codecs_that_do_not_give_back_what_they_got(monkeypatch):
    import google_crc32c

    monkeypatch.setattr(doctor.BloscChunk, "decode", lambda _self, out: out.fill(0))
    state, says = doctor._codecs()
    assert (state, says.partition(" ")[0]) == ("problem", "lz4")
    monkeypatch.undo()
    monkeypatch.setattr(google_crc32c, "implementation", "python")
    state, says = doctor._codecs()
    assert state == "warning"
    assert "CRC32C is computed in Python" in says
    monkeypatch.setattr(google_crc32c, "value", lambda _: 0)
    assert doctor._codecs()[0] == "problem"


# the machine


def test_memory_for_fewer_threads(monkeypatch):
    monkeypatch.setattr(doctor, "n_threads", lambda _: 8)
    four = doctor._worker_nbytes(4)
    assert doctor._worker_nbytes(3) < four < doctor._worker_nbytes(5)
    monkeypatch.setattr(doctor, "memory_nbytes", lambda: four)
    state, says = doctor._memory()
    assert state == "warning"
    assert says.endswith(": use --threads 4, or free memory")
    monkeypatch.setattr(doctor, "memory_nbytes", lambda: 10**6)
    assert doctor._memory()[1].endswith(": use a smaller --tile-size, or free memory")
    monkeypatch.setattr(doctor, "n_threads", lambda _: 1)
    monkeypatch.setattr(doctor, "memory_nbytes", lambda: doctor._worker_nbytes(1))
    assert doctor._memory()[0] == "ok"


def test_more_threads_than_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 5})
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(doctor, "n_threads", lambda _: 3)
    assert doctor._cores() == (
        "warning",
        "2 of 64 are available; a merge uses 3 threads, which is more: use --threads 2",
    )
    monkeypatch.setattr(doctor, "n_threads", lambda _: 2)
    assert doctor._cores() == ("ok", "2 of 64 are available; a merge uses 2 threads")


@pytest.mark.parametrize(
    ("limits", "state", "says"),
    [
        (
            (512, 4096),
            "warning",
            "512 open files are allowed, at most 4096 (ulimit -n); expected at ",
        ),
        ((1024, 1024), "ok", "1024 open files are allowed, at most 1024"),
        (
            (resource.RLIM_INFINITY,) * 2,
            "ok",
            "unlimited open files are allowed, at most unlimited",
        ),
    ],
)
def test_file_descriptors(monkeypatch, limits, state, says):
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    found = doctor._file_descriptors()
    assert found[0] == state
    assert found[1].startswith(says)


@pytest.mark.parametrize(
    ("mask", "state", "says"),
    [
        (0o022, "ok", "umask 0022: everybody can read new files"),
        (0o027, "ok", "umask 0027: your group can read new files"),
        (0o077, "ok", "umask 0077: only you can read new files"),
        (0o277, "problem", "umask 0277: you cannot use your own new files; "),
    ],
)
def test_file_mode(mask, state, says):
    before = os.umask(mask)
    try:
        found = doctor._file_mode()
    finally:
        os.umask(before)
    assert found[0] == state
    assert found[1].startswith(says)


# the folder


def mounts(monkeypatch, *pairs):
    import psutil

    found = [types.SimpleNamespace(mountpoint=m, fstype=kind) for m, kind in pairs]
    monkeypatch.setattr(psutil, "disk_partitions", lambda **_: found)


def test_which_file_system(monkeypatch, tmp_path):
    here = os.path.realpath(tmp_path)
    mounts(monkeypatch, ("/", "ext4"), (here + "x", "nfs"), (here, "xfs"), (here, "beegfs"))
    assert doctor._file_system(tmp_path) == (
        "ok",
        f"{tmp_path} is on beegfs, mounted at {here}; files are created exclusively and replaced "
        "atomically",
    )
    mounts(monkeypatch, ("/", "overlay"))
    state, says = doctor._file_system(tmp_path)
    assert state == "warning"
    assert says.endswith("; its files are lost with this machine or container")
    mounts(monkeypatch)
    assert "is on an unknown file system" in doctor._file_system(tmp_path)[1]
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_that_lets_two_create_a_file(monkeypatch, tmp_path):
    def open_objects(place):
        objects = original(place)
        monkeypatch.setattr(objects, "create", lambda key, data: objects.put(key, [data]) or True)
        return objects

    original = doctor.open_objects
    monkeypatch.setattr(doctor, "open_objects", open_objects)
    state, says = doctor._file_system(tmp_path)
    assert state == "problem"
    assert "lacks what a merge needs" in says


def test_little_space(monkeypatch, tmp_path):
    usage = types.SimpleNamespace(free=10**9, total=10**12)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage)
    assert doctor._disk_space(tmp_path) == (
        "warning",
        "1 GB of 1 TB are free, which is little",
    )
    usage.free = 10**11
    monkeypatch.setattr(os, "statvfs", lambda _: types.SimpleNamespace(f_files=9, f_favail=7))
    state, says = doctor._disk_space(tmp_path)
    assert (state, says.partition(", ")[2]) == ("warning", "but only 7 more files can be created")
    monkeypatch.setattr(os, "statvfs", lambda _: types.SimpleNamespace(f_files=0, f_favail=0))
    assert doctor._disk_space(tmp_path) == ("ok", "100 GB of 1 TB are free")
    monkeypatch.setattr(
        os, "statvfs", lambda _: types.SimpleNamespace(f_files=9**9, f_favail=10**6)
    )
    assert doctor._disk_space(tmp_path)[1].partition(" free, and ")[2] == (
        "1,000,000 more files can be created: a search of 32768 x 32768 pixels on 8 devices has "
        "320 (65,600 with --chunk-files), its result 72 (15,372 if a cluster merges it)"
    )
    usage.free = doctor.SPEED_NBYTES
    assert doctor._disk_speed(tmp_path) == ("warning", "not measured: less than 512 MB are free")


def test_a_slow_disk_is_given_up_after_some_time(fast, monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "SPEED_SECONDS", 0.1)
    monkeypatch.setattr(os, "fsync", lambda _: time.sleep(0.3))
    monkeypatch.setattr(doctor, "SPEED_NBYTES", 10**6)
    state, says = doctor._disk_speed(tmp_path)
    assert state == "warning"
    assert says.endswith("; merges will be limited by it: a local disk may be faster")


def test_a_disk_that_gives_back_something_else(fast, monkeypatch, tmp_path):
    def damage(descriptor):
        os.pwrite(descriptor, b"\0" * 100, 9_000_000)

    monkeypatch.setattr(os, "fsync", damage)
    assert doctor._disk_speed(tmp_path) == (
        "problem",
        "the data at byte 8,000,000 differ from what was written",
    )


@pytest.mark.parametrize(
    ("seconds", "state", "says"),
    [
        (100, "warning", "clock is 1 min 40 s ahead: synchronise both with the same time server"),
        (-50, "warning", "clock is 50 s behind: synchronise both with the same time server"),
        (1, "ok", "the file system's clock agrees"),
    ],
)
def test_the_clock_of_the_file_system(monkeypatch, tmp_path, seconds, state, says):
    def fstat(descriptor):
        found = original(descriptor)
        fields = {name: getattr(found, name) for name in dir(found) if name.startswith("st_")}
        return types.SimpleNamespace(**fields | {"st_mtime": found.st_mtime + seconds})

    original = os.fstat
    monkeypatch.setattr(os, "fstat", fstat)
    found = doctor._clock(tmp_path)
    assert found[0] == state
    assert found[1].endswith(says)


# the cluster


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        (None, ("problem", "SLURM: sbatch, squeue, scancel, sinfo not found: use a host")),
        (
            "echo 'cpu*|up|4|1:00'; echo 'gpu|down|1|infinite'",
            (
                "ok",
                "SLURM: cpu (default) is up, "
                "4 nodes, time limit 1:00; gpu is down, 1 node, time limit infinite. To do: test",
            ),
        ),
        ("echo 'no controller' >&2; exit 1", ("problem", "SLURM: no controller")),
    ],
)
def test_slurm(tmp_path, monkeypatch, program, expected):
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("sbatch", "squeue", "scancel", "sinfo") if program else ():
        (tmp_path / name).write_text(f"#!/bin/sh\n{program}\n")
        (tmp_path / name).chmod(0o755)
    (found,) = doctor_cluster.of_cluster(tmp_path, "slurm")
    assert (found.state, found.text[: len(expected[1])]) == expected


@pytest.fixture(scope="module")
def cluster():
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster:
        yield cluster


def test_a_cluster(cluster, tmp_path):
    findings = doctor_cluster.of_cluster(tmp_path, cluster.scheduler_address)
    assert [(finding.name, finding.state) for finding in findings] == [
        ("cluster", "ok"),
        ("workers' versions", "ok"),
        ("workers' folder", "ok"),
        ("workers' clocks", "ok"),
    ]
    assert findings[0].text == f"{cluster.scheduler_address}: 2 workers with 2 threads on 1 host"
    assert findings[1].text.startswith("the same as here: python, ocelot_em, dask, ")
    assert findings[2].text == f"2 workers can read and write {tmp_path}"
    assert list(tmp_path.iterdir()) == []


def test_a_cluster_whose_workers_have_other_versions(cluster, monkeypatch, tmp_path):
    here = doctor_cluster.loaded_versions()
    monkeypatch.setattr(doctor_cluster, "loaded_versions", lambda: here | {"zarr": "2.0"})
    findings = {f.name: f for f in doctor_cluster.of_cluster(tmp_path, cluster.scheduler_address)}
    assert findings["workers' versions"] == Finding(
        "workers' versions",
        "problem",
        f"zarr: expected 2.0 as here, got {here['zarr']} (2 workers on 127.0.0.1); install the "
        "same versions on all machines",
    )


def test_a_worker_that_does_not_answer(cluster, monkeypatch, tmp_path):
    timeouts = []

    async def wait(asked, timeout):
        """Let the time be up when one has answered, however long that takes."""
        timeouts.append(timeout)
        await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)

    hurried = types.SimpleNamespace(**vars(asyncio) | {"wait": wait})
    monkeypatch.setattr(doctor_cluster, "asyncio", hurried)
    pid = next(iter(cluster.workers.values())).pid
    os.kill(pid, signal.SIGSTOP)
    try:
        findings = doctor_cluster.of_cluster(tmp_path, cluster.scheduler_address)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert [(finding.name, finding.state) for finding in findings] == [
        ("cluster", "ok"),
        ("workers", "problem"),
        ("workers' versions", "ok"),
        ("workers' folder", "ok"),
        ("workers' clocks", "ok"),
    ]
    assert findings[1].text.startswith("no answer in 30 s (1 worker on 127.0.0.1); ")
    assert timeouts == [doctor_cluster.RESPONSE_SECONDS]
    assert findings[3].text == f"1 worker can read and write {tmp_path}"


def test_workers_that_cannot_load_what_they_are_asked(cluster, monkeypatch, tmp_path):
    stranger = types.ModuleType("only_here")
    exec("def look_around(path, content): pass", stranger.__dict__)
    monkeypatch.setitem(sys.modules, "only_here", stranger)
    monkeypatch.setattr(doctor_cluster, "look_around", stranger.look_around)
    findings = doctor_cluster.of_cluster(tmp_path, cluster.scheduler_address)
    assert [finding.name for finding in findings] == ["cluster", "workers"]
    assert findings[1].text == (
        """ModuleNotFoundError("No module named 'only_here'") (2 workers on 127.0.0.1); they """
        "must be able to import this ocelot_em, and to answer"
    )


def test_a_scheduler_without_workers(fast, tmp_path):
    with LocalCluster(n_workers=0, dashboard_address=":0") as empty:
        (finding,) = examine_cluster(tmp_path, empty.scheduler_address)
    assert finding.state == "problem"
    assert "has no workers; start some with 'dask worker tcp://" in finding.text


def examine_cluster(place: Path, address: str) -> list[Finding]:
    return [f for f in examine(place, address) if f.name not in NAMES]


def test_what_is_no_scheduler(monkeypatch, tmp_path):
    monkeypatch.setattr(connect, "CONNECT_SECONDS", 0.2)
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        address = f"tcp://127.0.0.1:{mute.getsockname()[1]}"
        (finding,) = doctor_cluster.of_cluster(tmp_path, address)
    assert finding.state == "problem"
    assert f"no Dask scheduler responds at {address}: TimeoutError" in finding.text
    (finding,) = doctor_cluster.of_cluster(tmp_path, "tcp://127.0.0.1:9")
    assert "no Dask scheduler responds at tcp://127.0.0.1:9: " in finding.text
    (finding,) = doctor_cluster.of_cluster(tmp_path, "local")
    assert finding.state == "problem"
    assert finding.text.startswith("expected slurm, or the address of a Dask scheduler")


def test_what_workers_answer_is_judged(tmp_path):
    here = doctor_cluster.loaded_versions()
    unlike = here | {"numba": "none that can be imported: ImportError: x"}
    answers = {
        "tcp://a:1": doctor_cluster._Answer(WorkerFacts(100.0, 101.0, here, ""), 100.5, 102.0),
        "tcp://b:1": doctor_cluster._Answer(
            WorkerFacts(80.0, 81.0, unlike, "cannot write"), 100.0, 102.0
        ),
        "tcp://b:2": doctor_cluster._Answer(
            WorkerFacts(80.0, 81.0, unlike, "cannot write"), 100.0, 102.0
        ),
        "tcp://c:1": doctor_cluster._Answer(WorkerFacts(100.5, 112.0, here, ""), 100.0, 102.0),
        "tcp://d:1": doctor_cluster._Answer(OSError("gone"), 0, 0),
    }
    assert doctor_cluster._of_workers(tmp_path, answers) == [
        Finding(
            "workers",
            "problem",
            "OSError: gone (1 worker on d); they must be able to import this ocelot_em, and to "
            "answer",
        ),
        Finding(
            "workers' versions",
            "problem",
            f"numba: expected {here['numba']} as here, got none that can be imported: ImportError: "
            "x (2 workers on b); install the same versions on all machines",
        ),
        Finding(
            "workers' folder",
            "problem",
            "cannot write (2 workers on b); use a folder that all machines share, under one name",
        ),
        Finding(
            "workers' clocks",
            "warning",
            "20 s behind (2 workers on b); 10 s ahead (1 worker on c); synchronise all "
            "machines with the same time server",
        ),
    ]


def test_many_hosts_are_counted():
    workers = [f"tcp://host{n}:1" for n in range(8)]
    assert doctor_cluster._described({"bad": workers}) == (
        "bad (8 workers on host0, host1, host2, host3, host4 and 3 more)"
    )


def test_a_folder_that_workers_do_not_share(monkeypatch, tmp_path):
    file = tmp_path / "F"
    assert doctor_cluster.try_folder(str(file), b"x") == (
        "cannot read the driver's file: No such file or directory"
    )
    file.write_bytes(b"y")
    assert doctor_cluster.try_folder(str(file), b"x") == "reads other data than the driver wrote"
    assert doctor_cluster.try_folder(str(file), b"y") == ""
    assert list(tmp_path.iterdir()) == [file]

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    assert doctor_cluster.try_folder(str(file), b"y") == "cannot write there: Permission denied"


def test_packages_that_cannot_be_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    versions = doctor_cluster.loaded_versions()
    assert versions["numba"].startswith("none that can be imported: ModuleNotFoundError: ")
    assert versions["numpy"] == np.__version__
