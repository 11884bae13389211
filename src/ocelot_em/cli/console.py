"""The console on which commands print."""

from rich.console import Console


def open_console() -> Console:
    """Return a console on standard output that neither highlights nor wraps."""
    return Console(highlight=False, soft_wrap=True)
