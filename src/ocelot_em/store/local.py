"""Objects in a directory, written atomically and never outside the store."""

import contextlib
import ctypes
import errno
import itertools
import math
import os
import re
import resource
import shutil
import stat
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path, PurePosixPath
from typing import ClassVar
from weakref import WeakSet

from ocelot_em.store.bucket import BucketObjects
from ocelot_em.store.contract import (
    MAX_NBYTES,
    AppendedObject,
    RangeReader,
    ReusedMemory,
    refuse_too_large,
)
from ocelot_em.store.result_shards import chunk_nbytes, read_chunk

_CHECKED_SECONDS = 1.0
"""Seconds for which the check that a folder is inside the store is cached."""

_MAX_CHECKED = 4096
"""Maximum number of cached folder checks."""

_STAGED = re.compile(r"#\d+$")
"""Suffix of temporary files and folders; listings leave them out."""

_numbers = itertools.count(uuid.uuid4().int)


def _renumber() -> None:
    global _numbers
    _numbers = itertools.count(uuid.uuid4().int)


os.register_at_fork(after_in_child=_renumber)


def new_suffix() -> str:
    """Return a suffix of temporary files and folders that no other process returns."""
    return f"#{next(_numbers)}"


NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
"""Flags to open a file that must not exist."""


class LocalObjects(BucketObjects):
    """Objects in a directory, which the first write creates; reading never creates it.

    The directory may be a symbolic link. Inside it, links that point outside are rejected; others
    are followed, except in listings.
    """

    can_append = True
    streams = 1
    requests: int | None = None

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._checked: dict[str, float] = {}

    def get_into(
        self,
        key: str,
        memory: ReusedMemory,
        max_nbytes: int = MAX_NBYTES,
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
                refuse_too_large(status.st_size, max_nbytes)
                target, n_read = memory.of(status.st_size), 0
                while n_read < len(target) and (n := os.readv(descriptor, [target[n_read:]])):
                    n_read += n
                return target[:n_read]
            finally:
                os.close(descriptor)

        found = self._guard("read", key, action)
        return found if found is not None else read_chunk(self, key, memory, max_nbytes)

    def ranges(self, key: str) -> RangeReader:
        return _RangeFile(self, key).read

    def _open_to_read(self, key: str) -> int:
        # O_NONBLOCK: opening a pipe must not wait for a writer.
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW
        path = self._path(key)
        try:
            return os.open(path, flags)
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.EMLINK):  # the latter on FreeBSD
                raise
        return os.open(self._resolved(path), flags)

    def create(self, key: str, data: bytes) -> bool:
        def action() -> bool:
            target = self._path(key)
            with self._staged(target, [data]) as staged:
                try:
                    self._publish(partial(os.link, staged, target), target)
                except OSError as error:
                    # A file server's answer may get lost, and the repeated request then fails.
                    if Path(staged).stat().st_nlink == 1:
                        if isinstance(error, FileExistsError):
                            return False
                        raise
                finally:
                    Path(staged).unlink(missing_ok=True)
            return True

        return self._guard("create", key, action)

    def put(self, key: str, parts: Sequence[bytes]) -> None:
        def action() -> None:
            target = self._path(key)
            # A power loss must not destroy both the old and the new metadata: not every file
            # system writes content before names.
            sync = key.endswith(".json") and Path(target).exists()
            with self._staged(target, parts, sync=sync) as staged:
                self._publish(partial(os.rename, staged, target), target)

        self._guard("write", key, action)

    def append_to(self, key: str, head_nbytes: int) -> AppendedObject:
        return self._guard("create", key, lambda: _AppendedFile(self, key, head_nbytes))

    @contextlib.contextmanager
    def _staged(self, target: str, parts: Sequence[bytes], *, sync: bool = False) -> Iterator[str]:
        """Write a temporary file; it is deleted after an error."""
        staged, descriptor = self._stage(target)
        try:
            try:
                write_all(descriptor, parts)
                if sync:
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)
            yield staged
        except BaseException:
            with contextlib.suppress(OSError):
                Path(staged).unlink()
            raise

    def _stage(self, target: str) -> tuple[str, int]:
        """Open a temporary file for a target, whose folder is created if needed."""
        staged = f"{target}{new_suffix()}"
        return staged, open_new(Path(staged))

    def _publish(self, move: Callable[[], object], _target: str) -> None:
        """Give a temporary file its final name."""
        move()

    def sizes(self, prefix: str) -> dict[str, int]:
        def action() -> dict[str, int]:
            sizes = {}
            for entry in self._walk(prefix):
                with contextlib.suppress(FileNotFoundError):  # deleted since it was listed
                    sizes[self._key(entry)] = entry.stat(follow_symlinks=False).st_size
            return sizes

        return self._guard("list", prefix, action)

    def size(self, key: str) -> int | None:
        def action() -> int | None:
            try:
                status = Path(self._resolved(self._path(key))).stat()
            except (FileNotFoundError, NotADirectoryError):
                return None
            return status.st_size if stat.S_ISREG(status.st_mode) else None

        found = self._guard("look up", key, action)
        return found if found is not None else chunk_nbytes(self, key)

    def keys(self, prefix: str) -> Iterator[str]:
        return map(self._key, self._walk(prefix))

    def _children(self, prefix: str) -> list[str]:
        def action() -> list[str]:
            return sorted(entry.name for entry in self._entries(prefix) if entry.is_dir())

        return self._guard("list", prefix, action)

    def _key(self, entry: "os.DirEntry[str]") -> str:
        return entry.path[len(self.url.rstrip("/")) + 1 :]

    def _entries(self, prefix: str) -> "list[os.DirEntry[str]]":
        """Entries of a folder of the store; empty if there is no such folder."""
        try:
            with os.scandir(self._path(f"{prefix}/" if prefix else "")) as entries:
                return list(entries)
        except (FileNotFoundError, NotADirectoryError):
            return []

    def _walk(self, prefix: str) -> "Iterator[os.DirEntry[str]]":
        """All complete files below a prefix; links are not followed."""
        folders = [prefix]
        while folders:
            folder = folders.pop()
            for entry in self._guard("list", folder, partial(self._entries, folder)):
                if _STAGED.search(entry.name):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    folders.append(f"{folder}/{entry.name}" if folder else entry.name)
                elif entry.is_file(follow_symlinks=False):
                    yield entry

    def delete(self, prefix: str, keep: str | None = None) -> None:
        target = Path(self.url, prefix) if prefix else Path(self.url)

        def action() -> None:
            self._path(prefix)
            for path in [target] if keep is None else list(target.iterdir()):
                if keep is None or path.name != keep or not path.is_dir():
                    self._discard(path)

        if target.is_dir():
            self._guard("delete", prefix, action)

    def delete_one(self, key: str) -> None:
        def action() -> None:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                self._discard(Path(self._path(key)))
                # Remove empty folders, which a bucket would not have.
                with contextlib.suppress(OSError):
                    for folder in PurePosixPath(key).parents:
                        Path(self.url, folder).rmdir()

        self._guard("delete", key, action)

    def _discard(self, path: Path) -> None:
        """Delete a file, or a folder with all that it contains."""
        while path.is_dir() and not path.is_symlink():
            with contextlib.suppress(FileNotFoundError):  # another process deletes it, too
                shutil.rmtree(path)
                return
        path.unlink(missing_ok=True)

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
                sync_file_system(descriptor)
            finally:
                os.close(descriptor)

        if Path(self.url).is_dir():
            self._guard("write to the disk", "", action)

    def _path(self, key: str) -> str:
        """Return the path of an object, whose folder must be inside the store."""
        folder, _, _ = key.rpartition("/")
        now = time.monotonic()
        if not now - self._checked.get(folder, -math.inf) < _CHECKED_SECONDS:
            self._resolved(f"{self.url}/{folder}")
            if len(self._checked) >= _MAX_CHECKED:
                self._checked.clear()
            self._checked[folder] = now
        return f"{self.url}/{key}"

    def _resolved(self, path: str) -> str:
        real = os.path.realpath(path)
        if real != self.url and not real.startswith(f"{self.url.rstrip('/')}/"):
            raise OSError(
                f"it is a symbolic link, or below one, that leads out of the store, to {real}; "
                "replace the link with a copy of what it refers to"
            )
        return real

    def free_bytes(self) -> int | None:
        return shutil.disk_usage(self._nearest).free

    def free_inodes(self) -> int | None:
        facts = os.statvfs(self._nearest)
        # File systems that create inodes on demand report a total of zero.
        return facts.f_favail if facts.f_files else None

    @property
    def _nearest(self) -> Path:
        """The nearest folder that exists."""
        place = Path(self.url)
        while not place.exists():
            place = place.parent
        return place


