"""Simulated searches of any size with planted particles, for demonstrations and benchmarks.

The maps have the properties of a real search that a merge and a peak search depend on: a smooth
mean and standard deviation, a ``mip`` that is the maximum of the effective number of independent
correlations (:data:`~ocelot_em.testing.noise.INDEPENDENT_SHARE`), a correlation between adjacent
pixels, consistent sums, and poses from the partial's own share. ``docs/benchmarks.md`` compares
them with a real search. A pixel depends only on the seed, the partial and its position, so maps
can be generated region by region and need not fit into memory.
"""

import math
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise, product
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ocelot_em.errors import InvalidInputError, OutputExistsError
from ocelot_em.model.maps import (
    INDEX,
    MAPS,
    MIP,
    POSES,
    SQUARED_SUM,
    SUM,
    AnyArray,
    Float32,
    Int32,
    MapSet,
    PoseForm,
)
from ocelot_em.model.problems import require
from ocelot_em.model.regions import Region, Tile, TileGrid
from ocelot_em.model.search_space import SearchSpace
from ocelot_em.model.threads import map_in_threads
from ocelot_em.store.partials import PartialWriter
from ocelot_em.store.search_info import SearchInfo
from ocelot_em.store.whole_file import write_file
from ocelot_em.testing import noise
from ocelot_em.testing.recovery import TRUTH_DTYPE, TRUTH_POSES

STORE_NAME = "RUN.zarr"
TRUTH_NAME = "truth.csv"
MIN_SPACING_PX = 12
PIXEL_SIZE_ANGSTROM = 2.5
_PLACEMENT_CELL_PX = 2 * MIN_SPACING_PX
_PLACEMENT_MARGIN_PX = noise.PEAK_RADIUS_PX + 1


