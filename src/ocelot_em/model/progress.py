"""Progress that people watch: a bar on a terminal or in a notebook, the rate and the time left."""

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape
from typing import Any, Literal, NamedTuple, Self
from uuid import uuid4

OnProgress = Callable[[str, float], None]
"""Called with a phase and the fraction of it done, 0 to 1."""

LINE_SECONDS = 5.0
"""Interval between lines where there is neither a terminal nor a notebook, and in logs."""

NOTEBOOK_SECONDS = 0.25
"""Minimum interval between updates of a bar in a notebook."""

REFRESHES_PER_SECOND = 4
"""Number of times per second that a bar on a terminal is drawn."""

WINDOW_SECONDS = 20.0
"""Time over which a rate is measured, if enough steps end in it."""

STEPS_PER_THREAD = 4
"""Minimum number of steps of each thread over which a rate is measured, once there are so many."""

SETTLED_SECONDS = 1.0
"""Minimum time of work before a rate is stated."""

RESOLUTION_SECONDS = 0.1
"""Steps that end within this time are kept as one."""


class _Moment(NamedTuple):
    at: float
    n_steps: int
    nbytes: int


class Pace:
    """Rate at which the steps of several threads end; unknown until each thread has ended one.

    Parameters
    ----------
    n_threads
        Returns the number of threads at work, which may change.

    Examples
    --------
    >>> pace = Pace(lambda: 2)
    >>> pace.step(1000)
    >>> pace.steps_per_second is None
    True
    """

    def __init__(self, n_threads: Callable[[], int] = lambda: 1) -> None:
        self._n_threads = n_threads
        self.restart()

    def restart(self) -> None:
        """Forget all steps: work starts now."""
        self._restarted = time.perf_counter()
        self._start = _Moment(self._restarted, 0, 0)
        self._moments = deque([self._start])

    def step(self, nbytes: int = 0, seconds: float | None = None) -> None:
        """Count a step that has ended, and which took so long if that is known.

        The work starts with the first step: workers may have to start before.
        """
        moments, now = self._moments, time.perf_counter()
        if len(moments) == 1 and seconds is not None:
            self._start = moments[0] = _Moment(max(self._start.at, now - seconds), 0, 0)
        _, n_steps, total = moments[-1]
        if len(moments) > 2 and now - moments[-2].at < RESOLUTION_SECONDS:
            moments.pop()
        moments.append(_Moment(now, n_steps + 1, total + nbytes))
        enough = STEPS_PER_THREAD * max(self._n_threads(), 1)
        while now - moments[1].at > WINDOW_SECONDS and n_steps + 1 - moments[1].n_steps >= enough:
            moments.popleft()

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._restarted

    @property
    def steps_per_second(self) -> float | None:
        """Latest rate of steps, or None."""
        (first, *_, last), n_threads = self._pair, max(self._n_threads(), 1)
        if last.n_steps < n_threads or last.at - self._start.at < SETTLED_SECONDS:
            return None
        # At the start no step is half done; later, one of each thread is.
        n_steps = last.n_steps - first.n_steps + (n_threads / 2 if first is self._start else 0)
        return n_steps / max(last.at - first.at, 1e-9)

    @property
    def bytes_per_second(self) -> float | None:
        """Latest rate of bytes, or None."""
        (first, *_, last), rate = self._pair, self.steps_per_second
        if rate is None:
            return None
        return rate * (last.nbytes - first.nbytes) / max(last.n_steps - first.n_steps, 1)

    def seconds_left(self, n_steps: int) -> float | None:
        """Return the estimated time until so many more steps have ended, or None."""
        rate = self.steps_per_second
        if not rate:
            return None
        return max(n_steps / rate - (time.perf_counter() - self._moments[-1].at), 0.0)

    @property
    def _pair(self) -> tuple[_Moment, _Moment]:
        return self._moments[0], self._moments[-1]


Face = Literal["terminal", "notebook", "lines", "none"]
"""Where progress is shown."""


def choose_face(progress: bool | None) -> Face:
    """Choose where progress is shown: by itself in notebooks and interactive sessions only.

    Parameters
    ----------
    progress
        True: always, as lines if there is no terminal. False: never. None: in a notebook, and where
        a person types into a terminal; not in a script.

    Examples
    --------
    >>> choose_face(False)
    'none'
    """
    shell = None
    if "IPython" in sys.modules:
        from IPython import get_ipython

        shell = get_ipython()
    if progress is False:
        return "none"
    if hasattr(shell, "kernel"):
        return "notebook"
    if progress is None and shell is None and not hasattr(sys, "ps1"):
        return "none"
    return "terminal" if sys.stderr.isatty() else "lines" if progress else "none"


