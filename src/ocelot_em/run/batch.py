"""Many micrographs in one run: each is merged and picked, and all get one table and one page."""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from ocelot_em.errors import TilesFailedError
from ocelot_em.io.many_tables import FILES, open_tables
from ocelot_em.io.optics import Optics
from ocelot_em.io.optics_files import read_optics_of
from ocelot_em.merge.plan import MergePlan
from ocelot_em.merge.result import MergedResult
from ocelot_em.model.batch_options import BatchOptions
from ocelot_em.model.keywords import BatchKeywords, takes
from ocelot_em.model.progress import Bar
from ocelot_em.model.regions import template_box_of
from ocelot_em.model.text import count_text
from ocelot_em.particles.micrographs import among_all, heights_of, of_micrograph, ranks_of
from ocelot_em.particles.table import ALL_COLUMNS, NEG_LOG_P, RANK_IN_MICROGRAPH, ParticleTable
from ocelot_em.run.api import PathOrUrl, run_merge
from ocelot_em.run.batch_plan import (
    BAD,
    BatchPlan,
    Judged,
    OpticsOf,
    PlannedMicrograph,
    plan_batch,
)
from ocelot_em.run.batch_progress import BatchProgress
from ocelot_em.run.clusters import within_job
from ocelot_em.run.connect import address_of, warn_if_unused
from ocelot_em.run.observer import Observer, Observers
from ocelot_em.run.shared_cluster import SharedCluster
from ocelot_em.store.lock import OutputLock
from ocelot_em.store.objects import open_objects
from ocelot_em.view.index import Entry, IndexRow, judged, write_page

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BatchReport:
    """What a batch has done.

    ``n_merged`` micrographs were merged or updated by this run, and the particles of ``n_picked``
    were picked; what earlier runs had done of the others still holds. ``skipped`` says what is
    wrong with bad ones, by name. ``tables`` are the paths of the tables of all particles.

    Examples
    --------
    >>> from ocelot_em import merge_many
    >>> report = merge_many(["SEARCH.zarr"], "session")
    >>> report.page.name, [table.name for table in report.tables]
    ('index.html', ['particles.csv'])
    """

    page: Path
    tables: tuple[Path, ...]
    n_micrographs: int
    n_merged: int
    n_picked: int
    n_particles: int
    skipped: Mapping[str, str]
    seconds: float


@takes(BatchOptions)
def merge_many(
    searches: PathOrUrl | Sequence[PathOrUrl],
    output: PathOrUrl,
    *,
    optics: PathOrUrl | Mapping[str, Optics] | None = None,
    progress: bool | None = None,
    observer: Observer | None = None,
    **options: Unpack[BatchKeywords],
) -> BatchReport:
    """Merge many micrographs, pick their particles, and write one table and one page of all.

    The micrographs are merged one after the other, with the memory of one, by one cluster. Running
    the same again does only what is new: micrographs that were added, whose search has grown, or
    that an interrupted run had left. The folder gets

    - ``NAME.zarr``, the merged result of each micrograph, and ``tables/NAME.csv``, its particles;
    - ``particles.csv``, and the other ``tables`` (``particles.parquet``, ``particles.star`` for
      RELION, ``particles_cistem.star``): the particles of all micrographs, which come in the order
      of the searches, each highest first, with ``micrograph``, ``rank`` among all and
      ``rank_in_micrograph``;
    - ``index.html``, a page with a row for each micrograph, its table ``index_results.csv``, and
      with ``reports`` the folder ``index_reports``.

    Parameters
    ----------
    searches
        Paths or URLs of searches, or of merged results, which are not merged again; folders, of
        which all searches are taken, or all merged results if there is no search; files with a
        list: a path a line, or a CSV table with the columns ``search`` and ``micrograph``. Without
        that column, a micrograph has the name of its store. With ``group_by``, searches of one name
        are the groups of one micrograph.
    output
        Folder for all results.
    optics
        Optics of the micrographs, which ``relion`` and ``cistem`` need: RELION's table of
        micrographs, cisTEM's database, a folder with a file for each (``NAME.yaml``,
        ``NAME.txt``), or optics by name.
    progress
        Whether to show a bar. None: in a notebook, and in an interactive session on a terminal.
    observer
        Receives the events of all merges.
    **options
        The fields of :class:`BatchOptions`, which are those of :class:`MergeOptions` and
        :class:`PickOptions`, and ``tables``, ``reports``, ``estimates`` and ``skip_bad``.

    Returns
    -------
    BatchReport

    Raises
    ------
    InvalidInputError
        A name is given twice, or micrographs are bad; nothing has been written.
    TilesFailedError
        A micrograph turned out to be bad while it was merged or picked; all others before are done.
    OutputLockedError
        Another run is writing the folder.
    PlanError, OutputExistsError, StoppedError
        As of :func:`ocelot_em.merge`.

    Examples
    --------
    >>> from ocelot_em import merge_many
    >>> report = merge_many(["SEARCH.zarr", "MISSING.zarr"], "session", skip_bad=True)
    >>> report.n_micrographs, report.n_particles, list(report.skipped)
    (2, 20, ['MISSING'])
    >>> report = merge_many(["SEARCH.zarr"], "session")
    >>> report.n_merged
    0
    """
    if "cluster" not in options:
        warn_if_unused()
    with address_of(options.get("cluster", "threads")) as cluster:
        parsed = BatchOptions.parse({**options, "cluster": cluster})
        known: OpticsOf | Mapping[str, Optics] | None
        if optics is None or isinstance(optics, Mapping):
            known = optics
        else:
            known = optics_from(optics, needs_template="cistem" in parsed.tables)
        with (
            within_job(parsed.merging) as requested,
            SharedCluster() as shared,
            Bar(progress) as bar,
        ):
            asked = parsed.model_copy(update={"cluster": requested.cluster})
            watching = BatchProgress(bar)
            watching.show("planning")
            plan = plan_batch(searches, output, asked, shared, known)
            return run_batch(plan, shared, watching, observer or Observer())


