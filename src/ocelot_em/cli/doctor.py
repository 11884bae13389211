"""Checks of an installation and its environment, with their findings as data.

Every check runs in its own thread with a timeout, so that a file system or driver that does not
answer becomes a finding and does not block the others.
"""

import importlib
import importlib.metadata
import os
import platform
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from ocelot_em import __version__
from ocelot_em.cli.doctor_cluster import (
    MAX_CLOCK_SECONDS,
    SCRATCH_PREFIX,
    Finding,
    State,
    ahead_by,
    clock_offset,
    named,
    of_cluster,
)
from ocelot_em.errors import DeviceError, MissingDependencyError
from ocelot_em.kernels import Kernels, ahead, load
from ocelot_em.kernels.device import find_devices, open_device
from ocelot_em.merge.forecast import n_files_of_maps
from ocelot_em.merge.memory_model import StorageShape, n_threads, worker_nbytes
from ocelot_em.model.control_groups import memory_nbytes
from ocelot_em.model.maps import MapSet, PartialMaps, PoseForm
from ocelot_em.model.options import MergeOptions
from ocelot_em.model.text import nbytes_text, seconds_text
from ocelot_em.run.connect import call_with_timeout
from ocelot_em.store.blosc import BloscChunk, encode
from ocelot_em.store.constants import DEFAULT_CHUNK, SHARD_CHUNKS
from ocelot_em.store.objects import open_objects

CHECK_SECONDS = 180.0
"""Timeout of a check; compiling all kernels takes a minute on a slow machine."""

SPEED_NBYTES = 256 * 10**6
SPEED_SECONDS = 20.0
"""Maximum size, and maximum time each for writing and reading, of the disk benchmark."""

SLOW_NBYTES_PER_SECOND = 50e6
"""Disk speed below which a merge mostly waits for the disk."""

LITTLE_NBYTES, FEW_FILES, FEW_DESCRIPTORS = 2 * 10**9, 10_000, 1024
"""Minimum free space, free inodes and file descriptors; less gives a warning."""

EXAMPLE_PX = 32768
"""Edge of the maps for which the number of files is stated."""

_NOT_FOR_USERS = ("all", "docs", "test")
_ONE_OF_THESE = {"cuda12", "cuda13"}
_TRANSIENT = ("tmpfs", "ramfs", "overlay")

Check = Callable[[], tuple[State, str]]


def examine(folder: str | PathLike[str], cluster: str | None = None) -> list[Finding]:
    """Check this installation and machine, a folder, and the workers of a cluster.

    Test files in the folder, at most 256 MB at a time, are removed. The checks take seconds, or
    minutes if something does not answer. Return one finding per check, in a fixed order; an
    exception of a check becomes a problem.
    """
    place = Path(folder).absolute()
    checks: dict[str, Check] = {
        "versions": _versions,
        "extras": _extras,
        "other extras": _other_extras,
        "GPUs": _gpus,
        "kernels": _kernels,
        "codecs": _codecs,
        "memory": _memory,
        "CPU cores": _cores,
        "file descriptors": _file_descriptors,
        "file mode": _file_mode,
        "file system": partial(_file_system, place),
        "disk space": partial(_disk_space, place),
        "disk speed": partial(_disk_speed, place),
        "clock": partial(_clock, place),
    }
    findings = [_finding(name, check) for name, check in checks.items()]
    return findings + ([] if cluster is None else of_cluster(place, cluster))


def _finding(name: str, check: Check) -> Finding:
    try:
        return Finding(name, *call_with_timeout(CHECK_SECONDS, check))
    except Exception as error:
        return Finding(name, "problem", named(error))


# the installation


def _versions() -> tuple[State, str]:
    found, missing = _installed(extra="")
    names = [f"python {platform.python_version()}", f"ocelot_em {__version__}", *found]
    if missing:
        return "problem", f"{'; '.join(missing)}: pip install --upgrade ocelot-em"
    return "ok", ", ".join(names)


def _extras() -> tuple[State, str]:
    complete = [extra for extra, packages in _missing_of_extras().items() if not packages]
    return ("ok" if complete else "absent"), ", ".join(complete) or "none"


