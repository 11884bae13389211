"""The report of a merged result: one HTML page that needs no network.

All but the overview and the zooms comes from the merge statistics; the map is read chunk by chunk
and is never in memory as a whole.
"""

from os import PathLike
from pathlib import Path

from typing_extensions import Unpack

from ocelot_em.errors import InvalidInputError
from ocelot_em.merge.result import MergedResult
from ocelot_em.model.html import render
from ocelot_em.model.keywords import ReportKeywords, takes
from ocelot_em.model.maps import AnyArray, Float32
from ocelot_em.model.regions import ceil_div
from ocelot_em.particles.table import ParticleTable
from ocelot_em.store.whole_file import refuse_existing, whole_or_nothing, write_file
from ocelot_em.view import report_sections as sections
from ocelot_em.view.coverage import Coverage
from ocelot_em.view.figures import PAGE_OVERVIEW_PX, new_figure
from ocelot_em.view.hits import ReportImages
from ocelot_em.view.instrument import MAP_PX, make_instrument
from ocelot_em.view.montage_plots import outline_exposures
from ocelot_em.view.page import collector_paused
from ocelot_em.view.plots import MAX_CIRCLES, plot_zscore, pooled_further, pooled_zscore
from ocelot_em.view.statistics_plots import plot_survival

MAX_WARNINGS = 8
"""Maximum number of warnings on the page before the others are folded."""

MAX_FOLDED_WARNINGS = 200
"""Maximum number of warnings on the page."""

MAX_PARTIALS = 1000
"""Maximum number of listed partials of a search; there may be thousands."""


@takes(ReportImages)
def write_report(
    store: str | PathLike[str] | MergedResult,
    path: str | PathLike[str],
    *,
    particles: ParticleTable | None = None,
    max_zooms: int = 6,
    overwrite: bool = True,
    **images: Unpack[ReportKeywords],
) -> Path:
    """Write an HTML report: particles, significance, poses, partials, timings, provenance.

    For a montage, it also shows the placement of exposures and whether their seams are visible. The
    file refers to no other; its path is returned.

    Parameters
    ----------
    store, path
        A merged result, and the file to write.
    particles
        Picked particles; those of :func:`ocelot_em.particles.picking.find_peaks` by default.
    max_zooms
        Maximum number of particles shown enlarged, the best first.
    overwrite
        Replace an existing file.
    **images
        Files with images. ``micrograph``: MRC file of the micrograph that was searched, in which
        the enlarged particles are then shown, too; not for a montage. ``template``: MRC file of the
        template that was searched, of which projections at the particles' poses are shown.
        ``pyramid``: image of this result from :func:`ocelot_em.io.ome_zarr.write_ome_zarr`, from
        which the overview is then read.

    Raises
    ------
    StoreNotFoundError, FormatError, IncompleteError, ChunkError
        The store is not a finished merged result, has no statistics, or cannot be read.
    InvalidInputError
        The images or the particles belong to another result: particles of a montage for a result
        that is none, or vice versa, or particles of other exposures. An image cannot be read.
    MissingDependencyError
        matplotlib, or mrcfile for an MRC file, is not installed.
    OutputExistsError
        The file exists, and ``overwrite`` is False.
    StorageError
        The report cannot be written.

    Examples
    --------
    >>> from ocelot_em import find_peaks, write_report
    >>> write_report("MERGED.zarr", "report.html", particles=find_peaks("MERGED.zarr"), max_zooms=1)
    PosixPath('report.html')
    """
    refuse_existing([Path(path)], overwrite)
    files = ReportImages.parse(images)
    page = report_page(store, particles=particles, max_zooms=max_zooms, images=files)
    return write_file(path, page)


@collector_paused()
def report_page(
    store: str | PathLike[str] | MergedResult,
    *,
    particles: ParticleTable | None = None,
    max_zooms: int = 6,
    images: ReportImages | None = None,
    refresh_seconds: int | None = None,
) -> bytes:
    """Return the page that :func:`write_report` writes.

    With ``refresh_seconds``, browsers load it again after that time.
    """
    data = sections.read_report_data(store, particles)
    images = images or ReportImages()
    is_live = not refresh_seconds  # what is selected would be lost
    fine = _overview(data, images.pyramid, MAP_PX if is_live else PAGE_OVERVIEW_PX)
    overview = pooled_further(*fine, PAGE_OVERVIEW_PX)
    coverage = Coverage.of(data.merged.attributes) if data.is_montage else None
    group_by = data.merged.attributes.group_by
    return render(
        "view/templates/report.html.j2",
        name=data.merged.url.rstrip("/").rpartition("/")[2] or data.merged.url,
        refresh_seconds=refresh_seconds,
        data=data,
        coverage=coverage,
        live=make_instrument(data, fine) if is_live else None,
        warnings=sections.warnings_of(data),
        max_warnings=MAX_WARNINGS,
        max_folded_warnings=MAX_FOLDED_WARNINGS,
        particles=sections.particles_section(data, overview, max_zooms, images),
        montage=sections.montage_section(data) if data.is_montage else None,
        groups=sections.groups_section(data) if group_by else None,
        significance=sections.significance_section(data),
        poses=sections.poses_section(data.particles),
        partials=sections.partials_section(data),
        timings=sections.timings_section(data),
        options=sections.options_section(data),
        max_circles=MAX_CIRCLES,
        max_partials=MAX_PARTIALS,
    ).encode()


def save_overview(
    store: str | PathLike[str] | MergedResult,
    path: str | PathLike[str],
    *,
    cutoff: float | None = None,
    truth: AnyArray | None = None,
    overwrite: bool = True,
) -> Path:
    """Save the z-score map and its survival histogram as one image; return its path."""
    place = Path(path)
    refuse_existing([place], overwrite)
    figure = new_figure((13.0, 5.6))
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    merged = MergedResult.open(store)
    plot_zscore(merged, left, truth)
    outline_exposures(left, merged.attributes.outlined)
    plot_survival(merged, right, cutoff)
    figure.suptitle(merged.incomplete_text)
    with whole_or_nothing(place) as staged:
        figure.savefig(staged, format=place.suffix.lstrip(".") or "png", dpi=110)
    return place


def _overview(
    data: sections.ReportData, pyramid: str | PathLike[str] | None, longest_edge_px: int
) -> tuple[Float32, int]:
    if pyramid is None:
        return pooled_zscore(data.merged, longest_edge_px)
    from ocelot_em.io.ome_zarr import read_level

    values, factor = read_level(pyramid, longest_edge_px)
    expected = tuple(ceil_div(length, factor) for length in data.merged.attributes.valid_shape)
    if values.shape != expected:
        raise InvalidInputError(
            f"{pyramid}: expected an image of {data.merged.url}, which has {expected} pixels when "
            f"pooled by {factor}, got {values.shape}; export the image again"
        )
    return values, factor
