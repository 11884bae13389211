"""The commands ``peaks``, ``detections`` and ``export``."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Group, Parameter

from ocelot_em.cli.console import open_console
from ocelot_em.cli.parameters import MapName, Merged, PathOrUrl, require_stores
from ocelot_em.errors import InvalidInputError
from ocelot_em.model.options import Options
from ocelot_em.model.pick_options import DetectionOptions, PickOptions

if TYPE_CHECKING:
    from ocelot_em.io.optics import Optics
    from ocelot_em.merge.result import MergedResult
    from ocelot_em.particles.table import ParticleTable
    from ocelot_em.store.attributes import MergedAttributes

PICKING = Parameter(name="*", group=Group.create_ordered("Picking", sort_key=1))
DETECTING = Parameter(name="*", group=Group.create_ordered("Detections", sort_key=1))
OPTICS = Parameter(name="*", group=Group.create_ordered("Optics of the micrograph", sort_key=1))


class OpticsOptions(Options):
    """Optics of a micrograph, which tables for RELION, cisTEM and Leopard-EM need.

    Parameters
    ----------
    optics
        File with the optics: Leopard-EM's configuration of the search (.yaml), RELION's table of
        micrographs (``micrographs_ctf.star``), cisTEM's database (.db), or CTFFIND's results
        (.txt). Options override it. Default: options have everything.
    micrograph
        Name of the micrograph; it selects one in a table of optics, or of particles. Default: that
        of the file with the optics, and in tables of our own that of the result, without ``.zarr``.
    template
        Name of the template, for cisTEM and Leopard-EM. Default: that of the file.
    template_box
        Edge of the template box in pixels. Default: the one that the maps were imported with, or
        that of the template's file.
    pixel_size_angstrom
        Pixel size of the micrograph in Å. Default: that of the file, or of the maps.
    voltage_kv
        Acceleration voltage in kV. Default: that of the file.
    spherical_aberration_mm
        Spherical aberration in mm. Default: that of the file.
    amplitude_contrast
        Amplitude contrast, 0 to 1. Default: that of the file.
    defocus_u_angstrom
        Defocus of the micrograph in Å along the first axis; positive for underfocus. Default: that
        of the file.
    defocus_v_angstrom
        Defocus of the micrograph in Å along the second axis. Default: that of the file.
    astigmatism_angle_degrees
        Angle between the x axis and the first axis of the defocus, in degrees. Default: that of the
        file.
    phase_shift_degrees
        Phase shift of a phase plate in degrees. Default: that of the file, or 0.
    """

    optics: PathOrUrl | None = None
    micrograph: str | None = None
    template: str | None = None
    template_box: int | None = None
    pixel_size_angstrom: float | None = None
    voltage_kv: float | None = None
    spherical_aberration_mm: Annotated[float | None, Parameter(alias="--cs")] = None
    amplitude_contrast: float | None = None
    defocus_u_angstrom: float | None = None
    defocus_v_angstrom: float | None = None
    astigmatism_angle_degrees: float | None = None
    phase_shift_degrees: float | None = None

    def read(
        self, attributes: "MergedAttributes", exposure: str | None, *, needs_template: bool
    ) -> "Optics":
        """Read the optics; the maps have the template box and the pixel size."""
        from ocelot_em.io.optics_files import read_optics
        from ocelot_em.model.regions import template_box_of

        given = self.model_dump(exclude={"optics", "template_box"})
        shapes = {one.id: (one.shape, one.valid_shape) for one in attributes.exposures}
        whole = (attributes.shape, attributes.valid_shape)
        box = self.template_box or template_box_of(*shapes.get(exposure or "", whole))
        defaults = {
            "pixel_size_angstrom": attributes.pixel_size_angstrom,
            "template": None if needs_template else "unknown",  # RELION's table does not name it
        }
        return read_optics(self.optics, defaults=defaults, template_box_px=box, **given)


NO_OPTICS = OpticsOptions()
DEFAULTS = PickOptions()
DETECTION_DEFAULTS = DetectionOptions()


class ExportOptions(Options):
    """What to export, and where to.

    Parameters
    ----------
    to
        Format of maps (``mrc``, ``hdf5``, ``ome-zarr``) or of particles; ``napari``: CSV of points
        for napari; ``correlations``: Parquet with the devices' correlation tables above the cutoff.
    output
        File to write; folder for ``mrc`` and ``ome-zarr``.
    overwrite
        Replace an existing file or folder.
    prefix
        Prefix of the names of MRC files, such as ``output`` for ``output_mip.mrc``. Default: none.
    exposure
        Export only the particles, or correlations, of this exposure of a montage. Default: all.
    maps
        Folder of the MRC files to which Leopard-EM's table refers. Default: the paths in its
        configuration.
    particles
        Table of particles (.csv, .parquet) written by ``peaks``. Default: pick particles.
    map
        Map of an ``ome-zarr`` image; repeat it for several. Default: z-scores.
    """

    to: Literal[
        "mrc",
        "hdf5",
        "ome-zarr",
        "leopard",
        "relion",
        "cistem",
        "napari",
        "parquet",
        "correlations",
    ]
    output: PathOrUrl
    overwrite: bool = False
    prefix: str = ""
    exposure: str | None = None
    maps: PathOrUrl | None = None
    particles: PathOrUrl | None = None
    map: tuple[MapName, ...] = ()


def peaks(
    store: Merged,
    /,
    *,
    output: PathOrUrl,
    overwrite: bool = False,
    estimates: PathOrUrl | None = None,
    picking: Annotated[PickOptions, PICKING] = DEFAULTS,
    optics: Annotated[OpticsOptions, OPTICS] = NO_OPTICS,
) -> None:
    """Pick particles and write their table.

    Parameters
    ----------
    output
        Table to write: .csv, .parquet, or .star (for RELION; needs the optics).
    overwrite
        Replace an existing table.
    estimates
        Add the columns ``precision`` and ``recall``. ``noise``: by the model of noise; else a decoy
        that counts false particles: the name of its group, or its table (.csv, .parquet).
        Default: they are not added.
    """
    require_stores(store, kind="merged")
    from ocelot_em.io.tables import write_table
    from ocelot_em.merge.result import MergedResult
    from ocelot_em.particles.picking import pick_particles
    from ocelot_em.store.whole_file import refuse_existing

    refuse_existing([Path(output)], overwrite)
    merged, found = MergedResult.open(store), None
    if str(output).lower().endswith(".star"):
        found = optics.read(merged.attributes, None, needs_template=False)
    table = with_estimates(_named(pick_particles(merged, picking), optics), merged, estimates)
    write_table(table, output, optics=found, overwrite=overwrite)
    print_particles(table, output)


def with_estimates(
    table: "ParticleTable", merged: "MergedResult", by: PathOrUrl | None
) -> "ParticleTable":
    """Return particles with estimates by noise, a group or a table; without any if it is None."""
    from ocelot_em.io.tables import read_particles
    from ocelot_em.particles.estimates import NOISE, estimate

    if by is None:
        return table
    decoy: Any = None if by == NOISE else str(by)
    if decoy and Path(decoy).suffix.lower() in (".csv", ".parquet"):
        decoy = read_particles(decoy)
    return estimate(table, merged, decoy=decoy)


def detections(
    store: Merged,
    /,
    *,
    output: PathOrUrl,
    overwrite: bool = False,
    exposure: str | None = None,
    search: PathOrUrl | None = None,
    detecting: Annotated[DetectionOptions, DETECTING] = DETECTION_DEFAULTS,
) -> None:
    """Find detections in correlation tables, beyond the best of each pixel.

    Parameters
    ----------
    output
        Parquet file to write (.parquet), beside which a temporary file may need room.
    overwrite
        Replace an existing file.
    exposure
        Only those of this exposure of a montage, or of this group. Default: all.
    search
        Search that was merged, if it was moved since. Default: where it was then.
    """
    require_stores(store, kind="merged")
    from ocelot_em.particles.detections import find_detections
    from ocelot_em.store.whole_file import refuse_existing

    place = Path(output)
    if place.suffix.lower() != ".parquet":
        raise InvalidInputError(
            f"{output}: expected a name that ends in .parquet, got {place.suffix!r}"
        )
    refuse_existing([place], overwrite)
    place.parent.mkdir(parents=True, exist_ok=True)
    found = find_detections(
        store, exposure=exposure, search=search, scratch=place.parent, **detecting.model_dump()
    )
    found.to_parquet(place, overwrite=overwrite)
    rows = found.correlations
    counts = f"{found.n_found:,} detections among {rows.n_kept:,} of {rows.n_rows:,} correlations"
    limits = f"cutoff {rows.cutoff:.4f}", f"above threshold {rows.threshold:g}"
    facts = counts, *limits, rows.area_text, rows.result.incomplete_text
    open_console().print(f"{', '.join(filter(None, facts))}: {output}")


def export(
    store: Merged,
    /,
    *,
    options: Annotated[ExportOptions, Parameter(name="*")],
    picking: Annotated[PickOptions, PICKING] = DEFAULTS,
    optics: Annotated[OpticsOptions, OPTICS] = NO_OPTICS,
) -> None:
    """Write maps or a table for other programs."""
    require_stores(store, kind="merged")
    from ocelot_em.io import hdf5, mrc, napari, ome_zarr, parquet, tables
    from ocelot_em.io.optics import with_maps_in
    from ocelot_em.merge.result import MergedResult
    from ocelot_em.model.maps import SCALED_MIP
    from ocelot_em.particles.areas import Area
    from ocelot_em.particles.correlations import Correlations
    from ocelot_em.particles.micrographs import plain_name
    from ocelot_em.store.distinct import require_distinct
    from ocelot_em.store.whole_file import refuse_existing

    to, output, overwrite = options.to, options.output, options.overwrite
    writers: dict[str, Callable[..., object]] = {
        "mrc": partial(mrc.write_mrc_set, prefix=options.prefix),
        "hdf5": hdf5.write_hdf5,
        "ome-zarr": partial(ome_zarr.write_ome_zarr, maps=options.map or (SCALED_MIP,)),
        "napari": napari.write_napari_csv,
        "parquet": parquet.write_parquet,
        "leopard": tables.write_leopard_csv,
        "relion": tables.write_relion_star,
        "cistem": tables.write_cistem_star,
    }
    if to in ("mrc", "hdf5", "ome-zarr"):
        merged = MergedResult.open(store)
        writers[to](merged, output, overwrite=overwrite)
        open_console().print(", ".join(filter(None, [f"wrote {output}", merged.incomplete_text])))
        return
    given = (options.particles, optics.optics)
    require_distinct(output, [path for path in given if path is not None])
    refuse_existing([Path(output)], overwrite)
    if to == "correlations":
        merged = MergedResult.open(store)
        area = Area.of(merged, picking)
        rows = Correlations(merged, picking.cutoff, options.exposure, area=area)
        rows.micrograph = plain_name(optics.micrograph or rows.micrograph)
        parquet.write_correlations(rows, output, overwrite=overwrite)
        counts = f"{rows.n_kept:,} of {rows.n_rows:,} correlations, cutoff {rows.cutoff:.4f}"
        facts = counts, rows.area_text, rows.result.incomplete_text
        open_console().print(f"{', '.join(filter(None, facts))}: {output}")
        return
    merged, write = MergedResult.open(store), writers[to]
    if to == "napari":
        write = partial(write, pixel_size_angstrom=merged.attributes.pixel_size_angstrom)
    elif to != "parquet":
        found = optics.read(merged.attributes, options.exposure, needs_template=to != "relion")
        if options.maps is not None:
            found = with_maps_in(found, options.maps, options.prefix)
        write = partial(write, optics=found)
    table = _named(particles_to_export(store, options, picking), optics)
    write(table, output, overwrite=overwrite)
    print_particles(table, output)


def _named(table: "ParticleTable", optics: OpticsOptions) -> "ParticleTable":
    """Return particles with the name of their micrograph, or those of the one that is named."""
    from ocelot_em.particles.micrographs import renamed

    return table if optics.micrograph is None else renamed(table, optics.micrograph)


def particles_to_export(
    store: PathOrUrl, options: ExportOptions, picking: PickOptions
) -> "ParticleTable":
    """Read or pick particles, and select the exposure if one is given."""
    from ocelot_em.io.tables import read_particles
    from ocelot_em.merge.result import MergedResult
    from ocelot_em.particles.picking import pick_particles

    if options.particles is None:
        table = pick_particles(MergedResult.open(store), picking)
    else:
        table = read_particles(options.particles)
    return table if options.exposure is None else table.of_exposure(options.exposure)


def print_particles(table: "ParticleTable", output: PathOrUrl) -> None:
    """Print the number of particles, the cutoff and the output path."""
    about, cutoff = table.about, ""
    if about is not None:
        kind = "" if about.method == "cutoff" else f"{about.method} "
        cutoff = f", {kind}cutoff {about.cutoff_text}" + (f" per {about.per}" if about.per else "")
    if about is not None and about.area_text:
        cutoff += f", {about.area_text}"
    if table.incomplete_text:
        cutoff += f", {table.incomplete_text}"
    open_console().print(f"{len(table)} particles{cutoff}: {output}")
