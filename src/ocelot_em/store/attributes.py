"""The attributes of the stored format, version 3, which ``docs/format.md`` describes.

They are pydantic models under the one key ``ocelot`` of a group's attributes; parsing reports
every problem with its place. Stores of version 1 are converted when read.
"""

import json
import reprlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    PlainSerializer,
    StringConstraints,
    ValidationError,
    model_validator,
)

from ocelot_em.errors import FormatError
from ocelot_em.model.arrays import MAX_COUNT
from ocelot_em.model.correlation_histogram import CorrelationHistogram
from ocelot_em.model.maps import MapSet, PoseForm
from ocelot_em.model.ranges import Ranges, parse_ranges, ranges_text, union
from ocelot_em.model.regions import GroupBy, Region
from ocelot_em.store.constants import ATTRIBUTE_KEY, FORMAT_VERSION
from ocelot_em.store.metadata import problems_of

PartialName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._\-]{0,127}$")]
ExposureId = Annotated[str, StringConstraints(pattern=r"^([A-Za-z0-9][A-Za-z0-9._\-]{0,127})?$")]
"""Empty for the only exposure of a search without named exposures."""

Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
"""SHA-256, as of a manifest."""

Id = Annotated[str, StringConstraints(pattern=r"^[!-~]{1,128}$")]
"""Id of a version of the data."""

Folder = Annotated[str, StringConstraints(pattern=r"^([0-9a-f]{1,32})?$")]
"""Folder of a partial's arrays."""

PixelCount = Annotated[int, Field(ge=1, le=2**31 - 1)]
Shape = tuple[PixelCount, PixelCount]
Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Number = Annotated[int, Field(ge=0, le=2**31 - 2)]
Order = Annotated[int, Field(ge=-(2**53), le=2**53)]
Origin = Annotated[float, Field(ge=-(2**31), le=2**31, allow_inf_nan=False)]
Angstrom = Annotated[float, Field(gt=0, allow_inf_nan=False)]
CanvasPixel = Annotated[int, Field(ge=-(2**33), le=2**33)]
"""Row or column of a canvas, which begins up to 2**31 pixels before or after row or column 0."""


Item = TypeVar("Item")
Several = Annotated[tuple[Item, ...], FailFast()]
"""Reports only the first wrong item, because millions of errors would fill the memory."""


