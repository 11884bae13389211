"""One cluster for several merges, one after the other."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Self

from ocelot_em.merge.memory_model import DeviceChoice
from ocelot_em.model.options import MergeOptions
from ocelot_em.run.clusters import Cluster, choose_device, open_cluster


class SharedCluster:
    """Chooses the device and starts the cluster once, when it is first needed.

    A context manager, which stops the cluster. All merges have the same options.
    """

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._chosen: tuple[DeviceChoice, MergeOptions] | None = None
        self._cluster: Cluster | None = None

    def choose_device(self, options: MergeOptions) -> tuple[DeviceChoice, MergeOptions]:
        """Choose as :func:`ocelot_em.run.clusters.choose_device` does."""
        if self._chosen is None:
            self._chosen = choose_device(options)
        return self._chosen[0], self._chosen[1].model_copy(
            update={"complete_only": options.complete_only}
        )

    @contextmanager
    def opened(self, options: MergeOptions) -> Iterator[Cluster]:
        """Yield the cluster, which stays open."""
        if self._cluster is None:
            self._cluster = self._stack.enter_context(open_cluster(options))
        yield self._cluster

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._cluster = None
        self._stack.__exit__(*error)  # type: ignore[arg-type]
