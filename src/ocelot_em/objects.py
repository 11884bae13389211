"""Named byte objects in a directory or a bucket: one code path for local disks and URLs.

obstore serves local paths and the schemes it knows (``s3``, ``gs``, ``az``, ``http`` ...); any
other ``scheme://`` goes through fsspec. Credentials and endpoints come from the environment, as
those libraries document it. Nothing here knows about Zarr's content.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore

from ocelot_em.errors import MissingDependencyError, StorageError

_OBSTORE_SCHEMES = {"s3", "s3a", "gs", "az", "azure", "abfs", "abfss", "adl", "http", "https"}
_T = TypeVar("_T")


class Objects(Protocol):
    """Byte objects below one place; keys use ``/``.

    Every method raises :class:`StorageError` with the place and the reason when the storage fails.
    """

    url: str

    def get(self, key: str) -> bytes | None:
        """Return the object's bytes, or None where there is none."""
        ...

    def put(self, key: str, parts: Sequence[bytes]) -> None:
        """Write the concatenated parts, replacing what is there; readers see all or nothing."""
        ...

    def create(self, key: str, data: bytes) -> bool:
        """Write the object unless it is there; whether it was written."""
        ...

    def sizes(self, prefix: str) -> dict[str, int]:
        """Return keys and sizes in bytes of all objects below a prefix."""
        ...

    def children(self, prefix: str) -> list[str]:
        """Return names of the folders directly below a prefix."""
        ...

    def delete(self, prefix: str) -> None:
        """Delete all objects below a prefix (``""``: everything)."""
        ...

    def free_bytes(self) -> int | None:
        """Return free space in bytes, or None where the storage does not say."""
        ...

    def zarr_store(self) -> Any:
        """Return a Zarr store over the same objects, for reading: writing is done here."""
        ...


def normalise_url(place: str | os.PathLike[str]) -> str:
    """Return the absolute path of a local place, without a trailing slash; a URL as it is."""
    text = os.fspath(place)
    if "://" in text:
        scheme = urlsplit(text).scheme
        if scheme != "file":
            return text.rstrip("/")
        text = text.removeprefix("file://")
    return str(Path(text).expanduser().resolve())


def is_local(url: str) -> bool:
    """Whether a normalised place is a path on this machine."""
    return "://" not in url


def open_objects(place: str | os.PathLike[str]) -> Objects:
    """Open a place, which need not exist yet; nothing is created before the first write."""
    return _open(normalise_url(place))


@lru_cache(maxsize=256)
def _open(url: str) -> Objects:
    if is_local(url):
        return _LocalObjects(url)
    if urlsplit(url).scheme in _OBSTORE_SCHEMES:
        return _ObstoreObjects(url)
    return _FsspecObjects(url)


class _ObstoreObjects:
    def __init__(self, url: str) -> None:
        self.url = url

    def __reduce__(self) -> tuple[Callable[[str], "Objects"], tuple[str]]:
        return _open, (self.url,)

    @property
    def _store(self) -> Any:
        if not hasattr(self, "_opened"):
            self._opened = self._guard("open", "", self._connect)
        return self._opened

    def _connect(self) -> Any:
        return obstore.store.from_url(self.url)

    def _guard(self, verb: str, key: str, action: Callable[[], _T]) -> _T:
        try:
            return action()
        except (BaseError, OSError) as error:
            raise _storage_error(verb, self.url, key, error) from error

    def get(self, key: str) -> bytes | None:
        def action() -> bytes | None:
            try:
                return obstore.get(self._store, key).bytes().to_bytes()
            except FileNotFoundError:
                return None

        return self._guard("read", key, action)

    def put(self, key: str, parts: Sequence[bytes]) -> None:
        # A single put is atomic everywhere; multipart uploads would need an abort path.
        self._guard(
            "write",
            key,
            lambda: obstore.put(self._store, key, b"".join(parts), use_multipart=False),
        )

    def create(self, key: str, data: bytes) -> bool:
        def action() -> bool:
            try:
                obstore.put(self._store, key, data, mode="create")
            except (AlreadyExistsError, FileExistsError):
                return False
            return True

        return self._guard("create", key, action)

    def sizes(self, prefix: str) -> dict[str, int]:
        def action() -> dict[str, int]:
            batches = obstore.list(self._store, prefix or None)
            return {meta["path"]: meta["size"] for batch in batches for meta in batch}

        return self._guard("list", prefix, action)

    def children(self, prefix: str) -> list[str]:
        def action() -> list[str]:
            found = obstore.list_with_delimiter(self._store, prefix)["common_prefixes"]
            return [path.rstrip("/").rpartition("/")[2] for path in found]

        return self._guard("list", prefix, action)

    def delete(self, prefix: str) -> None:
        keys = list(self.sizes(prefix))

        def action() -> None:
            if keys:
                obstore.delete(self._store, keys)

        self._guard("delete", prefix, action)

    def free_bytes(self) -> int | None:
        return None

    def zarr_store(self) -> Any:
        from zarr.storage import ObjectStore

        return ObjectStore(self._store, read_only=True)


