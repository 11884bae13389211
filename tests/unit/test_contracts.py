"""Executors, kernels and devices of ours keep the contracts; stores do in ``test_objects.py``."""

import pytest

from gpu_kernels import needs_gpu
from host_device import HostDevice, LateDevice
from ocelot_em.kernels import load
from ocelot_em.kernels.device import open_device
from ocelot_em.model.options import MergeOptions
from ocelot_em.run.clusters import open_cluster
from ocelot_em.run.executors import ClientExecutor, ThreadExecutor
from ocelot_em.testing.device_contract import DeviceContract, KernelsContract
from ocelot_em.testing.executor_contract import ExecutorContract


class TestThreads(ExecutorContract):
    @pytest.fixture
    def make_executor(self):
        return lambda attempt: ThreadExecutor(2, attempt)


@pytest.fixture(scope="module")
def client():
    with open_cluster(MergeOptions(cluster="local", workers=1, threads=2)) as cluster:
        yield cluster.executor.client


class TestLocalCluster(ExecutorContract):
    @pytest.fixture
    def make_executor(self, client):
        return lambda attempt: ClientExecutor(client, attempt)


class TestReference(KernelsContract):
    @pytest.fixture
    def kernels(self):
        return load("reference")


class TestCpu(KernelsContract):
    @pytest.fixture
    def kernels(self):
        return load("cpu")


class TestHostDevice(DeviceContract):
    @pytest.fixture
    def device(self):
        return HostDevice(limit_nbytes=2**30)


class TestLateDevice(DeviceContract):
    @pytest.fixture
    def device(self):
        return LateDevice(limit_nbytes=2**30)


@pytest.mark.gpu
@needs_gpu[1]
class TestGpu(DeviceContract):
    @pytest.fixture
    def device(self):
        return open_device()
