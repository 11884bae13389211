"""Findings of ``ocelot doctor``, and the checks of the workers of a cluster."""

import asyncio
import importlib
import importlib.metadata
import platform
import secrets
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

from ocelot_em.errors import OcelotError
from ocelot_em.model.text import count_text, seconds_text
from ocelot_em.run.connect import RESPONSE_SECONDS, call_with_timeout, connect_client
from ocelot_em.run.slurm import require_jobqueue

SCRATCH_PREFIX = ".ocelot-doctor-"
"""Prefix of temporary folders in the folder that is checked."""

MAX_CLOCK_SECONDS = 3.0
"""Maximum difference between clocks that gives no warning."""

State = Literal["ok", "absent", "warning", "problem"]


class Finding(NamedTuple):
    """Result of one check; ``text`` includes a remedy unless the state is ``ok``."""

    name: str
    state: State
    text: str


def named(error: BaseException) -> str:
    """Format an error, with its type if the text alone may be unclear."""
    # Dask replaces exceptions that it cannot send by plain ones whose text has the type.
    if isinstance(error, (OcelotError, TimeoutError)) or type(error) is Exception:
        return str(error) or "no answer"
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def clock_offset(started: float, ended: float, before: float, after: float) -> float:
    """Return by how many seconds another clock is ahead, given times of one event on both."""
    return min(started - before, 0.0) + max(ended - after, 0.0)


def ahead_by(seconds: float) -> str:
    """Format the offset of a clock; positive is ahead."""
    return f"{seconds_text(round(abs(seconds)))} {'ahead' if seconds > 0 else 'behind'}"


HOSTS_NAMED = 5
SAME_EVERYWHERE = ("ocelot_em", "dask", "distributed", "zarr", "numcodecs", "numpy", "numba")
"""Packages whose versions must match between workers and driver."""


class WorkerFacts(NamedTuple):
    """Facts collected by a worker; times are on its clock, in seconds since 1970."""

    started: float
    ended: float
    versions: dict[str, str]
    folder_trouble: str


class _Answer(NamedTuple):
    """Facts from a worker, or its exception, and the times of the query and the answer."""

    facts: WorkerFacts | BaseException
    before: float
    after: float


_Troubles = dict[str, list[str]]
"""Addresses of workers by problem."""


def of_cluster(place: Path, address: str) -> list[Finding]:
    """Check the workers of a running cluster, or whether SLURM accepts jobs here."""
    findings = list[Finding]()
    try:
        if address == "slurm":
            return [Finding("cluster", *_slurm(place))]
        if ":" not in address:
            expected = "expected slurm, or the address of a Dask scheduler such as tcp://host:8786"
            return [Finding("cluster", "problem", f"{expected}, got {address!r}")]
        with connect_client(address) as client:
            threads: dict[str, int] = call_with_timeout(RESPONSE_SECONDS, client.nthreads)
            findings.append(Finding("cluster", *_workers(address, threads)))
            if threads:
                findings += _of_workers(place, _ask(client, list(threads), place))
    except Exception as error:
        findings.append(Finding("cluster", "problem", named(error)))
    return findings


def _slurm(place: Path) -> tuple[State, str]:
    lacking = [name for name in ("sbatch", "squeue", "scancel", "sinfo") if not shutil.which(name)]
    if lacking:
        return "problem", f"SLURM: {', '.join(lacking)} not found: use a host that submits jobs"
    require_jobqueue()
    command = ["sinfo", "--noheader", "--format=%P|%a|%D|%l"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=RESPONSE_SECONDS)
    if done.returncode:
        return "problem", f"SLURM: {'; '.join(done.stderr.splitlines())}"
    rows = [line.split("|") for line in done.stdout.splitlines()]
    partitions = [
        f"{name.replace('*', ' (default)')} is {state}, {count_text(int(n), 'node')}, "
        f"time limit {limit}"
        for name, state, n, limit in rows
    ]
    if not partitions:
        return "problem", "SLURM: sinfo shows no partitions that you may use"
    on_node = f"test the folder on a node, too: srun ocelot doctor --folder {place}"
    return "ok", f"SLURM: {'; '.join(partitions)}. To do: {on_node}"


def _workers(address: str, threads: Mapping[str, int]) -> tuple[State, str]:
    if not threads:
        return "problem", f"{address} has no workers; start some with 'dask worker {address}'"
    n_hosts = len({urlsplit(worker).hostname for worker in threads})
    return "ok", (
        f"{address}: {count_text(len(threads), 'worker')} with "
        f"{count_text(sum(threads.values()), 'thread')} on {count_text(n_hosts, 'host')}"
    )


