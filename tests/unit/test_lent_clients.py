"""Merges on a client or a cluster of Dask that the caller has opened."""

import time

import pytest
from distributed import Client, LocalCluster

from builders import write_explicit_search
from ocelot_em import Observer, merge
from ocelot_em.errors import InvalidInputError, PlanError
from ocelot_em.run.clusters import Cluster
from ocelot_em.run.executors import ClientExecutor


@pytest.fixture(scope="module")
def cluster():
    settings = {"n_workers": 1, "threads_per_worker": 2, "processes": False}
    with LocalCluster(dashboard_address=":0", **settings) as one:
        yield one


@pytest.fixture
def client(cluster):
    with Client(cluster) as one:
        yield one


@pytest.fixture
def search(tmp_path):
    return write_explicit_search(tmp_path / "RUN.zarr", (20, 30))


class Clients(Observer):
    """The clients that a scheduler has during a merge, and the merge's own."""

    def __init__(self, cluster):
        self.cluster = cluster

    def started(self, cluster):
        self.used = cluster.executor.client
        self.address = self.used.scheduler.address
        self.n_clients = len(self.cluster.scheduler.clients)


def test_a_client_is_used_and_stays_open(cluster, client, search, tmp_path):
    seen = Clients(cluster)
    for name in ("A", "B"):
        assert merge(search, tmp_path / name, cluster=client, observer=seen).n_merged == 1
        assert seen.used is client
    assert client.submit(sum, [1, 2]).result() == 3


def test_a_cluster_is_used_and_stays_open(cluster, search, tmp_path):
    seen, before = Clients(cluster), set(cluster.scheduler.clients)
    assert merge(search, tmp_path / "A", cluster=cluster, observer=seen).n_merged == 1
    assert seen.address == cluster.scheduler_address
    assert seen.n_clients == len(before) + 1
    with Client(cluster) as later:
        assert later.submit(sum, [1, 2]).result() == 3


def test_an_active_client_that_is_not_used_is_named(client, search, tmp_path, caplog):
    merge(search, tmp_path / "A")
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert f"the active Dask client of {client.scheduler.address}, with 1 worker, is not" in warning
    assert "pass cluster=client" in warning
    caplog.clear()
    merge(search, tmp_path / "B", cluster="threads")
    assert [record for record in caplog.records if record.levelname == "WARNING"] == []


def test_a_closed_client_and_other_things_are_refused(cluster, search, tmp_path):
    with Client(cluster) as client:
        pass
    with pytest.raises(PlanError, match="expected a client that is synchronous and connected"):
        merge(search, tmp_path / "A", cluster=client)
    with pytest.raises(InvalidInputError, match="option cluster"):
        merge(search, tmp_path / "A", cluster=3)
    assert not (tmp_path / "A").exists()


def test_the_number_of_threads_is_known_after_a_client_is_closed(cluster):
    with Client(cluster) as client:
        executor = ClientExecutor(client)
        assert executor.n_threads() == 2
    executor._queried_at = float("-inf")  # long ago
    assert Cluster(executor, "", None).n_threads() == 2


def test_phases_are_in_the_fine_performance_metrics_of_dask(cluster, search, tmp_path):
    merge(search, tmp_path / "A", cluster=cluster)

    def phases():
        found = cluster.scheduler.cumulative_worker_metrics
        return {key[2] for key in found if key[:2] == ("execute", "merge_tiles")}

    until = time.monotonic() + 60
    while not {"read", "fold", "write"} <= phases() and time.monotonic() < until:
        time.sleep(0.05)  # they come with the heartbeat of the worker
    assert {"read", "fold", "write"} <= phases()
