"""Opening stores of named byte objects: a directory, a bucket, or memory, by path or URL.

obstore serves buckets (``s3``, ``gs``, ``az``, ``http`` ...); credentials and endpoints come from
the environment, as obstore documents it. ``memory://NAME`` is in the memory of this process, for
trials. Nothing here knows about Zarr's content.
"""

import os
import re
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

from ocelot_em.errors import InvalidInputError
from ocelot_em.store.bucket import BucketObjects, MemoryObjects
from ocelot_em.store.contract import (
    Objects,
)
from ocelot_em.store.local import LocalObjects

_OBSTORE_SCHEMES = {"s3", "s3a", "gs", "az", "azure", "abfs", "abfss", "adl", "http", "https"}


_SECRETS = re.compile(r"secret|token|password|credential|signature|access_?key|\bsig\b", re.I)
"""In the names of parameters of a URL."""


def normalise_url(place: str | os.PathLike[str]) -> str:
    """Return the absolute path of a local place, without a trailing slash; a URL as it is.

    Raises
    ------
    InvalidInputError
        The URL carries credentials, which would be kept in logs and in what is stored.
    """
    text = os.fspath(place)
    if "://" in text:
        _refuse_secrets(text)
        scheme = urlsplit(text).scheme
        if scheme != "file":
            return text.rstrip("/")
        text = text.removeprefix("file://")
    return str(Path(text).expanduser().resolve())


def _refuse_secrets(url: str) -> None:
    parts = urlsplit(url)
    names = [name for name, _ in parse_qsl(parts.query, keep_blank_values=True)]
    if "@" in parts.netloc or any(map(_SECRETS.search, names)):
        raise InvalidInputError(
            f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}: the URL carries "
            "credentials, which would be kept in logs and in what is stored; give them in the "
            "environment, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )


def is_local(url: str) -> bool:
    """Whether a normalised place is a path on this machine."""
    return "://" not in url


def open_objects(place: str | os.PathLike[str]) -> Objects:
    """Open a place, which need not exist yet; nothing is created before the first write.

    Raises
    ------
    InvalidInputError
        A URL of this kind is not known, or it carries credentials.
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
    return BucketObjects.opened(url)
