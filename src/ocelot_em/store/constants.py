"""Names and limits of the stored format, which ``docs/format.md`` describes."""

from typing import Final, Literal

from ocelot_em.model.maps import (
    INDEX,
    MAPS,
    MEAN,
    MIP,
    SCALED_MIP,
    SECOND_ZSCORE,
    SQUARED_SUM,
    STD,
    SUM,
)

FORMAT_VERSION: Final = 3

FIRST_SEALED_VERSION: Final = 3
"""First version whose attributes are sealed, and whose data have manifests."""

ATTRIBUTE_KEY = "ocelot"
PARTIALS = "partials"
ROSTER = "roster"

EXPOSURES = "exposures"
EXPOSURE_NUMBERS = "exposure_numbers"

SEARCH_SPACE = "search_space"
SEARCH_SPACES = "search_spaces"
TILE_SUMMARY = "progress/tile_summary"

DIMENSIONS = ("y", "x")

DEFAULT_CHUNK = 1024
"""Edge of a chunk in pixels. 4 MiB decoded: small enough for the CPU caches, large enough that a
request per chunk costs little; ``docs/format.md`` has the measurements."""

MAX_CHUNK_NBYTES = 256 * 2**20
"""Size limit of a decoded chunk; larger ones indicate corrupt or malicious metadata."""

MAX_CHUNKS = 2**28
"""Maximum number of chunks of an array; metadata may claim nonexistent ones."""

SHARD_CHUNKS = 16
"""Edge of a new shard in chunks: 1 GiB decoded, which every bucket takes in one request."""

MAX_SHARD_CHUNKS = 2**16
"""Maximum number of chunks of a shard: its index is at most 1 MiB, and is kept in memory."""

MAX_TILES = 2**24
"""Maximum number of tiles of a merge: four million pixels squared in tiles of the default size.
Lists of tiles must fit into memory, even if metadata claims nonexistent ones."""

MAX_METADATA_NBYTES = 64 * 2**20
"""Size limit of a ``zarr.json``: a merge of about 60,000 partials."""


def own_tables(digest: str) -> str:
    """Path of the tables of a group whose search space is not that of the first group."""
    return f"{SEARCH_SPACES}/{digest}"


def shuffle_of(name: str) -> Literal["shuffle", "bitshuffle"]:
    """Shuffle filter of a map before compression; ``docs/format.md`` has the measurements.

    Maps with few distinct values compress better with bitshuffle. Noise compresses to the same size
    with byte shuffle, which decodes two to four times faster.
    """
    noise = (MIP, INDEX, SUM, SQUARED_SUM, SCALED_MIP, SECOND_ZSCORE, MEAN, STD)
    return "shuffle" if name in noise else "bitshuffle"


def map_attributes(name: str) -> dict[str, str]:
    """Attributes of a map's array, with the names that xarray and CF readers expect."""
    info = MAPS[name]
    return {"long_name": info.meaning, "units": info.unit}