class _OpenFile:
    """A file for reading, which is closed when the last reference to it is dropped."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor, self.status = descriptor, os.fstat(descriptor)

    def __del__(self) -> None:
        os.close(self.descriptor)


class _RangeFile:
    """Reads parts of a file, which stays open unless many others are; see :class:`Objects`."""

    kept: ClassVar[WeakSet[_OpenFile]] = WeakSet()

    def __init__(self, objects: LocalObjects, key: str) -> None:
        self._objects, self._key = objects, key
        self._file: _OpenFile | None = None

    def read(self, memory: ReusedMemory, nbytes: int, start: int) -> memoryview | None:
        return self._objects._guard("read", self._key, lambda: self._read(memory, nbytes, start))

    def _read(self, memory: ReusedMemory, nbytes: int, start: int) -> memoryview | None:
        file, self._file = self._file, None  # after an error it is opened again
        try:
            found = os.lstat(self._objects._path(self._key))
            if file is None or not os.path.samestat(found, file.status):
                file = _OpenFile(self._objects._open_to_read(self._key))
                found = file.status
        except (FileNotFoundError, NotADirectoryError):
            return None
        if not stat.S_ISREG(found.st_mode):
            raise OSError("expected a file")
        target = memory.of(max(min(nbytes, found.st_size - start), 0))
        n_read = 0
        while n_read < len(target) and (
            n := os.preadv(file.descriptor, [target[n_read:]], start + n_read)
        ):
            n_read += n
        if file in self.kept or len(self.kept) < _max_kept():
            self.kept.add(file)
            self._file = file
        return target[:n_read]


@cache
def _max_kept() -> int:
    """Return the maximum number of files that stay open for reading, a quarter of the possible."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4


