"""Partials that are recorded while their search runs, one checkpoint after another.

Each checkpoint is a whole version of the partial, with an id, a folder and a manifest of its own,
and becomes the partial when the record of the partial is replaced, which is atomic. The version
before is kept until the next checkpoint, so that a merge that has just been planned can read it.
A name has one writer for ever: a process that is started again takes another name.
"""

import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count
from os import PathLike
from typing import Any

from ocelot_em.errors import IncompleteError, InvalidInputError, StorageError
from ocelot_em.model import ranges as sets
from ocelot_em.model.arrays import MAX_COUNT
from ocelot_em.model.correlations import CorrelationTable
from ocelot_em.model.maps import MIP
from ocelot_em.model.ranges import Ranges
from ocelot_em.model.regions import TileGrid
from ocelot_em.model.search_space import SearchSpace
from ocelot_em.store import attributes as fmt
from ocelot_em.store import constants, groups
from ocelot_em.store.arrays import ChunkedMap
from ocelot_em.store.completion import complete_partial, publish_shards
from ocelot_em.store.correlations import StoredTable, open_table, write_table
from ocelot_em.store.creation import ensure_search, now, provenance, refresh_total
from ocelot_em.store.lock import has_ended, this_process
from ocelot_em.store.manifest import MANIFEST, Manifest, find_manifest, write_manifest
from ocelot_em.store.objects import open_objects
from ocelot_em.store.partials import create_arrays
from ocelot_em.store.roster import read_roster, register
from ocelot_em.store.search import (
    MapGroup,
    find_partial_at,
    open_partial,
    partial_names,
    partial_path,
    read_partial_at,
)
from ocelot_em.store.search_info import SearchInfo
from ocelot_em.store.validation import name_problems


