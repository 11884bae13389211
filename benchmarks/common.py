"""What the benchmarks share: data, turns, memory, the machine's name and tables.

``python -m benchmarks.common [--quick]`` prints the machine and how fast it copies memory and
files, to judge the other figures by.
"""

import argparse
import contextlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from ocelot_em.merge.job import JobSpec
from ocelot_em.merge.merge import Executor, merge
from ocelot_em.merge.outcome import SUMMARY_FIELDS, MergeReport, Outcome, Outcomes, TileSummary
from ocelot_em.merge.resume import PreparedMerge
from ocelot_em.model.maps import MAPS, MapSet, PoseForm
from ocelot_em.model.options import MergeOptions
from ocelot_em.model.regions import ceil_div
from ocelot_em.store import arrays as store
from ocelot_em.store import attributes as fmt
from ocelot_em.store import constants, groups
from ocelot_em.store.constants import DEFAULT_CHUNK
from ocelot_em.store.contract import Objects
from ocelot_em.store.creation import write_search_space
from ocelot_em.store.lock import OutputLock
from ocelot_em.store.objects import open_objects
from ocelot_em.store.search import partial_path, read_attributes, read_partials, read_search_space
from ocelot_em.testing.simulation import STORE_NAME, TRUTH_NAME, Simulation, simulate

PROJECTIONS_PER_POSE = 159
"""Makes 20.5 million cross-correlations, as many as a usual search has."""

PIXELS_PER_PARTICLE = 60_000
PACKAGES = ("ocelot-em", "numpy", "numba", "dask", "zarr", "numcodecs")
SAMPLE_SECONDS = 0.02
_BLOCK_NBYTES = 16 * 2**20
_BLOCKS_BETWEEN_LOOKS = 16


@dataclass(frozen=True)
class Run:
    """One run of one way.

    Parameters
    ----------
    seconds
        How long it took.
    process_nbytes
        Most resident memory of any one process, shared libraries included.
    total_nbytes
        Most memory of all processes at one time, in which shared libraries count once.
    output
        What it printed.
    """

    seconds: float
    process_nbytes: int = 0
    total_nbytes: int = 0
    output: str = ""