class Attributes(BaseModel):
    """Immutable records without extra fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Provenance(Attributes):
    """Origin of the data, for readers; ``input_sha256`` also reveals files given twice."""

    created: str
    versions: dict[str, str]
    inputs: Several[str] = ()
    input_sha256: str = ""
    options: dict[str, Any] = {}


def _shapes_agree(model: Any) -> Any:
    """Require valid pixels within the shape, or neither of the two."""
    shape, valid = model.shape, model.valid_shape
    if (shape is None) != (valid is None):
        raise ValueError(
            "valid_shape: expected one where there is a shape, and none where there is none, "
            f"got {valid} for shape {shape}"
        )
    if shape and (valid[0] > shape[0] or valid[1] > shape[1]):
        raise ValueError(f"valid_shape: expected at most shape {shape}, got {valid}")
    return model


WRAPPED_EDGES = (
    "the valid region is unknown, and the edges look wrapped: the last rows and columns continue "
    "with the first, as in maps of the micrograph's shape; particles near the edges may be false; "
    "import the files again with their template box (--template-box N --overwrite)"
)
"""The warning about data whose ``looks_wrapped`` is true."""


class _Result(Attributes):
    """Attributes that a search and a merged result share."""

    format_version: Literal[2, 3]
    pixel_size_angstrom: Angstrom | None
    pose_form: PoseForm
    has_pixel_size: bool
    has_counts: bool
    search_space_digest: Digest | None
    total_projections: Count
    provenance: Provenance
    looks_wrapped: bool = False
    template_name: PartialName | None = None

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
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

    @property
    def edge_warning(self) -> str:
        """Warning that pixels near the edges may be invalid; empty if there is no sign of it."""
        return WRAPPED_EDGES * self.looks_wrapped


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
    """Root of a search: properties that all its partials share.

    ``total_projections`` is the sum over the complete partials when the last of them was
    finished; the partials' own counts are authoritative. In a search of several exposures, the
    shapes and totals belong to the exposures.
    """

    kind: Literal["search"]
    has_counts: Literal[False]
    shape: Shape | None
    valid_shape: Shape | None

    _sized = model_validator(mode="after")(_shapes_agree)

    @property
    def has_exposures(self) -> bool:
        """Whether the partials belong to exposures."""
        return self.shape is None


class ExposureAttributes(Attributes):
    """One exposure of a search; the only one of a search without named exposures has no id."""

    id: ExposureId
    number: Number
    origin: tuple[Origin, Origin]
    acquired: Order
    shape: Shape
    valid_shape: Shape
    total_projections: Count

    _sized = model_validator(mode="after")(_shapes_agree)


SHARED_BY_EXPOSURE = ("origin", "acquired", "shape", "valid_shape")
"""Fields that must agree between all partials of an exposure."""


class NumberAttributes(Attributes):
    """Exposure that owns a number; see ``docs/format.md``."""

    exposure: ExposureId


class Coverage(Attributes):
    """The orientations in a partial, out of those of the whole search.

    ``ranges`` are stored as text: the orientations of a long search are handed out in thousands of
    small ranges. ``batch_size`` is the number of orientations that were computed at a time;
    ``data_sha256`` identifies what was searched, so that no other search continues this one.
    """

    ranges: Annotated[Ranges, BeforeValidator(parse_ranges), PlainSerializer(ranges_text)]
    n_orientations: PixelCount
    batch_size: PixelCount | None = None
    data_sha256: Digest | None = None

    @model_validator(mode="after")
    def _ranges_are_sorted(self) -> Self:
        ranges, end = self.ranges, self.n_orientations
        if ranges != union(ranges) or (ranges and not 0 <= ranges[0][0] <= ranges[-1][1] <= end):
            raise ValueError(f"ranges: expected sorted disjoint ranges within 0 to {end}")
        return self


class Recording(Attributes):
    """When and by which process a partial was recorded while its search ran; times in UTC."""

    started: str
    heartbeat: str
    every_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    process: dict[str, Any]


class PartialAttributes(Attributes):
    """One partial; ``state`` becomes ``complete`` after its last chunk is written.

    A ``running`` partial is recorded while its search runs: it can be read, and will be replaced.
    With ``has_counts``, the count differs from pixel to pixel and is a map, of which
    ``total_projections`` is an upper bound.
    """

    id: Id
    order: Order
    total_projections: Count
    state: Literal["writing", "running", "complete"]
    provenance: Provenance
    folder: Folder = ""
    manifest: Digest | None = None
    has_counts: bool = False
    coverage: Coverage | None = None
    recording: Recording | None = None
    correlation_threshold: Annotated[float, Field(allow_inf_nan=False)] | None = None
    correlation_histogram: CorrelationHistogram | None = None

    @model_validator(mode="after")
    def _running_is_recorded(self) -> Self:
        if self.state == "running" and (self.coverage is None or self.recording is None):
            raise ValueError("state: expected coverage and recording of a running partial")
        return self

    @property
    def is_readable(self) -> bool:
        """Whether there are maps that can be read."""
        return self.state != "writing" and (self.state == "complete" or self.manifest is not None)

    def maps(self, of_search: MapSet) -> MapSet:
        """Which maps it has, in a search whose other partials have these."""
        return replace(of_search, counts=self.has_counts)

    @property
    def manifest_folder(self) -> str:
        """Group of the manifest, within the partial's; each checkpoint has its own."""
        return self.folder if self.state == "running" else ""


class Contribution(Attributes):
    """A partial in a merged result; ``best_partial`` holds its index in the list."""

    name: PartialName
    id: Id
    total_projections: Count
    coverage: Coverage | None = None
    correlation_histogram: CorrelationHistogram | None = None


class PlacedExposure(Attributes):
    """An exposure or group on a canvas: the origin there, and its region that is used.

    ``search_space_digest`` is that of a group whose search space is not the result's.
    """

    id: ExposureId
    number: Number
    acquired: Order
    origin: tuple[CanvasPixel, CanvasPixel]
    shape: Shape
    valid_shape: Shape
    taken: tuple[CanvasPixel, CanvasPixel, CanvasPixel, CanvasPixel]
    search_space_digest: Digest | None = None

    @property
    def region(self) -> Region:
        """The region used, in the exposure."""
        return Region(*self.taken)

    @property
    def on_canvas(self) -> Region:
        """The same region in the merged maps."""
        return self.region.shifted(*self.origin)

    _sized = model_validator(mode="after")(_shapes_agree)

    @model_validator(mode="after")
    def _takes_own_pixels(self) -> Self:
        whole, region = Region.whole(self.shape), self.region
        if not region.size or region.intersect(whole) != region:
            raise ValueError(f"taken: expected pixels of {whole}, got {region}")
        return self


class MergedExposure(PlacedExposure):
    """An exposure of a merged result, and its range in the result's ``partials``."""

    total_projections: Count
    first_partial: Number
    n_partials: Number


