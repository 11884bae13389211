"""Named byte objects in a directory or a bucket: one code path for local disks and URLs.

obstore serves local paths and the schemes it knows (``s3``, ``gs``, ``az``, ``http`` ...); any
other ``scheme://`` goes through fsspec. Credentials and endpoints come from the environment, as
those libraries document it. Nothing here knows about Zarr's content.
"""

import contextlib
import ctypes
import errno
import logging
import math
import os
import random
import re
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, TypeVar, cast
from urllib.parse import parse_qsl, urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore

from ocelot_em.errors import InvalidInputError, MissingDependencyError, StorageError

log = logging.getLogger(__name__)

_OBSTORE_SCHEMES = {"s3", "s3a", "gs", "az", "azure", "abfs", "abfss", "adl", "http", "https"}
MOST_NBYTES = 2**31
"""Largest object that is read; Blosc frames are not larger."""

_CHECKED_SECONDS = 1.0
"""So long a folder counts as one of the store after it was looked at."""

_MOST_CHECKED = 4096
"""Folders that are remembered to have been looked at."""

_STAGED = re.compile(r"#\d+$")
"""How the names of files end that are not whole yet; listings leave them out."""

PAUSES_SECONDS = (0.1, 0.5, 2.0)
"""Before each of the next tries of what failed for a reason that may pass."""

_MAY_PASS = {
    errno.EAGAIN,
    errno.EBUSY,
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.EINTR,
    errno.EIO,
    errno.ENETDOWN,
    errno.ENETRESET,
    errno.ENETUNREACH,
    errno.ESTALE,
    errno.ETIMEDOUT,
}
"""Numbers of errors of file systems that may pass; those of the network's among them."""

_SECRETS = re.compile(r"secret|token|password|credential|signature|access_?key|\bsig\b", re.I)
"""In the names of parameters of a URL."""

_T = TypeVar("_T")


class Objects(Protocol):
    """Byte objects below one place; keys use ``/``.

    Every method raises :class:`StorageError` with the place and the reason when the storage fails.
    """

    url: str

    streams: int
    """Transfers that are worth having at a time, per thread that waits for them."""

    def get(self, key: str, most_nbytes: int = MOST_NBYTES) -> bytes | None:
        """Return the object's bytes, or None where there is none; a larger one is refused."""
        ...

    def get_into(
        self, key: str, memory: "ReusedMemory", most_nbytes: int = MOST_NBYTES
    ) -> memoryview | None:
        """As :meth:`get`, in the given memory, which the caller may change."""
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

    def size(self, key: str) -> int | None:
        """Return the object's size in bytes, or None where there is none."""
        ...

    def keys(self, prefix: str) -> Iterator[str]:
        """All keys below a prefix, one after another, however many there are."""
        ...

    def children(self, prefix: str) -> list[str]:
        """Return names of the folders directly below a prefix."""
        ...

    def delete(self, prefix: str, keep: str | None = None) -> None:
        """Delete all objects below a prefix (``""``: everything), but not the folder ``keep``."""
        ...

    def delete_one(self, key: str) -> None:
        """Delete an object, if it is there."""
        ...

    def tidy(self, prefix: str) -> None:
        """Remove what writers that died have left half-written below a prefix."""
        ...

    def sync(self) -> None:
        """Return when all that was written here from this machine survives a loss of power."""
        ...

    def free_bytes(self) -> int | None:
        """Return free space in bytes, or None where the storage does not say."""
        ...


