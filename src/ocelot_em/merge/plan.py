"""The plan of a merge: inputs, tiles and options that determine the output.

The plan is made before the merge starts, printed by ``--dry-run``, and stored in the output so that
a run can be resumed. An impossible plan is rejected with numbers.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from itertools import accumulate
from typing import Annotated, Literal, NamedTuple

import numpy as np
from pydantic import Field

from ocelot_em.errors import FormatError
from ocelot_em.model.arrays import MAX_COUNT
from ocelot_em.model.maps import Int64, MapSet, PoseForm
from ocelot_em.model.options import LARGEST_TILE
from ocelot_em.model.regions import GroupBy, Overlap, Region, Tile, TileGrid, ceil_div
from ocelot_em.store import attributes as fmt
from ocelot_em.store import constants
from ocelot_em.store.arrays import ArrayLayout, map_layout
from ocelot_em.store.progress import SearchProgress, combined, progress_of
from ocelot_em.store.sources import Source


class PlannedExposure(fmt.PlacedExposure):
    """An exposure and its sources, numbered in the stated order.

    A search without exposures is one exposure with an empty id, of which all pixels are merged,
    valid or not.
    """

    sources: Annotated[fmt.Several[Source], Field(min_length=1)]

    @property
    def counted(self) -> Region:
        """Valid merged pixels, in exposure coordinates; statistics cover only these."""
        return self.region.intersect(Region.whole(self.valid_shape))

    @property
    def total_projections(self) -> int:
        """Sum of all counts."""
        return sum(source.total_projections for source in self.sources)

    @property
    def contributions(self) -> tuple[fmt.Contribution, ...]:
        """All partials, in the order of their numbers."""
        return tuple(c for source in self.sources for c in source.contributions)


class Piece(NamedTuple):
    """The part of an exposure that is in a tile."""

    exposure: int
    """Position of the exposure in the plan."""
    region: Region
    """The pixels, in exposure coordinates."""
    in_tile: Region
    """The same pixels, in tile coordinates."""


class MergePlan(fmt.Attributes):
    """Everything that determines the bytes of the output; two equal plans give equal maps.

    ``identity`` is in the records of the output's tiles, and is kept when a montage is extended;
    None for an output that an earlier version began. ``in_shards`` is chosen when the output is
    created. ``docs/format.md`` describes the rest.
    """

    exposures: Annotated[fmt.Several[PlannedExposure], Field(min_length=1)]
    shape: fmt.Shape
    valid_shape: fmt.Shape
    pixel_size_angstrom: fmt.Angstrom | None
    pose_form: PoseForm
    has_pixel_size: bool
    has_counts: bool
    search_space_digest: fmt.Digest | None
    tile: fmt.Shape
    nan: Literal["raise", "mask"]
    has_decoded_poses: bool = True
    has_derived_maps: bool = True
    canvas_origin: tuple[fmt.CanvasPixel, fmt.CanvasPixel] = (0, 0)
    overlap: Overlap = "earliest"
    erode_px: fmt.Number = 0
    identity: fmt.Id | None = None
    looks_wrapped: bool = False
    in_shards: bool = False
    group_by: GroupBy | None = None
    template_name: fmt.PartialName | None = None

    @property
    def has_parts(self) -> bool:
        """Whether the output is made of exposures, or groups, rather than a single search."""
        return bool(self.exposures[0].id)

    @property
    def is_montage(self) -> bool:
        """Whether it is made of exposures that may have different origins."""
        return self.has_parts and not self.group_by

    @property
    def part(self) -> str:
        """What an exposure of the plan is, for messages."""
        return "group" if self.group_by else "exposure"

    @property
    def templates(self) -> list[int]:
        """Number of the template of each exposure or group.

        Orientations of one template can be compared. Groups of different stores are of one template
        if these state its name; exposures of a montage are.
        """
        if not self.group_by or (self.group_by != "template" and self.template_name is not None):
            return [0] * len(self.exposures)
        is_own = self.group_by == "template"
        names = [own.id if is_own else own.sources[0].url for own in self.exposures]
        return [names.index(name) for name in names]

    def digest_of(self, exposure: fmt.PlacedExposure) -> fmt.Digest | None:
        """Return the digest of the search space of an exposure or group."""
        return exposure.search_space_digest or self.search_space_digest

    @property
    def own_digests(self) -> dict[fmt.Digest, Source]:
        """Digests of the search spaces that only some groups have, and a source that has each."""
        return {
            e.search_space_digest: e.sources[0] for e in self.exposures if e.search_space_digest
        }

    @property
    def maps(self) -> MapSet:
        """Maps of the output."""
        return MapSet(
            self.pose_form,
            self.has_pixel_size,
            self.has_counts,
            self.has_decoded_poses,
            self.has_parts,
            self.has_derived_maps,
            self.group_by is not None,
        )

    @property
    def maps_of_exposure(self) -> MapSet:
        """Maps of a single exposure."""
        return replace(self.maps, exposures=False, groups=False)

    @property
    def grid(self) -> TileGrid:
        """The tiles."""
        return TileGrid(self.shape, self.tile)

    @property
    def chunk(self) -> tuple[int, int]:
        """Chunk shape of the output: the default, or the tile if it is smaller."""
        edge = constants.DEFAULT_CHUNK
        return min(self.tile[0], edge), min(self.tile[1], edge)

    def layout(self, name: str) -> ArrayLayout:
        """Return the layout of the array of a map."""
        dtype = self.maps.merged_dtype(name)
        return self.laid_out(map_layout(name, self.shape, self.chunk, dtype))

    def laid_out(self, layout: ArrayLayout) -> ArrayLayout:
        """Return the layout of an array of tiles, in shards if the output is."""
        return layout.of_result if self.in_shards else layout

    @property
    def sources(self) -> tuple[Source, ...]:
        """The inputs of all exposures."""
        return tuple(source for exposure in self.exposures for source in exposure.sources)

    @property
    def total_projections(self) -> int:
        """Sum of all counts."""
        return sum(exposure.total_projections for exposure in self.exposures)

    @property
    def contributions(self) -> tuple[fmt.Contribution, ...]:
        """The partials of all exposures, each in the order of their numbers."""
        return tuple(c for exposure in self.exposures for c in exposure.contributions)

    @property
    def progress(self) -> SearchProgress | None:
        """How much of the searches is merged; None if the partials do not state it."""
        several = searched_together(self.exposures, self.group_by)
        return combined(
            [progress_of(c.coverage for e in own for c in e.contributions) for own in several]
        )

    @property
    def incomplete_text(self) -> str:
        """How much is merged of an incomplete search; empty if all, or if it is not known."""
        return self.progress.incomplete_text if self.progress else ""

    @cached_property
    def _bounds(self) -> Int64:
        """Bounds of the exposures on the canvas, (n, 4), in the order in which they are placed."""
        return np.array([self.exposures[k].on_canvas.bounds for k in self._order], np.int64)

    @cached_property
    def _order(self) -> list[int]:
        all_exposures = range(len(self.exposures))
        return sorted(all_exposures, key=lambda k: (self.exposures[k].acquired, k))

    def pieces(self, tile: Tile) -> list[Piece]:
        """Return the pieces of a tile, the earliest acquired exposure first; ties by number."""
        pieces = []
        for position in self.touching(tile.region):
            exposure = self.exposures[position]
            shared, (dy, dx) = exposure.on_canvas.intersect(tile.region), exposure.origin
            in_tile = shared.relative_to(tile.region)
            pieces.append(Piece(position, shared.shifted(-dy, -dx), in_tile))
        return pieces

    def touching(self, region: Region) -> list[int]:
        """Plan positions of the exposures that touch a region of the canvas, in the same order."""
        y0, y1, x0, x1 = self._bounds.T
        touches = (y0 < region.y1) & (y1 > region.y0) & (x0 < region.x1) & (x1 > region.x0)
        return [self._order[number] for number in np.flatnonzero(touches)]

    def merged_exposures(self) -> tuple[fmt.MergedExposure, ...]:
        """Return the exposures for the output's attributes; empty if it has none."""
        if not self.has_parts:
            return ()
        ns = [len(exposure.contributions) for exposure in self.exposures]
        return tuple(
            fmt.MergedExposure(
                **exposure.model_dump(exclude={"sources"}),
                total_projections=exposure.total_projections,
                first_partial=end - n,
                n_partials=n,
            )
            for exposure, n, end in zip(self.exposures, ns, accumulate(ns), strict=True)
        )