@dataclass(frozen=True)
class Simulation:
    """A search with planted particles; equal parameters give equal maps.

    Parameters
    ----------
    shape
        Height and width of the maps in pixels, equal to the micrograph's (mode ``same``).
    n_partials
        Number of devices that share the search.
    n_particles
        Number of particles planted in the valid region, at least :data:`MIN_SPACING_PX` apart
        along one axis.
    seed
        Random seed, 0 or more.
    form
        Explicit poses, or one index into :attr:`search_space`.
    template_box
        Edge of the template box in pixels.
    projections_per_pose
        Cross-correlations per pose of the search space, to imitate a finer search; 159 gives
        20.5 million.
    chunk_files
        As in :class:`~ocelot_em.SearchInfo`.

    Raises
    ------
    InvalidInputError
        Lists every invalid parameter.

    Examples
    --------
    >>> from ocelot_em import Region, Simulation
    >>> simulation = Simulation((300, 400), n_partials=3, n_particles=10, seed=1)
    >>> simulation.counts
    (51840, 43200, 34560)
    >>> simulation.partial_block(0, Region(0, 64, 0, 100))["mip"].shape
    (64, 100)
    """

    shape: tuple[int, int]
    n_partials: int
    n_particles: int
    seed: int
    form: PoseForm = PoseForm.EXPLICIT
    template_box: int = 56
    projections_per_pose: int = 1
    chunk_files: bool = False

    def __post_init__(self) -> None:
        is_shape = len(self.shape) == 2 and min(self.shape) >= 1
        shortest = min(self.shape, default=0)
        fits = is_shape and 1 <= self.template_box <= shortest
        capacity = math.prod(self._placement_cells) if fits else max(self.n_particles, 0)
        checks = (
            ("shape", is_shape, "a height and a width above 0"),
            ("template_box", fits or not is_shape, f"1 to {shortest} pixels, the shorter edge"),
            (
                "n_particles",
                0 <= self.n_particles <= capacity,
                f"0 to {capacity}, which is what the valid pixels hold (use larger maps for more)",
            ),
            (
                "n_partials",
                1 <= self.n_partials <= noise.MAX_PARTIALS,
                f"1 to {noise.MAX_PARTIALS}",
            ),
            ("seed", self.seed >= 0, "0 or more"),
            ("form", self.form in tuple(PoseForm), " or ".join(PoseForm)),
            ("projections_per_pose", self.projections_per_pose >= 1, "1 or more"),
        )
        problems = [
            f"{name}: expected {expected}, got {getattr(self, name)!r}"
            for name, is_valid, expected in checks
            if not is_valid
        ]
        if problems:
            raise InvalidInputError(problems)
        object.__setattr__(self, "form", PoseForm(self.form))

    @property
    def valid_shape(self) -> tuple[int, int]:
        """Height and width of the region where the template box is inside the micrograph."""
        return self.shape[0] - self.template_box + 1, self.shape[1] - self.template_box + 1

    @property
    def search_space(self) -> SearchSpace:
        """A 12-degree ZYZ grid, five defoci and three pixel-size offsets."""
        return _search_space()

    @property
    def orientation_ranges(self) -> tuple[tuple[int, int], ...]:
        """Half-open range of orientations of each partial.

        Shares shrink from the first partial to the last, to about half the size.
        """
        weights = np.arange(2 * self.n_partials, self.n_partials, -1)
        ends = np.cumsum(weights) * len(self.search_space.euler_angles) // weights.sum()
        return tuple(pairwise([0, *ends.tolist()]))

    @property
    def counts(self) -> tuple[int, ...]:
        """Number of cross-correlations of each partial.

        The counts differ and add up to ``search_space.n_poses * projections_per_pose``.
        """
        space = self.search_space
        per_orientation = space.n_poses // len(space.euler_angles) * self.projections_per_pose
        return tuple((end - start) * per_orientation for start, end in self.orientation_ranges)

    @cached_property
    def truth(self) -> NDArray[np.void]:
        """Planted particles, (n_particles,) of :data:`TRUTH_DTYPE`, sorted by y, then x."""
        rng = noise.generator(self.seed, noise.TRUTH_STREAM)
        cells = self._placement_cells
        space = self.search_space
        table = np.zeros(self.n_particles, TRUTH_DTYPE)
        if self.n_particles:
            # At most one particle per cell; limited jitter keeps the minimum spacing between
            # particles of neighbouring cells.
            chosen = rng.choice(math.prod(cells), self.n_particles, replace=False)
            room = _PLACEMENT_CELL_PX - MIN_SPACING_PX + 1
            for axis, cell in zip(("y", "x"), np.unravel_index(chosen, cells), strict=True):
                jitter = rng.integers(0, room, self.n_particles)
                table[axis] = _PLACEMENT_MARGIN_PX + cell * _PLACEMENT_CELL_PX + jitter
        table["global_index"] = rng.integers(0, space.n_poses, self.n_particles)
        for name, values in zip(TRUTH_POSES, space.decode(table["global_index"]), strict=True):
            table[name] = values
        ends = [end for _, end in self.orientation_ranges]
        orientation = table["global_index"] % len(space.euler_angles)
        table["partial"] = np.searchsorted(ends, orientation, side="right")
        table["amplitude"] = rng.uniform(9.5, 13.5, self.n_particles)
        table.sort(order=("y", "x"))
        table.setflags(write=False)
        return table

    @property
    def _placement_cells(self) -> tuple[int, int]:
        """Number of rows and columns of cells that can hold one particle each."""
        inner = (max(edge - 2 * _PLACEMENT_MARGIN_PX, 0) for edge in self.valid_shape)
        height, width = (edge // _PLACEMENT_CELL_PX for edge in inner)
        return height, width

    def partial_block(self, partial: int, region: Region) -> dict[str, AnyArray]:
        """Generate the maps of one partial, by its number, in one region, which may be empty.

        Pixel values do not depend on the region. Regions made of whole 256 x 256 blocks, such as
        chunks, are fastest. The maps are those of :attr:`~ocelot_em.model.maps.MapSet.partial`,
        with their stored dtypes, without NaN and unsearched pixels.

        Raises
        ------
        InvalidInputError
            The partial does not exist, or the region extends beyond the map.
        """
        problems = []
        if not 0 <= partial < self.n_partials:
            problems.append(f"partial: expected 0 to {self.n_partials - 1}, got {partial}")
        if region != region.intersect(Region.whole(self.shape)):
            problems.append(f"region: expected pixels of a map of {self.shape}, got {region}")
        if problems:
            raise InvalidInputError(problems)
        maps = {
            name: np.empty(region.shape, MAPS[name].dtypes[0]) for name in MapSet(self.form).partial
        }
        for block in TileGrid(self.shape, (noise.BLOCK_PX, noise.BLOCK_PX)).touching(region):
            wanted = block.region.intersect(region)
            source = wanted.relative_to(block.region).slices
            target = wanted.relative_to(region).slices
            drawn = {n: v[source] for n, v in self._draw_block(partial, block.iy, block.ix).items()}
            if self.form == PoseForm.EXPLICIT:
                index = drawn.pop(INDEX)
                drawn |= {pose: table.take(index) for pose, table in _pose_tables()}
            for name, values in drawn.items():
                maps[name][target] = values
        return maps

    def _draw_block(self, partial: int, iy: int, ix: int) -> dict[str, AnyArray]:
        """Draw the indexed maps of one whole block, which may extend beyond the map."""
        shape = (noise.BLOCK_PX, noise.BLOCK_PX)
        count = self.counts[partial]
        rng = noise.generator(self.seed, noise.BLOCK_STREAM, partial, iy, ix)
        # In place where possible: allocating an array costs as much as the arithmetic here.
        mean = noise.waves(self.seed, 0, iy, ix, amplitude=0.2)
        mean += noise.waves(self.seed, 2 + partial, iy, ix, amplitude=0.1)
        # 0.84 to 1.5 and mostly near 1, as in real searches; the same for all devices.
        std = noise.waves(self.seed, 1, iy, ix, amplitude=1.0)
        std += 1
        std *= std
        std *= np.float32(0.165)
        std += np.float32(0.84)

        mip = noise.maximum_of_normals(noise.draw_rarities(rng), noise.INDEPENDENT_SHARE * count)
        mip *= std
        mip += mean
        correlation_sum = rng.standard_normal(shape, np.float32)  # error of the mean
        correlation_sum *= std
        correlation_sum *= np.float32(math.sqrt(count) / count)
        correlation_sum += mean
        squared_sum = std * std
        squared_sum += correlation_sum * correlation_sum
        squared_sum *= np.float32(count)
        correlation_sum *= np.float32(count)
        index = self._draw_poses(rng, partial, shape)

        y0, x0 = iy * noise.BLOCK_PX, ix * noise.BLOCK_PX
        block = Region(y0, y0 + noise.BLOCK_PX, x0, x0 + noise.BLOCK_PX)
        for particle in self._particles_near(partial, block):
            around = noise.window(particle)
            at = around.intersect(block).relative_to(block).slices
            profile = noise.peak_profile()[around.intersect(block).relative_to(around).slices]
            peak = mean[at] + particle["amplitude"] * std[at] * profile
            higher = peak > mip[at]
            mip[at] = np.where(higher, peak, mip[at])
            index[at] = np.where(higher, particle["global_index"], index[at])
        return {MIP: mip, INDEX: index, SUM: correlation_sum, SQUARED_SUM: squared_sum}

    def _draw_poses(self, rng: np.random.Generator, partial: int, shape: tuple[int, int]) -> Int32:
        """Draw global indices uniformly from a partial's share."""
        space = self.search_space
        n_orientations = len(space.euler_angles)
        start, end = self.orientation_ranges[partial]
        n_other = space.n_poses // n_orientations
        index = rng.integers(0, (end - start) * n_other, shape, np.int32)
        # Convert (other, orientation in share) to (other, orientation in search space).
        skipped = index // np.int32(end - start)
        skipped *= np.int32(n_orientations - (end - start))
        index += skipped
        index += np.int32(start)
        return index

    def _particles_near(self, partial: int, block: Region) -> NDArray[np.void]:
        reach = noise.PEAK_RADIUS_PX
        first, last = np.searchsorted(self.truth["y"], (block.y0 - reach, block.y1 + reach))
        band = self.truth[first:last]
        near = (band["x"] >= block.x0 - reach) & (band["x"] < block.x1 + reach)
        mine: NDArray[np.void] = band[near & (band["partial"] == partial)]
        return mine


def write_truth(simulation: Simulation, path: str | PathLike[str]) -> None:
    """Write the planted particles as CSV, with the field names of :data:`TRUTH_DTYPE` as header.

    Angles and offsets use the shortest text that reads back as the same float32. An existing file
    is replaced.
    """
    rows = [TRUTH_DTYPE.names or (), *(map(str, particle) for particle in simulation.truth)]
    write_file(Path(path), "".join(f"{','.join(row)}\n" for row in rows).encode())


def simulate(directory: str | PathLike[str], simulation: Simulation, *, n_threads: int = 1) -> Path:
    """Write a simulated search to a store, chunk by chunk, and its truth table next to it.

    Memory use is a few chunks per thread, independent of the map size. The truth table is written
    last: if it is missing, the search is incomplete.

    Parameters
    ----------
    directory
        Local directory for ``RUN.zarr``, whose path is returned, and ``truth.csv``; created if
        missing.
    simulation
        Search to write; its partials are named ``device_0``, ``device_1``, ... with leading zeros.
    n_threads
        Number of chunks generated in parallel.

    Raises
    ------
    OutputExistsError
        The directory already contains a search or a truth table; nothing is changed.
    InvalidInputError
        ``n_threads`` is below 1.

    Examples
    --------
    >>> from ocelot_em import Simulation, describe, simulate
    >>> search = simulate("demo", Simulation((300, 400), n_partials=2, n_particles=10, seed=1))
    >>> describe(search).partials
    (('device_0', 'complete', 74055), ('device_1', 'complete', 55545))
    """
    require(simulation, Simulation, "simulation: expected a Simulation")
    if n_threads < 1:
        raise InvalidInputError(f"n_threads: expected 1 or more, got {n_threads}")
    store, truth = Path(directory, STORE_NAME), Path(directory, TRUTH_NAME)
    for path in (store, truth):
        if path.exists():
            raise OutputExistsError(
                f"{path}: already there; choose another directory, or remove it first"
            )
    Path(directory).mkdir(parents=True, exist_ok=True)
    indexed = simulation.form == PoseForm.INDEXED
    info = SearchInfo(
        template_box=simulation.template_box,
        pixel_size_angstrom=PIXEL_SIZE_ANGSTROM,
        search_space=simulation.search_space if indexed else None,
        chunk_files=simulation.chunk_files,
    )
    digits = len(str(simulation.n_partials - 1))
    with ExitStack() as stack:
        writers = []
        for number, count in enumerate(simulation.counts):
            options: Any = {"total_projections": count, "order": number, "search": info}
            name = f"device_{number:0{digits}}"
            writer = PartialWriter(store, name, simulation.shape, **options)
            writers.append(stack.enter_context(writer))

        def write_chunk(which: tuple[int, Tile]) -> None:
            partial, chunk = which
            writers[partial].write(chunk.region, simulation.partial_block(partial, chunk.region))

        chunks = TileGrid(simulation.shape, writers[0].chunk)
        every = product(range(simulation.n_partials), chunks)
        deque(map_in_threads(write_chunk, every, n_threads), maxlen=0)
    write_truth(simulation, truth)
    return store


@lru_cache(maxsize=1)
def _search_space() -> SearchSpace:
    # As in real searches, psi varies slowest, and theta rows near the poles have fewer phi.
    step = 12
    rows = []
    for theta in range(0, 180 + step, step):
        n_phi = max(1, round(360 / step * math.sin(math.radians(theta))))
        rows += [(phi, theta) for phi in np.linspace(0, 360, n_phi, endpoint=False)]
    angles = [(phi, theta, psi) for psi in range(0, 360, step) for phi, theta in rows]
    space = SearchSpace.from_tables(angles, [-600.0, -300.0, 0.0, 300.0, 600.0], [-0.15, 0.0, 0.15])
    for table in (space.euler_angles, space.defocus_values, space.pixel_values):
        table.setflags(write=False)  # shared by all callers
    return space


@lru_cache(maxsize=1)
def _pose_tables() -> tuple[tuple[str, Float32], ...]:
    """Return the poses of all global indices by map; a lookup is faster than decoding."""
    space = _search_space()
    poses = space.decode(np.arange(space.n_poses, dtype=np.int32))
    return tuple(zip(POSES, poses, strict=True))
