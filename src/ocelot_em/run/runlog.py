"""Records of a run: a log of JSON lines, and a run folder."""

import contextlib
import dataclasses
import datetime
import json
import logging
import os
import platform
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from os import PathLike
from pathlib import Path
from typing import Any, Self

from ocelot_em.errors import InvalidInputError, OcelotError, printable
from ocelot_em.merge.outcome import MergeReport, Outcome
from ocelot_em.merge.result import MergedResult
from ocelot_em.merge.resume import PreparedMerge
from ocelot_em.model.options import MergeOptions
from ocelot_em.model.progress import LINE_SECONDS
from ocelot_em.run.clusters import Cluster
from ocelot_em.run.observer import Observer, TileProgress
from ocelot_em.store.objects import is_local, normalise_url
from ocelot_em.store.whole_file import write_file

log = logging.getLogger(__name__)

PACKAGES = (
    *("ocelot-em", "dask", "distributed", "zarr", "numcodecs", "numpy", "numba", "obstore"),
    *("dask-jobqueue", "dask-cuda", "cupy-cuda12x", "cupy-cuda13x"),
)
"""Packages whose versions a run folder records, if they are installed."""


class RunLog(TileProgress):
    """Writes the progress of a merge, and its log messages, as JSON lines.

    A context manager. Every line has ``time`` (UTC), ``run`` (one identifier per run; a resumed run
    has a new one) and ``event``. ``path`` is appended to; ``-`` is standard error.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.run_id = uuid.uuid4().hex[:12]
        self._path = os.fspath(path)
        self._writing = threading.Lock()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        """Open the file."""
        if self._path == "-":
            self._file = sys.stderr
        else:
            try:
                Path(self._path).parent.mkdir(parents=True, exist_ok=True)
                # One write per line keeps the lines of several runs whole.
                self._file = self._stack.enter_context(Path(self._path).open("a", buffering=1))
            except OSError as error:
                raise InvalidInputError(f"log {self._path}: cannot be written: {error}") from error
        root, handler = logging.getLogger(), _Handler(self.event)
        root.addHandler(handler)
        self._stack.callback(root.removeHandler, handler)
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        """Write how the run ended, and close the file."""
        state, text = ("done", "") if error is None else (type(error).__name__, str(error))
        self.event("ended", state=state, text=text)
        with contextlib.suppress(OSError):  # what could not be written is still in the buffer
            self._stack.close()

    def event(self, event: str, **fields: object) -> None:
        """Write a line; a write error, such as a full disk, does not end the run."""
        at = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        line = json.dumps(
            _printable({"time": at, "run": self.run_id, "event": event, **fields}), default=str
        )
        with self._writing, contextlib.suppress(OSError, ValueError):
            self._file.write(line + "\n")

    def planned(self, ready: PreparedMerge, options: MergeOptions) -> None:
        super().planned(ready, options)
        cost = ready.forecast
        self.event(
            "planned",
            output=ready.output,
            host=socket.gethostname(),
            pid=os.getpid(),
            tiles=cost.n_tiles,
            tiles_done=cost.n_done,
            partials=len(ready.plan.contributions),
            bytes_to_read=cost.stored_nbytes_in,
            bytes_to_write=cost.stored_nbytes_out,
            worker_bytes=cost.worker_nbytes,
            device=cost.device.kind,
            options=options.model_dump(mode="json"),
        )

    def waiting(self, reason: str) -> None:
        self.event("waiting", reason=reason)

    def locked(self, stop: Callable[[], None]) -> None:  # noqa: ARG002
        self.event("locked")

    def started(self, cluster: Cluster) -> None:
        super().started(cluster)
        self._progress_at = time.monotonic()
        self.event("started", cluster=cluster.description, dashboard=cluster.dashboard)

    def compiling(self) -> None:
        self.event("compiling")

    def compiled(self, seconds: float) -> None:
        super().compiled(seconds)
        self.event("compiled", seconds=round(seconds, 3))

    def tile_ended(self, outcome: Outcome) -> None:
        tile = outcome.summary
        fields: dict[str, object] = {"error": outcome.error, "is_transient": outcome.is_transient}
        if tile is not None:
            seconds = {phase: round(value, 6) for phase, value in tile.seconds.items()}
            nbytes = {kind: int(value) for kind, value in tile.nbytes.items()}
            fields = {"seconds": seconds, "bytes": nbytes}
        state, position = "failed" if tile is None else "merged", [outcome.iy, outcome.ix]
        self.event("tile", tile=position, state=state, worker=outcome.where, **fields)
        super().tile_ended(outcome)
        if time.monotonic() - self._progress_at >= LINE_SECONDS:
            self._progress_at = time.monotonic()
            self._log_progress()

    def _log_progress(self) -> None:
        left, rate = self.seconds_left, self.pace.bytes_per_second
        self.event(
            "progress",
            tiles=self.n_tiles,
            tiles_done=self.n_done,
            tiles_failed=len(self.failed),
            bytes_per_second=None if rate is None else round(rate),
            seconds_left=None if left is None else round(left),
        )

    def merged(self, report: MergeReport) -> None:
        """Write the totals of the merge."""
        self.event(
            "merged",
            tiles=report.n_tiles,
            tiles_merged=report.n_merged,
            seconds=round(report.seconds, 3),
            compile_seconds=round(report.compile_seconds, 3),
            totals=dataclasses.asdict(report.totals),
        )


def _printable(value: object) -> object:
    """Escape the control characters of all texts in a value."""
    if isinstance(value, str | os.PathLike):
        return printable(str(value))
    if isinstance(value, Mapping):
        return {key: _printable(item) for key, item in value.items()}
    return [_printable(item) for item in value] if isinstance(value, list | tuple) else value


class _Handler(logging.Handler):
    """Forwards this package's messages, and warnings of other packages."""

    def __init__(self, event: Callable[..., None]) -> None:
        super().__init__(logging.INFO)
        self._event = event

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno < logging.WARNING and not record.name.startswith("ocelot_em"):
            return
        with contextlib.suppress(Exception):  # like logging itself: no log may end a run
            self._event(
                "message",
                level=record.levelname.lower(),
                logger=record.name,
                text=record.getMessage(),
            )


