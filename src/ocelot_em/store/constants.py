"""Names and limits of the stored format, which ``docs/format.md`` describes."""

from typing import Final, Literal

from ocelot_em.model.maps import (
    INDEX,
    MAPS,
    MEAN,
    MIP,
    SCALED_MIP,
    SQUARED_SUM,
    STD,
    SUM,
)

FORMAT_VERSION: Final = 2


ATTRIBUTE_KEY = "ocelot"
PARTIALS = "partials"


EXPOSURES = "exposures"
EXPOSURE_NUMBERS = "exposure_numbers"


SEARCH_SPACE = "search_space"
TILE_SUMMARY = "progress/tile_summary"


DIMENSIONS = ("y", "x")


DEFAULT_CHUNK = 1024
"""Edge of a chunk in pixels. 4 MiB decoded: small enough to stay near the caches, large enough
that a request per chunk costs little; ``docs/format.md`` has what was measured."""


MAX_CHUNK_NBYTES = 256 * 2**20
"""Largest decoded chunk that is read; more is a sign of broken or hostile metadata."""

MAX_CHUNKS = 2**28
"""Chunks of an array that is read. They may only be said to be there."""

MAX_TILES = 2**24
"""Of a merge: four million pixels squared in tiles of the default size. Lists of them must fit into
memory, also of those that are only said to be there."""


MAX_METADATA_NBYTES = 64 * 2**20
"""Largest ``zarr.json`` that is read or written: a merge of some sixty thousand partials."""


def fill_value(name: str) -> float | int:
    """Fill value of a map: NaN, or for the integer maps -1 (index, partial) and 0 (count)."""
    return MAPS[name].fill


def shuffle_of(name: str) -> Literal["shuffle", "bitshuffle"]:
    """How a map is shuffled before it is compressed: what measured best, see ``docs/format.md``.

    Maps of few different values compress better by bits. Noise compresses to the same size by
    bytes, which are decoded two to four times faster.
    """
    return (
        "shuffle" if name in (MIP, INDEX, SUM, SQUARED_SUM, SCALED_MIP, MEAN, STD) else "bitshuffle"
    )


def map_attributes(name: str) -> dict[str, str]:
    """Attributes of a map's array, in the names that xarray and CF readers look for."""
    info = MAPS[name]
    return {"long_name": info.meaning, "units": info.unit}