class ReusedMemory:
    """Memory that is used again and again: fresh pages cost more than what is read into them."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def of(self, nbytes: int) -> memoryview:
        """Return this many bytes; valid until they are asked for again."""
        if len(self._bytes) < nbytes:
            self._bytes = bytearray(nbytes + nbytes // 16)
        return memoryview(self._bytes)[:nbytes]

    def filled(self, data: memoryview) -> memoryview:
        """Return a copy of these bytes in this memory."""
        target = self.of(len(data))
        target[:] = data
        return target


def return_free_memory() -> None:
    """Give freed memory back to the system, where the C library is glibc and would keep it.

    For code that makes and frees arrays of some MiB many times among small objects that stay: what
    it frees is scattered, and is not used again.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


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
    streams = 8  # a request takes far longer to be answered than to be transferred

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
        return _patiently(verb, self.url, key, action)

    def get(self, key: str, most_nbytes: int = MOST_NBYTES) -> bytes | None:
        def action() -> bytes | None:
            try:
                found = obstore.get(self._store, key)
            except FileNotFoundError:
                return None
            _refuse_too_large(found.meta["size"], most_nbytes)
            return found.bytes().to_bytes()

        return self._guard("read", key, action)

    def get_into(
        self, key: str, memory: ReusedMemory, most_nbytes: int = MOST_NBYTES
    ) -> memoryview | None:
        def action() -> memoryview | None:
            try:
                found = obstore.get(self._store, key)
            except FileNotFoundError:
                return None
            _refuse_too_large(found.meta["size"], most_nbytes)
            return memory.filled(memoryview(found.bytes()))

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

    def size(self, key: str) -> int | None:
        def action() -> int | None:
            try:
                return int(obstore.head(self._store, key)["size"])
            except FileNotFoundError:
                return None

        return self._guard("look up", key, action)

    def keys(self, prefix: str) -> Iterator[str]:
        batches = iter(self._guard("list", prefix, lambda: obstore.list(self._store, prefix)))
        while batch := self._next(prefix, batches):
            yield from (meta["path"] for meta in batch)

    def _next(self, prefix: str, batches: Iterator[Any]) -> Any:
        # Not tried again here: a listing that broke off must not look like one that ended.
        try:
            return next(batches, None)
        except (BaseError, OSError) as error:
            raise _storage_error("list", self.url, prefix, error) from error

    def children(self, prefix: str) -> list[str]:
        def action() -> list[str]:
            found = obstore.list_with_delimiter(self._store, prefix)["common_prefixes"]
            return [path.rstrip("/").rpartition("/")[2] for path in found]

        return self._guard("list", prefix, action)

    def delete(self, prefix: str, keep: str | None = None) -> None:
        keys = [key for key in self.sizes(prefix) if keep is None or not key.startswith(f"{keep}/")]

        def action() -> None:
            if keys:
                obstore.delete(self._store, keys)

        self._guard("delete", prefix, action)

    def delete_one(self, key: str) -> None:
        def action() -> None:
            with contextlib.suppress(FileNotFoundError):
                obstore.delete(self._store, key)

        self._guard("delete", key, action)

    def tidy(self, prefix: str) -> None:
        """Do nothing: what was not sent whole is not there."""

    def sync(self) -> None:
        """Do nothing: a request is answered when what it brought is safe."""

    def free_bytes(self) -> int | None:
        return None


