"""Every error that ocelot-em raises on purpose.

One root, :class:`OcelotError`, for callers that want to catch them all; each leaf is also a
builtin, for callers that know only Python. A message says what is wrong, where (store, partial,
map, tile), what was expected, what was found and what to do about it.
"""

from collections.abc import Iterable


class OcelotError(Exception):
    """Root of all errors raised by ocelot-em."""


class InvalidInputError(OcelotError, ValueError):
    """Something that was handed in cannot be used; carries every problem that was found.

    Parameters
    ----------
    problems
        One sentence per problem, each naming its place.
    """

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__(*self.problems)

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return self.problems[0]
        lines = "\n".join(f"  - {problem}" for problem in self.problems)
        return f"{len(self.problems)} problems:\n{lines}"


class InvalidDataError(InvalidInputError):
    """A map holds values that no search can produce: NaN, or an index outside the search space."""


class StoreNotFoundError(OcelotError, FileNotFoundError):
    """There is no ocelot-em store at the given place."""


class FormatError(OcelotError, ValueError):
    """A store's metadata does not follow ``docs/format.md``."""


class IncompleteError(OcelotError, ValueError):
    """A partial or a merged result was never finished by its writer."""


class ChunkError(OcelotError, ValueError):
    """A chunk cannot be read as it was written."""


class MissingChunkError(ChunkError):
    """A chunk of a map has no object in the store."""


class CorruptChunkError(ChunkError):
    """A chunk's bytes are not the ones that were written."""


class StorageError(OcelotError, OSError):
    """Reading from or writing to the storage failed (no space, no permission, no network)."""


class PlanError(OcelotError, ValueError):
    """A merge cannot be carried out as asked; the message gives the numbers."""


class OutputExistsError(OcelotError, FileExistsError):
    """The output is already there and is not the same merge, interrupted."""


class OutputLockedError(OcelotError, BlockingIOError):
    """Another run is writing the output."""


class StoppedError(OcelotError, RuntimeError):
    """A run ended before all was done, because it was asked to or lost what it ran on.

    Whatever was finished is kept; the same command goes on.
    """


class ClusterLostError(StoppedError):
    """The scheduler is gone, or there are no workers and none come."""


class TilesFailedError(OcelotError, RuntimeError):
    """Some tiles could not be merged; the others are done and are kept."""


class MissingDependencyError(OcelotError, ImportError):
    """An optional package that this operation needs is not installed."""


class DeviceError(OcelotError, RuntimeError):
    """A GPU was asked for and cannot be used; the message says why in one sentence."""


class DeviceMemoryError(DeviceError, MemoryError):
    """A GPU has not as much free memory as was planned."""