class RunFolder(Observer):
    """Keeps a run's configuration, versions, log, performance reports, statistics and report.

    A context manager. A resumed run uses the same folder: it appends to the log, and adds a
    performance report.
    """

    def __init__(self, path: str | PathLike[str], write_config: Callable[[Path], None]) -> None:
        if not is_local(normalise_url(path)):
            raise InvalidInputError(f"run folder {path}: expected a local folder")
        self.path = Path(normalise_url(path))
        self._write_config = write_config
        self._performance = contextlib.ExitStack()

    @property
    def log_file(self) -> Path:
        """Path of the run's log."""
        return self.path / "log.jsonl"

    def __enter__(self) -> Self:
        """Create the folder, and write the configuration and versions."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._write_config(self.path / "config.yaml")
            self._write("versions.json", _versions())
        except OSError as error:
            raise InvalidInputError(
                f"run folder {self.path}: cannot be written: {error}"
            ) from error
        return self

    def __exit__(self, *_: object) -> None:
        self.ending()

    def started(self, cluster: Cluster) -> None:
        number = sum(1 for _ in self.path.glob("performance*.html")) + 1
        name = "performance.html" if number == 1 else f"performance-{number}.html"
        self._performance.enter_context(cluster.profiled(self.path / name))

    def ending(self) -> None:
        try:
            self._performance.close()
        except Exception as error:  # a lost cluster has none
            log.warning("no performance report: %s", error)

    def merged(self, report: MergeReport) -> None:
        """Write the statistics, and the report if figures can be drawn."""
        merged = MergedResult.open(report.output)
        if merged.statistics is not None:
            self._write("statistics.json", merged.statistics.model_dump(mode="json"))
        try:
            from ocelot_em.view.report import write_report

            write_report(merged, self.path / "report.html")
        except (OcelotError, ImportError) as error:
            log.warning("no report: %s", error)

    def _write(self, name: str, content: Mapping[str, Any]) -> None:
        write_file(self.path / name, (json.dumps(content, indent=2) + "\n").encode())


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