class _LocalObjects(_ObstoreObjects):
    """A directory; made by the first write, so that looking at a place never creates it.

    Chunks are read and written with plain system calls: one copy between them and the page cache.
    The directory may be a symbolic link; within it, links that lead out of it are refused: who
    sends a store must not choose which other files are read or written. Links within it are
    followed, but not where objects are listed.
    """

    streams = 1

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._checked: dict[str, float] = {}

    def _connect(self) -> Any:
        return LocalStore(self.url, mkdir=True)

    @property
    def _exists(self) -> bool:
        return Path(self.url).is_dir()

    def get(self, key: str, most_nbytes: int = MOST_NBYTES) -> bytes | None:
        found = self.get_into(key, ReusedMemory(), most_nbytes)
        return None if found is None else bytes(found)

    def get_into(
        self, key: str, memory: ReusedMemory, most_nbytes: int = MOST_NBYTES
    ) -> memoryview | None:
        def action() -> memoryview | None:
            try:
                descriptor = self._open_to_read(key)
            except (FileNotFoundError, NotADirectoryError):
                return None
            try:
                status = os.fstat(descriptor)
                if stat.S_ISDIR(status.st_mode):
                    return None
                if not stat.S_ISREG(status.st_mode):
                    raise OSError("expected a file")
                _refuse_too_large(status.st_size, most_nbytes)
                target = memory.of(status.st_size)
                n_read = 0
                while n := os.readv(descriptor, [target[n_read:]]):
                    n_read += n
                return target[:n_read]
            finally:
                os.close(descriptor)

        return self._guard("read", key, action)

    def _open_to_read(self, key: str) -> int:
        # O_NONBLOCK: opening a pipe that lies there must not wait for a writer.
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW
        path = self._path(key)
        try:
            return os.open(path, flags)
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.EMLINK):  # the latter on FreeBSD
                raise
        return os.open(self._resolved(path), flags)

    def create(self, key: str, data: bytes) -> bool:
        self._guard("create", key, lambda: self._path(key))
        return super().create(key, data)

    def put(self, key: str, parts: Sequence[bytes]) -> None:
        def action() -> None:
            # Renamed when it is whole.
            staged = Path(f"{self._path(key)}#{uuid.uuid4().int}")
            try:
                descriptor = _open_new(staged)
                try:
                    _write_all(descriptor, parts)
                    if key.endswith(".json") and Path(self._path(key)).exists():
                        # Of metadata that is replaced, a loss of power must not take both: not
                        # every file system writes content before names.
                        os.fsync(descriptor)
                finally:
                    os.close(descriptor)
                staged.rename(self._path(key))
            except BaseException:
                with contextlib.suppress(OSError):
                    staged.unlink()
                raise

        self._guard("write", key, action)

    def sizes(self, prefix: str) -> dict[str, int]:
        def action() -> dict[str, int]:
            found = ((self._key(e), e.stat(follow_symlinks=False)) for e in self._walk(prefix))
            return {key: status.st_size for key, status in found}

        return self._guard("list", prefix, action)

    def size(self, key: str) -> int | None:
        def action() -> int | None:
            try:
                return Path(self._resolved(self._path(key))).stat().st_size
            except (FileNotFoundError, NotADirectoryError):
                return None

        return self._guard("look up", key, action)

    def keys(self, prefix: str) -> Iterator[str]:
        return map(self._key, self._walk(prefix))

    def children(self, prefix: str) -> list[str]:
        def action() -> list[str]:
            return sorted(entry.name for entry in self._entries(prefix) if entry.is_dir())

        return self._guard("list", prefix, action)

    def _key(self, entry: "os.DirEntry[str]") -> str:
        return entry.path[len(self.url.rstrip("/")) + 1 :]

    def _entries(self, prefix: str) -> "list[os.DirEntry[str]]":
        """What is in a folder of the store; nothing where there is none."""
        try:
            with os.scandir(self._path(f"{prefix}/" if prefix else "")) as entries:
                return list(entries)
        except (FileNotFoundError, NotADirectoryError):
            return []

    def _walk(self, prefix: str) -> "Iterator[os.DirEntry[str]]":
        """All files below a prefix; links are not followed."""
        folders = [prefix]
        while folders:
            folder = folders.pop()
            for entry in self._guard("list", folder, partial(self._entries, folder)):
                if entry.is_dir(follow_symlinks=False):
                    folders.append(f"{folder}/{entry.name}" if folder else entry.name)
                elif entry.is_file(follow_symlinks=False) and not _STAGED.search(entry.name):
                    yield entry

    def delete(self, prefix: str, keep: str | None = None) -> None:
        target = Path(self.url, prefix) if prefix else Path(self.url)

        def action() -> None:
            self._path(prefix)
            if keep is None:
                shutil.rmtree(target)
                return
            for path in target.iterdir():
                if path.is_dir() and not path.is_symlink():
                    if path.name != keep:
                        shutil.rmtree(path)
                else:
                    path.unlink()

        if target.is_dir():
            self._guard("delete", prefix, action)
        if not prefix and keep is None and hasattr(self, "_opened"):
            del self._opened  # the directory is made anew by the next write

    def delete_one(self, key: str) -> None:
        def action() -> None:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                Path(self._path(key)).unlink()
                # Folders that are empty now would not be there in a bucket.
                with contextlib.suppress(OSError):
                    for folder in PurePosixPath(key).parents:
                        Path(self.url, folder).rmdir()

        self._guard("delete", key, action)

    def tidy(self, prefix: str) -> None:
        def action() -> None:
            for folder, _, names in os.walk(self._path(f"{prefix}/" if prefix else "")):
                for name in names:
                    if _STAGED.search(name):
                        Path(folder, name).unlink(missing_ok=True)

        self._guard("tidy", prefix, action)

    def sync(self) -> None:
        def action() -> None:
            descriptor = os.open(self.url, os.O_RDONLY | os.O_CLOEXEC)
            try:
                _sync_file_system(descriptor)
            finally:
                os.close(descriptor)

        if self._exists:
            self._guard("write to the disk", "", action)

    def _path(self, key: str) -> str:
        """Return the path of an object, of which no folder may lie outside the store.

        Raises
        ------
        OSError
            A link leads there.
        """
        folder, _, _ = key.rpartition("/")
        now = time.monotonic()
        if not now - self._checked.get(folder, -math.inf) < _CHECKED_SECONDS:
            self._resolved(f"{self.url}/{folder}")
            if len(self._checked) >= _MOST_CHECKED:
                self._checked.clear()
            self._checked[folder] = now
        return f"{self.url}/{key}"

    def _resolved(self, path: str) -> str:
        real = os.path.realpath(path)
        if real != self.url and not real.startswith(f"{self.url.rstrip('/')}/"):
            raise OSError(
                f"it is, or lies behind, a symbolic link that leads out of the store, to {real}; "
                "put what it should be in its place"
            )
        return real

    def free_bytes(self) -> int | None:
        place = Path(self.url)
        while not place.exists():
            place = place.parent
        return shutil.disk_usage(place).free


