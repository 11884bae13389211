"""Record a search of Leopard-EM while it runs, with two lines in the user's script.

Leopard-EM 1.2 and 1.3 are not changed. While :func:`recording` is active, the function that starts
Leopard-EM's processes starts them with two additions: the queue that hands out orientations leaves
out those that were searched before, and asks for a checkpoint in between; and the first update of
the maps tells where they are.
"""

import contextlib
import hashlib
import importlib
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from itertools import chain
from os import PathLike, fspath
from typing import Any

import numpy as np

from ocelot_em.errors import IncompleteError, InvalidInputError
from ocelot_em.merge.recorder import SearchRecorder, read_recorded
from ocelot_em.model import ranges as sets
from ocelot_em.model.arrays import as_numpy
from ocelot_em.model.correlations import TABLE, THRESHOLD
from ocelot_em.model.maps import INDEX, MIP, NOT_SEARCHED, SQUARED_SUM, SUM, AnyArray
from ocelot_em.model.ranges import Range, Ranges
from ocelot_em.model.search_space import SearchSpace
from ocelot_em.store.recorded import RecordedPartial, SearchSize
from ocelot_em.store.search_info import SearchInfo

_CORE = "leopard_em.backend.core_match_template"
_MANAGER = "leopard_em.pydantic_models.managers.match_template_manager"
_UPDATES = "do_iteration_and_correlation_table_updates", "do_iteration_statistics_updates_compiled"
"""Function that adds to the maps, in 1.3 and in 1.2."""

_MAPS = MIP, INDEX, SUM, SQUARED_SUM


@contextlib.contextmanager
def recording(
    store: str | PathLike[str], *, every: str | float = "10min", search: SearchInfo | None = None
) -> Iterator[None]:
    """Record ``MatchTemplateManager.run_match_template`` of Leopard-EM 1.2 or 1.3 while it runs.

    Each device writes a checkpoint when it is due. After a kill, the same script searches what is
    missing, on any number of devices. Leopard-EM's results are as without it, also those of a
    search that was resumed.

    Parameters
    ----------
    store
        Path or URL of the search; created if missing. Each micrograph needs its own, or an exposure
        of its own.
    every
        Time between two checkpoints: seconds, or text such as ``10min``.
    search
        Gives the exposure of a montage and the template's name; the other properties are taken
        from Leopard-EM.

    Raises
    ------
    InvalidInputError
        The store has another search, or was recorded with another batch size.
    IncompleteError
        A device ended before its time: run the script again.

    Examples
    --------
    >>> from ocelot_em import leopard
    >>> with leopard.recording("RUN.zarr", every="10min"):  # doctest: +SKIP
    ...     manager.run_match_template(orientation_batch_size=16)
    """
    importlib.import_module(_CORE)
    core, module = sys.modules[_CORE], importlib.import_module(_MANAGER)
    manager, jobs = module.MatchTemplateManager, core.run_multiprocess_jobs
    run, running = manager.run_match_template, list[Any]()

    @wraps(run)
    def run_match_template(self: Any, *arguments: Any, **options: Any) -> Any:
        running.append(self)
        try:
            return run(self, *arguments, **options)
        finally:
            running.pop()

    def refuse(*_: Any, **__: Any) -> None:
        raise InvalidInputError(
            "run_match_template_distributed cannot be recorded; use run_match_template"
        )

    def run_multiprocess_jobs(
        target: Callable[..., None], kwargs_list: Sequence[dict[str, Any]], **rest: Any
    ) -> dict[int, dict[str, Any]]:
        about = _Recorded.of(
            fspath(store), every, search or SearchInfo(), running[-1], kwargs_list[0]
        )
        device, queue = _Device(about, target), kwargs_list[0]["index_queue"]
        if show := rest.get("post_start_callback"):
            others = multiprocessing.active_children()
            rest["post_start_callback"] = partial(_until_all_ended, queue, show, others)
        results = jobs(target=device, kwargs_list=kwargs_list, **rest)
        return about.completed(results, len(kwargs_list))

    changes = (
        (core, "run_multiprocess_jobs", run_multiprocess_jobs),
        (manager, "run_match_template", run_match_template),
        (manager, "run_match_template_distributed", refuse),
    )
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    try:
        for owner, name, value in changes:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def _until_all_ended(queue: Any, show_progress: Callable[[], None], others: list[Any]) -> None:
    """Show progress until all is searched, or until no device is left.

    Leopard-EM alone would wait forever for the orientations of devices that were killed.
    """
    children = [child for child in multiprocessing.active_children() if child not in others]
    devices = [child for child in children if not child.name.startswith("SyncManager")]
    get_current_index = queue.get_current_index

    def end_without_devices() -> int:
        is_searching = any(device.is_alive() for device in devices)
        return int(get_current_index() if is_searching else queue.total_indices)

    queue.get_current_index = end_without_devices
    show_progress()