def searched_together(
    exposures: Sequence[PlannedExposure], group_by: GroupBy | None
) -> list[list[PlannedExposure]]:
    """Return the exposures of each search: each alone, or all sectors of a search space."""
    if group_by != "sector":
        return [[exposure] for exposure in exposures]
    found: dict[str | None, list[PlannedExposure]] = {}
    for exposure in exposures:
        found.setdefault(exposure.search_space_digest, []).append(exposure)
    return list(found.values())


def read_plan(attributes: fmt.MergedAttributes, url: str) -> MergePlan:
    """Read the plan of a merged result, finished or not, which must agree with the result."""
    plan = fmt.validated(MergePlan, attributes.plan, f"{url}: plan")
    if problems := _impossible(plan) or _disagreements(plan, attributes):
        raise FormatError(f"{url}: plan: {'; '.join(problems[:20])}")
    return plan


REPEATED = (
    "shape",
    "valid_shape",
    "pixel_size_angstrom",
    "pose_form",
    "has_pixel_size",
    "has_counts",
    "has_decoded_poses",
    "has_derived_maps",
    "search_space_digest",
    "canvas_origin",
    "looks_wrapped",
    "group_by",
    "template_name",
)
"""Attributes of a merged result that its plan repeats."""


def _impossible(plan: MergePlan) -> list[str]:
    """Return the reasons why no merge can have this plan."""
    problems, canvas = [], Region.whole(plan.shape)
    for exposure in plan.exposures:
        name, region = f"exposure {exposure.id!r}", exposure.region
        if len(plan.exposures) > 1 and not exposure.id:
            problems.append(f"{name}: expected an id, since there are several exposures")
        if exposure.on_canvas.intersect(canvas) != exposure.on_canvas:
            problems.append(
                f"{name}: expected {region} to be inside {canvas}, got {exposure.on_canvas}"
            )
    numbers = [exposure.number for exposure in plan.exposures]
    if numbers != sorted(set(numbers)):
        problems.append("exposures: expected unique numbers in ascending order")
    if (total := plan.total_projections) > MAX_COUNT:
        problems.append(f"total_projections: expected at most 2**62, got {total}")
    if max(plan.tile) > LARGEST_TILE:
        problems.append(f"tile: expected at most {LARGEST_TILE:,} pixels, got {plan.tile}")
    if (n := len(TileGrid(plan.shape, plan.chunk))) > constants.MAX_TILES:
        problems.append(f"tile: expected at most {constants.MAX_TILES:,} chunks, got {n:,}")
    return problems