class _FsspecObjects:
    streams = 8

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
        return _patiently(verb, self.url, key, action)

    def _path(self, key: str) -> str:
        return f"{self._root.rstrip('/')}/{key}" if key else self._root

    def get(self, key: str, most_nbytes: int = MOST_NBYTES) -> bytes | None:
        def action() -> bytes | None:
            try:
                found = cast(bytes, self._fs.cat_file(self._path(key)))
            except FileNotFoundError:
                return None
            _refuse_too_large(len(found), most_nbytes)  # not all of them know before they read
            return found

        return self._guard("read", key, action)

    def get_into(
        self, key: str, memory: ReusedMemory, most_nbytes: int = MOST_NBYTES
    ) -> memoryview | None:
        found = self.get(key, most_nbytes)
        return None if found is None else memory.filled(memoryview(found))

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

    def size(self, key: str) -> int | None:
        def action() -> int | None:
            try:
                return int(self._fs.info(self._path(key))["size"])
            except FileNotFoundError:
                return None

        return self._guard("look up", key, action)

    def keys(self, prefix: str) -> Iterator[str]:
        yield from self.sizes(prefix)

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

    def delete(self, prefix: str, keep: str | None = None) -> None:
        def action() -> None:
            if keep is None:
                if self._fs.exists(self._path(prefix)):
                    self._fs.rm(self._path(prefix), recursive=True)
                return
            for key in self.sizes(prefix):
                if not key.startswith(f"{keep}/"):
                    self._fs.rm_file(self._path(key))

        self._guard("delete", prefix, action)

    def delete_one(self, key: str) -> None:
        def action() -> None:
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm_file(self._path(key))

        self._guard("delete", key, action)

    def tidy(self, prefix: str) -> None:
        """Do nothing: how half-written objects look depends on the file system."""

    def sync(self) -> None:
        """Do nothing: what is safe when depends on the file system."""

    def free_bytes(self) -> int | None:
        return None


def _patiently(verb: str, url: str, key: str, action: Callable[[], _T]) -> _T:
    """Do something with a place; again where it fails for a reason that may pass.

    Clients of buckets try requests again themselves.

    Raises
    ------
    StorageError
    """
    for pause in PAUSES_SECONDS:
        try:
            return action()
        except StorageError:  # of something that was done for it
            raise
        except (BaseError, OSError) as error:
            if not _may_pass(error):
                raise _storage_error(verb, url, key, error) from error
            log.warning("%s; trying again in %g s", _storage_error(verb, url, key, error), pause)
        # Not all at the same moment.
        time.sleep(pause * random.uniform(0.5, 1.5))
    try:
        return action()
    except (BaseError, OSError) as error:
        raise _storage_error(verb, url, key, error) from error


def _may_pass(error: Exception) -> bool:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _MAY_PASS
    found = _ERROR_NUMBER.search(str(error))
    return found is not None and int(found[1]) in _MAY_PASS


_ERROR_NUMBER = re.compile(r"\(os error (\d+)\)")
"""As obstore tells of an error of the system."""


def _sync_file_system(descriptor: int) -> None:
    """Wait until a file system has everything on its disk, where the system can do just that."""
    syncfs = getattr(ctypes.CDLL(None, use_errno=True), "syncfs", None)
    if syncfs is None:
        os.sync()
    elif syncfs(descriptor):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _refuse_too_large(nbytes: int, most_nbytes: int) -> None:
    if nbytes > most_nbytes:
        raise OSError(f"expected at most {most_nbytes:,} bytes, got {nbytes:,}")


def _open_new(path: Path) -> int:
    """Open a file that is not there yet, in folders that need not be, for writing."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        return os.open(path, flags, 0o666)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, flags, 0o666)


def _write_all(descriptor: int, parts: Sequence[bytes]) -> None:
    left = [memoryview(part) for part in parts if part]
    while left:
        n_written = os.writev(descriptor, left)
        while left and n_written >= len(left[0]):
            n_written -= len(left.pop(0))
        if n_written:
            left[0] = left[0][n_written:]


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