@dataclass(frozen=True)
class SearchSize:
    """The size of a search.

    Parameters
    ----------
    n_orientations
        Number of orientations of the whole search, on all devices.
    projections_each
        Number of cross-correlations of each orientation: of defocus values times pixel sizes.
    batch_size
        Number of orientations that are computed at a time, to be kept with the data.
    data_sha256
        SHA-256 of what is searched, such as micrograph, template and filters, hexadecimal. A store
        that was recorded with another one is refused.

    Examples
    --------
    >>> from ocelot_em import SearchSize
    >>> SearchSize(n_orientations=1_584_480, projections_each=13).projections_each
    13
    """

    n_orientations: int
    projections_each: int = 1
    batch_size: int | None = None
    data_sha256: str | None = None

    @classmethod
    def of(cls, space: SearchSpace) -> "SearchSize":
        """Return the size of an indexed search."""
        n_orientations = len(space.euler_angles)
        return cls(n_orientations, space.n_poses // n_orientations)

    @property
    def coverage(self) -> fmt.Coverage:
        """Return the coverage of a partial without orientations."""
        return fmt.Coverage(
            ranges=(),
            n_orientations=self.n_orientations,
            batch_size=self.batch_size,
            data_sha256=self.data_sha256,
        )

    def problems(self, space: SearchSpace | None) -> list[str]:
        """Name what is wrong with it."""
        names = "n_orientations", "projections_each", "batch_size"
        rest: dict[str, Any] = {"batch_size": self.batch_size, "data_sha256": self.data_sha256}
        problems = [
            f"{name}: expected an integer of at least 1, got {value!r}"
            for name in names
            if (value := getattr(self, name)) is not None or name != "batch_size"
            if type(value) is not int or value < 1
        ]
        if problems:
            return problems
        if space is not None and replace(SearchSize.of(space), **rest) != self:
            problems.append(
                f"size: expected {SearchSize.of(space)} as the search space, got {self}"
            )
        if self.n_orientations * self.projections_each > MAX_COUNT:
            problems.append(f"size: expected at most 2**62 cross-correlations, got {self}")
        return problems


@dataclass(frozen=True)
class Slot:
    """A version of a partial that is being written: its group, manifest and maps."""

    group: MapGroup
    manifest: Manifest
    maps: dict[str, ChunkedMap]

    def with_table(self, table: CorrelationTable) -> "Slot":
        """Write a correlation table, which has no problems."""
        arrays = write_table(self.group, table, self.maps[MIP].grid)
        manifest = replace(self.manifest, arrays={**self.manifest.arrays, **arrays})
        group = replace(self.group, correlation_threshold=table.threshold)
        return replace(self, group=group, manifest=manifest)


class RecordedPartial:
    """A partial of a running search; nothing of it is stored before its first checkpoint.

    Parameters
    ----------
    store, name
        The search, which is created if missing, and the wanted name. If that is taken, a number is
        appended: ``gpu0.2``.
    shape
        Height and width of the maps.
    info, size
        Properties of the search.
    every_seconds
        Time between two checkpoints.

    Raises
    ------
    InvalidInputError
        Listing all problems.
    """

    def __init__(
        self,
        store: str | PathLike[str],
        name: str,
        shape: tuple[int, int],
        info: SearchInfo,
        size: SearchSize,
        every_seconds: float,
    ) -> None:
        problems = name_problems(name) + size.problems(info.search_space)
        if problems:
            raise InvalidInputError(problems)
        self.name, self._info, self.size = name, replace(info, float64_sums=True), size
        edge = constants.DEFAULT_CHUNK
        self.grid = TileGrid(shape, (min(edge, shape[0]), min(edge, shape[1])))
        self._objects, self._exposure = open_objects(store), info.exposure_id
        self._record = fmt.PartialAttributes(
            id=uuid.uuid4().hex,
            order=0,
            total_projections=0,
            state="running",
            provenance=provenance(inputs=(), options={}),
            coverage=size.coverage,
            recording=fmt.Recording(
                started=now(), heartbeat=now(), every_seconds=every_seconds, process=this_process()
            ),
        )
        self._is_claimed = False
        ensure_search(self._objects, shape, self._info)
        self._repair()
        self.searched_before()

    @property
    def ranges(self) -> Ranges:
        """The orientations of the last checkpoint."""
        assert self._record.coverage is not None
        return self._record.coverage.ranges

    def searched_before(self, added: Ranges = ()) -> Ranges:
        """Return the orientations in all partials, including this one.

        Raises
        ------
        InvalidInputError
            Another partial is of another search.
        IncompleteError
            Another partial has orientations that are to be added to this one.
        """
        everything = list(self.ranges)
        for name, partial in self._others():
            found, where = partial.coverage, f"{self._objects.url}: partial"
            if found is None:
                continue
            if found.n_orientations != self.size.n_orientations:
                raise InvalidInputError(
                    f"{where} {name!r}: expected a search of {self.size.n_orientations:,} "
                    f"orientations, got {found.n_orientations:,}; give every search a store of its "
                    "own"
                )
            if found.data_sha256 != self.size.data_sha256:
                raise InvalidInputError(
                    f"{where} {name!r}: is of a search with another micrograph, template or other "
                    "filters; give every search a store of its own"
                )
            if twice := sets.shared(found.ranges, added):
                raise IncompleteError(
                    f"{where} {self.name!r}: {sets.size(twice):,} orientations, from "
                    f"{twice[0][0]:,} on, have been recorded by {name!r} meanwhile, and must not "
                    "be counted twice; nothing was recorded since the last checkpoint: search "
                    "orientations in one process only"
                )
            everything += found.ranges
        return sets.union(everything)

    def _others(self) -> Iterator[tuple[str, fmt.PartialAttributes]]:
        """Read all other partials by the names on the list, which does not lag."""
        objects, exposure = self._objects, self._exposure
        for name in sorted({*read_roster(objects, exposure), *partial_names(objects, exposure)}):
            if self._is_claimed and name == self.name:
                continue
            found = find_partial_at(objects, partial_path(name, exposure))
            if found is not None:  # or it is just being created
                yield name, found

    def _repair(self) -> None:
        """Finish what killed processes have left half done."""
        objects, exposure = self._objects, self._exposure
        there = {*partial_names(objects, exposure)}
        for name, entry in read_roster(objects, exposure).items():
            if name in there or not entry.is_recorded:
                continue
            # Killed between the list and the group, or lost: the search of this is repeated.
            nothing = self._record.model_copy(update={"id": uuid.uuid4().hex})
            path = partial_path(name, exposure)
            groups.create_group(objects, path, fmt.dump_attributes(nothing))
        for name, partial in self._others():
            about = partial.recording
            if partial.state == "running" and about is not None and has_ended(about.process):
                self._close(name, partial)

    def _close(self, name: str, partial: fmt.PartialAttributes) -> None:
        """Complete the partial of a process that has ended, and delete what it left."""
        path, objects = partial_path(name, self._exposure), self._objects
        if manifest := open_partial(objects, name, self._exposure, partial).manifest:
            complete_partial(objects, path, partial, manifest)
        else:
            objects.tidy(path)
            for child in objects.children(path):
                objects.delete(f"{path}/{child}")

    def last(self) -> tuple[dict[str, ChunkedMap], StoredTable | None]:
        """Open the maps and the correlation table of the last checkpoint, if there is one."""
        if self._record.manifest is None:
            return {}, None
        group = open_partial(self._objects, self.name, self._exposure, self._record)
        return group.open(self._info.maps.partial, self.grid.shape), open_table(group)

    def begin(self) -> Slot:
        """Create the arrays of the next checkpoint."""
        if self._is_claimed:
            self._require_own()
        else:
            self._claim()
        owner = uuid.uuid4().hex
        group = MapGroup(self._objects, self._path, self.name, owner[:12])
        groups.create_group(self._objects, group.path_of(""), {})
        manifest, maps = create_arrays(group, self._info, self.grid, owner)
        return Slot(group, manifest, maps)

    @property
    def _path(self) -> str:
        return partial_path(self.name, self._exposure)

    def _claim(self) -> None:
        """Create the partial's group under a name that no other process has."""
        objects, wanted = self._objects, self.name
        taken = {*read_roster(objects, self._exposure)}
        for number in count(1):
            self.name = wanted if number == 1 else f"{wanted}.{number}"
            if self.name in taken:
                continue
            register(objects, self._exposure, [self.name], is_recorded=True)
            if groups.create_group(objects, self._path, fmt.dump_attributes(self._record)):
                self._is_claimed = True
                return

    def publish(self, slot: Slot, ranges: Ranges) -> Ranges:
        """Make a checkpoint, whose arrays are written, the content of the partial.

        Other partials are read twice: before the record is replaced, because a kill afterwards
        would leave orientations in two partials; and then, because another process may have looked
        before.

        Parameters
        ----------
        slot
            The checkpoint.
        ranges
            The orientations searched since the last one.

        Returns
        -------
        Ranges
            The orientations in all partials.
        """
        objects, before = self._objects, self._record
        assert before.coverage is not None
        assert before.recording is not None
        everything = sets.union((*before.coverage.ranges, *ranges))
        folder = slot.group.folder
        publish_shards(slot.maps)
        digest = write_manifest(objects, f"{self._path}/{folder}", slot.manifest)
        objects.sync()  # the data must be on the disk before the record
        changes = {
            "id": slot.manifest.id,
            "folder": folder,
            "manifest": digest,
            "total_projections": sets.size(everything) * self.size.projections_each,
            "coverage": before.coverage.model_copy(update={"ranges": everything}),
            "correlation_threshold": slot.group.correlation_threshold,
            "recording": before.recording.model_copy(update={"heartbeat": now()}),
        }
        self._require_own()
        self.searched_before(ranges)
        self._replace(before.model_copy(update=changes))
        try:
            searched = self.searched_before(ranges)
        except (IncompleteError, InvalidInputError):
            self._replace(before)
            raise
        with suppress(StorageError):  # the next checkpoint deletes them, too
            for child in {*objects.children(self._path)} - {before.folder, folder, MANIFEST}:
                objects.delete(f"{self._path}/{child}")
        return searched

    def _replace(self, record: fmt.PartialAttributes) -> None:
        groups.replace_attributes(self._objects, self._path, fmt.dump_attributes(record))
        self._record = record

    def _require_own(self) -> None:
        found = read_partial_at(self._objects, self._path)
        if found.id != self._record.id or find_manifest(self._objects, self._path) is not None:
            raise IncompleteError(
                f"{self._objects.url}: partial {self.name!r} was completed or replaced by another "
                "process, which took this one to have ended; nothing was recorded since the last "
                "checkpoint; run the search again, which searches only what is missing"
            )

    def complete(self) -> None:
        """Complete the partial at the end of the search, if there is a checkpoint."""
        if self._record.manifest is not None:
            self._require_own()
            self._close(self.name, self._record)
        refresh_total(self._objects, self._exposure)
        self._objects.sync()
