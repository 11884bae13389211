"""The commands ``peaks``, ``export``, ``report`` and ``view``."""

import argparse
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from ocelot_em.io.optics import Optics
    from ocelot_em.particles.table import ParticleTable
from ocelot_em.cli.exit_codes import DONE

MAP_FORMATS = ("mrc", "hdf5", "ome-zarr")


TABLE_FORMATS = ("leopard", "relion", "cistem", "parquet")
"""Formats of ``ocelot export``: ``MAP_FORMATS`` for maps, these for particles."""


def picked_particles(parsed: argparse.Namespace) -> "ParticleTable":
    """Pick or read particles, and select the exposure if one is given."""
    table = given_or_picked(parsed)
    exposure = getattr(parsed, "exposure", None)
    return table if exposure is None else table.of_exposure(exposure)


def given_or_picked(parsed: argparse.Namespace) -> "ParticleTable":
    """Read the given particle table, or pick particles."""
    from ocelot_em.errors import InvalidInputError
    from ocelot_em.particles.options import PickOptions
    from ocelot_em.particles.picking import find_peaks
    from ocelot_em.particles.table import ParticleTable

    given = getattr(parsed, "particles", None)
    if given is None:
        options = {name: getattr(parsed, name) for name in PickOptions.model_fields}
        return find_peaks(parsed.store, **options)
    if Path(given).suffix == ".csv":
        return ParticleTable.read_csv(given)
    if Path(given).suffix == ".parquet":
        from ocelot_em.io.parquet import read_parquet

        return read_parquet(given)
    raise InvalidInputError(f"{given}: expected a table that ends in .csv or .parquet")


def optics_of(parsed: argparse.Namespace) -> "Optics | None":
    """Return the optics in the options, if any."""
    from ocelot_em.io.optics import Optics

    if parsed.optics is None:
        return None
    return Optics.from_leopard_yaml(parsed.optics, parsed.template_box)


def say_particles(console: Console, table: "ParticleTable", output: str) -> None:
    """Print the number of particles, the cutoff and the output path."""
    about = table.about
    cutoff = "" if about is None else f", {about.method} cutoff {about.cutoff_text}"
    if about is not None and about.per is not None:
        cutoff += f" per {about.per}"
    console.print(f"{len(table)} particles{cutoff}: {output}", markup=False)


def peaks(parsed: argparse.Namespace, console: Console) -> int:
    """Pick particles and write their table."""
    from ocelot_em.io.tables import write_table

    optics = optics_of(parsed)
    table = picked_particles(parsed)
    write_table(table, parsed.output, optics)
    say_particles(console, table, parsed.output)
    return DONE


def export(parsed: argparse.Namespace, console: Console) -> int:
    """Write maps or a table for other programs."""
    from ocelot_em.errors import InvalidInputError, OutputExistsError
    from ocelot_em.io import hdf5, mrc, ome_zarr, parquet, tables
    from ocelot_em.io import optics as optics_module

    if parsed.to in MAP_FORMATS:
        if parsed.to == "mrc":
            mrc.write_mrc_set(
                parsed.store, parsed.output, prefix=parsed.prefix, overwrite=parsed.overwrite
            )
        else:
            write = {"hdf5": hdf5.write_hdf5, "ome-zarr": ome_zarr.write_ome_zarr}[parsed.to]
            write(parsed.store, parsed.output, overwrite=parsed.overwrite)
        console.print(f"wrote {parsed.output}", markup=False)
        return DONE
    if Path(parsed.output).exists() and not parsed.overwrite:
        raise OutputExistsError(
            f"{parsed.output}: is there already; choose another name, or --overwrite"
        )
    optics = optics_of(parsed)
    if parsed.to == "parquet":
        table = picked_particles(parsed)
        parquet.write_parquet(table, parsed.output)
    elif optics is None:
        raise InvalidInputError(
            f"--to {parsed.to}: needs the micrograph's optics; give Leopard-EM's configuration of "
            "the search with --optics CONFIG.yaml"
        )
    else:
        table = picked_particles(parsed)
        if parsed.maps is not None:
            optics = optics_module.with_maps_in(optics, parsed.maps, parsed.prefix)
        writers = {
            "leopard": tables.write_leopard_csv,
            "relion": tables.write_relion_star,
            "cistem": tables.write_cistem_star,
        }
        writers[parsed.to](table, optics, parsed.output)
    say_particles(console, table, parsed.output)
    return DONE


def report(parsed: argparse.Namespace, console: Console) -> int:
    """Write the report of a merged result."""
    from ocelot_em.merge.result import MergedResult
    from ocelot_em.view.report import write_report

    parsed.store = MergedResult.open(parsed.store)
    table = picked_particles(parsed)
    write_report(parsed.store, parsed.output, particles=table)
    say_particles(console, table, parsed.output)
    return DONE


def view_map(parsed: argparse.Namespace, console: Console) -> int:
    """Serve a map to a browser until interrupted."""
    from ocelot_em.view.viewer import view

    with view(parsed.picture, parsed.port) as shown:
        console.print(f"serving {shown.url}", markup=False)
        console.print(f"open {shown.neuroglancer_url}", markup=False)
        if not shown.is_offline:
            console.print(
                "neuroglancer itself comes from the network: pip install 'ocelot-em[view]' for one "
                "that does not"
            )
        console.print("Ctrl-C stops it")
        with contextlib.suppress(KeyboardInterrupt):
            shown.wait()
    return DONE
