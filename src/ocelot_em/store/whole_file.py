"""Files that are written whole or not at all: tables, reports, maps for other programs."""

import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path

from ocelot_em.errors import OcelotError, OutputExistsError, StorageError


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


def write_file(path: str | PathLike[str], data: bytes) -> None:
    """Write a file whole or not at all; an existing one is replaced.

    Raises
    ------
    StorageError
        The file cannot be written; an existing one is unchanged.
    """
    with whole_or_nothing(Path(path)) as staged:
        staged.write_bytes(data)


@contextmanager
def whole_or_nothing(path: Path) -> Iterator[Path]:
    """Yield a temporary path that replaces the file at the end, or is deleted on an error.

    Devices and pipes are written directly: they are not replaced.

    Raises
    ------
    StorageError
        Any OSError is converted to this.
    """
    is_special = path.exists() and not path.is_file()
    staged = path if is_special else path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with storage_errors(path):
            yield staged
            if not is_special:
                staged.replace(path)
    except BaseException:
        if not is_special:
            with suppress(OSError):
                staged.unlink()
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
            f"{place}: cannot be written: {error.strerror or error}; check the free space and the "
            "permissions, and try again"
        ) from error
