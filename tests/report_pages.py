"""Pages of reports, with what their figures say instead of how they look.

A page takes more than a second to draw, nearly all of it for layout and SVG files, and most tests
are about words and numbers. Figures that are told run all of a plot but the rendering.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from ocelot_em.model.markup import Markup, element
from ocelot_em.view import report, report_sections
from ocelot_em.view.figures import new_figure

FIGURES = ["told", pytest.param("drawn", marks=pytest.mark.slow)]
"""Parameters of a fixture: the same tests draw their pages in the second tier."""


def tell_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have reports name what is in their figures, and leave out the rendering."""
    for module in (report, report_sections):
        monkeypatch.setattr(module, "drawing", _told)


def _told(
    name: str, size_inches: tuple[float, float], draw: Callable[[Any], object], label: str
) -> Markup:
    figure = new_figure(size_inches)
    draw(figure)
    words = (element("text", word) for word in _words(figure))
    return element("svg", element("title", label), *words, id=f"{name}-figure")


def _words(figure: Any) -> Iterator[str]:
    for axes in figure.axes:
        yield from (axes.get_title(), axes.get_xlabel(), axes.get_ylabel())
        legend = axes.get_legend()
        for text in (*axes.texts, *(() if legend is None else legend.get_texts())):
            yield text.get_text()
