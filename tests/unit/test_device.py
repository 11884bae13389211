"""Finding a GPU, and saying in one sentence why there is none; CuPy is played by a fake."""

import sys
import types

import pytest

from ocelot_em.errors import DeviceError, MissingDependencyError
from ocelot_em.kernels.device import CudaDevice, DeviceFacts, find_devices, open_device
from ocelot_em.model.options import MergeOptions
from ocelot_em.run import clusters as cluster
from ocelot_em.run.api import merge


class CUDARuntimeError(RuntimeError):
    pass


def fake_cupy(*, error="", driver=13020, n_devices=2, limit=0):
    def count():
        if error:
            raise CUDARuntimeError(error)
        return n_devices

    runtime = types.SimpleNamespace(
        CUDARuntimeError=CUDARuntimeError,
        getDeviceCount=count,
        runtimeGetVersion=lambda: 13020,
        driverGetVersion=lambda: driver,
        getDeviceProperties=lambda number: {
            "name": f"GPU {number}".encode(),
            "totalGlobalMem": 80 * 2**30 - number,
        },
    )
    module = types.ModuleType("cupy")
    module.cuda = types.SimpleNamespace(runtime=runtime)
    module.get_default_memory_pool = lambda: types.SimpleNamespace(get_limit=lambda: limit)
    return module


@pytest.fixture
def install(monkeypatch):
    open_device.cache_clear()

    def install(**options):
        monkeypatch.setitem(sys.modules, "cupy", fake_cupy(**options))

    return install


def test_facts_of_all_devices(install):
    install()
    assert find_devices() == [
        DeviceFacts("GPU 0", 80 * 2**30),
        DeviceFacts("GPU 1", 80 * 2**30 - 1),
    ]
    install(limit=2**30)
    assert {facts.memory_nbytes for facts in find_devices()} == {2**30}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"error": "cudaErrorInsufficientDriver", "driver": 0}, "expected an NVIDIA driver"),
        (
            {"error": "cudaErrorInsufficientDriver", "driver": 12040},
            r"driver is for CUDA 12.4, the installed CuPy needs 13.2: .*ocelot-em\[cuda12\]",
        ),
        ({"error": "cudaErrorNoDevice: no CUDA-capable device"}, "none is visible"),
        ({"n_devices": 0}, "CUDA_VISIBLE_DEVICES is '-1'"),
        ({"error": "cudaErrorUnknown"}, "cannot be used: cudaErrorUnknown"),
    ],
)
def test_why_there_is_none(install, monkeypatch, options, sentence):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    install(**options)
    with pytest.raises(DeviceError, match=sentence) as caught:
        open_device()
    assert "\n" not in str(caught.value)


