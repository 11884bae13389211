"""A search for tests of recording: its scores are random, and known by orientation and defocus."""

import numpy as np

from ocelot_em import SearchInfo, SearchRecorder, SearchSpace
from ocelot_em.model.correlations import TABLE
from ocelot_em.model.maps import INDEX, MIP, POSES, SQUARED_SUM, SUM

N, SHAPE, BATCH = 48, (40, 56), 4
SPACE = SearchSpace.from_tables(
    np.random.default_rng(0).uniform(0, 180, (N, 3)).astype("f4"), [-100, 0], [0]
)
INFO = SearchInfo(template_box=8, pixel_size_angstrom=2.0, search_space=SPACE)
THRESHOLD, COLUMNS = 3.0, ("pos_y", "pos_x", "global_idx", "corr_value")
BATCHES = [(start, start + BATCH) for start in range(0, N, BATCH)]


def new_maps(*, explicit=False):
    """Maps of a device that has searched nothing."""
    maps = {MIP: np.full(SHAPE, -np.inf, "f4")}
    poses = dict.fromkeys(POSES, np.nan) if explicit else {INDEX: np.int32(-1)}
    maps |= {
        key: np.full(SHAPE, value, getattr(value, "dtype", "f4")) for key, value in poses.items()
    }
    return maps | {key: np.zeros(SHAPE, "f4") for key in (SUM, SQUARED_SUM)}


def new_table():
    """A correlation table of a device that has searched nothing."""
    dtypes = "i4", "i4", "i4", "f4"
    columns = {key: np.empty(0, dtype) for key, dtype in zip(COLUMNS, dtypes, strict=True)}
    return columns | {"threshold": THRESHOLD}


def search(maps, start, stop):
    """Search some orientations, and add to the maps."""
    for number in range(start, stop):
        for defocus in range(2):
            scores = np.random.default_rng([number, defocus]).normal(size=SHAPE).astype("f4")
            won, index = scores > np.asarray(maps[MIP]), number + defocus * N
            maps[MIP][won] = scores[won]
            if INDEX in maps:
                maps[INDEX][won] = index
            else:
                for key, values in zip(POSES, SPACE.decode(np.array([index])), strict=True):
                    maps[key][won] = values[0]
            maps[SUM] += scores
            maps[SQUARED_SUM] += scores**2
            if TABLE in maps:
                rows = np.nonzero(scores > THRESHOLD)
                new = *rows, np.full(len(rows[0]), index), scores[rows]
                for key, values in zip(COLUMNS, new, strict=True):
                    maps[TABLE][key] = np.concatenate([maps[TABLE][key], values])


def recorder(run, name="gpu0", maps=None, every=0, **options):
    """A recorder of such a search, and its maps."""
    maps = new_maps() if maps is None else maps
    options = {"search": INFO} | options
    return SearchRecorder(run, name, maps, every=every, **options), maps


def record(run, name="gpu0", batches=BATCHES, n=N, every=0):
    """Search some batches, and stop without a word after a number of them."""
    device, maps = recorder(run, name, every=every)
    for number, (start, stop) in enumerate(device.ranges(batches)):
        if number == n:
            return device
        search(maps, start, stop)
    device.finish()
    return device
