"""Dictionaries of arrays in ``.npz`` and ``.pt`` files, read in bands of rows.

Files may be broken or malicious. Nothing is ever unpickled: ``.npz`` members are parsed as plain
``.npy`` streams, and tensors are located by :mod:`ocelot_em.io.torch_pickle`. The checksum of
every member that is read is verified.
"""

import hashlib
import io
import math
import struct
import zipfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.lib import format as npy

from ocelot_em.errors import InvalidInputError
from ocelot_em.io import torch_pickle
from ocelot_em.io.text_file import file_identity, local_path, require_unchanged
from ocelot_em.model.correlations import TABLE
from ocelot_em.model.maps import COUNT, INDEX, MIP, POSES, SQUARED_SUM, SUM, AnyArray
from ocelot_em.model.search_space import TABLES

MAX_TABLE_NBYTES = 2**30
"""Maximum size of an array that is read whole: 90 million orientations."""

Rows = Callable[[int, int], AnyArray]
"""Reader of rows ``y0:y1`` of a map."""

KEYS = frozenset((MIP, INDEX, *POSES, SUM, SQUARED_SUM, COUNT, *TABLES))
"""Keys of a partial result; a file may have any others."""

_LOCAL_HEADER = struct.Struct("<4s22xHH")
"""Local header of a zip member: signature, lengths of the name and of the extra field."""

_BLOCK_NBYTES = 2**20


def open_result_file(path: str | PathLike[str]) -> "ResultFile":
    """Open a ``.npz`` or ``.pt`` file; its content decides which of the two it is.

    Refuse a file that is missing, damaged, of another format, or would need unpickling.
    """
    place = local_path(path)
    with closing(_DigestedFile(place)) as file:
        with _refusing(place, "cannot be opened"):
            if not place.is_file():
                raise InvalidInputError(f"{place}: expected a file, got nothing there")
            if file.read(2) != b"PK":
                raise InvalidInputError(
                    f"{place}: expected a .npz or .pt dictionary of arrays"
                    + "; save it again with torch 1.6 or later" * (place.suffix in (".pt", ".pth"))
                )
            archive = zipfile.ZipFile(cast(Any, file))
        members = Counter(archive.namelist())
        if twice := {member: n for member, n in members.items() if n > 1}:
            raise InvalidInputError(
                f"{place}: {member}: expected once, got it {n} times" for member, n in twice.items()
            )
        is_torch = any(member.endswith("/data.pkl") for member in members)
        return (_TorchFile if is_torch else _NpzFile)(place, file, archive)


