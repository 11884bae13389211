"""What there is to do for each micrograph of a batch; nothing is written, and no chunk is read."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

from pydantic import TypeAdapter

from ocelot_em import __version__
from ocelot_em.errors import (
    ChunkError,
    FormatError,
    IncompleteError,
    InputChangedError,
    InvalidInputError,
    OutputExistsError,
    PlanError,
    StoreNotFoundError,
    TilesFailedError,
)
from ocelot_em.io.many_tables import WITH_OPTICS, open_tables, require_star_names
from ocelot_em.io.optics import Optics
from ocelot_em.io.tables import require_same_search
from ocelot_em.io.text_file import file_identity
from ocelot_em.merge.plan import MergePlan
from ocelot_em.merge.result import MergedResult
from ocelot_em.model.batch_options import BatchOptions
from ocelot_em.model.pick_options import PickOptions
from ocelot_em.model.regions import template_box_of
from ocelot_em.model.threads import map_in_threads
from ocelot_em.particles.estimates import NOISE
from ocelot_em.particles.table import ParticleTable
from ocelot_em.run.api import PathOrUrl, plan_merge
from ocelot_em.run.micrographs import Micrograph, find_micrographs, is_result
from ocelot_em.run.shared_cluster import SharedCluster
from ocelot_em.store.attributes import MergedAttributes
from ocelot_em.store.objects import is_local, normalise_url, open_objects
from ocelot_em.store.whole_file import refuse_existing, write_file
from ocelot_em.view.index import Entry

BAD = (
    InvalidInputError,
    StoreNotFoundError,
    FormatError,
    IncompleteError,
    InputChangedError,
    ChunkError,
    TilesFailedError,
)
"""Errors of one micrograph, which may be skipped; all others end a batch."""

OpticsOf = Callable[[str, MergePlan], Optics]
"""Returns the optics of a micrograph by its name and the plan of its merge."""

_PROBLEMS_SHOWN = 20


@dataclass(frozen=True)
class Judged:
    """What is kept of a micrograph whose particles were picked.

    ``made_from`` identifies the result and the options, and ``table`` the table of its particles;
    ``incomplete`` says how much was searched, if not all.
    """

    made_from: str
    table: str
    entry: Entry
    incomplete: str


_JUDGED = TypeAdapter(Judged)


@dataclass(frozen=True)
class PlannedMicrograph:
    """What there is to do for a micrograph.

    ``problem`` says why it cannot be merged. ``result`` is the URL of the merged result;
    ``n_tiles`` of its tiles are missing, and reading and writing them takes this many stored bytes.
    ``is_update`` is whether there is a complete result of fewer partials. ``judged`` is what is
    kept of an earlier run, if it still holds.
    """

    micrograph: Micrograph
    result: str = ""
    problem: str = ""
    n_tiles: int = 0
    nbytes_in: int = 0
    nbytes_out: int = 0
    worker_nbytes: int = 0
    is_update: bool = False
    optics: Optics | None = None
    judged: Judged | None = None

    @property
    def name(self) -> str:
        """Name of the micrograph."""
        return self.micrograph.name


@dataclass(frozen=True)
class BatchPlan:
    """The plan of a batch: its folder, its options and its micrographs."""

    folder: Path
    options: BatchOptions
    micrographs: tuple[PlannedMicrograph, ...]

    @property
    def bad(self) -> dict[str, str]:
        """What is wrong with micrographs, by name."""
        return {one.name: one.problem for one in self.micrographs if one.problem}

    @property
    def good(self) -> tuple[PlannedMicrograph, ...]:
        """All other micrographs."""
        return tuple(one for one in self.micrographs if not one.problem)

    def report_of(self, name: str) -> Path | None:
        """Return the path of a report, if reports are wanted."""
        return self.folder / "index_reports" / f"{name}.html" if self.options.reports else None

    def table_of(self, name: str) -> Path:
        """Return the path of a micrograph's own table."""
        return self.folder / "tables" / f"{name}.csv"

    def record_of(self, name: str) -> Path:
        """Return the path of what is kept of a micrograph."""
        return self.folder / "tables" / f"{name}.json"

    def picking_of(self, name: str) -> PickOptions:
        """Return the options for picking, with the micrograph's own mask of a folder of masks."""
        picking = self.options.picking
        if not isinstance(picking.mask, str | PathLike):
            return picking
        folder = Path(picking.mask)
        if not folder.exists():
            raise InvalidInputError(f"{folder}: expected a mask, or a folder of masks, got nothing")
        if not folder.is_dir() or any((folder / own).exists() for own in ("zarr.json", ".zarray")):
            return picking
        found = [path for path in folder.iterdir() if path.stem == name]
        if len(found) != 1:
            raise InvalidInputError(
                f"{folder}: expected one mask of the micrograph, such as {name}.mrc, got "
                f"{len(found)}"
            )
        return picking.model_copy(update={"mask": str(found[0])})

    def made_from(self, name: str, attributes: MergedAttributes) -> str:
        """Identify a result, and the options with which its particles are picked."""
        facts = (attributes.id, attributes.manifest, attributes.finished, __version__)
        picking = self.picking_of(name)
        mask: object = picking.mask
        if isinstance(mask, str | PathLike) and Path(mask).is_file():
            mask = str(mask), file_identity(Path(mask))
        elif mask is not None:  # pixels in memory or in a folder may be others each time
            mask = uuid4().hex
        known = facts, mask, self.options.estimates
        return json.dumps([*known, picking.model_dump(mode="json", exclude={"mask"})])

    def judged(self, name: str, attributes: MergedAttributes) -> Judged | None:
        """Return what is kept of a micrograph, if it still holds."""
        with suppress(OSError, ValueError):
            found = _JUDGED.validate_json(self.record_of(name).read_bytes())
            report = found.entry.row.report
            if (
                found.made_from == self.made_from(name, attributes)
                and found.table == self.digest_of(name)
                and ((self.folder / report).is_file() if report else not self.options.reports)
            ):
                return found
        return None

    def digest_of(self, name: str) -> str:
        """Return the digest of a micrograph's own table."""
        return sha256(self.table_of(name).read_bytes()).hexdigest()

    def keep(self, name: str, judged: Judged) -> None:
        """Keep what is known of a micrograph."""
        write_file(self.record_of(name), _JUDGED.dump_json(judged))