def _disagreements(plan: MergePlan, attributes: fmt.MergedAttributes) -> list[str]:
    """Return the differences between a plan and the attributes of its result."""
    problems = [
        f"{field}: expected {theirs} as in the result, got {own}"
        for field, own, theirs in fmt.differences(plan, attributes, REPEATED)
    ]
    if plan.contributions != attributes.partials:
        problems.append("partials: expected those of the result, got others")
    if plan.merged_exposures() != attributes.exposures:
        problems.append("exposures: expected those of the result, got others")
    return problems


def tile_size_of(plan: MergePlan) -> int:
    """Return a tile size that reproduces the plan's tiles, even if the map truncated them."""
    edge = max(plan.tile)
    if edge <= constants.DEFAULT_CHUNK:
        return edge
    return ceil_div(edge, constants.DEFAULT_CHUNK) * constants.DEFAULT_CHUNK


def plan_differences(found: MergePlan, wanted: MergePlan, *, is_update: bool = False) -> list[str]:
    """Return why a merge cannot be resumed with another plan; empty if it can.

    A montage can be resumed after exposures, or partials of exposures, were added. In an update, a
    search has gone on since: partials may have other contents.
    """
    has_parts = found.has_parts and wanted.has_parts
    if not (has_parts or is_update):
        return _differences(found, wanted)
    of_canvas = ("shape", "valid_shape") if has_parts else ()
    differences = _differences(found, wanted, ignored=("exposures", *of_canvas))
    wanted_by_id = {exposure.id: exposure for exposure in wanted.exposures}
    for old in found.exposures:
        new = wanted_by_id.get(old.id)
        if new is None:
            differences.append(f"{found.part} {old.id!r}: is in the output, not in the inputs")
            continue
        changed = _differences(old, new, ignored=("sources",))
        differences += [f"{found.part} {old.id!r}: {text}" for text in changed]
        if not is_update and not {source.id for source in old.sources} <= {
            source.id for source in new.sources
        }:
            differences.append(f"{found.part} {old.id!r}: {_inputs(old.sources, new.sources)}")
    return differences


