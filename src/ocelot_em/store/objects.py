"""Open stores of named byte objects in a directory, a bucket or memory, by path or URL.

obstore provides buckets (``s3``, ``gs``, ``az`` ...); credentials and endpoints come from
the environment, as documented by obstore. ``memory://NAME`` is in the memory of this process, for
trials. This module does not depend on Zarr's content.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from os.path import realpath
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import obstore

from ocelot_em.errors import InvalidInputError
from ocelot_em.store.bucket import BucketObjects, MemoryObjects
from ocelot_em.store.contract import Objects
from ocelot_em.store.local import LocalObjects

_OBSTORE_SCHEMES = {"s3", "s3a", "gs", "az", "azure", "abfs", "abfss", "adl", "http", "https"}


_SECRETS = re.compile(
    "secret|token|passw|passwd|passphrase|pwd|credential|signature|session|bearer|cookie|jwt|login|"
    r"auth(?!or\b)|access_?id|(^|[^a-z])(sig|sas|user|username|pin)([^a-z]|$)|key",
    re.I,
)
"""Names of URL parameters that carry credentials."""

_URL_IN_PATH = re.compile("^(s3a?|gs|azure|az|abfss?|adl|https?|memory|file):/(?!/)", re.I)
"""The beginning of a URL that was made a :class:`~pathlib.Path`, which merges slashes."""

_FILE_URL = re.compile("^file://(localhost(?=/))?", re.I)


PathOrUrl = str | os.PathLike[str]


def as_places(places: PathOrUrl | Iterable[PathOrUrl]) -> list[PathOrUrl]:
    """Return one or several paths or URLs as a list; refuse what is neither.

    >>> as_places("RUN.zarr"), as_places(["A.zarr", "B.zarr"])
    (['RUN.zarr'], ['A.zarr', 'B.zarr'])
    """
    if isinstance(places, (list, tuple, set, frozenset, Iterator)):
        return [_require_path(place) for place in places]
    return [_require_path(places)]


def _require_path(place: object) -> PathOrUrl:
    if isinstance(place, (str, os.PathLike)):
        return place
    raise InvalidInputError(
        f"expected a path or URL, got an object of type {type(place).__name__}; give the path of "
        "the store or file (merge_arrays merges arrays in memory, and write_partial stores them)"
    )


def normalise_url(place: str | os.PathLike[str]) -> str:
    """Return a local path as absolute, or a URL, both without a trailing slash.

    Raises
    ------
    InvalidInputError
        The URL carries credentials, which would be kept in logs and in stored data; or the text
        cannot be a path or URL; or something else was given.
    """
    text = os.fspath(_require_path(place))
    if not isinstance(place, str):
        text = _URL_IN_PATH.sub(r"\1://", text)
    if "\0" in text:
        raise InvalidInputError(f"{text}: expected a path, got a text with a NUL character")
    if "://" in text:
        _refuse_secrets(text)
        scheme = urlsplit(text).scheme
        if scheme != "file":
            return text.rstrip("/")
        text = _FILE_URL.sub("", text)
    return realpath(Path(text).expanduser())


def _refuse_secrets(url: str) -> None:
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise InvalidInputError(f"expected a URL, got one that is invalid: {error}") from None
    parameters = f"{parts.query}&{parts.fragment}".replace(";", "&")
    names = [name for name, _ in parse_qsl(parameters, keep_blank_values=True)]
    if "@" in parts.netloc or any(map(_SECRETS.search, names)):
        raise InvalidInputError(
            f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}: the URL carries "
            "credentials, which would be kept in logs and in what is stored; give them in the "
            "environment, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )


def stores_below(folder: str, without: str = "") -> Iterator[str]:
    """Yield the paths of all stores below a local folder, by name, but for those ``without``.

    Links are followed, and each folder is entered once. Stores are not searched.

    Raises
    ------
    InvalidInputError
        A folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise InvalidInputError(f"{error.filename}: cannot be read: {error.strerror}")

    entered = {without}
    for place, below, files in os.walk(folder, onerror=refuse, followlinks=True):
        below.sort()
        if (own := realpath(Path(place))) in entered:
            below.clear()
            continue
        entered.add(own)
        if "zarr.json" in files:
            below.clear()
            yield place


def is_local(url: str) -> bool:
    """Whether a normalised URL is a path on this machine."""
    return "://" not in url


Stores = Callable[[str], Objects]
"""Opens the store at a normalised URL."""


@contextmanager
def snapshots() -> Iterator[Stores]:
    """Yield a function that opens each store once, as a :meth:`Objects.snapshot`."""
    with ExitStack() as stack:
        yield cache(lambda url: stack.enter_context(open_objects(url).snapshot()))


def open_objects(place: str | os.PathLike[str]) -> Objects:
    """Open a store, which need not exist yet; the first write creates it.

    Raises
    ------
    InvalidInputError
        The URL scheme is not supported, the URL is that of a web server, or it carries
        credentials.
    """
    url = normalise_url(place)
    if is_local(url):
        return LocalObjects.opened(url)
    scheme = urlsplit(url).scheme
    if scheme == "memory":
        return MemoryObjects.opened(url)
    if scheme not in _OBSTORE_SCHEMES:
        raise InvalidInputError(
            f"{url}: expected a path, or a URL of one of {', '.join(sorted(_OBSTORE_SCHEMES))}"
        )
    if scheme.startswith("http") and obstore.parse_scheme(url) == "http":
        raise InvalidInputError(
            f"{url}: expected a path, or the URL of a bucket, got that of a web server, which "
            "cannot list a store's content; download the store, or give its bucket as s3://, "
            "gs:// or az://"
        )
    return BucketObjects.opened(url)
