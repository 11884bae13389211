"""Dictionaries of arrays in ``.npz`` and ``.pt`` files, read in bands of rows.

Files may be broken or malicious. Nothing is ever unpickled: ``.npz`` members are parsed as plain
``.npy`` streams, and tensors are located by :mod:`ocelot_em.io.torch_pickle`.
"""

import math
import struct
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from numpy.lib import format as npy

from ocelot_em.errors import InvalidInputError
from ocelot_em.io import torch_pickle
from ocelot_em.model.maps import MAPS, AnyArray
from ocelot_em.model.search_space import TABLES

MAX_TABLE_NBYTES = 2**30
"""Maximum size of an array that is read whole: 90 million orientations."""

_KEYS = {*MAPS, *TABLES}
"""Keys that are read from a file; others are ignored."""

_LOCAL_HEADER = struct.Struct("<4s22xHH")
"""Local header of a zip member: signature, lengths of the name and of the extra field."""

_BLOCK_NBYTES = 2**20


class ResultFile(Protocol):
    """A dictionary of arrays in a file, readable in bands of rows."""

    path: Path

    def info(self) -> Mapping[str, tuple[tuple[int, ...], "np.dtype[Any]"]]:
        """Return shape and dtype of every array."""
        ...

    def small(self, key: str) -> AnyArray:
        """Read a scalar or a table whole."""
        ...

    def rows(self, key: str) -> Callable[[int, int], AnyArray]:
        """Return a reader of rows ``y0:y1`` of a map; calls must go downwards without gaps."""
        ...

    def close(self) -> None:
        """Close the file."""
        ...


def open_result_file(path: str | PathLike[str]) -> ResultFile:
    """Open a ``.npz`` or ``.pt`` file; its content decides which of the two it is.

    Raises
    ------
    InvalidInputError
        The file is missing, damaged, of another format, or would need unpickling.
    """
    place = Path(path)
    archive = None
    try:
        if not place.is_file():
            raise InvalidInputError(f"{place}: expected a file, got nothing there")
        with place.open("rb") as file:
            head = file.read(2)
        if head != b"PK":
            raise InvalidInputError(
                f"{place}: expected a .npz or .pt dictionary of arrays"
                + "; save it again with torch 1.6 or later" * (place.suffix in (".pt", ".pth"))
            )
        archive = zipfile.ZipFile(place)
    except InvalidInputError:
        raise
    except Exception as error:  # zipfile's exceptions are undocumented
        raise InvalidInputError(f"{place}: cannot be opened: {error}") from error
    try:
        members = Counter(archive.namelist())
        twice = [f"{place}: {member}: is there {n} times" for member, n in members.items() if n > 1]
        if twice:
            raise InvalidInputError(twice)
        of_torch = any(member.endswith("/data.pkl") for member in members)
        return _TorchFile(place, archive) if of_torch else _NpzFile(place, archive)
    except BaseException:
        archive.close()
        raise


@contextmanager
def _refusing(path: Path, member: str) -> Iterator[None]:
    """Convert any error of zipfile, zlib or NumPy on a broken or malicious archive."""
    try:
        yield
    except InvalidInputError:
        raise
    except Exception as error:  # their exceptions are undocumented
        raise InvalidInputError(f"{path}: {member}: {error}") from error