class Bar:
    """A bar with a label and a text, where someone watches; a context manager.

    Parameters
    ----------
    progress
        As of :func:`choose_face`; ignored if there is a console.
    console
        The rich console of a command; shows a bar if it is a terminal, and else lines.

    Examples
    --------
    >>> with Bar(progress=False) as bar:
    ...     bar.show("reading", 0.5, "1 of 2 files")
    """

    def __init__(self, progress: bool | None = None, console: Any = None) -> None:
        self.face: Face = choose_face(progress)
        if console is not None:
            self.face = "terminal" if console.is_terminal else "lines"
        self.console = console
        if console is None and self.face in ("terminal", "lines"):
            from rich.console import Console

            self.console = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
        self._label = ""
        self._share: float | None = None
        self._text: Callable[[], str] = str
        self._links: dict[str, str] = {}
        self._id, self._is_displayed, self._shown_at = uuid4().hex, False, time.perf_counter()
        self._bar: Any = None

    def say(self, text: str) -> None:
        """Print a line above the bar; in a notebook, nothing."""
        if self.face in ("terminal", "lines"):
            self.console.print(text)

    def link(self, name: str, url: str) -> None:
        """Show a link."""
        self.say(f"{name}: {url}")
        self._links[name] = url

    def show(
        self,
        label: str,
        share: float | None,
        text: str | Callable[[], str] = "",
        *,
        now: bool = False,
    ) -> None:
        """Show what happens, how much of it is done (None if not known), and a text.

        A text that is a function is called whenever the bar is drawn. ``now`` marks the start of a
        phase, which a notebook shows at once; lines follow later.
        """
        self._label, self._share = label, share
        self._text = text if callable(text) else lambda: text
        if self.face == "terminal":
            self._draw()
        elif self.face != "none":
            at = time.perf_counter()
            interval = NOTEBOOK_SECONDS if self.face == "notebook" else LINE_SECONDS
            if now or at - self._shown_at >= interval:
                self._shown_at = at
                if self.face == "notebook":
                    self._display()
                elif not now:
                    self._print()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.face == "notebook" and self._label:
            self._display()
        if self._bar is not None:
            self._bar.stop()

    def __rich__(self) -> str:
        return self._text()

    def _draw(self) -> None:
        from rich.progress import BarColumn, Progress, RenderableColumn, TextColumn

        if self._bar is None:
            columns = TextColumn("{task.description}", markup=False), BarColumn()
            self._bar = Progress(
                *columns,
                RenderableColumn(self),
                console=self.console,
                refresh_per_second=REFRESHES_PER_SECOND,
            )
            self._bar.add_task("")
        (task,) = self._bar.tasks
        task.description, task.completed = self._label, self._share or 0.0
        task.total = None if self._share is None else 1.0
        self._bar.start()

    def _print(self) -> None:
        self.say(", ".join(filter(None, [self._label, self._text()])))

    def _display(self) -> None:
        from IPython import display

        text, value = self._text(), "" if self._share is None else f' value="{self._share:.4f}"'
        links = [
            f' <a href="{escape(url)}" target="_blank">{escape(name)}</a>'
            for name, url in self._links.items()
        ]
        html = (
            f"<div>{escape(self._label)} <progress{value}></progress> {escape(text)}"
            f"{''.join(links)}</div>"
        )
        plain = [f"{self._label} {text}", *(f"{k}: {v}" for k, v in self._links.items())]
        data = {"text/html": html, "text/plain": "\n".join(plain)}
        display.display(data, raw=True, display_id=self._id, update=self._is_displayed)  # type: ignore[no-untyped-call]
        self._is_displayed = True


@contextmanager
def share_bar(
    progress: bool | OnProgress | None = None, console: Any = None
) -> Iterator[OnProgress]:
    """Show the progress of a function that reports a phase and its finished fraction.

    Parameters
    ----------
    progress, console
        As of :class:`Bar`; or a function that is called instead of showing a bar.

    Examples
    --------
    >>> with share_bar(progress=False) as on_progress:
    ...     on_progress("read", 0.5)
    """
    if callable(progress):
        yield progress
        return
    with Bar(progress, console) as bar:

        def on_progress(phase: str, fraction: float) -> None:
            bar.show(phase, fraction, f"{fraction:.0%}", now=fraction in (0, 1))

        yield on_progress
