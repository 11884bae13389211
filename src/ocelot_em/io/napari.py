"""Particles as points in the layout of napari, which opens the file as a layer by itself."""

from os import PathLike
from pathlib import Path

import numpy as np

from ocelot_em.particles.column_table import as_text
from ocelot_em.particles.table import ParticleTable
from ocelot_em.store.whole_file import write_file


def write_napari_csv(
    table: ParticleTable,
    output: str | PathLike[str],
    *,
    pixel_size_angstrom: float | None = None,
    overwrite: bool = False,
) -> Path:
    """Write particles as a layer of points for napari, over an image of the same result.

    ``axis-0`` and ``axis-1`` are y and x of the pixel's centre on the map, in a montage on its
    canvas, in Å if the pixel size is known, like the image of
    :func:`ocelot_em.io.ome_zarr.write_ome_zarr`. The columns of the table follow; napari shows them
    as features of the points.

    Raises
    ------
    OutputExistsError
        The file exists, and ``overwrite`` is False.
    StorageError
        The file cannot be written.

    Examples
    --------
    >>> from ocelot_em import find_peaks
    >>> from ocelot_em.io.napari import write_napari_csv
    >>> path = write_napari_csv(find_peaks("MERGED.zarr"), "points.csv", pixel_size_angstrom=2.0)
    >>> path.read_text().splitlines()[0][:40]
    'index,axis-0,axis-1,micrograph,rank,pos_'
    """
    prefix, size = "canvas" if table.is_of_montage else "pos", pixel_size_angstrom or 1.0
    places = {f"axis-{n}": size * table.columns[f"{prefix}_{axis}"] for n, axis in enumerate("yx")}
    columns = {"index": np.arange(len(table)), **places, **table.columns}
    rows = zip(*map(as_text, columns.values()), strict=True)
    lines = [",".join(columns), *(",".join(row) for row in rows)]
    return write_file(output, ("\n".join(lines) + "\n").encode(), overwrite=overwrite)
