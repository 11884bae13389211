"""numba's side of the kernels: what they are compiled with, on demand and ahead.

Importing numba takes longer than a small merge; nothing imports this module unless a kernel must be
compiled. It defines the operations of :mod:`ocelot_em.kernels.compiling` that have no equivalent in
Python, and lets kernels call each other by their stand-ins there.
"""

import functools
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils, errors, event
from numba.core.registry import cpu_target
from numba.extending import intrinsic, typeof_impl
from numba.np.arrayobj import populate_array

from ocelot_em.kernels.compile_cache import caching_there, compiling_alone


class Operation(Protocol):
    """What only compiled code can call; its name is one of :data:`_OPERATIONS`."""

    name: str


class Kernel(Protocol):
    """A function to compile, the options of numba for it, and what numba made of it."""

    function: Callable[..., Any]
    options: dict[str, Any]

    @property
    def dispatcher(self) -> Any:
        """The result of :func:`dispatcher_of`."""
        ...


def dispatcher_of(kernel: Kernel) -> Any:
    """Return a kernel as a function that numba compiles at its first call, and caches on disk."""
    # No kernel is passed to another one as a function, which a second wrapper is for.
    settings = {"nogil": True, "error_model": "numpy", "no_cfunc_wrapper": True, **kernel.options}
    if _only_assembly:
        return njit(no_cpython_wrapper=True, **settings)(kernel.function)
    with caching_there() as cache:
        return njit(cache=cache, **settings)(kernel.function)


_only_assembly = False


def make_only_assembly() -> None:
    """Let this process make LLVM's assembly of kernels, which cannot be called then.

    Otherwise, numba also makes the machine code of each, and of every one that it calls, and what
    Python calls them by, which takes longer than the assembly.
    """
    from numba.core import codegen, cpu

    global _only_assembly
    _only_assembly = True

    def finish(_context: Any, library: Any, *_: Any) -> Callable[..., Any]:
        library._ensure_finalized()
        return object().__sizeof__  # a function of C, which is another one each time

    cpu.CPUContext.get_executable = finish
    codegen.JITCPUCodegen._add_module = codegen.JITCodeLibrary._finalize_specific = lambda *_: None


ANNOUNCE_AFTER_SECONDS = 1.0
"""Duration after which compilation is announced; a few kernels take less, all of them 15 s."""


class _NotCachedError(Exception):
    """A kernel is not in the cache."""


