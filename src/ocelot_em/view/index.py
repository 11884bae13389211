"""One page for many merged results, with a report of each beside it, and a table for pandas."""

import re
from base64 import b64encode
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from io import BytesIO
from itertools import takewhile
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import numpy as np
from typing_extensions import Unpack

from ocelot_em.errors import (
    InvalidInputError,
    MissingDependencyError,
    OcelotError,
    StoreNotFoundError,
    optional_import,
)
from ocelot_em.merge.result import MergedResult
from ocelot_em.model.html import is_html, render
from ocelot_em.model.keywords import PickKeywords, takes
from ocelot_em.model.maps import SECOND_ZSCORE
from ocelot_em.model.pick_options import PickOptions
from ocelot_em.particles.areas import Area
from ocelot_em.particles.estimates import NOISE, estimate
from ocelot_em.particles.picking import pick_particles
from ocelot_em.particles.table import GROUP, ParticleTable
from ocelot_em.store.attributes import MergedAttributes
from ocelot_em.store.constants import ATTRIBUTE_KEY
from ocelot_em.store.objects import as_places, is_local, normalise_url, open_objects, stores_below
from ocelot_em.store.search import read_attributes
from ocelot_em.store.whole_file import refuse_existing, write_file
from ocelot_em.view.plots import pooled_zscore
from ocelot_em.view.report import write_report
from ocelot_em.view.report_sections import read_report_data, warnings_of

if TYPE_CHECKING:
    import pandas as pd

THUMBNAIL_PX = 96
"""Maximum edge of a thumbnail in pixels."""

_MAX_NAME = 100  # characters of a report's file name


@dataclass(frozen=True)
class IndexRow:
    """A result on the page, which is a row of its table.

    ``micrograph`` is its name on the page: that of the store without ``.zarr``, or of the folders
    in which results of one name differ. ``rank`` is the rank of its highest z-score among all.
    ``group`` and ``second_z`` are those of its highest particle, if it has groups. ``result`` is a
    path or URL, ``report`` a path relative to the page. If the result could not be read, ``error``
    states why, and the other fields are empty. Of a montage, ``cutoff`` is the lowest one and
    ``projections`` are those of all exposures. ``warnings`` are separated by line breaks.
    """

    micrograph: str
    result: str
    rank: int | None = None
    report: str = ""
    particles: int | None = None
    method: str = ""
    cutoff: float | None = None
    highest_z: float | None = None
    highest_mip: float | None = None
    group: str = ""
    second_z: float | None = None
    n_warnings: int | None = None
    warnings: str = ""
    height: int | None = None
    width: int | None = None
    pixel_size_angstrom: float | None = None
    projections: int | None = None
    partials: int | None = None
    exposures: int | None = None
    finished: str = ""
    error: str = ""


@dataclass(frozen=True)
class Entry:
    """A row of the page with its picture, a data URL; both are empty if there is an error."""

    row: IndexRow
    thumbnail: str = ""


