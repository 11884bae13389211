"""Files that are written whole or not at all: tables, reports, maps for other programs.

A file is written under a temporary name, brought to the disk, and renamed. A set of files that
belong together is replaced as one: see :func:`whole_set_or_nothing`.
"""

import errno
import json
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path

from ocelot_em.errors import FormatError, OcelotError, OutputExistsError, StorageError
from ocelot_em.store.distinct import require_outside_stores

_JOURNAL = ".ocelot-replacing.json"
"""File that lists a set of files while it is put in place."""


def refuse_existing(paths: Iterable[Path], overwrite: bool) -> None:
    """Refuse to overwrite files or folders, and to write into a store; devices may exist.

    Raises
    ------
    OutputExistsError
        Naming all existing files.
    InvalidInputError
        A file would be inside a store.
    """
    paths = list(paths)
    for path in paths:
        require_outside_stores(path)
    there = [] if overwrite else [str(p) for p in paths if p.is_file() or p.is_dir()]
    if there:
        raise OutputExistsError(
            f"{', '.join(there)}: already there; choose another place, or overwrite (--overwrite)"
        )


def write_file(path: str | PathLike[str], data: bytes, *, overwrite: bool = True) -> Path:
    """Write a file whole or not at all, and return its path.

    Raises
    ------
    OutputExistsError
        The file exists, and ``overwrite`` is False.
    StorageError
        The file cannot be written; an existing one is unchanged.
    """
    place = Path(path)
    if not overwrite:
        refuse_existing([place], overwrite)
    with whole_or_nothing(place) as staged:
        staged.write_bytes(data)
    return place


@contextmanager
def whole_or_nothing(path: Path) -> Iterator[Path]:
    """Yield a temporary path that replaces the file at the end, or is deleted on an error.

    A missing folder is created. Afterwards the file is on the disk. Devices and pipes are written
    directly.

    Raises
    ------
    StorageError
        Any OSError is converted to this.
    InvalidInputError
        The file would be inside a store.
    """
    require_outside_stores(path)
    if path.exists() and not path.is_file():
        with storage_errors(path):
            yield path
        return
    with _staged([path]) as (staged,), storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        yield staged
        sync_to_disk(staged)
        staged.replace(path)
        sync_to_disk(path.parent)


@contextmanager
def whole_set_or_nothing(folder: Path, names: Sequence[str]) -> Iterator[list[Path]]:
    """Yield temporary paths that replace files of a folder, as a set; or are deleted on an error.

    A missing folder is created.

    At no time does the folder contain files of both sets: first the new ones are brought to the
    disk and listed in a journal, then the old ones are deleted, then the new ones are renamed.
    If the process is killed in between, :func:`finish_set` puts the new ones in place.

    Raises
    ------
    StorageError
        Any OSError is converted to this.
    """
    finish_set(folder)
    with _staged([folder / name for name in names]) as staged, storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        yield staged
        for path in staged:
            sync_to_disk(path)
        journal = {path.name: name for path, name in zip(staged, names, strict=True)}
        write_file(folder / _JOURNAL, json.dumps(journal).encode())
        _put_in_place(folder, journal)


def finish_set(folder: Path) -> None:
    """Put a set of files in place that a killed process had written completely.

    Raises
    ------
    StorageError
        The files cannot be renamed.
    FormatError
        The journal is damaged.
    """
    path = folder / _JOURNAL
    with storage_errors(folder):
        if not path.is_file():
            return
        try:
            journal = {
                str(Path(staged).name): str(Path(name).name)
                for staged, name in json.loads(path.read_bytes()).items()
            }
        except (ValueError, AttributeError, TypeError) as error:
            raise FormatError(
                f"{path}: expected a list of files, got something else ({error}); delete it and "
                "write the files again"
            ) from error
        _put_in_place(folder, journal)


def _put_in_place(folder: Path, journal: Mapping[str, str]) -> None:
    """Replace files by staged ones, in steps that can be repeated; delete the journal."""
    left = {staged: name for staged, name in journal.items() if (folder / staged).exists()}
    for name in left.values():
        (folder / name).unlink(missing_ok=True)
    sync_to_disk(folder)
    for staged, name in left.items():
        (folder / staged).replace(folder / name)
    sync_to_disk(folder)
    (folder / _JOURNAL).unlink()
    sync_to_disk(folder)


@contextmanager
def _staged(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """Yield a temporary path for each file, to be renamed; those that are left are deleted."""
    staged = [path.with_name(f".{secrets.token_hex(8)}.tmp") for path in paths]
    try:
        yield staged
    except BaseException:
        if not (paths[0].parent / _JOURNAL).exists():  # which names them as complete
            for path in staged:
                with suppress(OSError):
                    path.unlink()
        raise


def sync_to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems write names at once, and refuse this for folders.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


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