class _DigestedFile:
    """A file whose SHA-256 is computed from what is read of it from front to back.

    It is open only while it is read, so that any number of files can be checked together.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: io.FileIO | None = None
        self._identity: tuple[int, ...] = ()
        self._at = 0
        self._sha256: Any = None
        self._digested = 0

    def start_digest(self) -> None:
        """Digest from now on what is read for the first time, and gaps that are skipped."""
        if self._sha256 is None:
            self._sha256 = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        start = self.tell()
        if self._sha256 is not None:
            self._digest_until(start)
        data = self._opened().read(size)
        end = start + len(data)
        if self._sha256 is not None and start <= self._digested < end:
            self._sha256.update(memoryview(data)[self._digested - start :])
            self._digested = end
        return data

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._opened().seek(offset, whence)

    def tell(self) -> int:
        return self._opened().tell()

    def seekable(self) -> bool:
        return True

    def _opened(self) -> io.FileIO:
        if self._file is None:
            self._file = io.FileIO(self._path)
            self.require_unchanged()
            self._file.seek(self._at)
        return self._file

    def require_unchanged(self) -> None:
        """Raise if the file is not what it was when it was first opened."""
        if not self._identity:
            self._identity = file_identity(self._path)
        else:
            require_unchanged(self._path, self._identity)

    def _digest_until(self, end: int) -> None:
        file = self._opened()
        here = file.tell()
        file.seek(self._digested)
        while block := file.read(min(_BLOCK_NBYTES, max(end - self._digested, 0))):
            self._sha256.update(block)
            self._digested += len(block)
        file.seek(here)

    def sha256(self) -> str:
        """Return the digest of the whole file, after reading what was not read yet."""
        self.start_digest()
        self._digest_until(self.seek(0, io.SEEK_END))
        digest: str = self._sha256.hexdigest()
        return digest

    def close(self) -> None:
        """Close the file until it is read again."""
        if self._file is not None:
            self._at = self._file.tell()
            self._file.close()
            self._file = None


@contextmanager
def _refusing(path: Path, member: str) -> Iterator[None]:
    """Convert any error of zipfile, zlib or NumPy on a broken or malicious archive."""
    try:
        yield
    except InvalidInputError:
        raise
    except Exception as error:  # their exceptions are undocumented
        raise InvalidInputError(f"{path}: {member}: {error}") from error


def _too_large(path: Path, key: str, nbytes: int) -> InvalidInputError:
    return InvalidInputError(
        f"{path}: {key}: expected at most {MAX_TABLE_NBYTES} bytes, got {nbytes}"
    )


class ResultFile(ABC):
    """A dictionary of arrays in a zip archive, readable in bands of rows."""

    def __init__(self, path: Path, file: _DigestedFile, archive: zipfile.ZipFile) -> None:
        self.path = path
        self._streams = ExitStack()
        self._file = file
        self._archive = archive

    @abstractmethod
    def info(
        self, keys: Collection[str] = KEYS
    ) -> Mapping[str, tuple[tuple[int, ...], "np.dtype[Any]"]]:
        """Return shape and dtype of the arrays of these keys; others are not looked at."""

    @property
    @abstractmethod
    def has_correlation_table(self) -> bool:
        """Whether there is a correlation table, which is not looked at."""

    @abstractmethod
    def small(self, key: str) -> AnyArray:
        """Read a scalar or a table whole."""

    @abstractmethod
    def rows(self, key: str) -> Rows:
        """Return a reader of rows ``y0:y1`` of a map; calls must go downwards without gaps."""

    def scan(self, keys: Iterable[str]) -> Iterator[tuple[str, Rows]]:
        """Yield maps and their readers in the order of the file.

        If each is read before the next, the file is read once, :meth:`sha256` included.
        """
        places = {key: self._archive.getinfo(self._member_of(key)).header_offset for key in keys}
        self._file.start_digest()
        for key in sorted(places, key=places.__getitem__):
            yield key, self.rows(key)

    def sha256(self) -> str:
        """Return the digest of the file's bytes, as hexadecimal digits."""
        return self._file.sha256()

    def require_unchanged(self) -> None:
        """Raise if the file was changed since it was opened."""
        self._file.require_unchanged()

    def close(self) -> None:
        """Free memory and descriptors until the file is read again."""
        self._streams.close()
        self._file.close()

    @abstractmethod
    def _member_of(self, key: str) -> str:
        """Return the name of the member with an array's values."""

    @abstractmethod
    def _end(self, stream: Any, place: str) -> None:
        """Read to the end of a member whose values were read: its CRC is checked only there."""

    def _bands(
        self, stream: Any, place: str, shape: tuple[int, ...], dtype: "np.dtype[Any]"
    ) -> Rows:
        """Return a reader of the rows of a map whose values come next in a stream."""
        height, width = shape
        position = 0

        def read(y0: int, y1: int) -> AnyArray:
            nonlocal position
            assert y0 == position, "bands are read downwards without gaps"
            position = y1
            data = self._exactly(stream, (y1 - y0) * width * dtype.itemsize, place)
            if y1 == height:
                self._end(stream, place)
            band = np.frombuffer(data, dtype).reshape(y1 - y0, width)
            return band.astype(dtype.newbyteorder("="), copy=False)

        return read

    def _exactly(self, stream: Any, nbytes: int, place: str) -> bytes:
        with _refusing(self.path, place):
            data = cast(bytes, stream.read(nbytes))
        if len(data) != nbytes:
            raise InvalidInputError(
                f"{self.path}: {place}: the file ends early: expected {nbytes} more bytes, got "
                f"{len(data)}"
            )
        return data