@dataclass
class Measured:
    """All measured runs of one way, in the order in which they ran."""

    runs: list[Run] = field(default_factory=list)

    @property
    def seconds(self) -> list[float]:
        return [run.seconds for run in self.runs]

    @property
    def median(self) -> float:
        """Median of the seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> str:
        """Shortest and longest, as text."""
        return f"{min(self.seconds):.2f} - {max(self.seconds):.2f}"

    @property
    def process_nbytes(self) -> int:
        """Most resident memory of any process in any run."""
        return max(run.process_nbytes for run in self.runs)

    @property
    def total_nbytes(self) -> int:
        """Most memory of all processes in any run."""
        return max(run.total_nbytes for run in self.runs)


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Parser with the options that all benchmarks have; a benchmark may add its own."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a small size, once")
    parser.add_argument("--repeats", type=int, default=5, help="measured rounds (%(default)s)")
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FOLDER",
        default=Path(tempfile.gettempdir(), "ocelot-bench"),
        help="where simulated searches are kept for later runs (%(default)s)",
    )
    return parser


def search_of(side: int, n_partials: int, form: PoseForm, *, folder: Path) -> Path:
    """A simulated search of ``side`` x ``side`` pixels, made once and then found again.

    Memory is a few chunks, whatever the size. What an interrupted run left, or what is stored
    otherwise than this version would, is made anew.

    Parameters
    ----------
    side
        Height and width of the maps in pixels.
    n_partials
        Devices that shared the search.
    form
        Explicit or indexed poses.
    folder
        Where searches are kept; made if it is not there.

    Returns
    -------
    Path
        The store.
    """
    place = folder / f"{form}-{side}-x{n_partials}-{version('ocelot-em')}"
    complete = (place / TRUTH_NAME).exists()  # written last
    if not complete or not _is_stored_as_now(place / STORE_NAME, side, form):
        shutil.rmtree(place, ignore_errors=True)
        simulation = Simulation(
            (side, side),
            n_partials,
            side * side // PIXELS_PER_PARTICLE,
            seed=1,
            form=form,
            projections_per_pose=PROJECTIONS_PER_POSE,
            chunk_files=True,  # so that all ways read the same files
        )
        simulate(place, simulation, n_threads=n_cores())
    return place / STORE_NAME


def _is_stored_as_now(search: Path, side: int, form: PoseForm) -> bool:
    """Whether the maps have the chunks and codecs that a search written now would have."""
    partial = next((search / "partials").glob("device_*"), search)
    chunk = min(side, DEFAULT_CHUNK)
    with tempfile.TemporaryDirectory() as folder:
        for name in MapSet(form).partial:
            store.create_map(open_objects(folder), name, name, (side, side), (chunk, chunk))
            metadata = partial / name / "zarr.json"
            if not metadata.exists():
                return False
            found = json.loads(metadata.read_text())
            now = json.loads(Path(folder, name, "zarr.json").read_text())
            if any(now[key] != found[key] for key in ("codecs", "chunk_grid")):
                return False
    return True


def decoded_nbytes(side: int, n_partials: int, form: PoseForm) -> int:
    """Bytes of all maps of a simulated search in memory."""
    per_pixel = sum(np.dtype(MAPS[name].dtypes[0]).itemsize for name in MapSet(form).partial)
    return n_partials * per_pixel * side * side


def repeated(
    search: Path, place: Path, side: int, *, n_partials: int, n_rows: int | None = None
) -> Path:
    """A search of any size that takes no space: hard links to the chunks of a small one.

    Parameters
    ----------
    search
        The small one, of whole chunks.
    place
        The store to make, on the same file system.
    side
        Height and width of its maps in pixels.
    n_partials
        Of the small one's partials so many, each taken again if it has fewer.
    n_rows
        Rows of chunks that are there; None for all. A store without chunks can be planned.

    Returns
    -------
    Path
        ``place``.
    """
    small, large = open_objects(search), open_objects(place)
    about, partials = read_attributes(small), read_partials(small)
    taken = [partials[number % len(partials)] for number in range(n_partials)]
    margins = [n - n_valid for n, n_valid in zip(about.shape, about.valid_shape, strict=True)]
    changes = {
        "format_version": 2,  # without manifests
        "shape": (side, side),
        "valid_shape": (side - margins[0], side - margins[1]),
        "total_projections": sum(attributes.total_projections for _, attributes in taken),
    }
    groups.create_group(large, "", fmt.dump_attributes(about.model_copy(update=changes)))
    groups.create_group(large, constants.PARTIALS, {})
    space = read_search_space(small, about.search_space_digest)
    if space is not None:
        write_search_space(large, space)
    for number, (name, attributes) in enumerate(taken):
        changes = {"id": uuid.uuid4().hex, "order": number, "manifest": None}
        own = attributes.model_copy(update=changes)
        path = partial_path(f"p{number}")
        groups.create_group(large, path, fmt.dump_attributes(own))
        for source in (search / partial_path(name)).glob("*/zarr.json"):
            if source.parent.name in MAPS:
                _repeat_map(source.parent, large, f"{path}/{source.parent.name}", side, n_rows)
    return place


def _repeat_map(source: Path, large: Objects, path: str, side: int, n_rows: int | None) -> None:
    about = json.loads((source / "zarr.json").read_text())
    small, (chunk, _) = about["shape"], about["chunk_grid"]["configuration"]["chunk_shape"]
    if any(n % chunk for n in small):
        raise ValueError(f"{source}: expected whole chunks of {chunk}, got shape {small}")
    large.put(f"{path}/zarr.json", [json.dumps({**about, "shape": [side, side]}).encode()])
    n, n_small = ceil_div(side, chunk), small[0] // chunk
    for iy in range(n if n_rows is None else min(n, n_rows)):
        row = Path(large.url, path, "c", str(iy))
        row.mkdir(parents=True)
        for ix in range(n):
            row.joinpath(str(ix)).hardlink_to(source / f"c/{iy % n_small}/{ix % n_small}")


def merge_alone(
    ready: PreparedMerge,
    options: MergeOptions,
    executor: Executor,
    on_outcome: Callable[[Outcome], None] = lambda _: None,
) -> MergeReport:
    """Merge what is prepared, with an executor of one's own."""
    with OutputLock(open_objects(ready.output)) as lock:
        return merge(ready, options, executor, lock, on_outcome)


