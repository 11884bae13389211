"""Folders that are written whole or not at all: images, and searches that replace others."""

import fcntl
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from glob import escape
from os import PathLike
from pathlib import Path

from ocelot_em.errors import InvalidInputError, OutputExistsError
from ocelot_em.store.attributes import SearchAttributes
from ocelot_em.store.distinct import require_distinct, require_no_store_within
from ocelot_em.store.local import new_suffix
from ocelot_em.store.objects import is_local, normalise_url, open_objects
from ocelot_em.store.search import read_attributes, read_exposures, read_partials
from ocelot_em.store.whole_file import storage_errors, sync_to_disk

_LEFT_BEHIND = re.compile(r"#\d{30,39}$")
"""Suffix of folders that are being written or were replaced, a random number of 128 bits."""


@contextmanager
def whole_folder_or_nothing(place: Path) -> Iterator[Path]:
    """Yield a new folder that replaces a folder at the end, or is deleted on an error.

    The new folder is complete and on the disk before the old one is moved aside and deleted. What
    a killed process has left beside the folder is deleted by the next one that succeeds.

    Raises
    ------
    StorageError
        Any OSError is converted to this.
    """
    staged, old = (place.with_name(place.name + new_suffix()) for _ in range(2))
    try:
        with storage_errors(place), ExitStack() as stack:
            staged.mkdir(parents=True)
            stack.enter_context(_locked(staged))
            yield staged
            open_objects(staged).sync()
            if place.exists():
                place.rename(old)
            staged.rename(place)
            _delete_left_behind(place)
            sync_to_disk(place.parent)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


@contextmanager
def replaced_search(
    output: str | PathLike[str], inputs: Iterable[str | PathLike[str]]
) -> Iterator[Path]:
    """Yield a new folder for a search that replaces one, if there is one.

    Raises
    ------
    InvalidInputError
        The place is in a bucket, is an input, or contains another store.
    OutputExistsError
        Something else is there, or a search that is being recorded.
    """
    url = normalise_url(output)
    if not is_local(url):
        raise InvalidInputError(
            f"{url}: overwrite: expected a local folder, because buckets cannot rename; delete the "
            "search first, or choose another output"
        )
    require_distinct(url, inputs)
    if Path(url).exists():
        _require_idle_search(url)
    with whole_folder_or_nothing(Path(url)) as staged:
        yield staged


def _require_idle_search(url: str) -> None:
    """Refuse to delete anything but a search, and one that is being recorded."""
    objects = open_objects(url)
    attributes = read_attributes(objects)
    if not isinstance(attributes, SearchAttributes):
        raise OutputExistsError(
            f"{url}: expected a search to overwrite, got a merged result, which is not replaced; "
            "choose another output, or delete it"
        )
    require_no_store_within(objects)
    for exposure in read_exposures(objects, attributes):
        running = [n for n, p in read_partials(objects, exposure.id) if p.state == "running"]
        if running:
            raise OutputExistsError(
                f"{url}: expected a search that is not being recorded, got {', '.join(running)}, "
                "which a search records; stop it and delete the folder, or choose another output"
            )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock a folder until the end of this process at the latest; OSError if another one has it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _delete_left_behind(place: Path) -> None:
    """Delete the replaced folder, and what killed processes have left beside it."""
    for path in place.parent.glob(f"{escape(place.name)}#*"):
        if _LEFT_BEHIND.search(path.name) and not path.is_symlink():
            with suppress(OSError), _locked(path):
                shutil.rmtree(path)
