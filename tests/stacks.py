"""Random stacks of partial results, with all that is awkward in them, and how they are compared."""

import numpy as np
from hypothesis import strategies as st

from ocelot_em.model.maps import Accumulator, PartialMaps, PoseForm
from ocelot_em.testing.device_contract import MAP_SETS, SPACE, assert_same, assert_same_bits

__all__ = ["assert_same", "assert_same_bits"]  # how stacks are compared

TABLES = SPACE.euler_angles, SPACE.defocus_values, SPACE.pixel_values
SHAPES = [(1, 1), (1, 9), (5, 1), (3, 4), (1, 2047), (1, 2048), (1, 2049), (2, 2049), (33, 125)]
COUNTS = [0, 1, 3, 1000, 20_500_000, 2**31 + 5, 2**53 + 1]
MIPS = np.array([1, 1, 2, 2.5, -3, 0.0, -0.0, np.inf, -np.inf, 3.4e38, 1e-45], np.float32)
SUMS = np.array([0, -0.0, 1, 3, 1e7, -2, 1e-30, 3.2e38, -3.4e38, np.inf, -np.inf], np.float32)

map_sets = st.sampled_from(MAP_SETS)


def space_of(maps):
    return SPACE if maps.form is PoseForm.INDEXED else None


def sprinkle(rng, array, value, share):
    array[rng.random(array.shape) < share] = value
    return array


def draw_partial(rng, shape, maps, number, *, nan=0.0, sum_dtype=np.float32):
    """One device: mostly ties and special values, in places idle."""
    plain = rng.random() < 0.5
    mip = rng.standard_normal(shape).astype(np.float32) if plain else rng.choice(MIPS, shape)
    idle = rng.random(shape) < rng.choice([0.0, 0.2, 1.0], p=[0.5, 0.4, 0.1])
    mip[idle] = -np.inf
    if maps.form is PoseForm.INDEXED:
        pose = (rng.integers(0, SPACE.n_poses, shape, dtype=np.int32),)
        pose[0][idle | (mip == -np.inf)] = -1
    else:
        pose = tuple(
            np.where(idle, np.nan, rng.choice([0.0, -0.0, 90.0, 270.5, -1.5], shape)).astype("f4")
            for _ in maps.pose
        )
        for values in pose:
            sprinkle(rng, values, np.nan, nan)
    if plain:
        count = int(rng.choice(COUNTS[1:5]))
        sums = [rng.normal(0.1 * count, count**0.5, shape), rng.normal(2 * count, 1, shape)]
    else:
        count = COUNTS[rng.integers(len(COUNTS))]
        sums = [rng.choice(SUMS, shape), rng.choice(SUMS, shape)]
    sums = [sprinkle(rng, np.where(idle, 0, s).astype(sum_dtype), np.nan, nan) for s in sums]
    if maps.counts and rng.random() < 0.7:
        count = np.where(idle, 0, rng.integers(0, 2**40, shape))
    best = number
    if rng.random() < 0.2:  # an earlier merge of the partials up to this one
        best = np.where(idle, -1, rng.integers(0, number + 1, shape)).astype(np.int32)
    return PartialMaps(sprinkle(rng, mip, np.nan, nan), pose, *sums, count, best)


@st.composite
def stacks(draw, shapes=SHAPES, sets=map_sets, nan=False, max_partials=6):
    maps, shape = draw(sets), draw(st.sampled_from(shapes))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    share = draw(st.sampled_from([0.0, 0.001, 0.2])) if nan else 0.0
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    n = draw(st.integers(1, max_partials))
    partials = [draw_partial(rng, shape, maps, i, nan=share, sum_dtype=dtype) for i in range(n)]
    return maps, partials


def fold_each(kernels, maps, partials):
    acc = kernels.identity(partials[0].mip.shape, maps)
    reports = [kernels.fold_all(acc, [partial], space_of(maps)) for partial in partials]
    return acc, reports


def fold_at_once(kernels, maps, partials):
    acc = kernels.identity(partials[0].mip.shape, maps)
    return acc, kernels.fold_all(acc, partials, space_of(maps))


def as_partial(acc: Accumulator) -> PartialMaps:
    return PartialMaps(
        acc.mip.copy(),
        tuple(p.copy() for p in acc.pose),
        acc.correlation_sum.copy(),
        acc.correlation_squared_sum.copy(),
        acc.count if acc.count_map is None else acc.count_map.copy(),
        acc.best_partial.copy(),
    )
