"""The command ``report``."""

from typing import Annotated

from ocelot_em.cli.parameters import Merged, PathOrUrl, require_stores
from ocelot_em.cli.particle_commands import DEFAULTS, PICKING, print_particles
from ocelot_em.particles.options import PickOptions


def report(
    store: Merged, /, *, output: PathOrUrl, picking: Annotated[PickOptions, PICKING] = DEFAULTS
) -> None:
    """Write the report of a merged result.

    Parameters
    ----------
    output
        HTML file to write.
    """
    require_stores(store)
    from ocelot_em.merge.result import MergedResult
    from ocelot_em.particles.picking import pick_particles
    from ocelot_em.view.report import write_report

    merged = MergedResult.open(store)
    table = pick_particles(merged, picking)
    write_report(merged, output, particles=table)
    print_particles(table, output)
