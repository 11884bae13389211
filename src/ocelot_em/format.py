"""The stored format, version 1: names and attributes. Pure; ``docs/format.md`` is normative.

Attributes are pydantic models under the one key ``ocelot`` of a group's attributes; parsing
reports every problem with its place.
"""

import json
from dataclasses import replace
from typing import Annotated, Any, Final, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from ocelot_em.errors import FormatError
from ocelot_em.maps import (
    INDEX,
    MAPS,
    MEAN,
    MIP,
    SCALED_MIP,
    SQUARED_SUM,
    STD,
    SUM,
    MapSet,
    PoseForm,
)

FORMAT_VERSION: Final = 1
ATTRIBUTE_KEY = "ocelot"
PARTIALS = "partials"
SEARCH_SPACE = "search_space"
TILE_SUMMARY = "progress/tile_summary"
DIMENSIONS = ("y", "x")

DEFAULT_CHUNK = 1024
"""Edge of a chunk in pixels. 4 MiB decoded: small enough to stay near the caches, large enough
that a request per chunk costs little; measured in ``docs/design.md``."""

MAX_CHUNK_NBYTES = 256 * 2**20
"""Largest decoded chunk that is read; more is a sign of broken or hostile metadata."""

PartialName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._\-]{0,127}$")]
PixelCount = Annotated[int, Field(ge=1, le=2**31 - 1)]
Shape = tuple[PixelCount, PixelCount]
Count = Annotated[int, Field(ge=0, le=2**62)]
Angstrom = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Attributes(BaseModel):
    """Strictly read, never changed records."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Provenance(Attributes):
    """Where something came from, for people; ``input_sha256`` also tells files given twice.

    Parameters
    ----------
    created
        Time, in UTC (ISO 8601).
    versions
        Of the packages that made it.
    inputs
        Stores that were merged, or the file a partial was imported from.
    input_sha256
        Hash of that file.
    options
        What was asked for.
    """

    created: str
    versions: dict[str, str]
    inputs: tuple[str, ...] = ()
    input_sha256: str = ""
    options: dict[str, Any] = {}


class _Result(Attributes):
    """What a search and a merged result have in common."""

    format_version: Literal[1]
    shape: Shape
    valid_shape: Shape
    pixel_size_angstrom: Angstrom | None
    pose_form: PoseForm
    has_pixel_size: bool
    has_counts: bool
    search_space_digest: str | None
    total_projections: Count
    provenance: Provenance

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.valid_shape[0] > self.shape[0] or self.valid_shape[1] > self.shape[1]:
            raise ValueError(
                f"valid_shape: expected at most shape {self.shape}, got {self.valid_shape}"
            )
        if (self.pose_form is PoseForm.INDEXED) != (self.search_space_digest is not None):
            raise ValueError(
                "search_space_digest: expected one for indexed poses and none for explicit ones, "
                f"got {self.search_space_digest} for {self.pose_form.value} ones"
            )
        if self.pose_form is PoseForm.INDEXED and not self.has_pixel_size:
            raise ValueError("has_pixel_size: expected true for indexed poses, got false")
        return self

    @property
    def maps(self) -> MapSet:
        """Which maps there are."""
        return MapSet(self.pose_form, self.has_pixel_size, self.has_counts)


SHARED_BY_PARTIALS = (
    "shape",
    "valid_shape",
    "pixel_size_angstrom",
    "pose_form",
    "has_pixel_size",
    "search_space_digest",
)
"""Fields that must agree between all partials of a search, and between the inputs of a merge."""


class SearchAttributes(_Result):
    """Root of a search: what all its partials share.

    ``total_projections`` is the sum over the complete partials when the last of them was
    finished; the partials' own counts are authoritative.
    """

    kind: Literal["search"]
    has_counts: Literal[False]


class PartialAttributes(Attributes):
    """One partial. ``state`` becomes ``complete`` after its last chunk is written."""

    id: str
    order: int
    total_projections: Count
    state: Literal["writing", "complete"]
    provenance: Provenance


class Contribution(Attributes):
    """A partial that went into a merged result; its place in the list is its ``best_partial``."""

    name: str
    id: str
    total_projections: Count


class MergedAttributes(_Result):
    """Root of a merged result. ``state`` becomes ``complete`` after the last tile."""

    kind: Literal["merged"]
    id: str
    state: Literal["writing", "complete"]
    partials: tuple[Contribution, ...]
    plan: dict[str, Any]
    finished: str | None = None
    has_decoded_poses: bool = True

    @property
    def maps(self) -> MapSet:
        """Which maps there are."""
        return replace(super().maps, decoded=self.has_decoded_poses)


class PartialStatistics(Attributes):
    """How often a partial won, of the valid pixels."""

    name: str
    total_projections: Count
    won_pixels: Count


class SourceStatistics(Attributes):
    """An input's own correlations, over the valid pixels; None where nothing is known.

    Parameters
    ----------
    mean, mean_spread
        Mean over the pixels of the mean correlation, and its standard deviation over the pixels.
    std
        Standard deviation of the correlations at one pixel, in the quadratic mean over the pixels.
    correlation_sum, correlation_squared_sum
        Sums over all pixels; equal ones give away a share that was searched twice.
    """

    name: str
    total_projections: Count
    mean: float | None = None
    mean_spread: float | None = None
    std: float | None = None
    correlation_sum: float | None = None
    correlation_squared_sum: float | None = None


class StatisticsAttributes(Attributes):
    """What was counted over the valid pixels of a merged result."""

    valid_pixels: Count
    searched_pixels: Count
    unsearched_pixels: Count
    nan_pixels: Count
    zero_std_pixels: Count
    mip_range: tuple[float, float] | None
    scaled_mip_range: tuple[float, float] | None
    candidate_level: float | None
    n_candidates: Count
    partials: tuple[PartialStatistics, ...]
    sources: tuple[SourceStatistics, ...]


_Model = TypeVar("_Model", bound=Attributes)


def parse_attributes(model: type[_Model], attributes: object, where: str) -> _Model:
    """Read the ``ocelot`` attributes of a group.

    Raises
    ------
    FormatError
        Naming the place and every problem; a store of a later version is said to be that.
    """
    content = attributes.get(ATTRIBUTE_KEY) if isinstance(attributes, dict) else None
    if not isinstance(content, dict):
        raise FormatError(
            f"{where}: expected an attribute {ATTRIBUTE_KEY!r}, got none; not an ocelot-em store"
        )
    version = content.get("format_version", FORMAT_VERSION)
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise FormatError(
            f"{where}: expected format version {FORMAT_VERSION}, got {version!r}; "
            "read it with the version of ocelot-em that wrote it, or a newer one"
        )
    try:
        return model.model_validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, p['loc'])) or 'attributes'}: {p['msg']}" for p in error.errors()
        ]
        raise FormatError(f"{where}: {'; '.join(problems)}") from None


def dump_attributes(model: Attributes) -> dict[str, Any]:
    """Return the group attributes that :func:`parse_attributes` reads."""
    return {ATTRIBUTE_KEY: model.model_dump(mode="json")}


def fill_value(name: str) -> float | int:
    """Fill value of a map: NaN, or for the integer maps -1 (index, partial) and 0 (count)."""
    return MAPS[name].fill


def shuffle_of(name: str) -> Literal["shuffle", "bitshuffle"]:
    """How a map is shuffled before it is compressed: what measured best, see ``docs/format.md``.

    Maps of few different values compress better by bits. Noise compresses to the same size by
    bytes, which are decoded four times faster.
    """
    return (
        "shuffle" if name in (MIP, INDEX, SUM, SQUARED_SUM, SCALED_MIP, MEAN, STD) else "bitshuffle"
    )


def map_attributes(name: str) -> dict[str, str]:
    """Attributes of a map's array, in the names that xarray and CF readers look for."""
    info = MAPS[name]
    return {"long_name": info.meaning, "units": info.unit}
