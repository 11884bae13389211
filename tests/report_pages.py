"""Pages of reports, with the text of their figures instead of their rendering.

A page takes more than a second to draw, nearly all of it for layout and SVG files, and most tests
are about words and numbers. A figure with stubbed rendering runs all of a plot but these.
"""

from collections.abc import Iterator
from html import escape
from typing import Any

import pytest

from ocelot_em.view import page, report
from ocelot_em.view.instrument import Instrument

RENDERING = ["stubbed", pytest.param("drawn", marks=pytest.mark.slow)]
"""Parameters of a fixture: the same tests draw their pages in the second tier."""


def stub_rendering(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have reports write the text of their figures, and leave out layout, rendering and scripts."""
    monkeypatch.setattr(page, "_make_room", lambda *_: None)
    monkeypatch.setattr(page, "inline_svg", _texts_as_svg)
    monkeypatch.setattr(report, "make_instrument", lambda *_: Instrument((), "", "", 0, True))


def _texts_as_svg(figure: Any, name: str) -> str:
    texts = "".join(f"<text>{escape(text)}</text>" for text in _texts(figure))
    return f'<svg id="{name}-figure">{texts}</svg>'


def _texts(figure: Any) -> Iterator[str]:
    for axes in figure.axes:
        yield from (axes.get_title(), axes.get_xlabel(), axes.get_ylabel())
        legend = axes.get_legend()
        for text in (*axes.texts, *(() if legend is None else legend.get_texts())):
            yield text.get_text()