class _NpzFile:
    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        self.path = path
        self._archive = archive
        self._stack = ExitStack()
        self._stack.callback(archive.close)

    def info(self) -> Mapping[str, tuple[tuple[int, ...], "np.dtype[Any]"]]:
        found = {}
        for member in self._archive.namelist():
            if member.endswith(".npy"):
                with self._open(member) as stream:
                    shape, dtype = self._header(stream, member)
                found[member.removesuffix(".npy")] = (shape, dtype)
        return found

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
                raise InvalidInputError(
                    f"{self.path}: {key}: expected at most {MAX_TABLE_NBYTES} bytes, got {nbytes}"
                )
            data = self._exactly(stream, nbytes, key)
            self._end(stream, key)
            with _refusing(self.path, key):
                return np.ndarray(shape, dtype, data)

    def rows(self, key: str) -> Callable[[int, int], AnyArray]:
        stream = self._stack.enter_context(self._open(f"{key}.npy"))
        (height, width), dtype = self._header(stream, key)
        position = 0

        def read(y0: int, y1: int) -> AnyArray:
            nonlocal position
            assert y0 == position, "bands are read downwards without gaps"
            position = y1
            data = self._exactly(stream, (y1 - y0) * width * dtype.itemsize, key)
            if y1 == height:
                self._end(stream, key)
            band = np.frombuffer(data, dtype).reshape(y1 - y0, width)
            return band.astype(dtype.newbyteorder("="), copy=False)

        return read

    def _exactly(self, stream: Any, nbytes: int, key: str) -> bytes:
        with _refusing(self.path, key):
            data = cast(bytes, stream.read(nbytes))
        if len(data) != nbytes:
            raise InvalidInputError(
                f"{self.path}: {key}: the file ends early: expected {nbytes} more bytes, got "
                f"{len(data)}"
            )
        return data

    def _end(self, stream: Any, key: str) -> None:
        """Read the end of a member: its CRC is checked only there."""
        with _refusing(self.path, key):
            if stream.read(1):
                raise ValueError("expected the array's values only, got more bytes after them")

    def close(self) -> None:
        self._stack.close()


class _TorchFile:
    """A zip archive with a pickle, and the raw values of each storage in a member."""

    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        self.path = path
        self._archive = archive
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
        if not isinstance(content, dict):
            raise InvalidInputError(
                f"{path}: expected a dictionary of tensors, got {type(content).__name__}"
            )
        self._content = {str(key): value for key, value in content.items()}
        order = self._folder + "byteorder"
        self._order = ">" if order in members and self._member(order).tobytes() == b"big" else "<"
        self._storages: dict[str, AnyArray] = {}

    def info(self) -> Mapping[str, tuple[tuple[int, ...], "np.dtype[Any]"]]:
        arrays = {key: self.small(key) for key in self._content if key in _KEYS}
        return {key: (array.shape, array.dtype) for key, array in arrays.items()}

    def small(self, key: str) -> AnyArray:
        value = self._content[key]
        with _refusing(self.path, key):
            if isinstance(value, torch_pickle.Tensor):
                return self._values(value)
            if not isinstance(value, bool | int | float):
                raise ValueError(f"expected a tensor or a number, got {type(value).__name__}")
            return np.asarray(value)

    def rows(self, key: str) -> Callable[[int, int], AnyArray]:
        values = self.small(key)
        return lambda y0, y1: values[y0:y1].astype(values.dtype.newbyteorder("="), copy=False)

    def _values(self, tensor: torch_pickle.Tensor) -> AnyArray:
        """Return a view of a tensor's values in the memory-mapped file."""
        storage = tensor.storage
        name = torch_pickle.STORAGE_DTYPES[storage.kind]
        if name is None:
            raise ValueError(f"NumPy has nothing like torch's {storage.kind}; save tensor.float()")
        dtype = np.dtype(self._order + name)
        if storage.key not in self._storages:
            self._storages[storage.key] = self._member(f"{self._folder}data/{storage.key}")
        raw = self._storages[storage.key]
        if raw.nbytes != storage.n * dtype.itemsize:
            raise ValueError(f"expected {storage.n * dtype.itemsize:,} bytes, got {raw.nbytes:,}")
        offset, *strides = (n * dtype.itemsize for n in (tensor.offset, *tensor.strides))
        return np.ndarray(tensor.shape, dtype, raw.data, offset, strides)

    def _member(self, member: str) -> AnyArray:
        """Verify a member's checksum and return its bytes, memory-mapped."""
        with _refusing(self.path, member):
            info = self._archive.getinfo(member)
            if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
                raise ValueError("is compressed, which torch does not do; save it again with torch")
            with self._archive.open(info) as stream:
                while stream.read(_BLOCK_NBYTES):
                    pass
            if not info.file_size:
                return np.empty(0, np.uint8)
            with self.path.open("rb") as file:
                file.seek(info.header_offset)
                _, *lengths = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
            start = info.header_offset + _LOCAL_HEADER.size + sum(lengths)
            return np.memmap(self.path, np.uint8, "r", start, (info.file_size,))

    def close(self) -> None:
        self._content, self._storages = {}, {}
        self._archive.close()