def _other_extras() -> tuple[State, str]:
    missing = _missing_of_extras()
    has_one = any(not missing.get(extra, [""]) for extra in _ONE_OF_THESE)
    others = [
        f"{', '.join(packages)}: pip install 'ocelot-em[{extra}]'"
        for extra, packages in missing.items()
        if packages and not (has_one and extra in _ONE_OF_THESE)
    ]
    if not others:
        return "ok", "none is missing"
    is_old = any("expected" in other for other in others)
    return ("warning" if is_old else "absent"), "\n".join(others)


def _missing_of_extras() -> dict[str, list[str]]:
    """Return what each extra lacks, by its name."""
    extras = importlib.metadata.metadata("ocelot-em").get_all("Provides-Extra") or []
    return {extra: _installed(extra)[1] for extra in sorted({*extras} - {*_NOT_FOR_USERS})}


def _installed(extra: str) -> tuple[list[str], list[str]]:
    """Return the installed and the missing requirements of an extra, or of the package if empty."""
    from packaging.requirements import Requirement

    found, missing = [], []
    for text in importlib.metadata.requires("ocelot-em") or []:
        need = Requirement(text)
        marker = need.marker
        is_of_extra = marker is not None and not marker.evaluate({"extra": ""})
        if is_of_extra != bool(extra) or (marker and not marker.evaluate({"extra": extra})):
            continue
        try:
            version = importlib.metadata.version(need.name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(f"{need.name} is missing")
            continue
        if need.specifier.contains(version, prereleases=True):
            found.append(f"{need.name} {version}")
        else:
            missing.append(f"{need.name}: expected {need.specifier}, got {version}")
    return found, missing


_NVIDIA_GPUS = Path("/proc/driver/nvidia/gpus")
"""Folder in which NVIDIA's driver lists its GPUs."""


def _gpus() -> tuple[State, str]:
    try:
        found = find_devices()
        open_device()
    except (DeviceError, MissingDependencyError) as error:
        n_there = len(list(_NVIDIA_GPUS.glob("*")))
        if n_there:
            return "warning", f"{n_there} on this machine, but none can be used: {error}"
        return "absent", "none; merges run on the CPU"
    return "ok", ", ".join(f"{gpu.name} with {nbytes_text(gpu.memory_nbytes)}" for gpu in found)


def _kernels() -> tuple[State, str]:
    random = np.random.default_rng(1)
    shape, maps = (64, 256), MapSet(PoseForm.EXPLICIT)
    partials = [
        PartialMaps(
            random.normal(5, 1, shape).astype(np.float32),
            tuple(random.normal(size=shape).astype(np.float32) for _ in maps.pose),
            random.normal(size=shape).astype(np.float32),
            random.uniform(9, 10, shape).astype(np.float32),
            10,
            number,
        )
        for number in range(3)
    ]

    def merged(kernels: Kernels) -> Mapping[str, Any]:
        acc = kernels.identity(shape, maps)
        kernels.fold_all(acc, partials, None)
        return kernels.finalise(acc, maps, None)

    started = time.perf_counter()
    compiled = merged(load("cpu"))
    seconds = time.perf_counter() - started
    plain, is_ahead, folder = merged(load("reference")), ahead.are_loaded(), None
    if not is_ahead:
        from ocelot_em.kernels import compile_cache  # on demand, with numba

        folder = compile_cache.cache_folder()
    wrong = [name for name in plain if compiled[name].tobytes() != plain[name].tobytes()]
    if wrong:
        hint = "reinstall ocelot-em" if is_ahead else f"delete the folder {folder}"
        return "problem", (
            f"the compiled kernels compute {', '.join(wrong)} incorrectly; {hint}, and report it "
            "if that does not help"
        )
    text = f"loaded and correct after {seconds_text(seconds)}"
    if is_ahead:
        return "ok", f"{text}, compiled ahead"
    if folder is None:
        return "warning", (
            f"{text}: each process compiles them, because no folder can be written to cache them; "
            "set NUMBA_CACHE_DIR to one that can"
        )
    text += f", cached in {folder}"
    if seconds > 10:
        return "warning", f"{text}: they were compiled, which happens once per installation"
    return "ok", text


def _codecs() -> tuple[State, str]:
    import google_crc32c
    from numcodecs.blosc import Blosc

    if google_crc32c.value(b"123456789") != 0xE3069283:
        hint = "pip install --force-reinstall google-crc32c"
        return "problem", f"CRC32C is computed incorrectly: {hint}"
    random = np.random.default_rng(1)
    values = random.normal(5, 1, (DEFAULT_CHUNK, DEFAULT_CHUNK)).astype(np.float32)
    speeds = []
    for name in ("lz4", "zstd"):
        started = time.perf_counter()
        parts = encode(values, Blosc(cname=name, clevel=5, shuffle=Blosc.SHUFFLE))
        encoded = time.perf_counter()
        back = np.empty_like(values)
        BloscChunk(memoryview(bytearray().join(parts)), values.nbytes).decode(back)
        ended = time.perf_counter()
        if back.tobytes() != values.tobytes():
            return "problem", (
                f"{name} does not decode what it encoded: pip install --force-reinstall numcodecs"
            )
        encodes = _rate(values.nbytes, encoded - started)
        speeds.append(f"{name} encodes {encodes}, decodes {_rate(values.nbytes, ended - encoded)}")
    text = f"with CRC32C, in one thread: {'; '.join(speeds)}"
    if google_crc32c.implementation != "c":
        return "warning", (
            f"{text}; CRC32C is computed in Python, which is slow: "
            "pip install --force-reinstall google-crc32c"
        )
    return "ok", text


# the machine


def _memory() -> tuple[State, str]:
    import psutil

    limit = memory_nbytes()
    available = min(limit, psutil.virtual_memory().available)
    threads = n_threads(MergeOptions())
    per_worker = _worker_nbytes(threads)
    text = (
        f"{nbytes_text(limit)}, {nbytes_text(available)} of it available now; a merge with "
        f"{threads} threads needs about {nbytes_text(per_worker)}"
    )
    if per_worker <= available:
        return "ok", text
    fitting = [n for n in range(1, threads) if _worker_nbytes(n) <= available]
    hint = f"--threads {fitting[-1]}" if fitting else "a smaller --tile-size"
    return "warning", f"{text}: use {hint}, or free memory"


def _worker_nbytes(threads: int) -> int:
    """Return the memory that a worker needs to merge the usual maps from a local disk."""
    shape, maps = (DEFAULT_CHUNK, DEFAULT_CHUNK), MapSet(PoseForm.EXPLICIT)
    storage = StorageShape(shape, sum_itemsize=4, streams=1)
    return worker_nbytes(shape, storage, maps, MergeOptions(threads=threads))


def _cores() -> tuple[State, str]:
    allowed, there = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    threads = n_threads(MergeOptions())
    text = f"{allowed} of {there} are available; a merge uses {threads} threads"
    if threads > allowed:
        return "warning", f"{text}, which is more: use --threads {allowed}"
    return "ok", text


def _file_descriptors() -> tuple[State, str]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    shown = ["unlimited" if n == resource.RLIM_INFINITY else str(n) for n in (soft, hard)]
    text = f"{shown[0]} open files are allowed, at most {shown[1]} (ulimit -n)"
    few = soft != resource.RLIM_INFINITY and soft < FEW_DESCRIPTORS
    return ("warning", f"{text}; expected at least {FEW_DESCRIPTORS}") if few else ("ok", text)


def _file_mode() -> tuple[State, str]:
    # os.umask can only read it by setting it, for all threads.
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    masks = [int(line.split()[1], 8) for line in lines if line.startswith("Umask:")]
    if not masks:
        return "absent", "not known on this system"
    mask = masks[0]
    if mask & 0o700:
        return "problem", f"umask {mask:04o}: you cannot use your own new files; run 'umask 022'"
    others = "everybody" if not mask & 0o005 else "your group"
    return "ok", f"umask {mask:04o}: {'only you' if mask & 0o050 else others} can read new files"


# the folder


def _file_system(place: Path) -> tuple[State, str]:
    kind, mount = _mount_of(place)
    with tempfile.TemporaryDirectory(prefix=SCRATCH_PREFIX, dir=place) as scratch:
        objects = open_objects(scratch)
        won = [objects.create("a", b"first"), objects.create("a", b"second")]
        objects.put("b", [b"old"])
        objects.put("b", [b"new"])
        found = {key: objects.get(key) for key in objects.sizes("")}
    text = f"{place} is on {kind}, mounted at {mount}"
    if won != [True, False] or found != {"a": b"first", "b": b"new"}:
        return "problem", (
            f"{text}, which lacks what a merge needs: exclusive creation and atomic replacement "
            "of files; use another file system"
        )
    text += "; files are created exclusively and replaced atomically"
    if kind in _TRANSIENT:
        return "warning", f"{text}; its files are lost with this machine or container"
    return "ok", text


def _mount_of(place: Path) -> tuple[str, str]:
    import psutil

    real = place.resolve()
    mounts = [m for m in psutil.disk_partitions(all=True) if real.is_relative_to(m.mountpoint)]
    if not mounts:
        return "an unknown file system", "an unknown place"
    # If several are mounted at one place, the last hides the others.
    best = max(enumerate(mounts), key=lambda pair: (len(pair[1].mountpoint), pair[0]))[1]
    return best.fstype, best.mountpoint


def _disk_space(place: Path) -> tuple[State, str]:
    usage, free_inodes = shutil.disk_usage(place), open_objects(place).free_inodes()
    text = f"{nbytes_text(usage.free)} of {nbytes_text(usage.total)} are free"
    if usage.free < LITTLE_NBYTES:
        return "warning", f"{text}, which is little"
    if free_inodes is None:
        return "ok", text
    if free_inodes < FEW_FILES:
        return "warning", f"{text}, but only {free_inodes:,} more files can be created"
    explicit = MapSet(PoseForm.EXPLICIT, pixel_size=True)
    n_chunks, n_shards = EXAMPLE_PX // DEFAULT_CHUNK, EXAMPLE_PX // DEFAULT_CHUNK // SHARD_CHUNKS
    plain, sharded = (
        8 * n_files_of_maps(len(explicit.partial), (n, n)) for n in (n_chunks, n_shards)
    )
    n_maps = len(explicit.merged)
    merged = n_files_of_maps(n_maps, (n_shards, n_shards)) + 3 * n_shards**2
    of_cluster = n_files_of_maps(n_maps, (n_chunks, n_chunks)) + 3 * n_chunks**2
    return "ok", (
        f"{text}, and {free_inodes:,} more files can be created: a search of {EXAMPLE_PX} x "
        f"{EXAMPLE_PX} pixels on 8 devices has {sharded:,} ({plain:,} with --chunk-files), its "
        f"result {merged:,} ({of_cluster:,} if a cluster merges it)"
    )


def _disk_speed(place: Path) -> tuple[State, str]:
    if shutil.disk_usage(place).free < 2 * SPEED_NBYTES:
        return "warning", f"not measured: less than {nbytes_text(2 * SPEED_NBYTES)} are free"
    block = np.random.default_rng(1).bytes(8 * 10**6)  # incompressible for any file system
    # The file has no name, so nothing remains even if this process is killed.
    with tempfile.TemporaryFile(dir=place, buffering=0) as file:
        started, written = time.perf_counter(), 0
        while written < SPEED_NBYTES and time.perf_counter() - started < SPEED_SECONDS:
            written += file.write(block[: SPEED_NBYTES - written])
        os.fsync(file.fileno())
        write_seconds = time.perf_counter() - started
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        started, read = time.perf_counter(), 0
        while time.perf_counter() - started < SPEED_SECONDS and (data := file.read(len(block))):
            if data != block[: len(data)]:
                return "problem", f"the data at byte {read:,} differ from what was written"
            read += len(data)
        read_seconds = time.perf_counter() - started
    text = (
        f"writes {_rate(written, write_seconds)}, with fsync; "
        f"reads {_rate(read, read_seconds)}, possibly from a cache (the page cache of this "
        "machine was asked to drop the file)"
    )
    if min(written / write_seconds, read / read_seconds) < SLOW_NBYTES_PER_SECOND:
        return "warning", f"{text}; merges will be limited by it: a local disk may be faster"
    return "ok", text


def _rate(nbytes: int, seconds: float) -> str:
    return f"{nbytes_text(nbytes / max(seconds, 1e-9))}/s"


def _clock(place: Path) -> tuple[State, str]:
    with tempfile.TemporaryFile(dir=place, buffering=0) as file:
        before = time.time()
        file.write(b"x")
        os.fsync(file.fileno())
        stamp, after = os.fstat(file.fileno()).st_mtime, time.time()
    off = clock_offset(stamp, stamp, before, after)
    text = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
    if abs(off) > MAX_CLOCK_SECONDS:
        return "warning", (
            f"{text}; the file system's clock is {ahead_by(off)}: synchronise both with the same "
            "time server"
        )
    return "ok", f"{text}; the file system's clock agrees"
