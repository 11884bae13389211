"""The page of the dashboard that shows the tiles of a merge."""

from types import SimpleNamespace

import numpy as np
import pytest
from bokeh.document import Document

from ocelot_em.run import panel


@pytest.fixture
def clock(monkeypatch):
    at = [1000.0]
    monkeypatch.setattr(panel, "time", SimpleNamespace(time=lambda: at[0]))
    monkeypatch.setattr(panel, "_runs", {})
    return at


def begin(counts, missing):
    panel.begin("run", "OUT.zarr", counts, np.array(missing, np.int64).tobytes())
    return panel._runs["run"]


def test_tiles_rate_and_phases_follow_what_the_driver_sends(clock):
    run = begin((2, 3), [1, 2, 4])
    np.testing.assert_array_equal(run.states, [[1, 0, 0], [1, 0, 1]])
    panel.update("run", "3 of 6 tiles", [], {})
    clock[0] += 2
    panel.update("run", "4 of 6 tiles", [(0, 1, 2), (0, 2, 3)], {"read": 3.0, "waited": 1.0})
    np.testing.assert_array_equal(run.picture(), [[1, 2, 3], [1, 0, 1]])
    assert run.speeds() == {
        **{"at": [1_002_000], "rate": [30], "read": [1.5], "fold": [0], "write": [0]}
    }
    panel.update("another run", "", [(0, 0, 3)], {})
    assert run.states[0, 0] == 1


def test_the_picture_of_many_tiles_is_small(clock):
    run = begin((1000, 300), [])
    run.states[999, 0], run.states[500, 299] = 3, 0
    picture = run.picture()
    assert picture.shape == (200, 60)
    assert (picture[199, 0], picture[100, 59], picture[0, 0]) == (3, 0, 1)


def test_the_page_draws_itself(clock):
    run, document = begin((2, 3), range(6)), Document()
    panel.update("run", "0 of <6> tiles", [], {})
    panel.draw(None, {"prefix": "/"}, document)
    assert document.title == "Ocelot-EM"
    (title,) = document.select({"type": panel_div()})
    assert "OUT.zarr: 0 of &lt;6&gt; tiles" in title.text
    (refresh,) = document.session_callbacks
    run.text = "1 of 6 tiles"
    refresh.callback()
    assert "1 of 6 tiles" in title.text


def panel_div():
    from bokeh.models import Div

    return Div
