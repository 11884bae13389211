"""The console on which commands print."""

from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.segment import Segment
from rich.text import Text

from ocelot_em.errors import printable


class PlainConsole(Console):
    """A console whose content cannot control the terminal: control characters are escaped."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Convert a string; the width of columns counts its escapes."""
        return super().render_str(printable(text), **options)

    def render(self, renderable: Any, options: Any = None) -> Iterator[Segment]:
        """Render anything; only the console's own segments control the terminal."""
        for segment in super().render(renderable, options):
            text, style, control = segment
            yield segment if control else Segment(printable(text), style)


def open_console() -> Console:
    """Return a console on standard output that prints text as it is: a name may have brackets."""
    return PlainConsole(markup=False, emoji=False, highlight=False, soft_wrap=True)


def missing_manifests_text(names: Sequence[str]) -> str:
    """State which data have no manifest, and what to do about it."""
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return (
        f"without manifest: {shown}; format versions 1 and 2 had none, so that intact chunks in "
        "wrong places would not be noticed; ocelot check --upgrade adds them"
    )