def plan_batch(
    searches: PathOrUrl | Sequence[PathOrUrl],
    output: PathOrUrl,
    options: BatchOptions,
    shared: SharedCluster,
    optics_of: OpticsOf | Mapping[str, Optics] | None = None,
) -> BatchPlan:
    """Plan the merge of every micrograph, several at a time.

    Raises
    ------
    InvalidInputError
        Micrographs are bad, and bad ones are not to be skipped; or all are; or a name is given
        twice; or the output is not a local folder.
    PlanError
        The disk is too small for all results, or the options cannot work.
    OutputExistsError
        A result in the folder is of another merge.
    MissingDependencyError
        A package that writes a table is not installed.
    """
    url = normalise_url(output)
    if not is_local(url) or Path(url).is_file():
        raise InvalidInputError(f"{url}: expected a folder on this machine as the output")
    refuse_existing([Path(url) / "index.html"], overwrite=True)
    if options.estimates == NOISE and options.method == "mip":
        raise InvalidInputError(
            "estimates: expected the name of a group that is a decoy, because there is no model of "
            f"noise for the method mip, got {NOISE}"
        )
    nothing = ParticleTable.empty()  # fail now if a package is missing
    with TemporaryDirectory() as place, open_tables(Path(place), options.tables, nothing, {}):
        pass
    draft = BatchPlan(Path(url), options, ())
    found = find_micrographs(searches, output, join_names=options.group_by is not None)
    shared.choose_device(options.merging)
    planning = partial(_planned, draft, shared, optics_of)
    plan = BatchPlan(draft.folder, options, tuple(map_in_threads(planning, found)))
    if plan.bad and not (options.skip_bad and plan.good):
        problems = [f"micrograph {name}: {problem}" for name, problem in plan.bad.items()]
        more, shown = len(problems) - _PROBLEMS_SHOWN, problems[:_PROBLEMS_SHOWN]
        hint = "" if options.skip_bad else "mend them, or leave them out (--skip-bad)"
        ending = filter(None, [f"and {more:,} more" * (more > 0), hint])  # is no problem itself
        raise InvalidInputError([*shown[:-1], "\n  ".join([shown[-1], *ending])])
    needed, free = sum(one.nbytes_out for one in plan.good), open_objects(url).free_bytes()
    if free is not None and needed > free:
        raise PlanError(
            f"disk: the results of {len(plan.good):,} micrographs need about {needed:,} more "
            f"bytes, {free:,} are free; free some space, or choose another output"
        )
    return plan