class _NpzFile(ResultFile):
    def info(
        self, keys: Collection[str] = KEYS
    ) -> Mapping[str, tuple[tuple[int, ...], "np.dtype[Any]"]]:
        found = {}
        for member in self._archive.namelist():
            key = member.removesuffix(".npy")
            if key in keys and key != member:
                with self._open(member) as stream:
                    found[key] = self._header(stream, member)
        return found

    @property
    def has_correlation_table(self) -> bool:
        return any(member.startswith(TABLE) for member in self._archive.namelist())

    def _member_of(self, key: str) -> str:
        return f"{key}.npy"

    def _open(self, member: str) -> Any:
        with _refusing(self.path, member):
            info = self._archive.getinfo(member)
            # zipfile decompresses other methods without a size limit.
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError("is compressed in a way that NumPy does not use")
            return self._archive.open(info)

    def _header(self, stream: Any, member: str) -> tuple[tuple[int, ...], "np.dtype[Any]"]:
        with _refusing(self.path, member):
            major, minor = npy.read_magic(stream)
            reader = {1: npy.read_array_header_1_0, 2: npy.read_array_header_2_0}.get(major)
            if reader is None:
                raise ValueError(f".npy version {major}.{minor}")
            shape, fortran, dtype = reader(stream)
            if not all(0 <= n < 2**63 for n in shape):
                raise ValueError("expected a shape of numbers from 0 to 2**63 - 1")
        if dtype.hasobject:
            raise InvalidInputError(
                f"{self.path}: {member}: holds Python objects, which are never unpickled"
            )
        if fortran and len(shape) > 1:
            raise InvalidInputError(
                f"{self.path}: {member}: expected row-major order, got column-major; save "
                "np.ascontiguousarray(map)"
            )
        return shape, dtype

    def small(self, key: str) -> AnyArray:
        with self._open(f"{key}.npy") as stream:
            shape, dtype = self._header(stream, key)
            nbytes = math.prod(shape) * dtype.itemsize
            if nbytes > MAX_TABLE_NBYTES:
                raise _too_large(self.path, key, nbytes)
            data = self._exactly(stream, nbytes, key)
            self._end(stream, key)
            with _refusing(self.path, key):
                return np.ndarray(shape, dtype, data)

    def rows(self, key: str) -> Rows:
        stream = self._streams.enter_context(self._open(f"{key}.npy"))
        shape, dtype = self._header(stream, key)
        return self._bands(stream, key, shape, dtype)

    def _end(self, stream: Any, place: str) -> None:
        with _refusing(self.path, place):
            if stream.read(1):
                raise ValueError("expected the array's values only, got more bytes after them")


