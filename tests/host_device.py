"""Stand-ins for a GPU: the same CUDA source, compiled for this processor, on memory of the host.

A warp has one lane there, or, where that is tested, all lanes, which take turns between the points
where they meet.
"""

import ctypes
import fcntl
import functools
import hashlib
import shutil
import subprocess
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest

from ocelot_em.errors import DeviceMemoryError
from ocelot_em.kernels.device import DeviceFacts, kernel_source
from ocelot_em.merge import job
from ocelot_em.run import clusters

PRELUDE = """
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <utility>
struct Index { unsigned x; };
static thread_local Index blockIdx, blockDim, threadIdx;
#define __device__
#define __global__
static inline float __int_as_float(int bits) { float f; std::memcpy(&f, &bits, 4); return f; }
#define __shared__ static thread_local
#define __launch_bounds__(N)
#define __ffs __builtin_ffs
static inline unsigned atomicMax(unsigned *p, unsigned v)
{ const unsigned before = *p; *p = before < v ? v : before; return before; }
static inline double __dadd_rn(double a, double b) { return a + b; }
static inline double __dsub_rn(double a, double b) { return a - b; }
static inline double __dmul_rn(double a, double b) { return a * b; }
static inline double __ddiv_rn(double a, double b) { return a / b; }
static inline double __dsqrt_rn(double a) { return std::sqrt(a); }
static inline double __ll2double_rn(long long a) { return (double)a; }
static inline float __double2float_rn(double a) { return (float)a; }
static inline unsigned long long atomicAdd(unsigned long long *p, unsigned long long v)
{ return __atomic_fetch_add(p, v, __ATOMIC_RELAXED); }
"""

ONE_LANE = """
#define LANES 1
static inline void __syncwarp() {}
static inline unsigned __ballot_sync(unsigned, bool a) { return a; }
template <typename T> static inline T __shfl_sync(unsigned, T a, int) { return a; }
static inline double __shfl_down_sync(unsigned, double a, int) { return a; }
static void each_lane(const std::function<void()> &lane) { lane(); }
"""

ALL_LANES = """
#include <ucontext.h>
#define LANES 32
struct Lane { ucontext_t context; bool has_ended; unsigned n_met; char stack[1 << 16]; };
static Lane lanes[LANES];
static ucontext_t caller;
static const std::function<void()> *work;
static uint64_t shown[2][LANES];
static Lane &own() { return lanes[threadIdx.x % LANES]; }
static void __syncwarp() { own().n_met++; swapcontext(&own().context, &caller); }
// What a lane shows is still there when the slowest looks, as the next goes beside it.
template <typename T> static const uint64_t *show(T value)
{
    uint64_t *all = shown[own().n_met % 2];
    std::memcpy(all + threadIdx.x % LANES, &value, sizeof(T));
    __syncwarp();
    return all;
}
template <typename T> static T __shfl_sync(unsigned, T value, int lane)
{
    const uint64_t *all = show(value);
    std::memcpy(&value, all + lane, sizeof(T));
    return value;
}
static double __shfl_down_sync(unsigned, double value, int n)
{
    const int lane = threadIdx.x % LANES;
    return __shfl_sync(0, value, lane + n < LANES ? lane + n : lane);
}
static unsigned __ballot_sync(unsigned, bool value)
{
    const uint64_t *all = show<uint64_t>(value);
    unsigned bits = 0;
    for (int lane = 0; lane < LANES; lane++) bits |= (unsigned)all[lane] << lane;
    return bits;
}
static void run_lane() { (*work)(); own().has_ended = true; swapcontext(&own().context, &caller); }
// Run a warp, forwards and backwards in turn, so that results that depend on the order differ.
static void each_lane(const std::function<void()> &lane_work)
{
    if (threadIdx.x % LANES) return;
    const unsigned first = threadIdx.x;
    work = &lane_work;
    for (Lane &lane : lanes) {
        lane.has_ended = false;
        lane.n_met = 0;
        getcontext(&lane.context);
        lane.context.uc_stack.ss_sp = lane.stack;
        lane.context.uc_stack.ss_size = sizeof(lane.stack);
        makecontext(&lane.context, run_lane, 0);
    }
    bool any = true;
    for (int turn = 0; any; turn++) {
        any = false;
        for (int i = 0; i < LANES; i++) {
            threadIdx.x = first + (turn % 2 ? LANES - 1 - i : i);
            if (own().has_ended) continue;
            any = true;
            swapcontext(&caller, &own().context);
        }
    }
    threadIdx.x = first;
}
"""