class _AppendedFile:
    """A temporary file that becomes an object; see :class:`AppendedObject`."""

    def __init__(self, objects: LocalObjects, key: str, head_nbytes: int) -> None:
        self._objects, self._key, self._end = objects, key, head_nbytes
        self._target = objects._path(key)
        self._staged, self._descriptor = objects._stage(self._target)
        self._lock = threading.Lock()

    def append(self, parts: Sequence[bytes]) -> int:
        with self._lock:
            start = self._end
            self._objects._guard("write", self._key, lambda: self._write(parts, start))
            self._end += sum(map(len, parts))
        return start

    def _write(self, parts: Sequence[bytes], start: int) -> None:
        if self._descriptor < 0:
            self._descriptor = os.open(self._staged, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        for part in parts:
            left = memoryview(part)
            while left:
                n_written = os.pwrite(self._descriptor, left, start)
                left, start = left[n_written:], start + n_written

    def rest(self) -> None:
        with self._lock:
            self._close()

    def publish(self, head: bytes) -> None:
        self._objects._guard("write", self._key, lambda: self._write([head], 0))
        self._objects._guard("write", self._key, self._rename)
        self._close()

    def _rename(self) -> None:
        try:
            self._objects._publish(partial(os.rename, self._staged, self._target), self._target)
        except FileNotFoundError:
            # A file server's answer may get lost, and the repeated request then fails.
            if not os.path.samestat(Path(self._target).stat(), os.fstat(self._descriptor)):
                raise

    def share(self, head: bytes) -> bool:
        def link() -> bool:
            move = partial(os.link, self._staged, self._target)
            try:
                self._objects._publish(move, self._target)
            except FileExistsError:
                # A file server's answer may get lost, and the repeated request then fails.
                return Path(self._staged).samefile(self._target)
            return True

        self.update(head)
        is_first = self._objects._guard("create", self._key, link)
        if not is_first:
            self.discard()
        return is_first

    def update(self, head: bytes) -> None:
        with self._lock:
            self._objects._guard("write", self._key, lambda: self._write([head], 0))

    def discard(self) -> None:
        self._close()
        with contextlib.suppress(OSError):
            Path(self._staged).unlink()

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            self._close()


def sync_file_system(descriptor: int) -> None:
    """Wait until a file system is on disk; without ``syncfs``, until all file systems are."""
    syncfs = getattr(ctypes.CDLL(None, use_errno=True), "syncfs", None)
    if syncfs is None:
        os.sync()
    elif syncfs(descriptor):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def open_new(path: Path) -> int:
    """Open a new file for writing; create its folders if needed."""
    try:
        return os.open(path, NEW_FILE, 0o666)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, NEW_FILE, 0o666)


def write_all(descriptor: int, parts: Sequence[bytes]) -> None:
    """Write all bytes to a file, in as many system calls as needed."""
    left = [memoryview(part) for part in parts if part]
    while left:
        n_written = os.writev(descriptor, left)
        while left and n_written >= len(left[0]):
            n_written -= len(left.pop(0))
        if n_written:
            left[0] = left[0][n_written:]
