"""Atomic writing of files."""

import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ocelot_em.errors import (
    OcelotError,
    OutputExistsError,
    StorageError,
)


def refuse_existing(paths: Iterable[Path], overwrite: bool) -> None:
    """Refuse to overwrite files.

    Raises
    ------
    OutputExistsError
        Naming all existing files.
    """
    there = [] if overwrite else [str(path) for path in paths if path.exists()]
    if there:
        raise OutputExistsError(
            f"{', '.join(there)}: already there; choose another place, or ask to overwrite"
        )


@contextmanager
def whole_or_nothing(path: Path) -> Iterator[Path]:
    """Yield a temporary path that replaces the file at the end, or is deleted on an error.

    Raises
    ------
    StorageError
        Any OSError is converted to this.
    """
    staged = path.with_name(f"{path.name}#{uuid.uuid4().int}")
    try:
        with storage_errors(path):
            yield staged
            staged.replace(path)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise


@contextmanager
def storage_errors(place: Path) -> Iterator[None]:
    """Convert OSError to StorageError, which names the path."""
    try:
        yield
    except OcelotError:
        raise
    except OSError as error:
        raise StorageError(
            f"cannot write {place}: {error.strerror or error}; check the free space and the "
            "permissions of that place and run it again"
        ) from error
