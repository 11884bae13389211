"""What ``watch`` shows: the progress of a running search, and what it has found so far."""

import contextlib
import datetime
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from ocelot_em.cli.console import open_console
from ocelot_em.cli.parameters import PathOrUrl
from ocelot_em.cli.text_map import map_text, strip_text
from ocelot_em.errors import (
    IncompleteError,
    InputChangedError,
    InvalidInputError,
    OcelotError,
    StorageError,
    TilesFailedError,
)
from ocelot_em.merge.outcome import Outcome
from ocelot_em.merge.result import MergedResult
from ocelot_em.merge.resume import PreparedMerge
from ocelot_em.model import ranges as sets
from ocelot_em.model.maps import Float32
from ocelot_em.model.options import MergeOptions
from ocelot_em.model.text import count_text, partial_text, percent_text, seconds_text
from ocelot_em.model.threads import map_in_threads
from ocelot_em.particles.picking import find_peaks
from ocelot_em.particles.table import ParticleTable
from ocelot_em.run.api import run_merge
from ocelot_em.run.observer import Observer
from ocelot_em.store.attributes import MergedAttributes, PartialAttributes, SearchAttributes
from ocelot_em.store.lock import has_ended
from ocelot_em.store.objects import open_objects
from ocelot_em.store.progress import SearchProgress, combined, progress_of_partials
from ocelot_em.store.search import read_attributes, read_exposures, read_partials
from ocelot_em.store.sources import prefetch_partials, prefetch_search
from ocelot_em.store.whole_file import write_file
from ocelot_em.view.plots import pooled_zscore

POLL_SECONDS = 2.0
"""Minimum time between two looks at a search; slow storage is asked less often."""

PAGE_SECONDS = 30
"""Time after which a browser loads the page again."""

MAP_EDGE_PX = 256
MAX_DEVICES = 16
"""Maximum number of devices shown; there may be thousands of exposures."""

LOOK_THREADS = 16
"""Number of exposures that are read at a time; a bucket takes its time for each."""

_KEPT = "nan", "poses", "derived", "overlap", "erode", "origins"
"""Options that decide what a result contains; watching has none of them itself."""

_PREFERRED = "running", "writing", "complete"
"""States of devices, in the order in which some are chosen to be shown; the last written first."""


def watch_search(
    run: PathOrUrl, output: PathOrUrl | None, page: PathOrUrl | None, own: Mapping[str, object]
) -> None:
    """Show a search until it is complete, or once; ``own`` are options of the command."""
    once, own = own["once"], {"so_far": True} | {k: v for k, v in own.items() if k != "once"}
    options = MergeOptions.parse(own if output is None else _kept_options(output) | own)
    with contextlib.ExitStack() as stack:
        if output is None:
            output = stack.enter_context(tempfile.TemporaryDirectory(prefix="ocelot-watch-"))
            output = Path(output, "merged.zarr")
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        stack.callback(signal.signal, signal.SIGTERM, before)
        stack.enter_context(contextlib.suppress(KeyboardInterrupt))
        watched = Watched(run, (output, page), options, open_console())
        watched.show_once() if once else watched.follow()


def _kept_options(output: PathOrUrl) -> dict[str, object]:
    """Return the options that decide what an existing result contains: watching keeps them."""
    with contextlib.suppress(OcelotError):  # nothing there, or the merge reports it
        attributes = read_attributes(open_objects(output))
        if isinstance(attributes, MergedAttributes):
            options = attributes.provenance.options
            return {name: options[name] for name in _KEPT if name in options}
    return {}