class _Refusal(event.Listener):  # type: ignore[misc]
    """Interrupts this thread where it would compile; listeners hear all threads."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()

    def on_start(self, _event: Any) -> None:
        if threading.get_ident() == self._thread:
            raise _NotCachedError

    def on_end(self, _event: Any) -> None:
        pass


class _Announcement(event.Listener):  # type: ignore[misc]
    """Announces compilation that lasts, by this process or by the one that it waits for."""

    def __init__(self, announce: Callable[[], None]) -> None:
        self._announce: Callable[[], None] | None = announce
        self._started = time.perf_counter()

    def on_start(self, _event: Any = None) -> None:
        if self._announce is not None and self.seconds >= ANNOUNCE_AFTER_SECONDS:
            self._announce()
            self._announce = None

    def on_end(self, _event: Any) -> None:
        pass

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._started


def seconds_compiling(work: Callable[[], None], announce: Callable[[], None]) -> float:
    """Call ``work``, which compiles kernels, and time it; 0 if all of them are in the cache.

    If one is not, ``work`` is interrupted before the first, and called again when no other process
    that shares the cache is compiling: it then finds what that process has compiled. ``announce``
    is called once if this takes long.
    """
    with suppress(_NotCachedError), event.install_listener("numba:compile", _Refusal()):
        work()
        return 0.0
    announcement = _Announcement(announce)
    with (
        compiling_alone(announcement.on_start),
        event.install_listener("numba:compile", announcement),
    ):
        work()
    return announcement.seconds


def teach(kernel_type: type[Kernel], operation_type: type[Operation]) -> None:
    """Let compiled functions call kernels and operations by their names in Python."""

    @typeof_impl.register(kernel_type)
    def of_kernel(kernel: Kernel, _context: Any) -> Any:
        return types.Dispatcher(kernel.dispatcher)

    @typeof_impl.register(operation_type)
    def of_operation(operation: Operation, _context: Any) -> Any:
        return cpu_target.typing_context.resolve_value_type(_OPERATIONS[operation.name])


def array_at(
    context: Any, builder: Any, array_type: Any, address: Any, lengths: tuple[list[Any], list[Any]]
) -> Any:
    """Return an array at an address, given its shape and strides, which may be missing."""
    array = context.make_array(array_type)(context, builder)
    shape, strides = lengths
    itemsize = ir.Constant(ir.IntType(64), _itemsize(context, array_type))
    if not strides:
        strides = [itemsize]
        for length in shape[:0:-1]:
            strides.insert(0, builder.mul(strides[0], length))
    data = builder.inttoptr(address, array.data.type)
    populate_array(array, data, shape, strides, itemsize, None)
    return array._getvalue()


def _itemsize(context: Any, array_type: Any) -> int:
    return int(context.get_abi_sizeof(context.get_data_type(array_type.dtype)))


@intrinsic
def _plane(_context: Any, _address: Any, dtype: Any, _start: Any, _size: Any) -> Any:
    array_type = types.Array(dtype.dtype, 1, "C")

    def generate(context: Any, builder: Any, _: Any, args: Any) -> Any:
        address, _dtype, start, size = args
        itemsize = ir.Constant(start.type, _itemsize(context, array_type))
        first = builder.add(address, builder.mul(start, itemsize))
        return array_at(context, builder, array_type, first, ([size], []))

    return array_type(types.int64, dtype, types.int64, types.int64), generate


@intrinsic(prefer_literal=True)
def _on_stack(_context: Any, size: Any, dtype: Any) -> Any:
    if not isinstance(size, types.IntegerLiteral):
        raise errors.TypingError("the size of memory on the stack must be a constant")
    array_type, n = types.Array(dtype.dtype, 1, "C"), size.literal_value

    def generate(context: Any, builder: Any, _: Any, __: Any) -> Any:
        int64 = ir.IntType(64)
        data_type = context.get_data_type(array_type.dtype)
        memory = cgutils.alloca_once(builder, data_type, ir.Constant(int64, n))
        address = builder.ptrtoint(memory, int64)
        return array_at(context, builder, array_type, address, ([ir.Constant(int64, n)], []))

    return array_type(size, dtype), generate


@intrinsic
def _decompress(
    _context: Any, _function: Any, _source: Any, _target: Any, _nbytes: Any, _n: Any
) -> Any:
    def generate(_: Any, builder: Any, __: Any, args: Any) -> Any:
        int32, bytes_pointer = ir.IntType(32), ir.IntType(8).as_pointer()
        function_type = ir.FunctionType(int32, [bytes_pointer, bytes_pointer, int32, int32])
        function = builder.inttoptr(args[0], function_type.as_pointer())
        source, target = (builder.inttoptr(address, bytes_pointer) for address in args[1:3])
        sizes = [builder.trunc(size, int32) for size in args[3:]]
        return builder.call(function, [source, target, *sizes])

    return types.int32(*[types.int64] * 5), generate


_OPERATIONS = {"plane": _plane, "on_stack": _on_stack, "decompress": _decompress}
cpu_target.typing_context.refresh()


@functools.cache
def entry_point(kernel: Kernel, argument_types: Any) -> Callable[..., Any]:
    """Return a function of two addresses that calls a kernel: its arguments, and what it returns.

    Both are rows of 64-bit words, in the order of :mod:`ocelot_em.kernels.compiling`.
    """
    dispatcher = kernel.dispatcher

    @intrinsic
    def unpack(_context: Any, _address: Any) -> Any:
        def generate(context: Any, builder: Any, _: Any, args: Any) -> Any:
            words = _Words(context, builder, args[0])
            return words.value(argument_types)

        return argument_types(types.int64), generate

    @intrinsic
    def pack(_context: Any, _address: Any, result: Any) -> Any:
        def generate(context: Any, builder: Any, _: Any, args: Any) -> Any:
            _Words(context, builder, args[0]).keep(result, args[1])
            return context.get_dummy_value()

        return types.void(types.int64, result), generate

    @njit(nogil=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)
    def enter(arguments: Any, returned: Any) -> None:
        pack(returned, dispatcher(*unpack(arguments)))

    return enter  # type: ignore[no-any-return]


class _Words:
    """Reads and writes values of numba as rows of words at an address."""

    def __init__(self, context: Any, builder: Any, address: Any) -> None:
        self._context, self._builder, self._n = context, builder, 0
        self._words = builder.inttoptr(address, ir.IntType(64).as_pointer())

    def _next(self) -> Any:
        at = self._builder.gep(self._words, [ir.Constant(ir.IntType(64), self._n)])
        self._n += 1
        return at

    def value(self, own_type: Any) -> Any:
        """Read a value."""
        builder, context = self._builder, self._context
        if isinstance(own_type, types.BaseTuple):
            return context.make_tuple(builder, own_type, [self.value(t) for t in own_type])
        if isinstance(own_type, types.Array):
            address = builder.load(self._next())
            shape = [builder.load(self._next()) for _ in range(own_type.ndim)]
            n_strides = 0 if own_type.layout == "C" else own_type.ndim
            strides = [builder.load(self._next()) for _ in range(n_strides)]
            return array_at(context, builder, own_type, address, (shape, strides))
        word = builder.load(self._next())
        if isinstance(own_type, types.Float):
            wide = builder.bitcast(word, ir.DoubleType())
            return context.cast(builder, wide, types.float64, own_type)
        if isinstance(own_type, types.Boolean):
            return builder.icmp_signed("!=", word, ir.Constant(word.type, 0))
        return context.cast(builder, word, types.int64, own_type)

    def keep(self, own_type: Any, value: Any) -> None:
        """Write a value."""
        builder, context = self._builder, self._context
        if isinstance(own_type, types.BaseTuple):
            for number, item_type in enumerate(own_type):
                self.keep(item_type, builder.extract_value(value, number))
        elif isinstance(own_type, types.Float):
            wide = context.cast(builder, value, own_type, types.float64)
            builder.store(builder.bitcast(wide, ir.IntType(64)), self._next())
        elif own_type != types.none:
            wide = context.cast(builder, value, own_type, types.int64)
            builder.store(wide, self._next())