class _TorchFile(ResultFile):
    """A zip archive with a pickle, and the raw values of each storage in a member."""

    def __init__(self, path: Path, file: _DigestedFile, archive: zipfile.ZipFile) -> None:
        super().__init__(path, file, archive)
        members = set(archive.namelist())
        pickles = [member for member in members if member.endswith("/data.pkl")]
        if len(pickles) > 1:
            raise InvalidInputError(f"{path}: expected one data.pkl, got {len(pickles)}")
        self._folder = pickles[0].removesuffix("data.pkl")
        with _refusing(path, pickles[0]):
            if archive.getinfo(pickles[0]).file_size > torch_pickle.MAX_NBYTES:
                raise ValueError(f"expected at most {torch_pickle.MAX_NBYTES:,} bytes of it")
            pickle = self._member(pickles[0])
            content = torch_pickle.parse(pickle.tobytes())
            if isinstance(content, torch_pickle.Foreign):
                raise ValueError(content.refusal)
        if not isinstance(content, dict):
            raise InvalidInputError(
                f"{path}: expected a dictionary of tensors, got {type(content).__name__}"
            )
        self._content = {str(key): value for key, value in content.items()}
        order = self._folder + "byteorder"
        self._order = ">" if order in members and self._member(order).tobytes() == b"big" else "<"
        self._storages: dict[str, AnyArray] = {}

    def info(
        self, keys: Collection[str] = KEYS
    ) -> Mapping[str, tuple[tuple[int, ...], "np.dtype[Any]"]]:
        found = {}
        for key in self._content:
            if key not in keys or self._content[key] is None:
                continue
            value = self._value(key)
            if isinstance(value, torch_pickle.Tensor):
                found[key] = (value.shape, self._dtype(key, value.storage))
            else:
                found[key] = (value.shape, value.dtype)
        return found

    @property
    def has_correlation_table(self) -> bool:
        return TABLE in self._content

    def _value(self, key: str) -> torch_pickle.Tensor | AnyArray:
        value = self._content[key]
        if isinstance(value, torch_pickle.Tensor):
            return value
        with _refusing(self.path, key):
            if isinstance(value, torch_pickle.Foreign):
                raise ValueError(value.refusal)
            if not isinstance(value, bool | int | float):
                raise ValueError(f"expected a tensor or a number, got {type(value).__name__}")
            return np.asarray(value)

    def _dtype(self, key: str, storage: torch_pickle.Storage) -> "np.dtype[Any]":
        """Return the dtype of a storage whose values are all there."""
        with _refusing(self.path, key):
            name = torch_pickle.STORAGE_DTYPES[storage.kind]
            if name is None:
                raise ValueError(
                    f"NumPy has nothing like torch's {storage.kind}; save tensor.float()"
                )
            dtype = np.dtype(self._order + name)
            expected, got = storage.n * dtype.itemsize, self._info(self._storage(storage)).file_size
            if got != expected:
                raise ValueError(f"expected {expected:,} bytes, got {got:,}")
            return dtype

    def _storage(self, storage: torch_pickle.Storage) -> str:
        return f"{self._folder}data/{storage.key}"

    def _member_of(self, key: str) -> str:
        return self._storage(cast(torch_pickle.Tensor, self._content[key]).storage)

    def small(self, key: str) -> AnyArray:
        tensor = self._value(key)
        if not isinstance(tensor, torch_pickle.Tensor):
            return tensor
        nbytes = math.prod(tensor.shape) * self._dtype(key, tensor.storage).itemsize
        if nbytes > MAX_TABLE_NBYTES:
            raise _too_large(self.path, key, nbytes)
        return self._mapped(key, tensor).copy()  # which needs no descriptor

    def _mapped(self, key: str, tensor: torch_pickle.Tensor) -> AnyArray:
        """Return a tensor memory-mapped, after verifying the checksum of its storage."""
        dtype, member = self._dtype(key, tensor.storage), self._storage(tensor.storage)
        if member not in self._storages:
            self._storages[member] = self._member(member)
        offset, *strides = (n * dtype.itemsize for n in (tensor.offset, *tensor.strides))
        with _refusing(self.path, key):
            return np.ndarray(tensor.shape, dtype, self._storages[member].data, offset, strides)

    def rows(self, key: str) -> Rows:
        tensor = cast(torch_pickle.Tensor, self._content[key])
        dtype = self._dtype(key, tensor.storage)
        if tensor.strides != (tensor.shape[1], 1):
            values = self._mapped(key, tensor)
            return lambda y0, y1: values[y0:y1].astype(dtype.newbyteorder("="), copy=False)
        member = self._storage(tensor.storage)
        with _refusing(self.path, member):
            stream = self._streams.enter_context(self._archive.open(member))
            self._skip(stream, tensor.offset * dtype.itemsize)
        return self._bands(stream, member, tensor.shape, dtype)

    def _end(self, stream: Any, place: str) -> None:
        with _refusing(self.path, place):
            self._skip(stream)

    def _skip(self, stream: Any, nbytes: int = 2**63) -> None:
        """Read up to so many bytes; a seek would turn the check of the CRC off."""
        while nbytes and (block := stream.read(min(nbytes, _BLOCK_NBYTES))):
            nbytes -= len(block)

    def _info(self, member: str) -> zipfile.ZipInfo:
        with _refusing(self.path, member):
            info = self._archive.getinfo(member)
            if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
                raise ValueError("is compressed, which torch does not do; save it again with torch")
            return info

    def _member(self, member: str) -> AnyArray:
        """Verify a member's checksum and return its bytes, memory-mapped."""
        info = self._info(member)
        with _refusing(self.path, member):
            with self._archive.open(info) as stream:
                self._skip(stream)
            if not info.file_size:
                return np.empty(0, np.uint8)
            with self.path.open("rb") as file:
                file.seek(info.header_offset)
                _, *lengths = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
            start = info.header_offset + _LOCAL_HEADER.size + sum(lengths)
            return np.memmap(self.path, np.uint8, "r", start, (info.file_size,))

    def close(self) -> None:
        self._storages = {}
        super().close()