_AS_OPTION: dict[str, tuple[str, dict[object, str]]] = {
    "has_derived_maps": ("derived", {True: "stored", False: "none"}),
    "has_decoded_poses": ("poses", {True: "decoded", False: "index"}),
}
"""Options of a merge that its plan has under another name, with their values."""


def _differences(
    found: fmt.Attributes, wanted: fmt.Attributes, ignored: tuple[str, ...] = ()
) -> list[str]:
    differences = []
    for key in sorted(set(type(found).model_fields) - set(ignored)):
        old, new = getattr(found, key), getattr(wanted, key)
        if _without_paths(old) == _without_paths(new):
            continue
        if key == "exposures":
            one, other = (tuple(s for e in es for s in e.sources) for es in (old, new))
            if _without_paths(one) != _without_paths(other):
                differences.append(_inputs(one, other))
        else:
            option, texts = _AS_OPTION.get(key, (key, {}))
            old, new = (texts.get(value, value) for value in (old, new))
            differences.append(f"{option}: the output has {old}, requested is {new}")
    return differences


def _without_paths(value: object) -> object:
    """Reduce sources to what identifies them: they may have been moved, or given a manifest."""
    if isinstance(value, tuple):
        return tuple(map(_without_paths, value))
    if isinstance(value, Source):
        name = value.name if value.path else ""
        moved = {"url": "", "name": name, "manifest": None, "manifest_folder": ""}
        return value.model_copy(update=moved)
    if isinstance(value, PlannedExposure):
        return value.model_copy(update={"sources": _without_paths(value.sources)})
    return value


def _inputs(old: Sequence[Source], new: Sequence[Source]) -> str:
    one, other = ([f"{s.url} {s.name} {s.id[:8]}" for s in sources] for sources in (old, new))
    return f"inputs: the output was made from {one}, requested are {other}"


def changed_tiles(found: MergePlan, wanted: MergePlan) -> list[Tile]:
    """Tiles of the wanted plan that touch an exposure which is new or has changed."""
    known = {exposure.id: exposure for exposure in found.exposures}
    changed = {
        (tile.iy, tile.ix)
        for exposure in wanted.exposures
        if _without_paths(known.get(exposure.id)) != _without_paths(exposure)
        for tile in wanted.grid.touching(exposure.on_canvas)
    }
    return [wanted.grid.at(iy, ix) for iy, ix in sorted(changed)]