def _planned(
    draft: BatchPlan,
    shared: SharedCluster,
    optics_of: OpticsOf | Mapping[str, Optics] | None,
    micrograph: Micrograph,
) -> PlannedMicrograph:
    name, facts = micrograph.name, dict[str, Any]()
    attributes: MergedAttributes | None
    try:
        first, *others = micrograph.urls
        if not others and is_result(first):
            merged = MergedResult.open(first)
            attributes, plan = merged.attributes, merged.plan
            facts = {"result": merged.url}
        else:
            output = draft.folder / f"{name}.zarr"
            ready, _ = plan_merge(micrograph.urls, output, draft.options.merging, shared)
            attributes, plan, cost = ready.existing, ready.plan, ready.forecast
            is_complete = attributes is not None and attributes.state == "complete"
            share = len(ready.missing) / cost.n_tiles
            facts = {
                "result": ready.output,
                "n_tiles": len(ready.missing) or int(not is_complete),
                "nbytes_in": int(share * cost.stored_nbytes_in),
                "nbytes_out": int(share * cost.stored_nbytes_out),
                "worker_nbytes": cost.worker_nbytes,
                "is_update": is_complete and bool(ready.missing),
            }
        if {*draft.options.tables} & {*WITH_OPTICS}:
            facts["optics"] = own = _optics(optics_of, name, plan, first)
            require_star_names(draft.options.tables, own)
        draft.picking_of(name)
    except BAD as error:
        return PlannedMicrograph(micrograph, problem=str(error))
    except OutputExistsError as error:
        problem = f"{error}; --overwrite merges all again; delete its result to merge it alone"
        if draft.options.skip_bad:
            return PlannedMicrograph(micrograph, problem=problem)
        raise OutputExistsError(f"micrograph {name}: {problem}") from error
    if not facts.get("n_tiles") and attributes is not None:
        facts["judged"] = draft.judged(name, attributes)
    return PlannedMicrograph(micrograph, **facts)


def _optics(
    optics_of: OpticsOf | Mapping[str, Optics] | None, name: str, plan: MergePlan, url: str
) -> Optics:
    """Return the optics of a micrograph, which must belong to its search."""
    if plan.is_montage:
        raise InvalidInputError(
            f"{url}: is a montage, whose exposures have optics of their own; tables for RELION and "
            "cisTEM need searches of single micrographs"
        )
    if isinstance(optics_of, Mapping):
        if name not in optics_of:
            raise InvalidInputError(f"optics: expected those of {name!r}, got none")
        optics = optics_of[name]
    elif optics_of is None:
        raise InvalidInputError(
            "optics: tables for RELION and cisTEM need those of every micrograph, got none; give "
            "RELION's table of micrographs, cisTEM's database, or a folder with a file for each "
            "(--optics)"
        )
    else:
        optics = optics_of(name, plan)
    box = template_box_of(plan.shape, plan.valid_shape)
    require_same_search(optics, url, box, plan.pixel_size_angstrom)
    return optics
