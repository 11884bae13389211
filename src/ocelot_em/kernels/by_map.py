"""The merge for the CPU, one map at a time: for maps that arrive one after another.

First the highest correlations of all partials say which partial wins each pixel; then each map can
be merged alone, while it is in the caches, and is done with when its last partial has come. Same
bits as folding partial by partial (:mod:`ocelot_em.kernels.reference`).

All arrays are C-contiguous and of one size. Winners are numbers of partials, int16, -1 where no
partial has searched. Functions that return a boolean say whether a value needs a closer look: NaN,
or an index out of range.
"""

from typing import Any

import numpy as np

from ocelot_em.kernels.compiling import compiled
from ocelot_em.model.maps import NOT_SEARCHED


@compiled
def contest(new: Any, number: Any, mip: Any, winner: Any) -> Any:
    """Let a partial win where its ``mip`` is higher; -inf and NaN never win."""
    any_nan = np.int32(0)
    for i in range(mip.size):
        value, old, won_before = new[i], mip[i], winner[i]
        won = value > old
        mip[i] = value if won else old
        winner[i] = number if won else won_before
        any_nan |= np.int32(value != value)
    return any_nan != 0


@compiled
def contest_first(new: Any, mip: Any, winner: Any) -> Any:
    """As :func:`contest` of the first partial, whatever is in the memory of the others."""
    any_nan = np.int32(0)
    for i in range(mip.size):
        value = new[i]
        won = value > -np.inf
        mip[i] = value if won else np.float32(-np.inf)
        winner[i] = np.int16(0) if won else np.int16(-1)
        any_nan |= np.int32(value != value)
    return any_nan != 0


@compiled
def contest_indexed(new: Any, new_index: Any, number: Any, n_poses: Any, kept: Any) -> Any:
    """As :func:`contest`, with equal correlations going to the lower index.

    ``kept`` are the ``mip``, the index and the winner.
    """
    mip, index, winner = kept
    bad = np.int32(0)
    for i in range(mip.size):
        value, old, won_before = new[i], mip[i], winner[i]
        candidate, old_index = new_index[i], index[i]
        searched = value > -np.inf
        won = (value > old) | ((value == old) & (candidate < old_index) & searched)
        mip[i] = value if won else old
        index[i] = candidate if won else old_index
        winner[i] = number if won else won_before
        bad |= np.int32(value != value) | np.int32(
            (candidate < NOT_SEARCHED)
            | (candidate >= n_poses)
            | ((candidate == NOT_SEARCHED) & searched)
        )
    return bad != 0


@compiled
def take(new: Any, number: Any, winner: Any, kept: Any) -> Any:
    """Take the values of a partial where it won; whether any of its values is NaN."""
    any_nan = np.int32(0)
    for i in range(kept.size):
        value, old, won = new[i], kept[i], winner[i] == number
        kept[i] = value if won else old
        any_nan |= np.int32(value != value)
    return any_nan != 0


@compiled
def has_nan(values: Any) -> Any:
    """Whether any value is NaN."""
    any_nan = np.int32(0)
    for i in range(values.size):
        value = values[i]
        any_nan |= np.int32(value != value)
    return any_nan != 0


@compiled
def count_unsearched(winner: Any) -> int:
    """In how many pixels nobody won."""
    count = 0
    for i in range(winner.size):
        count += int(winner[i] < 0)
    return count


@compiled
def blank(winner: Any, kept: Any) -> None:
    """Set NaN where nobody won."""
    for i in range(kept.size):
        old = kept[i]
        kept[i] = np.float32(np.nan) if winner[i] < 0 else old


@compiled
def number_winners(winner: Any, numbers: Any, best_partial: Any) -> None:
    """Look up what the winners are called; -1 where nobody won."""
    for i in range(winner.size):
        won = winner[i]
        best_partial[i] = numbers[won] if won >= 0 else np.int32(NOT_SEARCHED)


@compiled
def take_number(new: Any, first: Any, number: Any, winner: Any, best_partial: Any) -> None:
    """Take the numbers of a partial that has several in it, counted from ``first``."""
    for i in range(winner.size):
        value, old = new[i], best_partial[i]
        best_partial[i] = first + value if winner[i] == number else old


@compiled
def add(new: Any, total: Any) -> Any:
    """Add in float64; whether any new value is NaN."""
    any_nan = np.int32(0)
    for i in range(total.size):
        value, old = new[i], total[i]
        total[i] = old + np.float64(value)
        any_nan |= np.int32(value != value)
    return any_nan != 0


@compiled
def add_first(new: Any, total: Any) -> Any:
    """As :func:`add` to a total of 0 everywhere, whatever is in its memory."""
    any_nan = np.int32(0)
    for i in range(total.size):
        value = new[i]
        total[i] = 0.0 + np.float64(value)  # -0.0 becomes 0.0, as if it were added
        any_nan |= np.int32(value != value)
    return any_nan != 0