class _LocalObjects(_ObstoreObjects):
    """A directory; made by the first write, so that looking at a place never creates it."""

    def _connect(self) -> Any:
        return LocalStore(self.url, mkdir=True)

    @property
    def _exists(self) -> bool:
        return Path(self.url).is_dir()

    def get(self, key: str) -> bytes | None:
        return super().get(key) if self._exists else None

    def sizes(self, prefix: str) -> dict[str, int]:
        return super().sizes(prefix) if self._exists else {}

    def children(self, prefix: str) -> list[str]:
        return super().children(prefix) if self._exists else []

    def delete(self, prefix: str) -> None:
        target = Path(self.url, prefix) if prefix else Path(self.url)
        if target.is_dir():
            self._guard("delete", prefix, lambda: shutil.rmtree(target))
        if not prefix and hasattr(self, "_opened"):
            del self._opened  # the directory is made anew by the next write

    def free_bytes(self) -> int | None:
        place = Path(self.url)
        while not place.exists():
            place = place.parent
        return shutil.disk_usage(place).free


class _FsspecObjects:
    def __init__(self, url: str) -> None:
        try:
            from fsspec.core import url_to_fs

            self._fs, self._root = cast("tuple[Any, str]", url_to_fs(url))
        except (ImportError, ValueError) as error:
            raise MissingDependencyError(
                f"{url}: no package on this machine serves this kind of URL ({error})"
            ) from error
        self.url = url

    def __reduce__(self) -> tuple[Callable[[str], "Objects"], tuple[str]]:
        return _open, (self.url,)

    def _guard(self, verb: str, key: str, action: Callable[[], _T]) -> _T:
        try:
            return action()
        except OSError as error:
            raise _storage_error(verb, self.url, key, error) from error

    def _path(self, key: str) -> str:
        return f"{self._root.rstrip('/')}/{key}" if key else self._root

    def get(self, key: str) -> bytes | None:
        def action() -> bytes | None:
            try:
                return cast(bytes, self._fs.cat_file(self._path(key)))
            except FileNotFoundError:
                return None

        return self._guard("read", key, action)

    def put(self, key: str, parts: Sequence[bytes]) -> None:
        def action() -> None:
            self._fs.makedirs(self._path(key).rpartition("/")[0], exist_ok=True)
            self._fs.pipe_file(self._path(key), b"".join(parts))

        self._guard("write", key, action)

    def create(self, key: str, data: bytes) -> bool:
        # fsspec has no put-if-absent in common; two writers within one round trip may both win,
        # and then write the same bytes or notice the difference when they read it back.
        if self._guard("look up", key, lambda: self._fs.exists(self._path(key))):
            return False
        self.put(key, [data])
        return True

    def sizes(self, prefix: str) -> dict[str, int]:
        def action() -> dict[str, int]:
            found = self._fs.find(self._path(prefix), detail=True)
            strip = len(self._root.rstrip("/")) + 1
            return {path[strip:]: int(info["size"]) for path, info in found.items()}

        return self._guard("list", prefix, action)

    def children(self, prefix: str) -> list[str]:
        def action() -> list[str]:
            if not self._fs.isdir(self._path(prefix)):
                return []
            found = self._fs.ls(self._path(prefix), detail=True)
            return [
                info["name"].rstrip("/").rpartition("/")[2]
                for info in found
                if info["type"] == "directory"
            ]

        return self._guard("list", prefix, action)

    def delete(self, prefix: str) -> None:
        def action() -> None:
            if self._fs.exists(self._path(prefix)):
                self._fs.rm(self._path(prefix), recursive=True)

        self._guard("delete", prefix, action)

    def free_bytes(self) -> int | None:
        return None

    def zarr_store(self) -> Any:
        from zarr.storage import FsspecStore

        return FsspecStore.from_url(self.url, read_only=True)


def _storage_error(verb: str, url: str, key: str, error: Exception) -> StorageError:
    # obstore appends a debug dump of its internals after the first line.
    reason = str(error).partition("\n")[0].strip() or type(error).__name__
    place = f"{url}/{key}" if key else url
    hint = ""
    if "No space left" in str(error) or "os error 28" in str(error) or "Quota" in str(error):
        hint = "; the disk is full: free some space and run the same command again"
    elif "ermission denied" in str(error):
        hint = "; check the permissions of that place"
    return StorageError(f"cannot {verb} {place}: {reason}{hint}")