def _ask(client: Any, workers: list[str], place: Path) -> dict[str, _Answer]:
    """Run :func:`look_around` on every worker, and return the answers."""
    content = secrets.token_bytes(32)

    async def one(worker: str, path: str) -> _Answer:
        before = time.time()
        run = client.run(look_around, path, content, workers=[worker], on_error="return")
        return _Answer((await run)[worker], before, time.time())

    async def everyone(path: str) -> dict[str, _Answer]:
        asked = {worker: asyncio.ensure_future(one(worker, path)) for worker in workers}
        await asyncio.wait(asked.values(), timeout=RESPONSE_SECONDS)
        return {worker: answered(task) for worker, task in asked.items()}

    def answered(task: asyncio.Future[_Answer]) -> _Answer:
        if not task.done():
            task.cancel()
            return _Answer(TimeoutError(f"no answer in {RESPONSE_SECONDS:g} s"), 0, 0)
        error = task.exception()
        return task.result() if error is None else _Answer(error, 0, 0)

    with tempfile.TemporaryDirectory(prefix=SCRATCH_PREFIX, dir=place) as scratch:
        file = Path(scratch) / "of-the-driver"
        file.parent.chmod(stat.S_IMODE(place.stat().st_mode))  # workers may run as another user
        file.write_bytes(content)
        answers: dict[str, _Answer] = call_with_timeout(
            2 * RESPONSE_SECONDS, partial(client.sync, everyone, str(file))
        )
    return answers


def look_around(path: str, content: bytes) -> WorkerFacts:
    """Collect the facts about this worker; see :func:`try_folder`."""
    started = time.time()
    versions, trouble = loaded_versions(), try_folder(path, content)
    return WorkerFacts(started, time.time(), versions, trouble)


def loaded_versions() -> dict[str, str]:
    """Import ``SAME_EVERYWHERE``, and return the versions or import errors by name."""
    found = {"python": platform.python_version()}
    for name in SAME_EVERYWHERE:
        try:
            found[name] = str(importlib.import_module(name).__version__)
        except Exception as error:
            found[name] = f"none that can be imported: {type(error).__name__}: {error}"
    return found


def try_folder(path: str, content: bytes) -> str:
    """Read another process's file and write one next to it; return the problem, or ""."""
    own = Path(f"{path}-{secrets.token_hex(8)}")
    try:
        found = Path(path).read_bytes()
    except OSError as error:
        return f"cannot read the driver's file: {error.strerror}"
    if found != content:
        return "reads other data than the driver wrote"
    try:
        own.write_bytes(content)
        own.unlink()
    except OSError as error:
        return f"cannot write there: {error.strerror}"
    return ""


def _of_workers(place: Path, answers: Mapping[str, _Answer]) -> list[Finding]:
    """Turn the answers of workers, and missing ones, into findings."""
    silent, versions, folder, clocks = _Troubles(), _Troubles(), _Troubles(), _Troubles()
    here, farthest = loaded_versions(), 0.0
    for worker, (facts, before, after) in answers.items():
        if isinstance(facts, BaseException):
            silent.setdefault(named(facts), []).append(worker)
            continue
        for name, version in facts.versions.items():
            if version != here.get(name):
                trouble = f"{name}: expected {here.get(name)} as here, got {version}"
                versions.setdefault(trouble, []).append(worker)
        if facts.folder_trouble:
            folder.setdefault(facts.folder_trouble, []).append(worker)
        off = clock_offset(facts.started, facts.ended, before, after)
        farthest = max(farthest, abs(off))
        if abs(off) > MAX_CLOCK_SECONDS:
            clocks.setdefault(ahead_by(off), []).append(worker)
    n_answered = len(answers) - sum(map(len, silent.values()))
    findings = []
    if silent:
        hint = "they must be able to import this ocelot_em, and to answer"
        findings.append(Finding("workers", "problem", f"{_described(silent)}; {hint}"))
    if not n_answered:
        return findings

    def judge(name: str, troubles: _Troubles, praise: str, hint: str, state: State) -> None:
        text = f"{_described(troubles)}; {hint}" if troubles else praise
        findings.append(Finding(f"workers' {name}", state if troubles else "ok", text))

    same, shared = f"the same as here: {', '.join(here)}", count_text(n_answered, "worker")
    judge("versions", versions, same, "install the same versions on all machines", "problem")
    hint = "use a folder that all machines share, under one name"
    judge("folder", folder, f"{shared} can read and write {place}", hint, "problem")
    near = f"within {seconds_text(farthest)} of this machine's"
    judge("clocks", clocks, near, "synchronise all machines with the same time server", "warning")
    return findings


def _described(troubles: _Troubles) -> str:
    """Describe the problems, each with the hosts of its workers."""
    sentences = []
    for trouble, workers in troubles.items():
        hosts = list(dict.fromkeys(urlsplit(worker).hostname or worker for worker in workers))
        more = f" and {len(hosts) - HOSTS_NAMED} more" if len(hosts) > HOSTS_NAMED else ""
        named = ", ".join(hosts[:HOSTS_NAMED])
        sentences.append(f"{trouble} ({count_text(len(workers), 'worker')} on {named}{more})")
    return "; ".join(sentences)
