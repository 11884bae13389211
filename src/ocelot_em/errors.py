"""All errors that ocelot-em raises on purpose.

The tree, with the built-in exceptions from which they also derive::

    OcelotError
    +-- InvalidInputError (ValueError)
    |   +-- InvalidDataError
    +-- StoreNotFoundError (FileNotFoundError)
    +-- FormatError (ValueError)
    +-- IncompleteError (ValueError)
    +-- InputChangedError (RuntimeError)
    +-- ChunkError (ValueError)
    |   +-- MissingChunkError
    |   +-- CorruptChunkError
    +-- StorageError (OSError)
    +-- PlanError (ValueError)
    +-- OutputExistsError (FileExistsError)
    +-- OutputLockedError (BlockingIOError)
    +-- StoppedError (RuntimeError)
    |   +-- ClusterLostError
    |   +-- LockLostError
    +-- TilesFailedError (RuntimeError)
    +-- MissingDependencyError (ImportError)
    +-- DeviceError (RuntimeError)
        +-- DeviceMemoryError (MemoryError)

A message states the problem, where it is (store, partial, map, tile), the expected and the actual
value, and how to fix it.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""Characters that control a terminal or the direction of text, and bytes that are no UTF-8."""


def printable(text: str) -> str:
    r"""Escape all control characters but line breaks and tabs.

    >>> print(printable("gpu0\x1b[2J"))
    gpu0\x1b[2J
    """
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class OcelotError(Exception):
    """Base class of all errors raised by ocelot-em.

    Examples
    --------
    >>> from ocelot_em import OcelotError, describe
    >>> try:
    ...     describe("missing.zarr")
    ... except OcelotError as error:
    ...     print(type(error).__name__)
    StoreNotFoundError
    """

    def __str__(self) -> str:
        return printable(self._text())

    def _text(self) -> str:
        return super().__str__()


class InvalidInputError(OcelotError, ValueError):
    """An input is invalid; lists every problem found.

    Parameters
    ----------
    problems
        One sentence per problem, each stating where it is.
    """

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__(*self.problems)

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.problems,), self.__dict__

    def _text(self) -> str:
        if len(self.problems) == 1:
            return self.problems[0]
        lines = "\n".join(f"  - {problem}" for problem in self.problems)
        return f"{len(self.problems)} problems:\n{lines}"


class InvalidDataError(InvalidInputError):
    """A map has values that no search can produce: NaN, or an index outside the search space."""


class StoreNotFoundError(OcelotError, FileNotFoundError):
    """There is no ocelot-em store at the given path or URL."""


class FormatError(OcelotError, ValueError):
    """A store's metadata does not follow ``docs/format.md``."""


class IncompleteError(OcelotError, ValueError):
    """A partial or a merged result was never finished by its writer."""


class InputChangedError(OcelotError, RuntimeError):
    """An input of a merge is no longer the one that was planned."""


class ChunkError(OcelotError, ValueError):
    """A chunk is missing or corrupt."""


class MissingChunkError(ChunkError):
    """A chunk of a map has no object in the store."""


class CorruptChunkError(ChunkError):
    """A chunk's bytes are not the ones that were written."""


class StorageError(OcelotError, OSError):
    """Reading from or writing to storage failed (no space, no permission, no network)."""


class PlanError(OcelotError, ValueError):
    """A merge is impossible with these options; the message gives the numbers."""


class OutputExistsError(OcelotError, FileExistsError):
    """The output already exists and is not an interrupted run of the same merge."""


class OutputLockedError(OcelotError, BlockingIOError):
    """Another run is writing the output."""


class StoppedError(OcelotError, RuntimeError):
    """A run was stopped before it was complete, or lost its lock or its workers.

    Finished tiles are kept; the same command resumes the run.
    """


class ClusterLostError(StoppedError):
    """The scheduler is lost, or no workers became available."""


class LockLostError(StoppedError):
    """A run no longer holds the lock of its output, so that it must not write any more."""


class TilesFailedError(OcelotError, RuntimeError):
    """Some tiles could not be merged; the others are done and kept."""


class MissingDependencyError(OcelotError, ImportError):
    """An optional package that this operation needs is not installed."""


@contextmanager
def optional_import(need: str, extra: str) -> Iterator[None]:
    """Convert the ImportError of an optional package, with what needs it and the extra it is in."""
    try:
        yield
    except ImportError as error:
        raise MissingDependencyError(f"{need}: pip install 'ocelot-em[{extra}]'") from error


class DeviceError(OcelotError, RuntimeError):
    """A requested GPU cannot be used; the message gives the reason in one sentence."""


class DeviceMemoryError(DeviceError, MemoryError):
    """A GPU has less free memory than planned."""