class Watched(Observer):
    """A search that is watched: its partials, and what the last merge has found.

    Parameters
    ----------
    run
        Path or URL of the search.
    written
        The merged result, and the page, if any.
    options
        How to merge.
    console
        Where it is shown.
    """

    def __init__(
        self,
        run: PathOrUrl,
        written: tuple[PathOrUrl, PathOrUrl | None],
        options: MergeOptions,
        console: Console,
    ) -> None:
        self._objects = open_objects(run)
        (self._output, self._page), self._options = written, options
        self.console = console
        self._partials: list[tuple[str, PartialAttributes]] = []
        self._shown: list[tuple[str, PartialAttributes]] = []
        self._progress: SearchProgress | None = None
        self._has_empty_exposures = False
        self._merged: object = None
        self._picture: Float32 | None = None
        self._found, self._status = "nothing merged yet", ""
        self._n_tiles = self._n_done = 0

    def show_once(self) -> None:
        """Look, merge, and print."""
        self.look()
        self.merge()
        self._print()

    def follow(self) -> None:
        """Look and merge until the search is complete."""
        shown = self._live() if self.console.is_terminal else contextlib.nullcontext()
        with shown:
            while True:
                started = time.monotonic()
                has_news = self.look()
                pause = max(POLL_SECONDS, 10 * (time.monotonic() - started))
                if has_news:
                    self.merge()
                    if not self.console.is_terminal:
                        self._print()
                if self.is_complete:
                    return
                time.sleep(pause)

    def _live(self) -> Live:
        return Live(get_renderable=self.render, console=self.console, refresh_per_second=1)

    def look(self) -> bool:
        """Read the partials; return whether there is anything new to merge."""
        with self._objects.snapshot() as known:
            prefetch_search(known)
            attributes = read_attributes(known)
            if not isinstance(attributes, SearchAttributes):
                raise InvalidInputError(
                    f"{self._objects.url}: expected a search, got a merged result; give the "
                    "search from which it was merged"
                )
            listed = read_exposures(known, attributes)
            prefetch_partials(known, listed)
            exposures = [own.id for own in listed]
            found = list(map_in_threads(partial(read_partials, known), exposures, LOOK_THREADS))
        self._partials = [
            (partial_text(exposure, name), own)
            for exposure, partials in zip(exposures, found, strict=True)
            for name, own in partials
        ]
        self._progress = combined([progress_of_partials(own) for own in found])
        self._has_empty_exposures = not all(found)
        preferred = sorted(self._partials, key=_last_written, reverse=True)
        preferred.sort(key=lambda item: _PREFERRED.index(item[1].state))
        names = {name for name, _ in preferred[:MAX_DEVICES]}
        self._shown = [item for item in self._partials if item[0] in names]
        return bool(readable := self._readable()) and readable != self._merged

    def _readable(self) -> list[str]:
        return [own.id for _, own in self._partials if own.is_readable]

    @property
    def is_complete(self) -> bool:
        """Whether all orientations were searched, or all partials are complete, and merged."""
        if self._readable() != self._merged or self._has_empty_exposures:
            return False
        if self._progress is not None:
            return self._progress.is_whole
        return all(own.state == "complete" for _, own in self._partials)

    def merge(self) -> None:
        """Merge what there is, and look for particles."""
        readable = self._readable()
        try:
            run_merge(str(self._objects.url), self._output, self._options, self)
            self._status = "looking for particles"
            merged = MergedResult.open(self._output)
            particles: ParticleTable | None = None
            try:
                particles = find_peaks(merged)
                about = particles.about
                cutoff = f" above z = {about.cutoff_text}" if about else ""
                self._found = f"{count_text(len(particles), 'particle')}{cutoff}"
            except InvalidInputError as error:
                self._found = f"no particles could be picked: {error}"
            if (counted := merged.statistics) and counted.scaled_mip_range:
                self._found += f"; highest z-score {counted.scaled_mip_range[1]:.2f}"
            self._picture = pooled_zscore(merged, MAP_EDGE_PX)[0]
            if self._page is not None:
                self._status = f"writing {self._page}"
                self._write_page(merged, particles)
        except (IncompleteError, InputChangedError, StorageError, TilesFailedError) as error:
            self._status = f"not merged: {error}"
            return
        self._merged, self._status = readable, f"merged at {datetime.datetime.now():%H:%M:%S}"

    def _write_page(self, merged: MergedResult, particles: ParticleTable | None) -> None:
        from ocelot_em.view.report import report_page

        assert self._page is not None
        progress = merged.plan.progress
        refresh = PAGE_SECONDS if progress and not progress.is_whole else None
        page = report_page(merged, particles=particles, refresh_seconds=refresh)
        write_file(self._page, page)

    def planned(self, ready: PreparedMerge, _options: MergeOptions) -> None:
        """Begin to count tiles."""
        self._n_tiles, self._n_done = ready.forecast.n_tiles, ready.forecast.n_done

    def waiting(self, reason: str) -> None:
        """Show why the merge is waiting."""
        self._status = reason

    def compiling(self) -> None:
        """Show that kernels are compiled."""
        self._status = "compiling kernels (once after an installation)"

    def tile_ended(self, outcome: Outcome) -> None:
        """Count a tile."""
        self._n_done += outcome.summary is not None
        self._status = f"merging: {self._n_done:,} of {count_text(self._n_tiles, 'tile')}"

    def _summary(self) -> tuple[str, float | None]:
        """Return the progress of the search in words, and as a share."""
        if self._progress is not None:
            return self._progress.text, self._progress.share
        n = sum(own.state == "complete" for _, own in self._partials)
        return f"{n} of {count_text(len(self._partials), 'partial')} complete", None

    def render(self) -> RenderableType:
        """Everything, for a terminal."""
        text, share = self._summary()
        parts: list[RenderableType] = [self._objects.url, text]
        if share is not None:
            bar = Table.grid()  # which ends the line
            bar.add_row(ProgressBar(total=1, completed=share, width=self.console.width - 1))
            parts.append(bar)
        rows = list(self._rows())
        table = Table("device", "state", "searched", "", "last checkpoint", "rate", box=None)
        for name, state, searched, strip, last, rate in rows:
            table.add_row(name, state, searched, strip, last, rate)
        parts += [table, *self._others(), self._found, self._status]
        n_lines = self.console.height - len(parts) - len(rows) - 2
        if self._picture is not None and n_lines > 2:
            parts.append(map_text(self._picture, self.console, n_lines))
        return Group(*parts)

    def _others(self) -> list[str]:
        """Count the devices that are not shown, by state."""
        states = Counter[str](own.state for _, own in self._partials)
        states.subtract(own.state for _, own in self._shown)
        counts = ", ".join(f"{states[state]:,} {state}" for state in _PREFERRED if states[state])
        return [f"and others: {counts}"] if counts else []

    def _rows(self) -> Iterator[Sequence[str]]:
        """Describe each device shown: name, state, share searched, strip, last checkpoint, rate."""
        now = datetime.datetime.now(datetime.UTC)
        width = min(max(self.console.width - 64, 4), 40)
        for name, own in self._shown:
            found, about = own.coverage, own.recording
            searched = strip = last = rate = ""
            state: str = own.state
            if found is not None:
                n, total = sets.size(found.ranges), found.n_orientations
                searched = f"{n:,} ({percent_text(n / total)})"
                strip = strip_text(found.ranges, total, width, self.console.encoding)
                if about is not None:
                    start, end = map(
                        datetime.datetime.fromisoformat, (about.started, about.heartbeat)
                    )
                    ago = max((now - end).total_seconds(), 0)
                    last = f"{seconds_text(ago, is_rough=True)} ago"
                    per_minute = n / max((end - start).total_seconds(), 1) * 60
                    rate = f"{per_minute:,.0f}/min" if per_minute >= 10 else f"{per_minute:.2g}/min"
            if state == "running" and about is not None and has_ended(about.process):
                state = "ended"
            yield name, state, searched, strip, last, rate

    def _print(self) -> None:
        """Print once: everything on a terminal, plain lines elsewhere."""
        if self.console.is_terminal:
            self.console.print(self.render())
            return
        self.console.print(f"{self._objects.url}: {self._summary()[0]}")
        for name, state, searched, _, last, rate in self._rows():
            facts = (state, searched, last and f"wrote {last}", rate)
            self.console.print(f"  {name}: {', '.join(filter(None, facts))}")
        for others in self._others():
            self.console.print(f"  {others}")
        self.console.print(f"  {self._found} ({self._status})")


def _last_written(named: tuple[str, PartialAttributes]) -> str:
    """Return the time of the last checkpoint, empty without any."""
    about = named[1].recording
    return about.heartbeat if about is not None else ""
