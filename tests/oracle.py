"""A second, independent merge: all partials in one stack, written apart from the kernels.

It shares no code with the kernels, needs memory without bound, and is what they are held against.
"""

import numpy as np

NAMES = ("best_phi", "best_theta", "best_psi", "best_defocus", "best_pixel_size")


def _stacked(values, shape, dtype):
    return np.stack([np.broadcast_to(np.asarray(v, dtype), shape) for v in values])


def _pick(stack, winner):
    return np.take_along_axis(stack, winner[None], axis=0)[0]


def _total(terms, shape):
    total = np.zeros(shape, np.float64)
    with np.errstate(all="ignore"):
        for term in terms:
            total = total + np.asarray(term).astype(np.float64)
    return total


def merge(partials, tables=None):
    """Merge all partials at once; the maps by name, counts always as a map.

    ``tables`` (angles, defocus, pixel sizes) says that poses are indexed.
    """
    shape = partials[0].mip.shape
    mips = _stacked([p.mip for p in partials], shape, np.float32)
    comparable = np.where(np.isnan(mips), np.float32(-np.inf), mips)
    numbers = _stacked([p.best_partial for p in partials], shape, np.int32)
    if tables is None:
        winner = comparable.argmax(axis=0)
    else:
        indices = _stacked([p.pose[0] for p in partials], shape, np.int32)
        winner = np.lexsort((indices, -comparable), axis=0)[0]
    idle = _pick(comparable, winner) == -np.inf
    out = {
        "mip": np.where(idle, np.float32(-np.inf), _pick(mips, winner)),
        "best_partial": np.where(idle, np.int32(-1), _pick(numbers, winner)),
    }
    if tables is None:
        for name, *maps in zip(NAMES, *(p.pose for p in partials), strict=False):
            picked = _pick(_stacked(maps, shape, np.float32), winner)
            out[name] = np.where(idle, np.float32(np.nan), picked)
    else:
        index = np.where(idle, np.int32(-1), _pick(indices, winner))
        out["best_global_index"] = index
        angles, defocus, pixel = tables
        where = np.unravel_index(np.maximum(index, 0), (len(pixel), len(defocus), len(angles)))
        decoded = (*angles[where[2]].transpose(2, 0, 1), defocus[where[1]], pixel[where[0]])
        for name, pose in zip(NAMES, decoded, strict=True):
            out[name] = np.where(index < 0, np.float32(np.nan), pose)

    total = _total([p.correlation_sum for p in partials], shape)
    squared_total = _total([p.correlation_squared_sum for p in partials], shape)
    counts = np.zeros(shape, object)  # Python's integers: exact whatever their size
    for partial in partials:
        counts = counts + np.broadcast_to(np.asarray(partial.count, object), shape)
    floats = counts.astype(np.float64)
    with np.errstate(all="ignore"):
        mean = total / floats
        variance = squared_total / floats - np.square(mean)
        variance[variance < 0] = 0.0
        std = np.sqrt(variance)
        z = (out["mip"].astype(np.float64) - mean) / std
        z[std == 0] = 0.0
        z[idle] = np.nan
        mean[counts == 0] = std[counts == 0] = np.nan
        out |= {
            "scaled_mip": z.astype(np.float32),
            "correlation_mean": mean.astype(np.float32),
            "correlation_std": std.astype(np.float32),
            "correlation_sum": total.astype(np.float32),
            "correlation_squared_sum": squared_total.astype(np.float32),
        }
    return out | {"total_projections": counts}


def bad_pixels(partial):
    """How many pixels hold NaN or infinities; what a pose is without a correlation is all one."""
    bad = {tuple(at) for at in np.argwhere(np.isnan(partial.mip) | np.isposinf(partial.mip))}
    for values in (partial.correlation_sum, partial.correlation_squared_sum):
        bad |= {tuple(at) for at in np.argwhere(np.isnan(values) | np.isinf(values))}
    for pose in partial.pose:
        if pose.dtype.kind == "f":
            for y, x in np.argwhere(np.isnan(pose) | np.isinf(pose)):
                if not np.isneginf(partial.mip[y, x]):
                    bad.add((y, x))
    return len(bad)


def invalid_indices(partial, n_poses):
    """How many pixels have an index that no search could have written there."""
    invalid = 0
    for mip, index in zip(
        partial.mip.ravel().tolist(), partial.pose[0].ravel().tolist(), strict=True
    ):
        idle = mip == -np.inf or mip != mip
        invalid += not (0 <= index < n_poses or (index == -1 and idle))
    return invalid


def drop_bad(partials):
    """Per pixel ((y, x), list): one-pixel cuts of the partials that are usable there."""
    for y, x in np.ndindex(partials[0].mip.shape):
        here = []
        for partial in partials:
            cut = type(partial)(
                mip=partial.mip[y : y + 1, x : x + 1],
                pose=tuple(p[y : y + 1, x : x + 1] for p in partial.pose),
                correlation_sum=partial.correlation_sum[y : y + 1, x : x + 1],
                correlation_squared_sum=partial.correlation_squared_sum[y : y + 1, x : x + 1],
                count=int(np.broadcast_to(partial.count, partial.mip.shape)[y, x]),
                best_partial=int(np.broadcast_to(partial.best_partial, partial.mip.shape)[y, x]),
            )
            if not bad_pixels(cut):
                here.append(cut)
        yield (y, x), here
