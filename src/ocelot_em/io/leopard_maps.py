"""The eight maps of a finished Leopard-EM search, which its file formats share."""

from collections.abc import Mapping

from ocelot_em.model.maps import MEAN, MIP, SCALED_MIP, STD
from ocelot_em.model.regions import TileGrid, ceil_div

OUR_NAMES: Mapping[str, str] = {
    "mip": MIP,
    "scaled_mip": SCALED_MIP,
    "correlation_average": MEAN,
    "correlation_variance": STD,  # misnamed in Leopard-EM since 1.0: it is not squared
    "orientation_psi": "best_psi",
    "orientation_theta": "best_theta",
    "orientation_phi": "best_phi",
    "relative_defocus": "best_defocus",
}
"""Leopard-EM's map names, and the names used here."""

BAND_PX = 4 * 2**20
"""Pixels of a map in memory at a time, unless chunks are larger."""

LEAST_ROWS = 1024
"""Minimum rows of a band: few bands, of whole chunks so that none is read in pieces."""


def band_grid(shape: tuple[int, int], block: tuple[int, int]) -> TileGrid:
    """Cut a map into bands of whole blocks, each of about :data:`BAND_PX` pixels.

    Wide maps are cut along both axes: one row of chunks of a montage can be gigabytes.
    """
    rows = ceil_div(LEAST_ROWS, block[0]) * block[0]
    columns = max(BAND_PX // (rows * block[1]), 1) * block[1]
    return TileGrid(shape, (min(rows, shape[0]), min(columns, shape[1])))