LAUNCHER = """
template <typename... A, std::size_t... I>
static void run(void (*kernel)(A...), unsigned blocks, unsigned threads, void **arguments,
                std::index_sequence<I...>)
{
    blockDim.x = threads;
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++)
        for (threadIdx.x = 0; threadIdx.x < threads; threadIdx.x++)
            each_lane([&] { kernel(*reinterpret_cast<A *>(arguments[I])...); });
}
template <typename... A>
static void run(void (*kernel)(A...), unsigned blocks, unsigned threads, void **arguments)
{ run(kernel, blocks, threads, arguments, std::index_sequence_for<A...>()); }
#define LAUNCHER(NAME) extern "C" void launch_##NAME(unsigned b, unsigned t, void **a) \\
    { run(NAME, b, t, a); }
LAUNCHER(fold_indexed) LAUNCHER(fold_4_poses) LAUNCHER(fold_5_poses)
LAUNCHER(finalise) LAUNCHER(mask_nan)
LAUNCHER(decode_streams) LAUNCHER(unshuffle) LAUNCHER(measure_rows)
LAUNCHER(shuffle) LAUNCHER(encode_streams) LAUNCHER(pack_streams) LAUNCHER(gather)
"""

THREADS = 32


def host_kernels(lanes=ONE_LANE):
    """The compiled library, or a skip that says why there is none."""
    return _compiled(lanes)


@functools.cache
def _compiled(lanes):
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler to build the CUDA source for the host with")
    source = PRELUDE + lanes + kernel_source() + LAUNCHER
    flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-fPIC", "-shared", "-Wall", "-Werror"]
    flags.append("-Wno-maybe-uninitialized")
    # All processes of the tests share it, and later runs.
    name = hashlib.sha256(" ".join([compiler, *flags, source]).encode()).hexdigest()[:16]
    library = Path(__file__).parent / "__pycache__" / f"host-kernels-{name}.so"
    library.parent.mkdir(exist_ok=True)
    with library.with_name("host-kernels.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the others wait for the first
        if not library.exists():
            new = library.with_suffix(".new")
            command = [compiler, *flags, "-x", "c++", "-", "-o", new]
            done = subprocess.run(command, input=source, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            new.replace(library)
    return ctypes.CDLL(str(library))


class Done:
    def synchronize(self):
        pass


class HostDevice:
    """A device whose memory is the host's, and which does everything at once.

    Allocations are counted, and refused beyond a limit.
    """

    def __init__(self, limit_nbytes=None, lanes=ONE_LANE):
        self._library, self._limit = host_kernels(lanes), limit_nbytes
        self._lock = threading.Lock()
        self.nbytes = self.peak_nbytes = 0
        self.launched = []

    def empty(self, n, dtype):
        nbytes = n * np.dtype(dtype).itemsize
        with self._lock:
            if self._limit is not None and self.nbytes + nbytes > self._limit:
                raise DeviceMemoryError(f"cuda: {nbytes:,} bytes more do not fit")
            self.nbytes += nbytes
            self.peak_nbytes = max(self.peak_nbytes, self.nbytes)
        values = np.empty(n, dtype)
        weakref.finalize(values, self._give_back, values.nbytes)
        return values

    def _give_back(self, nbytes):
        with self._lock:
            self.nbytes -= nbytes

    def pinned(self, nbytes):
        return np.empty(nbytes, np.uint8)

    def copy_in(self, host, values):
        return self._later(lambda: np.copyto(values, host))

    def copy_out(self, values, host):
        return self._later(lambda: np.copyto(host, values))

    def launch(self, kernel, n_threads, arguments):
        kept = [self._argument(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * len(kept))(*(value.ctypes.data for value in kept))
        run = getattr(self._library, f"launch_{kernel}")
        blocks = -(-n_threads // THREADS)
        self.launched.append(kernel)

        def action(_kept=(kept, arguments)):
            run(ctypes.c_uint(blocks), ctypes.c_uint(THREADS), pointers)

        self._later(action)

    def _argument(self, argument):
        """A value as it is passed: arrays on the device by their address."""
        if isinstance(argument, np.ndarray) and argument.dtype.fields is None:
            return np.array([argument.ctypes.data], np.int64)
        return np.array(argument).reshape(1).copy()

    def address(self, values):
        return values.ctypes.data

    def _later(self, action):
        action()
        return Done()


class LateDevice(HostDevice):
    """One that does everything as late as it may: when somebody waits for it.

    Whoever uses memory again before its copy is done, or looks at it too early, gets wrong values.
    """

    def __init__(self, limit_nbytes=None):
        super().__init__(limit_nbytes)
        self._of_thread = threading.local()

    def _later(self, action):
        if not hasattr(self._of_thread, "queue"):
            self._of_thread.queue = []
        queue = self._of_thread.queue
        queue.append(action)
        return Late(queue, action)


class Late:
    def __init__(self, queue, action):
        self._queue, self._action = queue, action

    def synchronize(self):
        if self._action in self._queue:
            for _ in range(self._queue.index(self._action) + 1):
                self._queue.pop(0)()


def lend_device(monkeypatch, device, memory_nbytes=2**30):
    """Make a device the machine's only GPU."""
    facts = [DeviceFacts("stand-in", memory_nbytes)]
    monkeypatch.setattr(clusters, "find_devices", lambda: facts)
    monkeypatch.setattr(clusters, "open_device", lambda: device)
    monkeypatch.setattr(job, "open_device", lambda: device)
    return device
