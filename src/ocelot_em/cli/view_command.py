"""The command ``view``."""

import contextlib
import signal
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from ocelot_em.cli.console import open_console
from ocelot_em.cli.parameters import MapName, PathOrUrl
from ocelot_em.errors import InvalidInputError


def view_map(
    source: PathOrUrl,
    /,
    *,
    maps: Annotated[tuple[MapName, ...], Parameter(name="--map")] = (),
    particles: PathOrUrl | None = None,
    port: int = 0,
) -> None:
    """Show maps and particles in a browser until interrupted.

    Parameters
    ----------
    source
        A merged result, or an image written by ``export --to ome-zarr``. Of a result, an image is
        written into a temporary folder first.
    maps
        Map to show; repeat it for several. Default: all maps of an image, z-scores of a result.
    particles
        Table of particles (.csv, .parquet) to draw over the maps. Default: of a result, those that
        ``peaks`` picks; of an image, none.
    port
        Port of the web server on this machine. 0: one that is free.
    """
    if not ("://" in str(source) or Path(source).exists()):
        raise InvalidInputError(
            f"{source}: expected a merged result or an OME-Zarr image, got nothing there"
        )
    from ocelot_em.io.tables import read_particles
    from ocelot_em.merge.result import MergedResult
    from ocelot_em.view.viewer import is_store, view

    console = open_console()
    for number in (signal.SIGTERM, signal.SIGHUP):  # a temporary image is deleted then, too
        signal.signal(number, signal.default_int_handler)
    opened = MergedResult.open(source) if is_store(source) else source
    if opened is not source:
        console.print(f"writing an image of {source} into a temporary folder")
    table = None if particles is None else read_particles(particles)
    with view(opened, port, maps=maps, particles=table) as shown:
        console.print(f"open {shown.url}")
        console.print(f"from another computer, first run there: {shown.ssh_command}")
        if not shown.is_offline:
            console.print(
                "the viewer is loaded from the network; to use it offline: "
                "pip install 'ocelot-em[view]'"
            )
        console.print("Ctrl-C stops it")
        with contextlib.suppress(KeyboardInterrupt):
            shown.wait()
