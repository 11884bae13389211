"""CUDA device interface of the merge: memory, copies and kernel launches, in stream order.

The rest of the package uses GPUs only through :class:`Device`; :class:`CudaDevice` is the only user
of CuPy besides :mod:`ocelot_em.model.arrays`. Each thread has its own stream. Importing this module
requires neither CuPy nor a GPU.
"""

import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from ocelot_em.errors import DeviceError, DeviceMemoryError, MissingDependencyError
from ocelot_em.model.maps import AnyArray

_THREADS_PER_BLOCK = 256

_ONE_WARP = 32
_WARP_KERNELS = ("decode_streams", "encode_streams", "pack_streams")
"""Kernels with few warps that work for long: each is a block, so that all processors have some."""

_COMPILE_OPTIONS = ("--fmad=false", "--ftz=false")
"""As on the CPU, round each product and sum separately, and keep subnormal values."""


class DeviceEvent(Protocol):
    """A point in a stream."""

    def synchronize(self) -> None:
        """Wait until all earlier work in the stream is complete."""


class Device(Protocol):
    """Memory and kernels of one device; the calls of one thread are executed in order."""

    def empty(self, n: int, dtype: "str | np.dtype[Any]") -> AnyArray:
        """Allocate ``n`` values on the device."""

    def pinned(self, nbytes: int) -> AnyArray:
        """Allocate page-locked host memory (uint8) for direct copies to and from the device."""

    def copy_in(self, host: AnyArray, values: AnyArray) -> DeviceEvent:
        """Copy contiguous values to the device; ``host`` must not change before the event."""

    def copy_out(self, values: AnyArray, host: AnyArray) -> DeviceEvent:
        """Copy contiguous values to the host; they are complete at the event."""

    def launch(self, kernel: str, n_threads: int, arguments: Sequence[Any]) -> None:
        """Start a kernel of ``kernels/*.cu`` with at least ``n_threads`` threads.

        Arguments are NumPy integers and floats, structures as one-record arrays, and device arrays.
        """

    def address(self, values: AnyArray) -> int:
        """Return the device address of an array."""


def kernel_source() -> str:
    """Return the CUDA source of all kernels."""
    names = "merge", "decode", "encode"
    return "".join(Path(__file__).with_name(f"{name}.cu").read_text("utf-8") for name in names)


@dataclass(frozen=True)
class DeviceFacts:
    """Properties of a device that are known before anything is started on it.

    ``memory_nbytes`` may be allocated: the device memory, or CuPy's limit if set and lower.
    """

    name: str
    memory_nbytes: int


def find_devices() -> list[DeviceFacts]:
    """List the devices that this process can use; nothing is started on them.

    A missing or too old driver, and no visible device, are a DeviceError.
    """
    cupy = _cupy()
    runtime = cupy.cuda.runtime
    try:
        n_devices = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        raise DeviceError(_why_no_device(runtime, error)) from error
    if n_devices == 0:
        raise DeviceError(_NO_DEVICE.format(visible=os.environ.get("CUDA_VISIBLE_DEVICES")))
    limit = cupy.get_default_memory_pool().get_limit()
    found = []
    for number in range(n_devices):
        properties = runtime.getDeviceProperties(number)
        total = int(properties["totalGlobalMem"])
        found.append(DeviceFacts(properties["name"].decode(), min(limit or total, total)))
    return found


_NO_DEVICE = (
    "cuda: expected a GPU, none is visible (CUDA_VISIBLE_DEVICES is {visible!r}); "
    "use --device cpu, or run where there is one"
)


def _cupy() -> Any:
    try:
        import cupy
    except ImportError as error:
        raise MissingDependencyError(
            "cuda: CuPy is not installed, or cannot be loaded: pip install 'ocelot-em[cuda13]', or "
            f"'ocelot-em[cuda12]' for drivers of CUDA 12 ({error})"
        ) from error
    return cupy


def _why_no_device(runtime: Any, error: Exception) -> str:
    needed, found = runtime.runtimeGetVersion(), runtime.driverGetVersion()
    if found == 0:
        return "cuda: expected an NVIDIA driver, found none on this machine; use --device cpu"
    if found // 1000 < needed // 1000:
        return (
            f"cuda: the driver is for CUDA {_dotted(found)}, the installed CuPy needs "
            f"{_dotted(needed)}: update the driver, or install 'ocelot-em[cuda{found // 1000}]'"
        )
    if "NoDevice" in str(error):
        return _NO_DEVICE.format(visible=os.environ.get("CUDA_VISIBLE_DEVICES"))
    return f"cuda: the GPU cannot be used: {error}; use --device cpu"


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


@lru_cache(maxsize=1)
def open_device() -> Device:
    """Return the device of this process, with all kernels compiled."""
    find_devices()
    return CudaDevice(_cupy())


