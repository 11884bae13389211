"""Findings of ``ocelot doctor``, and helpers of its checks."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

from ocelot_em.errors import OcelotError

CHECK_SECONDS = 180.0
"""Timeout of a check; compiling all kernels takes a minute on a slow machine."""

MAX_CLOCK_SECONDS = 3.0
"""Maximum difference between clocks that gives no warning."""

State = Literal["ok", "warning", "problem"]

Check = Callable[[], tuple[State, str]]

_T = TypeVar("_T")


class Finding(NamedTuple):
    """Result of one check; ``text`` includes a remedy unless the state is ``ok``."""

    name: str
    state: State
    text: str


def named(error: BaseException) -> str:
    """Format an error, with its type if the text alone may be unclear."""
    # Dask replaces exceptions that it cannot send by plain ones whose text has the type.
    if isinstance(error, (OcelotError, TimeoutError)) or type(error) is Exception:
        return str(error) or "no answer"
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


@contextmanager
def scratch_folder(place: Path) -> Iterator[Path]:
    """Create a temporary folder in ``place``, and remove it on exit."""
    with tempfile.TemporaryDirectory(prefix=".ocelot-doctor-", dir=place) as scratch:
        yield Path(scratch)


def ahead_by(seconds: float) -> str:
    """Format the offset of a clock; positive is ahead."""
    return f"{abs(seconds):.0f} s {'ahead' if seconds > 0 else 'behind'}"


def size_of(nbytes: float) -> str:
    """Format a number of bytes in GB."""
    return f"{nbytes / 1e9:.1f} GB"


def rate_of(nbytes: float, seconds: float) -> str:
    """Format a rate in MB/s."""
    return f"{nbytes / max(seconds, 1e-9) / 1e6:,.0f} MB/s"