@takes(PickOptions)
def write_index(
    results: str | PathLike[str] | Iterable[str | PathLike[str]],
    output: str | PathLike[str],
    *,
    overwrite: bool = True,
    on_result: Callable[[IndexRow], object] | None = None,
    **options: Unpack[PickKeywords],
) -> "pd.DataFrame":
    """Write one page for many results, a report of each, and a table of all; return the table.

    Of ``index.html``, the reports are in ``index_reports`` and the table is ``index_results.csv``.
    A result that cannot be read is named on the page and in the table, in the column ``error``. The
    columns are those of :class:`ocelot_em.view.index.IndexRow`.

    Parameters
    ----------
    results
        Merged results, or folders in which all are found.
    output
        HTML file to write, or a folder in which ``index.html`` is written.
    overwrite
        Replace existing files: the page, the table and the reports.
    on_result
        Called with each row as soon as its report is written.
    **options
        Fields of :class:`ocelot_em.PickOptions`.

    Raises
    ------
    MissingDependencyError
        matplotlib is not installed.
    InvalidInputError
        The output is within a store.
    OutputExistsError
        A file exists, and ``overwrite`` is False; nothing is written.
    StorageError
        The page cannot be written.

    Examples
    --------
    >>> from ocelot_em import write_index
    >>> table = write_index(["MERGED.zarr", "MISSING.zarr"], "index.html")
    >>> table["particles"].tolist()
    [20, <NA>]
    >>> table["error"].tolist()
    ['', '...MISSING.zarr: expected an ocelot-em store, got nothing there']
    """
    page = _page_of(output)
    reports, table_path = (page.with_name(f"{page.stem}_{n}") for n in ("reports", "results.csv"))
    picking = PickOptions.parse(options)
    urls = list(dict.fromkeys(url for place in as_places(results) for url in find_results(place)))
    names, entries = [name.removesuffix(".zarr") for name in short_names(urls)], list[Entry]()
    files = [reports / name for name in _file_names(names)]
    refuse_existing([page, table_path, *files], overwrite)
    for url, name, file in zip(urls, names, files, strict=True):
        entries.append(_entry(name, url, file, picking))
        if on_result is not None:
            on_result(entries[-1].row)
    return write_page(page, entries)


def write_page(page: Path, entries: Sequence[Entry], kind: str = "result") -> "pd.DataFrame":
    """Write the page of some results, and the table beside it; return the table.

    ``kind`` is what the page calls a result.
    """
    table_path, script = (
        page.with_name(f"{page.stem}_results.csv"),
        render("view/templates/index.js"),
    )
    html = render(
        "view/templates/index.html.j2",
        entries=entries,
        kind=kind,
        table=quote(table_path.name),
        script=script,
        script_hash=b64encode(sha256(script.encode()).digest()).decode(),
        quote=quote,
    )
    rows = [entry.row for entry in entries]
    table = table_of(rows)
    table["rank"] = table["highest_z"].rank(method="first", ascending=False).convert_dtypes()
    write_file(table_path, table.to_csv(index=False).encode())
    write_file(page, html.encode())
    return table


def find_results(place: str | PathLike[str]) -> list[str]:
    """Return the URL of a store, or those of all merged results below a local folder.

    Stores are not searched; unfinished results, and those with unreadable metadata, are included.
    """
    url = normalise_url(place)
    if not is_local(url) or not Path(url).is_dir() or (Path(url) / "zarr.json").exists():
        return [url]
    return list(filter(_may_be_result, stores_below(url))) or [url]


def table_of(rows: Sequence[IndexRow]) -> "pd.DataFrame":
    """Return rows as a table; whole numbers stay whole where others are missing."""
    import pandas as pd

    return pd.DataFrame([asdict(row) for row in rows]).convert_dtypes()


def _page_of(output: str | PathLike[str]) -> Path:
    return Path(output) if is_html(output) else Path(output, "index.html")


def _may_be_result(folder: str) -> bool:
    try:
        return isinstance(read_attributes(open_objects(folder)), MergedAttributes)
    except OcelotError:
        text = (Path(folder) / "zarr.json").read_text(encoding="utf-8", errors="replace")
        return f'"{ATTRIBUTE_KEY}"' in text


def short_names(urls: Sequence[str]) -> list[str]:
    """Return the URLs without the folders, and the last name, that all have in common."""
    parts = [url.rstrip("/").split("/") for url in urls]
    if len(parts) > 1 and len({own[-1] for own in parts}) == 1:
        parts = [own[:-1] for own in parts]
    levels = zip(*(own[:-1] for own in parts), strict=False)
    n_common = sum(1 for _ in takewhile(lambda level: len(set(level)) == 1, levels))
    return ["/".join(own[n_common:]) for own in parts]