class MergedAttributes(_Result):
    """Root of a merged result; ``state`` becomes ``complete`` after the last tile."""

    kind: Literal["merged"]
    shape: Shape
    valid_shape: Shape
    exposures: Several[MergedExposure] = ()
    canvas_origin: tuple[CanvasPixel, CanvasPixel] = (0, 0)
    id: Id
    state: Literal["writing", "complete"]
    partials: Several[Contribution]
    plan: dict[str, Any]
    finished: str | None = None
    has_decoded_poses: bool = True
    has_derived_maps: bool = True
    manifest: Digest | None = None
    group_by: GroupBy | None = None

    _sized = model_validator(mode="after")(_shapes_agree)

    @model_validator(mode="after")
    def _partials_agree(self) -> Self:
        next_partial = 0
        for exposure in self.exposures:
            if exposure.first_partial != next_partial:
                raise ValueError(
                    f"exposures: expected the partials of exposure {exposure.number} to begin with "
                    f"{next_partial}, got {exposure.first_partial}"
                )
            next_partial += exposure.n_partials
        if self.exposures and next_partial != len(self.partials):
            raise ValueError(
                f"exposures: expected all {len(self.partials)} partials to be one's, got "
                f"{next_partial}"
            )
        return self

    @property
    def is_montage(self) -> bool:
        """Whether its exposures are placed on a canvas, and are not groups."""
        return bool(self.exposures) and not self.group_by

    @property
    def outlined(self) -> tuple[MergedExposure, ...]:
        """The exposures of a montage; groups have no outlines of their own."""
        return self.exposures if self.is_montage else ()

    @property
    def part(self) -> str:
        """What its exposures are, for messages."""
        return "group" if self.group_by else "exposure"

    @property
    def maps(self) -> MapSet:
        """Which maps there are."""
        return replace(
            super().maps,
            decoded=self.has_decoded_poses,
            exposures=bool(self.exposures),
            derived=self.has_derived_maps,
            groups=self.group_by is not None,
        )


def differences(
    one: Attributes, other: Attributes, fields: Iterable[str]
) -> Iterator[tuple[str, Any, Any]]:
    """Yield the fields in which two records differ, and both values."""
    for field in fields:
        own, others = getattr(one, field), getattr(other, field)
        if own != others:
            yield field, own, others


_Model = TypeVar("_Model", bound=Attributes)


def parse_attributes(model: type[_Model], attributes: object, where: str) -> _Model:
    """Read the ``ocelot`` attributes of a group; ``FormatError`` names every problem."""
    content = attributes.get(ATTRIBUTE_KEY) if isinstance(attributes, dict) else None
    if not isinstance(content, dict):
        raise FormatError(
            f"{where}: expected an attribute {ATTRIBUTE_KEY!r}, got none; not an ocelot-em store"
        )
    content = upgraded(content)
    version = content.get("format_version", FORMAT_VERSION)
    if version not in (2, FORMAT_VERSION) or isinstance(version, bool):
        raise FormatError(
            f"{where}: expected format version {FORMAT_VERSION}, got {reprlib.repr(version)}; "
            "read it with the version of ocelot-em that wrote it, or a newer one"
        )
    return validated(model, content, where)


def validated(model: type[_Model], content: object, where: str) -> _Model:
    """Validate part of a JSON document; ``FormatError`` names every problem."""
    try:
        return model.model_validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        raise FormatError(f"{where}: {'; '.join(problems_of(error))}") from None
    except RecursionError:
        raise FormatError(f"{where}: the attributes are nested too deeply") from None


def upgraded(content: dict[str, Any]) -> dict[str, Any]:
    """Convert attributes of version 1 to 2: a merge's plan listed sources instead of exposures."""
    if content.get("format_version") != 1 or isinstance(content["format_version"], bool):
        return content
    new = {**content, "format_version": 2}
    plan = content.get("plan")
    if isinstance(plan, dict) and isinstance(plan.get("sources"), list):
        shapes = {key: plan.get(key) for key in ("shape", "valid_shape")}
        rest = {key: value for key, value in plan.items() if key != "sources"}
        # An invalid shape is rejected later.
        edges = plan.get("shape")
        rows, columns = edges if isinstance(edges, list) and len(edges) == 2 else (0, 0)
        only = {
            "id": "",
            "number": 0,
            "acquired": 0,
            "origin": [0, 0],
            **shapes,
            "taken": [0, rows, 0, columns],
            "sources": plan["sources"],
        }
        new["plan"] = {**rest, "exposures": [only]}
    return new


def dump_attributes(model: Attributes) -> dict[str, Any]:
    """Return the group attributes that :func:`parse_attributes` reads."""
    return {ATTRIBUTE_KEY: model.model_dump(mode="json")}
