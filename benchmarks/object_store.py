"""What the latency of a bucket costs: round trips at the start and at the end, and throughput.

``python -m benchmarks.object_store [--quick] [--delay-ms N] [--repeats N]`` merges searches in the
memory of this process, in which each request takes a fixed time, as in a bucket. Round trips are
the longest chain of requests that wait for each other, whatever the number of threads. Throughput
is compared with the same merge without the delay, in turn.
"""

import itertools
import statistics
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from benchmarks import common
from ocelot_em import Exposure, Observer, SearchInfo, merge, write_partial
from ocelot_em.merge.outcome import Outcome
from ocelot_em.merge.resume import prepare
from ocelot_em.model.maps import MAPS, MIP, PoseForm
from ocelot_em.model.options import MergeOptions
from ocelot_em.store import attributes as fmt
from ocelot_em.store import bucket, fence, groups
from ocelot_em.store.bucket import BucketObjects, MemoryObjects
from ocelot_em.store.objects import open_objects
from ocelot_em.store.roster import register
from ocelot_em.store.search import (
    exposure_path,
    partial_path,
    read_attributes,
    read_exposure,
    read_partial_attributes,
)

N_THREADS = 2


@dataclass(frozen=True)
class Request:
    """A request, and the number of round trips that it had to wait for."""

    verb: str
    url: str
    key: str
    n_before: int

    @property
    def is_chunk(self) -> bool:
        """Whether it reads or writes a chunk of a map."""
        array, _, chunk = self.key.partition("/c/")
        return bool(chunk) and array.rpartition("/")[2] in MAPS