@dataclass(frozen=True)
class _Recorded:
    """What the process of each device must know of the search."""

    store: str
    every: str | float
    info: SearchInfo
    size: SearchSize
    done: Ranges

    @classmethod
    def of(
        cls,
        store: str,
        every: str | float,
        given: SearchInfo,
        manager: Any,
        kwargs: Mapping[str, Any],
    ) -> "_Recorded":
        # Copied, for torch moves the memory of tensors that it sends to a process.
        names = "euler_angles", "defocus_values", "pixel_values"
        space = SearchSpace.from_tables(*(as_numpy(kwargs[name]).copy() for name in names))
        box = int(kwargs["template_dft"].shape[-2])
        height, columns = kwargs["image_dft"].shape
        shape = int(height), 2 * (int(columns) - 1)
        is_cropped = hasattr(sys.modules[_CORE], _UPDATES[0])
        if is_cropped:
            shape = shape[0] - box + 1, shape[1] - box + 1
        batch_size = int(kwargs["orientation_batch_size"])
        size = SearchSize(
            len(space.euler_angles),
            space.n_poses // len(space.euler_angles),
            batch_size,
            _digest(manager),
        )
        info = SearchInfo(
            template_box=None if is_cropped else box,
            pixel_size_angstrom=float(manager.optics_group.pixel_size),
            search_space=space,
            exposure=given.exposure,
            chunk_files=given.chunk_files,
            template_name=given.template_name,
        )
        done = RecordedPartial(store, "gpu0", shape, info, size, 0).searched_before()
        for start, stop in sets.minus(((0, size.n_orientations),), done):
            if start % batch_size or (stop % batch_size and stop != size.n_orientations):
                raise InvalidInputError(
                    f"{store}: orientations {start:,} to {stop:,} are missing, which batches of "
                    f"{batch_size:,} orientations do not cover; use the batch size with which the "
                    "search was started (ocelot info)"
                )
        return cls(store, every, info, size, done)

    def completed(
        self, results: dict[int, dict[str, Any]], n_devices: int
    ) -> dict[int, dict[str, Any]]:
        """Return the results of the devices, with those of earlier runs in the first one.

        Raises
        ------
        IncompleteError
            Not all orientations were searched.
        """
        found, whole = read_recorded(self.store, self.info.exposure_id)
        if found is None or not found.is_whole or not results:
            what = "nothing was searched" if found is None else found.text
            raise IncompleteError(
                f"{self.store}: {what}: a device ended before its time; run the script again, "
                "which searches only what is missing"
            )
        for name in (SUM, SQUARED_SUM):
            whole[name] = whole[name].astype(np.float32)
        # A device that was killed after its last checkpoint has no results; none is needed.
        some, columns = results[min(results)], whole.pop(TABLE, {})
        for rank in range(n_devices):
            result = {**results.get(rank, some), **_nothing(whole[MIP].shape)}
            if TABLE in result:  # without rows, for all are recorded
                result[TABLE] = result[TABLE].clone()
            results[rank] = result
        results[0] |= whole
        for name in columns.keys() - {THRESHOLD}:
            like = results[0][TABLE][name]
            results[0][TABLE][name] = like.new_tensor(columns[name])
        return results


def _nothing(shape: tuple[int, ...]) -> dict[str, AnyArray]:
    """Return the maps of a device that searched nothing."""
    maps: dict[str, AnyArray] = {name: np.zeros(shape, np.float32) for name in (SUM, SQUARED_SUM)}
    maps[MIP] = np.full(shape, -np.inf, np.float32)
    maps[INDEX] = np.full(shape, NOT_SEARCHED, np.int32)
    return maps


def _digest(manager: Any) -> str:
    """Identify what is searched: micrograph, template, optics and filters."""
    hasher = hashlib.sha256()
    for values in (manager.micrograph, manager.template_volume):
        hasher.update(np.ascontiguousarray(as_numpy(values)).tobytes())
    for model in (manager.optics_group, manager.preprocessing_filters):
        hasher.update(model.model_dump_json().encode())
    return hasher.hexdigest()


@dataclass(frozen=True)
class _Device:
    """Stands in for Leopard-EM's function in the process of a device."""

    about: _Recorded
    target: Callable[..., None]

    def __call__(self, results: Any, rank: int, **kwargs: Any) -> None:
        """Search on one device."""
        importlib.import_module(_CORE)
        core = sys.modules[_CORE]
        name = next(name for name in _UPDATES if hasattr(core, name))
        update = getattr(core, name)
        queue = _Queue(kwargs["index_queue"], self.about.done)

        def first_update(**maps: Any) -> Any:
            kind = str(kwargs["device"]).partition(":")[0]
            queue.recorder = SearchRecorder(
                self.about.store,
                f"{'gpu' if kind == 'cuda' else kind}{rank}",
                {name: maps[name] for name in (*_MAPS, TABLE) if name in maps},
                search=self.about.info,
                size=self.about.size,
                every=self.about.every,
            )
            setattr(core, name, update)
            return update(**maps)

        setattr(core, name, first_update)
        kwargs["index_queue"] = queue
        self.target(results, rank, **kwargs)


class _Queue:
    """Leopard-EM's queue, which leaves out what was searched before, and writes checkpoints.

    When it is asked for more, the maps of the device have all that it was given before.
    """

    def __init__(self, queue: Any, done: Ranges) -> None:
        self._queue, self._done = queue, done
        self._first: Range | None = None
        self._ranges: Iterator[Range] | None = None
        self.recorder: SearchRecorder | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._queue, name)

    def get_next_indices(self, process_id: int | None = None) -> Range | None:
        """Return the next orientations to search; None at the end."""
        if self.recorder is None:
            self._missing = self._pieces(process_id)
            self._first = next(self._missing, None)
            return self._first
        if self._ranges is None:
            assert self._first is not None
            self._ranges = self.recorder.ranges(chain([self._first], self._missing))
            if next(self._ranges, None) != self._first:
                raise IncompleteError(
                    f"{self.recorder.name}: another process searches the same; end one of them"
                )
        found = next(self._ranges, None)
        if found is None:
            self.recorder.finish()
        return found

    def _pieces(self, process_id: int | None) -> Iterator[Range]:
        while (given := self._queue.get_next_indices(process_id=process_id)) is not None:
            yield from sets.minus((tuple(given),), self._done)