def _file_names(names: Sequence[str]) -> list[str]:
    """Return a file name for each report, different even where case is ignored."""
    given: dict[str, str] = {}
    for name in names:
        safe = re.sub(r"[^A-Za-z0-9._-]+", "_", name.removesuffix(".zarr"))
        stem, number = safe[-_MAX_NAME:].lstrip(".-") or "result", 1
        own = stem
        while own.casefold() in given:
            number += 1
            own = f"{stem}-{number}"
        given[own.casefold()] = own
    return [f"{own}.html" for own in given.values()]


def _entry(name: str, url: str, path: Path, picking: PickOptions) -> Entry:
    """Write the report of a result; return its entry, or one that says why there is none."""
    try:
        return judged(MergedResult.open(url), name, picking, report=path)[0]
    except MissingDependencyError:
        raise
    except OcelotError as error:
        problem = str(error)
        if isinstance(error, StoreNotFoundError) and Path(url).is_dir():
            problem = f"{url}: expected merged results in this folder, found none"
        return Entry(IndexRow(name, url, error=problem))


def judged(
    merged: MergedResult,
    name: str,
    picking: PickOptions,
    report: Path | None = None,
    estimates: str | None = None,
) -> tuple[Entry, ParticleTable]:
    """Pick particles and write the report if one is wanted; return the entry and the particles.

    ``estimates`` adds those of precision and recall: by ``noise``, or by the name of a decoy group.

    Raises
    ------
    OcelotError
        The result cannot be read, the report not be written, or there is no such group.
    """
    try:
        particles, reason = pick_particles(merged, picking), ""
    except InvalidInputError as error:  # nothing was searched, or too little for a cutoff
        Area.of(merged, picking)  # a mask that does not fit is an error of its own
        particles, reason = ParticleTable.empty(), f"No particles could be picked: {error}"
    if estimates is not None and not reason:
        decoy = None if estimates == NOISE else estimates
        particles = estimate(particles, merged, decoy=decoy)
    data = read_report_data(merged, particles)
    warnings = [*filter(None, [reason]), *warnings_of(data)]
    if report is not None:
        write_report(merged, report, particles=particles)
    attributes, about, statistics = merged.attributes, particles.about, data.summary.attributes
    best = particles[0] if len(particles) else {}
    row = IndexRow(
        micrograph=name,
        result=merged.url,
        report=f"{report.parent.name}/{report.name}" if report else "",
        particles=len(particles),
        method=about.method if about else "",
        cutoff=about.cutoff if about else None,
        highest_z=(statistics.scaled_mip_range or (None, None))[1],
        highest_mip=(statistics.mip_range or (None, None))[1],
        group=best.get(GROUP, ""),
        second_z=best.get(SECOND_ZSCORE),
        n_warnings=len(warnings),
        warnings="\n".join(warnings),
        height=merged.valid_shape[0],
        width=merged.valid_shape[1],
        pixel_size_angstrom=attributes.pixel_size_angstrom,
        projections=attributes.total_projections,
        partials=len(attributes.partials),
        exposures=len(attributes.outlined),  # not groups
        finished=attributes.finished or "",
    )
    return Entry(row, _thumbnail(merged)), particles


def _thumbnail(merged: MergedResult) -> str:
    """Return the z-score map, pooled by maximum, as a data URL."""
    with optional_import("thumbnails need matplotlib", extra="viz"):
        from matplotlib import colormaps
        from matplotlib.image import imsave
    z, _ = pooled_zscore(merged, THUMBNAIL_PX)
    known, image = z[np.isfinite(z)], BytesIO()
    low, high = np.percentile(known, (2, 99.9)).tolist() if known.size else (0.0, 1.0)
    shades = colormaps["magma"].with_extremes(bad=(0.5, 0.5, 0.5))
    high, quality = max(high, low + 1), {"quality": 85}
    imsave(image, z, low, high, shades, "jpeg", pil_kwargs=quality)
    return f"data:image/jpeg;base64,{b64encode(image.getvalue()).decode()}"
