"""Outputs must neither be an input, nor contain one, nor be inside one.

Paths do not identify a folder: a symbolic link, a bind mount or another spelling of a URL leads to
it as well. Local places are compared by the numbers that their file systems give them, up to the
root; URLs by scheme and path, which have several spellings. What both overlook is found by content:
an output inside any Zarr store, and a store inside the result that is to be replaced.
"""

import json
import posixpath
from collections.abc import Hashable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from os import PathLike
from os.path import realpath
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ocelot_em.errors import InvalidInputError, StorageError
from ocelot_em.model.threads import map_in_threads
from ocelot_em.store.constants import ATTRIBUTE_KEY, MAX_METADATA_NBYTES
from ocelot_em.store.contract import Objects, at_once
from ocelot_em.store.fence import FOLDER
from ocelot_em.store.objects import is_local, normalise_url, open_objects

_SAME_SCHEME = {"s3a": "s3", "azure": "az", "adl": "az", "abfs": "az", "abfss": "az"}


def require_distinct(
    output: str | PathLike[str], inputs: Iterable[str | PathLike[str]] = ()
) -> None:
    """Raise if writing an output could damage an input, or another store.

    Raises
    ------
    InvalidInputError
        Naming all overlaps.
    """
    if problems := overlaps(output, inputs):
        raise InvalidInputError(problems)


def overlaps(output: str | PathLike[str], inputs: Iterable[str | PathLike[str]] = ()) -> list[str]:
    """Name every input that is an output, contains it or lies in it, and a store that contains it.

    Parameters
    ----------
    output
        Path or URL of a store, a folder or a file, which need not exist.
    inputs
        Paths or URLs of what is read.
    """
    url = normalise_url(output)
    own, problems = _places(url), []
    for place in dict.fromkeys(map(normalise_url, inputs)):
        other = _places(place)
        if own[0] == other[0]:
            problems.append(f"{url}: is also an input; choose another output")
        elif other[0] in own:
            problems.append(f"{url}: is inside the input {place}; choose a place outside of it")
        elif own[0] in other:
            problems.append(f"{url}: contains the input {place}; choose a place beside it")
    return problems or inside_store(url)


def inside_store(url: str) -> list[str]:
    """Name the Zarr store that contains a place, if any; a list of at most one problem."""

    def is_store(parent: str) -> bool:
        with suppress(StorageError):  # one may not be allowed to look there
            return open_objects(parent).size("zarr.json") is not None
        return False

    parents = _parents(url)
    found = at_once(open_objects(url), [partial(is_store, parent) for parent in parents])
    return [
        f"{url}: is inside the Zarr store {parent}; choose a place outside of it"
        for parent, is_there in zip(parents, found, strict=True)
        if is_there
    ][:1]


def require_outside_stores(path: Path) -> None:
    """Raise if a file would be inside a Zarr store.

    Raises
    ------
    InvalidInputError
    """
    if problems := inside_store(realpath(path)):
        raise InvalidInputError(problems)


def require_no_store_within(objects: Objects) -> None:
    """Raise if a result that is to be replaced contains another store.

    Raises
    ------
    InvalidInputError
        Naming all of them.
    """
    keys = [key for key in objects.keys("") if _is_metadata_below_root(key)]
    stores = [
        key.removesuffix("/zarr.json")
        for key, is_root in zip(keys, map_in_threads(partial(_is_root, objects), keys), strict=True)
        if is_root
    ]
    if stores:
        raise InvalidInputError(
            f"{objects.url}: contains {', '.join(stores[:20])}, which would be deleted with it; "
            "move it elsewhere, or choose another output"
        )


def _is_metadata_below_root(key: str) -> bool:
    """Whether a key is of metadata, but neither the root's nor those of a result set aside."""
    return key.endswith("/zarr.json") and not key.startswith(f"{FOLDER}/")


def _is_root(objects: Objects, key: str) -> bool:
    """Whether metadata are those of the root of a search or of a result."""
    try:
        content = json.loads(objects.get(key, MAX_METADATA_NBYTES) or b"{}")
        return "kind" in content["attributes"][ATTRIBUTE_KEY]
    except (ValueError, LookupError, TypeError, RecursionError):
        return False


def _places(url: str) -> Sequence[Hashable]:
    """Identify a place and all that contain it."""
    if not is_local(url):
        parts = urlsplit(url)
        scheme = _SAME_SCHEME.get(parts.scheme, parts.scheme)
        path = Path(posixpath.normpath(f"/{unquote(parts.path)}").lstrip("/"))
        return [(scheme, parts.netloc.lower(), str(p)) for p in (path, *path.parents)]
    found: list[Hashable] = []
    for path in (Path(url), *Path(url).parents):
        try:
            status = path.stat()
            found.append((status.st_dev, status.st_ino))
        except OSError:  # it does not exist yet, or may not be looked at
            found.append(str(path))
    return found


def _parents(url: str) -> list[str]:
    """Return the places that contain a place, from the inside out."""
    if is_local(url):
        return [str(path) for path in Path(url).parents]
    root, path = url.split("://", 1)[0], url.split("://", 1)[1]
    parts = [part for part in path.split("/") if part]
    return [f"{root}://{'/'.join(parts[:n])}" for n in range(len(parts) - 1, 0, -1)]