def test_no_cupy(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'ocelot-em\[cuda13\]'"):
        find_devices()
    with pytest.raises(MissingDependencyError):
        merge(tmp_path / "nothing.zarr", tmp_path / "OUT.zarr", cluster="cuda")
    assert not (tmp_path / "OUT.zarr").exists()


def test_kernels_that_cannot_be_compiled(install):
    def refuse(*_):
        raise RuntimeError("cannot open source file cuda_fp16.h\n and much more")

    cupy = fake_cupy()
    cupy.cuda.Module = object
    cupy.cuda.compiler = types.SimpleNamespace(compile_using_nvrtc=refuse)
    with pytest.raises(DeviceError, match=r"compiled: RuntimeError: cannot open .*cuda-toolkit"):
        CudaDevice(cupy)


def test_threads_and_workers_follow_from_the_gpus(install, monkeypatch):
    install()
    monkeypatch.setattr(cluster, "_require_dask_cuda", lambda: None)
    monkeypatch.setattr(cluster, "n_cpus", lambda: 24)
    choice, options = cluster.choose_device(MergeOptions(cluster="cuda"))
    assert (choice.kind, choice.n_devices, options.device) == ("cuda", 2, "cuda")
    assert (options.workers, options.threads) == (2, 12)
    assert choice.memory_nbytes == int(0.9 * (80 * 2**30 - 1))
    assert choice.reason == "requested: 2 x GPU 0 and GPU 1"
    pooled = MergeOptions(cluster="cuda", workers=1, threads=3, rmm_pool_size=2**30)
    choice, options = cluster.choose_device(pooled)
    assert (choice.memory_nbytes, options.workers, options.threads) == (2**30, 1, 3)


def test_without_dask_cuda_nothing_starts(install):
    install()
    with pytest.raises(MissingDependencyError, match="dask-cuda is not installed"):
        cluster.choose_device(MergeOptions(cluster="cuda"))


class Client:
    """A cluster whose workers answer as given."""

    def __init__(self, *answers):
        self._answers = answers

    def run(self, _function, _question, on_error):
        return dict(enumerate(self._answers))

    def nthreads(self):
        return dict.fromkeys(range(len(self._answers)), 8)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


GPU, NONE = DeviceFacts("H100", 80 * 2**30), "cuda: expected an NVIDIA driver, found none"


@pytest.mark.parametrize(
    ("answers", "kind", "reason"),
    [
        ((GPU, GPU), "cuda", "auto; all workers have a GPU: 2 x H100"),
        ((GPU, NONE), "cpu", "auto: 1 of 2 workers have no GPU"),
        ((), "cpu", "auto: 0 of 0 workers have no GPU"),
    ],
)
def test_auto_asks_the_workers(monkeypatch, answers, kind, reason):
    monkeypatch.setattr(cluster, "connect_client", lambda _: Client(*answers))
    choice, options = cluster.choose_device(MergeOptions(cluster="tcp://host:8786"))
    assert (choice.kind, choice.reason, options.device) == (kind, reason, kind)
    # What the plan says of memory is for as many threads as really share a GPU.
    assert options.threads == (8 if kind == "cuda" else None)


def test_workers_without_the_gpu_that_was_asked_for(monkeypatch):
    monkeypatch.setattr(cluster, "connect_client", lambda _: Client(GPU, NONE))
    options = MergeOptions(cluster="tcp://host:8786", device="cuda")
    with pytest.raises(DeviceError, match=r"1 of 2 workers .*expected an NVIDIA driver"):
        cluster.choose_device(options)


def test_workers_whose_gpu_fails_at_the_start():
    with pytest.raises(DeviceError, match="1 workers cannot use their GPUs: out of order"):
        cluster._open_gpus(Client(False, "out of order"), MergeOptions(device="cuda"))


def test_a_cluster_of_gpus_is_asked_for_what_it_should_be(install, monkeypatch, tmp_path, rng):
    from distributed import LocalCluster

    from helpers import make_result, write_search

    asked = {}

    class LocalCUDACluster(LocalCluster):
        def __init__(self, **options):
            asked.update(options)
            for name in ("device_memory_limit", "rmm_pool_size", "rmm_allocator_external_lib_list"):
                del options[name]
            super().__init__(**options)

    install()
    dask_cuda = types.ModuleType("dask_cuda")
    dask_cuda.LocalCUDACluster = LocalCUDACluster
    monkeypatch.setitem(sys.modules, "dask_cuda", dask_cuda)
    monkeypatch.setattr(cluster, "_require_dask_cuda", lambda: None)
    search = write_search(tmp_path / "RUN.zarr", [make_result(rng, (20, 30), 5)], [5])
    # The real workers have no GPU: the merge is refused before anything is written.
    with pytest.raises(DeviceError, match="2 workers cannot use their GPUs: cuda: "):
        merge(search, tmp_path / "OUT.zarr", cluster="cuda", threads=1, rmm_pool_size="1 GiB")
    assert not (tmp_path / "OUT.zarr").exists()
    assert (asked["n_workers"], asked["threads_per_worker"]) == (2, 1)
    assert (asked["host"], asked["protocol"]) == ("127.0.0.1", "tcp")
    assert (asked["memory_limit"], asked["device_memory_limit"]) == (0, 0)
    assert asked["rmm_pool_size"] == 2**30
    assert asked["rmm_allocator_external_lib_list"] == "cupy"


def test_a_taken_dashboard_port_is_left_alone(monkeypatch):
    import socket

    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        monkeypatch.setattr(cluster, "DASHBOARD_PORT", other.getsockname()[1])
        assert cluster._dashboard_address() == "127.0.0.1:0"
    assert cluster._dashboard_address() == f"127.0.0.1:{cluster.DASHBOARD_PORT}"