@dataclass
class Bucket:
    """A bucket in memory: requests take time, and are counted.

    Requests of a thread wait for each other. A task begins when it is submitted, however many
    threads there are, and what waits for its result continues after its last request.
    """

    delay_seconds: float = 0.0
    requests: list[Request] = field(default_factory=list)
    _own: threading.local = field(default_factory=threading.local)

    @property
    def round_trips(self) -> int:
        """Round trips that this thread has waited for."""
        return getattr(self._own, "n", 0)

    def retrying(self, verb: str, url: str, key: str, action: Callable[[], Any]) -> Any:
        """Stand in for :func:`ocelot_em.store.contract.retrying`."""

        def requested() -> Any:
            self.requests.append(Request(verb, url, key, self.round_trips))
            time.sleep(self.delay_seconds)
            self._own.n = self.round_trips + 1
            return action()

        return requested() if verb != "open" and url.startswith("memory://") else action()

    def submit(self, pool: Any, function: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Stand in for :meth:`ThreadPoolExecutor.submit`."""
        n_before, ends = self.round_trips, list[int]()

        def task() -> Any:
            self._own.n = n_before
            try:
                return function(*args, **kwargs)
            finally:
                ends.append(self.round_trips)

        future = _SUBMIT(pool, task)
        future.ends = ends  # type: ignore[attr-defined]
        return future

    def waited(self, wait: Callable[..., Any]) -> Callable[..., Any]:
        """Stand in for :meth:`Future.result` and :meth:`Future.exception`."""

        def waiting(future: Any, timeout: float | None = None) -> Any:
            try:
                return wait(future, timeout)
            finally:
                self._own.n = max(self.round_trips, *getattr(future, "ends", ()), 0)

        return waiting


_SUBMIT = ThreadPoolExecutor.submit


@contextmanager
def as_bucket(delay_seconds: float = 0.0) -> Iterator[Bucket]:
    """Make stores in memory behave like buckets, in this process."""
    stub = Bucket(delay_seconds)
    with (
        patch.object(bucket, "retrying", stub.retrying),
        patch.object(MemoryObjects, "streams", BucketObjects.streams),
        patch.object(MemoryObjects, "requests", BucketObjects.requests),
        patch.object(ThreadPoolExecutor, "submit", lambda *a, **k: stub.submit(*a, **k)),
        patch.object(Future, "result", stub.waited(Future.result)),
        patch.object(Future, "exception", stub.waited(Future.exception)),
    ):
        yield stub


@dataclass(frozen=True)
class RoundTrips:
    """Round trips of a merge before it reads its first chunk, and after it wrote its last."""

    start: int
    end: int
    n_requests: int


def round_trips(search: str, output: str, **options: Any) -> RoundTrips:
    """Merge, and count round trips; the proof that a lock is held stays fresh meanwhile."""
    with as_bucket() as stub, patch.object(fence, "CHECK_SECONDS", float("inf")):
        merge(search, output, threads=1, **options)
        n_all = stub.round_trips
    chunks = [r for r in stub.requests if r.is_chunk]
    start = min(r.n_before for r in chunks if r.url == search)
    last = max(r.n_before for r in chunks if r.url == output)
    return RoundTrips(start, n_all - last - 1, len(stub.requests))


# Searches in memory.


def in_memory(search: Path) -> str:
    """Copy a search into the memory of this process; return its URL."""
    url = f"memory://{uuid.uuid4().hex}"
    source, target = open_objects(search), open_objects(url)
    for key in source.keys(""):
        target.put(key, [source.get(key) or b""])
    return url


def tiny_search(n_partials: int) -> str:
    """Write a search of a few pixels into the memory of this process; return its URL."""
    url = f"memory://{uuid.uuid4().hex}"
    for number in range(n_partials):
        write_partial(url, f"gpu{number}", _tiny_maps(), total_projections=1)
    return url


def tiny_montage(n_exposures: int, n_partials: int) -> str:
    """Write the metadata of a montage into memory: copies of one exposure, without chunks."""
    url = f"memory://{uuid.uuid4().hex}"
    info = SearchInfo(exposure=Exposure("e0", (0, 0), 0))
    for number in range(n_partials):
        write_partial(url, f"gpu{number}", _tiny_maps(), total_projections=1, search=info)
    objects = open_objects(url)
    first, root = read_exposure(objects, "e0"), read_attributes(objects)
    names = [f"gpu{number}" for number in range(n_partials)]
    partials = [read_partial_attributes(objects, name, "e0") for name in names]
    arrays = [key for key in objects.keys(partial_path("gpu0", "e0")) if key.endswith("/zarr.json")]
    for number in range(1, n_exposures):
        own = f"e{number}"
        changes = {"id": own, "number": number, "origin": (0.0, 8.0 * number)}
        exposure = fmt.dump_attributes(first.model_copy(update=changes))
        groups.create_group(objects, exposure_path(own), exposure)
        claim = fmt.dump_attributes(fmt.NumberAttributes(exposure=own))
        groups.create_group(objects, f"exposure_numbers/{number}", claim)
        register(objects, own, names)
        for name, attributes in zip(names, partials, strict=True):
            for key in arrays:
                target = key.replace(partial_path("gpu0", "e0"), partial_path(name, own))
                objects.put(target, [objects.get(key) or b""])
            content = attributes.model_copy(update={"id": uuid.uuid4().hex})
            path = partial_path(name, own)
            groups.replace_attributes(objects, path, fmt.dump_attributes(content))
    groups.replace_attributes(objects, "", fmt.dump_attributes(root))
    return url


def _tiny_maps() -> dict[str, Any]:
    names = "best_phi", "best_theta", "best_psi", "best_defocus", MIP
    names += "correlation_sum", "correlation_squared_sum"
    return {name: np.ones((16, 16), np.float32) for name in names}


# Tables.


def round_trip_table(n_partials: list[int]) -> None:
    """Print the round trips of merges, which do not depend on the delay."""
    print("\nround trips, of a merge of 4 tiles into a new result\n")
    rows = []
    for n in n_partials:
        search = tiny_search(n)
        found = round_trips(search, f"memory://{uuid.uuid4().hex}", tile_size=8)
        rows.append((n, found.start, found.end, f"{found.n_requests:,}"))
    common.table(("partials", "before the first chunk", "after the last", "requests"), rows)


def planning_table(n_exposures: int, delay: float) -> None:
    """Print what it takes to plan a montage."""
    print(f"\nplanning {n_exposures:,} exposures, {1000 * delay:.0f} ms a request\n")
    rows = []
    for n_partials in (1, 2):
        search = tiny_montage(n_exposures, n_partials)
        with as_bucket(delay) as stub:
            started = time.perf_counter()
            prepare([search], f"memory://{uuid.uuid4().hex}", MergeOptions(threads=1))
            seconds = time.perf_counter() - started
        rows.append((n_partials, f"{seconds:.1f}", stub.round_trips, f"{len(stub.requests):,}"))
    common.table(("partials each", "seconds", "round trips", "requests"), rows)


class _TilePhase(Observer):
    """Times a merge from its first tile's reading to the end of its last tile."""

    def started(self, _cluster: object) -> None:
        self.began = self.ended = time.perf_counter()

    def tile_ended(self, _outcome: Outcome) -> None:
        self.ended = time.perf_counter()


def throughput_table(side: int, delay: float, repeats: int, folder: Path) -> None:
    """Print how long the tiles of a merge take, in a directory and in a bucket."""
    n_partials = 4
    local = common.search_of(side, n_partials, PoseForm.EXPLICIT, folder=folder)
    search = in_memory(local)
    nbytes = common.decoded_nbytes(side, n_partials, PoseForm.EXPLICIT)
    seconds: dict[str, list[float]] = {}

    def measure(way: str, source: str | Path, output: str, delay_seconds: float) -> None:
        phase = _TilePhase()
        with as_bucket(delay_seconds):
            merge(source, output, threads=N_THREADS, tile_size=1024, observer=phase)
        seconds.setdefault(way, []).append(phase.ended - phase.began)
        open_objects(output).delete("")

    for number in itertools.count():
        if number == 1:
            seconds.clear()  # the first round warms up
        if number > repeats:
            break
        with tempfile.TemporaryDirectory(dir=folder) as place:
            measure("directory", local, f"{place}/OUT.zarr", 0.0)
        measure("bucket, no delay", search, f"memory://{uuid.uuid4().hex}", 0.0)
        name = f"bucket, {1000 * delay:.0f} ms a request"
        measure(name, search, f"memory://{uuid.uuid4().hex}", delay)
    print(f"\ntiles of {n_partials} explicit partials of {side} x {side}, {N_THREADS} threads\n")
    reference = seconds["directory"]
    rows = [
        (
            way,
            f"{statistics.median(own):.2f}",
            f"{min(own):.2f} - {max(own):.2f}",
            f"{nbytes / statistics.median(own) / 1e9:.2f}",
            f"{statistics.median(b / a for a, b in zip(reference, own, strict=True)):.2f}",
        )
        for way, own in seconds.items()
    ]
    common.table(("store", "seconds", "range", "GB/s decoded", "of the directory's time"), rows)


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--delay-ms", type=float, default=50, help="of a request (%(default)s)")
    options = parser.parse_args()
    delay, repeats = options.delay_ms / 1000, 1 if options.quick else options.repeats
    options.data.mkdir(parents=True, exist_ok=True)
    print(f"{common.machine()}\nmedians of {repeats}")
    round_trip_table([4, 16] if options.quick else [4, 64])
    planning_table(20 if options.quick else 1000, delay)
    throughput_table(1024 if options.quick else 8192, delay, repeats, options.data)


if __name__ == "__main__":
    main()
