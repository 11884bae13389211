"""A page of the dashboard of Dask: the tiles of a merge, its rate, and what workers spend time on.

Everything here runs in the process of the scheduler.
"""

import time
from collections import deque
from html import escape
from typing import Any, NamedTuple

import numpy as np

from ocelot_em.merge.outcome import ACTIVITIES
from ocelot_em.model.maps import AnyArray

PAGE = "ocelot"
"""Path of the page."""

MAX_CELLS = 200
"""Maximum number of rows and columns of the picture of the tiles."""

MAX_SAMPLES = 900
"""Maximum number of updates that are kept: half an hour."""

SAMPLES_PER_MEAN = 5
"""Number of updates from which a rate is computed: tiles end in bursts."""

REFRESH_MS = 1000
"""Interval between updates of the page."""

COLOURS = {"read": "#4c78a8", "fold": "#f58518", "write": "#54a24b"}
"""Colours of the phases."""

PALETTE = ("#d9d9d9", "#9ecae1", "#3182bd", "#d62728")
"""Colours of tiles by state."""

STATES = ("to do", "done before", "merged", "failed")
"""States of tiles, by number."""


class Sample(NamedTuple):
    """What a run has done at a time: tiles, and seconds by phase."""

    at: float
    n_done: int
    seconds: dict[str, float]


class Run:
    """A run, as its driver describes it."""

    def __init__(self, name: str, states: AnyArray) -> None:
        self.name, self.states, self.text = name, states, ""
        self.samples = deque[Sample](maxlen=MAX_SAMPLES)

    def picture(self) -> AnyArray:
        """Return the states of tiles, or of blocks of tiles: failed, if one is; else the first."""
        step = -(-max(self.states.shape) // MAX_CELLS)
        rows, columns = (range(0, length, step) for length in self.states.shape)
        blocks = [[self.states[y : y + step, x : x + step] for x in columns] for y in rows]
        return np.array(
            [[3 if (b == 3).any() else b.min() for b in row] for row in blocks], np.uint8
        )

    def speeds(self) -> dict[str, list[float]]:
        """Return, for each update, its time in ms, tiles per minute, and busy threads by phase.

        Each is the mean of the latest updates.
        """
        found: dict[str, list[float]] = {name: [] for name in ("at", "rate", *COLOURS)}
        samples = list(self.samples)
        for number, after in enumerate(samples[1:], 1):
            before = samples[max(number - SAMPLES_PER_MEAN, 0)]
            seconds = max(after.at - before.at, 1e-3)
            found["at"].append(1000 * after.at)
            found["rate"].append(60 * (after.n_done - before.n_done) / seconds)
            for name in COLOURS:
                spent = after.seconds.get(name, 0.0) - before.seconds.get(name, 0.0)
                found[name].append(spent / seconds)
        return found


_runs: dict[str, Run] = {}
"""The latest run of this scheduler."""


def begin(run_id: str, name: str, counts: tuple[int, int], missing: bytes) -> None:
    """Show a new run; ``missing`` are the numbers of the tiles that it merges, as int64."""
    states = np.ones(counts, np.uint8)
    states.reshape(-1)[np.frombuffer(missing, np.int64)] = 0
    _runs.clear()
    _runs[run_id] = Run(name, states)


def update(
    run_id: str, text: str, ended: list[tuple[int, int, int]], seconds: dict[str, float]
) -> None:
    """Show what has happened: tiles with their states, and all seconds by phase."""
    run = _runs.get(run_id)
    if run is None:
        return
    for iy, ix, state in ended:
        run.states[iy, ix] = state
    run.text = text
    done = int(((run.states == 1) | (run.states == 2)).sum())
    run.samples.append(Sample(time.time(), done, seconds))


def install(dask_scheduler: Any) -> bool:
    """Add the page to the dashboard of a scheduler; return whether it has one."""
    from bokeh.server.tornado import BokehTornado
    from distributed.dashboard.core import BokehApplication
    from distributed.dashboard.scheduler import template_variables
    from tornado.ioloop import IOLoop

    routing = dask_scheduler.http_application
    boards = [one for one in routing.applications if isinstance(one, BokehTornado)]
    variables = template_variables(dask_scheduler)
    if boards and PAGE not in variables["pages"]:
        variables["pages"].insert(0, PAGE)  # a tab on every page
        pages = {f"/{PAGE}": draw}
        board = BokehApplication(pages, dask_scheduler, boards[0].prefix, variables)
        routing.add_application(board)
        board.initialize(IOLoop.current())
        board.start()
    return bool(boards)


def draw(_scheduler: Any, extra: dict[str, Any], document: Any) -> None:
    """Draw the page, and keep it up to date."""
    from bokeh.layouts import column, row
    from bokeh.models import ColumnDataSource, DataRange1d, Div, LinearColorMapper
    from bokeh.plotting import figure
    from distributed.dashboard.components.scheduler import BOKEH_THEME, env

    tiles = ColumnDataSource({"image": [], "dw": [], "dh": []})
    rates = ColumnDataSource({"at": [], "rate": []})
    phases = ColumnDataSource({name: [] for name in ("at", *COLOURS)})
    wide: Any = {"sizing_mode": "stretch_both"}
    title = Div(styles={"font-size": "16px"}, sizing_mode="stretch_width")
    grid = figure(
        title="tiles",
        x_axis_label="column",
        y_axis_label="row",
        match_aspect=True,
        tools="pan,wheel_zoom,reset",
        **wide,
    )
    grid.y_range.flipped = True
    mapper = LinearColorMapper(PALETTE, low=-0.5, high=len(PALETTE) - 0.5)
    grid.image("image", 0, 0, "dw", "dh", source=tiles, color_mapper=mapper)
    times: Any = {"x_axis_type": "datetime", "tools": "", "y_range": DataRange1d(start=0)}
    rate = figure(title="tiles per minute", **times, **wide)
    rate.line("at", "rate", source=rates, line_width=2)
    times["y_range"] = DataRange1d(start=0)
    shares = figure(title="busy threads", **times, **wide)
    labels, colours = [ACTIVITIES[name] for name in COLOURS], list(COLOURS.values())
    shares.varea_stack(list(COLOURS), x="at", color=colours, source=phases, legend_label=labels)
    shares.legend.location = "top_left"
    key = " ".join(
        f'<span style="color:{colour}">&#9632;</span> {state}'
        for colour, state in zip(PALETTE, STATES, strict=True)
    )

    def refresh() -> None:
        for run in _runs.values():
            title.text = f"{escape(run.name)}: {escape(run.text)}<br>{key}"
            height, width = run.states.shape
            tiles.data = {"image": [run.picture()], "dw": [width], "dh": [height]}
            speeds = run.speeds()
            rates.data = {name: speeds[name] for name in ("at", "rate")}
            phases.data = {name: speeds[name] for name in ("at", *COLOURS)}

    refresh()
    document.title, document.template = "Ocelot-EM", env.get_template("simple.html")
    document.template_variables.update(extra)
    document.theme = BOKEH_THEME
    document.add_root(column(title, row(grid, column(rate, shares, **wide), **wide), **wide))
    document.add_periodic_callback(refresh, REFRESH_MS)