@contextmanager
def borrow_device(number: int, producers: Iterable[int]) -> Iterator["CudaDevice"]:
    """Use a GPU for arrays that are already on it, after waiting for their producers.

    It is CuPy's current device within the context, and has completed all work after it. Numbers
    are those of CUDA; ``producers`` are the GPUs whose pending work must be complete first.
    """
    cuda = _cupy().cuda
    device = _open_at(number)
    # The arrays may have been filled on any stream of any thread.
    for producer in producers:
        cuda.Device(producer).synchronize()
    with cuda.Device(number):
        before = cuda.get_current_stream()
        try:
            yield device
        finally:
            device.finish()
            before.use()


@lru_cache
def _open_at(number: int) -> "CudaDevice":
    # Kernels and streams belong to the GPU that is current when they are created.
    find_devices()
    cupy = _cupy()
    with cupy.cuda.Device(number):
        return CudaDevice(cupy)


class CudaDevice:
    """The current CUDA device, through CuPy; see :class:`Device`."""

    def __init__(self, cupy: Any) -> None:
        self._cupy = cupy
        self._per_thread = threading.local()
        self._module = cupy.cuda.Module()
        try:
            # A RawModule always flushes subnormal values to zero.
            compiled, _ = cupy.cuda.compiler.compile_using_nvrtc(kernel_source(), _COMPILE_OPTIONS)
            self._module.load(compiled)
        except Exception as error:
            first_line = str(error).strip().partition("\n")[0]
            raise DeviceError(
                f"cuda: the kernels cannot be compiled: {type(error).__name__}: {first_line}; "
                "CuPy needs the compiler and headers of its CUDA: pip install "
                "'cuda-toolkit[cudart,nvrtc]' of that version"
            ) from error

    @property
    def _stream(self) -> Any:
        """Stream of this thread, which becomes current."""
        if not hasattr(self._per_thread, "stream"):
            self._per_thread.stream = self._cupy.cuda.Stream(non_blocking=True)
        stream = self._per_thread.stream
        stream.use()
        return stream

    def empty(self, n: int, dtype: "str | np.dtype[Any]") -> AnyArray:
        """Allocate on the device."""
        _ = self._stream  # later work on the array uses this stream, too
        try:
            return cast("AnyArray", self._cupy.empty(n, dtype))
        except self._cupy.cuda.memory.OutOfMemoryError as error:
            nbytes = n * np.dtype(dtype).itemsize
            free, total = self._cupy.cuda.runtime.memGetInfo()
            held = self._cupy.get_default_memory_pool().total_bytes()
            raise DeviceMemoryError(
                f"cuda: {nbytes:,} bytes more do not fit: of {total:,} bytes {free:,} are free, "
                f"this process holds {held:,}; other processes may hold the rest: wait for them, "
                "or use fewer threads or a smaller --tile-size"
            ) from error

    def pinned(self, nbytes: int) -> AnyArray:
        """Allocate page-locked host memory."""
        import cupyx

        return cast("AnyArray", cupyx.empty_pinned((nbytes,), np.uint8))

    def copy_in(self, host: AnyArray, values: AnyArray) -> DeviceEvent:
        """Copy to the device on this thread's stream."""
        stream = self._stream
        cast("Any", values).data.copy_from_host_async(host.ctypes.data, host.nbytes, stream)
        return self._record_event(stream)

    def copy_out(self, values: AnyArray, host: AnyArray) -> DeviceEvent:
        """Copy to the host on this thread's stream."""
        stream = self._stream
        cast("Any", values).data.copy_to_host_async(host.ctypes.data, host.nbytes, stream)
        return self._record_event(stream)

    def _record_event(self, stream: Any) -> DeviceEvent:
        # Waiting for a blocking event leaves the core to decoding threads.
        event = self._cupy.cuda.Event(block=True, disable_timing=True)
        event.record(stream)
        return cast("DeviceEvent", event)

    def launch(self, kernel: str, n_threads: int, arguments: Sequence[Any]) -> None:
        """Start a kernel on this thread's stream."""
        stream = self._stream
        per_block = _ONE_WARP if kernel in _WARP_KERNELS else _THREADS_PER_BLOCK
        blocks = -(-n_threads // per_block)
        function = self._module.get_function(kernel)
        function((blocks,), (per_block,), tuple(arguments), stream=stream)

    def address(self, values: AnyArray) -> int:
        """Return the device address."""
        return int(cast("Any", values).data.ptr)

    def bring(self, values: Any) -> AnyArray:
        """Return a CuPy array from any GPU as a C-contiguous array on the current GPU.

        The array is copied only if necessary.
        """
        cupy, stream = self._cupy, self._stream
        if values.device.id == cupy.cuda.Device().id:
            return cast("AnyArray", cupy.ascontiguousarray(values))
        # Copies between two GPUs are untested.
        with values.device:
            contiguous = cupy.ascontiguousarray(values)
            cupy.cuda.get_current_stream().synchronize()
        copied = contiguous.copy()
        stream.synchronize()  # the contiguous copy may now be freed
        return cast("AnyArray", copied)

    def finish(self) -> None:
        """Wait for all work that this thread has started on the device."""
        self._stream.synchronize()