def do_nothing(_work: JobSpec, tiles: Iterable[tuple[int, int]]) -> Outcomes:
    """A task that merges nothing, to measure what all else costs."""
    summary = TileSummary(*(0 for _ in SUMMARY_FIELDS))
    for iy, ix in tiles:
        yield Outcome(iy, ix, summary)


def in_turn(
    ways: Mapping[str, Callable[[], object]],
    repeats: int,
    *,
    warm_up: bool = True,
    before: Callable[[], object] = lambda: None,
) -> dict[str, Measured]:
    """Run all ways in turn, so that what else goes on in the machine hits them alike.

    Parameters
    ----------
    ways
        What to run, by name. A way that returns a :class:`Run` has timed itself; of all others the
        time of the call counts.
    repeats
        Measured rounds, at least 1.
    warm_up
        Whether a round that does not count comes first.
    before
        Called before every run; its time does not count.
    """
    measured = {name: Measured() for name in ways}
    for number in range(-1 if warm_up else 0, repeats):
        for name, way in ways.items():
            before()
            started = time.perf_counter()
            result = way()
            seconds = time.perf_counter() - started
            if number >= 0:
                measured[name].runs.append(result if isinstance(result, Run) else Run(seconds))
    return measured


def run_and_watch(args: Sequence[str]) -> Run:
    """Run a command and watch the memory of its process and of all that descend from it.

    Linux only. Looks every 20 ms: peaks of one process are the kernel's own record and exact but
    for a process's last 20 ms; the peak over all processes is sampled.

    Raises
    ------
    RuntimeError
        The command failed; with the end of what it wrote to standard error.
    """
    process_nbytes = total_nbytes = 0
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        started = time.perf_counter()
        with subprocess.Popen(args, stdout=output, stderr=errors) as process:
            while process.poll() is None:
                largest, together = _memory_of_tree(process.pid)
                process_nbytes = max(process_nbytes, largest)
                total_nbytes = max(total_nbytes, together, largest)
                time.sleep(SAMPLE_SECONDS)
        seconds = time.perf_counter() - started
        for file in (output, errors):
            file.seek(0)
        if process.returncode:
            complaint = errors.read().decode(errors="replace")[-4000:]
            raise RuntimeError(f"{' '.join(args)} ended with {process.returncode}:\n{complaint}")
        return Run(seconds, process_nbytes, total_nbytes, output.read().decode())


def _memory_of_tree(root: int) -> tuple[int, int]:
    """Largest peak of a process so far, and what all take together now, in bytes."""
    largest = own = files = 0
    todo = [root]
    while todo:
        pid = todo.pop()
        status, children = _read_process(pid)
        todo += children
        largest = max(largest, status.get("VmHWM", 0))
        own += status.get("RssAnon", 0) + status.get("RssShmem", 0)
        # Processes of one program map the same libraries: count them once.
        files = max(files, status.get("RssFile", 0))
    return largest, own + files


def _read_process(pid: int) -> tuple[dict[str, int], list[int]]:
    """Bytes by name in a process's status, and its children; nothing if it has just ended."""
    place = Path("/proc", str(pid))
    status: dict[str, int] = {}
    children: list[int] = []
    try:
        for line in (place / "status").read_text().splitlines():
            name, _, value = line.partition(":")
            if value.endswith(" kB"):
                status[name] = int(value.removesuffix(" kB")) * 1024
        for thread in (place / "task").iterdir():
            children += map(int, (thread / "children").read_text().split())
    except (FileNotFoundError, ProcessLookupError):
        pass  # a process or a thread that is gone
    return status, children