def optics_from(place: PathOrUrl | None, *, needs_template: bool, **given: Any) -> OpticsOf:
    """Return a function that reads the optics of a micrograph.

    ``given`` are values of all micrographs; the maps have the template box and the pixel size.
    """

    def read(name: str, plan: MergePlan) -> Optics:
        box = given.get("template_box_px") or template_box_of(plan.shape, plan.valid_shape)
        defaults = {
            "pixel_size_angstrom": plan.pixel_size_angstrom,
            "template": None if needs_template else "unknown",  # RELION's table does not name it
        }
        facts = {**given, "template_box_px": box}
        return read_optics_of(name, place, defaults=defaults, **facts)

    return read


def run_batch(
    plan: BatchPlan, shared: SharedCluster, progress: BatchProgress, observer: Observer
) -> BatchReport:
    """Do what is planned; micrographs that turn out to be bad are skipped if requested.

    The folder is locked, because tables and the page are those of one run.
    """
    with OutputLock(open_objects(plan.folder), progress.waiting):
        return _run_batch(plan, shared, progress, observer)


def _run_batch(
    plan: BatchPlan, shared: SharedCluster, progress: BatchProgress, observer: Observer
) -> BatchReport:
    started, merging = time.perf_counter(), plan.options.merging
    kept = {one.name: one.judged for one in plan.good if one.judged is not None}
    to_do, bad, n_merged = [one for one in plan.good if one.judged is None], dict(plan.bad), 0
    progress.begin(len(to_do))
    for one in to_do:
        progress.enter(one.name)
        try:
            if one.n_tiles:
                watching = Observers(progress, observer)
                run_merge(one.micrograph.urls, one.result, merging, watching, shared)
                n_merged += 1
            kept[one.name] = _pick(plan, one)
        except BAD as error:
            if not plan.options.skip_bad:
                raise TilesFailedError(
                    f"micrograph {one.name}: {error}; what is done is kept: mend it and run the "
                    "same command again, or leave it out (--skip-bad)"
                ) from error
            bad[one.name] = str(error)
        progress.leave(skipped=one.name in bad)
    progress.show("writing tables and the page")
    n_particles = _write_tables(plan, kept)
    entries = []
    for one in plan.micrographs:
        problem = IndexRow(one.name, one.micrograph.urls[0], error=bad.get(one.name, ""))
        entries.append(Entry(problem) if problem.error else kept[one.name].entry)
    page = plan.folder / "index.html"
    write_page(page, entries, "micrograph")
    return BatchReport(
        page=page,
        tables=tuple(plan.folder / FILES[kind] for kind in plan.options.tables),
        n_micrographs=len(plan.micrographs),
        n_merged=n_merged,
        n_picked=sum(one.name in kept for one in to_do),
        n_particles=n_particles,
        skipped=bad,
        seconds=time.perf_counter() - started,
    )


def _pick(plan: BatchPlan, one: PlannedMicrograph) -> Judged:
    """Pick the particles of a merged micrograph; write its table, its report and its record."""
    name, merged = one.name, MergedResult.open(one.result)
    plan.record_of(name).unlink(missing_ok=True)
    own = plan.picking_of(name), plan.report_of(name), plan.options.estimates
    entry, particles = judged(merged, name, *own)
    of_micrograph(particles, name).to_csv(plan.table_of(name))
    made_from, table = plan.made_from(name, merged.attributes), plan.digest_of(name)
    found = Judged(made_from, table, entry, particles.incomplete_text)
    plan.keep(name, found)
    return found


def _write_tables(plan: BatchPlan, kept: Mapping[str, Judged]) -> int:
    """Write the tables of all particles, with those of one micrograph in memory at a time.

    Return the number of particles.
    """
    for kind, file in FILES.items():
        if kind not in plan.options.tables and (plan.folder / file).exists():
            log.warning(
                "%s: this table of an earlier run is not renewed, because --tables does not ask "
                "for it; ask for %s, too, or delete it",
                plan.folder / file,
                kind,
            )
    several = [one for one in plan.good if one.name in kept]
    heights, columns = [], {RANK_IN_MICROGRAPH}
    for one in several:
        table = ParticleTable.read_csv(plan.table_of(one.name))
        heights.append(heights_of(table, plan.options.method))
        columns |= table.columns.keys()
    nothing = of_micrograph(ParticleTable.empty(neg_log_p=NEG_LOG_P in columns), "")
    names = [name for name in ALL_COLUMNS if name in {*columns, *nothing.columns}]
    like = among_all(nothing, np.empty(0, np.int64), names)
    optics = {one.name: one.optics for one in several if one.optics is not None}
    n = sum(bool(kept[one.name].incomplete) for one in several)
    comment = f"incomplete searches of {count_text(n, 'micrograph')}" if n else ""
    with open_tables(plan.folder, plan.options.tables, like, optics, comment) as write:
        for one, ranks in zip(several, ranks_of(heights), strict=True):
            table = ParticleTable.read_csv(plan.table_of(one.name))
            write(among_all(table, ranks, names), one.name)
    return sum(map(len, heights))
