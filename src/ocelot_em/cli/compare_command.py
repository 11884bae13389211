"""The command ``compare``."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from ocelot_em.cli.console import open_console
from ocelot_em.cli.parameters import PathOrUrl, require_stores
from ocelot_em.cli.particle_commands import DEFAULTS, PICKING
from ocelot_em.errors import InvalidInputError
from ocelot_em.model.html import is_html
from ocelot_em.model.options import Options
from ocelot_em.model.pick_options import PickOptions

SEARCH = Parameter(help="Path or URL of a merged result, or table of particles (.csv, .parquet).")
_TABLES = ".csv", ".parquet"


class CompareOptions(Options):
    """What to write, and which particles are the same.

    Parameters
    ----------
    output
        HTML page to write (.html).
    table
        Table to write, too (.csv, .parquet). Default: none.
    overwrite
        Replace existing files.
    max_distance
        Maximum distance of a particle's positions in both searches, in pixels of A. Default: the
        minimum distance of peaks.
    symmetry
        Symmetry group of the template, with axes as in RELION: C1, C4, D7, T, O, I, I1.
    """

    output: PathOrUrl
    table: PathOrUrl | None = None
    overwrite: bool = False
    max_distance: float | None = None
    symmetry: str = "C1"


def compare(
    a: Annotated[PathOrUrl, SEARCH],
    b: Annotated[PathOrUrl, SEARCH],
    /,
    *,
    options: Annotated[CompareOptions, Parameter(name="*")],
    picking: Annotated[PickOptions, PICKING] = DEFAULTS,
) -> None:
    """Compare two searches of one micrograph, or of one montage."""
    require_stores(*(own for own in (a, b) if Path(own).suffix.lower() not in _TABLES))
    output, table, overwrite = options.output, options.table, options.overwrite
    problems = [] if is_html(output) else [f"{output}: expected a name that ends in .html"]
    if table is not None and Path(table).suffix.lower() not in _TABLES:
        problems.append(f"{table}: expected a name that ends in .csv or .parquet")
    if problems:
        raise InvalidInputError(problems)
    from ocelot_em.particles.comparison import compare as compare_searches
    from ocelot_em.store.whole_file import refuse_existing
    from ocelot_em.view.comparison_page import write_comparison

    refuse_existing([Path(own) for own in (output, table) if own is not None], overwrite)
    limit, symmetry = options.max_distance, options.symmetry
    found = compare_searches(a, b, max_distance=limit, symmetry=symmetry, **dict(picking))
    write_comparison(found, output, overwrite=overwrite)
    if table is not None:
        write = found.to_csv if str(table).lower().endswith(".csv") else found.to_parquet
        write(table, overwrite=overwrite)
    both, only_a, only_b = found.counts.values()
    open_console().print(f"{both:,} in both, {only_a:,} only in A, {only_b:,} only in B: {output}")