def resident_nbytes() -> int:
    """Memory that this process takes now."""
    return _read_process(os.getpid())[0]["VmRSS"]


def peak_nbytes() -> int:
    """Most memory that this process has taken so far."""
    return _read_process(os.getpid())[0]["VmHWM"]


def in_own_process(module: str, *args: str) -> Any:
    """Run a benchmark's own ``--one`` in a fresh process; what it printed, as JSON."""
    command = [sys.executable, "-m", module, "--one", *args]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def warm(path: Path) -> int:
    """Read all files below a path once, so that they are in the page cache; their bytes."""
    block = bytearray(_BLOCK_NBYTES)
    nbytes = 0
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        with file.open("rb", buffering=0) as stream:
            while n := stream.readinto(block):
                nbytes += n
    return nbytes


@contextlib.contextmanager
def full_memory(folder: Path, *, quick: bool = False) -> Iterator[Callable[[], None]]:
    """Give a function that takes all free memory for the page cache, to be called before each run.

    As on a machine after days of work. Virtual machines give pages that are free for a few seconds
    back to their host, and the first touch of such a page costs ten times its use: writing 3 MB
    into the page cache then takes 7 ms instead of 0.7, and what is measured is the host. Pages of
    the page cache stay, and can be had at once.

    Parameters
    ----------
    folder
        On a disk, for a sparse file that is gone afterwards.
    quick
        Give a function that does nothing.
    """
    if quick:
        yield lambda: None
        return
    block, size, position = bytearray(_BLOCK_NBYTES), 2 * memory_nbytes(), 0
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        file.truncate(size)

        def fill() -> None:
            nonlocal position
            free, n_read = _free_nbytes(), 0
            while n_read < size:
                for _ in range(_BLOCKS_BETWEEN_LOOKS):
                    n_read += os.preadv(file.fileno(), [block], position)
                    position = (position + _BLOCK_NBYTES) % size
                before, free = free, _free_nbytes()
                if before - free < _BLOCKS_BETWEEN_LOOKS * _BLOCK_NBYTES // 4:
                    return  # the kernel takes the pages from what it has read before

        yield fill


def _free_nbytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def n_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0))


def memory_nbytes() -> int:
    """Memory of this machine in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def machine() -> str:
    """Processor, memory, kernel and versions, in two lines; nothing that names the machine."""
    hardware = f"{_processor()}, {n_cores()} cores, {memory_nbytes() / 2**30:.0f} GiB"
    system = f"{platform.system()} {platform.release()}"
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return f"{hardware}, {system}\nPython {platform.python_version()}, {packages}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.machine())


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print an aligned Markdown table: the first column to the left, the others to the right."""
    cells = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        for row in cells
    ]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    for line in (lines[0], rule, *lines[1:]):
        print(f"| {' | '.join(line)} |")


def main() -> None:
    options = arguments(__doc__).parse_args()
    nbytes = 2**24 if options.quick else 2**30
    source, target = np.ones(nbytes, np.uint8), np.zeros(nbytes, np.uint8)
    options.data.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.data) as folder:
        file = Path(folder, "bytes")
        ways: dict[str, Callable[[], object]] = {
            "copy memory": lambda: np.copyto(target, source),
            "write a file": lambda: source.tofile(file),
            "read it, from the page cache": lambda: warm(file.parent),
        }
        measured = in_turn(ways, 1 if options.quick else options.repeats)
    print(f"{machine()}\none thread, {nbytes:,} bytes\n")
    rows = [
        (name, f"{m.median:.3f}", m.spread, f"{nbytes / m.median / 1e9:.1f}")
        for name, m in measured.items()
    ]
    table(("way", "seconds", "lowest - highest", "GB/s"), rows)


if __name__ == "__main__":
    main()
