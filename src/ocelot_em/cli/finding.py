"""What the doctor finds."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

from ocelot_em.errors import OcelotError

CHECK_SECONDS = 180.0
"""After which a check is given up; compiling all kernels takes a minute on a slow machine."""

MAX_CLOCK_SECONDS = 3.0
"""By which clocks may differ."""


State = Literal["ok", "warning", "problem"]


Check = Callable[[], tuple[State, str]]


_T = TypeVar("_T")


class Finding(NamedTuple):
    """What one check has found.

    Parameters
    ----------
    name
        Of the check, such as ``disk speed``.
    state
        ``problem``: something will not work. ``warning``: it may work badly.
    says
        What was found, and what to do about it if it is not ``ok``.
    """

    name: str
    state: State
    says: str


def named(error: BaseException) -> str:
    """Say what went wrong, with the kind of error where its text may not be enough."""
    # Dask turns what it cannot send into plain exceptions that say what they were.
    if isinstance(error, (OcelotError, TimeoutError)) or type(error) is Exception:
        return str(error) or "no answer"
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


@contextmanager
def scratch_folder(place: Path) -> Iterator[Path]:
    """Make a folder for trials; removed in the end."""
    with tempfile.TemporaryDirectory(prefix=".ocelot-doctor-", dir=place) as scratch:
        yield Path(scratch)


def ahead_by(seconds: float) -> str:
    """Say by how much a clock is ahead."""
    return f"{abs(seconds):.0f} s {'ahead' if seconds > 0 else 'behind'}"


def count_of(n: int, what: str) -> str:
    """Say how many there are."""
    return f"{n:,} {what}{'s' * (n != 1)}"


def size_of(nbytes: float) -> str:
    """Say how many bytes, in a unit that people read."""
    return f"{nbytes / 1e9:.1f} GB"


def rate_of(nbytes: float, seconds: float) -> str:
    """Say how many bytes a second."""
    return f"{nbytes / max(seconds, 1e-9) / 1e6:,.0f} MB/s"
